"""Which patches become the memory bank, when a detector is fitted and when it grows, and how far from it any patch is.

*Growing.* The candidates are the rows of the bank, first, and the patches that came in. Greedy selection begins with
the bank's first row, the first it ever picked: without new patches it picks the bank again in the same order, since
each row was the farthest of all patches when it was picked and so is the farthest of the bank's rows. A patch that was
within `cover` of the old bank is within `cover` plus the radius of this selection of the new one. A random selection
keeps shares: old patches, of which the bank's rows are a sample, and new ones are drawn in proportion to their numbers.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from patchcore_rs.coreset import add_cover, coreset_size, greedy_sequence, johnson_lindenstrauss_width

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchcore_rs.detector.method import Call
    from patchcore_rs.model.settings import PatchCoreSettings


class Selection(NamedTuple):
    """Rows in the order they were picked, None for all. No row is farther from them than `cover`, None if unknown."""

    rows: NDArray[np.int64] | None
    cover: float | None

    def of(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """The chosen rows of the features that were selected from."""
        return features if self.rows is None else features[self.rows]


def select_rows(features: NDArray[np.float32], settings: PatchCoreSettings, call: Call) -> Selection:
    """The rows of (n, d) features that become the memory bank."""
    if settings.coreset is None:
        return Selection(None, 0.0)
    count = coreset_size(settings.coreset, len(features))
    if settings.coreset_method == "random":
        return Selection(_permutation(len(features), settings)[:count], None)
    selection = _greedy(features, count, settings, call)
    if selection.rows is not None and len(selection.rows) < count:
        warnings.warn(
            f"the coreset has {len(selection.rows)} rows instead of {count}: every other patch equals a chosen one",
            stacklevel=3,
        )
    return selection


def grow_rows(
    features: NDArray[np.float32],
    settings: PatchCoreSettings,
    call: Call,
    *,
    held: int,
    patches: tuple[int, int],
    cover: float | None,
) -> Selection:
    """The rows that become the bank of a detector that grows.

    The first `held` of the (n, d) features are its bank's. `patches`: (patches seen before, patches seen now).
    `cover`: a bound on any seen patch's distance to its nearest candidate, None if unknown.
    """
    if settings.coreset is None:
        return Selection(None, cover)
    budget = settings.coreset
    # No bank gets smaller; a fraction of all patches is no less than it was, unless their number is not known exactly.
    count = max(held, coreset_size(budget, sum(patches))) if isinstance(budget, float) else budget
    count = min(count, len(features))
    if settings.coreset_method == "random":
        old = min(held, round(count * patches[0] / sum(patches)))
        old = max(old, count - (len(features) - held))
        rows = _permutation(held, settings)[:old], held + _permutation(len(features) - held, settings)[: count - old]
        return Selection(np.concatenate(rows), None)
    found = _greedy(features, count, replace(settings, start=0), call)
    if found.cover is None or cover is None:
        return Selection(found.rows, None)
    return Selection(found.rows, add_cover(cover, found.cover, features.shape[1]))


def _permutation(rows: int, settings: PatchCoreSettings) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64(settings.seed)).permutation(rows).astype(np.int64)


def _greedy(features: NDArray[np.float32], count: int, settings: PatchCoreSettings, call: Call) -> Selection:
    """The greedy selection; it ends early, without a word, where all distinct rows are chosen."""
    projection = settings.projection
    if projection == "johnson-lindenstrauss":
        projection = johnson_lindenstrauss_width(*features.shape)
    rows, radii = greedy_sequence(
        features,
        count,
        seed=settings.seed,
        start=settings.start,
        projection=projection,
        projection_kind=settings.projection_kind,
        threads=call.threads,
        progress=None if call.progress is None else partial(call.progress, "coreset"),
    )
    # A radius in a projection, or from a beginning with means, is no distance that patches have to the bank.
    exact = projection is None and not isinstance(settings.start, str)
    return Selection(rows, float(radii[-1]) if exact else None)
