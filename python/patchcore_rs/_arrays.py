"""Arrays that come from callers: features as float32 rows, scores as floats, all else as numpy reads it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from patchcore_rs import _native
from patchcore_rs._limits import require_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32] | NDArray[np.float64]

_LIMIT = np.float32(_native.MAX_MAGNITUDE)
_BLOCK = 4096  # rows looked at at once


def feature_matrix(value: Any, name: str, *, strict: bool = False) -> NDArray[np.float32]:
    """Return `value` as an aligned, C-contiguous (rows, channels) float32 array.

    Float16, bfloat16 tensors, float64 and big-endian floats are converted, strided views copied; an
    array that already fits is returned as it is. `strict` refuses every other dtype than float32.

    Raises:
        TypeError: the values are no floats, or a tensor lives on a device or is sparse.
        ValueError: the array does not have two dimensions, is empty in its second, or a value does not
            fit float32. NaN and infinite values are left to the kernels, which refuse them by position.
        MemoryError: it must be converted or copied, and the memory is not there.
    """
    array = as_array(value, name, strict=strict)
    if array.dtype.kind != "f":
        raise TypeError(
            f"{name} must hold floating-point values; got dtype {array.dtype}. Convert with .astype(np.float32)"
        )
    if strict and array.dtype != np.float32:
        raise _not_float32(name, array.dtype)
    if array.ndim != 2:
        raise ValueError(f"{name} must be a 2-D array (rows, channels); got {array.ndim}-D with shape {array.shape}")
    if array.shape[1] == 0:
        raise ValueError(
            f"{name} must have at least one channel; got shape {array.shape}. "
            "A backbone that returned empty features is the usual cause"
        )
    if array.dtype != np.float32 or not (array.flags.c_contiguous and array.flags.aligned):
        require_memory(
            4 * array.size,
            f"a C-contiguous float32 copy of {name}, {array.dtype} of shape {array.shape},",
            f"store {name} as such an array, or pass fewer rows at a time",
        )
    try:
        with np.errstate(all="ignore", over="raise"):  # tiny values are rounded, whatever the caller has set
            return np.require(array, np.float32, ["C", "A"]).view(np.ndarray)
    except FloatingPointError:
        too_large = np.isfinite(array) & (np.abs(array) > np.finfo(np.float32).max)
        row, column = np.argwhere(too_large)[0]
        raise ValueError(
            f"{name}[{row}, {column}] is {array[row, column]:g}: it overflows float32; scale the features"
        ) from None


def require_finite(rows: NDArray[np.float32], name: str, first: int = 0) -> None:
    """Refuse values as the kernels do, where none of them reads `rows`; the first row is called `first`.

    Raises:
        ValueError: a value is not finite or above 1e16 in magnitude; the first one is named by its position.
    """
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        if (np.abs(block) <= _LIMIT).all():  # false for NaN too
            continue
        row, column = np.argwhere(~(np.abs(block) <= _LIMIT))[0]
        value, where = block[row, column], f"{name}[{first + start + row}, {column}]"
        if np.isfinite(value):
            raise ValueError(
                f"{where} is {value:g}: magnitudes above {_LIMIT:g} overflow float32 distances; scale the features"
            )
        raise ValueError(f"{where} is {value:g}: every value must be finite; look at what produced that row")


def floats(array: NDArray[Any], name: str) -> Floats:
    """Return numbers aligned and C-contiguous as float32 where their dtype fits it, else as float64.

    Raises:
        TypeError: they are no real numbers.
    """
    return np.require(array, float_type(array.dtype, name), ["C", "A"])


def float_type(dtype: np.dtype[Any], name: str) -> type[np.float32 | np.float64]:
    """The float that numbers of a dtype are compared as: float32 where all of them fit it, else float64.

    Raises:
        TypeError: the dtype is none of real numbers.
    """
    if dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold numbers; got dtype {dtype}")
    return np.float32 if np.can_cast(dtype, np.float32) else np.float64


def _not_float32(name: str, dtype: object) -> TypeError:
    return TypeError(f"{name} must be float32 when strict=True; got dtype {dtype}")


def as_array(value: Any, name: str, *, strict: bool = False) -> NDArray[Any]:
    """Return what array-likes and CPU tensors hold as an array of any shape and dtype, not copied where that can be.

    Raises:
        TypeError: values are masked or sparse, or a tensor or what speaks DLPack lives on a device or is of a dtype
            unknown to numpy (bfloat16 tensors are converted to float32, if not `strict`); or it is nothing of these.
        ValueError: nested lists are ragged.
    """
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            raise TypeError(f"{name} has masked values; fill or drop them first")
        return value.data
    if is_tensor(value):
        return _from_tensor(value, name, strict=strict)
    if not hasattr(value, "__array__") and hasattr(value, "toarray"):  # SciPy's
        raise TypeError(f"{name} is a sparse matrix, {type(value).__name__}; pass {name}.toarray()")
    try:
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as one array: {error}") from error
    except (BufferError, RuntimeError) as error:  # of DLPack: another device, or a type that numpy has not
        raise TypeError(f"{name} cannot be read by numpy: {error}. Pass it as float32 on the CPU") from error
    if array.dtype.kind == "O" and array.ndim == 0:
        raise TypeError(
            f"{name} must be an array, a tensor or nested lists of numbers; got {type(value).__name__}. Make one of "
            "it, numpy.array(list(...)) of a generator"
        )
    return array


def is_tensor(value: object) -> bool:
    """Whether a value is a torch tensor; torch is not imported to find that out."""
    return any(base.__module__.partition(".")[0] == "torch" for base in type(value).__mro__)


def like(value: object, array: NDArray[Any]) -> Any:
    """An array as a tensor that shares its memory where `value` is a tensor, else as it is."""
    return sys.modules["torch"].from_numpy(array) if is_tensor(value) else array


def _from_tensor(tensor: Any, name: str, *, strict: bool) -> NDArray[Any]:
    if tensor.device.type != "cpu":
        raise TypeError(f"{name} is a tensor on {tensor.device}; pass {name}.cpu()")
    if str(tensor.layout) != "torch.strided":
        raise TypeError(f"{name} is a sparse tensor; pass {name}.to_dense()")
    if str(tensor.dtype) == "torch.bfloat16":  # numpy has no such dtype
        if strict:
            raise _not_float32(name, tensor.dtype)
        tensor = tensor.float()
    try:
        array: NDArray[Any] = tensor.numpy(force=True)  # without gradient, conjugate and negative bits resolved
    except (RuntimeError, TypeError) as error:
        raise TypeError(f"{name} is a tensor that numpy cannot read: {error}") from error
    return array
