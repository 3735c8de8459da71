"""Several coresets and seeds on one data set: the backbone passed once, and the numbers of fits made one by one."""

from __future__ import annotations

import weakref

import numpy as np
import oracle_metrics
import pytest
from detectors import detector, flawed, normal, pyramid, write_folder

import patchcore_rs
from patchcore_rs import PatchCore, Run, evaluate, load_dataset, metrics
from patchcore_rs.evaluation.inspection import Inspection, inspect
from patchcore_rs.evaluation.judging import judge, judge_kinds
from patchcore_rs.images.files import write_image

OPTIONS = {"backbone": pyramid, "resize": None, "crop": None}
COUNTS = {"train/good": 6, "test/good": 4, "test/hole": 4}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "set"
    for number, (name, count) in enumerate(COUNTS.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_folder(root / name, (flawed if name == "test/hole" else normal)(count, number))
    return root


class Counting:
    """A backbone that counts the images it sees."""

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return pyramid(images)


def numbers(run):
    return run.metrics, run.kinds, run.bank, run.settings.coreset, run.settings.seed


def test_the_backbone_is_passed_once_for_all_runs(folder):
    backbone = Counting()
    runs = evaluate(folder, coresets=(0.1, 20, None), seeds=(0, 1), **OPTIONS | {"backbone": backbone})
    assert backbone.seen == sum(COUNTS.values())
    assert [(run.settings.coreset, run.settings.seed) for run in runs] == [
        (coreset, seed) for coreset in (0.1, 20, None) for seed in (0, 1)
    ]
    dataset = load_dataset(folder)
    for run in runs:
        assert isinstance(run, Run)
        alone = detector(coreset=run.settings.coreset, seed=run.settings.seed).fit(dataset)
        inspection = inspect(alone, dataset)
        np.testing.assert_array_equal(run.inspection.scores, inspection.scores)
        np.testing.assert_array_equal(run.inspection.maps, inspection.maps)
        assert run.metrics == judge(inspection)
        assert run.bank == alone.memory_bank_.shape
        assert run.backbone == "Counting"
        assert run.trained_on == 6
        assert set(run.fit_seconds) == set(run.inspect_seconds) == {"backbone", "aggregation", "coreset", "scoring"}
        assert run.fit_seconds["backbone"] > 0 < run.inspect_seconds["backbone"]
        assert run.inspect_seconds["scoring"] > 0 == run.inspect_seconds["coreset"]


def test_one_run_is_what_it_is_among_others(folder):
    [alone] = evaluate(load_dataset(folder), coresets=[20], seeds=[1], **OPTIONS)
    among = evaluate(folder, coresets=(20, None), seeds=(1,), **OPTIONS)[0]
    assert numbers(alone) == numbers(among)
    np.testing.assert_array_equal(alone.inspection.maps, among.inspection.maps)


def test_progress_goes_by_in_stages(folder):
    seen = []
    evaluate(folder, coresets=(10, 20), progress=lambda *call: seen.append(call), **OPTIONS)
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["features", "test features", "coreset", "metrics"]
    assert [call for call in seen if call[0] == "metrics"] == [
        ("metrics", 0, None),
        ("metrics", 1, 2),
        ("metrics", 2, 2),
    ] * 2
    assert ("features", 6, 6) in seen
    assert ("test features", 8, 8) in seen
    assert ("coreset", 20, 20) in seen


@pytest.mark.parametrize("room", [0, 1, 2])
def test_features_that_do_not_fit_are_read_again_and_it_says_so(folder, monkeypatch, room):
    """With room for no features kept, for the training features, or for both until the fit."""
    expected = list(map(numbers, evaluate(folder, coresets=(10, 20), **OPTIONS)))
    extract, fit_features, calls = PatchCore.extract, PatchCore.fit_features, []

    def limited(model, images, **options):
        calls.append("extract")
        if len(calls) > room:
            raise MemoryError("no room")
        return extract(model, images, **options)

    def failing(model, features, **options):
        if room == 2 and "failed" not in calls:
            calls.append("failed")
            raise MemoryError("no room")
        return fit_features(model, features, **options)

    monkeypatch.setattr(PatchCore, "extract", limited)
    monkeypatch.setattr(PatchCore, "fit_features", failing)
    with pytest.warns(UserWarning, match="are not kept, and computed anew for each run: no room") as caught:
        found = list(map(numbers, evaluate(folder, coresets=(10, 20), **OPTIONS)))
    assert found == expected
    assert len(caught) == (2 if room == 0 else 1)


def test_features_that_are_given_up_free_their_memory(folder, monkeypatch):
    kept, alive = [], []
    extract, fit_features = PatchCore.extract, PatchCore.fit_features

    def watched(model, images, **options):
        features = extract(model, images, **options)
        kept.append(weakref.ref(features))
        return features

    def failing(model, features, **options):
        alive.append([each() is not None for each in kept])
        if len(alive) == 1:
            raise MemoryError("no room")
        return fit_features(model, features, **options)

    monkeypatch.setattr(PatchCore, "extract", watched)
    monkeypatch.setattr(PatchCore, "fit_features", failing)
    with pytest.warns(UserWarning, match="the test features are not kept"):
        evaluate(folder, coresets=(10, 20), **OPTIONS)
    assert alive == [[True, True], [True, False], [True, False]]


def test_too_little_memory_for_any_fit_is_an_error(folder, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(PatchCore, "fit", fail)
    monkeypatch.setattr(PatchCore, "extract", fail)
    with pytest.warns(UserWarning, match="not kept"), pytest.raises(MemoryError, match="no room"):
        evaluate(folder, coresets=(10, 20), **OPTIONS)


@pytest.mark.parametrize("coresets", [(20,), (20, None)])
def test_unreadable_images_are_left_out_on_request(folder, coresets):
    (folder / "train/good/0.png").write_bytes(b"")
    (folder / "test/hole/1.png").write_bytes(b"")
    with pytest.raises(patchcore_rs.ImageError, match="the file is empty"):
        evaluate(folder, coresets=coresets, **OPTIONS)
    with pytest.warns(UserWarning, match="images were left out"):
        runs = evaluate(folder, coresets=coresets, on_error="skip", **OPTIONS)
    for run in runs:
        assert (run.metrics.good, run.metrics.anomalous, run.trained_on) == (4, 3, 5)
        assert "1.png" not in [
            path.name for path, kind in zip(run.inspection.paths, run.inspection.kinds, strict=True) if kind == "hole"
        ]


def test_wrong_arguments_are_named(folder):
    with pytest.raises(TypeError, match=r"coreset must be given as coresets=\(\.\.\.\)"):
        evaluate(folder, coreset=0.1, **OPTIONS)
    with pytest.raises(TypeError, match=r"seed must be given as seeds=\(\.\.\.\)"):
        evaluate(folder, seed=1, **OPTIONS)
    with pytest.raises(TypeError, match="corset"):
        evaluate(folder, corset=1, **OPTIONS)
    with pytest.raises(ValueError, match="coresets and seeds must hold at least one value each"):
        evaluate(folder, coresets=(), **OPTIONS)
    with pytest.raises(ValueError, match="no test images"):
        evaluate(folder / "train", **OPTIONS)


def write_masks(folder, masks):
    for i, mask in enumerate(masks):
        (folder / "masks/hole").mkdir(parents=True, exist_ok=True)
        write_image(folder / f"masks/hole/{i}.png", mask)


HOLE = np.zeros((32, 32), np.uint8)
HOLE[8:20, 4:16] = 255


@pytest.mark.parametrize("seed", range(3))
def test_ignored_pixels_count_in_no_pixel_metric(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((4, 8, 9)) < 0.2
    masks[:2] = False
    ignored = ~masks & (rng.random(masks.shape) < 0.3)
    ignored[1] = True
    maps = rng.integers(0, 9, masks.shape).astype(np.float32)
    maps[ignored] += 5  # they would be false alarms
    scores, labels = rng.random(4), np.array([0, 0, 1, 1], np.uint8)
    kinds = ("good", "good", "hole", "hole")
    inspection = Inspection("set", (), scores, maps, kinds, labels, masks, ignored=ignored)
    found = judge(inspection)
    assert found.pixel_auroc == pytest.approx(oracle_metrics.roc_auc(masks[~ignored], maps[~ignored]), abs=1e-12)
    assert found.pro == pytest.approx(oracle_metrics.pro(masks, maps, 0.3, ignored), abs=1e-12)
    [kind] = judge_kinds(inspection, 0.5)
    assert (kind.pixel_auroc, kind.pro) == (found.pixel_auroc, found.pro)


def test_flawed_images_with_black_masks_count_but_their_pixels_do_not(folder):
    write_masks(folder, [HOLE, HOLE * 0, HOLE, HOLE * 0])
    with pytest.warns(UserWarning, match=r"2 of 4 masks of flawed images mark nothing: .*1\.png, .*3\.png; these"):
        [run] = evaluate(folder, coresets=[20], **OPTIONS)
    assert (run.metrics.good, run.metrics.anomalous) == (4, 4)
    rows = [i for i, path in enumerate(run.inspection.paths) if path.parent.name == "good" or path.stem in {"0", "2"}]
    masks, maps = run.inspection.masks[rows], run.inspection.maps[rows]
    assert run.metrics.pixel_auroc == pytest.approx(oracle_metrics.roc_auc(masks.ravel(), maps.ravel()), abs=1e-12)
    assert run.metrics.pro == pytest.approx(metrics.pro(masks, maps), abs=1e-12)


def test_pixels_to_ignore_are_left_out_of_an_evaluation(folder):
    edge = HOLE.copy()
    edge[20:24, 4:16] = 128
    write_masks(folder, [edge] * 4)
    [run] = evaluate(load_dataset(folder, ignore=128), coresets=[20], **OPTIONS)
    assert run.inspection.ignored.sum() == 4 * 4 * 12
    assert run.inspection.masks.sum() == 4 * 12 * 12
    kept = ~run.inspection.ignored
    expected = oracle_metrics.roc_auc(run.inspection.masks[kept], run.inspection.maps[kept])
    assert run.metrics.pixel_auroc == pytest.approx(expected, abs=1e-12)


def test_inverted_masks_are_refused_before_the_fit(folder, monkeypatch):
    write_masks(folder, [255 - HOLE] * 3 + [HOLE])
    monkeypatch.setattr(PatchCore, "fit", None)
    with pytest.raises(ValueError, match="more than half of the image is marked in 3 of 4 masks, so they seem to be"):
        evaluate(folder, coresets=[20], **OPTIONS)
