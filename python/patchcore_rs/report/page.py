"""The HTML report: one self-contained file that shows what a model saw, its worst mistakes first.

No script and no reference to anything outside the file. Every text is escaped, and a content security policy forbids
what escaping might miss: names of files and folders come from strangers. Images are thumbnails, taken in until the
file's size limit is spent; what was left out is stated.
"""

from __future__ import annotations

import base64
import bisect
import html
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from patchcore_rs._text import Table, counted, figure, printable, told_apart
from patchcore_rs.images.files import encode_webp
from patchcore_rs.model.map_values import map_extent
from patchcore_rs.report import charts, heatmap

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from patchcore_rs.evaluation.inspection import Inspection
    from patchcore_rs.model.map_values import MapScale

    Reader = Callable[[Path], NDArray[np.uint8]]

SIDE = 224  # the longest side of a thumbnail, in pixels
SIZE_LIMIT = 12_000_000  # bytes of all thumbnails of a report, as they stand in the file
_QUALITY = 82
_TRUTH = "Ground truth"
_HEAT = "Heat map"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_LEAD = (
    "A model was shown images of flawless pieces only and learnt what they look like, patch by patch. "
    "A new image is compared with that: the less it resembles anything learnt, the higher its anomaly score and the "
    "hotter the colour of the place."
)
_TERMS = (
    (
        "Anomaly score",
        "One number per image, the higher the more unusual. It is a distance: compare scores within one category only.",
    ),
    (
        "Threshold",
        "An image that scores at or above it counts as anomalous. Here it is the one with the best balance of false "
        "alarms and misses on these very images (largest F1), unless another origin is stated.",
    ),
    (
        "Image AUROC",
        "The chance that an anomalous image scores higher than a good one, both drawn at random: 1 is perfect, 0.5 is "
        "guessing.",
    ),
    ("Pixel AUROC", "The same for single pixels of the heat map, against the ground truth."),
    (
        "PRO",
        "How much of each flawed region the heat map covers while at most 30 % of the normal pixels light up; small "
        "regions count as much as large ones. 1 is perfect.",
    ),
    (
        "False alarms at full recall",
        "The good images that would be rejected if the threshold were low enough to miss no anomalous image.",
    ),
)


_BY_SCORE = "Images, the most anomalous first"
_ORIGINS = {
    "calibration": "the same for every image of this model: clear is what the flawless images of its calibration show",
    "training": "the same for every image of this model: clear is what the images it learnt from show",
    "images": "out of the images of this section, and the same for all of them: other images have other colours",
    "option": "as it was chosen, and the same for all images",
}


@dataclass(frozen=True)
class Verdict:
    """What the threshold says of one image: a word, why, and whether the label disagrees (None: no label)."""

    word: str
    reason: str
    mistake: bool | None


def verdict(score: float, threshold: float | None, label: int | None) -> Verdict:
    """Judge one score; anomalous where score >= threshold."""
    if threshold is None:
        return Verdict("", f"score {figure(score)}", None)
    anomalous = score >= threshold
    text, limit = told_apart(score, threshold)
    side = "at or above" if anomalous else "below"
    reason = f"score {text} is {side} the threshold {limit}"
    if label is None:
        return Verdict("anomalous" if anomalous else "normal", reason, None)
    word = {(1, True): "found", (1, False): "missed", (0, True): "false alarm", (0, False): "passed"}[label, anomalous]
    return Verdict(word, reason, anomalous != bool(label))


def gallery_order(
    scores: NDArray[np.float64], threshold: float | None, labels: NDArray[np.uint8] | None, kinds: Sequence[str] = ()
) -> tuple[list[int], list[int]]:
    """Which images to show first: (mistakes, others), indices into `scores` (n,).

    Mistakes run from the most confident one, furthest on the wrong side of the threshold. Correct images run from the
    closest call, the kinds taking turns so that each is seen. Without labels there are no mistakes and the images run
    from the most anomalous one.
    """
    if threshold is None or labels is None:
        return [], np.argsort(-scores, kind="stable").tolist()
    margins = np.abs(scores - threshold)
    wrong = (scores >= threshold) != (labels != 0)
    mistakes = sorted(np.flatnonzero(wrong).tolist(), key=lambda i: -margins[i])
    queues: dict[str, list[int]] = {}
    for i in sorted(np.flatnonzero(~wrong).tolist(), key=lambda i: margins[i]):
        queues.setdefault(kinds[i] if kinds else str(labels[i]), []).append(i)
    turns = sorted((turn, name, i) for name, queue in queues.items() for turn, i in enumerate(queue))
    return mistakes, [i for _, _, i in turns]


class Report:
    """Collects tables and inspections, then writes the page.

    `sections` is how many inspections will be added: each gets its share of `size_limit` bytes of thumbnails.
    Thumbnails are made as inspections are added, so maps need not be kept.
    """

    def __init__(self, title: str, *, sections: int = 1, size_limit: int = SIZE_LIMIT) -> None:
        """An empty report.

        Raises:
            ValueError: `sections` is below 1.
        """
        if sections < 1:
            raise ValueError(f"sections must be at least 1; got {sections}")
        self._title = title
        self._allowance = size_limit // sections
        self._facts: list[tuple[str, str]] = []  # name, HTML
        self._opening: list[str] = []
        self._sections: list[tuple[str, str]] = []
        self._truth = False
        self._example = ""

    def add_fact(self, name: str, value: str) -> None:
        """A line of "how this was made"."""
        self._facts.append((name, _text(value)))

    def add_pages(self, name: str, pages: Sequence[str]) -> None:
        """A line of "how this was made" that links to pages, by their paths from this one."""
        links = ", ".join(f'<a href="{_text(quote(page))}">{_text(page)}</a>' for page in pages)
        self._facts.append((name, links))

    def add_table(self, table: Table) -> None:
        """A table of the opening part, in the order of the calls."""
        self._opening.append(_table(table))

    def add_charts(self, drawn: Sequence[tuple[str, str]]) -> None:
        """Charts of the opening part side by side, below what was added before: (heading, SVG) each."""
        self._opening.append(_row_of_charts(drawn))

    def add_inspection(
        self,
        inspection: Inspection,
        threshold: float | None,
        read: Reader,
        *,
        scale: MapScale | None = None,
        origin: str = "",
        note: str = "",
    ) -> None:
        """A section of charts and images.

        Args:
            inspection: the images with their scores and maps.
            threshold: an image is anomalous where score >= threshold; None for none.
            read: called with a path, returns the image as it was resized for the model, (h, w, 3) uint8. The map
                belongs to its centre, which is framed where the image is larger. What it raises is raised.
            scale: of the colours; by default that of the inspection, else that of `heatmap.colour_scale`.
            origin: where the threshold comes from, in words.
            note: a line below the heading.

        Raises:
            ValueError: an image is smaller than its map.
        """
        scale = scale or inspection.map_scale or heatmap.colour_scale(map_extent(inspection.maps), inspection.labels)
        mistakes, others = gallery_order(inspection.scores, threshold, inspection.labels, inspection.kinds)
        self._truth = self._truth or inspection.masks is not None
        if not self._example and inspection.labels is not None and threshold is not None:
            found = [i for i in others if inspection.labels[i]]
            if found:  # of middling clarity: the plainest one would promise too much
                middling = sorted(found, key=lambda i: inspection.scores[i])[len(found) // 2]
                self._example = _card(inspection, middling, threshold, scale, read)
        cards, spent = [], 0
        for i in mistakes + others:
            card = _card(inspection, i, threshold, scale, read)
            if spent + len(card) > self._allowance:
                break
            cards.append(card)
            spent += len(card)
        scores, labels = inspection.scores, inspection.labels
        parts = [f"<p>{_text(note)}</p>" if note else "", _summary(scores, labels, threshold, len(mistakes), origin)]
        parts.append(_charts(scores, labels, threshold))
        parts.append(_legend(scale))
        judged = labels is not None and threshold is not None
        if mistakes:
            shown = cards[: len(mistakes)]
            heading = f"Mistakes, the most confident first{_cut(len(shown), len(mistakes))}"
            parts.append(_gallery(heading, shown))
        kind = "Correct, the closest calls first, the kinds in turn" if judged else _BY_SCORE
        parts.append(_gallery(f"{kind}{_cut(max(0, len(cards) - len(mistakes)), len(others))}", cards[len(mistakes) :]))
        self._sections.append((inspection.name, "".join(parts)))

    def stream(self, threshold: float | None, read: Reader, scale: MapScale) -> Stream:
        """A section of images without ground truth that come in parts; `add_stream` ends it.

        Arguments are those of `add_inspection`.
        """
        return Stream(self._allowance, threshold, read, scale)

    def add_stream(self, name: str, stream: Stream, *, origin: str = "") -> None:
        """The section that `add_inspection` would make of all these images at once."""
        scores, cards = np.array(stream.scores), stream.cards
        parts = [_summary(scores, None, stream.threshold, 0, origin), _charts(scores, None, stream.threshold)]
        parts += [_legend(stream.scale), _gallery(f"{_BY_SCORE}{_cut(len(cards), len(scores))}", cards)]
        self._sections.append((name, "".join(parts)))

    def html(self) -> str:
        """The page."""
        style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
        names = [name for name, _ in self._sections]
        links = "".join(f'<a href="#section-{i}">{_text(name)}</a>' for i, name in enumerate(names))
        sections = "".join(
            f'<section id="section-{i}"><h2>{_text(name)}</h2>{body}</section>'
            for i, (name, body) in enumerate(self._sections)
        )
        facts = "".join(f"<dt>{_text(name)}</dt><dd>{value}</dd>" for name, value in self._facts)
        terms = "".join(
            f"<dt>{_text(term)}</dt><dd>{_text(said)}</dd>" for term, said in _TERMS if self._explains(term)
        )
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_text(self._title)}</title><style>{style}</style></head>\n<body>"
            f'<header><h1>{_text(self._title)}</h1><p class="lead">{_LEAD}</p>'
            + (f"<h3>For example</h3>{_grid([self._example])}" if self._example else "")
            + f"</header><main>{''.join(self._opening)}"
            + (f'<nav aria-label="Sections">{links}</nav>' if len(names) > 1 else "")
            + (f"<h2>How to read this page</h2>{_reading(truth=self._truth)}" if names else "")
            + f"<details><summary>What the numbers mean</summary><dl>{terms}</dl></details>{sections}</main>"
            + (f"<footer><h3>How this was made</h3><dl>{facts}</dl></footer>" if facts else "")
            + "</body></html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page to `path`."""
        Path(path).write_text(self.html(), encoding="utf-8")

    def _explains(self, term: str) -> bool:
        """Terms about ground truth explain nothing where there is none."""
        return self._truth or term in ("Anomaly score", "Threshold")


class Stream:
    """The most anomalous of images that come in any order: as many cards as fit into `allowance` bytes, no more kept.

    What is kept is what a gallery of all images would show: in order of score, up to the first card that does not fit.
    """

    def __init__(self, allowance: int, threshold: float | None, read: Reader, scale: MapScale) -> None:
        """Nothing yet; see `Report.stream`."""
        self.threshold, self.scale = threshold, scale
        self.scores: list[float] = []
        self._allowance, self._read = allowance, read
        self._kept: list[tuple[tuple[float, int], str]] = []  # by rank: the score, then the order of arrival
        self._spent = 0
        self._end = (math.inf, 0)  # the first rank that does not fit

    @property
    def cards(self) -> list[str]:
        """The cards that fit, the most anomalous image first."""
        return [card for _, card in self._kept]

    def add(self, inspection: Inspection) -> None:
        """Images with their scores and maps; what reading one raises is raised, and it is not counted.

        Raises:
            ValueError: an image is smaller than its map.
        """
        for i, score in enumerate(inspection.scores.tolist()):
            rank = (-score, len(self.scores))
            if rank < self._end:
                card = _card(inspection, i, self.threshold, self.scale, self._read)
                bisect.insort(self._kept, (rank, card))
                self._spent += len(card)
            self.scores.append(score)
            while self._spent > self._allowance:
                self._end, card = self._kept.pop()
                self._spent -= len(card)


def thumbnail(image: NDArray[np.uint8]) -> str:
    """A data URI of the (H, W, 3) image as WebP, its longer side `SIDE` pixels at most."""
    contents = encode_webp(image, side=SIDE, quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(contents).decode("ascii")


def _card(inspection: Inspection, i: int, threshold: float | None, scale: MapScale, read: Reader) -> str:
    path, score = inspection.paths[i], float(inspection.scores[i])
    label = None if inspection.labels is None else int(inspection.labels[i])
    mask = None if inspection.masks is None else inspection.masks[i]
    kind = inspection.kinds[i] if inspection.kinds else ""
    whole = read(path)
    image = heatmap.centre(whole, inspection.maps.shape[1:])
    heat = heatmap.overlay(image, inspection.maps[i], scale)
    if mask is not None and mask.any():
        heat = heatmap.outline(heat, mask)
    named = _text(f"{kind} {path.name}".strip())
    panels = [_panel("Image", f"image {named}", heatmap.framed(whole, image))]
    if label == 1 and mask is not None:
        panels.append(
            _panel(_TRUTH, f"where the flaw of {named} is", heatmap.framed(whole, heatmap.spotlight(image, mask)))
        )
    elif label == 0:
        panels.append(f'<div><span>{_TRUTH}</span><p class="none">no flaw</p></div>')
    if inspection.maps[i].min() < inspection.maps[i].max():
        panels.append(_panel(_HEAT, f"heat map of {named}", heatmap.framed(whole, heat)))
    else:  # of a method that says whether, not where: a tint of the whole image would show no place
        panels.append(f'<div><span>{_HEAT}</span><p class="none">one value for the whole image</p></div>')
    outside = 1 - image.size / whole.size
    unseen = f"<br>not looked at, outside the frame: {outside:.1%} of the image" if outside else ""
    judged = verdict(score, threshold, label)
    badge = "mistake" if judged.mistake or judged.word == "anomalous" else "correct"
    word = f'<span class="badge {badge}">{judged.word}</span>' if judged.word else ""
    return (
        f'<figure{" class=mistake" if judged.mistake else ""}><div class="panels">{"".join(panels)}</div>'
        f"<figcaption>{word}{_text(judged.reason)}{unseen}<br>"
        f'<span class="file">{_text(_file(path, kind))}</span></figcaption></figure>\n'
    )


def _file(path: Path, kind: str) -> str:
    """The file by its folder and name, and the kind of flaw where the folder does not say it."""
    short = "/".join(path.parts[-2:])
    return short if not kind or kind == path.parent.name else f"{short} ({kind})"


def _panel(heading: str, said: str, image: NDArray[np.uint8]) -> str:
    return f'<div><span>{heading}</span><img loading="lazy" alt="{said}" src="{thumbnail(image)}"></div>'


def _summary(
    scores: NDArray[np.float64], labels: NDArray[np.uint8] | None, threshold: float | None, mistakes: int, origin: str
) -> str:
    total = len(scores)
    if threshold is None:
        return f"<p>{counted(total, 'image')}. There is no threshold: the model is not calibrated.</p>"
    of = f"threshold {figure(threshold)}" + (f" ({_text(origin)})" if origin else "")
    above = scores >= threshold
    if labels is None:
        return f"<p>{int(above.sum())} of {counted(total, 'image')} score at or above the {of}.</p>"
    misses, alarms = int((~above & (labels != 0)).sum()), int((above & (labels == 0)).sum())
    good = int((labels == 0).sum())
    return (
        f"<p>{counted(good, 'good image')} and {total - good:,} anomalous. "
        f"At the {of}, {total - mistakes:,} of {total:,} are told apart correctly: "
        f"{counted(misses, 'flaw')} missed, {counted(alarms, 'false alarm')}.</p>"
    )


def _charts(scores: NDArray[np.float64], labels: NDArray[np.uint8] | None, threshold: float | None) -> str:
    drawn = [("Images by their score", charts.histogram(scores, labels, threshold))]
    if labels is not None and threshold is not None and 0 < np.count_nonzero(labels) < len(labels):
        curve = charts.roc(scores, labels, threshold)
        drawn.append(("ROC: flaws found against false alarms", curve))
    return _row_of_charts(drawn)


def _row_of_charts(drawn: Sequence[tuple[str, str]]) -> str:
    boxes = "".join(f"<figure><figcaption>{_text(heading)}</figcaption>{chart}</figure>" for heading, chart in drawn)
    return f'<div class="charts">{boxes}</div>'


def _legend(scale: MapScale) -> str:
    low, high = figure(scale.low), figure(scale.high)
    return (
        f'<div class="legend"><span>map value {low} or less</span>'
        f'<img alt="heat map colours, from clear at {low} over violet and red to yellow at {high}" '
        f'src="{thumbnail(heatmap.legend(SIDE, 14))}">'
        f"<span>{high} or more</span><span class=soft>{_ORIGINS[scale.origin]}</span></div>"
    )


def _reading(*, truth: bool) -> str:
    outline = (
        ' The <span class="contour" aria-hidden="true"></span> cyan line is the outline of the flaw as a person marked '
        "it, drawn for comparison; the model never saw it."
        if truth
        else ""
    )
    return (
        "<p>Each image is shown as the model saw it, dimmed outside a frame where it did not look, beside the same "
        "image under the heat map: ordinary surface stays clear, unusual patches glow from violet over red to yellow. "
        f"The colours mean the same in all images of a section.{outline}</p>"
    )


def _gallery(heading: str, cards: Sequence[str]) -> str:
    return f"<h3>{heading}</h3>{_grid(cards)}"


def _grid(cards: Sequence[str]) -> str:
    """The cards, narrower ones where none shows ground truth."""
    pairs = "" if any(_TRUTH in card for card in cards) else " pairs"
    return f'<div class="gallery{pairs}">{"".join(cards)}</div>' if cards else ""


def _cut(shown: int, total: int) -> str:
    return f" ({total:,})" if shown == total else f" ({shown:,} of {total:,} shown, to keep this file small)"


def _table(table: Table) -> str:
    def cell(tag: str, column: str, text: str) -> str:
        words = ' class="words"' if column in table.words else ""
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{words}>{_text(text)}</{tag}>"

    head = "".join(cell("th", column, column.replace("-\n", "").replace("\n", " ")) for column in table.columns)
    body = []
    for i, row in enumerate(table.rows):
        total = ' class="total"' if i in table.totals else ""
        cells = "".join(cell("td", column, text) for column, text in zip(table.columns, row, strict=True))
        body.append(f"<tr{total}>{cells}</tr>")
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    title = _text(table.title)
    return (
        f'<h3>{title}</h3><div class="scroll"><table aria-label="{title}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{note}"
    )


def _text(text: str) -> str:
    return html.escape(printable(text), quote=True)
