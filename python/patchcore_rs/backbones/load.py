"""A backbone from whatever the caller names or holds."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchcore_rs._checks import integer
from patchcore_rs._limits import torch_call
from patchcore_rs.backbones.backbone import Backbone, resolve_device
from patchcore_rs.backbones.host import widen
from patchcore_rs.backbones.layers import HookedLayers, check_layers, freeze
from patchcore_rs.backbones.named import load_named
from patchcore_rs.backbones.weights import hash_weights, load_weights

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence


def load_backbone(
    backbone: str | nn.Module | Callable[[Tensor], Any] | Backbone,
    *,
    layers: Sequence[str] | None = None,
    strides: Sequence[int] | None = None,
    weights: str | os.PathLike[str] | None = "default",
    device: str | torch.device = "auto",
) -> Backbone:
    """Build a backbone, load its weights and freeze it.

    Args:
        backbone: "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", the name of a torchvision
            classification model, "timm:NAME", a `torch.nn.Module` with `layers=`, or a callable (a module without
            `layers=` too) that maps images (n, 3, H, W) to a list of maps (n, c, h, w). A module is copied: the
            caller's own keeps its mode, its gradients and its hooks, and later changes to it have no effect here. Half
            precision is widened to float32, float64 is refused. A `Backbone` is moved to `device`.
        layers: names out of `module.named_modules()`; the first sets the grid of the patches. None takes the
            recommended ones: "layer2" and "layer3" for every ResNet. A layer that runs several times gives its first
            output.
        strides: in place of `layers`, for a network called by its name: the last layer of each of these strides that it
            has, in pixels of the image, such as (4, 8, 16). Known of EfficientNet-Lite (2 to 32), ResNets and DenseNets
            (4 to 32), SqueezeNet 1.1 (4 to 16), and those of timm's networks that say so.
        weights: "default" for the ImageNet weights (`IMAGENET1K_V1` for torchvision, fetched and hash-checked on first
            use; an installed package for EfficientNet-Lite) or those a module holds. None keeps the random
            initialisation, drawn from torch's global generator. A path is a state dict: `.safetensors`, or what
            `torch.save` wrote, read with `weights_only=True`; half precision is widened to float32.
        device: "auto" (CUDA where there is one, else the CPU) or a torch device.

    Returns:
        A frozen `Backbone`.

    Raises:
        TypeError: the backbone, the layers or the strides are of another kind.
        ValueError: a name, a layer, a stride, a weight file or the device does not fit.
        ImportError: a package is missing.
        RuntimeError: weights cannot be fetched.
        OSError: the file of the weights cannot be opened.
    """
    with torch_call():
        return _load(backbone, layers, strides, weights, resolve_device(device))


def _load(
    backbone: str | nn.Module | Callable[[Tensor], Any] | Backbone,
    layers: Sequence[str] | None,
    strides: Sequence[int] | None,
    weights: str | os.PathLike[str] | None,
    target: torch.device,
) -> Backbone:
    if isinstance(backbone, Backbone):
        if layers is not None or strides is not None or weights != "default":
            raise ValueError(
                "layers=, strides= and weights= are part of a Backbone already; pass them where it is loaded"
            )
        return backbone.to(target)
    names, chosen = _check_layer_names(layers), _check_strides(strides)
    if names is not None and chosen is not None:
        raise ValueError(f"strides must be None where layers= names the layers; got {chosen}. Pass one of the two")
    if isinstance(backbone, str):
        return load_named(backbone, names, chosen, weights).to(target)
    if not callable(backbone):
        raise TypeError(
            f"backbone must be a name, a torch.nn.Module or a callable returning maps; got {type(backbone).__name__}"
        )
    if chosen is not None:
        raise ValueError(
            f"backbone must be a name where strides= chooses its layers; got {type(backbone).__name__}. Name the "
            "layers of a torch.nn.Module with layers="
        )
    if isinstance(backbone, nn.Module):
        return _load_module(backbone, names, weights).to(target)
    if names or weights not in ("default", None):
        raise ValueError(
            "layers= and weights= need a torch.nn.Module, and this backbone is a plain callable: "
            "let it return the maps of its layers itself"
        )
    return Backbone(getattr(backbone, "__qualname__", type(backbone).__name__), backbone, ())


def _load_module(module: nn.Module, layers: tuple[str, ...] | None, weights: str | os.PathLike[str] | None) -> Backbone:
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"backbone must be a torch.nn.Module that Python runs, or a callable; got {name}. Pass the network that it "
            "was made from, or a function that returns its maps: lambda images: module(images)"
        )
    empty = next((parameter for parameter, tensor in module.named_parameters() if tensor.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"backbone {name!r} must hold its weights; got {empty!r} on the meta device. Load them before: "
            'module.to_empty(device="cpu"), then module.load_state_dict(...)'
        )
    module = copy.deepcopy(module)
    widen(module, name)
    if layers is not None:
        check_layers(module, layers, name)
    if weights not in ("default", None):
        load_weights(module, weights)
    digest = hash_weights(module)
    freeze(module)
    reader = module if layers is None else HookedLayers(module, layers)
    return Backbone(name, reader, layers or (), weights_hash=digest)


def _check_layer_names(layers: Sequence[str] | None) -> tuple[str, ...] | None:
    if layers is None:
        return None
    if isinstance(layers, str) or not all(isinstance(layer, str) for layer in layers):
        raise TypeError(f"layers must be a sequence of module names such as ('layer2', 'layer3'); got {layers!r}")
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers must name at least one module and none twice; got {tuple(layers)!r}")
    return tuple(layers)


def _check_strides(strides: Sequence[int] | None) -> tuple[int, ...] | None:
    if strides is None:
        return None
    if isinstance(strides, str) or not isinstance(strides, Iterable):
        raise TypeError(f"strides must be a sequence of integers such as (4, 8, 16); got {strides!r}")
    chosen = tuple(integer(stride, "a stride", minimum=1) for stride in strides)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"strides must be at least one and none twice; got {chosen}")
    return chosen
