"""The stages around the search: aggregation, and the inspection of an image from its pixels to score and map."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from benches import checks, data, engines, goals, record
from benches.engines import OURS
from benches.rivals import matmul_search
from benches.scenarios import Aggregate
from patchcore_rs import MemoryBank, _native
from patchcore_rs.backbones.efficientnet_lite0 import EfficientNetLite0, default_weights_path, rename_weights
from patchcore_rs.backbones.layers import HookedLayers
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.backbones.weights import load_weights
from patchcore_rs.demo import plain_torch as reference
from patchcore_rs.features.aggregation import aggregate_tensors
from patchcore_rs.features.extractor import FeatureExtractor

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from benches.data import Array
    from benches.record import Table
    from benches.run import Run

_EXACT = 1e-6  # of the largest value, that features may be off
_ROUNDING = 1e-4  # relative, between our inspection and torch's
_SIGMA = 4.0
_LITE0 = ((40, 28), (112, 14), (192, 7))
_WIDE = ((512, 28), (1024, 14))

AGGREGATE = (
    *(Aggregate("EfficientNet-Lite0", images, _LITE0) for images in (1, 32)),
    *(Aggregate("WideResNet50", images, _WIDE, embedding=1024) for images in (1, 32)),
)


def aggregate_tables(run: Run) -> list[Table]:
    """Aggregation of one image and of 32, for both widths."""
    return [record.table("aggregate", [aggregate_row(run, scenario) for scenario in AGGREGATE])]


def aggregate_row(run: Run, scenario: Aggregate) -> dict[str, Any]:
    """Ours beside torch's forms, in both memory layouts."""
    images = min(scenario.images, 2) if run.features.quick else scenario.images
    maps = [data.normal((images, channels, side, side), seed) for seed, (channels, side) in enumerate(scenario.layers)]
    calls: dict[str, Callable[[], Array]] = {
        name: prepare(maps, scenario, run.threads) for name, prepare in engines.AGGREGATE.items()
    }
    if scenario.layers == _WIDE and scenario.embedding == 1024:
        calls["torch, closed form"] = engines.closed_form(maps, torch.contiguous_format)
        calls["torch, closed form, channels last"] = engines.closed_form(maps, torch.channels_last)
    first = [torch.from_numpy(layer[:1]).double() for layer in maps]
    expected = aggregate_tensors(first, 3, 1, scenario.embedding)[0].numpy()
    for name, call in calls.items():
        error = float(np.abs(call()[: len(expected)] - expected).max() / np.abs(expected).max())
        checks.require(error < _EXACT, f"features of {name} are off by {error:.2g}")
    times = run.times(calls)
    ours = times.pop(OURS)
    fastest = min(times, key=lambda name: times[name])
    return {
        "data": scenario.network,
        "images": images,
        "width": expected.shape[1],
        "pooled": scenario.embedding is not None,
        "ours_ms": ours,
        "fastest": fastest,
        "fastest_ms": times[fastest],
        **goals.judged(times[fastest] / ours, goals.AGGREGATE),
        "rivals_ms": times,
    }


# --- Inspection --------------------------------------------------------------------------------------------


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
        arrays = [layer_map.permute(0, 2, 3, 1).contiguous().numpy() for layer_map in maps]
        return _native.aggregate(arrays, 3, 1, None, self._threads)[0]

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
        return reference.aggregate(maps).contiguous().numpy()

    def search(self, features: Array) -> Array:
        return self._nearest(features)[0][:, 0]

    def draw(self, scores: Array) -> Array:
        return reference.anomaly_maps(torch.from_numpy(scores), 224, 224, _SIGMA).numpy()


Contestant = _Ours | _Torch


def inspect(contestant: Contestant, image: NDArray[np.uint8]) -> tuple[float, Array]:
    """Score and map of an image in memory."""
    features = contestant.aggregate(contestant.backbone(contestant.prepare(image)))
    scores = contestant.search(features)
    return float(scores.max()), contestant.draw(scores.reshape(1, 28, 28))


def inspect_tables(run: Run) -> list[Table]:
    """Every stage on its own, then the whole."""
    rows, image = run.features.bank_of_everything(), run.features.test_image()
    ours = _Ours(rows, run.threads)
    torches = {"torch": torch.contiguous_format, "torch, channels last": torch.channels_last}
    contestants: dict[str, Contestant] = {OURS: ours, **{name: _Torch(rows, it) for name, it in torches.items()}}

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
        times = run.times({name: partial(call, each) for name, each in contestants.items()})
        took = times.pop(OURS)
        fastest = min(times, key=lambda name: times[name])
        found.append(
            {
                "stage": stage,
                "ours_ms": took,
                "fastest": fastest,
                "fastest_ms": times[fastest],
                "ratio": times[fastest] / took,
                "rivals_ms": times,
            }
        )
    facts = {"data": run.features.name("lite0"), "rows": len(rows), "width": rows.shape[1]}
    return [record.table("inspect", found, **facts)]
