"""Small charts as inline SVG: the scores of good and anomalous images, the ROC curve, a number against another.

Colours come from the page's CSS classes, so the charts follow its light and dark design; each carries a title that
says in words what it shows.
"""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

import numpy as np

from patchcore_rs._text import counted, figure
from patchcore_rs.metrics import roc_curve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_WIDTH, _HALF, _LEFT, _RIGHT, _TOP = 520, 84, 14, 506, 30
_BINS = 40
_SIDE, _MARGIN = 200, 34
_LINES = 340
_KINDS = ("good", "bad", "other")  # the colours of lines


def histogram(scores: NDArray[np.float64], labels: NDArray[np.uint8] | None, threshold: float | None) -> str:
    """Scores (n,) as bars: good images upwards, anomalous ones downwards, each to its own height.

    Without labels all point upwards.
    """
    labels = np.zeros(len(scores), dtype=np.uint8) if labels is None else labels
    shown = np.append(scores, threshold) if threshold is not None else scores
    low, high = float(shown.min()), float(shown.max())
    pad = 0.02 * (high - low) or max(0.5 * abs(high), 0.5)
    low, high = low - pad, high + pad
    edges = np.linspace(low, high, _BINS + 1)
    counts = [np.histogram(scores[labels == label], edges)[0] for label in (0, 1)]
    tallest = [max(1, int(heights.max())) for heights in counts]
    both = bool(labels.any())
    middle, bottom = _TOP + _HALF, _TOP + _HALF * (2 if both else 1)

    def across(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_RIGHT - _LEFT)

    parts = []
    step = (_RIGHT - _LEFT) / _BINS
    for kind, heights, most in zip(("good", "bad"), counts, tallest, strict=True):
        for column, number in enumerate(heights):
            if number:
                height = max(1.5, number / most * (_HALF - 6))
                y = middle - height - 0.5 if kind == "good" else middle + 0.5
                x = _LEFT + column * step
                parts.append(
                    f'<rect class="{kind}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{step - 1:.1f}" height="{height:.1f}"/>'
                )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{middle}" y2="{middle}"/>')
    for tick in _ticks(low, high):
        x = across(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{_RIGHT}" y="{bottom + 40}" text-anchor="end">anomaly score →</text>')
    if both:
        parts.append(f'<text class="good" x="{_LEFT}" y="{bottom + 40}">▲ good</text>')
        parts.append(f'<text class="bad" x="{_LEFT + 70}" y="{bottom + 40}">▼ anomalous</text>')
    if threshold is not None:
        x = across(threshold)
        anchor = "start" if x < _WIDTH / 2 else "end"
        parts.append(f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{_TOP - 14}" text-anchor="{anchor}">threshold {figure(threshold)}</text>')
    good, bad = int(np.count_nonzero(labels == 0)), int(np.count_nonzero(labels))
    said = f"Histogram of anomaly scores from {figure(float(scores.min()))} to {figure(float(scores.max()))}: "
    said += f"{good} good and {counted(bad, 'anomalous image')}" if both else counted(good, "image")
    said += "" if threshold is None else f", threshold {figure(threshold)}"
    return _svg(_WIDTH, bottom + 48, "histogram", said, parts)


def roc(scores: NDArray[np.float64], labels: NDArray[np.uint8], threshold: float) -> str:
    """The ROC curve with a dot at `threshold` (anomalous where score >= threshold)."""
    alarms, found, _ = roc_curve(labels, scores)

    def place(x: float, y: float) -> tuple[float, float]:
        return _MARGIN + x * _SIDE, 12 + (1 - y) * _SIDE

    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, alarms.tolist(), found.tolist()))
    recall = float(np.mean(scores[labels == 1] >= threshold))
    alarm = float(np.mean(scores[labels == 0] >= threshold))
    x, y = place(alarm, recall)
    right, bottom = place(1.0, 0.0)
    parts = [
        f'<rect class="frame" x="{_MARGIN}" y="12" width="{_SIDE}" height="{_SIDE}"/>',
        f'<line class="grid" x1="{_MARGIN}" y1="{bottom}" x2="{right}" y2="12"/>',
        f'<polyline class="curve" points="{points}"/>',
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
        f'<text x="{_MARGIN + _SIDE / 2}" y="{bottom + 20}" text-anchor="middle">false alarms →</text>',
        f'<text transform="translate({_MARGIN - 12} {12 + _SIDE / 2}) rotate(-90)" text-anchor="middle">found →</text>',
        f'<text x="{_MARGIN}" y="{bottom + 20}" text-anchor="middle">0</text>',
        f'<text x="{right}" y="{bottom + 20}" text-anchor="middle">1</text>',
    ]
    said = f"ROC curve; at the threshold {recall:.0%} of the anomalous images are found, "
    said += f"{alarm:.0%} of the good ones raise a false alarm"
    return _svg(_SIDE + _MARGIN + 16, _SIDE + 46, "roc", said, parts)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    axis: str,
    said: str,
    *,
    logarithmic: bool,
    ticks: Mapping[float, str] | None = None,
) -> str:
    """Lines through the points (x, y) of each series, in ascending order of x, one point at least.

    `axis` names x, which may be `logarithmic`; `ticks` are names of values of x, of which others show their number;
    `said` is what the chart shows in words.
    """
    names = ticks or {}
    xs = sorted({x for points in series.values() for x, _ in points})
    ys = [y for points in series.values() for _, y in points]
    scale = math.log if logarithmic else float
    left, right = scale(xs[0]), scale(xs[-1])
    pad = 0.05 * (max(ys) - min(ys)) or max(0.01 * abs(ys[0]), 0.01)
    low, high = min(ys) - pad, max(ys) + pad
    bottom = 12 + _SIDE

    def place(x: float, y: float) -> tuple[float, float]:
        across = (scale(x) - left) / (right - left) if right > left else 0.5
        return _MARGIN + 20 + across * (_LINES - 24), bottom - (y - low) / (high - low) * _SIDE

    parts = []
    for tick in _ticks(low, high):
        y = place(xs[0], tick)[1]
        parts.append(f'<line class="grid" x1="{_MARGIN + 14}" x2="{_MARGIN + _LINES}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_MARGIN + 10}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for x in xs:
        across = place(x, low)[0]
        parts.append(f'<line class="axis" x1="{across:.1f}" x2="{across:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        name = html.escape(names.get(x, f"{x:g}"))
        parts.append(f'<text x="{across:.1f}" y="{bottom + 20}" text-anchor="middle">{name}</text>')
    parts.append(f'<text x="{_MARGIN + _LINES}" y="{bottom + 40}" text-anchor="end">{html.escape(axis)} →</text>')
    for number, (name, points) in enumerate(series.items()):
        kind = _KINDS[number % len(_KINDS)]
        places = [place(x, y) for x, y in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line {kind}" points="{path}"/>')
        parts += [f'<circle class="point {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places]
        if len(series) > 1:
            parts.append(
                f'<text class="{kind}" x="{_MARGIN + 90 * number}" y="{bottom + 40}">{html.escape(name)}</text>'
            )
    return _svg(_MARGIN + _LINES + 16, bottom + 48, "lines", said, parts)


def _svg(width: int, height: int, name: str, said: str, parts: list[str]) -> str:
    said = html.escape(said)
    opening = f'<svg class="{name}" viewBox="0 0 {width} {height}" role="img" aria-label="{said}">'
    return f"{opening}<title>{said}</title>{''.join(parts)}</svg>"


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers between the two."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - rough))
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]
