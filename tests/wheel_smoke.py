"""Install the newest wheel of a folder into an empty environment, far from the checkout; inspect images, time loops.

Usage: python wheel_smoke.py DIST
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib import metadata
from pathlib import Path

INNER_LOOPS = Path(__file__).resolve().with_name("test_inner_loops.py")

INSPECTION = """
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import patchcore_rs
from patchcore_rs import PatchCore
from PIL import Image

assert Path(patchcore_rs.__file__).is_relative_to(sys.prefix), patchcore_rs.__file__
assert {"LICENSE", "THIRD-PARTY-NOTICES.md"} <= {file.name for file in metadata.files("patchcore-rs")}
rng = np.random.default_rng(0)


def part(name, flaw):
    rows, columns = np.mgrid[:96, :96]
    image = 128 + 60 * np.sin(rows / 5) * np.cos(columns / 7) + rng.normal(0, 4, (96, 96))
    if flaw:
        image[30:50, 40:70] = 20
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).convert("RGB").save(path)
    return path


train = [part(f"train/{i}.png", flaw=False) for i in range(4)]
test = [part(f"test/{i}.png", flaw=i > 1) for i in range(4)]
model = PatchCore(backbone="efficientnet_lite0", coreset=0.25).fit(train)
result = model.predict(test)
assert result.scores[2:].min() > 1.2 * result.scores[:2].max(), result.scores
assert result.maps.shape[0] == 4
model.save("model.safetensors")
again = PatchCore.load("model.safetensors").predict(test)
assert again.scores.tobytes() == result.scores.tobytes()
assert again.maps.tobytes() == result.maps.tobytes()
print(" ".join(f"{score:.2f}" for score in result.scores))
"""


def newest_wheel(dist: Path) -> Path:
    """The newest wheel, which must fit CPython 3.10 and all later ones."""
    wheels = sorted(dist.glob("patchcore_rs-*.whl"), key=lambda path: path.stat().st_mtime)
    assert wheels, f"{dist} holds no wheel"
    python, abi, platform = wheels[-1].stem.split("-")[-3:]
    assert (python, abi) == ("cp310", "abi3"), f"{wheels[-1].name} is no abi3 wheel of CPython 3.10"
    systems = {"linux": ("manylinux", "musllinux", "linux"), "darwin": ("macosx",), "win32": ("win",)}
    assert platform.startswith(systems[sys.platform]), f"{wheels[-1].name} is for another system"
    return wheels[-1].resolve()


def main() -> None:
    begin = time.perf_counter()
    wheel = newest_wheel(Path(sys.argv[1]))
    uv = [sys.executable, "-m", "uv"] if importlib.util.find_spec("uv") else ["uv"]
    clean = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}

    with tempfile.TemporaryDirectory() as folder:

        def run(*command: str | Path) -> str:
            done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
            return done.stdout

        # The versions at hand, so that what is installed comes from uv's cache.
        versions = {item.name: item.version.partition("+")[0] for item in metadata.distributions()}
        versions.pop("patchcore-rs", None)
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in sorted(versions.items())))

        run(*uv, "venv", "--quiet", "--python", sys.executable, "environment")
        scripts = Path(folder, "environment", Path(sysconfig.get_path("scripts")).name)
        python = scripts / Path(sys.executable).name
        run(*uv, "pip", "install", "--quiet", "--python", python, "--constraint", constraints, wheel)
        scores = run(python, "-I", "-c", INSPECTION).strip()
        assert "simd" in run(scripts / "patchcore-rs", "info").lower()
        assert "efficientnet_lite0" in run(scripts / "patchcore-rs", "info", "model.safetensors")
        # The loops of the wheel itself: what else is tested was built by a command of its own.
        run(*uv, "pip", "install", "--quiet", "--python", python, "--constraint", constraints, "pytest")
        shutil.copy(INNER_LOOPS, folder)
        run(python, "-m", "pytest", "-c", os.devnull, "--rootdir", folder, INNER_LOOPS.name)
    print(f"{wheel.name} works in an empty environment (scores {scores}; {time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
