"""Files of torch.save, in both of its formats, read without trusting them; and the plain pickles of model zoos."""

import io
import struct
import zipfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .names import CheckpointError
from .restricted_pickle import STORAGE_DTYPES, Global, RestrictedUnpickler, Source, Storage

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # the first pickle of torch.save before 1.6; its version is the second
LEGACY_VERSION = 1001


def read_object(file: BinaryIO) -> Any:
    """What a file of torch.save or a plain pickle contains; which one it is, the file itself says.

    Raises:
        CheckpointError: it asks for something else than data.
        Exception: it is damaged; of any class.
    """
    source = Source(file)
    if file.read(2) == b"PK":
        return read_zip(source)
    file.seek(0)
    first = RestrictedUnpickler(source, load_bytes=_read_bytes).load()
    # Compared as numbers alone: a container may compare as anything.
    return read_legacy(source) if type(first) is int and first == MAGIC_NUMBER else first


def _read_bytes(data: bytes) -> Any:
    return read_object(io.BytesIO(data))


def read_zip(source: Source) -> Any:
    """torch.save since 1.6: an archive of one pickle and one file per storage, none of them compressed."""
    with zipfile.ZipFile(source.file) as archive:
        records = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in records if f"/{name}".endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError("the archive has no single data.pkl, so it is not one of torch.save")
    root = roots[0]
    if f"{root}byteorder" in records and _record(source, records[f"{root}byteorder"]).numpy().tobytes() != b"little":
        raise CheckpointError("it was written on a machine of another byte order; save it anew on a common one")
    storages: dict[str, Tensor] = {}

    def load_storage(reference) -> Storage:
        dtype, name, count = _storage_reference(reference)
        if name not in storages:
            storages[name] = _record(source, records[f"{root}data/{name}"])
        return _storage(storages[name], dtype, count)

    content = _record(source, records[f"{root}data.pkl"]).numpy().tobytes()
    return RestrictedUnpickler(Source(io.BytesIO(content)), load_storage, _read_bytes).load()


def _record(source: Source, info: zipfile.ZipInfo) -> Tensor:
    """The bytes of one file of the archive. Check sums are not compared: torch.save may be told to leave them out."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise CheckpointError(
            f"{info.filename} in the archive is compressed or encrypted, which torch.save never does"
        )
    source.file.seek(info.header_offset)
    lengths = struct.unpack("<HH", source.read(30)[26:])  # of name and extra field, which the data follow
    source.read(sum(lengths))
    return _bytes(source, info.file_size)


def _bytes(source: Source, count: int) -> Tensor:
    source.spend(count)
    if count > source.length - source.tell():
        raise CheckpointError(f"it states {count} bytes of data where {source.length - source.tell()} are left")
    data = torch.empty(count, dtype=torch.uint8)
    _fill(source, data)
    return data


def _fill(source: Source, data: Tensor):
    if source.file.readinto(memoryview(data.numpy())) != len(data):
        raise CheckpointError("it ends in the middle of a tensor")


def _storage_reference(reference) -> tuple[torch.dtype, str, int]:
    """("storage", type, name, device, number of elements), and in the legacy format None, for no view of another."""
    if type(reference) is not tuple or len(reference) < 5 or any(part is not None for part in reference[5:]):
        raise CheckpointError("the pickle refers to something outside itself that is not a storage")
    _, kind, name, _, count = reference[:5]
    dtype = STORAGE_DTYPES.get(kind.name) if isinstance(kind, Global) else None
    if dtype is None or type(name) is not str or type(count) is not int or count < 0:
        raise CheckpointError("the pickle refers to a storage without a dtype, name or number of elements")
    return dtype, name, count


def _storage(data: Tensor, dtype: torch.dtype, count: int) -> Storage:
    if count * dtype.itemsize != len(data):
        raise CheckpointError(f"a storage of {count} x {dtype} has {len(data)} bytes of data")
    return Storage(data, dtype)


def read_legacy(source: Source) -> Any:
    """torch.save before 1.6, and inside pickles: five pickles, then each storage's number of elements and bytes."""
    version, system = RestrictedUnpickler(source).load(), RestrictedUnpickler(source).load()
    if version != LEGACY_VERSION or type(system) is not dict or system.get("little_endian") is not True:
        raise CheckpointError("it is of another version of torch.save, or of a machine of another byte order")
    storages: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def load_storage(reference) -> Storage:
        dtype, name, count = _storage_reference(reference)
        if name not in storages:
            source.spend(count * dtype.itemsize)
            storages[name] = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
            counts[name] = count
        return _storage(storages[name], dtype, count)

    content = RestrictedUnpickler(source, load_storage, _read_bytes).load()
    names = RestrictedUnpickler(source).load()
    if type(names) is not list or not all(type(name) is str for name in names) or sorted(names) != sorted(storages):
        raise CheckpointError("its storages are not those that its tensors need")
    for name in names:
        (count,) = struct.unpack("<q", source.read(8))
        if count != counts[name]:
            raise CheckpointError(f"a storage of {counts[name]} elements has {count}")
        _fill(source, storages[name])
    return content
