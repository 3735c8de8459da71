"""The fitted detectors of an ensemble: their scores and maps on one scale, and the means of these."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import numpy as np

from patchcore_rs._text import counted
from patchcore_rs.detector.method import FittedMethod, Scored
from patchcore_rs.functional import anomaly_maps
from patchcore_rs.images.sources import Source
from patchcore_rs.model.arrays import ENSEMBLE, name_of_member_array
from patchcore_rs.model.map_values import MapValues

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from patchcore_rs.detector.base import Detector
    from patchcore_rs.features.reader import Reader
    from patchcore_rs.images.sources import Item

SCALED = ("score", "map")  # what has a scale, as the arrays of a model file are named
_ALIKE = 1e-12  # values that span a smaller share of their size differ by rounding alone
_LARGEST = float(np.finfo(np.float32).max)  # maps are float32


class Scale(NamedTuple):
    """Values less the offset, divided by the width > 0, are on the scale that the members of an ensemble share."""

    offset: float
    width: float

    def of(self, values: Any) -> Any:
        """Values, (...), on the common scale, float64."""
        return (np.asarray(values, np.float64) - self.offset) / self.width


class Member(NamedTuple):
    """A fitted detector, what it was fitted to when the ensemble was, and the scales of its scores and maps."""

    detector: Detector
    fitted: FittedMethod
    scores: Scale
    maps: Scale

    def scaled(self, batches: Iterable[Scored], size: tuple[int, int], *, maps: bool) -> Scored:
        """What it scored, as one, with scores (n,) and maps (n, *size) on the common scale, in float64."""
        parts = list(batches)
        drawn = [np.empty((0, *size))]
        drawn += [self.maps.of(_resized(self.fitted, part.maps, size)) for part in parts if part.maps is not None]
        known = [part.in_training for part in parts if part.in_training is not None]
        return Scored(
            tuple(path for part in parts for path in part.paths),
            self.scores.of(np.concatenate([np.empty(0), *(part.scores for part in parts)])),
            np.concatenate(drawn) if maps else None,
            tuple(share for part in parts for share in part.unseen or ()),
            np.concatenate(known) if known else None,
        )


@dataclass(frozen=True, eq=False)
class Members:
    """What an ensemble learnt; see `detector.method.Learned`."""

    name: ClassVar[str] = ENSEMBLE
    stage: ClassVar[str] = "scale"

    members: tuple[Member, ...]

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The members' arrays and scales."""
        arrays: dict[str, NDArray[Any]] = {
            name_of_member_array(i, member.fitted.learned.name, name): array
            for i, member in enumerate(self.members)
            for name, array in member.fitted.learned.arrays.items()
        }
        for what, scales in zip(SCALED, zip(*((m.scores, m.maps) for m in self.members), strict=True), strict=True):
            arrays[f"{what}_offset"] = np.array([scale.offset for scale in scales])
            arrays[f"{what}_width"] = np.array([scale.width for scale in scales])
        return arrays

    @property
    def summary(self) -> str:
        """What each member consists of."""
        return f"{len(self.members)} members: {'; '.join(member.fitted.learned.summary for member in self.members)}"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the maps."""
        return self.members[0].fitted.description.image_size

    @property
    def map_values(self) -> MapValues | None:
        """The means of those that the members know of normal images, on the common scale; None where one knows none.

        No map of the ensemble exceeds the mean of the members' largest values.
        """
        scaled: list[tuple[float, float]] = []
        for member in self.members:
            known = member.fitted.description.map_values
            if known is None:
                return None
            scaled.append((member.maps.of(known.median), member.maps.of(known.upper)))
        median, upper = np.mean(scaled, axis=0).clip(-_LARGEST, _LARGEST).tolist()
        return MapValues(median, upper)

    def score(
        self, readers: Sequence[Reader], items: Sequence[Item], *, maps: bool, in_training: bool
    ) -> tuple[Scored, list[tuple[str, str]]]:
        """The means of the members' scores and maps of some images, and (name, reason) of those that one left out.

        Each member has its reader. What one leaves out, the next do not get, and none is asked for.
        """
        named = left = list(_with_own_names(items))
        refused: dict[str, str] = {}
        total: Scored | None = None
        for i, (member, reader) in enumerate(zip(self.members, readers, strict=True)):
            reader.skipped = []
            asked = in_training and i == 0  # all members know the images of all
            batches = member.fitted.score_all(
                reader, "scores", Source(iter(left), len(left)), maps=maps, in_training=asked
            )
            scored = member.scaled(batches, self.size, maps=maps)
            refused |= dict(reader.skipped)
            kept = np.array([item.name not in refused for item in left])
            total = scored if total is None else _added(total, kept, scored)
            left = [item for item in left if item.name not in refused]
            if not left:
                break
        pairs = zip(items, named, strict=True)
        skipped = [(item.name, refused[own.name]) for item, own in pairs if own.name in refused]
        return _divided(cast("Scored", total), len(self.members)), skipped


def measure(
    fitted: FittedMethod, batches: Iterable[Scored], size: tuple[int, int], combine: str, name: str
) -> tuple[Scale, Scale]:
    """The scales of the scores and maps of a member by its training images, of which two numbers each are kept.

    Maps count at `size`, that of the ensemble's maps. `name` is the member's in messages.

    Raises:
        ValueError: all have the same score or map value, or there are none.
    """
    scores, maps = [], []
    for batch in batches:
        scores.append(_statistics(batch.scores[:, None], combine))
        maps.append(_statistics(_resized(fitted, batch.maps, size), combine))
    if not scores:
        raise ValueError(f"none of the images can be read again, for the scale of {name}")
    return _scale(scores, combine, f"{name} must score"), _scale(maps, combine, f"the maps of {name} must show")


def _statistics(values: NDArray[Any], combine: str) -> NDArray[np.float64]:
    """Of each image's values, (n, ...): smallest and largest, or mean and variance, (n, 2)."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    if combine == "minmax":
        return np.stack([flat.min(axis=1), flat.max(axis=1)], axis=1)
    return np.stack([flat.mean(axis=1), flat.var(axis=1)], axis=1)


def _scale(parts: Sequence[NDArray[np.float64]], combine: str, must: str) -> Scale:
    """The scale of values of equally many pixels an image, by the statistics of the images."""
    first, second = np.concatenate(parts).T
    if combine == "minmax":
        offset, width = first.min(), second.max() - first.min()
    else:
        offset = first.mean()
        width = np.sqrt((second + np.square(first - offset)).mean())
    if not width > _ALIKE * abs(offset):
        raise ValueError(
            f"{must} images differently, or there is no scale; got {offset:g} for all of "
            f"{counted(len(first), 'image')}. Pass other ones without anomalies, fit(images, scale_images=...), or "
            "take a smaller coreset: where all patches are kept, those of training images find themselves"
        )
    return Scale(float(offset), float(width))


def _resized(fitted: FittedMethod, maps: NDArray[np.float32] | None, size: tuple[int, int]) -> NDArray[np.float32]:
    """(n, height, width) maps of this size."""
    drawn = cast("NDArray[np.float32]", maps)
    if drawn.shape[1:] == size:
        return drawn
    brought: NDArray[np.float32] = anomaly_maps(drawn, size, sigma=0.0, threads=fitted.threads)
    return brought


def _with_own_names(items: Sequence[Item]) -> Iterator[Item]:
    """The images under names of which none is another's, so that one that is left out is known by its name."""
    taken: set[str] = set()
    for item in items:
        name, number = item.name, 1
        while name in taken:
            number += 1
            name = f"{item.name} ({number})"
        taken.add(name)
        yield item._replace(name=name)


def _added(total: Scored, kept: NDArray[np.bool_], scored: Scored) -> Scored:
    """What a member scored added to the sums of those before, of which the images that are `kept` stay."""
    known = total.in_training
    return Scored(
        scored.paths,
        total.scores[kept] + scored.scores,
        None if total.maps is None or scored.maps is None else total.maps[kept] + scored.maps,
        tuple(compress(total.unseen or (), kept)),
        None if known is None else known[kept],
    )


def _divided(total: Scored, members: int) -> Scored:
    """Means of the sums; maps as float32."""
    maps = None if total.maps is None else (total.maps / members).clip(-_LARGEST, _LARGEST).astype(np.float32)
    return total._replace(scores=total.scores / members, maps=maps)
