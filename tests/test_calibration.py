"""The threshold: the smallest that is expected to keep the false alarm rate, its provenance, normalised scores."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from detectors import detector, flawed, normal, pyramid, write_folder

from patchcore_rs import PatchCore
from patchcore_rs.cli import predict as cli_predict
from patchcore_rs.cli.main import main
from patchcore_rs.model.calibration import Calibration, calibrate_threshold, min_max, upper_bound
from patchcore_rs.model.file import read_model, write_model


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
    assert record.threshold == model.threshold_ == np.nextafter(np.sort(scores)[4], np.inf)
    assert (record.images, record.false_alarm_rate, record.reached_rate, record.expected_rate) == (6, 0.4, 1 / 6, 2 / 7)
    assert (record.minimum, record.median, record.maximum) == (scores.min(), np.median(scores), scores.max())
    assert record.source == str(folder)
    result = model.predict(np.concatenate([normal(6), flawed(3)]))
    assert result.labels.dtype == np.int8
    assert result.labels.tolist() == (result.scores >= model.threshold_).astype(int).tolist()
    assert result.labels.sum() == 4
    assert "4 anomalous at threshold" in repr(result)
    assert model.calibrate(normal(4), false_alarm_rate=0.3).calibration_.source == "4 images (ndarray)"


# --- the rate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "rate", "alarms"),
    [
        # floor(rate * (n + 1)) - 1
        (100, 0.05, 4),
        (99, 0.05, 4),
        (98, 0.05, 3),
        (20, 0.05, 0),
        (39, 0.05, 1),
        (99, 0.29, 28),  # 0.29 * 100 is 28.999999999999996
        (99, 0.07, 6),  # 0.07 * 100 is 7.000000000000001
        (99, 0.57, 56),  # 0.57 * 100 is 56.99999999999999
        (5, 1 / 3, 1),
        (9, 0.99, 8),
        (150, 0.01, 0),
        (100, 0.0, 0),
        (1, 0.5, 0),
    ],
)
def test_the_expected_rate_is_the_one_asked_for_or_the_next_below_that_n_images_have(n, rate, alarms):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = calibrate_threshold(np.arange(float(n)), rate, source="")
    assert record.reached_rate == alarms / n
    assert record.expected_rate == (alarms + 1) / (n + 1)
    assert record.threshold == np.nextafter(n - 1.0 - alarms, np.inf)


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_smallest_that_keeps_the_rate(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 120))
    scores = rng.integers(0, 30, n) / 7.0
    for rate in (0.0, 0.01, 1 / n, 0.07, 0.29, 0.5, 1 - 1 / n):
        record = calibrate_threshold(scores, rate, source="", warn=False)
        allowed = round(record.expected_rate * (n + 1)) - 1
        assert np.count_nonzero(scores >= record.threshold) <= allowed
        lower = np.nextafter(record.threshold, -np.inf)
        assert np.count_nonzero(scores >= lower) > allowed
        assert record.expected_rate <= max(rate, 1 / (n + 1))
        assert (allowed + 2) / (n + 1) > rate


@pytest.mark.parametrize("n", [20, 40, 100])
def test_over_many_calibrations_the_mean_rate_is_the_one_asked_for_and_one_in_twenty_exceeds_its_bound(n):
    rng = np.random.default_rng(0)
    records = [calibrate_threshold(rng.random(n), 0.05, source="") for _ in range(1000)]
    rates = np.array([1 - record.threshold for record in records])  # of uniform scores
    assert 0.85 * 0.05 < rates.mean() < 1.1 * 0.05
    assert abs(rates.mean() - records[0].expected_rate) < 4 * rates.std() / np.sqrt(1000)
    assert np.mean(rates > records[0].rate_bound) == pytest.approx(0.05, abs=0.025)


@pytest.mark.parametrize(
    ("alarms", "n", "bound"),
    [
        (0, 1, 0.95),  # 1 - p = 0.05
        (0, 20, 1 - 0.05 ** (1 / 20)),  # (1 - p)**20 = 0.05
        (1, 2, math.sqrt(0.95)),  # 1 - p**2 = 0.05
        (6, 7, 0.95 ** (1 / 7)),  # 1 - p**7 = 0.05
        (1, 100, 0.046560),  # (1 - p)**99 * (1 + 99 * p) = 0.05
    ],
)
def test_the_bound_of_the_rate_is_that_of_the_binomial_tail(alarms, n, bound):
    assert upper_bound(alarms, n) == pytest.approx(bound, abs=1e-6)
    p = upper_bound(alarms, n)
    tail = math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(alarms + 1))
    assert tail == pytest.approx(0.05, rel=1e-12)


def test_the_bound_of_the_rate_is_a_quantile_of_the_beta_distribution():
    stats = pytest.importorskip("scipy.stats")
    for n in (1, 2, 5, 20, 100, 999, 20_000):
        for alarms in {0, n // 100, n // 10, n // 2, n - 1}:
            assert upper_bound(alarms, n) == pytest.approx(stats.beta.ppf(0.95, alarms + 1, n - alarms), rel=1e-9)


@pytest.mark.parametrize(
    ("n", "rate", "shown", "needed"),
    [(20, 0.01, "0.048", 99), (98, 0.01, "0.010", 99), (1, 0.07, "0.50", 14), (3, 1 / 49, "0.25", 48)],
)
def test_too_few_images_for_a_rate_give_a_warning_that_says_which_they_can_show(n, rate, shown, needed):
    message = f"cannot show a false alarm rate of {rate:g}, but {shown} or more: .* calibrate on at least {needed}$"
    with pytest.warns(UserWarning, match=message):
        record = calibrate_threshold(np.arange(float(n)), rate, source="")
    assert record.threshold == np.nextafter(n - 1.0, np.inf)
    assert (record.reached_rate, record.expected_rate) == (0, 1 / (n + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = calibrate_threshold(np.arange(float(needed)), rate, source="")
    assert enough.expected_rate == 1 / (needed + 1) <= rate


def test_a_forecast_has_two_digits_and_is_missing_where_a_file_has_none():
    record = calibrate_threshold(np.arange(100.0), 0.02, source="x")
    forecast = "about 2.0 % of flawless images would raise a false alarm, with 95 % confidence at most 4.7 %"
    assert record.forecast == forecast
    for rate, said in ((0.0004, "0.040"), (0.0099999, "1.0"), (0.123, "12"), (1 / 3, "33"), (0.9999, "100")):
        assert replace(record, expected_rate=rate).forecast.startswith(f"about {said} % of")
    old = record.to_json()
    del old["expected_rate"], old["rate_bound"]
    assert Calibration.from_json(old) == replace(record, expected_rate=None, rate_bound=None)
    assert Calibration.from_json(old).forecast == ""
    assert Calibration.from_json(record.to_json()) == record
    for wrong in ({"expected_rate": 1.5}, {"rate_bound": -0.1}, {"rate_bound": "0.1"}):
        with pytest.raises(ValueError, match=f"calibration {next(iter(wrong))} must be a "):
            Calibration.from_json(record.to_json() | wrong)


def test_fit_info_and_the_report_state_the_forecast(folder, tmp_path):
    def run(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    path, page = tmp_path / "m.safetensors", tmp_path / "r.html"
    command = ("fit", write_folder(tmp_path / "good", normal(3, 1)), "-o", path, "--backbone", "efficientnet_lite0")
    command += ("--coreset", 9, "--resize", "32x32", "--calibrate", folder, "--false-alarm-rate", 0.3)
    record = json.loads(run(*command, "--json"))["calibration"]
    assert (record["expected_rate"], record["rate_bound"]) == (2 / 7, upper_bound(1, 6))
    forecast = "about 29 % of flawless images would raise a false alarm, with 95 % confidence at most 58 %"
    assert f"from 6 flawless images: {forecast}\n" in run(*command)
    facts = json.loads(run("info", path, "--json"))
    assert facts["calibration"] == record
    assert facts["map_calibration"]["expected_rate"] == 2 / 7
    run("predict", path, folder, "--report", page)
    assert f"calibrated on 6 flawless images: {forecast}" in page.read_text("utf-8")
    model = PatchCore.load(path)
    model.calibration_ = replace(model.calibration_, expected_rate=None, rate_bound=None)
    model.save(path)
    run("predict", path, folder, "--report", page)
    assert "(calibrated on 6 flawless images)" in page.read_text("utf-8")


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan"), "1%", None])
def test_bad_rates_are_refused(fitted, rate):
    with pytest.raises(ValueError if isinstance(rate, float) else TypeError, match="false_alarm_rate must be"):
        fitted.calibrate(normal(3), false_alarm_rate=rate)
    assert fitted.threshold_ is None


def test_calibrating_on_nothing_is_refused(fitted):
    with pytest.raises(ValueError, match="normal_images must hold at least one image"):
        fitted.calibrate([])


# --- normalised scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
def test_normalised_scores_have_the_threshold_in_the_middle_and_are_clipped_where_that_is_asked_for(clip):
    model = detector(normalize=True, clip=clip, coreset=50).fit(normal(10, 1))
    with pytest.raises(ValueError, match=r"normalize=True needs .* call calibrate"):
        model.predict(normal(2))
    plain = detector(coreset=50).fit(normal(10, 1)).calibrate(normal(20), false_alarm_rate=0.1)
    test = np.concatenate([normal(20), flawed(2)])
    expected = plain.predict(test)
    model.calibrate(normal(20), false_alarm_rate=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model.predict(test)
    assert result.threshold == 0.5
    np.testing.assert_array_equal(result.labels, expected.labels)
    np.testing.assert_array_equal(result.labels, result.scores >= 0.5)
    record = plain.calibration_
    for values, raw in ((result.scores, expected.scores), (result.maps, expected.maps)):
        formula = (raw.astype(np.float64) - record.threshold) / (record.maximum - record.minimum) + 0.5
        np.testing.assert_allclose(values, formula.clip(0, 1) if clip else formula, rtol=1e-6)
        assert formula.min() < 0
        assert formula.max() > 1
    assert result.maps.dtype == np.float32


@pytest.mark.parametrize(("profile", "clips"), [("inspect", False), ("paper", False), ("anomalib", True)])
def test_only_the_profile_anomalib_clips_and_what_is_clipped_is_counted_in_a_warning(profile, clips):
    model = detector(profile=profile, projection=None, normalize=True).fit(normal(10, 1))
    assert model.settings_.clip is clips
    model.calibrate(normal(20), false_alarm_rate=0.1)
    test = np.concatenate([normal(20, 5), flawed(30)])
    plain = detector(profile=profile, projection=None).fit(normal(10, 1)).predict(test).scores
    record = model.calibration_
    formula = (plain - record.threshold) / (record.maximum - record.minimum) + 0.5
    outside = int(np.sum((formula < 0) | (formula > 1)))
    assert formula.min() < 0
    assert outside >= 30
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = model.predict(test).scores
    said = [str(warning.message) for warning in caught]
    message = f"normalised scores are clipped to 0 or 1, where they tie: {outside} of 50; fit with clip=False to keep"
    assert said == ([f"{message} their order"] if clips else [])
    assert all(warning.filename == __file__ for warning in caught)
    assert len(np.unique(scores)) == (50 - outside + 2 if clips else 50)


def test_a_normalised_score_below_the_threshold_is_never_rounded_to_it():
    model = detector(normalize=True).fit(normal(10, 1)).calibrate(normal(20), false_alarm_rate=0.1)
    score = detector().fit(normal(10, 1)).predict(normal(1)).scores[0]
    model.calibration_ = replace(model.calibration_, minimum=0.0, maximum=1e6)
    for threshold, label in ((np.nextafter(score, np.inf), 0), (score, 1)):
        model.threshold_ = float(threshold)
        result = model.predict(normal(1))
        assert (result.scores >= 0.5).tolist() == result.labels.tolist() == [label]


def test_scores_within_the_range_are_not_warned_of():
    model = detector(normalize=True, clip=True).fit(normal(10, 1)).calibrate(normal(20), false_alarm_rate=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        middle = np.argsort(detector().fit(normal(10, 1)).predict(normal(20)).scores)[9:11]
        scores = model.predict(normal(20)[middle]).scores
    assert ((scores > 0) & (scores < 1)).all()


def test_a_range_of_almost_nothing_gives_finite_scores():
    record = calibrate_threshold(np.array([0.0, 1e-300]), 0.0, source="")
    values = np.array([1.0, -1.0], np.float32)
    with np.errstate(over="ignore"):
        assert np.isfinite(min_max(values, record.threshold, record, clip=False)).all()
    assert min_max(values, record.threshold, record, clip=True).tolist() == [1, 0]


@pytest.mark.filterwarnings("ignore:normalised scores are clipped")
def test_a_file_says_whether_scores_are_clipped_and_readers_that_would_clip_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    for normalize, clip in itertools.product((False, True), repeat=2):
        model = detector(normalize=normalize, clip=clip).fit(normal(10, 1))
        model.calibrate(normal(20), false_alarm_rate=0.1).save(path)
        metadata = read_model(path).metadata
        assert metadata["settings"]["clip"] is clip
        assert ("clip" in metadata["requires"]) == (normalize and not clip)
        loaded = PatchCore.load(path, backbone=pyramid)
        assert loaded.settings_.clip is clip
        np.testing.assert_array_equal(loaded.predict(normal(20)).scores, model.predict(normal(20)).scores)


def test_a_file_from_before_goes_on_clipping(tmp_path):
    path = tmp_path / "m.safetensors"
    model = detector(normalize=True, clip=True).fit(normal(10, 1)).calibrate(normal(20), false_alarm_rate=0.1)
    model.save(path)
    stored = read_model(path)
    del stored.metadata["settings"]["clip"]
    write_model(path, stored)
    with pytest.warns(UserWarning, match="normalised scores are clipped to 0 or 1, where they tie: 2 of 2"):
        assert PatchCore.load(path, backbone=pyramid).predict(flawed(2)).scores.tolist() == [1, 1]


def test_the_command_line_counts_all_clipped_scores_once_and_names_its_own_option(tmp_path, monkeypatch):
    monkeypatch.setattr(cli_predict, "_CHUNK", 2)
    path = tmp_path / "m.safetensors"
    good, bad = write_folder(tmp_path / "good", normal(5, 1)), write_folder(tmp_path / "bad", flawed(5))
    more = write_folder(tmp_path / "more", normal(5, 2))
    command = ["fit", good, "-o", path, "--calibrate", more, "--false-alarm-rate", 0, "--normalize"]
    command += ["--backbone", "efficientnet_lite0", "--coreset", 9, "--resize", "32x32"]
    said = {}
    for option in ("--clip", "--no-clip"):
        for words in ([*command, option, "-q"], ["predict", path, bad, "-q"]):
            result = CliRunner().invoke(main, [str(word) for word in words])
            assert result.exit_code == 0, result.output
        said[option] = result.stderr
    message = "normalised scores are clipped to 0 or 1, where they tie: 5 of 5; fit with --no-clip to keep their order"
    assert said == {"--clip": f"patchcore-rs: warning: {message}\n", "--no-clip": ""}
