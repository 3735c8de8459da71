"""Greedy k-centre coreset selection (section 3.2 and Algorithm 1 of the paper). Needs numpy only."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from patchcore_rs import _native
from patchcore_rs._arrays import as_array, feature_matrix
from patchcore_rs._checks import flags, integer, non_negative, thread_count
from patchcore_rs._limits import require_memory, selection_memory
from patchcore_rs._progress import reporting_rows, require_progress

if TYPE_CHECKING:
    from typing import SupportsFloat

    from numpy.typing import ArrayLike, NDArray

    from patchcore_rs._types import RowProgress

    Indices = NDArray[np.int64]
    Radii = NDArray[np.float64]
    Start = int | str | NDArray[np.uintp] | None

_LABEL = "selecting the coreset"  # what a bar of progress is called


def coreset_size(amount: float, rows: int, name: str = "amount") -> int:
    """Return the number of rows that `amount` stands for: an int is a count, a float a fraction.

    Raises:
        TypeError: `amount` is no number.
        ValueError: the count is not in 1..rows, the fraction not in (0, 1], or rounds down to 0 rows.
    """
    if isinstance(amount, (float, np.floating)):
        if not 0 < amount <= 1:
            raise ValueError(
                f"{name} must be a fraction in (0, 1] when it is a float, or a count when it is an int; got {amount}"
            )
        count = math.floor(rows * amount)
        if count == 0:
            raise ValueError(
                f"{name} {amount} of {rows} rows is no row at all; take at least {1 / rows:.3g}, or a count"
            )
        return count
    count = integer(amount, name, minimum=1)
    if count > rows:
        raise ValueError(f"{name} must be at most the {rows} rows of features; got {count}")
    return count


@overload
def greedy_coreset(
    features: ArrayLike,
    amount: float,
    *,
    seed: int = ...,
    start: int | Literal["mean", "mean10"] | ArrayLike | None = ...,
    projection: int | None = ...,
    projection_kind: Literal["sparse", "gaussian"] = ...,
    fill: bool = ...,
    return_radii: Literal[False] = ...,
    strict: bool = ...,
    threads: int | None = ...,
    progress: RowProgress | bool | None = ...,
) -> Indices: ...


@overload
def greedy_coreset(
    features: ArrayLike,
    amount: float,
    *,
    seed: int = ...,
    start: int | Literal["mean", "mean10"] | ArrayLike | None = ...,
    projection: int | None = ...,
    projection_kind: Literal["sparse", "gaussian"] = ...,
    fill: bool = ...,
    return_radii: Literal[True],
    strict: bool = ...,
    threads: int | None = ...,
    progress: RowProgress | bool | None = ...,
) -> tuple[Indices, Radii]: ...


def greedy_coreset(
    features: ArrayLike,
    amount: float,
    *,
    seed: int = 0,
    start: int | Literal["mean", "mean10"] | ArrayLike | None = None,
    projection: int | None = None,
    projection_kind: Literal["sparse", "gaussian"] = "sparse",
    fill: bool = False,
    return_radii: bool = False,
    strict: bool = False,
    threads: int | None = None,
    progress: RowProgress | bool | None = None,
) -> Indices | tuple[Indices, Radii]:
    """Choose rows so that every row is near a chosen one: the exact greedy k-centre sequence.

    Each pick is the row farthest from those chosen so far (ties to the lowest index), in the
    canonical distance and the full dimension. No row is chosen twice. The sequence has the same bits
    for any number of threads and any SIMD level, and a smaller coreset is a prefix of a larger one.

    Features that are C-contiguous float32, a numpy memmap for one, are read where they lie, never copied: in
    full four times (to check, average and encode them, and for their distances to the first pick), and from
    then on only the rows whose distance may matter, which are all in data that the codes cannot tell apart.
    Any others are converted first. What is read once only, and may exceed memory: `StreamingCoreset`.

    Args:
        features: (n, d) floating-point rows, finite and at most 1e16 in magnitude.
        amount: an int is a count, a float a fraction (`floor(n * fraction)` rows).
        seed: decides the first row and the projection.
        start: None for the seeded row `splitmix64(seed) mod n`, an int for that row; either comes
            first and counts. "mean" and "mean10" choose no row at first: they begin with the mean
            distance to all rows or to ten seeded ones, and pick the farthest row first. So does an array of
            row indices, with the mean distance to those rows.
        projection: select in a random projection to that many channels (the paper's psi); None for the
            full dimension.
        projection_kind: "sparse" (signs and zeros) or "gaussian".
        fill: where every distinct row is chosen before there are enough, the other rows follow, lowest index first,
            so that there are as many as asked for.
        return_radii: also return the covering radius after each pick.
        strict: refuse features of any other dtype than float32 instead of converting them.
        threads: None for as many as this process may use.
        progress: True for a bar on stderr, or called now and then with (done, total), the part of the work that is
            done, in picks; what it raises ends the call.

    Returns:
        indices: (k,) int64 in pick order. Fewer than asked for, with a UserWarning, when the chosen rows
            already equal all others, if not `fill`.
        radii: (k,) float64 Euclidean, if `return_radii`: after each pick, the largest distance of a row to
            its nearest pick, 0 for rows that `fill` adds. (Where means begin, a row's mean distance counts as that
            to one more pick.)

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or a value is not finite.
        MemoryError: the selection would not fit into the memory there is; raised before it is taken.
    """
    threads, seed, first = _checked(threads, seed, start, progress)
    fill = flags(fill, "fill")
    width = None if projection is None else integer(projection, "projection", minimum=1)
    if projection_kind not in ("sparse", "gaussian"):
        kind = ValueError if isinstance(projection_kind, str) else TypeError
        raise kind(f'projection_kind must be "sparse" or "gaussian"; got "{projection_kind}"')
    rows = _rows(features, strict=strict)
    count = coreset_size(amount, rows.shape[0])
    with reporting_rows(progress, _LABEL, count) as report:
        indices, radii = greedy_sequence(
            rows,
            count,
            seed=seed,
            start=first,
            projection=width,
            projection_kind=projection_kind,
            threads=threads,
            progress=report,
        )
    if fill:
        indices, radii = _filled(indices, radii, count, len(rows))
    elif len(indices) < count:
        warnings.warn(
            f"the coreset has {len(indices)} rows instead of {count}: every other row equals a chosen one",
            UserWarning,
            stacklevel=2,
        )
    return (indices, radii) if return_radii else indices


def greedy_sequence(
    rows: NDArray[np.float32],
    count: int,
    *,
    seed: int,
    start: Start,
    projection: int | None,
    projection_kind: str,
    threads: int | None,
    progress: RowProgress | None,
) -> tuple[Indices, Radii]:
    """Return what `greedy_coreset` does for checked arguments, without its warning of an early end."""
    if projection is not None:
        _require_room(rows, projection)
        rows = _native.project(rows, projection, projection_kind, seed, threads)
    _require_room(rows)
    indices, radii, _ = _native.greedy_coreset(rows, count, start, seed, threads, progress)
    return indices, radii


@overload
def coreset_for_radius(
    features: ArrayLike,
    radius: SupportsFloat,
    *,
    seed: int = ...,
    start: int | None = ...,
    max_amount: float | None = ...,
    return_radii: Literal[False] = ...,
    strict: bool = ...,
    threads: int | None = ...,
    progress: RowProgress | bool | None = ...,
) -> Indices: ...


@overload
def coreset_for_radius(
    features: ArrayLike,
    radius: SupportsFloat,
    *,
    seed: int = ...,
    start: int | None = ...,
    max_amount: float | None = ...,
    return_radii: Literal[True],
    strict: bool = ...,
    threads: int | None = ...,
    progress: RowProgress | bool | None = ...,
) -> tuple[Indices, Radii]: ...


def coreset_for_radius(
    features: ArrayLike,
    radius: SupportsFloat,
    *,
    seed: int = 0,
    start: int | None = None,
    max_amount: float | None = None,
    return_radii: bool = False,
    strict: bool = False,
    threads: int | None = None,
    progress: RowProgress | bool | None = None,
) -> Indices | tuple[Indices, Radii]:
    """Choose rows until every row lies within `radius` of a chosen one.

    The rows are those of `greedy_coreset` in their order, as many as it takes: the sequence ends with the
    first pick after which the covering radius (Euclidean, in the canonical distance) is at most `radius`.
    Chosen rows are farther than `radius` apart.

    Args:
        features: as for `greedy_coreset`.
        radius: the distance that is good enough, >= 0; at 0 every distinct row is chosen.
        seed: decides the first row.
        start: None for the seeded row, an int for that row. (The other beginnings of `greedy_coreset` choose
            by mean distances, which cover nothing.)
        max_amount: end there in any case, with a UserWarning: a count or a fraction, as `amount`.
        return_radii: also return the covering radius after each pick.
        strict: refuse features of any other dtype than float32 instead of converting them.
        threads: None for as many as this process may use.
        progress: True for a bar on stderr, or called now and then with (done, total), the part that is done of the
            most work there can be, in picks; what it raises ends the call.

    Returns:
        What `greedy_coreset` returns.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or a value is not finite.
        MemoryError: the selection would not fit into the memory there is; raised before it is taken.
    """
    enough = non_negative(radius, "radius")
    if start is not None and (isinstance(start, str) or np.ndim(start)):
        raise ValueError(f"start must be None or a row index where a radius is asked for; got {start!r:.80}")
    threads, seed, first = _checked(threads, seed, start, progress)
    rows = _rows(features, strict=strict)
    limit = rows.shape[0] if max_amount is None else coreset_size(max_amount, rows.shape[0], "max_amount")
    _require_room(rows)
    with reporting_rows(progress, _LABEL, limit) as report:
        indices, radii, _ = _native.greedy_coreset(rows, limit, first, seed, threads, report, radius=enough)
    if radii[-1] > enough:
        warnings.warn(
            f"the coreset ends at max_amount, {len(indices)} rows, with the covering radius {radii[-1]:g} instead of "
            f"{enough:g}",
            UserWarning,
            stacklevel=2,
        )
    return (indices, radii) if return_radii else indices


def johnson_lindenstrauss_width(rows: int, dimensions: int, *, eps: float = 0.9) -> int | None:
    """The projection's width that keeps all distances within 1 ± `eps`; None where it would not reduce `dimensions`.

    4 ln(rows) / (eps² / 2 - eps³ / 3), rounded down (Dasgupta and Gupta, 2003).
    """
    width = int(4 * math.log(rows) / (eps**2 / 2 - eps**3 / 3))
    return width if 0 < width < dimensions else None


def add_cover(cover: float, radius: float, dimensions: int) -> float:
    """Return within which distance of a chosen row a row lies that was within `cover` of a candidate.

    `radius` is the covering radius of the chosen rows over the candidates. By the triangle inequality it is
    the sum, but for rounding. A term of 0 means equal rows and adds nothing.
    """
    return cover + radius if cover == 0 or radius == 0 else (cover + radius) * rounding(dimensions)


def rounding(dimensions: int) -> float:
    """Return the factor that makes a sum of two canonical distances a bound on a third, by the triangle inequality.

    A canonical distance is the root of a sum of products of differences, taken in at most d/16 + 5 additions,
    each step rounded to 53 bits: it is off by a factor within 1 ± e, e = (d/16 + 10) 2^-53. The true third
    distance is at most the sum / (1 - e), the canonical one (1 + e) times that, which is below the sum times
    1 + 3 e. The answer, 1 + 4 e, leaves room for the roundings of its own use.
    """
    return 1 + (dimensions / 16 + 10) * 2.0**-51


def _rows(features: ArrayLike, *, strict: bool) -> NDArray[np.float32]:
    rows = feature_matrix(features, "features", strict=strict)
    if rows.shape[0] == 0:
        raise ValueError("features must have at least one row; got none")
    return rows


def _checked(
    threads: int | None, seed: int, start: int | str | ArrayLike | None, progress: object
) -> tuple[int | None, int, Start]:
    require_progress(progress)
    return thread_count(threads), integer(seed, "seed", minimum=0, below=2**64), _start(start)


def _start(start: Any) -> Start:
    """A start as the kernel takes it: whether its rows exist is the kernel's to say."""
    if start is None or isinstance(start, str):
        return start
    rows = as_array(start, "start")
    if rows.ndim == 0:
        return integer(start, "start", minimum=0)
    if rows.ndim != 1 or (rows.dtype.kind not in "iu" and rows.size):
        raise TypeError(f"start must hold row indices, integers of shape (n,); got {rows.dtype} of shape {rows.shape}")
    if rows.size and rows.min() < 0:
        raise ValueError(f"start must hold row indices >= 0; got {rows.min()}")
    return np.ascontiguousarray(rows, np.uintp)


def _filled(indices: Indices, radii: Radii, count: int, rows: int) -> tuple[Indices, Radii]:
    """The picks, and the lowest of the other rows up to that count: rows that equal a pick."""
    unpicked = np.ones(rows, bool)
    unpicked[indices] = False
    more = np.flatnonzero(unpicked)[: count - len(indices)]
    return np.concatenate([indices, more]), np.concatenate([radii, np.zeros(len(more))])


def _require_room(rows: NDArray[np.float32], projected: int = 0) -> None:
    """MemoryError where a selection, or a projection to `projected` channels, cannot fit."""
    count, dimensions = rows.shape
    require_memory(
        4 * count * projected if projected else selection_memory(count, dimensions),
        f"selecting a coreset of {count} rows of {dimensions} channels, besides these rows,",
        "use StreamingCoreset, which holds a limited number of rows, or fewer rows",
    )
