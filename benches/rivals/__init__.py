"""What others offer for the same task, each in the form that is fastest here.

Search rivals prepare untimed (norms, indices, rotations of the bank) and return the call that is timed: queries in,
distances and indices out. Coreset rivals are loops that cost the same at every pick; they are written from their
published descriptions.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from patchcore_rs.demo import plain_torch as reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from benches.data import Array

Indices = NDArray[np.int64]
Found = tuple[NDArray[np.float32], Indices]

# --- Search ------------------------------------------------------------------------------------------------

_ROWS = 16_384  # rows of a block of products: 784 queries make 49 MiB of them
_PANORAMA_ROWS = 16_000  # beyond, Panorama takes seconds
_PANORAMA_LEVELS = 8


def matmul_search(rows: Array, k: int) -> Callable[[NDArray[np.float32]], Found]:
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

    def search(queries: NDArray[np.float32]) -> Found:
        q = torch.from_numpy(queries)
        parts = [block(q, start) for start in range(0, len(bank), _ROWS)]
        values, indices = parts[0]
        if len(parts) > 1:
            values, indices = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
            indices = indices.gather(1, values.topk(k, largest=False).indices)
        distances = torch.linalg.vector_norm(q[:, None] - bank[indices], dim=2)
        return distances.numpy(), indices.numpy()

    return search


def torch_matmul(rows: Array, queries: Array, k: int, _threads: int) -> Callable[[], Found]:
    """`matmul_search` of these queries."""
    search = matmul_search(rows, k)
    return lambda: search(queries)


def torch_cdist(rows: Array, queries: Array, k: int, _threads: int) -> Callable[[], Found]:
    """The distance matrix and its smallest entries."""
    bank, q = torch.from_numpy(rows), torch.from_numpy(queries)

    def search() -> Found:
        distances = torch.cdist(q, bank)
        best = distances.topk(k, largest=False) if k > 1 else distances.min(dim=1, keepdim=True)
        return best[0].numpy(), best[1].numpy()

    return search


def faiss_flat(rows: Array, queries: Array, k: int, threads: int) -> Callable[[], Found]:
    """FAISS IndexFlatL2."""
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatL2(rows.shape[1])
    index.add(rows)

    def search() -> Found:
        distances, indices = index.search(queries, k)
        return np.sqrt(np.maximum(distances, 0)), indices

    return search


def faiss_panorama(rows: Array, queries: Array, k: int, threads: int) -> Callable[[], Found] | None:
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

    def search() -> Found:
        distances, indices = index.search(rotation.apply(queries), k)
        return np.sqrt(np.maximum(distances, 0)), indices

    return search


def scikit_learn(rows: Array, queries: Array, k: int, threads: int) -> Callable[[], Found]:
    """scikit-learn's brute force. Its threads are OpenMP's, which the environment of the process sets."""
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=threads).fit(rows)
    return lambda: index.kneighbors(queries)


def scikit_learn_intelex(rows: Array, queries: Array, k: int, threads: int) -> Callable[[], Found] | None:
    """The same by scikit-learn-intelex; None where it is not installed."""
    if importlib.util.find_spec("sklearnex") is None:
        return None
    from sklearnex.neighbors import NearestNeighbors  # type: ignore[import-not-found,unused-ignore]

    index = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=threads).fit(rows)
    return lambda: index.kneighbors(queries)


SEARCH: dict[str, Callable[[Array, Array, int, int], Callable[[], Found] | None]] = {
    "torch matmul": torch_matmul,
    "torch.cdist": torch_cdist,
    "FAISS flat": faiss_flat,
    "FAISS Panorama": faiss_panorama,
    "scikit-learn": scikit_learn,
    "scikit-learn-intelex": scikit_learn_intelex,
}


# --- Coreset -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """What a rival's selection takes: `before` the loop and for each of `picks` picks, in seconds."""

    before: float
    each: float
    picks: int
    width: int

    def seconds(self, count: int) -> float:
        """Of a selection of `count` rows; every pick costs the same."""
        return self.before + count * self.each


def _each(loop: Callable[[int], float], picks: int) -> float:
    """Seconds a pick in the faster half of the picks, after two to warm up."""
    loop(2)
    half = max(1, picks // 2)
    return min(loop(half), loop(half)) / half


def anomalib(features: Array, picks: int) -> Selection:
    """anomalib's KCenterGreedy: the loop in a sparse random projection to the Johnson-Lindenstrauss width at eps 0.9.

    Each pick computes the distance of every projected row to it, from differences, and the running minimum. Where the
    features are narrower than that width, the loop runs in their own.
    """
    from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim

    begin = perf_counter()
    values = torch.from_numpy(features)
    if int(johnson_lindenstrauss_min_dim(len(features), eps=0.9)) <= features.shape[1]:
        projection = SparseRandomProjection(eps=0.9, random_state=0).fit(features)
        components = torch.from_numpy(projection.components_.toarray().astype(np.float32))
        values = values @ components.T
    nearest = torch.full((len(values),), torch.inf)
    before = perf_counter() - begin
    pick = 0

    def loop(count: int) -> float:
        nonlocal pick
        begin = perf_counter()
        for _ in range(count):
            distances = torch.linalg.vector_norm(values - values[pick], dim=1)
            torch.minimum(nearest, distances, out=nearest)
            pick = int(nearest.argmax())
        return perf_counter() - begin

    return Selection(before, _each(loop, picks), picks, values.shape[1])


def approximate(
    features: Array, picks: int, *, streamlined: bool = False, width: int = 128, starts: int = 10
) -> Selection:
    """patchcore-inspection's approximate greedy sampler: a random linear map to 128 channels, ten starting rows.

    The mean distance to the starting rows stands for the distance to the chosen ones at first; each pick then costs one
    product of all rows with it, the root, and the running minimum. As shipped, the squared norms of all rows are
    computed for every pick and the minimum is taken of two joined columns; `streamlined` keeps norms and memory.
    """
    generator = torch.Generator().manual_seed(0)
    begin = perf_counter()
    values = torch.from_numpy(features)
    bound = values.shape[1] ** -0.5
    mapping = torch.empty(values.shape[1], width).uniform_(-bound, bound, generator=generator)
    values = values @ mapping
    norms = values.square().sum(dim=1)
    first = torch.randperm(len(values), generator=generator)[:starts]
    nearest = torch.cdist(values, values[first]).mean(dim=1)
    before = perf_counter() - begin

    def thrifty() -> None:
        pick = int(nearest.argmax())
        distances = torch.addmv(norms, values, values[pick], alpha=-2).add_(norms[pick]).clamp_(min=0).sqrt_()
        torch.minimum(nearest, distances, out=nearest)

    def shipped() -> None:
        nonlocal nearest
        pick = int(nearest.argmax())
        chosen = values[pick : pick + 1]
        squared = torch.bmm(values[:, None], values[:, :, None]).reshape(-1, 1)
        distances = (squared - 2 * (values @ chosen.T) + chosen @ chosen.T).clamp(0).sqrt()
        nearest = torch.cat([nearest[:, None], distances], dim=1).min(dim=1).values

    step = thrifty if streamlined else shipped

    def loop(count: int) -> float:
        begin = perf_counter()
        for _ in range(count):
            step()
        return perf_counter() - begin

    return Selection(before, _each(loop, picks), picks, width)


def naive(features: Array, picks: int) -> Selection:
    """The incremental minimum in float32 and the full dimension."""
    values = torch.from_numpy(features)
    reference.greedy_coreset(values, 2, 0)
    begin = perf_counter()
    reference.greedy_coreset(values, 1, 0)
    once = perf_counter() - begin  # its norms, mostly
    begin = perf_counter()
    reference.greedy_coreset(values, picks, 0)
    took = perf_counter() - begin
    return Selection(once, max(0.0, took - once) / max(1, picks - 1), picks, values.shape[1])


CORESET: dict[str, Callable[[Array, int], Selection]] = {
    "anomalib": anomalib,
    "patchcore-inspection": approximate,
    "patchcore-inspection, streamlined": partial(approximate, streamlined=True),
    "naive": naive,
}
