"""Read the pickle inside a PyTorch file: nothing that it names is called, and time and memory are bounded.

`torch.load(weights_only=True)` executes nothing either, but a file of a kilobyte keeps it busy for minutes (the hash of
a tuple of tuples that share their parts) or fills the memory (`bytearray(10**10)`), and one of 300 kB ends the process
(the hash of a deeply nested tuple). Here, an allowed name stands for one of the few functions below or for nothing, and
only short names and numbers become keys of dictionaries.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

UNITS = 1_000_000
"""Allowance of a pickle: each read (an opcode is one to three) and each 64 bytes of text cost one unit.

A pickle costs about 100 for each tensor and a few for each number in lists such as logs. A million takes about half a
second. Time grows with the file: each storage, for which the file must hold the data, adds UNITS_PER_STORAGE.
"""
UNITS_PER_STORAGE = 200
LONGEST_NAME = 1000
"""Characters in a tensor's name; the longest in published checkpoints have about 100."""
DIMENSIONS = 64
"""Of a tensor; PyTorch calculates with no more."""
REPEATS = 16
"""How often the tensors of a file may hold its bytes: tied weights, and one set of weights under several names."""

_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip
_INERT = re.compile(
    r"""
    (builtins | __builtin__)\.(bool | bytearray | bytes | complex | dict | float | frozenset | int | list | object
        | range | set | slice | str | tuple)
    | _codecs\.encode | copyreg\._reconstructor | copy_reg\._reconstructor
    | collections\.(Counter | deque) | types\.SimpleNamespace | typing\.Any
    | argparse\.Namespace | pathlib(\._local)?\.(Pure)?(Posix | Windows)?Path
    | datetime\.(date | datetime | time | timedelta | timezone) | decimal\.Decimal | uuid\.UUID
    | numpy\.(dtype | ndarray | bool_? | u?int\d+ | float\d+ | dtypes\.\w+
        | _?core\.(multiarray\.(scalar | _reconstruct) | numeric\._frombuffer)
        | random\.(_pickle\.__(randomstate | bit_generator | generator)_ctor | _mt19937\.MT19937 | _pcg64\.PCG64))
    | mmengine\.(logging\.history_buffer\.HistoryBuffer(\.\w+)? | config\.config\.(Config | ConfigDict))
    | omegaconf\.(base | dictconfig | listconfig | nodes)\.\w+
    | (lightning | lightning_fabric | pytorch_lightning)(\.\w+)*\.(AttributeDict | EarlyStopping | ModelCheckpoint)
    | (detectron2\.config\.config | fvcore\.common\.config | yacs\.config)\.CfgNode
    | addict\.addict\.Dict | easydict\.EasyDict
    | torch\.torch_version\.TorchVersion
    | torch\.(Size | \w*Tensor | device | per_\w+ | Q\w+Storage | serialization\._get_layout)
    | torch\.nn\.parameter\.(Parameter | Buffer)
    | torch\._utils\._rebuild_\w+
    """,
    re.VERBOSE,
)
"""Classes and functions that checkpoints name and weights do not need: stand-ins take their place."""
_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST EMPTY_DICT "
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID"
)
"""Those of the binary protocols 2 to 5 that the unpickler takes as they are; the class replaces more."""

_HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"


class RefusedError(Exception):
    """A pickle needs code or more than its share; the message is a clause that follows "it"."""


class StandIn:
    """Takes the place of a class, function or object: it accepts everything and keeps only the name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: object) -> StandIn:
        return self

    def __repr__(self) -> str:
        return self.name


class Storage(NamedTuple):
    """The bytes that tensors are views of, and the type of their elements."""

    dtype: torch.dtype
    content: torch.UntypedStorage


class Meter:
    """A binary file that is read as long as its allowance lasts."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.left = file, UNITS

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise RefusedError("takes more steps to read than weights of its size")

    def read(self, size: int) -> bytes:
        self.left -= 1 + size // 64  # as `spend` does, without the call: this is half of the time
        if self.left < 0:
            self.spend(0)
        return self.file.read(size)

    def readline(self) -> bytes:
        self.spend(1)
        return self.file.readline(LONGEST_NAME)


_Unpickler: Any = pickle._Unpickler  # the form in Python of the one in C; its type leaves out what is replaced below


class Unpickler(_Unpickler):
    """Python's own unpickler with fewer opcodes, on a file; `read_storage(key, bytes)` returns a storage by its key.

    `size` is that of the whole file in bytes.
    """

    def __init__(self, file: IO[bytes], size: int, read_storage: Callable[[str, int], torch.UntypedStorage]) -> None:
        self.meter = Meter(file)
        super().__init__(self.meter, encoding="utf-8", errors="replace")
        self.read_storage, self.allowed_bytes = read_storage, REPEATS * size
        self.storages: dict[str, Storage] = {}

    def load(self) -> Any:
        """Return the content of the next pickle in the file; each numbers its objects anew."""
        self.memo.clear()
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _DTYPES:
            return _DTYPES[full]
        if module in {"torch", "torch.cuda", "torch.storage"} and name.removesuffix("Storage") in _STORAGES:
            return _STORAGES[name.removesuffix("Storage")]
        match full:
            case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
                return self.tensor
            case "torch._utils._rebuild_tensor_v3":
                return self.tensor_of_type
            case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
                return lambda tensor, *settings: tensor
            case "torch._tensor._rebuild_from_type_v2":
                return lambda rebuild, kind, args, attributes: self.call(rebuild, args)
            case "collections.OrderedDict" | "collections.defaultdict":
                return self.dictionary
            case "builtins.getattr" | "__builtin__.getattr":
                return self.method
        if _INERT.fullmatch(full):
            return StandIn(full)
        printable = full[:80] if full.isprintable() else repr(full[:80])
        raise RefusedError(f"requires {printable}, which weights do not need")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or type(key) is not str or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("not a storage")
        if not isinstance(dtype, torch.dtype):
            return StandIn("torch.Storage")
        if key not in self.storages:
            self.storages[key] = Storage(dtype, self.read_storage(key, count * dtype.itemsize))
            self.meter.left += UNITS_PER_STORAGE
        content = self.storages[key].content
        if view and view[0] is not None:  # before PyTorch 0.4
            _, start, length = view[0]
            content = content[start * dtype.itemsize : (start + length) * dtype.itemsize]
        return Storage(dtype, content)

    def tensor(
        self, storage: Any, offset: int, size: Any, stride: Any, grad: object = None, hooks: object = None,
        metadata: object = None, dtype: torch.dtype | None = None,
    ) -> Tensor | StandIn:  # fmt: skip
        """Return a view of the storage as the file describes it, `offset` and `stride` in elements."""
        if not isinstance(storage, Storage) or metadata:  # quantized, or a negated view
            return StandIn("a special tensor")
        self.meter.spend(20)
        dtype = dtype or storage.dtype
        if len(size) != len(stride) or len(size) > DIMENSIONS:
            raise pickle.UnpicklingError("sizes and strides differ in number")
        if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
            raise pickle.UnpicklingError("sizes and strides are not whole numbers")
        self.allowed_bytes -= math.prod(size) * dtype.itemsize
        if self.allowed_bytes < 0:
            raise RefusedError(f"holds tensors of more than {REPEATS} times its size")
        end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else 0
        if end * dtype.itemsize > storage.content.nbytes():
            raise RefusedError("holds a tensor that reaches beyond its data")
        return torch.empty(0, dtype=dtype).set_(storage.content, offset, size, stride)

    def tensor_of_type(
        self, storage: Any, offset: int, size: Any, stride: Any, grad: object, hooks: object, dtype: Any,
        metadata: object = None,
    ) -> Tensor | StandIn:  # fmt: skip
        return self.tensor(storage, offset, size, stride, grad, hooks, metadata, dtype)

    def dictionary(self, *items: Any) -> dict[Any, Any]:
        """Return an OrderedDict's items as a dictionary: none yet, or Python 2's list of pairs."""
        if not items or not isinstance(items[0], list):
            return {}
        self.meter.spend(len(items[0]))
        return {_key(key): value for key, value in items[0]}

    def method(self, owner: Any, name: Any) -> StandIn:
        """Return a stand-in for a method of mmengine's HistoryBuffer, which keeps its statistics by name."""
        if isinstance(owner, StandIn) and owner.name == _HISTORY:
            return owner
        raise RefusedError("requires builtins.getattr, which weights do not need")

    def call(self, function: Any, args: Any) -> Any:
        """Call what `find_class` returned; nothing else on the stack can be called."""
        self.meter.spend(len(args))
        return function(*args)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keywords
        self.load_reduce()

    def load_build(self) -> None:
        self.stack.pop()  # attributes, such as a state dict's metadata

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    def set_items(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is dict:  # a stand-in keeps nothing
            self.stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def load_append(self) -> None:
        self.add_items([self.stack.pop()])

    def load_appends(self) -> None:
        self.add_items(self.pop_mark())

    def add_items(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.load_empty_set()

    def load_empty_set(self) -> None:
        self.append(StandIn("set"))

    def load_frame(self) -> None:
        self.read(8)  # only a hint for reading ahead, which would bypass the meter

    dispatch = {  # noqa: RUF012
        getattr(pickle, name)[0]: _Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES.split()
    }
    dispatch |= {
        pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_reduce, pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
        pickle.APPEND[0]: load_append, pickle.APPENDS[0]: load_appends, pickle.ADDITEMS[0]: load_appends,
        pickle.EMPTY_SET[0]: load_empty_set, pickle.FROZENSET[0]: load_frozenset, pickle.FRAME[0]: load_frame,
    }  # fmt: skip


_OTHER_KEY = StandIn("a key other than a name")


def _key(key: Any) -> Any:
    """Return a key if hashing and comparing it takes constant time, else a stand-in for it."""
    if (type(key) is str and len(key) <= LONGEST_NAME) or (type(key) is int and abs(key) < 2**60):
        return key
    return _OTHER_KEY
