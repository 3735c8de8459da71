"""Small detectors and images that the tests of the detector share: a backbone without weights, stripes with flaws."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from patchcore_rs import PatchCore
from patchcore_rs.images.files import write_image


def pyramid(images):
    """Two layers of maps, 1/4 and 1/8 of the image: a backbone that needs no weights."""
    fine, coarse = functional.avg_pool2d(images, 4), functional.avg_pool2d(images, 8)
    return [torch.cat([fine, fine * fine], dim=1), coarse]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())


def normal(count, seed=0, size=32):
    """Noisy stripes, (count, size, size, 3) uint8."""
    rng = np.random.default_rng(seed)
    stripes = 120 + 40 * np.sin(np.arange(size) / 3)[None, None, :, None]
    return (stripes + rng.normal(0, 6, (count, size, size, 3))).clip(0, 255).astype(np.uint8)


def flawed(count, seed=9, size=32):
    images = normal(count, seed, size)
    images[:, 8:20, 4:16] = 250
    return images


def detector(**options):
    return PatchCore(**{"backbone": pyramid, "resize": None, "crop": None} | options)


def unlike():
    """Two detectors that differ in their backbones, coresets and the size at which they see an image."""
    return [detector(), detector(backbone=network(), layers=("1", "3"), resize=(48, 40), coreset=0.2)]


class Images(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.from_numpy(self.images[index].transpose(2, 0, 1).copy()), 0


def write_folder(folder, images):
    """The images as 0.png, 1.png, ... in a new folder."""
    folder.mkdir()
    for i, image in enumerate(images):
        write_image(folder / f"{i}.png", image)
    return folder


def same(first, second):
    np.testing.assert_array_equal(first.scores, second.scores)
    np.testing.assert_array_equal(first.maps, second.maps)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert first.threshold == second.threshold
