"""What the map values of normal images are, and the scale that shows any image in the same colours in any company.

Image scores say nothing of this: Eq. 7 re-weights them, and maps are smoothed. So maps have a threshold of their own,
by the same rule over each image's largest map value.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from patchcore_rs.model.settings import check_number

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_rs.model.calibration import Calibration

    Origin = Literal["calibration", "training", "images", "option"]

_LARGEST = float(np.finfo(np.float32).max)  # maps are float32


class MapScale(NamedTuple):
    """The map values at the two ends of the colours, low < high: clear at `low` and below, hottest from `high` on.

    `origin` says where they come from: "calibration" and "training", the normal images that the model was calibrated on
    or fitted to; "images", those that are shown; "option", the caller.
    """

    low: float
    high: float
    origin: Origin = "option"

    @classmethod
    def between(cls, low: float, high: float, origin: Origin) -> Self:
        """From `low` to `high`, or to a little more than `low` where that is more."""
        return cls(low, max(high, low + 1e-6 * max(1.0, abs(low))), origin)

    def to_json(self) -> dict[str, Any]:
        """The scale as a JSON object."""
        return self._asdict()


@dataclass(frozen=True)
class MapValues:
    """Map values of some normal images.

    `median` is the middle one of the images' medians, what a map shows of ordinary surface; `upper` is a value that
    hardly a map of a normal image reaches.
    """

    median: float
    upper: float

    @classmethod
    def of(cls, extent: NDArray[np.float64]) -> Self:
        """Of n >= 1 images, whose maps have this `map_extent`, (n, 2).

        `upper` is the 95 % quantile of their largest values, farther from the median by the factor 1 + 1 / (2 √n): the
        fewer images there are, the more do others exceed it.
        """
        median, quantile = float(np.median(extent[:, 0])), float(np.quantile(extent[:, 1], 0.95))
        return cls(median, median + (1 + 0.5 / math.sqrt(len(extent))) * (quantile - median))

    @classmethod
    def from_json(cls, stored: Any) -> Self:
        """Check what `to_json` gave after its way through a file; ValueError names what is wrong."""
        if not isinstance(stored, dict):
            raise ValueError(f"map_values must be an object or null; got {stored!r:.80}")
        median, upper = (check_number(f"map_values {name}", stored.get(name)) for name in ("median", "upper"))
        if not -_LARGEST <= median <= upper <= _LARGEST:
            raise ValueError(f"map_values must be float32 with median <= upper; got {median:g} and {upper:g}")
        return cls(median, upper)

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return asdict(self)

    def scale(self, calibration: Calibration | None) -> MapScale:
        """From the map threshold, or `upper` without one, to twice as far above it as `upper` is above `median`.

        The threshold is one of a few largest values, and a single odd image among the normal ones may set it; what they
        span in common stays the measure of what is above.
        """
        low = self.upper if calibration is None else calibration.threshold
        origin: Origin = "training" if calibration is None else "calibration"
        return MapScale.between(low, low + 2 * (self.upper - self.median), origin)


def map_extent(maps: NDArray[np.float32]) -> NDArray[np.float64]:
    """Median and largest value of each of (n, H, W) maps, (n, 2)."""
    values = maps.reshape(len(maps), maps.shape[1] * maps.shape[2])  # there may be no map
    return np.stack([np.median(values, axis=1), values.max(axis=1)], axis=1).astype(np.float64)


def larger(values: MapValues | None, other: MapValues | None) -> MapValues | None:
    """The larger of both records, number by number; the one that is known where the other is not."""
    if values is None or other is None:
        return values or other
    return MapValues(max(values.median, other.median), max(values.upper, other.upper))
