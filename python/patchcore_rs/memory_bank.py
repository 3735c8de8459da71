"""The memory bank: patch features of good parts, and exact search among them. Needs numpy only."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from patchcore_rs import _native
from patchcore_rs.arguments import feature_matrix, integer, thread_count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


class MemoryBank:
    """An immutable set of feature rows that answers exact nearest-neighbour queries.

    The rows are copied, so later changes to ``features`` do not matter, and a bank may be used by any
    number of threads at once.

    Args:
        features: (N, d) floating-point rows, finite and at most 1e16 in magnitude, N >= 1.
        dtype: storage of the rows; "float32".
        strict: refuse features and queries of any other dtype than float32 instead of converting them.
        threads: threads for building and for queries; None for as many as this process may use.

    Raises:
        TypeError: ``features`` holds no floats, or is a tensor on a device.
        ValueError: ``features`` is empty, not 2-D, or holds a NaN, infinite or too large value, which
            is named by its position.
    """

    def __init__(
        self, features: ArrayLike, *, dtype: str = "float32", strict: bool = False, threads: int | None = None
    ) -> None:
        if dtype != "float32":
            raise ValueError(f'dtype must be "float32"; got {dtype!r}')
        self._threads = thread_count(threads)
        self._strict = strict
        self._native = _native.MemoryBank(feature_matrix(features, "features", strict=strict), self._threads)

    def __len__(self) -> int:
        return self._native.rows

    def __repr__(self) -> str:
        return f"MemoryBank({self._native.rows} rows x {self._native.dim} channels, {self.nbytes / 2**20:.1f} MiB)"

    def __reduce__(self) -> tuple[partial[MemoryBank], tuple[NDArray[np.float32]]]:
        return partial(MemoryBank, strict=self._strict, threads=self._threads), (self.features,)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and channels, (N, d)."""
        return self._native.rows, self._native.dim

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._native.nbytes

    @property
    def features(self) -> NDArray[np.float32]:
        """A copy of the rows, (N, d) float32."""
        return self._native.features()

    def kneighbors(
        self, queries: ArrayLike, k: int = 1, *, threads: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the ``k`` nearest rows of each query, exactly.

        Rows are ordered by squared distance, summed over differences in float64 in one fixed order,
        then by index. The answer has the same bits for any number of threads, any split of the queries
        and any SIMD level.

        Args:
            queries: (n, d) floating-point rows; n may be 0.
            k: number of neighbours, 1 <= k <= N.
            threads: overrides the bank's own number.

        Returns:
            distances: (n, k) float32, Euclidean (not squared), ascending.
            indices: (n, k) int64 rows of the bank; among equal distances the lowest come first.

        Raises:
            TypeError: ``queries`` holds no floats, or ``k`` is no integer.
            ValueError: the widths differ, ``k`` exceeds the bank, or a value is not finite.
        """
        rows = feature_matrix(queries, "queries", strict=self._strict)
        threads = self._threads if threads is None else thread_count(threads)
        return self._native.kneighbors(rows, integer(k, "k", minimum=1), threads)

    def image_scores(
        self,
        features: NDArray[Any],
        distances: NDArray[np.float32],
        indices: NDArray[np.int64],
        *,
        patches: int,
        reweight: int | None,
    ) -> NDArray[np.float64]:
        """Turn patch distances into image scores: Eq. 6, or Eq. 7 over ``reweight`` neighbours.

        Args:
            features: (n * patches, d) float32 patch features of n images, image after image.
            distances: (n * patches,) distances of the patches to their nearest rows.
            indices: (n * patches,) those rows.
            patches: patches of an image.
            reweight: b of Eq. 7, the nearest row itself counted; lowered to the size of the bank. None
                or 1 is Eq. 6: the largest patch distance.

        Returns:
            (n,) float64, higher is more anomalous.
        """
        b = 1 if reweight is None else min(integer(reweight, "reweight", minimum=1), len(self))
        return self._native.image_scores(features, distances, indices, patches, b, self._threads)
