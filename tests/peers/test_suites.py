"""The suites of anomalib that are run with our classes: which version's they are, and that our classes take part."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from suites import run_suites, take_suites

MODULE = "tests/test_version.py"


def git(checkout, *arguments):
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(checkout), *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    """A repository with two tagged versions, each of which its test names, and a version that has no tag yet."""
    folder = tmp_path / "checkout"
    (folder / "tests").mkdir(parents=True)
    (folder / "src").mkdir()
    (folder / "src" / "anomalib.py").touch()
    (folder / "pyproject.toml").touch()
    git(folder, "init", "--quiet")
    for version, tag in (("2.0.0", "v2.0.0"), ("2.7.0", "lib/v2.7.0"), ("2.8.0", None)):
        (folder / MODULE).write_text(f"# {version}\n")
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "--message", version)
        if tag:
            git(folder, "tag", tag)
    return folder


@pytest.mark.parametrize("version", ["2.0.0", "2.7.0"])
def test_suites_are_those_of_the_versions_tag(checkout, tmp_path, version):
    folder = tmp_path / "suites"
    folder.mkdir()
    assert take_suites(checkout, version, folder)
    assert (folder / MODULE).read_text() == f"# {version}\n"
    assert (folder / "pyproject.toml").exists()
    assert not (folder / "src").exists()  # pytest would put it before the version that is installed


def test_a_version_without_a_tag_fails_in_one_line(checkout, capfd):
    assert run_suites(Path(sys.executable), checkout, "2.8.0") == {"anomalib 2.8.0's own suites": 1}
    (line,) = "".join(capfd.readouterr()).splitlines()
    assert "tag v2.8.0 or lib/v2.8.0" in line


def test_what_is_no_repository_fails_in_one_line(tmp_path, capfd):
    assert run_suites(Path(sys.executable), tmp_path, "2.0.0") == {"anomalib 2.0.0's own suites": 1}
    assert "got" in "".join(capfd.readouterr())


SUITE = """
import torch
from anomalib.models.components.sampling.k_center_greedy import KCenterGreedy as {name}

def test_it():
    assert len({name}(torch.rand(20, 4), 0.5).select_coreset_idxs()) == 10
"""


@pytest.mark.parametrize(
    ("name", "code", "counts"), [("KCenterGreedy", 0, "greedy_coreset 1"), ("Theirs", 1, "nothing")]
)
def test_a_suite_that_asks_none_of_our_kernels_fails(tmp_path, name, code, counts):
    pytest.importorskip("anomalib", reason="needs anomalib: make test-peers")
    (tmp_path / "test_it.py").write_text(SUITE.format(name=name))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "substituted", "-p", "no:cacheprovider", "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout
    assert f"asked of our kernels: {counts}" in done.stdout
    assert done.returncode == code
