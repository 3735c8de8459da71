"""What every record says about its machine, and the table of ratios at the end."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


def _threads() -> int:
    """All processors that this process may use, or PATCHCORE_BENCH_THREADS of them: the same for every engine."""
    from patchcore_rs import build_info

    return int(os.environ.get("PATCHCORE_BENCH_THREADS", build_info()["threads"]))


@pytest.fixture(scope="session")
def threads() -> Iterator[int]:
    """Threads of the session, given to torch too."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(_threads())
    yield _threads()
    torch.set_num_threads(before)


def _machine() -> dict[str, Any]:
    from patchcore_rs import build_info

    return {
        "cpu_model": _cpu_model(),
        "threads": _threads(),
        "simd": build_info()["simd"],
        "simd_available": build_info()["simd_available"],
        "python_version": platform.python_version(),
        **{name: metadata.version(name) for name in ("patchcore-rs", "numpy", "torch")},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.update(_machine())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the ratios to the rivals: the quickest run of each, and how far its answer was off."""
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for bench in session.benchmarks if session else ():
        if bench.has_error or not bench.stats.data:
            continue
        info = bench.extra_info
        groups[bench.group][info["engine"]] = (bench.stats.min / info["share"], info["error"])
    if not groups:
        return
    write = terminalreporter.write_line
    terminalreporter.section("ratios")
    write(", ".join(f"{name} {value}" for name, value in _machine().items() if name != "simd_available"))
    write(f"{'ms':>10}  {'ratio':>6}  {'error':>8}")
    for group, engines in groups.items():
        write(group)
        ours = engines.get("patchcore-rs")
        for engine, (seconds, error) in engines.items():
            ratio = f"{seconds / ours[0]:.1f}x" if ours else ""
            write(f"{1000 * seconds:10.2f}  {ratio:>6}  {error:8.1e}  {engine}")
