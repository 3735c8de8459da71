"""Signature, docstring, command line, settings and profiles agree with the one table of parameters."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from detectors import normal, write_folder

from patchcore_rs import PatchCore, greedy_coreset
from patchcore_rs.cli import main as cli
from patchcore_rs.methods.load import DETECTORS
from patchcore_rs.model import settings as checks
from patchcore_rs.model.parameters import AUTO, METHODS, score_settings
from patchcore_rs.model.profiles import PROFILES, Profile
from patchcore_rs.model.settings import PatchCoreSettings as Settings

TABLE = METHODS["patchcore"]
STORED = {name: parameter for name, parameter in TABLE.items() if parameter.stored}
SETTINGS = Settings(**{name: parameter.absent for name, parameter in STORED.items()})


def check(parameters):
    return checks.check(parameters, "patchcore")


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


# --- The table and what is written beside it ---------------------------------------------------------------


@pytest.mark.parametrize("method", DETECTORS)
def test_the_signature_is_the_tables(method):
    signature, table = inspect.signature(DETECTORS[method]).parameters, METHODS[method]
    assert list(signature) == list(table) == [parameter.name for parameter in table.values()]
    for name, parameter in signature.items():
        assert repr(parameter.default) == repr(table[name].default), name
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("method", DETECTORS)
def test_every_entry_of_the_docstring_begins_with_the_tables_sentence(method):
    table = METHODS[method]
    args = inspect.getdoc(DETECTORS[method]).split("Args:\n")[1].split("\n\n")[0]
    entries = dict(re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", args, re.MULTILINE))
    assert list(entries) == list(table)
    for name, text in entries.items():
        rest = " ".join(text.split()).removeprefix(table[name].help)
        assert rest[:1] in {".", ":", ",", ";"}, f"{name}: {text}"
        assert text.endswith("."), name


@pytest.mark.parametrize("method", DETECTORS)
def test_settings_are_what_is_stored(method):
    stored = {name for name, parameter in METHODS[method].items() if parameter.stored}
    assert {field.name for field in dataclasses.fields(checks.SETTINGS[method])} == stored
    assert set(TABLE) - set(STORED) == {"preset", "backbone", "weights", "device", "batch_size", "threads"}


def test_profiles_are_made_of_parameters_that_may_be_auto():
    names = {field.name for field in dataclasses.fields(Profile)}
    assert names < set(TABLE)
    assert {name for name, parameter in TABLE.items() if parameter.auto} == names | {
        "layers",
        "mean",
        "std",
        "white_level",
        "standardize",
        "coreset",
        "round_floats",
        "device",
    }
    for profile in PROFILES.values():
        values = dataclasses.asdict(profile)
        assert check(values) == values


def test_a_default_passes_its_own_check():
    defaults = {name: parameter.default for name, parameter in TABLE.items()}
    assert check(defaults) == defaults | {"standardize": False, "coreset": 0.1}
    assert {name for name, value in defaults.items() if value == AUTO} == {
        name for name, parameter in TABLE.items() if parameter.auto and name != "white_level"
    }


def test_the_settings_that_decide_scores_are_named():
    chosen_rows = {"profile", "coreset", "coreset_method", "projection", "projection_kind", "start"}
    assert score_settings("patchcore") == tuple(name for name in STORED if name not in chosen_rows)


@pytest.mark.parametrize(
    "module", ["patchcore_rs.model.parameters", "patchcore_rs.model.settings", "patchcore_rs._checks"]
)
def test_the_table_needs_neither_numpy_nor_torch(module):
    code = f"import sys, {module}; print([m for m in ('numpy', 'torch', 'click') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# --- One policy for wrong types and wrong values -----------------------------------------------------------

# What no parameter is, and what each parameter that is checked before anything is loaded is not.
WRONG_TYPES = [object(), {"a": 1}, 1j, b"bytes"]
NO_NUMBER = [True, "3", (1, "x", 3), [[1], [2], [3]], None]
CHECKED = [name for name in TABLE if name not in ("backbone", "device")]


@pytest.mark.parametrize("name", CHECKED)
def test_a_wrong_type_is_a_type_error_at_the_door_and_a_value_error_in_a_file(name):
    for value in WRONG_TYPES:
        with pytest.raises(TypeError, match=rf"^{name} must be .*; got ") as caught:
            check({name: value})
        if name in STORED:
            with pytest.raises(ValueError, match=rf"^{name} must be ") as stored:
                Settings.from_json(SETTINGS.to_json() | {name: value})
            assert str(stored.value) == str(caught.value)


@pytest.mark.parametrize("name", ["patch_size", "batch_size", "seed", "sigma", "mean", "std"])
def test_neither_text_nor_bools_nor_none_are_numbers(name):
    for value in NO_NUMBER:
        with pytest.raises(TypeError, match=f"^{name} must be "):
            check({name: value})


@pytest.mark.parametrize("name", CHECKED)
def test_none_is_refused_by_type_where_it_means_nothing(name):
    may_be = "preset weights resize crop coreset projection start reweight threads value_range"
    if name in may_be.split():
        assert check({name: None}) == {name: None}
    else:
        with pytest.raises(TypeError, match=f"^{name} must be .*; got None"):
            check({name: None})


WRONG_VALUES = {
    "profile": "best",
    "layers": ["layer2", "layer2"],
    "resize": (1, 2, 3),
    "crop": 0,
    "resampling": "",
    "mean": (0.5, 0.5),
    "std": (1, 1, float("nan")),
    "white_level": 65536,
    "value_range": (1, 1),
    "embedding": "wide",
    "patch_size": 256,
    "coreset": -3,
    "coreset_method": "Greedy",
    "projection": 0,
    "projection_kind": "dense",
    "start": -1,
    "reweight": 0,
    "distance": "cosine",
    "upsampling": "cubic",
    "border": "wrap",
    "sigma": 10**400,
    "index": "hnsw",
    "batch_size": 0,
    "threads": 0,
    "seed": 2**64,
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_wrong_value_is_a_value_error_at_every_door(name):
    with pytest.raises(ValueError, match=rf"^{name} must be .*; got ") as caught:
        check({name: WRONG_VALUES[name]})
    if name in STORED:
        with pytest.raises(ValueError, match=f"^{name} must be ") as stored:
            Settings.from_json(SETTINGS.to_json() | {name: WRONG_VALUES[name]})
        assert str(stored.value) == str(caught.value)


def test_the_doors_agree():
    rows = np.eye(3, dtype=np.float32)
    for seed, error in ((1.5, TypeError), ("1", TypeError), (True, TypeError), (-1, ValueError), (2**64, ValueError)):
        for door in (lambda: check({"seed": seed}), lambda: greedy_coreset(rows, 1, seed=seed)):  # noqa: B023
            with pytest.raises(error, match=r"^seed must be "):
                door()


def test_numpys_numbers_are_numbers():
    given = {
        "resize": np.array([8, 9]),
        "patch_size": np.int8(5),
        "coreset": np.float32(0.5),
        "sigma": np.float64(2),
        "seed": np.uint64(2**64 - 1),
        "mean": np.zeros(3),
        "normalize": np.True_,
    }
    plain = check(given)
    assert plain == {
        "resize": (8, 9),
        "patch_size": 5,
        "coreset": 0.5,
        "sigma": 2.0,
        "seed": 2**64 - 1,
        "mean": (0.0, 0.0, 0.0),
        "normalize": True,
    }
    assert json.loads(json.dumps(plain)) == plain | {"resize": [8, 9], "mean": [0, 0, 0]}


def test_arguments_of_a_callers_subclass_are_left_alone():
    assert check({"seed": 3, "mine": "anything"}) == {"seed": 3, "mine": "anything"}


# --- Settings in a file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORED)
def test_a_missing_setting_is_an_error_or_the_value_it_had_before_it_was_there(name):
    stored = json.loads(json.dumps(SETTINGS.to_json()))
    assert Settings.from_json(stored) == SETTINGS
    del stored[name]
    if name in ("white_level", "value_range", "round_floats", "clip"):  # newer than files that must be complete
        assert Settings.from_json(stored) == SETTINGS
    else:
        with pytest.raises(ValueError, match=f"^the settings lack {name}$"):
            Settings.from_json(stored)
    assert Settings.from_json(stored, complete=False) == SETTINGS


def test_what_a_file_lacks_is_what_the_paper_says():
    paper = dataclasses.asdict(PROFILES["paper"])
    settings = Settings.from_json({}, complete=False).to_json()
    assert {name: settings[name] for name in paper if name in settings} == {
        name: value for name, value in paper.items() if name != "backbone"
    } | {"clip": True}  # all were clipped then
    assert settings["layers"] == ()
    defaults = {name: parameter.default for name, parameter in STORED.items() if not parameter.auto}
    assert {name: settings[name] for name in defaults} == defaults | {"profile": "paper"}
    for no_object in (None, [], "x"):
        with pytest.raises(ValueError, match=r"^settings must be an object; got "):
            Settings.from_json(no_object, complete=False)
    assert Settings.from_json({"later": 1}, complete=False) == SETTINGS


# --- The shell ---------------------------------------------------------------------------------------------

COMMANDS = ["fit", "evaluate"]
OFFERED = TABLE | {name: METHODS["padim"][name] for name in ("channels", "epsilon")}
OFFERED |= {name: METHODS["spade"][name] for name in ("neighbours", "kappa")}
REPEATABLE = {"evaluate": {"coreset", "seed"}}
WRITTEN = {
    "profile": ("amazon", "amazon"),
    "backbone": ("resnet18", "resnet18"),
    "layers": ("a, b.c", ("a", "b.c")),
    "weights": ("w.pth", "w.pth"),
    "resize": ("240x320", (240, 320)),
    "crop": ("none", None),
    "resampling": ("tensor", "tensor"),
    "mean": ("0.5,0.25,0", (0.5, 0.25, 0.0)),
    "std": ("1,2,0.5", (1.0, 2.0, 0.5)),
    "white_level": ("auto", "auto"),
    "value_range": ("-20,80.5", (-20.0, 80.5)),
    "embedding": ("concat", "concat"),
    "patch_size": ("5", 5),
    "coreset": ("all", None),
    "coreset_method": ("random", "random"),
    "projection": ("johnson-lindenstrauss", "johnson-lindenstrauss"),
    "projection_kind": ("gaussian", "gaussian"),
    "start": ("mean10", "mean10"),
    "reweight": ("none", None),
    "distance": ("squared", "squared"),
    "upsampling": ("nearest", "nearest"),
    "border": ("reflect", "reflect"),
    "sigma": ("2.5", 2.5),
    "index": ("ivfpq", "ivfpq"),
    "device": ("cpu", "cpu"),
    "batch_size": ("4", 4),
    "threads": ("1", 1),
    "seed": ("7", 7),
}
FLAGS = ("round_floats", "standardize", "normalize", "clip", "autocast")
EITHER = ("round_floats", "clip", "standardize")  # flags that may be "auto"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_parameter_has_an_option_in_the_order_of_the_table(command):
    options = [
        parameter for parameter in cli.main.commands[command].params if getattr(parameter, "group", None) is not None
    ]
    assert [option.opts for option in options] == [[f"--{name.replace('_', '-')}"] for name in OFFERED]
    assert {name for table in METHODS.values() for name in table} == set(OFFERED)
    repeatable = REPEATABLE.get(command, set())
    for option, (name, parameter) in zip(options, OFFERED.items(), strict=True):
        assert (option.name, option.multiple) == ((f"{name}s", True) if name in repeatable else (name, False))
        assert option.group == parameter.group
        assert option.help.lower().startswith(parameter.help.lower()), name
        assert ("[default: " in option.help) != (parameter.default is False), name
        assert option.secondary_opts == ([f"--no-{name.replace('_', '-')}"] if name in EITHER else [])


def test_headings_follow_each_other_once():
    groups = [parameter.group for parameter in TABLE.values()]
    assert [group for group, before in zip(groups, [None, *groups], strict=False) if group != before] == list(
        dict.fromkeys(groups)
    )
    text = run("fit", "--help").stdout
    headings = re.findall(r"^([A-Z][a-z ]+):$", text, re.MULTILINE)
    assert headings == ["Options", *dict.fromkeys(groups)]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [*WRITTEN, *FLAGS])
def test_an_option_reaches_the_detector(command, name, tmp_path, monkeypatch):
    seen = {}

    def note(self, **arguments):
        seen.update(arguments)
        raise ValueError("seen")

    root = write_folder(tmp_path / "images", normal(2)) if command == "fit" else tmp_path
    if command == "evaluate":
        for part in ("train", "test"):
            (tmp_path / part).mkdir()
            write_folder(tmp_path / part / "good", normal(1))
    monkeypatch.setattr(PatchCore, "__init__", note)
    text, value = WRITTEN.get(name, (None, True))
    words = [f"--{name.replace('_', '-')}", *([] if text is None else [text])]
    if command == "fit":
        words += ["-o", tmp_path / "m.safetensors", "--calibrate", write_folder(tmp_path / "more", normal(2, 1))]
    result = run(command, root, *words)
    if (command, name) == ("evaluate", "normalize"):
        assert "--normalize needs a calibrated model, and evaluate does not calibrate" in result.stderr
        return
    assert result.stderr.strip().endswith("error: seen"), result.stderr
    given = {name: value} if command == "fit" else {"coreset": "auto", "seed": 0} | {name: value}
    assert seen == given
    assert repr(seen[name]) == repr(value)
    monkeypatch.undo()
    assert getattr(PatchCore(**given), name) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mean 0.5,0.5", "Invalid value for '--mean': '0.5,0.5' is not three numbers such as 0.5,0.5,0.5"),
        ("--std 0,1,1", "Invalid value for '--std': it must be a number > 0 and <= 1e+06; got 0.0"),
        ("--white-level bright", "Invalid value for '--white-level': 'bright' is no whole number and not 'auto'"),
        ("--value-range 20", "Invalid value for '--value-range': '20' is not two numbers such as 20,80"),
        ("--value-range 80,20", "it must be a pair (low, high) of numbers, low < high, or None; got (80.0, 20.0)"),
        ("--start first", "'first' is no whole number and not 'none', 'mean' or 'mean10'"),
        ("--sigma wide", "'wide' is no number"),
        ("--sigma -1", "it must be a number >= 0 and <= 1000; got -1.0"),
        ("--patch-size 0", "it must be an integer from 1 to 255; got 0"),
        ("--threads 1.5", "'1.5' is no whole number"),
        ("--seed -1", "it must be an integer from 0 to"),
        ("--coreset 1.5", "it must be a count"),
        ("--index hnsw", "'hnsw' is not one of"),
        ("--resize 0x3", "it must be an integer (the shorter side), a pair"),
        ("--layers a,a", "it must be distinct module names"),
    ],
)
def test_a_slip_is_found_before_anything_is_loaded(words, message, tmp_path):
    folder = write_folder(tmp_path / "images", normal(1))
    result = run("fit", folder, "-o", tmp_path / "m.safetensors", *words.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help_loads_nothing_heavy():
    for words in (["--help"], *([command, "--help"] for command in cli.main.commands)):
        code = (
            f"import sys; from patchcore_rs.cli.main import main\ntry: main({words!r})\n"
            "finally: print([m for m in ('numpy', 'torch', 'rich', 'PIL') if m in sys.modules])"
        )
        assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "[]", words


def test_defaults_show_what_the_profiles_say():
    shown = {
        parameter.name: parameter.help for parameter in cli.main.commands["fit"].params if hasattr(parameter, "help")
    }
    assert shown["reweight"].endswith("[default: 9, none for amazon]")
    assert shown["projection"].endswith("[default: none, 128 for amazon, johnson-lindenstrauss for anomalib]")
    assert shown["clip"].endswith("[default: no, yes for anomalib]")
    assert shown["sigma"].endswith("[default: 4]")
    assert shown["threads"].endswith("[default: all this process may use]")


# A bundled network on images of 64 x 64: 64 patches an image.
SMALL = ["--backbone", "efficientnet_lite0", "--resize", "64x64", "--crop", "none", "--threads", "1"]


def test_every_new_option_is_in_the_model_file(tmp_path):
    folder, path = write_folder(tmp_path / "images", normal(4)), tmp_path / "m.safetensors"
    words = "--resampling tensor --mean 0.5,0.5,0.5 --std 0.2,0.2,0.2 --projection 4 --projection-kind gaussian"
    words += " --start mean --distance squared --upsampling nearest --border reflect --sigma 1.5"
    words += " --normalize --no-clip --round-floats --autocast"
    more = write_folder(tmp_path / "more", normal(4, 1))
    result = run("fit", folder, "-o", path, "--calibrate", more, *SMALL, *words.split(), "--json")
    assert result.exit_code == 0, result.stderr
    settings = json.loads(result.stdout)["settings"]
    expected = {
        "resampling": "tensor",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "projection": 4,
        "projection_kind": "gaussian",
        "start": "mean",
        "distance": "squared",
        "upsampling": "nearest",
        "border": "reflect",
        "sigma": 1.5,
        "normalize": True,
        "clip": False,
        "round_floats": True,
        "autocast": True,
        "index": "exact",
    }
    assert {name: settings[name] for name in expected} == expected
    assert json.loads(run("info", path, "--json").stdout)["settings"] == settings


def test_approximate_search_works_from_the_shell(tmp_path):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed (pip install patchcore-rs[faiss])")
    folder, path = write_folder(tmp_path / "images", normal(12)), tmp_path / "m.safetensors"
    scores = {}
    for index in ("exact", "ivfpq"):
        result = run("fit", folder, "-o", path, "--index", index, "--coreset", "all", *SMALL)
        assert result.exit_code == 0, result.stderr
        assert "warning" not in result.stderr
        facts = json.loads(run("info", path, "--json").stdout)
        assert facts["settings"]["index"] == index
        assert facts["bank"]["rows"] == 12 * 64
        other = write_folder(tmp_path / index, normal(3, seed=1))
        answer = run("predict", path, other, "--json", "--threads", "1")
        assert answer.exit_code == 0, answer.stderr
        scores[index] = [image["score"] for image in json.loads(answer.stdout)["images"]]
    assert scores["ivfpq"] == pytest.approx(scores["exact"], rel=0.3)
