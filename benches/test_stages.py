"""The four stages beside their pure-torch twins. Every answer is checked before it is timed."""

from __future__ import annotations

from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest

from benches import data, engines, scenarios
from benches.checks import oracle
from benches.engines import OURS
from benches.scenarios import Aggregate, Coreset, Maps, Search
from patchcore_rs import MemoryBank, greedy_coreset

if TYPE_CHECKING:
    from collections.abc import Callable

    from benches.data import Array

T = TypeVar("T")
S = TypeVar("S", Search, Coreset, Aggregate, Maps)

_SECONDS = 1.0  # of measuring per engine and scenario


def stage(table: tuple[S, ...], rivals: dict[str, Any]) -> pytest.MarkDecorator:
    """Every scenario of a table with every engine."""
    pairs = [pytest.param(s, engine, id=f"{s.name}-{engine}") for s in table for engine in rivals]
    return pytest.mark.parametrize(("scenario", "engine"), pairs)


def sized(scenario: S, benchmark: Any) -> S:
    """The scenario, or its small twin where nothing is timed."""
    benchmark.group = scenario.name
    return scenario.small() if benchmark.disabled else scenario


def first_run(benchmark: Any, call: Callable[[], T]) -> T:
    """The answer to check; how long it took decides how often the call is timed."""
    begin = perf_counter()
    answer = call()
    benchmark.extra_info["first"] = perf_counter() - begin
    return answer


def measure(benchmark: Any, call: Callable[[], Any], engine: str, error: float, share: float = 1.0) -> None:
    """Times a call that has run before. `error` is how far its answer was off, `share` how much of the work it does."""
    first = max(benchmark.extra_info.pop("first"), 1e-4)
    rounds = int(np.clip(_SECONDS / first, 2 if first > _SECONDS else 7, 200))
    benchmark.extra_info.update(engine=engine, error=error, share=share)
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=1 if rounds > 2 else 0)


def relative_error(found: Array, expected: np.ndarray[Any, np.dtype[np.floating[Any]]]) -> float:
    """The largest difference, in units of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@cache
def search_data(s: Search) -> tuple[Array, Array, Array]:
    """Rows, queries and the exact distances."""
    if s.source == "images":
        images = data.of_images(-(-10 * s.rows // 784), "train")
        rows, queries = images[greedy_coreset(images, s.rows)], data.of_images(1, "test")[: s.queries]
    else:
        rows, queries = data.generated(s.rows, s.width, 784, 0), data.generated(s.queries, s.width, 784, 1)
    return rows, queries, MemoryBank(rows).kneighbors(queries, s.k)[0]


@stage(scenarios.SEARCH, engines.SEARCH)
def test_search(benchmark: Any, threads: int, scenario: Search, engine: str) -> None:
    s = sized(scenario, benchmark)
    rows, queries, exact = search_data(s)
    call = engines.SEARCH[engine](rows, queries, s.k, threads)
    distances, indices = first_run(benchmark, call)

    sample = slice(None, None, max(1, s.queries // 8))
    expected, expected_indices = oracle.nearest(queries[sample], rows, s.k)
    if engine == OURS:
        assert np.array_equal(indices[sample], expected_indices)
        assert np.array_equal(distances[sample], expected)
    np.testing.assert_allclose(distances, exact, rtol=2e-3)
    measure(benchmark, call, engine, relative_error(distances, exact))


@stage(scenarios.CORESET, engines.CORESET)
def test_coreset(benchmark: Any, threads: int, scenario: Coreset, engine: str) -> None:
    s = sized(scenario, benchmark)
    if s.source == "images":
        features = data.of_images(-(-s.rows // 784), "train")[: s.rows]
    else:
        features = data.generated(s.rows, s.width, 784, 0)
    share = 1.0 if engine == OURS else s.rival_share
    count = max(2, round(s.count * share))
    call = engines.CORESET[engine](features, count, threads)
    picks = first_run(benchmark, call)

    assert len(np.unique(picks)) == count
    error = 0.0
    if engine == OURS:
        assert picks[:6].tolist() == oracle.greedy(features, 6, start=0)[0]
    else:  # rounding may lead to other picks, but not to a worse cover
        radius = greedy_coreset(features, count, start=0, return_radii=True)[1][-1]
        covered = float(MemoryBank(features[picks]).kneighbors(features)[0].max())
        assert covered == pytest.approx(radius, rel=1e-2)
        error = abs(covered - radius) / radius
    measure(benchmark, call, engine, error, count / s.count)


@stage(scenarios.AGGREGATE, engines.AGGREGATE)
def test_aggregate(benchmark: Any, threads: int, scenario: Aggregate, engine: str) -> None:
    import torch

    from patchcore_rs.features.aggregation import aggregate_tensors

    s = sized(scenario, benchmark)
    maps = [data.normal((s.images, channels, side, side), seed) for seed, (channels, side) in enumerate(s.layers)]
    call = engines.AGGREGATE[engine](maps, s, threads)
    features = first_run(benchmark, call)

    expected, grid = aggregate_tensors([torch.from_numpy(m).double() for m in maps], 3, 1, s.embedding)
    assert grid == (s.layers[0][1], s.layers[0][1])
    error = relative_error(features, expected.numpy())
    assert features.shape == expected.shape
    assert error < 1e-6
    measure(benchmark, call, engine, error)


@stage(scenarios.MAPS, engines.MAPS)
def test_maps(benchmark: Any, threads: int, scenario: Maps, engine: str) -> None:
    import torch
    from scipy import ndimage

    s = sized(scenario, benchmark)
    scores = data.normal((s.images, s.grid, s.grid), 0)
    call = engines.MAPS[engine](scores, s, threads)
    maps, image_scores = first_run(benchmark, call)

    grids = torch.from_numpy(scores).double()[:, None]
    upsampled = torch.nn.functional.interpolate(grids, (s.size, s.size), mode="bilinear", align_corners=False)[:, 0]
    smooth = [ndimage.gaussian_filter(u, s.sigma, mode="reflect", truncate=4.0) for u in upsampled.numpy()]
    error = relative_error(maps, np.stack(smooth))
    assert maps.shape == (s.images, s.size, s.size)
    assert error < 1e-5
    assert np.array_equal(image_scores, scores.max(axis=(1, 2)))
    measure(benchmark, call, engine, error)
