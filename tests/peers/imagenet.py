"""The two networks with ImageNet weights that both programs are given, and generated images for them."""

import os

import numpy as np
import pytest
import torch

from benches.peers import networks
from patchcore_rs.backbones.backbone import IMAGENET_MEAN, IMAGENET_STD
from patchcore_rs.demo.synthetic import KINDS, render

LAYERS = {"lite0": ["blocks.4", "blocks.10"], "squeezenet": ["features.7", "features.12"]}
SIDE = 224


def network(name):
    """The network that is timed, with its weights; a test is skipped where SqueezeNet's are not at hand."""
    if name == "squeezenet" and not os.environ.get("PATCHCORE_BENCH_WEIGHTS"):
        pytest.skip("needs SqueezeNet's weights: PATCHCORE_BENCH_WEIGHTS=FILE")
    return networks.network(name)


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
