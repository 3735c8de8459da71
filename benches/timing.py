"""Times of calls that take turns, so that all of them see the same machine."""

from __future__ import annotations

from time import perf_counter, sleep
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

_LONG = 1.0  # seconds of a call that gets few turns
_SHORT = 0.05  # seconds of a call that runs several times a turn
_ROUNDS, _MOST, _FEW = 5, 20, 2
_BUDGET = 4.0  # seconds that the turns of the calls below `_LONG` should take
_REST = 0.05  # seconds in which the last call's idle threads go to sleep


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """How many seconds one call takes, and what it returns."""
    begin = perf_counter()
    answer = call()
    return perf_counter() - begin, answer


def seconds(call: Callable[[], object]) -> float:
    """How many seconds one call takes."""
    return timed(call)[0]


def interleave(calls: Mapping[str, Callable[[], object]], *, quick: bool = False) -> dict[str, float]:
    """The best milliseconds of each call, by name.

    After one call of each to warm up they take turns: at least five for calls below a second, the same number for all
    of these, and two for the others. A short call runs three times in its turn: the first may still feel the threads of
    the one before, which spin for a while. `quick` ones take one turn.
    """
    best = {name: seconds(call) for name, call in calls.items()}
    short = {name for name, took in best.items() if took < _SHORT}
    many = {name for name, took in best.items() if took < _LONG}
    turns = sum(best[name] * (3 if name in short else 1) + _REST for name in many)
    rounds = max(_ROUNDS, min(_MOST, int(_BUDGET / turns))) if many else _FEW
    for turn in range(1 if quick else rounds):
        for name, call in calls.items():
            if name not in many and turn >= _FEW:
                continue
            sleep(_REST)
            took = min(seconds(call) for _ in range(3 if name in short else 1))
            best[name] = min(best[name], took)
    return {name: 1e3 * took for name, took in best.items()}


def exponent(sizes: list[int], times: list[float]) -> float | None:
    """The slope of log time over log size, by least squares; None for fewer than two sizes."""
    from numpy import log, polyfit

    if len(sizes) < 2:
        return None
    return round(float(polyfit(log(sizes), log(times), 1)[0]), 3)
