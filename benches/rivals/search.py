"""Search: each rival prepares untimed (norms, indices, rotations of the bank) and returns the search that is timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from benches.data import Array

Indices = NDArray[np.int64]
Found = tuple[Array, Indices]  # distances and indices, both (n, k)
Search = Callable[[Array], Found]  # of the queries

_ROWS = 16_384  # rows of a block of products: 784 queries make 49 MiB of them
_PANORAMA_ROWS = 16_000  # beyond, Panorama takes seconds
_PANORAMA_LEVELS = 8


def torch_matmul(rows: Array, k: int, _threads: int) -> Search:
    """Norms and matrix products in blocks of rows, the k smallest kept; their distances once more from differences."""
    bank = torch.from_numpy(rows)
    norms = bank.square().sum(dim=1)

    def block(queries: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = slice(start, start + _ROWS)
        products = torch.addmm(norms[part], queries, bank[part].T, alpha=-2)
        if k == 1:
            values, indices = products.min(dim=1, keepdim=True)
        else:
            values, indices = products.topk(min(k, products.shape[1]), largest=False)
        return values, indices + start

    def search(queries: Array) -> Found:
        q = torch.from_numpy(queries)
        parts = [block(q, start) for start in range(0, len(bank), _ROWS)]
        values, indices = parts[0]
        if len(parts) > 1:
            values, indices = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
            indices = indices.gather(1, values.topk(k, largest=False).indices)
        distances = torch.linalg.vector_norm(q[:, None] - bank[indices], dim=2)
        return distances.numpy(), indices.numpy()

    return search


def torch_cdist(rows: Array, k: int, _threads: int) -> Search:
    """The distance matrix and its smallest entries."""
    bank = torch.from_numpy(rows)

    def search(queries: Array) -> Found:
        distances = torch.cdist(torch.from_numpy(queries), bank)
        best = distances.topk(k, largest=False) if k > 1 else distances.min(dim=1, keepdim=True)
        return best[0].numpy(), best[1].numpy()

    return search


def faiss_flat(rows: Array, k: int, threads: int) -> Search:
    """FAISS IndexFlatL2."""
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatL2(rows.shape[1])
    index.add(rows)

    def search(queries: Array) -> Found:
        distances, indices = index.search(queries, k)
        return np.sqrt(np.maximum(distances, 0)), indices

    return search


def faiss_panorama(rows: Array, k: int, threads: int) -> Search | None:
    """FAISS IndexFlatL2Panorama after a full PCA; None where it takes too long, or FAISS does not have it."""
    import faiss

    width = rows.shape[1]
    if k > 1 or len(rows) > _PANORAMA_ROWS or len(rows) < 2 * width or not hasattr(faiss, "IndexFlatL2Panorama"):
        return None
    faiss.omp_set_num_threads(threads)
    rotation = faiss.PCAMatrix(width, width)
    rotation.train(rows)
    index = faiss.IndexFlatL2Panorama(width, _PANORAMA_LEVELS)
    index.add(rotation.apply(rows))

    def search(queries: Array) -> Found:
        distances, indices = index.search(rotation.apply(queries), k)
        return np.sqrt(np.maximum(distances, 0)), indices

    return search


def scikit_learn(rows: Array, k: int, threads: int) -> Search:
    """scikit-learn's brute force. Its threads are OpenMP's, which the environment of the process sets."""
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=threads).fit(rows)
    search: Search = index.kneighbors
    return search


def scikit_learn_intelex(rows: Array, k: int, threads: int) -> Search | None:
    """The same by scikit-learn-intelex; None where it is not installed."""
    if importlib.util.find_spec("sklearnex") is None:
        return None
    from sklearnex.neighbors import NearestNeighbors  # type: ignore[import-not-found,unused-ignore]

    index = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=threads).fit(rows)
    search: Search = index.kneighbors
    return search


Prepare = Callable[[Array, int, int], Search | None]  # of rows, k and threads

IN_TORCH: dict[str, Prepare] = {"torch matmul": torch_matmul, "torch.cdist": torch_cdist}
FLAT: dict[str, Prepare] = {"FAISS flat": faiss_flat}
ALL: dict[str, Prepare] = {
    **IN_TORCH,
    **FLAT,
    "FAISS Panorama": faiss_panorama,
    "scikit-learn": scikit_learn,
    "scikit-learn-intelex": scikit_learn_intelex,
}
DENSE = ALL.keys() - {"FAISS Panorama"}  # all products of all queries and rows: the values do not matter
