"""What a fit learns, and how it scores: the parts of a fitted detector, put together and never changed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from patchcore_rs import _native
from patchcore_rs.coreset import coreset_size, greedy_coreset
from patchcore_rs.features import FeatureExtractor
from patchcore_rs.ivfpq import IVFPQ, build_index
from patchcore_rs.settings import Settings, johnson_lindenstrauss_width
from patchcore_rs.standardization import standardize

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from patchcore_rs.backbones import Backbone
    from patchcore_rs.description import Description
    from patchcore_rs.memory_bank import MemoryBank
    from patchcore_rs.reading import Progress


@dataclass(frozen=True)
class Fitted:
    """A fitted detector; safe to share between threads."""

    description: Description
    extractor: FeatureExtractor
    bank: MemoryBank
    index: MemoryBank | IVFPQ
    mean: NDArray[np.float32] | None
    deviation: NDArray[np.float32] | None

    @classmethod
    def build(
        cls,
        description: Description,
        extractor: FeatureExtractor,
        bank: MemoryBank,
        mean: NDArray[np.float32] | None,
        deviation: NDArray[np.float32] | None,
    ) -> Fitted:
        """With the index that the settings ask for; `mean` and `deviation` (d,) where they ask to standardise."""
        settings = description.settings
        index: MemoryBank | IVFPQ = bank
        if settings.index == "ivfpq":
            index = build_index(bank, bank.features, seed=settings.seed, threads=extractor.threads)
        return cls(description, extractor, bank, index, mean, deviation)

    def score(
        self, features: NDArray[np.float32], grid: tuple[int, int]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Image scores (n,) and anomaly maps (n, H, W) of (n * gh * gw, d) features, which are consumed."""
        settings, threads = self.description.settings, self.extractor.threads
        if self.mean is not None and self.deviation is not None:
            standardize(features, self.mean, self.deviation)
        neighbours = self.index.kneighbors(features, 1, threads=threads)
        distances, indices = neighbours[0].ravel(), neighbours[1].ravel()
        patches = grid[0] * grid[1]
        scores = self.bank.image_scores(features, distances, indices, patches=patches, reweight=settings.reweight)
        if settings.distance == "squared":
            scores, distances = np.square(scores), np.square(distances)
        maps = _native.anomaly_maps(
            distances.reshape(-1, *grid),
            *self.description.image_size,
            settings.sigma,
            settings.upsampling,
            settings.border,
            threads,
        )
        return scores, maps


def build_extractor(
    backbone: Backbone, settings: Settings, device: str | torch.device, threads: int | None
) -> FeatureExtractor:
    """The way from an image to patch features that the settings describe."""
    return FeatureExtractor(
        backbone,
        resize=settings.resize,
        crop=settings.crop,
        embedding=settings.embedding,
        patch_size=settings.patch_size,
        device=device,
        autocast=settings.autocast,
        antialias_tensor=settings.resampling == "tensor",
        threads=threads,
        mean=settings.mean,
        std=settings.std,
    )


def select_rows(
    features: NDArray[np.float32], settings: Settings, threads: int | None, progress: Progress | None
) -> NDArray[np.int64] | None:
    """The rows of (n, d) features that become the memory bank, in the order they were picked; None for all."""
    if settings.coreset is None:
        return None
    rows, dimensions = features.shape
    if settings.coreset_method == "random":
        order = np.random.Generator(np.random.PCG64(settings.seed)).permutation(rows)
        return order[: coreset_size(settings.coreset, rows)].astype(np.int64)
    projection = settings.projection
    if projection == "johnson-lindenstrauss":
        projection = johnson_lindenstrauss_width(rows, dimensions)
    return greedy_coreset(
        features,
        settings.coreset,
        seed=settings.seed,
        start=settings.start,
        projection=projection,
        projection_kind=settings.projection_kind,
        threads=threads,
        progress=None if progress is None else partial(progress, "coreset"),
    )
