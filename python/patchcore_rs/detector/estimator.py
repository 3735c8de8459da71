"""What detectors and ensembles of them share, in scikit-learn's manner.

Arguments by name, attributes with an underscore once it is fitted, and what is done with the scores of images, however
these are scored: predict, calibrate, save.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import numpy as np

from patchcore_rs._checks import flags, numbers
from patchcore_rs._limits import ProcessLock, torch_call
from patchcore_rs._progress import reporting
from patchcore_rs._version import __version__
from patchcore_rs.detector.extraction import check_calibration
from patchcore_rs.features.reader import warn_of_skipped
from patchcore_rs.images.sources import describe_source, open_source
from patchcore_rs.model.calibration import alarm_rate, calibrate_threshold
from patchcore_rs.model.file import ModelFile, write_model
from patchcore_rs.model.map_values import MapValues, map_extent

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_rs._types import Channels, OnError, Pages, Progress
    from patchcore_rs.detector.method import Fitted, Learned, Scored
    from patchcore_rs.detector.prediction import Prediction
    from patchcore_rs.images.sources import Source
    from patchcore_rs.model.calibration import Calibration
    from patchcore_rs.model.description import Training
    from patchcore_rs.model.settings import Settings

# Held while a detector's state is looked at and replaced; never during work.
_lock = ProcessLock()


class Estimator:
    """A class whose constructor stores its arguments as they are, under their names."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002, FBT001, FBT002 - scikit-learn's signature
        """The constructor's arguments by name; `deep` is scikit-learn's and changes nothing."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **parameters: Any) -> Self:
        """Set arguments of the constructor by name; they are checked in, and hold from, the next `fit`.

        Raises:
            ValueError: a name is none of them; nothing is set then.
        """
        known = self.get_params()
        for name in parameters:
            if name not in known:
                raise ValueError(f"{name} is no parameter of {type(self).__name__}; it has {', '.join(known)}")
        for name, value in parameters.items():
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn, which alone asks, may expect: images go in, and no labels are needed."""
        utils: Any = sys.modules["sklearn.utils"]
        return utils.Tags(
            estimator_type=None,
            target_tags=utils.TargetTags(required=False),
            input_tags=utils.InputTags(two_d_array=False),
        )

    def __repr__(self) -> str:
        """The arguments that are not the default."""
        parameters = inspect.signature(type(self)).parameters
        changed = (
            f"{name}={value!r:.80}"
            for name, value in self.get_params().items()
            if value is not parameters[name].default and not _equal(value, parameters[name].default)
        )
        return f"{type(self).__name__}({', '.join(changed)})"


class NotFittedError(ValueError, AttributeError):
    """A detector was used before `fit` or `load`."""


class Reading(NamedTuple):
    """How the images of a call are read, and who is told of it.

    `skipped` takes in (name, reason) of those that are left out; `flawless` refuses a folder that holds masks or flawed
    images by the names in it.
    """

    progress: Progress | None
    on_error: OnError
    channels: Channels
    pages: Pages
    skipped: list[tuple[str, str]]
    flawless: bool = False

    def open(self, images: Any) -> Source:
        """The images to be scored."""
        return open_source(images, training=False, channels=self.channels, flawless=self.flawless, pages=self.pages)


class FittedEstimator(Estimator):
    """What was learnt, as attributes, and what is done with it. It is one `Fitted`, replaced as a whole."""

    _unfitted: ClassVar[str] = "is not fitted yet"

    timings_: dict[str, float]
    _fitted: Fitted

    def __getstate__(self) -> dict[str, Any]:
        """All but the seconds spent, so that joblib knows a model again that has predicted meanwhile."""
        state = dict(self.__dict__)
        if "timings_" in state:
            state["timings_"] = dict.fromkeys(state["timings_"], 0.0)
        return state

    def __sklearn_is_fitted__(self) -> bool:
        """Whether `fit` or `load` came before, for scikit-learn."""
        return "_fitted" in self.__dict__

    @property
    def settings_(self) -> Settings:
        """Every choice with nothing left at "auto"."""
        return self._require_fitted().description.settings

    @property
    def backbone_name_(self) -> str:
        """The name of the backbone, "" for a detector that was fitted on features of one's own."""
        return self._require_fitted().description.backbone

    @property
    def summary_(self) -> str:
        """What was learnt in a few words, "5,974 patches of 344 channels"."""
        return self._require_fitted().learned.summary

    @property
    def image_size_(self) -> tuple[int, int]:
        """(height, width) of the images after resizing and cropping, and of the maps."""
        return self._require_fitted().description.image_size

    @property
    def training_(self) -> Training:
        """How many images and patches the detector learnt from, and how far from its bank a patch can be."""
        return self._require_fitted().description.training

    @property
    def threshold_(self) -> float | None:
        """An image is anomalous where score >= threshold; None before `calibrate`. May be set by hand."""
        return self._require_fitted().description.threshold

    @threshold_.setter
    def threshold_(self, threshold: float | None) -> None:
        self._describe(threshold=threshold)

    @property
    def calibration_(self) -> Calibration | None:
        """Where the threshold comes from, or None."""
        return self._require_fitted().description.calibration

    @calibration_.setter
    def calibration_(self, calibration: Calibration | None) -> None:
        self._describe(calibration=calibration)

    @property
    def map_calibration_(self) -> Calibration | None:
        """The threshold of maps, and of which largest map values of normal images it is; None before `calibrate`.

        What lies below it stays clear in pictures. `threshold_` does not move it.
        """
        return self._require_fitted().description.map_calibration

    @property
    def skipped_(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of training images left out by `on_error="skip"`."""
        return self._require_fitted().skipped

    # --- what is done with it ----------------------------------------------------------------------------------

    def predict(
        self,
        images: Any,
        *,
        progress: Progress | bool | None = None,
        on_error: OnError = "raise",
        channels: Channels = "rgb",
        pages: Pages = "first",
        maps: bool = True,
        in_training: bool = False,
    ) -> Prediction:
        """Score images. Safe to call from several threads; an image's score does not depend on its batch.

        Takes what `fit` takes (of a data set of `load_dataset`, its test images), with progress as the stage "scores".
        Masks in a folder, by the names in it, are left out and named in the log "patchcore_rs.images", as WARNING.
        The features of one batch are held at a time. No images give an empty prediction.

        The maps of all images are kept: 4 bytes a pixel. `maps=False` draws none, and `Prediction.maps` is None: then
        memory does not grow with the number of images but for their scores and names.

        `in_training=True` says of each image whether it was trained on, in `Prediction.in_training`: it is hashed for
        that, a few milliseconds for a million pixels.

        Raises:
            NotFittedError: before `fit`.
            ValueError: an image cannot be read, or has another size than the training images after resizing and
                cropping, or the detector was fitted on features of one's own.
        """
        fitted, maps = self._require_fitted(), flags(maps, "maps")
        in_training = flags(in_training, "in_training")
        fitted.require_scale()
        skipped: list[tuple[str, str]] = []
        with reporting(progress) as report, torch_call():
            reading = Reading(report, on_error, channels, pages, skipped)
            scored = list(self._score_images(fitted, images, reading, maps=maps, in_training=in_training))
        warn_of_skipped(skipped, sum(len(batch.paths) for batch in scored), stacklevel=2)
        return fitted.prediction(scored, tuple(skipped), maps=maps)

    def calibrate(
        self,
        normal_images: Any,
        *,
        false_alarm_rate: float = 0.01,
        progress: Progress | bool | None = None,
        on_error: OnError = "raise",
        channels: Channels = "rgb",
        pages: Pages = "first",
    ) -> Self:
        """Set `threshold_` from normal images that were not trained on, and record its provenance in `calibration_`.

        `map_calibration_` is the same of each image's largest map value: with it, colours of maps begin there.

        The threshold is the smallest whose false alarm rate on further normal images is expected to be at most
        `false_alarm_rate`: the next float64 above the (a + 1)-th largest score of the n images, of which at most
        a = max(0, floor(rate * (n + 1)) - 1) alarm (score >= threshold). `calibration_` states the expected rate,
        (a + 1) / (n + 1), and a 95 % upper bound. Warns where n < 1 / rate - 1 images cannot show the rate.
        Takes images and the other arguments as `predict` does.

        Images that were trained on score less than others do, and a threshold of theirs alarms too often. They are
        known by the hashes of their samples: warns with their number where some are such, and where the detector does
        not know its training images (a model file that keeps no hashes, features of one's own).

        Raises:
            TypeError: `false_alarm_rate` is no number.
            ValueError: not 0 <= false_alarm_rate < 1, no image can be read, all were trained on, or normalize=True and
                all score alike.
            RuntimeError: another thread fitted the detector meanwhile, so that the threshold holds no longer.
        """
        fitted = self._require_fitted()
        rate = alarm_rate(false_alarm_rate)
        paths: list[Path | None] = []
        scores, extents = [np.empty(0)], [np.empty((0, 2))]
        in_training: list[NDArray[np.bool_] | None] = []
        skipped: list[tuple[str, str]] = []
        with reporting(progress) as report, torch_call():
            reading = Reading(report, on_error, channels, pages, skipped, flawless=True)
            for batch in self._score_images(fitted, normal_images, reading, in_training=True):
                paths += batch.paths
                scores.append(batch.scores)
                extents.append(map_extent(cast("NDArray[np.float32]", batch.maps)))
                in_training.append(batch.in_training)
        warn_of_skipped(skipped, len(paths), stacklevel=2)
        if not paths:
            raise ValueError("normal_images must hold at least one image that can be read; got none")
        check_calibration(in_training)
        all_scores, extent = np.concatenate(scores), np.concatenate(extents)
        fitted.require_range(all_scores)
        source = describe_source(normal_images, paths)
        calibration = calibrate_threshold(all_scores, rate, source=source)
        self._describe(
            fitted.learned,
            threshold=calibration.threshold,
            calibration=calibration,
            map_values=MapValues.of(extent),
            map_calibration=calibrate_threshold(extent[:, 1], rate, source=source, warn=False),
        )
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to one safetensors file, whole or not at all; the same model gives the same bytes.

        The backbone is stored as its name and the hash of its weights.

        Raises:
            NotFittedError: before `fit`.
            TypeError, ValueError: `threshold_` is no finite number.
            OSError: the file cannot be written.
        """
        fitted = self._require_fitted()
        threshold = fitted.description.threshold
        if threshold is not None:
            threshold = numbers()(threshold, "threshold_")
        description = replace(fitted.description, threshold=threshold)
        metadata = description.to_json() | {"writer": __version__}
        write_model(path, ModelFile(fitted.learned.name, fitted.learned.arrays, metadata, fitted.optional))

    # --- for subclasses -------------------------------------------------------------------------------------

    def _score_images(
        self, fitted: Fitted, images: Any, reading: Reading, *, maps: bool = True, in_training: bool = False
    ) -> Iterator[Scored]:
        """Paths, scores and maps, batch by batch; adds to the timings at the end."""
        raise NotImplementedError

    def _require_fitted(self) -> Fitted:
        fitted: Fitted | None = self.__dict__.get("_fitted")
        if fitted is None:
            name = type(self).__name__
            raise NotFittedError(f"this {name} {self._unfitted}; call fit(images) or {name}.load(path) first")
        return fitted

    def _learn(self, fitted: Fitted, seconds: Mapping[str, float]) -> None:
        """Take over what was learnt, in one step."""
        stages = ("backbone", "aggregation", fitted.learned.stage, "scoring")
        with _lock.held():  # or a threshold that is set meanwhile would bring back what was learnt before
            self.__dict__.update(_fitted=fitted, timings_=dict.fromkeys(stages, 0.0) | dict(seconds))

    def _spend(self, seconds: Mapping[str, float]) -> None:
        with _lock.held():
            self.timings_ = {stage: spent + seconds.get(stage, 0.0) for stage, spent in self.timings_.items()}

    def _describe(self, learned: Learned | None = None, **changes: Any) -> None:
        """Replace parts of the description; RuntimeError where another fit has taken the place of `learned`."""
        with _lock.held():
            fitted = self._require_fitted()
            if learned is not None and fitted.learned is not learned:
                raise RuntimeError("the detector was fitted while it was calibrated; call calibrate again")
            self._fitted = fitted.describe(**changes)


def _equal(value: object, default: object) -> bool:
    return type(value) is type(default) and value == default
