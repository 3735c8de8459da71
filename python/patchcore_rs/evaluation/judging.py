"""The numbers of an inspection: how well it tells good images and pixels from anomalous ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patchcore_rs import metrics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from patchcore_rs.evaluation.inspection import Inspection

PRO_LIMIT = 0.3


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


def judge(inspection: Inspection, *, threads: int | None = None) -> Metrics:
    """The metrics of a labelled inspection.

    Raises:
        ValueError: it has no labels.
    """
    if inspection.labels is None:
        raise ValueError(f"{inspection.name}: no labels; metrics need to know which images are anomalous")
    labels, scores = inspection.labels, inspection.scores
    anomalous = int(np.count_nonzero(labels))
    good = len(labels) - anomalous
    if not good or not anomalous:
        return Metrics(good, anomalous)
    threshold, _, false_alarms, misses = metrics.f1_optimal(labels, scores)
    full_recall_threshold, full_recall_false_alarms = metrics.full_recall(labels, scores)
    pixel_auroc, pro = _judge_pixels(inspection, slice(None), threads)
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


def _judge_pixels(
    inspection: Inspection, chosen: NDArray[np.bool_] | slice, threads: int | None
) -> tuple[float | None, float | None]:
    """Pixel AUROC and PRO of some of the images; None where nothing is marked on them."""
    if inspection.masks is None or not inspection.masks[chosen].any():
        return None, None
    masks, maps = inspection.masks[chosen], inspection.maps[chosen]
    if inspection.ignored is None or not inspection.ignored[chosen].any():
        return metrics.pixel_auroc(masks, maps, threads=threads), metrics.pro(masks, maps, threads=threads)
    ignored = inspection.ignored[chosen]
    kept = ~ignored
    normal = np.count_nonzero(kept & ~masks)
    # Normal pixels below all others are never found: they change nothing but the number that false positive rates are
    # shares of, and so the limit.
    below = np.where(ignored, np.nextafter(maps.min(), np.float32(-np.inf)), maps)
    limit = PRO_LIMIT * normal / (normal + np.count_nonzero(ignored))
    auroc = metrics.pixel_auroc(masks[kept][None, None], maps[kept][None, None], threads=threads)
    return auroc, metrics.pro(masks, below, limit, threads=threads)


@dataclass(frozen=True)
class KindMetrics:
    """One kind of flaw against all good images; `missed` at the threshold of the whole inspection."""

    kind: str
    images: int
    missed: int
    image_auroc: float | None = None
    pixel_auroc: float | None = None
    pro: float | None = None


def judge_kinds(inspection: Inspection, threshold: float, *, threads: int | None = None) -> list[KindMetrics]:
    """The metrics of each kind of flaw alone, beside all good images, in the order of the images.

    Raises:
        ValueError: the inspection has no labels or kinds.
    """
    if inspection.labels is None or len(inspection.kinds) != len(inspection.scores):
        raise ValueError(f"{inspection.name}: judging by kind needs the label and the kind of every image")
    kinds = np.array(inspection.kinds)
    good = inspection.labels == 0
    rows = []
    for kind in dict.fromkeys(kinds[~good].tolist()):
        of_kind = ~good & (kinds == kind)
        chosen = good | of_kind
        image_auroc = pixel_auroc = pro = None
        if good.any():
            image_auroc = metrics.image_auroc(inspection.labels[chosen], inspection.scores[chosen])
            pixel_auroc, pro = _judge_pixels(inspection, chosen, threads)
        missed = int(np.count_nonzero(inspection.scores[of_kind] < threshold))
        rows.append(KindMetrics(kind, int(np.count_nonzero(of_kind)), missed, image_auroc, pixel_auroc, pro))
    return rows


def mean_metric(values: Iterable[float | None]) -> float | None:
    """The mean of the values there are; None where there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
