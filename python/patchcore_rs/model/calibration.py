"""The alarm threshold: from the scores of normal images, with a record of where it came from.

An image is anomalous where score >= threshold. Of n normal scores, a = floor(rate * n) may alarm; the threshold is the
next float64 above the (a + 1)-th largest score. It is the smallest one that alarms on at most a of the n images, equal
scores included, and its false alarm rate on further normal images is an estimate that n limits.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from patchcore_rs._checks import number
from patchcore_rs._text import counted
from patchcore_rs.model.map_values import MapScale
from patchcore_rs.model.settings import check_number

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Calibration:
    """A threshold and its provenance.

    `images` normal images out of `source` had scores from `minimum` over `median` to `maximum`; `false_alarm_rate` was
    asked for and `reached_rate`, at most that, is the share of them with score >= `threshold`.
    """

    threshold: float
    false_alarm_rate: float
    reached_rate: float
    images: int
    minimum: float
    median: float
    maximum: float
    source: str

    @classmethod
    def from_json(cls, stored: Any, name: str = "calibration") -> Calibration:
        """Check what `dataclasses.asdict` gave after its way through a file; ValueError names what is wrong."""
        if not isinstance(stored, dict):
            raise ValueError(f"{name} must be an object or null; got {stored!r:.80}")
        names = ("threshold", "false_alarm_rate", "reached_rate", "minimum", "median", "maximum")
        numbers = {each: check_number(f"{name} {each}", stored.get(each)) for each in names}
        if type(stored.get("images")) is not int or stored["images"] < 1:
            raise ValueError(f"{name} images must be an integer >= 1; got {stored.get('images')!r:.80}")
        if not isinstance(stored.get("source"), str):
            raise ValueError(f"{name} source must be a string; got {stored.get('source')!r:.80}")
        return cls(**numbers, images=stored["images"], source=stored["source"])

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return asdict(self)


def threshold_origin(threshold: float | None, calibration: Calibration | None) -> Literal["calibration", "hand"] | None:
    """Whether the threshold is the calibration's or was set by hand; None without a threshold."""
    if threshold is None:
        return None
    return "calibration" if calibration is not None and calibration.threshold == threshold else "hand"


def alarm_rate(value: Any) -> float:
    """A `false_alarm_rate`: a share from 0 to below 1."""
    rate = number(value, "false_alarm_rate")
    if not 0 <= rate < 1:
        raise ValueError(f"false_alarm_rate must be a share >= 0 and < 1; got {value!r}")
    return rate


def calibrate_threshold(
    scores: NDArray[np.float64], false_alarm_rate: float, *, source: str, warn: bool = True
) -> Calibration:
    """The threshold for the (n,) `scores` of normal images, n >= 1, as the module's text defines it.

    Where n is too small to show the rate, the threshold lies just above the largest score, with a warning if `warn`.
    """
    n = len(scores)
    allowed = math.floor(false_alarm_rate * n)
    if (allowed + 1) / n <= false_alarm_rate:  # 0.29 * 100 is 28.999999999999996
        allowed += 1
    if warn and allowed == 0 and false_alarm_rate > 0:
        warnings.warn(
            f"{counted(n, 'normal image')} cannot show a false alarm rate of {false_alarm_rate:g}: the threshold "
            f"lies just above the largest of their scores; calibrate on at least {math.ceil(1 / false_alarm_rate)}",
            stacklevel=3,
        )
    ascending = np.sort(scores)
    threshold = float(np.nextafter(ascending[n - 1 - allowed], np.inf))
    return Calibration(
        threshold=threshold,
        false_alarm_rate=false_alarm_rate,
        reached_rate=float(np.count_nonzero(scores >= threshold)) / n,
        images=n,
        minimum=float(ascending[0]),
        median=float(np.median(ascending)),
        maximum=float(ascending[-1]),
        source=source,
    )


def min_max(values: NDArray[Any], threshold: float, calibration: Calibration) -> NDArray[Any]:
    """Scores or maps as anomalib's post-processor shows them: [0, 1], the threshold at 0.5, dtype kept.

    `clip((values - threshold) / (maximum - minimum) + 0.5, 0, 1)`. What is clipped becomes a tie.
    """
    normalised: NDArray[Any] = np.clip(_normalised(values.astype(np.float64), threshold, calibration), 0, 1)
    return normalised.astype(values.dtype)


def min_max_scale(scale: MapScale, threshold: float, calibration: Calibration) -> MapScale:
    """The same colours for maps normalised by `min_max`; `high` may lie beyond 1."""
    low, high = (_normalised(value, threshold, calibration) for value in (scale.low, scale.high))
    return MapScale.between(min(max(low, 0.0), 1.0), high, scale.origin)


def _normalised(values: Any, threshold: float, calibration: Calibration) -> Any:
    return (values - threshold) / (calibration.maximum - calibration.minimum) + 0.5
