"""Layers by stride: the last of each stride asked for, where strides are known, and refusals of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from patchcore_rs.backbones.backbone import Backbone
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.detector.extraction import find_backbone

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("torchvision")

RESNET = {2: "relu", 4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"}
DENSENET = {4 * 2**i: f"features.denseblock{i + 1}" for i in range(4)}
LITE12 = {2: "blocks.0", 4: "blocks.3", 8: "blocks.6", 16: "blocks.14", 32: "blocks.20"}
KNOWN = {
    "efficientnet_lite0": {2: "blocks.0", 4: "blocks.2", 8: "blocks.4", 16: "blocks.10", 32: "blocks.15"},
    "efficientnet_lite1": LITE12,
    "efficientnet_lite2": LITE12,
    "resnet18": RESNET,
    "resnet50": RESNET,
    "densenet121": {2: "features.relu0"} | DENSENET,
    "squeezenet1_1": {4: "features.4", 8: "features.7", 16: "features.12"},
    "timm:resnet18": RESNET | {2: "act1"},
    "timm:densenet121": DENSENET,
    "timm:tf_efficientnet_lite0": {2: "blocks.0", 4: "blocks.1", 8: "blocks.2", 16: "blocks.4", 32: "blocks.6"},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small images gain nothing from torch's threads, and lose much where others use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", KNOWN)
def test_strides_choose_layers_whose_maps_have_them(name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    backbone = load_backbone(name, strides=tuple(KNOWN[name]), weights=None, device="cpu")
    assert backbone.layers == tuple(KNOWN[name].values())
    floor = name == "squeezenet1_1"  # its pooling drops what does not fill a window
    assert [layer_map.shape[-1] for layer_map in backbone(torch.zeros(1, 3, 64, 64))] == [
        64 // stride - floor for stride in KNOWN[name]
    ]


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite2"])
def test_the_block_of_a_stride_is_the_last_with_maps_of_its_size(name: str) -> None:
    blocks = tuple(f"blocks.{i}" for i in range(int(KNOWN[name][32].removeprefix("blocks.")) + 1))
    maps = load_backbone(name, layers=blocks, weights=None, device="cpu")(torch.zeros(1, 3, 64, 64))
    assert {64 // layer_map.shape[-1]: block for block, layer_map in zip(blocks, maps, strict=True)} == KNOWN[name]
    with pytest.raises(ValueError, match="is not a module"):
        load_backbone(name, layers=(f"blocks.{len(blocks)}",), weights=None)


def test_strides_that_a_network_has_not_got_are_left_out() -> None:
    backbone = load_backbone("squeezenet1_1", strides=(2, 4, 16, 32), weights=None, device="cpu")
    assert backbone.layers == ("features.4", "features.12")


def test_strides_are_taken_in_the_order_asked_for() -> None:
    backbone = load_backbone("resnet18", strides=[16, 4], weights=None, device="cpu")
    assert backbone.layers == ("layer3", "layer1")
    assert [tuple(layer_map.shape) for layer_map in backbone(torch.zeros(1, 3, 64, 64))] == [
        (1, 256, 4, 4),
        (1, 64, 16, 16),
    ]


def test_a_timm_network_with_its_channels_last_has_no_known_strides() -> None:
    timm = pytest.importorskip("timm")
    if not timm.is_model("mambaout_femto"):
        pytest.skip("this timm has no such network")
    with pytest.raises(ValueError, match=r"'timm:mambaout_femto' has no known strides; pass layers= with"):
        load_backbone("timm:mambaout_femto", strides=(8,), weights=None)


class Maps(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


BACKBONE = Backbone("mine", lambda x: [x], ())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"backbone": "squeezenet1_1", "strides": (32, 64)},
            ValueError,
            r"of backbone 'squeezenet1_1' must be among 4, 8, 16; got 32, 64\. .* pass layers= with .*'features\.12'",
        ),
        ({"backbone": "alexnet", "strides": (8,)}, ValueError, r"'alexnet' has no known strides; pass layers= with"),
        ({"backbone": "resnet18", "strides": (8,), "layers": ("layer2",)}, ValueError, r"got \(8,\)\. Pass one of the"),
        ({"backbone": "resnet18", "strides": ()}, ValueError, r"at least one and none twice; got \(\)"),
        ({"backbone": "resnet18", "strides": (8, 8)}, ValueError, r"at least one and none twice; got \(8, 8\)"),
        ({"backbone": "resnet18", "strides": (0,)}, ValueError, "a stride must be at least 1; got 0"),
        ({"backbone": "resnet18", "strides": (8.0,)}, TypeError, "a stride must be an integer; got 8.0"),
        ({"backbone": "resnet18", "strides": 8}, TypeError, r"sequence of integers such as \(4, 8, 16\); got 8"),
        ({"backbone": "resnet18", "strides": "8"}, TypeError, "sequence of integers .* got '8'"),
        ({"backbone": Maps(), "strides": (8,)}, ValueError, "must be a name where strides= .* got Maps.*layers="),
        ({"backbone": len, "strides": (8,)}, ValueError, "must be a name where strides= .* got builtin_function"),
        ({"backbone": BACKBONE, "strides": (8,)}, ValueError, "strides= and weights= are part of a Backbone already"),
    ],
)
def test_strides_that_do_not_fit_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    weights = {"weights": None} if isinstance(arguments["backbone"], str) else {}
    with pytest.raises(error, match=message):
        load_backbone(**arguments, **weights)


def test_a_methods_strides_are_for_networks_whose_layers_are_left_to_it() -> None:
    def layers(backbone: Any, layers: Any = "auto", weights: Any = "default") -> tuple[str, ...]:
        parameters = {"profile": "inspect", "backbone": backbone, "layers": layers, "weights": weights, "device": "cpu"}
        return find_backbone(parameters, (4, 8)).layers

    assert layers("resnet18", weights=None) == ("layer1", "layer2")
    assert layers("resnet18", ("layer3",), None) == ("layer3",)
    assert layers(nn.Sequential(nn.Identity()), ("0",)) == ("0",)
    assert layers(Maps()) == layers(len) == layers(BACKBONE) == ()
