"""The stages around the search: aggregation of a backbone's maps, and anomaly maps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benches import checks, goals, record
from benches.data import normal
from benches.rivals import stages as rivals
from benches.run import OURS, Contest
from patchcore_rs import _native, aggregate

if TYPE_CHECKING:
    from collections.abc import Callable

    from benches.data import Array
    from benches.record import Table
    from benches.run import Run

_QUICK = 2  # images of a quick run
_SIGMA = 4.0


# --- Aggregation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aggregate:
    """A row: maps of some images, (channels, side) of each layer; `width` None joins the layers."""

    network: str
    images: int
    layers: tuple[tuple[int, int], ...]
    width: int | None = None

    @property
    def key(self) -> str:
        """What tests call the case."""
        return f"{self.network}, {self.images} images" if self.images > 1 else f"{self.network}, 1 image"

    @property
    def entrants(self) -> dict[str, rivals.Prepare]:
        """The forms of torch that suit these layers."""
        return rivals.aggregation([channels for channels, _ in self.layers], self.width)


_LITE0 = ((40, 28), (112, 14), (192, 7))
_WIDE = ((512, 28), (1024, 14))
AGGREGATE = (
    *(Aggregate("EfficientNet-Lite0", images, _LITE0) for images in (1, 32)),
    *(Aggregate("WideResNet50", images, _WIDE, width=1024) for images in (1, 32)),
)


def aggregate_tables(run: Run) -> list[Table]:
    """Aggregation of one image and of 32, for both networks."""
    return [record.table("aggregate", [aggregate_row(run, case) for case in AGGREGATE])]


def aggregate_contest(run: Run, case: Aggregate) -> Contest:
    """Ours beside torch's forms, in both memory layouts."""
    images = min(case.images, _QUICK) if run.features.quick else case.images
    maps = [normal((images, channels, side, side), seed) for seed, (channels, side) in enumerate(case.layers)]
    # As the backbones of this project return them: channels last in memory.
    tensors = [torch.from_numpy(layer).contiguous(memory_format=torch.channels_last) for layer in maps]

    def ours() -> Array:
        features: Array = aggregate(tensors, width=case.width, threads=run.threads)[0].numpy()
        return features

    calls: dict[str, Callable[[], Array]] = {OURS: ours}
    calls |= {name: prepare(maps) for name, prepare in case.entrants.items()}
    errors = {name: checks.check_features(call(), maps, case.width) for name, call in calls.items()}
    columns = calls[OURS]().shape[1]
    cells = {"data": case.network, "images": images, "width": columns, "pooled": case.width is not None}
    return Contest(f"aggregate {case.key} to {columns} channels", ({**calls},), errors, cells)


def aggregate_row(run: Run, case: Aggregate) -> dict[str, Any]:
    """Ours and torch in turns."""
    match = aggregate_contest(run, case)
    race = run.race(match.calls[0])
    return {**match.cells, **race, **goals.judged(race["ratio"], goals.AGGREGATE)}


# --- Maps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Maps:
    """A row: grids of patch scores of some images, drawn at `size` x `size` pixels."""

    images: int
    grid: int
    size: int

    @property
    def key(self) -> str:
        """What tests call the case."""
        return f"{self.images} images, {self.grid} to {self.size} pixels"


MAPS = (Maps(16, 28, 224), Maps(4, 56, 448))


def maps_tables(run: Run) -> list[Table]:
    """Anomaly maps of some images at once."""
    return [record.table("maps", [maps_row(run, case) for case in MAPS])]


def maps_contest(run: Run, case: Maps) -> Contest:
    """Ours beside torch's separable convolution."""
    images, size = (min(case.images, _QUICK), case.size // 4) if run.features.quick else (case.images, case.size)
    scores = normal((images, case.grid, case.grid), 0)
    ours = partial(_native.anomaly_maps, scores, size, size, _SIGMA, "bilinear", "symmetric", run.threads)
    calls: dict[str, Callable[[], Array]] = {OURS: ours, "torch": rivals.anomaly_maps(scores, size, _SIGMA)}
    errors = {name: checks.check_maps(call(), scores, size, _SIGMA) for name, call in calls.items()}
    cells = {"images": images, "grid": case.grid, "size": size, "sigma": _SIGMA}
    return Contest(f"maps of {case.key}", ({**calls},), errors, cells)


def maps_row(run: Run, case: Maps) -> dict[str, Any]:
    """Ours and torch in turns."""
    match = maps_contest(run, case)
    return {**match.cells, **run.race(match.calls[0])}
