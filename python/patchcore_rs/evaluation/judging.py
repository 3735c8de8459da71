"""The numbers of an inspection: how well it tells good images and pixels from anomalous ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from patchcore_rs import metrics
from patchcore_rs._checks import one_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from patchcore_rs._types import RowProgress
    from patchcore_rs.evaluation.inspection import Inspection

Pixels = Literal["mask", "model"]

PRO_LIMIT = 0.3
check_pixels = one_of("mask", "model")

_OF_SCORES = (
    "image_auroc",
    "image_auroc_interval",
    "image_average_precision",
    "part_auroc",
    "threshold",
    "false_alarms",
    "misses",
    "misclassified",
    "full_recall_threshold",
    "full_recall_false_alarms",
)
OF_MAPS = ("pixel_auroc", "pixel_average_precision", "pixel_f1", "pro", "aupimo")


@dataclass(frozen=True)
class Metrics:
    """What a test set says about a model; None where it cannot say it, and `reasons` by name why.

    Of images: AUROC, its 95 % interval, average precision; `part_auroc` of parts of several images, each with the
    largest of their scores. Of pixels, judged in the masks' own or at the model's size, as `pixels` says: AUROC,
    average precision, the largest F1, PRO up to the false positive rate `fpr_limit`, the mean AUPIMO of the anomalous
    images, and the number of marked `regions`.

    `marked_regions` are those in the masks' own pixels, and `unseen_flaws` the flawed images on which all that is
    marked is cut off by the crop or, at the model's size, lost with the resize.

    `threshold` is the F1-optimal one, `false_alarms` and `misses` are the mistakes at it. `full_recall_threshold` is
    the highest threshold that finds every anomalous image, `full_recall_false_alarms` the mistakes at that.
    """

    good: int
    anomalous: int
    image_auroc: float | None = None
    image_auroc_interval: tuple[float, float] | None = None
    image_average_precision: float | None = None
    part_auroc: float | None = None
    pixels: Pixels | None = None
    pixel_auroc: float | None = None
    pixel_average_precision: float | None = None
    pixel_f1: float | None = None
    pro: float | None = None
    fpr_limit: float = PRO_LIMIT
    aupimo: float | None = None
    regions: int | None = None
    marked_regions: int | None = None
    unseen_flaws: int | None = None
    threshold: float | None = None
    false_alarms: int | None = None
    misses: int | None = None
    full_recall_threshold: float | None = None
    full_recall_false_alarms: int | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def misclassified(self) -> int | None:
        """False alarms and misses at the F1-optimal threshold."""
        if self.false_alarms is None or self.misses is None:
            return None
        return self.false_alarms + self.misses

    def to_json(self) -> dict[str, Any]:
        """All of it as a JSON object."""
        return asdict(self) | {"misclassified": self.misclassified}


def judge(
    inspection: Inspection, *, pixels: Pixels = "mask", fpr_limit: float = PRO_LIMIT, threads: int | None = None
) -> Metrics:
    """The metrics of a labelled inspection.

    Args:
        inspection: with labels.
        pixels: "mask" judges in the images' own pixels, where the inspection has its masks in these, each map brought
            back through crop and resize; what was never seen has the smallest map value of the inspection. "model"
            judges at the size at which the model sees the images.
        fpr_limit: of PRO.
        threads: of the metrics of pixels.

    Raises:
        ValueError: it has no labels, or an argument is out of range.
    """
    check_pixels(pixels, "pixels")
    if inspection.labels is None:
        raise ValueError(f"{inspection.name}: no labels; metrics need to know which images are anomalous")
    good, anomalous = (int(np.count_nonzero(inspection.labels == label)) for label in (0, 1))
    reasons: dict[str, str] = {}
    numbers = _of_images(inspection, reasons) | _of_pixels(inspection, pixels, fpr_limit, threads, reasons)
    return Metrics(good, anomalous, fpr_limit=fpr_limit, reasons=reasons, **numbers)


def _of_images(inspection: Inspection, reasons: dict[str, str]) -> dict[str, Any]:
    """The metrics of image scores, which compare both classes."""
    labels, scores = inspection.labels, inspection.scores
    assert labels is not None
    lacking = _lacking(labels)
    if lacking:
        reasons |= dict.fromkeys(_OF_SCORES, lacking)
        return {}
    threshold, _, false_alarms, misses = metrics.f1_optimal(labels, scores)
    full_recall_threshold, full_recall_false_alarms = metrics.full_recall(labels, scores)
    numbers: dict[str, Any] = {
        "image_auroc": metrics.image_auroc(labels, scores),
        "image_average_precision": metrics.average_precision(labels, scores),
        "threshold": threshold,
        "false_alarms": false_alarms,
        "misses": misses,
        "full_recall_threshold": full_recall_threshold,
        "full_recall_false_alarms": full_recall_false_alarms,
    }
    if 1 < labels.sum() < len(labels) - 1:
        numbers["image_auroc_interval"] = tuple(metrics.image_auroc_interval(labels, scores))
    else:
        reasons["image_auroc_interval"] = "one flawed image" if labels.sum() == 1 else "one good image"
    if not any(inspection.parts):
        reasons["part_auroc"] = "no parts"
        return numbers
    _, part_labels, part_scores = inspection.of_parts()
    lacking = _lacking(part_labels)
    if lacking:
        reasons["part_auroc"] = lacking.replace("images", "parts")
        return numbers
    return numbers | {"part_auroc": metrics.image_auroc(part_labels, part_scores)}


def _lacking(labels: NDArray[np.uint8]) -> str:
    """The class that there is none of, in words; empty where there are both."""
    return "" if 0 < labels.sum() < len(labels) else "no good images" if labels.all() else "no flawed images"


class _Marked(NamedTuple):
    """What metrics of pixels take, in one of both sizes."""

    masks: NDArray[np.bool_] | list[NDArray[np.bool_]]
    maps: NDArray[np.float32] | list[NDArray[np.float32]]
    ignored: NDArray[np.bool_] | list[NDArray[np.bool_]] | None


def _of_pixels(
    inspection: Inspection, pixels: Pixels, fpr_limit: float, threads: int | None, reasons: dict[str, str]
) -> dict[str, Any]:
    """The metrics of maps beside masks."""
    labels, truth = inspection.labels, inspection.truth
    assert labels is not None
    if inspection.masks is None or not labels.any():
        lacking = "no masks" if labels.any() else "no flawed images"
        reasons |= dict.fromkeys((*OF_MAPS, "pixels", "regions", "marked_regions", "unseen_flaws"), lacking)
        return {}
    seen, own = inspection.masks, pixels == "mask" and truth is not None
    numbers: dict[str, Any] = {"pixels": "mask" if own else "model"}
    if truth is not None:
        marks = [each.anomalous for each in truth.marks]
        flawed = [i for i in np.flatnonzero(labels).tolist() if marks[i].any()]
        numbers["marked_regions"] = metrics.count_regions(marks, threads=threads)
        numbers["unseen_flaws"] = sum(truth.is_unseen(i) if own else not seen[i].any() for i in flawed)
    marked = _marked(inspection, pixels, threads)
    masks, maps, ignored = marked
    options: dict[str, Any] = {"ignored": ignored, "threads": threads}
    numbers["regions"] = numbers["marked_regions"] if own else metrics.count_regions(masks, **options)
    undefined = _undefined(marked)
    if undefined:
        lost = undefined == _UNMARKED and numbers.get("marked_regions")
        reasons |= dict.fromkeys(OF_MAPS, "nothing marked is left at this size" if lost else undefined)
        return numbers
    numbers |= {
        "pixel_auroc": metrics.pixel_auroc(masks, maps, **options),
        "pixel_average_precision": metrics.pixel_average_precision(masks, maps, **options),
        "pixel_f1": metrics.pixel_f1_optimal(masks, maps, **options).f1,
        "pro": metrics.pro(masks, maps, fpr_limit, **options),
    }
    # A flawed image on which no mark is left is no normal one.
    bare = [i for i in np.flatnonzero(labels).tolist() if not masks[i].any()]
    if bare:
        left_out = [np.zeros_like(mask) for mask in masks] if ignored is None else list(ignored)
        for i in bare:
            left_out[i] = np.ones_like(masks[i])
        options["ignored"] = left_out
    try:
        numbers["aupimo"] = float(np.nanmean(metrics.aupimo(masks, maps, **options)))
    except ValueError:  # normal images cannot show so low a rate
        reasons["aupimo"] = _lacking(labels) or "too few normal pixels"
    return numbers


_UNMARKED = "nothing is marked"


def _undefined(marked: _Marked) -> str:
    """Why images have no metrics of pixels; empty where they have."""
    if not any(mask.any() for mask in marked.masks):
        return _UNMARKED
    left_out = [False] * len(marked.masks) if marked.ignored is None else marked.ignored
    if all((mask | out).all() for mask, out in zip(marked.masks, left_out, strict=True)):
        return "no normal pixels"
    return ""


def _marked(
    inspection: Inspection, pixels: Pixels, threads: int | None, chosen: Sequence[int] | None = None
) -> _Marked:
    """All images, or those that are chosen."""
    truth = inspection.truth
    if truth is None or pixels == "model":
        assert inspection.masks is not None
        at = slice(None) if chosen is None else chosen
        ignored = None if inspection.ignored is None else inspection.ignored[at]
        return _Marked(inspection.masks[at], inspection.maps[at], ignored)
    unseen = float(inspection.maps.min())
    chosen = range(len(truth.marks)) if chosen is None else chosen
    marks = [truth.marks[i] for i in chosen]
    return _Marked(
        [each.anomalous for each in marks],
        [truth.bring_back(i, inspection.maps[i], unseen, threads) for i in chosen],
        [each.ignored for each in marks] if any(each.ignored.any() for each in marks) else None,
    )


@dataclass(frozen=True)
class KindMetrics:
    """One kind of flaw against all good images; `missed` at the threshold of the whole inspection, None without one."""

    kind: str
    images: int
    missed: int | None
    image_auroc: float | None = None
    pixel_auroc: float | None = None
    pro: float | None = None


def judge_kinds(
    inspection: Inspection,
    threshold: float | None,
    *,
    pixels: Pixels = "mask",
    fpr_limit: float = PRO_LIMIT,
    threads: int | None = None,
    progress: RowProgress | None = None,
) -> list[KindMetrics]:
    """The metrics of each kind of flaw alone, beside all good images, in the order of the images.

    Arguments as in `judge`; `progress` is called with the number of kinds that are done and of all.

    Raises:
        ValueError: the inspection has no labels or kinds, or an argument is out of range.
    """
    check_pixels(pixels, "pixels")
    if inspection.labels is None or len(inspection.kinds) != len(inspection.scores):
        raise ValueError(f"{inspection.name}: judging by kind needs the label and the kind of every image")
    kinds = np.array(inspection.kinds)
    good = inspection.labels == 0
    rows: list[KindMetrics] = []
    names = dict.fromkeys(kinds[~good].tolist())
    if progress is not None:
        progress(0, len(names))
    for kind in names:
        of_kind = ~good & (kinds == kind)
        chosen = np.flatnonzero(good | of_kind)
        image_auroc = pixel_auroc = pro = None
        if good.any():
            image_auroc = metrics.image_auroc(inspection.labels[chosen], inspection.scores[chosen])
        if inspection.masks is not None:
            marked = _marked(inspection, pixels, threads, chosen.tolist())
            masks, maps, ignored = marked
            if not _undefined(marked):
                pixel_auroc = metrics.pixel_auroc(masks, maps, ignored=ignored, threads=threads)
                pro = metrics.pro(masks, maps, fpr_limit, ignored=ignored, threads=threads)
        missed = None if threshold is None else int(np.count_nonzero(inspection.scores[of_kind] < threshold))
        rows.append(KindMetrics(kind, int(np.count_nonzero(of_kind)), missed, image_auroc, pixel_auroc, pro))
        if progress is not None:
            progress(len(rows), len(names))
    return rows


def mean_metric(values: Iterable[float | None]) -> float | None:
    """The mean of the values there are; None where there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
