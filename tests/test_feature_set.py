"""Features apart from images: extracted once, fitted and scored at will, refused where they do not belong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from detectors import detector, flawed, network, normal, same, write_folder

from patchcore_rs import FeatureSet, NotFittedError, PatchCore
from patchcore_rs.images.pixels import image_hash

TRAIN, TEST = normal(8), np.concatenate([normal(3, 5), flawed(3)])
OPTIONS = [{}, {"standardize": True, "coreset": 20}, {"coreset": None, "distance": "squared"}, {"reweight": None}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_features_give_what_their_images_give(options):
    whole = detector(**options).fit(TRAIN)
    apart = detector(**options)
    features = apart.extract(TRAIN)
    held = features.features.copy()
    assert apart.fit_features(features) is apart
    np.testing.assert_array_equal(apart.memory_bank_.features, whole.memory_bank_.features)
    assert apart.settings_ == whole.settings_
    assert apart.training_ == whole.training_
    expected = whole.calibrate(normal(20, 3), false_alarm_rate=0.1).predict(TEST)
    apart.calibrate(normal(20, 3), false_alarm_rate=0.1)
    same(apart.predict(TEST), expected)
    tests = apart.extract(TEST)
    scored = tests.features.copy()
    same(apart.predict_features(tests), expected)
    # What was passed stays as it is, standardised or not.
    np.testing.assert_array_equal(features.features, held)
    np.testing.assert_array_equal(tests.features, scored)


def test_a_set_says_what_it_is(tmp_path):
    folder = write_folder(tmp_path / "images", TRAIN)
    (folder / "3.png").write_bytes(b"")
    model = detector(backbone=network(), layers=("1", "3"))
    seen = []
    with pytest.warns(UserWarning, match="1 of 8 images were left out"):
        features = model.extract(folder, on_error="skip", progress=lambda *call: seen.append(call))
    assert len(features) == 7
    assert features.features.shape == (7 * 64, 24)
    assert (features.grid, features.patches, features.image_size) == ((8, 8), 64, (32, 32))
    assert features.names == tuple(str(folder / f"{i}.png") for i in range(8) if i != 3)
    assert [path.name for path in features.paths] == [f"{i}.png" for i in range(8) if i != 3]
    assert features.backbone == "Sequential"
    assert len(features.weights_hash) == 64
    assert features.image_hashes.tolist() == [image_hash(image) for i, image in enumerate(TRAIN) if i != 3]
    assert {"layers", "resize", "crop", "mean", "patch_size", "view"} <= set(features.extraction)
    assert [name for name, _ in features.skipped] == [str(folder / "3.png")]
    assert set(features.seconds) == {"backbone", "aggregation"}
    assert seen[-1] == ("features", 8, 8)
    assert repr(features) == ("FeatureSet(7 images of 32 x 32 pixels, 8 x 8 patches of 24 channels, Sequential)")
    model.fit_features(features)
    assert model.skipped_ == features.skipped
    assert model.timings_["backbone"] == features.seconds["backbone"]


DIFFERENT = {
    "resize": ({"resize": (32, 32)}, r"resize=\(32, 32\); got None"),
    "patch_size": ({"patch_size": 5}, "patch_size=5; got 3"),
    "embedding": ({"embedding": 8}, "embedding=8; got 'concat'"),
    "std": ({"std": (1.0, 1.0, 1.0)}, r"std=\(1.0, 1.0, 1.0\); got"),
    "resampling": ({"resampling": "tensor"}, "resampling='tensor'; got 'pil'"),
    "backbone": ({"backbone": network(), "layers": ("1", "3")}, "backbone='Sequential'; got 'pyramid'"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_features_of_other_settings_are_refused(case):
    options, reason = DIFFERENT[case]
    features = detector().extract(TRAIN)
    other = detector(**options)
    with pytest.raises(ValueError, match=f"features must have been extracted with {reason}"):
        other.fit_features(features)
    with pytest.raises(NotFittedError):
        other.predict_features(features)
    other.fit(TRAIN)
    with pytest.raises(ValueError, match=f"features must have been extracted with {reason}"):
        other.predict_features(features)


def test_features_of_other_weights_are_refused():
    model = detector(backbone=network(), layers=("1", "3"))
    features = model.extract(TRAIN)
    with pytest.raises(ValueError, match="features must have been extracted with weights_sha256="):
        detector(backbone=network(seed=1), layers=("1", "3")).fit_features(features)


def test_settings_that_change_no_feature_share_features():
    features = detector().extract(TRAIN)
    for options in (
        {"coreset": 10},
        {"seed": 3, "coreset": 10},
        {"reweight": 3},
        {"sigma": 0.0},
        {"standardize": True},
    ):
        model = detector(**options).fit_features(features)
        same(model.predict(TEST), detector(**options).fit(TRAIN).predict(TEST))


def test_one_detector_fits_again_and_again_by_set_params():
    model = detector()
    features, tests = model.extract(TRAIN), model.extract(TEST)
    for coreset in (10, 0.3, None):
        model.set_params(coreset=coreset).fit_features(features)
        same(model.predict_features(tests), detector(coreset=coreset).fit(TRAIN).predict(TEST))


def own(images=4, seed=0, **changes):
    rng = np.random.default_rng(seed)
    given = {"features": rng.normal(size=(images * 6, 5)), "grid": (2, 3), "image_size": (20, 30)}
    return FeatureSet(**given | changes)


def test_features_of_ones_own_need_no_backbone(tmp_path):
    model = PatchCore(coreset=None, backbone="no such network")
    features = own()
    assert features.features.dtype == np.float32
    assert features.names[2] == "images[2]"
    model.fit_features(features)
    assert model.backbone_name_ == ""
    result = model.predict_features(own(2, seed=1))
    assert result.maps.shape == (2, 20, 30)
    assert result.paths == (None, None)
    assert (model.predict_features(features).scores < 1e-6).all()
    with pytest.raises(ValueError, match="fitted on features of your own and has no backbone: call predict_features"):
        model.predict(TEST)
    with pytest.raises(ValueError, match="fitted on features of your own"):
        model.predict_features(detector().extract(TEST))
    with pytest.raises(ValueError, match=r"must be of images of \(20, 30\)"):
        model.predict_features(own(image_size=(20, 31)))
    model.save(tmp_path / "own.safetensors")
    loaded = PatchCore.load(tmp_path / "own.safetensors")
    same(loaded.predict_features(own(2, seed=1)), result)


def test_features_of_another_width_are_refused():
    model = PatchCore(coreset=None).fit_features(own())
    with pytest.raises(ValueError, match=r"5.*4|4.*5"):
        model.predict_features(own(features=np.zeros((12, 4), np.float32)))


WRONG = {
    "no floats": ({"features": np.zeros((6, 5), int)}, TypeError, "features must hold floating-point values"),
    "one axis": ({"features": np.zeros(6)}, ValueError, "features must be a 2-D array"),
    "no whole image": ({"features": np.zeros((7, 5))}, ValueError, "a multiple of 2 x 3 rows.* got 7"),
    "grid of one": ({"grid": (2,)}, ValueError, "grid must be a pair"),
    "grid of floats": ({"grid": (2.0, 3.0)}, TypeError, "grid must be an integer"),
    "no grid": ({"grid": None}, TypeError, "grid must be a pair"),
    "size of 0": ({"image_size": (0, 3)}, ValueError, "image_size must be at least 1"),
    "names": ({"names": ("a",)}, ValueError, "names must have an entry for each of the 4 images; got 1"),
    "hashes": ({"image_hashes": np.zeros(1, np.int64)}, ValueError, "image_hashes must have an entry"),
    "half a backbone": ({"backbone": "x"}, ValueError, "backbone and extraction belong together"),
}


@pytest.mark.parametrize("case", WRONG)
def test_sets_that_do_not_fit_together_are_refused(case):
    changes, kind, reason = WRONG[case]
    with pytest.raises(kind, match=reason):
        own(**changes)


@pytest.mark.parametrize("method", ["fit_features", "predict_features"])
def test_only_sets_are_taken(method):
    model = detector().fit(TRAIN)
    with pytest.raises(TypeError, match="features must be a FeatureSet, as extract returns; got ndarray"):
        getattr(model, method)(np.zeros((64, 9), np.float32))


def test_a_failed_fit_changes_nothing():
    model = detector().fit(TRAIN)
    before = model._fitted
    with pytest.raises(ValueError, match=r"coreset|amount"):
        model.set_params(coreset=10**6).fit_features(model.extract(TRAIN))
    assert model._fitted is before
    same(model.predict(TEST), detector().fit(TRAIN).predict(TEST))


def test_features_stay_when_a_copy_is_made_by_replace():
    features = detector().extract(TRAIN)
    entries = {name: getattr(features, name)[:2] for name in ("names", "paths", "unseen", "image_hashes")}
    part = replace(features, features=features.features[:128], **entries)
    assert len(part) == 2
    same(detector(coreset=None).fit_features(part).predict(TEST), detector(coreset=None).fit(TRAIN[:2]).predict(TEST))
