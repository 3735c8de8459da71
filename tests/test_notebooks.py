"""In a notebook: bars below the cell, and predictions that show scores and small maps."""

from __future__ import annotations

import base64
import io
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from detectors import detector, flawed, normal, write_folder
from PIL import Image

from patchcore_rs import greedy_coreset
from patchcore_rs._progress import STAGES, reporting


@pytest.fixture
def cells(monkeypatch):
    """A stand-in for IPython's display in a kernel: what each cell has shown, text after text."""
    shown = []

    class Handle:
        def __init__(self, data):
            self.texts = [data]
            shown.append(self.texts)

        def update(self, data, *, raw):
            assert raw
            self.texts.append(data)

    def display(data, *, raw, display_id):
        assert raw
        assert display_id
        return Handle(data)

    module = SimpleNamespace(display=display)
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()), display=module)
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_bars_move_below_the_cell(cells, capsys):
    with reporting(True) as report:
        for done in range(1, 4):
            report("features", done, 3)
        report("coreset", 5, None)
        report("coreset", 5, 5)
    (texts,) = cells
    assert all(set(data) == {"text/plain"} for data in texts)
    last = texts[-1]["text/plain"]
    assert [STAGES["features"] in last, "3/3" in last, STAGES["coreset"] in last, "5/5" in last] == [True] * 4
    assert "\x1b" not in last
    assert len(last.strip().splitlines()) == 2
    assert len(texts) < 7, "a picture at the beginning, one at each end, and few between"
    assert capsys.readouterr() == ("", "")


def test_calls_without_stages_have_a_bar_too(cells):
    greedy_coreset(np.eye(30, dtype=np.float32), 9, progress=True)
    assert "100%" in cells[0][-1]["text/plain"]


def test_ipython_in_a_terminal_is_no_notebook(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=SimpleNamespace))
    greedy_coreset(np.eye(30, dtype=np.float32), 9, progress=True)
    assert "100%" in capsys.readouterr().err


def pictures(page):
    for code in re.findall(r'<img src="data:image/webp;base64,([^"]+)">', page):
        yield np.asarray(Image.open(io.BytesIO(base64.b64decode(code))).convert("L"))


def test_a_prediction_shows_scores_verdicts_and_maps(tmp_path):
    model = detector().fit(normal(8)).calibrate(normal(10, 4), false_alarm_rate=0.2)
    folder = write_folder(tmp_path / "a<b>", np.concatenate([normal(2, 2), flawed(1)]))
    page = model.predict(folder)._repr_html_()
    rows = page.split("<tr>")[2:]
    assert rows[0].split("<td>")[2] == "anomalous"
    assert "2.png" in rows[0]
    assert "a&lt;b&gt;" in page
    assert "<b>" not in page
    found = list(pictures(page))
    assert [picture.shape for picture in found] == [(32, 32)] * 3
    assert found[0][8:20, 4:16].mean() > found[1].mean() + 30
    assert "3 images" in page


def test_a_prediction_without_maps_paths_or_threshold_is_short(tmp_path):
    model = detector().fit(normal(8))
    result = model.predict(normal(30, 2))
    page = result._repr_html_()
    assert page.count("<tr>") == 11
    best = int(result.scores.argmax())
    assert f"[{best}]" in page.split("<tr>")[2]
    assert len(list(pictures(page))) == 10
    bare = model.predict(normal(2, 2), maps=False)._repr_html_()
    assert "<img" not in bare
    assert "<td>-<td>-<td>" in bare
    assert model.predict([])._repr_html_().count("<tr>") == 1
