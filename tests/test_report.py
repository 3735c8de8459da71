"""The report: worst mistakes first, text from strangers escaped, size bounded, colours that compare."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchcore_rs._text import Table, counted, figure, listing, printable, told_apart
from patchcore_rs.evaluation.inspection import Inspection
from patchcore_rs.model.map_values import MapScale, map_extent
from patchcore_rs.report import charts, heatmap
from patchcore_rs.report.heatmap import write_map_png
from patchcore_rs.report.page import SIDE, Report, gallery_order, verdict

HOSTILE = '<script>alert("1")</script>&\'\x1b[31m\u202egnp.png'
VOID = {"meta", "img", "br", "line", "rect", "circle", "polyline"}


class Page(HTMLParser):
    """Collects what a browser would see, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def inspection(scores: list[float], labels: list[int] | None, *, name: str = "tiles", side: int = 32) -> Inspection:
    n = len(scores)
    rng = np.random.default_rng(0)
    maps = rng.random((n, side, side)).astype(np.float32) * np.array(scores, np.float32)[:, None, None]
    masks = np.zeros((n, side, side), np.bool_)
    if labels is not None:
        masks[np.array(labels) == 1, 8:16, 8:20] = True
    return Inspection(
        name=name,
        paths=tuple(Path(f"test/{i:02}.png") for i in range(n)),
        scores=np.array(scores, dtype=np.float64),
        maps=maps,
        kinds=() if labels is None else tuple("crack" if label else "good" for label in labels),
        labels=None if labels is None else np.array(labels, np.uint8),
        masks=None if labels is None else masks,
    )


def read(path: Path) -> np.ndarray:
    return np.full((32, 32, 3), 90 + len(path.name), np.uint8)


def page(*inspections: Inspection, threshold: float | None, size_limit: int = 10_000_000) -> str:
    report = Report("Inspection", sections=len(inspections), size_limit=size_limit)
    for each in inspections:
        report.add_inspection(each, threshold, read)
    return report.html()


def test_mistakes_come_first_and_the_most_confident_one_leads():
    # at threshold 2: images 1 and 4 are misses, 2 and 5 false alarms
    scores = np.array([1.0, 1.9, 3.5, 2.5, 0.75, 2.25, 2.05])
    labels = np.array([0, 1, 0, 1, 1, 0, 1], np.uint8)
    mistakes, others = gallery_order(scores, 2.0, labels, ("good", "crack", "good", "crack", "crack", "good", "dent"))
    assert mistakes == [2, 4, 5, 1]
    assert others == [3, 6, 0]


def test_correct_images_take_turns_by_kind_from_the_closest_call():
    scores = np.array([1.0, 1.9, 1.5, 2.1, 2.9, 2.2])
    labels = np.array([0, 0, 0, 1, 1, 1], np.uint8)
    _, others = gallery_order(scores, 2.0, labels, ("good", "good", "good", "crack", "crack", "dent"))
    assert others == [3, 5, 1, 4, 2, 0]


def test_without_labels_the_most_anomalous_comes_first():
    assert gallery_order(np.array([1.0, 3.0, 2.0]), 1.5, None) == ([], [1, 2, 0])


@pytest.mark.parametrize(
    ("score", "label", "word", "reason", "mistake"),
    [
        (1.92, 1, "missed", "score 1.92 is below the threshold 2.10", True),
        (2.5, 0, "false alarm", "score 2.50 is at or above the threshold 2.10", True),
        (2.1, 1, "found", "score 2.10 is at or above the threshold 2.10", False),
        (1.0, 0, "passed", "score 1.00 is below the threshold 2.10", False),
        (2.09999, 1, "missed", "score 2.09999 is below the threshold 2.10000", True),
        (2.5, None, "anomalous", "score 2.50 is at or above the threshold 2.10", None),
    ],
)
def test_each_image_says_why_it_was_judged_so(score, label, word, reason, mistake):
    judged = verdict(score, 2.1, label)
    assert (judged.word, judged.reason, judged.mistake) == (word, reason, mistake)


def test_the_page_lists_mistakes_before_correct_images():
    text = Page(page(inspection([1.0, 1.9, 3.5, 2.5], [0, 1, 0, 1]), threshold=2.0)).text
    words = re.findall(r"\b(false alarm|missed|found|passed)\b(?= score)", text[text.index("Mistakes") :])
    assert words == ["false alarm", "missed", "found", "passed"]
    assert "2 of 4 are told apart correctly: 1 flaw missed, 1 false alarm" in " ".join(text.split())


def test_text_from_strangers_is_escaped_everywhere():
    hostile = inspection([1.0, 3.0], [0, 1], name=HOSTILE)
    hostile = Inspection(
        HOSTILE,
        (Path(HOSTILE.replace("/", "_")),) * 2,
        hostile.scores,
        hostile.maps,
        ("good", HOSTILE),
        hostile.labels,
        hostile.masks,
    )
    report = Report(HOSTILE, sections=1)
    report.add_fact(HOSTILE, HOSTILE)
    report.add_table(Table(HOSTILE, (HOSTILE,), ((HOSTILE,),), note=HOSTILE))
    report.add_inspection(hostile, 2.0, read, origin=HOSTILE, note=HOSTILE)
    text = report.html()
    seen = Page(text)
    assert "script" not in {tag for tag, _ in seen.tags}
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert seen.text.count("alert") >= 9  # shown as text, not dropped
    assert all(set(attributes) <= {"loading", "alt", "src"} for tag, attributes in seen.tags if tag == "img")


def test_the_page_is_self_contained_and_forbids_scripts():
    text = page(inspection([1.0, 3.0], [0, 1]), threshold=2.0)
    seen = Page(text)
    sources = [attributes["src"] or "" for tag, attributes in seen.tags if tag == "img"]
    assert sources
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    links = [attributes["href"] or "" for _, attributes in seen.tags if "href" in attributes]
    assert all(link.startswith("#") for link in links)
    policy = next(
        a["content"] for tag, a in seen.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http://" not in text
    assert "https://" not in text


def test_every_image_has_a_text_in_its_place():
    for tag, attributes in Page(page(inspection([1.0, 3.0], [0, 1]), threshold=2.0)).tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes["aria-label"]


def test_a_large_set_is_cut_to_the_size_limit_and_says_so():
    many = inspection([1.0 + i / 100 for i in range(60)], [0] * 30 + [1] * 30)
    whole, small = page(many, threshold=1.3), page(many, threshold=1.3, size_limit=30_000)
    assert len(small) < 60_000 < len(whole)
    assert "(60)" in whole
    shown = re.search(r"\((\d+) of 60 shown, to keep this file small\)", small)
    assert shown is not None
    gallery = small[small.index("<section") :]
    assert gallery.count("<figcaption><span") == int(shown[1]) > 0


def test_every_section_gets_its_share_of_the_size():
    many = [inspection([1.0 + i / 100 for i in range(60)], [0] * 30 + [1] * 30, name=f"set {k}") for k in range(3)]
    text = page(*many, threshold=1.3, size_limit=60_000)
    assert len(re.findall(r"\(\d+ of 60 shown", text)) == 3


def test_without_ground_truth_the_page_does_not_speak_of_it():
    text = Page(page(inspection([1.0, 3.0], None), threshold=2.0)).text
    assert "1 of 2 images score at or above the threshold 2.00" in " ".join(text.split())
    assert "Ground truth" not in text
    assert "cyan" not in text
    assert "anomalous" in text


def test_without_threshold_the_page_says_so():
    assert "no threshold" in Page(page(inspection([1.0, 3.0], None), threshold=None)).text


def test_a_written_page_is_the_page(tmp_path):
    report = Report("Inspection")
    report.add_inspection(inspection([1.0], None), None, read)
    report.write(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.html()


def test_sections_must_be_positive():
    with pytest.raises(ValueError, match="sections must be at least 1; got 0"):
        Report("Inspection", sections=0)


def test_colours_are_perceptually_uniform():
    linear = (heatmap.colour_table() / 255.0) ** 2.2
    lightness = 116 * np.cbrt(linear @ np.array([0.2126, 0.7152, 0.0722])) - 16
    steps = np.diff(lightness)
    assert heatmap.colour_table().shape == (256, 3)
    assert steps.min() > -0.05
    assert np.convolve(steps, np.ones(32) / 32, "valid").max() < 2 * steps.mean()


def test_overlay_leaves_the_normal_clear_and_saturates():
    image = np.full((4, 4, 3), 100, np.uint8)
    values = np.array([[0.0, 1.0, 2.0, 9.0]] * 4, np.float32)
    heat = heatmap.overlay(image, values, MapScale(1.0, 2.0))
    assert (heat[:, :2] == 100).all()
    assert (heat[:, 2] == heat[:, 3]).all()
    assert not (heat[:, 2] == 100).all()
    assert (image == 100).all()
    with pytest.raises(ValueError, match=r"must have the image's size \(4, 4\); got \(3, 4\)"):
        heatmap.overlay(image, values[:3], MapScale(1.0, 2.0))


def test_one_scale_serves_a_category():
    maps = np.stack([np.full((8, 8), v, np.float32) for v in (1.0, 1.2, 5.0, 9.0)])
    maps[:, :6] = 1.0
    scale = heatmap.colour_scale(map_extent(maps), np.array([0, 0, 1, 1], np.uint8))
    assert scale == MapScale(1.0, 7.0, "images")
    assert heatmap.colour_scale(map_extent(maps)).high == 9.0
    flat = heatmap.colour_scale(np.zeros((2, 2)))
    assert flat.high > flat.low
    with pytest.raises(ValueError, match="at least one map"):
        heatmap.colour_scale(np.zeros((0, 2)))


def test_outline_surrounds_the_region_and_leaves_it_visible():
    image = np.full((20, 20, 3), 7, np.uint8)
    mask = np.zeros((20, 20), bool)
    mask[8:11, 0:5] = True
    drawn = heatmap.outline(image, mask)
    assert (drawn[mask] == 7).all()
    assert (drawn[7, 0:5] == [0, 240, 255]).all()
    assert (drawn[15:] == 7).all()
    assert (heatmap.outline(image, np.zeros((20, 20), bool)) == image).all()


def test_maps_are_written_with_16_bits(tmp_path):
    write_map_png(tmp_path / "map.png", np.array([[0.0, 1.5], [2.0, 3.0]], np.float32), MapScale(1.0, 2.0))
    with Image.open(tmp_path / "map.png") as written:
        assert np.asarray(written).tolist() == [[0, 32768], [65535, 65535]]
        assert json.loads(written.text["map_scale"]) == {"low": 1.0, "high": 2.0, "origin": "option"}


def test_thumbnails_are_small():
    report = Report("Inspection")
    big = inspection([1.0], None, side=600)
    report.add_inspection(big, None, lambda _: np.zeros((600, 600, 3), np.uint8))
    assert len(report.html()) < 60_000
    assert SIDE < 600


def test_histogram_survives_equal_scores():
    drawn = charts.histogram(np.array([2.0, 2.0]), None, None)
    assert "nan" not in drawn
    assert drawn.count("<rect") == 1


def test_roc_passes_through_its_threshold():
    scores, labels = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 1, 0, 1], np.uint8)
    drawn = charts.roc(scores, labels, 3.0)
    assert "50% of the anomalous images are found, 50% of the good ones raise a false alarm" in drawn
    points = re.search(r'points="([^"]+)"', drawn)
    dot = re.search(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert points is not None
    assert dot is not None
    assert f"{dot[1]},{dot[2]}" in points[1].split()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.2345, "1.23"),
        (0.01234, "0.0123"),
        (123.45, "123"),
        (12345.6, "12,346"),
        (0.0, "0.00"),
        (1.5e-7, "1.50e-07"),
        (None, "-"),
    ],
)
def test_figures(value, text):
    assert figure(value) == text


def test_words_for_numbers_and_names():
    assert told_apart(1.0, 1.0001) == ("1.0000", "1.0001")
    assert counted(1, "image") == "1 image"
    assert counted(2000, "image") == "2,000 images"
    assert listing(["a"]) == "a"
    assert listing(["a", "b", "c"]) == "a, b and c"
    assert printable("a\nb\u202e\udc80é") == "a\\nb\\u202e\\udc80é"
