"""Exact metrics of pixels; what masks, maps and ignored pixels may be says `metrics`. Needs numpy only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from patchcore_rs import _native
from patchcore_rs._arrays import as_array, float_type, floats
from patchcore_rs._checks import integer, numbers, ranges, thread_count
from patchcore_rs.image_metrics import F1Optimum

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from patchcore_rs._arrays import Floats

    Stack = ArrayLike | Sequence[ArrayLike]
    Labels = NDArray[np.uint8]
    Sizes = list[tuple[int, int]]
    Images = Sequence[NDArray[Any]] | NDArray[Any]

_IGNORED = 2  # what the kernels leave out, beside 0 (normal) and 1 (anomalous)


def pixel_auroc(masks: Stack, maps: Stack, *, ignored: Stack | None = None, threads: int | None = None) -> float:
    """Area under the ROC curve over all pixels of the set, in 0 to 1 (Table 2 of the paper).

    Args:
        masks: (n, H, W) bool, or uint8 where above 127 is anomalous; or a list of n arrays (H, W).
        maps: finite anomaly maps of the sizes of the masks.
        ignored: bool, of the sizes of the masks: True leaves a pixel out.
        threads: None for as many as this process may use.

    Raises:
        ValueError: see the module; AUROC needs normal and anomalous pixels.
    """
    return _native.roc_auc(*_pixels(masks, maps, ignored), threads=thread_count(threads))


def pixel_average_precision(
    masks: Stack, maps: Stack, *, ignored: Stack | None = None, threads: int | None = None
) -> float:
    """Average precision over all pixels of the set, in 0 to 1: `average_precision` of pixels.

    Args:
        masks: (n, H, W) bool, or uint8 where above 127 is anomalous; or a list of n arrays (H, W).
        maps: finite anomaly maps of the sizes of the masks.
        ignored: bool, of the sizes of the masks: True leaves a pixel out.
        threads: None for as many as this process may use.

    Raises:
        ValueError: see the module; at least one pixel must be anomalous.
    """
    return _native.average_precision(*_pixels(masks, maps, ignored), threads=thread_count(threads))


def pixel_f1_optimal(
    masks: Stack, maps: Stack, *, ignored: Stack | None = None, threads: int | None = None
) -> F1Optimum:
    """The threshold of the largest F1 over all pixels of the set, and its errors: `f1_optimal` of pixels.

    Args:
        masks: (n, H, W) bool, or uint8 where above 127 is anomalous; or a list of n arrays (H, W).
        maps: finite anomaly maps of the sizes of the masks.
        ignored: bool, of the sizes of the masks: True leaves a pixel out.
        threads: None for as many as this process may use.

    Returns:
        An `F1Optimum`, whose false alarms and misses are pixels.

    Raises:
        ValueError: see the module; at least one pixel must be anomalous.
    """
    return F1Optimum(*_native.f1_optimal(*_pixels(masks, maps, ignored), threads=thread_count(threads)))


def pro(
    masks: Stack, maps: Stack, fpr_limit: float = 0.3, *, ignored: Stack | None = None, threads: int | None = None
) -> float:
    """Per-region overlap, averaged up to a false positive rate; in 0 to 1 (Table 3 of the paper).

    At a threshold, the overlap is the mean over all anomalous regions of the set (8-connected, all of
    equal weight) of the part of the region that is found, and the false positive rate is the part of all
    normal pixels of the set that is found. The result is the area under overlap over rate from 0 to
    `fpr_limit`, divided by `fpr_limit`: every distinct score is a threshold, with straight lines between
    them, also where the last one crosses the limit (Bergmann et al., The MVTec Anomaly Detection Dataset,
    IJCV 2021). Ignored pixels are neither normal nor part of a region.

    Args:
        masks: (n, H, W) bool, or uint8 where above 127 is anomalous; or a list of n arrays (H, W).
        maps: finite anomaly maps of the sizes of the masks.
        fpr_limit: above 0, at most 1.
        ignored: bool, of the sizes of the masks: True leaves a pixel out.
        threads: None for as many as this process may use.

    Raises:
        ValueError: see the module; PRO needs normal and anomalous pixels.
    """
    limit = numbers(0, 1, above=True)(fpr_limit, "fpr_limit")
    return _native.pro(*_pixels(masks, maps, ignored), fpr_limit=limit, threads=thread_count(threads))


def aupimo(
    masks: Stack,
    maps: Stack,
    fpr_limits: tuple[float, float] = (1e-5, 1e-4),
    *,
    ignored: Stack | None = None,
    threads: int | None = None,
) -> NDArray[np.float64]:
    """Per-image overlap at so low a false positive rate that normal images show next to nothing (AUPIMO).

    The rate of a threshold is taken of normal images alone: the mean, over the images without an anomalous pixel,
    of the part of an image's pixels that is found. The value of an anomalous image is the part of its anomalous
    pixels that is found, as a mean over the logarithm of that rate between the limits (Bertoldo et al., AUPIMO:
    Redefining Visual Anomaly Detection Benchmarks with High Speed and Low Tolerance, BMVC 2024). Every distinct
    score is a threshold, with straight lines between them as in `pro`; anomalib takes 300 000 thresholds at equal
    distances.

    Args:
        masks: (n, H, W) bool, or uint8 where above 127 is anomalous; or a list of n arrays (H, W).
        maps: finite anomaly maps of the sizes of the masks.
        fpr_limits: (lower, upper) false positive rates, 0 < lower < upper <= 1. The lower one is at least one pixel of
            all normal images of the largest size; 1e-5 needs two of 224 x 224.
        ignored: bool, of the sizes of the masks: True leaves a pixel out.
        threads: None for as many as this process may use.

    Returns:
        (n,) float64 in 0 to 1, one value for each image; NaN for images without an anomalous pixel. Their mean and
        median (`numpy.nanmean`, `numpy.nanmedian`) are what a set is compared by.

    Raises:
        TypeError: `fpr_limits` are no numbers; see the module too.
        ValueError: see the module; AUPIMO needs an anomalous image, and normal images with enough pixels for the lower
            limit.
    """
    limits = ranges(fpr_limits, "fpr_limits")
    return _native.aupimo(*_pixels(masks, maps, ignored), fpr_limits=limits, threads=thread_count(threads))


def count_regions(masks: Stack, *, ignored: Stack | None = None, threads: int | None = None) -> int:
    """The number of anomalous regions of the set, which `pro` averages over; 8-connected.

    Args:
        masks: (n, H, W) bool, or uint8 where above 127 is anomalous; or a list of n arrays (H, W).
        ignored: bool, of the sizes of the masks: True leaves a pixel out, and so may cut a region in two.
        threads: None for as many as this process may use.

    Raises:
        ValueError: see the module.
    """
    given = _images(masks, "masks")
    return _native.count_regions(_labels(given, ignored), _sizes(given), threads=thread_count(threads))


def pixel_memory(pixels: int) -> int:
    """Bytes that a metric of so many pixels takes at its peak beside its arguments, whose maps are float32.

    They are 5 for the pixels of a list in one row, and 9 to rank them: measured, where few pixels are anomalous.
    """
    return 14 * integer(pixels, "pixels", minimum=0)


def _pixels(masks: Stack, maps: Stack, ignored: Stack | None) -> tuple[Labels, Floats, Sizes]:
    """Labels and scores of all pixels, one image after the other, and the size of each image."""
    given_masks, given_maps = _images(masks, "masks"), _images(maps, "maps")
    _require_same_sizes(given_masks, "masks", given_maps, "maps")
    return _labels(given_masks, ignored), _scores(given_maps), _sizes(given_maps)


def _images(given: Stack, name: str) -> Images:
    """One (n, H, W) array, or a list of arrays (H, W)."""
    if isinstance(given, (list, tuple)):
        arrays = [as_array(array, f"{name}[{index}]") for index, array in enumerate(given)]
        for index, array in enumerate(arrays):
            if array.ndim != 2:
                raise ValueError(f"{name}[{index}] must have shape (H, W), as an image; got shape {array.shape}")
        return arrays
    stack = as_array(given, name)
    if stack.ndim != 3:
        raise ValueError(f"{name} must have shape (n, H, W), one (H, W) array for each image; got shape {stack.shape}")
    return stack


def _sizes(images: Images) -> Sizes:
    return [(image.shape[0], image.shape[1]) for image in images]


def _require_same_sizes(images: Images, name: str, others: Images, other: str) -> None:
    if len(images) != len(others):
        raise ValueError(f"{name} must be as many as {other}, one for each; got {len(images)} and {len(others)}")
    for index, (size, wanted) in enumerate(zip(_sizes(images), _sizes(others), strict=True)):
        if size != wanted:
            raise ValueError(f"{name}[{index}] must have the size of {other}[{index}], {wanted}; got {size}")


def _scores(maps: Images) -> Floats:
    if isinstance(maps, np.ndarray):
        return floats(maps, "maps").reshape(-1)
    types = {float_type(image.dtype, f"maps[{index}]") for index, image in enumerate(maps)}
    return _joined(maps, maps, np.float64 if np.float64 in types else np.float32)


def _labels(masks: Images, ignored: Stack | None) -> Labels:
    """0 (normal), 1 (anomalous) or 2 (ignored) of all pixels; a bool array is read where it lies if none is ignored."""
    left_out = _left_out(ignored, masks)
    if isinstance(masks, np.ndarray) and left_out is None:
        anomalous = np.ascontiguousarray(_anomalous(masks)).reshape(-1)
    else:
        anomalous = _joined(map(_anomalous, masks), masks, np.bool_)
    if not anomalous.any():
        _refuse_zeros_and_ones(masks, left_out)
    labels = anomalous.view(np.uint8)
    end = 0
    for image in () if left_out is None else left_out:
        start, end = end, end + image.size
        np.copyto(labels[start:end].reshape(image.shape), _IGNORED, where=image)
    return labels


def _left_out(ignored: Stack | None, masks: Images) -> Images | None:
    """The ignored pixels of each image; None where there are none."""
    if ignored is None:
        return None
    images = _images(ignored, "ignored")
    _require_same_sizes(images, "ignored", masks, "masks")
    for image in images:
        if image.dtype != np.bool_:
            raise TypeError(
                f"ignored must be bool, True where a pixel counts in no metric; got dtype {image.dtype}. "
                "For zeros and ones pass ignored != 0"
            )
    return images if any(image.any() for image in images) else None


def _anomalous(masks: NDArray[Any]) -> NDArray[np.bool_]:
    if masks.dtype == np.bool_:
        return masks
    if masks.dtype != np.uint8:
        raise TypeError(
            f"masks must be bool, or uint8 where above 127 is anomalous; got dtype {masks.dtype}. "
            "For zeros and ones pass masks != 0"
        )
    return masks > 127


def _refuse_zeros_and_ones(masks: Images, left_out: Images | None) -> None:
    """Refuse masks that mark something, but nothing above 127."""
    counted = [True] * len(masks) if left_out is None else map(np.logical_not, left_out)
    highest = max((mask.max(initial=0, where=where) for mask, where in zip(masks, counted, strict=True)), default=0)
    if highest:
        raise ValueError(
            f"masks are uint8 of at most {highest}, where only above 127 is anomalous: no pixel would be. "
            "Pass masks != 0, or values of 0 and 255"
        )


def _joined(values: Iterable[NDArray[Any]], images: Images, dtype: type[np.generic]) -> NDArray[Any]:
    """The values of all images, one image after the other; the sizes are those of `images`."""
    joined = np.empty(sum(image.size for image in images), dtype)
    end = 0
    for value in values:
        start, end = end, end + value.size
        joined[start:end].reshape(value.shape)[...] = value
    return joined
