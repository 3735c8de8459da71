"""Test sets inspected: scores and maps of their images, and the ground truth beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from patchcore_rs.evaluation.ground_truth import GroundTruth

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_rs._types import OnError, Progress
    from patchcore_rs.detector.base import Detector
    from patchcore_rs.features.feature_set import FeatureSet
    from patchcore_rs.images.datasets import Dataset
    from patchcore_rs.methods.ensemble import Ensemble
    from patchcore_rs.model.map_values import MapScale


@dataclass(frozen=True)
class Inspection:
    """Images with their anomaly scores and maps, and what is known about them.

    `scores` (n,) float64, `maps` (n, H, W) float32, both higher where more anomalous; `paths` and `kinds` hold n
    entries. Where there is ground truth, `labels` (n,) uint8 is 1 for anomalous images and `masks` (n, H, W) bool
    is True on anomalous pixels, as the model sees the images; `ignored`, of that shape, is True on pixels that count in
    no pixel metric, None where there are none. `truth` has the same in the images' own pixels; without it pixel metrics
    are of `masks`. `threshold` is a calibrated one, None where there is none.
    `map_scale` is that of the model, None where it knows none. `in_training` (n,) bool says which images the model was
    trained on, None where that is not known. `parts` names the part that each image is a view of, None or nothing where
    images stand alone.
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
    truth: GroundTruth | None = None
    parts: tuple[str | None, ...] = ()

    def of_parts(self) -> tuple[tuple[str, ...], NDArray[np.uint8], NDArray[np.float64]]:
        """Names, labels and scores of the parts: of its images each has the largest; an image without one stands alone.

        Raises:
            ValueError: there are no labels.
        """
        if self.labels is None:
            raise ValueError(f"{self.name}: no labels; scores of parts are judged by them")
        parts = self.parts or (None,) * len(self.paths)
        names = [part or str(path) for part, path in zip(parts, self.paths, strict=True)]
        order = {name: index for index, name in enumerate(dict.fromkeys(names))}
        places = [order[name] for name in names]
        labels, scores = np.zeros(len(order), np.uint8), np.full(len(order), -np.inf)
        np.maximum.at(labels, places, self.labels)
        np.maximum.at(scores, places, self.scores)
        return tuple(order), labels, scores


def inspect(
    model: Detector | Ensemble,
    dataset: Dataset,
    *,
    features: FeatureSet | None = None,
    progress: Progress | None = None,
    on_error: OnError = "raise",
    before: Inspection | None = None,
) -> Inspection:
    """Score the test images of a data set with a fitted model and lay the ground truth beside the maps.

    There is none where an anomalous image has no mask.

    Args:
        model: a fitted detector.
        dataset: its test images are scored.
        features: those of the test images, in their order, where they are there already.
        progress: as in `PatchCore.predict`.
        on_error: as in `PatchCore.predict`; images left out are no part of the inspection.
        before: an inspection of the same data set by a model that sees images alike: of the same images, its ground
            truth is taken and not read again.

    Raises:
        ValueError: the data set has no test images, or one cannot be read.
    """
    require_test(dataset)
    if features is None:
        tested = [sample.path for sample in dataset.test]
        prediction = model.predict(tested, progress=progress, on_error=on_error, in_training=True)
    else:
        prediction = cast("Detector", model).predict_features(features)
    unread = {name for name, _ in prediction.skipped}
    samples = [sample for sample in dataset.test if str(sample.path) not in unread]
    paths = tuple(sample.path for sample in samples)
    truth = masks = ignored = None
    if before is not None and before.paths == paths:
        truth, masks, ignored = before.truth, before.masks, before.ignored
    elif samples and all(sample.mask is not None for sample in samples if sample.label):
        truth = GroundTruth.of(samples, model.settings_)
        masks, ignored = truth.as_seen()
    return Inspection(
        dataset.name,
        paths,
        prediction.scores,
        cast("NDArray[np.float32]", prediction.maps),
        tuple(sample.kind for sample in samples),
        np.array([sample.label for sample in samples], dtype=np.uint8),
        masks,
        prediction.threshold,
        prediction.map_scale,
        prediction.in_training,
        ignored,
        truth,
        tuple(sample.part for sample in samples),
    )


def require_test(dataset: Dataset) -> None:
    """Refuse a data set without test images."""
    if not dataset.test:
        raise ValueError(
            f"{dataset.name}: no test images; evaluation needs test/good and a folder for each kind of flaw"
        )
