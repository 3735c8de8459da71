"""The search tables: exact search beside its rivals, float16 storage, and the hand-off to FAISS IVFPQ."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from benches import checks, goals, record
from benches.data import noise
from benches.hostile import HOSTILE
from benches.images import ImageSet
from benches.rivals import search as rivals
from benches.run import OURS, Contest, Run, compare
from benches.timing import seconds, timed
from patchcore_rs import MemoryBank, _native
from patchcore_rs.detector.ivfpq import IVFPQ

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benches.data import Array, Kind, Which
    from benches.record import Table
    from benches.run import Calls

_SLOW = 0.5  # seconds of a search by a rival that would take minutes over all images


@dataclass(frozen=True)
class Case:
    """A row: the patches of images in a bank. `kind` None is Gaussian noise of `width` channels.

    The bank holds the first greedy rows of a sample, random rows of it, or a tenth of all rows ("everything").
    """

    kind: Kind | None
    rows: int
    k: int = 1
    bank: Literal["greedy", "random", "everything"] = "greedy"
    images: Which = "test"
    width: int = 1024
    queries: int | None = None

    @property
    def key(self) -> str:
        """What goals and tests call the case."""
        k = f", k {self.k}" if self.k > 1 else ""
        few = f", {self.queries} {'query' if self.queries == 1 else 'queries'}" if self.queries else ""
        images = {"test": "", "hardest": ", hardest patches", "foreign": ", foreign images"}
        return f"{self.kind or 'noise'} {self.rows}{k}{few}{images[self.images]}"

    @property
    def entrants(self) -> Mapping[str, rivals.Prepare]:
        """The rivals. What could be hostile to ours is measured by the one that is fastest at other images."""
        return rivals.ALL if self.images == "test" else rivals.FLAT

    def load(self, run: Run) -> tuple[Array, ImageSet]:
        """Rows and queries."""
        features, rows = run.features, run.size(self.rows)
        if self.kind is None:
            count = self.queries or run.size(784)
            return noise(rows, self.width, 0), ImageSet(("noise",), noise(count, self.width, 1)[None])
        images = features.images(self.kind, self.images)
        if self.bank == "everything":
            return features.bank_of_everything(), images
        return features.bank(self.kind, rows) if self.bank == "greedy" else features.sample(self.kind)[:rows], images

    def name(self, run: Run) -> str:
        """What the data are."""
        if self.kind is None:
            return "Gaussian noise"
        images = {"test": "", "hardest": "hardest patches, ", "foreign": "foreign images, "}
        rows = "random rows" if self.bank == "random" else "greedy bank"
        return f"{images[self.images]}{run.features.name(self.kind)}, {rows}"


CASES = (
    Case("lite0", 59_740, bank="everything"),
    Case("lite0", 59_740, k=9, bank="everything"),
    Case("lite0", 59_740, bank="everything", images="hardest"),
    Case("lite0", 59_740, bank="everything", images="foreign"),
    Case("squeezenet", 1_600),
    Case("squeezenet", 16_000),
    Case("squeezenet", 16_000, k=9),
    Case("squeezenet", 160_000, bank="random"),
    Case("expanded", 16_000),
    Case("lite0-2", 16_000),
    Case("lite0", 16_000),
    Case(None, 16_000),
    *(Case(None, 16_000, queries=count) for count in (1, 2, 4, 8)),
)
HALF = (Case("squeezenet", 16_000), Case("squeezenet", 160_000, bank="random"))
HANDED_OFF = (*HALF, Case("expanded", 16_000))


def tables(run: Run) -> list[Table]:
    """All of them."""
    return [
        record.table("search", [search_row(run, case) for case in CASES], overhead_goal=goals.OVERHEAD),
        record.table("search-hostile", [hostile_row(run, name, k) for name in HOSTILE for k in (1, 9)]),
        half_table(run),
        # Training takes long even for few rows.
        record.table("ivfpq", [ivfpq_row(run, case) for case in HANDED_OFF[: 1 if run.features.quick else None]]),
    ]


def shape(run: Run, case: Case, rows: Array, images: ImageSet) -> dict[str, Any]:
    """The cells that say what a row measures."""
    return {
        "data": case.name(run),
        "queries": images.patches.shape[1],
        "rows": len(rows),
        "width": rows.shape[1],
        "k": case.k,
    }


def contest(run: Run, case: Case, entrants: Mapping[str, rivals.Prepare] | None = None) -> Contest:
    """Ours and the rivals, prepared and checked on every image; a rival may have nothing to offer for a case.

    A dense rival that is slow has calls, and was checked, on one image of each kind: its time is the same for all.
    """
    rows, images = case.load(run)
    bank = MemoryBank(rows, threads=run.threads)
    exact = [bank.kneighbors(queries, case.k) for queries in images.patches]
    checked = checks.check_ours(exact, images.patches, rows, case.k)
    calls: tuple[Calls, ...] = tuple({OURS: partial(bank.kneighbors, queries, case.k)} for queries in images.patches)
    prepared = {name: prepare(rows, case.k, run.threads) for name, prepare in (entrants or case.entrants).items()}
    searches = {name: search for name, search in prepared.items() if search is not None}
    took = {name: seconds(partial(search, images.patches[0])) for name, search in searches.items()}
    errors = {}
    for name, search in searches.items():
        slow = name in rivals.DENSE and took[name] > max(_SLOW, 2 * min(took.values()))
        chosen = images.one_of_each_kind() if slow else range(len(calls))
        found = {i: search(images.patches[i])[0] for i in chosen}
        errors[name] = max(checks.rival_error(distances, exact[i][0]) for i, distances in found.items())
        if errors[name] <= checks.RIVAL_TOLERANCE:
            for i in chosen:
                calls[i][name] = partial(search, images.patches[i])
    cells = {**shape(run, case, rows, images), "overhead": bank.nbytes / rows.nbytes - 1, "checked": checked}
    title = f"search of {cells['queries']} in {len(rows)} x {rows.shape[1]}, k {case.k}: {cells['data']}"
    return Contest(title, calls, {OURS: 0.0, **errors}, cells, kinds=images.kinds)


def build_seconds(run: Run, case: Case) -> float:
    """What a memory bank takes, the better of two."""
    rows, _ = case.load(run)
    return min(timed(lambda: MemoryBank(rows, threads=run.threads))[0] for _ in range(2))


def search_row(run: Run, case: Case) -> dict[str, Any]:
    """Ours and every rival in turns, image by image, after all answers were checked."""
    build = build_seconds(run, case)
    match = contest(run, case)
    errors = {name: error for name, error in match.errors.items() if name != OURS}
    race = compare(match.kinds, run.times(match.calls))
    every = goals.at(goals.SEARCH_EVERY, case.key, run.level)
    return {
        **match.cells,
        **race,
        **goals.judged(race["ratio"], goals.at(goals.SEARCH, case.key, run.level)),
        **goals.judged_every(race["smallest"], every),
        "build_ms": 1e3 * build,
        # Single patches are no images.
        "build_share": None if case.queries else 1e3 * build / (goals.BUILD_IMAGES * race["fastest_ms"]["mean"]),
        "rival_errors": errors,
        "disagree": [name for name, error in errors.items() if error > checks.RIVAL_TOLERANCE],
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
    rows, images = case.load(run)
    MemoryBank(rows[:1], dtype="float16")  # refused where it is not offered
    stored = rows.astype(np.float16).astype(np.float32)
    bank, full = MemoryBank(rows, dtype="float16", threads=run.threads), MemoryBank(rows, threads=run.threads)
    exact = [bank.kneighbors(queries, case.k) for queries in images.patches]
    checked = checks.check_ours(exact, images.patches, stored, case.k)
    times = run.times(
        [
            {OURS: partial(bank.kneighbors, queries, case.k), "float32": partial(full.kneighbors, queries, case.k)}
            for queries in images.patches
        ]
    )
    size = bank.nbytes / rows.nbytes
    return {
        **shape(run, case, rows, images),
        **compare(images.kinds, times),
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
    checked = checks.check_ours([ours.kneighbors(queries, k, run.threads)], [queries], rows, k)
    banks = {OURS: ours, "plain": plain}
    race = run.race({name: partial(bank.kneighbors, queries, k, run.threads) for name, bank in banks.items()})
    return {
        "data": name,
        "queries": count,
        "rows": len(rows),
        "width": rows.shape[1],
        "k": k,
        "ours_ms": race["ours_ms"],
        "plain_ms": race["fastest_ms"],
        **goals.judged(race["ratio"], goals.HOSTILE_SEARCH),
        "checked": checked,
    }


def ivfpq_row(run: Run, case: Case) -> dict[str, Any]:
    """The approximate index beside exact search: what it costs, and what it loses."""
    rows, images = case.load(run)
    bank = MemoryBank(rows, threads=run.threads)
    build, index = timed(lambda: IVFPQ(bank, rows, threads=run.threads))
    answers = [(bank.kneighbors(queries), index.kneighbors(queries)) for queries in images.patches]
    exact, found = (np.stack([each[i][0] for each in answers]) for i in (0, 1))
    recall = np.mean([ours[1] == theirs[1] for ours, theirs in answers])
    checked = checks.check_ours([ours for ours, _ in answers], images.patches, rows, 1)
    checks.require(bool((found >= exact * (1 - 1e-6)).all()), "an approximate distance is below the exact one")
    times = run.times(
        [
            {OURS: partial(bank.kneighbors, queries), "IVFPQ": partial(index.kneighbors, queries)}
            for queries in images.patches
        ]
    )
    return {
        **shape(run, case, rows, images),
        **compare(images.kinds, times),
        "recall": float(recall),
        "error": float(((found - exact) / np.maximum(exact, np.finfo(np.float32).tiny)).mean()),
        "build_ms": 1e3 * build,
        "lists": index.lists,
        "bits": index.bits,
        "checked": checked,
    }
