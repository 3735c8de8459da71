"""Half a file is refused also where the process has told Pillow to take such, and its setting stays."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from detectors import detector, normal
from PIL import Image, ImageFile

from patchcore_rs import ImageError
from patchcore_rs.images.files import read_image
from patchcore_rs.images.pixels import to_pixels

NOISE = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
FORMATS = {
    "jpeg": {"format": "JPEG"},
    "progressive jpeg": {"format": "JPEG", "progressive": True},
    "png": {"format": "PNG"},
    "bmp": {"format": "BMP"},
    "gif": {"format": "GIF"},
    "ppm": {"format": "PPM"},
    "tiff": {"format": "TIFF"},
    "packed tiff": {"format": "TIFF", "compression": "tiff_lzw"},
    "webp": {"format": "WEBP", "lossless": True},
}


def encoded(name):
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, **FORMATS[name])
    return buffer.getvalue()


def opened(content):
    """As a caller has it who opens files by Pillow."""
    return Image.open(io.BytesIO(content))


def verdict(read, content):
    try:
        return read(content).tobytes()
    except ValueError:
        return "refused"


@pytest.fixture
def halves_wanted(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    yield
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.usefixtures("halves_wanted")
@pytest.mark.parametrize("name", FORMATS)
def test_half_a_file_is_refused_in_every_form(name, tmp_path):
    whole, path = encoded(name), tmp_path / "image"
    half = whole[: len(whole) // 2]
    path.write_bytes(half)
    # Of these Pillow reads the end before it opens the beginning.
    for image in (path, half, *([] if name in ("webp", "packed tiff") else [opened(half)])):
        with pytest.raises(ImageError, match=r"cannot be decoded|not a PNG"):
            to_pixels(image)
    path.write_bytes(whole)
    expected = np.asarray(Image.open(io.BytesIO(whole)).convert("RGB"))
    for image in (path, whole, opened(whole)):
        np.testing.assert_array_equal(to_pixels(image), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_refused_does_not_depend_on_the_setting(name, monkeypatch):
    whole = encoded(name)
    rng = np.random.default_rng(0)
    contents = [whole[: int(cut)] for cut in rng.integers(len(whole) // 20, len(whole), 12)]
    verdicts = []
    for wanted in (False, True):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", wanted)
        verdicts.append([verdict(to_pixels, content) for content in contents])
    assert verdicts[0] == verdicts[1]
    assert "refused" in verdicts[0]


@pytest.mark.usefixtures("halves_wanted")
def test_no_detector_learns_half_an_image(tmp_path):
    names = [tmp_path / f"{i}.jpg" for i in range(4)]
    for name, image in zip(names, normal(4, size=64), strict=True):
        Image.fromarray(image).save(name)
    names[2].write_bytes(names[2].read_bytes()[:900])
    with pytest.raises(ImageError, match=r"2\.jpg: cannot be decoded \(image file is truncated"):
        detector().fit(names)
    with pytest.warns(UserWarning, match="1 of 4 images were left out"):
        model = detector().fit(names, on_error="skip")
    assert model.training_.images == 3
    with open(names[2], "rb") as file, pytest.raises(ImageError, match="image file is truncated"):
        model.predict(file)


@pytest.mark.usefixtures("halves_wanted")
def test_other_threads_read_halves_meanwhile(tmp_path):
    half = encoded("jpeg")[:3000]
    (tmp_path / "half.jpg").write_bytes(half)

    def ours(_):
        return verdict(read_image, tmp_path / "half.jpg")

    def theirs(_):
        return opened(half).convert("RGB").tobytes()

    with ThreadPoolExecutor(4) as pool:
        refused, read = pool.map(ours, range(40)), pool.map(theirs, range(40))
        assert set(refused) == {"refused"}
        assert len(set(read)) == 1
