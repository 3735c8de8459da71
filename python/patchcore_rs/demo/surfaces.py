"""How the surfaces of the generated inspection set are drawn, with numpy alone.

A drawing function takes the side n in pixels, the stream of the natural variation and a flaw or None; it returns linear
light (n, n, 3) and the region of the flaw (n, n). Natural variation never reads the stream of the flaw, nor the other
way round, so that a picture with a flaw and the same picture without it differ in the flaw alone. Lengths are fractions
of the picture's side, so a flaw covers about the same share of it at any n. The arithmetic is float64, so that rounding
to uint8 does not hang on the last bit of a CPU's sine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DRAW", "Flaw", "photograph"]

Array = NDArray[np.float64]
Scene = tuple[Array, NDArray[np.bool_]]


@dataclass(frozen=True)
class Flaw:
    """What to draw wrong: the kind, the flaw's own stream, and its severity in [0, 1)."""

    kind: str
    rng: np.random.Generator
    severity: float

    def between(self, mild: float, strong: float) -> float:
        """The value that lies `severity` of the way from mild to strong."""
        return mild + (strong - mild) * self.severity


# Drawing tools: (n, n) arrays over the unit square, x to the right and y down; distances are negative inside.


def _grid(n: int) -> tuple[Array, Array]:
    t = (np.arange(n) + 0.5) / n
    return t[None, :], t[:, None]


@lru_cache(maxsize=32)
def _spline(n: int, cells: int) -> Array:
    """Weights of the uniform cubic B-spline with `cells` intervals at n points, (n, cells + 3)."""
    t = (np.arange(n) + 0.5) / n * cells
    first = t.astype(np.int64)
    f = t - first
    weights = np.zeros((n, cells + 3))
    for k, basis in enumerate(((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3)):
        weights[np.arange(n), first + k] = basis / 6
    return weights


def _smooth_noise(rng: np.random.Generator, n: int, cells: int) -> Array:
    """Smooth noise of about unit deviation with `cells` bumps across the picture."""
    weights = _spline(n, cells)
    noise: Array = weights @ rng.normal(0.0, 2.0, (cells + 3, cells + 3)) @ weights.T
    return noise


def _inside(distance: Array, width: float) -> Array:
    """1 inside, 0 outside, and a smooth step of this width over the edge."""
    t = np.clip(0.5 - distance / width, 0.0, 1.0)
    cover: Array = t * t * (3.0 - 2.0 * t)
    return cover


def _over(below: Array, above: Array, opacity: Array) -> Array:
    return below + opacity[..., None] * (above - below)


def _pose(rng: np.random.Generator, n: int, degrees: float, zoom: float, shift: float) -> tuple[Array, Array]:
    """Coordinates from the centre after a turn, a zoom and a shift, each drawn from +- its argument."""
    x, y = _grid(n)
    turn, scale = math.radians(rng.uniform(-degrees, degrees)), 1.0 + rng.uniform(-zoom, zoom)
    c, s = scale * math.cos(turn), scale * math.sin(turn)
    dx, dy = rng.uniform(-shift, shift, 2)
    return c * (x - 0.5) - s * (y - 0.5) + dx, s * (x - 0.5) + c * (y - 0.5) + dy


def _blob(rng: np.random.Generator, dx: Array, dy: Array, radius: float, rough: float) -> Array:
    """Distance to a stretched, turned and irregular disc around (0, 0)."""
    stretch, turn = rng.uniform(0.75, 1.3), rng.uniform(0.0, math.pi)
    a = (math.cos(turn) * dx + math.sin(turn) * dy) * stretch
    b = (math.cos(turn) * dy - math.sin(turn) * dx) / stretch
    angle = np.linspace(-math.pi, math.pi, 257)
    waves = np.arange(2, 9)
    heights, phases = rough * rng.normal(size=7) / waves, rng.uniform(0.0, 2.0 * math.pi, 7)
    outline = 1.0 + np.cos(angle[:, None] * waves + phases) @ heights
    distance: Array = np.sqrt(a * a + b * b) - radius * np.interp(np.arctan2(b, a), angle, outline)
    return distance


def _path(rng: np.random.Generator, start: Array, heading: float, length: float, wander: float) -> Array:
    """A meandering line of 24 steps, (25, 2)."""
    headings = heading + np.cumsum(rng.normal(0.0, wander, 24))
    steps = np.stack([np.cos(headings), np.sin(headings)], axis=1) * (length / 24)
    return np.concatenate([start[None], start + np.cumsum(steps, axis=0)])


def _stroke(path: Array, n: int, reach: float = 0.02) -> tuple[Array, Array]:
    """Distance to a path, infinite beyond `reach`, and the place of the nearest point along it in [0, 1]."""
    x, y = _grid(n)
    distance, place = np.full((n, n), np.inf), np.zeros((n, n))
    for k, (p, q) in enumerate(pairwise(path)):
        low = np.clip(np.floor((np.minimum(p, q) - reach) * n), 0, n).astype(int)
        high = np.clip(np.ceil((np.maximum(p, q) + reach) * n), 0, n).astype(int)
        window = (slice(low[1], high[1]), slice(low[0], high[0]))
        px, py, d = x[:, window[1]] - p[0], y[window[0]] - p[1], q - p
        t = np.clip((px * d[0] + py * d[1]) / float(d @ d), 0.0, 1.0)
        r = np.sqrt((px - t * d[0]) ** 2 + (py - t * d[1]) ** 2)
        nearer = r < distance[window]
        distance[window] = np.where(nearer, r, distance[window])
        place[window] = np.where(nearer, (k + t) / (len(path) - 1), place[window])
    return distance, place


def _tint(rng: np.random.Generator, rgb: tuple[float, float, float], spread: float) -> Array:
    return np.array(rgb) * rng.normal(1.0, spread, 3)


def _cloth(n: int, rng: np.random.Generator, flaw: Flaw | None) -> Scene:
    """Two sets of round threads that pass over and under each other; the higher one is seen."""
    threads = 22
    u, v = _pose(rng, n, 1.5, 0.02, 0.5)
    u, v = threads * u + 0.10 * _smooth_noise(rng, n, 4), threads * v + 0.10 * _smooth_noise(rng, n, 4)
    i, j = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    warp_width, weft_width = rng.normal(0.47, 0.012, (2, 64))
    warp_tone, weft_tone = rng.normal(1.0, 0.02, (2, 64))
    warp_dye, weft_dye = _tint(rng, (0.66, 0.62, 0.53), 0.01), _tint(rng, (0.24, 0.33, 0.47), 0.015)
    slub = 1.0 + 0.03 * _smooth_noise(rng, n, 20)
    fuzz = 1.0 + 0.05 * rng.standard_normal((n, n)) + 0.03 * _smooth_noise(rng, n, 64)

    x, _ = _grid(n)
    mask = np.zeros((n, n), dtype=bool)
    present, thickness = np.ones((n, n)), np.ones((n, n))
    if flaw and flaw.kind in ("missing_thread", "thin_thread"):
        row = flaw.rng.integers(j.min() + 4, j.max() - 3)
        length = flaw.between(0.25, 0.6)
        start = flaw.rng.uniform(0.05, 0.95 - length)
        mask = (j == row) & (x > start) & (x < start + length)
        if flaw.kind == "missing_thread":
            present = 1.0 - mask
        else:
            thickness = 1.0 - flaw.between(0.30, 0.85) * mask

    across_warp, across_weft = u - i - 0.5, v - j - 0.5
    over = 1.0 - 2.0 * ((i + j) & 1)
    lift_warp, lift_weft = over * np.cos(np.pi * across_weft), -over * np.cos(np.pi * across_warp)
    p, q = across_warp / (warp_width[i & 63] * slub), across_weft / (weft_width[j & 63] * slub * thickness)
    round_warp, round_weft = np.sqrt(np.maximum(0.0, 1.0 - p * p)), present * np.sqrt(np.maximum(0.0, 1.0 - q * q))
    seen = 1.0 / (1.0 + np.exp(-12.0 * (round_warp - round_weft + 0.7 * (lift_warp - present * lift_weft))))
    twist_warp = 0.07 * np.sin(2.0 * math.pi * (0.7 * p + 2.0 * v))
    twist_weft = 0.07 * np.sin(2.0 * math.pi * (0.7 * q + 2.0 * u))
    light_warp = (0.30 + 0.50 * round_warp**2 + 0.28 * lift_warp - 0.10 * p + twist_warp) * warp_tone[i & 63]
    light_weft = (0.30 + 0.50 * round_weft**2 + 0.28 * lift_weft - 0.10 * q + twist_weft) * weft_tone[j & 63]
    gap = 0.15 + 0.85 * np.minimum(1.0, 2.5 * np.maximum(round_warp, round_weft))
    light = (seen * light_warp)[..., None] * warp_dye + ((1.0 - seen) * light_weft)[..., None] * weft_dye
    light *= (gap * fuzz)[..., None]

    if flaw and flaw.kind == "hole":
        return _hole(light, flaw, np.stack([warp_dye, weft_dye]))
    if flaw and flaw.kind == "stain":
        return _stain(light, flaw)
    return light, mask


def _hole(light: Array, flaw: Flaw, dyes: Array) -> Scene:
    n = len(light)
    x, y = _grid(n)
    centre, radius = flaw.rng.uniform(0.12, 0.88, 2), flaw.between(0.035, 0.07)
    fray = 0.005 * _smooth_noise(flaw.rng, n, 48)
    distance = _blob(flaw.rng, x - centre[0], y - centre[1], radius, 0.3) + fray
    light, mask = _over(light, np.full(3, 0.012), _inside(distance, 0.008)), distance < 0.003
    for _ in range(3):
        start, heading = centre + flaw.rng.normal(0.0, 0.5 * radius, 2), flaw.rng.uniform(0.0, 2.0 * math.pi)
        fibre, _ = _stroke(_path(flaw.rng, start, heading, 2.0 * radius, 0.25), n)
        light = _over(light, 0.5 * flaw.rng.choice(dyes), 0.8 * _inside(fibre - 0.001, 0.005) * mask)
    return light, mask


def _stain(light: Array, flaw: Flaw) -> Scene:
    x, y = _grid(len(light))
    cx, cy = flaw.rng.uniform(0.15, 0.85, 2)
    distance = _blob(flaw.rng, x - cx, y - cy, flaw.between(0.06, 0.12), 0.25)
    rim = np.exp(-(((distance + 0.008) / 0.008) ** 2))
    depth = _inside(distance, 0.02) * (0.7 + 0.3 * rim)
    return light * (1.0 - depth[..., None] * np.array([0.40, 0.50, 0.62])), distance < 0.006


def _metal(n: int, rng: np.random.Generator, flaw: Flaw | None) -> Scene:
    """White noise filtered to streaks along the brushing direction, under a lamp's broad reflection."""
    x, y = _grid(n)
    turn = math.radians(rng.uniform(-3.0, 3.0))
    fx, fy = np.fft.rfftfreq(n, 1.0 / n)[None, :], np.fft.fftfreq(n, 1.0 / n)[:, None]
    along, across = math.cos(turn) * fx + math.sin(turn) * fy, math.cos(turn) * fy - math.sin(turn) * fx
    along = along * rng.uniform(0.85, 1.15)
    streaks = np.exp(-0.5 * (along / 1.6) ** 2) + 0.5 * np.exp(-0.5 * (along / 7.0) ** 2)
    streaks = streaks * np.exp(-0.5 * (across / 90.0) ** 2)
    grain = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((n, n))) * streaks, s=(n, n))
    grain *= rng.uniform(0.065, 0.08) / grain.std()
    lamp = rng.uniform(0.2, 0.8) + 0.15 * rng.normal() * (y - 0.5)
    glow = 0.50 + 0.34 * np.exp(-(((x - lamp) / rng.uniform(0.35, 0.5)) ** 2)) + 0.015 * _smooth_noise(rng, n, 5)
    steel = _tint(rng, (0.60, 0.61, 0.63), 0.008)

    mask = np.zeros((n, n), dtype=bool)
    centre = flaw.rng.uniform(0.15, 0.85, 2) if flaw else np.zeros(2)
    from_x, from_y = x - centre[0], y - centre[1]
    if flaw and flaw.kind == "smudge":
        distance = _blob(flaw.rng, from_x, from_y, flaw.between(0.05, 0.09), 0.15)
        ridges = 0.75 + 0.25 * np.sin(2.0 * math.pi * (distance / 0.016 + 0.5 * _smooth_noise(flaw.rng, n, 8)))
        dull = flaw.between(0.40, 0.92) * _inside(distance, 0.03) * ridges
        grain, glow = grain * (1.0 - dull), glow * (1.0 - 0.12 * dull)
        mask = distance < 0.005
    if flaw and flaw.kind == "dent":
        radius = flaw.between(0.03, 0.05)
        px, py = from_x / radius, from_y / radius
        glow = glow * (1.0 + 0.4 * (0.5 * px + py) * np.exp(-0.9 * (px * px + py * py)))
        mask = px * px + py * py < 3.5
    light = (glow * (1.0 + grain))[..., None] * steel

    if flaw and flaw.kind == "scratch":
        return _scratch(light, flaw, centre)
    if flaw and flaw.kind == "blowholes":
        return _blowholes(light, flaw, from_x, from_y)
    return light, mask


def _scratch(light: Array, flaw: Flaw, centre: Array) -> Scene:
    heading, length = flaw.rng.uniform(0.5, 2.6), flaw.between(0.2, 0.5)
    start = centre - 0.5 * length * np.array([math.cos(heading), math.sin(heading)])
    distance, place = _stroke(_path(flaw.rng, start, heading, length, 0.03), len(light))
    width = 0.001 + 0.0025 * np.sqrt(4.0 * place * (1.0 - place))
    light = light * (1.0 - 0.35 * _inside(distance - 2.0 * width, 0.004))[..., None]
    return _over(light, np.full(3, 0.9), 0.6 * _inside(distance - 0.8 * width, 0.003)), distance < 2.0 * width + 0.001


def _blowholes(light: Array, flaw: Flaw, from_x: Array, from_y: Array) -> Scene:
    mask = np.zeros(light.shape[:2], dtype=bool)
    for _ in range(flaw.rng.integers(2, 6)):
        px, py = from_x - flaw.rng.normal(0.0, 0.04), from_y - flaw.rng.normal(0.0, 0.04)
        radius = flaw.rng.uniform(0.008, 0.02)
        distance = _blob(flaw.rng, px, py, radius, 0.15)
        rim = 0.3 * _inside(distance - 0.004, 0.006) * np.clip(py / radius, -1.0, 1.0)
        light = _over(light * (1.0 + rim)[..., None], np.full(3, 0.04), _inside(distance, 0.006))
        mask = mask | (distance < 0.006)
    return light, mask


def _ornament(a: Array, b: Array) -> tuple[Array, Array]:
    """Where the blue and the ochre ink go, at tile coordinates in [-1, 1]."""
    soft = 0.035
    r = np.sqrt(a * a + b * b)
    c, s = a / (r + 1e-9), b / (r + 1e-9)
    cos4 = 1.0 - 8.0 * (c * s) ** 2
    cos8 = 2.0 * cos4 * cos4 - 1.0
    corner = np.sqrt((1.0 - np.abs(a)) ** 2 + (1.0 - np.abs(b)) ** 2)
    star = _inside(r - 0.52 - 0.16 * cos8, soft)
    petals = star * _inside(np.abs(r - 0.38) - 0.07 - 0.05 * cos8, soft)
    arcs = _inside(np.abs(corner - 0.40) - 0.05, soft) + _inside(corner - 0.20, soft)
    frame = _inside(np.abs(np.maximum(np.abs(a), np.abs(b)) - 0.92) - 0.014, soft)
    blue: Array = np.maximum(np.maximum(star - petals, arcs), frame)
    return blue, petals


def _tiles(n: int, rng: np.random.Generator, flaw: Flaw | None) -> Scene:
    """Printed and glazed tiles in a fixture: grout, body, two inks, and the light on the rounded edges."""
    u, v = _pose(rng, n, 0.3, 0.004, 0.004)
    u, v = (u + 0.5) / 0.36 + 4.15, (v + 0.5) / 0.36 + 4.40
    i, j = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    tile = 16 * i + j
    joint = rng.uniform(0.036, 0.044)
    a, b = (2.0 * (u - i) - 1.0) / (1.0 - joint), (2.0 * (v - j) - 1.0) / (1.0 - joint)
    slip_a, slip_b, density, tone = rng.normal((0.0, 0.0, 0.92, 1.0), (0.005, 0.005, 0.010, 0.01), (256, 4)).T[:, tile]
    density = density + 0.015 * _smooth_noise(rng, n, 12)
    glaze, clay = _tint(rng, (0.80, 0.78, 0.72), 0.01), _tint(rng, (0.46, 0.25, 0.15), 0.03)
    blue, ochre = _tint(rng, (0.06, 0.12, 0.35), 0.02), _tint(rng, (0.62, 0.36, 0.08), 0.02)
    cement = _tint(rng, (0.36, 0.34, 0.31), 0.02) * (1.0 + 0.10 * rng.standard_normal((n, n, 1)))
    mottle = 1.0 + 0.006 * _smooth_noise(rng, n, 40) + 0.01 * _smooth_noise(rng, n, 9)

    a_print, b_print = a + slip_a, b + slip_b
    blue_ink, ochre_ink = _ornament(a_print, b_print)
    edge = np.maximum(np.abs(a), np.abs(b)) - 1.0
    mask = np.zeros((n, n), dtype=bool)
    cx, cy = flaw.rng.uniform(0.2, 0.8, 2).tolist() if flaw else (0.5, 0.5)
    here = int(cy * n), int(cx * n)
    struck = (tile == tile[here]) & (edge < 0.0)
    if flaw and flaw.kind == "misprint":
        way, far = flaw.rng.uniform(0.0, 2.0 * math.pi), flaw.between(0.05, 0.12)
        _, moved = _ornament(a_print + far * math.cos(way), b_print + far * math.sin(way))
        mask = struck & (np.abs(moved - ochre_ink) > 0.05)
        ochre_ink = np.where(struck, moved, ochre_ink)
    if flaw and flaw.kind == "faded_print":
        density = density - flaw.between(0.10, 0.33) * struck
        mask = struck & (np.maximum(blue_ink, ochre_ink) > 0.2)
    light = _over(_over(np.broadcast_to(glaze, (n, n, 3)), blue, blue_ink * density), ochre, ochre_ink * density)
    slope = np.where(np.abs(a) > np.abs(b), -np.sign(a), -np.sign(b))
    light = light * (tone * mottle * (1.0 + 0.12 * slope * np.exp(-(((edge + 0.03) / 0.02) ** 2))))[..., None]

    if flaw and flaw.kind == "chip":
        at = np.array([a[here], b[here]])
        nearest = np.argmax(np.abs(at))
        at[nearest] = np.copysign(0.95, at[nearest])
        distance = _blob(flaw.rng, a - at[0], b - at[1], flaw.between(0.18, 0.32), 0.3)
        distance = distance + 0.02 * _smooth_noise(flaw.rng, n, 40)
        relief = (1.0 + 0.08 * _smooth_noise(flaw.rng, n, 60)) * (1.0 - 0.4 * np.exp(-((distance / 0.04) ** 2)))
        light = _over(light, clay * relief[..., None], _inside(distance, 0.04) * struck)
        mask = struck & (distance < 0.015)
    if flaw and flaw.kind == "crack":
        inwards = math.atan2(-b[here], -a[here]) + flaw.rng.normal(0.0, 0.4)
        path = _path(flaw.rng, np.array([cx, cy]), inwards, flaw.between(0.20, 0.32), 0.2)
        distance, place = _stroke(path, n)
        width = 0.004 * (1.0 - 0.7 * place)
        light = _over(light, np.full(3, 0.06), 0.85 * _inside(distance - width, 0.004) * struck)
        mask = struck & (distance < width + 0.0015)
    shade = 1.0 - 0.35 * _inside(np.abs(edge), 0.08)
    return _over(cement * shade[..., None], light, _inside(edge + 0.01, 0.03)), mask


DRAW: dict[str, Callable[[int, np.random.Generator, Flaw | None], Scene]] = {
    "cloth": _cloth,
    "metal": _metal,
    "tiles": _tiles,
}


def photograph(light: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Lamp, lens, white balance, sensor noise and gamma: linear light (n, n, 3) to uint8."""
    n = len(light)
    x, y = _grid(n)
    tilt, way = rng.uniform(0.0, 0.2), rng.uniform(0.0, 2.0 * math.pi)
    lamp = 1.0 + tilt * ((x - 0.5) * math.cos(way) + (y - 0.5) * math.sin(way))
    lens = 1.0 - rng.uniform(0.1, 0.25) * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
    exposure = rng.normal(1.0, 0.03) * rng.normal(1.0, 0.01, 3)
    light = np.clip(light * (lamp * lens)[..., None] * exposure, 0.0, 1.0)
    light = light + np.sqrt(1e-5 + 6e-5 * light) * rng.standard_normal((n, n, 3))
    return np.rint(255.0 * np.clip(light, 0.0, 1.0) ** (1.0 / 2.2)).astype(np.uint8)
