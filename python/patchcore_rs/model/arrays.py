"""The arrays of a model file: which ones a method needs, of which types and shapes, and the checks of both."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

# The types that a model file may hold, by their names in safetensors; bytes are little-endian.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U32": np.dtype("<u4"),
    "U8": np.dtype("u1"),
}
AXES = 8  # an array's most; numpy has a limit too, of 32 or 64

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_BLOCK = 1 << 16  # values looked at at once
_MEMBER = re.compile(r"(0|[1-9][0-9]{0,3})\.([a-z0-9_]+)\.([a-z0-9_]+)")


@dataclass(frozen=True)
class ArraySpec:
    """What an array may be: one of `dtypes`, with a `shape` of named sizes.

    A name stands for one size in all arrays of a model, and none is 0. Arrays of one `group` are there all or none,
    those without a group always. `means` says what one is, after "of". No value is above `limit` in magnitude, and
    all are > 0 where `positive`.
    """

    dtypes: tuple[str, ...]
    shape: tuple[str, ...]
    group: str | None = None
    means: str = ""
    limit: float | None = None
    positive: bool = False


ENSEMBLE = "ensemble"  # of detectors: no method by itself, but saved by such a name

# What the methods need. A method that is not here cannot be saved; an array that is not here must be optional.
METHOD_ARRAYS: Mapping[str, Mapping[str, ArraySpec]] = {
    "patchcore": {
        # Above 1e16 the kernels refuse a value: its squared distances would overflow float32.
        "bank": ArraySpec(("F32",), ("rows", "dimensions"), limit=1e16),
        "mean": ArraySpec(("F32",), ("dimensions",), "standardize", "a bank row"),
        "deviation": ArraySpec(("F32",), ("dimensions",), "standardize", "a bank row", positive=True),
    },
    "padim": {
        "channels": ArraySpec(("U8",), ("columns",)),  # 1 for those that are used
        "mean": ArraySpec(("F64",), ("positions", "dimensions"), limit=1e16),
        # Cholesky factors of the covariances: lower triangles, column after column.
        "factors": ArraySpec(("F64",), ("positions", "triangle")),
        "grid": ArraySpec(("I64",), ("axes",)),  # rows and columns of the positions, which are row after row
    },
    "mahalanobis": {  # of all layers, one after the other
        "widths": ArraySpec(("I64",), ("layers",)),
        "mean": ArraySpec(("F64",), ("dimensions",), limit=1e16),
        "factors": ArraySpec(("F64",), ("values",)),
    },
    "spade": {
        "bank": ArraySpec(("F32",), ("rows", "dimensions"), limit=1e16),
        "images": ArraySpec(("F32",), ("training_images", "image_dimensions"), limit=1e16),
        # Of a feature: how many columns are the patch's, and how many the image's; one number where all are both.
        "widths": ArraySpec(("I64",), ("parts",)),
    },
    # And the arrays of its members, see `member_arrays`. A member's score less its offset, divided by its width, is on
    # the scale that all share; so are map values.
    ENSEMBLE: {
        "score_offset": ArraySpec(("F64",), ("members",)),
        "score_width": ArraySpec(("F64",), ("members",), positive=True),
        "map_offset": ArraySpec(("F64",), ("members",)),
        "map_width": ArraySpec(("F64",), ("members",), positive=True),
    },
}
# Arrays that change no score and are known nevertheless; their sizes may be those of the method's arrays.
OPTIONAL_ARRAYS: Mapping[str, ArraySpec] = {
    "image_hashes": ArraySpec(("I64",), ("images",)),  # `images.pixels.image_hash`, of all images learnt from
}


def dtype_name(array: NDArray[Any]) -> str | None:
    """The name in safetensors of an array's type, whatever its byte order; None for a type of no model file."""
    little = array.dtype.newbyteorder("<")
    return next((name for name, dtype in DTYPES.items() if dtype == little), None)


def check_arrays(method: str, arrays: Mapping[str, NDArray[Any]], optional: Mapping[str, NDArray[Any]]) -> None:
    """ValueError unless `arrays` are those of the method, and they and the `optional` ones are as their tables say."""
    table = METHOD_ARRAYS.get(method)
    if table is None:
        raise ValueError(f"method must be one of {', '.join(METHOD_ARRAYS)}; got {method!r:.80}")
    sizes: dict[str, int] = {}
    if method == ENSEMBLE:
        arrays, members = member_arrays(arrays)
        sizes["members"] = len(members)
        for i, (member, part) in enumerate(members):
            try:
                check_arrays(member, part, {})
            except ValueError as error:
                raise ValueError(f"member {i}: {error}") from error
    _check_names(table, arrays, optional)
    for name, spec in table.items():
        if name in arrays:
            _check_array(name, arrays[name], spec, sizes)
    for name in sorted(optional):
        _check_array(name, optional[name], OPTIONAL_ARRAYS.get(name), sizes)


def member_arrays(
    arrays: Mapping[str, NDArray[Any]],
) -> tuple[dict[str, NDArray[Any]], list[tuple[str, dict[str, NDArray[Any]]]]]:
    """The own arrays of an ensemble, and each member's method and arrays, by their names: "0.patchcore.bank".

    Raises:
        ValueError: the names are not those of members from 0 on, each of one method that is no ensemble itself.
    """
    own: dict[str, NDArray[Any]] = {}
    members: dict[tuple[int, str], dict[str, NDArray[Any]]] = {}
    for name, array in arrays.items():
        parts = _MEMBER.fullmatch(name)
        if parts is None:
            own[name] = array
        else:
            members.setdefault((int(parts[1]), parts[2]), {})[parts[3]] = array
    found = sorted(members)
    if not found or [index for index, _ in found] != list(range(len(found))):
        named = ", ".join(f"{index}.{method}" for index, method in found)[:200] or "none"
        raise ValueError(f"the members of an ensemble must be numbered from 0 on, each of one method; got {named}")
    for index, method in found:
        if method == ENSEMBLE or method not in METHOD_ARRAYS:
            known = ", ".join(known for known in METHOD_ARRAYS if known != ENSEMBLE)
            raise ValueError(f"member {index} must be of one of the methods {known}; got {method}")
    return own, [(method, members[index, method]) for index, method in found]


def name_of_member_array(index: int, method: str, name: str) -> str:
    """The name in an ensemble's file of an array of one of its members, which `member_arrays` reads."""
    return f"{index}.{method}.{name}"


def _check_names(
    table: Mapping[str, ArraySpec], arrays: Mapping[str, NDArray[Any]], optional: Mapping[str, NDArray[Any]]
) -> None:
    required = [name for name, spec in table.items() if spec.group is None]
    groups: dict[str, list[str]] = {}
    for name, spec in table.items():
        if spec.group is not None:
            groups.setdefault(spec.group, []).append(name)
    partial = any(0 < len(arrays.keys() & set(names)) < len(names) for names in groups.values())
    if partial or not set(required) <= arrays.keys() <= table.keys():
        plural = "s" if len(required) > 1 else ""
        more = "".join(f", with or without {' and '.join(names)}" for names in groups.values())
        held = ", ".join(name if _NAME.fullmatch(name) else ascii(name) for name in sorted(arrays))[:200] or "none"
        raise ValueError(f"it must hold the array{plural} {', '.join(required)}{more}; got {held}")
    for name in sorted(optional):
        if name in table or not _NAME.fullmatch(name):
            raise ValueError(
                f"an optional array must have a plain name (a-z, 0-9, _) that is none of the method's; got {name!a:.80}"
            )


def _check_array(name: str, array: NDArray[Any], spec: ArraySpec | None, sizes: dict[str, int]) -> None:
    """Check type, shape and values; an array without a `spec` may have any type and shape of a model file."""
    held = dtype_name(array)
    dtypes = tuple(DTYPES) if spec is None else spec.dtypes
    if held not in dtypes:
        wanted = " or ".join(f"{DTYPES[dtype].name} ({dtype})" for dtype in dtypes)
        raise ValueError(f"{name} must be {wanted}; got {held or array.dtype}")
    if spec is not None:
        _check_shape(name, array.shape, spec, sizes)
    elif 0 in array.shape or array.ndim > AXES:
        raise ValueError(f"{name} must have at most {AXES} axes, none of length 0; got {array.shape}")
    if array.dtype.kind == "f":
        _check_finite(name, array, None if spec is None else spec.limit)
    if spec is not None and spec.positive and not (array > 0).all():
        raise ValueError(f"{name} must be > 0, its smallest value is {array.min()}")


def _check_shape(name: str, shape: tuple[int, ...], spec: ArraySpec, sizes: dict[str, int]) -> None:
    """Check that the sizes that have been seen are those again, and note the others in `sizes`."""
    expected = tuple(sizes.get(size, size) for size in spec.shape)
    seen = dict(zip(spec.shape, shape, strict=False))
    if len(shape) == len(expected) and 0 not in shape and shape == tuple((seen | sizes)[size] for size in spec.shape):
        sizes.update(seen)
        return
    wanted = f"({', '.join(map(str, expected))}{',' * (len(expected) == 1)})"
    wanted += f" of {spec.means}" if spec.means else ""
    if any(isinstance(size, str) for size in expected):
        wanted += {1: ", not 0", 2: ", neither 0"}.get(len(expected), ", none 0")
    raise ValueError(f"{name} must have the shape {wanted}; got {shape}")


def _check_finite(name: str, array: NDArray[Any], limit: float | None) -> None:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        good = np.isfinite(block) if limit is None else np.abs(block) <= limit  # false for NaN too
        if good.all():
            continue
        first = start + int(np.argmin(good))
        place = ", ".join(str(int(i)) for i in np.unravel_index(first, array.shape))
        value = flat[first]
        rule = f"no magnitude may be above {limit:g}" if np.isfinite(value) else "every value must be finite"
        raise ValueError(f"{name}[{place}] is {value:g}: {rule}")
