"""FAISS's flat index, `IndexFlatL2`, and its files. FAISS itself is not needed and never imported."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patchcore_rs._arrays import as_array, feature_matrix, require_finite
from patchcore_rs._checks import integer, number, thread_count
from patchcore_rs.memory_bank import MemoryBank
from patchcore_rs.model.file import ModelFileError, replace_file

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

METRIC_L2 = 1
_MISSING = np.float32(3.4028235e38)  # the distance of a neighbour that is not there; its index is -1

# The head of a file: kind, d, ntotal, two that are unused, whether it is trained, metric, number of values.
_HEAD = struct.Struct("<4siqqqBiQ")
_KIND = b"IxF2"
_UNUSED = 1 << 20
_OTHERS = {b"IxFI": "a flat index by inner product", b"IwPQ": "an IVFPQ index", b"IwFl": "an IVF index"}


# The rows of an index, replaced in one assignment so that threads may share it: a bank of the first ones, made when it
# is first searched, those that were added since, and all of them once more where a part was asked for.
_Held = tuple["MemoryBank | None", tuple["NDArray[np.float32]", ...], "NDArray[np.float32] | None"]


class IndexFlatL2:
    """Exact search by squared Euclidean distance, as FAISS's class of that name.

    Rows are float32; others are converted. Distances are sums in float64 that are rounded to float32 once, neighbours
    of equal distance come in the order of their indices. Rows and queries must be finite and at most 1e16 in magnitude.

    Args:
        d: channels of a row.
        threads: threads for a search; None for as many as this process may use.

    Attributes:
        d: channels of a row.
        ntotal: rows held.
        is_trained: always True.
        metric_type: always `METRIC_L2`.
    """

    is_trained = True
    metric_type = METRIC_L2

    def __init__(self, d: int, *, threads: int | None = None) -> None:
        self.d = integer(d, "d", minimum=1, below=2**31)
        self.ntotal = 0
        self._threads = thread_count(threads)
        self._held: _Held = (None, (), None)

    def train(self, x: ArrayLike) -> None:
        """Do nothing: a flat index needs no training."""

    def add(self, x: ArrayLike) -> None:
        """Add the rows `x`, (n, d); they are copied.

        Raises:
            ValueError: the shape is another, or a value is not finite or above 1e16 in magnitude.
        """
        rows = self._rows(x, "x")
        require_finite(rows, "x", self.ntotal)
        if len(rows):
            bank, added, _ = self._held
            self._held = bank, (*added, rows.copy()), None
            self.ntotal += len(rows)

    def reset(self) -> None:
        """Remove all rows."""
        self._held, self.ntotal = (None, (), None), 0

    def search(
        self,
        x: ArrayLike,
        k: int,
        *,
        params: None = None,  # noqa: ARG002 - FAISS's signature
        D: NDArray[np.float32] | None = None,
        I: NDArray[np.int64] | None = None,  # noqa: E741 - FAISS's name
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The `k` nearest rows of each of the queries `x`, (n, d), nearest first.

        Returns:
            Squared distances (n, k) float32 and indices (n, k) int64, in `D` and `I` where they are given; beyond the
            rows there are, 3.4028235e38 and -1.

        Raises:
            ValueError: the shape is another, `k` is below 1, or a value is not finite.
        """
        queries, k = self._rows(x, "x"), integer(k, "k", minimum=1)
        shape = (len(queries), k)
        distances = np.full(shape, _MISSING) if D is None else _output(D, "D", shape, np.float32)
        indices = np.full(shape, -1, np.int64) if I is None else _output(I, "I", shape, np.int64)
        found = min(k, self.ntotal)
        distances[:, found:], indices[:, found:] = _MISSING, -1
        if found:
            distances[:, :found], indices[:, :found] = self._built().kneighbors(
                queries, found, squared=True, threads=self._threads
            )
        return distances, indices

    def assign(self, x: ArrayLike, k: int, labels: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """The indices alone that `search` gives, in `labels` where they are given."""
        return self.search(x, k, I=labels)[1]

    def range_search(
        self,
        x: ArrayLike,
        thresh: float,
        *,
        params: None = None,  # noqa: ARG002 - FAISS's signature
    ) -> tuple[NDArray[np.uint64], NDArray[np.float32], NDArray[np.int64]]:
        """All rows whose squared distance, in float32, is below `thresh`, for each of the queries `x`, (n, d).

        Returns:
            Limits (n + 1,) uint64, squared distances float32 and indices int64: those of query i are at
            `limits[i]:limits[i + 1]`, by ascending index.

        Raises:
            ValueError: the shape is another, or a value is not finite.
        """
        queries = self._rows(x, "x")
        limit = np.float32(min(number(thresh, "thresh"), float(_MISSING)))
        distances: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(queries)
        indices: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(queries)
        if self.ntotal and limit > 0:  # the sphere that the core decides in float64 holds what is below in float32
            distances, indices = self._built().radius_neighbors(
                queries, float(limit), squared=True, threads=self._threads
            )
        for i, (near, rows) in enumerate(zip(distances, indices, strict=True)):
            order = np.argsort(rows)
            order = order[near[order] < limit]
            distances[i], indices[i] = near[order], rows[order]
        lengths = np.cumsum([0, *map(len, indices)], dtype=np.uint64)
        none = np.empty(0, np.float32), np.empty(0, np.int64)
        return lengths, np.concatenate([none[0], *distances]), np.concatenate([none[1], *indices])

    def reconstruct(self, key: int) -> NDArray[np.float32]:
        """A copy of the row `key`, (d,)."""
        row: NDArray[np.float32] = self.reconstruct_n(integer(key, "key", minimum=0, below=max(self.ntotal, 1)), 1)[0]
        return row

    def reconstruct_n(self, n0: int = 0, ni: int = -1) -> NDArray[np.float32]:
        """A copy of `ni` rows from row `n0` on, (ni, d); -1 for all that follow."""
        first = integer(n0, "n0", minimum=0, below=self.ntotal + 1)
        count = self.ntotal - first if ni == -1 else integer(ni, "ni", minimum=0, below=self.ntotal - first + 1)
        bank, added, rows = self._held
        if rows is None:
            rows = _joined(bank, added, self.d)
            if bank is not None and not added and count == self.ntotal:
                return rows  # the bank's own copy
            # Whoever asks for a part asks again.
            self._held = bank, added if bank is not None else (rows,), rows
        part: NDArray[np.float32] = rows[first : first + count].copy()
        return part

    def _built(self) -> MemoryBank:
        """The bank of all rows."""
        bank, added, rows = self._held
        if bank is None or added:
            bank = MemoryBank(_joined(bank, added, self.d), threads=self._threads)
            self._held = bank, (), rows
        return bank

    def _rows(self, value: ArrayLike, name: str) -> NDArray[np.float32]:
        array = as_array(value, name)
        rows = feature_matrix(array.astype(np.float32) if array.dtype.kind in "iub" else array, name)
        if rows.shape[1] != self.d:
            raise ValueError(f"{name} must have the {self.d} channels of the index; got {rows.shape[1]}")
        return rows


def _joined(bank: MemoryBank | None, added: tuple[NDArray[np.float32], ...], d: int) -> NDArray[np.float32]:
    """All rows as one array."""
    parts = [] if bank is None else [bank.features]
    parts += added
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, d), np.float32), *parts])


def _output(array: Any, name: str, shape: tuple[int, int], dtype: type[Any]) -> NDArray[Any]:
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} must be a {np.dtype(dtype)} array of shape {shape}; got {got}")
    return array


def write_index(index: IndexFlatL2, fname: str | os.PathLike[str]) -> None:
    """Write `index` to a file as FAISS does, whole or not at all.

    Raises:
        TypeError: `index` is no `IndexFlatL2`.
        OSError: the file cannot be written.
    """
    if not isinstance(index, IndexFlatL2):
        raise TypeError(f"index must be an IndexFlatL2; got {type(index).__name__}. Add its rows to one")
    head = _HEAD.pack(_KIND, index.d, index.ntotal, _UNUSED, _UNUSED, 1, METRIC_L2, index.ntotal * index.d)
    rows = index.reconstruct_n().astype("<f4", copy=False)
    replace_file(Path(os.path.realpath(fname)), head + rows.tobytes())


def read_index(fname: str | os.PathLike[str], *, threads: int | None = None) -> IndexFlatL2:
    """Read a flat index by Euclidean distance that FAISS or `write_index` wrote; every length is checked first.

    Raises:
        ModelFileError: the path and the reason: it holds another kind of index, or is damaged.
        OSError: it cannot be opened.
    """
    if not stat.S_ISREG(os.stat(fname).st_mode):
        raise ModelFileError(fname, "not a regular file; an index is what faiss.write_index writes")
    with open(fname, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_HEAD.size)
        if head[:4] != _KIND:
            kind = _OTHERS.get(head[:4], "no flat index by Euclidean distance")
            raise ModelFileError(fname, f"it is {kind}; read it with faiss, and add its rows to an IndexFlatL2")
        if len(head) < _HEAD.size:
            raise ModelFileError(fname, f"it ends within its head, after {len(head)} bytes; copy it again")
        _, d, ntotal, _, _, _, metric, values = _HEAD.unpack(head)
        if metric != METRIC_L2:
            raise ModelFileError(fname, f"its metric must be {METRIC_L2} (L2); got {metric}. Read it with faiss")
        if d < 1 or ntotal < 0 or values != d * ntotal or size != _HEAD.size + 4 * values:
            raise ModelFileError(
                fname, f"it claims {ntotal} rows of {d} channels, {values} values, in {size} bytes; copy it again"
            )
        rows = np.empty((ntotal, d), "<f4")
        if file.readinto(rows.reshape(-1).view(np.uint8).data) != 4 * values:
            raise ModelFileError(fname, "it ends early; copy it again")
    index = IndexFlatL2(d, threads=threads)
    try:
        index.add(rows)
    except ValueError as error:
        raise ModelFileError(fname, str(error)) from error
    return index
