"""The pixels of an image in memory: arrays, tensors and Pillow images, checked and in one form."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from patchcore_rs.images.files import read_image, resize_crop_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray


# An image of any kind, and what it becomes first: (H, W, 3) uint8, or (3, H, W) float32.
Image = str | os.PathLike[str] | np.ndarray[Any, Any] | Tensor
Pixels = np.ndarray[Any, np.dtype[np.uint8]] | Tensor


def to_pixels(image: Any, *, normalised: bool = False) -> Pixels:
    """The pixels of an image in one of two forms: (H, W, 3) uint8 or (3, H, W) float32.

    Args:
        image: a path; an array (H, W), (H, W, 1) or (H, W, 3), a tensor (1, H, W) or (3, H, W), each uint8 or floating
            point in [0, 1], arrays also uint16; or a Pillow image of mode L, RGB or I;16.
        normalised: floating-point values need only be finite.

    Raises:
        TypeError: the image or its dtype is of another kind.
        ValueError: it has another shape, or values outside the range; a file cannot be read (`ImageError`).
        OSError: a file cannot be opened.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(
                f"a tensor image must have shape (3, H, W) or (1, H, W); got {tuple(image.shape)}. "
                "An array may have its channels last"
            )
        if image.is_floating_point():
            return _check_range(image.float().expand(3, -1, -1), normalised=normalised)
        image = image.permute(1, 2, 0).numpy()
    elif hasattr(image, "getbands") and image.mode in ("L", "RGB", "I;16"):
        image = np.asarray(image)  # a Pillow image, the item of many a torchvision Dataset
    if not isinstance(image, np.ndarray) or np.ma.isMaskedArray(image):
        raise TypeError(
            f"an image must be a path, a numpy array, a torch tensor, or a Pillow image of mode L, RGB or I;16; "
            f"got {type(image).__name__}"
        )
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"an array image must have shape (H, W) or (H, W, 3), channels last; got {image.shape}")
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if image.dtype.kind == "u" and image.dtype.itemsize == 2:
        # 65535 is white, by the rounding that files get.
        eight_bit: NDArray[np.uint8] = ((image.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return eight_bit
    if image.dtype.kind == "f":
        floats = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32).copy())
        return _check_range(floats, normalised=normalised)
    raise TypeError(f"an image must be uint8, uint16 or floating point in [0, 1]; got {image.dtype}")


def from_uint8(pixels: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) pixels as a (3, H, W) float32 tensor in [0, 1]."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 255


def _check_range(image: Tensor, *, normalised: bool) -> Tensor:
    if image.numel() == 0:
        raise ValueError(f"an image must hold at least one pixel; got shape {tuple(image.shape)}")
    low, high = (float(value) for value in torch.aminmax(image))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("a floating-point image must be finite; got NaN or infinity")
    if not normalised and (low < -1e-6 or high > 1 + 1e-6):
        raise ValueError(
            f"a floating-point image must lie in [0, 1]; got [{low:g}, {high:g}]. Scale it, or pass mean=0, std=1 "
            "where it is normalised already"
        )
    return image


def resize_crop_tensor(
    image: Tensor, resize: int | tuple[int, int] | None, crop: int | tuple[int, int] | None
) -> Tensor:
    """`resize_crop` of a (3, H, W) float32 tensor: its geometry and its checks, asked of a blank mask."""
    resized = resize_crop_mask(np.zeros(image.shape[1:], dtype=np.bool_), resize, None)
    height, width = resized.shape
    rows, columns = resize_crop_mask(resized, None, crop).shape
    if resized.shape != image.shape[1:]:
        image = functional.interpolate(
            image[None], (height, width), mode="bilinear", align_corners=False, antialias=True
        )[0]
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    return image[:, top : top + rows, left : left + columns]
