"""The parameters of a `PatchCore`: what each may be, and what its default stands for."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from patchcore_rs.model.profiles import PROFILES, Embedding, Profile, Projection, ProjectionKind, Size, Start

if TYPE_CHECKING:
    from patchcore_rs.backbones.backbone import Backbone

AUTO: Final = "auto"

# Larger images or numbers are a slip, or a hostile model file asking for all memory.
_SIDE_LIMIT = 8192
_COUNT_LIMIT = 65536
_SIGMA_LIMIT = 1000.0


@dataclass(frozen=True)
class Settings:
    """Every choice resolved, by the names of `PatchCore`'s arguments: what a model file stores."""

    profile: str
    layers: tuple[str, ...]
    resize: Size
    crop: Size
    resampling: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    embedding: Embedding
    patch_size: int
    standardize: bool
    coreset: float | None
    coreset_method: str
    projection: Projection
    projection_kind: ProjectionKind
    start: Start
    reweight: int | None
    distance: str
    upsampling: str
    border: str
    sigma: float
    normalize: bool
    index: str
    autocast: bool
    seed: int

    def to_json(self) -> dict[str, Any]:
        """The settings as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: object) -> Settings:
        """Check what :meth:`to_json` gave after its way through a file; ValueError names what is wrong.

        Settings of a later minor version are ignored: what may be ignored is what a minor version may add.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(stored, dict) or not set(names) <= set(stored):
            missing = names if not isinstance(stored, dict) else [name for name in names if name not in stored]
            raise ValueError(f"the settings lack {', '.join(missing)}")
        checked = check({name: stored[name] for name in names if name != "layers" or stored[name] != []})
        for name, value in checked.items():
            if _is_auto(value):
                raise ValueError(f"{name} must be resolved in a model file, got {AUTO!r}")
        return cls(**{"layers": ()} | checked)


def check(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters by name, checked and in plain types; "auto" stays where it may stand for a default.

    Raises ValueError: the argument's name, what was expected, what came.
    """
    return {
        name: value if name not in _CHECKS or (name in _AUTOMATIC and _is_auto(value)) else _CHECKS[name](name, value)
        for name, value in parameters.items()
    }


def resolve(checked: Mapping[str, Any], backbone: Backbone) -> Settings:
    """What every "auto" among the checked parameters stands for with this backbone."""
    profile, paper = PROFILES[checked["profile"]], PROFILES["paper"]
    recommended = asdict(profile)
    for names in (("resize", "crop"), ("embedding",)):
        own = [getattr(backbone, name) for name in names]
        if own != [getattr(paper, name) for name in names] and checked["backbone"] not in (AUTO, profile.backbone):
            recommended |= dict(zip(names, own, strict=True))
    recommended |= {"mean": backbone.mean, "std": backbone.std}
    values = {
        name: recommended[name] if _is_auto(value) and name in recommended else value for name, value in checked.items()
    }
    values["layers"] = backbone.layers
    return Settings(**{field.name: values[field.name] for field in fields(Settings)})


def _is_auto(value: object) -> bool:
    return isinstance(value, str) and value == AUTO


def _integer(low: int, high: int) -> Callable[[str, Any], int]:
    def checker(name: str, value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            number = low - 1
        if isinstance(value, bool) or not low <= number <= high:
            raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r:.80}")
        return number

    return checker


def _one_of(*choices: str) -> Callable[[str, Any], str]:
    def checker(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r:.80}")
        return str(value)

    return checker


_side = _integer(1, _SIDE_LIMIT)


def _either(*checkers: Callable[[str, Any], Any], text: str) -> Callable[[str, Any], Any]:
    """The first of the checkers that accepts; `text` says what all of them together expect."""

    def checker(name: str, value: Any) -> Any:
        for candidate in checkers:
            try:
                return candidate(name, value)
            except ValueError:
                continue
        raise ValueError(f"{name} must be {text}, got {value!r:.80}")

    return checker


def _optional(*checkers: Callable[[str, Any], Any], text: str) -> Callable[[str, Any], Any]:
    """As `_either`, and None is accepted too."""
    checker = _either(*checkers, text=text)
    return lambda name, value: None if value is None else checker(name, value)


def _number(low: float, high: float, *, open_low: bool = False) -> Callable[[str, Any], float]:
    def checker(name: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool | str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not low <= number <= high or (open_low and number == low):
            relation = ">" if open_low else ">="
            raise ValueError(f"{name} must be a number {relation} {low:g} and <= {high:g}, got {value!r:.80}")
        return number

    return checker


def _fraction(name: str, value: Any) -> float:
    if hasattr(value, "__index__"):  # an integer is a count, never a fraction
        raise ValueError(name)
    return _number(0, 1, open_low=True)(name, value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r:.80}")
    return value


def check_number(name: str, value: Any) -> float:
    """A finite number; ValueError for anything else."""
    return _number(-sys.float_info.max, sys.float_info.max)(name, value)


def check_pair(name: str, value: Any) -> tuple[int, int]:
    """A (height, width) in whole pixels or patches; ValueError for anything else."""
    items = _items(value)
    if len(items) != 2:
        raise ValueError(f"{name} must be a pair (height, width), got {value!r:.80}")
    return _side(name, items[0]), _side(name, items[1])


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else []


def _names(name: str, value: Any) -> tuple[str, ...]:
    names = _items(value)
    if not names or not all(isinstance(item, str) and item for item in names) or len(set(names)) != len(names):
        raise ValueError(f"{name} must be distinct module names such as ('layer2', 'layer3'), got {value!r:.80}")
    return tuple(names)


def _channels(low: float, *, open_low: bool = False) -> Callable[[str, Any], tuple[float, ...]]:
    def checker(name: str, value: Any) -> tuple[float, ...]:
        items = _items(value)
        if len(items) != 3:
            raise ValueError(f"{name} must be three numbers, one a colour channel, got {value!r:.80}")
        return tuple(_number(low, 1e6, open_low=open_low)(name, item) for item in items)

    return checker


_count = _integer(1, _COUNT_LIMIT)
_row = _integer(0, 2**63 - 1)
_row_count = _integer(1, 2**63 - 1)
_size = _optional(
    _side,
    check_pair,
    text=f"an integer (the shorter side), a pair (height, width), or None, with sides from 1 to {_SIDE_LIMIT}",
)

# The parameters whose default is another's choice: the profile's, and of some the backbone's.
_AUTOMATIC = {field.name for field in fields(Profile)} | {"layers", "mean", "std"}
_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "profile": _one_of(*PROFILES),
    "layers": _names,
    "resize": _size,
    "crop": _size,
    "resampling": _one_of("pil", "tensor"),
    "mean": _channels(-1e6),
    "std": _channels(0, open_low=True),
    "embedding": _either(_count, _one_of("concat"), text=f'an integer from 1 to {_COUNT_LIMIT} or "concat"'),
    "patch_size": _integer(1, 255),
    "standardize": _flag,
    "coreset": _optional(
        _row_count, _fraction, text="a count (int >= 1), a fraction (0 < float <= 1), or None for all"
    ),
    "coreset_method": _one_of("greedy", "random"),
    "projection": _optional(
        _count, _one_of("johnson-lindenstrauss"), text='a width (int >= 1), "johnson-lindenstrauss", or None'
    ),
    "projection_kind": _one_of("sparse", "gaussian"),
    "start": _optional(_row, _one_of("mean", "mean10"), text='a row (int >= 0), "mean", "mean10", or None'),
    "reweight": _optional(_count, text=f"an integer from 1 to {_COUNT_LIMIT}, the b of Eq. 7, or None"),
    "distance": _one_of("euclidean", "squared"),
    "upsampling": _one_of("bilinear", "nearest"),
    "border": _one_of("symmetric", "reflect"),
    "sigma": _number(0, _SIGMA_LIMIT),
    "normalize": _flag,
    "index": _one_of("exact", "ivfpq"),
    "autocast": _flag,
    "batch_size": _count,
    "threads": _optional(_count, text="an integer >= 1, or None for all that this process may use"),
    "seed": _integer(0, 2**64 - 1),
}
