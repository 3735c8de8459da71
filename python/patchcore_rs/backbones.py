"""Frozen backbones: which networks there are, where their weights come from, and what each recommends.

A named network of known code is traced, folded and run channels-last, which measures fastest on a CPU; its maps meet
the plain network's at rtol 1e-4. timm's networks and the caller's own modules run as they are.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import http.client
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from patchcore_rs import efficientnet_lite0
from patchcore_rs.layers import HookedLayers, trace_layers

if TYPE_CHECKING:
    import os

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Backbone:
    """A frozen network that turns images into feature maps, with the preprocessing it was trained for.

    ``layers`` is empty for a callable that returns its own maps. ``resize`` (an int is the shorter side) and ``crop``
    are in pixels; ``mean`` and ``std`` normalise RGB in [0, 1]. ``embedding`` is the recommended width of a patch
    feature, ``"concat"`` for the plain concatenation of the layers. ``weights_hash`` is the sha256 of the state dict
    before folding, see :func:`hash_weights`; it is empty for a callable that is no ``torch.nn.Module``.
    """

    name: str
    module: Callable[[Tensor], Any]
    layers: tuple[str, ...]
    resize: int | tuple[int, int] | None = 256
    crop: int | None = 224
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    embedding: int | Literal["concat"] = "concat"
    weights_hash: str = ""
    channels_last: bool = False

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Feature maps (n, c, h, w), one per layer, of normalised ``images`` (n, 3, H, W) on the backbone's device.

        Safe to call from several threads. Raises ValueError where the network returns anything but such maps.
        """
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        with torch.inference_mode():
            maps = self.module(images.contiguous(memory_format=layout))
        if isinstance(maps, Mapping):
            maps = list(maps.values())
        if not isinstance(maps, (list, tuple)) or not maps:
            raise ValueError(
                f"backbone {self.name!r} must return a list of maps (n, c, h, w), got {_describe(maps)}; "
                "name the layers of a torch.nn.Module with layers="
            )
        for i, layer_map in enumerate(maps):
            if not isinstance(layer_map, Tensor) or layer_map.ndim != 4 or layer_map.shape[0] != images.shape[0]:
                where = f"layer {self.layers[i]!r}" if self.layers else f"map {i}"
                raise ValueError(
                    f"{where} of backbone {self.name!r} must be a map ({images.shape[0]}, c, h, w), "
                    f"got {_describe(layer_map)}; choose a layer whose output is one map per image"
                )
        return list(maps)

    def to(self, device: torch.device) -> Backbone:
        """This backbone with its weights on ``device``; a callable that is no module is left to its owner."""
        if not isinstance(self.module, nn.Module):
            return self
        if all(tensor.device == device for tensor in chain(self.module.parameters(), self.module.buffers())):
            return self
        return replace(self, module=copy.deepcopy(self.module).to(device))


def load_backbone(
    backbone: str | nn.Module | Callable[[Tensor], Any] | Backbone,
    *,
    layers: Sequence[str] | None = None,
    weights: str | os.PathLike[str] | None = "default",
    device: str | torch.device = "auto",
) -> Backbone:
    """Build a backbone, load its weights and freeze it.

    ``backbone`` is ``"efficientnet_lite0"``, the name of a torchvision classification model, ``"timm:NAME"``, a
    ``torch.nn.Module`` with ``layers=``, or a callable (a module without ``layers=`` too) that maps images
    (n, 3, H, W) to a list of maps (n, c, h, w). A module is copied: the caller's own keeps its mode, its gradients
    and its hooks, and later changes to it have no effect here.

    ``layers`` are names out of ``module.named_modules()``; the first sets the grid of the patches. None takes the
    recommended ones: ``layer2`` and ``layer3`` for every ResNet. A layer that runs several times gives its first
    output.

    ``weights="default"`` are the ImageNet weights (``IMAGENET1K_V1`` for torchvision, fetched and hash-checked on first
    use; an installed package for EfficientNet-Lite0) or those a module holds. None keeps the random initialisation,
    drawn from torch's global generator. A path is a state dict: ``.safetensors``, or what ``torch.save`` wrote, read
    with ``weights_only=True``; half precision is widened to float32.

    ``device`` is ``"auto"`` (CUDA where there is one, else the CPU) or a torch device.

    Raises ValueError for a name, a layer, a weight file or a device that does not fit, ImportError for a missing
    package, RuntimeError where weights cannot be fetched.
    """
    target = resolve_device(device)
    if isinstance(backbone, Backbone):
        if layers is not None or weights != "default":
            raise ValueError("layers= and weights= are part of a Backbone already; pass them where it is loaded")
        return backbone.to(target)
    names = _check_layer_names(layers)
    if isinstance(backbone, str):
        return _load_named(backbone, names, weights).to(target)
    if isinstance(backbone, nn.Module):
        return _load_module(backbone, names, weights).to(target)
    if not callable(backbone):
        raise TypeError(
            f"backbone must be a name, a torch.nn.Module or a callable returning maps, got {type(backbone).__name__}"
        )
    if names or weights not in ("default", None):
        raise ValueError(
            "layers= and weights= need a torch.nn.Module, and this backbone is a plain callable: "
            "let it return the maps of its layers itself"
        )
    return Backbone(getattr(backbone, "__qualname__", type(backbone).__name__), backbone, ())


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device for ``device``, ``"auto"`` being CUDA where there is one, else the CPU.

    Raises ValueError for a device that torch does not know or this machine does not have.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r} cannot be used here ({reason}); pass 'cpu' or 'auto'") from error
    if resolved.type == "meta":
        raise ValueError("device='meta' holds no values; pass 'cpu' or 'auto'")
    return resolved


def hash_weights(module: nn.Module) -> str:
    """sha256 (hex) over the state dict sorted by name: each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load_named(name: str, layers: tuple[str, ...] | None, weights: str | os.PathLike[str] | None) -> Backbone:
    if name == "efficientnet_lite0":
        module, preset = _build_efficientnet_lite0(weights)
    elif name.startswith("timm:"):
        module, preset = _build_timm(name, weights)
    else:
        module, preset = _build_torchvision(name, weights)
    recommended, embedding = _recommend(name, module)
    layers = layers if layers is not None else recommended
    if layers is None:
        raise ValueError(
            f"backbone {name!r} has no recommended layers; pass layers= with names of its modules, "
            f"such as {_examples(module)} (all of them: dict(module.named_modules()))"
        )
    preset = replace(preset, layers=layers, embedding=embedding, weights_hash=hash_weights(module))
    _freeze(module)
    _check_layers(module, layers, name)
    reader: nn.Module | None = None if name.startswith("timm:") else trace_layers(module, layers)
    if reader is None:
        reader = HookedLayers(module, layers)
    return replace(preset, module=reader.to(memory_format=torch.channels_last), channels_last=True)


def _recommend(name: str, module: nn.Module) -> tuple[tuple[str, ...] | None, int | Literal["concat"]]:
    """Recommended layers and embedding: the paper's for ResNets, strides 8 and 16 for the other networks it names."""
    names = {path for path, _ in module.named_modules()}
    if name == "efficientnet_lite0":
        return ("blocks.4", "blocks.10", "blocks.14"), "concat"
    if {"layer2", "layer3"} <= names:
        return ("layer2", "layer3"), 1024
    if {"features.denseblock2", "features.denseblock3"} <= names:
        return ("features.denseblock2", "features.denseblock3"), "concat"
    if name == "squeezenet1_1":
        return ("features.7", "features.12"), "concat"
    return None, "concat"


def _build_efficientnet_lite0(weights: str | os.PathLike[str] | None) -> tuple[nn.Module, Backbone]:
    module = efficientnet_lite0.EfficientNetLite0()
    if weights is not None:
        path = efficientnet_lite0.default_weights_path() if weights == "default" else weights
        load_weights(module, path, rename=efficientnet_lite0.rename_weights)
    half = (0.5, 0.5, 0.5)
    return module, Backbone("efficientnet_lite0", module, (), resize=(224, 224), crop=None, mean=half, std=half)


def _build_torchvision(name: str, weights: str | os.PathLike[str] | None) -> tuple[nn.Module, Backbone]:
    try:
        from torchvision import models  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"backbone {name!r} needs torchvision: pip install torchvision") from error
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, [*known, "efficientnet_lite0"])
        raise ValueError(
            f"backbone {name!r} is not known"
            + (f"; did you mean {', '.join(map(repr, near))}?" if near else ".")
            + " Pass a torchvision classification model, 'efficientnet_lite0', 'timm:NAME', or a torch.nn.Module"
        )
    module: Any = models.get_model(name, weights=None)
    if weights is not None:
        load_weights(module, _fetch(name) if weights == "default" else weights, rename=_rename_densenet)
    if hasattr(module, "transform_input"):
        # GoogLeNet and Inception map ImageNet-normalised input to the range their weights were trained on.
        module.transform_input = True
    return module, Backbone(name, module, ())


def _fetch(name: str) -> Path:
    """The file of a torchvision network's ImageNet weights in torch's cache, downloaded where it is not there yet."""
    from torchvision import models

    choices = models.get_model_weights(name).__members__
    url: str = (choices.get("IMAGENET1K_V1") or choices["DEFAULT"]).url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.exists():
        digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest[1] if digest else None, progress=False)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise RuntimeError(
                f"cannot fetch the weights of backbone {name!r} ({error}): download {url} where there is a network and "
                "pass weights=PATH, or use backbone='efficientnet_lite0', whose weights are a package"
            ) from error
    return path


def _rename_densenet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of torchvision's DenseNet files (``norm.1``) as its modules have them today (``norm1``)."""
    return {
        re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name): value for name, value in state.items()
    }


def _build_timm(name: str, weights: str | os.PathLike[str] | None) -> tuple[nn.Module, Backbone]:
    model_name = name.removeprefix("timm:")
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"backbone {name!r} needs timm: pip install timm") from error
    if not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name.split(".")[0], timm.list_models())
        raise ValueError(
            f"timm has no model {model_name!r}" + (f"; did you mean {', '.join(map(repr, near))}?" if near else "")
        )
    try:
        module: nn.Module = timm.create_model(model_name, pretrained=weights == "default")
    except Exception as error:
        raise RuntimeError(
            f"cannot build backbone {name!r} ({error}): where its weights cannot be fetched, download them where there "
            "is a network and pass weights=PATH, or use backbone='efficientnet_lite0', whose weights are a package"
        ) from error
    if weights not in ("default", None):
        load_weights(module, weights)
    config: Any = module.pretrained_cfg
    crop = int(config["input_size"][-1])
    resize = int(crop / config["crop_pct"])
    return module, Backbone(name, module, (), resize, crop, mean=tuple(config["mean"]), std=tuple(config["std"]))


def _load_module(module: nn.Module, layers: tuple[str, ...] | None, weights: str | os.PathLike[str] | None) -> Backbone:
    name = type(module).__name__
    module = copy.deepcopy(module)
    if layers is not None:
        _check_layers(module, layers, name)
    if weights not in ("default", None):
        load_weights(module, weights)
    digest = hash_weights(module)
    _freeze(module)
    reader = module if layers is None else HookedLayers(module, layers)
    return Backbone(name, reader, layers or (), weights_hash=digest)


def _freeze(module: nn.Module) -> None:
    module.eval().requires_grad_(requires_grad=False)


def load_weights(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Load the state dict in ``path`` into ``module``, widened to the module's dtypes; nothing in the file is run.

    Raises ValueError naming the first names that are missing, unexpected or of another shape; throw the module away
    then. OSError where the file cannot be opened.
    """
    state = _read_state_dict(Path(path))
    # Networks bring the names of older versions up to date by the version in this attribute.
    metadata = getattr(state, "_metadata", None)
    state = OrderedDict(rename(state) if rename is not None else state)
    expected = {name: value.shape for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    shapes = {
        name: f"{name} is {tuple(value.shape)}, expected {tuple(expected[name])}"
        for name, value in state.items()
        if name in expected and value.shape != expected[name]
    }
    fitting = OrderedDict((name, value) for name, value in state.items() if name not in shapes)
    fitting._metadata = metadata  # type: ignore[attr-defined]
    try:
        missing, unexpected = module.load_state_dict(fitting, strict=False)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"weights {str(path)!r} do not fit {type(module).__name__}: {error}") from error
    # Files written before batch norms counted their batches lack the counters, which play no part here.
    missing = [name for name in missing if name not in shapes and not name.endswith("num_batches_tracked")]
    problems = [
        f"{label}: {_first(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", [*shapes.values()]))
        if names
    ]
    if problems:
        raise ValueError(f"weights {str(path)!r} do not fit {type(module).__name__}: " + "; ".join(problems))


def _read_state_dict(path: Path) -> Mapping[str, Tensor]:
    with path.open("rb"):
        pass  # OSError in its own words: missing, a folder, no permission
    try:
        if path.suffix == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ImportError as error:
                raise ImportError(f"weights {str(path)!r} need safetensors: pip install safetensors") from error
            state: Any = load_file(path)
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
    except ImportError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights {str(path)!r} hold more than tensors, and no code is run to load them; "
            "save the state dict alone: torch.save(module.state_dict(), PATH)"
        ) from error
    except Exception as error:
        raise ValueError(f"weights {str(path)!r} cannot be read: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"weights {str(path)!r} must hold a state dict (names to tensors), got {_describe(state)}; "
            "save module.state_dict()"
        )
    return state


def _check_layer_names(layers: Sequence[str] | None) -> tuple[str, ...] | None:
    if layers is None:
        return None
    if isinstance(layers, str) or not all(isinstance(layer, str) for layer in layers):
        raise TypeError(f"layers must be a sequence of module names such as ('layer2', 'layer3'), got {layers!r}")
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers must name at least one module and none twice, got {tuple(layers)!r}")
    return tuple(layers)


def _check_layers(module: nn.Module, layers: tuple[str, ...], backbone: str) -> None:
    names = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
    for layer in layers:
        if layer not in names:
            near = difflib.get_close_matches(layer, names)
            hint = f"did you mean {', '.join(map(repr, near))}" if near else f"it has {_examples(module)}"
            raise ValueError(f"layer {layer!r} is not a module of backbone {backbone!r}; {hint}?")


def _examples(module: nn.Module) -> str:
    """Names of the network's blocks: its children, and for a container the last of its own children."""
    names = []
    for name, child in module.named_children():
        inner = [inner for inner, _ in child.named_children()]
        names.append(f"{name}.{inner[-1]}" if inner and isinstance(child, nn.Sequential) else name)
    return _first([repr(name) for name in names], 6)


def _first(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
