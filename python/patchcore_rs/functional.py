"""The steps of PatchCore one by one, on arrays of the caller's own: what came in as torch tensors goes out as such.

Patch features by `aggregate` (section 3.1 of the paper), then `MemoryBank.kneighbors`, `image_scores` (section 3.3)
and `anomaly_maps`. Needs numpy only: tensors are read where they lie, on the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from patchcore_rs import _native
from patchcore_rs._arrays import as_array, like
from patchcore_rs._checks import integer, integers, number, one_of, sequences, thread_count
from patchcore_rs._limits import in_parallel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from patchcore_rs.memory_bank import MemoryBank

_SMALL = 1 << 18  # values that are moved before a thread would have begun
_size = sequences(integers(1, 2**31 - 1), 2, "(height, width), two integers >= 1")
_upsampling = one_of("bilinear", "nearest")
_border = one_of("symmetric", "reflect")


def aggregate(
    maps: Sequence[Any], *, patch_size: int = 3, stride: int = 1, width: int | None = None, threads: int | None = None
) -> tuple[Any, tuple[int, int]]:
    """Make patch features of a backbone's maps: local neighbourhood aggregation (section 3.1 of the paper).

    Each position takes in its zero-padded `patch_size` x `patch_size` neighbourhood; deeper layers are interpolated
    bilinearly to the grid of the first, and joined.

    Args:
        maps: one (n, c, h, w) floating-point array or tensor per layer, of the same n images. Tensors in torch's
            channels_last memory format are read without a copy.
        patch_size: side of the neighbourhood.
        stride: positions between two patches.
        width: None joins the means of the neighbourhoods; an integer pools the channels and positions of each layer
            adaptively to that many channels, then the joined layers again, as the paper's authors do.
        threads: None for as many as this process may use.

    Returns:
        features: (n * rows * columns, d) float32, image after image, row by row; a tensor if the maps are tensors.
        grid: (rows, columns) of patches of an image.

    Raises:
        TypeError: maps hold no floats, or lie on a device.
        ValueError: shapes do not fit each other, or a value is not finite.
    """
    threads = thread_count(threads)
    layers = [_channels_last(layer_map, f"maps[{i}]", threads) for i, layer_map in enumerate(maps)]
    features, grid = _native.aggregate(
        layers,
        integer(patch_size, "patch_size", minimum=1),
        integer(stride, "stride", minimum=1),
        None if width is None else integer(width, "width", minimum=1),
        threads,
    )
    return like(maps[0], features), grid


def image_scores(
    bank: MemoryBank,
    features: ArrayLike,
    distances: ArrayLike,
    indices: ArrayLike,
    *,
    patches: int,
    reweight: int | None = 9,
) -> Any:
    """Turn the patch distances of images into image scores: Eq. 7 of the paper, or Eq. 6.

    Args:
        bank: the memory bank.
        features: (n * patches, d) floating-point patch features of n images, image after image.
        distances: their distances to the nearest rows, (n * patches,) or (n * patches, 1), as
            `bank.kneighbors(features)` gives them.
        indices: those rows, in the same shapes.
        patches: patches of an image.
        reweight: b of Eq. 7, the nearest row itself counted; lowered to the size of the bank. None or 1 is Eq. 6: the
            largest distance.

    Returns:
        (n,) float64, higher is more anomalous; a tensor if `features` is one.

    Raises:
        TypeError: `features` or `distances` hold no floats, `indices` no integers, or `patches` or `reweight` is no
            integer.
        ValueError: the widths or lengths differ, `patches` does not divide them, an index is no row of the bank, a
            distance is NaN or a feature not finite.
    """
    return like(features, bank.image_scores(features, distances, indices, patches=patches, reweight=reweight))


def anomaly_maps(
    scores: Any,
    size: tuple[int, int],
    *,
    sigma: float = 4.0,
    upsampling: str = "bilinear",
    border: str = "symmetric",
    threads: int | None = None,
) -> Any:
    """Draw anomaly maps: patch scores on the images' pixels, smoothed by a Gaussian (section 3.3 of the paper).

    Args:
        scores: (n, rows, columns) floating-point patch scores.
        size: (height, width) of the maps.
        sigma: the Gaussian's deviation in pixels; 0 smooths nothing. It is cut off at four deviations.
        upsampling: "bilinear" (torch's `align_corners=False`) or "nearest".
        border: what lies past the edge: "symmetric" repeats the last pixel (scipy's "reflect"), "reflect" does not
            (torch's and anomalib's).
        threads: None for as many as this process may use.

    Returns:
        (n, height, width) float32; a tensor if `scores` is one.

    Raises:
        TypeError: `scores` hold no floats, or an option has the wrong type.
        ValueError: `scores` have another shape, or an option is out of range.
    """
    values = as_array(scores, "scores")
    if values.ndim != 3:
        raise ValueError(
            f"scores must be a 3-D array (images, rows, columns); got {values.ndim}-D with shape {values.shape}"
        )
    height, width = _size(size, "size")
    maps = _native.anomaly_maps(
        _float32(values, "scores"),
        height,
        width,
        number(sigma, "sigma"),
        _upsampling(upsampling, "upsampling"),
        _border(border, "border"),
        thread_count(threads),
    )
    return like(scores, maps)


def _channels_last(layer_map: Any, name: str, threads: int | None) -> NDArray[np.float32]:
    """(n, c, h, w) as C-contiguous (n, h, w, c) float32."""
    array = as_array(layer_map, name)
    if array.ndim != 4:
        raise ValueError(
            f"{name} must be a 4-D array (images, channels, height, width), one for each layer; got {array.ndim}-D "
            f"with shape {array.shape}"
        )
    moved = array.transpose(0, 2, 3, 1)
    if moved.flags.c_contiguous or moved.size < _SMALL:
        return _float32(moved, name)
    _require_floats(moved, name)
    copy = np.empty(moved.shape, np.float32)

    def move(image: int) -> None:
        with np.errstate(all="ignore"):
            copy[image] = moved[image]

    in_parallel(move, range(len(copy)), threads)
    return copy


def _float32(array: NDArray[Any], name: str) -> NDArray[np.float32]:
    """The values as a C-contiguous array."""
    _require_floats(array, name)
    with np.errstate(all="ignore"):  # tiny values are rounded, infinite ones refused by the kernels
        return np.require(array, np.float32, ["C", "A"])


def _require_floats(array: NDArray[Any], name: str) -> None:
    if array.dtype.kind != "f":
        raise TypeError(f"{name} must hold floating-point values; got dtype {array.dtype}")
