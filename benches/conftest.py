"""What a benchmark is given, what it records of its machine, and the table of ratios at the end."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest

from benches import record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benches.run import Run


def _threads() -> int:
    """All processors that this process may use, or PATCHCORE_BENCH_THREADS of them: the same for every engine."""
    from patchcore_rs import build_info

    return int(os.environ.get("PATCHCORE_BENCH_THREADS", build_info()["threads"]))


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Iterator[Run]:
    """Data and threads of the session, given to torch too; quick where nothing is timed."""
    import torch

    from benches.data import Features
    from benches.run import Run
    from patchcore_rs import build_info

    quick = pytestconfig._benchmarksession.disabled  # type: ignore[attr-defined]
    before = torch.get_num_threads()
    torch.set_num_threads(_threads())
    yield Run(Features(quick=quick), _threads(), build_info()["simd"])
    torch.set_num_threads(before)


def _machine() -> dict[str, Any]:
    from patchcore_rs import build_info

    return {
        "cpu_model": record.cpu_model(),
        "threads": _threads(),
        "simd": build_info()["simd"],
        "simd_available": build_info()["simd_available"],
        **record.versions(),
    }


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
