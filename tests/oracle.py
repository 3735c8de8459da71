"""What the kernels must answer, from the definitions, in plain float64 numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LANES = 16


def squared_distances(queries: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, N) canonical squared distances: column j is added to lane j mod 16, lanes are folded in halves."""
    groups = -(-rows.shape[1] // LANES)

    def lanes(values: NDArray[np.float32]) -> NDArray[np.float64]:
        wide = np.zeros((len(values), groups * LANES))
        wide[:, : values.shape[1]] = values
        return wide.reshape(len(values), groups, LANES)

    x, y = lanes(queries), lanes(rows)
    result = np.empty((len(x), len(y)))
    for query, line in zip(x, result, strict=True):
        sums = np.zeros((len(y), LANES))
        for group in range(groups):
            difference = query[group] - y[:, group]
            sums += difference * difference
        while sums.shape[1] > 1:
            half = sums.shape[1] // 2
            sums = sums[:, :half] + sums[:, half:]
        line[:] = sums[:, 0]
    return result


def nearest(
    queries: NDArray[np.float32], rows: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(n, k) distances and indices in the order (squared distance, index)."""
    squared = squared_distances(queries, rows)
    indices = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.sqrt(np.take_along_axis(squared, indices, axis=1)).astype(np.float32), indices


def splitmix64(state: int) -> int:
    """Vigna's SplitMix64: one output."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def greedy(
    rows: NDArray[np.float32], count: int, *, start: int | None = None, value: NDArray[np.float64] | None = None
) -> tuple[list[int], list[float]]:
    """Indices and radii of the textbook greedy k-centre loop, ties to the lowest index.

    It begins with row ``start``, or with the largest of ``value``: first squared distances.
    """
    value = np.full(len(rows), np.inf) if value is None else value.copy()
    picks: list[int] = []
    radii: list[float] = []
    while len(picks) < count:
        pick = start if start is not None and not picks else int(np.argmax(value))
        if picks and value[pick] <= 0:
            break
        picks.append(pick)
        value = np.minimum(value, squared_distances(rows[pick : pick + 1], rows)[0])
        value[pick] = -1
        radii.append(float(np.sqrt(max(value.max(), 0.0))))
    return picks, radii
