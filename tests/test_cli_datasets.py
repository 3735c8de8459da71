"""Data sets on the command line: what was taken for what is told, --good and --masks settle it, fit takes no masks."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from image_folders import make

from patchcore_rs.cli import main as cli
from patchcore_rs.images.layouts import LAYOUTS

TINY = ["--backbone", "efficientnet_lite0", "--coreset", "8", "--resize", "32x32", "--crop", "none"]


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.fixture
def folder(tmp_path):
    files = [f"{place}/{i}.png" for place in ("train", "test/reference", "test/hole", "drawn/hole") for i in range(2)]
    return make(tmp_path / "set", files)


def test_evaluate_says_what_it_took_for_what(folder):
    assert "say which are good: --good NAME" in refused("evaluate", folder, *TINY)
    options = ["--good", "reference", "--masks", "drawn"]
    result = run("evaluate", folder, *TINY, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[0] == "set: train: 2, good: 2, hole: 2, masks: 2 of 2"
    quiet = run("evaluate", folder.parent, "--category", "all", *TINY, *options, "--json", "--quiet")
    assert "train: " not in quiet.stderr
    [one] = json.loads(quiet.stdout)["runs"]
    assert one["metrics"]["good"] == 2
    assert one["metrics"]["pixel_auroc"] is not None


@pytest.mark.parametrize("inside", ["test/hole", "ground_truth/hole", "masks", "gt", "NG"])
def test_fit_takes_no_folder_that_holds_what_is_not_flawless(tmp_path, inside):
    make(tmp_path / "in", ["0.png", "1.png", f"{inside}/0.png"])
    line = refused("fit", tmp_path / "in", "-o", tmp_path / "m.safetensors", *TINY)
    assert f"holds {inside.partition('/')[0]}, so not all of its images are flawless" in line
    make(tmp_path / "good", ["0.png", "1.png"])
    options = ["-o", tmp_path / "m.safetensors", "--calibrate", tmp_path / "in", *TINY]
    assert "so not all of its images are flawless" in refused("fit", tmp_path / "good", *options)
    assert not (tmp_path / "m.safetensors").exists()


def test_the_option_layout_offers_the_layouts_there_are():
    [layout] = [option for option in cli.evaluate.params if option.name == "layout"]
    assert tuple(layout.type.choices) == LAYOUTS


def test_predict_says_which_masks_it_left_out_quietly_too(tmp_path):
    make(tmp_path / "good", ["0.png", "1.png"])
    make(tmp_path / "set", ["test/hole/0.png", "ground_truth/hole/0_mask.png"])
    model = tmp_path / "m.safetensors"
    assert run("fit", tmp_path / "good", "-o", model, *TINY).exit_code == 0
    result = run("predict", model, tmp_path / "set", "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert [image["path"] for image in json.loads(result.stdout)["images"]] == [str(tmp_path / "set/test/hole/0.png")]
    assert "warning: " in result.stderr
    assert (
        "set: left out 1 image, masks by their names: ground_truth; pass what is none by its own path" in result.stderr
    )
    assert len(json.loads(run("predict", model, tmp_path / "set/ground_truth", "--json").stdout)["images"]) == 1
