"""Several detectors as one: their scores and maps on one scale, averaged (table 4 of the paper)."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from patchcore_rs._limits import torch_call
from patchcore_rs._progress import reporting
from patchcore_rs._stopwatch import Stopwatch
from patchcore_rs._text import listing
from patchcore_rs.detector.base import Detector
from patchcore_rs.detector.estimator import FittedEstimator
from patchcore_rs.detector.extraction import find_backbone
from patchcore_rs.detector.method import Fitted, united_hashes
from patchcore_rs.features.reader import check_headers, check_on_error
from patchcore_rs.images.sources import open_source
from patchcore_rs.methods.detectors import DETECTORS
from patchcore_rs.methods.members import SCALED, Member, Members, Scale, measure
from patchcore_rs.model.arrays import ENSEMBLE, member_arrays
from patchcore_rs.model.description import EnsembleDescription, check_combine, check_members, read_description
from patchcore_rs.model.file import ModelFileError, model_name
from patchcore_rs.model.settings import PaDiMSettings, resolve

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import IO

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_rs._types import Channels, OnError, Pages, Progress
    from patchcore_rs.backbones.backbone import Backbone
    from patchcore_rs.detector.estimator import Reading
    from patchcore_rs.detector.method import Scored
    from patchcore_rs.model.description import Description
    from patchcore_rs.model.file import ModelFile

    # As `PatchCore.load` takes them.
    Weights = str | os.PathLike[str] | None
    Network = torch.nn.Module | Callable[[torch.Tensor], Any] | Backbone | str | None

_BATCHES = 4  # that one member scores before the next does: it reads one while it works on another


class Ensemble(FittedEstimator):
    """Several detectors as one: the mean of their scores, and of their maps, on one scale (table 4 of the paper).

    Every argument is stored as it is and checked in `fit`. Members may differ in whatever decides their scores, and in
    the size of the images; they must see the same part of an image. Maps have the size of the first member's, to which
    the others' are resized bilinearly.

    The scale of a member is that of its scores, and of the values of its maps, on the images that it is fitted on, or
    on others without anomalies. The paper's implementation takes the images that are scored, so that a score depends on
    the company of its image.

    Args:
        detectors: `PatchCore`, `SPADE`, `PaDiM` and `MahalanobisAD`, at least one and none twice. `fit` fits copies of
            them; they stay as they are.
        combine: how scores come to one scale: "minmax", the smallest training score at 0 and the largest at 1, or
            "zscore", their mean at 0 and their deviation 1; maps by the values of all pixels. The scale stays as it is
            fitted: `calibrate` sets thresholds only.

    Attributes (after `fit` or `load`; `NotFittedError` before):
        members_: the fitted detectors, in their order.
        settings_: those of the first member, as which images and maps are seen; so are `image_size_` and `training_`.
        backbone_name_: the names of all backbones.
        threshold_: an image is anomalous where score >= threshold_; None before `calibrate`.
        calibration_: where the threshold comes from, or None.
        map_calibration_: the threshold of map values, where colours of maps begin, or None.
        skipped_: (name, reason) of training images that a member left out by `on_error="skip"`.
        timings_: seconds of the members' stages and of "scale", summed over all members, `fit` and every call since.
    """

    def __init__(self, detectors: Sequence[Detector], *, combine: str = "minmax") -> None:
        """Store the arguments; `fit` checks them."""
        self.detectors = detectors
        self.combine = combine

    @property
    def members_(self) -> tuple[Detector, ...]:
        """The fitted detectors. What is done to one afterwards changes nothing here, but for its `batch_size`."""
        return tuple(member.detector for member in cast("Members", self._require_fitted().learned).members)

    def fit(
        self,
        images: Any,
        y: object = None,  # noqa: ARG002 - scikit-learn's signature
        *,
        scale_images: Any = None,
        progress: Progress | bool | None = None,
        on_error: OnError = "raise",
        channels: Channels = "rgb",
        pages: Pages = "first",
    ) -> Self:
        """Fit a copy of each detector to images without anomalies, then find its scale by scoring them.

        All or nothing: a fit that fails or is interrupted leaves the ensemble as it was.

        Args:
            images: as in `PatchCore.fit`, but what gives its images only once, such as a generator, is refused: they
                are gone through twice for each member.
            y: without effect, as in `PatchCore.fit`.
            scale_images: images without anomalies, as `images`, to find the scales by instead of these. A member that
                keeps all patches, such as SPADE or `PatchCore(coreset=None)`, needs others than it is fitted on, whose
                patches would all find themselves; and so does a `PaDiM` of as many channels as images or more, which is
                warned of: its training images all lie about equally far, so that it outweighs the other members.
            progress: as in `PatchCore.fit`; of one member after the other its stages, and "scale", in images.
            on_error: as in `PatchCore.fit`; each member leaves out what it cannot take.
            channels: as in `PatchCore.fit`.
            pages: as in `PatchCore.fit`.

        Raises:
            TypeError: `detectors` holds what is none, or an argument has the wrong type.
            ValueError: as `PatchCore.fit`; or members see different parts of an image or normalise their scores, a
                member scores all images alike, or the images are given once only.
            OSError, MemoryError, ImportError: as `PatchCore.fit`.
        """
        check_on_error(on_error)
        combine = check_combine(self.combine, "combine")
        with reporting(progress) as report, torch_call():
            detectors = _checked_copies(self.detectors)
            for name, given in {"images": images, "scale_images": scale_images}.items():
                if given is not None and open_source(given, channels=channels, pages=pages, flawless=True).once:
                    raise ValueError(
                        f"{name} must be such as can be gone through again for each detector; got "
                        f"{type(given).__name__}, which gives them once. Pass a list of them"
                    )
            members: list[Member] = []
            seconds: list[Mapping[str, float]] = []
            for i, detector in enumerate(detectors):
                advance = _through_all(report, i, len(detectors))
                detector.fit(images, progress=advance, on_error=on_error, channels=channels, pages=pages)
                fitted, stopwatch = detector._require_fitted(), Stopwatch()
                size = (members[0].fitted if members else fitted).description.image_size
                with stopwatch("scale"):
                    seen = images if scale_images is None else scale_images
                    source = open_source(seen, channels=channels, pages=pages, flawless=True)
                    scored = fitted.score_all(detector._reader(fitted, advance, on_error), "scale", source)
                    scales = measure(fitted, scored, size, combine, f"detectors[{i}]")
                members.append(Member(detector, fitted, *scales))
                seconds += [detector.timings_, stopwatch.seconds]
            if scale_images is None:
                _warn_of_noise(members)
            self._learn(_as_one(members, combine), _summed(seconds))
        return self

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | bytes | IO[bytes],
        *,
        device: str | torch.device = "auto",
        weights: Weights | Sequence[Weights] = "default",
        backbone: Network | Sequence[Network] = None,
        threads: int | None = None,
    ) -> Self:
        """Read what `save` wrote: the same predictions to the bit, given the same backbones on the same device.

        Takes and raises what `PatchCore.load` does. `weights` and `backbone` are those of all members, or lists (or
        tuples) of one a member.
        """
        stored, description = read_description(path)
        if stored.method != ENSEMBLE:
            raise ModelFileError(
                path,
                f"it was saved by the method {stored.method!r}, {cls.__name__} loads {ENSEMBLE!r}; "
                "patchcore_rs.load(path) loads every method's",
            )
        return cls.restore(
            model_name(path), stored, description, device=device, weights=weights, backbone=backbone, threads=threads
        )

    @classmethod
    def restore(cls, path: str | os.PathLike[str], stored: ModelFile, description: Description, **loading: Any) -> Self:
        """The ensemble of a file that was read and checked; the rest are `load`'s arguments."""
        description = cast("EnsembleDescription", description)
        own, parts = member_arrays(stored.arrays)
        members: list[Member] = []
        for i, (method, arrays) in enumerate(parts):
            part = replace(stored, method=method, arrays=arrays)
            chosen = {name: _of_member(value, name, i, len(parts)) for name, value in loading.items()}
            try:
                detector = DETECTORS[method].restore(path, part, description.members[i], **chosen)
            except ModelFileError as error:
                raise ModelFileError(path, f"member {i}: {error.reason}") from error
            scales = [Scale(float(own[f"{what}_offset"][i]), float(own[f"{what}_width"][i])) for what in SCALED]
            members.append(Member(detector, detector._require_fitted(), *scales))
        constructor: Callable[..., Self] = cls
        model = constructor([_copy(member.detector) for member in members], combine=description.combine)
        seconds = _summed([member.detector.timings_ for member in members])
        model._learn(Fitted(description, Members(tuple(members)), optional=stored.optional), seconds)
        return model

    def _score_images(
        self, fitted: Fitted, images: Any, reading: Reading, *, maps: bool = True, in_training: bool = False
    ) -> Iterator[Scored]:
        """Some images at a time pass one member after the other, each of which works on them in parallel."""
        members = cast("Members", fitted.learned)
        readers = [member.detector._reader(member.fitted, None, reading.on_error) for member in members.members]
        source = reading.open(images)
        if reading.on_error == "raise":
            check_headers(source)
        passed, size = 0, _BATCHES * max(reader.batch_size for reader in readers)  # images, each once a member
        while chunk := list(islice(source.items, size)):
            for reader in readers:
                reader.progress = _in_turn(reading.progress, source.count, passed, len(readers))
                passed += len(chunk)
            scored, skipped = members.score(readers, chunk, maps=maps, in_training=in_training)
            reading.skipped.extend(skipped)
            if scored.paths:
                yield scored
        self._spend(_summed([reader.stopwatch.seconds for reader in readers]))


def _checked_copies(detectors: Any) -> list[Detector]:
    """Unfitted copies of detectors that can be the members of an ensemble, their arguments checked."""
    if not isinstance(detectors, list | tuple) or not all(isinstance(detector, Detector) for detector in detectors):
        held = detectors if isinstance(detectors, list | tuple) else [detectors]
        kinds = ", ".join(dict.fromkeys(type(detector).__name__ for detector in held))
        raise TypeError(f"detectors must be a list of PatchCore and detectors of patchcore_rs.methods; got {kinds}")
    if len({id(detector) for detector in detectors}) < max(len(detectors), 1):
        got = f"{len(detectors)}, one of them twice" if detectors else "none"
        raise ValueError(f"detectors must be at least one, each with arguments of its own; got {got}")
    copies, settings = [_copy(detector) for detector in detectors], []
    for detector in copies:
        parameters = detector._checked()
        settings.append(resolve(parameters, find_backbone(parameters), detector.method.name))
    check_members(settings)
    return copies


def _copy(detector: Detector) -> Detector:
    """An unfitted detector with the arguments of this one."""
    constructor: Callable[..., Detector] = type(detector)
    return constructor(**detector.get_params())


def _as_one(members: Sequence[Member], combine: str) -> Fitted:
    """The ensemble of fitted members; each is told the images of all."""
    known: dict[str, NDArray[np.int64]] = dict(members[0].fitted.optional)
    skipped = dict(members[0].fitted.skipped)
    for member in members[1:]:
        known = united_hashes(known.get("image_hashes"), member.fitted.image_hashes)
        skipped |= {name: reason for name, reason in member.fitted.skipped if name not in skipped}
    learned = Members(tuple(member._replace(fitted=replace(member.fitted, optional=known)) for member in members))
    description = EnsembleDescription.of(
        [member.fitted.description for member in members], combine, map_values=learned.map_values
    )
    return Fitted(description, learned, tuple(skipped.items()), known)


def _warn_of_noise(members: Sequence[Member]) -> None:
    """Warn where training images, by which the scales are, tell little of the Gaussians that they made."""
    few = [
        f"detectors[{i}] ({training.images} images, {settings.channels} channels)"
        for i, member in enumerate(members)
        for training, settings in [(member.fitted.description.training, member.fitted.description.settings)]
        if isinstance(settings, PaDiMSettings) and (training.images or 0) <= int(settings.channels)
    ]
    if few:
        warnings.warn(
            f"{listing(few)} must be fitted to more images than channels, or its covariances are only epsilon in most "
            "directions: training images all lie about equally far, and by their scale it outweighs the other "
            "detectors. Pass other images without anomalies, fit(images, scale_images=...), or take fewer channels",
            stacklevel=3,
        )


def _of_member(value: Any, name: str, member: int, members: int) -> Any:
    """The value for one member, of a value for all of them or a list of one a member."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) != members:
        raise ValueError(f"{name} must be one for all members or a list of {members}, one a member; got {len(value)}")
    return value[member]


def _summed(seconds: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The seconds of each stage."""
    total: dict[str, float] = {}
    for spent in seconds:
        for stage, some in spent.items():
            total[stage] = total.get(stage, 0.0) + some
    return total


def _through_all(progress: Progress | None, member: int, members: int) -> Progress | None:
    """Progress of one of the members, which go through all images one after the other."""
    if progress is None:
        return None

    def advance(stage: str, done: int, total: int | None) -> None:
        progress(stage, done if total is None else member * total + done, None if total is None else members * total)

    return advance


def _in_turn(progress: Progress | None, images: int | None, passed: int, members: int) -> Progress | None:
    """Progress in images of members that take some images in turn, when so many had `passed` one member or another."""
    if progress is None:
        return None
    return lambda stage, done, _: progress(stage, (passed + done) // members, images)
