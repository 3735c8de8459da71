"""Presets: a network and settings that go together, between what the caller says and what the backbone recommends."""

from __future__ import annotations

import pytest
from detectors import flawed, normal, pyramid, write_folder

from patchcore_rs import PatchCore, evaluate
from patchcore_rs.model import profiles
from patchcore_rs.model.parameters import METHODS
from patchcore_rs.model.settings import check

OWN = {
    "backbone": "efficientnet_lite0",
    "layers": ("blocks.4",),
    "embedding": 7,
    "resize": (40, 48),
    "crop": None,
    "coreset": 0.3,
}


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setitem(profiles.PRESETS, "fast", OWN)


def checked(**arguments):
    return check(PatchCore(**arguments).get_params(), "patchcore")


@pytest.mark.parametrize("preset", profiles.PRESETS)
def test_a_preset_is_arguments_that_may_be_left_to_it(preset):
    table = METHODS["patchcore"]
    chosen = profiles.PRESETS[preset]
    assert set(chosen) <= {name for name, parameter in table.items() if parameter.auto or name == "backbone"}
    assert {name: table[name].check(value, name) for name, value in chosen.items()} == chosen
    found = checked(preset=preset)
    assert {name: found[name] for name in chosen} == chosen


def test_without_a_preset_a_tenth_is_remembered_and_nothing_standardised():
    found = checked()
    assert (found["coreset"], found["standardize"], found["backbone"], found["layers"]) == (0.1, False, "auto", "auto")


def test_what_is_given_wins_over_the_preset(own):
    found = checked(preset="fast", coreset=50, layers=("blocks.10",), resize=None)
    assert (found["coreset"], found["layers"], found["resize"]) == (50, ("blocks.10",), None)
    assert (found["embedding"], found["backbone"]) == (7, "efficientnet_lite0")


def test_another_network_takes_what_is_not_of_the_presets_network_alone(own):
    found = checked(preset="fast", backbone="resnet18")
    assert (found["layers"], found["embedding"]) == ("auto", "auto")
    assert (found["resize"], found["coreset"]) == ((40, 48), 0.3)


def test_the_preset_wins_over_the_backbone_and_the_profile(own):
    model = PatchCore(preset="fast", profile="amazon", backbone=pyramid).fit(normal(4))
    assert model.settings_.resize == (40, 48)
    assert model.settings_.coreset == 0.3
    assert model.settings_.distance == "squared"  # the profile's, as the preset says nothing of it


def test_a_model_file_has_what_the_preset_stood_for(own, tmp_path, monkeypatch):
    model = PatchCore(preset="fast", backbone=pyramid).fit(normal(4))
    model.save(tmp_path / "model.safetensors")
    monkeypatch.setitem(profiles.PRESETS, "fast", {"coreset": 0.9})
    loaded = PatchCore.load(tmp_path / "model.safetensors", backbone=pyramid)
    assert loaded.settings_ == model.settings_
    assert (loaded.preset, loaded.coreset) == (None, 0.3)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"preset must be 'fast', 'accurate' or None; got 'best'"):
        PatchCore(preset="best").fit(normal(2))


def test_evaluate_takes_the_presets_coreset(own, tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        write_folder(tmp_path / part / "good", normal(4, seed=len(part)))
    write_folder(tmp_path / "test" / "bad", flawed(2))
    [run] = evaluate(tmp_path, preset="fast", backbone=pyramid, pixels="model")
    assert run.settings.coreset == 0.3


def test_a_subclass_of_another_method_keeps_its_own_meaning_of_these_names():
    given = {"preset": "sheet", "coreset": "auto"}
    assert check(given, "padim") == given
