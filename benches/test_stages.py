"""`make bench`: the cases of the tables beside pure torch, by pytest-benchmark. Every answer is checked before."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benches.rivals.search import IN_TORCH
from benches.run import OURS
from benches.tables import coreset, search, stages
from benches.timing import seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from benches.run import Contest, Run

pytestmark = pytest.mark.timeout(3600)  # the first of all extracts the features

_SECONDS = 1.0  # of measuring an engine


def each(pairs: Iterable[tuple[Any, Iterable[str]]]) -> pytest.MarkDecorator:
    """Every case with each of its engines."""
    found = [pytest.param(case, engine, id=f"{case.key}-{engine}") for case, engines in pairs for engine in engines]
    return pytest.mark.parametrize(("case", "engine"), found)


@lru_cache(maxsize=1)  # the engines of a case come one after the other
def checked(make: Callable[[Run, Any], Contest], run: Run, case: Any) -> Contest:
    """The contest of a case, whose answers are checked once for all engines."""
    return make(run, case)


def measure(benchmark: Any, contest: Contest, engine: str) -> None:
    """Times the calls of an engine on all images; how long they take decides how often. The figure is their mean."""
    calls = [each[engine] for each in contest.calls if engine in each]
    assert calls, f"{engine} is off by {contest.errors[engine]:.2g}"
    share = len(calls) * contest.shares.get(engine, 1.0)
    benchmark.group = contest.title
    benchmark.extra_info.update(engine=engine, error=contest.errors[engine], share=share)

    def every() -> None:
        for call in calls:
            call()

    first = max(seconds(every), 1e-4)
    rounds = int(np.clip(_SECONDS / first, 2 if first > _SECONDS else 7, 200))
    benchmark.pedantic(every, rounds=rounds, warmup_rounds=1 if rounds > 2 else 0)


search_in_torch = partial(search.contest, entrants=IN_TORCH)


@each((case, (OURS, *IN_TORCH)) for case in search.CASES)
def test_search(benchmark: Any, run: Run, case: search.Case, engine: str) -> None:
    measure(benchmark, checked(search_in_torch, run, case), engine)


# All rows of all images take torch minutes.
@each((case, (OURS, coreset.NAIVE)) for case in coreset.CASES if not case.everything)
def test_coreset(benchmark: Any, run: Run, case: coreset.Case, engine: str) -> None:
    measure(benchmark, checked(coreset.contest, run, case), engine)


@each((case, (OURS, *case.entrants)) for case in stages.AGGREGATE)
def test_aggregate(benchmark: Any, run: Run, case: stages.Aggregate, engine: str) -> None:
    measure(benchmark, checked(stages.aggregate_contest, run, case), engine)


@each((case, (OURS, "torch")) for case in stages.MAPS)
def test_maps(benchmark: Any, run: Run, case: stages.Maps, engine: str) -> None:
    measure(benchmark, checked(stages.maps_contest, run, case), engine)
