"""Records: what a run of the tables says of its machine, its command and its results. Standard library only.

A table is {"name", "rows": [{...}], "facts": {...}}; render.py knows the columns of each name. A record holds runs: the
tables that one process made at one SIMD level with one number of threads, and the environment it had.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "records"
PACKAGES = ("patchcore-rs", "numpy", "torch", "faiss-cpu", "scikit-learn", "scikit-learn-intelex")

Table = dict[str, Any]
Record = dict[str, Any]

_FLAGS = re.compile(r"(avx2|fma|f16c|avx_vnni\w*|avx512\w*|amx\w*|asimd\w*|sve\w*|i8mm)")
_HELD = ("avx2", "avxvnni")  # levels whose rivals are held to AVX2 too


def table(name: str, rows: list[dict[str, Any]], /, **facts: Any) -> Table:
    """A table of that name; `facts` hold for all of it."""
    return {"name": name, "rows": rows, "facts": facts}


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instruction sets that matter here."""
    names = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return sorted(name for name in names if _FLAGS.fullmatch(name))


def _cpuinfo(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), None)


def environment(level: str, threads: int) -> dict[str, str]:
    """What a process must find set before it imports numpy, torch or FAISS.

    FAISS brings an OpenBLAS that mistakes many a server CPU for an old one unless it is told. At a level of AVX2 the
    rivals get AVX2 as well: two variables for FAISS, whose releases read one or the other.
    """
    count = str(threads)
    held = level in _HELD
    variables = {"PATCHCORE_RS_SIMD": level, "PATCHCORE_BENCH_THREADS": count}
    variables |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), count)
    flags = cpu_flags()
    if "avx512f" in flags and not held:
        variables["OPENBLAS_CORETYPE"] = "SkylakeX"
    elif "avx2" in flags:
        variables["OPENBLAS_CORETYPE"] = "Haswell"
    if held:
        variables |= dict.fromkeys(("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"), "AVX2")
        variables |= dict.fromkeys(("FAISS_OPT_LEVEL", "FAISS_SIMD_LEVEL"), "AVX2")
        variables["ATEN_CPU_CAPABILITY"] = "avx2"
    return variables


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def new(command: str, *, quick: bool) -> Record:
    """A record without runs."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "quick": quick,
        "commit": _commit(),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "flags": cpu_flags(),
            "memory_gib": round(memory() / 2**30, 1),
            "system": platform.system(),
        },
        "versions": versions(),
        "load": load(),
        "runs": [],
    }


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes: how idle the machine was."""
    return [round(value, 2) for value in os.getloadavg()]


def memory(*, available: bool = False) -> int:
    """Bytes of memory, or of those that are free for use."""
    pages = "SC_AVPHYS_PAGES" if available else "SC_PHYS_PAGES"
    if available:
        try:
            text = Path("/proc/meminfo").read_text("utf-8")
        except OSError:
            text = ""
        found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _commit() -> str:
    root = FOLDER.parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return described.stdout.strip()


def default_path(record: Record, level: str) -> Path:
    """Where a record goes: its minute and the best level it ran at."""
    return FOLDER / f"{record['date'][:16].replace(':', '')}-{level}.json"


def write(record: Record, path: Path) -> None:
    """One row a line, so that two records can be compared by eye."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    # Lists and objects that hold only numbers and short words go on one line.
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda match: re.sub(r"\n\s*", " ", match[0]), text)
    path.write_text(text + "\n", "utf-8")


def read(path: Path) -> Record:
    """A record that `write` wrote."""
    record: Record = json.loads(path.read_text("utf-8"))
    return record
