"""One frame is one image, whatever holds it, alone as in a list; what could be read as several is refused."""

from __future__ import annotations

import io
import os
from collections import OrderedDict, UserList

import numpy as np
import pytest
import torch
from detectors import detector, normal, same, write_folder
from PIL import Image

from patchcore_rs.images.files import read_image
from patchcore_rs.images.layouts import load_dataset
from patchcore_rs.images.pixels import to_pixels
from patchcore_rs.images.read_ahead import iterate_images

FRAME = normal(1)[0]
RNG = np.random.default_rng(0)
RGBA = RNG.integers(0, 256, (20, 24, 4), dtype=np.uint8)


def pixels(source):
    return [image for _, image in iterate_images(source)]


def png(image):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()


ONE = {
    "grey": FRAME[:, :, 0],
    "grey with an axis": FRAME[:, :, :1],
    "RGB": FRAME,
    "RGBA": RGBA,
    "16 bits with an axis": FRAME[:, :, :1].astype(np.uint16) * 257,
    "floats with alpha": RGBA / 255,
    "three rows of grey": np.zeros((3, 40, 1), np.uint8),
    "grey tensor": torch.from_numpy(FRAME[:, :, 0].copy())[None],
    "tensor": torch.from_numpy(FRAME.transpose(2, 0, 1).copy()),
    "Pillow": Image.fromarray(FRAME),
    "bytes": png(FRAME),
    "bytearray": bytearray(png(FRAME)),
    "memoryview": memoryview(png(FRAME)),
}


@pytest.mark.parametrize("name", ONE)
def test_one_frame_is_one_image_alone_and_in_a_list(name):
    alone, listed = pixels(ONE[name]), pixels([ONE[name]])
    assert len(alone) == len(listed) == 1
    assert alone[0].shape[-2:] == listed[0].shape[-2:]
    np.testing.assert_array_equal(alone[0], listed[0])


SEVERAL = {
    "channels first": (np.zeros((3, 24, 20), np.uint8), r"got \(3, 24, 20\). Move the channels last: numpy.moveaxis"),
    "one channel first": (np.zeros((1, 24, 20)), r"got \(1, 24, 20\). Move the channels last: numpy.moveaxis"),
    "four channels first": (np.zeros((4, 24, 20)), r"got \(4, 24, 20\). Move the channels last: numpy.moveaxis"),
    "a stack of grey": (np.zeros((7, 24, 20)), r"got \(7, 24, 20\). Give grey images as a list, list\(array\)"),
    "two channels": (np.zeros((24, 20, 2)), r"got \(24, 20, 2\)"),
    "a batch, channels first": (np.zeros((7, 3, 24, 20)), r"got \(7, 3, 24, 20\). Move the channels last"),
    "five axes": (np.zeros((2, 2, 24, 20, 3)), r"got \(2, 2, 24, 20, 3\). Give several images as a list"),
    "an encoded file": (np.zeros(100, np.uint8), r"got \(100,\). Give an encoded file as bytes, array.tobytes\(\)"),
    "tensor, channels last": (torch.zeros(24, 20, 3), r"got \(24, 20, 3\). Move the channels first: tensor.movedim"),
    "tensors, channels last": (torch.zeros(7, 24, 20, 3), r"got \(7, 24, 20, 3\). Move the channels first"),
    "tensors of grey": (torch.zeros(7, 24, 20), r"got \(7, 24, 20\). Give grey images an axis .*unsqueeze\(-3\)"),
    "grey tensor": (torch.zeros(24, 20), r"got \(24, 20\). Give grey images an axis .*unsqueeze\(-3\)"),
    "tensor of RGBA": (torch.zeros(4, 24, 20), r"of RGBA take tensor\[:3\]"),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_what_could_be_several_is_refused_alone_and_in_a_list(name):
    source, message = SEVERAL[name]
    for given in (source, [source]):
        with pytest.raises(ValueError, match=message):
            pixels(given)


def test_the_remedies_of_the_messages_are_ones():
    first = np.moveaxis(FRAME, -1, -3)
    np.testing.assert_array_equal(pixels(np.moveaxis(first, -3, -1)), [FRAME])
    np.testing.assert_array_equal(pixels(np.moveaxis(first[None], -3, -1)), [FRAME])
    stack = normal(5)[:, :, :, 0]
    for several in (list(stack), stack[..., None], torch.from_numpy(stack).unsqueeze(-3)):
        np.testing.assert_array_equal(np.array(pixels(several))[..., 0], stack)
    last = torch.from_numpy(normal(5))
    np.testing.assert_array_equal(pixels(last.movedim(-1, -3)), normal(5))


def test_a_refused_frame_changes_no_detector():
    model = detector().fit(normal(3))
    fitted = model._fitted
    for call in (model.fit, model.partial_fit, model.calibrate, model.predict, model.extract):
        with pytest.raises(ValueError, match=r"got \(3, 32, 32\)"):
            call(FRAME.transpose(2, 0, 1))
    assert model._fitted is fitted


@pytest.mark.parametrize("shape", [(240, 240), (240, 240, 1), (240, 240, 3), (240, 240, 4)])
def test_a_camera_frame_is_one_prediction(shape):
    frame = RNG.integers(0, 256, shape, np.uint8)
    model = detector().fit(frame)
    assert model.training_.images == 1
    with pytest.warns(UserWarning, match="^1 normal image cannot show"):
        model.calibrate(255 - frame)
    assert len(model.predict(frame).scores) == 1
    assert len(model.extract(frame)) == 1


# --- Colours -----------------------------------------------------------------------------------------------


def test_rgba_in_memory_is_laid_on_white_as_a_file_is(tmp_path):
    Image.fromarray(RGBA).save(tmp_path / "a.png")
    expected = read_image(tmp_path / "a.png")
    for image in (RGBA, RGBA.astype(np.uint16) * 257, Image.fromarray(RGBA), png(RGBA)):
        np.testing.assert_array_equal(to_pixels(image), expected)
    floats = np.asarray(to_pixels(RGBA / 255)).transpose(1, 2, 0)
    np.testing.assert_allclose(floats * 255, expected, atol=1)
    with pytest.raises(ValueError, match="at least one pixel"):
        detector().fit(np.zeros((0, 4, 4), np.uint8))


def test_bgr_is_for_arrays_and_tensors_alone(tmp_path):
    (folder := tmp_path / "images").mkdir()
    Image.fromarray(FRAME).save(folder / "a.png")
    swapped = np.ascontiguousarray(FRAME[:, :, ::-1])
    bgra = np.ascontiguousarray(RGBA[:, :, [2, 1, 0, 3]])
    tensor = torch.from_numpy(swapped.transpose(2, 0, 1).copy())
    model = detector()
    expected = model.extract(FRAME).features
    for image in (swapped, swapped / 255, [swapped], swapped[None], tensor, tensor[None], iter([swapped])):
        found = model.extract(image, channels="bgr").features
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for image in (folder, folder / "a.png", Image.fromarray(FRAME), png(FRAME), io.BytesIO(png(FRAME))):
        np.testing.assert_array_equal(model.extract(image, channels="bgr").features, expected)
    np.testing.assert_array_equal(model.extract(bgra, channels="bgr").features, model.extract(RGBA).features)
    grey = FRAME[:, :, 0]
    np.testing.assert_array_equal(model.extract(grey, channels="bgr").features, model.extract(grey).features)


def test_every_call_knows_the_order_of_colours_and_none_keeps_it():
    images, more = RNG.integers(0, 256, (4, 32, 32, 3), np.uint8), RNG.integers(0, 256, (4, 32, 32, 3), np.uint8)
    rgb = detector().fit(images).partial_fit(more).calibrate(255 - more, false_alarm_rate=0.5)
    bgr = detector().fit(images[..., ::-1], channels="bgr").partial_fit(more[..., ::-1], channels="bgr")
    bgr.calibrate(255 - more[..., ::-1], false_alarm_rate=0.5, channels="bgr")
    np.testing.assert_array_equal(bgr.memory_bank_.features, rgb.memory_bank_.features)
    same(bgr.predict(more[..., ::-1], channels="bgr"), rgb.predict(more))
    same(bgr.predict(more), rgb.predict(more))
    assert not np.array_equal(rgb.predict(more, channels="bgr").scores, rgb.predict(more).scores)


@pytest.mark.parametrize(("channels", "error"), [("BGR", ValueError), (None, TypeError)])
def test_another_order_of_colours_is_refused(channels, error):
    with pytest.raises(error, match=r"^channels must be one of 'rgb', 'bgr'; got "):
        detector().fit(FRAME, channels=channels)


# --- Pillow images, bytes and files ------------------------------------------------------------------------

MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I;16B"]


@pytest.mark.parametrize("mode", MODES)
def test_a_pillow_image_of_any_mode_is_what_its_colours_are(mode):
    colours = Image.fromarray(FRAME)
    if mode.startswith("I;16"):
        deep = FRAME[:, :, 0].astype(np.uint16) * 257
        image = Image.frombytes(mode, deep.shape[::-1], deep.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    elif mode == "LAB":
        image = Image.new("LAB", colours.size, (128, 0, 0))
    elif mode in ("La", "RGBa"):
        image = colours.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    else:
        image = colours.convert(mode)
    before = image.mode, image.tobytes()
    alone, listed = pixels(image), pixels([image, image])
    assert (len(alone), len(listed)) == (1, 2)
    assert (image.mode, image.tobytes()) == before
    assert alone[0].shape == FRAME.shape
    if mode in ("RGB", "RGBA", "RGBa", "RGBX", "CMYK"):
        np.testing.assert_array_equal(alone[0], FRAME)
    elif mode in ("YCbCr", "HSV"):
        assert np.abs(alone[0].astype(int) - FRAME).max() <= 8
    elif mode in ("L", "LA", "La"):
        np.testing.assert_array_equal(alone[0][:, :, 0], np.asarray(colours.convert("L")))
    elif mode.startswith("I;16"):
        np.testing.assert_array_equal(alone[0][:, :, 0], FRAME[:, :, 0])


def test_a_pillow_image_is_turned_upright_as_its_file_is(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(RGBA).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(to_pixels(image), read_image(tmp_path / "a.png"))
        assert image.size == (24, 20)
    assert read_image(tmp_path / "a.png").shape == (24, 20, 3)


def test_what_pillow_cannot_decode_is_named(tmp_path):
    (tmp_path / "cut.png").write_bytes(png(RGBA)[:-200])
    with Image.open(tmp_path / "cut.png") as cut, pytest.raises(ValueError, match=r"images\[1\]: Pillow image: cannot"):
        pixels([FRAME, cut])
    for broken, reason in ((b"no image", "not a PNG"), (b"", "there are none"), (png(RGBA)[:-200], "cannot be decod")):
        for one in (broken, io.BytesIO(broken)) if broken else (broken,):
            with pytest.raises(ValueError, match=rf"images\[1\]: bytes: {reason}"):
                pixels([png(FRAME), one])


def test_a_file_object_that_gives_nothing_is_named():
    closed, read = io.BytesIO(png(FRAME)), io.BytesIO(png(FRAME))
    closed.close()
    read.read()
    for file, reason in ((closed, "this file object is closed"), (read, r"nothing is left .* file\.seek\(0\)")):
        for i, source in enumerate((file, [FRAME, file])):
            with pytest.raises(ValueError, match=rf"^images\[{i}\]: {reason}"):
                pixels(source)


def test_a_file_object_is_read_from_where_it_stands_and_put_back(tmp_path):
    (tmp_path / "a.png").write_bytes(b"head" + png(FRAME))
    with open(tmp_path / "a.png", "rb") as file:
        file.seek(4)
        for source in (file, [file], (one for one in [file]), file):
            np.testing.assert_array_equal(pixels(source), [FRAME])
    with (
        open(tmp_path / "a.png", encoding="latin-1") as file,
        pytest.raises(TypeError, match='Open it with mode "rb"'),
    ):
        pixels(file)


# --- Several -----------------------------------------------------------------------------------------------


class Series:
    """As much of a pandas Series as matters: neither a Sequence nor a Mapping, and with keys."""

    def __init__(self, values):
        self.values = list(values)

    def __len__(self):
        return len(self.values)

    def __iter__(self):
        return iter(self.values)

    def __getitem__(self, label):
        raise KeyError(label)

    def keys(self):
        return range(10, 10 + len(self.values))


@pytest.mark.parametrize(
    "source",
    [
        lambda files: (str(file) for file in files),
        lambda files: sorted(files[0].parent.glob("*.png")),
        lambda files: files[0].parent.glob("*.png"),
        iter,
        lambda files: map(str, files),
        lambda files: Series(map(str, files)),
        lambda files: np.array(list(map(str, files))),
        lambda files: np.array(files),
        UserList,
        lambda files: dict.fromkeys(files).keys(),
        lambda files: dict(enumerate(files)).values(),
        lambda files: (file.read_bytes() for file in files),
        lambda files: [Image.open(file) for file in files],
        lambda files: np.array([read_image(files[0]), None, read_image(files[2])], dtype=object)[[0, 2]],
    ],
)
def test_several_come_out_of_whatever_can_be_gone_through(source, tmp_path):
    folder = write_folder(tmp_path / "images", normal(3))
    files = [folder / f"{i}.png" for i in range(3)]
    found = pixels(source(files))
    assert len(found) in (2, 3)
    np.testing.assert_array_equal(found[0], read_image(files[0]))
    assert detector().fit(source(files)).training_.images == len(found)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"a.png"}, r"got set. A set has no order.*sorted\(images\)"),
        (frozenset(), "got frozenset. A set has no order"),
        ({"a": "a.png"}, r"got dict. Pass its values, list\(images.values\(\)\)"),
        (OrderedDict(), "got OrderedDict. Pass its values"),
        (type("Table", (Series,), {"columns": ["path"]})(["path"]), r'got Table. Pass the column of paths, .*"path"'),
        (None, "got NoneType"),
        (3.5, "got float"),
    ],
)
def test_what_has_no_order_or_is_no_image_is_refused_with_the_reason(source, message):
    with pytest.raises(TypeError, match=rf"^images must be a folder, .*; {message}"):
        pixels(source)


@pytest.mark.parametrize("value", [float("nan"), None, 7, [FRAME]])
def test_an_entry_that_is_no_image_is_named(value):
    with pytest.raises(TypeError, match=r"^images\[1\]: an image must be a path"):
        pixels(Series([FRAME, value]))


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("", ValueError, "must not be empty"),
        ("http://example.org/a.png", FileNotFoundError, "download it first"),
        ("~/gone.png", FileNotFoundError, r"expand ~ first: Path\(...\).expanduser"),
        ("gone/*.png", FileNotFoundError, r"expand the pattern first: .*glob"),
        ("gone.png", FileNotFoundError, "No such file or directory: 'gone.png'"),
    ],
)
def test_a_path_where_nothing_is_says_what_may_have_been_meant(path, error, message, tmp_path, monkeypatch):
    write_folder(tmp_path / "here", normal(1))
    monkeypatch.chdir(tmp_path / "here")  # an empty path would stand for it
    for call in (pixels, load_dataset):
        with pytest.raises(error, match=message):
            call(path)


def test_a_path_may_be_bytes_inside(tmp_path):
    folder = write_folder(tmp_path / "images", normal(1))
    entries = [entry for entry in os.scandir(os.fsencode(folder)) if entry.name.endswith(b".png")]
    np.testing.assert_array_equal(pixels(entries), normal(1))
    [entry] = entries
    for source in (entry, _Path(folder), np.array([entry.path]), [entry, FRAME]):
        np.testing.assert_array_equal(pixels(source)[0], FRAME)
    model = detector().fit(normal(3))
    same(model.predict(entries), model.predict(normal(1)))


class _Path:
    """A path as bytes, which Path does not take."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return os.fsencode(self.path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.zeros(3, 8, 8).to_sparse(),
            r"must be dense and hold its values; got torch\.sparse_coo on cpu\. Pass tens",
        ),
        (torch.zeros(3, 8, 8, device="meta"), r"got torch\.strided on meta\. Make it on another device"),
    ],
)
def test_a_tensor_that_holds_no_pixels_is_refused(tensor, message):
    for source in (tensor, [tensor], tensor[None]):
        with pytest.raises(ValueError, match=message):
            pixels(source)


@pytest.mark.parametrize("dtype", [bool, np.int32, np.int64])
def test_other_types_say_how_to_convert_them(dtype):
    with pytest.raises(TypeError, match=r"got (bool|int\d\d)\. Convert it, image\.astype\(numpy\.uint8\)"):
        pixels(FRAME.astype(dtype))


def test_an_array_of_paths_has_one_axis():
    with pytest.raises(TypeError, match=r"must be uint8, uint16 or floating point in \[0, 1\]; got <U5"):
        pixels(np.array([["a.png"]]))
