"""The contestants. Each prepares its input untimed, in the form it likes best, and returns the call that is timed.

`patchcore-rs` is this project on numpy arrays; `torch` is the same stage in plain torch, as a good torch user writes
it: the functions that the demo compares with, and faster variants where there are any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from data import Array
from numpy.typing import NDArray

from patchcore_rs import MemoryBank, _native, greedy_coreset, reference
from patchcore_rs.features import aggregate_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from scenarios import Aggregate, Maps

Indices = NDArray[np.int64]
OURS = "patchcore-rs"


# --- Search: (distances, indices), both (n, k) -------------------------------------------------------------

Found = tuple[Array, Indices]


def _search_ours(rows: Array, queries: Array, k: int, threads: int) -> Callable[[], Found]:
    bank = MemoryBank(rows, threads=threads)
    return lambda: bank.kneighbors(queries, k)


def _search_matmul(rows: Array, queries: Array, k: int, _threads: int) -> Callable[[], Found]:
    """Norms and products in blocks, the k smallest, their distances once more from differences."""
    bank, q = torch.from_numpy(rows), torch.from_numpy(queries)
    if k == 1:

        def nearest() -> Found:
            distances, indices = reference.nearest(q, bank)
            return distances[:, None].numpy(), indices[:, None].numpy()

        return nearest
    norms = bank.square().sum(dim=1)
    block = max(1, (1 << 22) // len(bank))

    def several() -> Found:
        parts = [torch.addmm(norms, p, bank.T, alpha=-2).topk(k, largest=False).indices for p in torch.split(q, block)]
        indices = torch.cat(parts)
        distances = torch.linalg.vector_norm(q[:, None] - bank[indices], dim=2)
        return distances.numpy(), indices.numpy()

    return several


def _search_cdist(rows: Array, queries: Array, k: int, _threads: int) -> Callable[[], Found]:
    bank, q = torch.from_numpy(rows), torch.from_numpy(queries)

    def search() -> Found:
        distances = torch.cdist(q, bank)
        best = distances.topk(k, largest=False) if k > 1 else distances.min(dim=1, keepdim=True)
        return best[0].numpy(), best[1].numpy()

    return search


SEARCH: dict[str, Callable[[Array, Array, int, int], Callable[[], Found]]] = {
    OURS: _search_ours,
    "torch": _search_matmul,
    "torch.cdist": _search_cdist,
}


# --- Coreset: indices in pick order ------------------------------------------------------------------------


def _coreset_ours(features: Array, count: int, threads: int) -> Callable[[], Indices]:
    return lambda: greedy_coreset(features, count, start=0, threads=threads)


def _coreset_torch(features: Array, count: int, _threads: int) -> Callable[[], Indices]:
    tensor = torch.from_numpy(features)
    return lambda: reference.greedy_coreset(tensor, count, 0).numpy()


CORESET: dict[str, Callable[[Array, int, int], Callable[[], Indices]]] = {OURS: _coreset_ours, "torch": _coreset_torch}


# --- Aggregation: (n * h * w, d) features of (n, c, h, w) maps ---------------------------------------------


def _aggregate_ours(maps: list[Array], scenario: Aggregate, threads: int) -> Callable[[], Array]:
    # As the backbones of this project return them: channels last in memory.
    tensors = [torch.from_numpy(m).contiguous(memory_format=torch.channels_last) for m in maps]

    def aggregate() -> Array:
        arrays = [tensor.permute(0, 2, 3, 1).contiguous().numpy() for tensor in tensors]
        return _native.aggregate(arrays, 3, 1, scenario.embedding, threads)[0]

    return aggregate


def _aggregate_torch(layout: torch.memory_format) -> Callable[[list[Array], Aggregate, int], Callable[[], Array]]:
    def prepare(maps: list[Array], scenario: Aggregate, _threads: int) -> Callable[[], Array]:
        tensors = [torch.from_numpy(m).contiguous(memory_format=layout) for m in maps]

        def aggregate() -> Array:
            if scenario.embedding is None:
                return reference.aggregate(tensors).numpy()
            return aggregate_tensors(tensors, 3, 1, scenario.embedding)[0].numpy()

        return aggregate

    return prepare


AGGREGATE: dict[str, Callable[[list[Array], Aggregate, int], Callable[[], Array]]] = {
    OURS: _aggregate_ours,
    "torch": _aggregate_torch(torch.contiguous_format),
    "torch, channels last": _aggregate_torch(torch.channels_last),
}


# --- Maps and scores: (n, H, W) and (n,) -------------------------------------------------------------------

Scored = tuple[Array, Array]


def _maps_ours(scores: Array, scenario: Maps, threads: int) -> Callable[[], Scored]:
    def draw() -> Scored:
        size = scenario.size
        maps = _native.anomaly_maps(scores, size, size, scenario.sigma, "bilinear", "symmetric", threads)
        return maps, scores.max(axis=(1, 2))

    return draw


def _maps_torch(scores: Array, scenario: Maps, _threads: int) -> Callable[[], Scored]:
    tensor = torch.from_numpy(scores)

    def draw() -> Scored:
        maps = reference.anomaly_maps(tensor, scenario.size, scenario.size, scenario.sigma)
        return maps.numpy(), tensor.amax(dim=(1, 2)).numpy()

    return draw


MAPS: dict[str, Callable[[Array, Maps, int], Callable[[], Scored]]] = {OURS: _maps_ours, "torch": _maps_torch}
