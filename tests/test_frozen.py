"""The package where it is no folder of an environment: frozen by PyInstaller, and in a zip."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from detectors import normal, write_folder

import patchcore_rs
from patchcore_rs._version import LIBRARIES, installed

PROGRAM = """
    import hashlib, sys
    import numpy as np
    from patchcore_rs import PatchCore
    from patchcore_rs.cli.main import main

    if len(sys.argv) > 1:
        main()
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    model = PatchCore(backbone="efficientnet_lite0", coreset=20, device="cpu").fit(images)
    model.save("model.safetensors")
    print(hashlib.sha256(model.predict(images).maps.tobytes()).hexdigest())
"""


def run(*command, folder):
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_pyinstaller_is_told_where_the_hook_lies():
    (entry,) = [
        entry for entry in metadata.entry_points(group="pyinstaller40") if entry.module.startswith("patchcore_rs.")
    ]
    (folder,) = entry.load()()
    assert Path(folder, "hook-patchcore_rs.py").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_frozen_program_has_the_weights_the_reports_style_and_the_versions(tmp_path):
    pytest.importorskip("PyInstaller", reason="PyInstaller is not installed (make test-slow)")
    (tmp_path / "app.py").write_text(textwrap.dedent(PROGRAM))
    expected = run(sys.executable, "app.py", folder=tmp_path)
    run(sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "ERROR", "app.py", folder=tmp_path)
    program = tmp_path / "dist" / "app" / "app"
    assert run(program, folder=tmp_path) == expected
    told, known = (
        json.loads(run(*command, "info", "--json", folder=tmp_path))["packages"]
        for command in ([program], [sys.executable, "app.py"])
    )
    assert told == known
    model = json.loads(run(program, "info", "model.safetensors", "--json", folder=tmp_path))
    assert model["libraries"] == {"patchcore-rs": patchcore_rs.__version__, **installed(*LIBRARIES)}
    write_folder(tmp_path / "images", normal(2, size=64))
    run(program, "predict", "model.safetensors", "images", "--report", "report.html", folder=tmp_path)
    assert "<style>" in (tmp_path / "report.html").read_text("utf-8")


def test_in_a_zip_the_error_says_what_to_do(tmp_path):
    package = Path(patchcore_rs.__file__).parent
    with zipfile.ZipFile(tmp_path / "site.zip", "w") as archive:
        for path in package.rglob("*.py"):
            archive.write(path, path.relative_to(package.parent))
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site.zip')!r}); import patchcore_rs"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: patchcore_rs must lie in a folder")
    assert "site.zip" in last
    assert last.endswith("Install the wheel by pip, or unpack the zip and put its folder on sys.path")
