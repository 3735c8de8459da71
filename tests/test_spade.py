"""SPADE: its scores are the definition's, whatever the batches, and the file it saves gives them again."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from detectors import flawed, normal, pyramid, same

import patchcore_rs
from patchcore_rs import SPADE, FeatureSet, ModelFileError, NotFittedError, PatchCore, _limits
from patchcore_rs.detector.method import sample_images
from patchcore_rs.model.file import ModelFile, read_model, write_model

GRID = (3, 5)
PATCHES, WIDTH, LAST = 15, 7, 4


def spade(**options):
    return SPADE(**{"backbone": pyramid, "resize": None, "crop": None, "neighbours": 3} | options)


def feature_set(images, seed=0, *, widths=(3, WIDTH - 3, LAST), **options):
    """Features of one's own: what 3 layers of a grid of 3 x 5 might be."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(images, 1, WIDTH + LAST))
    values = centres + rng.normal(size=(images, PATCHES, WIDTH + LAST))
    rows = values.reshape(-1, WIDTH + LAST).astype(np.float32)
    return FeatureSet(rows, GRID, (12, 20), layer_widths=widths, **options)


def as_images(features, *, both=False):
    """Each image's patches, and its columns of the last layer."""
    images = features.features.reshape(len(features), PATCHES, -1)
    return [(image, image) if both else (image[:, :WIDTH], image[:, WIDTH:]) for image in images]


def learned(model):
    return model._fitted.learned


# --- Scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("neighbours", "kappa"), [(1, 1), (4, 1), (4, 5), (20, 31)])
def test_scores_are_those_of_the_definition(neighbours, kappa):
    train, test = feature_set(20), feature_set(3, 1)
    model = SPADE(neighbours=neighbours, kappa=kappa, sigma=0).fit_features(train)
    scores, patches = learned(model).score(test.features, GRID, None)
    for i, image in enumerate(as_images(test)):
        score, of_patches = oracle.spade(image, as_images(train), neighbours, kappa)
        np.testing.assert_allclose(scores[i], score, rtol=1e-6)
        np.testing.assert_allclose(patches[i].ravel(), of_patches, rtol=1e-6)
    assert np.array_equal(model.predict_features(test).scores, scores)


@pytest.mark.parametrize("widths", [None, (WIDTH + LAST,)])
def test_one_layer_serves_for_images_and_patches(widths):
    train, test = feature_set(9, widths=widths), feature_set(2, 1, widths=widths)
    model = SPADE(neighbours=2).fit_features(train)
    assert model.memory_bank_.shape == (9 * PATCHES, WIDTH + LAST)
    scores, patches = learned(model).score(test.features, GRID, None)
    for i, image in enumerate(as_images(test, both=True)):
        score, of_patches = oracle.spade(image, as_images(train, both=True), 2, 1)
        np.testing.assert_allclose(scores[i], score, rtol=1e-6)
        np.testing.assert_allclose(patches[i].ravel(), of_patches, rtol=1e-6)


def test_a_patch_is_compared_with_the_nearest_images_alone():
    # The first image is far by its last layer and has the patches of the test image; the second is near by its last.
    train, test = feature_set(2), feature_set(1, 1)
    rows = train.features.copy()
    rows[:PATCHES] = test.features
    rows[:PATCHES, WIDTH:] += 100
    rows[PATCHES:, WIDTH:] = test.features[:, WIDTH:]
    model = SPADE(neighbours=1).fit_features(FeatureSet(rows, GRID, (12, 20), layer_widths=(WIDTH, LAST)))
    scores, patches = learned(model).score(test.features, GRID, None)
    assert scores[0] == 0
    assert patches.min() > 0


def test_flaws_score_higher_than_what_is_normal():
    model = spade().fit(normal(12)).calibrate(normal(20, 3), false_alarm_rate=0.1)
    result = model.predict(np.concatenate([normal(4, 8), flawed(3)]))
    assert result.labels.tolist() == [0] * 4 + [1] * 3
    assert result.maps.shape == (7, 32, 32)
    assert result.maps[4:, 8:20, 4:16].mean() > 5 * result.maps[:4].mean()


def test_an_image_scores_alike_in_any_batch():
    model = spade().fit(normal(7))
    images = np.concatenate([normal(3, 1), flawed(2)])
    whole = model.predict(images)
    for size in (1, 2):
        model.batch_size = size
        same(model.predict(images), whole)
    model.threads = 1
    same(model.predict_features(model.extract(images)), whole)


# --- Fitting -----------------------------------------------------------------------------------------------


def test_batch_after_batch_learns_what_all_at_once_does():
    images, test = normal(11), flawed(2)
    whole = spade(batch_size=11).fit(images)
    for size in (1, 4):
        parts = spade(batch_size=size).fit(images)
        for name, array in learned(whole).arrays.items():
            assert np.array_equal(learned(parts).arrays[name], array)
        assert np.array_equal(learned(parts).normal_scores, learned(whole).normal_scores)
        same(parts.predict(test), whole.predict(test))
    model = spade()
    same(model.fit_features(model.extract(images)).predict(test), whole.predict(test))
    assert whole.memory_bank_.shape == (11 * 64, 6)  # the patch columns alone
    assert whole.memory_bank_.groups.tolist() == [64] * 11
    assert whole.summary_ == "11 images of 704 patches of 6 channels"
    assert (whole.training_.images, whole.training_.patches, whole.training_.cover) == (11, 704, None)


def test_fit_tells_how_far_it_is():
    calls = []
    model = spade().fit(normal(9), progress=lambda *call: calls.append(call))
    assert calls == [("features", 8, 9), ("features", 9, 9), ("model", 9, 9)]
    assert list(model.timings_) == ["backbone", "aggregation", "model", "scoring"]


def test_fewer_images_and_patches_than_asked_for_are_all_taken():
    train, test = feature_set(4), feature_set(2, 1)
    with pytest.warns(UserWarning, match=r"^neighbours=50 exceeds the 4 training images; SPADE takes 4 instead$"):
        model = SPADE().fit_features(train)
    exact = SPADE(neighbours=4).fit_features(train)
    same(model.predict_features(test), exact.predict_features(test))
    assert model.settings_.neighbours == 50
    with pytest.warns(UserWarning, match=r"^kappa=31 exceeds the 30 patches of the nearest images; SPADE takes 30 "):
        model = SPADE(neighbours=2, kappa=31).fit_features(train)
    exact = SPADE(neighbours=2, kappa=30).fit_features(train)
    same(model.predict_features(test), exact.predict_features(test))


@pytest.mark.parametrize("twins", [0, 4])
def test_training_images_are_scored_by_the_others(twins):
    train = feature_set(7)
    rows = train.features.copy()
    rows[: twins * PATCHES] = np.tile(rows[:PATCHES], (twins, 1))  # images that are the same
    train = FeatureSet(rows, GRID, (12, 20), layer_widths=(WIDTH, LAST))
    model = SPADE(neighbours=3).fit_features(train)
    images = as_images(train)
    sampled = sample_images(7, PATCHES)
    assert len(sampled) == 1
    own = int(sampled[0])
    expected = oracle.spade(images[own], images[:own] + images[own + 1 :], 3, 1)[1]
    found = learned(model).normal_scores
    assert found.shape == (1, *GRID)
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-6)
    assert (found.max() == 0) == (own < twins)


def test_a_single_image_says_nothing_of_others():
    model = SPADE(neighbours=1).fit_features(feature_set(1))
    assert learned(model).normal_scores is None
    assert model.predict_features(feature_set(2, 1)).map_scale is None


def test_a_failing_fit_changes_nothing():
    model = spade().fit(normal(5))
    before = model.predict(flawed(1))
    with pytest.raises(ValueError, match="neighbours must be an integer from 1 to 65536; got 0"):
        model.set_params(neighbours=0).fit(normal(6))
    rows = feature_set(3).features.copy()
    rows[4, 2] = np.nan
    model.set_params(neighbours=2)
    with pytest.raises(ValueError, match="every value must be finite"):
        model.fit_features(FeatureSet(rows, GRID, (12, 20)))
    same(model.predict(flawed(1)), before)
    with pytest.raises(NotFittedError):
        spade().predict(normal(1))


def test_memory_is_asked_about_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(_limits, "available_memory", lambda: 10_000)
    with pytest.raises(MemoryError, match=r"^fit takes about 0.00 GB for 320 patches of 6 float32 channels .* layers="):
        spade().fit(normal(5))


def test_features_of_another_width_are_refused():
    model = SPADE(neighbours=2).fit_features(feature_set(3))
    narrow = FeatureSet(feature_set(1).features[:, 1:], GRID, (12, 20))
    with pytest.raises(ValueError, match=r"^features must have 7 columns of patches and 4 of images, .*; got 10$"):
        model.predict_features(narrow)


def test_half_and_double_the_columns_are_another_width(tmp_path):
    """Where patches and images have as many columns, one layer for both is not two layers."""
    rows = np.random.default_rng(0).normal(size=(4 * PATCHES, 8)).astype(np.float32)
    sets = {
        (8,): FeatureSet(rows, GRID, (12, 20), layer_widths=(8,)),
        (8, 8): FeatureSet(np.tile(rows, 2), GRID, (12, 20), layer_widths=(3, 5, 8)),
    }
    for widths, other in (((8,), (8, 8)), ((8, 8), (8,))):
        model = SPADE(neighbours=2).fit_features(sets[widths])
        assert learned(model).arrays["widths"].tolist() == list(widths)
        model.save(tmp_path / "model.spade")
        of = "8 columns of patches and 8 of images" if len(widths) == 2 else "8 columns"
        for detector in (model, patchcore_rs.load(tmp_path / "model.spade")):
            with pytest.raises(ValueError, match=rf"^features must have {of}, as those .*; got {sum(other)}$"):
                detector.predict_features(sets[other])
        same(detector.predict_features(sets[widths]), model.predict_features(sets[widths]))


# --- Files -------------------------------------------------------------------------------------------------


def test_a_saved_model_predicts_the_same_to_the_bit(tmp_path):
    path, test = tmp_path / "model.spade", np.concatenate([normal(2, 4), flawed(2)])
    model = spade(kappa=2, sigma=2.0).fit(normal(8)).calibrate(normal(5, 1), false_alarm_rate=0.2)
    model.save(path)
    loaded = patchcore_rs.load(path, backbone=pyramid)
    assert type(loaded) is SPADE
    same(loaded.predict(test), model.predict(test))
    assert loaded.settings_ == model.settings_
    assert (loaded.training_, loaded.calibration_) == (model.training_, model.calibration_)
    again = tmp_path / "again.spade"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(ModelFileError, match="saved by the method 'spade', PatchCore loads 'patchcore'"):
        PatchCore.load(path, backbone=pyramid)
    stored = read_model(path)
    assert {"neighbours", "kappa"} <= set(stored.metadata["requires"])
    assert "coreset" not in stored.metadata["settings"]


def test_a_file_whose_images_have_unequal_shares_of_the_rows_is_refused(tmp_path):
    path = tmp_path / "model.spade"
    spade().fit(normal(4)).save(path)
    stored = read_model(path)
    arrays = dict(stored.arrays) | {"bank": stored.arrays["bank"][:-1]}
    write_model(path, ModelFile("spade", arrays, dict(stored.metadata), {}))
    with pytest.raises(ModelFileError, match="bank must have as many rows for each of the 4 images; got 255"):
        patchcore_rs.load(path, backbone=pyramid)


@pytest.mark.parametrize("widths", [[6], [3, 6], [6, 3, 0], [9]])
def test_a_file_whose_features_have_other_columns_is_refused(widths, tmp_path):
    path = tmp_path / "model.spade"
    spade().fit(normal(4)).save(path)
    stored = read_model(path)
    assert stored.arrays["widths"].tolist() == [6, 3]
    arrays = dict(stored.arrays) | {"widths": np.array(widths)}
    write_model(path, ModelFile("spade", arrays, dict(stored.metadata), {}))
    with pytest.raises(ModelFileError, match=r"widths must be the columns of bank and images, \[6, 3\]; got "):
        patchcore_rs.load(path, backbone=pyramid)


def test_images_that_are_the_same_are_saved(tmp_path):
    model = spade().fit(np.repeat(normal(2), 3, axis=0))
    model.save(tmp_path / "model.spade")
    same(patchcore_rs.load(tmp_path / "model.spade", backbone=pyramid).predict(flawed(1)), model.predict(flawed(1)))
