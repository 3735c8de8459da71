"""Aggregation: close to the float64 oracle and to torch, and the same bits whatever the threads, batches and level."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from patchcore_rs import _native, build_info

# Per case: (height, width, channels) of each layer.
BACKBONES = {
    "efficientnet_lite0": [(28, 28, 40), (14, 14, 112), (7, 7, 192)],
    "small wide_resnet50": [(8, 8, 512), (4, 4, 1024)],
    "odd": [(9, 7, 5), (5, 4, 11), (11, 3, 2)],
    "one position": [(1, 1, 3), (1, 1, 8)],
    "one layer": [(6, 5, 7)],
}


# Large enough that an image is cut between threads.
WIDE_RESNET50 = {"wide_resnet50": [(28, 28, 512), (14, 14, 1024)]}


def layers(name, n=2, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, *shape), dtype=np.float32) for shape in (BACKBONES | WIDE_RESNET50)[name]]


def aggregate(maps, patch_size=3, stride=1, width=None, threads=2):
    features, (rows, columns) = _native.aggregate(maps, patch_size, stride, width, threads)
    assert features.dtype == np.float32
    return features.reshape(-1, rows, columns, features.shape[-1])


def expected(maps, patch_size, stride, width):
    if width is None:
        return oracle.concatenated(maps, patch_size, stride)
    return oracle.pooled(maps, patch_size, stride, width)


# --- The definition ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("width", [None, 1, 7, 64, 384, 1024])
def test_features_are_the_oracles(name, width):
    maps = layers(name)
    np.testing.assert_allclose(aggregate(maps, width=width), expected(maps, 3, 1, width), rtol=0, atol=2e-6)


@pytest.mark.parametrize("patch_size", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("width", [None, 6, 9])
def test_neighbourhoods_are_the_oracles(patch_size, stride, width):
    maps = layers("odd")
    found = aggregate(maps, patch_size, stride, width)
    np.testing.assert_allclose(found, expected(maps, patch_size, stride, width), rtol=0, atol=1e-6)


def test_the_joined_layers_of_the_paper_have_a_closed_form():
    shallow, deep = layers("small wide_resnet50", n=1)
    found = aggregate([shallow, deep], width=1024)[0, 3, 4]
    around = shallow[0, 2:5, 3:6].astype(np.float64)
    np.testing.assert_allclose(found[:512], (around.sum(axis=(0, 1)) + around[1, 1]) / 10, rtol=0, atol=1e-6)
    means = oracle.unfold(deep, 3, 1).mean(axis=-1).reshape(1, 4, 4, 512, 2).mean(axis=-1)
    np.testing.assert_allclose(found[512:], oracle.to_grid(means, (8, 8))[0, 3, 4], rtol=0, atol=1e-6)


# --- Torch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_concatenation_is_torchs(name):
    torch = pytest.importorskip("torch")
    maps = layers(name)
    grid = maps[0].shape[1:3]
    joined = []
    for layer in maps:
        mean = torch.nn.functional.avg_pool2d(torch.from_numpy(layer).permute(0, 3, 1, 2), 3, 1, 1)
        joined.append(torch.nn.functional.interpolate(mean, size=grid, mode="bilinear", align_corners=False))
    expected = torch.cat(joined, dim=1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(aggregate(maps), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("name", "width"), [("small wide_resnet50", 1024), ("odd", 6), ("odd", 7)])
def test_pooling_is_torchs(name, width):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    maps = layers(name)
    grid = maps[0].shape[1:3]
    joined = []
    for layer in maps:
        n, h, w, c = layer.shape
        unfolded = functional.unfold(torch.from_numpy(layer).permute(0, 3, 1, 2), 3, padding=1)
        unfolded = functional.interpolate(unfolded.reshape(n, c * 9, h, w), size=grid, mode="bilinear")
        joined.append(functional.adaptive_avg_pool1d(unfolded.permute(0, 2, 3, 1).reshape(-1, 1, c * 9), width))
    expected = functional.adaptive_avg_pool1d(torch.cat(joined, dim=-1), width).reshape(-1, *grid, width).numpy()
    np.testing.assert_allclose(aggregate(maps, width=width), expected, rtol=1e-5, atol=2e-6)


# --- Bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BACKBONES, *WIDE_RESNET50])
@pytest.mark.parametrize("width", [None, 1024, 21])
def test_bits_do_not_depend_on_threads_batches_or_level(name, width, monkeypatch):
    maps = layers(name, n=3)
    first = aggregate(maps, width=width, threads=1)
    for level in build_info()["simd_available"]:
        monkeypatch.setenv("PATCHCORE_RS_SIMD", level)
        for threads in (1, 2, 7, None):
            assert aggregate(maps, width=width, threads=threads).tobytes() == first.tobytes()
    for image in range(3):
        alone = aggregate([layer[image : image + 1] for layer in maps], width=width)
        assert alone.tobytes() == first[image].tobytes()


def test_no_images_give_no_features():
    features, grid = _native.aggregate([np.zeros((0, 5, 4, 3), np.float32)], 3, 1, None, 2)
    assert features.shape == (0, 3)
    assert grid == (5, 4)


# --- Arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e16])
@pytest.mark.parametrize("threads", [1, 2])
def test_bad_values_are_named(value, threads):
    maps = layers("odd")
    maps[1][1, 4, 2, 10] = value
    with pytest.raises(
        ValueError, match=r"maps must be finite .* in maps\[1\] at image 1, row 4, column 2, channel 10"
    ):
        aggregate(maps, threads=threads)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 3, 1, None, 1), "maps is empty"),
        (([np.zeros((1, 4, 4, 0), np.float32)], 3, 1, None, 1), "channels of at least 1"),
        (([np.zeros((1, 1, 4, 3), np.float32)], 4, 1, None, 1), "lower patch_size"),
        (([np.zeros((n, 4, 4, 3), np.float32) for n in (2, 1)], 3, 1, None, 1), "same number of images"),
        (([np.zeros((1, 4, 4, 3), np.float32)[:, ::2]], 3, 1, None, 1), "maps must be C-contiguous"),
        (([np.zeros((1, 4, 4, 3), np.float32)], 0, 1, None, 1), "patch_size must be from 1"),
        (([np.zeros((1, 4, 4, 3), np.float32)], 3, 0, None, 1), "stride must be at least 1"),
        (([np.zeros((1, 4, 4, 3), np.float32)], 3, 1, 0, 1), "width must be at least 1"),
        (([np.zeros((1, 4, 4, 3), np.float32)], 3, 1, 2**60, 1), "does not fit"),
        (([np.zeros((1, 4, 4, 3), np.float32)], 3, 1, None, 0), "threads must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        _native.aggregate(*arguments)
