"""What is timed. Sizes are PatchCore's own: patches of an image against memory banks of one MVTec AD category.

EfficientNet-Lite0 gives 28 x 28 = 784 patches of 344 channels, and a SqueezeNet (27 x 27 patches, 768 channels) stands
for wider features. Every scenario has a small twin, which `--benchmark-disable` runs once as a test.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Source = Literal["generated", "images"]


@dataclass(frozen=True)
class Search:
    """Distances and indices of the k nearest of `rows` rows for each query."""

    rows: int
    width: int
    queries: int
    k: int = 1
    source: Source = "generated"

    @property
    def name(self) -> str:
        source = " of the demo's images" if self.source == "images" else ""
        return f"search {self.queries} in {self.rows} x {self.width}, k {self.k}{source}"

    def small(self) -> Search:
        return replace(self, rows=self.rows // 40, queries=min(self.queries, 40))


@dataclass(frozen=True)
class Coreset:
    """Greedy selection of `count` of `rows` rows. A rival whose picks all cost the same does a share of them."""

    rows: int
    width: int
    count: int
    rival_share: float = 1.0
    source: Source = "generated"

    @property
    def name(self) -> str:
        source = " of the demo's images" if self.source == "images" else ""
        return f"coreset {self.count} of {self.rows} x {self.width}{source}"

    def small(self) -> Coreset:
        return replace(self, rows=self.rows // 40, count=self.count // 40)


@dataclass(frozen=True)
class Aggregate:
    """Patch features of the maps of some images: (channels, side) of each layer; `embedding` None joins the layers."""

    network: str
    images: int
    layers: tuple[tuple[int, int], ...]
    embedding: int | None = None

    @property
    def name(self) -> str:
        kind = "joined" if self.embedding is None else f"pooled to {self.embedding}"
        return f"aggregate {self.network}, {self.images} images, {kind}"

    def small(self) -> Aggregate:
        return replace(self, images=1, layers=tuple((channels // 4, side // 2) for channels, side in self.layers))


@dataclass(frozen=True)
class Maps:
    """Anomaly maps and image scores of `images` grids of patch scores."""

    images: int
    grid: int
    size: int
    sigma: float = 4.0

    @property
    def name(self) -> str:
        return f"maps {self.images} x {self.grid}² to {self.size}², sigma {self.sigma:g}"

    def small(self) -> Maps:
        return replace(self, images=2, size=self.size // 4)


SEARCH = (
    Search(5_958, 344, 784, source="images"),
    Search(5_974, 344, 784),
    Search(16_000, 344, 784),
    Search(16_000, 768, 729),
    Search(16_000, 344, 784, k=9),
)
CORESET = (
    Coreset(16_000, 344, 1_600, rival_share=0.25),
    Coreset(59_584, 344, 5_958, rival_share=0.05, source="images"),
    Coreset(40_000, 768, 4_000, rival_share=0.05),
)
AGGREGATE = (
    Aggregate("EfficientNet-Lite0", 8, ((40, 28), (112, 14), (192, 7))),
    Aggregate("WideResNet50", 4, ((512, 28), (1024, 14))),
    Aggregate("WideResNet50", 4, ((512, 28), (1024, 14)), embedding=1024),
)
MAPS = (Maps(16, 28, 224), Maps(4, 56, 448))
