"""However many images there are, a call holds the maps and pictures of a few."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from detectors import detector, flawed, normal, pyramid, write_folder

from patchcore_rs import PatchCore
from patchcore_rs.cli import predict as cli_predict
from patchcore_rs.cli.main import main
from patchcore_rs.detector import method
from patchcore_rs.evaluation.inspection import Inspection
from patchcore_rs.methods import load as methods_load
from patchcore_rs.model.map_values import MapScale
from patchcore_rs.report.page import Report

SCALE = MapScale(0.0, 1.0)


# --- predict(maps=False) ------------------------------------------------------------------------------------


def test_without_maps_scores_are_the_same_and_no_map_is_drawn(monkeypatch):
    model = detector().fit(normal(12)).calibrate(normal(10, 4), false_alarm_rate=0.2)
    features, whole = model.extract(flawed(3)), model.predict(flawed(3))
    monkeypatch.setattr(method, "anomaly_maps", None)
    for bare in (model.predict(flawed(3), maps=False), model.predict_features(features, maps=False)):
        assert bare.maps is bare[1].maps is None
        np.testing.assert_array_equal(bare.scores, whole.scores)
        np.testing.assert_array_equal(bare.labels, whole.labels)
        assert bare.map_scale == whole.map_scale
        assert "no maps" in repr(bare)
    assert bare.to_csv() == whole.to_csv()
    assert json.loads(bare.to_json())["threshold"] == whole.threshold
    assert len(model.predict([], maps=False)) == 0


def test_without_maps_normalised_scores_are_the_same():
    model = detector(normalize=True).fit(normal(12)).calibrate(normal(20, 4), false_alarm_rate=0.2)
    whole, bare = model.predict(flawed(3)), model.predict(flawed(3), maps=False)
    np.testing.assert_array_equal(bare.scores, whole.scores)
    assert (bare.maps, bare.threshold) == (None, 0.5)


def test_maps_must_be_true_or_false():
    model = detector().fit(normal(12))
    for predict, images in ((model.predict, normal(1)), (model.predict_features, model.extract(normal(1)))):
        with pytest.raises(TypeError, match=r"maps must be .*; got 'no'"):
            predict(images, maps="no")


def test_what_was_not_looked_at_stands_in_json():
    model = detector().fit(normal(12))
    assert [image["unseen"] for image in json.loads(model.predict(normal(2)).to_json())["images"]] == [0.0, 0.0]
    own = model.extract(normal(2))
    own = type(own)(own.features, own.grid, own.image_size)
    prediction = detector().fit_features(own).predict_features(own)
    assert json.loads(prediction.to_json())["images"][0]["unseen"] is None


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A model, one as it was saved before it knew its colours, and many images."""
    monkeypatch.setattr(methods_load, "load", partial(methods_load.load, backbone=pyramid))
    model = detector().fit(normal(12, size=64))
    model.save(tmp_path / "new.safetensors")
    model._fitted = model._fitted.describe(map_values=None)
    model.save(tmp_path / "old.safetensors")
    for name, count in (("few", 10), ("many", 100)):
        write_folder(tmp_path / name, np.repeat(flawed(10, size=64), count // 10, axis=0))
    return tmp_path


def predict(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in ("predict", *arguments)])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("model", ["new", "old"])
def test_ten_times_the_images_take_no_more_memory(shop, model, monkeypatch):
    monkeypatch.setattr(cli_predict, "_DRAWN", 5)
    monkeypatch.setitem(Report.__init__.__kwdefaults__, "size_limit", 20_000)
    peaks = {}
    written = ["-o", shop / "out", "--report", shop / "r.html", "--csv"]
    written += [word for kind in ("overlay", "npy", "png16") for word in ("--save", kind)]
    options = [*written, "--batch-size", "1"]  # a batch or two wait to be scored, however many images there are
    predict(shop / f"{model}.safetensors", shop / "few", *options)  # imports
    for name in ("few", "many"):
        tracemalloc.start()
        try:
            predict(shop / f"{model}.safetensors", shop / name, *options)
            peaks[name] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    maps = 90 * 64 * 64 * 4
    assert peaks["many"] - peaks["few"] < maps / 4


def test_csv_with_pictures_comes_out_as_images_are_done(shop, monkeypatch):
    monkeypatch.setattr(cli_predict, "_DRAWN", 5)
    seen = []
    print_rows = cli_predict.print_rows

    def spy(terminal, scored, kinds, start):
        seen.append(len(scored.scores) - start)
        assert all(Path(scored.written[name]["overlay"]).is_file() for name in scored.names)
        return print_rows(terminal, scored, kinds, start)

    monkeypatch.setattr(cli_predict, "print_rows", spy)
    rows = predict(shop / "new.safetensors", shop / "few", "-o", shop / "out", "--csv").stdout
    assert seen == [5, 5, 0]
    assert [Path(row["overlay"]).is_file() for row in csv.DictReader(io.StringIO(rows))] == [True] * 10


def test_pictures_that_cannot_be_written_take_no_score(shop, monkeypatch):
    monkeypatch.setattr(cli_predict, "_DRAWN", 5)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patchcore_rs.report.heatmap.write_overlay", full)
    result = CliRunner().invoke(
        main, ["predict", str(shop / "new.safetensors"), str(shop / "few"), "-o", str(shop / "out"), "--json"]
    )
    assert result.exit_code == 3
    answer = json.loads(result.stdout)
    assert len(answer["images"]) == 10
    assert "No space left on device" in answer["error"]


def test_without_colours_of_its_own_a_model_gives_the_picture_that_all_maps_decide(shop):
    """In two passes, as in one: the scale is out of the images' medians and largest values."""
    answer = json.loads(predict(shop / "old.safetensors", shop / "few", "-o", shop / "out", "--json").stdout)
    maps = PatchCore.load(shop / "old.safetensors", backbone=pyramid).predict(shop / "few").maps.reshape(10, -1)
    assert answer["scale"]["low"] == pytest.approx(np.median(np.median(maps, axis=1)))
    assert answer["scale"]["high"] == maps.max()
    assert len(list((shop / "out").glob("*.overlay.png"))) == 10


@pytest.mark.parametrize("model", ["new", "old"])
def test_a_part_without_a_readable_image_is_no_obstacle(shop, model, monkeypatch):
    monkeypatch.setattr(cli_predict, "_DRAWN", 2)
    for name in "01":
        (shop / "few" / f"{name}.png").write_bytes(b"no image")
    arguments = (shop / f"{model}.safetensors", shop / "few", "-o", shop / "out", "--report", shop / "r.html")
    answer = json.loads(predict(*arguments, "--skip-unreadable", "--json").stdout)
    assert [len(answer["images"]), len(answer["skipped"])] == [8, 2]
    assert len(list((shop / "out").iterdir())) == 8
    assert "8 images" in (shop / "r.html").read_text("utf-8")


# --- the report ---------------------------------------------------------------------------------------------


def picture(path):
    """A picture whose thumbnail is larger the larger its number."""
    number = int(path.stem)
    return np.random.default_rng(number).integers(0, 1 + number * 12, (16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [0, 3_000, 12_000, 10**6])
def test_a_page_of_images_that_come_in_parts_is_the_page_of_all_at_once(seed, limit):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 9, 20) / 4.0  # with ties
    maps = rng.random((20, 16, 16), np.float32)
    paths = tuple(Path(f"{i}.png") for i in rng.permutation(20))
    whole, parts = Report("Parts", size_limit=limit), Report("Parts", size_limit=limit)
    whole.add_inspection(Inspection("Images", paths, scores, maps), 1.0, picture, scale=SCALE, origin="here")
    stream = parts.stream(1.0, picture, SCALE)
    for start in range(0, 20, 3):
        part = slice(start, start + 3)
        stream.add(Inspection("Images", paths[part], scores[part], maps[part]))
        assert sum(map(len, stream.cards)) <= limit
    parts.add_stream("Images", stream, origin="here")
    assert parts.html() == whole.html()
    if limit == 12_000:
        assert 0 < len(stream.cards) < 20
        assert f"({len(stream.cards)} of 20 shown, to keep this file small)" in parts.html()


def test_no_picture_is_made_that_cannot_be_kept():
    read = []

    def counting(path):
        read.append(path)
        return picture(path)

    stream = Report("Parts", size_limit=3_000).stream(None, counting, SCALE)
    paths = tuple(Path(f"{i}.png") for i in range(20))
    stream.add(Inspection("Images", paths, np.arange(20.0, 0, -1), np.zeros((20, 16, 16), np.float32)))
    assert len(read) == len(stream.cards) + 1
    assert len(stream.scores) == 20
