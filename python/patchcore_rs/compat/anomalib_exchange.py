"""Models of anomalib as `PatchCore` and back: what each consists of, read from a live one or from its file."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from patchcore_rs.backbones.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.backbones.weights import hash_weights
from patchcore_rs.compat.pickles import Record, read_torch_file
from patchcore_rs.detector.patchcore import assemble
from patchcore_rs.images.levels import FULL, Levels
from patchcore_rs.model.file import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_rs.detector.patchcore import PatchCore

_LIVE = "load it with anomalib and pass the live model"
_ROUNDING = 1e-4  # relative, between the maps of one network in two programs
_WITHOUT_CROP = {"precision"}  # arguments that came after the default crop of anomalib 2.0 had gone


@dataclass(frozen=True)
class _Parts:
    """What makes a fitted model of anomalib's: `network` where it is live, else `weights` for one built anew."""

    backbone: str
    layers: tuple[str, ...]
    neighbors: int
    share: float | None
    state: Mapping[str, Any]  # of the torch model, by anomalib's names
    steps: list[tuple[str, Mapping[str, Any]]] | None  # of the preparation of images, by class and attributes
    threshold: float | None
    network: nn.Module | None = None


def read_model(model: Any) -> PatchCore:
    """The `PatchCore` that a live model of anomalib's, or a file of one, is."""
    parts = _from_file(model) if isinstance(model, (str, os.PathLike)) else _from_live(model)
    arguments, bank = _arguments(parts)
    network = _built(parts) if parts.network is None else load_backbone(parts.network, device="cpu")
    module = network.module
    if isinstance(module, nn.Module):
        module.to(memory_format=torch.channels_last)
    backbone = replace(network, name=parts.backbone, layers=parts.layers, embedding="concat", channels_last=True)
    return _assembled(arguments | {"backbone": backbone}, bank, parts.threshold)


def read_file(path: str | os.PathLike[str], weights: Path) -> PatchCore:
    """The `PatchCore` that a file of anomalib's is, of a network that is known by its name and its weights.

    Those are written to `weights` as a state dict: whoever loads the model passes that file.
    """
    parts = _from_file(path)
    arguments, bank = _arguments(parts)
    module: Any = _built(parts).module
    with whole_file(weights) as temporary:
        torch.save(module.module.state_dict(), temporary)
    arguments |= {"backbone": f"timm:{parts.backbone}", "layers": parts.layers, "weights": weights}
    return _assembled(arguments, bank, parts.threshold)


def _arguments(parts: _Parts) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """The arguments of `PatchCore` but those of its network, and the bank; refused before any work."""
    prepared = _preparation(parts.steps)
    bank = np.array(parts.state["memory_bank"], dtype=np.float32)
    if bank.ndim != 2 or not len(bank):
        raise ValueError("model must be fitted; its memory bank is empty. Fit it with anomalib first")
    kernel = parts.state["anomaly_map_generator.blur.kernel"]
    arguments = {
        "profile": "anomalib",
        "embedding": "concat",
        "coreset": parts.share,
        "reweight": parts.neighbors,
        "sigma": (kernel.shape[-1] - 1) / 8,  # anomalib's kernels reach four deviations
        **prepared,
    }
    return arguments, bank


def _assembled(arguments: dict[str, Any], bank: NDArray[np.float32], threshold: float | None) -> PatchCore:
    return assemble(arguments, bank, image_size=arguments["crop"] or arguments["resize"], threshold=threshold)


# --- what a model consists of -------------------------------------------------------------------------------


def _from_live(model: Any) -> _Parts:
    inner: Any = getattr(model, "model", model)
    if type(inner).__name__ != "PatchcoreModel":
        raise TypeError(
            "model must be a Patchcore or PatchcoreModel of anomalib, or the path of a file of one; "
            f"got {type(model).__name__}"
        )
    layers = tuple(map(str, inner.layers))
    extractor: Any = inner.feature_extractor
    network = extractor.feature_extractor
    listed = isinstance(inner.backbone, str) and not getattr(extractor, "_uses_intermediates", False)
    preparation = getattr(model, "pre_processor", None)
    return _Parts(
        backbone=inner.backbone if isinstance(inner.backbone, str) else type(inner.backbone).__name__,
        layers=layers,
        neighbors=int(inner.num_neighbors),
        share=getattr(model, "coreset_sampling_ratio", None),
        state=inner.state_dict(),
        steps=None if preparation is None else list(_steps(getattr(preparation, "transform", None))),
        threshold=_threshold(getattr(getattr(model, "post_processor", None), "_image_threshold", None)),
        network=network if listed else _NamedMaps(extractor, layers),
    )


class _NamedMaps(nn.Module):
    """The maps of a network that gives them by name."""

    def __init__(self, network: nn.Module, layers: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.layers = network, layers

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The maps in the order of the layers, for images (n, 3, H, W)."""
        maps = self.network(images)
        return [maps[layer] for layer in self.layers]


def _from_file(path: str | os.PathLike[str]) -> _Parts:
    held = read_torch_file(path)
    whole = held.get("model") if isinstance(held, dict) else None
    if isinstance(whole, Record):
        return _from_record(whole, path)
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        return _from_checkpoint(held, path)
    raise ValueError(f"{path} must hold a model that anomalib saved; got another {type(held).__name__}")


def _from_checkpoint(held: Mapping[str, Any], path: str | os.PathLike[str]) -> _Parts:
    """A `.ckpt`, which Lightning writes: arguments and state."""
    arguments = held.get("hyper_parameters")
    arguments = arguments if isinstance(arguments, dict) else {}
    state = held["state_dict"]
    config = held.get("anomalib_pre_processor_config")
    steps: list[tuple[str, Mapping[str, Any]]] | None
    if isinstance(config, dict) and isinstance(config.get("transform"), dict):
        steps = list(_steps(config["transform"]))
    elif isinstance(arguments.get("pre_processor"), Record):
        steps = list(_steps(_transform(arguments["pre_processor"]))) or None
    elif arguments.keys() & _WITHOUT_CROP:
        normalize = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
        steps = [("Resize", {"size": (256, 256), "antialias": True}), ("Normalize", normalize)]
    else:
        raise ValueError(f"{path} does not say how images are prepared; {_LIVE}")
    return _Parts(
        **_architecture(arguments, path),
        state={name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")},
        steps=steps,
        threshold=_threshold(state.get("post_processor._image_threshold")),
    )


def _from_record(whole: Record, path: str | os.PathLike[str]) -> _Parts:
    """A `.pt`, a pickle of the model: its attributes."""
    outer = _attributes(whole)
    parts = outer.get("_modules", {})
    model = parts.get("model", whole)
    inner = _attributes(model)
    preparation = parts.get("pre_processor")
    steps = None
    if preparation is not None:
        steps = list(_steps(_transform(preparation)))
    arguments = dict(inner) | {"coreset_sampling_ratio": outer.get("coreset_sampling_ratio")}
    return _Parts(
        **_architecture(arguments, path),
        state=dict(_state(model)),
        steps=steps,
        threshold=_threshold(dict(_state(whole)).get("post_processor._image_threshold")),
    )


def _architecture(arguments: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    backbone, layers = arguments.get("backbone"), arguments.get("layers")
    neighbors, share = arguments.get("num_neighbors"), arguments.get("coreset_sampling_ratio")
    if not isinstance(neighbors, int):
        raise ValueError(f"{path} must hold a Patchcore; it has no num_neighbors. Other models cannot be carried over")
    if not isinstance(backbone, str) or "vit" in backbone.lower():
        raise ValueError(f"{path} was made with a network that is not built from its name alone; {_LIVE}")
    if not isinstance(layers, (list, tuple)) or not layers or not all(isinstance(layer, str) for layer in layers):
        raise ValueError(f"{path} does not name the layers of its network; {_LIVE}")
    known = isinstance(share, float) and 0 < share <= 1
    return {
        "backbone": backbone,
        "layers": tuple(layers),
        "neighbors": neighbors,
        "share": share if known else None,
    }


def _attributes(value: Any) -> Mapping[str, Any]:
    """The attributes of a live object or of a record of one."""
    if isinstance(value, Record):
        return value.attributes
    return getattr(value, "__dict__", {})


def _state(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A module's parameters and buffers, by the names of its state dict."""
    attributes = _attributes(record)
    for kind in ("_parameters", "_buffers"):
        held = attributes.get(kind)
        yield from ((prefix + name, value) for name, value in (held or {}).items() if isinstance(value, np.ndarray))
    for name, module in (attributes.get("_modules") or {}).items():
        yield from _state(module, f"{prefix}{name}.")


def _threshold(value: Any) -> float | None:
    """Anomalib calls anomalous what is above its threshold, this package what reaches its own."""
    threshold = math.nan if value is None else float(value)
    return math.nextafter(threshold, math.inf) if math.isfinite(threshold) else None


# --- preparation of images ----------------------------------------------------------------------------------


def _transform(preparation: Any) -> Any:
    """What a pre-processor does, an attribute of it or a module within it; None where it does nothing."""
    held = _attributes(preparation)
    found = held.get("transform")
    return (held.get("_modules") or {}).get("transform") if found is None else found


def _steps(transform: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Class and attributes of each step of a transform: live, a record of one, or as checkpoints of 2.7 describe it."""
    if transform is None:
        return
    if isinstance(transform, dict):
        name, attributes = str(transform.get("class_path")).rpartition(".")[2], transform.get("init_args") or {}
    else:
        name = transform.name if isinstance(transform, Record) else type(transform).__name__
        attributes = _attributes(transform)
    if name == "Compose":
        for step in attributes["transforms"]:
            yield from _steps(step)
    else:
        yield name.removeprefix("Exportable"), attributes


def _preparation(steps: list[tuple[str, Mapping[str, Any]]] | None) -> dict[str, Any]:
    """The steps as arguments of `PatchCore`; ValueError for what it has no arguments for."""
    if steps is None:
        raise ValueError(f"model must come with the preparation of its images; {_LIVE}, the Lightning module")
    found: dict[str, Any] = {"resize": None, "crop": None, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    order = [name for name, _ in steps]
    if order != [name for name in ("Resize", "CenterCrop", "Normalize") if name in order]:
        raise ValueError(
            f"model must prepare images by Resize, CenterCrop and Normalize in this order; got {', '.join(order)}. "
            "Prepare them before, and pass a model whose pre_processor does the rest"
        )
    for name, attributes in steps:
        if name == "Normalize":
            found |= {key: tuple(float(value) for value in attributes[key]) for key in ("mean", "std")}
            continue
        size = attributes["size"]
        sides = (size, size) if isinstance(size, int) else tuple(size) if len(size) == 2 else (size[0], size[0])
        if name == "Resize":
            mode = attributes.get("interpolation", "bilinear")
            mode = mode.args[0] if isinstance(mode, Record) and mode.args else getattr(mode, "value", mode)
            if isinstance(size, int) or len(size) == 1 or mode != "bilinear" or attributes.get("antialias") is False:
                raise ValueError(
                    "model must resize images to a height and a width, bilinearly and with antialiasing; "
                    f"got size {size!r:.40}, {mode}"
                )
        found["resize" if name == "Resize" else "crop"] = (int(sides[0]), int(sides[1]))
    if found["resize"] is None and found["crop"] is None:
        raise ValueError(f"model must resize or crop images to one size; got {', '.join(order) or 'no step'}")
    return found


# --- networks -----------------------------------------------------------------------------------------------


def _built(parts: _Parts) -> Backbone:
    """The network of that name by timm, with the weights of the file."""
    backbone = load_backbone(f"timm:{parts.backbone}", layers=parts.layers, weights=None, device="cpu")
    reader: Any = backbone.module
    prefix = "feature_extractor.feature_extractor."
    given = {
        name.removeprefix(prefix): torch.from_numpy(np.array(value))
        for name, value in parts.state.items()
        if name.startswith(prefix)
    }
    _fill(reader, reader.module, given, f"the network {parts.backbone!r} that timm builds")
    return replace(backbone, weights_hash=hash_weights(reader.module))


def _fill(reader: Any, network: nn.Module, given: Mapping[str, torch.Tensor], what: str) -> None:
    """Load weights by name into a network, zeros where its maps do not depend on them; ValueError where they do."""
    expected = network.state_dict()
    unknown = sorted(given.keys() - expected.keys())
    ran: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.add(f"{name}."))
        for name, module in network.named_modules()
        if next(module.children(), None) is None
    ]
    try:
        with torch.inference_mode():
            reader(torch.zeros(1, 3, 64, 64))
    finally:
        for handle in handles:
            handle.remove()
    needed = [name for name in expected if any(name.startswith(module) for module in ran)]
    missing = [name for name in needed if name not in given and not name.endswith("num_batches_tracked")]
    shapes = [name for name, value in given.items() if name in expected and expected[name].shape != value.shape]
    if unknown or missing or shapes:
        name = (unknown or missing or shapes)[0]
        raise ValueError(f"the weights must be those of {what}; {name} is not. Otherwise {_LIVE}")
    network.load_state_dict({name: given.get(name, torch.zeros_like(value)) for name, value in expected.items()})


# --- the other way ------------------------------------------------------------------------------------------


def write_model(model: PatchCore) -> Any:
    """The live `Patchcore` of anomalib that a fitted `PatchCore` is."""
    from anomalib.models.image.patchcore.lightning_model import Patchcore
    from anomalib.pre_processing import PreProcessor
    from torchvision.transforms import v2  # type: ignore[import-untyped]

    fitted = model._require_fitted()
    settings, description = model.settings_, fitted.description
    if fitted.extractor is None:
        raise ValueError("model must have a backbone; this one was fitted on features of your own")
    wanted = {
        "embedding": "concat",
        "patch_size": 3,
        "standardize": False,
        "distance": "euclidean",
        "upsampling": "nearest",
        "border": "reflect",
        "sigma": 4.0,
        "resampling": "tensor",
    }
    for name, value in wanted.items():
        if getattr(settings, name) != value:
            raise ValueError(
                f"{name} must be {value!r}, as anomalib has it; got {getattr(settings, name)!r}. Fit with "
                "profile='anomalib'"
            )
    if Levels.of(settings) != Levels():
        raise ValueError(
            f"white_level and value_range must be {FULL} and None, as anomalib has no such; got {settings.white_level} "
            f"and {settings.value_range}. Fit on images of 8 bits"
        )
    if isinstance(settings.resize, int):
        raise ValueError(f"resize must be (height, width), as in anomalib; got {settings.resize!r}")
    steps: list[Any] = [v2.Resize(list(settings.resize), antialias=True)] if settings.resize else []
    if settings.crop is not None:
        steps.append(v2.CenterCrop(settings.crop if isinstance(settings.crop, int) else list(settings.crop)))
    steps.append(v2.Normalize(mean=list(settings.mean), std=list(settings.std)))
    backbone = fitted.extractor.backbone
    name = backbone.name.removeprefix("timm:")
    try:
        theirs = Patchcore(
            backbone=name,
            layers=list(settings.layers),
            pre_trained=False,
            coreset_sampling_ratio=settings.coreset if isinstance(settings.coreset, float) else 0.1,
            num_neighbors=settings.reweight or 1,
            pre_processor=PreProcessor(transform=v2.Compose(steps)),
        )
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"backbone must be a network of timm with these layers; got {name!r} ({error})") from error
    _give_network(backbone, theirs.model.feature_extractor, description.image_size)
    bank = torch.from_numpy(model.memory_bank_.features)
    theirs.model.memory_bank = bank
    theirs._is_fitted = torch.tensor([True])
    if description.threshold is not None and theirs.post_processor is not None:
        below = math.nextafter(description.threshold, -math.inf)
        theirs.post_processor._image_threshold = torch.tensor(below, dtype=torch.float32)
    return theirs.eval()


def _give_network(backbone: Backbone, extractor: Any, size: tuple[int, int]) -> None:
    """Give anomalib's network the weights of ours, and see that it answers the same."""
    reader: Any = backbone.module
    network = getattr(reader, "module", reader)
    ours, theirs = network.state_dict(), extractor.feature_extractor.state_dict()
    what = f"those of the network {backbone.name!r} that timm builds"
    if theirs.keys() - ours.keys() or any(ours[name].shape != value.shape for name, value in theirs.items()):
        raise ValueError(f"backbone must have {what}; got others. Fit with backbone='timm:NAME'")
    extractor.feature_extractor.load_state_dict({name: ours[name].detach().clone() for name in theirs})
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = backbone(images)
    found = list(extractor.eval()(images).values())
    for mine, other in zip(expected, found, strict=True):
        if mine.shape != other.shape or not torch.allclose(mine, other, rtol=_ROUNDING, atol=_ROUNDING):
            raise ValueError(f"backbone must answer as {what} does; its maps differ. Fit with backbone='timm:NAME'")
