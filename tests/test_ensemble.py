"""An ensemble is the mean of its members on one scale, and in everything else a detector like each of them."""

from __future__ import annotations

import copy
import re
import warnings

import numpy as np
import oracle
import pytest
import torch
from detectors import Images, detector, flawed, normal, pyramid, same, unlike, write_folder

from patchcore_rs import Ensemble, NotFittedError, PaDiM, PatchCore, evaluate_detector
from patchcore_rs.images.files import write_image
from patchcore_rs.methods.detectors import DETECTORS
from patchcore_rs.model.calibration import calibrate_threshold
from patchcore_rs.model.map_values import MapValues, map_extent

TRAIN, TEST = normal(8), np.concatenate([normal(3, 2), flawed(3)])


@pytest.fixture(scope="module")
def fitted():
    """Not to be changed."""
    return Ensemble(unlike()).fit(TRAIN)


# --- scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["minmax", "zscore"])
def test_scores_and_maps_are_the_means_of_the_members_on_the_scale_of_the_training_images(combine):
    result = Ensemble(unlike(), combine=combine).fit(TRAIN).predict(TEST)
    alone = [model.fit(TRAIN) for model in unlike()]
    answers = [(model.predict(TRAIN), model.predict(TEST)) for model in alone]
    scores = oracle.combined([(train.scores, test.scores) for train, test in answers], combine)
    np.testing.assert_allclose(result.scores, scores, rtol=1e-12)
    maps = [tuple(oracle.to_grid(one.maps.astype(np.float64), (32, 32)) for one in pair) for pair in answers]
    np.testing.assert_allclose(result.maps, oracle.combined(maps, combine), rtol=1e-4, atol=1e-5)
    assert result.maps.dtype == np.float32
    assert result.scores[3:].min() > result.scores[:3].max()


def test_an_ensemble_of_one_has_the_order_of_its_member():
    result, alone = Ensemble([detector()]).fit(TRAIN).predict(TEST), detector().fit(TRAIN).predict(TEST)
    assert np.argsort(result.scores).tolist() == np.argsort(alone.scores).tolist()


@pytest.mark.parametrize("combine", ["minmax", "zscore"])
def test_scores_depend_on_no_batch(combine):
    def scored(size):
        parts = [detector(batch_size=size), detector(batch_size=size, resize=(48, 40), coreset=0.3)]
        return Ensemble(parts, combine=combine).fit(TRAIN).predict(TEST)

    expected = scored(8)
    for size in (1, 3):
        same_scores(scored(size), expected)


def same_scores(first, second):
    np.testing.assert_array_equal(first.scores, second.scores)
    np.testing.assert_array_equal(first.maps, second.maps)


def test_images_come_from_any_source_and_in_their_order(fitted, tmp_path):
    expected = fitted.predict(TEST)
    folder = write_folder(tmp_path / "test", TEST)
    for images in (list(TEST), iter(TEST), Images(TEST), folder, torch.from_numpy(TEST.transpose(0, 3, 1, 2))):
        same_scores(fitted.predict(images), expected)
    paths = fitted.predict(folder).paths
    assert [path.name for path in paths] == [f"{i}.png" for i in range(len(TEST))]
    same_scores(fitted.predict(TEST[..., ::-1], channels="bgr"), expected)
    assert len(fitted.predict([])) == 0


def test_some_images_at_a_time_pass_all_members():
    """However many there are, and no more are taken from their source than pass together."""
    model = Ensemble([part.set_params(batch_size=2) for part in unlike()]).fit(TRAIN)
    taken, calls = [], []

    def source():
        for i in range(30):
            taken.append(i)
            yield TEST[i % len(TEST)]

    result = model.predict(source(), maps=False, progress=lambda *call: calls.append((len(taken), *call)))
    assert result.maps is None
    np.testing.assert_array_equal(result.scores, model.predict(TEST).scores[np.arange(30) % len(TEST)])
    assert {stage for _, stage, _, _ in calls} == {"scores"}
    done = [done for _, _, done, _ in calls]
    assert done == sorted(done)
    assert done[-1] == 30
    assert all(len_taken <= done + 8 for len_taken, _, done, _ in calls)


def test_progress_of_a_fit_goes_once_over_all_members():
    calls = []
    Ensemble(unlike()).fit(TRAIN, progress=lambda *call: calls.append(call))
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == ["features", "coreset", "scale"]
    for stage in ("features", "scale"):
        done = [done for name, done, _ in calls if name == stage]
        assert done == sorted(done)
        assert done[-1] == 2 * len(TRAIN)


# --- fitting -------------------------------------------------------------------------------------------------


def test_the_detectors_given_stay_as_they_are():
    given = unlike()
    model = Ensemble(given).fit(TRAIN)
    assert not any(hasattr(part, "settings_") for part in given)
    assert [type(part) for part in model.members_] == [PatchCore, PatchCore]
    assert [part.get_params() for part in model.members_] == [part.get_params() for part in given]
    before = model.predict(TEST)
    model.members_[0].fit(flawed(3))
    given[1].set_params(coreset=1)
    same(model.predict(TEST), before)


def test_what_was_learnt_is_there_only_after_a_fit():
    model = Ensemble(unlike())
    with pytest.raises(NotFittedError, match=r"this Ensemble is not fitted yet; call fit\(images\) or Ensemble.load"):
        model.predict(TEST)
    assert not hasattr(model, "members_")
    model.fit(TRAIN)
    assert (model.image_size_, model.threshold_, model.skipped_) == ((32, 32), None, ())
    assert model.settings_ == model.members_[0].settings_
    assert model.summary_ == "2 members: 51 patches of 9 channels; 192 patches of 24 channels"
    assert model.backbone_name_ == "pyramid + Sequential"
    spent = dict(model.timings_)
    assert set(spent) == {"backbone", "aggregation", "coreset", "scale", "scoring"}
    assert spent["coreset"] == sum(part.timings_["coreset"] for part in model.members_)
    model.predict(TEST)
    assert model.timings_["scoring"] > spent["scoring"]


def test_a_fit_that_fails_changes_nothing():
    model = Ensemble(unlike()).fit(TRAIN).calibrate(normal(9, 3), false_alarm_rate=0.1)
    before, state = model.predict(TEST), model._fitted
    model.detectors = [detector(), detector(coreset=None)]
    with pytest.raises(ValueError, match=r"detectors\[1\] must score images differently"):
        model.fit(TRAIN)

    def stop(stage, done, total):
        if stage == "scale" and done > len(TRAIN):
            raise KeyboardInterrupt

    model.detectors = unlike()
    with pytest.raises(KeyboardInterrupt):
        model.fit(TRAIN, progress=stop)
    assert model._fitted is state
    same(model.predict(TEST), before)


@pytest.mark.parametrize("combine", ["minmax", "zscore"])
def test_a_member_that_scores_training_images_alike_is_refused_with_what_to_do(combine):
    with pytest.raises(
        ValueError, match=r"got 0 for all of 8 images. Pass other ones without anomalies, fit\(images, sc"
    ):
        Ensemble([detector(coreset=None)], combine=combine).fit(TRAIN)
    with pytest.raises(ValueError, match=r"for all of 1 image\. Pass other ones"):
        Ensemble([detector(coreset=20)], combine=combine).fit(TRAIN[:1])


@pytest.mark.parametrize("combine", ["minmax", "zscore"])
def test_the_scale_may_be_that_of_other_images(combine):
    held = normal(6, 4)
    result = Ensemble([detector(coreset=None), detector()], combine=combine).fit(TRAIN, scale_images=held).predict(TEST)
    alone = [detector(coreset=None).fit(TRAIN), detector().fit(TRAIN)]
    answers = [(model.predict(held), model.predict(TEST)) for model in alone]
    scores = oracle.combined([(other.scores, test.scores) for other, test in answers], combine)
    np.testing.assert_allclose(result.scores, scores, rtol=1e-12)
    with pytest.raises(ValueError, match="scale_images must be such as can be gone through again for each detector"):
        Ensemble([detector()]).fit(TRAIN, scale_images=iter(held))


@pytest.mark.filterwarnings("ignore:neighbours=50 exceeds")
def test_detectors_of_every_method_can_be_members(tmp_path):
    parts = [method(backbone=pyramid, resize=None, crop=None) for method in DETECTORS.values()]
    model = Ensemble(parts).fit(TRAIN, scale_images=normal(6, 4))
    result = model.predict(TEST)
    assert result.scores[3:].min() > 10 * result.scores[:3].max()
    assert result.map_scale is None
    model.calibrate(normal(9, 3), false_alarm_rate=0.1).save(tmp_path / "ensemble.safetensors")
    loaded = Ensemble.load(tmp_path / "ensemble.safetensors", backbone=pyramid)
    same(loaded.predict(TEST), model.predict(TEST))
    assert [type(part) for part in loaded.members_] == list(DETECTORS.values())
    assert loaded.predict(TEST).map_scale.origin == "calibration"


@pytest.mark.parametrize(("images", "warns"), [(9, True), (10, False)])
def test_a_padim_of_no_more_images_than_channels_is_warned_of_once(images, warns):
    def parts():
        return [PaDiM(backbone=pyramid, resize=None, crop=None, channels=count) for count in (9, 4, 9)]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Ensemble([detector(), *parts()]).fit(normal(images))
        Ensemble(parts()).fit(normal(images), scale_images=normal(6, 4))
    found = [str(each.message) for each in caught]
    named = (
        r"detectors\[1\] \(9 images, 9 channels\) and detectors\[3\] \(9 images, 9 channels\) must be fitted to more"
    )
    assert len(found) == warns
    assert not warns or re.match(named, found[0])
    assert not warns or caught[0].filename == __file__


def test_images_that_are_given_once_are_refused_before_any_work():
    calls = []
    with pytest.raises(ValueError, match=r"gone through again .* got generator, which gives them once. Pass a list"):
        Ensemble(unlike()).fit((image for image in TRAIN), progress=lambda *call: calls.append(call))
    assert not calls
    Ensemble([detector()]).fit(Images(TRAIN))


WRONG = {
    "no list": (lambda: detector(), TypeError, "detectors must be a list of PatchCore and .*; got PatchCore"),
    "an ensemble in it": (lambda: [Ensemble([detector()])], TypeError, "got Ensemble"),
    "a class": (lambda: [PatchCore], TypeError, "got type"),
    "none": (list, ValueError, "detectors must be at least one, .*; got none"),
    "one twice": (lambda: [detector()] * 2, ValueError, "with arguments of its own; got 2, one of them twice"),
    "normalised": (lambda: [detector(), detector(normalize=True)], ValueError, r"detectors\[1\] must have normalize=F"),
    "an argument": (lambda: [detector(), detector(sigma=-1)], ValueError, "sigma must be"),
    "a crop beside none": (
        lambda: [detector(resize=36), detector(resize=36, crop=32)],
        ValueError,
        r"detectors\[1\] must see the same part of an image as detectors\[0\], with resize=36 and crop=None; got "
        r"resize=36 and crop=\(?32.* Leave out all crops, or give resize and crop the same proportion",
    ),
    "another share": (
        lambda: [detector(resize=36, crop=32), detector(resize=48, crop=32)],
        ValueError,
        "must see the same part",
    ),
    "another side": (
        lambda: [detector(resize=36, crop=32), detector(resize=(36, 36), crop=32)],
        ValueError,
        "must see the same part",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_detectors_that_do_not_go_together_are_refused_before_any_work(case):
    given, kind, reason = WRONG[case]
    calls = []
    with pytest.raises(kind, match=reason):
        Ensemble(given()).fit(TRAIN, progress=lambda *call: calls.append(call))
    assert not calls
    with pytest.raises(ValueError, match="combine must be one of 'minmax', 'zscore'; got 'mean'"):
        Ensemble(unlike(), combine="mean").fit(TRAIN)


@pytest.mark.filterwarnings("ignore:the crop cuts off")
def test_members_may_see_the_same_centre_at_several_sizes():
    parts = [detector(resize=36, crop=32), detector(resize=54, crop=48), detector(resize=41, crop=36)]
    model = Ensemble(parts).fit(normal(6, size=40))
    result = model.predict(flawed(2, size=40))
    assert result.maps.shape == (2, 32, 32)
    np.testing.assert_array_equal(result.unseen, model.members_[0].predict(flawed(2, size=40)).unseen)


def test_arguments_are_those_of_an_estimator():
    given = unlike()
    model = Ensemble(given, combine="zscore")
    assert model.get_params() == {"detectors": given, "combine": "zscore"}
    assert model.detectors is given
    assert model.set_params(combine="minmax").combine == "minmax"
    assert repr(Ensemble([detector()])).startswith("Ensemble(detectors=[PatchCore(backbone=<function pyramid")


# --- images that one member cannot take ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def choosy():
    """Of two members the first takes images of any size, the second those of 32 x 32 only."""
    return Ensemble([detector(resize=(32, 32)), detector(coreset=0.3)]).fit(TRAIN)


def test_what_one_member_cannot_take_is_left_out_for_all(choosy, tmp_path):
    folder = write_folder(tmp_path / "images", TEST)
    (folder / "1.png").write_bytes(b"no image")
    write_image(folder / "4.png", normal(1, size=40)[0])
    with pytest.warns(UserWarning, match=r"2 of 6 images were left out; the first: .*1\.png \(") as caught:
        result = choosy.predict(folder, on_error="skip", in_training=True)
    assert len(caught) == 1
    kept = [0, 2, 3, 5]
    same_scores(result, choosy.predict(TEST[kept]))
    assert [path.name for path in result.paths] == [f"{i}.png" for i in kept]
    assert [name for name, _ in result.skipped] == [str(folder / "1.png"), str(folder / "4.png")]
    assert "40 x 40 pixels" in result.skipped[1][1]
    assert (result.unseen.tolist(), result.in_training.tolist()) == ([0] * 4, [False] * 4)
    with pytest.raises(ValueError, match=r"4\.png: 40 x 40 pixels"):
        choosy.predict([folder / f"{i}.png" for i in (0, 4)])
    with pytest.raises(ValueError, match=r"1\.png"):
        choosy.predict(folder)


class Crops(torch.utils.data.Dataset):
    """Several images out of one file, so that all have its name."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "image_path": "scan.png"}


def test_images_of_one_name_are_told_apart(choosy):
    images = [TEST[0], normal(1, size=40)[0], TEST[5], TEST[3]]
    with pytest.warns(UserWarning, match=r"1 of 4 images were left out; the first: scan\.png"):
        result = choosy.predict(Crops(images), on_error="skip")
    same_scores(result, choosy.predict(TEST[[0, 5, 3]]))
    assert [name for name, _ in result.skipped] == ["scan.png"]


def test_where_no_image_can_be_taken_the_answer_is_empty(choosy):
    large = normal(2, size=40)
    with pytest.warns(UserWarning, match="2 of 2 images were left out"):
        assert len(choosy.predict(large, on_error="skip")) == 0
    with (
        pytest.warns(UserWarning, match="2 of 2 images were left out"),
        pytest.raises(ValueError, match="at least one image that can be read; got none"),
    ):
        choosy.calibrate(large, on_error="skip")


def test_training_images_that_a_member_left_out_are_listed():
    images = [*TRAIN, normal(1, size=40)[0]]
    model = Ensemble([detector(), detector(resize=(32, 32))])
    with pytest.warns(UserWarning, match="1 of 9 images were left out"):
        model.fit(images, on_error="skip")
    assert [name for name, _ in model.skipped_] == ["images[8]"]
    assert model.predict(normal(1, size=32), in_training=True).in_training.tolist() == [True]


# --- calibration ---------------------------------------------------------------------------------------------


def test_a_calibration_is_that_of_the_combined_scores():
    model, held = Ensemble(unlike()).fit(TRAIN), normal(19, 4)
    before, largest = model.predict(held), map_extent(model.predict(held).maps)
    assert model.calibrate(held, false_alarm_rate=0.1) is model
    expected = calibrate_threshold(before.scores, 0.1, source="19 images (ndarray)")
    assert model.calibration_ == expected
    assert model.threshold_ == expected.threshold
    assert model.map_calibration_ == calibrate_threshold(largest[:, 1], 0.1, source="19 images (ndarray)")
    after = model.predict(TEST)
    assert after.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert after.map_scale == MapValues.of(largest).scale(model.map_calibration_)
    same_scores(model.predict(held), before)
    model.threshold_ = 1e9
    assert model.predict(TEST).labels.tolist() == [0] * 6


def test_images_that_were_trained_on_are_known(fitted):
    mixed = np.concatenate([TRAIN[:2], TEST[:1]])
    assert fitted.predict(mixed, in_training=True).in_training.tolist() == [True, True, False]
    assert fitted.predict(mixed).in_training is None
    with pytest.raises(ValueError, match="normal_images must be images that were not trained on; got 8 images"):
        copy.deepcopy(fitted).calibrate(TRAIN, false_alarm_rate=0.5)


def test_colours_begin_where_maps_of_normal_images_end(fitted):
    scale, maps = fitted.predict(TEST).map_scale, fitted.predict(TEST).maps
    assert scale.origin == "training"
    assert maps[:3].max() < 1.5 * scale.low
    assert maps[3:].max(axis=(1, 2)).min() > scale.high


# --- evaluation ---------------------------------------------------------------------------------------------


def test_an_ensemble_can_be_judged(tmp_path):
    for name, images in (("train/good", TRAIN), ("test/good", normal(3, 2)), ("test/hole", flawed(3))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_folder(tmp_path / name, images)
    run = evaluate_detector(Ensemble(unlike()), tmp_path, pixels="model")
    assert run.metrics.image_auroc == 1.0
    assert (run.backbone, run.bank, run.trained_on) == ("pyramid + Sequential", None, len(TRAIN))
