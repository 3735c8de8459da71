"""What the tests of `reproduce` share: a tiny network under whatever name, and a data set of a few small images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from detectors import flawed, normal, write_folder
from torch import nn

from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.images.files import write_image

SIDE = 32
COUNTS = {"train/good": 4, "test/good": 2, "test/hole": 2}
STRIDES = {4: "1", 8: "2", 16: "3"}
PASSED = []  # images that a network was given


class Network(nn.Sequential):
    """Three layers without trained weights that count their images."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1))

    def forward(self, images):
        PASSED.append(len(images))
        return super().forward(images)


def tiny(name, *, layers=None, strides=None, weights="default", device="auto"):
    """A backbone for small images under whatever name, in place of one that needs weights."""
    torch.manual_seed(0)
    at = tuple(STRIDES[stride] for stride in strides or () if stride in STRIDES)
    backbone = load_backbone(Network(), layers=layers or at or ("1", "2"), device="cpu")
    return replace(backbone, name=name, resize=(SIDE, SIDE), crop=None)


def write_category(root, seed=0):
    for number, (name, count) in enumerate(COUNTS.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_folder(root / name, (flawed if "hole" in name else normal)(count, seed + number, SIDE))
    masks = root / "ground_truth" / "hole"
    masks.mkdir(parents=True)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[8:20, 4:16] = 255
    for index in range(COUNTS["test/hole"]):
        write_image(masks / f"{index}_mask.png", mask)
    return root
