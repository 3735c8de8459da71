"""Pickles, and the files that torch saves, read as plain data: nothing in them is imported or called.

A pickle is a program. Here a machine of our own steps through its instructions, and it has no instruction that calls:
a name stays a name, and what would be a call becomes an inert `Record` of the name and the arguments. The few names in
`BUILDERS`, those of containers, of numpy's arrays and of torch's tensors, are built by functions of this package,
which check every argument. Tensors become numpy arrays, bfloat16 ones float32.

Memory is bounded by the size of the input. Lengths are checked before they are believed, arrays are views of bytes that
are there, copies are counted, and a pickle of more than `_STEPS` instructions is no model.
"""

from __future__ import annotations

import os
import pickletools
import stat
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from patchcore_rs.compat.plain_objects import BUILDERS, Record, Storage, fill_array, plain_key, set_order
from patchcore_rs.model.file import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Record", "read_pickle", "read_torch_file"]

_STEPS = 1 << 20
_HINT = "save it again, or ask whoever made it"


def read_pickle(source: bytes | BinaryIO, *, storages: Callable[[str, str, int], Storage] | None = None) -> Any:
    """What a pickle holds, as plain values, numpy arrays and `Record`s. Nothing is imported or called.

    Args:
        source: the pickle, or a binary file from which all is read.
        storages: what opens a storage that torch keeps beside the pickle, by the name of its class, its key and its
            length; without it such a reference is a `Record`.

    Returns:
        Values of None, bool, int, float, complex, str, bytes, bytearray, slice, list, tuple, dict, set, frozenset,
        numpy arrays (read-only ones too) and scalars, and `Record`s. They may contain themselves.

    Raises:
        ValueError: it is no whole pickle, or asks for what is refused; the message says what and where.
    """
    contents = source if isinstance(source, bytes) else source.read()
    machine = _Machine(len(contents), storages)
    position: int | None = 0
    try:
        for opcode, argument, position in pickletools.genops(contents):  # noqa: B007 - for the message
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"no pickle that can be read ({error}, at byte {position}); {_HINT}") from error
    raise ValueError(f"no whole pickle: it does not end; {_HINT}")


class _Machine:
    """The stack, the marks on it and the memo of a pickle that is read."""

    def __init__(self, size: int, storages: Callable[[str, str, int], Storage] | None) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages
        self.opened: set[str] = set()  # keys of storages
        self.unfilled: dict[int, Any] = {}  # arrays and dtypes that wait for their state, by identity
        self.steps = 0
        self.allowance = 2 * size + 4096  # bytes and entries that may be copied: no memo makes much of little

    def step(self, name: str, argument: Any) -> None:
        """Run one instruction."""
        self.steps += 1
        if self.steps > _STEPS:
            raise ValueError(f"it has more than {_STEPS} instructions")
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _INSTRUCTIONS:
            _INSTRUCTIONS[name](self, argument)
        else:
            raise ValueError(f"the instruction {name} is not read")

    # --- the stack ------------------------------------------------------------------------------------------

    def pop(self) -> Any:
        """The topmost value, taken; ValueError where there is none above the last mark."""
        self.top()
        return self.stack.pop()

    def top(self) -> Any:
        """The topmost value, left where it is."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("a value is missing")
        return self.stack[-1]

    def pop_marked(self) -> list[Any]:
        """All values above the last mark, taken with the mark."""
        if not self.marks:
            raise ValueError("a mark is missing")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def pop_some(self, count: int) -> tuple[Any, ...]:
        """The `count` topmost values, the lowest first."""
        return tuple(self.pop() for _ in range(count))[::-1]

    def drop(self) -> None:
        """Take the topmost value, or else the last mark."""
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def spend(self, amount: int) -> None:
        """Count what is copied; ValueError beyond what the size of the input allows."""
        self.allowance -= amount
        if self.allowance < 0:
            raise ValueError("it makes more of its data than it holds")

    # --- containers -----------------------------------------------------------------------------------------

    def recall(self, number: int) -> None:
        """Push what the memo holds under that number."""
        if number not in self.memo:
            raise ValueError(f"number {number} of the memo is missing")
        self.stack.append(self.memo[number])

    def extend(self, items: list[Any]) -> None:
        """Append to the list, or note for the record, on the top."""
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Record):
            target.add_values(items)
        else:
            raise ValueError(f"a {type(target).__name__} cannot be appended to")

    def add(self, items: list[Any]) -> None:
        """Add to the set, or note for the record, on the top."""
        target = self.top()
        if isinstance(target, set):
            target.update(map(plain_key, items))
        elif isinstance(target, Record):
            target.add_values(items)
        else:
            raise ValueError(f"a {type(target).__name__} cannot be added to")

    def set_items(self, items: list[Any]) -> None:
        """Set the keys and values, one after the other, of the dict or the record on the top."""
        target = self.top()
        if isinstance(target, dict):
            target.update(_pairs(items))
        elif isinstance(target, Record):
            target.add_pairs(_pairs(items))
        else:
            raise ValueError(f"a {type(target).__name__} has no items to set")

    # --- what would run code --------------------------------------------------------------------------------

    def name(self, module: Any, name: Any) -> None:
        """Push a name; nothing is imported."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name must be text")
        self.stack.append(Record(module, name))

    def call(self, target: Any, args: Any, kwargs: Any = None) -> Any:
        """What stands for a call: an object of `BUILDERS`, else an inert record."""
        if not isinstance(args, tuple):
            raise ValueError("the arguments of a call must be a tuple")
        if not isinstance(target, Record) or target.args is not None:
            return Record("", "", (target, args))
        build = BUILDERS.get((target.module, target.name))
        if build is not None and not kwargs:
            return build(self, *args)
        record = Record(target.module, target.name, args)
        if isinstance(kwargs, dict):
            record.kwargs = kwargs
        return record

    def build(self, state: Any) -> None:
        """Note the state of a record on the top, or fill the array there."""
        target = self.top()
        if isinstance(target, Record):
            target.state = state
        elif self.unfilled.pop(id(target), None) is not None:
            (set_order if isinstance(target, np.dtype) else fill_array)(self, target, state)
        elif not isinstance(target, OrderedDict):  # whose attributes, such as a state dict's _metadata, are dropped
            raise ValueError(f"a {type(target).__name__} has no state")

    def refer(self, reference: Any) -> None:
        """Push the storage that torch refers to, or a record of another reference."""
        if self.storages is None:
            self.stack.append(Record("", "", (reference,)))
            return
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
            raise ValueError("a reference must be to a storage")
        _, kind, key, _, length = reference
        if not isinstance(kind, Record) or not isinstance(key, str) or type(length) is not int or length < 0:
            raise ValueError("a storage must have a class, a key and a length")
        storage = self.storages(kind.name, key, length)
        if key not in self.opened:
            self.opened.add(key)
            self.allowance += 8 * storage.values.nbytes  # bfloat16 is widened, perhaps for several names
        self.stack.append(storage)


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("a key has no value")
    return [(plain_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True)]


# --- instructions -------------------------------------------------------------------------------------------

_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}


def _check_protocol(_: _Machine, protocol: int) -> None:
    if protocol > 5:
        raise ValueError(f"its protocol is {protocol}, 5 is the last that is known")


def _remember(machine: _Machine, number: int) -> None:
    machine.memo[number] = machine.top()


def _reduce(machine: _Machine, _: Any) -> None:
    machine.stack.append(machine.call(*machine.pop_some(2)))


def _reduce_named(machine: _Machine, _: Any) -> None:
    machine.stack.append(machine.call(*machine.pop_some(3)))


def _instance(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.stack.append(machine.call(Record(module, name), tuple(machine.pop_marked())))


def _object(machine: _Machine, _: Any) -> None:
    target, *args = machine.pop_marked() or [None]
    machine.stack.append(machine.call(target, tuple(args)))


def _push(make: Callable[[list[Any]], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(make(machine.pop_marked()))


def _push_tuple(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(machine.pop_some(count))


_INSTRUCTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _check_protocol,
    "FRAME": lambda *_: None,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: machine.drop(),
    "POP_MARK": lambda machine, _: machine.pop_marked().clear(),
    "DUP": lambda machine, _: machine.stack.append(machine.top()),
    "TUPLE": _push(tuple),
    "TUPLE1": _push_tuple(1),
    "TUPLE2": _push_tuple(2),
    "TUPLE3": _push_tuple(3),
    "LIST": _push(list),
    "DICT": _push(lambda items: dict(_pairs(items))),
    "FROZENSET": _push(lambda items: frozenset(map(plain_key, items))),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_marked()),
    "ADDITEMS": lambda machine, _: machine.add(machine.pop_marked()),
    "SETITEM": lambda machine, _: machine.set_items([*machine.pop_some(2)]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_marked()),
    "PUT": _remember,
    "BINPUT": _remember,
    "LONG_BINPUT": _remember,
    "MEMOIZE": lambda machine, _: _remember(machine, len(machine.memo)),
    "GET": lambda machine, number: machine.recall(number),
    "BINGET": lambda machine, number: machine.recall(number),
    "LONG_BINGET": lambda machine, number: machine.recall(number),
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.pop_some(2)),
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _reduce_named,
    "INST": _instance,
    "OBJ": _object,
    "BUILD": lambda machine, _: machine.build(machine.pop()),
    "PERSID": lambda machine, reference: machine.refer(reference),
    "BINPERSID": lambda machine, _: machine.refer(machine.pop()),
}


# --- torch's files -------------------------------------------------------------------------------------------

_STORAGES: Mapping[str, str] = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "BFloat16Storage": "u2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
    "UntypedStorage": "u1",
}
_ORDERS: Mapping[bytes, Literal["<", ">"]] = {b"little": "<", b"big": ">"}
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that files of torch before 1.6 begin with
_AGAIN = "save it again with torch.save, or pass the live object"


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """What a `.pt`, `.pth` or `.ckpt` file holds, as plain values; see `read_pickle`. Nothing is imported or called.

    Tensors are numpy arrays, read-only where they are views of the file's bytes, bfloat16 widened to float32. All
    lengths are checked, and no more memory is taken than the file has bytes, and a little.

    Raises:
        ModelFileError: the path and the reason: it is no such file, is damaged, holds code of its own (TorchScript), or
            is of the format before torch 1.6.
        OSError: it cannot be opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ModelFileError(path, f"not a regular file; {_AGAIN}")
    with open(path, "rb") as file:
        start = file.read(len(_LEGACY))
        size = os.fstat(file.fileno()).st_size
        if not start.startswith(b"PK"):
            kind = "a file of the format before torch 1.6" if start == _LEGACY else "no file that torch.save writes"
            raise ModelFileError(path, f"{kind}; {_AGAIN}")
        try:
            with zipfile.ZipFile(file) as archive:
                return _Archive(archive, size).read()
        except MemoryError:
            raise
        except Exception as error:  # whatever zipfile makes of damage
            raise ModelFileError(path, f"not read as a file of torch.save: {error}; {_AGAIN}") from error


class _Archive:
    """An archive whose directory was checked, and the storages that were read from it."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self.archive = archive
        entries = archive.infolist()
        self.entries = {entry.filename: entry for entry in entries}
        if len(self.entries) < len(entries):
            raise ValueError("a name stands twice in it")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"{entry.filename!a:.80} is compressed, which torch does not do")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its entries claim more bytes than it has")
        pickles = [name for name in self.entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it must have one data.pkl")
        self.root = pickles[0].removesuffix("data.pkl")
        if any(name.startswith(f"{self.root}code/") for name in self.entries):
            raise ValueError("it is a TorchScript archive, which holds code")
        self.storages: dict[str, bytes] = {}
        order = archive.read(f"{self.root}byteorder") if f"{self.root}byteorder" in self.entries else b"little"
        if order not in _ORDERS:
            raise ValueError(f"its byte order must be little or big; got {order!a:.40}")
        self.order = _ORDERS[order]

    def read(self) -> Any:
        """The value that the pickle holds."""
        return read_pickle(self.archive.read(f"{self.root}data.pkl"), storages=self.storage)

    def storage(self, kind: str, key: str, length: int) -> Storage:
        """The storage of that class, key and length; ValueError where the archive has it not or not so long."""
        if kind not in _STORAGES or (kind == "UntypedStorage" and self.order == ">"):
            raise ValueError(f"a storage of the class {kind!a:.40} is not read")
        name, dtype = f"{self.root}data/{key}", np.dtype(_STORAGES[kind]).newbyteorder(self.order)
        if name not in self.entries:
            raise ValueError(f"the storage {key!a:.40} is missing")
        held = self.entries[name].file_size
        if length * dtype.itemsize > held:
            raise ValueError(f"the storage {key!a:.40} has {held} bytes, {length} values of {dtype} are claimed")
        if name not in self.storages:
            self.storages[name] = self.archive.read(name)
        return Storage(np.frombuffer(self.storages[name], dtype, length), kind == "BFloat16Storage")
