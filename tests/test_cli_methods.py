"""`--method`: the other methods by their names from the shell, their options and no others, and what is PatchCore's."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from detectors import flawed, normal, write_folder

import patchcore_rs
from patchcore_rs import PatchCore, evaluate_detector
from patchcore_rs.cli import main as cli
from patchcore_rs.methods.detectors import DETECTORS
from patchcore_rs.model.parameters import METHODS

pytestmark = pytest.mark.usefixtures("one_load_per_backbone")

SMALL = {"backbone": "efficientnet_lite0", "resize": (32, 32), "threads": 1}
WORDS = ("--backbone", "efficientnet_lite0", "--resize", "32x32", "--threads", "1")
OWN = {"padim": {"channels": 5, "epsilon": 0.5}, "spade": {"neighbours": 2, "kappa": 3}, "mahalanobis": {}}


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fails(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    for number, name in enumerate(("train/good", "test/good", "test/hole")):
        (root / name).parent.mkdir(exist_ok=True)
        write_folder(root / name, (flawed if "hole" in name else normal)(6, number))
    return root


@pytest.fixture(scope="module")
def saved(root, tmp_path_factory):
    """A model file of each of the other methods, fitted from the shell, and what was said of it."""
    folder, said = tmp_path_factory.mktemp("models"), {}
    for method, own in OWN.items():
        words = [word for name, value in own.items() for word in (f"--{name}", value)]
        path = folder / f"{method}.safetensors"
        result = succeed("fit", root / "train" / "good", "-o", path, "--method", method, *WORDS, *words, "--json")
        said[method] = path, json.loads(result.stdout)
    return said


@pytest.mark.parametrize("method", OWN)
def test_fit_takes_every_method(method, root, saved):
    path, said = saved[method]
    model, expected = patchcore_rs.load(path, threads=1), DETECTORS[method](**SMALL, **OWN[method])
    assert type(model) is DETECTORS[method]
    expected.fit(root / "train" / "good")
    np.testing.assert_array_equal(model.predict(root / "test").scores, expected.predict(root / "test").scores)
    assert {name: said["settings"][name] for name in OWN[method]} == OWN[method]
    assert (said["bank"] and said["bank"]["rows"]) == (6 * 8 * 8 if method == "spade" else None)
    assert set(said["stages"]) == {"backbone", "aggregation", "model", "scoring"}


@pytest.mark.parametrize("method", OWN)
def test_info_takes_every_method(method, saved):
    path, said = saved[method]
    facts = json.loads(succeed("info", path, "--json").stdout)
    assert facts["method"] == method
    assert facts["settings"] == said["settings"]
    assert method in succeed("info", path).stdout


@pytest.mark.filterwarnings("ignore:neighbours=50 exceeds the 6 training images")
@pytest.mark.parametrize("method", OWN)
def test_evaluate_takes_every_method(method, root):
    result = succeed("evaluate", root, "--method", method, *WORDS, "--seed", 0, "--seed", 3, "--json")
    runs = json.loads(result.stdout)["runs"]
    assert [(each["method"], each["coreset"], each["seed"]) for each in runs] == [(method, None, 0), (method, None, 3)]
    for each in runs:
        expected = evaluate_detector(DETECTORS[method](**SMALL, seed=each["seed"]), root)
        assert each["metrics"]["image_auroc"] == expected.metrics.image_auroc
        assert set(each["fit_ms"]) == {"backbone", "aggregation", "model"}
        assert each["fit_ms"]["model"] > 0
    table = succeed("evaluate", root, "--method", method, *WORDS).stdout
    assert "model" in table
    assert len(re.findall(r"\bcore-", table)) == 2  # the column of both tables, and no stage
    first = next(line.split() for line in table.splitlines() if line.startswith(root.name))
    assert first[1] == "-"  # it has no coreset


def test_without_a_method_it_is_patchcore(root, tmp_path):
    succeed("fit", root / "train" / "good", "-o", tmp_path / "m.safetensors", *WORDS, "--coreset", 4, "--reweight", 2)
    assert type(patchcore_rs.load(tmp_path / "m.safetensors")) is PatchCore
    named = succeed("evaluate", root, "--method", "patchcore", *WORDS, "--coreset", 4, "--reweight", 2, "--json")
    assert [(each["method"], each["coreset"]) for each in json.loads(named.stdout)["runs"]] == [("patchcore", 4)]


def test_the_names_are_those_of_the_model_files(root):
    assert "'patchcore', 'padim', 'mahalanobis', 'spade'" in fails("evaluate", root, "--method", "pca")


@pytest.mark.parametrize("command", ["fit", "evaluate"])
@pytest.mark.parametrize("method", METHODS)
def test_an_option_of_another_method_is_refused_before_any_work(command, method, root, tmp_path):
    output = ("-o", tmp_path / "m.safetensors") if command == "fit" else ()
    given = {"coreset": "0.5", "patch-size": "5", "channels": "all", "epsilon": "1", "kappa": "2", "neighbours": "2"}
    for option, value in given.items():
        having = [name for name, table in METHODS.items() if option.replace("-", "_") in table]
        if method not in having:
            line = fails(command, root, *output, "--method", method, f"--{option}", value)
            assert f"--{option} is an option of --method {having[0]}; got --method {method}" in line
    assert not (tmp_path / "m.safetensors").exists()


def test_only_patchcore_learns_more(root, saved, tmp_path):
    good, output = root / "test" / "good", tmp_path / "m.safetensors"
    for method, (path, _) in saved.items():
        line = fails("fit", good, "-o", output, "--add-to", path)
        assert f"--add-to must be a model of PatchCore, which alone learns more; got {path}" in line
        assert line.endswith(f"of the method '{method}'. Fit one anew to all images")
    assert "--add-to takes the model's settings: leave out --method" in fails(
        "fit", good, "-o", output, "--add-to", saved["padim"][0], "--method", "padim"
    )
    assert not output.exists()


def test_only_patchcore_goes_to_patchcore_inspection(saved, tmp_path):
    path = saved["spade"][0]
    line = fails("convert", path, tmp_path / "folder")
    assert "SOURCE must be a model of PatchCore, the one method that patchcore-inspection has; got " in line
    assert "of the method 'spade'" in line
    assert not (tmp_path / "folder").exists()


def test_what_pictures_of_one_tint_show_is_said_and_the_report_shows_none(root, saved, tmp_path):
    where = ("--output", tmp_path / "out", "--report", tmp_path / "report.html")
    said = "The model says whether an image is anomalous, not where"
    for method in ("padim", "mahalanobis"):
        result = succeed("predict", saved[method][0], root / "test", *where, "--threads", 1)
        page, placeless = (tmp_path / "report.html").read_text("utf-8"), method == "mahalanobis"
        assert (result.stderr.count(said) == 1) == placeless
        assert page.count("one value for the whole image") == (12 if placeless else 0)
        assert page.count('alt="heat map of') == (0 if placeless else 12)
    assert said not in succeed("predict", saved["mahalanobis"][0], root / "test").stderr


def test_help_says_which_models_know_no_colours():
    text = " ".join(succeed("predict", "--help").stdout.split())
    assert "a method that cannot know them before it is calibrated, as Mahalanobis-AD" in text
