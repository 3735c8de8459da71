"""Metrics of images: equal to their definitions and to scikit-learn, ties included, whatever the dtype."""

from __future__ import annotations

import doctest
from statistics import NormalDist

import numpy as np
import oracle_metrics
import pytest

from patchcore_rs import image_metrics
from patchcore_rs.metrics import (
    F1Optimum,
    FullRecall,
    average_precision,
    f1_optimal,
    full_recall,
    image_auroc,
    image_auroc_interval,
    precision_recall_curve,
    roc_curve,
)

IMAGE_METRICS = [image_auroc, image_auroc_interval, average_precision, f1_optimal, full_recall]
CURVES = [roc_curve, precision_recall_curve]

# (samples, distinct scores or None for all distinct, share of anomalies)
SETS = [(2, None, 0.5), (9, 2, 0.3), (50, 5, 0.5), (500, 20, 0.1), (500, None, 0.9), (3000, 1, 0.4), (3000, None, 0.01)]


def image_set(samples, distinct, share, dtype=np.float64):
    """Labels of both classes, and scores that know something of them."""
    rng = np.random.default_rng(samples)
    labels = rng.random(samples) < share
    labels[:2] = [True, False]
    scores = rng.normal(size=samples) + labels
    if distinct:
        scores = np.round(scores * distinct / 8) / 3
    return labels, scores.astype(dtype)


# --- Values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("samples", "distinct", "share"), SETS)
def test_image_metrics_equal_scikit_learn(samples, distinct, share, dtype):
    reference = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference here")
    labels, scores = image_set(samples, distinct, share, dtype)
    assert image_auroc(labels, scores) == pytest.approx(reference.roc_auc_score(labels, scores), abs=1e-12)
    expected = reference.average_precision_score(labels, scores)
    assert average_precision(labels, scores) == pytest.approx(expected, abs=1e-12)
    precision, recall, _ = reference.precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    assert f1_optimal(labels, scores).f1 == pytest.approx(f1.max(), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("samples", "distinct", "share"), SETS)
def test_image_metrics_equal_their_definitions(samples, distinct, share, dtype):
    labels, scores = image_set(samples, distinct, share, dtype)
    assert image_auroc(labels, scores) == pytest.approx(oracle_metrics.roc_auc(labels, scores), abs=1e-12)
    assert average_precision(labels, scores) == pytest.approx(
        oracle_metrics.average_precision(labels, scores), abs=1e-12
    )
    assert f1_optimal(labels, scores) == F1Optimum(*oracle_metrics.f1_optimal(labels, scores))
    points = oracle_metrics.operating_points(labels, scores)
    threshold, _, alarms = next(point for point in points if point[1] == labels.sum())
    assert full_recall(labels, scores) == FullRecall(threshold, alarms)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("samples", "distinct", "share"), SETS)
def test_curves_equal_scikit_learn(samples, distinct, share, dtype):
    reference = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference here")
    labels, scores = image_set(samples, distinct, share, dtype)
    for ours, theirs in (
        (roc_curve(labels, scores), reference.roc_curve(labels, scores, drop_intermediate=False)),
        (precision_recall_curve(labels, scores), reference.precision_recall_curve(labels, scores)),
    ):
        for array, expected in zip(ours, theirs, strict=True):
            assert array.dtype == np.float64
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(("samples", "distinct", "share"), SETS)
def test_curves_enclose_the_areas(samples, distinct, share):
    labels, scores = image_set(samples, distinct, share)
    across, up, _ = roc_curve(labels, scores)
    area = float(np.sum(np.diff(across) * (up[1:] + up[:-1])) / 2)
    assert area == pytest.approx(image_auroc(labels, scores), abs=1e-12)
    precision, recall, _ = precision_recall_curve(labels, scores)
    area = float(np.sum(-np.diff(recall) * precision[:-1]))
    assert area == pytest.approx(average_precision(labels, scores), abs=1e-12)


@pytest.mark.parametrize(("samples", "distinct", "share"), SETS)
def test_a_curve_has_a_point_for_each_threshold(samples, distinct, share):
    labels, scores = image_set(samples, distinct, share, np.float32)
    curve = roc_curve(labels, scores)
    assert curve.thresholds.tolist() == [np.inf, *sorted({float(score) for score in scores}, reverse=True)]
    for alarms, found, threshold in list(zip(*curve, strict=True))[:: max(1, samples // 20)]:
        assert alarms == np.mean(scores[~labels] >= threshold)
        assert found == np.mean(scores[labels] >= threshold)
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    assert (precision[-1], recall[-1]) == (1, 0)
    assert thresholds.tolist() == curve.thresholds[:0:-1].tolist()
    assert recall[:-1].tolist() == curve.true_positive_rates[:0:-1].tolist()


def test_curves_of_scores_that_all_tie():
    assert [array.tolist() for array in roc_curve([0, 1, 1], [2.0, 2.0, 2.0])] == [[0, 1], [0, 1], [np.inf, 2]]
    assert [array.tolist() for array in precision_recall_curve([0, 1], [-0.0, 0.0])] == [[0.5, 1], [1, 0], [0]]
    assert len(roc_curve([0, 1], [-1.7e308, 1.7e308]).thresholds) == 3  # farther apart than float64 reaches
    assert len(roc_curve([0, 1], [0.0, 5e-324]).thresholds) == 3


def test_the_examples_run():
    assert doctest.testmod(image_metrics).failed == 0
    assert doctest.testmod(image_metrics).attempted >= 11


# --- The interval ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(("samples", "distinct", "share"), [s for s in SETS if s[1] != 1 and s[0] > 2])
def test_the_interval_equals_its_definition(samples, distinct, share, confidence):
    labels, scores = image_set(samples, distinct, share)
    labels[2:4] = [True, False]
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)
    expected = oracle_metrics.auroc_interval(labels, scores, quantile)
    interval = image_auroc_interval(labels, scores, confidence)
    assert interval == pytest.approx(expected, abs=1e-12)
    assert interval.lower <= image_auroc(labels, scores) <= interval.upper
    mirrored = image_auroc_interval(labels, -scores, confidence)
    assert mirrored == pytest.approx((1 - interval.upper, 1 - interval.lower), abs=1e-12)


def test_the_interval_by_hand():
    # Of the anomalous images 4 beats 3 of 4 normal ones, the others all: variance 1/64. Likewise the normal ones.
    labels, scores = [0, 0, 0, 0, 1, 1, 1, 1], [1, 2, 3, 5, 4, 6, 7, 8]
    error = np.sqrt((1 / 64 + 1 / 64) / 4)
    factor = np.exp(1.959963984540054 * error / (15 / 16 * 1 / 16))  # of the odds, 15 to 1
    expected = [1 - 1 / (1 + odds) for odds in (15 / factor, 15 * factor)]
    assert image_auroc_interval(labels, scores) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("normal", "anomalous"), [(2, 2), (3, 20), (30, 8)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_where_all_pairs_are_in_order_the_interval_is_no_better_than_with_one_pair_swapped(
    normal, anomalous, confidence
):
    labels, scores = np.repeat([0, 1], [normal, anomalous]), np.arange(normal + anomalous, dtype=float)
    swapped = scores.copy()
    swapped[[normal - 1, normal]] = swapped[[normal, normal - 1]]
    lower, upper = image_auroc_interval(labels, scores, confidence)
    worse = image_auroc_interval(labels, swapped, confidence)
    assert (lower, upper) == (worse.lower, 1)
    assert 0 < lower < image_auroc(labels, swapped) < worse.upper < 1
    assert image_auroc_interval(labels, -scores, confidence) == pytest.approx((0, 1 - lower), abs=1e-12)
    assert image_auroc_interval(labels, labels * 0, confidence) == (0, 1)


@pytest.mark.parametrize(
    ("distance", "images", "least"), [(0.5, 40, 0.94), (1.5, 25, 0.94), (2.9, 20, 0.94), (2.9, 5, 0.94)]
)
def test_the_interval_holds_the_auroc_of_all_images_about_as_often_as_it_says(distance, images, least):
    rng = np.random.default_rng(int(distance * 10))
    truth = NormalDist().cdf(distance / np.sqrt(2))
    labels = np.repeat([0, 1], images)
    held = 0
    for _ in range(1000):
        lower, upper = image_auroc_interval(labels, rng.normal(size=2 * images) + distance * labels)
        held += lower <= truth <= upper
    assert held >= least * 1000


def test_intervals_that_are_refused():
    for labels in ([0, 1, 1], [0, 0, 1], [0, 1]):
        with pytest.raises(ValueError, match=f"at least two images of each class.*got {sum(labels)} anomalous of"):
            image_auroc_interval(labels, np.arange(len(labels)))
    with pytest.raises(ValueError, match="labels must be of both classes"):
        image_auroc_interval([1, 1], [1, 2])
    for confidence in (0, 1, 95, -0.5, np.nan):
        with pytest.raises(ValueError, match=r"confidence must be above 0 and below 1.*For 95 % pass 0\.95"):
            image_auroc_interval([0, 0, 1, 1], [1, 2, 3, 4], confidence)
    with pytest.raises(TypeError, match="confidence must be a number"):
        image_auroc_interval([0, 0, 1, 1], [1, 2, 3, 4], "95%")


def test_the_threshold_does_what_it_says():
    labels, scores = image_set(500, None, 0.3, np.float32)
    best = f1_optimal(labels, scores)
    assert best.false_alarms == np.sum(~labels & (scores >= best.threshold))
    assert best.misses == np.sum(labels & (scores < best.threshold))
    assert best.misclassified == best.false_alarms + best.misses
    threshold, false_alarms = full_recall(labels, scores)
    assert np.all(scores[labels] >= threshold)
    assert false_alarms == np.sum(~labels & (scores >= threshold))


def test_of_equal_f1_the_highest_threshold_wins():
    assert f1_optimal([1, 0, 0, 1], [0.9, 0.5, 0.4, 0.1]) == F1Optimum(0.9, 2 / 3, 0, 1)


def test_distances_above_one_are_ranked_like_any_others():
    labels, scores = [0, 0, 1, 1], [21.0, 22.0, 40.0, 41.0]
    assert image_auroc(labels, scores) == 1.0
    assert image_auroc(labels, [-score for score in scores]) == 0.0


def test_scores_that_all_tie():
    assert image_auroc([0, 1, 1], [2.0, 2.0, 2.0]) == 0.5
    assert image_auroc([0, 1], [-0.0, 0.0]) == 0.5


# --- What is accepted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", IMAGE_METRICS)
def test_labels_and_scores_of_any_kind(metric):
    labels = np.array([0, 1, 0, 1, 1, 0])
    scores = np.array([3, 7, 5, 9, 5, 1])
    expected = metric(labels, scores.astype(np.float64))
    for kind in (bool, np.int8, np.uint8, np.int64, np.uint64, np.float32):
        assert metric(labels.astype(kind), scores) == expected
    for dtype in (np.float16, np.float32, ">f4", ">f8", np.longdouble, np.uint8, np.int64):
        assert metric(labels, scores.astype(dtype)) == expected
    assert metric(labels.tolist(), scores.tolist()) == expected
    assert metric(np.repeat(labels, 2)[::2], np.repeat(scores, 2)[::2]) == expected
    assert metric(labels[::-1], scores[::-1]) == expected


@pytest.mark.parametrize("curve", CURVES)
def test_curves_of_labels_and_scores_of_any_kind(curve):
    labels, scores = np.array([0, 1, 0, 1, 1, 0]), np.array([3, 7, 5, 9, 5, 1])
    expected = [array.tolist() for array in curve(labels, scores)]
    for kind in (bool, np.uint8, np.float32):
        assert [array.tolist() for array in curve(labels.astype(kind), scores)] == expected
    for dtype in (np.float16, np.float32, ">f8", np.uint8):
        assert [array.tolist() for array in curve(labels, scores.astype(dtype))] == expected
    assert [array.tolist() for array in curve(labels[::-1].tolist(), scores[::-1].tolist())] == expected


def test_scores_are_not_rounded():
    assert image_auroc([0, 1], [1.0, 1.0 + 1e-15]) == 1.0


def test_tensors_are_read():
    torch = pytest.importorskip("torch", reason="tensors need torch")
    assert image_auroc(torch.tensor([0, 1]), torch.tensor([0.5, 1.5], dtype=torch.bfloat16)) == 1.0


# --- What is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", IMAGE_METRICS + CURVES)
@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.5], "scores must be of the same length as labels, 2; got 1"),
        ([], [], "scores is empty"),
        ([0, 1, 2], [0.1, 0.2, 0.3], r"labels must be 0 \(normal\) or 1 \(anomalous\); got 2 at index 2"),
        ([0, -1], [0.1, 0.2], "got -1 at index 1"),
        ([0, 256, 1], [0.1, 0.2, 0.3], "got 256 at index 1"),
        ([0, 0.5], [0.1, 0.2], "got 0.5 at index 1"),
        ([0, 1, 1], [0.1, np.nan, np.inf], "scores must be finite everywhere; got nan at index 1"),
        ([0, 1, 1], [-np.inf, 0.2, 0.3], "got -inf at index 0"),
        ([[0, 1]], [0.1, 0.2], r"labels must have shape \(n,\).*got shape \(1, 2\)"),
        ([0, 1], [[0.1], [0.2]], r"scores must have shape \(n,\).*got shape \(2, 1\)"),
    ],
)
def test_images_that_are_refused(metric, labels, scores, message):
    with pytest.raises(ValueError, match=message):
        metric(labels, scores)


@pytest.mark.parametrize("metric", IMAGE_METRICS + CURVES)
def test_dtypes_that_are_refused(metric):
    with pytest.raises(TypeError, match="labels must be bool, or numbers"):
        metric(["good", "bad"], [0.1, 0.2])
    with pytest.raises(TypeError, match="scores must hold numbers"):
        metric([0, 1], [0.1, 0.2j])


def test_a_missing_class_is_refused():
    message = "labels must be of both classes, for AUROC compares anomalous images.*got 0 anomalous of 2 images"
    with pytest.raises(ValueError, match=message):
        image_auroc([0, 0], [0.1, 0.2])
    with pytest.raises(ValueError, match="got 2 anomalous of 2"):
        image_auroc([1, 1], [0.1, 0.2])
    for labels in ([0, 0], [1, 1]):
        message = f"labels must be of both classes, for an ROC curve.*got {sum(labels)} anomalous of 2 images"
        with pytest.raises(ValueError, match=message):
            roc_curve(labels, [0.1, 0.2])
    assert precision_recall_curve([1, 1], [0.1, 0.2]).precision.tolist() == [1, 1, 1]
    for metric in (average_precision, f1_optimal, full_recall, precision_recall_curve):
        with pytest.raises(ValueError, match=r"at least once.*got 0 anomalous of 2 images"):
            metric([0, 0], [0.1, 0.2])
    assert average_precision([1, 1], [0.1, 0.2]) == 1.0
    assert f1_optimal([1, 1], [0.1, 0.2]) == F1Optimum(0.1, 1.0, 0, 0)
    assert full_recall([1, 1], [0.1, 0.2]) == FullRecall(0.1, 0)
