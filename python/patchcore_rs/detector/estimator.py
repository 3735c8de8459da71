"""What scikit-learn expects of an estimator: arguments by name, and attributes with an underscore once it is fitted."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

from patchcore_rs._limits import ProcessLock

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

    from patchcore_rs.detector.method import Fitted, Method
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


class FittedAttributes(Estimator):
    """What was learnt, as attributes. It is one `Fitted`, replaced as a whole."""

    _unfitted: ClassVar[str] = "is not fitted yet"

    timings_: dict[str, float]
    _fitted: Fitted

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

    # --- for subclasses -------------------------------------------------------------------------------------

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

    def _describe(self, learned: Method | None = None, **changes: Any) -> None:
        """Replace parts of the description; RuntimeError where another fit has taken the place of `learned`."""
        with _lock.held():
            fitted = self._require_fitted()
            if learned is not None and fitted.learned is not learned:
                raise RuntimeError("the detector was fitted while it was calibrated; call calibrate again")
            self._fitted = fitted.describe(**changes)


def _equal(value: object, default: object) -> bool:
    return type(value) is type(default) and value == default
