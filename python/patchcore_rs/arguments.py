"""Checks of arguments that come from callers: what is accepted, and what the refusal says."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def feature_matrix(value: Any, name: str, *, strict: bool = False) -> NDArray[np.float32]:
    """Return ``value`` as an aligned, C-contiguous (rows, channels) float32 array.

    Float16, bfloat16 tensors, float64 and big-endian floats are converted, strided views copied; an
    array that already fits is returned as it is. ``strict`` refuses every conversion of dtype.

    Raises:
        TypeError: the values are no floats, or a tensor lives on a device.
        ValueError: the array does not have two dimensions, or is empty in its second.
    """
    array = _as_array(value, name)
    if array.dtype.kind != "f":
        raise TypeError(
            f"{name} must hold floating-point values; got dtype {array.dtype}. Convert with .astype(np.float32)"
        )
    if strict and array.dtype != np.float32:
        raise TypeError(f"{name} must be float32 when strict=True; got dtype {array.dtype}")
    if array.ndim != 2:
        raise ValueError(
            f"{name} must be a 2-D array (rows, channels); got {array.ndim}-D with shape {array.shape}"
        )
    if array.shape[1] == 0:
        raise ValueError(
            f"{name} must have at least one channel; got shape {array.shape}. "
            "A backbone that returned empty features is the usual cause"
        )
    with np.errstate(over="ignore"):  # what does not fit float32 becomes inf, which the kernels refuse by position
        return np.require(array, np.float32, ["C", "A"]).view(np.ndarray)


def _as_array(value: Any, name: str) -> NDArray[Any]:
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            raise TypeError(f"{name} has masked values; fill or drop them first")
        return value.data
    if type(value).__module__.partition(".")[0] == "torch":
        return _from_tensor(value, name)
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as one array: {error}") from error


def _from_tensor(tensor: Any, name: str) -> NDArray[Any]:
    if tensor.device.type != "cpu":
        raise TypeError(f"{name} is a tensor on {tensor.device}; pass {name}.cpu()")
    if tensor.is_sparse:
        raise TypeError(f"{name} is a sparse tensor; pass {name}.to_dense()")
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.float()
    array: NDArray[Any] = tensor.numpy()
    return array


def integer(value: SupportsIndex, name: str, *, minimum: int) -> int:
    """Return ``value`` as an int of at least ``minimum``; bools and floats are refused.

    Raises:
        TypeError: it is no integer.
        ValueError: it is too small.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer; got {value!r} ({type(value).__name__})") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {number}")
    return number


def thread_count(threads: SupportsIndex | None) -> int | None:
    """Return ``threads`` checked; None means as many as this process may use."""
    return None if threads is None else integer(threads, "threads", minimum=1)
