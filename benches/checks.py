"""Answers are checked before they are timed: ours against the definition, rivals' by distance."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from patchcore_rs import MemoryBank
from patchcore_rs.features.aggregation import aggregate_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from benches.data import Array

    Indices = NDArray[np.int64]

# The oracle of the tests is the benchmarks' too. It is run by its path, since `tests` is no package.
oracle: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[1] / "tests" / "oracle.py")))

RIVAL_TOLERANCE = 2e-3  # relative, of distances
_COVER = 1e-2  # relative, of covering radii
_FEATURES, _MAPS = 1e-6, 1e-5  # of the largest value
_CHECKED = 8  # queries of a row of a table that are compared; two of each image where there are many
_CHUNK = 1024  # rows whose float64 copy is held at once: in the cache


class WrongAnswerError(RuntimeError):
    """An answer is not what the definition says; its time means nothing."""


def require(condition: object, what: str) -> None:
    """Raises WrongAnswerError naming `what` is wrong where the condition does not hold."""
    if not condition:
        raise WrongAnswerError(what)


def squared(queries: Array, rows: Array) -> NDArray[np.float64]:
    """(n, N) canonical squared distances, in chunks of rows."""
    starts = range(0, len(rows), _CHUNK)
    return np.concatenate([oracle.squared_distances(queries, rows[i : i + _CHUNK]) for i in starts], axis=1)


def nearest(queries: Array, rows: Array, k: int) -> tuple[Array, Indices]:
    """(n, k) distances and indices by the definition: float64 differences, ties to the lowest index."""
    found: tuple[Array, Indices] = oracle.smallest(squared(queries, rows), k)
    return found


def check_ours(
    found: Sequence[tuple[Array, Indices]], images: Iterable[Array], rows: Array, k: int, each: int | None = None
) -> int:
    """Our neighbours of some patches of every image equal the definition's, bit for bit; how many were compared.

    `each` of every image are compared, or two at least. The patch that is farthest from the rows is the first of them:
    it makes the image's score.
    """
    checked = 0
    spread = (each or max(2, _CHECKED // len(found))) - 1
    for (distances, indices), queries in zip(found, images, strict=True):
        places = (2 * np.arange(spread) + 1) * len(queries) // max(1, 2 * spread)
        chosen = np.union1d(places, distances[:, 0].argmax())
        due, neighbours = nearest(queries[chosen], rows, k)
        require(np.array_equal(indices[chosen], neighbours), "our neighbours differ from the float64 brute force")
        require(np.array_equal(distances[chosen], due), "our distances differ from the float64 brute force")
        checked += len(chosen)
    return checked


def rival_error(distances: Array, exact: Array) -> float:
    """The largest relative difference of a rival's distances; beyond `RIVAL_TOLERANCE` its time does not count."""
    return float((np.abs(distances - exact) / np.maximum(exact, np.finfo(np.float32).tiny)).max())


def cover_error(features: Array, picks: Indices, radius: float) -> float:
    """How far the covering radius of a rival's picks is from that of as many of ours.

    Rounding may lead to other picks, but not to a worse cover.
    """
    require(len(np.unique(picks)) == len(picks), "a rival picks a row twice")
    covered = float(MemoryBank(features[picks]).kneighbors(features)[0].max())
    error = abs(covered - radius) / max(radius, float(np.finfo(np.float32).tiny))
    require(error <= _COVER, f"a rival's cover is off by {error:.2g}")
    return error


def check_features(found: Array, maps: Sequence[Array], width: int | None) -> float:
    """Aggregated 3 x 3 neighbourhoods beside torch in float64; how far they are off, of the largest value."""
    images = len(maps[0])
    found = found.reshape(images, -1, found.shape[-1])
    largest = off = 0.0
    for i in range(images):  # one at a time: torch unfolds all neighbourhoods, in float64
        layers = [torch.from_numpy(layer[i : i + 1]).double() for layer in maps]
        expected, grid = aggregate_tensors(layers, 3, 1, width)
        require(grid == maps[0].shape[2:] and found[i].shape == expected.shape, "features have another shape")
        off = max(off, float(np.abs(found[i] - expected.numpy()).max()))
        largest = max(largest, float(expected.abs().max()))
    require(off < _FEATURES * largest, f"features are off by {off / largest:.2g}")
    return off / largest


def check_maps(found: Array, scores: Array, size: int, sigma: float) -> float:
    """Anomaly maps beside the definition in float64; how far they are off, of the largest value."""
    expected = oracle.anomaly_maps(scores, (size, size), sigma, "bilinear", "symmetric")
    require(found.shape == expected.shape, "maps have another shape")
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    require(error < _MAPS, f"maps are off by {error:.2g}")
    return error


def check_picks(features: Array, picks: Indices, radii: NDArray[np.float64], prefix: int) -> int:
    """Our greedy sequence: its first picks by the naive canonical loop, and deep in it the pick that is due.

    Half-way and at the last pick, an exact search (checked on its own) says how far every row is from the rows chosen
    before: the pick must be a farthest row. Returns the number of picks of the naive loop.
    """
    value = np.full(len(features), np.inf)
    prefix = min(prefix, len(picks))
    for position in range(prefix):
        due = int(picks[0]) if position == 0 else int(np.argmax(value))
        require(due == picks[position], f"pick {position} is {picks[position]}; the naive loop picks {due}")
        value = np.minimum(value, squared(features[due : due + 1], features)[0])
        value[due] = -1
    require(len(np.unique(picks)) == len(picks), "a row is picked twice")
    for depth in sorted({len(picks) // 2, len(picks) - 1} - {0}):
        distances = MemoryBank(features[picks[:depth]]).kneighbors(features)[0][:, 0]
        require(distances[picks[depth]] == distances.max(), f"pick {depth} is not a farthest row")
        require(np.float32(radii[depth - 1]) == distances.max(), f"radius {depth - 1} is not the largest distance")
    return prefix
