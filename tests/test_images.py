"""Image files of every mode and depth become the same array; files that cannot be read are refused by name."""

from __future__ import annotations

import os
import pickle
import stat
import struct
import warnings
import zlib
from typing import TYPE_CHECKING

import numpy as np
import PIL
import pytest
from PIL import Image

from patchcore_rs.images.files import (
    IMAGE_SUFFIXES,
    ImageError,
    check_header,
    image_size,
    read_image,
    write_image,
)
from patchcore_rs.images.masks import read_mask
from patchcore_rs.images.pixels import resize_crop, resize_crop_mask

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]
RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
RAMP_8_BIT = np.round(RAMP / 257).astype(np.uint8)


def grey_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def tiff(path: Path, samples: bytes, *, width: int, bits: int, photometric: int = 1, signed: bool = False) -> Path:
    """A one-row grey little-endian TIFF of a depth Pillow cannot write."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 1, 279: len(samples)}
    tags[339] = 2 if signed else 1
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + samples)
    return path


# Reading: modes and depths


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_suffix_is_read_as_rgb(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == ".webp" else {}
    image = read_image(save(tmp_path / f"image{suffix}", RGB, **options))
    assert image.shape == (6, 9, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    if suffix not in (".jpg", ".jpeg", ".jpe", ".jfif", ".pbm", ".pgm"):
        np.testing.assert_array_equal(image, RGB)


@pytest.mark.parametrize(("dtype", "suffix"), [("<u2", ".png"), ("<u2", ".tif"), (">u2", ".tif")])
def test_a_16_bit_ramp_keeps_256_levels(tmp_path: Path, dtype: str, suffix: str) -> None:
    mode = "I;16B" if dtype == ">u2" else "I;16"
    Image.frombytes(mode, (256, 256), RAMP.astype(dtype).tobytes()).save(tmp_path / f"ramp{suffix}")
    image = read_image(tmp_path / f"ramp{suffix}")
    assert len(np.unique(image)) == 256
    np.testing.assert_array_equal(image, grey_rgb(RAMP_8_BIT))


def test_12_bit_grey_is_scaled_by_its_own_depth(tmp_path: Path) -> None:
    # Two 12-bit samples in three bytes: 0x000, 0xFFF, 0x800, 0x400.
    path = tiff(tmp_path / "a.tif", bytes([0x00, 0x0F, 0xFF, 0x80, 0x04, 0x00]), width=4, bits=12)
    np.testing.assert_array_equal(read_image(path)[0, :, 0], [0, 255, 128, 64])


def test_white_is_zero_tiff_is_inverted_at_16_bits_as_at_8(tmp_path: Path) -> None:
    eight = tiff(tmp_path / "8.tif", bytes([0, 64, 255]), width=3, bits=8, photometric=0)
    sixteen = tiff(tmp_path / "16.tif", struct.pack("<3H", 0, 64 * 257, 65535), width=3, bits=16, photometric=0)
    np.testing.assert_array_equal(read_image(eight)[0, :, 0], [255, 191, 0])
    np.testing.assert_array_equal(read_image(sixteen), read_image(eight))


def test_grey_and_one_bit_images_become_three_equal_channels(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(save(tmp_path / "grey.png", GREY)), grey_rgb(GREY))
    one_bit = save(tmp_path / "one_bit.png", GREY > 127)
    np.testing.assert_array_equal(read_image(one_bit), grey_rgb(np.where(GREY > 127, 255, 0).astype(np.uint8)))


def test_palette_images_show_their_colours(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([1, 0])
    image.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), [[[200, 100, 50], [10, 20, 30]]])


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", ".jpg"), ("CMYK", ".tif"), ("YCbCr", ".jpg")])
def test_cmyk_and_ycbcr_are_converted(tmp_path: Path, mode: str, suffix: str) -> None:
    flat = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    image = read_image(save(tmp_path / f"image{suffix}", flat, mode))
    assert np.abs(image.astype(int) - flat).max() <= 4


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_alpha_is_composited_on_the_background(tmp_path: Path, suffix: str) -> None:
    rgba = np.array([[[10, 20, 30, 255], [0, 0, 0, 0], [255, 0, 0, 128]]], np.uint8)
    path = save(tmp_path / f"alpha{suffix}", rgba, **({"lossless": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(read_image(path), [[[10, 20, 30], [255, 255, 255], [255, 127, 127]]])
    on_blue = read_image(path, background=(0, 0, 255))
    np.testing.assert_array_equal(on_blue, [[[10, 20, 30], [0, 0, 255], [128, 0, 127]]])


def test_transparency_without_an_alpha_channel_is_composited(tmp_path: Path) -> None:
    colour_key = save(tmp_path / "rgb.png", np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8), transparency=(4, 5, 6))
    np.testing.assert_array_equal(read_image(colour_key)[0, 1], [255, 255, 255])
    grey_key = save(tmp_path / "grey.png", np.array([[7, 8]], np.uint8), transparency=8)
    np.testing.assert_array_equal(read_image(grey_key)[0, :, 0], [7, 255])
    deep_key = save(tmp_path / "deep.png", np.array([[0, 5]], np.uint16), transparency=5)
    np.testing.assert_array_equal(read_image(deep_key, background=(9, 8, 7)), [[[0, 0, 0], [9, 8, 7]]])
    grey_alpha = save(tmp_path / "la.png", np.array([[[40, 255], [40, 0]]], np.uint8))
    np.testing.assert_array_equal(read_image(grey_alpha)[0, :, 0], [40, 255])
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 10, 10, 20, 20, 20, 30, 30, 30])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "p.png", transparency=bytes([255, 0, 255]))
    np.testing.assert_array_equal(read_image(tmp_path / "p.png")[0, :, 0], [10, 255, 30])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda stored: stored),
        (2, lambda stored: stored[:, ::-1]),
        (3, lambda stored: stored[::-1, ::-1]),
        (4, lambda stored: stored[::-1]),
        (5, lambda stored: stored.swapaxes(0, 1)),
        (6, lambda stored: stored.swapaxes(0, 1)[:, ::-1]),
        (7, lambda stored: stored[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda stored: stored.swapaxes(0, 1)[::-1]),
    ],
)
def test_exif_orientation_is_applied(
    tmp_path: Path, suffix: str, orientation: int, upright: Callable[[np.ndarray], np.ndarray]
) -> None:
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"turned{suffix}", stored, exif=exif)
    expected = upright(stored)
    assert image_size(path) == expected.shape[:2]
    np.testing.assert_array_equal(read_image(path) > 127, expected > 127)
    np.testing.assert_array_equal(read_mask(path), expected[:, :, 0] > 127)


def test_a_16_bit_image_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in (".png", ".tif"):
        path = save(tmp_path / f"turned{suffix}", RAMP, exif=exif)
        np.testing.assert_array_equal(read_image(path)[:, :, 0], RAMP_8_BIT.T[:, ::-1])


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.jpg"])
def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    # A JPEG with several pictures is an MPO file, which cameras and phones write as .jpg.
    options = {"format": "MPO"} if name == "a.jpg" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    if name == "a.jpg":
        image = read_image(tmp_path / name)
    else:
        with pytest.warns(UserWarning, match="the first of 2 pages is read, 1 is left out"):
            image = read_image(tmp_path / name)
    assert np.abs(image.astype(int) - (255, 0, 0)).max() <= 2


# Reading: refusals


def not_an_image(path: Path) -> None:
    path.write_text("these are words")


def empty(path: Path) -> None:
    path.touch()


def an_icon(path: Path) -> None:
    Image.new("L", (4, 4)).save(path, format="ICO")


def a_float(path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)).save(path, format="TIFF")


def an_int32(path: Path) -> None:
    Image.fromarray(np.arange(16, dtype=np.int32).reshape(4, 4)).save(path, format="TIFF")


def a_signed_16_bit(path: Path) -> None:
    tiff(path, struct.pack("<3h", -5, 0, 5), width=3, bits=16, signed=True)


def test_a_tiff_that_pillow_does_not_know_is_called_one(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", struct.pack("<2d", 0.5, 1.5), width=2, bits=64)
    for read in (read_image, check_header):
        with pytest.raises(ImageError, match=r"a\.tif: cannot be decoded \(a TIFF .* with 8, 16 or 32 bits\)"):
            read(path)


def a_lab(path: Path) -> None:
    Image.new("LAB", (4, 4)).save(path, format="TIFF")


def a_bomb(path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


UNREADABLE = [
    (not_an_image, "GIF, PBM, PGM or PPM image, or its header is damaged; replace it or leave it out"),
    (empty, "the file is empty; replace it or leave it out"),
    (an_icon, "not a PNG, JPEG, BMP, TIFF, WebP, GIF, PBM, PGM or PPM image"),
    (a_float, "mode F: its 32-bit or signed samples have no stated range; save it as 8-bit or unsigned 16-bit grey"),
    (an_int32, "mode I: its 32-bit or signed samples have no stated range"),
    (a_signed_16_bit, "mode I: its 32-bit or signed samples have no stated range"),
    (a_lab, "mode LAB: this colour mode is not supported; save it as RGB"),
    (a_bomb, "(400000000 pixels) exceeds limit of 178956970 pixels"),
    (a_bomb, "Scale the image down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"),
]


@pytest.mark.parametrize(("make", "reason"), UNREADABLE)
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_an_unreadable_file_is_refused_by_name(
    tmp_path: Path, make: Callable[[Path], None], reason: str, read: Callable[[Path], np.ndarray]
) -> None:
    path = tmp_path / "part_017.png"
    make(path)
    with pytest.raises(ImageError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"cut{suffix}", noise)
    content = path.read_bytes()
    # Pillow writes the directory of a TIFF before its samples, so the header of each file survives.
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "replace" in str(caught.value)
    assert "leave it out" in str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
def test_damage_anywhere_gives_an_array_or_an_image_error(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    rng = np.random.default_rng(2)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / f"damaged{suffix}", rng.integers(0, 256, (8, 12, 3), dtype=np.uint8), exif=exif)
    content = path.read_bytes()
    refusals: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(300):
            damaged = bytearray(content[: int(rng.integers(1, len(content) + 1))])
            for _ in range(int(rng.integers(0, 4))):
                damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
            path.write_bytes(damaged)
            try:
                assert read_image(path).shape[2] == 3
            except ImageError as error:
                refusals.append(str(error))
    assert len(refusals) > 100
    assert all(message.startswith(f"{path}: ") for message in refusals)


def test_missing_folder_and_closed_files_keep_their_python_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*gone\.png"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(IsADirectoryError, match=r"expected an image file; got a folder \(find_images lists"):
        read_image(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="making links needs a privilege on Windows")
def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match=r"dangling\.png"):
        read_image(tmp_path / "dangling.png")
    (tmp_path / "link.png").symlink_to(save(tmp_path / "image.png", RGB))
    np.testing.assert_array_equal(read_image(tmp_path / "link.png"), RGB)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="file permissions of this kind are POSIX only")
def test_a_file_without_permission_is_refused_by_path(tmp_path: Path) -> None:
    path = save(tmp_path / "closed.png", RGB)
    path.chmod(0)
    user = os.geteuid()
    # The superuser may read anything.
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match=r"Permission denied: .*closed\.png"):
            read_image(path)
    finally:
        os.seteuid(user)
        path.chmod(stat.S_IRUSR | stat.S_IWUSR)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX only")
def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(tmp_path / "pipe.png")


BACKGROUNDS = {ValueError: [(0, 0), (0, 0, 256), (0, 0, -1)], TypeError: [(0.5, 0, 0), "red", None]}


@pytest.mark.parametrize(
    ("error", "background"), [(error, each) for error in BACKGROUNDS for each in BACKGROUNDS[error]]
)
def test_a_background_that_is_no_colour_is_refused(tmp_path: Path, background: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"background must be three integers from 0 to 255; got"):
        read_image(save(tmp_path / "a.png", RGB), background=background)  # type: ignore[arg-type]


def test_an_image_error_is_a_value_error_and_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.png: broken")))
    assert isinstance(error, ValueError)
    assert str(error) == "a.png: broken"


# Resize and crop


@pytest.mark.parametrize(
    ("shape", "resize", "crop", "expected"),
    [
        ((100, 150), 64, None, (64, 96)),
        ((150, 100), 64, None, (96, 64)),
        ((103, 289), 256, 224, (224, 224)),
        ((103, 289), 256, None, (256, 718)),
        ((30, 40), (20, 50), None, (20, 50)),
        ((31, 40), None, (24, 17), (24, 17)),
        ((31, 40), None, None, (31, 40)),
        ((31, 40), [16, 16], [8, 9], (8, 9)),
        ((31, 40), np.int64(16), np.int64(16), (16, 16)),
        ((1, 1), 8, 8, (8, 8)),
    ],
)
def test_resize_and_crop_give_the_stated_size(
    shape: tuple[int, int], resize: object, crop: object, expected: tuple[int, int]
) -> None:
    image = np.zeros((*shape, 3), np.uint8)
    assert resize_crop(image, resize, crop).shape == (*expected, 3)  # type: ignore[arg-type]
    assert resize_crop_mask(image[:, :, 0] > 0, resize, crop).shape == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(103, 289), (289, 103), (300, 300), (257, 256), (40, 61)])
@pytest.mark.parametrize(
    ("resize", "crop"), [(256, 224), (256, 225), (255, 224), ((224, 200), None), ((50, 77), (33, 40))]
)
def test_resize_and_crop_equal_torchvision(
    shape: tuple[int, int], resize: int | tuple[int, int], crop: int | tuple[int, int] | None
) -> None:
    transforms = pytest.importorskip("torchvision.transforms", reason="the reference implementation is torchvision")
    image = np.random.default_rng(3).integers(0, 256, (*shape, 3), dtype=np.uint8)
    mask = image[:, :, 0] > 127
    cut = [] if crop is None else [transforms.CenterCrop(crop)]
    nearest = transforms.InterpolationMode.NEAREST
    expected = transforms.Compose([transforms.Resize(resize), *cut])(Image.fromarray(image))
    expected_mask = transforms.Compose([transforms.Resize(resize, nearest), *cut])(Image.fromarray(mask))
    difference = np.abs(resize_crop(image, resize, crop).astype(int) - np.asarray(expected))
    assert difference.max() <= (0 if PIL.__version__.startswith("13.") else 1)
    np.testing.assert_array_equal(resize_crop_mask(mask, resize, crop), np.asarray(expected_mask))


def test_the_result_of_resize_and_crop_is_a_copy_and_the_input_is_kept() -> None:
    image = RGB.copy()
    image.flags.writeable = False
    for resize, crop in ((None, None), ((6, 9), None), (None, 4), (4, 3)):
        result = resize_crop(image, resize, crop)  # type: ignore[arg-type]
        assert not np.shares_memory(result, image)
        result[...] = 0
    np.testing.assert_array_equal(image, RGB)


@pytest.mark.parametrize(
    ("image", "resize", "crop", "error", "message"),
    [
        (
            RGB,
            None,
            7,
            ValueError,
            r"image is 6 x 9 \(height x width\) where it is cropped, and crop=7 needs at least 7 x 7",
        ),
        (RGB, 8, (4, 13), ValueError, r"image is 8 x 12 .*crop=\(4, 13\) needs at least 4 x 13; use larger images"),
        (RGB, 0, None, ValueError, "resize must be at least 1; got 0"),
        (RGB, None, (3, -1), ValueError, "crop must be at least 1; got -1"),
        (RGB, 2.5, None, TypeError, "resize must be an integer, a pair of integers .* got 2.5"),
        (RGB, True, None, TypeError, "resize must be an integer, a pair of integers .* got True"),
        (RGB, (1, 2, 3), None, ValueError, r"resize must be an integer, a pair .* got \(1, 2, 3\)"),
        (RGB, None, "4", TypeError, "crop must be an integer, a pair of integers .* got '4'"),
        (GREY, None, None, ValueError, r"image must have shape \(height, width, 3\); got \(6, 9\)"),
        (RGB.astype(np.float32), None, None, TypeError, "image must be uint8; got float32"),
        (RGB[:0], 4, None, ValueError, "image must hold at least one pixel; got 0 x 9"),
        (
            np.zeros((1, 100_000, 3), np.uint8),
            256,
            224,
            ValueError,
            r"resize=256 makes 256 x 25600000 pixels of a 1 x 100000",
        ),
    ],
)
def test_resize_and_crop_refuse_by_argument(
    image: np.ndarray, resize: object, crop: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resize_crop(image, resize, crop)  # type: ignore[arg-type]


def test_resize_and_crop_of_a_mask_refuse_by_argument() -> None:
    with pytest.raises(TypeError, match=r"mask must be bool; got uint8\. read_mask returns one"):
        resize_crop_mask(GREY, 4, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask must have shape \(height, width\); got \(6, 9, 3\)"):
        resize_crop_mask(RGB > 0, 4, None)


# Writing


@pytest.mark.parametrize("array", [RGB, GREY, RGB[::2, ::-1], np.asfortranarray(GREY)])
def test_a_written_image_reads_back(tmp_path: Path, array: np.ndarray) -> None:
    write_image(tmp_path / "out.png", array)
    np.testing.assert_array_equal(read_image(tmp_path / "out.png"), array if array.ndim == 3 else grey_rgb(array))


@pytest.mark.parametrize(
    ("name", "array", "error", "message"),
    [
        ("out.jpg", RGB, ValueError, "path must end in .png, the one format written; got .*out.jpg"),
        ("out.png", RGB / 255, TypeError, "array must be uint8; got float64. Scale it to 0..255 first"),
        ("out.png", RGB[0, 0], ValueError, r"array must have shape \(height, width\) or .* got \(3,\)"),
        ("out.png", RGB[:, :, :2], ValueError, r"array must have shape .* got \(6, 9, 2\)"),
        ("out.png", RGB[:0], ValueError, r"no 0 in it; got \(0, 9, 3\)"),
        ("gone/out.png", RGB, FileNotFoundError, "No such file or directory: .*out.png"),
    ],
)
def test_write_image_refuses_by_argument(
    tmp_path: Path, name: str, array: np.ndarray, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_image(tmp_path / name, array)
    assert not list(tmp_path.iterdir())
