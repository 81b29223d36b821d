"""A reader of pickles that builds data and nothing else, whatever the file says.

Not by restricting the globals of `pickle.Unpickler` or by `torch.load(weights_only=True)`: both believe the file's
numbers and structure. Ten bytes (a memo of a large number) take gigabytes, three megabytes of nested tuples as a key
end the process in `hash`, and `ndarray.__setstate__` of a list that is too short reads foreign memory (CPython 3.11,
torch 2.13, NumPy 2.4). Here a global of the file is only ever a name, the functions below stand for the few names that
tensors need, and they check every number before anything is made of it.
"""

import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .names import CheckpointError

# A training checkpoint of 1000 parameters with its optimizer has 0.2 million; each takes up to 200 bytes of memory.
MOST_OPERATIONS = 10_000_000
MOST_DIMENSIONS = 32  # NumPy 1's own limit
NUMBERS = re.compile(r"b1|[iu][1248]|f[248]")  # dtypes of arrays; no objects, no text
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
VIEWED_DTYPES = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
LITERALS = set(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Source:
    """A file that gives no more than it has, and counts what is made of it.

    Args:
        file: seekable, in binary mode; read from its beginning.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.length = file.seek(0, 2)
        file.seek(0)
        # Every byte of a sound file is copied at most twice: from text to bytes, and to an array or tensor.
        self.budget = 2 * self.length

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self.length - self.tell():
            raise CheckpointError(f"it states {count} bytes where {self.length - self.tell()} are left")
        return self.file.read(count)

    def readline(self) -> bytes:
        return self.file.readline()

    def tell(self) -> int:
        return self.file.tell()

    def spend(self, count: int):
        """Refuse to make more of a file than its size justifies, as by copying one text a million times."""
        self.budget -= count
        if self.budget < 0:
            raise CheckpointError(f"it asks for more memory than its {self.length} bytes justify")


@dataclass(frozen=True, slots=True)
class Global:
    """A name in the pickle. Nothing is imported for it."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Memory that tensors share: its bytes, and the dtype in which the file counts them."""

    data: Tensor  # (bytes,) uint8
    dtype: torch.dtype


class RestrictedUnpickler:
    """Builds dicts, lists, numbers, text, arrays of numbers and tensors of one pickle.

    Args:
        source: where the pickle begins; it is read up to its end and no further.
        load_storage: gives the storage for a persistent id; None refuses data outside the pickle.
        load_bytes: reads a file of torch.save inside the pickle.
    """

    def __init__(
        self,
        source: Source,
        load_storage: Callable[[Any], Storage] | None = None,
        load_bytes: Callable[[bytes], Any] | None = None,
    ):
        self.source, self.load_storage, self.load_bytes = source, load_storage, load_bytes
        self.stack, self.outer, self.memo = [], [], {}  # `outer`: the stacks below each mark
        self.functions = {
            ("collections", "OrderedDict"): self.ordered_dict,
            ("numpy", "dtype"): numpy_dtype,
            ("_codecs", "encode"): self.encode,
            ("__builtin__", "bytes"): lambda: b"",  # how protocol 2 writes no bytes
            ("torch", "Size"): lambda sides: sides,
            ("torch", "device"): lambda name, *index: name,
            ("torch._utils", "_rebuild_tensor"): tensor,
            ("torch._utils", "_rebuild_tensor_v2"): tensor_v2,
            ("torch._utils", "_rebuild_tensor_v3"): tensor_v3,
            ("torch._utils", "_rebuild_parameter"): lambda data, *unused: data,
            ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *unused: data,
            ("torch._tensor", "_rebuild_from_type_v2"): lambda made_by, kind, given, state: self.call(made_by, given),
            ("torch.storage", "_load_from_bytes"): self.nested,
        }
        for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
            self.functions[core + ".multiarray", "_reconstruct"] = lambda *unused: np.zeros(0, np.uint8)
            self.functions[core + ".numeric", "_frombuffer"] = self.array

    def load(self) -> Any:
        """The object.

        Raises:
            CheckpointError: the pickle asks for something else.
            Exception: it is damaged; of any class.
        """
        for count, (operation, argument, _) in enumerate(pickletools.genops(self.source)):
            if operation.name == "STOP":
                break
            if count == MOST_OPERATIONS:
                raise CheckpointError(f"it has more than {count} operations; a file of tensors has far fewer")
            self.step(operation.name, argument)
        return self.stack.pop()

    def step(self, name: str, argument):
        if name in LITERALS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in TUPLES:
            self.stack.append(tuple(self.pop(TUPLES[name])))
        elif name == "MARK":
            self.outer.append(self.stack)
            self.stack = []
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(self.named(*argument.split(" ", 1)))
        elif name not in ("PROTO", "FRAME"):
            self.build(name)

    def build(self, name: str):
        """The operations that take what is on the stack."""
        if name in ("TUPLE", "LIST"):
            items = self.pop_to_mark()
            self.stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = self.pop_to_mark() if name.endswith("S") else self.pop(1)
            container = self.stack[-1]
            if type(container) is list and name != "ADDITEMS":
                container.extend(items)
            elif type(container) is set and name == "ADDITEMS":
                container.update(map(key, items))
            else:
                raise CheckpointError(f"it adds items to a {type(container).__name__}")
        elif name in ("DICT", "SETITEM", "SETITEMS"):
            items = self.pop(2) if name == "SETITEM" else self.pop_to_mark()
            if name == "DICT":
                self.stack.append({})
            if type(self.stack[-1]) is not dict:
                raise CheckpointError(f"it sets items of a {type(self.stack[-1]).__name__}")
            self.stack[-1].update(zip(map(key, items[::2]), items[1::2], strict=True))
        elif name == "STACK_GLOBAL":
            self.stack.append(self.named(*self.pop(2)))
        elif name == "REDUCE":
            self.stack.append(self.call(*self.pop(2)))
        elif name == "BUILD":
            (state,) = self.pop(1)
            self.set_state(self.stack[-1], state)
        elif name == "BINPERSID" and self.load_storage is not None:
            self.stack.append(self.load_storage(*self.pop(1)))
        elif name in ("BINPERSID", "PERSID"):
            raise CheckpointError("the pickle refers to data outside itself, which a file of tensors does not need")
        else:
            raise CheckpointError(f"the pickle uses the operation {name}, which is not needed for tensors")

    def pop(self, count: int) -> list:
        items = self.stack[-count:]
        if len(items) < count:
            raise CheckpointError("it takes what is not there")
        del self.stack[-count:]
        return items

    def pop_to_mark(self) -> list:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def named(self, module: str, name: str) -> Global | torch.dtype:
        if type(module) is not str or type(name) is not str:
            raise CheckpointError("the pickle asks for something by a name that is no text")
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) not in self.functions and (module, name) not in DATA_GLOBALS:
            raise CheckpointError(
                f"the pickle asks for {module:.80}.{name:.80}, which is not needed for tensors and may run code; "
                "nothing was run. If you trust the file, save its tensors anew as {'model': state_dict}, by torch.save"
            )
        return Global(module, name)

    def call(self, function: Global, arguments: tuple):
        if not isinstance(function, Global) or (function.module, function.name) not in self.functions:
            raise CheckpointError("the pickle calls what is no function")
        self.source.spend(len(arguments))
        return self.functions[function.module, function.name](*arguments)

    def ordered_dict(self, items: list = ()) -> dict:
        self.source.spend(len(items))
        return {key(name): value for name, value in items}

    def encode(self, text: str, encoding: str) -> bytes:
        """Bytes as protocols below 3 write them."""
        if type(text) is not str or type(encoding) is not str or encoding != "latin1":
            raise CheckpointError("it encodes something else than text, or in another way than as latin1")
        self.source.spend(len(text))
        return text.encode("latin1")

    def nested(self, data: bytes):
        if self.load_bytes is None:
            raise CheckpointError("it has a file of torch.save where none belongs")
        self.source.spend(len(data))
        return self.load_bytes(data)

    def array(self, data: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str, *unused) -> np.ndarray:
        """NumPy's `_frombuffer`, of protocol 5."""
        self.source.spend(len(data))
        check_data(data, dtype, shape)
        return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")

    def set_state(self, value, state):
        """What a pickle sets after making an object; NumPy's own method gets it only if NumPy itself writes such."""
        if isinstance(value, np.dtype):
            if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "|"):
                raise CheckpointError("a dtype has a state that is not a byte order")
            value.__setstate__((3, state[1], None, None, None, -1, -1, 0))
        elif isinstance(value, np.ndarray):
            if type(state) is not tuple or len(state) != 5:
                raise CheckpointError("an array has a state that is not (version, shape, dtype, order, data)")
            _, shape, dtype, by_columns, data = state
            data = data.encode("latin1") if isinstance(data, str) else data  # Python 2
            self.source.spend(len(data))
            check_data(data, dtype, shape)
            value.__setstate__((1, shape, dtype, bool(by_columns), bytes(data)))
        elif type(value) is not dict:  # of an OrderedDict: its attributes, such as `_metadata`; nobody reads them
            raise CheckpointError(f"it sets the state of a {type(value).__name__}")


DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*STORAGE_DTYPES.values(), *VIEWED_DTYPES)}
# Globals that stand as arguments.
DATA_GLOBALS = {("torch", name) for name in (*STORAGE_DTYPES, "Tensor")} | {
    ("numpy", "ndarray"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.storage", "UntypedStorage"),
}


def key(value):
    """Text and numbers. Other keys are compared and hashed by recursion, which deep ones make crash."""
    if value is not None and type(value) not in (str, bytes, int, float, bool):
        raise CheckpointError(f"it has a {type(value).__name__} as a key; keys are text or numbers")
    if type(value) is int and abs(value) >= 2**64:  # Python does not print numbers of more than 4300 digits
        raise CheckpointError("it has a number of more than 64 bits as a key")
    return value


def element_count(shape, *, most: int, what: str = "shape") -> int:
    """The product of sides that are whole numbers, none of them negative or absurd."""
    if type(shape) is not tuple or len(shape) > MOST_DIMENSIONS:
        raise CheckpointError(f"{what} of an array is not a tuple of up to {MOST_DIMENSIONS} whole numbers")
    if not all(type(side) is int and 0 <= side < 2**48 for side in shape):
        raise CheckpointError(f"{what} of an array has a side that is no whole number, negative or absurdly large")
    count = math.prod(shape)
    if count > most:
        raise CheckpointError(f"{what} {shape} of an array states {count} elements; its data are {most}")
    return count


def numpy_dtype(code: str, *unused) -> np.dtype:
    if type(code) is not str or not NUMBERS.fullmatch(code):
        name = code[:40] if type(code) is str else type(code).__name__
        raise CheckpointError(f"it has an array of dtype {name!r}; only numbers are read")
    return np.dtype(code, copy=True)  # an object of its own: `set_state` changes its byte order


def check_data(data, dtype, shape):
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, np.dtype):
        raise CheckpointError("the data of an array are not bytes of a dtype")
    count = element_count(shape, most=len(data) // dtype.itemsize)
    if count * dtype.itemsize != len(data):
        raise CheckpointError(f"an array of shape {shape} and {dtype} has {len(data)} bytes of data")


def tensor(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], dtype=None) -> Tensor:
    """A view of a storage, which must hold as many elements as the tensor has."""
    if not isinstance(storage, Storage):
        raise CheckpointError("a tensor has no storage")
    flat = storage.data.view(dtype or storage.dtype)
    count = element_count(size, most=len(flat), what="size")
    element_count(stride, most=math.inf, what="stride")
    if type(offset) is not int or offset < 0 or len(stride) != len(size):
        raise CheckpointError(f"a tensor of size {size} and stride {stride} has no stride per side, or no offset")
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if count and last >= len(flat):
        raise CheckpointError(f"a tensor of size {size} and stride {stride} ends outside its {len(flat)} elements")
    return flat.as_strided(size, stride, offset) if count else flat.new_empty(size)


def tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None) -> Tensor:
    return tensor_v3(storage, offset, size, stride, requires_grad, hooks, None, metadata)


def tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> Tensor:
    """Of uint16 and the like, whose storages have no dtype."""
    if metadata:
        raise CheckpointError("a tensor is a conjugate or negative view; save its .resolve_neg().resolve_conj()")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in VIEWED_DTYPES):
        raise CheckpointError("a tensor has a dtype that no model here has")
    return tensor(storage, offset, size, stride, dtype)
