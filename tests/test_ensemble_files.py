"""The file of an ensemble: all its members, back to the bit, and each of them checked as a file of its own."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from detectors import detector, flawed, network, normal, pyramid, same, unlike, write_folder

import patchcore_rs
from patchcore_rs import Ensemble, ModelFileError, PatchCore
from patchcore_rs.cli.main import main
from patchcore_rs.model.file import read_model, write_model

TRAIN, TEST = normal(8), np.concatenate([normal(3, 2), flawed(3)])
BACKBONES = [pyramid, network()]


@pytest.fixture(scope="module")
def fitted():
    """Not to be changed."""
    return Ensemble(unlike()).fit(TRAIN)


@pytest.fixture
def saved(fitted, tmp_path):
    path = tmp_path / "ensemble.safetensors"
    fitted.save(path)
    return path


@pytest.mark.parametrize("combine", ["minmax", "zscore"])
def test_a_loaded_ensemble_predicts_the_same_bits_and_saves_the_same_bytes(combine, tmp_path):
    model = Ensemble(unlike(), combine=combine).fit(TRAIN).calibrate(normal(9, 3), false_alarm_rate=0.2)
    path, again = tmp_path / "ensemble.safetensors", tmp_path / "again.safetensors"
    model.save(path)
    for loaded in (Ensemble.load(path, backbone=BACKBONES), patchcore_rs.load(path, backbone=BACKBONES)):
        assert type(loaded) is Ensemble
        same(loaded.predict(TEST), model.predict(TEST))
        assert loaded.predict(TRAIN, in_training=True).in_training.all()
        assert (loaded.calibration_, loaded.map_calibration_) == (model.calibration_, model.map_calibration_)
        assert (loaded.combine, loaded.image_size_, loaded.summary_) == (combine, (32, 32), model.summary_)
        loaded.save(again)
        assert again.read_bytes() == path.read_bytes()
        np.testing.assert_array_equal(loaded.fit(TRAIN).predict(TEST).scores, model.predict(TEST).scores)


def test_an_ensemble_can_be_copied_and_pickled(fitted):
    expected = fitted.predict(TEST)
    same(copy.deepcopy(fitted).predict(TEST), expected)
    same(pickle.loads(pickle.dumps(fitted)).predict(TEST), expected)


def test_each_member_may_have_weights_of_its_own(tmp_path):
    parts = [detector(backbone=network(seed), layers=("1", "3")) for seed in (0, 1)]
    path, files = tmp_path / "ensemble.safetensors", [tmp_path / "0.pt", tmp_path / "1.pt"]
    model = Ensemble(parts).fit(TRAIN)
    model.save(path)
    for seed, file in enumerate(files):
        torch.save(network(seed).state_dict(), file)
    same(Ensemble.load(path, backbone=network(5), weights=files).predict(TEST), model.predict(TEST))
    with pytest.raises(
        ModelFileError, match=r"ensemble.safetensors: member 0: it was fitted with weights of the sha256"
    ):
        Ensemble.load(path, backbone=network(5), weights=files[::-1])
    with pytest.raises(ValueError, match="weights must be one for all members or a list of 2, one a member; got 3"):
        Ensemble.load(path, backbone=network(5), weights=[None] * 3)


def test_a_file_is_loaded_by_the_class_that_saved_it(saved, tmp_path):
    with pytest.raises(
        ModelFileError, match=r"saved by the method 'ensemble', PatchCore loads 'patchcore'; patchcore_rs"
    ):
        PatchCore.load(saved)
    with pytest.raises(
        ModelFileError, match="member 0: it was fitted with a network of the caller's own; pass backbone"
    ):
        Ensemble.load(saved)
    single = tmp_path / "single.safetensors"
    detector().fit(TRAIN).save(single)
    with pytest.raises(
        ModelFileError, match="saved by the method 'patchcore', Ensemble loads 'ensemble'; patchcore_rs"
    ):
        Ensemble.load(single)


def changed(where, value):
    """What replaces a value of the metadata, or deletes it where `value` is None."""

    def change(model):
        model = replace(model, metadata=copy.deepcopy(model.metadata))
        *parents, last = where
        inner = model.metadata
        for parent in parents:
            inner = inner[parent]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
        return model

    return change


def arrays(changes):
    """What replaces arrays, or deletes those that are None."""

    def change(model):
        found = dict(model.arrays) | changes
        return replace(model, arrays={name: array for name, array in found.items() if array is not None})

    return change


HOSTILE = {
    "no members": (changed(["members"], None), "members must be one object for each, of the methods patchcore and pat"),
    "members a number": (changed(["members"], 2), "members must be one object for each"),
    "a member a list": (changed(["members", 1], []), "members must be one object for each"),
    "a member more": (lambda m: changed(["members"], m.metadata["members"] * 2)(m), "members must be one object for"),
    "a member of no method": (changed(["members", 1, "method"], None), "members must be one object for each"),
    "a member of another method": (changed(["members", 1, "method"], "padim"), "members must be one object for each"),
    "no combine": (changed(["settings", "combine"], None), "it requires combine, which the settings lack"),
    "settings a list": (changed(["settings"], []), "combine must be one of 'minmax', 'zscore'; got None"),
    "another combine": (changed(["settings", "combine"], "product"), "combine must be one of .*; got 'product'"),
    "a combine of a wrong type": (changed(["settings", "combine"], {}), "combine must be one of 'minmax', 'zscore'"),
    "requires what nobody knows": (changed(["requires"], ["combine", "warp"]), "need the setting 'warp', unknown to"),
    "no requires": (changed(["requires"], None), "requires must be a list of settings; got None"),
    "a member requires what nobody knows": (
        changed(["members", 1, "requires"], ["x"]),
        "need the setting 'x', unknown",
    ),
    "a member without requires": (changed(["members", 1, "requires"], None), "requires must be a list of settings"),
    "a member's setting": (changed(["members", 1, "settings", "sigma"], 1e9), "member 1: sigma must be a number"),
    "a member's width": (changed(["members", 1, "settings", "embedding"], 7), "member 1: embedding is 7, the bank has"),
    "a member's hash": (
        changed(["members", 0, "backbone", "weights_sha256"], "x"),
        "member 0: backbone weights_sha256",
    ),
    "a member's path": (
        changed(["members", 0, "backbone"], {"name": "/x", "named": True, "weights_sha256": ""}),
        "member 0: backbone must have a plain name",
    ),
    "a member normalised": (changed(["members", 1, "settings", "normalize"], True), "must have normalize=False"),
    "a member cropped": (changed(["members", 1, "settings", "crop"], 24), "must see the same part of an image"),
    "a threshold": (changed(["threshold"], "1"), "threshold must be a number"),
    "a calibration": (changed(["calibration"], 1), "calibration must be an object or null; got 1"),
    "map values": (changed(["map_values"], {"median": 2, "upper": 1}), "map_values must be float32 with median <="),
    "no scale": (
        arrays({"score_width": None}),
        "it must hold the arrays score_offset, score_width, map_offset, map_width",
    ),
    "a scale of one": (arrays({"map_offset": np.zeros(1)}), r"map_offset must have the shape \(2,\)"),
    "a scale of floats": (arrays({"map_offset": np.zeros(2, np.float32)}), "map_offset must be float64"),
    "a width of 0": (arrays({"score_width": np.array([1.0, 0.0])}), "score_width must be > 0"),
    "an offset that is none": (
        arrays({"map_offset": np.array([0, np.nan])}),
        r"map_offset\[1\] is nan: every value must",
    ),
    "a bank too large": (
        arrays({"0.patchcore.bank": np.full((3, 9), 1e17, np.float32)}),
        r"member 0: bank\[0, 0\] is 1e\+17: no magnitude",
    ),
    "a bank of doubles": (arrays({"1.patchcore.bank": np.zeros((3, 24))}), "member 1: bank must be float32"),
    "no bank": (arrays({"1.patchcore.bank": None}), r"score_offset must have the shape \(1,\); got \(2,\)"),
    "a gap": (
        lambda m: arrays({"1.patchcore.bank": None, "2.patchcore.bank": m.arrays["1.patchcore.bank"]})(m),
        r"the members of an ensemble must be numbered from 0 on, each of one method; got 0\.patchcore, 2\.patchcore",
    ),
    "two methods": (
        arrays({"1.ensemble.score_width": np.ones(1)}),
        r"each of one method; got 0\.patchcore, 1\.ensemble, 1\.patchcore",
    ),
    "an ensemble in it": (
        lambda m: arrays({"2.ensemble.bank": m.arrays["1.patchcore.bank"]})(m),
        "member 2 must be of one of the methods .*; got ensemble",
    ),
    "an unknown method": (
        arrays({"2.magic.bank": np.zeros(1)}),
        "member 2 must be of one of the methods .*; got magic",
    ),
    "an array of no member": (arrays({"bank": np.zeros((1, 1), np.float32)}), "it must hold the arrays score_offset"),
}


def write_unchecked(path, model, monkeypatch):
    """A file that the writer would refuse."""
    with monkeypatch.context() as context:
        context.setattr("patchcore_rs.model.file.check_arrays", lambda *_: None)
        write_model(path, model)


@pytest.mark.parametrize("case", HOSTILE)
def test_files_with_wrong_relations_are_refused(case, saved, monkeypatch):
    change, reason = HOSTILE[case]
    write_unchecked(saved, change(read_model(saved)), monkeypatch)
    with pytest.raises(ModelFileError, match=reason) as caught:
        patchcore_rs.load(saved, backbone=BACKBONES)
    assert caught.value.path == str(saved)


def test_the_hostile_table_starts_from_a_file_that_loads(saved, monkeypatch):
    write_unchecked(saved, changed(["new"], 1)(read_model(saved)), monkeypatch)
    assert len(patchcore_rs.load(saved, backbone=BACKBONES).predict(TEST)) == len(TEST)


@pytest.mark.usefixtures("one_load_per_backbone")
@pytest.mark.filterwarnings("ignore:reweight")
def test_the_command_line_takes_an_ensemble(tmp_path):
    parts = [PatchCore(backbone="efficientnet_lite0", resize=(32, 32), coreset=count) for count in (4, 8)]
    model, path = Ensemble(parts).fit(TRAIN).calibrate(normal(9, 3), false_alarm_rate=0.2), tmp_path / "e.safetensors"
    model.save(path)
    folder = write_folder(tmp_path / "test", TEST)

    def run(*arguments):
        result = CliRunner().invoke(main, [str(word) for word in arguments])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    report = tmp_path / "report.html"
    answer = json.loads(run("predict", path, folder, "--json", "-q", "--batch-size", "2", "--report", report))
    expected = model.predict(folder)
    assert [image["score"] for image in answer["images"]] == expected.scores.tolist()
    assert answer["threshold"] == model.threshold_
    assert "2 members: 4 patches of" in report.read_text("utf-8")
    facts = json.loads(run("info", path, "--json", "-q"))
    assert (facts["method"], facts["settings"]) == ("ensemble", {"combine": "minmax"})
    assert [member["bank"]["rows"] for member in facts["members"]] == [4, 8]
    assert "requires" not in facts["members"][0]
    assert "members.1.settings.sigma" in run("info", path, "-q")
