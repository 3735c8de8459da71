"""Metrics of pixels: equal to their definitions and to scikit-learn, whatever the sizes, the dtype and the threads."""

from __future__ import annotations

import numpy as np
import oracle_metrics
import pytest

from patchcore_rs.metrics import (
    F1Optimum,
    aupimo,
    count_regions,
    pixel_auroc,
    pixel_average_precision,
    pixel_f1_optimal,
    pro,
    roc_curve,
)


def aupimo_of_few(masks, maps, **options):
    """AUPIMO up to rates that sets of few pixels can show; NaN, which equals nothing, as -1."""
    return np.nan_to_num(aupimo(masks, maps, (0.05, 0.5), **options), nan=-1).tolist()


PIXEL_METRICS = [pixel_auroc, pixel_average_precision, pixel_f1_optimal, pro, aupimo_of_few]
BOTH_CLASSES = [pixel_auroc, pro]


def pixel_set(images, height, width, *, distinct=None, seed=0):
    """Masks of rectangles and single pixels, one of three or more empty, and maps that know something of them."""
    rng = np.random.default_rng(seed)
    masks = rng.random((images, height, width)) < 0.02
    for mask in masks[::2]:
        top, left = rng.integers(0, height), rng.integers(0, width)
        mask[top : top + height // 3 + 1, left : left + width // 4 + 1] = True
    if images > 2:
        masks[1] = False
    masks[0, 0, :2] = [True, False]
    maps = rng.normal(size=masks.shape) + masks
    if distinct:
        maps = np.round(maps * distinct / 8) / 3
    return masks, maps.astype(np.float32)


def mixed_set(*, distinct=None, seed=0):
    """Masks and maps of several sizes, and pixels to leave out: some of every class, and all of one image."""
    sizes = [(7, 9), (12, 5), (1, 8), (9, 9), (4, 2)]
    sets = [pixel_set(1, *size, distinct=distinct, seed=seed + i) for i, size in enumerate(sizes)]
    masks, maps = [mask[0] for mask, _ in sets], [amap[0] for _, amap in sets]
    masks[3][:] = False
    rng = np.random.default_rng(seed)
    ignored = [rng.random(size) < 0.2 for size in sizes]
    ignored[1][:] = True
    return masks, maps, ignored


def kept(masks, maps, ignored):
    """Labels and scores of the pixels that count."""
    return (
        np.concatenate([array[~out] for array, out in zip(arrays, ignored, strict=True)]) for arrays in (masks, maps)
    )


# --- Values ------------------------------------------------------------------------------------------------


def test_curves_of_pixels():
    masks, maps = pixel_set(3, 8, 9)
    across, up, _ = roc_curve(masks.ravel(), maps.ravel())
    area = float(np.sum(np.diff(across) * (up[1:] + up[:-1])) / 2)
    assert area == pytest.approx(pixel_auroc(masks, maps), abs=1e-12)


def test_scores_that_all_tie():
    masks = np.array([[[True, False, False]]])
    assert pixel_auroc(masks, np.zeros((1, 1, 3))) == 0.5
    assert pro(masks, np.zeros((1, 1, 3))) == pytest.approx(0.15, abs=1e-15)


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("images", "height", "width", "distinct"), [(1, 5, 4, 3), (3, 12, 9, None), (4, 16, 16, 12)])
def test_pro_equals_its_definition(images, height, width, distinct, limit):
    masks, maps = pixel_set(images, height, width, distinct=distinct)
    expected = oracle_metrics.pro(masks, maps, limit)
    assert pro(masks, maps, limit) == pytest.approx(expected, abs=1e-12)
    assert pro(masks, maps.astype(np.float64), limit) == pro(masks, maps, limit)


def test_pro_by_hand():
    # Two regions of one image: {0.9, 0.5} and {0.2}; normal pixels 0.7, 0.3, 0.3, 0.1.
    masks = np.array([[[1, 1, 0, 0, 0, 1, 0]]], bool)
    maps = np.array([[[0.9, 0.5, 0.7, 0.3, 0.3, 0.2, 0.1]]])
    assert pro(masks, maps, 0.25) == 0.25
    assert pro(masks, maps, 0.5) == 0.375
    assert pro(masks, maps, 1.0) == 0.5625


def test_regions_count_alike_whatever_their_size():
    masks = np.zeros((1, 20, 20), bool)
    masks[0, :10, :10] = masks[0, 15, 15] = True
    maps = np.zeros((1, 20, 20))
    maps[0, :10, :10] = 1
    # The large region is found at once, the single pixel only with all normal ones: half of the diagonal.
    assert pro(masks, maps) == pytest.approx(0.5 + 0.15 / 2, abs=1e-15)


def test_one_region_up_to_rate_one_is_the_auroc():
    masks, maps = pixel_set(1, 15, 11)
    masks[:] = False
    masks[0, 3:7, 2:9] = True
    assert pro(masks, maps, 1.0) == pytest.approx(pixel_auroc(masks, maps), abs=1e-14)


@pytest.mark.parametrize("limit", [0.001, 0.3, 1.0])
def test_perfect_maps_reach_one_and_not_more(limit):
    masks, _ = pixel_set(3, 14, 17)
    assert pro(masks, masks.astype(np.float32), limit) == 1.0
    assert pixel_auroc(masks, masks.astype(np.float32)) == 1.0
    assert pro(masks, -masks.astype(np.float32), 0.3) == 0.0


def test_a_large_set_equals_scikit_learn_on_any_number_of_threads():
    reference = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference here")
    masks, maps = pixel_set(40, 224, 224, distinct=1000)
    auroc = pixel_auroc(masks, maps)
    assert auroc == pytest.approx(reference.roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    overlap = pro(masks, maps)
    for threads in (1, 2, 5):
        assert pixel_auroc(masks, maps, threads=threads) == auroc
        assert pro(masks, maps, threads=threads) == overlap


# --- Sizes that differ, pixels that are ignored ------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("distinct", [None, 9])
def test_images_of_several_sizes_are_one_set_of_pixels(distinct, seed):
    masks, maps, _ = mixed_set(distinct=distinct, seed=seed)
    labels, scores = np.concatenate([m.ravel() for m in masks]), np.concatenate([m.ravel() for m in maps])
    assert pixel_auroc(masks, maps) == pixel_auroc(labels[None, None], scores[None, None])
    expected = oracle_metrics.average_precision(labels, scores)
    assert pixel_average_precision(masks, maps) == pytest.approx(expected, abs=1e-12)
    assert pixel_f1_optimal(masks, maps) == F1Optimum(*oracle_metrics.f1_optimal(labels, scores))
    assert pro(masks, maps) == pytest.approx(oracle_metrics.pro(masks, maps, 0.3), abs=1e-12)
    assert count_regions(masks) == sum(len(oracle_metrics.regions(mask)) for mask in masks)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("distinct", [None, 9])
def test_ignored_pixels_count_in_no_metric(distinct, seed):
    masks, maps, ignored = mixed_set(distinct=distinct, seed=seed)
    labels, scores = kept(masks, maps, ignored)
    assert pixel_auroc(masks, maps, ignored=ignored) == pixel_auroc(labels[None, None], scores[None, None])
    expected = oracle_metrics.average_precision(labels, scores)
    assert pixel_average_precision(masks, maps, ignored=ignored) == pytest.approx(expected, abs=1e-12)
    assert pixel_f1_optimal(masks, maps, ignored=ignored) == F1Optimum(*oracle_metrics.f1_optimal(labels, scores))
    expected = oracle_metrics.pro(masks, maps, 0.3, ignored)
    assert pro(masks, maps, ignored=ignored) == pytest.approx(expected, abs=1e-12)
    counted = [mask & ~out for mask, out in zip(masks, ignored, strict=True)]
    regions = sum(len(oracle_metrics.regions(mask)) for mask in counted)
    assert count_regions(masks, ignored=ignored) == count_regions(counted) == regions
    # What stands under an ignored pixel makes no difference.
    others = [mask ^ out for mask, out in zip(masks, ignored, strict=True)]
    elsewhere = [np.where(out, 99, amap) for amap, out in zip(maps, ignored, strict=True)]
    for metric in PIXEL_METRICS:
        assert metric(others, elsewhere, ignored=ignored) == metric(masks, maps, ignored=ignored)


def test_ignored_pixels_by_hand():
    # Two regions {0.9, 0.5} and {0.2}; normal pixels 0.7, 0.3, 0.3, 0.1: `test_pro_by_hand` with four pixels more.
    masks = np.array([[[1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0]]], bool)
    maps = np.array([[[0.9, 0.5, 0.7, 0.6, 0.95, 0.3, 0.3, 0.8, 0.2, 0.1, 0.05]]])
    ignored = np.array([[[0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1]]], bool)
    for limit, value in ((0.25, 0.25), (0.5, 0.375), (1.0, 0.5625)):
        assert pro(masks, maps, limit, ignored=ignored) == value
    assert count_regions(masks) == 3
    assert count_regions(masks, ignored=ignored) == 2
    # Of 12 pairs 0.9 wins four, 0.5 three, 0.2 one.
    assert pixel_auroc(masks, maps, ignored=ignored) == 8 / 12
    # Found of those at or above: 0.9 is 1 of 1, 0.5 is 2 of 3, 0.2 is 3 of 6.
    assert pixel_average_precision(masks, maps, ignored=ignored) == pytest.approx((1 + 2 / 3 + 1 / 2) / 3, abs=1e-15)
    assert pixel_f1_optimal(masks, maps, ignored=ignored) == F1Optimum(0.5, 4 / 6, 1, 1)


@pytest.mark.parametrize("limits", [(0.05, 0.5), (0.2, 1.0), (0.03, 0.04)])
@pytest.mark.parametrize("distinct", [None, 9, 2])
def test_aupimo_equals_its_definition(distinct, limits):
    masks, maps, ignored = mixed_set(distinct=distinct)
    masks[2][:] = False
    for options in ({}, {"ignored": ignored}):
        found = aupimo(masks, maps, limits, **options)
        np.testing.assert_allclose(found, oracle_metrics.aupimo(masks, maps, limits, **options), atol=1e-12)
        assert found.dtype == np.float64
        assert np.isnan(found[[2, 3]]).all()
        wide = [amap.astype(np.float64) for amap in maps]
        np.testing.assert_array_equal(aupimo(masks, wide, limits, threads=1, **options), found)


def test_aupimo_by_hand():
    # A normal image of ten pixels, 10 to 1: 8.5 is found from the rate 0.2 on, half of the way from 0.1 to 0.4 in
    # logarithms; 11 always. 20 is a normal pixel of an anomalous image, and counts nowhere.
    masks = [np.zeros((2, 5), bool), np.array([[True, False, True]])]
    maps = [np.arange(10.0, 0.0, -1.0).reshape(2, 5), np.array([[11.0, 20.0, 8.5]])]
    assert aupimo(masks, maps, (0.1, 0.4))[1] == pytest.approx(0.75, abs=1e-15)
    # 8 ties with a normal pixel, and is found gradually from 0.2 to 0.3.
    maps[1][0, 2] = 8
    expected = 0.5 + (1 - 2 * np.log(1.5) + np.log(4 / 3)) / np.log(4) / 2
    assert aupimo(masks, maps, (0.1, 0.4))[1] == pytest.approx(expected, abs=1e-15)
    # An image of two pixels weighs as much as that of ten: above 8 are 10, 9.5 and 9, so rates of 0.05 + 0.25 + 0.05.
    masks.append(np.zeros((1, 2), bool))
    maps.append(np.array([[9.5, 0.0]]))
    assert aupimo(masks, maps, (0.1, 0.4))[1] == pytest.approx(0.5 + (1 - 7 * np.log(8 / 7)) / np.log(4) / 2, abs=1e-15)


def test_perfect_maps_have_an_aupimo_of_one_and_maps_upside_down_of_zero():
    masks, _ = pixel_set(4, 224, 224)
    masks[1] = masks[3] = False
    np.testing.assert_array_equal(aupimo(masks, masks.astype(np.float32)), [1, np.nan, 1, np.nan])
    np.testing.assert_array_equal(aupimo(masks, -masks.astype(np.float32)), [0, np.nan, 0, np.nan])


def test_an_ignored_pixel_cuts_a_region():
    masks, ignored = np.zeros((1, 3, 5), bool), np.zeros((1, 3, 5), bool)
    masks[0, 1] = ignored[0, 1, 2] = True
    assert count_regions(masks) == 1
    assert count_regions(masks, ignored=ignored) == 2
    assert count_regions([]) == count_regions(masks & False) == count_regions(masks, ignored=masks) == 0


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_arrays_lists_and_ignored_pixels_of_one_size_agree(metric):
    masks, maps = pixel_set(3, 8, 9)
    ignored = np.random.default_rng(1).random(masks.shape) < 0.3
    before = masks.copy(), maps.copy(), ignored.copy()
    expected = metric(masks, maps, ignored=ignored)
    assert expected != metric(masks, maps)
    for given in (list(ignored), np.asfortranarray(ignored)):
        assert metric(masks, maps, ignored=given) == metric(list(masks), maps, ignored=given) == expected
        assert metric(masks.astype(np.uint8) * 255, list(maps), ignored=given) == expected
    assert metric(masks, maps, ignored=ignored & False) == metric(masks, maps, ignored=None) == metric(masks, maps)
    for array, copy in zip((masks, maps, ignored), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_images_of_a_list_may_have_dtypes_of_their_own():
    masks, maps = pixel_set(2, 8, 9, distinct=9)
    expected = pixel_auroc(masks, maps)
    assert pixel_auroc([masks[0], masks[1].astype(np.uint8) * 255], [maps[0], maps[1].astype(np.float64)]) == expected
    assert pixel_auroc([[[True, False]], [[False]]], [[[2, 1]], [[1.5]]]) == 1.0


# --- What is accepted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_masks_and_maps_of_any_kind(metric):
    masks, maps = pixel_set(3, 8, 9)
    expected = metric(masks, maps)
    assert metric(masks.astype(np.uint8) * 255, maps) == expected
    assert metric(np.where(masks, 128, 127).astype(np.uint8), maps) == expected
    assert metric(list(masks), tuple(maps)) == metric(masks, list(maps)) == expected
    assert metric(np.asfortranarray(masks), np.asfortranarray(maps)) == expected
    assert metric(masks[:, ::-1, ::-1], maps[:, ::-1, ::-1]) == expected


def test_tensors_are_read():
    torch = pytest.importorskip("torch", reason="tensors need torch")
    masks, maps = pixel_set(3, 8, 9)
    for metric in PIXEL_METRICS:
        expected = metric(masks, maps)
        assert metric(torch.from_numpy(masks), torch.from_numpy(maps).requires_grad_()) == expected
        assert metric(list(torch.from_numpy(masks)), list(torch.from_numpy(maps))) == expected


# --- What is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_pixels_that_are_refused(metric):
    masks, maps = pixel_set(2, 4, 5)
    bad = maps.copy()
    bad[1, 2, 3] = np.nan
    refused = [
        (masks, maps[:, :3], r"masks\[0\] must have the size of maps\[0\], \(3, 5\); got \(4, 5\)"),
        (masks, maps[:1], "masks must be as many as maps, one for each; got 2 and 1"),
        (masks, bad, "maps must be finite everywhere; got nan at index 1, row 2, column 3"),
        (masks.astype(np.uint8), maps, "uint8 of at most 1.*masks != 0"),
        (masks[0], maps[0], r"masks must have shape \(n, H, W\).*got shape \(4, 5\)"),
        (masks, maps[:, None], r"maps must have shape \(n, H, W\).*got shape \(2, 1, 4, 5\)"),
        ([masks[0], masks[1, :2]], maps, r"masks\[1\] must have the size of maps\[1\], \(4, 5\); got \(2, 5\)"),
        (masks, [maps[0], maps[1, 0]], r"maps\[1\] must have shape \(H, W\), as an image; got shape \(5,\)"),
        (list(masks), [maps[0], bad[1]], "maps must be finite everywhere; got nan at index 1, row 2, column 3"),
        ([masks[0], masks[1, :, :0]], [maps[0], maps[1, :, :0]], "at least one pixel.*height 4 and width 0 at index 1"),
        (masks & False, maps, "masks must be .*got 0 anomalous of 40 pixels"),
        (masks[:0], maps[:0], "maps is empty"),
        ([], [], "maps is empty"),
    ]
    for given_masks, given_maps, message in refused:
        with pytest.raises(ValueError, match=message):
            metric(given_masks, given_maps)
    with pytest.raises(TypeError, match=r"got dtype int64. For zeros and ones pass masks != 0"):
        metric(masks.astype(np.int64), maps)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        metric(masks, maps, threads=0)


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.01, np.nan])
def test_limits_that_are_refused(limit):
    masks, maps = pixel_set(2, 4, 5)
    with pytest.raises(ValueError, match="fpr_limit must be a number > 0 and <= 1"):
        pro(masks, maps, limit)


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_ignored_pixels_that_are_refused(metric):
    masks, maps = pixel_set(2, 4, 5)
    ignored = np.zeros_like(masks)
    refused = [
        (ignored[:1], "ignored must be as many as masks, one for each; got 1 and 2"),
        (ignored[:, :3], r"ignored\[0\] must have the size of masks\[0\], \(4, 5\); got \(3, 5\)"),
        (ignored[0], r"ignored must have shape \(n, H, W\).*got shape \(4, 5\)"),
        (masks, "masks must be .*got 0 anomalous of [0-9]+ pixels and [0-9]+ ignored"),
        (~ignored, "got 0 anomalous of 0 pixels and 40 ignored"),
    ]
    for given, message in refused:
        with pytest.raises(ValueError, match=message):
            metric(masks, maps, ignored=given)
    for given in (ignored.astype(np.uint8), [ignored[0], ignored[1].astype(int)]):
        with pytest.raises(TypeError, match=r"ignored must be bool.*For zeros and ones pass ignored != 0"):
            metric(masks, maps, ignored=given)


def test_masks_of_zeros_and_ones_are_refused_whatever_is_ignored():
    masks, maps = pixel_set(2, 4, 5)
    ones = masks.astype(np.uint8)
    for given in (ones, list(ones)):
        with pytest.raises(ValueError, match=r"uint8 of at most 1.*masks != 0"):
            pixel_auroc(given, maps, ignored=masks & (np.arange(5) == 0))
    # Where all that is marked is ignored, nothing was meant to be anomalous.
    assert count_regions(ones * 100, ignored=masks) == 0


@pytest.mark.parametrize("metric", BOTH_CLASSES)
def test_a_missing_class_of_pixels_is_refused(metric):
    masks, maps = pixel_set(2, 4, 5)
    for given, anomalous in ((masks & False, 0), (masks | True, 40)):
        with pytest.raises(ValueError, match=f"masks must be of both classes.*got {anomalous} anomalous of 40 pixels"):
            metric(given, maps)


def test_limits_of_aupimo_that_are_refused():
    masks, maps = pixel_set(3, 4, 5)
    masks[1:] = False
    refused = [
        ((0.1, 0.1), "fpr_limits must be a pair"),
        ((0.3, 0.1), "fpr_limits must be a pair"),
        ((0.3,), "fpr_limits must be a pair"),
        ((np.nan, 0.1), "fpr_limits must be a number and finite"),
        ((0, 0.1), "fpr_limits must be two false positive rates, 0 < lower < upper <= 1; got 0 and 0.1"),
        ((0.1, 1.5), "fpr_limits must be two false positive rates"),
        (
            (0.024, 0.1),
            r"fpr_limits\[0\] must.*at least 1/40, one pixel in one of 2 normal images of 20.*; got 2\.4e-2\. Take",
        ),
    ]
    for limits, message in refused:
        with pytest.raises(ValueError, match=message):
            aupimo(masks, maps, limits)
    with pytest.raises(TypeError, match="fpr_limits must be a pair"):
        aupimo(masks, maps, 0.1)
    aupimo(masks, maps, (0.025, 0.1))
    with pytest.raises(ValueError, match=r"without an anomalous pixel in at least one image.*got 0 normal of 1 images"):
        aupimo(masks[:1], maps[:1])
    with pytest.raises(ValueError, match="got 0 normal of 3 images"):
        aupimo(masks, maps, ignored=np.arange(3)[:, None, None].repeat(4, 1).repeat(5, 2) > 0)
