"""Aggregation and maps in torch: the functions that the demo compares with, and faster forms where there are any."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from patchcore_rs.demo import plain_torch
from patchcore_rs.features.aggregation import aggregate_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from benches.data import Array

    Form = Callable[[Sequence[Tensor]], Tensor]
    Prepare = Callable[[Sequence[Array]], Callable[[], Array]]  # lays out untimed, returns what is timed

LAYOUTS = {"torch": torch.contiguous_format, "torch, channels last": torch.channels_last}
_CLOSED = ((512, 1024), 1024)  # channels of the layers and the width that `_closed_form` is for


def aggregation(channels: Sequence[int], width: int | None) -> dict[str, Prepare]:
    """Every form of 3 x 3 aggregation of (n, c, h, w) maps of so many channels; `width` None joins the layers."""
    forms: dict[str, Form] = {"": plain_torch.aggregate}
    if width is not None:
        forms[""] = lambda maps: aggregate_tensors(maps, 3, 1, width)[0]
        if (tuple(channels), width) == _CLOSED:
            forms[", closed form"] = _closed_form

    def entrant(form: Form, layout: torch.memory_format) -> Prepare:
        def prepare(maps: Sequence[Array]) -> Callable[[], Array]:
            tensors = [torch.from_numpy(layer).contiguous(memory_format=layout) for layer in maps]
            return lambda: form(tensors).contiguous().numpy()

        return prepare

    return {
        name.replace("torch", f"torch{suffix}"): entrant(form, layout)
        for suffix, form in forms.items()
        for name, layout in LAYOUTS.items()
    }


def _closed_form(maps: Sequence[Tensor]) -> Tensor:
    """What pooling to 1024 comes to for layers of 512 and 1024 channels, without unfolding anything.

    512 channels of 9 taps pooled to 1024, then joined and pooled again, give each channel its nine taps at 1/10 and the
    centre once more; 1024 channels give the means of pairs.
    """
    first, second = maps
    fine = torch.add(0.1 * first, functional.avg_pool2d(first, 3, 1, 1), alpha=0.9)
    n, channels, height, width = second.shape
    pairs = second.view(n, channels // 2, 2, height, width).mean(dim=2)
    coarse = functional.interpolate(
        functional.avg_pool2d(pairs, 3, 1, 1), fine.shape[2:], mode="bilinear", align_corners=False
    )
    return torch.cat([fine, coarse], dim=1).permute(0, 2, 3, 1).flatten(0, 2)


def anomaly_maps(scores: Array, size: int, sigma: float) -> Callable[[], Array]:
    """Maps of (n, h, w) patch scores."""
    tensor = torch.from_numpy(scores)
    return lambda: plain_torch.anomaly_maps(tensor, size, size, sigma).numpy()
