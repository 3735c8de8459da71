"""What a method supplies to a detector, and the state of a fitted one.

`detector/base.py` says how the two fit together.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from patchcore_rs._text import counted
from patchcore_rs.detector.prediction import Prediction
from patchcore_rs.functional import anomaly_maps
from patchcore_rs.model.calibration import Calibration, min_max, min_max_scale, warn_of_clipping
from patchcore_rs.model.map_values import MapValues, map_extent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray
    from typing_extensions import Self

    from patchcore_rs._types import Progress
    from patchcore_rs.features.extractor import FeatureExtractor, View
    from patchcore_rs.features.feature_set import FeatureSet
    from patchcore_rs.features.reader import Reader
    from patchcore_rs.images.sources import Source
    from patchcore_rs.model.description import Description, Training
    from patchcore_rs.model.settings import Settings


_SAMPLED = 50  # a fit scores one of so many images anew: about 1 % of its time
_SAMPLED_PATCHES = 20_000
CHUNK = 8  # images that are scored, or drawn, together


class Call(NamedTuple):
    """How a call runs: on how many threads (None for all that this process may use), and who is told of it."""

    threads: int | None
    progress: Progress | None = None


class Scored(NamedTuple):
    """n images that were scored: paths (None for one that is no file), scores (n,) and anomaly maps (n, H, W).

    `maps` are None where none were asked for.
    `unseen` are the shares of the images that the crop cut off, None where they are not known; `in_training` says of
    which images the model was made, None where that was not asked or it does not know.
    """

    paths: tuple[Path | None, ...]
    scores: NDArray[np.float64]
    maps: NDArray[np.float32] | None
    unseen: tuple[float, ...] | None
    in_training: NDArray[np.bool_] | None


class Learner(Protocol):
    """Takes in the features of normal images, part after part, and learns from them."""

    def append(self, features: NDArray[np.float32], images: int, layer_widths: tuple[int, ...] | None) -> None:
        """Take in the (images * gh * gw, d) features of the next images.

        `layer_widths` are the columns of each layer, None where that is not known. Raises MemoryError, before anything
        is allocated, where what will be learnt does not fit into memory.
        """
        ...

    def finish(self, grid: tuple[int, int]) -> Method:
        """What was learnt from images of this grid of patches, one at least; progress goes by as the method's stage."""
        ...


class Learned(Protocol):
    """What was learnt. It never changes, so threads may share it.

    `name` stands in the model file, which holds `arrays` by the table of that name in `model.arrays`; `stage` is what
    progress and timings call the learning.
    """

    name: ClassVar[str]
    stage: ClassVar[str]

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """All that comes back from the model file besides the description."""
        ...

    @property
    def summary(self) -> str:
        """What it consists of in a few words: "5,974 patches of 344 channels"."""
        ...


class Method(Learned, Protocol):
    """A way to learn from features and to score features; an instance is what was learnt.

    `name` also names the method's table in `model.parameters` and class in `model.settings`; `view` is how backbone
    maps become features (see `FeatureExtractor`).
    """

    view: ClassVar[View]

    @classmethod
    def learner(cls, settings: Settings, call: Call, images: int | None) -> Learner:
        """What learns from so many normal images, None where their number is not known."""
        ...

    @classmethod
    def fit(cls, features: FeatureSet, settings: Settings, call: Call) -> Method:
        """Learn from the features of normal images, which stay as they are, as a `learner` would."""
        ...

    @classmethod
    def load(cls, arrays: Mapping[str, NDArray[Any]], description: Description, threads: int | None) -> Self:
        """What `arrays` and the description beside them were saved from, checked already."""
        ...

    @property
    def settings(self) -> Settings:
        """Those that it learnt by, with nothing left at "auto"."""
        ...

    @property
    def training(self) -> Training:
        """What was learnt from."""
        ...

    def score(
        self, features: NDArray[np.float32], grid: tuple[int, int], threads: int | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Image scores (n,) and patch scores (n, gh, gw) of (n * gh * gw, d) features, which stay as they are."""
        ...

    @property
    def normal_scores(self) -> NDArray[np.float32] | None:
        """Patch scores (n, gh, gw), as of `score`, of the images of `sample_images`, as if they were not learnt from.

        None from a method that cannot say; then nothing is known of maps before `calibrate`.
        """
        ...


def learn_in_parts(learner: Learner, features: FeatureSet) -> Method:
    """What a learner learns from features in memory, which stay as they are; ValueError where there are none."""
    if len(features) == 0:
        raise ValueError("features must hold at least one image; got none")
    for start in range(0, len(features), CHUNK):
        images = min(CHUNK, len(features) - start)
        rows = features.features[start * features.patches : (start + images) * features.patches]
        learner.append(rows, images, features.layer_widths)
    return learner.finish(features.grid)


def sample_images(images: int, patches: int) -> NDArray[np.int64]:
    """Which of the images, of so many patches each, to score anew after a fit, spread evenly.

    One of 50, at most 20 000 patches of them, but one image at least.
    """
    count = max(1, min(images // _SAMPLED, _SAMPLED_PATCHES // patches))
    return (2 * np.arange(count, dtype=np.int64) + 1) * images // (2 * count)


@dataclass(frozen=True, eq=False)
class Fitted:
    """Everything that a fitted detector, or ensemble, consists of: one object, replaced as a whole, never changed.

    A call takes it once and works with that, so no call mixes one fit's bank with another's threshold. `optional` are
    arrays of a model file that no score depends on.
    """

    description: Description
    learned: Learned
    skipped: tuple[tuple[str, str], ...] = ()
    optional: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def image_hashes(self) -> NDArray[np.int64] | None:
        """Those of all images that were learnt from, in ascending order; None where they are not known."""
        return self.optional.get("image_hashes")

    def describe(self, **changes: Any) -> Self:
        """As this one, with changes of its description."""
        return replace(self, description=replace(self.description, **changes))

    def require_scale(self) -> Calibration | None:
        """What scores are normalised by, or None; ValueError where they should be and nothing says by what."""
        if not self.description.settings.normalize:
            return None
        calibration = self.description.calibration
        if self.description.threshold is None or calibration is None or calibration.minimum == calibration.maximum:
            raise ValueError("normalize=True needs the range of normal scores: call calibrate(normal_images) first")
        return calibration

    def require_range(self, scores: NDArray[np.float64]) -> None:
        """ValueError where (n,) scores of normal images span no range and scores should be normalised by it."""
        if self.description.settings.normalize and scores.min() == scores.max():
            raise ValueError(
                "normalize=True needs normal_images of at least two different scores; got "
                f"{counted(len(scores), 'image')}, with the score {scores[0]:g}. Calibrate with more"
            )

    def warn_of_calibration(self) -> None:
        """Say that a threshold does not hold for another bank, where there is one."""
        if self.description.threshold is not None:
            warnings.warn(
                "the threshold does not hold for the memory bank that this call makes: call calibrate(normal_images)",
                stacklevel=3,
            )

    def prediction(self, scored: Sequence[Scored], skipped: tuple[tuple[str, str], ...], *, maps: bool) -> Prediction:
        """The answer to a call, out of the batches that were scored, with or without `maps`."""
        scores = np.concatenate([np.empty(0), *(batch.scores for batch in scored)])
        drawn = [np.empty((0, *self.description.image_size), np.float32)]
        drawn += [batch.maps for batch in scored if batch.maps is not None]
        all_maps = np.concatenate(drawn) if maps else None
        threshold, scale, map_scale = self.description.threshold, self.require_scale(), self.description.map_scale
        labels = None if threshold is None else (scores >= threshold).astype(np.int8)
        if scale is not None and threshold is not None:
            clip = self.description.settings.clip
            scores = min_max(scores, threshold, scale, clip=clip)
            scores = np.where(labels == 0, np.minimum(scores, np.nextafter(0.5, 0)), scores)  # where 0.5 was rounded to
            all_maps = None if all_maps is None else min_max(all_maps, threshold, scale, clip=clip)
            map_scale = None if map_scale is None else min_max_scale(map_scale, threshold, scale, clip=clip)
            threshold = 0.5
            if clip:
                warn_of_clipping(scores, stacklevel=3)
        paths = tuple(path for batch in scored for path in batch.paths)
        shares = [share for batch in scored if batch.unseen is not None for share in batch.unseen]
        unseen = np.array(shares) if len(shares) == len(scores) else None
        known = [batch.in_training for batch in scored if batch.in_training is not None]
        in_training = np.concatenate([np.empty(0, np.bool_), *known])
        return Prediction(
            scores,
            all_maps,
            labels,
            threshold,
            paths,
            skipped,
            unseen,
            map_scale,
            in_training if len(in_training) == len(scores) else None,
        )


@dataclass(frozen=True, eq=False)
class FittedMethod(Fitted):
    """Everything that a fitted detector of one method consists of.

    `extractor` is None for a detector that was fitted on features of the caller's own.
    """

    learned: Method
    extractor: FeatureExtractor | None = None
    threads: int | None = None

    def score(
        self,
        paths: tuple[Path | None, ...],
        features: NDArray[np.float32],
        grid: tuple[int, int],
        unseen: tuple[float, ...] | None,
        hashes: ArrayLike | None,
        *,
        maps: bool = True,
    ) -> Scored:
        """Score the n images at `paths` by their (n * gh * gw, d) features; draw `maps`, or none."""
        scores, patch_scores = self.learned.score(features, grid, self.threads)
        known = self.image_hashes
        in_training = None if known is None or hashes is None else np.isin(hashes, known)
        return Scored(paths, scores, self.draw(patch_scores) if maps else None, unseen, in_training)

    def score_all(
        self, reader: Reader, stage: str, source: Source, *, maps: bool = True, in_training: bool = False
    ) -> Iterator[Scored]:
        """Score the images of a source, batch by batch, in the time of the reader's stopwatch."""
        hashes = in_training and self.image_hashes is not None  # else there are none to compare with
        for batch, features, grid in reader.read(stage, source, hashes=hashes):
            with reader.stopwatch("scoring"):
                scored = self.score(batch.paths, features, grid, batch.unseen, batch.hashes, maps=maps)
            yield scored

    def measure_maps(self) -> MapValues | None:
        """Map values of images learnt from, None where the method cannot say."""
        scores = self.learned.normal_scores
        if scores is None:
            return None
        chunks = (scores[start : start + CHUNK] for start in range(0, len(scores), CHUNK))
        return MapValues.of(np.concatenate([map_extent(self.draw(chunk)) for chunk in chunks]))

    def draw(self, patch_scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, H, W) maps of (n, gh, gw) patch scores."""
        settings = self.description.settings
        maps: NDArray[np.float32] = anomaly_maps(
            patch_scores,
            self.description.image_size,
            sigma=settings.sigma,
            upsampling=settings.upsampling,
            border=settings.border,
            threads=self.threads,
        )
        return maps


def united_hashes(first: ArrayLike | None, second: ArrayLike | None) -> dict[str, NDArray[np.int64]]:
    """The array of a model file that holds the hashes of both; none where either is not known."""
    return {} if first is None or second is None else {"image_hashes": np.union1d(first, second)}
