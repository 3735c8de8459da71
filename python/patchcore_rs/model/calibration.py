"""The alarm threshold: from the scores of normal images, with a record of where it came from.

An image is anomalous where score >= threshold. Of n normal scores, a may alarm; the threshold is the next float64 above
the (a + 1)-th largest score, the smallest one that alarms on at most a of the n images, equal scores included.

On further normal images it alarms more often than on these: its rate over them has the distribution Beta(a + 1, n - a),
whatever that of the scores, if all are drawn alike and none are equal (H. A. David, H. N. Nagaraja, Order Statistics,
2003, section 2.5). So

- the expected rate is (a + 1) / (n + 1), and a = max(0, floor(rate * (n + 1)) - 1) is the most that keeps it at `rate`;
- with 95 % confidence it is at most p where P(Binomial(n, p) <= a) = 0.05: the upper bound of C. J. Clopper and
  E. S. Pearson, Biometrika 26, 1934, for a alarms of n.

Equal scores make both smaller.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from patchcore_rs._checks import number
from patchcore_rs._text import counted, figure
from patchcore_rs.model.map_values import MapScale
from patchcore_rs.model.settings import check_number

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DOUBT = 0.05  # 95 % confidence


@dataclass(frozen=True)
class Calibration:
    """A threshold and its provenance.

    `images` normal images out of `source` had scores from `minimum` over `median` to `maximum`; `false_alarm_rate` was
    asked for and `reached_rate`, at most that, is the share of them with score >= `threshold`. Of further normal images
    the share `expected_rate` is expected to alarm, and with 95 % confidence at most `rate_bound`, as the module's text
    defines them; None in model files that were written before these were stored.
    """

    threshold: float
    false_alarm_rate: float
    reached_rate: float
    images: int
    minimum: float
    median: float
    maximum: float
    source: str
    expected_rate: float | None = None
    rate_bound: float | None = None

    @property
    def forecast(self) -> str:
        """What further normal images do, in words; empty where that is not known."""
        if self.expected_rate is None or self.rate_bound is None:
            return ""
        expected, bound = (figure(float(f"{100 * rate:.2g}"), 2) for rate in (self.expected_rate, self.rate_bound))
        return (
            f"about {expected} % of flawless images would raise a false alarm, with 95 % confidence at most {bound} %"
        )

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
        rates = {
            each: check_number(f"{name} {each}", stored[each])
            for each in ("expected_rate", "rate_bound")
            if stored.get(each) is not None
        }
        for each, rate in rates.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} {each} must be a share from 0 to 1, or null; got {rate:g}")
        return cls(**numbers, images=stored["images"], source=stored["source"], **rates)

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
    places = round(false_alarm_rate * (n + 1))
    places -= places / (n + 1) > false_alarm_rate  # divided, as 0.29 * 100 is 28.999999999999996
    allowed = max(0, places - 1)
    if warn and places == 0 and false_alarm_rate > 0:
        needed = int(1 / Fraction(false_alarm_rate)) - 1
        needed += 1 / (needed + 1) > false_alarm_rate
        warnings.warn(
            f"{counted(n, 'normal image')} cannot show a false alarm rate of {false_alarm_rate:g}, but "
            f"{figure(1 / (n + 1), 2)} or more: the threshold lies just above the largest of their scores; calibrate "
            f"on at least {needed}",
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
        expected_rate=(allowed + 1) / (n + 1),
        rate_bound=upper_bound(allowed, n),
    )


def upper_bound(alarms: int, n: int) -> float:
    """The rate p with P(Binomial(n, p) <= alarms) = 0.05, for 0 <= alarms < n: the tail falls as p grows."""
    counts = np.arange(alarms + 1)
    choices = np.concatenate([[0.0], np.cumsum(np.log((n - counts[1:] + 1) / counts[1:]))])  # log of n over each
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        tail = np.exp(choices + counts * math.log(p) + (n - counts) * math.log1p(-p)).sum()
        low, high = (p, high) if tail > _DOUBT else (low, p)
    return high


def min_max(values: NDArray[Any], threshold: float, calibration: Calibration, *, clip: bool) -> NDArray[Any]:
    """Scores or maps on anomalib's scale, the threshold at 0.5, dtype kept: (values - threshold) / range + 0.5.

    The range is that of the calibration's scores. With `clip` to [0, 1], as anomalib's post-processor does it; what is
    clipped becomes a tie. Else to the finite numbers of the dtype.
    """
    limits = np.finfo(values.dtype)
    low, high = (0, 1) if clip else (limits.min, limits.max)
    normalised: NDArray[Any] = np.clip(_normalised(values.astype(np.float64), threshold, calibration), low, high)
    return normalised.astype(values.dtype)


def min_max_scale(scale: MapScale, threshold: float, calibration: Calibration, *, clip: bool) -> MapScale:
    """The same colours for maps normalised by `min_max`; `high` may lie beyond 1."""
    low, high = (_normalised(value, threshold, calibration) for value in (scale.low, scale.high))
    return MapScale.between(min(max(low, 0.0), 1.0) if clip else low, high, scale.origin)


def warn_of_clipping(scores: NDArray[np.float64], *, stacklevel: int) -> None:
    """Say how many of (n,) scores that `min_max` clipped lie at an end, where there are such."""
    clipped = np.count_nonzero((scores <= 0) | (scores >= 1))
    if clipped:
        warnings.warn(
            f"normalised scores are clipped to 0 or 1, where they tie: {clipped:,} of {len(scores):,}; fit with "
            "clip=False to keep their order",
            stacklevel=stacklevel + 1,
        )


def _normalised(values: Any, threshold: float, calibration: Calibration) -> Any:
    return (values - threshold) / (calibration.maximum - calibration.minimum) + 0.5
