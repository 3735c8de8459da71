"""The cache of a backbone's maps: read back to the bit, an image past the backbone once, a file cut short anew."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_networks import PASSED, Network, tiny

from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.reproduce.cache import MapCache


@pytest.mark.parametrize("name", ["efficientnet_lite0", "network"])
def test_maps_out_of_the_cache_are_the_backbones_to_the_bit(name, tmp_path):
    backbone = load_backbone(name, layers=("blocks.4", "blocks.10")) if name != "network" else tiny(name)
    cache = MapCache(tmp_path, backbone)
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 3, 64, 48), np.float32))
    expected = backbone(images)
    for layers in (backbone.layers, backbone.layers[1:], backbone.layers[::-1]):
        for _ in range(2):  # written, then read
            found = cache.view(layers)(images)
            assert cache.view(layers).layers == layers
            for layer, layer_map in zip(layers, found, strict=True):
                wanted = expected[backbone.layers.index(layer)]
                assert torch.equal(layer_map, wanted)
                assert layer_map.stride() == wanted.stride()


def test_an_image_passes_the_backbone_once_and_another_one_anew(tmp_path):
    PASSED.clear()
    cache = MapCache(tmp_path, tiny("network"))
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32))
    cache.view(("1",))(images)
    MapCache(tmp_path, tiny("network")).view(("2",))(images[1:])
    assert PASSED == [3]
    other = images.clone()
    other[2, 0, 0, 0] += 1e-6
    cache.view(("1",))(other)
    assert PASSED == [3, 3]
    files = list(tmp_path.rglob("*.npy"))
    assert len(files) == 4 * 2
    assert not [file for file in tmp_path.rglob("*") if "tmp" in file.name]
    with cache.bypassed(tiny("network", layers=("1",))):
        assert len(cache.view(("1",))(images)) == 1
    assert PASSED == [3, 3, 3]


def test_another_network_has_maps_of_its_own(tmp_path):
    images = torch.zeros(1, 3, 32, 32)
    first = tiny("network")
    torch.manual_seed(1)
    second = replace(load_backbone(Network(), layers=("1", "2"), device="cpu"), name="network")
    for backbone in (first, second, first):
        assert torch.equal(MapCache(tmp_path, backbone).view(("2",))(images)[0], backbone(images)[1])


def test_a_file_that_was_cut_short_is_written_anew(tmp_path):
    backbone = tiny("network")
    images = torch.ones(1, 3, 32, 32)
    expected = MapCache(tmp_path, backbone).view(("1",))(images)[0]
    for size in (0, 40, 200):
        file = next(tmp_path.rglob("*.1.npy"))
        os.truncate(file, size)
        assert torch.equal(MapCache(tmp_path, backbone).view(("1",))(images)[0], expected)
        assert file.stat().st_size > 200


def test_a_backbone_that_cannot_be_known_again_is_refused(tmp_path):
    with pytest.raises(ValueError, match="backbone must have weights that it is known by"):
        MapCache(tmp_path, load_backbone(lambda images: [images]))
    with pytest.raises(ValueError, match=r"layers must be some of \('1', '2'\); got \('3',\)"):
        MapCache(tmp_path, tiny("network")).view(("3",))
