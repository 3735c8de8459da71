"""Exact metrics of anomaly scores. Needs numpy only.

Everywhere a higher score is more anomalous, and a threshold calls anomalous what scores at least the
threshold. Equal scores are one threshold, so no result depends on the order of the samples; nor does any on
the number of threads.

The truth comes first, as in scikit-learn: (labels, scores) and (masks, maps). torchmetrics and anomalib take the scores
first, (preds, target); pass names where you come from there.

Images come as `labels` (n,) and `scores` (n,); pixels as `masks` (n, H, W) and `maps` (n, H, W), each one array or a
list of n arrays of one size. torch tensors on the CPU are read where they lie.

- Labels are bool, or numbers that are 0 (normal) or 1 (anomalous).
- Masks are bool, or uint8 as mask images are: above 127 is anomalous. They have been resized (nearest)
  and cropped as the images were.
- Scores and maps are finite numbers: compared as float32 where their dtype fits it, else as float64.

Every function raises ValueError when shapes or values are others, or a class is missing that the metric
needs, and TypeError when a dtype is none of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from patchcore_rs import _native
from patchcore_rs._arrays import as_array
from patchcore_rs._checks import thread_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    Labels = NDArray[np.uint8]
    Scores = NDArray[np.float32] | NDArray[np.float64]
    Stack = ArrayLike | Sequence[ArrayLike]

__all__ = [
    "F1Optimum",
    "FullRecall",
    "PrecisionRecallCurve",
    "RocCurve",
    "average_precision",
    "f1_optimal",
    "full_recall",
    "image_auroc",
    "pixel_auroc",
    "precision_recall_curve",
    "pro",
    "roc_curve",
]


class F1Optimum(NamedTuple):
    """A threshold and its errors."""

    threshold: float
    """Anomalous where score >= threshold; one of the scores."""
    f1: float
    """F1 at the threshold: 2 · found / (2 · found + false alarms + misses)."""
    false_alarms: int
    """Normal images at or above the threshold."""
    misses: int
    """Anomalous images below it."""

    @property
    def misclassified(self) -> int:
        """False alarms and misses together (Table 1 of the paper)."""
        return self.false_alarms + self.misses


class FullRecall(NamedTuple):
    """What finding every anomaly costs."""

    threshold: float
    """The highest threshold that misses nothing: the lowest score of an anomaly."""
    false_alarms: int
    """Normal images at or above the threshold."""


class RocCurve(NamedTuple):
    """An ROC curve, as `sklearn.metrics.roc_curve` gives it with `drop_intermediate=False`."""

    false_positive_rates: NDArray[np.float64]
    """(m + 1,): the share of normal images at or above each threshold, from 0 up to 1."""
    true_positive_rates: NDArray[np.float64]
    """(m + 1,): the share of anomalous images at or above each threshold, from 0 up to 1."""
    thresholds: NDArray[np.float64]
    """(m + 1,): infinity, where nothing is anomalous, then the m distinct scores from the highest down."""


class PrecisionRecallCurve(NamedTuple):
    """A precision-recall curve, as `sklearn.metrics.precision_recall_curve` gives it."""

    precision: NDArray[np.float64]
    """(m + 1,): the share of anomalous images among those at or above each threshold; the last one, 1, has none."""
    recall: NDArray[np.float64]
    """(m + 1,): the share of anomalous images at or above each threshold, from 1 down; the last one, 0, has none."""
    thresholds: NDArray[np.float64]
    """(m,): the distinct scores from the lowest up."""


def image_auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve of image scores, in 0 to 1 (Table 1 of the paper).

    The chance that an anomalous image scores above a normal one, ties counting half. Exact: pairs are
    counted in integers and divided once.

    Args:
        labels: (n,) 0 or 1, or bool.
        scores: (n,) finite.

    Raises:
        ValueError: see the module; AUROC needs both classes.
    """
    return _native.roc_auc(*_images(labels, scores), threads=1)


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Average precision of image scores, in 0 to 1.

    The precision at each distinct score, weighted by the recall that it adds: the area under the
    precision-recall curve without interpolation, as scikit-learn defines it.

    Args:
        labels: (n,) 0 or 1, or bool; at least one is 1.
        scores: (n,) finite.
    """
    return _native.average_precision(*_images(labels, scores), threads=1)


def f1_optimal(labels: ArrayLike, scores: ArrayLike) -> F1Optimum:
    """The threshold of the largest F1, and its errors (misclassified images in Table 1 of the paper).

    Among thresholds of equal F1 the highest.

    Args:
        labels: (n,) 0 or 1, or bool; at least one is 1.
        scores: (n,) finite.
    """
    return F1Optimum(*_native.f1_optimal(*_images(labels, scores), threads=1))


def full_recall(labels: ArrayLike, scores: ArrayLike) -> FullRecall:
    """The highest threshold that finds every anomaly, and its false alarms.

    Args:
        labels: (n,) 0 or 1, or bool; at least one is 1.
        scores: (n,) finite.
    """
    return FullRecall(*_native.full_recall(*_images(labels, scores), threads=1))


def roc_curve(labels: ArrayLike, scores: ArrayLike) -> RocCurve:
    """The ROC curve of image scores: which share of both classes scores at or above each threshold.

    Every distinct score is a threshold and gives a point; equal scores give one. The area under straight lines between
    the points is `image_auroc`. Of pixels pass `masks.ravel()`, as bool, and `maps.ravel()`: the curve has a point for
    each distinct value of the maps, so it can be as long as they are.

    Args:
        labels: (n,) 0 or 1, or bool; of both classes.
        scores: (n,) finite.

    Returns:
        A `RocCurve`: rates of false and of true positives, and thresholds, (m + 1,) float64 each for m distinct scores.

    Raises:
        TypeError: labels or scores have a dtype that is none of the module's.
        ValueError: see the module; the curve needs both classes.

    Example:
        >>> from patchcore_rs.metrics import roc_curve
        >>> curve = roc_curve([0, 0, 1, 1], [1.0, 4.0, 4.0, 8.0])
        >>> curve.thresholds.tolist()
        [inf, 8.0, 4.0, 1.0]
        >>> curve.true_positive_rates.tolist()
        [0.0, 0.5, 1.0, 1.0]
        >>> curve.false_positive_rates.tolist()
        [0.0, 0.0, 0.5, 1.0]
    """
    found, alarms, thresholds = _operating_points(labels, scores)
    if 0 in (found[-1], alarms[-1]):
        raise ValueError(
            "labels must be of both classes, for an ROC curve compares anomalous images with normal ones; "
            f"got {found[-1]} anomalous of {alarms[-1] + found[-1]} images"
        )
    return RocCurve(np.append(0, alarms) / alarms[-1], np.append(0, found) / found[-1], np.append(np.inf, thresholds))


def precision_recall_curve(labels: ArrayLike, scores: ArrayLike) -> PrecisionRecallCurve:
    """The precision-recall curve of image scores: how many of those called anomalous are, and how many are found.

    Every distinct score is a threshold and gives a point; equal scores give one. `average_precision` is the sum of each
    point's precision times the recall that it adds. For pixels see `roc_curve`.

    Args:
        labels: (n,) 0 or 1, or bool; at least one is 1.
        scores: (n,) finite.

    Returns:
        A `PrecisionRecallCurve`: precision and recall, (m + 1,) float64, and thresholds, (m,) float64, for m distinct
        scores.

    Raises:
        TypeError: labels or scores have a dtype that is none of the module's.
        ValueError: see the module; the curve needs an anomalous image.

    Example:
        >>> from patchcore_rs.metrics import precision_recall_curve
        >>> curve = precision_recall_curve([0, 0, 1, 1], [1.0, 4.0, 4.0, 8.0])
        >>> curve.thresholds.tolist()
        [1.0, 4.0, 8.0]
        >>> curve.recall.tolist()
        [1.0, 1.0, 0.5, 0.0]
    """
    found, alarms, thresholds = _operating_points(labels, scores)
    if found[-1] == 0:
        raise ValueError(
            "labels must be 1 (anomalous) at least once, for recall is about finding anomalous images; "
            f"got 0 anomalous of {alarms[-1]} images"
        )
    precision, recall = found / (found + alarms), found / found[-1]
    return PrecisionRecallCurve(np.append(precision[::-1], 1), np.append(recall[::-1], 0), thresholds[::-1].copy())


def pixel_auroc(masks: Stack, maps: Stack, *, threads: int | None = None) -> float:
    """Area under the ROC curve over all pixels of the set, in 0 to 1 (Table 2 of the paper).

    Args:
        masks: (n, H, W) bool, or uint8 where above 127 is anomalous.
        maps: (n, H, W) finite anomaly maps.
        threads: None for as many as this process may use.

    Raises:
        ValueError: see the module; AUROC needs normal and anomalous pixels.
    """
    return _native.roc_auc(*_pixels(masks, maps), threads=thread_count(threads))


def pro(masks: Stack, maps: Stack, fpr_limit: float = 0.3, *, threads: int | None = None) -> float:
    """Per-region overlap, averaged up to a false positive rate; in 0 to 1 (Table 3 of the paper).

    At a threshold, the overlap is the mean over all anomalous regions of the set (8-connected, all of
    equal weight) of the part of the region that is found, and the false positive rate is the part of all
    normal pixels of the set that is found. The result is the area under overlap over rate from 0 to
    `fpr_limit`, divided by `fpr_limit`: every distinct score is a threshold, with straight lines between
    them, also where the last one crosses the limit (Bergmann et al., The MVTec Anomaly Detection Dataset,
    IJCV 2021).

    Args:
        masks: (n, H, W) bool, or uint8 where above 127 is anomalous.
        maps: (n, H, W) finite anomaly maps.
        fpr_limit: above 0, at most 1.
        threads: None for as many as this process may use.

    Raises:
        ValueError: see the module; PRO needs normal and anomalous pixels.
    """
    return _native.pro(*_pixels(masks, maps), fpr_limit=float(fpr_limit), threads=thread_count(threads))


def _images(labels: ArrayLike, scores: ArrayLike) -> tuple[Labels, Scores]:
    given_labels, given_scores = as_array(labels, "labels"), as_array(scores, "scores")
    for name, array in (("labels", given_labels), ("scores", given_scores)):
        if array.ndim != 1:
            raise ValueError(f"{name} must have shape (n,), one value for each image; got shape {array.shape}")
    return _zeros_and_ones(given_labels), _floats(given_scores, "scores")


def _operating_points(
    labels: ArrayLike, scores: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """At each distinct score from the highest down: anomalous and normal images at or above it, and the score."""
    truth, values = _images(labels, scores)
    if len(truth) != len(values):
        raise ValueError(f"scores must be of the same length as labels, {len(truth)}; got {len(values)}")
    if len(values) == 0:
        raise ValueError("scores is empty: a curve needs at least one score")
    infinite = np.flatnonzero(~np.isfinite(values))
    if infinite.size:
        raise ValueError(f"scores must be finite everywhere; got {values[infinite[0]]} at index {infinite[0]}")
    order = np.argsort(values, kind="stable")[::-1]
    ranked = values[order]
    lasts = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    found = np.cumsum(truth[order], dtype=np.int64)[lasts]
    return found, lasts + 1 - found, ranked[lasts].astype(np.float64)


def _pixels(masks: Stack, maps: Stack) -> tuple[Labels, Scores]:
    return _thresholded(_stacked(masks, "masks")), _floats(_stacked(maps, "maps"), "maps")


def _zeros_and_ones(labels: NDArray[Any]) -> Labels:
    if labels.dtype.kind not in "biuf":
        raise TypeError(
            f"labels must be bool, or numbers that are 0 (normal) or 1 (anomalous); got dtype {labels.dtype}"
        )
    ones = labels == 1
    other = np.flatnonzero(~ones & (labels != 0))
    if other.size:
        raise ValueError(f"labels must be 0 (normal) or 1 (anomalous); got {labels[other[0]]} at index {other[0]}")
    return _bytes(ones)


def _thresholded(masks: NDArray[Any]) -> Labels:
    if masks.dtype == np.bool_:
        return _bytes(masks)
    if masks.dtype != np.uint8:
        raise TypeError(
            f"masks must be bool, or uint8 where above 127 is anomalous; got dtype {masks.dtype}. "
            "For zeros and ones pass masks != 0"
        )
    anomalous = masks > 127
    if masks.any() and not anomalous.any():
        raise ValueError(
            f"masks are uint8 of at most {masks.max()}, where only above 127 is anomalous: no pixel would be. "
            "Pass masks != 0, or values of 0 and 255"
        )
    return _bytes(anomalous)


def _bytes(flags: NDArray[np.bool_]) -> Labels:
    return np.ascontiguousarray(flags).view(np.uint8)


def _floats(scores: NDArray[Any], name: str) -> Scores:
    if scores.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold numbers; got dtype {scores.dtype}")
    dtype = np.float32 if np.can_cast(scores.dtype, np.float32) else np.float64
    return np.require(scores, dtype, ["C", "A"])


def _stacked(given: Stack, name: str) -> NDArray[Any]:
    if isinstance(given, (list, tuple)):
        arrays = [as_array(array, f"{name}[{index}]") for index, array in enumerate(given)]
        for index, array in enumerate(arrays):
            if array.shape != arrays[0].shape:
                raise ValueError(
                    f"{name} must all have one size; {name}[0] has shape {arrays[0].shape} and "
                    f"{name}[{index}] has {array.shape}"
                )
        stack = np.stack(arrays) if arrays else np.empty(0)
    else:
        stack = as_array(given, name)
    if stack.ndim != 3:
        raise ValueError(f"{name} must have shape (n, H, W), one (H, W) array for each image; got shape {stack.shape}")
    return stack
