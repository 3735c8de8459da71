"""Test sets inspected and judged: the numbers of one row of a results table, and the seconds they took."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from patchcore_rs._checks import flags, numbers
from patchcore_rs._progress import reporting
from patchcore_rs._text import counted
from patchcore_rs.evaluation.ground_truth import require_memory_for_masks, with_readable_masks
from patchcore_rs.evaluation.inspection import Inspection, inspect, require_test
from patchcore_rs.evaluation.judging import PRO_LIMIT, KindMetrics, Metrics, Pixels, check_pixels, judge, judge_kinds
from patchcore_rs.images.datasets import Dataset
from patchcore_rs.images.layouts import load_dataset

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from patchcore_rs._types import OnError, Progress
    from patchcore_rs.detector.base import Detector
    from patchcore_rs.detector.patchcore import PatchCore
    from patchcore_rs.features.feature_set import FeatureSet
    from patchcore_rs.memory_bank import MemoryBank
    from patchcore_rs.methods.ensemble import Ensemble
    from patchcore_rs.model.settings import Settings

_fpr_limit = numbers(0, 1, above=True)


@dataclass(frozen=True)
class Run:
    """A model fitted to a data set and judged on it.

    `summary` says what it learnt in a few words; `bank` are the rows and channels of its memory bank, None where its
    method has none.
    `fit_seconds` and `inspect_seconds` are by stage, for `trained_on` and for all test images; reading images is part
    of "backbone", and runs that share one pass of the backbone all state that pass.
    """

    inspection: Inspection
    metrics: Metrics
    kinds: tuple[KindMetrics, ...]
    settings: Settings
    backbone: str
    summary: str
    bank: tuple[int, int] | None
    trained_on: int
    fit_seconds: dict[str, float]
    inspect_seconds: dict[str, float]


def evaluate(
    dataset: Dataset | str | os.PathLike[str],
    *,
    coresets: Sequence[float | Literal["auto"] | None] = ("auto",),
    seeds: Sequence[int] = (0,),
    progress: Progress | bool | None = None,
    on_error: OnError = "raise",
    strict: bool = False,
    pixels: Pixels = "mask",
    fpr_limit: float = PRO_LIMIT,
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
            "test features", "scores" and "metrics", all flaws and each kind of them, for the test images. True draws
            bars on stderr.
        on_error: "raise", or "skip" to leave out images that cannot be read, with a warning; test images whose mask
            cannot be read are such too. All masks are read before the first fit.
        strict: refuse test images that were trained on, rather than warn of their number. They are known by the hash of
            their samples, whatever their names.
        pixels: "mask" judges pixels in the masks' own size, so that what crop and resize take away counts: maps are
            brought back, and what was not seen has the smallest map value of the test set. "model" judges at the size
            at which the model sees the images, as published figures do, and takes less memory.
        fpr_limit: the false positive rate of pixels up to which PRO is averaged, above 0 and at most 1.
        **parameters: of `PatchCore`.

    Returns:
        A `Run` for each coreset and, within it, each seed.

    Raises:
        TypeError: a parameter is none of `PatchCore`'s or has the wrong type, or is `coreset` or `seed`.
        ValueError: there are no test images, some were trained on and `strict` is set, or what fitting and predicting
            raise.
        MemoryError: before any work, the metrics of pixels would not fit into memory.
    """
    from patchcore_rs.detector.extraction import find_white_level
    from patchcore_rs.detector.patchcore import PatchCore

    strict = flags(strict, "strict")
    pixels, fpr_limit = check_pixels(pixels, "pixels"), _fpr_limit(fpr_limit, "fpr_limit")
    for name, plural in (("coreset", "coresets"), ("seed", "seeds")):
        if name in parameters:
            raise TypeError(f"{name} must be given as {plural}=(...), one for each run")
    choices: list[dict[str, Any]] = [{"coreset": coreset, "seed": seed} for coreset in coresets for seed in seeds]
    if not choices:
        raise ValueError("coresets and seeds must hold at least one value each; got none")
    model = PatchCore(**parameters, **choices[0])
    dataset = _readable(dataset, pixels, on_error)
    with reporting(progress) as report:
        call = _Call(dataset, report, on_error, strict, pixels, fpr_limit)
        if len(choices) == 1:
            model.fit(dataset, progress=report, on_error=on_error)
            return [_judged(model, call, None, None)]
        tested = [sample.path for sample in dataset.test]
        # By the training images alone.
        model.set_params(white_level=find_white_level(model._checked(), dataset, on_error)["white_level"])
        kept = _Kept(_extract(model, dataset.train, "features", call), _extract(model, tested, "test features", call))
        runs: list[Run] = []
        for choice in choices:
            model.set_params(**choice)
            _fit_within_memory(model, kept, call)
            runs.append(_judged(model, call, kept.test, runs[0] if runs else None))
        return runs


def evaluate_detector(
    detector: Detector | Ensemble,
    dataset: Dataset | str | os.PathLike[str],
    *,
    progress: Progress | bool | None = None,
    on_error: OnError = "raise",
    strict: bool = False,
    pixels: Pixels = "mask",
    fpr_limit: float = PRO_LIMIT,
) -> Run:
    """Fit a detector of any method, or an ensemble, to a data set, inspect its test images, judge the scores.

    Takes, calls and raises what `evaluate` does; the detector is fitted anew, and stays fitted.
    """
    strict = flags(strict, "strict")
    pixels, fpr_limit = check_pixels(pixels, "pixels"), _fpr_limit(fpr_limit, "fpr_limit")
    dataset = _readable(dataset, pixels, on_error)
    with reporting(progress) as report:
        call = _Call(dataset, report, on_error, strict, pixels, fpr_limit)
        detector.fit(dataset, progress=report, on_error=on_error)
        return _judged(detector, call, None, None)


def _readable(dataset: Dataset | str | os.PathLike[str], pixels: Pixels, on_error: OnError) -> Dataset:
    """The data set with masks that were read once; refused where it has no test images, or too large for memory."""
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset)
    require_test(dataset)
    if pixels == "mask":
        require_memory_for_masks(dataset)
    return with_readable_masks(dataset, on_error)


class _Call(NamedTuple):
    """What every step of an evaluation is told."""

    dataset: Dataset
    progress: Progress | None
    on_error: OnError
    strict: bool
    pixels: Pixels
    fpr_limit: float


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


def _judged(model: Detector | Ensemble, call: _Call, test: FeatureSet | None, first: Run | None) -> Run:
    """Inspect and judge with a model that was fitted just now; the first run warns of what is so in all of them."""
    fitting = dict(model.timings_)
    before = None if first is None else first.inspection
    inspection = inspect(
        model, call.dataset, features=test, progress=call.progress, on_error=call.on_error, before=before
    )
    inspecting = {stage: seconds - fitting.get(stage, 0.0) for stage, seconds in model.timings_.items()}
    if test is not None:
        inspecting |= test.seconds
    if first is None:
        _check_leaks(inspection, strict=call.strict)
    threads = getattr(model, "threads", None)  # an ensemble's members have their own
    options: dict[str, Any] = {"pixels": call.pixels, "fpr_limit": call.fpr_limit, "threads": threads}

    def advance(done: int, kinds: int) -> None:
        if call.progress is not None:
            call.progress("metrics", 1 + done, 1 + kinds)

    if call.progress is not None:
        call.progress("metrics", 0, None)
    metrics = judge(inspection, **options)
    kinds = judge_kinds(inspection, metrics.threshold, progress=advance, **options)
    if first is None:
        _warn_of_losses(inspection.name, metrics)
    bank: MemoryBank | None = getattr(model, "memory_bank_", None)  # PatchCore's
    return Run(
        inspection,
        metrics,
        tuple(kinds),
        model.settings_,
        model.backbone_name_,
        model.summary_,
        None if bank is None else bank.shape,
        len(call.dataset.train) - len(model.skipped_),
        fitting,
        inspecting,
    )


def _warn_of_losses(name: str, metrics: Metrics) -> None:
    """Warn of flaws that the metrics of pixels do not know or the model has not seen."""
    flawed = counted(metrics.anomalous, "flawed image")
    if metrics.pixels == "model" and (metrics.regions, metrics.unseen_flaws) != (metrics.marked_regions, 0):
        warnings.warn(
            f'{name}: at the size at which the model sees the images, pixels="model", the {metrics.marked_regions:,} '
            f"marked regions become {metrics.regions:,}, and {metrics.unseen_flaws:,} of {flawed} keep no mark",
            stacklevel=4,
        )
    elif metrics.unseen_flaws:
        warnings.warn(
            f"{name}: on {metrics.unseen_flaws:,} of {flawed} all that is marked lies outside the crop, where the "
            'model sees nothing; see the whole image by the profile "inspect", or no crop',
            stacklevel=4,
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
    warnings.warn(message, stacklevel=4)
