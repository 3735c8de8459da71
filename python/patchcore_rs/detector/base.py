"""The shell of every detector: images in, predictions out, whatever the method between.

```text
  images -> Source -> Reader, FeatureExtractor -> FeatureSet -> method.fit -> Fitted      fit, fit_features
  images -> ... -> features of a batch -> FittedMethod.score -> scores, maps -> Prediction   predict, predict_features
```

The shell owns what all detectors share: sources, `on_error`, progress, timings, calibration, normalised scores, saving
and loading, thread safety, and that a call changes everything or nothing. It holds no arithmetic. A *method*
(`method.Method`) owns the arithmetic: what it learns from features, how it scores features, which arrays hold that.

**All or nothing, and threads.** What a detector knows is one `Fitted`, replaced in one assignment and never changed. A
call takes it once at its beginning: it answers by the bank, the settings and the threshold of one moment, also where
another thread fits or calibrates meanwhile.

**Which methods fit in.** A method names the view of the backbone's maps that it takes; what else it needs follows.

- PatchCore, "aggregated": learns a coreset as its bank; scores a patch by its distance to it, an image by Eq. 7.
- PaDiM, "raw": learns mean and covariance of each position of the grid, in one pass, and keeps the Cholesky factors;
  scores a patch by its Mahalanobis distance, an image by the largest.
- Mahalanobis-AD, "pooled", grid (1, 1): learns mean and covariance of each layer's columns; scores an image by the sum
  of the layers' distances, and its map is that one value.
- SPADE, "raw": learns all rows, the image of each, and each image's mean of the last layer's columns; scores an image
  by the mean distance to the K nearest images, a patch by its distance to the rows of those images.
- An ensemble learns nothing itself: its members are detectors with views of their own, and it averages their scores and
  maps on one scale. So it is no method but a detector of detectors, and shares `estimator.FittedEstimator`.

SPADE pools the last layer from its columns of the raw view, which are that layer's map, enlarged bilinearly to the
grid: their mean over the grid is the map's own wherever the grid is a whole multiple of the map.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, cast

from patchcore_rs._checks import flags
from patchcore_rs._limits import torch_call
from patchcore_rs._progress import reporting
from patchcore_rs._stopwatch import Stopwatch
from patchcore_rs._version import LIBRARIES, __version__, installed
from patchcore_rs.backbones.backbone import Backbone
from patchcore_rs.backbones.weights import WeightsError
from patchcore_rs.detector.estimator import FittedEstimator, Reading
from patchcore_rs.detector.extraction import (
    backbone_key,
    build_extractor,
    check_extraction,
    find_backbone,
    find_white_level,
    own_settings,
    require_set,
    resolve_extractor,
    warn_of_precision,
    warn_of_unseen,
)
from patchcore_rs.detector.method import CHUNK, Call, FittedMethod, Scored, united_hashes
from patchcore_rs.features.reader import Reader, check_on_error
from patchcore_rs.features.store import FeatureStore
from patchcore_rs.images.sources import open_source
from patchcore_rs.model.description import Description, read_description
from patchcore_rs.model.file import ModelFile, ModelFileError, model_name
from patchcore_rs.model.settings import AUTO, check

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator
    from typing import IO

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_rs._types import Channels, OnError, Pages, Progress
    from patchcore_rs.detector.method import Fitted, Method
    from patchcore_rs.detector.prediction import Prediction
    from patchcore_rs.features.extractor import FeatureExtractor
    from patchcore_rs.features.feature_set import FeatureSet
    from patchcore_rs.features.reader import Collected


class Detector(FittedEstimator):
    """What every detector does; see the module. Subclasses add the constructor and name their `method`.

    The constructor's arguments are checked in `fit`.
    """

    method: ClassVar[type[Method]]
    strides: ClassVar[tuple[int, ...] | None] = None  # of the layers at "auto"; None for those the backbone recommends

    backbone: Any
    batch_size: int
    threads: int | None

    # --- features -------------------------------------------------------------------------------------------

    def extract(
        self,
        images: Any,
        *,
        progress: Progress | bool | None = None,
        on_error: OnError = "raise",
        channels: Channels = "rgb",
        pages: Pages = "first",
    ) -> FeatureSet:
        """The patch features of images, by this detector's arguments; for `fit_features` and `predict_features`.

        Whoever fits several detectors that see patches alike passes the backbone once.

        Args:
            images: what `fit` takes (of a data set of `load_dataset`, its training images).
            progress: as in `fit`; the stage "features".
            on_error: as in `fit`; what was left out is listed in the set.
            channels: as in `fit`.
            pages: as in `fit`.

        Raises:
            MemoryError: the features would not fit into memory; raised before they are allocated.
            TypeError, ValueError, ImportError, OSError: as `fit`.
        """
        check_on_error(on_error)
        with reporting(progress) as report, torch_call():
            parameters = find_white_level(self._checked(), images, on_error, channels=channels, pages=pages)
            source = open_source(images, channels=channels, pages=pages)
            extractor, _ = resolve_extractor(parameters, self.method, find_backbone(parameters, self.strides))
            self._extracted_by = backbone_key(parameters), extractor.backbone
            reader = Reader(extractor, parameters["batch_size"], Stopwatch(), on_error=on_error, progress=report)
            return reader.gather(FeatureStore(source.count), source)

    # --- fitting --------------------------------------------------------------------------------------------

    def fit(
        self,
        images: Any,
        y: object = None,  # noqa: ARG002 - scikit-learn's signature
        *,
        progress: Progress | bool | None = None,
        on_error: OnError = "raise",
        channels: Channels = "rgb",
        pages: Pages = "first",
    ) -> Self:
        """Learn the normal from images without anomalies, and forget what was learnt before.

        One image of 50 is then scored as if it had not been learnt from, at most 20 000 patches in all: colours of maps
        begin beyond what these show, until `calibrate` knows better. A method that cannot score them so, such as
        `MahalanobisAD`, knows no colours before that.
        All or nothing: a fit that fails or is interrupted leaves the detector as it was.

        Args:
            images: a folder (searched recursively, and refused where names in it say that it holds masks, flawed
                images or those of a test) or a file; an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); a tensor
                (1, H, W) or (3, H, W); a Pillow image, bytes or a file object; several of them: a list, a generator,
                a fourth axis in front, a column of paths; a data set of `load_dataset` (its training images), a torch
                Dataset or DataLoader.
            y: without effect; scikit-learn's pipelines and searches pass labels.
            progress: called with (stage, done, total or None); stages "features", in images, and then "coreset", in
                rows, or "model" where there is no coreset. What it raises ends the fit. True draws bars on stderr.
            on_error: "raise", or "skip" to leave out images that cannot be read or have another size than the first,
                list them in `skipped_` and warn once.
            channels: the order of colours in arrays and tensors, "rgb", or "bgr" as OpenCV has it; it is not stored.
            pages: "all" takes each page of a TIFF, GIF, APNG or WebP file as an image, whose path is `file.tif#2`;
                "first" the first of them, with a UserWarning of how many are left out. A Pillow image is the page that
                it is at, either way. It is not stored.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument is out of range, there is no image, one cannot be read, or the weights do not fit.
            OSError: a file cannot be opened.
            MemoryError: the features would not fit into memory; raised before they are allocated.
            ImportError: the backbone or index needs a package that is not installed.
        """
        check_on_error(on_error)
        with reporting(progress) as report, torch_call():
            parameters = find_white_level(
                self._checked(), images, on_error, channels=channels, pages=pages, flawless=True
            )
            source = open_source(images, channels=channels, pages=pages, flawless=True)
            extractor, settings = resolve_extractor(parameters, self.method, find_backbone(parameters, self.strides))
            call = Call(parameters["threads"], report)
            learner = self.method.learner(settings, call, source.count)
            stopwatch = Stopwatch()
            reader = Reader(extractor, parameters["batch_size"], stopwatch, on_error=on_error, progress=report)

            def take(features: NDArray[np.float32], images: int) -> None:
                with stopwatch(self.method.stage):
                    learner.append(features, images, extractor.layer_widths)

            read = reader.collect(take, source)
            with stopwatch(self.method.stage):
                learned = learner.finish(read.grid)
            self._adopt(learned, extractor, call, read, skipped=tuple(reader.skipped), stopwatch=stopwatch)
        return self

    def fit_features(self, features: FeatureSet, *, progress: Progress | bool | None = None) -> Self:
        """Learn the normal from features of images without anomalies, as `fit` does from the images themselves.

        Args:
            features: from `extract`, of a detector whose arguments and weights give the same features as this one's;
                or features of one's own. A detector that was fitted on those predicts by `predict_features` alone.
            progress: as in `fit`, without the stage "features".

        Raises:
            TypeError: `features` is no `FeatureSet`.
            ValueError: the features were extracted otherwise than this detector's arguments say.
            MemoryError: the fit would not fit into memory.
        """
        require_set(features)
        with reporting(progress) as report, torch_call():
            parameters = self._checked()
            extractor: FeatureExtractor | None = None
            if features.extraction is None:
                settings = own_settings(parameters, self.method, features)
            else:
                if parameters["white_level"] == AUTO:
                    parameters["white_level"] = features.extraction["white_level"]
                backbone = self._backbone_of(features, parameters)
                extractor, settings = resolve_extractor(parameters, self.method, backbone)
                check_extraction(features, extractor)
            stopwatch, call = Stopwatch(features.seconds), Call(parameters["threads"], report)
            with stopwatch(self.method.stage):
                learned = self.method.fit(features, settings, call)
            self._adopt(learned, extractor, call, features, skipped=features.skipped, stopwatch=stopwatch)
        return self

    # --- predicting -----------------------------------------------------------------------------------------

    def predict_features(self, features: FeatureSet, *, maps: bool = True) -> Prediction:
        """Score the images of a `FeatureSet`, as `predict` does the images themselves: the same scores and maps.

        Raises:
            NotFittedError: before `fit`.
            TypeError: `features` is no `FeatureSet`.
            ValueError: the features were extracted otherwise than those that the detector was fitted on.
        """
        fitted, maps = self._require_fitted(), flags(maps, "maps")
        fitted.require_scale()
        require_set(features)
        if features.extraction is not None:
            check_extraction(features, fitted.extractor)
        if features.image_size != fitted.description.image_size:
            raise ValueError(
                f"features must be of images of {fitted.description.image_size} (height, width) after resizing and "
                f"cropping, as the detector was fitted on; got {features.image_size}"
            )
        stopwatch = Stopwatch()
        scored: list[Scored] = []
        for start in range(0, len(features), CHUNK):
            images = slice(start, min(start + CHUNK, len(features)))
            rows = features.features[images.start * features.patches : images.stop * features.patches]
            with stopwatch("scoring"):
                unseen = None if features.unseen is None else features.unseen[images]
                hashes = None if features.image_hashes is None else features.image_hashes[images]
                scored.append(fitted.score(features.paths[images], rows, features.grid, unseen, hashes, maps=maps))
        self._spend(stopwatch.seconds)
        return fitted.prediction(scored, features.skipped, maps=maps)

    # --- files ----------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | bytes | IO[bytes],
        *,
        device: str | torch.device = "auto",
        weights: str | os.PathLike[str] | None = "default",
        backbone: torch.nn.Module | Callable[[torch.Tensor], Any] | Backbone | str | None = None,
        threads: int | None = None,
    ) -> Self:
        """Read what `save` wrote: the same predictions to the bit, given the same backbone on the same device.

        `path` is the file, its content as bytes, or a file object open in binary mode, which is read to its end.

        The file is checked before it is believed, and never runs code. The backbone is built from its name, or is
        `backbone`, which a model fitted with a network of the caller's own needs; its weights must have the stored
        hash (a plain callable has none and is taken on trust).

        Raises:
            ModelFileError: a ValueError that names the path and the reason.
            TypeError: `path` is nothing of these.
            FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be opened.
            ValueError, ImportError, RuntimeError: as `load_backbone`.
        """
        stored, description = read_description(path)
        if stored.method != cls.method.name:
            raise ModelFileError(
                path,
                f"it was saved by the method {stored.method!r}, {cls.__name__} loads {cls.method.name!r}; "
                "patchcore_rs.load(path) loads every method's",
            )
        return cls.restore(
            model_name(path), stored, description, device=device, weights=weights, backbone=backbone, threads=threads
        )

    # --- for subclasses and `load` of any method ------------------------------------------------------------

    def _checked(self) -> dict[str, Any]:
        """The constructor's arguments, checked."""
        return check(self.get_params(), self.method.name)

    @classmethod
    def restore(
        cls, path: str | os.PathLike[str], stored: ModelFile, description: Description, *, backbone: Any, **running: Any
    ) -> Self:
        """The detector of a file of its method that was read and checked; the rest are `load`'s arguments."""
        extractor: FeatureExtractor | None = None
        if backbone is None and not description.named and description.backbone:
            raise ModelFileError(path, f"it was fitted with a network of the caller's own; {description.remedy}")
        settings = asdict(description.settings)
        layers = settings.pop("layers")
        constructor: Callable[..., Self] = cls
        model = constructor(
            backbone=description.backbone or AUTO if backbone is None else backbone,
            layers=AUTO if isinstance(backbone, Backbone) or not layers else layers,
            **running,
            **settings,
        )
        if description.backbone:
            parameters = model._checked()
            try:
                loaded = find_backbone(parameters, cls.strides)
            except WeightsError as error:  # the file does not say whether its weights were the default ones
                raise WeightsError(f"{path}: {description.remedy}; where those were the default: {error}") from error
            try:
                description.check_backbone(loaded)
            except ValueError as error:
                raise ModelFileError(path, str(error)) from error
            extractor = build_extractor(loaded, description.settings, parameters, cls.method.view)
        threads: int | None = running["threads"]
        learned = cls.method.load(stored.arrays, description, threads)
        fitted = FittedMethod(description, learned, optional=stored.optional, extractor=extractor, threads=threads)
        model._learn(fitted, {})
        return model

    def _require_fitted(self) -> FittedMethod:
        return cast("FittedMethod", super()._require_fitted())

    def _reader(self, fitted: FittedMethod, progress: Progress | None, on_error: OnError) -> Reader:
        """A reader of images as the detector was fitted on."""
        if fitted.extractor is None:
            raise ValueError(
                f"this {type(self).__name__} was fitted on features of your own and has no backbone: call "
                "predict_features, or fit it on images"
            )
        warn_of_precision(fitted.description.precision, fitted.extractor)
        batch_size = check({"batch_size": self.batch_size}, self.method.name)["batch_size"]
        size = fitted.description.image_size
        return Reader(fitted.extractor, batch_size, Stopwatch(), on_error=on_error, progress=progress, image_size=size)

    # --- the rest is the shell's own ------------------------------------------------------------------------

    def _backbone_of(self, features: FeatureSet, parameters: dict[str, Any]) -> Backbone:
        """The backbone of the last `extract` where it made these features by the same arguments, else a new one."""
        key, backbone = self.__dict__.get("_extracted_by", (None, None))
        if backbone is not None and key == backbone_key(parameters) and backbone.weights_hash == features.weights_hash:
            return cast("Backbone", backbone)
        return find_backbone(parameters, self.strides)

    def _adopt(
        self,
        learned: Method,
        extractor: FeatureExtractor | None,
        call: Call,
        read: Collected | FeatureSet,
        *,
        skipped: tuple[tuple[str, str], ...],
        stopwatch: Stopwatch,
    ) -> None:
        """Take over what was learnt from the images that were read, with the map values of normal images."""
        description = Description(
            settings=learned.settings,
            backbone="" if extractor is None else extractor.backbone.name,
            named=isinstance(self.backbone, str) and extractor is not None,
            weights_hash="" if extractor is None else extractor.backbone.weights_hash,
            image_size=read.image_size,
            training=learned.training,
            unseen=warn_of_unseen(read.unseen),
            libraries={"patchcore-rs": __version__, **installed(*LIBRARIES)},
            precision=None if extractor is None else extractor.precision,
        )
        hashes = united_hashes(read.image_hashes, read.image_hashes)
        fitted = FittedMethod(description, learned, skipped, hashes, extractor, call.threads)
        with stopwatch(self.method.stage):
            fitted = fitted.describe(map_values=fitted.measure_maps())
        self._learn(fitted, stopwatch.seconds)

    def _score_images(
        self, fitted: Fitted, images: Any, reading: Reading, *, maps: bool = True, in_training: bool = False
    ) -> Iterator[Scored]:
        fitted = cast("FittedMethod", fitted)
        reader = self._reader(fitted, reading.progress, reading.on_error)
        reader.skipped = reading.skipped
        source = reading.open(images)
        if source.count != 0:
            yield from fitted.score_all(reader, "scores", source, maps=maps, in_training=in_training)
        self._spend(reader.stopwatch.seconds)
