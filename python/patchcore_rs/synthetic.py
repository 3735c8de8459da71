"""A generated inspection set: procedural photographs of three surfaces with known flaws.

Woven cloth, brushed metal and printed tiles, each with the variation of real production (pose, lighting, colour, material) and with four kinds of flaw
whose difficulty runs from obvious to near-invisible. `generate` writes them in the layout of MVTec AD, so a demo, a test or a
benchmark has images, labels and exact masks without a download.

Every picture is a pure function of (seed, surface, kind, split, index, size): it draws from its own
`numpy.random.SeedSequence`, never from a stream shared with its neighbours. Lengths are fractions of the picture's side, so `size` changes
the resolution and not the scene. Arithmetic is float64 so that the bytes do not hang on a CPU's last bit.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "SURFACES", "Kind", "generate", "kinds", "render"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Scene = tuple[Array, Mask]

MANIFEST = "inspection_set.json"
GENERATION = 1
OVERSAMPLE = 2
DIFFICULTY = {1: "obvious", 2: "clear", 3: "subtle", 4: "near-invisible"}

SURFACES: dict[str, str] = {
    "cloth": "plain-woven cloth, pale warp and blue weft, threads uneven in thickness and dye",
    "metal": "brushed steel sheet under a lamp, streaks along the brushing direction",
    "tiles": "glazed wall tiles with a printed ornament and grout lines",
}


@dataclass(frozen=True)
class Kind:
    """One kind of flaw: its surface, its name (the folder under `test`), its difficulty from 1 (obvious) to 4 (near-invisible)."""

    surface: str
    name: str
    difficulty: int
    description: str

    @property
    def grade(self) -> str:
        """The difficulty in words."""
        return DIFFICULTY[self.difficulty]


KINDS: tuple[Kind, ...] = (
    Kind("cloth", "hole", 1, "a torn hole with frayed edges"),
    Kind("cloth", "stain", 2, "a liquid stain with a darker rim"),
    Kind("cloth", "missing_thread", 3, "a weft thread missing over part of the width"),
    Kind("cloth", "off_shade_thread", 4, "a stretch of one weft thread dyed slightly too light or too dark"),
    Kind("metal", "blowholes", 1, "a cluster of dark round pores"),
    Kind("metal", "scratch", 2, "a thin bright scratch across the brushing direction"),
    Kind("metal", "dent", 3, "a shallow dent, seen only by its shading"),
    Kind("metal", "smudge", 4, "a faint finger mark that dulls the brushing"),
    Kind("tiles", "chip", 1, "glaze chipped off a tile's edge, the clay showing"),
    Kind("tiles", "crack", 2, "a hairline crack across a tile"),
    Kind("tiles", "misprint", 3, "one colour of a tile printed out of register"),
    Kind("tiles", "faded_print", 4, "one tile printed in a slightly weaker blue"),
)


@dataclass(frozen=True)
class Flaw:
    """A flaw to draw: which kind, from which stream, how strong in [0, 1)."""

    kind: str
    rng: np.random.Generator
    severity: float

    def between(self, mild: float, strong: float) -> float:
        """The value `severity` of the way from mild to strong."""
        return mild + (strong - mild) * self.severity


# Drawing tools. A field is an (n, n) array over the unit square; distances are signed, negative inside.


def _grid(n: int) -> tuple[Array, Array]:
    t = (np.arange(n) + 0.5) / n
    return t[None, :], t[:, None]


@lru_cache(maxsize=32)
def _spline(n: int, cells: int) -> Array:
    """Uniform cubic B-spline weights, (n, cells + 3)."""
    t = (np.arange(n) + 0.5) / n * cells
    first = np.minimum(t.astype(np.int64), cells - 1)
    f = t - first
    weights = np.zeros((n, cells + 3))
    basis = ((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3)
    for k, b in enumerate(basis):
        weights[np.arange(n), first + k] = b / 6
    return weights


def _field(rng: np.random.Generator, n: int, cells: int) -> Array:
    """Smooth noise, about unit variance, `cells` bumps across the picture."""
    w = _spline(n, cells)
    smooth: Array = w @ rng.normal(0.0, 2.0, (cells + 3, cells + 3)) @ w.T
    return smooth


def _cover(distance: Array, width: float) -> Array:
    """1 inside, 0 outside, a smooth step `width` wide on the line."""
    t = np.clip(0.5 - distance / width, 0.0, 1.0)
    smooth: Array = t * t * (3.0 - 2.0 * t)
    return smooth


def _pose(rng: np.random.Generator, n: int, degrees: float) -> tuple[Array, Array]:
    """Coordinates after a small turn about the centre, an arbitrary shift and a zoom of a few percent."""
    x, y = _grid(n)
    a = math.radians(rng.uniform(-degrees, degrees))
    zoom = rng.uniform(0.96, 1.04)
    c, s = math.cos(a) * zoom, math.sin(a) * zoom
    dx, dy = rng.uniform(0.0, 1.0, 2)
    return c * (x - 0.5) - s * (y - 0.5) + dx, s * (x - 0.5) + c * (y - 0.5) + dy


def _blob(rng: np.random.Generator, n: int, radius: float, rough: float, margin: float = 0.12) -> Array:
    """Distance to an irregular blob somewhere inside the margins."""
    x, y = _grid(n)
    cx, cy = rng.uniform(margin, 1.0 - margin, 2)
    return _outline(rng, x - cx, y - cy, radius, rough)


def _outline(rng: np.random.Generator, dx: Array, dy: Array, radius: float, rough: float) -> Array:
    stretch, turn = rng.uniform(0.75, 1.3), rng.uniform(0.0, math.pi)
    a = (math.cos(turn) * dx + math.sin(turn) * dy) * stretch
    b = (math.cos(turn) * dy - math.sin(turn) * dx) / stretch
    angle = np.arctan2(b, a)
    edge = np.ones_like(angle)
    for k in range(2, 9):
        edge += rough * rng.normal() / k * np.cos(k * angle + rng.uniform(0.0, 2.0 * math.pi))
    distance: Array = np.hypot(a, b) - radius * edge
    return distance


def _stroke(points: Array, n: int, reach: float) -> tuple[Array, Array]:
    """Distance to the polyline through points (m, 2), infinite beyond `reach`; and the position along it in [0, 1]."""
    x, y = _grid(n)
    distance, along = np.full((n, n), np.inf), np.zeros((n, n))
    for k, (p, q) in enumerate(zip(points[:-1], points[1:], strict=True)):
        low = np.clip(np.floor((np.minimum(p, q) - reach) * n), 0, n).astype(int)
        high = np.clip(np.ceil((np.maximum(p, q) + reach) * n), 0, n).astype(int)
        box = (slice(low[1], high[1]), slice(low[0], high[0]))
        px, py, d = x[:, box[1]] - p[0], y[box[0]] - p[1], q - p
        t = np.clip((px * d[0] + py * d[1]) / float(d @ d), 0.0, 1.0)
        r = np.hypot(px - t * d[0], py - t * d[1])
        nearer = r < distance[box]
        distance[box] = np.where(nearer, r, distance[box])
        along[box] = np.where(nearer, (k + t) / (len(points) - 1), along[box])
    return distance, along


def _walk(rng: np.random.Generator, start: Array, heading: float, length: float, wander: float, steps: int = 24) -> Array:
    """A meandering path, (steps + 1, 2)."""
    headings = heading + np.cumsum(rng.normal(0.0, wander, steps))
    moves = np.stack([np.cos(headings), np.sin(headings)], axis=1) * (length / steps)
    return np.concatenate([start[None], start + np.cumsum(moves, axis=0)])


def _mix(below: Array, above: Array, share: Array) -> Array:
    """`above` over `below` with opacity `share` (n, n)."""
    return below + share[..., None] * (above - below)


def _colour(rng: np.random.Generator, rgb: tuple[float, float, float], shift: float) -> Array:
    return np.array(rgb) * rng.normal(1.0, shift, 3)


# Surfaces. Each draws all of its natural variation from `rng` and all of its flaw from `flaw.rng`, so the same picture with and without
# the flaw differs in the flaw only. Returns linear light (n, n, 3) and the flaw's exact region.


def _cloth(n: int, rng: np.random.Generator, flaw: Flaw | None) -> Scene:
    kind = flaw.kind if flaw else None
    u, v = _pose(rng, n, 2.0)
    threads = 26
    u = u * threads + 0.22 * _field(rng, n, 4)
    v = v * threads + 0.22 * _field(rng, n, 4)
    i, j = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    across_warp, across_weft = u - i - 0.5, v - j - 0.5

    warp_width, weft_width = (rng.normal(0.46, 0.02, 64) for _ in range(2))
    warp_tone, weft_tone = (rng.normal(1.0, 0.035, 64) for _ in range(2))
    warp_colour = _colour(rng, (0.80, 0.77, 0.70), 0.015)
    weft_colour = _colour(rng, (0.30, 0.40, 0.55), 0.02)
    slub = 1.0 + 0.05 * _field(rng, n, 20)
    fuzz = 1.0 + 0.10 * rng.standard_normal((n, n)) + 0.04 * _field(rng, n, 64)

    mask = np.zeros((n, n), dtype=bool)
    missing, weft_dye = np.zeros((n, n)), weft_tone[j & 63]
    if flaw and kind in ("missing_thread", "off_shade_thread"):
        row = flaw.rng.integers(j.min() + 4, j.max() - 3)
        length = flaw.between(0.25, 0.6)
        start = flaw.rng.uniform(0.05, 0.95 - length)
        x, _ = _grid(n)
        mask = (j == row) & (x > start) & (x < start + length)
        if kind == "missing_thread":
            missing = mask.astype(np.float64)
        else:
            weft_dye = weft_dye + mask * flaw.rng.choice([-1.0, 1.0]) * flaw.between(0.05, 0.16)

    over = 1.0 - 2.0 * ((i + j) & 1)
    lift_warp, lift_weft = over * np.cos(np.pi * across_weft), -over * np.cos(np.pi * across_warp)
    p = across_warp / (warp_width[i & 63] * slub)
    q = across_weft / (weft_width[j & 63] * slub)
    round_warp, round_weft = np.sqrt(np.maximum(0.0, 1.0 - p * p)), np.sqrt(np.maximum(0.0, 1.0 - q * q))
    round_weft = round_weft * (1.0 - missing)
    front = 1.0 / (1.0 + np.exp(-10.0 * (0.7 * lift_warp + round_warp - 0.7 * lift_weft - round_weft - 2.0 * missing * 0)))
    light_warp = (0.42 + 0.42 * round_warp + 0.16 * lift_warp - 0.10 * p) * warp_tone[i & 63]
    light_weft = (0.42 + 0.42 * round_weft + 0.16 * lift_weft - 0.10 * q) * weft_dye
    solid = np.maximum(np.minimum(1.0, 3.0 * round_warp), np.minimum(1.0, 3.0 * round_weft))
    rgb = (front * light_warp)[..., None] * warp_colour + ((1.0 - front) * light_weft)[..., None] * weft_colour
    rgb *= ((0.2 + 0.8 * solid) * fuzz)[..., None]

    if flaw and kind == "hole":
        distance = _blob(flaw.rng, n, flaw.between(0.035, 0.07), 0.5)
        distance = distance + 0.006 * _field(flaw.rng, n, 48)
        rgb = _mix(rgb, np.array([0.035, 0.03, 0.03]), _cover(distance, 0.006))
        mask = distance < 0.0
    if flaw and kind == "stain":
        distance = _blob(flaw.rng, n, flaw.between(0.06, 0.12), 0.3)
        depth = _cover(distance, 0.02) * (0.75 + 0.25 * np.exp(-((distance + 0.008) ** 2) / 0.008**2))
        rgb = rgb * (1.0 - depth[..., None] * np.array([0.28, 0.36, 0.48]))
        mask = distance < 0.004
    return rgb, mask


def _metal(n: int, rng: np.random.Generator, flaw: Flaw | None) -> Scene:
    kind = flaw.kind if flaw else None
    x, y = _grid(n)
    turn = math.radians(rng.uniform(-3.0, 3.0))
    fx, fy = np.fft.rfftfreq(n, 1.0 / n)[None, :], np.fft.fftfreq(n, 1.0 / n)[:, None]
    along, across = math.cos(turn) * fx + math.sin(turn) * fy, math.cos(turn) * fy - math.sin(turn) * fx
    reach = rng.uniform(0.85, 1.15)
    band = np.exp(-0.5 * (across / 90.0) ** 2)
    streaks = band * (np.exp(-0.5 * (along * reach / 1.6) ** 2) + 0.5 * np.exp(-0.5 * (along * reach / 7.0) ** 2))
    grain = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((n, n))) * streaks, s=(n, n))
    grain /= grain.std()

    lamp = rng.uniform(0.2, 0.8) + 0.15 * (y - 0.5) * rng.normal()
    glow = np.exp(-(((x - lamp) / rng.uniform(0.35, 0.5)) ** 2))
    contrast = rng.uniform(0.9, 1.1) * 0.06
    steel = _colour(rng, (0.60, 0.61, 0.63), 0.008)
    base = 0.62 + 0.42 * glow + 0.02 * _field(rng, n, 5)

    mask = np.zeros((n, n), dtype=bool)
    dull = shade = np.zeros((n, n))
    if flaw and kind == "smudge":
        distance = _blob(flaw.rng, n, flaw.between(0.05, 0.09), 0.25)
        dull = _cover(distance, 0.03) * flaw.between(0.3, 0.8)
        shade = -0.12 * dull
        mask = distance < 0.005
    if flaw and kind == "dent":
        radius = flaw.between(0.035, 0.06)
        cx, cy = flaw.rng.uniform(0.12, 0.88, 2)
        px, py = (x - cx) / radius, (y - cy) / radius
        shade = 0.45 * (0.5 * px + py) * np.exp(-0.9 * (px * px + py * py))
        mask = px * px + py * py < 2.0
    value = (base * (1.0 + shade)) * (1.0 + contrast * grain * (1.0 - dull))
    rgb = value[..., None] * steel

    if flaw and kind == "scratch":
        start = flaw.rng.uniform(0.2, 0.8, 2)
        heading = flaw.rng.choice([-1.0, 1.0]) * flaw.rng.uniform(0.5, 2.4)
        length = flaw.between(0.2, 0.5)
        path = _walk(flaw.rng, start - 0.5 * length * np.array([math.cos(heading), math.sin(heading)]), heading, length, 0.03)
        distance, where = _stroke(path, n, 0.02)
        width = 0.0028 * np.sqrt(np.clip(4.0 * where * (1.0 - where), 0.0, 1.0)) + 0.0008
        rgb = rgb * (1.0 - 0.25 * _cover(distance - 2.0 * width, 0.004))[..., None]
        rgb = _mix(rgb, np.array([1.0, 1.0, 1.0]), 0.6 * _cover(distance - width, 0.003))
        mask = distance < 2.0 * width
    if flaw and kind == "blowholes":
        centre = flaw.rng.uniform(0.15, 0.85, 2)
        for _ in range(int(flaw.rng.integers(2, 6))):
            cx, cy = centre + flaw.rng.normal(0.0, 0.05, 2)
            radius = flaw.rng.uniform(0.008, 0.02)
            distance = _outline(flaw.rng, x - cx, y - cy, radius, 0.15)
            rgb = rgb * (1.0 + 0.3 * _cover(distance - 0.004, 0.006) * np.clip((y - cy) / radius, -1.0, 1.0))[..., None]
            rgb = _mix(rgb, np.array([0.07, 0.065, 0.06]), _cover(distance, 0.005))
            mask = mask | (distance < 0.005)
    return rgb, mask


def _ornament(a: Array, b: Array, soft: float) -> tuple[Array, Array]:
    """Coverage by blue and by ochre ink at tile coordinates in [-1, 1]."""
    r, angle = np.hypot(a, b), np.arctan2(b, a)
    star = _cover(r - 0.52 - 0.16 * np.cos(8.0 * angle), soft)
    heart = _cover(r - 0.20 - 0.05 * np.cos(4.0 * angle), soft)
    petals = _cover(np.abs(r - 0.38) - 0.07 - 0.05 * np.cos(8.0 * angle), soft)
    corner = np.hypot(1.0 - np.abs(a), 1.0 - np.abs(b))
    arcs = _cover(np.abs(corner - 0.40) - 0.05, soft) + _cover(corner - 0.20, soft)
    frame = _cover(np.abs(np.maximum(np.abs(a), np.abs(b)) - 0.93) - 0.012, soft)
    blue = np.maximum(np.maximum(star * (1.0 - petals), arcs), frame)
    ochre = np.maximum(petals * star * (1.0 - heart), 0.0)
    return np.minimum(blue, 1.0), ochre


def _tiles(n: int, rng: np.random.Generator, flaw: Flaw | None) -> Scene:
    kind = flaw.kind if flaw else None
    x, y = _grid(n)
    u, v = _pose(rng, n, 1.2)
    pitch = 0.36
    i, j = np.floor(u / pitch).astype(np.int64), np.floor(v / pitch).astype(np.int64)
    gap = rng.uniform(0.9, 1.1) * 0.04
    a, b = (2.0 * (u / pitch - i) - 1.0) / (1.0 - gap), (2.0 * (v / pitch - j) - 1.0) / (1.0 - gap)
    tile = (i & 7) * 8 + (j & 7)
    shift_a, shift_b = (rng.normal(0.0, 0.008, 64)[tile] for _ in range(2))
    density = rng.normal(0.93, 0.02, 64)[tile] + 0.02 * _field(rng, n, 12)
    tone = rng.normal(1.0, 0.012, 64)[tile]
    glaze, blue_ink = _colour(rng, (0.84, 0.82, 0.76), 0.01), _colour(rng, (0.07, 0.14, 0.38), 0.03)
    ochre_ink, cement = _colour(rng, (0.62, 0.36, 0.08), 0.03), _colour(rng, (0.42, 0.40, 0.37), 0.03)
    mottle = 1.0 + 0.008 * _field(rng, n, 40) + 0.012 * _field(rng, n, 9)
    rough = 1.0 + 0.12 * rng.standard_normal((n, n)) + 0.05 * _field(rng, n, 90)

    edge = np.maximum(np.abs(a), np.abs(b)) - 1.0
    body = _cover(edge + 0.01, 0.03)
    mask = np.zeros((n, n), dtype=bool)
    hit = mask
    if flaw and kind in ("misprint", "faded_print", "chip", "crack"):
        cx, cy = flaw.rng.integers(int(0.2 * n), int(0.8 * n), 2)
        hit = (i == i[cy, cx]) & (j == j[cy, cx]) & (edge < 0.0)
    soft = 0.025
    blue, ochre = _ornament(a + shift_a, b + shift_b, soft)
    if flaw and kind == "misprint":
        slip = flaw.between(0.06, 0.14)
        way = flaw.rng.uniform(0.0, 2.0 * math.pi)
        _, slipped = _ornament(a + shift_a + slip * math.cos(way), b + shift_b + slip * math.sin(way), soft)
        mask = hit & (np.abs(slipped - ochre) > 0.3)
        ochre = np.where(hit, slipped, ochre)
    if flaw and kind == "faded_print":
        mask = hit & (blue > 0.5)
        density = density - hit * flaw.between(0.05, 0.2)
    rgb = np.broadcast_to(glaze, (n, n, 3))
    rgb = _mix(rgb, blue_ink, blue * density)
    rgb = _mix(rgb, ochre_ink, ochre * density)
    bevel = np.exp(-((edge + 0.03) ** 2) / 0.02**2) * np.where(np.abs(a) > np.abs(b), np.sign(-a), np.sign(-b))
    rgb = rgb * (tone * mottle * (1.0 + 0.10 * bevel))[..., None]
    if flaw and kind == "chip":
        pass
    shadow = 1.0 - 0.35 * _cover(np.abs(edge), 0.08)
    rgb = _mix(cement * (rough * shadow)[..., None], rgb, body)

    if flaw and kind == "chip":
        along = flaw.rng.uniform(-0.7, 0.7)
        side = flaw.rng.choice([-1.0, 1.0])
        da, db = (a - along, b - side) if flaw.rng.random() < 0.5 else (a - side, b - along)
        distance = _outline(flaw.rng, da, db, flaw.between(0.16, 0.30), 0.4) + 0.015 * _field(flaw.rng, n, 40)
        mask = hit & (distance < 0.0)
        clay = np.array([0.50, 0.30, 0.20]) * (1.0 + 0.08 * _field(flaw.rng, n, 60))[..., None]
        clay = clay * (1.0 - 0.3 * np.exp(-(distance**2) / 0.03**2))[..., None]
        rgb = _mix(rgb, clay, _cover(distance, 0.03) * body * hit)
    if flaw and kind == "crack":
        start = np.array([cx, cy]) / n
        heading = flaw.rng.uniform(0.0, 2.0 * math.pi)
        path = _walk(flaw.rng, start, heading, flaw.between(0.15, 0.35), 0.22)
        distance, where = _stroke(path, n, 0.02)
        width = 0.002 * (1.0 - 0.8 * where)
        rgb = _mix(rgb, np.array([0.10, 0.08, 0.07]), 0.8 * _cover(distance - width, 0.004))
        mask = distance < width + 0.001
    return rgb, mask


_DRAW: dict[str, Callable[[int, np.random.Generator, Flaw | None], Scene]] = {"cloth": _cloth, "metal": _metal, "tiles": _tiles}


def _photograph(rgb: Array, rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """Lighting, lens, white balance, sensor noise and gamma: linear light (n, n, 3) -> uint8 (size, size, 3)."""
    rgb = rgb.reshape(size, OVERSAMPLE, size, OVERSAMPLE, 3).mean(axis=(1, 3))
    x, y = _grid(size)
    slope, way = rng.uniform(0.0, 0.2), rng.uniform(0.0, 2.0 * math.pi)
    falloff = 1.0 - rng.uniform(0.1, 0.25) * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
    light = (1.0 + slope * ((x - 0.5) * math.cos(way) + (y - 0.5) * math.sin(way))) * falloff * rng.normal(1.0, 0.03)
    rgb = rgb * light[..., None] * rng.normal(1.0, 0.01, 3)
    noise = rng.standard_normal((size, size, 3))
    rgb = rgb + noise * np.sqrt(1e-5 + 6e-5 * np.clip(rgb, 0.0, 1.0))
    code = 255.0 * np.clip(rgb, 0.0, 1.0) ** (1.0 / 2.2)
    return np.rint(code).astype(np.uint8)


def render(surface, kind="good", index=0, *, split="test", seed=0, size=256, flawless=False):
    streams = np.random.SeedSequence((seed, zlib.crc32(f"{surface}/{split}/{kind}".encode()), index)).spawn(3)
    scene, camera, drawn = (np.random.Generator(np.random.PCG64(s)) for s in streams)
    flaw = None
    if kind != "good" and not flawless:
        flaw = Flaw(kind, drawn, (0.5 + index * 0.6180339887498949) % 1.0)
    rgb, region = _DRAW[surface](size * OVERSAMPLE, scene, flaw)
    mask = region.reshape(size, OVERSAMPLE, size, OVERSAMPLE).any(axis=(1, 3))
    return _photograph(rgb, camera, size), mask
