"""What malicious and damaged checkpoint files do: nothing. Mutated ones: tests/fuzz."""

import io
import pickle
import resource
import sys
import zipfile

import numpy as np
import pytest
import torch

from mask2former_hf.conversion import restricted_pickle
from mask2former_hf.conversion.checkpoint_files import read_checkpoint
from mask2former_hf.conversion.names import CheckpointError

MARK, STOP = b"(", b"."
MEBIBYTE = 2**20 if sys.platform == "darwin" else 2**10  # in `ru_maxrss`'s unit


def op(value) -> bytes:
    """The operations that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + MARK + b"".join(arguments) + b"tR"


def dtype(code: str, state: bytes = op((3, "<", None, None, None, -1, -1, 0))) -> bytes:
    return call("numpy", "dtype", op(code), op(0), op(1)) + state + b"b"


def array(shape: bytes, kind: bytes, data: bytes) -> bytes:
    made = call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n", op((0,)), op("b"))
    return made + MARK + op(1) + shape + kind + op(False) + data + b"tb"


def text(data: bytes) -> bytes:
    """As Python 2 writes bytes."""
    return b"T" + len(data).to_bytes(4, "little") + data


def pickled(value: bytes, name: bytes = op("x")) -> bytes:
    return b"\x80\x02}" + name + value + b"s" + STOP


def tensor(offset=0, size=(2,), stride=(1,), count=4, kind="FloatStorage", name="0") -> bytes:
    storage = MARK + op("storage") + b"ctorch\n" + kind.encode() + b"\n" + op(name) + op("cpu") + op(count) + b"tQ"
    parts = (storage, op(offset), op(size), op(stride), op(False), call("collections", "OrderedDict"))
    return call("torch._utils", "_rebuild_tensor_v2", *parts)


def archive(content: bytes, data: bytes = bytes(16), **options) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as records:
        records.writestr("archive/data.pkl", content)
        records.writestr("archive/data/0", data)
    return file.getvalue()


@pytest.fixture
def read(tmp_path):
    def read_bytes(content: bytes, name: str = "x.pkl"):
        (tmp_path / name).write_bytes(content)
        return read_checkpoint(tmp_path / name).tensors

    return read_bytes


FOUR = text(np.arange(4, dtype="<f4").tobytes())


def test_the_handmade_files_below_are_sound_until_something_is_wrong_with_them(read):
    assert read(pickled(array(op((2, 2)), dtype("f4"), FOUR)))["x"].tolist() == [[0, 1], [2, 3]]  # Python 2's form
    data = np.arange(4, dtype="f4").tobytes()
    assert read(archive(pickled(tensor(offset=1, stride=(2,))), data), "x.pth")["x"].tolist() == [1, 3]


NO_STATE = (op(3), op((3,)), op((3, "?")), op((3, ["<"])), op({"names": ["a"]}))


@pytest.mark.parametrize(
    "value, message",
    [
        (
            array(op((2,)), dtype("O8"), op([1])),
            "dtype 'O8'",
        ),  # NumPy reads as many pointers as the shape says: a crash
        (array(op((2,)), dtype("f4"), op([1, 2])), "not bytes"),
        (array(op((1,)), dtype("U4"), text(bytes(16))), "dtype 'U4'"),
        (array(op((2,)), dtype("f4,O"), text(bytes(24))), "dtype 'f4,O'"),
        (array(op((5,)), dtype("f4"), FOUR), "states 5 elements; its data are 4"),
        (array(op((3,)), dtype("f4"), FOUR), "has 16 bytes of data"),
        (array(op((10**12,)), dtype("f4"), FOUR), "states 1000000000000 elements"),
        (array(op((2**32, 2**32)), dtype("f4"), FOUR), "states 18446744073709551616 elements"),
        (array(op((-4,)), dtype("f4"), FOUR), "negative"),
        (array(op((4.0,)), dtype("f4"), FOUR), "no whole number"),
        (array(op((1,) * 40), dtype("f4"), FOUR), "up to 32"),
        (array(op((4,)), op("f4"), FOUR), "not bytes of a dtype"),
        (call("numpy.core.multiarray", "_reconstruct", op(0), op((10**12,)), op("b")) + op(3) + b"b", "a state"),
        (call("numpy.core.numeric", "_frombuffer", FOUR, dtype("f8"), op((4,)), op("C")), "not bytes"),
        (call("numpy.core.numeric", "_frombuffer", b"C\x02ab", dtype("f8"), op((4,)), op("C")), "its data are 0"),
        *((dtype("f4", state), "not a byte order") for state in NO_STATE),
        (b"r\xff\xff\xff\x7f" + op(1), "damaged|not tensors"),  # a memo of 2**31 entries, if it were a list
        (b"\x8e" + (10**12).to_bytes(8, "little") + b"x", "states 1000000000000 bytes where"),
        (b"cos\nsystem\n" + op(("true",)) + b"R", "os.system"),
        (op("os") + b"]\x93", "a name that is no text"),
        (b"cnumpy\nndarray\n" + op(()) + b"\x81", "NEWOBJ"),
        (b"ctorch\nFloatStorage\n" + op(()) + b"R", "calls what is no function"),
        (op([1]) + op({"append": 1}) + b"b", "sets the state of a list"),
        (op("a") + b"Q", "outside itself"),
        (b"e", "damaged"),
    ],
)
def test_a_pickle_that_asks_for_more_than_data_is_refused(value, message, read):
    with pytest.raises(CheckpointError, match=message):
        read(pickled(value))


@pytest.mark.parametrize(
    "value, message",
    [
        (tensor(size=(5,), count=5), "storage of 5 x torch.float32 has 16 bytes"),  # torch < 2.10 reads foreign memory
        (tensor(size=(10**12,), count=10**12), "has 16 bytes"),
        (tensor(size=(10**12,), stride=(0,)), "states 1000000000000 elements"),
        (tensor(size=(2,), stride=(4,)), "ends outside its 4 elements"),
        (tensor(offset=3), "ends outside"),
        (tensor(offset=-1), "no offset"),
        (tensor(size=(2, 2)), r"size \(2, 2\) and stride \(1,\) has no stride per side"),
        (tensor(size=(2,), stride=(-1,)), "negative"),
        (tensor(size=(2,), stride=(2**47 * 2**40,)), "absurdly large"),
        (tensor(kind="Size"), "without a dtype"),
        (tensor(name="9"), "archive/data/9"),
        (call("torch._utils", "_rebuild_tensor_v2", op(1), op(0), op((1,)), op((1,)), op(0), op(0)), "no storage"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(value, message, read):
    with pytest.raises(CheckpointError, match=message):
        read(archive(pickled(value)), "x.pth")


def test_an_archive_that_torch_save_does_not_write_is_refused(read):
    bomb = archive(pickled(tensor(count=2**22)), bytes(2**24), compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**16
    with pytest.raises(CheckpointError, match="compressed"):
        read(bomb, "x.pth")
    with pytest.raises(CheckpointError, match="no single data.pkl"):
        read(archive(b"").replace(b"data.pkl", b"code.pkl"), "x.pth")


def test_many_storages_in_one_place_of_the_file_are_refused(read):
    """1000 names for one record of 100 kB would take 100 MB."""
    file, count = io.BytesIO(), 1000
    with zipfile.ZipFile(file, "w") as records:
        value = b"".join(op(f"x{i}") + tensor(count=25_000, name=str(i)) for i in range(count))
        records.writestr("a/data.pkl", b"\x80\x02}" + MARK + value + b"u.")
        records.writestr("a/data/0", bytes(100_000))
        first = records.getinfo("a/data/0")
        for i in range(1, count):
            info = zipfile.ZipInfo(f"a/data/{i}")
            info.header_offset, info.file_size, info.compress_size = first.header_offset, 100_000, 100_000
            info.CRC = first.CRC
            records.filelist.append(info)
    with pytest.raises(CheckpointError, match="more memory than its .* bytes justify"):
        read(file.getvalue(), "x.pth")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(pickled(op(1), b")" + b"\x85" * 300_000), id="a key that is too deep to hash"),
        pytest.param(pickled(op("a" * 100_000) + b"q\x01" + call("_codecs", "encode", b"h\x01", op("latin1")) * 3000),
                     id="text copied many times"),
        pytest.param(pickled(op(()) + b"\x85" * 300_000), id="a value that is deep"),
    ],
)  # fmt: skip
def test_structures_made_to_exhaust_the_reader_are_refused(content, read):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        read(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * MEBIBYTE


def test_a_pickle_of_more_operations_than_any_checkpoint_has_is_refused(read, monkeypatch):
    monkeypatch.setattr(restricted_pickle, "MOST_OPERATIONS", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 operations"):
        read(pickled(b"]" * 1000))


@pytest.mark.parametrize("damage", ["count", "missing", "short", "order"])
def test_a_legacy_file_whose_storages_do_not_fit_is_refused(damage, read):
    file = io.BytesIO()
    torch.save({"model": {"x": torch.arange(3.0), "y": torch.arange(2)}}, file, _use_new_zipfile_serialization=False)
    content = file.getvalue()
    assert read(content, "x.pth")["y"].tolist() == [0, 1]
    count, data = (3).to_bytes(8, "little"), np.arange(3, dtype="<f4").tobytes()
    assert count + data in content
    broken = {
        "count": content.replace(count + data, (10**12).to_bytes(8, "little") + data),
        "missing": content.replace(op("x")[:-2], op("z")[:-2]).replace(b"e.", b"0.", 1),
        "short": content[:-3],
        "order": content.replace(b"little_endian", b"little_Endian"),
    }[damage]
    with pytest.raises(CheckpointError):
        read(broken, "x.pth")


def test_everything_that_torch_save_writes_of_a_state_is_read(read):
    base = torch.arange(12.0).view(3, 4)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "an attribute"
    state = {
        "view": base[1:, ::2],
        "columns": base.t(),
        "parameter": parameter,
        "uint16": torch.ones(3).to(torch.uint16),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "empty": base[:0],
        "scalar": torch.tensor(True),
        "base": base,
    }
    for zipped in (True, False):
        file = io.BytesIO()
        content = {"model": state, "size": base.shape, "dtype": torch.float16, "device": base.device, "lr": {0: [0.1]}}
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        found = read(file.getvalue(), "x.pth")
        for name, tensor in state.items():
            assert found[name].dtype == tensor.dtype and not found[name].requires_grad
            assert found[name].shape == tensor.shape and found[name].tolist() == tensor.tolist(), name
        assert found["view"].untyped_storage().data_ptr() == found["base"].untyped_storage().data_ptr()


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_the_other_byte_order_and_by_columns_are_read(protocol, read):
    numbers = np.arange(6, dtype=">f8").reshape(2, 3)
    arrays = {"order": numbers, "columns": np.asfortranarray(numbers), "none": numbers[:0]}
    found = read(pickle.dumps({"model": arrays}, protocol))
    assert all(found[name].tolist() == array.tolist() for name, array in arrays.items())
