"""The steps one by one: what the kernels compute, for arrays and tensors in any layout, and back in what came in."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from patchcore_rs import MemoryBank, aggregate, anomaly_maps, image_scores

SHAPES = [(2, 5, 9, 7), (2, 3, 5, 4)]  # (images, channels, height, width) of two layers


def layers(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in SHAPES]


KINDS = {
    "arrays": lambda maps: maps,
    "float64": lambda maps: [layer.astype(np.float64) for layer in maps],
    "strided": lambda maps: [np.repeat(layer, 2, axis=3)[..., ::2] for layer in maps],
    "tensors": lambda maps: [torch.from_numpy(layer) for layer in maps],
    "channels_last": lambda maps: [
        torch.from_numpy(layer).contiguous(memory_format=torch.channels_last) for layer in maps
    ],
    "with a gradient": lambda maps: [torch.from_numpy(layer).requires_grad_() for layer in maps],
}


# --- Aggregation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [None, 6])
def test_features_are_the_oracles_in_what_came_in(kind, width):
    maps = layers()
    found, grid = aggregate(KINDS[kind](maps), width=width)
    assert isinstance(found, np.ndarray if kind in ("arrays", "float64", "strided") else torch.Tensor)
    assert grid == (9, 7)
    channels_last = [layer.transpose(0, 2, 3, 1) for layer in maps]
    expected = oracle.concatenated(channels_last, 3, 1) if width is None else oracle.pooled(channels_last, 3, 1, width)
    np.testing.assert_allclose(np.asarray(found).reshape(expected.shape), expected, rtol=0, atol=2e-6)
    same, _ = aggregate(maps, width=width)
    assert np.asarray(found).tobytes() == same.tobytes()


def test_a_neighbourhood_and_its_stride_are_taken():
    maps = layers()[:1]
    found, grid = aggregate(maps, patch_size=1, stride=2)
    assert grid == (5, 4)
    assert np.array_equal(found.reshape(2, 5, 4, 5), maps[0].transpose(0, 2, 3, 1)[:, ::2, ::2])


# --- Scores and maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reweight", [None, 1, 9])
def test_image_scores_are_the_banks(reweight):
    rng = np.random.default_rng(1)
    bank, features = MemoryBank(rng.standard_normal((40, 8), dtype=np.float32)), rng.standard_normal((12, 8))
    features = features.astype(np.float32)
    distances, indices = bank.kneighbors(features)
    expected = bank.image_scores(features, distances, indices, patches=4, reweight=reweight)
    found = image_scores(bank, features, distances, indices, patches=4, reweight=reweight)
    assert isinstance(found, np.ndarray)
    assert found.tobytes() == expected.tobytes()
    tensors = map(torch.from_numpy, (features, distances, indices))
    found = image_scores(bank, *tensors, patches=4, reweight=reweight)
    assert found.dtype == torch.float64
    assert found.numpy().tobytes() == expected.tobytes()


def test_image_scores_weigh_by_nine_neighbours():
    rng = np.random.default_rng(2)
    rows, features = rng.standard_normal((40, 8), dtype=np.float32), rng.standard_normal((6, 8), dtype=np.float32)
    bank = MemoryBank(rows)
    found = image_scores(bank, features, *bank.kneighbors(features), patches=3)
    expected = [oracle.image_score(image, rows, 9) for image in features.reshape(2, 3, 8)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_maps_are_upsampled_and_smoothed_as_asked():
    scores = np.random.default_rng(3).random((2, 4, 5), dtype=np.float32)
    plain = torch.nn.functional.interpolate(torch.from_numpy(scores)[None], (16, 15), mode="bilinear")[0].numpy()
    np.testing.assert_allclose(anomaly_maps(scores, (16, 15), sigma=0), plain, rtol=0, atol=1e-6)
    nearest = anomaly_maps(scores, (8, 10), sigma=0, upsampling="nearest")
    assert np.array_equal(nearest, scores.repeat(2, axis=1).repeat(2, axis=2))
    smooth = anomaly_maps(torch.from_numpy(scores), (16, 15), sigma=2.0, border="reflect")
    assert isinstance(smooth, torch.Tensor)
    reach = torch.arange(-8, 9, dtype=torch.float64)
    kernel = torch.exp(-(reach**2) / 8)
    kernel /= kernel.sum()
    padded = torch.nn.functional.pad(torch.from_numpy(plain).double()[:, None], (8, 8, 8, 8), mode="reflect")
    across = torch.nn.functional.conv2d(padded, kernel[None, None, None])
    expected = torch.nn.functional.conv2d(across, kernel[None, None, :, None])[:, 0]
    np.testing.assert_allclose(smooth.numpy(), expected, rtol=0, atol=2e-6)
    assert not np.array_equal(smooth.numpy(), anomaly_maps(scores, (16, 15), sigma=2.0))


# --- What is refused ---------------------------------------------------------------------------------------

MAPS = np.zeros((1, 2, 3, 3), np.float32)
SCORES = np.zeros((1, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: aggregate(MAPS), ValueError, "maps[0] must be a 4-D array (images, channels, height, width), one for"),
        (lambda: aggregate([MAPS.astype(int)]), TypeError, "maps[0] must hold floating-point values; got dtype int64"),
        (lambda: aggregate([]), ValueError, "maps is empty: one map per layer"),
        (lambda: aggregate([MAPS], patch_size=0), ValueError, "patch_size must be at least 1; got 0"),
        (lambda: aggregate([MAPS], stride=1.5), TypeError, "stride must be an integer; got 1.5"),
        (lambda: aggregate([MAPS * np.nan]), ValueError, "maps"),
        (
            lambda: aggregate([torch.empty(1, 2, 3, 3, device="meta")]),
            TypeError,
            "maps[0] is a tensor on meta; pass maps[0].cpu()",
        ),
        (
            lambda: anomaly_maps(SCORES[0], (9, 9)),
            ValueError,
            "scores must be a 3-D array (images, rows, columns); got 2",
        ),
        (lambda: anomaly_maps(SCORES.astype(int), (9, 9)), TypeError, "scores must hold floating-point values"),
        (lambda: anomaly_maps(SCORES, 9), TypeError, "size must be (height, width), two integers >= 1; got 9"),
        (lambda: anomaly_maps(SCORES, (0, 9)), ValueError, "size must be an integer from 1 to 2147483647; got 0"),
        (lambda: anomaly_maps(SCORES, (9, 9), sigma=-1), ValueError, "sigma must be"),
        (
            lambda: anomaly_maps(SCORES, (9, 9), border="wrap"),
            ValueError,
            "border must be one of 'symmetric', 'reflect'",
        ),
    ],
)
def test_a_wrong_argument_is_named(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).startswith(message)
