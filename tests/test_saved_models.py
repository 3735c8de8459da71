"""A saved detector comes back the same to the bit, and a file that is not whole, safe and consistent does not."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from detectors import detector, flawed, network, normal, pyramid, same
from safetensors.numpy import save_file
from torch.nn import functional

import patchcore_rs
from patchcore_rs import PatchCore, __version__
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.detector.bank import LearnedBank
from patchcore_rs.model import file as model_file
from patchcore_rs.model.calibration import Calibration
from patchcore_rs.model.description import read_description
from patchcore_rs.model.file import FORMAT, ModelFileError, read_model, write_model
from patchcore_rs.model.parameters import METHODS
from patchcore_rs.model.settings import PatchCoreSettings as Settings

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


def test_a_model_is_loaded_from_bytes_and_file_objects(saved, tmp_path):
    content = saved.read_bytes()
    expected = PatchCore.load(saved, backbone=network()).predict(flawed(2))
    (tmp_path / "copy.safetensors").write_bytes(b"head" + content)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("model", content)
    with (
        open(tmp_path / "copy.safetensors", "rb") as file,
        zipfile.ZipFile(tmp_path / "a.zip") as archive,
        archive.open("model") as packed,
    ):
        file.seek(4)
        for source in (content, bytearray(content), memoryview(content), io.BytesIO(content), file, packed):
            same(PatchCore.load(source, backbone=network()).predict(flawed(2)), expected)
    same(patchcore_rs.load(content, backbone=network()).predict(flawed(2)), expected)


@pytest.mark.parametrize(
    ("source", "name", "reason"),
    [
        (lambda _: b"", "bytes", "the file is empty"),
        (lambda _: io.BytesIO(b"no model"), "file object", "not a safetensors file"),
        (lambda path: path.open("rb"), "model.safetensors", "it was fitted with a network of the caller's own"),
        (lambda path: path.read_bytes(), "bytes", "it was fitted with a network of the caller's own"),
    ],
)
def test_what_is_no_whole_model_is_named_where_it_has_a_name(source, name, reason, saved):
    for load in (PatchCore.load, patchcore_rs.load):
        given = source(saved)
        with pytest.raises(ModelFileError, match=reason) as caught:
            load(given)
        assert Path(caught.value.path).name == name
        assert pickle.loads(pickle.dumps(caught.value)).path == caught.value.path
        if hasattr(given, "close"):
            given.close()


def test_what_gives_no_bytes_is_refused(saved):
    for wrong, kind in ((3, "int"), (None, "NoneType"), (io.StringIO("text"), "str")):
        with pytest.raises(TypeError, match=rf"^path must be a path, the bytes .* in binary mode; got {kind}"):
            PatchCore.load(wrong)


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


def write_old(path, model):
    """A file of format 1.1."""
    metadata = {**model.metadata, "format": FORMAT, "version": [1, 1]}
    save_file(dict(model.arrays), path, metadata={"patchcore-rs": json.dumps(metadata)})


def change(model, where, value):
    """The model with a value of its metadata replaced, or deleted where `value` is None."""
    model = replace(model, metadata=copy.deepcopy(model.metadata))
    metadata = model.metadata
    *parents, last = where.split(".")
    for parent in parents:
        metadata = metadata[parent]
    if value is None:
        del metadata[last]
    else:
        metadata[last] = value
    return model


HOSTILE_1 = {
    "no settings": ("settings", None, "the settings lack profile, layers"),
    "settings a list": ("settings", [], "the settings lack"),
    "a setting missing": ("settings.sigma", None, "the settings lack sigma"),
}
HOSTILE_2 = {
    "no requires": ("requires", None, "requires must be a list of settings; got None. Save the model again"),
    "requires of numbers": ("requires", [1], r"requires must be a list of settings; got \[1\]"),
    "requires what nobody knows": (
        "requires",
        ["border", "warp"],
        r"need the setting 'warp', unknown to this patchcore-rs; .* that wrote it \([0-9.a-z]+\) or a later one",
    ),
    "a required setting missing": ("settings.sigma", None, "it requires sigma, which the settings lack; save"),
}
HOSTILE = {
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
    "all of an image unseen": ("unseen", 1, "unseen must be a share from 0 to below 1, or null; got 1"),
    "unseen a string": ("unseen", "0", "unseen must be a number|unseen must be a finite"),
    "threshold a string": ("threshold", "1", "threshold must be a finite|threshold must be a number"),
    "threshold of 10**400": ("threshold", 10**400, "threshold must be a number"),
    "calibration a number": ("calibration", 1, "calibration must be an object or null; got 1"),
    "calibration empty": ("calibration", {}, "calibration threshold must be a number"),
    "libraries a list": (
        "libraries",
        ["torch"],
        r"libraries must be an object of at most 32 versions .* got \['torch'\]",
    ),
    "a version a number": (
        "libraries",
        {"torch": 2},
        "libraries must be an object of at most 32 versions by plain names",
    ),
    "a version with an escape": ("libraries", {"torch": "\x1b[2J"}, "libraries must be an object"),
    "33 libraries": ("libraries", {str(i): "1" for i in range(33)}, "libraries must be an object"),
}


@pytest.mark.parametrize(
    ("write", "case"),
    [(write_old, case) for case in HOSTILE_1 | HOSTILE] + [(write_model, case) for case in HOSTILE_2 | HOSTILE],
)
def test_files_with_wrong_relations_are_refused(write, case, saved):
    where, value, reason = (HOSTILE_1 | HOSTILE_2 | HOSTILE)[case]
    write(saved, change(read_model(saved), where, value))
    with pytest.raises(ModelFileError, match=reason) as caught:
        PatchCore.load(saved, backbone=network())
    assert caught.value.path == str(saved)


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
@pytest.mark.parametrize("write", [write_old, write_model])
def test_a_setting_of_a_wrong_type_is_a_fault_of_the_file(write, name, saved):
    write(saved, change(read_model(saved), f"settings.{name}", {"a": 1}))
    with pytest.raises(ModelFileError, match=rf"{name} must be .*; got {{'a': 1}}; save the model again") as caught:
        read_description(saved)
    assert caught.value.path == str(saved)


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_a_setting_that_a_file_lacks_has_its_stated_value(name, saved):
    """As in a file that was written before there was this setting, so that its scores do not require it."""
    model = read_model(saved)
    required = [other for other in model.metadata["requires"] if other != name]
    if name == "embedding":  # its stated value must fit the bank
        model = replace(model, arrays={"bank": np.ones((51, 1024), np.float32)})
    write_model(saved, change(change(model, "requires", required), f"settings.{name}", None))
    settings = read_description(saved)[1].settings
    assert getattr(settings, name) == METHODS["patchcore"][name].absent
    assert asdict(settings).keys() == {field.name for field in fields(Settings)}


@pytest.mark.parametrize("write", [write_old, write_model])
def test_the_hostile_table_starts_from_a_file_that_loads(write, saved):
    write(saved, read_model(saved))
    assert len(PatchCore.load(saved, backbone=network()).predict(normal(2))) == 2


def test_a_bank_of_another_width_is_refused_at_the_first_prediction(saved):
    model = read_model(saved)
    write_model(saved, replace(model, arrays={"bank": model.arrays["bank"][:, :20]}))
    loaded = PatchCore.load(saved, backbone=network())
    with pytest.raises(ValueError, match=r"24.*20|20.*24"):
        loaded.predict(normal(2))


def test_what_a_later_minor_version_adds_is_ignored(saved):
    write_model(saved, change(change(read_model(saved), "settings.new", 1), "new", {"x": 2}))
    assert len(PatchCore.load(saved, backbone=network()).predict(normal(2))) == 2


EXTRAS = {"source": np.arange(51, dtype=np.uint32), "note": np.array([[0.5]], np.float16)}


def test_a_file_of_a_later_minor_version_is_scored_the_same(saved, monkeypatch):
    expected = PatchCore.load(saved, backbone=network()).predict(flawed(2))
    later = change(change(read_model(saved), "settings.new", 1), "writer", "9.9.9")
    monkeypatch.setattr(model_file, "VERSION", (2, 9))
    write_model(saved, replace(later, optional=EXTRAS))
    monkeypatch.undo()
    assert read_model(saved).version == (2, 9)
    loaded = PatchCore.load(saved, backbone=network())
    same(loaded.predict(flawed(2)), expected)
    loaded.save(saved)
    assert read_model(saved).version == (2, 0)
    assert read_model(saved).optional.keys() == EXTRAS.keys()


def test_a_model_keeps_the_versions_of_the_libraries_that_it_was_fitted_with(saved, monkeypatch):
    packages = ("torch", "numpy", "pillow")
    stored = read_model(saved)
    libraries = stored.metadata["libraries"]
    assert {
        "patchcore-rs": __version__,
        **{name: version(name) for name in packages},
    }.items() <= libraries.items()
    write_model(saved, change(stored, "libraries", {"torch": "1.0+cpu"}))
    before = saved.read_bytes()
    PatchCore.load(saved, backbone=network()).save(saved)
    assert saved.read_bytes() == before
    write_model(saved, change(stored, "libraries", None))  # as of a version that did not say it
    assert read_description(saved)[1].libraries == {}


def test_the_settings_that_scores_need_are_named(saved):
    metadata = read_model(saved).metadata
    free = {"profile", "coreset", "coreset_method", "projection", "projection_kind", "start"} | {
        "clip"
    }  # normalize=False
    assert metadata["requires"] == sorted(metadata["settings"].keys() - free)


def test_arrays_that_change_no_score_last_as_long_as_the_bank(saved):
    write_model(saved, replace(read_model(saved), optional=EXTRAS))

    def kept(model):
        model.save(saved)
        optional = read_model(saved).optional
        assert all(np.array_equal(optional[name], EXTRAS[name]) for name in optional.keys() & EXTRAS.keys())
        return optional.keys()

    def load():
        write_model(saved, replace(read_model(saved), optional=EXTRAS))
        return PatchCore.load(saved, backbone=network())

    assert kept(load()) == EXTRAS.keys()
    with pytest.warns(UserWarning, match="were trained on cannot be checked"):
        assert kept(load().calibrate(normal(10, 4), false_alarm_rate=0.2)) == EXTRAS.keys()
    assert kept(copy.deepcopy(load())) == EXTRAS.keys()
    with pytest.warns(UserWarning, match="threshold does not hold"):
        assert not kept(load().partial_fit(normal(2, 5)))
    assert not kept(load().merge(load()))
    assert kept(load().fit(normal(8))) == {"image_hashes"}


def test_a_model_of_another_method_is_refused(saved):
    class OtherMethod(LearnedBank):
        name = "other"

    class Other(PatchCore):
        method = OtherMethod

    with pytest.raises(ModelFileError, match="it was saved by the method 'patchcore', Other loads 'other'"):
        Other.load(saved, backbone=network())


def test_a_value_above_the_limit_of_the_kernels_is_refused_by_path(saved):
    model = read_model(saved)
    model.arrays["bank"][3, 2] = 1e17
    write_old(saved, model)
    with pytest.raises(ModelFileError, match=r"bank\[3, 2\] is 1e\+17: no magnitude may be above 1e\+16"):
        PatchCore.load(saved, backbone=network())


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


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:reweight")
def test_a_detector_can_be_copied_and_pickled(kind):
    fitted, test = MODELS[kind]()[0].fit(normal(12)).calibrate(normal(10, 4), false_alarm_rate=0.2), flawed(3)
    same(copy.deepcopy(fitted).predict(test), fitted.predict(test))
    pickled = pickle.dumps(fitted)
    same(pickle.loads(pickled).predict(test), fitted.predict(test))
    # A copy of a copy, as it comes from worker to worker.
    same(pickle.loads(pickle.dumps(pickle.loads(pickled))).predict(test), fitted.predict(test))


def test_an_approximate_detector_can_be_pickled():
    pytest.importorskip("faiss", reason="faiss-cpu is not installed (pip install patchcore-rs[faiss])")
    model = detector(index="ivfpq", coreset=None, threads=1).fit(normal(10))
    same(pickle.loads(pickle.dumps(model)).predict(flawed(3)), model.predict(flawed(3)))


@pytest.mark.filterwarnings("ignore:reweight")
def test_threads_unpickle_named_backbones_while_others_run_them():
    model = MODELS["named"]()[0].fit(normal(12))
    pickled, test = pickle.dumps(model), flawed(2)
    expected = model.predict(test)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(model.predict, test) for _ in range(6)]
        loaded = [pool.submit(lambda: pickle.loads(pickled).predict(test)) for _ in range(6)]
        for call in running + loaded:
            same(call.result(), expected)


def predict_in_a_child(model, results):
    results.put(model.predict(flawed(2)).scores)


@pytest.mark.filterwarnings("ignore:reweight")
def test_a_spawned_process_predicts_with_a_detector_that_was_sent_to_it():
    model = MODELS["named"]()[0].fit(normal(12))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=predict_in_a_child, args=(model, results))
    child.start()
    scores = results.get(timeout=120)
    child.join(60)
    assert child.exitcode == 0
    np.testing.assert_array_equal(scores, model.predict(flawed(2)).scores)


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
    assert model.calibration_ == Calibration(**expected["calibration"])
    assert result.labels.tolist() == [1, 1]
