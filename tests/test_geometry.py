"""What of an image is looked at: the whole by default; where a crop cuts something off, everything says so."""

from __future__ import annotations

import base64
import io
import re
import warnings

import numpy as np
import pytest
from detectors import pyramid
from PIL import Image

from patchcore_rs import PatchCore
from patchcore_rs.backbones.backbone import Backbone
from patchcore_rs.cli.models import model_facts
from patchcore_rs.evaluation.inspection import Inspection
from patchcore_rs.images.files import write_image
from patchcore_rs.images.pixels import read_as_seen
from patchcore_rs.report.page import Report

CUT = "cuts off up to"


def parts(count, *, hole=None, size=(40, 160), seed=0):
    """Noisy grey parts of (height, width), with a black hole around (row, column)."""
    images = np.random.default_rng(seed).normal(128, 4, (count, *size, 3)).clip(0, 255).astype(np.uint8)
    if hole is not None:
        row, column = hole
        images[:, row - 4 : row + 4, column - 4 : column + 4] = 0
    return images


def detector(**options):
    """A small stand-in for a network that recommends a centre crop, as torchvision's do."""
    return PatchCore(**{"backbone": Backbone("small", pyramid, (), resize=48, crop=32), "sigma": 1.0} | options)


def fitted(images, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{CUT}")
        return detector(**options).fit(images)


@pytest.mark.parametrize(("size", "hole"), [((40, 160), (20, 6)), ((160, 40), (152, 20)), ((64, 64), (5, 58))])
def test_a_hole_at_the_edge_of_any_image_is_found_by_default_and_not_by_the_papers_crop(size, hole):
    good, bad = parts(8, size=size), parts(1, hole=hole, size=size, seed=1)
    ordinary = parts(1, size=size, seed=1)
    model = detector().fit(good)
    assert model.predict(bad).scores[0] > 3 * model.predict(ordinary).scores[0]
    row, column = np.unravel_index(model.predict(bad).maps[0].argmax(), model.image_size_)
    height, width = model.image_size_
    assert abs((row + 0.5) / height - hole[0] / size[0]) < 0.1
    assert abs((column + 0.5) / width - hole[1] / size[1]) < 0.1
    paper = fitted(good, profile="paper")
    np.testing.assert_allclose(paper.predict(bad).scores, paper.predict(ordinary).scores, rtol=0.2)


def test_images_of_any_mix_of_sizes_have_one_size_by_default_and_nothing_is_unseen():
    images = [parts(1, size=size)[0] for size in ((40, 160), (160, 40), (64, 64), (33, 57), (5, 7))]
    model = detector().fit(images)
    assert model.image_size_ == (32, 32)
    prediction = model.predict(images)
    assert prediction.unseen.tolist() == [0.0] * 5
    assert "not seen" not in repr(prediction)


@pytest.mark.parametrize("profile", ["paper", "amazon"])
@pytest.mark.parametrize("channels_first", [False, True])
def test_a_crop_is_warned_of_at_fit_and_stated_in_the_prediction_by_the_share_it_cuts_off(profile, channels_first):
    wide, square = parts(4), parts(4, size=(32, 32))
    if channels_first:  # floating-point images go another way
        wide, square = ((images / np.float32(255)) for images in (wide, square))
    model = detector(profile=profile, embedding="concat", projection=None, start=None)
    # 40 x 160 becomes 48 x 192, and 32 x 32 of it are kept.
    with pytest.warns(UserWarning, match=rf"{CUT} 88\.9% of an image.*inspect"):
        model.fit(wide)
    prediction = model.predict([wide[0], square[0]])
    np.testing.assert_allclose(prediction.unseen, [1 - 32 * 32 / (48 * 192), 1 - 32 * 32 / 48**2], rtol=1e-12)
    assert "up to 89% of an image not seen" in repr(prediction)
    assert prediction[1].unseen.tolist() == prediction.unseen[1:].tolist()


def test_features_extracted_once_know_what_was_unseen_and_features_of_ones_own_do_not():
    model = detector(profile="paper")
    features = model.extract(parts(4))
    with pytest.warns(UserWarning, match=CUT):
        model.fit_features(features)
    np.testing.assert_array_equal(model.predict_features(features).unseen, model.predict(parts(4)).unseen)
    own = type(features)(features.features, features.grid, features.image_size)
    assert detector().fit_features(own).predict_features(own).unseen is None


def test_a_warning_that_is_an_error_leaves_the_detector_as_it_was():
    model = fitted(parts(4, size=(32, 32)), profile="paper")
    bank = model.memory_bank_
    for learn in (model.fit, model.partial_fit):
        with pytest.raises(UserWarning, match=CUT):
            learn(parts(4))
    assert model.memory_bank_ is bank


def test_the_largest_unseen_share_is_stored_grows_and_is_stated_by_info(tmp_path):
    path = tmp_path / "m.safetensors"
    small, large = 1 - 32 * 32 / 48**2, 1 - 32 * 32 / (48 * 192)
    model = fitted(parts(4, size=(32, 32)), profile="paper")
    model.save(path)
    assert model_facts(path)["unseen"] == pytest.approx(small)
    with pytest.warns(UserWarning, match=CUT):
        model.partial_fit(parts(4))
    model.save(path)
    assert model_facts(path)["unseen"] == pytest.approx(large)
    loaded = PatchCore.load(path, backbone=detector().backbone)
    assert loaded.settings_ == model.settings_  # the crop too
    merged = fitted(parts(4, size=(32, 32)), profile="paper").merge(loaded)
    merged.save(path)
    assert model_facts(path)["unseen"] == pytest.approx(large)
    fitted(parts(4)).save(path)
    assert model_facts(path)["unseen"] == 0.0


@pytest.mark.parametrize(("profile", "share"), [("inspect", 0.0), ("paper", None)])
def test_a_file_from_before_says_what_was_unseen_as_far_as_the_crop_tells(profile, share):
    description = fitted(parts(4), profile=profile)._fitted.description
    stored = description.to_json()
    del stored["unseen"]
    bank = {"bank": np.ones((1, 9), np.float32)}
    assert type(description).from_json(stored, "patchcore", bank).unseen == share


@pytest.mark.parametrize("crop", [None, 32, 31])
def test_the_report_frames_what_was_seen_of_each_image(tmp_path, crop):
    path = tmp_path / "part.png"
    write_image(path, np.full((40, 160, 3), 200, np.uint8))
    size = (36, 144) if crop is None else (crop, crop)
    report = Report("Parts")
    inspection = Inspection("Images", (path,), np.ones(1), np.zeros((1, *size), np.float32))
    report.add_inspection(inspection, None, lambda file: read_as_seen(file, resize=36, crop=None))
    page = report.html()
    uri = re.search(r'alt="image [^"]*" src="data:image/webp;base64,([^"]+)', page)[1]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("L")).astype(int)
    assert shown.shape == (36, 144)
    assert abs(shown[18, 72] - 200) < 8
    if crop is None:
        assert "not looked at" not in page
        assert abs(shown[18, 4] - 200) < 8
    else:
        assert f"not looked at, outside the frame: {1 - crop**2 / (36 * 144):.1%} of the image" in page
        left = round((144 - crop) / 2)
        assert abs(shown[18, 4] - 100) < 8
        assert shown[18, left - 1] > 225
        assert shown[18, left + crop] > 225
