"""A saved detector comes back the same to the bit, and a file that is not whole, safe and consistent does not."""

from __future__ import annotations

import copy
import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from detectors import detector, flawed, network, normal, pyramid, same
from torch.nn import functional

from patchcore_rs import PatchCore
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.model.file import ModelFile, ModelFileError, read_model, write_model

DATA = Path(__file__).parent / "data"


MODELS = {
    "callable": lambda: (detector(), {"backbone": pyramid}),
    "standardised": lambda: (detector(standardize=True, coreset=0.5), {"backbone": pyramid}),
    "amazon": lambda: (detector(profile="amazon", projection=4), {"backbone": pyramid}),
    "anomalib": lambda: (PatchCore(profile="anomalib", backbone=pyramid, resize=(32, 32)), {"backbone": pyramid}),
    "normalised": lambda: (detector(normalize=True), {"backbone": pyramid}),
    "module": lambda: (detector(backbone=network(), layers=("1", "3")), {"backbone": network()}),
    "loaded backbone": lambda: (
        detector(backbone=load_backbone(network(), layers=("1",))),
        {"backbone": load_backbone(network(), layers=("1",))},
    ),
    "named": lambda: (PatchCore(backbone="efficientnet_lite0", resize=(32, 32), coreset=2), {}),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:reweight")
def test_a_loaded_model_predicts_the_same_bits_and_saves_the_same_bytes(kind, tmp_path):
    model, extra = MODELS[kind]()
    model.fit(normal(8)).calibrate(normal(10, 4), false_alarm_rate=0.2)
    path, again = tmp_path / "model.safetensors", tmp_path / "again.safetensors"
    model.save(path)
    loaded = PatchCore.load(path, **extra)
    test = np.concatenate([normal(4, 2), flawed(3)])
    same(loaded.predict(test), model.predict(test))
    assert loaded.calibration_ == model.calibration_
    assert loaded.settings_ == model.settings_
    assert loaded.image_size_ == model.image_size_
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()
    np.testing.assert_array_equal(loaded.fit(normal(8)).memory_bank_.features, model.memory_bank_.features)


def test_an_approximate_model_comes_back_the_same(tmp_path):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed (pip install patchcore-rs[faiss])")
    model = detector(index="ivfpq", coreset=None, threads=1).fit(normal(10))
    model.save(tmp_path / "model.safetensors")
    loaded = PatchCore.load(tmp_path / "model.safetensors", backbone=pyramid, threads=1)
    test = np.concatenate([normal(4, 2), flawed(3)])
    result = model.predict(test)
    same(loaded.predict(test), result)
    exact = detector(coreset=None).fit(normal(10)).predict(test)
    assert (result.scores >= exact.scores * (1 - 1e-6)).mean() > 0.5
    np.testing.assert_allclose(result.scores, exact.scores, rtol=0.3)


def test_a_small_approximate_model_is_exact_with_one_warning():
    pytest.importorskip("faiss", reason="faiss-cpu is not installed (pip install patchcore-rs[faiss])")
    with pytest.warns(UserWarning, match="searching exactly instead") as caught:
        model = detector(index="ivfpq").fit(normal(8))
    assert len(caught) == 1
    same(model.predict(flawed(2)), detector().fit(normal(8)).predict(flawed(2)))


def test_saving_is_deterministic_and_stores_no_order_of_fitting(tmp_path):
    for name in ("a", "b"):
        detector(seed=3).fit(normal(5)).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    detector(backbone=network(), layers=("1", "3")).fit(normal(8)).save(path)
    return path


def test_a_model_of_the_callers_own_network_needs_it_again(saved):
    with pytest.raises(ModelFileError, match=r"a network of the caller's own; pass backbone= .* Sequential"):
        PatchCore.load(saved)


def test_other_weights_are_refused_by_both_hashes(saved, tmp_path):
    wrong = network(seed=1)
    hashes = [load_backbone(module, layers=("1", "3")).weights_hash for module in (network(), wrong)]
    with pytest.raises(ModelFileError, match=f"sha256 {hashes[0]}, those of backbone 'Sequential' have {hashes[1]}"):
        PatchCore.load(saved, backbone=wrong)
    torch.save(network().state_dict(), tmp_path / "weights.pt")
    assert PatchCore.load(saved, backbone=wrong, weights=tmp_path / "weights.pt").memory_bank_.shape == (51, 24)
    detector().fit(normal(3)).save(tmp_path / "callable.safetensors")
    with pytest.raises(ModelFileError, match=f"sha256 of a plain callable, those of .* have {hashes[0]}"):
        PatchCore.load(tmp_path / "callable.safetensors", backbone=load_backbone(network()))
    with pytest.raises(ModelFileError, match=r"fitted on the layers \('1', '3'\), those of the backbone given are"):
        PatchCore.load(saved, backbone=load_backbone(network(), layers=("1",)))


def test_a_named_model_with_other_weights_says_what_to_pass(tmp_path):
    path = tmp_path / "model.safetensors"
    model = PatchCore(backbone="efficientnet_lite0", weights=None, resize=(32, 32), coreset=10)
    model.fit(normal(8)).save(path)
    with pytest.raises(ModelFileError, match="pass weights=PATH with the weights it was fitted with"):
        PatchCore.load(path)


def stored(path):
    model = read_model(path)
    return model, {name: model.metadata[name] for name in model.metadata if name not in ("format", "version")}


def change(metadata, where, value):
    *parents, last = where.split(".")
    for parent in parents:
        metadata = metadata[parent]
    if value is None:
        del metadata[last]
    else:
        metadata[last] = value


HOSTILE = {
    "no settings": ("settings", None, "the settings lack profile, layers"),
    "settings a list": ("settings", [], "the settings lack"),
    "a setting missing": ("settings.sigma", None, "the settings lack sigma"),
    "unresolved": ("settings.crop", "auto", "crop must be resolved in a model file"),
    "resize of 10**9": ("settings.resize", 10**9, "resize must be an integer"),
    "sigma of 10**9": ("settings.sigma", 1e9, "sigma must be a number >= 0 and <= 1000"),
    "sigma of 10**400": ("settings.sigma", 10**400, "sigma must be a number"),
    "patch_size a string": ("settings.patch_size", "3", "patch_size must be an integer"),
    "embedding of another width": ("settings.embedding", 100, "embedding is 100, the bank has 24 dimensions"),
    "b of 0": ("settings.reweight", 0, "reweight must be an integer"),
    "unknown profile": ("settings.profile", "x", "profile must be one of"),
    "std of 0": ("settings.std", [0, 0, 0], "std must be a number > 0"),
    "layers a string": ("settings.layers", "layer2", "layers must be distinct module names"),
    "standardised without vectors": ("settings.standardize", True, "standardize is True, mean and deviation say False"),
    "no backbone": ("backbone", None, "backbone must be an object; got None"),
    "a path for a name": ("backbone", {"name": "timm:local-dir:/x", "named": True, "weights_sha256": ""}, "plain name"),
    "a hub for a name": ("backbone", {"name": "timm:hf-hub:a/b", "named": True, "weights_sha256": ""}, "plain name"),
    "no hash": ("backbone.weights_sha256", "abc", "weights_sha256 must be 64 hexadecimal digits"),
    "image size of 0": ("image_size", [0, 32], "image_size must be an integer from 1 to 8192; got 0"),
    "image size missing": ("image_size", None, r"image_size must be a pair \(height, width\); got None"),
    "threshold a string": ("threshold", "1", "threshold must be a finite|threshold must be a number"),
    "threshold of 10**400": ("threshold", 10**400, "threshold must be a number"),
    "calibration a number": ("calibration", 1, "calibration must be an object or null; got 1"),
    "calibration empty": ("calibration", {}, "calibration threshold must be a number"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_with_wrong_relations_are_refused(case, saved):
    where, value, reason = HOSTILE[case]
    model, metadata = stored(saved)
    change(metadata, where, value)
    write_model(saved, ModelFile(model.bank, None, None, metadata))
    with pytest.raises(ModelFileError, match=reason) as caught:
        PatchCore.load(saved, backbone=network())
    assert caught.value.path == str(saved)


def test_the_hostile_table_starts_from_a_file_that_loads(saved):
    model, metadata = stored(saved)
    write_model(saved, ModelFile(model.bank, None, None, metadata))
    assert len(PatchCore.load(saved, backbone=network()).predict(normal(2))) == 2


def test_a_bank_of_another_width_is_refused_at_the_first_prediction(saved):
    model, metadata = stored(saved)
    write_model(saved, ModelFile(model.bank[:, :20], None, None, metadata))
    loaded = PatchCore.load(saved, backbone=network())
    with pytest.raises(ValueError, match=r"24.*20|20.*24"):
        loaded.predict(normal(2))


def test_what_a_later_minor_version_adds_is_ignored(saved):
    model, metadata = stored(saved)
    metadata["settings"]["new"] = 1
    metadata["new"] = {"x": 2}
    write_model(saved, ModelFile(model.bank, None, None, metadata))
    assert len(PatchCore.load(saved, backbone=network()).predict(normal(2))) == 2


def test_a_failed_save_keeps_the_old_model(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*args):
        raise OSError("disk on fire")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk on fire"):
        detector().fit(normal(3)).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_threshold_that_is_no_number_is_not_saved(tmp_path):
    model = detector().fit(normal(3))
    model.threshold_ = float("nan")
    with pytest.raises(ValueError, match="threshold_ must be a number"):
        model.save(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_detector_can_be_copied_and_pickled():
    fitted, test = detector().fit(normal(12)), flawed(3)
    same(copy.deepcopy(fitted).predict(test), fitted.predict(test))
    same(pickle.loads(pickle.dumps(fitted)).predict(test), fitted.predict(test))


def brightness(images):
    return [functional.avg_pool2d(images, 8)]


def write_released(path):
    """What wrote the files in tests/data, when their version of the format was new."""
    model = PatchCore(backbone=brightness, resize=None, crop=None, standardize=True, coreset=12, seed=1)
    model.fit(normal(3)).calibrate(normal(5, 1), false_alarm_rate=0.2).save(path)
    result = model.predict(flawed(2))
    expected = {
        "scores": result.scores.tolist(),
        "map_means": result.maps.mean(axis=(1, 2)).tolist(),
        "calibration": asdict(model.calibration_),
    }
    path.with_suffix(".json").write_text(json.dumps(expected, indent=1) + "\n", "utf-8")


@pytest.mark.parametrize("path", sorted(DATA.glob("model-*.safetensors")), ids=lambda path: path.stem)
def test_every_format_ever_released_is_read(path):
    model = PatchCore.load(path, backbone=brightness)
    expected = json.loads(path.with_suffix(".json").read_text("utf-8"))
    result = model.predict(flawed(2))
    np.testing.assert_allclose(result.scores, expected["scores"], rtol=1e-5)
    np.testing.assert_allclose(result.maps.mean(axis=(1, 2)), expected["map_means"], rtol=1e-4)
    assert asdict(model.calibration_) == expected["calibration"]
    assert result.labels.tolist() == [1, 1]
