"""The method of PatchCore: a memory bank of chosen patches, and distances to it (sections 3.2 and 3.3 of the paper)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from patchcore_rs._limits import estimate_memory
from patchcore_rs.detector.ivfpq import IVFPQ, build_index
from patchcore_rs.detector.method import sample_images
from patchcore_rs.detector.selection import grow_rows, select_rows
from patchcore_rs.features.standardization import channel_statistics, standardize
from patchcore_rs.features.store import FeatureStore
from patchcore_rs.memory_bank import MemoryBank
from patchcore_rs.model.description import Training

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from patchcore_rs.detector.method import Call
    from patchcore_rs.features.extractor import View
    from patchcore_rs.features.feature_set import FeatureSet
    from patchcore_rs.model.description import Description
    from patchcore_rs.model.settings import PatchCoreSettings, Settings

# Rows among which one of another image is looked for. On magnetic tiles 1 patch in 1000 has none among 16, of a bank of
# a tenth of all patches, and none has of a bank of a hundredth.
_NEIGHBOURS = 16
# The share of all patches from which on a bank is thinned for that; distances then come out 5 % too large.
_DENSE = 0.25


@dataclass(frozen=True, eq=False)
class LearnedBank:
    """A memory bank, the index that searches it, and what its features were standardised by; see `Method`.

    `mean` and `deviation` are (d,), None where nothing is standardised. `normal_scores` are None for images of one
    patch, for a bank of one row, and once it is loaded or merged.
    """

    name: ClassVar[str] = "patchcore"
    view: ClassVar[View] = "aggregated"
    stage: ClassVar[str] = "coreset"

    settings: PatchCoreSettings
    training: Training
    bank: MemoryBank
    index: MemoryBank | IVFPQ
    mean: NDArray[np.float32] | None
    deviation: NDArray[np.float32] | None
    normal_scores: NDArray[np.float32] | None = None

    @classmethod
    def memory(cls, rows: int, dimensions: int, settings: PatchCoreSettings) -> int:
        """Bytes that a fit takes: the features, and the selection from them or the bank while it is copied."""
        share = 1.0 if settings.coreset is None else settings.coreset
        bank_rows = round(rows * share) if isinstance(share, float) else min(rows, share)
        return estimate_memory(rows, dimensions, bank_rows)

    @classmethod
    def learner(cls, settings: Settings, call: Call, images: int | None) -> _Gathering:
        """Keeps all patches, and chooses among them."""
        settings = cast("PatchCoreSettings", settings)
        return _Gathering(settings, call, images)

    @classmethod
    def fit(cls, features: FeatureSet, settings: Settings, call: Call) -> LearnedBank:
        """Choose the patches that become the memory bank."""
        return cls._choose(features.features, features.grid, cast("PatchCoreSettings", settings), call, consume=False)

    @classmethod
    def load(cls, arrays: Mapping[str, NDArray[Any]], description: Description, threads: int | None) -> LearnedBank:
        """The bank of a model file, with its index built anew."""
        bank = MemoryBank(arrays["bank"], threads=threads)
        settings = cast("PatchCoreSettings", description.settings)
        mean, deviation = arrays.get("mean"), arrays.get("deviation")
        return cls(settings, description.training, bank, _index(bank, settings, threads), mean, deviation)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The bank (N, d), and `mean` and `deviation` where it standardises."""
        arrays: dict[str, NDArray[Any]] = {"bank": self.bank.features}
        if self.mean is not None and self.deviation is not None:
            arrays |= {"mean": self.mean, "deviation": self.deviation}
        return arrays

    @property
    def summary(self) -> str:
        """Its rows and channels."""
        rows, channels = self.bank.shape
        return f"{rows:,} patches of {channels:,} channels"

    def standardize(self, features: NDArray[np.float32]) -> None:
        """Standardise (n, d) `features` in place as the training features were, where they were."""
        if self.mean is not None and self.deviation is not None:
            standardize(features, self.mean, self.deviation)

    def grow(
        self, features: NDArray[np.float32], added: Training, call: Call, grid: tuple[int, int] | None = None
    ) -> LearnedBank:
        """As this one, with a bank out of (n, d) `features`, standardised: its own bank's rows, then those `added`.

        `grid` is that of the added images, None where what is added is another bank.
        """
        known, held = self.training, len(self.bank)
        cover = None if known.cover is None or added.cover is None else max(known.cover, added.cover)
        patches = known.patches, added.patches
        selection = grow_rows(features, self.settings, call, held=held, patches=patches, cover=cover)
        images = None if known.images is None or added.images is None else known.images + added.images
        training = Training(images, sum(patches), selection.cover)
        rows = selection.of(features)
        grown = self._build(rows, self.settings, training, call, mean=self.mean, deviation=self.deviation)
        return grown if grid is None else grown._measured(features[held:], grid, rows, call)

    def check_mergeable(self, other: LearnedBank) -> None:
        """ValueError where features of the two are standardised differently."""
        for name, own, their in (("mean", self.mean, other.mean), ("deviation", self.deviation, other.deviation)):
            if own is not None and their is not None and not np.array_equal(own, their):
                raise ValueError(
                    f"other must have the same {name} of its standardised channels; got another. Models with "
                    "standardize=True can be merged if they went on by partial_fit from copies of one"
                )

    def score(
        self, features: NDArray[np.float32], grid: tuple[int, int], threads: int | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Image scores (n,) by Eq. 6 or Eq. 7, and patch scores (n, gh, gw): distances to the nearest bank row."""
        if self.mean is not None:
            features = features.copy()
            self.standardize(features)
        neighbours = self.index.kneighbors(features, 1, threads=threads)
        distances, indices = neighbours[0].ravel(), neighbours[1].ravel()
        patches = grid[0] * grid[1]
        reweight = self.settings.reweight
        scores = self.bank.image_scores(features, distances, indices, patches=patches, reweight=reweight)
        if self.settings.distance == "squared":
            scores, distances = np.square(scores), np.square(distances)
        return scores, distances.reshape(-1, *grid)

    def _measured(
        self, features: NDArray[np.float32], grid: tuple[int, int], rows: NDArray[np.float32], call: Call
    ) -> LearnedBank:
        """With `normal_scores` of some of the images of these (n * gh * gw, d) features; `rows` are the bank's.

        An image is scored by the rows of the others. A row at distance 0 of a patch is of its own image; where all of
        the nearest rows are, the farthest of them stands in.
        """
        patches = grid[0] * grid[1]
        if patches == 1 or len(rows) == 1:
            return self
        index, share = self.index, len(rows) / self.training.patches
        if share > _DENSE:
            # An image's own rows would be all that is near. Of every so many rows, fewer of its own are left.
            rows = rows[:: math.ceil(share * patches / (_NEIGHBOURS - 1))]
            index = MemoryBank(rows, threads=call.threads)
        measured = []
        for i in sample_images(len(features) // patches, patches):
            image = features[i * patches : (i + 1) * patches]
            near, found = index.kneighbors(image, min(_NEIGHBOURS, len(rows)), threads=call.threads)
            others = np.where(np.isin(found, found[near == 0]), np.inf, near).min(axis=1)
            measured.append(np.minimum(others, near[:, -1]).reshape(grid))
        scores: NDArray[np.float32] = np.stack(measured).astype(np.float32)
        return replace(self, normal_scores=np.square(scores) if self.settings.distance == "squared" else scores)

    @classmethod
    def _choose(
        cls,
        rows: NDArray[np.float32],
        grid: tuple[int, int],
        settings: PatchCoreSettings,
        call: Call,
        *,
        consume: bool,
    ) -> LearnedBank:
        """A bank of chosen ones of these rows, which may be overwritten where `consume`."""
        mean, deviation = None, None
        if settings.standardize:
            mean, deviation = channel_statistics(rows)
            rows = rows if consume else rows.copy()
            standardize(rows, mean, deviation)
        selection = select_rows(rows, settings, call)
        training = Training(len(rows) // (grid[0] * grid[1]), len(rows), selection.cover)
        chosen = selection.of(rows)
        learned = cls._build(chosen, settings, training, call, mean=mean, deviation=deviation)
        return learned._measured(rows, grid, chosen, call)

    @classmethod
    def _build(
        cls,
        rows: NDArray[np.float32],
        settings: PatchCoreSettings,
        training: Training,
        call: Call,
        *,
        mean: NDArray[np.float32] | None,
        deviation: NDArray[np.float32] | None,
    ) -> LearnedBank:
        """The bank of these rows, as the end of the stage "coreset". Warns where Eq. 7 asks for more rows."""
        bank = MemoryBank(rows, threads=call.threads)
        if call.progress is not None:
            call.progress("coreset", len(bank), len(bank))
        if settings.reweight is not None and settings.reweight > len(bank):
            warnings.warn(
                f"reweight={settings.reweight} exceeds the {len(bank)} rows of the memory bank; Eq. 7 takes "
                f"{len(bank)} neighbours instead",
                stacklevel=4,
            )
        return cls(settings, training, bank, _index(bank, settings, call.threads), mean, deviation)


class _Gathering:
    """All patches in one array until their choice; see `Learner`."""

    def __init__(self, settings: PatchCoreSettings, call: Call, images: int | None) -> None:
        self._settings, self._call = settings, call
        self._store = FeatureStore(images, lambda rows, width: LearnedBank.memory(rows, width, settings))

    def append(self, features: NDArray[np.float32], images: int, layer_widths: tuple[int, ...] | None) -> None:  # noqa: ARG002 - layers are one here
        self._store.append(features, images)

    def finish(self, grid: tuple[int, int]) -> LearnedBank:
        return LearnedBank._choose(self._store.finish(), grid, self._settings, self._call, consume=True)


def _index(bank: MemoryBank, settings: PatchCoreSettings, threads: int | None) -> MemoryBank | IVFPQ:
    """The search that the settings ask for."""
    if settings.index == "ivfpq":
        return build_index(bank, bank.features, seed=settings.seed, threads=threads)
    return bank
