"""Times of calls that take turns, so that all of them see the same machine."""

from __future__ import annotations

from time import perf_counter, sleep
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")

_LONG = 1.0  # seconds of a call that gets few turns
_SHORT = 0.05  # seconds of a call that runs several times a turn
_ROUNDS, _MOST, _FEW = 5, 20, 2
_PASSES = 3  # over several images
_BUDGET = 4.0  # seconds that the turns of the calls below `_LONG` should take
REST = 0.05  # seconds in which the last call's idle threads go to sleep


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """How many seconds one call takes, and what it returns."""
    begin = perf_counter()
    answer = call()
    return perf_counter() - begin, answer


def seconds(call: Callable[[], object]) -> float:
    """How many seconds one call takes."""
    return timed(call)[0]


def interleave(images: Sequence[Mapping[str, Callable[[], object]]], *, quick: bool = False) -> list[dict[str, float]]:
    """The best milliseconds of each call on each image, by name; not every image need have all calls.

    After one call of each name to warm up they take turns on the first image, then on the next. There are at least
    three such passes over all images, or five turns where there is one; two for calls that take a second. So a machine
    that is slow for a while is so for all calls on an image, and not in every pass. A short call runs three times in
    its turn: the first may still feel the threads of the one before, which spin for a while. `quick` is one pass.
    """
    first: dict[str, Callable[[], object]] = {}
    for calls in images:
        for name, call in calls.items():
            first.setdefault(name, call)
    took = {name: seconds(call) for name, call in first.items()}
    many = {name for name in took if took[name] < _LONG}
    turn = sum(took[name] * _repeats(took[name]) + REST for calls in images for name in calls if name in many)
    least = _ROUNDS if len(images) == 1 else _PASSES
    rounds = max(least, min(_MOST, int(_BUDGET / turn))) if many else _FEW
    best = [dict.fromkeys(calls, float("inf")) for calls in images]
    for round_ in range(1 if quick else rounds):
        for calls, fastest in zip(images, best, strict=True):
            for name, call in calls.items():
                if name not in many and round_ >= _FEW:
                    continue
                sleep(REST)
                once = seconds(call)
                again = (seconds(call) for _ in range(_repeats(once) - 1))
                fastest[name] = min(fastest[name], 1e3 * min((once, *again)))
    return best


def _repeats(took: float) -> int:
    """How often a call runs in its turn."""
    return 3 if took < _SHORT else 1


def exponent(sizes: list[int], times: list[float]) -> float | None:
    """The slope of log time over log size, by least squares; None for fewer than two sizes."""
    from numpy import log, polyfit

    if len(sizes) < 2:
        return None
    return round(float(polyfit(log(sizes), log(times), 1)[0]), 3)
