"""Image files in, uint8 arrays out, and back: the only module that opens or writes image files.

Files come from strangers, so the formats are an allow-list (PNG, JPEG, BMP, TIFF, WebP, GIF, PBM, PGM, PPM), Pillow's
decompression bomb limit stays on, and whatever a decoder raises on a damaged file becomes an `ImageError` that names
the file.

What a file becomes, always (height, width, 3) RGB:

- EXIF orientation is applied.
- Grey deeper than 8 bits is scaled by its bit depth, not clipped: 0 stays 0, the largest value the depth can hold
  becomes 255, or a lower one that `Levels` says is white. 16 bits a channel colour keeps its high byte, and is refused
  where another white is said.
- Transparency (alpha channel or transparent palette entry) is composited on a background colour.
- 1-bit, palette, CMYK and YCbCr are converted by Pillow, without colour profiles; of a Pillow image in memory HSV, LAB
  and premultiplied alpha too.
- Of an animation or a multi-page file the first frame is read.
- 32-bit integer and floating-point samples are refused unless `Levels` says which value is white: no file does.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from contextlib import contextmanager
from types import FunctionType
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from patchcore_rs._checks import either, integer, integers, sequences
from patchcore_rs.images.levels import FULL, Levels, deep_grey, is_deep_grey, to_8_bits, white_is_zero

# Pillow is imported where it is used: datasets.py needs only the suffixes.
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray
    from PIL import Image
    from PIL.ImageFile import ImageFile
    from PIL.PngImagePlugin import PngInfo

IMAGE_SUFFIXES: frozenset[str] = frozenset(
    ".png .jpg .jpeg .jpe .jfif .bmp .tif .tiff .webp .gif .pbm .pgm .ppm .pnm".split()  # noqa: SIM905 - easier to read
)

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")  # Pillow's PPM is PBM and PGM too
_KINDS = "PNG, JPEG, BMP, TIFF, WebP, GIF, PBM, PGM or PPM"
_ALPHA_MODES = frozenset({"LA", "PA", "RGBA"})
_MODES = _ALPHA_MODES | {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"}
# Modes that no file of those formats has, and what keeps all there is in them.
_MODES_IN_MEMORY = {"RGBa": "RGBA", "La": "LA", "HSV": "RGB", "LAB": "RGB"}
_EXIF_ORIENTATION = 274
# Entries of an image's info.
_DEEP_COLOUR = "patchcore_rs: 16-bit colour"
ORIENTATION = "patchcore_rs: EXIF orientation"  # as the file states it, None where it states none
_TIFF_BEGINS = (b"II*\0", b"MM\0*")

_WHITE = (255, 255, 255)
_PLAIN = Levels()
_COLOUR = "three integers from 0 to 255"
_SIDES = "an integer, a pair of integers (height, width) or None"
_colour = either(sequences(integers(0, 255), 3, _COLOUR), expected=_COLOUR)


class ImageError(ValueError):
    """An image file that cannot be read; the message names the file, the reason and what to do."""


def read_image(
    path: str | os.PathLike[str], *, background: tuple[int, int, int] = _WHITE, levels: Levels = _PLAIN
) -> NDArray[np.uint8]:
    """Read an image file as (height, width, 3) uint8 RGB.

    Args:
        path: the file.
        background: the RGB colour, 0 to 255, that shows through transparent pixels.
        levels: what is white where samples have more than 8 bits.

    Raises:
        ImageError: the file is no image of the kinds above, is damaged, is larger than Pillow's
            decompression bomb limit or holds samples of unknown range. It is a ValueError.
        OSError: the file cannot be opened: `FileNotFoundError`, `IsADirectoryError` or `PermissionError`.
    """
    background = _colour(background, "background")
    image = decode(path)
    floats = _ranged(image, path, levels)
    if floats is None:
        return to_rgb(image, path, background, levels)
    return np.repeat(np.rint(floats * 255).astype(np.uint8)[:, :, None], 3, axis=2)


def read_samples(path: str | os.PathLike[str], levels: Levels) -> NDArray[np.uint8] | NDArray[np.float32]:
    """As `read_image`, but for 32-bit and floating-point samples (height, width) float32 in [0, 1]."""
    return _samples(decode(path), path, levels)


def read_encoded(data: bytes, levels: Levels) -> NDArray[np.uint8] | NDArray[np.float32]:
    """The image that an encoded file in memory holds, as `read_samples` reads it from disk; raises its `ImageError`."""
    if not data:
        raise ImageError("bytes: there are none; give the whole content of an image file")
    return _samples(_decode_stream(io.BytesIO(data), "bytes"), "bytes", levels)


def from_pillow(image: Image.Image, levels: Levels) -> NDArray[np.uint8] | NDArray[np.float32]:
    """A Pillow image of any mode as `read_samples` reads it from a file; it is not changed.

    Raises:
        ImageError: the image cannot be decoded, or holds samples of unknown range.
    """
    from PIL import ImageOps

    name = "Pillow image"
    try:
        _load(image)
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode in _MODES_IN_MEMORY:
            image = image.convert(_MODES_IN_MEMORY[image.mode])
    except MemoryError:
        raise
    except Exception as error:  # it may be lazy and its file damaged
        raise ImageError(f"{name}: cannot be decoded ({error}); replace it or leave it out") from error
    return _samples(image, name, levels)


def composite(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(height, width, 4) RGBA laid on white, as files are: (height, width, 3)."""
    from PIL import Image

    return to_rgb(Image.fromarray(np.ascontiguousarray(image)), "RGBA", _WHITE, _PLAIN)


def check_header(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Open an image file without decoding it, in a hundredth of the time; raises what `read_image` does for a header.

    Pixels that are damaged or missing further on stay unseen. Returns (height, width) as stored, before any turn.
    """
    name = os.fspath(path)
    with _open_file(name) as file, _decoding(name):
        image = _open_image(file)
        return image.height, image.width


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of an image file as `read_image` returns it, EXIF orientation applied; raises what that does."""
    width, height = decode(path).size
    return height, width


def resize_crop(
    image: NDArray[np.uint8], resize: int | tuple[int, int] | None, crop: int | tuple[int, int] | None
) -> NDArray[np.uint8]:
    """Resize, then cut the centre out of, a (height, width, 3) uint8 image, as torchvision does with PIL images.

    Args:
        image: (height, width, 3) uint8.
        resize: an int is the new length of the shorter side (the longer one becomes int(resize * long / short)), a
            pair is the exact (height, width), None keeps the size. Bilinear with Pillow's antialiasing.
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
    return _resize_crop(image, resize, crop, "BILINEAR")


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
    return _resize_crop(mask.astype(np.uint8), resize, crop, "NEAREST").astype(np.bool_)


def write_image(path: str | os.PathLike[str], array: NDArray[np.uint8], text: Mapping[str, str] | None = None) -> None:
    """Write a (height, width) grey or (height, width, 3) RGB uint8 array as a PNG file; `path` ends in .png.

    `text` is stored beside the pixels, in Latin-1: keywords of up to 79 characters, and what they say.

    Raises:
        TypeError: the array is not uint8.
        ValueError: it has another shape or no pixel, or the path another suffix.
        OSError: the file cannot be written.
    """
    from PIL import Image

    array = np.asarray(array)
    if os.path.splitext(path)[1].lower() != ".png":
        raise ValueError(f"path must end in .png, the one format written; got {os.fspath(path)!r}")
    if array.dtype != np.uint8:
        raise TypeError(f"array must be uint8; got {array.dtype}. Scale it to 0..255 first")
    if array.size == 0 or (array.ndim != 2 and (array.ndim != 3 or array.shape[2] != 3)):
        raise ValueError(
            f"array must have shape (height, width) or (height, width, 3) and no 0 in it; got {array.shape}"
        )
    Image.fromarray(np.ascontiguousarray(array)).save(path, format="PNG", pnginfo=_png_text(text))


def write_grey16(
    path: str | os.PathLike[str], array: NDArray[np.uint16], text: Mapping[str, str] | None = None
) -> None:
    """Write a (height, width) uint16 array as a 16-bit grey PNG file, with `text` as `write_image` does.

    Raises:
        OSError: the file cannot be written.
    """
    from PIL import Image

    Image.fromarray(np.ascontiguousarray(array)).save(path, format="PNG", pnginfo=_png_text(text))


def _png_text(text: Mapping[str, str] | None) -> PngInfo | None:
    """The tEXt chunks of a PNG file."""
    from PIL.PngImagePlugin import PngInfo

    if not text:
        return None
    chunks = PngInfo()
    for keyword, said in text.items():
        chunks.add_text(keyword, said)
    return chunks


def encode_webp(image: NDArray[np.uint8], *, side: int, quality: int) -> bytes:
    """The (height, width, 3) image as a WebP file, shrunk until its longer side has at most `side` pixels."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=quality)
    return buffer.getvalue()


def decode(path: str | os.PathLike[str]) -> Image.Image:
    """The first frame of an image file, decoded and turned upright; its `info` tells the `ORIENTATION` it had."""
    name = os.fspath(path)
    with _open_file(name) as file:
        return _decode_stream(file, name)


def _open_file(name: str) -> IO[bytes]:
    """A file that holds something, open for reading."""
    status = os.stat(name)
    if stat.S_ISDIR(status.st_mode):
        hint = "expected an image file; got a folder (find_images lists the images in it)"
        raise IsADirectoryError(errno.EISDIR, hint, name)
    # A pipe or device would block or never end.
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name}: not a regular file; give the path of an image file")
    if status.st_size == 0:
        raise ImageError(f"{name}: the file is empty; replace it or leave it out")
    return open(name, "rb")


def _decode_stream(file: IO[bytes], name: str) -> Image.Image:
    """The first frame in an open file, decoded and turned upright; `name` is for messages."""
    from PIL import ImageOps

    with _decoding(name):
        image = _open_image(file)
        deep_colour = image.mode in ("RGB", "RGBA") and any(";16" in str(tile[3]) for tile in image.tile)
        orientation = getattr(image, "tag_v2", {}).get(_EXIF_ORIENTATION)  # loading a TIFF turns it
        _load(image)
        image.info[_DEEP_COLOUR] = deep_colour
        image.info[ORIENTATION] = orientation or image.getexif().get(_EXIF_ORIENTATION)
        ImageOps.exif_transpose(image, in_place=True)
        return image


def _load(image: Any) -> None:
    """Decode a Pillow image, or raise where its data are broken or end early.

    Where the process has set `LOAD_TRUNCATED_IMAGES`, Pillow would not; the setting stays, it is all threads'.
    """
    from PIL import ImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.TiffImagePlugin import TiffImageFile

    load: Any = ImageFile.ImageFile.load
    tiles = getattr(image, "tile", ())
    asks, jpeg = type(image).load in (load, TiffImageFile.load), isinstance(image, JpegImageFile)
    if not (ImageFile.LOAD_TRUNCATED_IMAGES and asks and tiles and tiles[0][0] != "libtiff"):
        image.load()
        return
    if jpeg:
        image.load_read = image.fp.read  # its own ends a file that has no end
    FunctionType(load.__code__, vars(ImageFile) | {"LOAD_TRUNCATED_IMAGES": False}, closure=load.__closure__)(image)


def _open_image(file: IO[bytes]) -> ImageFile:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        if file.read(4) in _TIFF_BEGINS:
            raise ValueError("a TIFF whose samples Pillow does not read; save it with 8, 16 or 32 bits") from None
        raise


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Whatever Pillow raises becomes an ImageError that names the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not a {_KINDS} image, or its header is damaged; replace it or leave it out"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: {error} Scale the image down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except Exception as error:  # decoders raise many types on damaged files: SyntaxError, struct.error, IndexError, ...
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ImageError(f"{name}: cannot be decoded ({error}); replace the file or leave it out") from error


def _samples(
    image: Image.Image, path: str | os.PathLike[str], levels: Levels
) -> NDArray[np.uint8] | NDArray[np.float32]:
    floats = _ranged(image, path, levels)
    return to_rgb(image, path, _WHITE, levels) if floats is None else floats


def _ranged(image: Image.Image, path: str | os.PathLike[str], levels: Levels) -> NDArray[np.float32] | None:
    """Samples of unknown range in [0, 1] where the levels say it; None for other images."""
    if levels.value_range is None or image.mode not in ("I", "F") or is_deep_grey(image):
        return None
    try:
        floats = levels.to_floats(np.asarray(image))
    except ValueError as error:
        raise ImageError(f"{os.fspath(path)}: {error}") from error
    # Pillow inverts white-is-zero TIFF only up to 8 bits.
    return 1 - floats if white_is_zero(image) else floats


def to_rgb(
    image: Image.Image, path: str | os.PathLike[str], background: tuple[int, int, int], levels: Levels
) -> NDArray[np.uint8]:
    """The samples of a decoded image as (height, width, 3) uint8; `path` is for messages."""
    from PIL import Image

    deep = deep_grey(image, levels)
    if deep is not None:
        rgb = np.repeat(to_8_bits(*deep)[:, :, None], 3, axis=2)
        if "transparency" in image.info:
            rgb[np.asarray(image) == image.info["transparency"]] = background
        return rgb
    if levels.white_level != FULL and image.info.get(_DEEP_COLOUR):
        raise ImageError(
            f"{os.fspath(path)}: 16-bit colour keeps its high byte, so white_level={levels.white_level} cannot hold "
            "for it; save it as 16-bit grey or as 8-bit colour"
        )
    if image.mode not in _MODES:
        reason = (
            "its 32-bit or signed samples have no stated range; save it as 8-bit or unsigned 16-bit grey, or say "
            "which samples are black and white: value_range=(low, high)"
            if image.mode in ("I", "F")
            else "this colour mode is not supported; save it as RGB"
        )
        raise ImageError(f"{os.fspath(path)}: mode {image.mode}: {reason}")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _resize_crop(
    array: NDArray[np.uint8],
    resize: int | tuple[int, int] | None,
    crop: int | tuple[int, int] | None,
    resampling: str,
) -> NDArray[np.uint8]:
    from PIL import Image

    (height, width), (top, left), (rows, columns) = geometry(array.shape[:2], resize, crop)
    if (height, width) != array.shape[:2]:
        array = np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling[resampling]))
    cropped: NDArray[np.uint8] = array[top : top + rows, left : left + columns].copy()
    return cropped


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
