"""The inspection of images from their pixels to score and map, by stages."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter, sleep
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image

from benches import checks, record
from benches.images import spread
from benches.rivals.search import torch_matmul
from benches.rivals.stages import LAYOUTS
from benches.run import OURS, compare
from benches.timing import REST
from patchcore_rs import MemoryBank, _native, aggregate
from patchcore_rs.backbones.efficientnet_lite import EfficientNetLite, default_weights_path, rename_weights
from patchcore_rs.backbones.layers import HookedLayers
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.backbones.weights import load_weights
from patchcore_rs.demo import plain_torch
from patchcore_rs.features.extractor import FeatureExtractor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from benches.data import Array
    from benches.record import Table
    from benches.rivals.search import Found
    from benches.run import Run

_ROUNDING = 1e-4  # relative, between our inspection and torch's
_SIGMA = 4.0
_STAGES = ("prepare", "backbone", "aggregation", "search", "map")
_PASSES = 2  # over all images

T = TypeVar("T")


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
        features: Array = aggregate(maps, threads=self._threads)[0].numpy()
        return features

    def search(self, features: Array) -> Found:
        return self._bank.kneighbors(features)

    def draw(self, scores: Array) -> Array:
        return _native.anomaly_maps(scores, 224, 224, _SIGMA, "bilinear", "symmetric", self._threads)


class _Torch:
    """The same stages in plain torch, the network as its authors' code runs it."""

    def __init__(self, rows: Array, layout: torch.memory_format) -> None:
        network = EfficientNetLite().eval().requires_grad_(requires_grad=False)
        load_weights(network, default_weights_path("efficientnet_lite0"), rename=rename_weights)
        self._network = HookedLayers(network, ("blocks.4", "blocks.10", "blocks.14")).to(memory_format=layout)
        self._layout, self._nearest = layout, torch_matmul(rows, 1, 0)

    def prepare(self, image: NDArray[np.uint8]) -> Tensor:
        resized = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BILINEAR), np.float32)
        return torch.from_numpy(resized).permute(2, 0, 1).div(255).sub(0.5).div(0.5)[None]

    def backbone(self, batch: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            maps: list[Tensor] = self._network(batch.contiguous(memory_format=self._layout))
        return maps

    def aggregate(self, maps: list[Tensor]) -> Array:
        return plain_torch.aggregate(maps).contiguous().numpy()

    def search(self, features: Array) -> Found:
        return self._nearest(features)

    def draw(self, scores: Array) -> Array:
        return plain_torch.anomaly_maps(torch.from_numpy(scores), 224, 224, _SIGMA).numpy()


Contestant = _Ours | _Torch


@dataclass(frozen=True)
class _Inspection:
    """What a contestant finds in an image, and the milliseconds of each stage."""

    features: Array
    found: Found
    anomaly_map: Array
    times: dict[str, float]


def inspect(contestant: Contestant, image: NDArray[np.uint8]) -> _Inspection:
    """Patch features, neighbours and map of an image in memory, stage by stage."""
    sleep(REST)
    ends = [perf_counter()]

    def stage(value: T) -> T:
        ends.append(perf_counter())
        return value

    batch = stage(contestant.prepare(image))
    maps = stage(contestant.backbone(batch))
    features = stage(contestant.aggregate(maps))
    found = stage(contestant.search(features))
    drawn = stage(contestant.draw(found[0].reshape(1, 28, 28)))
    times = {name: 1e3 * (end - begin) for name, begin, end in zip(_STAGES, ends, ends[1:], strict=False)}
    return _Inspection(features, found, drawn, {**times, "whole": sum(times.values())})


def tables(run: Run) -> list[Table]:
    """The stages and the whole over all test images; plain torch, which is slow at any, inspects some of each kind."""
    rows, images = run.features.bank_of_everything(), run.features.test_images
    some = {id(image) for image in spread(images)}
    ours = _Ours(rows, run.threads)
    rivals: dict[str, Contestant] = {name: _Torch(rows, it) for name, it in LAYOUTS.items()}
    for contestant in (ours, *rivals.values()):
        inspect(contestant, images[0].pixels)  # to warm up
    times: list[dict[str, dict[str, float]]] = [{} for _ in images]  # of each image by contestant and stage
    checked = 0
    for turn in range(1 if run.features.quick else _PASSES):
        for image, best in zip(images, times, strict=True):
            pixels = image.pixels
            own = inspect(ours, pixels)
            inspections = {OURS: own}
            if id(image) in some:
                inspections |= {name: inspect(rival, pixels) for name, rival in rivals.items()}
            for name, each in inspections.items():
                before = best.get(name, each.times)
                best[name] = {stage: min(took, before[stage]) for stage, took in each.times.items()}
                if turn == 0:
                    checks.require(_same(each, own), f"score or map of {name} differs by more than rounding")
            if turn == 0:
                checked += checks.check_ours([own.found], [own.features], rows, 1, each=1)
    kinds = [image.kind for image in images]
    found = [
        {"stage": stage, **compare(kinds, [{name: took[stage] for name, took in each.items()} for each in times])}
        for stage in (*_STAGES, "whole")
    ]
    facts = {"data": run.features.name("lite0"), "rows": len(rows), "width": rows.shape[1], "checked": checked}
    return [record.table("inspect", found, **facts)]


def _same(one: _Inspection, other: _Inspection) -> bool:
    """Whether scores and maps are equal but for rounding."""
    scores = [float(each.found[0].max()) for each in (one, other)]
    close = np.allclose(one.anomaly_map, other.anomaly_map, rtol=_ROUNDING, atol=1e-3)
    return close and abs(scores[0] - scores[1]) <= _ROUNDING * scores[1]
