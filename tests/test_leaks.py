"""Images that were trained on are known again: a calibration refuses them or warns, and so does an evaluation."""

from __future__ import annotations

import hashlib
import io
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from detectors import detector, flawed, normal, pyramid, write_folder
from PIL import Image

from patchcore_rs import FeatureSet, PatchCore, evaluate
from patchcore_rs.cli.main import main
from patchcore_rs.cli.models import model_facts
from patchcore_rs.images.pixels import image_hash
from patchcore_rs.model.file import read_model, write_model

TRAIN, OTHERS = normal(8, 1), normal(8, 2)


def hashes(*images, **options):
    """Those of images one by one, as they come out of a detector with these arguments."""
    return [int(detector(**options).extract([image]).image_hashes[0]) for image in images]


# --- the hash -----------------------------------------------------------------------------------------------


def by_definition(samples):
    data = samples.astype(samples.dtype.newbyteorder("<"))
    said = f"{data.dtype.str} {data.shape}".encode() + data.tobytes()
    return int.from_bytes(hashlib.sha256(said).digest()[:8], "little", signed=True)


def test_a_hash_is_what_its_definition_says_and_never_changes_as_files_keep_it():
    numbers = np.arange(100 * 90 * 3, dtype=np.uint32).reshape(100, 90, 3)
    images = (numbers * 2654435761 >> 24).astype(np.uint8), numbers[..., 0].astype(np.uint16), numbers[:5].astype("f4")
    for samples in images:
        assert image_hash(samples) == by_definition(samples)
    assert image_hash(images[0]) == 9191851686858893633


def test_images_that_differ_in_anything_have_other_hashes():
    image = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    images = [image, image.reshape(90, 80, 3), image[:79], image.astype(np.uint16), image[::-1], image + np.uint8(1)]
    for place in (0, 21_599):
        changed = image.copy()
        changed.flat[place] ^= 1
        images.append(changed)
    assert len(set(map(image_hash, images))) == len(images)


def test_order_in_memory_and_repeated_channels_make_no_difference():
    grey = np.random.default_rng(0).integers(0, 65536, (40, 50), dtype=np.uint16)
    for same in (grey.astype(">u2"), np.asfortranarray(grey), grey[:, :, None], grey[:, :, None].repeat(1, axis=2)):
        assert image_hash(same) == image_hash(grey)
    assert image_hash(np.broadcast_to(grey[:, :, None], (40, 50, 3))) == image_hash(grey)
    assert image_hash(np.empty((0, 5, 3), np.uint8)) != image_hash(np.empty((0, 6, 3), np.uint8))


def test_an_image_of_8_bits_has_one_hash_in_every_form(tmp_path):
    image = TRAIN[0]
    pillow, buffer = Image.fromarray(image), io.BytesIO()
    pillow.save(buffer, format="BMP")
    pillow.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn to the right shows it upright
    Image.fromarray(np.rot90(image).copy()).save(tmp_path / "turned.png", exif=exif)
    opaque = np.concatenate([image, np.full((32, 32, 1), 255, np.uint8)], axis=2)
    forms = (image, pillow, buffer.getvalue(), tmp_path / "a.png", tmp_path / "turned.png", opaque)
    found = hashes(*forms, torch.from_numpy(image).permute(2, 0, 1))
    found += hashes(image, resize=(16, 16)) + hashes(image, crop=20) + hashes(image, resampling="tensor")
    found += [int(detector().extract([image[..., ::-1]], channels="bgr").image_hashes[0])]
    assert set(found) == {image_hash(image)}
    grey = image[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    found = hashes(grey, grey[..., None], grey[..., None].repeat(3, axis=2), tmp_path / "grey.png")
    assert len({*found, image_hash(image)}) == 2


def test_deeper_samples_are_hashed_before_they_are_scaled(tmp_path):
    deep = np.random.default_rng(0).integers(0, 4096, (32, 32), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    with Image.open(tmp_path / "deep.png") as pillow:
        found = hashes(tmp_path / "deep.png", tmp_path / "deep.tif", pillow, deep, deep[..., None], white_level=4095)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a white level that is too large
        found += hashes(deep, tmp_path / "deep.png")
        nearly = deep.copy()
        nearly[5, 5] ^= 1  # the same 8 bits
        assert set(found) == {image_hash(deep)} != set(hashes(nearly))
    floats = np.random.default_rng(0).uniform(-20, 80, (32, 32)).astype(np.float32)
    Image.fromarray(floats).save(tmp_path / "thermal.tif")
    for value_range in ((-20, 80), (0, 50)):  # what is below black is cut off
        found = hashes(floats, floats[..., None], tmp_path / "thermal.tif", value_range=value_range)
        assert set(found) == {image_hash(floats)}


# --- what a model knows -------------------------------------------------------------------------------------


def known(model):
    return model.predict(np.concatenate([TRAIN, OTHERS]), in_training=True).in_training


def test_a_model_knows_its_images_again_after_a_file_and_by_features(tmp_path):
    model = detector().fit(TRAIN)
    assert known(model).tolist() == [True] * 8 + [False] * 8
    model.save(tmp_path / "m.safetensors")
    loaded = PatchCore.load(tmp_path / "m.safetensors", backbone=pyramid)
    np.testing.assert_array_equal(known(loaded), known(model))
    assert read_model(tmp_path / "m.safetensors").optional["image_hashes"].tolist() == sorted(map(image_hash, TRAIN))
    assert model_facts(tmp_path / "m.safetensors")["image_hashes"] == 8
    apart = detector()
    apart.fit_features(apart.extract(TRAIN))
    prediction = apart.predict_features(apart.extract(np.concatenate([OTHERS[:2], TRAIN[:1]])))
    assert prediction.in_training.tolist() == [False, False, True]
    assert prediction[2].in_training.tolist() == [True]


def test_partial_fit_and_merge_unite_what_is_known():
    grown = detector().fit(TRAIN[:3]).partial_fit(TRAIN[3:])
    merged = detector().fit(TRAIN[:5]).merge(detector().fit(TRAIN[4:]))
    for model in (grown, merged):
        assert known(model).tolist() == [True] * 8 + [False] * 8


def test_images_are_hashed_only_where_their_hashes_are_used(monkeypatch, tmp_path):
    model, unknown = detector().fit(TRAIN), forgetful(tmp_path / "m.safetensors")
    hashed = []
    monkeypatch.setattr(
        "patchcore_rs.features.extractor.image_hash", lambda samples: hashed.append(1) or image_hash(samples)
    )
    deep = [image[..., 0].astype(np.uint16) * 257 for image in OTHERS[:2]]
    assert model.predict(OTHERS).in_training is model.predict(deep).in_training is None
    assert unknown.predict(OTHERS, in_training=True).in_training is None  # there is nothing to compare with
    assert model._fitted.extractor.prepare(OTHERS[0]).shape == (3, 32, 32)
    assert not hashed
    assert model.predict(TRAIN[:3], in_training=True).in_training.tolist() == [True] * 3
    assert len(hashed) == 3
    model.extract(OTHERS)
    model.partial_fit(OTHERS[:2])
    model.calibrate(OTHERS[2:], false_alarm_rate=0.2)
    assert len(hashed) == 3 + 8 + 2 + 6
    with pytest.raises(TypeError, match="in_training must be True or False; got 1"):
        model.predict(TRAIN, in_training=1)


def forgetful(path):
    """A model file without hashes, as an older one."""
    detector().fit(TRAIN).save(path)
    write_model(path, replace(read_model(path), optional={}))
    assert model_facts(path)["image_hashes"] is None
    return PatchCore.load(path, backbone=pyramid)


def test_a_model_that_does_not_know_its_images_says_so_and_never_half_knows(tmp_path):
    model = forgetful(tmp_path / "m.safetensors")
    own = detector()
    own.fit_features(replace(own.extract(TRAIN), image_hashes=None))
    united = detector().fit(OTHERS[:2])
    for unknown in (model, own, forgetful(tmp_path / "n.safetensors").partial_fit(OTHERS[:1]), united.merge(model)):
        assert known(unknown) is None
        with pytest.warns(
            UserWarning, match="whether images to calibrate on were trained on cannot be checked"
        ) as said:
            unknown.calibrate(TRAIN[:4], false_alarm_rate=0.3)
        assert [warning.filename for warning in said] == [__file__]


def test_hashes_of_a_set_are_checked():
    rows = np.ones((4, 3), np.float32)
    with pytest.raises(TypeError, match=r"image_hashes must be \(n,\) int64; got \(1,\) uint64"):
        FeatureSet(rows, (2, 2), (8, 8), image_hashes=np.zeros(1, np.uint64))
    with pytest.raises(ValueError, match="image_hashes must have an entry for each of the 1 images; got 2"):
        FeatureSet(rows, (2, 2), (8, 8), image_hashes=np.zeros(2, np.int64))


# --- calibration --------------------------------------------------------------------------------------------


def test_a_calibration_on_training_images_alone_is_refused_and_changes_nothing():
    model = detector().fit(TRAIN).calibrate(OTHERS, false_alarm_rate=0.2)
    before = model._fitted
    with pytest.raises(
        ValueError, match=r"normal_images must be images that were not trained on; got 3 images, all tr"
    ):
        model.calibrate([Image.fromarray(image) for image in TRAIN[:3]], false_alarm_rate=0.3)
    assert model._fitted is before


def test_a_calibration_says_how_many_training_images_there_are_among_others():
    model = detector().fit(TRAIN)
    with pytest.warns(UserWarning, match=r"3 of 11 images to calibrate on were trained on and score less") as said:
        model.calibrate(np.concatenate([TRAIN[:3], OTHERS]), false_alarm_rate=0.2)
    assert [warning.filename for warning in said] == [__file__]
    assert model.calibration_.images == 11


# --- evaluation ---------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    """Two of four good test images, and one of three flawed ones, are training images of other names."""
    for name, images in (
        ("train/good", np.concatenate([TRAIN, flawed(1)])),
        ("test/good", np.concatenate([OTHERS[:2], TRAIN[2:4]])),
        ("test/hole", flawed(3)),
    ):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        write_folder(tmp_path / "set" / name, images)
    return tmp_path / "set"


LEAK = "2 of 4 good and 1 of 3 anomalous test images were trained on, the first "


@pytest.mark.parametrize("coresets", [(0.1,), (0.1, 0.2)])
def test_an_evaluation_warns_once_of_test_images_that_were_trained_on_and_strictly_refuses_them(dataset, coresets):
    options = {"backbone": pyramid, "resize": None, "crop": None, "coresets": coresets}
    with pytest.warns(UserWarning, match=LEAK) as said:
        runs = evaluate(dataset, **options)
    assert [warning.filename for warning in said] == [__file__]
    names = [
        path.name
        for path, leaked in zip(runs[0].inspection.paths, runs[0].inspection.in_training, strict=True)
        if leaked
    ]
    assert names == ["2.png", "3.png", "0.png"]
    with pytest.raises(ValueError, match=LEAK):
        evaluate(dataset, strict=True, **options)
    with pytest.raises(TypeError, match="strict must be True or False; got 1"):
        evaluate(dataset, strict=1, **options)
    for leaked in ("test/good/2.png", "test/good/3.png", "test/hole/0.png"):
        (dataset / leaked).unlink()
    assert evaluate(dataset, strict=True, **options)[0].metrics.good == 2


# --- the command line ---------------------------------------------------------------------------------------


def run(code, *arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stderr


SMALL = ("--backbone", "efficientnet_lite0", "--coreset", 9, "--resize", "32x32", "-q")


def test_fit_refuses_to_calibrate_on_what_it_learns_from(tmp_path, monkeypatch):
    good, path = write_folder(tmp_path / "good", TRAIN), tmp_path / "m.safetensors"
    command = ("fit", good, "-o", path, *SMALL, "--false-alarm-rate", 0.3, "--calibrate")
    with monkeypatch.context() as patch:
        patch.setattr(PatchCore, "fit", None)  # not begun
        for same in (good, good / "3.png"):
            assert f"--calibrate must be a folder of images that are not trained on; got {same}" in run(
                2, *command, same
            )
    copies = shutil.copytree(good, tmp_path / "copies")
    message = "--calibrate must be images that were not trained on; got 8 images, all trained on: "
    assert f"error: {message}" in run(2, *command, copies)
    assert not path.exists()
    write_folder(tmp_path / "more", OTHERS[:4])
    (copies / "1.png").rename(tmp_path / "more" / "copy.png")
    assert "warning: 1 of 5 images to calibrate on were trained on" in run(0, *command, tmp_path / "more")


def test_evaluate_has_an_option_to_refuse_what_was_trained_on(dataset):
    assert f"warning: set: {LEAK}{dataset / 'test/good/2.png'}" in run(0, "evaluate", dataset, *SMALL)
    assert f"error: set: {LEAK}" in run(2, "evaluate", dataset, *SMALL, "--strict")
