"""The maps of a backbone's layers on disk, so that an image passes the backbone once however many detectors see it.

A map is known by the prepared image, the tensor that the backbone is given: resize, crop, normalisation and whatever
else shapes it are in its values. What else changes a map names the folder: the network, its weights, the libraries
that run it and the processors. A batch of which one map is missing passes the backbone as a whole, so that maps are
those of a run without a cache, to the bit.

The maps of a category lie in one folder, which is removed when they have served, unless it is marked as kept. One run
at a time works in an output folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from patchcore_rs._version import installed
from patchcore_rs.model.file import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from patchcore_rs.backbones.backbone import Backbone


_KEPT = "kept"  # the file that marks a category's folder
_HEADER = 128  # bytes before the values of a map in its file
# numpy parses a header as Python, and the parser of CPython 3.11 fails where two threads are in it (SystemError: "AST
# constructor recursion depth mismatch").
_PARSING = threading.Lock()


class MapCache:
    """A backbone whose maps are kept in a folder: float32, one file an image and layer, each written whole."""

    def __init__(self, folder: Path, backbone: Backbone) -> None:
        """Keep them in a folder of this backbone below `folder`; it is made when the first are written.

        Raises:
            ValueError: the backbone is a plain callable, whose maps cannot be known again.
        """
        self.backbone = backbone
        self.folder = folder / self.folder_name(backbone)
        self._instead: Backbone | None = None

    @staticmethod
    def folder_name(backbone: Backbone) -> str:
        """What the folder of this backbone's maps is called; raises as the constructor does."""
        if not backbone.weights_hash:
            raise ValueError(f"backbone must have weights that it is known by; got the callable {backbone.name!r}")
        decides = [
            backbone.name,
            backbone.weights_hash,
            installed("torch", "torchvision", "timm"),
            torch.backends.cpu.get_cpu_capability(),
            torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        ]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]

    def view(self, layers: Sequence[str]) -> Backbone:
        """The backbone with some of its layers, as a detector takes it.

        Raises:
            ValueError: it does not give one of them.
        """
        if not set(layers) <= set(self.backbone.layers):
            raise ValueError(f"layers must be some of {self.backbone.layers}; got {tuple(layers)}")
        module = partial(self._maps, tuple(layers))
        return replace(self.backbone, module=module, layers=tuple(layers), channels_last=False)

    @contextmanager
    def bypassed(self, backbone: Backbone) -> Iterator[None]:
        """A backbone with the layers of a view in its place meanwhile, nothing read and nothing written."""
        self._instead = backbone
        try:
            yield
        finally:
            self._instead = None

    def _maps(self, layers: tuple[str, ...], images: Tensor) -> list[Tensor]:
        """The maps (n, c, h, w) of these layers for (n, 3, H, W) prepared images."""
        if self._instead is not None:
            return self._instead(images)
        names = [_name(image, images.device) for image in images.cpu()]
        try:
            arrays = [np.stack([self._read(name, layer) for name in names]) for layer in layers]
        except (FileNotFoundError, EOFError, ValueError):  # new, or cut short as the system went down
            arrays = self._compute(names, layers, images)
        maps = [torch.from_numpy(array).to(images.device) for array in arrays]
        return [layer_map.permute(0, 3, 1, 2) for layer_map in maps] if self.backbone.channels_last else maps

    def _compute(self, names: list[str], layers: tuple[str, ...], images: Tensor) -> list[NDArray[np.float32]]:
        """The maps of a batch as they lie in memory, after all layers of the backbone were written."""
        found: dict[str, NDArray[np.float32]] = {}
        for layer, layer_map in zip(self.backbone.layers, self.backbone(images), strict=True):
            maps = layer_map.float().cpu()
            maps = maps.permute(0, 2, 3, 1) if self.backbone.channels_last else maps
            found[layer] = maps.contiguous().numpy()
        self.folder.mkdir(parents=True, exist_ok=True)
        for layer, arrays in found.items():
            for name, array in zip(names, arrays, strict=True):
                with whole_file(self._file(name, layer)) as temporary:
                    np.save(temporary, array)
        return [found[layer] for layer in layers]

    def _read(self, name: str, layer: str) -> NDArray[np.float32]:
        with _PARSING:
            array: NDArray[np.float32] = np.load(self._file(name, layer))
        return array

    def _file(self, name: str, layer: str) -> Path:
        return self.folder / f"{name}.{layer}.npy"


def _name(image: Tensor, device: torch.device) -> str:
    """What a prepared image (3, H, W) on the CPU is known by, on its way through the network on that device."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{tuple(image.shape)} {device.type} {torch.is_autocast_enabled()}".encode())
    digest.update(image.contiguous().numpy().data)
    return digest.hexdigest()


class CategoryFolder:
    """Where the maps of one category lie: a folder for each network."""

    def __init__(self, path: Path) -> None:
        """Nothing is made before something is kept."""
        self.path = path

    @property
    def kept(self) -> bool:
        """Whether a run, this one or one before, asked for it to stay."""
        return (self.path / _KEPT).exists()

    def keep(self) -> None:
        """Let it stay, whatever runs come."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / _KEPT).touch()

    def clear(self) -> None:
        """Remove it, unless it is kept."""
        if not self.kept:
            shutil.rmtree(self.path, ignore_errors=True)

    def held(self, network: str, sizes: Mapping[str, int], images: int) -> int:
        """Bytes of maps of such `sizes` by layer, of so many images at most, in the folder of that name."""
        total, folder = 0, self.path / network
        for file in folder.glob("*.npy"):
            layer = file.name.partition(".")[2].removesuffix(".npy")
            if file.stat().st_size == sizes.get(layer, -1) + _HEADER:
                total += sizes[layer]
        return min(total, images * sum(sizes.values()))


@contextmanager
def reserved(output: Path) -> Iterator[None]:
    """Keep other runs out of the folder `output` meanwhile.

    The system gives up the lock with the process, however that ends; its empty file stays.

    Raises:
        BlockingIOError: another run works there.
        OSError: the folder cannot be written.
    """
    with (output / ".lock").open("ab") as file:
        try:
            _lock(file.fileno())
        except (BlockingIOError, PermissionError) as error:  # as Windows calls it
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                "another reproduce works in this folder; wait until it ends, or choose another --output",
                str(output),
            ) from error
        yield


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
