"""Greedy selection: loops that cost the same at every pick, written from their published descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from patchcore_rs.demo import plain_torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from benches.data import Array


@dataclass(frozen=True)
class Selection:
    """What a rival's selection takes: `before` the loop and for each of `picks` picks, in seconds."""

    before: float
    each: float
    picks: int
    width: int

    def seconds(self, count: int) -> float:
        """Of a selection of `count` rows; every pick costs the same."""
        return self.before + count * self.each


def _each(loop: Callable[[int], float], picks: int) -> float:
    """Seconds a pick in the faster half of the picks, after two to warm up."""
    loop(2)
    half = max(1, picks // 2)
    return min(loop(half), loop(half)) / half


def anomalib(features: Array, picks: int) -> Selection:
    """anomalib's KCenterGreedy: the loop in a sparse random projection to the Johnson-Lindenstrauss width at eps 0.9.

    Each pick computes the distance of every projected row to it, from differences, and the running minimum. Where the
    features are narrower than that width, the loop runs in their own.
    """
    from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim

    begin = perf_counter()
    values = torch.from_numpy(features)
    if int(johnson_lindenstrauss_min_dim(len(features), eps=0.9)) <= features.shape[1]:
        projection = SparseRandomProjection(eps=0.9, random_state=0).fit(features)
        components = torch.from_numpy(projection.components_.toarray().astype(np.float32))
        values = values @ components.T
    nearest = torch.full((len(values),), torch.inf)
    before = perf_counter() - begin
    pick = 0

    def loop(count: int) -> float:
        nonlocal pick
        begin = perf_counter()
        for _ in range(count):
            distances = torch.linalg.vector_norm(values - values[pick], dim=1)
            torch.minimum(nearest, distances, out=nearest)
            pick = int(nearest.argmax())
        return perf_counter() - begin

    return Selection(before, _each(loop, picks), picks, values.shape[1])


def approximate(
    features: Array, picks: int, *, streamlined: bool = False, width: int = 128, starts: int = 10
) -> Selection:
    """patchcore-inspection's approximate greedy sampler: a random linear map to 128 channels, ten starting rows.

    The mean distance to the starting rows stands for the distance to the chosen ones at first; each pick then costs one
    product of all rows with it, the root, and the running minimum. As shipped, the squared norms of all rows are
    computed for every pick and the minimum is taken of two joined columns; `streamlined` keeps norms and memory.
    """
    generator = torch.Generator().manual_seed(0)
    begin = perf_counter()
    values = torch.from_numpy(features)
    bound = values.shape[1] ** -0.5
    mapping = torch.empty(values.shape[1], width).uniform_(-bound, bound, generator=generator)
    values = values @ mapping
    norms = values.square().sum(dim=1)
    first = torch.randperm(len(values), generator=generator)[:starts]
    nearest = torch.cdist(values, values[first]).mean(dim=1)
    before = perf_counter() - begin

    def thrifty() -> None:
        pick = int(nearest.argmax())
        distances = torch.addmv(norms, values, values[pick], alpha=-2).add_(norms[pick]).clamp_(min=0).sqrt_()
        torch.minimum(nearest, distances, out=nearest)

    def shipped() -> None:
        nonlocal nearest
        pick = int(nearest.argmax())
        chosen = values[pick : pick + 1]
        squared = torch.bmm(values[:, None], values[:, :, None]).reshape(-1, 1)
        distances = (squared - 2 * (values @ chosen.T) + chosen @ chosen.T).clamp(0).sqrt()
        nearest = torch.cat([nearest[:, None], distances], dim=1).min(dim=1).values

    step = thrifty if streamlined else shipped

    def loop(count: int) -> float:
        begin = perf_counter()
        for _ in range(count):
            step()
        return perf_counter() - begin

    return Selection(before, _each(loop, picks), picks, width)


def naive(features: Array, picks: int) -> Selection:
    """The incremental minimum in float32 and the full dimension."""
    values = torch.from_numpy(features)
    plain_torch.greedy_coreset(values, 2, 0)
    begin = perf_counter()
    plain_torch.greedy_coreset(values, 1, 0)
    once = perf_counter() - begin  # its norms, mostly
    begin = perf_counter()
    plain_torch.greedy_coreset(values, picks, 0)
    took = perf_counter() - begin
    return Selection(once, max(0.0, took - once) / max(1, picks - 1), picks, values.shape[1])


ALL: dict[str, Callable[[Array, int], Selection]] = {
    "anomalib": anomalib,
    "patchcore-inspection": approximate,
    "patchcore-inspection, streamlined": partial(approximate, streamlined=True),
    "naive": naive,
}
