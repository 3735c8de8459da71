"""Mahalanobis-AD: a Gaussian of each layer's globally pooled features, and the sum of the distances to them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from patchcore_rs import _native
from patchcore_rs._limits import require_memory
from patchcore_rs._text import counted
from patchcore_rs.detector.base import Detector
from patchcore_rs.detector.method import learn_in_parts
from patchcore_rs.model.description import Training
from patchcore_rs.model.settings import AUTO

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Literal

    import torch
    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_rs.backbones.backbone import Backbone
    from patchcore_rs.detector.method import Call
    from patchcore_rs.features.extractor import View
    from patchcore_rs.features.feature_set import FeatureSet
    from patchcore_rs.model.description import Description
    from patchcore_rs.model.settings import MahalanobisADSettings, Settings

    Auto = Literal["auto"]


@dataclass(frozen=True, eq=False)
class LayerGaussians:
    """Mean and Cholesky factor of the covariance of each layer, and how features are scored by them."""

    name: ClassVar[str] = "mahalanobis"
    view: ClassVar[View] = "pooled"
    stage: ClassVar[str] = "model"

    settings: MahalanobisADSettings
    training: Training
    widths: NDArray[np.int64]  # (layers,)
    mean: NDArray[np.float64]  # (columns,), layer after layer
    factors: NDArray[np.float64]  # a lower triangle of each layer, column after column
    normal_scores: NDArray[np.float32] | None = None

    @classmethod
    def learner(cls, settings: Settings, call: Call, images: int | None) -> _Rows:  # noqa: ARG003 - they grow
        """Keeps a row for each image."""
        return _Rows(cast("MahalanobisADSettings", settings), call)

    @classmethod
    def fit(cls, features: FeatureSet, settings: Settings, call: Call) -> LayerGaussians:
        """Learn from features in memory."""
        return cast("LayerGaussians", learn_in_parts(cls.learner(settings, call, len(features)), features))

    @classmethod
    def load(cls, arrays: Mapping[str, NDArray[Any]], description: Description, threads: int | None) -> Self:  # noqa: ARG003 - nothing is built anew
        """The Gaussians of a model file."""
        settings = cast("MahalanobisADSettings", description.settings)
        return cls(settings, description.training, arrays["widths"], arrays["mean"], arrays["factors"])

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a model file holds."""
        return {"widths": self.widths, "mean": self.mean, "factors": self.factors}

    @property
    def summary(self) -> str:
        """Its layers and their channels."""
        return f"{counted(len(self.widths), 'Gaussian')} of {', '.join(f'{width:,}' for width in self.widths)} channels"

    def score(
        self, features: NDArray[np.float32], grid: tuple[int, int], threads: int | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """The sum of the layers' distances, which is also the one value of an image's map."""
        columns = len(self.mean)
        if features.shape[1] != columns or grid != (1, 1):
            raise ValueError(
                f"features must be a row of {columns} channels for each image, of a grid of 1 x 1; got "
                f"{features.shape[1]} channels at {grid[0]} x {grid[1]}"
            )
        scores = np.zeros(len(features))
        for layer, triangle in _layers(self.widths):
            rows, mean, factor = (
                np.ascontiguousarray(features[:, layer]),
                self.mean[None, layer],
                self.factors[triangle],
            )
            scores += _native.mahalanobis(rows, mean, factor[None], threads)[:, 0]
        if not np.isfinite(scores).all():  # no fit gives such factors
            raise ValueError("the Gaussians of this model give distances that are not finite; fit it again")
        return scores, scores.astype(np.float32).reshape(-1, 1, 1)


class _Rows:
    """The rows of all images until their Gaussians are made; see `Learner`."""

    def __init__(self, settings: MahalanobisADSettings, call: Call) -> None:
        self._settings, self._call = settings, call
        self._rows: list[NDArray[np.float32]] = []
        self._widths: tuple[int, ...] | None = None

    def append(self, features: NDArray[np.float32], images: int, layer_widths: tuple[int, ...] | None) -> None:
        if len(features) != images:
            raise ValueError(
                f"features must be one row for each image, of a grid of 1 x 1; got {len(features) // images} rows"
            )
        if self._widths is None:
            self._widths = layer_widths or (features.shape[1],)
            triangles = sum(width * (width + 1) // 2 for width in self._widths)
            purpose = f"fitting Gaussians of {features.shape[1]} channels"
            require_memory(8 * triangles, purpose, "use fewer or narrower layers=")
        self._rows.append(features.copy())

    def finish(self, grid: tuple[int, int]) -> LayerGaussians:  # noqa: ARG002 - one position an image
        rows = np.concatenate(self._rows)
        widths = np.array(self._widths, dtype=np.int64)
        mean = np.empty(rows.shape[1])
        factors = np.zeros(sum(width * (width + 1) // 2 for width in widths.tolist()))
        for done, (layer, triangle) in enumerate(_layers(widths), 1):
            mean[layer] = self._learn(rows[:, layer], factors[triangle])
            if self._call.progress is not None:
                self._call.progress(LayerGaussians.stage, done, len(widths))
        return LayerGaussians(self._settings, Training(len(rows), len(rows), None), widths, mean, factors)

    def _learn(self, rows: NDArray[np.float32], packed: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean of a layer's rows; `packed`, zeros before, becomes the factor of their covariance."""
        rows, threads = np.ascontiguousarray(rows), self._call.threads
        images, width = rows.shape
        sums = np.zeros((1, width))
        _native.accumulate_gaussians(rows, rows[:1], sums, packed[None], threads)
        shrinkage, variance = shrink(rows, sums[0], packed)
        scale, ridge = (1 - shrinkage) / images, shrinkage * variance
        try:
            _native.factorize_gaussians(rows[:1], sums, packed[None], images, scale, ridge, threads, None)
        except ValueError as error:
            raise ValueError(
                f"images must differ enough for a covariance that has an inverse; got {counted(images, 'image')}, of "
                f"which a layer of {width} channels has none. Fit to more and other images"
            ) from error
        mean: NDArray[np.float64] = sums[0]
        return mean


def shrink(rows: NDArray[np.float32], sums: NDArray[np.float64], packed: NDArray[np.float64]) -> tuple[float, float]:
    """How far Ledoit and Wolf (2004) shrink the covariance towards that of one variance for all channels.

    Args:
        rows: (n, d).
        sums: (d,), their differences from the first row.
        packed: (d(d + 1)/2,), the sums of the products of these.

    Returns:
        The shrinkage in [0, 1], and that variance, the mean of all. The estimate is the (1 - shrinkage)-fold empirical
        covariance (of denominator n) and the shrinkage-fold variance on the diagonal.
    """
    images, width = rows.shape
    centred = rows.astype(np.float64) - (rows[0] + sums / images)
    lengths = np.square(centred).sum(axis=1)
    variance = float(lengths.sum()) / images / width
    # The sum of squares of the covariance, out of its triangle.
    total, end = 0.0, 0
    for column in range(width):
        start, end = end, end + width - column
        values = (packed[start:end] - sums[column:] * (sums[column] / images)) / images
        total += 2 * float(np.square(values).sum()) - float(values[0]) ** 2
    spread = max(float(np.square(lengths).sum()) / images - total, 0.0) / images
    distance = total - width * variance**2
    return min(spread / distance, 1.0) if distance > 0 else 0.0, variance


def _layers(widths: NDArray[np.int64]) -> Iterator[tuple[slice, slice]]:
    """Where each layer's columns and triangle stand."""
    columns = np.cumsum([0, *widths]).tolist()
    triangles = np.cumsum([0, *(widths * (widths + 1) // 2)]).tolist()
    return zip(
        (slice(*ends) for ends in pairwise(columns)), (slice(*ends) for ends in pairwise(triangles)), strict=True
    )


class MahalanobisAD(Detector):
    """Mahalanobis-AD (Rippel, Mertens and Merhof, ICPR 2020, arXiv 2005.14140).

    That is "Modeling the Distribution of Normal Data in Pre-Trained Deep Features for Anomaly Detection". Each layer
    has a Gaussian of its globally pooled features, whose covariance is shrunk as Ledoit and Wolf (2004) say. An image
    scores the sum of the layers' Mahalanobis distances. It says whether, not where: a map is that one value, which the
    command line says of pictures and the report does not draw. Which values are normal is not known before `calibrate`.

    Every argument is stored as it is and checked in `fit`. "auto" takes what the backbone recommends, else what the
    profile says; an explicit value wins over both.

    Args:
        profile: whose arithmetic to follow where implementations of PatchCore differ, in images.
        backbone: the network whose maps are used; as for `PatchCore`.
        layers: names of the layers whose maps are used; the first sets the grid of the patches. "auto": the last
            layers at strides 2 to 32.
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
        upsampling: how patch scores become a map of the image's size; without effect, as a map is one value.
        border: how the map goes on beyond its border when it is smoothed; without effect.
        sigma: deviation in pixels of the Gaussian that smooths the map, 0 for none; without effect.
        normalize: scores and maps on anomalib's scale: the threshold is 0.5, and scores of normal images span 1; needs
            `calibrate`.
        clip: clip normalised scores and maps to [0, 1]; what is clipped ties.
        device: where the backbone runs, "auto" for CUDA where there is one.
        autocast: half precision of the backbone on CUDA.
        batch_size: images that are worked on together.
        threads: threads for reading, the backbone and the kernels; None for as many as this process may use.
        seed: seed of whatever is drawn at random: nothing, in this method.

    Attributes (after `fit` or `load`; `NotFittedError` before):
        settings_, image_size_, training_, threshold_, calibration_, map_calibration_, skipped_, timings_: as of
            `PatchCore`; timings have the stage "model" in place of "coreset".
    """

    method: ClassVar[type[LayerGaussians]] = LayerGaussians
    strides: ClassVar[tuple[int, ...]] = (2, 4, 8, 16, 32)

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
