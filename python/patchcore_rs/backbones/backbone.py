"""A frozen backbone: a network, its layers, and the preprocessing it was trained for."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Backbone:
    """A frozen network that turns images into feature maps, with the preprocessing it was trained for.

    It can be copied and pickled; a pickle holds the weights in use, on their device, and is the same bytes for the same
    network and weights.

    Attributes:
        name: what it was loaded as.
        module: images (n, 3, H, W) to a list of maps, without gradients.
        layers: names of the modules whose maps it gives; empty for a callable that returns its own maps.
        resize: pixels before the crop: an int for the shorter side, a pair (height, width), or None.
        crop: side in pixels of the centre that is kept, or None.
        mean: of each channel, for the normalisation of RGB in [0, 1].
        std: as `mean`.
        embedding: the recommended width of a patch feature, "concat" for the plain concatenation of the layers.
        weights_hash: sha256 of the state dict before folding, see `hash_weights`; empty for a callable that is no
            `torch.nn.Module`.
        channels_last: whether images are passed in torch's channels-last layout.
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

    def __getstate__(self) -> dict[str, Any]:
        """The fields, a module as the bytes of a file: tensors by themselves are pickled with their addresses."""
        state = dict(self.__dict__)
        if isinstance(self.module, nn.Module):
            file = io.BytesIO()
            torch.save(self.module, file)
            state["module"] = file.getvalue()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(state["module"], bytes):
            module = torch.load(io.BytesIO(state["module"]), weights_only=False)  # a part of the pickle
            self.__dict__["module"] = module

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images. Safe to call from several threads.

        Args:
            images: (n, 3, H, W) float32, normalised, on the backbone's device.

        Returns:
            A map (n, c, h, w) for each layer.

        Raises:
            ValueError: the network returns anything but such maps.
        """
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        with torch.inference_mode():
            maps = self.module(images.contiguous(memory_format=layout))
        if isinstance(maps, Mapping):
            maps = list(maps.values())
        if not isinstance(maps, (list, tuple)) or not maps:
            raise ValueError(
                f"backbone {self.name!r} must return a list of maps (n, c, h, w); got {describe_output(maps)}. "
                "Name the layers of a torch.nn.Module with layers="
            )
        for i, layer_map in enumerate(maps):
            if not isinstance(layer_map, Tensor) or layer_map.ndim != 4 or layer_map.shape[0] != images.shape[0]:
                where = f"layer {self.layers[i]!r}" if self.layers else f"map {i}"
                raise ValueError(
                    f"{where} of backbone {self.name!r} must be a map ({images.shape[0]}, c, h, w); "
                    f"got {describe_output(layer_map)}. Choose a layer whose output is one map per image"
                )
        return list(maps)

    def to(self, device: torch.device) -> Backbone:
        """This backbone with its weights on `device`; a callable that is no module is left to its owner."""
        if not isinstance(self.module, nn.Module):
            return self
        if all(tensor.device == device for tensor in chain(self.module.parameters(), self.module.buffers())):
            return self
        return replace(self, module=copy.deepcopy(self.module).to(device))


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device for `device`, "auto" being CUDA where there is one, else the CPU.

    Raises:
        ValueError: torch does not know the device, this machine does not have it, or a fork has broken it.
    """
    require_unforked("cuda" if device == "auto" else device)
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


def require_unforked(device: str | torch.device) -> None:
    """ValueError for CUDA in a forked child whose parent has used it: CUDA does not outlive a fork."""
    # A parent that only asked whether there is CUDA makes torch call the fork bad too.
    if str(device).startswith("cuda") and torch.cuda._initialized and torch.cuda._is_in_bad_fork():
        raise ValueError(
            f"device={str(device)!r} cannot be used in a process that was forked after CUDA was used; start it by "
            'multiprocessing.get_context("spawn"), or load the model in each process with device="cpu"'
        )


def describe_output(value: object) -> str:
    """What came instead of a map or a state dict, for a message."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
