"""From a detector's arguments to its feature extractor, and whether features are such as it would extract."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from patchcore_rs.backbones.backbone import Backbone
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.features.extractor import FeatureExtractor
from patchcore_rs.features.feature_set import FeatureSet
from patchcore_rs.model.profiles import PROFILES
from patchcore_rs.model.settings import AUTO, Settings, resolve

if TYPE_CHECKING:
    from patchcore_rs.features.extractor import View


def find_backbone(parameters: dict[str, Any]) -> Backbone:
    """The backbone that checked parameters name or hold; raises what `load_backbone` does."""
    backbone, layers = parameters["backbone"], parameters["layers"]
    if isinstance(backbone, str) and backbone == AUTO:
        backbone = PROFILES[parameters["profile"]].backbone
    layers = None if layers == AUTO else layers
    return load_backbone(backbone, layers=layers, weights=parameters["weights"], device=parameters["device"])


def build_extractor(backbone: Backbone, settings: Settings, parameters: dict[str, Any], view: View) -> FeatureExtractor:
    """The way from an image to features that the settings describe, on the device and threads of the parameters."""
    return FeatureExtractor(
        backbone,
        resize=settings.resize,
        crop=settings.crop,
        embedding=settings.embedding,
        patch_size=settings.patch_size,
        device=parameters["device"],
        autocast=settings.autocast,
        antialias_tensor=settings.resampling == "tensor",
        threads=parameters["threads"],
        mean=settings.mean,
        std=settings.std,
        view=view,
    )


def resolve_extractor(parameters: dict[str, Any], view: View, backbone: Backbone) -> tuple[FeatureExtractor, Settings]:
    """The extractor that checked parameters describe with this backbone, and the settings resolved with it."""
    settings = resolve(parameters, backbone)
    return build_extractor(backbone, settings, parameters, view), settings


def own_settings(parameters: dict[str, Any], features: FeatureSet) -> Settings:
    """The settings of a fit to features of the caller's own: there is no backbone, and images are of their size."""
    stand_in = Backbone("", lambda images: images, ())
    settings = resolve(parameters | {"backbone": stand_in}, stand_in)
    return replace(settings, resize=features.image_size, crop=None, embedding="concat", patch_size=1)


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
