"""The networks that both peers are timed on, with their ImageNet weights, and how images are prepared for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchcore_rs.backbones.efficientnet_lite import EfficientNetLite, default_weights_path, rename_weights
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.backbones.weights import load_weights
from patchcore_rs.features.extractor import FeatureExtractor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

LAYERS = {"lite0": ("blocks.4", "blocks.10", "blocks.14"), "squeezenet": ("features.7", "features.12")}


def network(name: str) -> nn.Module:
    """The network with its ImageNet weights, as its authors' code runs it."""
    if name == "lite0":
        module: nn.Module = EfficientNetLite()
        load_weights(module, default_weights_path("efficientnet_lite0"), rename=rename_weights)
        return module.eval()
    from torchvision import models  # type: ignore[import-untyped]

    folder = Path(os.environ["PATCHCORE_BENCH_WEIGHTS"])
    module = models.squeezenet1_1(weights=None)
    load_weights(module, next(folder.glob("squeezenet1_1*.pth")) if folder.is_dir() else folder)
    return module.eval()


def prepare(name: str) -> Callable[[Any], Tensor]:
    """An image, as a path or an array, to what the network takes, (1, 3, 224, 224)."""
    backbone = load_backbone("efficientnet_lite0" if name == "lite0" else "squeezenet1_1", weights=None)
    extractor = FeatureExtractor(backbone, resize=backbone.resize, crop=backbone.crop, embedding="concat")
    return lambda image: extractor.prepare(image)[None]
