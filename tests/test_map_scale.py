"""Colours are absolute: what a model knows of the maps of normal images decides them, not the images beside one."""

from __future__ import annotations

import copy
import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from detectors import detector, flawed, normal, pyramid, write_folder
from PIL import Image
from torch.nn import functional

from patchcore_rs import FeatureSet, PatchCore
from patchcore_rs.cli.main import main
from patchcore_rs.cli.models import model_facts
from patchcore_rs.detector import bank
from patchcore_rs.detector.method import sample_images
from patchcore_rs.evaluation.evaluate import evaluate
from patchcore_rs.memory_bank import MemoryBank
from patchcore_rs.methods import load as methods_load
from patchcore_rs.model.calibration import calibrate_threshold
from patchcore_rs.model.description import Description
from patchcore_rs.model.map_values import MapValues
from patchcore_rs.report.evaluation import EvaluationReport
from patchcore_rs.report.heatmap import overlay

DATA = Path(__file__).parent / "data"
OWN_COLOURS = "does not know which map values are normal"


def values(model):
    return model._fitted.description.map_values


def peaks(maps):
    return maps.reshape(len(maps), -1).max(axis=1).astype(np.float64)


def held_out(model, features, image):
    """The definition: the map of an image by the rows of the bank that are no patches of its own."""
    own = features.features.reshape(len(features), features.patches, -1)[image]
    rows = model.memory_bank_.features
    others = rows[~(rows[:, None] == own).all(axis=2).any(axis=1)]
    scores = MemoryBank(others).kneighbors(own)[0].reshape(1, *features.grid)
    return model._fitted.draw(scores)[0]


# --- what is known ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"coreset": None}, {"coreset": 0.5}, {"coreset_method": "random"}])
def test_a_fit_knows_the_maps_of_training_images_as_if_they_were_new(options, monkeypatch):
    monkeypatch.setattr(bank, "_NEIGHBOURS", 70)  # more than an image's patches
    model = detector(**options)
    features = model.extract(normal(101))
    maps = [held_out(model.fit_features(features), features, image) for image in (25, 75)]
    known = values(model)
    assert known.median == pytest.approx(np.median([np.median(each) for each in maps]))
    beyond = (1 + 0.5 / np.sqrt(2)) * (np.quantile([each.max() for each in maps], 0.95) - known.median)
    assert known.upper == pytest.approx(known.median + beyond)


def test_where_all_nearest_rows_are_the_images_own_the_farthest_of_them_stands_in():
    model = detector(reweight=None)
    features = model.extract(normal(1))  # there is no other image
    model.fit_features(features)
    rows = model.memory_bank_
    [drawn] = model._fitted.draw(rows.kneighbors(features.features, len(rows))[0][:, -1].reshape(1, *features.grid))
    median = float(np.median(drawn))
    assert values(model) == MapValues(median, pytest.approx(median + 1.5 * (drawn.max() - median)))


def test_squared_and_standardised_patch_scores_are_measured_as_they_are_scored():
    largest = []
    for distance in ("euclidean", "squared"):
        known = values(detector(sigma=0.0, upsampling="nearest", distance=distance).fit(normal(12)))
        largest.append(known.median + (known.upper - known.median) / 1.5)  # of the one image measured
    assert largest[1] == pytest.approx(largest[0] ** 2)
    whole = detector(standardize=True)
    features = whole.extract(normal(12))
    before = features.features.copy()
    assert values(whole.fit_features(features)) == values(detector(standardize=True).fit(normal(12)))
    np.testing.assert_array_equal(features.features, before)


@pytest.mark.parametrize("coreset", [0.02, 0.1, 0.5, 1.0, None])
@pytest.mark.filterwarnings("ignore:the coreset has")
def test_new_flawless_images_stay_clear_and_flaws_show_whatever_the_bank_holds(coreset):
    model = detector(coreset=coreset).fit(normal(60))
    good, bad = model.predict(normal(40, 77)), model.predict(flawed(3))
    assert np.quantile(peaks(good.maps), 0.9) < good.map_scale.low < 2 * peaks(good.maps).max()
    assert peaks(bad.maps).min() > bad.map_scale.high


@pytest.mark.parametrize(
    ("images", "patches", "chosen"),
    [(1, 4, [0]), (49, 4, [24]), (100, 4, [25, 75]), (500, 2000, [25, 75, 125, 175, 225, 275, 325, 375, 425, 475]),
     (5000, 4000, [500, 1500, 2500, 3500, 4500]), (3, 30_000, [1])],
)  # fmt: skip
def test_one_image_of_fifty_is_measured_and_at_most_20_000_patches(images, patches, chosen):
    assert sample_images(images, patches).tolist() == chosen


def test_a_fit_searches_the_patches_of_one_image_of_fifty(monkeypatch):
    searched = []
    search = MemoryBank.kneighbors

    def counting(self, queries, k=1, **options):
        searched.append(len(queries))
        return search(self, queries, k, **options)

    monkeypatch.setattr(MemoryBank, "kneighbors", counting)
    detector().fit(normal(150))
    assert sum(searched) == 3 * 64


def test_without_a_grid_or_a_second_row_nothing_is_known_and_nothing_is_claimed():
    rows = np.random.default_rng(0).random((30, 5), np.float32)
    vectors = FeatureSet(rows, (1, 1), (8, 8))
    model = detector(reweight=None).fit_features(vectors)
    assert values(model) is model.predict_features(vectors).map_scale is None
    assert values(detector(coreset=1, reweight=None).fit(normal(3))) is None


def test_calibration_takes_the_threshold_of_maps_from_each_images_largest_value():
    model = detector().fit(normal(12))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.calibrate(normal(20, 3))
    assert len(caught) == 1, "one warning about too few images, not two"
    maps = model.predict(normal(20, 3)).maps
    record = calibrate_threshold(peaks(maps), 0.01, source="20 images (ndarray)", warn=False)
    assert model.map_calibration_ == record
    median = float(np.median(np.median(maps.reshape(20, -1), axis=1)))
    low, span = record.threshold, (1 + 0.5 / np.sqrt(20)) * (np.quantile(peaks(maps), 0.95) - median)
    assert model.predict(normal(1)).map_scale == (low, pytest.approx(low + 2 * span), "calibration")


def test_a_threshold_by_hand_moves_no_colours():
    model = detector().fit(normal(12)).calibrate(normal(20, 3), false_alarm_rate=0.1)
    before = model.predict(normal(1)).map_scale
    model.threshold_ = 1e9
    assert model.predict(normal(1)).map_scale == before
    model.threshold_ = model.calibration_ = None
    assert model.predict(normal(1)).map_scale == before


def test_a_calibration_that_fails_changes_neither_threshold():
    model = detector(normalize=True).fit(normal(12)).calibrate(normal(20, 3), false_alarm_rate=0.1)
    before = model._fitted
    with pytest.raises(ValueError, match="at least two different scores"):
        model.calibrate(normal(1, 8))
    assert model._fitted is before


def test_growth_keeps_the_larger_values_and_drops_the_threshold():
    calm, loud = (
        detector().fit(normal(12)),
        detector().fit((normal(12, 5).astype(int) * 2 - 120).clip(0, 255).astype("u1")),
    )
    assert values(loud).upper > values(calm).upper
    assert values(calm.merge(loud)) == values(loud.merge(calm)) == values(loud)
    grown = copy.deepcopy(loud).calibrate(normal(5), false_alarm_rate=0.3)
    known = values(grown)
    with pytest.warns(UserWarning, match="threshold does not hold"):
        grown.partial_fit(normal(3, 8))
    assert grown.map_calibration_ is None
    assert values(grown).median >= known.median
    assert values(grown).upper >= known.upper
    measured = copy.deepcopy(calm).partial_fit((normal(12, 5).astype(int) * 2 - 120).clip(0, 255).astype("u1"))
    assert values(measured).upper > values(calm).upper


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_file_keeps_the_scale_and_info_states_it(calibrated, tmp_path):
    model = detector().fit(normal(12))
    if calibrated:
        model.calibrate(normal(10, 4), false_alarm_rate=0.2)
    model.save(tmp_path / "m.safetensors")
    loaded = PatchCore.load(tmp_path / "m.safetensors", backbone=pyramid)
    assert loaded.predict(normal(1)).map_scale == model.predict(normal(1)).map_scale
    assert loaded.map_calibration_ == model.map_calibration_
    facts = model_facts(tmp_path / "m.safetensors")
    assert facts["map_values"] == {"median": values(model).median, "upper": values(model).upper}
    threshold = None if facts["map_calibration"] is None else facts["map_calibration"]["threshold"]
    assert threshold == (model.map_calibration_.threshold if calibrated else None)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"map_values": 1}, "map_values must be an object or null; got 1"),
        ({"map_values": {"median": 1.0}}, "map_values upper must be a number"),
        ({"map_values": {"median": 2.0, "upper": 1.0}}, "map_values must be float32 with median <= upper; got 2 and 1"),
        ({"map_values": {"median": 0.0, "upper": 1e300}}, "map_values must be float32"),
        ({"map_values": None}, "map_calibration must come with map_values"),
        ({"map_calibration": 1}, "map_calibration must be an object or null; got 1"),
        ({"map_calibration": {}}, "map_calibration threshold must be a number"),
    ],
)
def test_a_hostile_record_is_refused(stored, message):
    model = detector().fit(normal(12)).calibrate(normal(10, 4), false_alarm_rate=0.2)
    description = model._fitted.description.to_json()
    with pytest.raises((TypeError, ValueError), match=message):
        Description.from_json(description | stored, "patchcore", model._fitted.learned.arrays)


@pytest.mark.parametrize("path", sorted(DATA.glob("model-*.safetensors")), ids=lambda path: path.stem)
def test_a_file_from_before_knows_no_scale_until_it_is_calibrated_or_grows(path):
    model = PatchCore.load(path, backbone=lambda images: [functional.avg_pool2d(images, 8)])
    assert model.calibration_ is not None
    assert values(model) is model.map_calibration_ is model.predict(normal(1)).map_scale is None
    grown = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="threshold does not hold"):
        grown.partial_fit(normal(3, 8))
    assert grown.predict(normal(1)).map_scale.origin == "training"
    with pytest.warns(UserWarning, match="were trained on cannot be checked"):
        model.calibrate(normal(5, 1), false_alarm_rate=0.2)
    assert model.predict(normal(1)).map_scale.origin == "calibration"


def without_values(model, path):
    """As a file was before maps had a scale."""
    model._fitted = model._fitted.describe(map_values=None, map_calibration=None)
    model.save(path)
    return path


# --- normalised maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.filterwarnings("ignore:normalised scores are clipped")
def test_normalised_maps_have_the_same_picture(clip):
    plain, scaled = (
        detector(normalize=normalize, clip=clip, coreset=50)
        .fit(normal(10, 1))
        .calibrate(normal(20), false_alarm_rate=0.1)
        for normalize in (False, True)
    )
    first, second = plain.predict(flawed(2)), scaled.predict(flawed(2))
    record = plain.calibration_
    formula = [(v - record.threshold) / (record.maximum - record.minimum) + 0.5 for v in first.map_scale[:2]]
    assert second.map_scale.low == pytest.approx(min(max(formula[0], 0), 1) if clip else formula[0])
    assert second.map_scale.high == pytest.approx(max(formula[1], second.map_scale.low), rel=1e-4)
    assert second.map_scale.origin == "calibration"
    clear = np.zeros((32, 32, 3), np.uint8)
    ours, theirs = (overlay(clear, each.maps[0], each.map_scale) > 0 for each in (first, second))
    assert (ours | ~theirs).all()


# --- pictures -----------------------------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """Good and flawed images as files, and `predict` over models of a callable."""
    monkeypatch.setattr(methods_load, "load", partial(methods_load.load, backbone=pyramid))
    write_folder(tmp_path / "good", normal(8, 4))
    write_folder(tmp_path / "bad", flawed(3))
    return tmp_path


def predict(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in ("predict", *arguments)])
    assert result.exit_code == 0, result.output
    return result


def fitted(path, *, calibrated, normalize=False):
    model = detector(normalize=normalize).fit(normal(60))
    if calibrated:
        model.calibrate(normal(40, 6), false_alarm_rate=0)
    model.save(path)
    return path


@pytest.mark.parametrize(("calibrated", "normalize"), [(False, False), (True, False), (True, True)])
def test_an_image_alone_and_in_company_gives_the_same_bytes_and_a_flawless_one_is_clear(shop, calibrated, normalize):
    model = fitted(shop / "m.safetensors", calibrated=calibrated, normalize=normalize)
    saves = ("--save", "overlay", "--save", "png16", "--json")
    alone = json.loads(predict(model, shop / "good/0.png", "-o", shop / "alone", *saves).stdout)
    company = json.loads(predict(model, shop / "good", shop / "bad", "-o", shop / "company", *saves).stdout)
    assert alone["scale"] == company["scale"]
    assert alone["scale"]["origin"] == ("calibration" if calibrated else "training")
    for name in ("0.png.overlay.png", "0.png.map.png"):
        assert (shop / "alone" / name).read_bytes() == (shop / "company" / name).read_bytes()
    with Image.open(shop / "alone/0.png.overlay.png") as drawn, Image.open(shop / "alone/0.png.map.png") as deep:
        np.testing.assert_array_equal(np.asarray(drawn), normal(1, 4)[0])
        assert np.asarray(deep).max() == 0
        assert json.loads(drawn.text["map_scale"]) == json.loads(deep.text["map_scale"]) == alone["scale"]
    for image in company["images"][8:]:
        with Image.open(image["files"]["png16"]) as deep:
            assert np.asarray(deep)[10:18, 6:14].min() > 30_000, "the flaw shows"


def test_the_report_and_json_without_pictures_have_the_models_scale(shop):
    model = fitted(shop / "m.safetensors", calibrated=True)
    scale = PatchCore.load(model, backbone=pyramid).predict(normal(1)).map_scale
    answer = json.loads(predict(model, shop / "good", "--report", shop / "r.html", "--json").stdout)
    assert answer["scale"] == json.loads(predict(model, shop / "good", "--json").stdout)["scale"] == scale.to_json()
    page = (shop / "r.html").read_text("utf-8")
    assert "clear is what the flawless images of its calibration show" in page
    assert f"map value {scale.low:.3g}"[:13] in page


def test_a_model_that_knows_no_scale_says_so_and_colours_by_the_images(shop):
    model = without_values(detector().fit(normal(12)), shop / "m.safetensors")
    result = predict(model, shop / "good", shop / "bad", "-o", shop / "out", "--report", shop / "r.html", "--json")
    assert json.loads(result.stdout)["scale"]["origin"] == "images"
    assert OWN_COLOURS in result.stderr.replace("\n", " ")
    assert "other images have other colours" in (shop / "r.html").read_text("utf-8")
    assert OWN_COLOURS not in predict(model, shop / "good", "-o", shop / "out", "--scale", 1, 2, "--json").stderr
    assert json.loads(predict(model, shop / "good", "--json").stdout)["scale"] is None


def test_a_threshold_of_the_call_moves_no_colours(shop):
    model = fitted(shop / "m.safetensors", calibrated=True)
    first, second = (
        json.loads(predict(model, shop / "good", "--json", *options).stdout)["scale"]
        for options in ((), ("--threshold", "0"))
    )
    assert first == second


def test_the_report_of_an_evaluation_has_the_models_scale(tmp_path):
    for folder, images in (("train/good", normal(8)), ("test/good", normal(2, 3)), ("test/dent", flawed(2))):
        (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
        write_folder(tmp_path / folder, images)
    [run] = evaluate(tmp_path, backbone=pyramid, resize=None, crop=None)
    assert run.inspection.map_scale.origin == "training"
    page = EvaluationReport("dents", sections=1)
    page.add(run)
    page.write(tmp_path / "r.html", [])
    assert "clear is what the images it learnt from show" in (tmp_path / "r.html").read_text("utf-8")


def test_a_part_of_a_prediction_and_its_json_have_the_scale():
    prediction = detector().fit(normal(12)).predict(normal(2))
    assert prediction[1].map_scale == prediction.map_scale
    assert json.loads(prediction.to_json())["scale"] == prediction.map_scale.to_json()
