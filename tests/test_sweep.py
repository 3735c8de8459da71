"""Settings chosen without a test image: training images held out, synthetic flaws in copies of them, the best row."""

from __future__ import annotations

import json
import shlex
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from small_networks import SIDE, write_category

from patchcore_rs import Ensemble, PatchCore
from patchcore_rs._text import listing
from patchcore_rs.cli import main as cli
from patchcore_rs.images.files import ImageError, read_image
from patchcore_rs.images.layouts import load_dataset
from patchcore_rs.reproduce.validation import KINDS, flaw, validation_set


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_category(tmp_path_factory.mktemp("sweep") / "parts")


def sweep(*arguments):
    return CliRunner().invoke(cli.main, ["reproduce", *map(str, arguments)])


def texture(grey=False):
    image = np.random.default_rng(7).integers(60, 190, (120, 160, 3)).astype(np.uint8)
    return np.repeat(image[:, :, :1], 3, axis=2) if grey else image


# --- Flaws -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("severity", [0.0, 0.5, 0.99])
def test_a_flaw_changes_its_mask_and_nothing_far_from_it(kind, severity):
    image = texture()
    drawn, mask = flaw(image, kind, severity, np.random.default_rng(3))
    assert drawn.dtype == np.uint8
    assert drawn.shape == image.shape
    assert set(np.unique(mask)) == {0, 255}
    inside = mask == 255
    assert 3 <= inside.sum() <= (0.6 if kind == "shade" else 0.05) * inside.size
    changed = (drawn != image).any(axis=2)
    assert changed[inside].mean() > 0.9
    rows, columns = np.nonzero(inside)
    box = np.zeros_like(inside)
    reach = 30 if kind == "shade" else 8  # a shade ends gently
    box[
        max(0, rows.min() - reach) : rows.max() + reach + 1, max(0, columns.min() - reach) : columns.max() + reach + 1
    ] = True
    assert not changed[~box].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_severer_flaw_changes_more(kind):
    def change(severity):
        drawn, mask = flaw(texture(), kind, severity, np.random.default_rng(5))
        return np.abs(drawn.astype(int) - texture())[mask == 255].mean()

    faint, severe = change(0.0), change(0.99)
    assert severe > 1.1 * faint > 0


@pytest.mark.parametrize("kind", KINDS)
def test_flaws_of_grey_images_are_grey(kind):
    drawn, _ = flaw(texture(grey=True), kind, 0.9, np.random.default_rng(3))
    assert (drawn == drawn[:, :, :1]).all()


# --- The split ---------------------------------------------------------------------------------------------


def test_what_is_held_out_is_not_learnt_and_no_test_image_is_seen(parts, tmp_path):
    dataset = load_dataset(parts)
    made = validation_set(dataset, tmp_path / "copies", seed=0)
    good = [sample.path for sample in made.test if not sample.label]
    flawed = [sample for sample in made.test if sample.label]
    assert sorted([*made.train, *good]) == sorted(dataset.train)
    assert len(good) == len(flawed) == 2
    assert not {sample.path for sample in made.test} & {sample.path for sample in dataset.test}
    for path, sample in zip(good, flawed, strict=True):
        changed = (read_image(path) != read_image(sample.path)).any(axis=2)
        assert 0 < changed.sum() < changed.size / 4
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "copies").iterdir()}
    assert validation_set(dataset, tmp_path / "copies", seed=0) == made
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert validation_set(dataset, tmp_path / "others", seed=1).train != made.train


def test_too_few_images_to_hold_some_out_are_refused(parts, tmp_path):
    root = shutil.copytree(parts, tmp_path / "few")
    for path in sorted((root / "train" / "good").iterdir())[:1]:
        path.unlink()
    result = sweep("mtd", root, "--sweep", "--backbone", "one", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "needs 4 of them, got 3" in result.stderr


# --- The command -------------------------------------------------------------------------------------------


def test_a_sweep_ranks_its_rows_and_names_the_best(parts, tmp_path, small):
    arguments = ["mtd", parts, "--sweep", "--backbone", "one", "--output", tmp_path / "out", "--threads", 1]
    result = sweep(*arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "mtd-sweep.json").read_text("utf-8"))
    means = {
        each["row"]: each["ours"]
        for each in report["studies"]["sweep"]
        if (each["metric"], each["category"]) == ("image_auroc", "mean") and each["ours"] is not None
    }
    assert len(means) > 20
    first = next(line for line in result.stdout.splitlines() if line.startswith("one, "))
    grid = {name: mean for name, mean in means.items() if name.count(",") == 2 or "standardized" in name}
    assert any(first.startswith(name) for name, mean in grid.items() if mean == max(grid.values()))
    lines = [line for line in result.stderr.splitlines() if line.startswith("best of ")]
    titles = [line.removeprefix("best of ").partition(": ")[0] for line in lines]
    assert titles == ["Settings, 1 %", "One setting changed, 1 %", "Several scales, or networks, as one, 1 %"]
    assert " --resize " in lines[0]
    for line in lines[:2]:
        options = shlex.split(line.partition(": ")[2])
        assert options[:2] == ["--backbone", "one"]
        checked = CliRunner().invoke(cli.main, ["evaluate", *options, "--help"])
        assert checked.exit_code == 0, checked.output
    ensemble = eval(lines[2].partition(": ")[2], {"Ensemble": Ensemble, "PatchCore": PatchCore})
    sides = sorted(SIDE if each.resize == "auto" else each.resize[0] for each in ensemble.detectors)
    assert len(set(sides)) == len(sides) >= 2
    assert {detector.backbone for detector in ensemble.detectors} == {"one"}
    assert means["one, " + listing([f"{side} px" for side in sides])] == max(
        mean for name, mean in means.items() if " and " in name
    )
    again = sweep(*arguments)
    assert f"{len(means)} finished earlier" in again.stderr


def test_other_tables_have_no_sweep(parts, tmp_path):
    result = sweep("table1", parts, "--sweep", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "--sweep is of mtd alone; got table1. Leave it out" in result.stderr


def test_a_copy_that_an_interrupted_run_left_broken_is_written_anew(parts, tmp_path):
    dataset = load_dataset(parts)
    made = validation_set(dataset, tmp_path, seed=0)
    file = next(sample.path for sample in made.test if sample.label)
    whole = file.read_bytes()
    for broken in (b"", whole[: len(whole) // 2]):
        file.write_bytes(broken)
        validation_set(dataset, tmp_path, seed=0)
        assert file.read_bytes() == whole


def test_what_cannot_be_read_is_left_out_where_that_is_asked_for(parts, tmp_path):
    root = shutil.copytree(parts, tmp_path / "parts")
    dataset = load_dataset(root)
    held = validation_set(dataset, tmp_path / "copies", seed=0).test[0].path
    held.write_bytes(b"no image")
    with pytest.raises(ImageError, match=held.name):
        validation_set(dataset, tmp_path / "copies", seed=0)
    made = validation_set(dataset, tmp_path / "copies", seed=0, on_error="skip")
    assert [sample.label for sample in made.test] == [0, 1]
