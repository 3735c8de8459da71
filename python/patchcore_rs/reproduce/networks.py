"""The backbones that rows are measured with: what they recommend, and where their weights are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.backbones.named import default_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from patchcore_rs.backbones.backbone import Backbone
    from patchcore_rs.model.profiles import Size


@dataclass(frozen=True)
class Network:
    """A backbone whose weights were found, without them in memory.

    `layers`, `resize` and `crop` are what it recommends, `weights` what `load_backbone` takes.
    """

    name: str
    weights: str | Path
    weights_hash: str
    layers: tuple[str, ...]
    resize: Size
    crop: Size

    @classmethod
    def find(cls, name: str, weights_dir: Path | None) -> Network:
        """The network of that name, its weights in the folder, or where `load_backbone` finds them.

        Raises:
            WeightsError, ValueError, ImportError, OSError: as `default_weights` and `load_backbone`.
        """
        weights = default_weights(name, weights_dir)
        backbone = load_backbone(name, weights=weights, device="cpu")
        return cls(name, weights, backbone.weights_hash, backbone.layers, backbone.resize, backbone.crop)

    def load(self, layers: Sequence[str], device: str | torch.device) -> Backbone:
        """The backbone with these layers, on a device."""
        return load_backbone(self.name, layers=layers, weights=self.weights, device=device)

    def at(self, side: int) -> dict[str, Any]:
        """The arguments of a detector that show it images of another side, cropped by the same share."""
        scale = side / seen_size(self.resize, self.crop)[0]

        def scaled(size: Size) -> Size:
            if size is None:
                return None
            return round(size * scale) if isinstance(size, int) else (round(size[0] * scale), round(size[1] * scale))

        return {"resize": scaled(self.resize), "crop": scaled(self.crop)}

    def layers_at(self, strides: tuple[int, ...] | None) -> tuple[str, ...]:
        """Its last layers at those of these strides that it has; the ones that it recommends for None.

        Raises:
            ValueError: its layers are not known by their strides.
        """
        return self.layers if strides is None else _layers_at(self.name, self.weights, strides)

    @property
    def depths(self) -> tuple[str, ...]:
        """Layers of increasing depth, for comparisons of depth: the first three blocks of a ResNet, else its own."""
        return ("layer1", *self.layers) if self.layers == ("layer2", "layer3") else self.layers


@cache
def _layers_at(name: str, weights: str | Path, strides: tuple[int, ...]) -> tuple[str, ...]:
    return load_backbone(name, weights=weights, strides=strides, device="cpu").layers


def seen_size(resize: Size, crop: Size) -> tuple[int, int]:
    """(height, width) of images after resize and crop, of square ones where only the shorter side is set."""
    size = resize if crop is None else crop
    return (size, size) if isinstance(size, int) else size or (224, 224)
