"""The coreset tables: greedy selection beside its rivals, on data that could be hostile to it, and projected."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benches import checks, goals, record
from benches.data import noise
from benches.hostile import HOSTILE
from benches.rivals import coreset as rivals
from benches.run import OURS, Contest, Run
from benches.timing import timed
from patchcore_rs import _native
from patchcore_rs.demo import plain_torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from benches.checks import Indices
    from benches.data import Array, Kind
    from benches.record import Table
    from benches.run import Calls

    Selected = tuple[Indices, NDArray[np.float64], float]

_PREFIX = 6  # picks compared with the naive canonical loop
_SHARE, _LEAST = 100, 20  # rivals do a hundredth of the picks, at least twenty
NAIVE = "torch"
_LONG = 5.0  # seconds of a selection that is timed once


@dataclass(frozen=True)
class Case:
    """A row: `fraction` of so many rows. `kind` None is Gaussian noise of 1024 channels."""

    kind: Kind | None
    rows: int
    fraction: float
    everything: bool = False

    @property
    def key(self) -> str:
        """What goals and tests call the case."""
        return f"{self.kind or 'noise'} {100 * self.fraction:g} % of {self.rows}"

    def load(self, run: Run) -> Array:
        """The features."""
        if self.kind is None:
            return noise(run.size(self.rows), 1024, 0)
        found = run.features.everything() if self.everything else run.features.sample(self.kind)
        count = min(run.size(self.rows), len(found))
        if self.everything or count == len(found):
            return found
        return found[np.sort(np.random.default_rng(0).choice(len(found), count, replace=False))]

    def count(self, features: Array) -> int:
        """How many rows are picked."""
        return max(2, int(len(features) * self.fraction))

    def name(self, run: Run) -> str:
        """What the data are."""
        return "Gaussian noise" if self.kind is None else run.features.name(self.kind)


CASES = (
    Case("squeezenet", 160_000, 0.1),
    Case("squeezenet", 160_000, 0.01),
    Case("squeezenet", 160_000, 0.25),
    Case("squeezenet", 40_000, 0.1),
    Case(None, 40_000, 0.1),
    Case("lite0", 597_408, 0.01, everything=True),
    Case("lite0", 597_408, 0.1, everything=True),
)


def tables(run: Run) -> list[Table]:
    """All of them."""
    return [
        record.table("coreset", [coreset_row(run, case) for case in CASES], rival_share=_SHARE, rival_least=_LEAST),
        record.table("coreset-hostile", [hostile_row(run, name) for name in HOSTILE], ratio_goal=goals.HOSTILE_CORESET),
        record.table("coreset-projected", [projected_row(run)]),
    ]


def sequence(
    features: Array,
    count: int,
    threads: int,
    *,
    projection: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Selected:
    """Our selection: picks, radii, and the share of the distances between rows and picks that it evaluated.

    What `greedy_coreset` does, which keeps the number of distances to itself.
    """
    rows = features if projection is None else _native.project(features, projection, "sparse", 0, threads)
    picks, radii, distances = _native.greedy_coreset(rows, count, None, 0, threads, progress)
    return picks, radii, distances / (len(rows) * len(picks))


def select(features: Array, count: int, threads: int, projection: int | None = None) -> tuple[float, Selected]:
    """Seconds of our selection, the best of up to three, and what `sequence` returns."""
    call = partial(sequence, features, count, threads, projection=projection)
    took, answer = timed(call)
    for _ in range(2 if took < _LONG else 0):
        took = min(took, timed(call)[0])
    return took, answer


def rival_picks(count: int) -> int:
    """How many picks rivals do of a selection of `count`."""
    return min(count, max(_LEAST, count // _SHARE))


def contest(run: Run, case: Case) -> Contest:
    """Ours in full and the naive loop of torch on a share of the picks, both checked."""
    features = case.load(run)
    count = case.count(features)
    picks, radii, _ = sequence(features, count, run.threads)
    checked = checks.check_picks(features, picks, radii, _PREFIX)
    share = rival_picks(count)
    naive = partial(plain_torch.greedy_coreset, torch.from_numpy(features), share, int(picks[0]))
    error = checks.cover_error(features, naive().numpy(), float(radii[share - 1]))
    title = f"coreset of {count} of {len(features)} x {features.shape[1]}: {case.name(run)}"
    # The norms before the loop take the naive loop about as long as a pick.
    shares = {NAIVE: (share + 1) / (count + 1)}
    calls: Calls = {OURS: partial(sequence, features, count, run.threads), NAIVE: naive}
    return Contest(title, (calls,), {OURS: 0.0, NAIVE: error}, {"checked": checked}, shares)


def coreset_row(run: Run, case: Case) -> dict[str, Any]:
    """Ours in full; the rivals on a share of the picks, scaled."""
    features = case.load(run)
    count = case.count(features)
    ours, (picks, radii, evaluated) = select(features, count, run.threads)
    checked = checks.check_picks(features, picks, radii, _PREFIX)
    share = rival_picks(count)
    found = {name: loop(features, share) for name, loop in rivals.ALL.items()}
    times = {name: selection.seconds(count) for name, selection in found.items()}
    return {
        "data": case.name(run),
        "rows": len(features),
        "width": features.shape[1],
        "fraction": case.fraction,
        "picks": count,
        "ours_s": ours,
        "evaluated": evaluated,
        **goals.judged(times["anomalib"] / ours, goals.at(goals.CORESET, case.key, run.level)),
        "approximate_ratio": times["patchcore-inspection"] / ours,
        "approximate_goal": goals.APPROXIMATE.get(case.key),
        "naive_ratio": times["naive"] / ours,
        "rivals_s": times,
        "rival_picks": share,
        "rival_widths": {name: selection.width for name, selection in found.items()},
        "radius": float(radii[-1]),
        "checked": checked,
    }


def hostile_row(run: Run, name: str) -> dict[str, Any]:
    """Ours beside the naive loop, both in full."""
    features = HOSTILE[name](np.random.default_rng(0), run.size(40_000))
    count = max(2, len(features) // 40)
    ours, (picks, radii, evaluated) = select(features, count, run.threads)
    checked = checks.check_picks(features, picks, radii, 2 * _PREFIX)
    naive = min(rivals.naive(features, count).seconds(count) for _ in range(2))
    return {
        "data": name,
        "rows": len(features),
        "width": features.shape[1],
        "picks": len(picks),
        "ours_s": ours,
        "evaluated": evaluated,
        "naive_s": naive,
        **goals.judged(naive / ours, goals.HOSTILE_CORESET),
        "checked": checked,
    }


def projected_row(run: Run) -> dict[str, Any]:
    """A projection to 128 channels beside the full dimension."""
    features = CASES[0].load(run)
    count = len(features) // 10
    full, (_, _, evaluated) = select(features, count, run.threads)
    projected, (_, _, projected_evaluated) = select(features, count, run.threads, projection=128)
    return {
        "data": run.features.name("squeezenet"),
        "rows": len(features),
        "width": features.shape[1],
        "picks": count,
        "ours_s": full,
        "evaluated": evaluated,
        "projected_s": projected,
        "projected_evaluated": projected_evaluated,
        **goals.judged(full / projected, goals.PROJECTED),
    }
