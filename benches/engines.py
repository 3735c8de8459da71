"""The contestants. Each prepares its input untimed, in the form it likes best, and returns the call that is timed.

`patchcore-rs` is this project on numpy arrays; `torch` is the same stage in plain torch, as a good torch user writes
it: the functions that the demo compares with, and faster variants where there are any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from benches import rivals
from benches.data import Array
from patchcore_rs import MemoryBank, _native, greedy_coreset
from patchcore_rs.demo import plain_torch as reference
from patchcore_rs.features.aggregation import aggregate_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from benches.scenarios import Aggregate, Maps

Indices = NDArray[np.int64]
OURS = "patchcore-rs"


# --- Search: (distances, indices), both (n, k) -------------------------------------------------------------

Found = tuple[Array, Indices]


def _search_ours(rows: Array, queries: Array, k: int, threads: int) -> Callable[[], Found]:
    bank = MemoryBank(rows, threads=threads)
    return lambda: bank.kneighbors(queries, k)


SEARCH: dict[str, Callable[[Array, Array, int, int], Callable[[], Found]]] = {
    OURS: _search_ours,
    "torch": rivals.torch_matmul,
    "torch.cdist": rivals.torch_cdist,
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


def closed_form(maps: list[Array], layout: torch.memory_format) -> Callable[[], Array]:
    """What pooling to 1024 comes to for layers of 512 and 1024 channels, without unfolding anything.

    512 channels of 9 taps pooled to 1024, then joined and pooled again, give each channel its nine taps at 1/10 and the
    centre once more; 1024 channels give the means of pairs.
    """
    first, second = (torch.from_numpy(m).contiguous(memory_format=layout) for m in maps)

    def aggregate() -> Array:
        fine = torch.add(0.1 * first, functional.avg_pool2d(first, 3, 1, 1), alpha=0.9)
        n, channels, height, width = second.shape
        pairs = second.view(n, channels // 2, 2, height, width).mean(dim=2)
        coarse = functional.interpolate(
            functional.avg_pool2d(pairs, 3, 1, 1), fine.shape[2:], mode="bilinear", align_corners=False
        )
        return torch.cat([fine, coarse], dim=1).permute(0, 2, 3, 1).flatten(0, 2).contiguous().numpy()

    return aggregate


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
