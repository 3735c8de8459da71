"""Test sets inspected and judged: the numbers of one row of a results table, and the seconds they took.

No torch here; the model is whatever the caller fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patchcore_rs import metrics
from patchcore_rs.images.datasets import read_sample_mask
from patchcore_rs.images.files import resize_crop_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_rs.detector.patchcore import PatchCore
    from patchcore_rs.images.datasets import Dataset
    from patchcore_rs.model.settings import Settings


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


def judge(inspection: Inspection, *, threads: int | None = None) -> Metrics:
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
        pixel_auroc = metrics.pixel_auroc(inspection.masks, inspection.maps, threads=threads)
        pro = metrics.pro(inspection.masks, inspection.maps, threads=threads)
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


def inspect(
    model: PatchCore, dataset: Dataset, *, progress: Callable[[str, int, int | None], object] | None = None
) -> Inspection:
    """Score the test images of a data set with a fitted model and lay the ground truth beside the maps.

    Masks are resized and cropped as the images were; there are none where an anomalous image has none.
    Raises ValueError where the data set has no test images, and what reading them raises.
    """
    samples, settings = dataset.test, model.settings_
    if not samples:
        raise ValueError(
            f"{dataset.name}: no test images; evaluation needs test/good and a folder for each kind of flaw"
        )
    prediction = model.predict([sample.path for sample in samples], progress=progress)
    masks = None
    if all(sample.mask is not None for sample in samples if sample.label):
        masks = np.stack([resize_crop_mask(read_sample_mask(each), settings.resize, settings.crop) for each in samples])
    return Inspection(
        dataset.name,
        tuple(sample.path for sample in samples),
        prediction.scores,
        prediction.maps,
        tuple(sample.kind for sample in samples),
        np.array([sample.label for sample in samples], dtype=np.uint8),
        masks,
        prediction.threshold,
    )


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
        image_auroc = pixel_auroc = pro = None
        if good.any():
            image_auroc = metrics.image_auroc(inspection.labels[chosen], inspection.scores[chosen])
            if inspection.masks is not None and inspection.masks[of_kind].any():
                masks, maps = inspection.masks[chosen], inspection.maps[chosen]
                pixel_auroc = metrics.pixel_auroc(masks, maps, threads=threads)
                pro = metrics.pro(masks, maps, threads=threads)
        missed = int(np.count_nonzero(inspection.scores[of_kind] < threshold))
        rows.append(KindMetrics(kind, int(np.count_nonzero(of_kind)), missed, image_auroc, pixel_auroc, pro))
    return rows


@dataclass(frozen=True)
class Run:
    """A model fitted to a data set and judged on it.

    `fit_seconds` and `inspect_seconds` are by stage, for `trained_on` and for all test images; reading images is part
    of "backbone". `kinds` is empty where the test images leave no threshold to find.
    """

    inspection: Inspection
    metrics: Metrics
    kinds: tuple[KindMetrics, ...]
    settings: Settings
    backbone: str
    bank: tuple[int, int]
    trained_on: int
    fit_seconds: dict[str, float]
    inspect_seconds: dict[str, float]


def run(
    dataset: Dataset,
    arguments: Mapping[str, Any],
    *,
    progress: Callable[[str, int, int | None], object] | None = None,
) -> Run:
    """Fit `PatchCore(**arguments)` to a data set, inspect its test images, judge the scores.

    Raises what fitting and predicting raise, and ValueError where there are no test images.
    """
    from patchcore_rs.detector.patchcore import PatchCore

    model = PatchCore(**arguments).fit(dataset, progress=progress)
    fitting = dict(model.timings_)
    inspection = inspect(model, dataset, progress=progress)
    inspecting = {stage: seconds - fitting.get(stage, 0.0) for stage, seconds in model.timings_.items()}
    threads = arguments.get("threads")
    metrics = judge(inspection, threads=threads)
    kinds = () if metrics.threshold is None else tuple(judge_kinds(inspection, metrics.threshold, threads=threads))
    return Run(
        inspection,
        metrics,
        kinds,
        model.settings_,
        str(model.backbone),
        model.memory_bank_.shape,
        len(dataset.train),
        fitting,
        inspecting,
    )


def mean_metric(values: Iterable[float | None]) -> float | None:
    """The mean of the values there are; None where there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
