"""The data of the scenarios, seeded.

Generated features resemble a backbone's in what matters to exact search: few directions carry the variance (that
of direction i falls as 1 / i), a patch lies near what its position shows on every image, images differ as a whole,
and values are rectified. Uncorrelated noise would be the wrong test: nothing can be skipped there, and nobody
inspects it.

The features of images are EfficientNet-Lite0's own, of the pictures that the demo generates.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from patchcore_rs.backbones import load_backbone
from patchcore_rs.features import FeatureExtractor
from patchcore_rs.synthetic import render

Array = NDArray[np.float32]

_DIRECTIONS = 96


@cache
def generated(rows: int, width: int, patches: int, seed: int) -> Array:
    """(rows, width) patch features of as many images of `patches` positions as that takes.

    Sets of one width show the same product, so one seed serves as queries to the bank of another.
    """
    product = np.random.default_rng(width)
    mixing = product.normal(size=(_DIRECTIONS, width)) / np.sqrt(np.arange(1, _DIRECTIONS + 1))[:, None]
    positions = product.normal(size=(24, _DIRECTIONS))[product.integers(24, size=patches)]
    rng = np.random.default_rng((seed, width))
    images = -(-rows // patches)
    latent = (
        positions[None]
        + 0.3 * rng.normal(size=(images, 1, _DIRECTIONS))
        + 0.5 * rng.normal(size=(images, patches, _DIRECTIONS))
    ).reshape(-1, _DIRECTIONS)[:rows]
    values = latent @ mixing + 0.05 * rng.normal(size=(rows, width))
    return np.maximum(values, 0).astype(np.float32)


@cache
def of_images(images: int, split: str) -> Array:
    """(images * 784, 344) EfficientNet-Lite0 features of generated cloth."""
    backbone = load_backbone("efficientnet_lite0")
    extractor = FeatureExtractor(backbone, resize=backbone.resize, crop=backbone.crop, embedding="concat")
    parts = []
    for first in range(0, images, 8):
        pictures = [render("cloth", index=i, split=split)[0] for i in range(first, min(first + 8, images))]
        parts.append(extractor.extract(torch.stack([extractor.prepare(picture) for picture in pictures]))[0])
    return np.concatenate(parts)


def normal(shape: tuple[int, ...], seed: int) -> Array:
    """Rectified normal values: maps of a backbone, or patch scores, whose values no kernel looks at."""
    return np.maximum(np.random.default_rng(seed).normal(size=shape), 0).astype(np.float32)
