"""What a fit learns, and how it scores: the parts of a fitted detector, put together and never changed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from patchcore_rs import _native
from patchcore_rs.detector.ivfpq import IVFPQ, build_index
from patchcore_rs.detector.selection import grow_rows
from patchcore_rs.features.extractor import FeatureExtractor
from patchcore_rs.features.standardization import standardize
from patchcore_rs.memory_bank import MemoryBank
from patchcore_rs.model.description import Description, Training

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from patchcore_rs.backbones.backbone import Backbone
    from patchcore_rs.features.reader import Progress
    from patchcore_rs.model.settings import Settings


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

    def standardize(self, features: NDArray[np.float32]) -> None:
        """Standardise (n, d) `features` in place, as the training features were, where they were."""
        if self.mean is not None and self.deviation is not None:
            standardize(features, self.mean, self.deviation)

    def grow(self, features: NDArray[np.float32], added: Training, progress: Progress | None) -> Fitted:
        """As this one, with a bank out of (n, d) `features`, standardised: its own bank's rows, then those `added`."""
        description, threads = self.description, self.extractor.threads
        known, held = description.training, len(self.bank)
        cover = None if known.cover is None or added.cover is None else max(known.cover, added.cover)
        patches = known.patches, added.patches
        selection = grow_rows(
            features, description.settings, threads, progress, held=held, patches=patches, cover=cover
        )
        bank = new_bank(selection.of(features), description.settings, threads, progress)
        images = None if known.images is None or added.images is None else known.images + added.images
        training = Training(images, sum(patches), selection.cover)
        description = replace(description, training=training, threshold=None, calibration=None)
        return self.build(description, self.extractor, bank, self.mean, self.deviation)

    def check_mergeable(self, other: Fitted) -> None:
        """ValueError naming the first choice in which `other` differs, of those that decide features and scores."""
        self.description.check_mergeable(other.description)
        for name, own, their in (("mean", self.mean, other.mean), ("deviation", self.deviation, other.deviation)):
            if own is not None and their is not None and not np.array_equal(own, their):
                raise ValueError(
                    f"other must have the same {name} of its standardised channels; got another. Models with "
                    "standardize=True can be merged if they went on by partial_fit from copies of one"
                )

    def score(
        self, features: NDArray[np.float32], grid: tuple[int, int]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Image scores (n,) and anomaly maps (n, H, W) of (n * gh * gw, d) features, which are consumed."""
        settings, threads = self.description.settings, self.extractor.threads
        self.standardize(features)
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


def new_bank(
    rows: NDArray[np.float32], settings: Settings, threads: int | None, progress: Progress | None
) -> MemoryBank:
    """The memory bank of these rows, as the end of the stage "coreset". Warns where Eq. 7 asks for more rows."""
    bank = MemoryBank(rows, threads=threads)
    if progress is not None:
        progress("coreset", len(bank), len(bank))
    if settings.reweight is not None and settings.reweight > len(bank):
        warnings.warn(
            f"reweight={settings.reweight} exceeds the {len(bank)} rows of the memory bank; Eq. 7 takes "
            f"{len(bank)} neighbours instead",
            stacklevel=3,
        )
    return bank


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
