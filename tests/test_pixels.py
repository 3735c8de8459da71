"""Pixel metrics in the masks' own pixels: flaws that crop or resize take away count, and what is undefined says why."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import oracle
import oracle_metrics
import pytest
from click.testing import CliRunner
from detectors import normal, pyramid, write_folder

from patchcore_rs import PatchCore, evaluate, metrics
from patchcore_rs.cli import main as cli
from patchcore_rs.evaluation import ground_truth
from patchcore_rs.evaluation.ground_truth import GroundTruth
from patchcore_rs.evaluation.inspection import Inspection
from patchcore_rs.evaluation.judging import judge, judge_kinds
from patchcore_rs.evaluation.tables import COLUMNS, DEFAULT
from patchcore_rs.images.files import write_image
from patchcore_rs.images.masks import Marks
from patchcore_rs.images.pixels import geometry

OPTIONS = {"backbone": pyramid, "coresets": [20]}


def inspected(masks, maps, *, resize=None, crop=None, labels=None, ignored=None, **options):
    """Images with these masks in their own pixels, and maps of the size at which the model saw them."""
    ignored = ignored or [np.zeros_like(mask) for mask in masks]
    truth = GroundTruth(tuple(map(Marks, masks, ignored)), resize, crop)
    seen, left_out = truth.as_seen()
    labels = np.array([mask.any() for mask in masks] if labels is None else labels, np.uint8)
    scores = np.asarray(maps).max(axis=(1, 2)).astype(np.float64)
    kinds = tuple("hole" if label else "good" for label in labels)
    options = {"ignored": left_out, "truth": truth} | options
    return Inspection("set", tuple(map(str, range(len(masks)))), scores, maps, kinds, labels, seen, **options)


def chips(count, size, places, side=2):
    """Masks of images: a square each at the given places, none on the others."""
    masks = [np.zeros((size, size), bool) for _ in range(count)]
    for mask, (row, column) in zip(masks, places, strict=False):
        mask[row : row + side, column : column + side] = True
    return masks


def test_flaws_that_the_crop_cuts_off_lower_the_pixel_metrics():
    """Of eight chips one lies where the model looks: it finds that one perfectly and cannot see the others."""
    masks = chips(12, 30, [(14, 14), *[(0, 3 * i) for i in range(7)]])
    maps = np.random.default_rng(0).uniform(1, 2, (12, 20, 20)).astype(np.float32)
    inspection = inspected(masks, maps, resize=26, crop=20)
    maps[0][inspection.masks[0]] = 9
    seen = judge(inspection, pixels="model")
    assert (seen.pixel_auroc, seen.pro) == (1.0, 1.0)  # which was the answer for all
    assert (seen.regions, seen.marked_regions, seen.unseen_flaws) == (1, 8, 7)
    back = np.stack([oracle.bring_back(each, (30, 30), (26, 26), (3, 3), maps.min()) for each in maps])
    found = judge(inspection)
    assert found.pixel_auroc == pytest.approx(oracle_metrics.roc_auc(np.ravel(masks), back.ravel()), abs=1e-6)
    assert found.pixel_auroc < 0.6
    assert found.pro == pytest.approx(oracle_metrics.pro(masks, back.astype(np.float32), 0.3), abs=1e-4)
    assert found.pro < 0.2
    assert (found.regions, found.marked_regions, found.unseen_flaws) == (8, 8, 7)
    [kind] = judge_kinds(inspection, None)
    assert (kind.pixel_auroc, kind.pro, kind.missed) == (found.pixel_auroc, found.pro, None)


def test_marks_smaller_than_a_pixel_of_the_model_count():
    """24 pinholes of one pixel, of which the resize leaves some: the metrics of the rest say nothing of the lost."""
    rng = np.random.default_rng(1)
    masks = [np.zeros((40, 40), bool) for _ in range(10)]
    for mask in masks[:8]:
        mask[rng.permutation(range(0, 40, 4))[:3], rng.permutation(range(0, 40, 4))[:3]] = True
    maps = rng.uniform(0, 1, (10, 22, 22)).astype(np.float32)
    inspection = inspected(masks, maps, resize=22)
    found, seen = judge(inspection), judge(inspection, pixels="model")
    assert found.regions == found.marked_regions == seen.marked_regions == 24
    assert 0 < seen.regions < 24
    assert seen.unseen_flaws == sum(not mask.any() for mask in inspection.masks[:8])
    assert found.unseen_flaws == 0
    back = np.stack([oracle.bring_back(each, (40, 40), (22, 22), (0, 0), 0) for each in maps])
    assert found.pixel_auroc == pytest.approx(oracle_metrics.roc_auc(np.ravel(masks), back.ravel()), abs=1e-6)
    assert found.pixel_auroc != pytest.approx(seen.pixel_auroc, abs=1e-3)


def test_images_of_any_mix_of_sizes_are_judged_each_in_its_own():
    sizes = [(24, 40), (31, 17), (16, 16), (50, 20)]
    rng = np.random.default_rng(2)
    masks = [rng.random(size) < 0.2 for size in sizes]
    masks[1][:] = False
    ignored = [~mask & (rng.random(mask.shape) < 0.1) for mask in masks]
    maps = rng.integers(0, 9, (4, 12, 12)).astype(np.float32)
    found = judge(inspected(masks, maps, resize=(16, 16), crop=(12, 12), ignored=ignored))
    pairs = []
    for mask, left_out, each in zip(masks, ignored, maps, strict=True):
        back = oracle.bring_back(each, mask.shape, (16, 16), (2, 2), 0)
        pairs.append((mask[~left_out], back[~left_out]))
    labels, values = (np.concatenate(part) for part in zip(*pairs, strict=True))
    assert found.pixel_auroc == pytest.approx(oracle_metrics.roc_auc(labels, values), abs=1e-5)
    assert found.regions == sum(len(oracle_metrics.regions(mask)) for mask in masks)


@pytest.mark.parametrize(("resize", "crop"), [(None, None), (16, None), ((20, 13), (9, 12)), (17, 11)])
def test_a_map_is_brought_back_to_where_it_was_seen(resize, crop):
    size = (37, 23)
    resized, offset, seen = geometry(size, resize, crop)
    anomaly_map = np.random.default_rng(3).random(seen).astype(np.float32)
    truth = GroundTruth((Marks(np.zeros(size, bool), np.zeros(size, bool)),), resize, crop)
    back = truth.bring_back(0, anomaly_map, -1.0, None)
    np.testing.assert_allclose(back, oracle.bring_back(anomaly_map, size, resized, offset, -1.0), atol=1e-6)
    assert (back == -1).any() == (crop is not None)


def undefined(found, *names):
    """The reason, or reasons, why these are undefined; all else is defined, but for parts."""
    missing = {name for name in COLUMNS if getattr(found, name) is None}
    assert missing - {"part_auroc"} == set(names) - {"part_auroc"}
    reasons = {found.reasons[name] for name in names}
    return reasons if len(reasons) > 1 else reasons.pop()


OF_IMAGES = (*DEFAULT[:2], "image_average_precision", "misclassified", "full_recall_false_alarms")
OF_PIXELS = ("pixel_auroc", "pixel_average_precision", "pixel_f1", "pro", "aupimo")


def test_flawed_images_alone_have_metrics_of_pixels():
    masks = chips(3, 20, [(2, 2), (8, 8), (4, 12)])
    maps = np.random.default_rng(4).random((3, 20, 20)).astype(np.float32)
    found = judge(inspected(masks, maps))
    assert undefined(found, *OF_IMAGES, "aupimo") == "no good images"
    assert found.pixel_auroc == pytest.approx(oracle_metrics.roc_auc(np.ravel(masks), maps.ravel()), abs=1e-12)
    assert found.pro == pytest.approx(oracle_metrics.pro(masks, maps, 0.3), abs=1e-12)
    [kind] = judge_kinds(inspected(masks, maps), found.threshold)
    assert (kind.pixel_auroc, kind.image_auroc, kind.missed) == (found.pixel_auroc, None, None)


def test_what_is_undefined_has_its_reason():
    maps = np.random.default_rng(5).random((800, 12, 12)).astype(np.float32)
    good, labels = chips(798, 12, []), [0] * 798 + [1] * 2
    masks = good + chips(2, 12, [(3, 3), (7, 5)])
    assert undefined(judge(inspected(masks, maps)), "part_auroc") == "no parts"
    black = inspected(chips(800, 12, []), maps, labels=labels)
    assert undefined(judge(black), *OF_PIXELS) == "nothing is marked"
    bare = Inspection("set", black.paths, black.scores, maps, black.kinds, black.labels)
    assert undefined(judge(bare), *OF_PIXELS) == "no masks"
    assert undefined(judge(inspected(good, maps[:798])), *OF_IMAGES, *OF_PIXELS) == "no flawed images"
    lost = judge(inspected(good + chips(2, 12, [(0, 0), (10, 10)]), maps[:, :6, :6], crop=6), pixels="model")
    assert undefined(lost, *OF_PIXELS) == "nothing marked is left at this size"
    few = judge(inspected(masks[-4:], maps[-4:]))
    assert undefined(few, "aupimo") == "too few normal pixels"
    whole = [np.ones((12, 12), bool)] * 2
    assert undefined(judge(inspected(whole, maps[:2])), *OF_IMAGES, *OF_PIXELS) == {
        "no good images",
        "no normal pixels",
    }
    one = inspected(masks[:-1], maps[:-1])
    assert undefined(judge(one), "image_auroc_interval") == "one flawed image"
    other = judge(inspected(masks[-3:], maps[-3:]))
    assert other.reasons["image_auroc_interval"] == "one good image"


def test_each_number_is_that_of_its_metric():
    """In the masks' own pixels, with enough good images for AUPIMO, an ignored corner and a black mask."""
    rng = np.random.default_rng(6)
    masks = chips(800, 12, [(3, 3), (7, 5), (2, 8)])
    labels = [1, 1, 1, 1] + [0] * 796
    ignored = [np.zeros_like(mask) for mask in masks]
    ignored[0][:2, :2] = ignored[3][:] = True
    maps = rng.random((800, 12, 12)).astype(np.float32)
    maps[:3, 2:9, 3:10] += 0.5
    inspection = inspected(masks, maps, labels=labels, ignored=ignored)
    found, options = judge(inspection, fpr_limit=0.2), {"ignored": ignored}
    assert found.image_auroc == metrics.image_auroc(labels, inspection.scores)
    assert found.image_auroc_interval == metrics.image_auroc_interval(labels, inspection.scores)
    assert found.image_average_precision == metrics.average_precision(labels, inspection.scores)
    assert found.pixel_auroc == metrics.pixel_auroc(masks, list(maps), **options)
    assert found.pixel_average_precision == metrics.pixel_average_precision(masks, list(maps), **options)
    assert found.pixel_f1 == metrics.pixel_f1_optimal(masks, list(maps), **options).f1
    assert found.pro == metrics.pro(masks, list(maps), 0.2, **options)
    values = metrics.aupimo(masks, list(maps), **options)
    assert np.isnan(values).tolist() == [False] * 3 + [True] * 797
    assert 0 < found.aupimo == np.nanmean(values) < 1


def test_a_flawed_image_without_a_mark_left_is_no_normal_one():
    masks = chips(400, 20, [(9, 9), (0, 0)])
    maps = np.random.default_rng(7).random((400, 16, 16)).astype(np.float32)
    maps[0] += 0.5
    maps[1] += 9  # its flaw is seen, though its mark is cut off
    inspection = inspected(masks, maps, crop=16)
    found, others = judge(inspection, pixels="model"), [0, *range(2, 400)]
    assert found.aupimo == metrics.aupimo(inspection.masks[others], maps[others])[0] > 0
    alone = judge(inspected(masks[:2], maps[:2], crop=16), pixels="model")
    assert alone.reasons["aupimo"] == "no good images"


def test_a_kind_is_judged_beside_all_that_is_known_of_the_set():
    """What was not seen has the smallest value of all images, which here lies in the other kind."""
    masks = chips(6, 12, [(0, 0), (5, 5)])
    maps = np.random.default_rng(8).uniform(2, 3, (6, 6, 6)).astype(np.float32)
    maps[1] -= 2
    maps[2:] -= 1
    inspection = inspected(masks, maps, crop=6)
    inspection = replace(inspection, kinds=("edge", "hole", *["good"] * 4))
    edge, hole = judge_kinds(inspection, 2.5)
    back = [oracle.bring_back(each, (12, 12), (12, 12), (3, 3), maps.min()) for each in maps]
    for kind, rows in ((edge, [0, 2, 3, 4, 5]), (hole, [1, 2, 3, 4, 5])):
        some = np.ravel([masks[i] for i in rows]), np.ravel([back[i] for i in rows])
        assert kind.pixel_auroc == pytest.approx(oracle_metrics.roc_auc(*some), abs=1e-9)
    assert (edge.missed, hole.missed) == (0, 1)


def test_a_kind_without_normal_pixels_loses_no_result():
    masks = [*chips(1, 8, [(2, 2)]), np.ones((8, 8), bool)]
    inspection = inspected(masks, np.random.default_rng(9).random((2, 8, 8)).astype(np.float32))
    hole, whole = judge_kinds(replace(inspection, kinds=("hole", "whole")), None)
    assert hole.pixel_auroc is not None
    assert (whole.pixel_auroc, whole.pro) == (None, None)
    with pytest.raises(ValueError, match="pixels must be one of 'mask', 'model'; got 'both'"):
        judge_kinds(inspection, None, pixels="both")
    with pytest.raises(ValueError, match="pixels must be one of"):
        judge(inspection, pixels="both")


def test_views_of_one_part_are_judged_together():
    """By hand: parts a (1, 8), b (9, 2; flawed), c (3) and the image alone (10; flawed): one pair of four is wrong."""
    scores, labels = np.array([1.0, 9, 3, 8, 2, 7.5]), np.array([0, 1, 0, 0, 0, 1], np.uint8)
    maps = np.zeros((6, 2, 2), np.float32)
    kinds = tuple("hole" if label else "good" for label in labels)
    paths = tuple("012345")
    parts = ("a", "b", "c", "a", "b", None)
    inspection = Inspection("set", paths, scores, maps, kinds, labels, parts=parts)
    names, part_labels, part_scores = inspection.of_parts()
    assert names == ("a", "b", "c", "5")
    assert part_labels.tolist() == [0, 1, 0, 1]
    assert part_scores.tolist() == [8, 9, 3, 7.5]
    assert judge(inspection).part_auroc == 0.75
    assert judge(inspection).image_auroc == 7 / 8
    alone = Inspection("set", paths, scores, maps, kinds, labels)
    assert judge(alone).reasons["part_auroc"] == "no parts"
    assert alone.of_parts()[0] == paths


# --- From files ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Images of 32 x 32, of which a crop of 16 sees the middle: one flaw of four lies in it."""
    root = tmp_path / "set"
    for number, (name, count) in enumerate({"train/good": 6, "test/good": 6, "test/hole": 4}.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_folder(root / name, normal(count, number))
    (root / "ground_truth/hole").mkdir(parents=True)
    for i in range(4):
        image, mask, place = normal(1, 9)[0], np.zeros((32, 32), np.uint8), 14 if i == 0 else 0
        image[place : place + 4, 14:18] = 250
        mask[place : place + 4, 14:18] = 255
        write_image(root / f"test/hole/{i}.png", image)
        write_image(root / f"ground_truth/hole/{i}_mask.png", mask)
    return root


def test_what_the_crop_hides_is_said_and_counts(folder):
    hides = "on 3 of 4 flawed images all that is marked lies outside the crop"
    with pytest.warns(UserWarning, match=hides), pytest.warns(UserWarning, match="the crop cuts off"):
        [run] = evaluate(folder, resize=None, crop=16, **OPTIONS)
    loses = "the 4 marked regions become 1, and 3 of 4 flawed images keep no mark"
    with pytest.warns(UserWarning, match=loses), pytest.warns(UserWarning, match="the crop cuts off"):
        [seen] = evaluate(folder, resize=None, crop=16, pixels="model", **OPTIONS)
    assert run.metrics.pixel_auroc < 0.9 < seen.metrics.pixel_auroc
    assert (run.metrics.pixels, run.metrics.regions, seen.metrics.pixels, seen.metrics.regions) == (
        "mask",
        4,
        "model",
        1,
    )
    assert run.inspection.masks.shape == (10, 16, 16)
    np.testing.assert_array_equal(run.inspection.maps, seen.inspection.maps)
    [whole] = evaluate(folder, resize=None, crop=None, **OPTIONS)
    assert whole.metrics.pixel_auroc > 0.9
    assert whole.metrics == judge(whole.inspection, pixels="mask")


def test_runs_share_the_ground_truth(folder, monkeypatch):
    reads = []
    read = ground_truth.read_sample_marks
    monkeypatch.setattr(ground_truth, "read_sample_marks", lambda sample: reads.append(sample) or read(sample))
    runs = evaluate(folder, resize=None, crop=None, seeds=(0, 1), **OPTIONS)
    assert len(reads) == 10
    assert runs[0].inspection.truth is runs[1].inspection.truth


def test_memory_for_pixels_is_looked_at_before_any_work(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(ground_truth, "require_memory", lambda needed, *_: asked.append(needed))
    evaluate(folder, resize=None, crop=None, **OPTIONS)
    assert asked == [24 * 10 * 32 * 32]  # of 10 images, as measured on many
    monkeypatch.undo()
    monkeypatch.setattr(PatchCore, "fit", None)
    monkeypatch.setattr(ground_truth, "measure_mask", None)
    monkeypatch.setattr(metrics, "pixel_memory", lambda pixels: pixels << 40)
    with pytest.raises(MemoryError, match=r"judging 10,240 pixels of 10 test images takes .* pixels=\"model\""):
        evaluate(folder, **OPTIONS)
    monkeypatch.undo()
    monkeypatch.setattr(PatchCore, "fit", None)
    monkeypatch.setattr(ground_truth, "require_memory", None)
    with pytest.raises(TypeError, match="not callable"):  # the fit that is not there
        evaluate(folder, pixels="model", **OPTIONS)


@pytest.mark.parametrize(("name", "bad"), [("pixels", "masks"), ("fpr_limit", 0), ("fpr_limit", 1.5)])
def test_wrong_choices_are_named(folder, name, bad):
    with pytest.raises(ValueError, match=f"{name} must be"):
        evaluate(folder, **{name: bad}, **OPTIONS)


def test_the_limit_of_pro_is_the_callers(folder):
    [run] = evaluate(folder, resize=None, crop=None, fpr_limit=0.05, **OPTIONS)
    marks = run.inspection.truth.marks
    expected = metrics.pro([mark.anomalous for mark in marks], list(run.inspection.maps), 0.05)
    assert run.metrics.pro == run.kinds[0].pro == expected
    assert run.metrics.fpr_limit == 0.05
    assert expected != metrics.pro([mark.anomalous for mark in marks], list(run.inspection.maps))


def run(*arguments):
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_the_command_line_chooses_pixels_and_metrics(folder):
    tiny = ["--backbone", "efficientnet_lite0", "--coreset", "8", "--resize", "none", "--crop", "16"]
    result = run("evaluate", folder, *tiny, "--metrics", "pixel_f1", "--metrics", "aupimo")
    table = result.stdout.split("Milliseconds")[0]
    assert "F1" in table
    assert "AUPIMO" in table
    assert "AUROC" not in table
    assert "Pixels are those of the masks." in result.stdout
    assert "warning: set: on 3 of 4 flawed images" in result.stderr
    options = ["--pixels", "model", "--fpr-limit", "0.1", "--metrics", "all", "--json"]
    result = run("evaluate", folder, *tiny, *options)
    assert "--pixels model, the 4 marked regions become 1" in result.stderr
    [one] = json.loads(result.stdout)["runs"]
    found = one["metrics"]
    assert {name for name in COLUMNS if name not in found} == set()
    assert (found["regions"], found["marked_regions"], found["unseen_flaws"], found["fpr_limit"]) == (1, 4, 3, 0.1)
    assert found["reasons"] == {"part_auroc": "no parts", "aupimo": "too few normal pixels"}
    assert {name for name, value in found.items() if value is None} == set(found["reasons"])
    low, high = found["image_auroc_interval"]
    assert low <= found["image_auroc"] <= high


def test_a_reason_stands_where_the_dash_stood(folder):
    for image in (folder / "test/good").iterdir():
        image.unlink()
    (folder / "test/good").rmdir()
    tiny = ["--backbone", "efficientnet_lite0", "--coreset", "8", "--resize", "32x32", "--crop", "none"]
    out = run("evaluate", folder, *tiny).stdout
    row = next(line for line in out.splitlines() if line.startswith("set "))
    assert row.count("no good images") == 4
    pixel_auroc, pro = map(float, row.split("no good images")[2].split())
    assert 0 < pro < pixel_auroc < 1


def test_the_option_metrics_offers_the_columns_there_are():
    [option] = [option for option in cli.evaluate.params if option.name == "metrics"]
    assert tuple(option.type.choices) == ("all", *COLUMNS)
