"""PaDiM: a Gaussian at each position of the grid, and Mahalanobis distances to it.

The triangle of a covariance has d(d + 1)/2 values in float64: at 3 136 positions 127 MB for 100 channels, 3.8 GB for
550. It is summed up in place, becomes the Cholesky factor in place, and is saved as it stands; what is held besides
(images that wait to be added, one position's tiles) is a few percent of that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from patchcore_rs import _native
from patchcore_rs._limits import require_memory
from patchcore_rs._text import counted
from patchcore_rs.detector.base import Detector
from patchcore_rs.detector.method import learn_in_parts, sample_images
from patchcore_rs.model.description import Training
from patchcore_rs.model.settings import AUTO

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from typing import Literal

    import torch
    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_rs.backbones.backbone import Backbone
    from patchcore_rs.detector.method import Call
    from patchcore_rs.features.extractor import View
    from patchcore_rs.features.feature_set import FeatureSet
    from patchcore_rs.model.description import Description
    from patchcore_rs.model.settings import PaDiMSettings, Settings

    Auto = Literal["auto"]

# Images wait until so many can be added together: each time, all triangles pass through memory.
_WAITING = 64
_WAITING_SHARE = 20  # at most this part of the triangles
_WAITING_BYTES = 1 << 25  # or this much, where they are small


@dataclass(frozen=True, eq=False)
class PositionGaussians:
    """Mean and Cholesky factor of the covariance of each position, and how features are scored by them."""

    name: ClassVar[str] = "padim"
    view: ClassVar[View] = "raw"
    stage: ClassVar[str] = "model"

    settings: PaDiMSettings
    training: Training
    chosen: NDArray[np.uint8]  # (columns of a feature,): 1 for those that are used
    mean: NDArray[np.float64]  # (positions, d)
    factors: NDArray[np.float64]  # (positions, d(d + 1)/2): lower triangles, column after column
    grid: tuple[int, int]  # of the positions, row after row
    normal_scores: NDArray[np.float32] | None = None

    @classmethod
    def learner(cls, settings: Settings, call: Call, images: int | None) -> _Sums:
        """Adds images to the sums of each position."""
        return _Sums(cast("PaDiMSettings", settings), call, images)

    @classmethod
    def fit(cls, features: FeatureSet, settings: Settings, call: Call) -> PositionGaussians:
        """Learn from features in memory."""
        return cast("PositionGaussians", learn_in_parts(cls.learner(settings, call, len(features)), features))

    @classmethod
    def load(cls, arrays: Mapping[str, NDArray[Any]], description: Description, threads: int | None) -> Self:  # noqa: ARG003 - nothing is built anew
        """The Gaussians of a model file."""
        settings = cast("PaDiMSettings", description.settings)
        height, width = arrays["grid"].tolist()
        return cls(
            settings, description.training, arrays["channels"], arrays["mean"], arrays["factors"], (height, width)
        )

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a model file holds."""
        grid = np.array(self.grid, np.int64)
        return {"channels": self.chosen, "mean": self.mean, "factors": self.factors, "grid": grid}

    @property
    def summary(self) -> str:
        """Its positions and channels."""
        positions, channels = self.mean.shape
        return f"{counted(positions, 'Gaussian')} of {channels:,} of {len(self.chosen):,} channels"

    def score(
        self, features: NDArray[np.float32], grid: tuple[int, int], threads: int | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """The largest distance of an image, and the distance of each of its positions."""
        columns = len(self.chosen)
        if features.shape[1] != columns or grid != self.grid:
            raise ValueError(
                f"features must be of {columns} channels on a grid of {self.grid[0]} x {self.grid[1]}, as the detector "
                f"was fitted on; got {features.shape[1]} on {grid[0]} x {grid[1]}"
            )
        distances = _native.mahalanobis(_columns(features, self.chosen), self.mean, self.factors, threads)
        if not np.isfinite(distances).all():  # no fit gives such factors
            raise ValueError("the Gaussians of this model give distances that are not finite; fit it again")
        return distances.max(axis=1), distances.astype(np.float32).reshape(-1, *grid)


class _Sums:
    """Sums of the images and of their products at each position; see `Learner`.

    Differences from the first image are summed, so that little cancels.
    """

    def __init__(self, settings: PaDiMSettings, call: Call, images: int | None) -> None:
        self._settings, self._call, self._expected = settings, call, images
        self._images, self._waiting = 0, 0
        self._kept: list[NDArray[np.float32]] = []

    def append(self, features: NDArray[np.float32], images: int, layer_widths: tuple[int, ...] | None) -> None:  # noqa: ARG002 - layers are one here
        positions = len(features) // images
        if self._images == 0:
            self._begin(positions, features.shape[1])
            self._shift = _columns(features[:positions], self._chosen).copy()
        rows = _columns(features, self._chosen).reshape(images, positions, -1)
        for image in rows:
            if self._images in self._sampled:
                self._kept.append(image.copy())
            self._buffer[self._waiting] = image
            self._images, self._waiting = self._images + 1, self._waiting + 1
            if self._waiting == len(self._buffer):
                self._add()

    def finish(self, grid: tuple[int, int]) -> PositionGaussians:
        self._add()
        del self._buffer
        images, progress = self._images, self._call.progress
        report = None if progress is None else (lambda done, total: progress(PositionGaussians.stage, done, total))
        # One image has no covariance: epsilon alone is left.
        scale = 1 / (images - 1) if images > 1 else 0.0
        mean, factors, threads = self._sums, self._packed, self._call.threads
        _native.factorize_gaussians(self._shift, mean, factors, images, scale, self._settings.epsilon, threads, report)
        if progress is not None:
            progress(PositionGaussians.stage, len(mean), len(mean))
        normal_scores = None
        if self._kept and images > 2:
            distances = _native.mahalanobis(np.concatenate(self._kept), mean, factors, threads)
            normal_scores = _left_out(distances, images).astype(np.float32).reshape(-1, *grid)
        return PositionGaussians(
            replace(self._settings, channels=mean.shape[1]),
            Training(images, images * len(mean), None),
            self._chosen,
            mean,
            factors,
            grid,
            normal_scores,
        )

    def _begin(self, positions: int, columns: int) -> None:
        """Choose channels, and allocate."""
        channels = _count(self._settings.channels, columns)
        self._chosen = np.zeros(columns, np.uint8)
        generator = np.random.Generator(np.random.PCG64(self._settings.seed))
        self._chosen[generator.permutation(columns)[:channels]] = 1
        triangles = 8 * positions * channels * (channels + 1) // 2
        image = 4 * positions * channels
        room = max(triangles // _WAITING_SHARE, _WAITING_BYTES) // image
        waiting = max(1, min(_WAITING, self._expected or _WAITING, room))
        self._sampled = set() if self._expected is None else set(sample_images(self._expected, positions).tolist())
        require_memory(
            triangles + image * (3 + waiting + len(self._sampled)),
            f"fitting {counted(positions, 'Gaussian')} of {channels} channels",
            "use fewer channels= or smaller images (crop=, resize=)",
        )
        self._sums = np.zeros((positions, channels))
        self._packed = np.zeros((positions, channels * (channels + 1) // 2))
        self._buffer = np.empty((waiting, positions, channels), np.float32)

    def _add(self) -> None:
        """Add the images that wait."""
        waiting = self._buffer[: self._waiting].reshape(-1, self._buffer.shape[2])
        _native.accumulate_gaussians(waiting, self._shift, self._sums, self._packed, self._call.threads)
        self._waiting = 0


def _count(channels: int | str, columns: int) -> int:
    """How many of the `columns` are used."""
    if channels == AUTO:
        channels = 550 if columns >= 1000 else 100
    return columns if isinstance(channels, str) else min(channels, columns)


def _columns(features: NDArray[np.float32], chosen: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The chosen columns, C-contiguous."""
    if chosen.all():
        return np.ascontiguousarray(features)
    return np.take(features, np.flatnonzero(chosen), axis=1)


def _left_out(distances: NDArray[np.float64], images: int) -> NDArray[np.float64]:
    """Distances, of images learnt from, to the Gaussians of the other images.

    By the formula of Sherman and Morrison, exact but for epsilon, which counts (n - 1)/(n - 2) times here: without an
    image at distance D, D² becomes (n/(n - 1))² (n - 2)/(n - 1) D² / (1 - D² n/(n - 1)²).
    """
    n, squared = images, np.square(distances)
    rest = np.maximum(1 - squared * n / (n - 1) ** 2, np.finfo(np.float64).eps)
    left_out: NDArray[np.float64] = n / (n - 1) * np.sqrt((n - 2) / (n - 1) * squared / rest)
    return left_out


class PaDiM(Detector):
    """PaDiM ("PaDiM: a Patch Distribution Modeling Framework", Defard et al., ICPR 2021 workshops, arXiv 2011.08785).

    Each position of the first layer's grid has a Gaussian of the features there, layers joined and channels drawn at
    random. A patch scores its Mahalanobis distance, an image the largest of these, as the paper has it, so that neither
    upsampling nor `sigma` changes an image's score; anomalib takes the largest value of the smoothed map, which is
    `prediction.maps.max(axis=(1, 2))`. Parts must lie alike in all images.

    Every argument is stored as it is and checked in `fit`. "auto" takes what the backbone recommends, else what the
    profile says; an explicit value wins over both.

    Args:
        profile: whose arithmetic to follow where implementations of PatchCore differ, in images and maps.
        backbone: the network whose maps are used; as for `PatchCore`.
        layers: names of the layers whose maps are used; the first sets the grid of the patches. "auto": the last
            layers at strides 4, 8 and 16, "layer1", "layer2" and "layer3" of a ResNet.
        weights: a state dict in place of the ImageNet weights, which torchvision fetches once: its path. "default" for
            the ImageNet weights, None for random ones.
        resize: size that images are resized to, before the crop: an int for the shorter side, a pair (height, width),
            or None.
        crop: size of the centre that is kept: a side, a pair (height, width), or None.
        resampling: how 8-bit images are resized: "pil", or "tensor" as floating-point images are.
        mean: mean of each colour channel in [0, 1], for normalisation; or one for all.
        std: deviation of each colour channel, for normalisation; or one for all.
        white_level: sample of 16-bit images that is white; as for `PatchCore`.
        value_range: samples of 32-bit and floating-point images that are black and white: (low, high), or None.
        round_floats: round floating-point images in [0, 1] to 8 bits, so that they score as their files do; as for
            `PatchCore`.
        channels: channels of a feature that are used, drawn at random by `seed` (the first of numpy's `PCG64(seed)`
            permutation): a number, lowered to what there are, or "all". "auto": 550 where there are 1 000 or more, as
            of a WideResNet50, else 100.
        epsilon: what is added to the variance of each channel; > 0 unless there are more images than channels.
        upsampling: how patch scores become a map of the image's size: "bilinear" or "nearest".
        border: how the map goes on beyond its border when it is smoothed: "symmetric" or "reflect" (numpy's terms).
        sigma: deviation in pixels of the Gaussian that smooths the map, 0 for none.
        normalize: scores and maps on anomalib's scale: the threshold is 0.5, and scores of normal images span 1; needs
            `calibrate`.
        clip: clip normalised scores and maps to [0, 1]; what is clipped ties.
        device: where the backbone runs, "auto" for CUDA where there is one.
        autocast: half precision of the backbone on CUDA.
        batch_size: images that are worked on together.
        threads: threads for reading, the backbone and the kernels; None for as many as this process may use.
        seed: seed of whatever is drawn at random: the channels; 0 <= seed < 2**64.

    Attributes (after `fit` or `load`; `NotFittedError` before):
        channels_: the columns of a raw feature that are used, (d,) int64, ascending.
        settings_, image_size_, training_, threshold_, calibration_, map_calibration_, skipped_, timings_: as of
            `PatchCore`; timings have the stage "model" in place of "coreset".
    """

    method: ClassVar[type[PositionGaussians]] = PositionGaussians
    strides: ClassVar[tuple[int, ...]] = (4, 8, 16)

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
        channels: int | str = AUTO,
        epsilon: float = 0.01,
        upsampling: str = AUTO,
        border: str = AUTO,
        sigma: float = 4.0,
        normalize: bool = False,
        clip: bool | Auto = AUTO,
        device: str | torch.device = "auto",
        autocast: bool = False,
        batch_size: int = 8,
        threads: int | None = None,
        seed: int = 0,
    ) -> None:
        """Store the arguments; `fit` checks them."""
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
        self.channels = channels
        self.epsilon = epsilon
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
    def channels_(self) -> NDArray[np.int64]:
        """The columns of a raw feature that are used, (d,) int64, ascending."""
        return np.flatnonzero(cast("PositionGaussians", self._require_fitted().learned).chosen)
