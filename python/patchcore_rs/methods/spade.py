"""SPADE: the training images most like an image, and how far its patches are from theirs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from patchcore_rs._text import counted
from patchcore_rs.detector.base import Detector
from patchcore_rs.detector.method import learn_in_parts, sample_images
from patchcore_rs.features.store import FeatureStore
from patchcore_rs.memory_bank import MemoryBank
from patchcore_rs.model.description import Training
from patchcore_rs.model.settings import AUTO

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from typing import Literal

    import torch
    from numpy.typing import NDArray

    from patchcore_rs.backbones.backbone import Backbone
    from patchcore_rs.detector.method import Call
    from patchcore_rs.features.extractor import View
    from patchcore_rs.features.feature_set import FeatureSet
    from patchcore_rs.model.description import Description
    from patchcore_rs.model.settings import Settings, SpadeSettings

    Auto = Literal["auto"]

# What a fit takes at its peak, in sizes of the patches: themselves, the bank's copy, and its codes while they are made.
_PEAK = 3.2


@dataclass(frozen=True, eq=False)
class LearnedGallery:
    """The patches of all training images, a group of the bank each, and the images' own features; see `Method`.

    `images` has a row for each training image. `widths` are the columns of a feature that are its patch's and its
    image's, one number where all are both. `normal_scores` are None for a single image, and once it is loaded.
    """

    name: ClassVar[str] = "spade"
    view: ClassVar[View] = "raw"
    stage: ClassVar[str] = "model"

    settings: SpadeSettings
    bank: MemoryBank
    images: MemoryBank
    widths: tuple[int, ...]
    normal_scores: NDArray[np.float32] | None = None

    @classmethod
    def learner(cls, settings: Settings, call: Call, images: int | None) -> _Gathering:
        """Keeps the patch columns of every image, and one row of its own."""
        return _Gathering(cast("SpadeSettings", settings), call, images)

    @classmethod
    def fit(cls, features: FeatureSet, settings: Settings, call: Call) -> LearnedGallery:
        """Learn from features in memory as from those of one batch after the other."""
        return cast("LearnedGallery", learn_in_parts(cls.learner(settings, call, len(features)), features))

    @classmethod
    def load(cls, arrays: Mapping[str, NDArray[Any]], description: Description, threads: int | None) -> LearnedGallery:
        """The banks of a model file."""
        settings, widths = cast("SpadeSettings", description.settings), tuple(arrays["widths"].tolist())
        return cls._build(arrays["bank"], arrays["images"], widths, settings, threads)

    @classmethod
    def _build(
        cls,
        rows: NDArray[np.float32],
        images: NDArray[np.float32],
        widths: tuple[int, ...],
        settings: SpadeSettings,
        threads: int | None,
    ) -> LearnedGallery:
        counts = np.full(len(images), len(rows) // len(images))
        bank = MemoryBank(rows, groups=counts, threads=threads)
        return cls(settings, bank, MemoryBank(images, threads=threads), widths)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The patches (N, d), image after image, the images (n, e), and where these stand in a feature."""
        widths = np.array(self.widths, np.int64)
        return {"bank": self.bank.features, "images": self.images.features, "widths": widths}

    @property
    def summary(self) -> str:
        """Its images, rows and channels."""
        rows, channels = self.bank.shape
        return f"{counted(len(self.images), 'image')} of {rows:,} patches of {channels:,} channels"

    @property
    def training(self) -> Training:
        """All images and patches are there."""
        return Training(len(self.images), len(self.bank), None)

    def score(
        self, features: NDArray[np.float32], grid: tuple[int, int], threads: int | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Image scores (n,), mean distances to the nearest images, and patch scores (n, gh, gw) by their patches."""
        patches = grid[0] * grid[1]
        count = len(features) // patches
        self._require_widths(features.shape[1])
        columns = features[:, : self.widths[0]]
        queries = image_features(features, count, self.images.shape[1])
        neighbours = min(self.settings.neighbours, len(self.images))
        distances, nearest = self.images.kneighbors(queries, neighbours, threads=threads)
        scores = np.empty((count, *grid), np.float32)
        for i, groups in enumerate(nearest):
            scores[i] = self._patch_scores(columns[i * patches : (i + 1) * patches], groups, threads).reshape(grid)
        return distances.mean(axis=1, dtype=np.float64), scores

    def _require_widths(self, columns: int) -> None:
        """ValueError for features of another number of columns than those that were learnt from."""
        if columns != sum(self.widths):
            own, *others = self.widths
            wanted = f"{own} columns{f' of patches and {others[0]} of images' if others else ''}"
            raise ValueError(f"features must have {wanted}, as those that the detector was fitted on; got {columns}")

    def _patch_scores(
        self, patches: NDArray[np.float32], groups: NDArray[np.int64], threads: int | None
    ) -> NDArray[np.float32]:
        """Mean distances (p,) of (p, d) patches to their nearest rows among those of some images."""
        rows = len(groups) * (len(self.bank) // len(self.images))
        kappa = min(self.settings.kappa, rows)
        distances = self.bank.kneighbors(patches, kappa, groups=groups, threads=threads)[0]
        means: NDArray[np.float32] = distances.mean(axis=1, dtype=np.float64).astype(np.float32)
        return means

    def _measured(self, rows: NDArray[np.float32], grid: tuple[int, int], threads: int | None) -> LearnedGallery:
        """With `normal_scores` by the other images; `rows` are the bank's."""
        count, patches = len(self.images), grid[0] * grid[1]
        if count == 1:
            return self
        sampled = sample_images(count, patches)
        neighbours = min(self.settings.neighbours, count - 1)
        _, nearest = self.images.kneighbors(self.images.features[sampled], neighbours + 1, threads=threads)
        scores = np.empty((len(sampled), *grid), np.float32)
        for i, (own, found) in enumerate(zip(sampled, nearest, strict=True)):
            others = found[found != own][:neighbours]
            image = rows[own * patches : (own + 1) * patches]
            scores[i] = self._patch_scores(image, others, threads).reshape(grid)
        return replace(self, normal_scores=scores)


class _Gathering:
    """Patch columns in one array, and one row an image; see `Learner`."""

    def __init__(self, settings: SpadeSettings, call: Call, images: int | None) -> None:
        self._settings, self._call = settings, call
        remedy = "fewer or shallower layers=: SPADE keeps all patches of all images"
        self._store = FeatureStore(images, lambda rows, width: round(4 * width * rows * _PEAK), remedy=remedy)
        self._images: list[NDArray[np.float32]] = []
        self._widths: tuple[int, ...] = ()

    def append(self, features: NDArray[np.float32], images: int, layer_widths: tuple[int, ...] | None) -> None:
        width = features.shape[1]
        last = width if layer_widths is None else layer_widths[-1]
        self._widths = (width - last, last) if last < width else (width,)
        self._store.append(features[:, : self._widths[0]], images)
        self._images.append(image_features(features, images, last))

    def finish(self, grid: tuple[int, int]) -> LearnedGallery:
        """The banks, and scores of some of the images by the others."""
        rows, images = self._store.finish(), np.concatenate(self._images)
        settings, threads = self._settings, self._call.threads
        nearest = min(settings.neighbours, len(images))
        compared = nearest * (len(rows) // len(images))
        for name, asked, there, what in (
            ("neighbours", settings.neighbours, nearest, "training images"),
            ("kappa", settings.kappa, compared, "patches of the nearest images"),
        ):
            if asked > there:
                warnings.warn(f"{name}={asked} exceeds the {there:,} {what}; SPADE takes {there} instead", stacklevel=4)
        learned = LearnedGallery._build(rows, images, self._widths, settings, threads)._measured(rows, grid, threads)
        if self._call.progress is not None:
            self._call.progress(LearnedGallery.stage, len(images), len(images))
        return learned


def image_features(features: NDArray[np.float32], images: int, columns: int) -> NDArray[np.float32]:
    """(n, columns): the mean of the last columns over the patches of each image."""
    last = features[:, features.shape[1] - columns :].reshape(images, -1, columns)
    # One image at a time: an image's sums must not depend on the others that it came with.
    means = [image.mean(axis=0, dtype=np.float64) for image in last]
    return np.array(means, np.float32).reshape(images, columns)


class SPADE(Detector):
    """SPADE ("Sub-Image Anomaly Detection with Deep Pyramid Correspondences", Cohen and Hoshen, arXiv 2005.02357).

    The last layer finds images: its mean over an image is compared with those of the training images, and the mean
    distance to the `neighbours` nearest of them is the image's score. The layers before it, joined on the grid of the
    first, tell patches: the score of one is its mean distance to the `kappa` nearest among all patches of those images,
    and map values are made of these. Distances are Euclidean, and both searches are exact. With one layer, or features
    of one's own that do not say where layers begin (`FeatureSet.layer_widths`), all columns serve for both.

    Every patch of every training image is kept: 4 bytes a column, and up to 0.6 of that for the search.

    Every argument is stored as it is and checked in `fit`. "auto" takes what the backbone recommends, else what the
    profile says; an explicit value wins over both.

    Args:
        profile: whose arithmetic to follow where implementations of PatchCore differ: "inspect", "paper", "amazon" or
            "anomalib"; here of the images, the backbone and the map. The paper's is "paper".
        backbone: the network whose maps are used: what `PatchCore` takes.
        layers: names of the layers whose maps are used; the first sets the grid of the patches. The last finds images.
            "auto" takes those at strides 4, 8, 16 and 32, "layer1" to "layer4" of a ResNet.
        weights: a state dict in place of the ImageNet weights, which torchvision fetches once: its path. "default" for
            the ImageNet weights, None for random ones.
        resize: size that images are resized to, before the crop: an int for the shorter side, a pair (height, width),
            or None.
        crop: size of the centre that is kept: a side, a pair (height, width), or None.
        resampling: how 8-bit images are resized: "pil", or "tensor" as floating-point images are.
        mean: mean of each colour channel in [0, 1], for normalisation; or one for all.
        std: deviation of each colour channel, for normalisation; or one for all.
        white_level: sample of 16-bit images that is white, as for `PatchCore`.
        value_range: samples of 32-bit and floating-point images that are black and white: (low, high). None refuses
            such files, and such arrays and tensors outside [0, 1].
        round_floats: round floating-point images in [0, 1] to 8 bits, so that they score as their files do; as for
            `PatchCore`.
        neighbours: training images that an image is compared with, the paper's K. Lowered to their number.
        kappa: patches of those images that a patch is compared with, the paper's κ. Lowered to their number.
        upsampling: how patch scores become a map of the image's size: "bilinear" or "nearest".
        border: how the map goes on beyond its border when it is smoothed: "symmetric" or "reflect" (numpy's terms).
        sigma: deviation in pixels of the Gaussian that smooths the map, 0 for none.
        normalize: scores and maps on anomalib's scale: the threshold is 0.5, and scores of normal images span 1; needs
            `calibrate`. Image scores and map values come from other layers, and may lie on other scales.
        clip: clip normalised scores and maps to [0, 1], as anomalib does; what is clipped ties, and `predict` warns of
            the number of such scores.
        device: where the backbone runs, "auto" for CUDA where there is one.
        autocast: half precision of the backbone on CUDA.
        batch_size: images that are worked on together.
        threads: threads for reading, the backbone and the kernels; None for as many as this process may use.
        seed: seed of whatever is drawn at random: nothing is, here.

    Attributes (after `fit` or `load`; `NotFittedError` before):
        memory_bank_: the `MemoryBank` of all patches, (N, d), a group for each training image.
        settings_: every choice with nothing left at "auto".
        image_size_: (height, width) of the images after resizing and cropping, and of the maps.
        training_: how many images and patches there are; see `Training`.
        threshold_: an image is anomalous where score >= threshold_; None before `calibrate`.
        calibration_: where the threshold comes from, or None.
        map_calibration_: the threshold of map values, where colours of maps begin, or None.
        skipped_: (name, reason) of training images left out by `on_error="skip"`.
        timings_: seconds of the stages "backbone" (reading included), "aggregation", "model" and "scoring", summed
            over `fit` and every call since.
    """

    method: ClassVar[type[LearnedGallery]] = LearnedGallery
    strides: ClassVar[tuple[int, ...]] = (4, 8, 16, 32)

    def __init__(
        self,
        *,
        profile: str = "inspect",
        backbone: str | torch.nn.Module | Callable[[torch.Tensor], Any] | Backbone = AUTO,
        layers: Sequence[str] | Auto = AUTO,
        weights: str | os.PathLike[str] | None = "default",
        resize: int | tuple[int, int] | Auto | None = AUTO,
        crop: int | tuple[int, int] | Auto | None = AUTO,
        resampling: str = AUTO,
        mean: float | tuple[float, float, float] | Auto = AUTO,
        std: float | tuple[float, float, float] | Auto = AUTO,
        white_level: int | Auto = 65535,
        value_range: tuple[float, float] | None = None,
        round_floats: bool | Auto = AUTO,
        neighbours: int = 50,
        kappa: int = 1,
        upsampling: str = AUTO,
        border: str = AUTO,
        sigma: float = 4.0,
        normalize: bool = False,
        clip: bool | Auto = AUTO,
        device: str | torch.device = AUTO,
        autocast: bool = False,
        batch_size: int = 8,
        threads: int | None = None,
        seed: int = 0,
    ) -> None:
        """Store the arguments; the class describes them."""
        self.profile = profile
        self.backbone = backbone
        self.layers = layers
        self.weights = weights
        self.resize = resize
        self.crop = crop
        self.resampling = resampling
        self.mean = mean
        self.std = std
        self.white_level = white_level
        self.value_range = value_range
        self.round_floats = round_floats
        self.neighbours = neighbours
        self.kappa = kappa
        self.upsampling = upsampling
        self.border = border
        self.sigma = sigma
        self.normalize = normalize
        self.clip = clip
        self.device = device
        self.autocast = autocast
        self.batch_size = batch_size
        self.threads = threads
        self.seed = seed

    @property
    def memory_bank_(self) -> MemoryBank:
        """The `MemoryBank` of all patches, (N, d), a group for each training image."""
        return cast("LearnedGallery", self._require_fitted().learned).bank
