"""The pixels of an image: arrays, tensors and Pillow images, checked and in one form, and resized and cropped."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from patchcore_rs import _native
from patchcore_rs._checks import integer
from patchcore_rs.images.files import composite, from_pillow, read_encoded, read_image, read_samples
from patchcore_rs.images.levels import Levels, to_8_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image as PillowImage


# An image of any kind, and what it becomes first: (H, W, 3) uint8, or (3, H, W) float32.
Image = Union[str, os.PathLike[str], bytes, np.ndarray[Any, Any], Tensor, "PillowImage"]
Pixels = np.ndarray[Any, np.dtype[np.uint8]] | Tensor

_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
_SIDES = "an integer, a pair of integers (height, width) or None"


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
        if image.layout != torch.strided or image.is_meta:
            remedy = "Make it on another device" if image.is_meta else "Pass tensor.to_dense()"
            raise ValueError(
                f"a tensor image must be dense and hold its values; got {image.layout} on {image.device}. {remedy}"
            )
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


def to_uint8(image: Tensor) -> NDArray[np.uint8]:
    """(3, H, W) in [0, 1] rounded to (H, W, 3) of 8 bits: what `from_uint8` was given, where it came from there."""
    levels = (image * 255).round().clamp(0, 255).to(torch.uint8)
    pixels: NDArray[np.uint8] = levels.permute(1, 2, 0).contiguous().numpy()
    return pixels


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


def resize_crop(
    image: NDArray[np.uint8], resize: int | tuple[int, int] | None, crop: int | tuple[int, int] | None
) -> NDArray[np.uint8]:
    """Resize, then cut the centre out of, a (height, width, 3) uint8 image, as torchvision does with PIL images.

    Args:
        image: (height, width, 3) uint8.
        resize: an int is the new length of the shorter side (the longer one becomes int(resize * long / short)), a
            pair is the exact (height, width), None keeps the size. Bilinear with antialiasing: the bytes of Pillow
            13.0, whatever Pillow is installed.
        crop: an int cuts a square, a pair (height, width), None cuts nothing. What is cut off at the top is
            round((resized height - crop height) / 2), and at the left alike.

    Returns:
        (H, W, 3) uint8 that never aliases `image`.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the image has another shape or is smaller than the crop (torchvision pads with black there), a
            length is below 1, or the resized image would exceed Pillow's limit on pixels.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise TypeError(f"image must be uint8; got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must have shape (height, width, 3); got {image.shape}")
    return _native.resize(np.ascontiguousarray(image), *geometry(image.shape[:2], resize, crop))


def read_as_seen(
    path: str | os.PathLike[str],
    *,
    resize: int | tuple[int, int] | None,
    crop: int | tuple[int, int] | None,
    levels: Levels = _PLAIN,
) -> NDArray[np.uint8]:
    """An image file as a model with this geometry and these levels sees it: resized and cropped, (H, W, 3) uint8."""
    return resize_crop(read_image(path, levels=levels), resize, crop)


def crop_offset(size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
    """(top, left) of a crop (height, width) in the centre of an image of `size`, as torchvision has it."""
    return round((size[0] - crop[0]) / 2), round((size[1] - crop[1]) / 2)


class Geometry(NamedTuple):
    """What `resize_crop` makes of an image: its size after the resize, where in that the crop begins, and the crop's.

    (height, width) each.
    """

    resized: tuple[int, int]
    offset: tuple[int, int]
    crop: tuple[int, int]


def geometry(
    size: tuple[int, int], resize: int | tuple[int, int] | None, crop: int | tuple[int, int] | None
) -> Geometry:
    """The geometry of an image of `size` (height, width); arguments and errors are those of `resize_crop`."""
    from PIL import Image

    if 0 in size:
        raise ValueError(f"image must hold at least one pixel; got {size[0]} x {size[1]} (height x width)")
    resized = _resized(size, resize)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and resized[0] * resized[1] > max(limit, size[0] * size[1]):
        raise ValueError(
            f"resize={resize!r} makes {resized[0]} x {resized[1]} pixels of a {size[0]} x {size[1]} image, more than "
            f"the limit of {limit} (PIL.Image.MAX_IMAGE_PIXELS); crop the image first or give resize as (height, width)"
        )
    cropped = resized if crop is None else _pair("crop", crop)
    if cropped[0] > resized[0] or cropped[1] > resized[1]:
        raise ValueError(
            f"image is {resized[0]} x {resized[1]} (height x width) where it is cropped, and crop={crop!r} needs at "
            f"least {cropped[0]} x {cropped[1]}; use larger images, a larger resize or a smaller crop"
        )
    return Geometry(resized, crop_offset(resized, cropped), cropped)


def unseen_share(
    size: tuple[int, int], resize: int | tuple[int, int] | None, crop: int | tuple[int, int] | None
) -> float:
    """The share of the area of an image of `size` (height, width) that `resize_crop` cuts off, 0 to below 1."""
    (height, width), _, (rows, columns) = geometry(size, resize, crop)
    return 1.0 - rows * columns / (height * width)


def resize_crop_mask(
    mask: NDArray[np.bool_], resize: int | tuple[int, int] | None, crop: int | tuple[int, int] | None
) -> NDArray[np.bool_]:
    """Resize and crop a (height, width) bool mask with the geometry of `resize_crop`, whose errors are raised here too.

    The nearest neighbour is taken.
    """
    mask = np.asarray(mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be bool; got {mask.dtype}. read_mask returns one, or compare: mask > 127")
    if mask.ndim != 2:
        raise ValueError(f"mask must have shape (height, width); got {mask.shape}")
    from PIL import Image

    (height, width), (top, left), (rows, columns) = geometry(mask.shape, resize, crop)
    if (height, width) != mask.shape:
        picture = Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
        mask = np.asarray(picture).astype(np.bool_)
    cropped: NDArray[np.bool_] = mask[top : top + rows, left : left + columns].copy()
    return cropped


def resize_crop_tensor(
    image: Tensor, resize: int | tuple[int, int] | None, crop: int | tuple[int, int] | None
) -> Tensor:
    """`resize_crop` of a (3, H, W) float32 tensor: its geometry and its checks."""
    before = (image.shape[1], image.shape[2])
    resized, (top, left), (rows, columns) = geometry(before, resize, crop)
    if resized != before:
        image = functional.interpolate(image[None], resized, mode="bilinear", align_corners=False, antialias=True)[0]
    return image[:, top : top + rows, left : left + columns]


def _resized(shape: tuple[int, ...], resize: int | tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) after the resize."""
    height, width = shape
    if resize is None:
        return height, width
    if isinstance(resize, (tuple, list)):
        return _pair("resize", resize)
    short = integer(resize, "resize", minimum=1, expected=_SIDES)
    long = int(short * max(height, width) / min(height, width))
    return (long, short) if width <= height else (short, long)


def _pair(name: str, value: Any) -> tuple[int, int]:
    """(height, width) of a pair, or of one int that stands for both."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} must be {_SIDES}; got {value!r:.80}")
        height, width = (integer(side, name, minimum=1, expected=_SIDES) for side in value)
        return height, width
    side = integer(value, name, minimum=1, expected=_SIDES)
    return side, side
