"""Prints the tables that compare patchcore-rs with its rivals, and keeps a dated record of them.

    python -m benches.tables all                       every table: hours
    python -m benches.tables search coreset --quick    some of them at a sixteenth of the size: a smoke test
    python -m benches.tables markdown RECORD           a record as markdown
    python -m benches.tables readme RECORD ...         writes the README's performance section, and lists all records

Each table is made in a process of its own for every SIMD level and number of threads, because OpenBLAS, oneDNN and
FAISS read their environment when they are loaded. This program itself computes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from benches import readme, record, render

PARTS = ("search", "coreset", "curves", "scale", "aggregate", "maps", "inspect")
EVERY_LEVEL = ("search", "coreset", "aggregate", "maps")  # the others run at the level in use, with all threads
ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """The program; returns its exit status."""
    arguments = _parse()
    if arguments.parts[0] == "worker":
        return work(arguments)
    if arguments.parts[0] == "markdown":
        print(render.markdown(record.read(Path(arguments.parts[1]))), end="")
        return 0
    if arguments.parts[0] == "readme":
        found = {Path(each).stem: record.read(Path(each)) for each in arguments.parts[1:]}
        if any(each["quick"] for each in found.values()):
            print("the README does not show quick records", file=sys.stderr)
            return 1
        every = {path.stem: record.read(path) for path in record.FOLDER.glob("*.json")}
        _rewrite(ROOT / "README.md", readme.section(found), "performance")
        _rewrite(ROOT / "benches" / "README.md", readme.listing(every), "records")
        return 0
    return measure(arguments)


def _rewrite(path: Path, made: str, name: str) -> None:
    path.write_text(readme.replace_section(path.read_text("utf-8"), made, name), "utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benches.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", metavar="TABLE", help=f"all, or some of: {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of every size: a smoke test")
    parser.add_argument("--levels", default="all", help="best, all (but scalar), or names: avx2,avx512vnni")
    parser.add_argument("--threads", default="", help="1,2: one and all by default")
    parser.add_argument("--output", type=Path, help="where the record goes; benches/records/ by default")
    arguments = parser.parse_args()
    first = arguments.parts[0]
    if first in ("markdown", "readme"):
        if len(arguments.parts) < 2 or (first == "markdown" and len(arguments.parts) > 2):
            parser.error(f"{first} takes {'one record' if first == 'markdown' else 'records'}")
    elif first != "worker":
        arguments.parts = list(PARTS) if arguments.parts == ["all"] else arguments.parts
        unknown = set(arguments.parts) - set(PARTS)
        if unknown:
            parser.error(f"no table is called {', '.join(sorted(unknown))}; there are all, {', '.join(PARTS)}")
    return arguments


def measure(arguments: argparse.Namespace) -> int:
    """Runs every part at every level and number of threads, prints the tables, writes the record."""
    from patchcore_rs import build_info

    info = build_info()
    best = info["simd"]
    levels = _levels(arguments.levels, best, info["simd_available"])
    counts = sorted({int(each) for each in arguments.threads.split(",") if each} or {1, info["threads"]})
    found = record.new(_command(arguments), quick=arguments.quick)
    path = arguments.output or (
        record.FOLDER.parent / ".cache" / "quick.json" if arguments.quick else record.default_path(found, best)
    )
    failed = 0
    for part in arguments.parts:
        every = part in EVERY_LEVEL
        for level in levels if every else levels[:1]:
            for threads in counts if every else counts[-1:]:
                print(f"{part}, {level}, {threads} threads ...", file=sys.stderr, flush=True)
                result = _start(part, level, threads, quick=arguments.quick)
                if result is None:
                    failed += 1
                    continue
                found["data"] = result.pop("data")
                found["runs"].append(result)
                print(render.run_markdown(result), flush=True)
                record.write(found, path)  # what is measured is kept, whatever happens next
                path.with_suffix(".md").write_text(render.markdown(found), "utf-8")
    if found["runs"]:
        print(f"the record is {_relative(path)}", file=sys.stderr)
    return 1 if failed else 0


def _levels(asked: str, best: str, available: list[str]) -> list[str]:
    """Level names, the one in use first."""
    if asked == "best":
        return [best]
    names = [name for name in available if name != "scalar"] if asked == "all" else asked.split(",")
    unknown = set(names) - set(available)
    if unknown:
        sys.exit(f"this CPU has no level {', '.join(sorted(unknown))}; it has {', '.join(available)}")
    return sorted(names, key=lambda name: (name != best, -available.index(name)))


def _start(part: str, level: str, threads: int, *, quick: bool) -> dict[str, Any] | None:
    """The result of a process that makes the tables of one part; None where it failed, with its reason on stderr."""
    environment = record.environment(level, threads)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benches.tables", "worker", part, "--levels", level, "--threads", str(threads)]
        command += ["--output", str(output), *(["--quick"] if quick else [])]
        status = subprocess.run(command, env={**os.environ, **environment}, check=False).returncode
        if status != 0:
            print(f"{part} at {level} with {threads} threads failed: exit status {status}", file=sys.stderr)
            return None
        result: dict[str, Any] = json.loads(output.read_text("utf-8"))
    return {**result, "environment": environment}


def work(arguments: argparse.Namespace) -> int:
    """Makes the tables of one part in this process, whose environment is set."""
    part, level, threads = arguments.parts[1], arguments.levels, int(arguments.threads)
    load, begin = record.load(), perf_counter()
    # An import of numpy, torch or FAISS settles what they use: none may come before this line.
    import torch

    from benches.data import Features
    from benches.run import Run
    from benches.tables import coreset, curves, inspection, search, stages
    from patchcore_rs import build_info

    if build_info()["simd"] != level:
        print(f"PATCHCORE_RS_SIMD={level} is not in effect", file=sys.stderr)
        return 1
    torch.set_num_threads(threads)
    run = Run(Features(quick=arguments.quick), threads, level)
    make = {
        "search": search.tables,
        "coreset": coreset.tables,
        "curves": curves.tables,
        "scale": curves.scale_tables,
        "aggregate": stages.aggregate_tables,
        "maps": stages.maps_tables,
        "inspect": inspection.tables,
    }
    result: dict[str, Any] = {
        "part": part,
        "level": level,
        "threads": threads,
        "load": load,
        "data": run.features.describe(),
        "tables": make[part](run),
    }
    result["in_effect"] = _in_effect()
    result["seconds"] = round(perf_counter() - begin)
    arguments.output.write_text(json.dumps(result), "utf-8")
    return 0


def _in_effect() -> dict[str, str]:
    """What the libraries made of their environment: the instructions that each one uses."""
    import faiss
    import threadpoolctl  # type: ignore[import-untyped,unused-ignore]
    import torch

    found = {"torch": torch.backends.cpu.get_cpu_capability()}
    if hasattr(faiss, "SIMDConfig"):
        found["FAISS"] = faiss.SIMDConfig.get_level_name()
    blas = [library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    for name in sorted({library["internal_api"] for library in blas}):
        found[name] = ", ".join(
            sorted({str(each.get("architecture")) for each in blas if each["internal_api"] == name})
        )
    return found


def _command(arguments: argparse.Namespace) -> str:
    """What was asked for, without where the record goes: folders are only this machine's."""
    words = ["python", "-m", "benches.tables", *arguments.parts, "--levels", arguments.levels]
    words += ["--threads", arguments.threads] if arguments.threads else []
    return " ".join([*words, "--quick"] if arguments.quick else words)


def _relative(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    sys.exit(main())
