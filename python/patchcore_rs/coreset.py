"""Greedy k-centre coreset selection (section 3.2 and Algorithm 1 of the paper). Needs numpy only."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Literal, overload

import numpy as np

from patchcore_rs import _native
from patchcore_rs.arguments import feature_matrix, integer, thread_count

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    Indices = NDArray[np.int64]
    Radii = NDArray[np.float64]


def coreset_size(amount: float, rows: int) -> int:
    """Return the number of rows that ``amount`` stands for: an int is a count, a float a fraction.

    Raises:
        TypeError: ``amount`` is no number.
        ValueError: the count is not in 1..rows, the fraction not in (0, 1], or rounds down to 0 rows.
    """
    if isinstance(amount, (float, np.floating)):
        if not 0 < amount <= 1:
            raise ValueError(
                f"amount must be a fraction in (0, 1] when it is a float, or a count when it is an int; got {amount}"
            )
        count = math.floor(rows * amount)
        if count == 0:
            raise ValueError(
                f"amount {amount} of {rows} rows is no row at all; take at least {1 / rows:.3g}, or a count"
            )
        return count
    count = integer(amount, "amount", minimum=1)
    if count > rows:
        raise ValueError(f"amount must be at most the {rows} rows of features; got {count}")
    return count


@overload
def greedy_coreset(
    features: ArrayLike,
    amount: float,
    *,
    seed: int = ...,
    start: int | Literal["mean", "mean10"] | None = ...,
    projection: int | None = ...,
    projection_kind: Literal["sparse", "gaussian"] = ...,
    return_radii: Literal[False] = ...,
    strict: bool = ...,
    threads: int | None = ...,
    progress: Callable[[int, int], object] | None = ...,
) -> Indices: ...


@overload
def greedy_coreset(
    features: ArrayLike,
    amount: float,
    *,
    seed: int = ...,
    start: int | Literal["mean", "mean10"] | None = ...,
    projection: int | None = ...,
    projection_kind: Literal["sparse", "gaussian"] = ...,
    return_radii: Literal[True],
    strict: bool = ...,
    threads: int | None = ...,
    progress: Callable[[int, int], object] | None = ...,
) -> tuple[Indices, Radii]: ...


def greedy_coreset(
    features: ArrayLike,
    amount: float,
    *,
    seed: int = 0,
    start: int | Literal["mean", "mean10"] | None = None,
    projection: int | None = None,
    projection_kind: Literal["sparse", "gaussian"] = "sparse",
    return_radii: bool = False,
    strict: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Indices | tuple[Indices, Radii]:
    """Choose rows so that every row is near a chosen one: the exact greedy k-centre sequence.

    Each pick is the row farthest from those chosen so far (ties to the lowest index), in the
    canonical distance and the full dimension. No row is chosen twice. The sequence has the same bits
    for any number of threads and any SIMD level, and a smaller coreset is a prefix of a larger one.

    Args:
        features: (n, d) floating-point rows, finite and at most 1e16 in magnitude.
        amount: an int is a count, a float a fraction (``floor(n * fraction)`` rows).
        seed: decides the first row and the projection.
        start: None for the seeded row ``splitmix64(seed) mod n``, an int for that row; either comes
            first and counts. "mean" and "mean10" choose no row at first: they begin with the mean
            distance to all rows or to ten seeded ones, and pick the farthest row first.
        projection: select in a random projection to that many channels (the paper's psi); None for the
            full dimension.
        projection_kind: "sparse" (signs and zeros) or "gaussian".
        return_radii: also return the covering radius after each pick.
        strict: refuse features of any other dtype than float32 instead of converting them.
        threads: None for as many as this process may use.
        progress: called now and then with (picks done, picks in all); what it raises ends the call.

    Returns:
        indices: (k,) int64 in pick order. Fewer than asked for, with a UserWarning, when the chosen rows
            already equal all others.
        radii: (k,) float64 Euclidean, if ``return_radii``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or a value is not finite.
    """
    rows = feature_matrix(features, "features", strict=strict)
    if rows.shape[0] == 0:
        raise ValueError("features must have at least one row; got none")
    count = coreset_size(amount, rows.shape[0])
    threads = thread_count(threads)
    seed = integer(seed, "seed", minimum=0, below=2**64)
    if start is not None and not isinstance(start, str):
        start = integer(start, "start", minimum=0)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable as progress(done, total); got {progress!r}")
    if projection is not None:
        width = integer(projection, "projection", minimum=1)
        rows = _native.project(rows, width, projection_kind, seed, threads)
    indices, radii = _native.greedy_coreset(rows, count, start, seed, threads, progress)
    if len(indices) < count:
        warnings.warn(
            f"the coreset has {len(indices)} rows instead of {count}: every other row equals a chosen one",
            UserWarning,
            stacklevel=2,
        )
    return (indices, radii) if return_radii else indices
