"""Exact metrics of image scores, and their curves; what labels and scores may be says `metrics`. Needs numpy only."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from patchcore_rs import _native
from patchcore_rs._arrays import as_array, floats
from patchcore_rs._checks import number

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from patchcore_rs._arrays import Floats

__all__ = [
    "F1Optimum",
    "FullRecall",
    "Interval",
    "PrecisionRecallCurve",
    "RocCurve",
    "average_precision",
    "f1_optimal",
    "full_recall",
    "image_auroc",
    "image_auroc_interval",
    "precision_recall_curve",
    "roc_curve",
]


class F1Optimum(NamedTuple):
    """A threshold and its errors, which are images or, of `pixel_f1_optimal`, pixels."""

    threshold: float
    """Anomalous where score >= threshold; one of the scores."""
    f1: float
    """F1 at the threshold: 2 · found / (2 · found + false alarms + misses)."""
    false_alarms: int
    """Normal images, or pixels, at or above the threshold."""
    misses: int
    """Anomalous images, or pixels, below it."""

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


class Interval(NamedTuple):
    """Where a metric of other images like these may lie."""

    lower: float
    upper: float


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
    return _native.roc_auc(*_images(labels, scores), sizes=None, threads=1)


def image_auroc_interval(labels: ArrayLike, scores: ArrayLike, confidence: float = 0.95) -> Interval:
    """A confidence interval of `image_auroc`: what other images of the same kinds may give.

    The variance is that of DeLong, DeLong & Clarke-Pearson (Biometrics 1988), by ranks (Sun & Xu, IEEE Signal
    Processing Letters 2014), and the interval symmetric in the logit, log(AUROC / (1 - AUROC)), so within 0 and 1;
    other programs have it symmetric in AUROC, where it is too narrow near 1. It supposes images that do not depend on
    each other. Of normally distributed scores, 5 to 40 images a class and AUROC from 0.9 to 0.995, that of 95 % holds
    the AUROC in 90 to 99 % of draws.

    Where all anomalous images score above all normal ones the estimated variance is 0, for two images of each class as
    for a thousand. The lower end is then that of scores of which the closest pair is swapped, and the upper one 1.
    Likewise the upper end where all score below. Where all tie nothing is known: from 0 to 1.

    Args:
        labels: (n,) 0 or 1, or bool; at least two of each class.
        scores: (n,) finite.
        confidence: how often such an interval is to hold the AUROC of all images, between 0 and 1.

    Raises:
        TypeError: labels, scores or confidence have a type that is none of these.
        ValueError: see the module; fewer than two images of a class, which say nothing of how they vary; or confidence
            is out of range.

    Example:
        >>> from patchcore_rs.metrics import image_auroc_interval
        >>> lower, upper = image_auroc_interval([0, 0, 0, 0, 1, 1, 1, 1], [1, 2, 3, 5, 4, 6, 7, 8])
        >>> round(lower, 3), round(upper, 3)
        (0.438, 0.997)
    """
    confidence = number(confidence, "confidence")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be above 0 and below 1; got {confidence:g}. For 95 % pass 0.95")
    truth, values = _images(labels, scores)
    auroc = image_auroc(truth, values)
    normal, anomalous = np.sort(values[truth == 0]), np.sort(values[truth == 1])
    if min(len(normal), len(anomalous)) < 2:
        raise ValueError(
            "labels must be of at least two images of each class, for the interval is made of how these differ; "
            f"got {len(anomalous)} anomalous of {len(values)} images"
        )
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)
    if auroc == 1:
        normal[-1], anomalous[0] = anomalous[0], normal[-1]
        return Interval(_logit_interval(normal, anomalous, quantile).lower, 1.0)
    if auroc == 0:
        normal[0], anomalous[-1] = anomalous[-1], normal[0]
        return Interval(0.0, _logit_interval(normal, anomalous, quantile).upper)
    return _logit_interval(normal, anomalous, quantile)


def _logit_interval(normal: Floats, anomalous: Floats, quantile: float) -> Interval:
    """The interval of scores that are neither all in order nor all in reverse."""
    beaten, beating = _beaten(anomalous, normal), _beaten(-normal, -anomalous)
    error = math.sqrt(sum(np.var(shares, ddof=1) / len(shares) for shares in (beaten, beating)))
    if error == 0:
        return Interval(0.0, 1.0)
    auroc = float(beaten.mean())
    centre, reach = math.log(auroc / (1 - auroc)), quantile * error / (auroc * (1 - auroc))
    lower, upper = (0.5 + 0.5 * math.tanh(end / 2) for end in (centre - reach, centre + reach))  # no logit overflows
    return Interval(lower, upper)


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Average precision of image scores, in 0 to 1.

    The precision at each distinct score, weighted by the recall that it adds: the area under the
    precision-recall curve without interpolation, as scikit-learn defines it.

    Args:
        labels: (n,) 0 or 1, or bool; at least one is 1.
        scores: (n,) finite.
    """
    return _native.average_precision(*_images(labels, scores), sizes=None, threads=1)


def f1_optimal(labels: ArrayLike, scores: ArrayLike) -> F1Optimum:
    """The threshold of the largest F1, and its errors (misclassified images in Table 1 of the paper).

    Among thresholds of equal F1 the highest.

    Args:
        labels: (n,) 0 or 1, or bool; at least one is 1.
        scores: (n,) finite.
    """
    return F1Optimum(*_native.f1_optimal(*_images(labels, scores), sizes=None, threads=1))


def full_recall(labels: ArrayLike, scores: ArrayLike) -> FullRecall:
    """The highest threshold that finds every anomaly, and its false alarms.

    Args:
        labels: (n,) 0 or 1, or bool; at least one is 1.
        scores: (n,) finite.
    """
    return FullRecall(*_native.full_recall(*_images(labels, scores), sizes=None, threads=1))


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


def _beaten(scores: Floats, others: Floats) -> NDArray[np.float64]:
    """For each score the share of the others that lie below it, ties counting half."""
    ranked = np.sort(others)
    return (np.searchsorted(ranked, scores, "left") + np.searchsorted(ranked, scores, "right")) / (2 * len(others))


def _images(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.uint8], Floats]:
    given_labels, given_scores = as_array(labels, "labels"), as_array(scores, "scores")
    for name, array in (("labels", given_labels), ("scores", given_scores)):
        if array.ndim != 1:
            raise ValueError(f"{name} must have shape (n,), one value for each image; got shape {array.shape}")
    return _zeros_and_ones(given_labels), floats(given_scores, "scores")


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


def _zeros_and_ones(labels: NDArray[Any]) -> NDArray[np.uint8]:
    if labels.dtype.kind not in "biuf":
        raise TypeError(
            f"labels must be bool, or numbers that are 0 (normal) or 1 (anomalous); got dtype {labels.dtype}"
        )
    ones = labels == 1
    other = np.flatnonzero(~ones & (labels != 0))
    if other.size:
        raise ValueError(f"labels must be 0 (normal) or 1 (anomalous); got {labels[other[0]]} at index {other[0]}")
    return np.ascontiguousarray(ones).view(np.uint8)
