"""Ground truth: masks as files hold them, laid on their images, and whether a test set's can be what they say."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from patchcore_rs._checks import integers
from patchcore_rs.images.files import ImageError, decode, deep_grey, image_size, to_rgb
from patchcore_rs.images.levels import Levels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchcore_rs.images.datasets import Sample

_PLAIN = Levels()
_BLACK = (0, 0, 0)
_threshold = integers(0, 254)


def read_mask(path: str | os.PathLike[str], *, threshold: int = 127) -> NDArray[np.bool_]:
    """Read a ground-truth mask as (height, width) bool: True where any colour channel is > `threshold`.

    Samples are compared on the 8-bit scale whatever their depth; transparent pixels are not anomalous.

    Raises:
        ImageError: as `read_image`; and where the mask has marks but none above `threshold`, for class numbers such as
            0 and 1 would otherwise read as a mask without anomaly.
        OSError: the file cannot be opened.
    """
    threshold = _threshold(threshold, "threshold")
    image = decode(path)
    values, maximum = deep_grey(image, _PLAIN) or (
        to_rgb(image, path, _BLACK, _PLAIN).max(axis=2).astype(np.uint32),
        255,
    )
    mask: NDArray[np.bool_] = values * 255 > threshold * maximum
    if not mask.any() and values.any():
        raise ImageError(
            f"{os.fspath(path)}: the largest value of this mask is {values.max()} of {maximum}, and a pixel is "
            f"anomalous where it is > {threshold} on the scale to 255; save the mask as 0 and {maximum}"
        )
    return mask


def read_sample_mask(sample: Sample) -> NDArray[np.bool_]:
    """The (height, width) bool ground truth of a test image, in the image's own size; all False for a normal one.

    Raises:
        ValueError: an anomalous sample has no mask.
        ImageError: image or mask cannot be read, or their sizes differ.
    """
    size = image_size(sample.path)
    mask = np.zeros(size, dtype=np.bool_)
    if sample.label == 0:
        return mask
    if sample.mask is None:
        raise ValueError(f"{sample.path}: no ground truth; pixel metrics need a mask for every anomalous image")
    for file in sample.mask if isinstance(sample.mask, tuple) else (sample.mask,):
        part = read_mask(file, threshold=sample.mask_threshold)
        if part.shape != size:
            raise ImageError(
                f"{file}: the mask is {part.shape[0]} x {part.shape[1]} (height x width) and its image "
                f"{sample.path} is {size[0]} x {size[1]}; save the mask in the size of the image"
            )
        mask |= part
    return mask
