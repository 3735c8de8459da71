"""Approximate search by FAISS: an inverted file with product quantisation (IVFPQ) over a memory bank.

FAISS finds candidates; their distances are then computed from the bank's own rows, so a distance returned is the exact
distance to the row it names, and only the choice of rows is approximate. It pays for banks of 100 000 rows and more
where memory traffic counts; below that the exact search is faster.
"""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from patchcore_rs._arrays import feature_matrix
from patchcore_rs._limits import openmp_lost, usable_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from patchcore_rs.memory_bank import MemoryBank

_SUBQUANTISERS = 64  # codes of 64 bytes a row, as patchcore-inspection has
_POINTS_PER_CENTROID = 39  # FAISS trains no centroid well on fewer
_CHUNK = 256  # queries whose candidates are gathered at once


class IVFPQ:
    """An IVFPQ index over `bank` with the bank's `kneighbors`; deterministic for a seed.

    The parameters follow the bank: about √rows lists, of which every eighth is searched, 64 sub-quantisers over the
    dimensions (padded with zeros to a multiple), and as many bits, 4 to 8, as the rows can train.
    """

    MINIMUM_ROWS = _POINTS_PER_CENTROID * 2**4

    def __init__(
        self, bank: MemoryBank, features: NDArray[np.float32], *, seed: int = 0, threads: int | None = None
    ) -> None:
        """Train on and add `features` (N, d) float32, the rows of `bank`, in so many `threads`; None for all there are.

        Raises:
            ImportError: faiss is not installed.
            ValueError: there are fewer than `MINIMUM_ROWS` rows.
        """
        try:
            import faiss
        except ImportError as error:
            raise ImportError('index="ivfpq" needs faiss: pip install patchcore-rs[faiss]') from error
        rows, dimensions = features.shape
        if rows < self.MINIMUM_ROWS:
            raise ValueError(f"the bank must have at least {self.MINIMUM_ROWS} rows to train IVFPQ; got {rows}")
        self._bank, self._features = bank, features
        trainable = rows // _POINTS_PER_CENTROID
        self.lists = min(math.isqrt(rows), trainable)
        self.bits = min(8, trainable.bit_length() - 1)
        self.subquantisers = min(_SUBQUANTISERS, dimensions)
        self._width = -(-dimensions // self.subquantisers) * self.subquantisers
        description = f"IVF{self.lists},PQ{self.subquantisers}x{self.bits}"
        self._index = cast("Any", faiss.index_factory(self._width, description))
        self._index.cp.seed = self._index.pq.cp.seed = seed % 2**31
        self._index.do_polysemous_training = False  # slow, and serves a search that is not used here
        self._index.nprobe = max(1, self.lists // 8)
        self._threads = threads
        padded = self._pad(features)
        with _faiss_threads(threads):
            self._index.train(padded)
            self._index.add(padded)

    def kneighbors(
        self, queries: NDArray[np.float32], k: int = 1, *, threads: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """As `MemoryBank.kneighbors`, over candidates."""
        threads = self._threads if threads is None else threads
        queries = feature_matrix(queries, "queries")
        if queries.shape[1] != self._features.shape[1] or not np.isfinite(queries).all():
            return self._bank.kneighbors(queries, k, threads=threads)  # which refuses them, naming the fault
        with _faiss_threads(threads):
            _, candidates = self._index.search(self._pad(queries), min(max(8, 4 * k), len(self._features)))
        distances = np.empty((len(queries), k), np.float32)
        indices = np.empty((len(queries), k), np.int64)
        for start in range(0, len(queries), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            # Ties go to the lowest index: order by index first, then stably by distance.
            found = np.sort(candidates[chunk], axis=1)
            difference = queries[chunk, None, :].astype(np.float64) - self._features[found]
            squared = np.einsum("qcd,qcd->qc", difference, difference)
            squared[found < 0] = np.inf
            order = np.argsort(squared, axis=1, kind="stable")[:, :k]
            indices[chunk] = np.take_along_axis(found, order, axis=1)
            distances[chunk] = np.sqrt(np.take_along_axis(squared, order, axis=1))
        # The searched lists of a query can hold fewer than k rows.
        short = np.flatnonzero(np.isinf(distances).any(axis=1))
        if len(short):
            distances[short], indices[short] = self._bank.kneighbors(queries[short], k, threads=threads)
        return distances, indices

    def _pad(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        missing = self._width - features.shape[1]
        return np.ascontiguousarray(np.pad(features, ((0, 0), (0, missing))) if missing else features)


@contextmanager
def _faiss_threads(threads: int | None) -> Iterator[None]:
    """FAISS with this many OpenMP threads, for calls of this thread only; with one where more would hang."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if openmp_lost() else usable_threads(threads))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def build_index(
    bank: MemoryBank, features: NDArray[np.float32], *, seed: int = 0, threads: int | None = None
) -> MemoryBank | IVFPQ:
    """An `IVFPQ` over the bank; the bank itself, with one warning, where it is too small to train one."""
    if len(features) < IVFPQ.MINIMUM_ROWS:
        warnings.warn(
            f'index="ivfpq" needs a memory bank of at least {IVFPQ.MINIMUM_ROWS} rows, this one has {len(features)}: '
            "searching exactly instead",
            stacklevel=3,
        )
        return bank
    return IVFPQ(bank, features, seed=seed, threads=threads)
