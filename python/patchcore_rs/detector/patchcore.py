"""PatchCore: fit on normal images, score any image. The shell is `base.Detector`, the method `bank.LearnedBank`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from patchcore_rs._limits import require_memory, torch_call
from patchcore_rs._progress import reporting
from patchcore_rs._stopwatch import Stopwatch
from patchcore_rs.detector.bank import LearnedBank
from patchcore_rs.detector.base import Detector
from patchcore_rs.detector.estimator import NotFittedError
from patchcore_rs.detector.extraction import find_backbone, resolve_extractor, warn_of_unseen
from patchcore_rs.detector.method import Call, FittedMethod, united_hashes
from patchcore_rs.features.store import FeatureStore
from patchcore_rs.images.sources import open_source
from patchcore_rs.model.description import Description, Training
from patchcore_rs.model.map_values import larger
from patchcore_rs.model.settings import AUTO

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from typing import Literal

    import torch
    from numpy.typing import NDArray

    from patchcore_rs._types import Channels, OnError, Pages, Progress
    from patchcore_rs.backbones.backbone import Backbone
    from patchcore_rs.memory_bank import MemoryBank
    from patchcore_rs.model.settings import PatchCoreSettings

    Auto = Literal["auto"]


class PatchCore(Detector):
    """PatchCore ("Towards Total Recall in Industrial Anomaly Detection", Roth et al., CVPR 2022).

    Every argument is stored as it is and checked in `fit`. "auto" takes what the preset says, else what the backbone
    recommends, else what the profile says; an explicit value wins over all.

    Args:
        preset: a network and settings that go together, in place of every "auto" among them: "fast" or "accurate";
            `patchcore_rs.model.profiles.PRESETS` lists them. None for none.
        profile: whose arithmetic to follow where implementations of PatchCore differ: "paper", "amazon"
            (patchcore-inspection) or "anomalib"; "inspect" is "paper" on the whole image, without a crop.
            `patchcore_rs.model.profiles.PROFILES` lists their choices.
        backbone: the network whose maps are used: a torchvision name, "efficientnet_lite0", "efficientnet_lite1",
            "efficientnet_lite2", "timm:NAME", a `torch.nn.Module`, a callable that returns maps, or a `Backbone`.
            "auto": WideResNet50, torchvision's but for `anomalib`, which takes timm's.
        layers: names of the layers whose maps are used; the first sets the grid of the patches.
        weights: a state dict in place of the ImageNet weights, which torchvision fetches once: its path. "default" for
            the ImageNet weights, None for random ones.
        resize: size that images are resized to, before the crop: an int for the shorter side, a pair (height, width),
            or None.
        crop: size of the centre that is kept: a side, a pair (height, width), or None.
        resampling: how 8-bit images are resized: "pil", or "tensor" as floating-point images are.
        mean: mean of each colour channel in [0, 1], for normalisation; or one for all.
        std: deviation of each colour channel, for normalisation; or one for all.
        white_level: sample of 16-bit images that is white, 4095 for a camera of 12 bits; larger ones count as white.
            "auto" reads the training images once more and takes the smallest of 1023, 4095, 16383 and 65535 that none
            of their samples exceeds. A file that states fewer bits has its own white where that is less.
        value_range: samples of 32-bit and floating-point images that are black and white: (low, high). None refuses
            such files, and such arrays and tensors outside [0, 1].
        round_floats: round floating-point images in [0, 1] to 8 bits, so that they score as their files do. "auto"
            does, but not with `resampling="tensor"`, a `value_range`, or mean 0 and std 1.
        embedding: channels of a patch feature, by adaptive pooling; "concat" for all there are.
        patch_size: side of a patch's neighbourhood, the p of section 3.1.
        standardize: scale each feature channel by its mean and deviation over the training patches; "auto": not.
        coreset: patches to remember, the rows of the memory bank: a fraction (float), a count (int), or None for all;
            "auto": a tenth.
        coreset_method: how they are chosen: "greedy" (section 3.2) or "random": the first rows of numpy's
            `PCG64(seed)` permutation.
        projection: width of the random projection that the coreset is selected in, "johnson-lindenstrauss" for the
            width that keeps distances within a factor of 1 ± 0.9, or None.
        projection_kind: values of that projection: "sparse" (signs and zeros) or "gaussian".
        start: first row of the greedy selection: an int, "mean", "mean10", or None for a row by the seed; see
            `greedy_coreset`.
        reweight: neighbours b of Eq. 7; None or 1 for the largest patch score, Eq. 6. Lowered to the bank's size.
        distance: whether scores are distances or their squares: "euclidean", or "squared": image scores and, before
            upsampling, patch scores are squared.
        upsampling: how patch scores become a map of the image's size: "bilinear" or "nearest".
        border: how the map goes on beyond its border when it is smoothed: "symmetric" or "reflect" (numpy's terms).
        sigma: deviation in pixels of the Gaussian that smooths the map, 0 for none.
        normalize: scores and maps on anomalib's scale: the threshold is 0.5, and scores of normal images span 1; needs
            `calibrate`.
        clip: clip normalised scores and maps to [0, 1], as anomalib does; what is clipped ties, and `predict` warns of
            the number of such scores.
        index: how the nearest patches are searched for: "exact", or "ivfpq" for approximate search by FAISS (an extra).
        device: where the backbone runs, "auto" for CUDA where there is one.
        autocast: half precision of the backbone on CUDA.
        batch_size: images that are worked on together; on a CPU each passes the backbone alone.
        threads: threads for reading, the backbone and the kernels; None for as many as this process may use.
        seed: seed of whatever is drawn at random: the coreset, the projection and the approximate index;
            0 <= seed < 2**64.

    Attributes (after `fit` or `load`; `NotFittedError` before):
        memory_bank_: the `MemoryBank`, (N, d).
        settings_: every choice with nothing left at "auto".
        image_size_: (height, width) of the images after resizing and cropping, and of the maps.
        training_: how many images and patches the bank was made of, and how far from it a patch can be; see `Training`.
        threshold_: an image is anomalous where score >= threshold_; None before `calibrate`.
        calibration_: where the threshold comes from, or None.
        map_calibration_: the threshold of map values, where colours of maps begin, or None.
        skipped_: (name, reason) of training images left out by `on_error="skip"`.
        timings_: seconds of the stages "backbone" (reading included), "aggregation", "coreset" and "scoring", summed
            over `fit` and every call since.
    """

    method: ClassVar[type[LearnedBank]] = LearnedBank
    _unfitted: ClassVar[str] = "has no memory bank yet"

    def __init__(
        self,
        *,
        preset: str | None = None,
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
        embedding: int | str = AUTO,
        patch_size: int = 3,
        standardize: bool | Auto = AUTO,
        coreset: float | Auto | None = AUTO,
        coreset_method: str = "greedy",
        projection: int | str | None = AUTO,
        projection_kind: str = AUTO,
        start: int | str | None = AUTO,
        reweight: int | Auto | None = AUTO,
        distance: str = AUTO,
        upsampling: str = AUTO,
        border: str = AUTO,
        sigma: float = 4.0,
        normalize: bool = False,
        clip: bool | Auto = AUTO,
        index: str = "exact",
        device: str | torch.device = "auto",
        autocast: bool = False,
        batch_size: int = 8,
        threads: int | None = None,
        seed: int = 0,
    ) -> None:
        """Store the arguments; `fit` checks them."""
        self.preset = preset
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
        self.embedding = embedding
        self.patch_size = patch_size
        self.standardize = standardize
        self.coreset = coreset
        self.coreset_method = coreset_method
        self.projection = projection
        self.projection_kind = projection_kind
        self.start = start
        self.reweight = reweight
        self.distance = distance
        self.upsampling = upsampling
        self.border = border
        self.sigma = sigma
        self.normalize = normalize
        self.clip = clip
        self.index = index
        self.device = device
        self.autocast = autocast
        self.batch_size = batch_size
        self.threads = threads
        self.seed = seed

    @property
    def settings_(self) -> PatchCoreSettings:
        """Every choice with nothing left at "auto"."""
        return _bank(self._require_fitted()).settings

    @property
    def memory_bank_(self) -> MemoryBank:
        """The `MemoryBank`, (N, d)."""
        return _bank(self._require_fitted()).bank

    def partial_fit(
        self,
        images: Any,
        *,
        progress: Progress | bool | None = None,
        on_error: OnError = "raise",
        channels: Channels = "rgb",
        pages: Pages = "first",
    ) -> PatchCore:
        """Learn from more normal images, without those learnt from before. On an unfitted detector this is `fit`.

        The new bank is selected from the rows of the old one and the new images' patches, within the budget that
        `settings_` give: a count stays that count, a fraction is one of all patches ever seen, None keeps all. Greedy
        selection begins with the bank's first row. `training_` counts on, and its `cover`, a bound from now on, is the
        one before and the radius of this selection together: no patch ever seen is farther from the new bank.

        Everything else stays as in `fit`: settings, image size, and with `standardize` the mean and deviation of its
        patches. A threshold does not hold for another bank: `threshold_` and `calibration_` become None, with a
        UserWarning if they were set. All or nothing: a call that fails or is interrupted changes nothing.

        Takes and raises what `fit` does, and ValueError for images of another size than those before.
        """
        fitted: FittedMethod | None = self.__dict__.get("_fitted")
        if fitted is None:
            return self.fit(images, progress=progress, on_error=on_error, channels=channels, pages=pages)
        learned, settings = _bank(fitted), _bank(fitted).settings
        with reporting(progress) as report, torch_call():
            reader = self._reader(fitted, report, on_error)
            source = open_source(images, channels=channels, pages=pages, flawless=True)
            store = FeatureStore(
                source.count, lambda rows, width: LearnedBank.memory(rows, width, settings), first=learned.bank.features
            )
            read = reader.collect(store.append, source)
            features, held = store.finish(), len(learned.bank)
            learned.standardize(features[held:])
            training = Training(len(read.names), len(features) - held, 0.0)
            with reader.stopwatch("coreset"):
                grown = learned.grow(features, training, Call(fitted.threads, report), read.grid)
            hashes = united_hashes(fitted.image_hashes, read.image_hashes)
            new = _grown(fitted, grown, fitted.skipped + tuple(reader.skipped), hashes)
            with reader.stopwatch("coreset"):
                map_values = larger(fitted.description.map_values, new.measure_maps())
        fitted.warn_of_calibration()
        unseen = _larger(fitted.description.unseen, warn_of_unseen(read.unseen))
        seconds = {stage: spent + reader.stopwatch.seconds.get(stage, 0.0) for stage, spent in self.timings_.items()}
        self._learn(new.describe(unseen=unseen, map_values=map_values), seconds)
        return self

    def merge(self, other: PatchCore, *, progress: Progress | bool | None = None) -> PatchCore:
        """A new detector from two fitted ones, as if it had been fitted to one's images and then to the other's.

        It has this one's arguments, settings and budget, as in `partial_fit`, and a bank selected from the rows of both
        banks, this one's first. It is not calibrated, with a UserWarning where this one is. Neither is changed.

        Both must have the same backbone, weights (a plain callable has none and is taken on trust), image size and
        settings, but for those of the selection, `index`, `normalize` and `clip`. With `standardize` they must share
        mean and deviation, as detectors do that went on by `partial_fit` from copies of one. Images that both saw count
        twice.

        Args:
            other: a fitted `PatchCore`.
            progress: as in `fit`; the stage "coreset".

        Raises:
            TypeError: `other` is no `PatchCore`.
            NotFittedError: one of them is not fitted.
            ValueError: the two differ in a setting, which is named.
            MemoryError: the rows of both would not fit into memory.
        """
        if not isinstance(other, PatchCore):
            raise TypeError(f"other must be a PatchCore; got {type(other).__name__}")
        fitted = self._require_fitted()
        theirs: FittedMethod | None = other.__dict__.get("_fitted")
        if theirs is None:
            raise NotFittedError("other has no memory bank yet; call its fit(images) first")
        fitted.description.check_mergeable(theirs.description)
        ours, added = _bank(fitted), _bank(theirs)
        ours.check_mergeable(added)
        rows, channels = len(ours.bank) + len(added.bank), ours.bank.shape[1]
        require_memory(
            LearnedBank.memory(rows, channels, ours.settings),
            f"merging two memory banks of {rows} rows together, of {channels} channels,",
            "fit with a smaller coreset= first",
        )
        stopwatch = Stopwatch()
        with reporting(progress) as report, stopwatch("coreset"):
            features = np.concatenate([ours.bank.features, added.bank.features])
            grown = ours.grow(features, theirs.description.training, Call(fitted.threads, report))
        fitted.warn_of_calibration()
        merged = type(self)(**self.get_params())
        hashes = united_hashes(fitted.image_hashes, theirs.image_hashes)
        new = _grown(fitted, grown, fitted.skipped + theirs.skipped, hashes).describe(
            unseen=_larger(fitted.description.unseen, theirs.description.unseen),
            map_values=larger(fitted.description.map_values, theirs.description.map_values),
        )
        merged._learn(new, stopwatch.seconds)
        return merged


def assemble(
    arguments: Mapping[str, Any],
    bank: NDArray[np.float32],
    *,
    image_size: tuple[int, int],
    threshold: float | None = None,
) -> PatchCore:
    """`PatchCore(**arguments)` as if it had been fitted, with the rows of `bank`, (N, d), as its memory bank.

    How many images it learnt from is unknown, its patches are counted as those of the bank, and no cover is known.

    Args:
        arguments: of the constructor.
        bank: its rows, finite.
        image_size: (height, width) of images after resizing and cropping.
        threshold: of image scores, without a calibration.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: as `PatchCore.fit` and `load_backbone` do.
    """
    model = PatchCore(**arguments)
    parameters = model._checked()
    extractor, settings = resolve_extractor(parameters, LearnedBank, find_backbone(parameters))
    backbone = extractor.backbone
    description = Description(
        settings=settings,
        backbone=backbone.name,
        named=isinstance(model.backbone, str),
        weights_hash=backbone.weights_hash,
        image_size=image_size,
        training=Training(None, len(bank), None),
        threshold=threshold,
    )
    learned = LearnedBank.load({"bank": bank}, description, parameters["threads"])
    model._learn(FittedMethod(description, learned, extractor=extractor, threads=parameters["threads"]), {})
    return model


def _bank(fitted: FittedMethod) -> LearnedBank:
    return cast("LearnedBank", fitted.learned)


def _larger(share: float | None, other: float | None) -> float | None:
    """The larger share of an image that the crop cut off; None, not known, where either is."""
    return None if share is None or other is None else max(share, other)


def _grown(
    fitted: FittedMethod,
    learned: LearnedBank,
    skipped: tuple[tuple[str, str], ...],
    hashes: Mapping[str, NDArray[np.int64]],
) -> FittedMethod:
    """As `fitted`, with another bank; what belonged to the old one, thresholds and extra arrays, is gone."""
    description = replace(
        fitted.description, training=learned.training, threshold=None, calibration=None, map_calibration=None
    )
    return FittedMethod(description, learned, skipped, hashes, fitted.extractor, fitted.threads)
