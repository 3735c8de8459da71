"""What the kernels must answer, from the definitions, in plain float64 numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LANES = 16


def squared_distances(queries: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, N) canonical squared distances: column j is added to lane j mod 16, lanes are folded in halves."""
    groups = -(-rows.shape[1] // LANES)

    def lanes(values: NDArray[np.float32]) -> NDArray[np.float64]:
        wide = np.zeros((len(values), groups * LANES))
        wide[:, : values.shape[1]] = values
        return wide.reshape(len(values), groups, LANES)

    x, y = lanes(queries), lanes(rows)
    result = np.empty((len(x), len(y)))
    for query, line in zip(x, result, strict=True):
        sums = np.zeros((len(y), LANES))
        for group in range(groups):
            difference = query[group] - y[:, group]
            sums += difference * difference
        while sums.shape[1] > 1:
            half = sums.shape[1] // 2
            sums = sums[:, :half] + sums[:, half:]
        line[:] = sums[:, 0]
    return result


def nearest(
    queries: NDArray[np.float32], rows: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(n, k) distances and indices in the order (squared distance, index)."""
    return smallest(squared_distances(queries, rows), k)


def smallest(squared: NDArray[np.float64], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The roots of the k smallest of every row, and their indices: ties to the lowest index."""
    indices = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.sqrt(np.take_along_axis(squared, indices, axis=1)).astype(np.float32), indices


def splitmix64(state: int) -> int:
    """Vigna's SplitMix64: one output."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def greedy(
    rows: NDArray[np.float32], count: int, *, start: int | None = None, value: NDArray[np.float64] | None = None
) -> tuple[list[int], list[float]]:
    """Indices and radii of the textbook greedy k-centre loop, ties to the lowest index.

    It begins with row ``start``, or with the largest of ``value``: first squared distances.
    """
    value = np.full(len(rows), np.inf) if value is None else value.copy()
    picks: list[int] = []
    radii: list[float] = []
    while len(picks) < count:
        pick = start if start is not None and not picks else int(np.argmax(value))
        if picks and value[pick] <= 0:
            break
        picks.append(pick)
        value = np.minimum(value, squared_distances(rows[pick : pick + 1], rows)[0])
        value[pick] = -1
        radii.append(float(np.sqrt(max(value.max(), 0.0))))
    return picks, radii


# --- Aggregation -------------------------------------------------------------------------------------------


def upsampling(size: int, target: int) -> NDArray[np.float64]:
    """(target, size) matrix of bilinear interpolation along an axis, align_corners=False."""
    matrix = np.zeros((target, size))
    for i in range(target):
        source = max((i + 0.5) * size / target - 0.5, 0.0)
        low = min(int(source), size - 1)
        matrix[i, low] += 1 - (source - low)
        matrix[i, min(low + 1, size - 1)] += source - low
    return matrix


def unfold(maps: NDArray[np.float32], patch_size: int, stride: int) -> NDArray[np.float64]:
    """(n, gh, gw, c, p * p): the zero-padded neighbourhoods of (n, h, w, c) maps."""
    pad = (patch_size - 1) // 2
    padded = np.pad(maps.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (patch_size, patch_size), axis=(1, 2))
    return windows[:, ::stride, ::stride].reshape(*windows[:, ::stride, ::stride].shape[:4], -1)


def to_grid(values: NDArray[np.float64], grid: tuple[int, int]) -> NDArray[np.float64]:
    """(n, h, w, ...) interpolated to (n, *grid, ...)."""
    rows = np.einsum("yi,niw...->nyw...", upsampling(values.shape[1], grid[0]), values)
    return np.einsum("xj,nyj...->nyx...", upsampling(values.shape[2], grid[1]), rows)


def adaptive_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Adaptive average pooling of the last axis."""
    size = values.shape[-1]
    ranges = [(k * size // width, -(-(k + 1) * size // width)) for k in range(width)]
    return np.stack([values[..., start:end].mean(axis=-1) for start, end in ranges], axis=-1)


def concatenated(maps: list[NDArray[np.float32]], patch_size: int, stride: int) -> NDArray[np.float64]:
    """(n, gh, gw, sum of c), the profile ``anomalib``: means over p * p, padding counted, layers joined."""
    means = [unfold(layer, patch_size, stride).mean(axis=-1) for layer in maps]
    return np.concatenate([to_grid(mean, means[0].shape[1:3]) for mean in means], axis=-1)


def pooled(maps: list[NDArray[np.float32]], patch_size: int, stride: int, width: int) -> NDArray[np.float64]:
    """(n, gh, gw, width), the profiles ``paper`` and ``amazon``: every layer's values pooled, then the joined ones."""
    layers = [unfold(layer, patch_size, stride) for layer in maps]
    layers = [to_grid(layer, layers[0].shape[1:3]) for layer in layers]
    layers = [adaptive_mean(layer.reshape(*layer.shape[:3], -1), width) for layer in layers]
    return adaptive_mean(np.concatenate(layers, axis=-1), width)


# --- Scores and maps ---------------------------------------------------------------------------------------


def image_score(patches: NDArray[np.float32], bank: NDArray[np.float32], b: int) -> float:
    """Eq. 7 for the (p, d) patches of one image; Eq. 6 where b is 1."""
    distances, indices = nearest(patches, bank, 1)
    test, star = int(np.argmax(distances)), int(indices[np.argmax(distances), 0])
    others = np.argsort(squared_distances(bank[star : star + 1], bank)[0], kind="stable")
    neighbourhood = [star, *others[others != star][: b - 1]]
    to = np.sqrt(squared_distances(patches[test : test + 1], bank)[0, neighbourhood])
    weights = np.exp(to - to.max())
    return float(to[0] if b == 1 else (1 - weights[0] / weights.sum()) * to[0])


def anomaly_maps(
    scores: NDArray[np.float32], size: tuple[int, int], sigma: float, kind: str, border: str
) -> NDArray[np.float64]:
    """(n, *size) maps of (n, rows, columns) scores: upsampled at full size, then blurred."""
    if kind == "bilinear":
        maps = to_grid(scores.astype(np.float64), size)
    else:
        maps = scores.astype(np.float64)
        for axis, target in zip((1, 2), size, strict=True):
            # Torch computes the source in float32, which decides ties at integers.
            scale = np.float32(scores.shape[axis]) / np.float32(target)
            source = (np.arange(target, dtype=np.float32) * scale).astype(int)
            maps = np.take(maps, np.minimum(source, scores.shape[axis] - 1), axis=axis)
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return maps
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (1, 2):
        padding = [(0, 0)] * 3
        padding[axis] = (radius, radius)
        padded = np.pad(maps, padding, mode="symmetric" if border == "symmetric" else "reflect")
        maps = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis=axis) @ kernel
    return maps


def bring_back(
    anomaly_map: NDArray[np.float32],
    size: tuple[int, int],
    resized: tuple[int, int],
    offset: tuple[int, int],
    unseen: float,
) -> NDArray[np.float64]:
    """A map in the pixels of its image of `size`, which was resized and then cropped from `offset` on."""
    out, seen = anomaly_map.astype(np.float64), np.ones(size, bool)
    for axis in (0, 1):
        at = (np.arange(size[axis]) + 0.5) * resized[axis] / size[axis] - 0.5 - offset[axis]
        known = np.arange(out.shape[axis])
        out = np.apply_along_axis(lambda line, at=at, known=known: np.interp(at, known, line), axis, out)
        inside = (at >= -0.5) & (at < len(known) - 0.5)
        seen &= inside[:, None] if axis == 0 else inside
    return np.where(seen, out, unseen)


# --- Gaussians ---------------------------------------------------------------------------------------------


def gaussians(features: NDArray[np.float32], epsilon: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(P, d) means and (P, d, d) covariances of (n, P, d) features, `epsilon` added to the diagonals."""
    wide = features.astype(np.float64)
    covariances = [np.atleast_2d(np.cov(wide[:, position], rowvar=False)) for position in range(wide.shape[1])]
    return wide.mean(axis=0), np.stack(covariances) + epsilon * np.eye(wide.shape[2])


def mahalanobis(
    features: NDArray[np.float32], means: NDArray[np.float64], covariances: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n, P) distances of (n, P, d) features."""
    centred = features.astype(np.float64) - means
    squared: NDArray[np.float64] = np.einsum("npi,pij,npj->np", centred, np.linalg.inv(covariances), centred)
    return np.sqrt(squared)


# --- Ensembles ---------------------------------------------------------------------------------------------


def combined(members: list[tuple[NDArray[np.float64], NDArray[np.float64]]], combine: str) -> NDArray[np.float64]:
    """The mean over members of what each gives test images, on the scale of what it gives training images."""
    scaled = []
    for training, test in members:
        if combine == "minmax":
            offset, width = training.min(), training.max() - training.min()
        else:
            offset, width = training.mean(dtype=np.float64), training.std(dtype=np.float64)
        scaled.append((test.astype(np.float64) - offset) / width)
    return np.mean(scaled, axis=0)


# --- SPADE -------------------------------------------------------------------------------------------------


def spade(
    image: tuple[NDArray[np.float32], NDArray[np.float32]],
    gallery: list[tuple[NDArray[np.float32], NDArray[np.float32]]],
    neighbours: int,
    kappa: int,
) -> tuple[float, NDArray[np.float64]]:
    """The score of an image and those of its p patches; an image is its (p, d) patches and (p, e) last layer.

    Means over the last layer are compared as float32, in which they are kept.
    """
    means = [last.mean(axis=0, dtype=np.float64).astype(np.float32) for _, last in [image, *gallery]]
    to_images = np.sqrt(squared_distances(means[0][None], np.stack(means[1:]))[0])
    nearest = np.argsort(to_images, kind="stable")[:neighbours]
    rows = np.concatenate([gallery[i][0] for i in sorted(nearest)])
    to_rows = np.sort(np.sqrt(squared_distances(image[0], rows)), axis=1)[:, :kappa]
    return float(to_images[nearest].mean()), to_rows.mean(axis=1)
