"""How cost grows: search with the bank, selection with rows and with picks; and selection from very many rows."""

from __future__ import annotations

import resource
import sys
from functools import partial
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benches import checks, goals, record
from benches.data import perturbed
from benches.run import OURS, by_image
from benches.tables.coreset import select, sequence
from benches.timing import exponent
from patchcore_rs import MemoryBank

if TYPE_CHECKING:
    from benches.record import Table
    from benches.run import Run

BANKS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
ROWS = (10_000, 20_000, 40_000, 80_000, 160_000)
PICKS = (400, 1_600, 6_400, 16_000, 40_000)
SCALE, SCALE_FRACTION = 2_000_000, 0.01
_FORECASTS = (0.1, 0.5)  # of the picks
_FIXED_PICKS = 1_600  # of the curve by rows
_COPIES = 3  # of the rows, that building a bank may hold at once


def tables(run: Run) -> list[Table]:
    """All of them."""
    return [search_curve(run), *coreset_curves(run)]


def search_curve(run: Run) -> Table:
    """The patches of images in banks of real rows, beyond these of real rows with noise."""
    sample, images = run.features.sample("squeezenet"), run.features.images("squeezenet")
    found: list[dict[str, Any]] = []
    skipped = []
    for full in BANKS:
        count = run.size(full)
        if _COPIES * 4 * count * sample.shape[1] > record.memory(available=True):
            skipped.append(count)
            continue
        rows = perturbed(sample, count, seed=1)
        bank = MemoryBank(rows, threads=run.threads)
        checked = checks.check_ours([bank.kneighbors(each) for each in images.patches], images.patches, rows, 1)
        del rows
        took = [each[OURS] for each in run.times([{OURS: partial(bank.kneighbors, each)} for each in images.patches])]
        queries = images.patches.shape[1]
        found.append(
            {
                "data": run.features.name("squeezenet") + ("" if count <= len(sample) else ", perturbed"),
                "queries": queries,
                "rows": count,
                "width": sample.shape[1],
                "k": 1,
                **by_image(images.kinds, took),
                "per_row_ns": 1e6 * fmean(took) / (count * queries),
                "checked": checked,
            }
        )
    slope = exponent([row["rows"] for row in found], [row["ours_ms"]["mean"] for row in found])
    facts: dict[str, Any] = {"exponent": slope, "exponent_goal": goals.EXPONENT}
    if skipped:
        facts["skipped"] = f"not enough memory for {', '.join(map(str, skipped))} rows"
    return record.table("search-curve", found, **facts)


def coreset_curves(run: Run) -> list[Table]:
    """Selection of a fixed number from ever more rows, and of ever more from fixed rows."""
    sample = run.features.sample("squeezenet")

    def row(rows: int, picks: int) -> dict[str, Any]:
        took, (_, _, evaluated) = select(sample[:rows], picks, run.threads)
        return {
            "data": run.features.name("squeezenet"),
            "rows": rows,
            "width": sample.shape[1],
            "picks": picks,
            "ours_s": took,
            "evaluated": evaluated,
        }

    most = len(sample)
    by_rows = [row(min(run.size(rows), most), run.size(_FIXED_PICKS)) for rows in ROWS]
    by_picks = [row(most, run.size(picks)) for picks in PICKS]
    tables = []
    for name, key, found in (("coreset-by-rows", "rows", by_rows), ("coreset-by-picks", "picks", by_picks)):
        slope = exponent([each[key] for each in found], [each["ours_s"] for each in found])
        tables.append(record.table(name, found, exponent=slope))
    return tables


def scale_tables(run: Run) -> list[Table]:
    """Selection from real rows with noise, their memory, and whether progress lets one foresee its end."""
    count = run.size(SCALE)
    features = run.features.sample("squeezenet")
    if 2 * 4 * count * features.shape[1] > record.memory(available=True):
        return [record.table("scale", [], skipped=f"not enough memory for {count} rows")]
    features = perturbed(features, count, seed=2)
    picks = int(count * SCALE_FRACTION)
    seen: list[tuple[float, float]] = []  # seconds, share of the picks
    begin = perf_counter()
    _, _, evaluated = sequence(
        features,
        picks,
        run.threads,
        progress=lambda done, total: seen.append((perf_counter() - begin, done / total)),
    )
    took = perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    row = {
        "data": run.features.name("squeezenet") + ", perturbed",
        "rows": count,
        "width": features.shape[1],
        "picks": picks,
        "ours_s": took,
        "evaluated": evaluated,
        "memory": peak / features.nbytes,
        # What the time until then leads to expect of the whole.
        "forecasts": [next((at / done / took for at, done in seen if done >= share), None) for share in _FORECASTS],
    }
    return [record.table("scale", [row])]
