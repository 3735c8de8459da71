"""anomalib's PatchCore and AnomalyDINO, faster: the same models, files and results (anomalib 2.0 and newer).

```python
from anomalib.models import Patchcore
from patchcore_rs.compat.anomalib import accelerate

model = accelerate(Patchcore())  # or one that is fitted or loaded
```

`Patchcore`, `PatchcoreModel`, `AnomalyDINO`, `AnomalyDINOModel` and `KCenterGreedy` of this module are subclasses of
anomalib's classes of those names, accelerated from the beginning. anomalib is imported when one of them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import os

    from patchcore_rs.detector.patchcore import PatchCore

    Patchcore: Any
    PatchcoreModel: Any
    AnomalyDINO: Any
    AnomalyDINOModel: Any
    KCenterGreedy: Any

# Without AnomalyDINO's classes, which anomalib has from 2.3: `import *` works with every version.
__all__ = [
    "KCenterGreedy",
    "Patchcore",
    "PatchcoreModel",
    "accelerate",
    "from_anomalib",
    "to_anomalib",
]

Model = TypeVar("Model")

_CLASSES = ("Patchcore", "PatchcoreModel", "AnomalyDINO", "AnomalyDINOModel", "KCenterGreedy")


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from patchcore_rs.compat.anomalib_models import host_class

    return host_class(name)


def accelerate(model: Model) -> Model:
    """Make a model of anomalib's compute by the kernels of this package what they can, in place.

    Embedding, search, image score, map and the selection of the bank get faster and stay what they were, but for
    rounding; `DIFFERENCES.md` has the numbers. Anomalib's own code runs while torch traces, compiles or exports, on
    devices, for other dtypes than float32 and where gradients are wanted.

    The search keeps a copy of the memory bank and notices when the bank is replaced or changed. A change that torch
    does not count, through `tensor.data` or numpy, is seen if it reaches one of 1024 values evenly spread over the
    bank.

    A pickle, a copy and what `to_torch` writes are of anomalib's own classes: they are not accelerated, and load where
    this package is missing. Checkpoints are what they were.

    Args:
        model: `Patchcore` or `AnomalyDINO`, the Lightning module or its torch model; new, fitted or loaded.

    Returns:
        `model` itself.

    Raises:
        ImportError: anomalib is not installed.
        TypeError: it is another model, or of a subclass that overrides what would be replaced.
    """
    from patchcore_rs.compat.anomalib_models import is_model, swap

    if not is_model(model):
        raise TypeError(
            "model must be a Patchcore, PatchcoreModel, AnomalyDINO or AnomalyDINOModel of anomalib; "
            f"got {type(model).__name__}. Its other models have no memory bank to search"
        )
    swap(model)
    return model


def from_anomalib(model: Any | str | os.PathLike[str]) -> PatchCore:
    """Take over a fitted Patchcore of anomalib: the same scores and maps, but for rounding.

    Backbone with its weights, layers, preparation of images, memory bank, `num_neighbors` and the image threshold are
    carried over. `save` writes a file without the network, as for any network of one's own: `PatchCore.load` then needs
    `backbone=`.

    Args:
        model: a live `Patchcore`, or the path of what anomalib wrote: a `.ckpt`, or a `.pt` of `to_torch`. These are
            pickles; they are read as data, and no code in them runs. A network out of a file is built by timm.

    Returns:
        A fitted `PatchCore` on the CPU.

    Raises:
        TypeError: it is another object.
        ValueError: the file holds another model, lacks what is needed, or the model does what `PatchCore` does not; the
            message says what, and what to do.
        ImportError: a file needs timm, which is not installed.
        OSError: the file cannot be opened.
    """
    from patchcore_rs.compat.anomalib_exchange import read_model

    return read_model(model)


def to_anomalib(model: PatchCore) -> Any:
    """Make the live Patchcore of anomalib that a fitted `PatchCore` is: the same scores and maps, but for rounding.

    Anomalib saves it: `engine.trainer.save_checkpoint`, `to_torch`, or any export of its own.

    Args:
        model: fitted with the choices of `profile="anomalib"` and a backbone of timm, or of torchvision where timm has
            the same network.

    Returns:
        A `Patchcore` in evaluation mode, not accelerated.

    Raises:
        NotFittedError: it is not fitted.
        ValueError: a setting or its network is not anomalib's; the message names it.
        ImportError: anomalib is not installed.
    """
    from patchcore_rs.compat.anomalib_exchange import write_model

    return write_model(model)
