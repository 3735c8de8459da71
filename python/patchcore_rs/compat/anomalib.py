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
    Patchcore: Any
    PatchcoreModel: Any
    AnomalyDINO: Any
    AnomalyDINOModel: Any
    KCenterGreedy: Any

__all__ = ["AnomalyDINO", "AnomalyDINOModel", "KCenterGreedy", "Patchcore", "PatchcoreModel", "accelerate"]

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

    The search keeps a copy of the memory bank and notices when the bank is replaced or changed. A change that torch does
    not count, through `tensor.data` or numpy, is seen if it reaches one of 1024 values evenly spread over the bank.

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
