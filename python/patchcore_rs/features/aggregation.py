"""Backbone maps to patch features on their own device: local neighbourhood aggregation (section 3.1), in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence


def aggregate_tensors(
    maps: Sequence[Tensor], patch_size: int, stride: int, width: int | None
) -> tuple[Tensor, tuple[int, int]]:
    """What `functional.aggregate` computes, on the maps' own device: ((n * gh * gw, d), (gh, gw)).

    `maps` (n, c, h, w), one per layer. Each position takes in its zero-padded p x p neighbourhood; deeper layers are
    interpolated bilinearly (`align_corners=False`) to the first one's grid. `width` None joins the means
    (padding counted); a width pools channels and taps of each layer adaptively to it, then the joined layers again.
    """
    padding = (patch_size - 1) // 2
    pooled: list[Tensor] = []
    for layer_map in maps:
        if width is None:
            layer = functional.avg_pool2d(layer_map, patch_size, stride, padding, count_include_pad=True)
        else:
            taps = functional.unfold(layer_map, patch_size, padding=padding, stride=stride)
            rows, columns = ((side + 2 * padding - patch_size) // stride + 1 for side in layer_map.shape[2:])
            # Pooling comes before the interpolation, which is linear too and then has less to do.
            reduced = functional.adaptive_avg_pool1d(taps.transpose(1, 2), width)
            layer = reduced.transpose(1, 2).reshape(len(layer_map), width, rows, columns)
        if pooled and layer.shape[2:] != pooled[0].shape[2:]:
            layer = functional.interpolate(layer, pooled[0].shape[2:], mode="bilinear", align_corners=False)
        pooled.append(layer)
    rows, columns = pooled[0].shape[2:]
    features = torch.cat(pooled, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    if width is not None:
        features = functional.adaptive_avg_pool1d(features[:, None], width)[:, 0]
    return features, (rows, columns)
