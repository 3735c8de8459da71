"""The search tables: exact search beside its rivals, float16 storage, and the hand-off to FAISS IVFPQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benches import checks, goals, record
from benches.data import noise
from benches.hostile import HOSTILE
from benches.rivals import search as rivals
from benches.run import OURS, Contest, Run
from benches.timing import timed
from patchcore_rs import MemoryBank, _native
from patchcore_rs.detector.ivfpq import IVFPQ

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benches.data import Array, Kind
    from benches.record import Table
    from benches.run import Calls

_CHECKED = 8  # queries compared with the float64 brute force


@dataclass(frozen=True)
class Case:
    """A row: queries of one image in a bank. `kind` None is Gaussian noise of `width` channels."""

    kind: Kind | None
    rows: int
    k: int = 1
    greedy: bool = True
    width: int = 1024
    queries: int | None = None

    @property
    def key(self) -> str:
        """What goals and tests call the case."""
        k = f", k {self.k}" if self.k > 1 else ""
        few = f", {self.queries} {'query' if self.queries == 1 else 'queries'}" if self.queries else ""
        return f"{self.kind or 'noise'} {self.rows}{k}{few}"

    def load(self, run: Run) -> tuple[Array, Array]:
        """Rows and queries."""
        rows = run.size(self.rows)
        if self.kind is None:
            count = self.queries or run.size(784)
            return noise(rows, self.width, 0), noise(count, self.width, 1)
        if self.greedy:
            return run.features.bank(self.kind, rows), run.queries(self.kind)
        return run.features.sample(self.kind)[:rows], run.queries(self.kind)

    def name(self, run: Run) -> str:
        """What the data are."""
        if self.kind is None:
            return "Gaussian noise"
        return run.features.name(self.kind) + (", greedy bank" if self.greedy else ", random rows")


CASES = (
    Case("squeezenet", 1_600),
    Case("squeezenet", 16_000),
    Case("squeezenet", 16_000, k=9),
    Case("squeezenet", 160_000, greedy=False),
    Case("expanded", 16_000),
    Case("lite0-2", 16_000),
    Case("lite0", 16_000),
    Case(None, 16_000),
    *(Case(None, 16_000, queries=count) for count in (1, 2, 4, 8)),
)
HALF = (Case("squeezenet", 16_000), Case("squeezenet", 160_000, greedy=False))
HANDED_OFF = (Case("squeezenet", 16_000), Case("squeezenet", 160_000, greedy=False), Case("expanded", 16_000))


def tables(run: Run) -> list[Table]:
    """All of them."""
    return [
        record.table("search", [search_row(run, case) for case in CASES], overhead_goal=goals.OVERHEAD),
        record.table("search-hostile", [hostile_row(run, name, k) for name in HOSTILE for k in (1, 9)]),
        half_table(run),
        # Training takes long even for few rows.
        record.table("ivfpq", [ivfpq_row(run, case) for case in HANDED_OFF[: 1 if run.features.quick else None]]),
    ]


def shape(run: Run, case: Case, rows: Array, queries: Array) -> dict[str, Any]:
    """The cells that say what a row measures."""
    return {
        "data": case.name(run),
        "queries": len(queries),
        "rows": len(rows),
        "width": rows.shape[1],
        "k": case.k,
    }


def contest(run: Run, case: Case, entrants: Mapping[str, rivals.Prepare] = rivals.ALL) -> Contest:
    """Ours and the rivals, prepared and checked; a rival may have nothing to offer for a case."""
    rows, queries = case.load(run)
    bank = MemoryBank(rows, threads=run.threads)
    exact = bank.kneighbors(queries, case.k)
    checked = checks.check_ours(exact, queries, rows, case.k, _CHECKED)
    calls: Calls = {OURS: lambda: bank.kneighbors(queries, case.k)}
    errors = {}
    for name, prepare in entrants.items():
        call = prepare(rows, queries, case.k, run.threads)
        if call is not None:
            errors[name] = checks.rival_error(call()[0], exact[0])
            if errors[name] <= checks.RIVAL_TOLERANCE:
                calls[name] = call
    cells = {**shape(run, case, rows, queries), "overhead": bank.nbytes / rows.nbytes - 1, "checked": checked}
    title = f"search of {len(queries)} in {len(rows)} x {rows.shape[1]}, k {case.k}: {cells['data']}"
    return Contest(title, calls, {OURS: 0.0, **errors}, cells)


def build_seconds(run: Run, case: Case) -> float:
    """What a memory bank takes, the better of two."""
    rows, _ = case.load(run)
    return min(timed(lambda: MemoryBank(rows, threads=run.threads))[0] for _ in range(2))


def search_row(run: Run, case: Case) -> dict[str, Any]:
    """Ours and every rival in turns, after all answers were checked."""
    build = build_seconds(run, case)
    match = contest(run, case)
    errors = {name: error for name, error in match.errors.items() if name != OURS}
    race = run.race(match.calls)
    return {
        **match.cells,
        **race,
        **goals.judged(race["ratio"], goals.at(goals.SEARCH, case.key, run.level)),
        "build_ms": 1e3 * build,
        # Single patches are no images.
        "build_share": None if case.queries else 1e3 * build / (goals.BUILD_IMAGES * race["fastest_ms"]),
        "rival_errors": errors,
        "disagree": [name for name in errors if name not in match.calls],
    }


def half_table(run: Run) -> Table:
    """Rows stored in half precision: exact with respect to what is stored."""
    try:
        found = [half_row(run, case) for case in HALF]
    except ValueError as error:  # this version stores float32 only
        return record.table("float16", [], skipped=str(error))
    return record.table("float16", found, size_goal=goals.HALF)


def half_row(run: Run, case: Case) -> dict[str, Any]:
    """A bank of float16 rows beside the same in float32."""
    rows, queries = case.load(run)
    MemoryBank(rows[:1], dtype="float16")  # refused where it is not offered
    stored = rows.astype(np.float16).astype(np.float32)
    bank, full = MemoryBank(rows, dtype="float16", threads=run.threads), MemoryBank(rows, threads=run.threads)
    checked = checks.check_ours(bank.kneighbors(queries, case.k), queries, stored, case.k, _CHECKED)
    times = run.times(
        {"float16": lambda: bank.kneighbors(queries, case.k), "float32": lambda: full.kneighbors(queries, case.k)}
    )
    size = bank.nbytes / rows.nbytes
    return {
        **shape(run, case, rows, queries),
        "ours_ms": times["float16"],
        "float32_ms": times["float32"],
        "size": size,
        "reached": size <= goals.HALF,
        "checked": checked,
    }


def hostile_row(run: Run, name: str, k: int) -> dict[str, Any]:
    """Rows and queries of one kind, with codes where the bank takes some, beside the plain tile of distances."""
    count = run.size(784)
    values = HOSTILE[name](np.random.default_rng(0), run.size(16_000) + count)
    rows, queries = values[:-count], values[-count:]
    ours = _native.MemoryBank(rows, run.threads)
    plain = _native.MemoryBank(rows, run.threads, codes=False)
    checked = checks.check_ours(ours.kneighbors(queries, k, run.threads), queries, rows, k, _CHECKED)
    times = run.times(
        {
            "ours": lambda: ours.kneighbors(queries, k, run.threads),
            "plain": lambda: plain.kneighbors(queries, k, run.threads),
        }
    )
    return {
        "data": name,
        "queries": count,
        "rows": len(rows),
        "width": rows.shape[1],
        "k": k,
        "ours_ms": times["ours"],
        "plain_ms": times["plain"],
        **goals.judged(times["plain"] / times["ours"], goals.HOSTILE_SEARCH),
        "checked": checked,
    }


def ivfpq_row(run: Run, case: Case) -> dict[str, Any]:
    """The approximate index beside exact search: what it costs, and what it loses."""
    rows, queries = case.load(run)
    bank = MemoryBank(rows, threads=run.threads)
    build, index = timed(lambda: IVFPQ(bank, rows, threads=run.threads))
    exact, nearest = bank.kneighbors(queries)
    found, indices = index.kneighbors(queries)
    checks.require(bool((found >= exact * (1 - 1e-6)).all()), "an approximate distance is below the exact one")
    times = run.times({"exact": lambda: bank.kneighbors(queries), "ivfpq": lambda: index.kneighbors(queries)})
    return {
        **shape(run, case, rows, queries),
        "ours_ms": times["exact"],
        "ivfpq_ms": times["ivfpq"],
        "ratio": times["ivfpq"] / times["exact"],
        "recall": float((indices == nearest).mean()),
        "error": float(((found - exact) / np.maximum(exact, np.finfo(np.float32).tiny)).mean()),
        "build_ms": 1e3 * build,
        "lists": index.lists,
        "bits": index.bits,
    }
