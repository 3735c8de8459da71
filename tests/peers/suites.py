"""Anomalib's own suites at one version, with our classes in place of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Folders and files of its suites, the first of which a version may lack, and which of their tests meet our classes.
# Models are called as `get_model` calls them: AnomalyDINO is anomaly_d_i_n_o.
SUITES = (
    (("tests/unit/models/components/sampling",), ""),
    (("tests/integration/model/test_models.py",), "patchcore and not m_h_patchcore"),
    (("tests/unit/models/image/anomaly_dino", "tests/integration/model/test_models.py"), "anomalydino or anomaly_d"),
)


def run_suites(python: Path, checkout: Path, version: str) -> dict[str, int]:
    """What pytest answers to each suite of the tag of `version` in `checkout`, run by `python`."""
    results, failed = {}, {f"anomalib {version}'s own suites": 1}
    with tempfile.TemporaryDirectory(prefix="anomalib-suites-") as name:
        folder = Path(name)
        if not take_suites(checkout, version, folder):
            return failed
        for paths, selection in SUITES:
            if (folder / paths[0]).exists():
                results[f"anomalib {version}'s {paths[0]}"] = _run(python, folder, paths, selection)
            else:
                print(f"anomalib {version} has no {paths[0]}", flush=True)
        return results or failed


def take_suites(checkout: Path, version: str, folder: Path) -> bool:
    """Whether `checkout`, a git repository, has the tag of `version`: its tests are put into `folder`.

    Its sources are not: pytest's settings would prefer them to the version that is installed.
    """
    for tag in (f"v{version}", f"lib/v{version}"):  # the second from 2.3.1 on
        git = ["git", "-C", str(checkout)]
        known = [*git, "rev-parse", "--verify", "--quiet", f"refs/tags/{tag}"]
        if subprocess.run(known, stdout=subprocess.DEVNULL, check=False).returncode == 0:
            archive = folder / "suites.tar"
            wanted = ["archive", "--output", str(archive.resolve()), tag, "tests", "pyproject.toml"]
            subprocess.run([*git, *wanted], check=True)
            shutil.unpack_archive(archive, folder)
            return True
    print(
        f"--anomalib must be a git repository with the tag v{version} or lib/v{version}; got {checkout}. "
        "Remedy: git fetch --tags there",
        flush=True,
    )
    return False


def _run(python: Path, folder: Path, paths: tuple[str, ...], selection: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-p",
        "substituted",
        "-p",
        "no:cacheprovider",
        "-k",
        selection,
        *paths,
    ]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode
