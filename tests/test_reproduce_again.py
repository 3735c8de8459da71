"""What a run of `reproduce` leaves in its folder and the next one finds: results, and a cache of feature maps."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectors import normal
from reproductions import numbers, run, succeed, write_mvtec
from small_networks import COUNTS, PASSED, SIDE, tiny, write_category

from patchcore_rs.images.files import write_image
from patchcore_rs.reproduce import experiments
from patchcore_rs.reproduce.cache import MapCache, reserved


@pytest.fixture(scope="module")
def mvtec(tmp_path_factory):
    """The categories of MVTec AD in small."""
    return write_mvtec(tmp_path_factory.mktemp("mvtec"))


# --- Results -----------------------------------------------------------------------------------------------


def test_a_run_that_was_interrupted_goes_on_where_it_was(mvtec, tmp_path, small, monkeypatch):
    chosen = ["--category", "bottle", "--category", "cable", "--threads", 1]
    succeed("table1", mvtec, *chosen, "--output", tmp_path / "whole")
    done = []

    def count(*arguments, **options):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(arguments)
        return whole(*arguments, **options)

    whole, stop = experiments.evaluate_detector, 8
    monkeypatch.setattr(experiments, "evaluate_detector", count)
    output = tmp_path / "parts"
    result = run("table1", mvtec, *chosen, "--output", output)
    assert result.exit_code == 130
    assert "Table 1: image AUROC" in result.stdout
    assert len(list(output.glob("results/*/*.json"))) == 8
    stop = -1
    PASSED.clear()
    result = succeed("table1", mvtec, *chosen, "--output", output)
    assert len(done) == 14
    assert "6 experiments to run, 8 finished earlier" in result.stderr
    assert sum(PASSED) == 1 + 0  # the maps of the second category were there already
    assert numbers(output, "table1") == numbers(tmp_path / "whole", "table1")
    PASSED.clear()
    succeed("table1", mvtec, *chosen, "--output", output)
    assert len(done) == 14
    assert PASSED == []
    succeed("table3", mvtec, *chosen, "--output", output)  # of the same detectors
    assert len(done) == 14


def test_what_decides_a_result_makes_it_anew(tmp_path, small, monkeypatch):
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    arguments = ["table1", root, "--output", output, "--threads", 1]

    def to_run(*more):
        text = succeed(*arguments, *more).stderr
        return int(re.search(r"(\d+) experiments? to run", text)[1])

    assert to_run() == 7
    assert to_run() == 0
    file = next(output.glob("results/parts/*.json"))
    file.write_text(file.read_text("utf-8")[:50], encoding="utf-8")
    assert to_run() == 1
    assert to_run("--seed", 1) == 7
    assert to_run("--seed", 0, "--seed", 1) == 0
    assert to_run("--batch-size", 3) == 7
    image = root / "test" / "good" / "0.png"
    write_image(image, normal(1, 77, SIDE)[0])
    assert to_run() == 7
    monkeypatch.setattr(experiments, "versions", lambda: {"patchcore-rs": "0.0.0"})
    assert to_run() == 7


def test_results_state_the_versions_of_all_that_may_have_made_them(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: f"{name}'s")
    assert experiments.versions.__wrapped__().items() >= {
        (name, f"{name}'s") for name in ("torch", "torchvision", "timm", "numpy", "pillow", "faiss-cpu")
    }


# --- The cache ---------------------------------------------------------------------------------------------


def test_a_cache_that_does_not_fit_on_the_disk_is_refused_before_any_work(tmp_path, small, monkeypatch):
    monkeypatch.setattr(experiments.shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    root = write_category(tmp_path / "parts")
    result = run("table1", root, "--output", tmp_path / "out")
    assert result.exit_code == 3
    assert "the cache of feature maps takes up to" in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.parametrize("changed", ["torch", "torchvision", "timm"])
def test_maps_of_other_libraries_are_not_taken(changed, tmp_path, small, monkeypatch):
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    succeed("table1", root, "--output", output, "--keep-cache")
    whole = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1" if name == changed else whole(name))
    PASSED.clear()
    succeed("table1", root, "--output", output, "--keep-cache", "--seed", 1)
    assert sum(PASSED) == 1 + sum(COUNTS.values())  # to measure the cache, and for the maps


def test_one_thread_at_a_time_parses_the_header_of_a_map(tmp_path, monkeypatch):
    layers, read, inside = ("1", "2"), np.load, []

    def load(path):
        inside.append(path)
        assert len(inside) == 1
        time.sleep(0.01)
        found = read(path)
        inside.pop()
        return found

    maps = MapCache(tmp_path, tiny("one")).view(layers)
    images = [torch.rand(1, 3, SIDE, SIDE) for _ in range(4)]
    expected = [maps(image) for image in images]
    monkeypatch.setattr(np, "load", load)
    with ThreadPoolExecutor(4) as pool:
        for found, own in zip(pool.map(maps, images), expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(found, own, strict=True))


def test_the_cache_is_kept_where_that_is_asked_for(tmp_path, small):
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    result = succeed("table1", root, "--output", output, "--keep-cache")
    kept = list((output / "cache").rglob("*.npy"))
    assert len(kept) == 3 * sum(COUNTS.values())
    stated = re.search(r"takes up to (\d+\.\d+) GB", result.stderr)[1]
    assert stated == f"{sum(file.stat().st_size - 128 for file in kept) / 1e9:.2f}"
    PASSED.clear()
    succeed("table1", root, "--output", output, "--keep-cache", "--seed", 1)
    assert sum(PASSED) == 1  # to measure the cache


def test_a_cache_that_is_to_be_kept_outlives_later_runs(tmp_path, small):
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    succeed("table1", root, "--output", output, "--keep-cache")
    kept = sorted((output / "cache").rglob("*.npy"))
    result = succeed("table1", root, "--output", output, "--seed", 1)
    assert "kept" in next(line for line in result.stderr.splitlines() if "cache of feature maps" in line)
    assert sorted((output / "cache").rglob("*.npy")) == kept


def test_maps_that_are_there_need_no_room_and_others_are_no_room(tmp_path, small, monkeypatch):
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    succeed("table1", root, "--output", output, "--keep-cache")
    monkeypatch.setattr(experiments.shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    succeed("table1", root, "--output", output, "--seed", 1)
    for file in (output / "cache").rglob("*.npy"):  # maps of another network
        (output / "cache" / "parts" / "other").mkdir(exist_ok=True)
        file.rename(output / "cache" / "parts" / "other" / file.name)
    result = run("table1", root, "--output", output, "--seed", 2)
    assert result.exit_code == 3
    assert "0.00 GB are free" in result.stderr.splitlines()[-1]


def test_two_runs_do_not_work_in_one_folder_at_once(tmp_path, small):
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    output.mkdir()
    with reserved(output):
        result = run("table1", root, "--output", output)
        assert result.exit_code == 3
        assert f"{output}: another reproduce works in this folder; wait" in result.stderr.splitlines()[-1]
        assert not (output / "results").exists()
    succeed("table1", root, "--output", output)
    with reserved(output):  # what is finished can be looked at
        assert "0 experiments to run" in succeed("table1", root, "--output", output).stderr
