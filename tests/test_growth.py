"""A fitted detector learns more, and two become one, within the budget and without the images learnt from before."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, replace

import numpy as np
import oracle
import pytest
from detectors import detector, flawed, network, normal, pyramid, same, write_folder
from test_detector import features_of, snapshot
from test_saved_models import DATA, brightness

from patchcore_rs import PatchCore, greedy_coreset
from patchcore_rs.detector.estimator import NotFittedError
from patchcore_rs.model.description import Training
from patchcore_rs.model.file import read_model, write_model

FIRST, MORE = normal(6), normal(5, 8)
ALL = np.concatenate([FIRST, MORE])


def patches(model, images):
    """The images' patch features, as the model's backbone gives them; standardised where it standardises."""
    whole = detector(coreset=None).fit(images).memory_bank_.features
    if model.settings_.standardize:
        whole = (whole - model._fitted.learned.mean) / model._fitted.learned.deviation
    return whole


def cover(model, images):
    """The largest distance of one of the images' patches to the bank."""
    return math.sqrt(oracle.squared_distances(patches(model, images), model.memory_bank_.features).min(axis=1).max())


def test_the_patches_of_these_tests_are_the_definitions():
    np.testing.assert_allclose(
        patches(detector().fit(FIRST), ALL), features_of(ALL).reshape(-1, 9), rtol=1e-5, atol=1e-6
    )


# --- partial_fit -------------------------------------------------------------------------------------------


def test_on_an_unfitted_detector_it_is_fit():
    model, expected = detector(), detector().fit(FIRST)
    assert model.partial_fit(FIRST) is model
    np.testing.assert_array_equal(model.memory_bank_.features, expected.memory_bank_.features)
    assert model.training_ == expected.training_


def test_without_a_budget_it_is_a_fit_to_all():
    model = detector(coreset=None).fit(FIRST).partial_fit(MORE)
    expected = detector(coreset=None).fit(ALL)
    np.testing.assert_array_equal(model.memory_bank_.features, expected.memory_bank_.features)
    assert model.training_ == expected.training_ == Training(11, 704, 0.0)
    test = np.concatenate([normal(2, 3), flawed(2)])
    same(model.predict(test), expected.predict(test))


@pytest.mark.parametrize(("coreset", "rows"), [(30, 30), (0.1, 70), (0.03, 21), (1.0, 704)])
@pytest.mark.parametrize("options", [{}, {"standardize": True}, {"start": 3, "seed": 5}], ids=str)
def test_the_bank_is_the_greedy_selection_from_the_old_one_and_the_new_patches(coreset, rows, options):
    model = detector(coreset=coreset, **options).fit(FIRST)
    mean, bank, before = model._fitted.learned.mean, model.memory_bank_.features, model.training_
    assert before.cover == cover(model, FIRST)
    candidates = np.concatenate([bank, patches(model, MORE)])
    assert model.partial_fit(MORE) is model
    picks, radii = oracle.greedy(candidates, rows, start=0)
    np.testing.assert_array_equal(model.memory_bank_.features, candidates[picks])
    assert model._fitted.learned.mean is mean
    # The cover is the sum of two radii, and holds.
    training = model.training_
    assert (training.images, training.patches) == (11, 704)
    assert cover(model, ALL) <= training.cover
    assert training.cover == pytest.approx(before.cover + radii[-1], rel=1e-12)
    model.partial_fit(normal(1, 20))
    assert cover(model, np.concatenate([ALL, normal(1, 20)])) <= model.training_.cover


def test_what_the_bank_covers_already_changes_nothing():
    model = detector(coreset=40).fit(FIRST)
    before = model.memory_bank_.features
    model.partial_fit(FIRST[:3]).partial_fit(FIRST)
    found = model.memory_bank_.features
    assert found[0].tobytes() == before[0].tobytes()
    whole = detector(coreset=1.0).fit(FIRST)
    rows = whole.memory_bank_.features
    np.testing.assert_array_equal(whole.partial_fit(FIRST).memory_bank_.features, rows)
    assert (whole.training_.cover, whole.training_.patches) == (0.0, 768)


@pytest.mark.parametrize(
    "options",
    [{"coreset_method": "random"}, {"projection": 4}, {"start": "mean"}, {"profile": "amazon", "embedding": "concat"}],
    ids=str,
)
def test_where_the_cover_is_not_known_none_is_claimed(options):
    model = detector(coreset=0.2, **options).fit(FIRST)
    assert model.training_ == Training(6, 384, None)
    assert len(model.partial_fit(MORE).memory_bank_) == 140
    assert model.training_ == Training(11, 704, None)
    rows = set(map(bytes, np.concatenate([patches(model, FIRST), patches(model, MORE)])))
    assert set(map(bytes, model.memory_bank_.features)) <= rows


def test_a_random_bank_keeps_shares():
    model = detector(coreset=0.25, coreset_method="random").fit(FIRST)
    old = set(map(bytes, model.memory_bank_.features))
    kept = [bytes(row) in old for row in model.partial_fit(MORE).memory_bank_.features]
    assert (sum(kept), len(kept)) == (96, 176)  # a quarter of 384 and of 704
    model = detector(coreset=100, coreset_method="random").fit(FIRST)
    old = set(map(bytes, model.memory_bank_.features))
    kept = [bytes(row) in old for row in model.partial_fit(MORE).memory_bank_.features]
    assert (sum(kept), len(kept)) == (round(100 * 384 / 704), 100)


def test_an_approximate_index_is_built_again():
    pytest.importorskip("faiss", reason="faiss-cpu is not installed (pip install patchcore-rs[faiss])")
    model = detector(index="ivfpq", coreset=None, threads=1).fit(normal(10))
    before = model._fitted.learned.index
    model.partial_fit(MORE)
    assert model._fitted.learned.index is not before
    expected = detector(index="ivfpq", coreset=None, threads=1).fit(np.concatenate([normal(10), MORE]))
    same(model.predict(flawed(3)), expected.predict(flawed(3)))


def test_a_threshold_does_not_outlive_its_bank():
    model = detector().fit(FIRST).calibrate(normal(10, 4), false_alarm_rate=0.2)
    with pytest.warns(UserWarning, match=r"threshold does not hold .* call calibrate\(normal_images\)") as caught:
        model.partial_fit(MORE)
    assert [warning.filename for warning in caught] == [__file__]
    assert (model.threshold_, model.calibration_) == (None, None)
    assert model.predict(MORE).labels is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.partial_fit(MORE)


def test_stages_are_timed_and_progress_is_told():
    model = detector(batch_size=2).fit(FIRST)
    before, calls = dict(model.timings_), []
    model.partial_fit(MORE, progress=lambda *call: calls.append(call))
    assert [call for call in calls if call[0] == "features"] == [("features", n, 5) for n in (2, 4, 5)]
    assert calls[-1] == ("coreset", 70, 70)
    assert all(model.timings_[stage] > before[stage] for stage in ("backbone", "aggregation", "coreset"))


# --- Faults ------------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated():
    return detector().fit(FIRST).calibrate(normal(10, 4), false_alarm_rate=0.2)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "there are no images"),
        (42, TypeError, "images must be a folder"),
        ([np.zeros((40, 32, 3), np.uint8)], ValueError, r"images\[0\]: 40 x 32 pixels .* where 32 x 32 is expected"),
        ([MORE[0], MORE[1].astype(float) / 99], ValueError, r"images\[1\]: .* must lie in \[0, 1\]"),
    ],
)
def test_a_failing_call_changes_nothing(images, error, message, calibrated):
    before = snapshot(calibrated)
    with pytest.raises(error, match=message):
        calibrated.partial_fit(images)
    assert snapshot(calibrated) == before


@pytest.mark.parametrize("stage", ["features", "coreset"])
def test_an_interrupted_call_changes_nothing(stage, calibrated):
    def interrupt(current, done, total):
        if current == stage:
            raise KeyboardInterrupt

    before = snapshot(calibrated)
    with pytest.raises(KeyboardInterrupt):
        calibrated.partial_fit(MORE, progress=interrupt)
    assert snapshot(calibrated) == before


def test_too_little_memory_is_said_before_it_is_taken(monkeypatch, calibrated):
    before = snapshot(calibrated)
    monkeypatch.setattr("patchcore_rs._limits.available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"for 358 patches of 9 float32 channels"):
        calibrated.partial_fit(MORE)
    assert snapshot(calibrated) == before


def test_images_that_cannot_be_read_are_skipped_with_a_report(tmp_path):
    folder = write_folder(tmp_path / "images", MORE)
    (folder / "1.png").write_bytes(b"")
    model = detector().fit(FIRST)
    with pytest.warns(UserWarning, match=r"1 of 5 images were left out; the first: .*1\.png") as caught:
        model.partial_fit(folder, on_error="skip")
    assert [warning.filename for warning in caught] == [__file__]
    assert model.training_.images == 10
    assert len(model.skipped_) == 1
    for path in folder.iterdir():
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="5 of 5 images"),
        pytest.raises(ValueError, match="none of the 5 images can be read"),
    ):
        model.partial_fit(folder, on_error="skip")


# --- Model files -------------------------------------------------------------------------------------------


def test_a_saved_detector_goes_on_where_it_was(tmp_path):
    model = detector(standardize=True).fit(FIRST).partial_fit(MORE)
    model.save(tmp_path / "model.safetensors")
    loaded = PatchCore.load(tmp_path / "model.safetensors", backbone=pyramid)
    assert loaded.training_ == model.training_
    for grown in (model, loaded):
        grown.partial_fit(normal(3, 11))
    np.testing.assert_array_equal(loaded.memory_bank_.features, model.memory_bank_.features)
    assert loaded.training_ == model.training_


def test_a_file_of_the_first_format_grows_too(tmp_path):
    with pytest.warns(UserWarning, match="threshold does not hold"):
        model = PatchCore.load(DATA / "model-1.0.safetensors", backbone=brightness).partial_fit(normal(2, 3))
    assert len(model.memory_bank_) == 12
    assert model.training_ == Training(None, 12 + 2 * 16, None)
    model.save(tmp_path / "model.safetensors")
    assert PatchCore.load(tmp_path / "model.safetensors", backbone=brightness).training_ == model.training_


@pytest.mark.parametrize(("coreset", "expected"), [(0.1, 380), (None, 38), (38, 38), (5e-324, 2**62)])
def test_what_such_a_file_implies(coreset, expected):
    assert Training.from_json(None, 38, coreset) == Training(None, expected, 0.0 if coreset is None else None)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ([], "training must be an object; got"),
        ({}, "training patches must be an integer >= 38, as the arrays come from no fewer; got None"),
        ({"images": 0}, "training images must be an integer >= 1 or null; got 0"),
        ({"images": 2**63}, "training images must be an integer >= 1 or null"),
        ({"patches": 37}, "training patches must be an integer >= 38"),
        ({"patches": 1e3}, "training patches must be an integer >= 38"),
        ({"cover": -1}, "training cover must be a number >= 0 or null; got -1"),
        ({"cover": "1"}, "training cover must be a number"),
    ],
)
def test_a_hostile_record_is_refused(stored, message, tmp_path):
    path = tmp_path / "model.safetensors"
    model = detector().fit(FIRST)
    model.save(path)
    good = read_model(path)
    assert (
        good.metadata["training"]
        == asdict(model.training_)
        == {"images": 6, "patches": 384, "cover": cover(model, FIRST)}
    )
    bad = stored if stored in ([], {}) else good.metadata["training"] | stored
    write_model(path, replace(good, metadata=good.metadata | {"training": bad}))
    with pytest.raises(ValueError, match=message):
        PatchCore.load(path, backbone=pyramid)


# --- merge -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coreset", [50, 0.1, None])
def test_a_merge_is_a_selection_from_both_banks(coreset):
    ours, theirs = detector(coreset=coreset).fit(FIRST), detector(coreset=0.3, seed=4).fit(MORE)
    before = snapshot(ours), snapshot(theirs)
    merged = ours.merge(theirs)
    assert (snapshot(ours), snapshot(theirs)) == before
    candidates = np.concatenate([ours.memory_bank_.features, theirs.memory_bank_.features])
    count = {50: 50, 0.1: 70, None: len(candidates)}[coreset]
    rows = slice(None) if coreset is None else greedy_coreset(candidates, count, start=0)
    np.testing.assert_array_equal(merged.memory_bank_.features, candidates[rows])
    assert merged.get_params() == ours.get_params()
    assert (merged.training_.images, merged.training_.patches) == (11, 704)
    assert cover(merged, ALL) <= merged.training_.cover
    assert merged.settings_ == ours.settings_
    assert len(merged.predict(MORE)) == 5


def test_copies_of_a_standardised_detector_merge(tmp_path):
    detector(standardize=True).fit(FIRST).save(tmp_path / "model.safetensors")
    one, two = (PatchCore.load(tmp_path / "model.safetensors", backbone=pyramid) for _ in range(2))
    merged = one.partial_fit(MORE).merge(two.partial_fit(normal(4, 9)))
    assert cover(merged, np.concatenate([ALL, normal(4, 9)])) <= merged.training_.cover
    with pytest.raises(ValueError, match="other must have the same mean of its standardised channels"):
        merged.merge(detector(standardize=True).fit(MORE))


DIFFERENT = {
    "backbone": lambda: detector(backbone=network(), layers=("1", "3")).fit(MORE),
    "patch_size": lambda: detector(patch_size=5).fit(MORE),
    "standardize": lambda: detector(standardize=True).fit(MORE),
    "reweight": lambda: detector(reweight=None).fit(MORE),
    "std": lambda: detector(std=(1, 1, 1)).fit(MORE),
    "sigma": lambda: detector(sigma=3).fit(MORE),
    "image_size": lambda: detector().fit(normal(3, size=64)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_detectors_that_differ_do_not_merge(name):
    with pytest.raises(ValueError, match=f"other must have the same {name}, .*; got .* can be merged"):
        detector().fit(FIRST).merge(DIFFERENT[name]())


def test_other_weights_do_not_merge():
    ours, theirs = (detector(backbone=network(seed), layers=("1", "3")).fit(FIRST) for seed in (0, 1))
    with pytest.raises(ValueError, match="other must have the same weights_sha256"):
        ours.merge(theirs)


def test_what_merges_is_checked(calibrated):
    with pytest.raises(TypeError, match="other must be a PatchCore; got MemoryBank"):
        calibrated.merge(calibrated.memory_bank_)
    with pytest.raises(NotFittedError, match=r"other has no memory bank yet; call its fit\(images\) first"):
        calibrated.merge(detector())
    with pytest.raises(NotFittedError, match="this PatchCore has no memory bank"):
        detector().merge(calibrated)
    with pytest.warns(UserWarning, match="threshold does not hold") as caught:
        merged = calibrated.merge(detector().fit(MORE))
    assert [warning.filename for warning in caught] == [__file__]
    assert merged.threshold_ is None
    assert calibrated.threshold_ is not None
