"""Mahalanobis-AD against its definition, and what the shell does with it."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from detectors import flawed, normal, pyramid, same

from patchcore_rs import FeatureSet, MahalanobisAD, ModelFileError, PatchCore, load
from patchcore_rs.methods import mahalanobis
from patchcore_rs.model.arrays import check_arrays
from patchcore_rs.model.file import read_model


def detector(**options):
    return MahalanobisAD(**{"backbone": pyramid, "resize": None, "crop": None} | options)


def drawn(images, width, seed=0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(5).normal(size=(width, width)) / width**0.5
    return (rng.normal(size=(images, width)) @ mix + 10).astype(np.float32)


def own(rows, widths=None):
    return FeatureSet(rows, (1, 1), (32, 32), layer_widths=widths)


def shrunk(rows):
    """The estimate of Ledoit and Wolf, by the formulas of their paper, and the shrinkage."""
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    images, width = centred.shape
    covariance = centred.T @ centred / images
    variance = np.trace(covariance) / width
    spread = sum(((np.outer(row, row) - covariance) ** 2).sum() for row in centred) / images**2
    distance = ((covariance - variance * np.eye(width)) ** 2).sum()
    share = min(spread, distance) / distance if distance > 0 else 0.0
    return (1 - share) * covariance + share * variance * np.eye(width), share


def expected_scores(training, rows, widths):
    total, first = 0.0, 0
    for width in widths:
        layer = slice(first, first + width)
        covariance, _ = shrunk(training[:, layer])
        mean = training[:, layer].mean(axis=0, dtype=np.float64)
        total = total + oracle.mahalanobis(rows[:, None, layer], mean[None], covariance[None])[:, 0]
        first += width
    return total


@pytest.mark.parametrize(("images", "widths"), [(30, (5, 12, 1)), (8, (20,)), (3, (4, 40)), (200, (7, 9))])
def test_scores_are_those_of_the_definition(images, widths):
    training, rows = drawn(images, sum(widths)), drawn(6, sum(widths), seed=1)
    model = MahalanobisAD().fit_features(own(training, widths))
    result = model.predict_features(own(rows, widths))
    np.testing.assert_allclose(result.scores, expected_scores(training, rows, widths), rtol=1e-9)
    np.testing.assert_allclose(result.maps, np.broadcast_to(result.scores[:, None, None], (6, 32, 32)), rtol=1e-6)
    assert model.summary_.endswith(f"of {', '.join(map(str, widths))} channels")


@pytest.mark.parametrize(("images", "width"), [(30, 5), (8, 20), (3, 40), (2, 3), (50, 1)])
def test_the_shrinkage_is_that_of_scikit_learn(images, width):
    covariance = pytest.importorskip("sklearn.covariance", reason="scikit-learn is not installed")
    rows = drawn(images, width)
    centred = rows.astype(np.float64) - rows[0]
    products = (centred.T @ centred)[np.triu_indices(width)]
    share, variance = mahalanobis.shrink(rows, centred.sum(axis=0), products)
    estimate, expected = covariance.ledoit_wolf(rows.astype(np.float64))
    assert share == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert variance == pytest.approx(np.trace(estimate) / width, rel=1e-9)


def test_layers_are_those_of_the_backbone():
    model = detector(batch_size=5).fit(normal(20))
    training, images = detector().extract(normal(20)), np.concatenate([normal(3, 4), flawed(3)])
    assert training.features.shape == (20, 9)
    expected = expected_scores(training.features, detector().extract(images).features, (6, 3))
    result = model.predict(images)
    np.testing.assert_allclose(result.scores, expected, rtol=1e-9)
    assert result.scores[3:].min() > 3 * result.scores[:3].max()
    assert list(model.timings_) == ["backbone", "aggregation", "model", "scoring"]


def test_layers_at_every_stride_are_the_default():
    model = MahalanobisAD(backbone="efficientnet_lite0", resize=(32, 32)).fit(normal(4))
    assert model.settings_.layers == ("blocks.0", "blocks.2", "blocks.4", "blocks.10", "blocks.15")
    assert model.summary_ == "5 Gaussians of 16, 24, 40, 112, 320 channels"


def test_batches_change_no_bit_and_what_is_saved_is_what_is_loaded(tmp_path):
    model = detector(batch_size=1, threads=1).fit(normal(13)).calibrate(normal(20, 3), false_alarm_rate=0.1)
    other = detector().fit_features(detector().extract(normal(13)))
    for name, array in model._fitted.learned.arrays.items():
        np.testing.assert_array_equal(array, other._fitted.learned.arrays[name], err_msg=name)
    path, again = tmp_path / "model.safetensors", tmp_path / "again.safetensors"
    model.save(path)
    images = np.concatenate([normal(2, 4), flawed(2)])
    for loaded in (MahalanobisAD.load(path, backbone=pyramid), load(path, backbone=pyramid)):
        same(loaded.predict(images), model.predict(images))
        loaded.save(again)
        assert again.read_bytes() == path.read_bytes()
    np.testing.assert_array_equal(other.predict(images[1:2]).scores, model.predict(images).scores[1:2])
    assert {name: array.shape for name, array in read_model(path).arrays.items()} == {
        "widths": (2,),
        "mean": (9,),
        "factors": (27,),
    }
    with pytest.raises(ModelFileError, match="by the method 'mahalanobis', PatchCore loads 'patchcore'"):
        PatchCore.load(path, backbone=pyramid)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"widths": np.array([9, 0])}, "widths must be >= 1 and add up to the 9 values of mean"),
        ({"widths": np.array([6, 4])}, "widths must be >= 1 and add up to the 9 values of mean"),
        ({"widths": np.array([5, 4])}, "factors must have 25 values, as triangles of these widths do"),
        ({"factors": np.zeros(27)}, "factors must be > 0 on the diagonal"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changed, message):
    model = detector().fit(normal(5))
    arrays = model._fitted.learned.arrays | changed
    check_arrays("mahalanobis", arrays, {})
    with pytest.raises(ValueError, match=message):
        model.settings_.check_arrays(arrays)


def test_refusals_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"^images must differ enough .*; got 1 image, .* more and other images"):
        detector().fit(normal(1))
    with pytest.raises(ValueError, match=r"^images must differ enough .*; got 4 images, "):
        detector().fit(np.repeat(normal(1), 4, axis=0))
    model = MahalanobisAD().fit_features(own(drawn(5, 7)))
    with pytest.raises(ValueError, match=r"^features must be a row of 7 channels .*; got 6 channels at 1 x 1"):
        model.predict_features(own(drawn(2, 6)))
    rows = FeatureSet(drawn(12, 3), (2, 3), (16, 24))
    with pytest.raises(ValueError, match=r"^features must be one row for each image"):
        MahalanobisAD().fit_features(rows)
