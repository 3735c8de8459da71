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
- A TIFF, GIF, APNG or WebP file may hold several pages, or frames of an animation. Of a path that names none the first
  is read, with a UserWarning of how many are left out; `file.tif#2` names the second, where no file is called so.
- 32-bit integer and floating-point samples are refused unless `Levels` says which value is white: no file does.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FunctionType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from patchcore_rs._checks import either, integers, sequences
from patchcore_rs._text import counted
from patchcore_rs.images.levels import FULL, Levels, deep_grey, is_deep_grey, to_8_bits, white_is_zero

# Pillow is imported where it is used: datasets.py needs only the suffixes.
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray
    from PIL import Image
    from PIL.ImageFile import ImageFile
    from PIL.PngImagePlugin import PngInfo

_IN_MEMORY = "bytes"  # what messages call a file that has no name
IMAGE_SUFFIXES: frozenset[str] = frozenset(
    ".png .jpg .jpeg .jpe .jfif .bmp .tif .tiff .webp .gif .pbm .pgm .ppm .pnm".split()  # noqa: SIM905 - easier to read
)

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")  # Pillow's PPM is PBM and PGM too
_PAGED = frozenset({"TIFF", "GIF", "PNG", "WEBP"})  # a JPEG's other pictures are previews of itself
_SCANNED = frozenset({"TIFF", "GIF"})  # whose pages are counted by going through the file
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
        raise ImageError(f"{_IN_MEMORY}: there are none; give the whole content of an image file")
    return _samples(_decode_stream(io.BytesIO(data), _IN_MEMORY), _IN_MEMORY, levels)


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
    path, page = split_page(name)
    with _open_file(path) as file, _decoding(name):
        image = _open_page(file, name, page)
        return image.height, image.width


def all_pages(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The paths of all pages of image files: `file.tif#1` and on where there are several, else the file's own.

    What cannot be read stays as it is, for whoever reads it to say so.
    """
    pages: list[Path] = []
    for path in paths:
        name, count = os.fspath(path), 1
        with suppress(Exception), _open_file(name) as file:  # of many types, as in _decoding
            count = _count_pages(file)
        pages += [Path(f"{name}#{page}") for page in range(1, count + 1)] if count > 1 else [Path(name)]
    return pages


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of an image file as `read_image` returns it, EXIF orientation applied; raises what that does."""
    width, height = decode(path).size
    return height, width


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
    """A page of an image file, decoded and turned upright; its `info` tells the `ORIENTATION` it had."""
    name = os.fspath(path)
    path, page = split_page(name)
    with _open_file(path) as file:
        return _decode_stream(file, name, page)


def split_page(name: str) -> tuple[str, int | None]:
    """The file, and which of its pages is meant: `file.tif#2`, where no file is called so; None where none is named."""
    path, mark, page = name.rpartition("#")
    named = mark and page.isascii() and page.isdecimal() and not os.path.lexists(name) and not os.path.isdir(path)
    return (path, int(page)) if named else (name, None)


def _count_pages(file: IO[bytes]) -> int:
    """How many pages an open file holds; raises what Pillow does where one of them is damaged."""
    image = _open_image(file)
    return int(getattr(image, "n_frames", 1)) if image.format in _PAGED else 1


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


def _decode_stream(file: IO[bytes], name: str, page: int | None = None) -> Image.Image:
    """A page in an open file, decoded and turned upright: the first unless named; `name` is for messages."""
    from PIL import ImageOps

    with _decoding(name):
        image = _open_page(file, name, page)
        deep_colour = image.mode in ("RGB", "RGBA") and any(";16" in str(tile[3]) for tile in image.tile)
        orientation = getattr(image, "tag_v2", {}).get(_EXIF_ORIENTATION)  # loading a TIFF turns it
        _load(image)
        image.info[_DEEP_COLOUR] = deep_colour
        image.info[ORIENTATION] = orientation or image.getexif().get(_EXIF_ORIENTATION)
        ImageOps.exif_transpose(image, in_place=True)
    if page is None and image.format in _PAGED:
        _warn_of_pages(image, file, name)
    return image


def _warn_of_pages(image: ImageFile, file: IO[bytes], name: str) -> None:
    """Say how many pages of a file are left out where the first, this image, was read."""
    count = 1
    with suppress(Exception):  # a later page is damaged, of which nobody has asked
        count = _count_pages(file) if image.format in _SCANNED else getattr(image, "n_frames", 1)
    if count > 1:
        left = "1 is" if count == 2 else f"{count - 1} are"
        remedy = (
            "each page of a file as an image" if name != _IN_MEMORY else "each page where the path of a file is given"
        )
        warnings.warn(
            f"{name}: the first of {count} pages is read, {left} left out; pages='all' takes {remedy}", stacklevel=4
        )


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


def _open_page(file: IO[bytes], name: str, page: int | None) -> ImageFile:
    """A page in an open file, not decoded yet: the first unless named."""
    count = 1 if page is None else _count_pages(file)
    image = _open_image(file)
    if page is not None:
        if not 1 <= page <= count:
            raise ImageError(
                f"{name}: the page after # must be one of the file, which has {counted(count, 'page')}; got {page}. "
                "Name another, or leave it out"
            )
        image.seek(page - 1)
    return image


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Whatever Pillow raises becomes an ImageError that names the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (MemoryError, ImageError):
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
