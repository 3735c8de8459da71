"""Data that could be hostile to filters: nothing may fall off a cliff there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from benches.data import Array


def _clustered(rng: np.random.Generator, rows: int, width: int) -> Array:
    """Few directions carry the variance, values are rectified: the ordinary case."""
    rank = max(1, width // 8)
    centres = 3 * rng.normal(size=(12, rank))
    latent = centres[rng.integers(12, size=rows)] + rng.normal(size=(rows, rank))
    return np.maximum(latent @ rng.normal(size=(rank, width)), 0).astype(np.float32)


def _constant_columns(rng: np.random.Generator, rows: int) -> Array:
    values = _clustered(rng, rows, 256)
    values[:, ::2] = 7
    return values


def _two_clusters(rng: np.random.Generator, rows: int) -> Array:
    values = _clustered(rng, rows, 256)
    values[rng.random(rows) < 0.5] += 1e5
    return values


def _outlier(rng: np.random.Generator, rows: int) -> Array:
    values = _clustered(rng, rows, 256)
    values[rows // 2] = 1e6
    return values


def _sorted(rng: np.random.Generator, rows: int) -> Array:
    values = _clustered(rng, rows, 256)
    return np.ascontiguousarray(values[np.argsort(np.linalg.norm(values, axis=1))])


HOSTILE: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "clustered (none of them)": lambda rng, rows: _clustered(rng, rows, 256),
    "constant columns": _constant_columns,
    "integer grid, d 8": lambda rng, rows: rng.integers(0, 5, (rows, 8)).astype(np.float32),
    "integer grid, d 256": lambda rng, rows: rng.integers(0, 3, (rows, 256)).astype(np.float32),
    "all rows equal": lambda _rng, rows: np.full((rows, 256), 1.5, np.float32),
    "two clusters far apart": _two_clusters,
    "one outlier at 1e6": _outlier,
    "heavy tails": lambda rng, rows: rng.standard_t(1.5, (rows, 256)).astype(np.float32),
    "rows sorted by norm": _sorted,
    "d 1": lambda rng, rows: rng.normal(size=(rows, 1)).astype(np.float32),
    "d 2000": lambda rng, rows: _clustered(rng, rows // 4, 2000),
}
