"""A prediction can be looped over, taken apart and written; what is written reads back the same."""

from __future__ import annotations

import csv
import io
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from detectors import flawed, normal, write_folder

from patchcore_rs import PatchCore, Prediction
from patchcore_rs.cli.main import main


def prediction(count=4, threshold=2.0):
    scores = np.random.default_rng(0).random(count) * 4
    maps = np.arange(count * 6, dtype=np.float32).reshape(count, 2, 3)
    labels = None if threshold is None else (scores >= threshold).astype(np.int8)
    paths = tuple(None if i == 1 else Path(f"folder/{i}, ü.png") for i in range(count))
    return Prediction(scores, maps, labels, threshold, paths, (("bad.png", "it is no image"),))


def equal(part, whole, places):
    np.testing.assert_array_equal(part.scores, whole.scores[places])
    np.testing.assert_array_equal(part.maps, whole.maps[places])
    np.testing.assert_array_equal(part.labels, whole.labels[places])
    assert part.paths == tuple(whole.paths[i] for i in places)
    assert part.threshold == whole.threshold
    assert part.skipped == ()
    assert (part.scores.dtype, part.maps.ndim, len(part)) == (np.float64, 3, len(places))


# --- Parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "places"),
    [
        (0, [0]),
        (-1, [3]),
        (-4, [0]),
        (np.int64(2), [2]),
        (np.uint8(3), [3]),
        (np.array(1), [1]),
        (torch.tensor(2), [2]),
        (slice(None), [0, 1, 2, 3]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -2), [3, 1]),
        (slice(9, 20), []),
        ([2, 0, -1, 2], [2, 0, 3, 2]),
        (np.array([3, 1], np.uint64), [3, 1]),
        ([], []),
        ([True, False, True, False], [0, 2]),
        (np.zeros(4, bool), []),
    ],
)
def test_an_index_gives_the_prediction_of_those_images(index, places):
    equal(prediction()[index], prediction(), places)


def test_a_loop_gives_each_image():
    whole = prediction()
    parts = list(whole)
    assert len(parts) == len(whole) == 4
    for i, part in enumerate(parts):
        equal(part, whole, [i])
    assert [part.paths for part in reversed(whole)] == [(path,) for path in reversed(whole.paths)]
    assert list(prediction(0)) == []
    assert prediction(threshold=None)[0].labels is None
    assert len(whole[whole.labels == 1]) == whole.labels.sum() > 0


def test_integers_and_slices_give_views():
    whole = prediction()
    assert np.shares_memory(whole[1].maps, whole.maps)
    assert np.shares_memory(whole[1:].maps, whole.maps)
    assert not np.shares_memory(whole[[1, 2]].maps, whole.maps)


@pytest.mark.parametrize("index", [1.0, "0", None, True, np.True_, (0, 1), [0.0], ["a"], np.zeros(4), {0}, ...])
def test_other_kinds_of_index_are_refused(index):
    with pytest.raises(TypeError, match="index must be"):
        prediction()[index]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (4, "index must be from -4 to 3; got 4"),
        (-5, "got -5"),
        ([0, 7], "from -4 to 3; got 7"),
        ([[0, 1]], r"1-D array.*got shape \(1, 2\)"),
        ([True], r"of 4 where it holds bools; got shape \(1,\)"),
        (np.array([2**63], np.uint64), "got 9223372036854775808"),
    ],
)
def test_what_lies_outside_is_refused(index, message):
    with pytest.raises(IndexError, match=message):
        prediction()[index]
    with pytest.raises(IndexError, match="index must be a slice of no images; got 0"):
        prediction(0)[0]


# --- Text --------------------------------------------------------------------------------------------------


def test_json_reads_back():
    whole = prediction()
    answer = json.loads(whole.to_json(), parse_constant=pytest.fail)
    assert answer["threshold"] == 2.0
    assert answer["skipped"] == [{"path": "bad.png", "reason": "it is no image"}]
    assert [image["score"] for image in answer["images"]] == whole.scores.tolist()
    assert [image["anomalous"] for image in answer["images"]] == (whole.labels == 1).tolist()
    assert [image["path"] for image in answer["images"]] == ["folder/0, ü.png", None, *map(str, whole.paths[2:])]
    bare = json.loads(prediction(threshold=None).to_json())
    assert bare["threshold"] is bare["images"][0]["anomalous"] is None
    assert json.loads(prediction(0)[:].to_json()) == {
        "threshold": 2.0,
        "scale": None,
        "images": [],
        "skipped": [],
    }


def test_csv_reads_back():
    whole = prediction()
    rows = list(csv.DictReader(io.StringIO(whole.to_csv())))
    assert [float(row["score"]) for row in rows] == whole.scores.tolist()
    assert [row["anomalous"] for row in rows] == [str(label) for label in whole.labels]
    assert [row["path"] for row in rows] == ["folder/0, ü.png", "", *map(str, whole.paths[2:])]
    assert [row["anomalous"] for row in csv.DictReader(io.StringIO(prediction(threshold=None).to_csv()))] == [""] * 4
    assert prediction(0).to_csv() == "path,score,anomalous\n"


@pytest.mark.parametrize("write", [Prediction.to_json, Prediction.to_csv])
def test_a_file_holds_the_same_text(write, tmp_path):
    target, link = tmp_path / "answer", tmp_path / "link"
    target.write_text("of before")
    link.symlink_to(target)
    assert write(prediction(), str(link)) is None
    assert link.is_symlink()
    assert target.read_bytes() == write(prediction()).encode()
    with pytest.raises(FileNotFoundError, match="the folder to write in does not exist"):
        write(prediction(), tmp_path / "none" / "answer")
    with pytest.raises(OSError, match=str(tmp_path.name)):
        write(prediction(), tmp_path)
    assert sorted(tmp_path.iterdir()) == [target, link]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk on fire")

    (tmp_path / "answer").write_text("of before")
    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk on fire"):
        prediction().to_csv(tmp_path / "answer")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of before"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_written_to_and_stays(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text("utf-8")))
    reader.start()
    prediction().to_csv(pipe)
    reader.join(timeout=30)
    assert read == [prediction().to_csv()]
    assert pipe.is_fifo()


def test_a_file_name_that_is_no_text_keeps_its_bytes(tmp_path):
    strange = replace(prediction(1), paths=(Path(os.fsdecode(b"\xff.png")),))
    strange.to_csv(tmp_path / "answer.csv")
    assert b"\xff.png," in (tmp_path / "answer.csv").read_bytes()
    strange.to_json(tmp_path / "answer.json")
    assert json.loads((tmp_path / "answer.json").read_bytes())["images"][0]["path"] == str(strange.paths[0])


def test_json_has_no_word_for_nan():
    bad = replace(prediction(), scores=np.array([1, np.nan, 2, np.inf]))
    with pytest.raises(ValueError, match=r"scores\[1\] must be finite to be written as JSON; got nan"):
        bad.to_json()
    with pytest.raises(ValueError, match="threshold must be finite to be written as JSON; got inf"):
        replace(prediction(), threshold=np.inf).to_json()
    assert ",nan,1\n" in replace(bad, labels=np.ones(4, np.int8)).to_csv()


def test_the_command_line_writes_the_same(tmp_path):
    model = PatchCore(backbone="efficientnet_lite0", resize=(32, 32), coreset=20)
    model.fit(normal(4)).calibrate(normal(4, 1), false_alarm_rate=0).save(tmp_path / "model.safetensors")
    folder = write_folder(tmp_path / "images", np.concatenate([normal(2, 5), flawed(2)]))
    result = model.predict(folder)
    command = ["predict", str(tmp_path / "model.safetensors"), str(folder)]
    said = CliRunner().invoke(main, [*command, "--csv"], catch_exceptions=False).stdout
    assert said == result.to_csv()
    answer = json.loads(CliRunner().invoke(main, [*command, "--json"], catch_exceptions=False).stdout)
    ours = json.loads(result.to_json())
    assert ours["threshold"] == answer["threshold"]
    assert ours["skipped"] == answer["skipped"]
    assert ours["images"] == [{key: image[key] for key in ours["images"][0]} for image in answer["images"]]
