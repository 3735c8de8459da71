"""From a detector's arguments to its feature extractor, and whether features are such as it would extract."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from patchcore_rs._text import counted
from patchcore_rs.backbones.backbone import Backbone
from patchcore_rs.backbones.host import difference
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.features.extractor import FeatureExtractor
from patchcore_rs.features.feature_set import FeatureSet
from patchcore_rs.images.levels import FULL, Levels, Peak
from patchcore_rs.images.pixels import to_pixels
from patchcore_rs.images.read_ahead import read_ahead
from patchcore_rs.images.sources import open_source
from patchcore_rs.model.profiles import PROFILES
from patchcore_rs.model.settings import AUTO, PatchCoreSettings, resolve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from patchcore_rs._types import Channels, OnError, Pages
    from patchcore_rs.detector.method import Method
    from patchcore_rs.features.extractor import View
    from patchcore_rs.model.settings import Settings


def find_backbone(parameters: dict[str, Any], strides: tuple[int, ...] | None = None) -> Backbone:
    """The backbone that checked parameters name or hold; raises what `load_backbone` does.

    Of a network that is called by its name, the layers of these `strides` where the parameters name none; None for the
    recommended ones.
    """
    backbone, layers = parameters["backbone"], parameters["layers"]
    if isinstance(backbone, str) and backbone == AUTO:
        backbone = PROFILES[parameters["profile"]].backbone
    layers = None if layers == AUTO else layers
    if layers is not None or not isinstance(backbone, str):
        strides = None
    return load_backbone(
        backbone, layers=layers, strides=strides, weights=parameters["weights"], device=parameters["device"]
    )


def backbone_key(parameters: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments that decide which network it is."""
    return tuple(parameters[name] for name in ("profile", "backbone", "layers", "weights", "device"))


def build_extractor(backbone: Backbone, settings: Settings, parameters: dict[str, Any], view: View) -> FeatureExtractor:
    """The way from an image to features that the settings describe, on the device and threads of the parameters."""
    patches: dict[str, Any] = {"embedding": "concat"}
    if isinstance(settings, PatchCoreSettings):
        patches = {"embedding": settings.embedding, "patch_size": settings.patch_size}
    return FeatureExtractor(
        backbone,
        resize=settings.resize,
        crop=settings.crop,
        device=parameters["device"],
        autocast=settings.autocast,
        antialias_tensor=settings.resampling == "tensor",
        round_floats=settings.round_floats,
        threads=parameters["threads"],
        mean=settings.mean,
        std=settings.std,
        levels=Levels.of(settings),
        view=view,
        **patches,
    )


def find_white_level(
    checked: dict[str, Any],
    images: Any,
    on_error: OnError = "raise",
    *,
    channels: Channels = "rgb",
    pages: Pages = "first",
    flawless: bool = False,
) -> dict[str, Any]:
    """Checked parameters with the white level of these training images, which are read for it, in place of "auto".

    `channels`, `pages` and `flawless` as for `open_source`, which refuses before anything is read.

    Raises:
        ValueError, OSError: an image cannot be read, or none a second time; or as `open_source`.
    """
    if checked["white_level"] != AUTO:
        return checked
    source = open_source(images, channels=channels, pages=pages, flawless=flawless)
    if source.once:
        raise ValueError(
            f'white_level="auto" must read the images twice; got {type(images).__name__}, which gives them once. Pass '
            "a list of them, or the level itself, 4095 for a camera of 12 bits"
        )
    peak = Peak()
    read = partial(to_pixels, normalised=True, levels=Levels(FULL, checked["value_range"], peak))
    skip = (lambda *_: None) if on_error == "skip" else None
    for _ in read_ahead(source.items, read, checked["threads"], ahead=0, on_failure=skip):
        pass
    return checked | {"white_level": peak.white_level}


def resolve_extractor(
    parameters: dict[str, Any], method: type[Method], backbone: Backbone
) -> tuple[FeatureExtractor, Settings]:
    """The extractor that checked parameters of a method describe with this backbone, and its settings resolved."""
    settings = resolve(parameters, backbone, method.name)
    return build_extractor(backbone, settings, parameters, method.view), settings


def own_settings(parameters: dict[str, Any], method: type[Method], features: FeatureSet) -> Settings:
    """The settings of a fit to features of the caller's own: there is no backbone, and images are of their size."""
    if parameters["white_level"] == AUTO:  # there is no image to take it from
        parameters = parameters | {"white_level": FULL}
    stand_in = Backbone("", lambda images: images, ())
    settings = replace(
        resolve(parameters | {"backbone": stand_in}, stand_in, method.name), resize=features.image_size, crop=None
    )
    if isinstance(settings, PatchCoreSettings):
        return replace(settings, embedding="concat", patch_size=1)
    return settings


def warn_of_unseen(shares: tuple[float, ...] | None) -> float | None:
    """The largest share of a training image that the crop cut off, with a UserWarning where that is something."""
    largest = max(shares) if shares else None
    if largest:
        warnings.warn(
            f"the crop cuts off up to {largest:.1%} of an image, and a defect there is never seen; to see the whole "
            'image choose the profile "inspect", or no crop and an exact (height, width) to resize to',
            stacklevel=5,
        )
    return largest


def warn_of_precision(fitted: Mapping[str, str] | None, extractor: FeatureExtractor) -> None:
    """UserWarning where torch computes in another precision than when a model was fitted, where that is known."""
    if found := difference(fitted, extractor.precision):
        warnings.warn(found, stacklevel=5)


def check_calibration(in_training: Sequence[NDArray[np.bool_] | None]) -> None:
    """Refuse images to calibrate on that were all trained on, warn of some; each (n,), None where that is not known."""
    known = [part for part in in_training if part is not None]
    if len(known) < len(in_training):
        warnings.warn(
            "whether images to calibrate on were trained on cannot be checked: the model keeps no hashes of its "
            "training images, as one of an older file, of another program or of features of your own",
            stacklevel=3,
        )
        return
    trained = np.concatenate(known)
    if trained.all():
        raise ValueError(
            f"normal_images must be images that were not trained on; got {counted(len(trained), 'image')}, all trained "
            "on: any other would score higher and be called anomalous. Calibrate on others"
        )
    if trained.any():
        warnings.warn(
            f"{trained.sum():,} of {counted(len(trained), 'image')} to calibrate on were trained on and score less "
            "than others do, so that more than the rate asked for will raise a false alarm: leave them out",
            stacklevel=3,
        )


def require_set(features: object) -> None:
    """TypeError for what is no `FeatureSet`."""
    if not isinstance(features, FeatureSet):
        raise TypeError(f"features must be a FeatureSet, as extract returns; got {type(features).__name__}")


def check_extraction(features: FeatureSet, extractor: FeatureExtractor | None) -> None:
    """ValueError naming the first choice in which the features differ from what the extractor would give."""
    if extractor is None:
        raise ValueError(
            "features were extracted by a backbone, and the detector was fitted on features of your own; pass such, "
            "without extraction="
        )
    backbone = extractor.backbone
    ours = {"backbone": backbone.name, "weights_sha256": backbone.weights_hash} | extractor.extraction
    theirs = {"backbone": features.backbone, "weights_sha256": features.weights_hash} | dict(features.extraction or {})
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"features must have been extracted with {name}={ours.get(name)!r:.80}; got {theirs.get(name)!r:.80}. "
                "Extract them with this detector's arguments"
            )
