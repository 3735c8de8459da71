"""The stages of PatchCore in plain torch, as a good torch user writes them.

What the demo and the benchmarks compare with: float32, vectorised, in bounded memory, on torch's own threads. The
greedy selection keeps a running minimum instead of a distance matrix and multiplies instead of subtracting, both the
faster choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

_PRODUCT = 1 << 22  # entries of a block of query-row products: 16 MiB


def aggregate(maps: Sequence[Tensor], patch_size: int = 3) -> Tensor:
    """Patch features (n * h * w, d) of one (n, c, h, w) map per layer, on the first one's grid.

    Means over patch_size x patch_size neighbourhoods (zeros beyond the border count), deeper layers upsampled
    bilinearly.
    """
    pooled = [functional.avg_pool2d(m, patch_size, stride=1, padding=patch_size // 2) for m in maps]
    grid = pooled[0].shape[-2:]
    deeper = [functional.interpolate(m, grid, mode="bilinear", align_corners=False) for m in pooled[1:]]
    return torch.cat([pooled[0], *deeper], dim=1).permute(0, 2, 3, 1).flatten(0, 2)


def greedy_coreset(features: Tensor, count: int, start: int) -> Tensor:
    """Greedy k-centre selection among (n, d) rows from row `start`: (count,) int64 in pick order."""
    norms = features.square().sum(dim=1)
    nearest = torch.full_like(norms, torch.inf)
    picks = torch.empty(count, dtype=torch.int64)
    pick = start
    for i in range(count):
        picks[i] = pick
        squared = torch.addmv(norms, features, features[pick], alpha=-2).add_(norms[pick])
        torch.minimum(nearest, squared, out=nearest)
        nearest[pick] = -1.0  # rounding must not make a row its own farthest
        pick = int(nearest.argmax())
    return picks


def nearest(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (n,) of (n, d) queries to their nearest of (N, d) rows, and those rows' indices (n,)."""
    norms = bank.square().sum(dim=1)
    block = max(1, _PRODUCT // len(bank))
    parts = torch.split(queries, block)
    indices = torch.cat([torch.addmm(norms, part, bank.T, alpha=-2).argmin(dim=1) for part in parts])
    return torch.linalg.vector_norm(queries - bank[indices], dim=1), indices


def anomaly_maps(scores: Tensor, height: int, width: int, sigma: float = 4.0) -> Tensor:
    """Patch scores (n, h, w) as (n, height, width) maps: bilinear, then a Gaussian cut at 4 sigma, mirrored borders."""
    maps = functional.interpolate(scores[:, None], (height, width), mode="bilinear", align_corners=False)
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    maps = functional.conv2d(maps[:, :, _mirrored(height, radius)], kernel[None, None, :, None])
    return functional.conv2d(maps[:, :, :, _mirrored(width, radius)], kernel[None, None, None, :])[:, 0]


def _mirrored(length: int, radius: int) -> Tensor:
    """Indices of a line of `length` pixels and `radius` more at either end, the edge repeated: c b a a b c c b a."""
    at = torch.arange(-radius, length + radius) % (2 * length)
    return torch.minimum(at, 2 * length - 1 - at)
