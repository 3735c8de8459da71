"""The threshold: the smallest that keeps the false alarm rate, its provenance, and scores normalised by it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from detectors import detector, flawed, normal, write_folder

from patchcore_rs.model.calibration import calibrate_threshold


@pytest.fixture(scope="module")
def fitted():
    return detector().fit(normal(12))


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", normal(6))


def test_calibration_labels_and_keeps_its_provenance(folder):
    model = detector(coreset=50).fit(normal(10, 1))
    assert model.calibrate(folder, false_alarm_rate=0.4) is model
    record = model.calibration_
    scores = model.predict(folder).scores
    assert record.threshold == model.threshold_ == np.nextafter(np.sort(scores)[3], np.inf)
    assert (record.images, record.false_alarm_rate, record.reached_rate) == (6, 0.4, 2 / 6)
    assert (record.minimum, record.median, record.maximum) == (scores.min(), np.median(scores), scores.max())
    assert record.source == str(folder)
    result = model.predict(np.concatenate([normal(6), flawed(3)]))
    assert result.labels.dtype == np.int8
    assert result.labels.tolist() == (result.scores >= model.threshold_).astype(int).tolist()
    assert result.labels.sum() == 5
    assert "5 anomalous at threshold" in repr(result)
    assert model.calibrate(normal(4), false_alarm_rate=0.3).calibration_.source == "4 images (ndarray)"


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_smallest_that_keeps_the_rate(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 120))
    scores = rng.integers(0, 30, n) / 7.0
    for rate in (0.0, 0.01, 1 / n, 0.07, 0.29, 0.5, 1 - 1 / n):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            threshold = calibrate_threshold(scores, rate, source="").threshold
        assert np.count_nonzero(scores >= threshold) / n <= rate
        lower = np.nextafter(threshold, -np.inf)
        assert np.count_nonzero(scores >= lower) / n > rate


def test_rates_are_counted_without_rounding_errors():
    record = calibrate_threshold(np.arange(100.0), 0.29, source="")
    assert record.reached_rate == 0.29


def test_too_few_images_for_a_rate_give_a_warning():
    with pytest.warns(UserWarning, match="20 normal images cannot show a false alarm rate of 0.01: .* at least 100"):
        record = calibrate_threshold(np.arange(20.0), 0.01, source="")
    assert record.threshold == np.nextafter(19.0, np.inf)
    assert record.reached_rate == 0


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan"), "1%", None])
def test_bad_rates_are_refused(fitted, rate):
    with pytest.raises(ValueError if isinstance(rate, float) else TypeError, match="false_alarm_rate must be"):
        fitted.calibrate(normal(3), false_alarm_rate=rate)
    assert fitted.threshold_ is None


def test_calibrating_on_nothing_is_refused(fitted):
    with pytest.raises(ValueError, match="normal_images must hold at least one image"):
        fitted.calibrate([])


def test_normalised_scores_lie_in_0_to_1_with_the_threshold_in_the_middle():
    model = detector(normalize=True, coreset=50).fit(normal(10, 1))
    with pytest.raises(ValueError, match=r"normalize=True needs .* call calibrate"):
        model.predict(normal(2))
    plain = detector(coreset=50).fit(normal(10, 1)).calibrate(normal(20), false_alarm_rate=0.1)
    test = np.concatenate([normal(20), flawed(2)])
    expected = plain.predict(test)
    result = model.calibrate(normal(20), false_alarm_rate=0.1).predict(test)
    assert result.threshold == 0.5
    np.testing.assert_array_equal(result.labels, expected.labels)
    np.testing.assert_array_equal(result.labels, result.scores >= 0.5)
    assert result.scores[20:].tolist() == [1, 1]
    assert result.maps.dtype == np.float32
    assert result.maps.min() >= 0
    assert result.maps.max() == 1
    record = plain.calibration_
    middle = (expected.scores[:20] - record.threshold) / (record.maximum - record.minimum) + 0.5
    np.testing.assert_allclose(result.scores[:20], middle.clip(0, 1))
