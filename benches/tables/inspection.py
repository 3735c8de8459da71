"""The inspection of an image from its pixels to score and map, by stages."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from benches import checks, record
from benches.rivals.search import matmul_search
from benches.rivals.stages import LAYOUTS
from benches.run import OURS
from patchcore_rs import MemoryBank, _native
from patchcore_rs.backbones.efficientnet_lite0 import EfficientNetLite0, default_weights_path, rename_weights
from patchcore_rs.backbones.layers import HookedLayers
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.backbones.weights import load_weights
from patchcore_rs.demo import plain_torch
from patchcore_rs.features.aggregation import aggregate_maps
from patchcore_rs.features.extractor import FeatureExtractor

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from benches.data import Array
    from benches.record import Table
    from benches.run import Run

_ROUNDING = 1e-4  # relative, between our inspection and torch's
_SIGMA = 4.0


class _Ours:
    """The stages as the detector runs them."""

    def __init__(self, rows: Array, threads: int) -> None:
        backbone = load_backbone("efficientnet_lite0")
        self._extractor = FeatureExtractor(
            backbone, resize=backbone.resize, crop=backbone.crop, embedding="concat", threads=threads
        )
        self._bank, self._threads = MemoryBank(rows, threads=threads), threads

    def prepare(self, image: NDArray[np.uint8]) -> Tensor:
        return self._extractor.prepare(image)[None]

    def backbone(self, batch: Tensor) -> list[Tensor]:
        return self._extractor.backbone(batch)

    def aggregate(self, maps: list[Tensor]) -> Array:
        return aggregate_maps(maps, 3, 1, None, self._threads)[0]

    def search(self, features: Array) -> Array:
        return self._bank.kneighbors(features)[0][:, 0]

    def draw(self, scores: Array) -> Array:
        return _native.anomaly_maps(scores, 224, 224, _SIGMA, "bilinear", "symmetric", self._threads)


class _Torch:
    """The same stages in plain torch, the network as its authors' code runs it."""

    def __init__(self, rows: Array, layout: torch.memory_format) -> None:
        network = EfficientNetLite0().eval().requires_grad_(requires_grad=False)
        load_weights(network, default_weights_path(), rename=rename_weights)
        self._network = HookedLayers(network, ("blocks.4", "blocks.10", "blocks.14")).to(memory_format=layout)
        self._layout, self._nearest = layout, matmul_search(rows, 1)

    def prepare(self, image: NDArray[np.uint8]) -> Tensor:
        resized = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BILINEAR), np.float32)
        return torch.from_numpy(resized).permute(2, 0, 1).div(255).sub(0.5).div(0.5)[None]

    def backbone(self, batch: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            maps: list[Tensor] = self._network(batch.contiguous(memory_format=self._layout))
        return maps

    def aggregate(self, maps: list[Tensor]) -> Array:
        return plain_torch.aggregate(maps).contiguous().numpy()

    def search(self, features: Array) -> Array:
        return self._nearest(features)[0][:, 0]

    def draw(self, scores: Array) -> Array:
        return plain_torch.anomaly_maps(torch.from_numpy(scores), 224, 224, _SIGMA).numpy()


Contestant = _Ours | _Torch


def inspect(contestant: Contestant, image: NDArray[np.uint8]) -> tuple[float, Array]:
    """Score and map of an image in memory."""
    features = contestant.aggregate(contestant.backbone(contestant.prepare(image)))
    scores = contestant.search(features)
    return float(scores.max()), contestant.draw(scores.reshape(1, 28, 28))


def tables(run: Run) -> list[Table]:
    """Every stage on its own, then the whole."""
    rows, image = run.features.bank_of_everything(), run.features.test_image()
    ours = _Ours(rows, run.threads)
    contestants: dict[str, Contestant] = {OURS: ours, **{name: _Torch(rows, it) for name, it in LAYOUTS.items()}}

    score, anomaly_map = inspect(ours, image)
    for name, contestant in contestants.items():
        other, drawn = inspect(contestant, image)
        same = abs(other - score) <= _ROUNDING * score and np.allclose(drawn, anomaly_map, rtol=_ROUNDING, atol=1e-3)
        checks.require(same, f"score or map of {name} differs by more than rounding")

    batch = ours.prepare(image)
    features = ours.aggregate(ours.backbone(batch))
    scores = ours.search(features)
    checks.check_ours((scores[:, None], MemoryBank(rows).kneighbors(features)[1]), features, rows, 1, 4)
    stages: dict[str, Callable[[Contestant], object]] = {
        "prepare": lambda each: each.prepare(image),
        "backbone": lambda each: each.backbone(batch),
        "aggregation": lambda each: each.aggregate(maps[each]),
        "search": lambda each: each.search(features),
        "map": lambda each: each.draw(scores.reshape(1, 28, 28)),
        "whole": lambda each: inspect(each, image),
    }
    maps = {each: each.backbone(batch) for each in contestants.values()}
    found = []
    for stage, call in stages.items():
        race = run.race({name: partial(call, each) for name, each in contestants.items()})
        found.append({"stage": stage, **race})
    facts = {"data": run.features.name("lite0"), "rows": len(rows), "width": rows.shape[1]}
    return [record.table("inspect", found, **facts)]
