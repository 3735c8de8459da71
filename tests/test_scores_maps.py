"""Image scores and anomaly maps: the paper's equations, scipy and torch, and the same bits on every path."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from patchcore_rs import MemoryBank, _native, build_info


def image_scores(features, bank, patches, b, threads=None):
    native = _native.MemoryBank(bank, threads)
    distances, indices = native.kneighbors(features, 1, threads)
    return native.image_scores(features, distances[:, 0].copy(), indices[:, 0].copy(), patches, b, threads)


def column(*values):
    return np.array(values, np.float32)[:, None]


# --- Eq. 6 and Eq. 7 ---------------------------------------------------------------------------------------


def test_the_literal_case():
    bank, patches = column(3, 3.5, 4), column(3.2, 0, 3.9)
    assert image_scores(patches, bank, 3, 3) == pytest.approx([2.4410], abs=5e-5)
    assert image_scores(patches, bank, 3, 1) == [3.0]


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("b", [1, 2, 9, 40])
def test_scores_are_the_oracles(b, quantised):
    rng = np.random.default_rng(b)
    features = rng.standard_normal((5 * 49 + 40, 20), dtype=np.float32)
    if quantised:  # ties and duplicates
        features = np.round(features)
    bank, patches = features[:40], features[40:]
    expected = [oracle.image_score(image, bank, b) for image in patches.reshape(5, 49, 20)]
    np.testing.assert_allclose(image_scores(patches, bank, 49, b), expected, rtol=1e-12)


def test_a_score_does_not_depend_on_the_batch_threads_or_level(monkeypatch):
    rng = np.random.default_rng(0)
    bank = rng.standard_normal((300, 33), dtype=np.float32)
    patches = rng.standard_normal((6 * 16, 33), dtype=np.float32)
    first = image_scores(patches, bank, 16, 9, threads=1)
    for level in build_info()["simd_available"]:
        monkeypatch.setenv("PATCHCORE_RS_SIMD", level)
        for threads in (1, 2, 7):
            assert image_scores(patches, bank, 16, 9, threads).tobytes() == first.tobytes()
    alone = np.concatenate([image_scores(image, bank, 16, 9) for image in patches.reshape(6, 16, 33)])
    assert alone.tobytes() == first.tobytes()


def test_far_images_have_finite_scores():
    bank = np.random.default_rng(0).standard_normal((20, 8), dtype=np.float32)
    score = image_scores(np.full((1, 8), 1e6, np.float32), bank, 1, 9)
    assert np.isfinite(score).all()
    assert score > 1e6


def test_b_is_lowered_to_the_bank():
    bank, patches = column(3, 3.5, 4), column(0, 1)
    distances, indices = MemoryBank(bank).kneighbors(patches)
    scores = MemoryBank(bank).image_scores(patches, distances[:, 0].copy(), indices[:, 0].copy(), patches=2, reweight=9)
    assert scores == pytest.approx([2.4410], abs=5e-5)


@pytest.mark.parametrize(
    ("arrays", "patches", "b", "message"),
    [
        ((np.zeros((4, 3)), np.zeros(4), np.zeros(4)), 2, 1, "features must be 2 values wide"),
        ((np.zeros((4, 2)), np.zeros(4), np.zeros(4)), 3, 1, "patches must be a divisor of the 4 rows"),
        ((np.zeros((4, 2)), np.zeros(3), np.zeros(4)), 2, 1, "distances must be 4 values"),
        ((np.zeros((4, 2)), np.zeros(4), np.zeros(5)), 2, 1, "indices must be 4 values"),
        ((np.zeros((4, 2)), np.zeros(4), np.full(4, 5)), 2, 1, "indices must be below the 5 rows"),
        ((np.zeros((4, 2)), np.zeros(4), np.full(4, -1)), 2, 1, "indices must be below the 5 rows"),
        ((np.zeros((4, 2)), np.full(4, np.nan), np.zeros(4)), 2, 1, "distances must be numbers"),
        ((np.full((4, 2), np.nan), np.zeros(4), np.zeros(4)), 2, 1, "features.*nan"),
        ((np.zeros((4, 2)), np.zeros(4), np.zeros(4)), 2, 0, "b must be between 1 and the 5 rows"),
        ((np.zeros((4, 2)), np.zeros(4), np.zeros(4)), 2, 6, "b must be between 1 and the 5 rows"),
    ],
)
def test_wrong_arguments_of_scores_are_named(arrays, patches, b, message):
    bank = _native.MemoryBank(np.zeros((5, 2), np.float32), None)
    features, distances, indices = arrays
    features, distances = features.astype(np.float32), distances.astype(np.float32)
    with pytest.raises(ValueError, match=message):
        bank.image_scores(features, distances, indices.astype(np.int64), patches, b)


# --- Maps --------------------------------------------------------------------------------------------------

SHAPES = [((2, 28, 28), (224, 224)), ((1, 5, 3), (37, 40)), ((3, 1, 1), (9, 1)), ((1, 14, 7), (5, 100))]


def grids(shape):
    return np.random.default_rng(0).uniform(0, 30, shape).astype(np.float32)


def anomaly_maps(scores, size, sigma=4.0, kind="bilinear", border="symmetric", *, threads=2):
    return _native.anomaly_maps(scores, *size, sigma, kind, border, threads)


@pytest.mark.parametrize(("shape", "size"), SHAPES)
@pytest.mark.parametrize("sigma", [0, 0.1, 1.3, 4, 20])
@pytest.mark.parametrize("kind", ["bilinear", "nearest"])
@pytest.mark.parametrize("border", ["symmetric", "reflect"])
def test_maps_are_the_oracles(shape, size, sigma, kind, border):
    scores = grids(shape)
    found = anomaly_maps(scores, size, sigma, kind, border)
    assert found.dtype == np.float32
    expected = oracle.anomaly_maps(scores, size, sigma, kind, border)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * scores.max())


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_maps_of_the_paper_are_torchs_and_scipys(shape, size):
    torch = pytest.importorskip("torch")
    ndimage = pytest.importorskip("scipy.ndimage")
    scores = grids(shape)
    upsampled = torch.nn.functional.interpolate(
        torch.from_numpy(scores)[None], size=size, mode="bilinear", align_corners=False
    )[0].numpy()
    expected = [ndimage.gaussian_filter(image, sigma=4) for image in upsampled]
    np.testing.assert_allclose(anomaly_maps(scores, size), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (50, 99)])
def test_maps_of_anomalib_are_torchs(size):
    torch = pytest.importorskip("torch")
    scores = grids((2, 28, 30))
    upsampled = torch.nn.functional.interpolate(torch.from_numpy(scores)[:, None], size=size, mode="nearest")
    assert np.array_equal(upsampled[:, 0], anomaly_maps(scores, size, 0, "nearest"))
    line = torch.exp(-0.5 * (torch.arange(-16, 17, dtype=torch.float64) / 4) ** 2)
    line = (line / line.sum()).float()
    padded = torch.nn.functional.pad(upsampled, (16, 16, 16, 16), mode="reflect")
    expected = torch.nn.functional.conv2d(padded, torch.outer(line, line)[None, None])[:, 0]
    np.testing.assert_allclose(anomaly_maps(scores, size, 4, "nearest", "reflect"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", [1, 7, 14, 27, 28, 30, 37])
def test_nearest_picks_torchs_positions(source):
    torch = pytest.importorskip("torch")
    scores = np.arange(source, dtype=np.float32)[None, None]
    for target in range(1, 300):
        expected = torch.nn.functional.interpolate(torch.from_numpy(scores), size=target, mode="nearest")
        assert np.array_equal(anomaly_maps(scores, (1, target), 0, "nearest"), expected), target


@pytest.mark.parametrize(("shape", "size"), [*SHAPES, ((2, 40, 40), (700, 300))])
def test_bits_of_maps_do_not_depend_on_threads_batches_or_level(shape, size, monkeypatch):
    scores = grids(shape)
    first = anomaly_maps(scores, size, threads=1)
    for level in build_info()["simd_available"]:
        monkeypatch.setenv("PATCHCORE_RS_SIMD", level)
        for threads in (1, 2, 7, None):
            assert anomaly_maps(scores, size, threads=threads).tobytes() == first.tobytes()
    assert b"".join(anomaly_maps(image[None], size).tobytes() for image in scores) == first.tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((1, 0, 2), np.float32), 4, 4, 4, "bilinear", "symmetric"), "scores is empty"),
        ((np.zeros((1, 2, 2), np.float32), 0, 4, 4, "bilinear", "symmetric"), "height must be at least 1"),
        ((np.zeros((1, 2, 2), np.float32), 4, 4, -1, "bilinear", "symmetric"), "sigma must be from 0"),
        ((np.zeros((1, 2, 2), np.float32), 4, 4, np.nan, "bilinear", "symmetric"), "sigma must be from 0"),
        (
            (np.zeros((1, 2, 2), np.float32), 4, 4, 4, "cubic", "symmetric"),
            'upsampling must be "bilinear" or "nearest"; got "cubic"',
        ),
        (
            (np.zeros((1, 2, 2), np.float32), 4, 4, 4, "nearest", "wrap"),
            'border must be "symmetric" or "reflect"; got "wrap"',
        ),
        (
            (np.full((1, 2, 2), np.nan, np.float32), 4, 4, 4, "nearest", "reflect"),
            "scores must be finite; got nan in image 0",
        ),
        ((np.zeros((1, 2, 4), np.float32)[..., ::2], 4, 4, 4, "nearest", "reflect"), "scores must be C-contiguous"),
    ],
)
def test_wrong_arguments_of_maps_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        _native.anomaly_maps(*arguments, 1)
