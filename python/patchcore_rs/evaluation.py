"""Anomaly scores judged against labels: the numbers of one row of a results table.

numpy and the metrics only; the model that scored the images may be any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patchcore_rs import metrics

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

GOOD = "good"


@dataclass(frozen=True)
class Inspection:
    """Images with their anomaly scores and maps, and what is known about them.

    `scores` (n,) float64, `maps` (n, H, W) float32, both higher where more anomalous; `paths` and `kinds` hold n
    entries. Where there is ground truth, `labels` (n,) uint8 is 1 for anomalous images and `masks` (n, H, W) bool
    is True on anomalous pixels. `threshold` is a calibrated one, None where there is none.
    """

    name: str
    paths: tuple[Path, ...]
    scores: NDArray[np.float64]
    maps: NDArray[np.float32]
    kinds: tuple[str, ...] = ()
    labels: NDArray[np.uint8] | None = None
    masks: NDArray[np.bool_] | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Metrics:
    """What a test set says about a model; None where it cannot say it.

    `threshold` is the F1-optimal one, `false_alarms` and `misses` are the mistakes at it. `full_recall_threshold` is
    the highest threshold that finds every anomalous image, `full_recall_false_alarms` the mistakes at that.
    """

    good: int
    anomalous: int
    image_auroc: float | None = None
    pixel_auroc: float | None = None
    pro: float | None = None
    threshold: float | None = None
    false_alarms: int | None = None
    misses: int | None = None
    full_recall_threshold: float | None = None
    full_recall_false_alarms: int | None = None

    @property
    def misclassified(self) -> int | None:
        """False alarms and misses at the F1-optimal threshold."""
        if self.false_alarms is None or self.misses is None:
            return None
        return self.false_alarms + self.misses


def judge(inspection: Inspection) -> Metrics:
    """The metrics of a labelled inspection. Raises ValueError where it has no labels."""
    if inspection.labels is None:
        raise ValueError(f"{inspection.name}: no labels; metrics need to know which images are anomalous")
    labels, scores = inspection.labels, inspection.scores
    anomalous = int(np.count_nonzero(labels))
    good = len(labels) - anomalous
    if not good or not anomalous:
        return Metrics(good, anomalous)
    threshold, _, false_alarms, misses = metrics.f1_optimal(labels, scores)
    full_recall_threshold, full_recall_false_alarms = metrics.full_recall(labels, scores)
    pixel_auroc = pro = None
    if inspection.masks is not None and inspection.masks.any():
        pixel_auroc = metrics.pixel_auroc(inspection.masks, inspection.maps)
        pro = metrics.pro(inspection.masks, inspection.maps)
    return Metrics(
        good,
        anomalous,
        metrics.image_auroc(labels, scores),
        pixel_auroc,
        pro,
        threshold,
        false_alarms,
        misses,
        full_recall_threshold,
        full_recall_false_alarms,
    )


@dataclass(frozen=True)
class KindMetrics:
    """One kind of flaw against all good images; `missed` at the threshold of the whole inspection."""

    kind: str
    images: int
    missed: int
    image_auroc: float | None
    pixel_auroc: float | None


def judge_kinds(inspection: Inspection, threshold: float) -> list[KindMetrics]:
    """The metrics of each kind of flaw alone, beside all good images, in the order of the images.

    Raises ValueError where the inspection has no labels or kinds.
    """
    if inspection.labels is None or len(inspection.kinds) != len(inspection.scores):
        raise ValueError(f"{inspection.name}: judging by kind needs the label and the kind of every image")
    kinds = np.array(inspection.kinds)
    good = inspection.labels == 0
    rows = []
    for kind in dict.fromkeys(kinds[~good].tolist()):
        of_kind = ~good & (kinds == kind)
        chosen = good | of_kind
        image_auroc = pixel_auroc = None
        if good.any():
            image_auroc = metrics.image_auroc(inspection.labels[chosen], inspection.scores[chosen])
            if inspection.masks is not None and inspection.masks[of_kind].any():
                pixel_auroc = metrics.pixel_auroc(inspection.masks[chosen], inspection.maps[chosen])
        missed = int(np.count_nonzero(inspection.scores[of_kind] < threshold))
        rows.append(KindMetrics(kind, int(np.count_nonzero(of_kind)), missed, image_auroc, pixel_auroc))
    return rows


def mean_metric(values: list[float | None]) -> float | None:
    """The mean of the values there are; None where there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
