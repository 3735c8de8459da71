"""The command however it is started, and where its paths come from: modules, python -OO, completion, logs, lists."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from detectors import normal, write_folder

from patchcore_rs import greedy_coreset
from patchcore_rs.cli import main as cli
from patchcore_rs.cli.predict import given_paths
from patchcore_rs.cli.terminal import Terminal

README = Path(__file__).parent.parent.joinpath("README.md").read_text("utf-8")
COMMAND = "from patchcore_rs.cli.main import main; main(prog_name='patchcore-rs')"
HELP = """
import click
from patchcore_rs.cli.main import main
for command in (main, *main.commands.values()):
    print(command.get_help(click.Context(command, info_name=command.name)))
"""


pytestmark = pytest.mark.usefixtures("one_load_per_backbone")


def python(*arguments, **environment):
    environment = os.environ | {"COLUMNS": "100"} | environment
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False, env=environment
    )


# --- How it is started -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["patchcore_rs", "patchcore_rs.cli"])
def test_the_modules_are_the_command(module):
    done = python("-m", module, "fit", "nonsense", "-o", "m.safetensors")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Path 'nonsense' does not exist" in done.stderr
    assert f"(see 'python -m {module} fit --help')" in done.stderr


def test_help_keeps_its_words_where_python_drops_docstrings():
    plain, stripped = (python(*flags, "-c", HELP) for flags in ((), ("-OO",)))
    assert (stripped.returncode, stripped.stdout) == (0, plain.stdout)
    for words in ("Find what is unusual in images", "Learn from flawless images", "Show this build, or what is in"):
        assert words in stripped.stdout


def test_a_wrong_simd_level_is_told_at_first_use_and_not_at_import():
    imported = "import patchcore_rs; print(patchcore_rs.__version__); patchcore_rs.build_info()"
    wrong = python("-c", imported, PATCHCORE_RS_SIMD="sse9")
    version, _, rest = wrong.stdout.partition("\n")
    assert (wrong.returncode, rest) == (1, "")
    assert wrong.stderr.splitlines()[-1].startswith("ValueError: PATCHCORE_RS_SIMD: SIMD level must be one of scalar")
    done = python("-m", "patchcore_rs", "--version", PATCHCORE_RS_SIMD="sse9")
    assert (done.returncode, version in done.stdout) == (0, True)
    done = python("-m", "patchcore_rs", "info", PATCHCORE_RS_SIMD="sse9")
    assert (done.returncode, done.stdout) == (2, "")
    assert "PATCHCORE_RS_SIMD" in done.stderr
    assert python("-c", imported, PATCHCORE_RS_SIMD="").returncode == 0


def test_a_shell_can_complete_it_as_the_readme_says():
    assert 'eval "$(_PATCHCORE_RS_COMPLETE=zsh_source patchcore-rs)"' in README
    script = python("-c", COMMAND, _PATCHCORE_RS_COMPLETE="zsh_source")
    assert (script.returncode, script.stderr) == (0, "")
    assert script.stdout.startswith("#compdef patchcore-rs")
    words = {"COMP_WORDS": "patchcore-rs pred", "COMP_CWORD": "1"}
    assert "predict" in python("-c", COMMAND, _PATCHCORE_RS_COMPLETE="zsh_complete", **words).stdout.splitlines()


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_log_gets_no_bars_that_move(variable, monkeypatch, capsys):
    monkeypatch.setenv(variable, "1")
    with Terminal().progress() as advance:
        advance("features", 1, 2)
    assert capsys.readouterr().err == ""
    greedy_coreset(np.eye(30, dtype=np.float32), 9, progress=True)
    drawn = capsys.readouterr().err
    assert "\x1b" not in drawn
    assert drawn.count("100%") == len(drawn.strip().splitlines()) == 1


# --- Lists of paths ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images") / "good", normal(4))


@pytest.fixture(scope="module")
def model(folder):
    path = folder.parent / "m.safetensors"
    options = ["--backbone", "efficientnet_lite0", "--resize", "32x32", "--coreset", "4", "-q"]
    result = CliRunner().invoke(cli.main, ["fit", str(folder), "-o", str(path), *options])
    assert result.exit_code == 0, result.output
    return path


def predict(model, *arguments, content=b""):
    """The paths that are scored, in their order."""
    words = ["predict", model, *arguments, "--csv", "-q"]
    result = CliRunner().invoke(cli.main, list(map(str, words)), input=content)
    assert result.exit_code == 0, result.output
    return [Path(row["path"]) for row in csv.DictReader(io.StringIO(result.stdout))]


def test_paths_come_from_standard_input_and_from_files(model, folder, tmp_path):
    files = [folder / f"{i}.png" for i in range(4)]
    names = [os.fsencode(file) for file in files]
    lists = {
        "lines": b"\n".join(names[:2]) + b"\n",
        "lines of Windows": b"\xef\xbb\xbf" + b"\r\n".join(names[:2]) + b"\r\n\r\n",
        "NUL": b"\0".join(names[:2]) + b"\0",
    }
    for name, content in lists.items():
        (tmp_path / "list").write_bytes(content)
        assert predict(model, "-", content=content) == files[:2], name
        assert predict(model, "--from-file", tmp_path / "list") == files[:2], name
    assert predict(model, files[3], "-", content=lists["lines"]) == [files[3], *files[:2]]
    assert predict(model, files[3], "--from-file", tmp_path / "list") == [files[3], *files[:2]]
    assert predict(model, "-", content=os.fsencode(folder)) == files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the list of PATHS must not be empty"),
        (b"\n\n", "the list of PATHS must not be empty"),
        (b"gone.png\n", "gone.png: No such file or directory"),
        (b"notes.txt\n", "expected a folder or an image file"),
    ],
)
def test_a_list_that_leads_nowhere_is_refused_before_any_work(content, message, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "list").write_bytes(content)
    for arguments in (["-"], ["--from-file", "list"]):
        result = CliRunner().invoke(cli.main, ["predict", str(model), *arguments], input=content)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_list_from_a_closed_standard_input_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match=r"must find a list on standard input; got a closed one\. Use --from-file"):
        list(given_paths([Path("-")]))


def test_the_list_is_not_written_over(model, folder, tmp_path):
    (tmp_path / "list.html").write_bytes(os.fsencode(folder))
    words = ["predict", model, "--from-file", tmp_path / "list.html", "--report", tmp_path / "list.html"]
    result = CliRunner().invoke(cli.main, list(map(str, words)))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--report must be a file that this command does not read" in result.stderr
