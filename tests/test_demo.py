"""The demo: the whole tour in small, its tables, and stages whose answers are checked before their times count."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from patchcore_rs import _native, greedy_coreset
from patchcore_rs.cli import demo
from patchcore_rs.cli.main import main
from patchcore_rs.demo import comparison as stages
from patchcore_rs.demo import plain_torch as reference
from patchcore_rs.images.layouts import load_dataset

SMALL = {"size": 64, "train": 4, "test_good": 3, "test_per_kind": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def printed(folder):
    """What the demo prints, run with few and small images."""
    with pytest.MonkeyPatch.context() as patch:
        generate = demo.generate
        patch.setattr(demo, "generate", lambda root, **given: generate(root, **{**given, **SMALL}))
        result = CliRunner().invoke(main, ["demo", "--output", str(folder / "out"), "--threads", "1"])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_table_has_every_kind_and_the_sums(printed):
    for surface, kinds in {
        "cloth": ["hole", "stain"],
        "metal": ["scratch", "smudge"],
        "tiles": ["chip", "crack"],
    }.items():
        for kind in kinds:
            assert re.search(
                rf"^{surface} +{kind} +\w+ +1 +[01]\.\d{{4}} +[01]\.\d{{4}} +[01]\.\d{{4}} +[01]$", printed, re.M
            )
        assert re.search(rf"^{surface} +all +7 +[01]\.\d{{4}}", printed, re.MULTILINE)
    assert re.search(r"^all +all +21 +[01]\.\d{4}", printed, re.MULTILINE)


def test_the_stages_are_timed_beside_torch(printed):
    table = printed[printed.index("Milliseconds an image") :]
    assert re.search(r"^backbone +([\d.,]+) +\1 +torch in both", table, re.MULTILINE)
    for stage in ("aggregation", r"coreset selection \(a training image\)", "nearest-neighbour search", "anomaly map"):
        assert re.search(rf"^{stage} +[\d.,]+ +[\d.,]+ +[\d.,]+ x", table, re.MULTILINE), stage
    assert re.search(r"^inspecting an image +[\d.,]+ +[\d.,]+ +[\d.,]+ x", table, re.MULTILINE)


def test_the_report_is_where_it_says(printed, folder):
    report = folder / "out" / "report.html"
    lines = printed.strip().splitlines()
    assert lines[-1] == report.as_uri()
    assert str(report) in lines[-2]
    page = report.read_text(encoding="utf-8")
    assert page.count("<section") == 3
    assert "plain torch" in page
    assert report.stat().st_size < 15_000_000


def test_the_images_are_kept_and_used_again(printed, folder):
    again = sorted((folder / "out" / "images").rglob("*.png"))
    assert len(again) == 3 * (4 + 3 + 2 * 4)


def test_a_folder_with_other_images_is_refused(printed, folder):
    result = CliRunner().invoke(main, ["demo", "--output", str(folder / "out"), "--seed", "9"])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_a_wrong_answer_is_no_time(monkeypatch, printed, folder):
    monkeypatch.setattr(reference, "aggregate", lambda maps, _: torch.zeros(len(maps[0]) * 28 * 28, 344))
    dataset = load_dataset(folder / "out" / "images" / "metal")
    with pytest.raises(stages.WrongAnswerError, match="features differ from plain torch's by up to"):
        demo._time_stages(dataset, 0, 1, lambda *_: None)


def test_torch_threads_are_as_before(printed, folder):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        dataset = load_dataset(folder / "out" / "images" / "metal")
        times = demo._time_stages(dataset, 0, 1, lambda *_: None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert json.loads(json.dumps([time.to_json() for time in times]))[1]["ratio"] > 0


# --- the pure torch stages ---------------------------------------------------------------------------------


def test_torch_greedy_selection_covers_as_well():
    features = np.random.default_rng(0).normal(size=(500, 12)).astype(np.float32)
    rows, radii = greedy_coreset(features, 40, return_radii=True)
    picks = reference.greedy_coreset(torch.from_numpy(features), 40, int(rows[0])).numpy()
    assert len(set(picks.tolist())) == 40
    assert (picks == rows).all()
    distances, _ = reference.nearest(torch.from_numpy(features), torch.from_numpy(features[picks]))
    assert float(distances.max()) == pytest.approx(radii[-1], rel=1e-5)


def test_torch_search_is_blocked_and_right(monkeypatch):
    rng = np.random.default_rng(1)
    queries, bank = rng.normal(size=(70, 9)).astype(np.float32), rng.normal(size=(30, 9)).astype(np.float32)
    every = np.linalg.norm(queries[:, None].astype(np.float64) - bank, axis=2)
    monkeypatch.setattr(reference, "_PRODUCT", 100)
    distances, indices = reference.nearest(torch.from_numpy(queries), torch.from_numpy(bank))
    assert (indices.numpy() == every.argmin(axis=1)).all()
    assert np.allclose(distances.numpy(), every.min(axis=1), rtol=1e-5)


def test_torch_maps_are_the_kernels():
    scores = np.random.default_rng(2).random((2, 7, 5), dtype=np.float32)
    expected = _native.anomaly_maps(scores, 50, 41, 4.0, "bilinear", "symmetric", 1)
    assert np.allclose(reference.anomaly_maps(torch.from_numpy(scores), 50, 41).numpy(), expected, atol=1e-6)
