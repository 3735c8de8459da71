"""PatchCore: fit on normal images, score any image. Composes the package's parts and holds no arithmetic of its own."""

from __future__ import annotations

import inspect
import threading
import warnings
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from patchcore_rs import _native
from patchcore_rs._stopwatch import Stopwatch
from patchcore_rs.backbones.backbone import Backbone
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.detector.fitted import Fitted, build_extractor, new_bank
from patchcore_rs.detector.prediction import Prediction
from patchcore_rs.detector.selection import select_rows
from patchcore_rs.features.reader import Reader
from patchcore_rs.features.standardization import channel_statistics, standardize
from patchcore_rs.features.store import FeatureStore
from patchcore_rs.images.sources import describe_source, open_source
from patchcore_rs.memory_bank import MemoryBank
from patchcore_rs.model.calibration import Calibration, calibrate_threshold, min_max
from patchcore_rs.model.description import Description, Training
from patchcore_rs.model.file import ModelFile, ModelFileError, read_model, write_model
from patchcore_rs.model.profiles import PROFILES
from patchcore_rs.model.settings import AUTO, Settings, check, check_number, resolve

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from typing import Literal

    import torch
    from numpy.typing import NDArray

    from patchcore_rs._types import OnError, Progress

    Auto = Literal["auto"]

_timings_lock = threading.Lock()


class NotFittedError(ValueError, AttributeError):
    """A detector was used before `fit` or `PatchCore.load`."""


class PatchCore:
    """PatchCore ("Towards Total Recall in Industrial Anomaly Detection", Roth et al., CVPR 2022).

    Every argument is stored as it is and checked in `fit`. "auto" takes what the backbone recommends, else what the
    profile says; an explicit value wins over both.

    Args:
        profile: whose arithmetic to follow where implementations of PatchCore differ: "paper", "amazon"
            (patchcore-inspection) or "anomalib". `patchcore_rs.model.profiles.PROFILES` lists their choices.
        backbone: the network whose maps are used: a torchvision name, "efficientnet_lite0", "timm:NAME", a
            `torch.nn.Module`, a callable that returns maps, or a `Backbone`. "auto": WideResNet50, torchvision's for
            `paper` and `amazon`, timm's for `anomalib`.
        layers: names of the layers whose maps are used; the first sets the grid of the patches.
        weights: a state dict in place of the ImageNet weights, which torchvision fetches once: its path. "default" for
            the ImageNet weights, None for random ones.
        resize: size that images are resized to, before the crop: an int for the shorter side, a pair (height, width),
            or None.
        crop: size of the centre that is kept: a side, a pair (height, width), or None.
        resampling: how 8-bit images are resized: "pil", or "tensor" as floating-point images are.
        mean: mean of each colour channel in [0, 1], for normalisation.
        std: deviation of each colour channel, for normalisation.
        embedding: channels of a patch feature, by adaptive pooling; "concat" for all there are.
        patch_size: side of a patch's neighbourhood, the p of section 3.1.
        standardize: scale each feature channel by its mean and deviation over the training patches.
        coreset: patches to remember, the rows of the memory bank: a fraction (float), a count (int), or None for all.
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
        normalize: scores and maps in [0, 1] with the threshold at 0.5, as anomalib shows them; needs `calibrate`.
        index: how the nearest patches are searched for: "exact", or "ivfpq" for approximate search by FAISS (an extra).
        device: where the backbone runs, "auto" for CUDA where there is one.
        autocast: half precision of the backbone on CUDA.
        batch_size: images that pass the backbone together.
        threads: threads for reading and the kernels; None for as many as this process may use.
        seed: seed of whatever is drawn at random: the coreset, the projection and the approximate index;
            0 <= seed < 2**64.

    Attributes, after `fit`, `load` or `calibrate`:
        memory_bank_: the `MemoryBank`, (N, d).
        settings_: every choice with nothing left at "auto".
        image_size_: (height, width) of the images after resizing and cropping, and of the maps.
        training_: how many images and patches the bank was made of, and how far from it a patch can be; see `Training`.
        threshold_: an image is anomalous where score >= threshold_; None before `calibrate`.
        calibration_: where the threshold comes from, or None.
        skipped_: (name, reason) of training images left out by `on_error="skip"`.
        timings_: seconds of the stages "backbone" (reading included), "aggregation", "coreset" and "scoring", summed
            over `fit` and every call since.
    """

    memory_bank_: MemoryBank
    settings_: Settings
    image_size_: tuple[int, int]
    training_: Training
    threshold_: float | None
    calibration_: Calibration | None
    skipped_: tuple[tuple[str, str], ...]
    timings_: dict[str, float]

    def __init__(
        self,
        *,
        profile: str = "paper",
        backbone: str | torch.nn.Module | Callable[[torch.Tensor], Any] | Backbone = AUTO,
        layers: Sequence[str] | Auto = AUTO,
        weights: str | os.PathLike[str] | None = "default",
        resize: int | tuple[int, int] | Auto | None = AUTO,
        crop: int | tuple[int, int] | Auto | None = AUTO,
        resampling: str = AUTO,
        mean: tuple[float, float, float] | Auto = AUTO,
        std: tuple[float, float, float] | Auto = AUTO,
        embedding: int | str = AUTO,
        patch_size: int = 3,
        standardize: bool = False,
        coreset: float | None = 0.1,
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
        index: str = "exact",
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
        self.index = index
        self.device = device
        self.autocast = autocast
        self.batch_size = batch_size
        self.threads = threads
        self.seed = seed

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002, FBT001, FBT002 - scikit-learn's signature
        """The constructor's arguments by name; `deep` is scikit-learn's and changes nothing."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        """The arguments that are not the default."""
        parameters = inspect.signature(type(self)).parameters
        changed = (
            f"{name}={value!r:.80}"
            for name, value in self.get_params().items()
            if value is not parameters[name].default and not _equal(value, parameters[name].default)
        )
        return f"PatchCore({', '.join(changed)})"

    def fit(self, images: Any, *, progress: Progress | None = None, on_error: OnError = "raise") -> PatchCore:
        """Learn the normal from images without anomalies, and forget what was learnt before.

        All or nothing: a fit that fails or is interrupted leaves the detector as it was.

        Args:
            images: a folder (searched recursively), a file, a sequence of files, arrays or tensors, an array
                (n, H, W, 3), a tensor (n, 3, H, W), a data set of `load_dataset` (its training images), a torch
                Dataset or DataLoader. See `patchcore_rs.features.iterate_images`.
            progress: called with (stage, done, total or None); stages "features", in images, and "coreset", in rows.
                What it raises ends the fit.
            on_error: "raise", or "skip" to leave out images that cannot be read, list them in `skipped_` and warn once.

        Raises:
            ValueError: an argument is out of range, there is no image, one cannot be read, or the weights do not fit.
            MemoryError: the features would not fit into memory; raised before they are allocated.
            ImportError: the backbone or index needs a package that is not installed.
        """
        parameters = check(self.get_params())
        stopwatch = Stopwatch()
        source = open_source(images)
        backbone = self._load_backbone(parameters)
        settings = resolve(parameters, backbone)
        threads: int | None = parameters["threads"]
        extractor = build_extractor(backbone, settings, self.device, threads)
        reader = Reader(extractor, parameters["batch_size"], stopwatch, on_error=on_error, progress=progress)
        store = FeatureStore(source.count, settings.coreset)
        features, image_size = reader.gather(store, source)
        mean = deviation = None
        if settings.standardize:
            mean, deviation = channel_statistics(features)
            standardize(features, mean, deviation)
        with stopwatch("coreset"):
            selection = select_rows(features, settings, threads, progress)
            bank = new_bank(selection.of(features), settings, threads, progress)
        description = Description(
            settings=settings,
            backbone=backbone.name,
            named=isinstance(self.backbone, str),
            weights_hash=backbone.weights_hash,
            image_size=image_size,
            training=Training(store.images, len(features), selection.cover),
        )
        del features
        fitted = Fitted.build(description, extractor, bank, mean, deviation)
        self._learn(fitted, stopwatch.seconds, tuple(reader.skipped))
        return self

    def partial_fit(self, images: Any, *, progress: Progress | None = None, on_error: OnError = "raise") -> PatchCore:
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
        fitted: Fitted | None = self.__dict__.get("_fitted")
        if fitted is None:
            return self.fit(images, progress=progress, on_error=on_error)
        reader = self._reader(fitted, progress, on_error)
        source = open_source(images)
        store = FeatureStore(source.count, fitted.description.settings.coreset, first=fitted.bank.features)
        features, _ = reader.gather(store, source)
        held = len(fitted.bank)
        fitted.standardize(features[held:])
        training = Training(store.images, len(features) - held, 0.0)
        with reader.stopwatch("coreset"):
            grown = fitted.grow(features, training, progress)
        del features
        self._warn_of_calibration()
        seconds = {stage: spent + reader.stopwatch.seconds.get(stage, 0.0) for stage, spent in self.timings_.items()}
        self._learn(grown, seconds, self.skipped_ + tuple(reader.skipped))
        return self

    def merge(self, other: PatchCore, *, progress: Progress | None = None) -> PatchCore:
        """A new detector from two fitted ones, as if it had been fitted to one's images and then to the other's.

        It has this one's arguments, settings and budget, as in `partial_fit`, and a bank selected from the rows of both
        banks, this one's first. It is not calibrated, with a UserWarning where this one is. Neither is changed.

        Both must have the same backbone, weights (a plain callable has none and is taken on trust), image size and
        settings, but for those of the selection, `index` and `normalize`. With `standardize` they must share mean and
        deviation, as detectors do that went on by `partial_fit` from copies of one. Images that both saw count twice.

        Raises TypeError where `other` is no `PatchCore`, `NotFittedError` where one of them is not fitted, and
        ValueError naming the first setting in which they differ.
        """
        if not isinstance(other, PatchCore):
            raise TypeError(f"other must be a PatchCore; got {type(other).__name__}")
        fitted = self._require_fitted()
        theirs: Fitted | None = other.__dict__.get("_fitted")
        if theirs is None:
            raise NotFittedError("other has no memory bank yet; call its fit(images) first")
        fitted.check_mergeable(theirs)
        stopwatch = Stopwatch()
        store = FeatureStore(1, fitted.description.settings.coreset, first=fitted.bank.features)
        store.append(theirs.bank.features, 1)
        with stopwatch("coreset"):
            grown = fitted.grow(store.finish(), theirs.description.training, progress)
        self._warn_of_calibration()
        merged = type(self)(**self.get_params())
        merged._learn(grown, stopwatch.seconds, self.skipped_ + other.skipped_)
        return merged

    def predict(self, images: Any, *, progress: Progress | None = None, on_error: OnError = "raise") -> Prediction:
        """Score images. Safe to call from several threads; an image's score does not depend on its batch.

        Takes what `fit` takes (of a data set of `load_dataset`, its test images), with progress as the stage "scores".
        The features of one batch are held at a time. No images give an empty prediction.

        Raises `NotFittedError` before `fit`, and ValueError for an image that cannot be read or that has another size
        than the training images after resizing and cropping.
        """
        fitted = self._require_fitted()
        scale = self._require_scale()
        threshold = self.threshold_
        paths: list[Path | None] = []
        scores, maps = [np.empty(0)], [np.empty((0, *fitted.description.image_size), np.float32)]
        reader = self._reader(fitted, progress, on_error)
        for batch_paths, batch_scores, batch_maps in self._score(fitted, reader, images):
            paths += batch_paths
            scores.append(batch_scores)
            maps.append(batch_maps)
        all_scores, all_maps = np.concatenate(scores), np.concatenate(maps)
        labels = None if threshold is None else (all_scores >= threshold).astype(np.int8)
        if scale is not None and threshold is not None:
            all_scores, all_maps, threshold = (
                min_max(all_scores, threshold, scale),
                min_max(all_maps, threshold, scale),
                0.5,
            )
        return Prediction(all_scores, all_maps, labels, threshold, tuple(paths), tuple(reader.skipped))

    def calibrate(
        self,
        normal_images: Any,
        *,
        false_alarm_rate: float = 0.01,
        progress: Progress | None = None,
        on_error: OnError = "raise",
    ) -> PatchCore:
        """Set `threshold_` from normal images that were not trained on, and record its provenance in `calibration_`.

        The threshold is the smallest that alarms (score >= threshold) on at most `false_alarm_rate` of the n images:
        the next float64 above the (floor(rate * n) + 1)-th largest score. Warns where n < 1 / rate.

        Takes images, `progress` and `on_error` as `predict` does. Raises ValueError unless 0 <= false_alarm_rate < 1.
        """
        fitted = self._require_fitted()
        rate = check_number("false_alarm_rate", false_alarm_rate)
        if not 0 <= rate < 1:
            raise ValueError(f"false_alarm_rate must be a share >= 0 and < 1; got {false_alarm_rate!r}")
        reader = self._reader(fitted, progress, on_error)
        paths: list[Path | None] = []
        scores = [np.empty(0)]
        for batch_paths, batch_scores, _ in self._score(fitted, reader, normal_images):
            paths += batch_paths
            scores.append(batch_scores)
        if not paths:
            raise ValueError("normal_images must hold at least one image that can be read; got none")
        calibration = calibrate_threshold(np.concatenate(scores), rate, source=describe_source(normal_images, paths))
        self.__dict__.update(threshold_=calibration.threshold, calibration_=calibration)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to one safetensors file, whole or not at all; the same model gives the same bytes.

        The backbone is stored as its name and the hash of its weights. Raises `NotFittedError` before `fit`,
        ValueError for a `threshold_` that is no finite number, and OSError where the file cannot be written.
        """
        fitted = self._require_fitted()
        threshold = None if self.threshold_ is None else check_number("threshold_", self.threshold_)
        description = replace(fitted.description, threshold=threshold, calibration=self.calibration_)
        metadata = description.to_json() | {"writer": _native.build_info()["version"]}
        write_model(path, ModelFile(fitted.bank.features, fitted.mean, fitted.deviation, metadata))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        weights: str | os.PathLike[str] | None = "default",
        backbone: torch.nn.Module | Callable[[torch.Tensor], Any] | Backbone | str | None = None,
        threads: int | None = None,
    ) -> PatchCore:
        """Read what `save` wrote: the same predictions to the bit, given the same backbone on the same device.

        The file is checked before it is believed, and never runs code. The backbone is built from its name, or is
        `backbone`, which a model fitted with a network of the caller's own needs; its weights must have the stored
        hash (a plain callable has none and is taken on trust).

        Raises `ModelFileError` (a ValueError) naming the path and the reason, `FileNotFoundError`,
        `IsADirectoryError` or `PermissionError` where the file cannot be opened, and what `load_backbone` raises.
        """
        stored = read_model(path)
        try:
            description = Description.from_json(
                stored.metadata, bank=stored.bank.shape, standardized=stored.mean is not None
            )
        except ValueError as error:
            raise ModelFileError(path, f"{error}; save the model again") from error
        if backbone is None and not description.named:
            raise ModelFileError(path, f"it was fitted with a network of the caller's own; {description.remedy}")
        settings = asdict(description.settings)
        layers = settings.pop("layers")
        model = cls(
            backbone=description.backbone if backbone is None else backbone,
            layers=AUTO if isinstance(backbone, Backbone) or not layers else layers,
            weights=weights,
            device=device,
            threads=threads,
            **settings,
        )
        loaded = model._load_backbone(check(model.get_params()))
        try:
            description.check_backbone(loaded)
        except ValueError as error:
            raise ModelFileError(path, str(error)) from error
        extractor = build_extractor(loaded, description.settings, device, threads)
        bank = MemoryBank(stored.bank, threads=threads)
        model._learn(Fitted.build(description, extractor, bank, stored.mean, stored.deviation), {})
        model.__dict__.update(threshold_=description.threshold, calibration_=description.calibration)
        return model

    def _load_backbone(self, parameters: dict[str, Any]) -> Backbone:
        backbone, layers = parameters["backbone"], parameters["layers"]
        if isinstance(backbone, str) and backbone == AUTO:
            backbone = PROFILES[parameters["profile"]].backbone
        layers = None if layers == AUTO else layers
        return load_backbone(backbone, layers=layers, weights=self.weights, device=self.device)

    def _learn(self, fitted: Fitted, seconds: dict[str, float], skipped: tuple[tuple[str, str], ...] = ()) -> None:
        """Take over what was learnt, in one step."""
        self.__dict__.update(
            _fitted=fitted,
            memory_bank_=fitted.bank,
            settings_=fitted.description.settings,
            image_size_=fitted.description.image_size,
            training_=fitted.description.training,
            threshold_=None,
            calibration_=None,
            skipped_=skipped,
            timings_=dict.fromkeys(("backbone", "aggregation", "coreset", "scoring"), 0.0) | seconds,
        )

    def _require_fitted(self) -> Fitted:
        fitted: Fitted | None = self.__dict__.get("_fitted")
        if fitted is None:
            raise NotFittedError(
                "this PatchCore has no memory bank yet; call fit(images) or PatchCore.load(path) first"
            )
        return fitted

    def _warn_of_calibration(self) -> None:
        if self.threshold_ is not None:
            warnings.warn(
                "the threshold does not hold for the memory bank that this call makes: call calibrate(normal_images)",
                stacklevel=3,
            )

    def _require_scale(self) -> Calibration | None:
        """What scores are normalised by, where they are."""
        if not self.settings_.normalize:
            return None
        if (
            self.threshold_ is None
            or self.calibration_ is None
            or self.calibration_.minimum == self.calibration_.maximum
        ):
            raise ValueError("normalize=True needs the range of normal scores: call calibrate(normal_images) first")
        return self.calibration_

    def _reader(self, fitted: Fitted, progress: Progress | None, on_error: OnError) -> Reader:
        batch_size = check({"batch_size": self.batch_size})["batch_size"]
        size = fitted.description.image_size
        return Reader(fitted.extractor, batch_size, Stopwatch(), on_error=on_error, progress=progress, image_size=size)

    def _score(
        self, fitted: Fitted, reader: Reader, images: Any
    ) -> Iterator[tuple[tuple[Path | None, ...], NDArray[np.float64], NDArray[np.float32]]]:
        """Paths, scores and maps, batch by batch; adds to the timings at the end."""
        source = open_source(images, training=False)
        if source.count == 0:
            return
        for batch, features, grid in reader.read("scores", source):
            with reader.stopwatch("scoring"):
                scores, maps = fitted.score(features, grid)
            yield batch.paths, scores, maps
        with _timings_lock:
            seconds = reader.stopwatch.seconds
            self.timings_ = {stage: spent + seconds.get(stage, 0.0) for stage, spent in self.timings_.items()}


def _equal(value: object, default: object) -> bool:
    return type(value) is type(default) and value == default
