"""The two networks with ImageNet weights that both programs are given, and generated images for them."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from patchcore_rs.backbones.backbone import IMAGENET_MEAN, IMAGENET_STD
from patchcore_rs.backbones.efficientnet_lite import EfficientNetLite, default_weights_path, rename_weights
from patchcore_rs.backbones.weights import load_weights
from patchcore_rs.demo.synthetic import KINDS, render

LAYERS = {"lite0": ["blocks.4", "blocks.10"], "squeezenet": ["features.7", "features.12"]}
SIDE = 224


def network(name):
    """A network with its weights; a test is skipped where SqueezeNet's are not at hand."""
    if name == "lite0":
        module = EfficientNetLite()
        load_weights(module, default_weights_path("efficientnet_lite0"), rename=rename_weights)
        return module.eval()
    from torchvision import models

    if not os.environ.get("PATCHCORE_BENCH_WEIGHTS"):
        pytest.skip("needs SqueezeNet's weights: PATCHCORE_BENCH_WEIGHTS=FILE")
    weights = Path(os.environ["PATCHCORE_BENCH_WEIGHTS"])
    module = models.squeezenet1_1(weights=None)
    load_weights(module, next(weights.glob("squeezenet1_1*.pth")) if weights.is_dir() else weights)
    return module.eval()


GOOD = np.stack([render("cloth", index=i, size=SIDE)[0] for i in range(12)])
FLAWS = [kind.name for kind in KINDS if kind.surface == "cloth"]
TESTS = np.stack(
    [render("cloth", index=i, size=SIDE)[0] for i in range(20, 24)]
    + [render("cloth", flaw, size=SIDE)[0] for flaw in FLAWS]
)


def prepared(images):
    """Images as tensors, normalised as both programs do."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std
