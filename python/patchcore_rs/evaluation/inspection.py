"""Test sets inspected: scores and maps of their images, and the ground truth beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from patchcore_rs.images.files import resize_crop_mask
from patchcore_rs.images.masks import read_sample_marks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_rs._types import OnError, Progress
    from patchcore_rs.detector.patchcore import PatchCore
    from patchcore_rs.features.feature_set import FeatureSet
    from patchcore_rs.images.datasets import Dataset, Sample
    from patchcore_rs.model.map_values import MapScale
    from patchcore_rs.model.settings import Settings


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
    require_test(dataset)
    if features is None:
        paths = [sample.path for sample in dataset.test]
        prediction = model.predict(paths, progress=progress, on_error=on_error, in_training=True)
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


def require_test(dataset: Dataset) -> None:
    """Refuse a data set without test images."""
    if not dataset.test:
        raise ValueError(
            f"{dataset.name}: no test images; evaluation needs test/good and a folder for each kind of flaw"
        )
