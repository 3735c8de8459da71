"""What the system lets a call have: memory, threads, and in a forked process threads of torch and locks.

**One number of threads.** `threads`, else what the processor affinity and the control group's quota leave: so many
read images, so many run the backbone, so many work in the kernels and in FAISS.

**Torch works in threads of ours, each with one of its own.** Its number of threads decides in which order a convolution
adds, and so the last bits of features. OpenMP keeps that number for each thread, so ours is one and those of the
program stay as they are, while a call runs and afterwards. The one exception: as a thread of ours begins, one of the
program's that asks torch for the first time in that instant takes its 1; so ours are kept from call to call.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from patchcore_rs._native import available_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")
Part = TypeVar("Part")

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


def usable_threads(threads: int | None) -> int:
    """The number of threads that a checked argument `threads` means."""
    return available_threads() if threads is None else threads


class ProcessLock:
    """A lock that a forked child finds free, whichever thread held it: the child has no thread to release it."""

    def __init__(self, kind: Callable[[], AbstractContextManager[object]] = threading.Lock) -> None:
        """Make a lock of this `kind` in each process."""
        self._kind = kind
        self._locks: dict[int, AbstractContextManager[object]] = {}

    def held(self) -> AbstractContextManager[object]:
        """The lock of this process, for a `with` statement."""
        return self._locks.setdefault(os.getpid(), self._kind())


class _DaemonCalls:
    """The calls that daemon threads are in, which the end of the process stops between two pieces of work.

    A daemon thread inside torch takes the process down with it where the interpreter ends meanwhile.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, as in a forked child, which has none of the threads."""
        self._left = threading.Condition()
        self._inside: set[int] = set()
        self._stopped = False

    @contextmanager
    def one(self) -> Iterator[None]:
        """A call of this thread. May be nested."""
        thread = threading.get_ident()
        if not threading.current_thread().daemon or thread in self._inside:
            yield
            return
        self._inside.add(thread)
        try:
            self.go_on()
            yield
        finally:
            self._leave(thread)

    def go_on(self) -> None:
        """Return, but to a daemon thread once the process ends: that waits here for good."""
        thread = threading.get_ident()
        if self._stopped and thread in self._inside:
            self._leave(thread)
            threading.Event().wait()

    def stop(self) -> None:
        """Wait until none of them works; not for ever, since one may be waiting for an image."""
        self._stopped = True
        with self._left:
            self._left.wait_for(lambda: not self._inside, timeout=_PATIENCE)

    def _leave(self, thread: int) -> None:
        with self._left:
            self._inside.discard(thread)
            self._left.notify_all()


_PATIENCE = 3.0  # seconds

_daemons = _DaemonCalls()
atexit.register(_daemons.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_daemons.forget)


class Workers:
    """Threads that take calls in turn, torch working in each with that thread alone."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        """Let the threads of `pool` work."""
        self._pool = pool
        self._unfinished: set[Future[Any]] = set()
        self.broken = False  # a call may lie in the pool that nobody waits for

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """The result of a call to come; it is there at once where no thread is to be had."""
        _daemons.go_on()
        try:
            future = self._pool.submit(_in_own_thread, self._pool, function, *arguments)
        except RuntimeError as error:
            self.broken = True
            if "shutdown" not in str(error):  # the system has no thread for us
                raise
            future = Future()  # the interpreter ends, and begins no more
            try:
                with _one_torch_thread():
                    future.set_result(function(*arguments))
            except Exception as error:  # noqa: BLE001 - it is raised where the result is asked for
                future.set_exception(error)
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        return future

    def finish(self) -> None:
        """Call off what has not begun, and wait for what has, but in a thread of the pool, which would wait for itself.

        The collector may end a generator in any thread, so in one of those that read for it.
        """
        left = tuple(self._unfinished)
        for future in left:
            future.cancel()
        if getattr(_own, "pool", None) is self._pool:
            self.broken = True
        else:
            wait(left)


_idle: dict[tuple[int, int], list[ThreadPoolExecutor]] = {}  # by process and number of threads


@contextmanager
def workers(threads: int) -> Iterator[Workers]:
    """So many threads for one call alone, kept for later calls; all work has ended, or was called off, at the exit."""
    idle = _idle.setdefault((os.getpid(), threads), [])
    try:
        pool = idle.pop()
    except IndexError:
        pool = ThreadPoolExecutor(threads, thread_name_prefix="patchcore-rs")
    taken = Workers(pool)
    try:
        yield taken
    finally:
        taken.finish()
        if not taken.broken:
            idle.append(pool)


def in_parallel(function: Callable[[Part], T], parts: Iterable[Part], threads: int | None) -> list[T]:
    """`function` of each part, in order, in several threads; raises what the first of those that fail does."""
    with workers(usable_threads(threads)) as team:
        return [future.result() for future in [team.submit(function, part) for part in parts]]


_own = threading.local()
_number = ProcessLock()  # held while torch's number of threads is not the program's


def _in_own_thread(pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
    _own.pool = pool
    torch: Any = sys.modules.get("torch")
    if not getattr(_own, "one", False) and hasattr(torch, "set_num_threads") and hasattr(torch, "backends"):
        _take_one_torch_thread(torch)
        _own.one = True
    return function(*arguments)


def _take_one_torch_thread(torch: Any) -> None:
    """Torch's number 1 for this thread, which has not worked with torch yet, and for no other.

    It is set for the process too, for threads that first ask later, and so is set back at once, in one that ends then.
    """
    if not torch.backends.openmp.is_available():  # it is one for the process then, and cannot be changed
        return
    go_on = threading.Event()
    with _number.held():
        before = torch.get_num_threads()

        def restore() -> None:
            go_on.wait()
            torch.set_num_threads(before)

        restorer = threading.Thread(target=restore, daemon=True)
        restorer.start()
        torch.set_num_threads(1)
        go_on.set()
        restorer.join()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Torch's number 1 for this thread meanwhile, where torch is there. May be nested."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def torch_call() -> Iterator[None]:
    """What a call that uses torch needs of the process meanwhile. May be nested.

    One thread for torch's work on the CPU where more would hang, see `openmp_lost`, and an end of the process that
    waits for it, see `_DaemonCalls`.

    Raises:
        RuntimeError: the interpreter has ended already, as `__del__` may find it.
    """
    if sys.is_finalizing():  # torch would abort the process as soon as a view of a tensor is freed
        raise RuntimeError(
            "what uses torch must be called before the interpreter ends; got a call after its end, as out of __del__. "
            "Call it earlier: atexit.register(...), or del the object"
        )
    with _daemons.one(), _one_torch_thread() if openmp_lost() else nullcontext():
        yield


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
