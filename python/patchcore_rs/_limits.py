"""What the system lets a call have: memory, and in a forked process threads of torch and locks."""

from __future__ import annotations

import logging
import os
import sys
import threading
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_logger = logging.getLogger("patchcore_rs")

LARGE = 1 << 26  # bytes; a call that takes less is neither announced nor asked about

_PROCESS = os.getpid()  # where this module was imported
_OPENMP_CAME_FIRST = not {"torch", "faiss"}.isdisjoint(sys.modules)
_FORKNOEXEC = 0x40  # Linux's flag of a process that was forked and has executed no program since


def estimate_memory(rows: int, dimensions: int, bank_rows: int) -> int:
    """Bytes that fitting takes at its peak: (rows, dimensions) float32 features and what follows them.

    That is the selection of the bank's rows, or the bank while it is copied.
    """
    features = 4 * dimensions * rows
    if bank_rows >= rows:
        return 2 * features + 16 * rows
    return features + max(selection_memory(rows, dimensions), 8 * dimensions * bank_rows + 16 * rows)


def selection_memory(rows: int, dimensions: int) -> int:
    """Bytes that a greedy selection takes besides the (rows, dimensions) float32 features: codes and state of rows."""
    return rows * (9 * dimensions // 5 + 192)  # 0.45 of the features, and what every row has however narrow


def require_memory(needed: int, purpose: str, remedy: str) -> None:
    """Announce in the log that `purpose` takes `needed` bytes; MemoryError with the `remedy` where they are not there.

    Nothing has been allocated then. A small need is not looked at.
    """
    if needed < LARGE:
        return
    _logger.info("%s takes about %s", purpose, gigabytes(needed))
    available = available_memory()
    if available is not None and needed > available:
        raise MemoryError(
            f"{purpose} takes about {gigabytes(needed)} of memory, {gigabytes(available)} are available; {remedy}"
        )


def available_memory() -> int | None:
    """Bytes this process may still take, the control group's limit included; None where the system does not say."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit, used = (group.joinpath(name).read_text("ascii") for name in ("memory.max", "memory.current"))
        limits.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no such file, or a limit of "max"
    if not limits and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def gigabytes(nbytes: int) -> str:
    """A size as text."""
    return f"{nbytes / 1e9:.2f} GB"


class ProcessLock:
    """A lock that a forked child finds free, whichever thread held it: the child has no thread to release it."""

    def __init__(self, kind: Callable[[], AbstractContextManager[object]] = threading.Lock) -> None:
        """Make a lock of this `kind` in each process."""
        self._kind = kind
        self._locks: dict[int, AbstractContextManager[object]] = {}

    def held(self) -> AbstractContextManager[object]:
        """The lock of this process, for a `with` statement."""
        return self._locks.setdefault(os.getpid(), self._kind())


@contextmanager
def fork_safe() -> Iterator[None]:
    """One thread for torch's CPU work meanwhile, where more would hang: see `openmp_lost`. Calls may be nested."""
    torch = sys.modules.get("torch")
    if torch is None or not openmp_lost():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def openmp_lost() -> bool:
    """Whether OpenMP (GNU's, of torch and FAISS) may wait here for threads that a fork did not copy, and so for ever.

    It keeps workers for each thread that has worked with it. Of those a forked child has the one that forked, now its
    main thread, without the workers; threads begun since get their own. Work in one thread needs none.
    """
    process = os.getpid()
    if sys.platform != "linux" or threading.get_native_id() != process:
        return False
    return process != _PROCESS or (_OPENMP_CAME_FIRST and _forked())


def _forked() -> bool:
    try:
        fields = Path("/proc/self/stat").read_text("ascii", "replace").rpartition(")")[2].split()
        return bool(int(fields[6]) & _FORKNOEXEC)
    except (OSError, ValueError, IndexError):
        return False
