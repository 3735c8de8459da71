"""What becomes of samples of more than 8 bits: what is white in them, and which are rounded to as many."""

from __future__ import annotations

import io
import json
import struct
import warnings

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from detectors import detector, normal, pyramid, same
from PIL import Image

from patchcore_rs import PatchCore, evaluate
from patchcore_rs.cli import main as cli
from patchcore_rs.images.files import ImageError, read_image
from patchcore_rs.images.levels import Levels, Peak
from patchcore_rs.images.pixels import to_pixels
from patchcore_rs.model.file import read_model, write_model

RNG = np.random.default_rng(0)
EIGHT = normal(6)[:, :, :, 0]
TWELVE = [((image * 4095 + 127) // 255).astype(np.uint16) for image in EIGHT.astype(np.uint32)]
CELSIUS = [(20 + image * (60 / 255)).astype(np.float32) for image in EIGHT]
TWELVE_BITS = Levels(white_level=4095)
THERMAL = Levels(value_range=(20.0, 80.0))


def save(folder, images, suffix="png"):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.{suffix}")
    return folder


def quiet(call, *arguments, **options):
    """The call, which may not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*arguments, **options)


# --- Floating point ----------------------------------------------------------------------------------------


def as_floats(images):
    """The images as tensors, and as arrays, in [0, 1]."""
    tensors = [torch.from_numpy(image).permute(2, 0, 1) / 255 for image in images]
    return tensors, [tensor.half() for tensor in tensors], [image / 255 for image in images]


@pytest.mark.parametrize("resize", [(24, 20), (48, 64), None])
def test_a_picture_scores_the_same_as_its_file_and_as_floats(resize, tmp_path):
    images, tests = normal(6), normal(3, seed=4)
    model = detector(resize=resize).fit(save(tmp_path / "train", images))
    assert model.settings_.round_floats
    expected = model.predict(save(tmp_path / "test", tests))
    for floats in as_floats(tests):
        same(model.predict(floats), expected)
    for floats in as_floats(images):
        assert model.predict(floats, in_training=True).in_training.all()
        same(detector(resize=resize).fit(floats).predict(tests), expected)


@pytest.mark.parametrize(
    "options", [{"resampling": "tensor"}, {"mean": (0, 0, 0), "std": (1, 1, 1)}, {"value_range": (0, 1)}]
)
def test_floats_are_taken_as_they_are_where_they_are_finer(options):
    tensors = as_floats(normal(4))[0]
    fine = [tensor * 0.501 for tensor in tensors]
    model = detector(resize=(24, 20), **options).fit(tensors)
    assert not model.settings_.round_floats
    kept = detector(resize=(24, 20), round_floats=False, **options).fit(tensors)
    same(model.predict(fine), kept.predict(fine))
    rounded = [(tensor * 255).round() / 255 for tensor in fine]
    assert (model.predict(fine).scores != model.predict(rounded).scores).any()


def test_normalised_images_cannot_be_rounded():
    with pytest.raises(ValueError, match="round_floats must be False where mean=0 and std=1 say"):
        detector(mean=(0, 0, 0), std=(1, 1, 1), round_floats=True).fit(normal(3))


@pytest.mark.parametrize("zero", [0, 0.0, (0, 0, 0)])
@pytest.mark.parametrize("one", [1, (1.0, 1.0, 1.0)])
def test_normalised_images_are_told_by_scalars_or_by_three_values(zero, one):
    tensors = [tensor * 3 - 1 for tensor in as_floats(normal(4))[0]]
    model = detector(mean=zero, std=one).fit(tensors)
    assert (model.settings_.mean, model.settings_.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    same(model.predict(tensors), detector(mean=(0, 0, 0), std=(1, 1, 1)).fit(tensors).predict(tensors))


def test_a_model_from_before_takes_floats_as_it_did(tmp_path):
    tensors = [tensor * 0.501 for tensor in as_floats(normal(4))[0]]
    path = tmp_path / "model.safetensors"
    kept = detector(resize=(24, 20), round_floats=False).fit(normal(4))
    kept.save(path)
    stored = read_model(path)
    stored.metadata["requires"].remove("round_floats")
    del stored.metadata["settings"]["round_floats"]
    write_model(path, stored)
    loaded = PatchCore.load(path, backbone=pyramid)
    assert loaded.round_floats is loaded.settings_.round_floats is False
    same(loaded.predict(tensors), kept.predict(tensors))
    assert (detector(resize=(24, 20)).fit(normal(4)).predict(tensors).scores != kept.predict(tensors).scores).any()


# --- White -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_twelve_bits_keep_all_levels_in_files_and_arrays(suffix, tmp_path):
    samples = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    path = save(tmp_path / "a", [samples], suffix) / f"0.{suffix}"
    expected = np.rint(samples / 4095 * 255).astype(np.uint8)
    tensors = [torch.from_numpy(samples)[None]] if hasattr(torch, "uint16") else []  # torch 2.2 has none
    for image in (samples, samples[:, :, None], *tensors, path, path.read_bytes()):
        np.testing.assert_array_equal(to_pixels(image, levels=TWELVE_BITS)[:, :, 0], expected)
    with Image.open(path) as image:
        np.testing.assert_array_equal(to_pixels(image, levels=TWELVE_BITS)[:, :, 1], expected)
    np.testing.assert_array_equal(read_image(path, levels=TWELVE_BITS)[:, :, 0], expected)
    assert len(np.unique(to_pixels(path))) == 17  # the fault


def test_larger_values_are_white():
    samples = np.array([[0, 2000, 4095, 4096, 65535]], np.uint16)
    assert to_pixels(samples, levels=TWELVE_BITS)[0, :, 0].tolist() == [0, 125, 255, 255, 255]


def tiff(samples, *, bits, photometric=1):
    """A TIFF of one row of 16-bit samples or, of 12 bits, of pairs of them packed."""
    body = struct.pack(f"<{len(samples)}H", *samples)
    if bits == 12:
        packed = [(a >> 4, (a & 15) << 4 | b >> 8, b & 255) for a, b in zip(samples[::2], samples[1::2], strict=True)]
        body = bytes(byte for three in packed for byte in three)
    tags = [
        (256, 3, len(samples)), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
        (273, 4, 8), (277, 3, 1), (278, 3, 1), (279, 4, len(body)),
    ]  # fmt: skip
    body += b"\0" * (len(body) % 2)
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def test_a_file_that_states_fewer_bits_has_its_own_white():
    stated = tiff([0, 2048, 1023, 4095], bits=12)
    assert to_pixels(stated)[0, :, 0].tolist() == [0, 128, 64, 255]
    assert to_pixels(stated, levels=Levels(white_level=1023))[0, :, 0].tolist() == [0, 255, 255, 255]


def test_where_zero_is_white_the_white_level_is_black():
    inverted = tiff([0, 2048, 4095, 60000], bits=16, photometric=0)
    assert to_pixels(inverted, levels=TWELVE_BITS)[0, :, 0].tolist() == [255, 127, 0, 0]


def test_sixteen_bit_colour_in_a_file_is_refused_with_another_white(tmp_path):
    # Pillow writes no such file: a PNG with a filter byte before its row.
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    row = zlib.compress(b"\0" + struct.pack(">6H", 4095, 0, 0, 0, 4095, 65535))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    assert to_pixels(content).tolist() == [[[15, 0, 0], [0, 15, 255]]]
    with pytest.raises(
        ImageError, match="16-bit colour keeps its high byte, so white_level=4095 cannot hold for it; save"
    ):
        to_pixels(content, levels=TWELVE_BITS)
    eight = Image.fromarray(normal(1)[0])
    np.testing.assert_array_equal(to_pixels(eight, levels=TWELVE_BITS), normal(1)[0])


@pytest.mark.parametrize(
    ("largest", "white"),
    [(0, 1023), (1023, 1023), (1024, 4095), (4095, 4095), (4096, 16383), (16384, 65535), (65535, 65535), (None, 65535)],
)
def test_auto_takes_the_smallest_white_that_no_sample_exceeds(largest, white):
    images = EIGHT if largest is None else [np.full((32, 32), min(largest, i * 7), np.uint16) for i in (0, 10_000)]
    model = quiet(detector(white_level="auto", coreset=None).fit, list(images))
    assert model.settings_.white_level == white
    assert model.white_level == "auto"


def test_auto_is_stored_and_scores_as_eight_bits_do(tmp_path):
    train, test = (
        save(tmp_path / "train", TWELVE[:4]),
        save(tmp_path / "test", [*TWELVE[4:], np.uint16(4095) - TWELVE[0]]),
    )
    expected = detector().fit(list(EIGHT[:4])).predict([*EIGHT[4:], 255 - EIGHT[0]])
    model = quiet(detector(white_level="auto").fit, train)
    found = model.predict(test)
    np.testing.assert_array_equal(found.scores, expected.scores)
    model.save(tmp_path / "m.safetensors")
    loaded = PatchCore.load(tmp_path / "m.safetensors", backbone=model.backbone)
    assert loaded.white_level == loaded.settings_.white_level == 4095
    same(loaded.predict(test), found)
    grown = model.partial_fit([np.full((32, 32), 60_000, np.uint16)])
    assert grown.settings_.white_level == 4095


def test_features_carry_the_white_level():
    model = detector(white_level="auto")
    features = model.extract(TWELVE)
    assert features.extraction["white_level"] == 4095
    assert model.fit_features(features).settings_.white_level == 4095
    same(model.predict(TWELVE), detector(white_level=4095).fit(TWELVE).predict(TWELVE))
    with pytest.raises(ValueError, match="white_level=65535; got 4095"):
        detector().fit_features(features)


@pytest.mark.parametrize(
    "source", [iter, lambda images: (image for image in images), lambda images: map(np.copy, images)]
)
def test_auto_refuses_what_is_gone_after_one_reading(source):
    images = source(list(TWELVE))
    with pytest.raises(ValueError, match=r'^white_level="auto" must read the images twice; got .*Pass a list'):
        detector(white_level="auto").fit(images)
    assert len(list(images)) == len(TWELVE)


class Pipe(io.BytesIO):
    """A file object that cannot go back."""

    def seekable(self):
        return False


@pytest.mark.parametrize("alone", [True, False])
def test_auto_refuses_a_file_object_that_cannot_go_back(alone):
    with io.BytesIO() as png:
        Image.fromarray(TWELVE[0]).save(png, format="PNG")
        pipe, file = Pipe(png.getvalue()), io.BytesIO(png.getvalue())
    with pytest.raises(ValueError, match=r'^white_level="auto" must read the images twice'):
        detector(white_level="auto").fit(pipe if alone else [file, pipe])
    assert pipe.tell() == file.tell() == 0
    assert detector(white_level="auto", coreset=None).fit(file).settings_.white_level == 4095


def test_auto_leaves_out_what_cannot_be_read_where_asked(tmp_path):
    folder = save(tmp_path / "a", TWELVE)
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.png"):
        detector(white_level="auto").fit(folder)
    with pytest.warns(UserWarning, match="1 of 7 images were left out"):
        model = detector(white_level="auto").fit(folder, on_error="skip")
    assert model.settings_.white_level == 4095


def test_evaluation_takes_the_level_from_training_images(tmp_path):
    train, bright = TWELVE[:4], [image * 15 for image in TWELVE[4:]]
    save(tmp_path / "train/good", train)
    save(tmp_path / "test/good", TWELVE[4:])
    save(tmp_path / "test/bright", bright)
    options = {"backbone": detector().backbone, "resize": None, "crop": None, "white_level": "auto"}
    for coresets in ((0.5,), (0.5, 1.0)):
        runs = quiet(evaluate, tmp_path, coresets=coresets, **options)
        assert [run.settings.white_level for run in runs] == [4095] * len(coresets)


# --- The warning -------------------------------------------------------------------------------------------


def test_a_fit_warns_where_sixteen_bits_use_less_than_a_sixteenth(tmp_path):
    message = r"largest of all 16-bit samples is \d+ where white is 65535: of 256 levels .* Pass white_level=4095"
    folder = save(tmp_path / "a", TWELVE)
    for call in (detector().fit, detector().extract):
        for images in (TWELVE, folder):
            with pytest.warns(UserWarning, match=message):
                call(images)
    quiet(detector(white_level=4095).fit, TWELVE)
    quiet(detector().fit, [*TWELVE, np.full((32, 32), 4096, np.uint16)])
    quiet(detector().fit, list(EIGHT))


# --- A range of values -------------------------------------------------------------------------------------


def test_thermal_images_are_read_in_their_range(tmp_path):
    path = save(tmp_path / "a", CELSIUS[:1], "tif") / "0.tif"
    with pytest.raises(ImageError, match=r"no stated range; .* value_range=\(low, high\)"):
        to_pixels(path)
    expected = torch.from_numpy(np.repeat(EIGHT[:1], 3, axis=0) / np.float32(255))
    with Image.open(path) as image:
        for one in (
            path,
            path.read_bytes(),
            image,
            CELSIUS[0],
            CELSIUS[0].astype(np.float64),
            torch.from_numpy(CELSIUS[0])[None],
        ):
            torch.testing.assert_close(to_pixels(one, levels=THERMAL), expected, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(read_image(path, levels=THERMAL)[:, :, 0], EIGHT[0])


@pytest.mark.parametrize("dtype", [np.int32, np.int16, np.int64])
def test_integers_of_unknown_range_are_read_in_theirs(dtype, tmp_path):
    samples = np.array([[-100, 0, 100, 300, 500]], dtype)
    levels = Levels(value_range=(0, 400))
    images = [samples, torch.from_numpy(samples)[None]]
    if dtype == np.int32:
        images.append(save(tmp_path / "a", [samples], "tif") / "0.tif")
    for image in images:
        np.testing.assert_allclose(to_pixels(image, levels=levels)[0, 0], [0, 0, 0.25, 0.75, 1])
    with pytest.raises((TypeError, ValueError)):
        to_pixels(samples)


def test_a_range_leaves_eight_and_sixteen_bits_alone():
    for image in (EIGHT[0], TWELVE[0]):
        np.testing.assert_array_equal(to_pixels(image, levels=THERMAL), to_pixels(image))


def test_samples_that_are_no_number_are_refused_by_name(tmp_path):
    broken = CELSIUS[0].copy()
    broken[3, 3] = np.nan
    folder = save(tmp_path / "a", [CELSIUS[1], broken], "tif")
    with pytest.raises(ValueError, match=r"1\.tif: samples must not be NaN"):
        detector(value_range=(20, 80)).fit(folder)
    with pytest.raises(ValueError, match=r"images\[1\]: samples must not be NaN"):
        detector(value_range=(20, 80)).fit([CELSIUS[1], broken])


def test_a_range_is_stored_and_scores_files_as_arrays(tmp_path):
    folder = save(tmp_path / "a", CELSIUS, "tif")
    model = detector(value_range=(20, 80)).fit(folder)
    expected = model.predict(CELSIUS).scores
    model.save(tmp_path / "m.safetensors")
    loaded = PatchCore.load(tmp_path / "m.safetensors", backbone=model.backbone)
    assert loaded.value_range == loaded.settings_.value_range == (20.0, 80.0)
    np.testing.assert_array_equal(loaded.predict(folder).scores, expected)


@pytest.mark.parametrize("value", [(80, 20), (20, 20), (20,), (0, float("nan")), (0, float("inf")), "20,80"])
def test_what_is_no_range_is_refused(value):
    with pytest.raises(
        (TypeError, ValueError), match=r"^value_range must be a pair \(low, high\) of numbers, low < high"
    ):
        detector(value_range=value).fit(CELSIUS)


def test_the_shell_reads_twelve_bits_and_thermal_files(tmp_path):
    large = [np.kron(image, np.ones((2, 2), image.dtype)) for image in (*TWELVE[:3], *CELSIUS[:3])]
    common = ["--backbone", "efficientnet_lite0", "--resize", "64x64", "--crop", "none", "--threads", "1", "--json"]
    for name, images, suffix, words, setting in (
        ("deep", large[:3], "png", ["--white-level", "auto"], {"white_level": 4095}),
        ("thermal", large[3:], "tif", ["--value-range", "20,80"], {"value_range": [20, 80]}),
    ):
        folder, model = save(tmp_path / name, images, suffix), tmp_path / f"{name}.safetensors"
        fitted = CliRunner().invoke(cli.main, ["fit", str(folder), "-o", str(model), *common, *words])
        assert fitted.exit_code == 0, fitted.stderr
        settings = json.loads(fitted.stdout)["settings"]
        assert settings == settings | setting
        report = tmp_path / f"{name}.html"
        asked = [
            "predict",
            str(model),
            str(folder),
            "--json",
            "--report",
            str(report),
            "-o",
            str(tmp_path / f"{name}-out"),
        ]
        answer = CliRunner().invoke(cli.main, asked)
        assert answer.exit_code == 0, answer.stderr
        assert len(json.loads(answer.stdout)["images"]) == 3


def test_threads_share_a_peak():
    peak = Peak()
    levels = Levels(4095, peak=peak)
    for largest in (7, 900, 30):
        levels.white(np.array([1, largest], np.uint16))
    levels.white(np.array([], np.uint16))
    assert (peak.value, peak.share, peak.white, peak.white_level) == (900, 900 / 4095, 4095, 1023)
