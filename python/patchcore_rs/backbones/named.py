"""The networks that have a name: how each is built, where its weights come from, and what it recommends."""

from __future__ import annotations

import difflib
import http.client
import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from patchcore_rs.backbones.backbone import Backbone
from patchcore_rs.backbones.efficientnet_lite import VARIANTS, EfficientNetLite, default_weights_path, rename_weights
from patchcore_rs.backbones.host import plain_tensors
from patchcore_rs.backbones.layers import HookedLayers, check_layers, freeze, layer_examples, trace_layers
from patchcore_rs.backbones.weights import WeightsError, hash_weights, load_weights

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping


_PATIENCE = 5.0  # seconds to wait for an answer


def load_named(
    name: str,
    layers: tuple[str, ...] | None,
    strides: tuple[int, ...] | None,
    weights: str | os.PathLike[str] | None,
) -> Backbone:
    """Build, load, freeze and trace the network called `name`; what it takes and raises is said in `load_backbone`."""
    if name in VARIANTS:
        module, preset = _build_efficientnet_lite(name, weights)
    elif name.startswith("timm:"):
        module, preset = _build_timm(name, weights)
    else:
        module, preset = _build_torchvision(name, weights)
    by_stride = _layers_by_stride(name, module)
    recommended, embedding = _recommend(module, by_stride)
    if layers is None:
        layers = recommended if strides is None else _choose(strides, by_stride or _timm_layers(module), name, module)
    if layers is None:
        raise ValueError(f"backbone {name!r} has no recommended layers; {_naming_layers(module)}")
    preset = replace(preset, layers=layers, embedding=embedding, weights_hash=hash_weights(module))
    freeze(module)
    check_layers(module, layers, name)
    reader: nn.Module | None = None if name.startswith("timm:") else trace_layers(module, layers)
    if reader is None:
        reader = HookedLayers(module, layers)
    return replace(preset, module=reader.to(memory_format=torch.channels_last), channels_last=True)


def _layers_by_stride(name: str, module: nn.Module) -> dict[int, str]:
    """The last layer of each stride, in pixels of the image, of the networks that are known here; none of others."""
    if isinstance(module, EfficientNetLite):
        return module.layers_by_stride()
    if name == "squeezenet1_1":
        return {4: "features.4", 8: "features.7", 16: "features.12"}
    names = {path for path, _ in module.named_modules()}
    for stage in ("layer", "features.denseblock"):  # ResNets and DenseNets, timm's too
        layers = {2 ** (i + 1): f"{stage}{i}" for i in range(1, 5)}
        if names.issuperset(layers.values()):
            stem = next((name for name in ("relu", "act1", "features.relu0") if name in names), None)
            return layers if stem is None else {2: stem} | layers
    return {}


def _timm_layers(module: nn.Module) -> dict[int, str]:
    """As `_layers_by_stride`, of a network of timm's that says so itself and whose maps have their channels first."""
    if getattr(module, "output_fmt", "NCHW") != "NCHW":
        return {}
    return {layer["reduction"]: layer["module"] for layer in getattr(module, "feature_info", ())}


def _recommend(module: nn.Module, by_stride: dict[int, str]) -> tuple[tuple[str, ...] | None, int | Literal["concat"]]:
    """Recommended layers and embedding: the paper's for ResNets, strides 8 and 16 for the other networks it names."""
    if not by_stride:
        return None, "concat"
    layers = (by_stride[8], by_stride[16])
    if isinstance(module, EfficientNetLite):  # and the stage before the last one, which is a single block
        return (*layers, f"blocks.{len(module.blocks) - 2}"), "concat"
    return layers, 1024 if layers[0] == "layer2" else "concat"


def _choose(strides: tuple[int, ...], by_stride: dict[int, str], name: str, module: nn.Module) -> tuple[str, ...]:
    """The layers of those of the strides that the network `name` has; ValueError where it has none of them."""
    if not by_stride:
        raise ValueError(f"backbone {name!r} has no known strides; {_naming_layers(module)}")
    layers = tuple(by_stride[stride] for stride in strides if stride in by_stride)
    if not layers:
        raise ValueError(
            f"strides of backbone {name!r} must be among {', '.join(map(str, by_stride))}; got "
            f"{', '.join(map(str, strides))}. Choose among them, or {_naming_layers(module)}"
        )
    return layers


def _naming_layers(module: nn.Module) -> str:
    return (
        f"pass layers= with names of its modules, such as {layer_examples(module)} "
        "(all of them: dict(module.named_modules()))"
    )


def _build_efficientnet_lite(name: str, weights: str | os.PathLike[str] | None) -> tuple[nn.Module, Backbone]:
    width, depth, side = VARIANTS[name]
    with plain_tensors(random=weights is None):
        module = EfficientNetLite(width, depth)
    if weights is not None:
        load_weights(module, default_weights_path(name) if weights == "default" else weights, rename=rename_weights)
    half = (0.5, 0.5, 0.5)
    return module, Backbone(name, module, (), resize=(side, side), crop=None, mean=half, std=half)


def _build_torchvision(name: str, weights: str | os.PathLike[str] | None) -> tuple[nn.Module, Backbone]:
    try:
        from torchvision import models  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"backbone {name!r} needs torchvision: pip install torchvision") from error
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *VARIANTS])
        raise ValueError(
            f"backbone {name!r} is not known"
            + (f"; did you mean {', '.join(map(repr, near))}?" if near else ".")
            + f" Pass a torchvision classification model, {', '.join(map(repr, VARIANTS))}, 'timm:NAME', or a "
            "torch.nn.Module"
        )
    with plain_tensors(random=weights is None):
        module: Any = models.get_model(name, weights=None).float()
    if weights is not None:
        load_weights(module, _fetch(name) if weights == "default" else weights, rename=_rename_densenet)
    if hasattr(module, "transform_input"):
        # GoogLeNet and Inception map ImageNet-normalised input to the range their weights were trained on.
        module.transform_input = True
    return module, Backbone(name, module, ())


def default_weights(name: str, folder: Path | None) -> str | Path:
    """What `load_backbone` takes as the ImageNet weights of the network called `name`, with torchvision's in a folder.

    Without a folder, and for a network that is not torchvision's, "default".

    Raises:
        WeightsError: the folder lacks the file, which is named as torchvision names it.
        ValueError: torchvision has no network of that name.
        ImportError: torchvision is not installed.
    """
    if folder is None or name in VARIANTS or name.startswith("timm:"):
        return "default"
    path = folder / _weights_url(name).rpartition("/")[2]
    if not path.is_file():
        raise WeightsError(f"the weights of backbone {name!r}, {path.name}, are not in {folder}")
    return path


def _weights_url(name: str) -> str:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"backbone {name!r} is no classification model of torchvision")
    choices = models.get_model_weights(name).__members__
    url: str = (choices.get("IMAGENET1K_V1") or choices["DEFAULT"]).url
    return url


def _fetch(name: str) -> Path:
    """The file of a torchvision network's ImageNet weights in torch's cache, downloaded where it is not there yet."""
    url = _weights_url(name)
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.exists():
        digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest[1] if digest else None, progress=False)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise WeightsError(
                f"cannot fetch the weights of backbone {name!r} ({error}): download {url} where there is a network and "
                "pass weights=PATH, or use backbone='efficientnet_lite0', whose weights are a package"
            ) from error
    return path


def _rename_densenet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of torchvision's DenseNet files (`norm.1`) as its modules have them today (`norm1`)."""
    return {
        re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name): value for name, value in state.items()
    }


@contextmanager
def _asking_the_hub_once() -> Iterator[None]:
    """Tell huggingface_hub that it is offline where its hub does not answer: it would ask for more than a minute."""
    try:
        from huggingface_hub import constants, get_session
    except ImportError:  # timm then fetches from elsewhere
        yield
        return
    before = constants.HF_HUB_OFFLINE
    try:
        if not before:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # noqa: BLE001 - of whichever client it has; what is in its cache will do
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


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
        asking = _asking_the_hub_once() if weights == "default" else nullcontext()
        with asking, plain_tensors(random=weights is None):
            module: nn.Module = timm.create_model(model_name, pretrained=weights == "default").float()
    except Exception as error:
        raise WeightsError(
            f"cannot build backbone {name!r} ({error}): where its weights cannot be fetched, download them where there "
            "is a network and pass weights=PATH, or use backbone='efficientnet_lite0', whose weights are a package"
        ) from error
    if weights not in ("default", None):
        load_weights(module, weights)
    config: Any = module.pretrained_cfg
    crop = int(config["input_size"][-1])
    resize = int(crop / config["crop_pct"])
    return module, Backbone(name, module, (), resize, crop, mean=tuple(config["mean"]), std=tuple(config["std"]))
