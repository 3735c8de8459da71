"""The weights of a network: read from a file without running code, checked, and hashed."""

from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchcore_rs._text import shortened
from patchcore_rs.backbones.backbone import describe_output

if TYPE_CHECKING:
    import os


class WeightsError(RuntimeError):
    """The default weights of a network cannot be fetched."""


def hash_weights(module: nn.Module) -> str:
    """sha256 (hex) over the state dict sorted by name: each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Load a state dict into `module`, widened to the module's dtypes; nothing in the file is run.

    Args:
        module: what to fill; throw it away after an error.
        path: a file, `.safetensors` or what `torch.save` wrote.
        rename: what makes the module's names of those in the file.

    Raises:
        ValueError: the file is no state dict, or tensors are missing, unexpected or of another shape; it names the
            first.
        ImportError: the file needs safetensors, which is not installed.
        OSError: the file cannot be opened.
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
        f"{label}: {shortened(names)}"
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
            f"weights {str(path)!r} must hold a state dict (names to tensors); got {describe_output(state)}. "
            "Save module.state_dict()"
        )
    return state
