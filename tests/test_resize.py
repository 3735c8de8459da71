"""8-bit images are resized as by Pillow 13.0, to the bit, whatever Pillow is installed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from threading import Thread

import numpy as np
import PIL
import pytest
from detectors import pyramid
from PIL import Image

from patchcore_rs import _native
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.features.extractor import FeatureExtractor
from patchcore_rs.images.files import write_image
from patchcore_rs.images.pixels import from_uint8, read_as_seen, resize_crop

MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # channels that Pillow resizes each alone
NOTED = Path(__file__).parent / "data" / "resized-by-pillow-13.json"
needs_pillow_13 = pytest.mark.skipif(not PIL.__version__.startswith("13."), reason="other releases give other pixels")


def image(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    """Random bytes that no library decides."""
    name = f"{height} {width} {channels} {seed}".encode("ascii")
    content = hashlib.shake_128(name).digest(height * width * channels)
    return np.frombuffer(content, np.uint8).reshape((height, width, channels) if channels > 1 else (height, width))


def by_pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    mode = MODES[pixels.shape[2] if pixels.ndim == 3 else 1]
    picture = Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes())
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def sizes(seed: int, count: int, longest: int) -> list[tuple[int, int, int, int, int]]:
    """Height, width, channels, and the height and width wanted: evenly by their logarithm, a third of them equal."""
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.uniform(0, np.log(longest + 1), (count, 4))).astype(int)
    same = rng.random((count, 2)) < 1 / 3
    sides[:, 2:] = np.where(same, sides[:, :2], sides[:, 2:])
    return [(h, w, int(rng.choice([1, 3, 4])), rows, columns) for h, w, rows, columns in sides.tolist()]


@needs_pillow_13
@pytest.mark.parametrize(("seed", "count", "longest"), [(1, 500, 30), (2, 200, 300), (3, 12, 1500)])
def test_pixels_are_those_of_pillow(seed: int, count: int, longest: int) -> None:
    for height, width, channels, rows, columns in sizes(seed, count, longest):
        pixels = image(height, width, channels)
        found = _native.resize(pixels, (rows, columns))
        expected = by_pillow(pixels, (rows, columns))
        assert np.array_equal(found, expected), (height, width, channels, rows, columns)


def test_pixels_are_those_that_pillow_13_gave_once() -> None:
    for entry in json.loads(NOTED.read_text("ascii")):
        height, width, channels, rows, columns, noted = entry
        found = _native.resize(image(height, width, channels), (rows, columns))
        assert hashlib.sha256(found.tobytes()).hexdigest()[:32] == noted, entry


@pytest.mark.parametrize("level", _native.build_info()["simd_available"])
def test_every_level_gives_the_same_bytes(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCORE_RS_SIMD", level)
    assert _native.build_info()["simd"] == level
    test_pixels_are_those_that_pillow_13_gave_once()


def test_of_a_crop_only_the_crop_is_given() -> None:
    pixels = image(90, 70, 3)
    for resized, offset, crop in (
        ((40, 60), (3, 5), (30, 41)),
        ((40, 69), (0, 0), (1, 69)),
        ((90, 70), (7, 9), (5, 6)),
    ):
        whole = _native.resize(pixels, resized)
        (top, left), (rows, columns) = offset, crop
        found = _native.resize(pixels, resized, offset, crop)
        np.testing.assert_array_equal(found, whole[top : top + rows, left : left + columns])


def test_no_image_for_the_backbone_is_resized_by_pillow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels = image(90, 70, 3)
    write_image(tmp_path / "image.png", pixels)
    monkeypatch.setattr(Image.Image, "resize", None)
    seen = read_as_seen(tmp_path / "image.png", resize=(40, 60), crop=(30, 41))
    np.testing.assert_array_equal(seen, _native.resize(pixels, (40, 60))[5:35, 10:51])
    extractor = FeatureExtractor(
        load_backbone(pyramid), resize=(40, 60), crop=(30, 41), embedding="concat", mean=0, std=1
    )
    for given in (pixels, Image.fromarray(pixels), tmp_path / "image.png"):
        np.testing.assert_array_equal(extractor.prepare(given), from_uint8(seen))


def test_an_image_keeps_its_axes_and_is_left_as_it_was() -> None:
    assert _native.resize(image(9, 7, 1), (4, 5)).shape == (4, 5)
    assert _native.resize(image(9, 7, 1)[:, :, None], (4, 5)).shape == (4, 5, 1)
    pixels = image(9, 7, 3).copy()
    pixels.flags.writeable = False
    found = _native.resize(pixels, (9, 7))
    assert not np.shares_memory(found, pixels)
    np.testing.assert_array_equal(found, pixels)


def test_rows_and_columns_of_a_larger_array_are_read_where_they_lie() -> None:
    pixels = image(60, 80, 3)
    for view in (pixels[::2, ::-1], pixels[5:50, 3:60], np.asfortranarray(pixels)):
        np.testing.assert_array_equal(resize_crop(view, (20, 30), None), resize_crop(view.copy(), (20, 30), None))


def test_other_threads_run_meanwhile() -> None:
    pixels = image(2000, 3000, 3)
    expected = hashlib.sha256(_native.resize(pixels, (224, 224)).tobytes()).digest()
    found = []
    threads = [
        Thread(target=lambda: found.append(hashlib.sha256(_native.resize(pixels, (224, 224)).tobytes()).digest()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


@pytest.mark.parametrize(
    ("pixels", "arguments", "message"),
    [
        (image(4, 5, 1)[0], ((2, 2),), r"pixels must have shape \(height, width\) or .* got \[5\]"),
        (image(4, 5, 3)[::2], ((2, 2),), "pixels must be C-contiguous"),
        (image(4, 5, 3)[:0], ((2, 2),), r"image must be at least one row and one column; got \[0, 5\]"),
        (image(4, 5, 3), ((0, 2),), r"resized must be at least one row and one column; got \[0, 2\]"),
        (image(4, 5, 3), ((2, 2), (1, 0), (2, 2)), r"crop must be a part of the resized image, \[2, 2\]; got \[2, 2\]"),
    ],
)
def test_what_does_not_fit_is_named(pixels: np.ndarray, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.resize(pixels, *arguments)
