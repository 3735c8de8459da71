"""Test sets inspected and judged: the numbers of one row of a results table, and the seconds they took."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from patchcore_rs import metrics
from patchcore_rs._checks import flags
from patchcore_rs._progress import reporting
from patchcore_rs.images.datasets import Dataset, Sample
from patchcore_rs.images.files import resize_crop_mask
from patchcore_rs.images.layouts import load_dataset
from patchcore_rs.images.masks import judge_masks, measure_mask, read_sample_marks

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_rs._types import OnError, Progress
    from patchcore_rs.detector.patchcore import PatchCore
    from patchcore_rs.features.feature_set import FeatureSet
    from patchcore_rs.model.map_values import MapScale
    from patchcore_rs.model.settings import Settings


PRO_LIMIT = 0.3


@dataclass(frozen=True)
class Inspection:
    """Images with their anomaly scores and maps, and what is known about them.

    `scores` (n,) float64, `maps` (n, H, W) float32, both higher where more anomalous; `paths` and `kinds` hold n
    entries. Where there is ground truth, `labels` (n,) uint8 is 1 for anomalous images and `masks` (n, H, W) bool
    is True on anomalous pixels; `ignored`, of that shape, is True on pixels that count in no pixel metric, None where
    there are none. `threshold` is a calibrated one, None where there is none.
    `map_scale` is that of the model, None where it knows none. `in_training` (n,) bool says which images the model was
    trained on, None where that is not known.
    """

    name: str
    paths: tuple[Path, ...]
    scores: NDArray[np.float64]
    maps: NDArray[np.float32]
    kinds: tuple[str, ...] = ()
    labels: NDArray[np.uint8] | None = None
    masks: NDArray[np.bool_] | None = None
    threshold: float | None = None
    map_scale: MapScale | None = None
    in_training: NDArray[np.bool_] | None = None
    ignored: NDArray[np.bool_] | None = None


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


def inspect(
    model: PatchCore,
    dataset: Dataset,
    *,
    features: FeatureSet | None = None,
    progress: Progress | None = None,
    on_error: OnError = "raise",
) -> Inspection:
    """Score the test images of a data set with a fitted model and lay the ground truth beside the maps.

    Masks are resized and cropped as the images were; there are none where an anomalous image has none.

    Args:
        model: a fitted detector.
        dataset: its test images are scored.
        features: those of the test images, in their order, where they are there already.
        progress: as in `PatchCore.predict`.
        on_error: as in `PatchCore.predict`; images left out are no part of the inspection.

    Raises:
        ValueError: the data set has no test images, or one cannot be read.
    """
    _require_test(dataset)
    if features is None:
        paths = [sample.path for sample in dataset.test]
        prediction = model.predict(paths, progress=progress, on_error=on_error)
    else:
        prediction = model.predict_features(features)
    unread = {name for name, _ in prediction.skipped}
    samples = [sample for sample in dataset.test if str(sample.path) not in unread]
    masks = ignored = None
    if samples and all(sample.mask is not None for sample in samples if sample.label):
        masks, ignored = _stack_marks(samples, model.settings_)
    return Inspection(
        dataset.name,
        tuple(sample.path for sample in samples),
        prediction.scores,
        cast("NDArray[np.float32]", prediction.maps),
        tuple(sample.kind for sample in samples),
        np.array([sample.label for sample in samples], dtype=np.uint8),
        masks,
        prediction.threshold,
        prediction.map_scale,
        prediction.in_training,
        ignored,
    )


def _stack_marks(samples: Sequence[Sample], settings: Settings) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
    """Anomalous pixels and those to leave out, None where there are none, as the model sees the images."""

    def seen(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return resize_crop_mask(mask, settings.resize, settings.crop)

    masks, left_out = [], {}
    for i, sample in enumerate(samples):
        marks = read_sample_marks(sample)
        masks.append(seen(marks.anomalous))
        if marks.ignored.any():
            left_out[i] = seen(marks.ignored)
    stack = np.stack(masks)
    if not left_out:
        return stack, None
    ignored = np.zeros_like(stack)
    ignored[list(left_out)] = list(left_out.values())
    return stack, ignored


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


@dataclass(frozen=True)
class Run:
    """A model fitted to a data set and judged on it.

    `fit_seconds` and `inspect_seconds` are by stage, for `trained_on` and for all test images; reading images is part
    of "backbone", and runs that share one pass of the backbone all state that pass. `kinds` is empty where the test
    images leave no threshold to find.
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


def evaluate(
    dataset: Dataset | str | os.PathLike[str],
    *,
    coresets: Sequence[float | None] = (0.1,),
    seeds: Sequence[int] = (0,),
    progress: Progress | bool | None = None,
    on_error: OnError = "raise",
    strict: bool = False,
    **parameters: Any,
) -> list[Run]:
    """Fit `PatchCore` to a data set with every coreset and every seed, inspect its test images, judge the scores.

    The images pass the backbone once, however many fits there are: `coreset` and `seed` change no feature. Features
    that do not fit into memory beside a fit are computed anew for each, with a warning.

    Args:
        dataset: of `load_dataset`, or its folder.
        coresets: each as `PatchCore(coreset=...)`.
        seeds: each as `PatchCore(seed=...)`.
        progress: called with (stage, done, total or None); stages "features" and "coreset" for the training images,
            "test features" and "scores" for the test images. True draws bars on stderr.
        on_error: "raise", or "skip" to leave out images that cannot be read, with a warning; test images whose mask
            cannot be read are such too. All masks are read before the first fit.
        strict: refuse test images that were trained on, rather than warn of their number. They are known by the hash of
            their samples, whatever their names.
        **parameters: of `PatchCore`.

    Returns:
        A `Run` for each coreset and, within it, each seed.

    Raises:
        TypeError: a parameter is none of `PatchCore`'s or has the wrong type, or is `coreset` or `seed`.
        ValueError: there are no test images, some were trained on and `strict` is set, or what fitting and predicting
            raise.
    """
    from patchcore_rs.detector.extraction import check_for
    from patchcore_rs.detector.patchcore import PatchCore

    strict = flags(strict, "strict")
    for name, plural in (("coreset", "coresets"), ("seed", "seeds")):
        if name in parameters:
            raise TypeError(f"{name} must be given as {plural}=(...), one for each run")
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset)
    _require_test(dataset)
    dataset = _with_readable_masks(dataset, on_error)
    choices: list[dict[str, Any]] = [{"coreset": coreset, "seed": seed} for coreset in coresets for seed in seeds]
    if not choices:
        raise ValueError("coresets and seeds must hold at least one value each; got none")
    model = PatchCore(**parameters, **choices[0])
    with reporting(progress) as report:
        call = _Call(dataset, report, on_error)
        if len(choices) == 1:
            model.fit(dataset, progress=report, on_error=on_error)
            run = _judged(model, call, None)
            _check_leaks(run.inspection, strict=strict)
            return [run]
        tested = [sample.path for sample in dataset.test]
        # By the training images alone.
        model.set_params(white_level=check_for(model.get_params(), dataset, on_error)["white_level"])
        kept = _Kept(_extract(model, dataset.train, "features", call), _extract(model, tested, "test features", call))
        runs = []
        for choice in choices:
            model.set_params(**choice)
            _fit_within_memory(model, kept, call)
            runs.append(_judged(model, call, kept.test))
            if len(runs) == 1:
                _check_leaks(runs[0].inspection, strict=strict)
        return runs


class _Call(NamedTuple):
    """What every step of an evaluation is told."""

    dataset: Dataset
    progress: Progress | None
    on_error: OnError


@dataclass
class _Kept:
    """The features that all runs share, in one place, so that giving them up frees their memory."""

    train: FeatureSet | None
    test: FeatureSet | None


def _extract(model: PatchCore, images: Sequence[Path], stage: str, call: _Call) -> FeatureSet | None:
    """The features of some images; None, with a warning, where they do not fit into memory."""

    def advance(_: str, done: int, total: int | None) -> None:
        if call.progress is not None:
            call.progress(stage, done, total)

    try:
        return model.extract(images, progress=advance, on_error=call.on_error)
    except MemoryError as error:
        _warn_of_memory(stage, error)
        return None


def _fit_within_memory(model: PatchCore, kept: _Kept, call: _Call) -> None:
    """Fit; give up first the test features and then the training features where memory is short."""
    while True:
        try:
            if kept.train is None:
                model.fit(call.dataset, progress=call.progress, on_error=call.on_error)
            else:
                model.fit_features(kept.train, progress=call.progress)
            return
        except MemoryError as error:
            if kept.test is not None:
                kept.test = None
                _warn_of_memory("test features", error)
            elif kept.train is not None:
                kept.train = None
                _warn_of_memory("features", error)
            else:
                raise


def _warn_of_memory(what: str, error: MemoryError) -> None:
    warnings.warn(f"the {what} are not kept, and computed anew for each run: {error}", stacklevel=4)


def _judged(model: PatchCore, call: _Call, test: FeatureSet | None) -> Run:
    """Inspect and judge with a model that was fitted just now."""
    fitting = dict(model.timings_)
    inspection = inspect(model, call.dataset, features=test, progress=call.progress, on_error=call.on_error)
    inspecting = {stage: seconds - fitting.get(stage, 0.0) for stage, seconds in model.timings_.items()}
    if test is not None:
        inspecting |= test.seconds
    metrics = judge(inspection, threads=model.threads)
    kinds: tuple[KindMetrics, ...] = ()
    if metrics.threshold is not None:
        kinds = tuple(judge_kinds(inspection, metrics.threshold, threads=model.threads))
    return Run(
        inspection,
        metrics,
        kinds,
        model.settings_,
        model.backbone_name_,
        model.memory_bank_.shape,
        len(call.dataset.train) - len(model.skipped_),
        fitting,
        inspecting,
    )


def _check_leaks(inspection: Inspection, *, strict: bool) -> None:
    """Warn of test images that were trained on, or refuse them where `strict`."""
    in_training, labels = inspection.in_training, inspection.labels
    if in_training is None or labels is None or not in_training.any():
        return
    found = [f"{(in_training & (labels == label)).sum():,} of {(labels == label).sum():,}" for label in (0, 1)]
    first = inspection.paths[int(in_training.argmax())]
    message = (
        f"{inspection.name}: {found[0]} good and {found[1]} anomalous test images were trained on, the first {first}, "
        "and score less than others do: the metrics are not those of new images. Take them out of the training or the "
        "test images"
    )
    if strict:
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


def _require_test(dataset: Dataset) -> None:
    if not dataset.test:
        raise ValueError(
            f"{dataset.name}: no test images; evaluation needs test/good and a folder for each kind of flaw"
        )


def _with_readable_masks(dataset: Dataset, on_error: OnError) -> Dataset:
    """The data set without the test images whose mask cannot be read; or ImageError, before any work is done."""
    from patchcore_rs.images.read_ahead import read_ahead
    from patchcore_rs.images.sources import Item

    masked = [Item(str(sample.path), sample.path, sample) for sample in dataset.test if sample.mask is not None]
    if not masked:
        return dataset
    bad: dict[str, Exception] = {}
    skip = bad.__setitem__ if on_error == "skip" else None
    # Masks are read again where they are needed: kept, those of a test set take as much memory as its maps.
    read = read_ahead(iter(masked), measure_mask, None, ahead=0, on_failure=skip)
    marked = {name: mask for name, _, mask in read}
    judge_masks({sample: marked[str(sample.path)] for sample in dataset.test if str(sample.path) in marked})
    if not bad:
        return dataset
    name, error = next(iter(bad.items()))
    warnings.warn(f"{len(bad)} of {len(dataset.test)} images were left out; the first: {name} ({error})", stacklevel=3)
    return replace(dataset, test=tuple(sample for sample in dataset.test if str(sample.path) not in bad))


def mean_metric(values: Iterable[float | None]) -> float | None:
    """The mean of the values there are; None where there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
