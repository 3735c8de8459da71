"""The pixels of an image in memory: arrays, tensors and Pillow images, checked and in one form."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from patchcore_rs.images.files import composite, from_pillow, geometry, read_encoded, read_samples
from patchcore_rs.images.levels import Levels, to_8_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image as PillowImage


# An image of any kind, and what it becomes first: (H, W, 3) uint8, or (3, H, W) float32.
Image = Union[str, os.PathLike[str], bytes, np.ndarray[Any, Any], Tensor, "PillowImage"]
Pixels = np.ndarray[Any, np.dtype[np.uint8]] | Tensor

_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA


_PLAIN = Levels()


def to_pixels(image: Any, *, normalised: bool = False, levels: Levels = _PLAIN) -> Pixels:
    """The pixels of an image in one of two forms: (H, W, 3) uint8 or (3, H, W) float32.

    Args:
        image: a path; an encoded image file as bytes; a Pillow image; or an array (H, W), (H, W, 1), (H, W, 3) or
            (H, W, 4), a tensor (1, H, W) or (3, H, W), each uint8, uint16 or floating point in [0, 1]. RGBA, four
            channels, is laid on white.
        normalised: floating-point values need only be finite.
        levels: what is white where samples have more than 8 bits. With a range of values, integers of another width
            than 8 or 16 bits and floating-point samples outside [0, 1] are taken too.

    Raises:
        TypeError: the image or its dtype is of another kind.
        ValueError: it has another shape, or values outside the range; a file cannot be read (`ImageError`).
        OSError: a file cannot be opened.
    """
    ranged = levels.value_range is not None  # and not applied yet
    if isinstance(image, str | os.PathLike):
        image, ranged = read_samples(image, levels), False
    elif isinstance(image, bytes):
        image, ranged = read_encoded(image, levels), False
    elif is_pillow(image):
        image, ranged = from_pillow(image, levels), False
    elif isinstance(image, Tensor):
        image = image.detach().cpu()
        check_shape(image)
        if image.is_floating_point():
            if not ranged:
                return _check_range(image.float().expand(3, -1, -1), normalised=normalised)
            image = image.double()  # numpy has no bfloat16
        image = image.permute(1, 2, 0).numpy()
    if not isinstance(image, np.ndarray) or np.ma.isMaskedArray(image):
        raise TypeError(
            "an image must be a path, bytes or a file object, a numpy array, a torch tensor or a Pillow image; "
            f"got {type(image).__name__}"
        )
    check_shape(image)
    if image.ndim == 2:
        image = image[:, :, None]
    if ranged and image.dtype.kind in "iuf" and (image.dtype.kind, image.dtype.itemsize) not in (("u", 1), ("u", 2)):
        image = np.concatenate([levels.to_floats(image[:, :, :3]), image[:, :, 3:]], axis=2)
    if image.shape[2] == 1:
        image = np.broadcast_to(image, (*image.shape[:2], 3))
    if image.dtype == np.uint8:
        return _opaque(image)
    if image.dtype.kind == "u" and image.dtype.itemsize == 2:
        return _opaque(to_8_bits(image, levels.white(image)))
    if image.dtype.kind == "f":
        with np.errstate(all="ignore"):  # tiny values are rounded, large ones refused below
            floats = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32).copy())
        if len(floats) == 3:
            return _check_range(floats, normalised=normalised)
        floats = _check_range(floats, normalised=False)
        return floats[:3] * floats[3:] + (1 - floats[3:])
    raise TypeError(
        f"an image must be uint8, uint16 or floating point in [0, 1]; got {image.dtype}. Convert it, "
        "image.astype(numpy.uint8) where it holds 0 to 255, or say which values are black and white by value_range"
    )


def image_hash(samples: NDArray[Any]) -> int:
    """The hash of an image's samples, their type and their shape, by which a model knows the image again.

    It is the first 64 bits of a SHA-256, as a signed number; channels that repeat one are left out. Model files keep
    it, so it never changes.
    """
    grey = samples.ndim == 3 and (samples.shape[2] == 1 or samples.strides[2] == 0)
    little = np.ascontiguousarray(samples[:, :, 0] if grey else samples, samples.dtype.newbyteorder("<"))
    digest = hashlib.sha256(f"{little.dtype.str} {little.shape}".encode("ascii"))
    digest.update(little.reshape(-1).view(np.uint8).data)
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def is_pillow(image: object) -> bool:
    """Whether it is a Pillow image, the item of many a torchvision Dataset; Pillow is not imported to find that out."""
    return any(base.__module__ == "PIL.Image" for base in type(image).__mro__)


def check_shape(image: NDArray[Any] | Tensor, *, batch: bool = False) -> None:
    """ValueError, with what mends it, unless the axes are those of one image, or of n where it is a `batch`.

    An array has its channels last: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), where a batch has all four axes. A tensor
    has them first: (1, H, W) or (3, H, W).
    """
    shape = tuple(image.shape)
    if isinstance(image, Tensor):
        fits = len(shape) == 3 + batch and shape[-3] in (1, 3)
        expected = "a tensor image must have shape (3, H, W) or (1, H, W)"
        if len(shape) > 2 and shape[-1] in _CHANNELS:
            remedy = "Move the channels first: tensor.movedim(-1, -3)"
        elif len(shape) < 4:
            remedy = "Give grey images an axis for their channel, tensor.unsqueeze(-3); of RGBA take tensor[:3]"
        else:
            remedy = "Give several images as a list, list(tensor)"
    else:
        fits = len(shape) == 3 + batch and shape[-1] in _CHANNELS
        fits |= len(shape) == 2 and not batch
        expected = "an array image must have shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), channels last"
        remedies = []
        if len(shape) > 2 and shape[-3] in _CHANNELS and shape[-1] not in _CHANNELS:
            remedies.append("Move the channels last: numpy.moveaxis(array, -3, -1)")
        if len(shape) == 3:
            remedies.append(
                "Give grey images as a list, list(array), or with an axis for their channel, array[..., None]"
            )
        elif len(shape) < 2:
            remedies.append("Give an encoded file as bytes, array.tobytes()")
        remedy = ". ".join(remedies or ["Give several images as a list, list(array)"])
    if not fits:
        raise ValueError(f"{expected}; got {shape}. {remedy}")


def _opaque(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) of (H, W, 3) or of RGBA, which is laid on white."""
    return composite(image) if image.shape[2] == 4 and image.size else np.ascontiguousarray(image[:, :, :3])


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
    """`resize_crop` of a (3, H, W) float32 tensor: its geometry and its checks."""
    before = (image.shape[1], image.shape[2])
    resized, (top, left), (rows, columns) = geometry(before, resize, crop)
    if resized != before:
        image = functional.interpolate(image[None], resized, mode="bilinear", align_corners=False, antialias=True)[0]
    return image[:, top : top + rows, left : left + columns]
