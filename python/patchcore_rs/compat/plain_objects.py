"""The objects that a pickle read as data is made of: records of what is not built, and builders of what is.

The builders are those of containers, of numpy's arrays and of torch's tensors. They call nothing that a pickle names,
check every argument, and count what they copy.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from numpy.typing import NDArray

_AXES = 32
_KEY_ITEMS = 16  # of a tuple that is a key: hashing nested tuples could take for ever
_NOTHING: Mapping[Any, Any] = MappingProxyType({})


class Record:
    """An object that a pickle describes and that is not built: inert data, compared by identity.

    Attributes:
        module: where its class or function would be imported from; empty for what has no such name.
        name: the name there.
        args: what it would be called with, None for a name that is not called.
        kwargs: the same by name.
        state: what it would be given as its state, None without.
        pairs: (key, value) of what would be set as items of it.
        values: what would be appended or added to it.
    """

    __slots__ = ("args", "kwargs", "module", "name", "pairs", "state", "values")

    def __init__(self, module: str, name: str, args: tuple[Any, ...] | None = None) -> None:
        self.module, self.name, self.args = module, name, args
        self.kwargs: Mapping[Any, Any] = _NOTHING
        self.state: Any = None
        # Lists once there is something: most records hold nothing, and a hostile pickle makes many.
        self.pairs: list[tuple[Any, Any]] | tuple[()] = ()
        self.values: list[Any] | tuple[()] = ()

    def add_pairs(self, pairs: list[tuple[Any, Any]]) -> None:
        """Note more items that would be set."""
        self.pairs = [] if isinstance(self.pairs, tuple) else self.pairs
        self.pairs.extend(pairs)

    def add_values(self, values: list[Any]) -> None:
        """Note more values that would be appended or added."""
        self.values = [] if isinstance(self.values, tuple) else self.values
        self.values.extend(values)

    @property
    def attributes(self) -> dict[Any, Any]:
        """The attributes that its state would set: the dict, and the slots behind it; empty where it is another."""
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}

    def __repr__(self) -> str:
        """The name alone: what it holds may hold itself."""
        return f"Record({self.module}.{self.name})"


class Storage(NamedTuple):
    """The values of one of torch's storages, (n,); `bfloat16` where they are the upper halves of float32."""

    values: NDArray[Any]
    bfloat16: bool


class Machine(Protocol):
    """What a builder needs of the machine that runs a pickle; `unfilled` waits for its state, by identity."""

    unfilled: dict[int, Any]

    def spend(self, amount: int) -> None:
        """Count what is copied; ValueError beyond what the size of the input allows."""
        ...

    def call(self, target: Any, args: Any, kwargs: Any = None) -> Any:
        """What stands for a call: a builder's object, else an inert record."""
        ...


def plain_key(value: Any) -> Any:
    """`value` where it may be a key: its hash is quick and its own."""
    if value is None or isinstance(value, (bool, float, str, bytes, Record)):
        return value
    if isinstance(value, int) and value.bit_length() <= 64:
        return value
    if isinstance(value, tuple) and len(value) <= _KEY_ITEMS and not any(isinstance(item, tuple) for item in value):
        return tuple(map(plain_key, value))
    raise ValueError(f"a {type(value).__name__} cannot be a key here")


# --- containers ------------------------------------------------------------------------------


def _items(machine: Machine, items: Iterable[Any] = ()) -> Any:
    """The items of a container that would be called with them, counted."""
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise ValueError(f"a container cannot be made of a {type(items).__name__}")
    machine.spend(len(items))
    return items


def _ordered_dict(machine: Machine, items: Any = ()) -> OrderedDict[Any, Any]:
    pairs = [(plain_key(key), value) for key, value in _items(machine, items)]
    return OrderedDict(pairs)


def _encode(machine: Machine, text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes as pickles of protocol 2 write them."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("only text in latin1 is read as bytes")
    machine.spend(len(text))
    return text.encode("latin1")


def _bytearray(machine: Machine, contents: Any = b"") -> bytearray:
    if not isinstance(contents, bytes):
        raise ValueError("a bytearray must be made of bytes")
    machine.spend(len(contents))
    return bytearray(contents)


def _plain_object(_: Machine, target: Any, *__: Any) -> Record:
    """An object as pickles of protocol 0 and 1 write it: its class, a base and the value of that base."""
    if not isinstance(target, Record):
        raise ValueError("an object must have a class")
    return Record(target.module, target.name, ())


def _complex(_: Machine, real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    if not all(isinstance(part, (int, float)) for part in (real, imaginary)):
        raise ValueError("a complex number must be made of two numbers")
    return complex(real, imaginary)


# --- numpy's arrays --------------------------------------------------------------------------

_DTYPE = re.compile(r"[<>=|]?(b1|[iuf][1248]|c8|c16)")


def _dtype(machine: Machine, code: Any, *_: Any) -> np.dtype[Any]:
    """A dtype of one's own: its byte order comes as its state."""
    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
        raise ValueError(f"a dtype must be of plain numbers; got {code!a:.40}")
    dtype = np.dtype(code, copy=True)
    machine.unfilled[id(dtype)] = dtype
    return dtype


def set_order(_: Machine, dtype: Any, state: Any) -> None:
    """Give a dtype the byte order that its state names."""
    if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "=", "|"):
        raise ValueError("the state of a dtype must name a byte order")
    dtype.__setstate__((3, state[1], None, None, None, -1, -1, 0))


def _shape(value: Any) -> tuple[int, ...]:
    """A shape or strides: a tuple of integers >= 0."""
    if not isinstance(value, (tuple, list)) or len(value) > _AXES or any(type(n) is not int or n < 0 for n in value):
        raise ValueError(f"a shape must be a tuple of at most {_AXES} integers >= 0")
    return tuple(value)


def _unfilled_array(machine: Machine, kind: Any, *_: Any) -> NDArray[Any]:
    """An array without values: they come as its state."""
    if not isinstance(kind, Record) or (kind.module, kind.name) != ("numpy", "ndarray"):
        raise ValueError("an array must be a numpy.ndarray")
    array = np.empty(0)
    machine.unfilled[id(array)] = array
    return array


def _check_length(contents: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(dtype, np.dtype) or not isinstance(contents, (bytes, bytearray)):
        raise ValueError("an array must have a dtype and bytes")
    if math.prod(shape) * dtype.itemsize != len(contents):
        raise ValueError(f"an array of {dtype} of shape {shape!a:.80} cannot be {len(contents)} bytes")


def fill_array(machine: Machine, array: Any, state: Any) -> None:
    """Give an array its state: (version, shape, dtype, whether in Fortran's order, bytes)."""
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[3], (bool, int)):
        raise ValueError("the state of an array must have five parts")
    _, shape, dtype, fortran, contents = state
    shape = _shape(shape)
    _check_length(contents, dtype, shape)
    machine.spend(len(contents))
    array.__setstate__((1, shape, dtype, bool(fortran), bytes(contents)))


def _array(_: Machine, contents: Any, dtype: Any, shape: Any, order: Any = "C") -> NDArray[Any]:
    """An array as pickles of protocol 5 write it; it reads the bytes where they are."""
    shape = _shape(shape)
    _check_length(contents, dtype, shape)
    array: NDArray[Any] = np.frombuffer(contents, dtype).reshape(shape, order="F" if order == "F" else "C")
    return array


def _scalar(_: Machine, dtype: Any, contents: Any) -> Any:
    _check_length(contents, dtype, ())
    return np.frombuffer(contents, dtype)[0]


# --- torch's tensors -------------------------------------------------------------------------

_TORCH_DTYPES: Mapping[str, str] = {
    "float32": "f4",
    "float64": "f8",
    "float16": "f2",
    "bfloat16": "u2",
    "int64": "i8",
    "int32": "i4",
    "int16": "i2",
    "int8": "i1",
    "uint64": "u8",
    "uint32": "u4",
    "uint16": "u2",
    "uint8": "u1",
    "bool": "?",
}


def _tensor(machine: Machine, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> NDArray[Any] | Record:
    """A view of a storage; refused where it repeats values, which could be of any size."""
    if not isinstance(storage, Storage):
        return Record("torch", "Tensor", (storage, offset, size, stride))
    shape, strides, values = _shape(size), _shape(stride), storage.values
    if len(shape) != len(strides) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor must have an offset, and as many strides as sizes")
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if count and (count > len(values) or last >= len(values)):
        raise ValueError(f"a tensor of shape {shape!a:.80} does not fit its storage of {len(values)} values")
    if not count:
        return np.empty(0, values.dtype).reshape(shape)
    steps = [values.itemsize * (step if n > 1 else 0) for n, step in zip(shape, strides, strict=True)]
    view = np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)
    if not storage.bfloat16:
        return view
    machine.spend(4 * count)
    widened: NDArray[np.float32] = np.left_shift(view, 16, dtype=np.uint32).view(np.float32)
    return widened


def _typed_tensor(
    machine: Machine, storage: Any, offset: Any, size: Any, stride: Any, *more: Any
) -> NDArray[Any] | Record:
    """A tensor on a storage without a type; its own comes after whether it has a gradient, and its hooks."""
    if not isinstance(storage, Storage) or len(more) < 3 or not isinstance(more[2], Record):
        raise ValueError("a tensor must have a storage and a dtype")
    name, dtype = more[2].name, _TORCH_DTYPES.get(more[2].name)
    if dtype is None:
        raise ValueError(f"a tensor of {name!a:.40} is not read")
    contents = storage.values.view(np.uint8)
    whole = contents[: len(contents) - len(contents) % np.dtype(dtype).itemsize].view(dtype)
    return _tensor(machine, Storage(whole, name == "bfloat16"), offset, size, stride)


def _from_type(machine: Machine, function: Any, _: Any, args: Any, *__: Any) -> Any:
    """A tensor of a class of its own: the function that would make the tensor, and its arguments."""
    return machine.call(function, args)


BUILDERS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): lambda *_: {},
    ("_codecs", "encode"): _encode,
    **{
        (module, name): build
        for module in ("builtins", "__builtin__")
        for name, build in (
            ("set", lambda machine, items=(): set(map(plain_key, _items(machine, items)))),
            ("frozenset", lambda machine, items=(): frozenset(map(plain_key, _items(machine, items)))),
            ("slice", lambda _, *limits: slice(*limits)),
            ("complex", _complex),
            ("bytes", lambda *_: b""),  # how pickles of protocol 2 write the empty ones
            ("bytearray", _bytearray),
        )
    },
    **{(module, "_reconstructor"): _plain_object for module in ("copyreg", "copy_reg")},
    ("numpy", "dtype"): _dtype,
    **{
        (f"numpy.{core}.{module}", name): build
        for core in ("core", "_core")
        for module, name, build in (
            ("multiarray", "_reconstruct", _unfilled_array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array),
        )
    },
    ("torch", "Size"): lambda _, size=(): _shape(size),
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda _, data, *__: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda _, data, *__: data,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
}
