"""The memory bank: patch features of good parts, and exact search among them. Needs numpy only."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from patchcore_rs import _native
from patchcore_rs._arrays import as_array, feature_matrix, require_finite
from patchcore_rs._checks import flags, integer, non_negative, one_of, thread_count
from patchcore_rs._limits import require_memory

if TYPE_CHECKING:
    from typing import SupportsFloat

    from numpy.typing import ArrayLike, NDArray

_storage = one_of("float32", "float16", expected='"float32" or "float16"')


class MemoryBank:
    """An immutable set of feature rows that answers exact nearest-neighbour queries.

    The rows are copied, so later changes to `features` do not matter, and a bank may be used by any
    number of threads at once. `with_rows` and `merge` give larger ones.

    Rows may come in groups, as those of one image after another. A search may then be held to the rows of some groups,
    others for each call, in the time that it takes in a bank of those rows alone.

    Args:
        features: (N, d) floating-point rows, finite and at most 1e16 in magnitude, N >= 1.
        groups: (G,) integers, how many rows each group has, in turn: at least 1 each, and N in all. None for a bank
            without groups.
        dtype: storage of the rows: "float32", or "float16", which rounds them. The search is exact for the
            rows as they are stored; a float16 bank takes at most 0.8 times the memory of float32 rows alone,
            and building it as much as the float32 rows for a while.
        strict: refuse features and queries of any other dtype than float32 instead of converting them.
        threads: threads for building and for queries; None for as many as this process may use.

    Raises:
        TypeError: `features` holds no floats, or is a tensor on a device.
        ValueError: `features` is empty, not 2-D, or holds a NaN, infinite or too large value, which
            is named by its position; for float16, too large is 65520. Or a group has no rows, or the groups have others
            in all than there are.
    """

    def __init__(
        self,
        features: ArrayLike,
        *,
        groups: ArrayLike | None = None,
        dtype: str = "float32",
        strict: bool = False,
        threads: int | None = None,
    ) -> None:
        self._dtype = _storage(dtype, "dtype")
        self._threads = thread_count(threads)
        self._strict = strict
        rows = feature_matrix(features, "features", strict=strict)
        self._groups = None if groups is None else _unsigned(groups, "groups")
        self._native = _native.MemoryBank(rows, self._threads, half=dtype == "float16", groups=self._groups)

    def __len__(self) -> int:
        return self._native.rows

    def __repr__(self) -> str:
        groups = "" if self._groups is None else f" in {len(self._groups)} groups"
        rows = f"{self._native.rows} rows{groups} x {self._native.dim} channels"
        return f"MemoryBank({rows}, {self.nbytes / 2**20:.1f} MiB)"

    def __reduce__(self) -> tuple[partial[MemoryBank], tuple[NDArray[np.float32]]]:
        return partial(MemoryBank, groups=self._groups, **self._options()), (self.features,)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and channels, (N, d)."""
        return self._native.rows, self._native.dim

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """How many rows each group has, (G,) int64; None for a bank without groups."""
        return None if self._groups is None else self._groups.astype(np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._native.nbytes

    @property
    def features(self) -> NDArray[np.float32]:
        """A copy of the rows, (N, d) float32."""
        return self._native.features()

    def with_rows(self, more: ArrayLike) -> MemoryBank:
        """Return a new bank of this bank's rows, then those of `more`; this one stays as it is.

        Storage, strictness and threads are this bank's. It costs what building the new bank does.

        Args:
            more: (n, d) floating-point rows; n may be 0.

        Raises:
            TypeError: `more` holds no floats.
            ValueError: the widths differ, or a value is not finite or too large, which is named by its position, or
                this bank has groups.
            MemoryError: the new bank would not fit into the memory there is.
        """
        self._require_no_groups("this bank")
        rows = feature_matrix(more, "more", strict=self._strict)
        if rows.shape[1] != self.shape[1]:
            raise ValueError(f"more must have the {self.shape[1]} channels of the bank; got {rows.shape[1]}")
        require_finite(rows, "more")
        count, dimensions = len(self) + len(rows), self.shape[1]
        require_memory(
            4 * dimensions * (count + len(self)) + self.nbytes // len(self) * count,
            f"a memory bank of {count} rows of {dimensions} channels, while it is built,",
            "reduce the rows with greedy_coreset first",
        )
        return MemoryBank(np.concatenate([self.features, rows]), **self._options())

    def merge(self, other: MemoryBank) -> MemoryBank:
        """Return a new bank of this bank's rows, then those of `other`; both stay as they are.

        Raises:
            TypeError: `other` is no `MemoryBank`.
            ValueError: its rows have another width or storage, or a bank has groups.
            MemoryError: the new bank would not fit into the memory there is.
        """
        if not isinstance(other, MemoryBank):
            raise TypeError(f"other must be a MemoryBank; got {type(other).__name__}. Rows go into with_rows")
        other._require_no_groups("other")
        if other.shape[1] != self.shape[1]:
            raise ValueError(f"other must have the {self.shape[1]} channels of this bank; got {other.shape[1]}")
        if other._dtype != self._dtype:
            raise ValueError(
                f"other must store its rows as {self._dtype}, as this bank does; got {other._dtype}. Rows of any dtype "
                "go into with_rows"
            )
        return self.with_rows(other.features)

    def _options(self) -> dict[str, Any]:
        return {"dtype": self._dtype, "strict": self._strict, "threads": self._threads}

    def _require_no_groups(self, name: str) -> None:
        """ValueError where the rows are those of groups: which group others belong to is not known."""
        if self._groups is not None:
            raise ValueError(
                f"{name} must have no groups to be joined with other rows; got {len(self._groups)}. Build a new bank: "
                "MemoryBank(all rows, groups=all counts)"
            )

    def kneighbors(
        self,
        queries: ArrayLike,
        k: int = 1,
        *,
        groups: ArrayLike | None = None,
        squared: bool = False,
        exclude_self: bool = False,
        threads: int | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the `k` nearest rows of each query, exactly.

        Rows are ordered by squared distance, summed over differences in float64 in one fixed order,
        then by index. The answer has the same bits for any number of threads, any split of the queries
        and any SIMD level.

        Args:
            queries: (n, d) floating-point rows; n may be 0.
            k: number of neighbours, 1 <= k <= N, or the number of rows of `groups`.
            groups: only rows of these groups are found: distinct numbers from 0 to G - 1, in any order. None for all
                rows.
            squared: return squared distances: float64 rounded once, which the square of a rounded root is not.
            exclude_self: query i does not find row i, only that one: for as many queries as there are rows, which
                are usually the rows themselves; then k <= N - 1. Not together with `groups`.
            threads: overrides the bank's own number.

        Returns:
            distances: (n, k) float32, ascending; Euclidean, or squared, which may be infinite beyond 3.4e38.
            indices: (n, k) int64 rows of the bank; among equal distances the lowest come first.

        Raises:
            TypeError: `queries` holds no floats, `k` is no integer, or `groups` are no integers.
            ValueError: the widths differ, `k` exceeds the rows, a value is not finite, `exclude_self` meets another
                number of queries than rows, or `groups` are empty, not distinct or not there.
        """
        rows = feature_matrix(queries, "queries", strict=self._strict)
        threads = self._threads if threads is None else thread_count(threads)
        k, squared = integer(k, "k", minimum=1), flags(squared, "squared")
        among = self._among(groups)
        if not flags(exclude_self, "exclude_self"):
            return self._native.kneighbors(rows, k, threads, squared=squared, groups=among)
        self._require_one_query_a_row(rows, among)
        if k >= len(self):
            raise ValueError(f"k must be at most {len(self) - 1}, the other rows of the memory bank; got {k}")
        distances, indices = self._native.kneighbors(rows, k + 1, threads, squared=squared)
        own = indices == np.arange(len(self))[:, None]
        own[~own.any(axis=1), k] = True  # not among the nearest: then the last is one too many
        return distances[~own].reshape(-1, k), indices[~own].reshape(-1, k)

    def radius_neighbors(
        self,
        queries: ArrayLike,
        radius: SupportsFloat,
        *,
        groups: ArrayLike | None = None,
        squared: bool = False,
        exclude_self: bool = False,
        threads: int | None = None,
    ) -> tuple[list[NDArray[np.float32]], list[NDArray[np.int64]]]:
        """Find all rows within `radius` of each query, exactly.

        A row at exactly `radius` lies within. That is decided in float64, before distances are rounded, so a returned
        one may exceed `radius` by its rounding. Order and bits are those of `kneighbors`.

        Args:
            queries: (n, d) floating-point rows; n may be 0.
            radius: the largest distance of interest, >= 0; Euclidean, or a squared one where `squared`.
            groups: as for `kneighbors`.
            squared: `radius` and the returned distances are squared ones.
            exclude_self: as for `kneighbors`.
            threads: overrides the bank's own number.

        Returns:
            distances: n arrays of float32, ascending; (m,) for a query that has m rows within.
            indices: n arrays of int64, the rows of the bank.

        Raises:
            TypeError: `queries` holds no floats, `radius` is no number, or `groups` are no integers.
            ValueError: the widths differ, `radius` is negative or NaN, a value is not finite, `exclude_self` meets
                another number of queries than rows, or `groups` are empty, not distinct or not there.
            MemoryError: the answer does not fit into the memory there is.
        """
        rows = feature_matrix(queries, "queries", strict=self._strict)
        threads = self._threads if threads is None else thread_count(threads)
        reach, among = non_negative(radius, "radius"), self._among(groups)
        if flags(exclude_self, "exclude_self"):
            self._require_one_query_a_row(rows, among)
        counts, distances, indices = self._native.radius_neighbors(
            rows, reach, threads, squared=flags(squared, "squared"), groups=among
        )
        if exclude_self:
            query = np.repeat(np.arange(len(self)), counts)
            others = indices != query
            distances, indices = distances[others], indices[others]
            counts = np.bincount(query[others], minlength=len(self))
        ends = np.cumsum(counts)
        return np.split(distances, ends)[:-1], np.split(indices, ends)[:-1]

    def _among(self, groups: ArrayLike | None) -> NDArray[np.uintp] | None:
        """The numbers of groups, checked as far as that needs no bank; ValueError where this one has none."""
        if groups is None:
            return None
        if self._groups is None:
            raise ValueError(
                "groups must be None, since this memory bank has none: build it with MemoryBank(features, groups=...)"
            )
        return _unsigned(groups, "groups")

    def _require_one_query_a_row(self, queries: NDArray[np.float32], groups: NDArray[np.uintp] | None) -> None:
        """ValueError for another number of queries than rows, or for rows of some groups only."""
        if groups is not None:
            raise ValueError("exclude_self must be False where groups are given; got True. Leave groups out instead")
        if len(queries) != len(self):
            raise ValueError(
                f"queries must be {len(self)}, one for each row of the memory bank, where exclude_self=True; "
                f"got {len(queries)}"
            )

    def image_scores(
        self,
        features: ArrayLike,
        distances: ArrayLike,
        indices: ArrayLike,
        *,
        patches: int,
        reweight: int | None,
    ) -> NDArray[np.float64]:
        """Turn patch distances into image scores: Eq. 6, or Eq. 7 over `reweight` neighbours.

        Args:
            features: (n * patches, d) floating-point patch features of n images, image after image.
            distances: distances of the patches to their nearest rows, (n * patches,), or (n * patches, 1) as
                `kneighbors(features)` gives them.
            indices: those rows, in the same shapes.
            patches: patches of an image.
            reweight: b of Eq. 7, the nearest row itself counted; lowered to the size of the bank. None
                or 1 is Eq. 6: the largest patch distance.

        Returns:
            (n,) float64, higher is more anomalous.

        Raises:
            TypeError: `features` or `distances` hold no floats, `indices` no integers, or `patches` or
                `reweight` is no integer.
            ValueError: the widths or lengths differ, `patches` does not divide them, an index is no row of the bank,
                a distance is NaN or a feature not finite.
        """
        rows = feature_matrix(features, "features", strict=self._strict)
        nearest = _one_column(distances, "distances", np.float32, "f", "floating-point values")
        found = _one_column(indices, "indices", np.int64, "iu", "integers")
        patches = integer(patches, "patches", minimum=1)
        b = 1 if reweight is None else min(integer(reweight, "reweight", minimum=1), len(self))
        return self._native.image_scores(rows, nearest, found, patches, b, self._threads)


def _unsigned(value: ArrayLike, name: str) -> NDArray[np.uintp]:
    """Integers from 0 on, one for each of some groups; TypeError or ValueError for others."""
    array = as_array(value, name)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must hold integers; got dtype {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape (n,), one integer for each group; got {array.shape}")
    if array.size and array.min() < 0:
        raise ValueError(f"{name} must hold integers from 0 on; got {array.min()}")
    return array.astype(np.uintp)


def _one_column(value: ArrayLike, name: str, dtype: type[Any], kinds: str, holds: str) -> NDArray[Any]:
    """An (n,) or (n, 1) array as a contiguous one of n values of that dtype; TypeError or ValueError for another."""
    array = as_array(value, name)
    if array.dtype.kind not in kinds:
        raise TypeError(f"{name} must hold {holds}; got dtype {array.dtype}")
    if array.ndim != 1 and (array.ndim != 2 or array.shape[1] != 1):
        raise ValueError(f"{name} must have shape (n,) or (n, 1), one value for each patch; got {array.shape}")
    with np.errstate(all="ignore"):  # only the order of distances counts
        return np.require(array.reshape(-1), dtype, ["C", "A"])
