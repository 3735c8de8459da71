"""The settings of a fitted detector: its parameters, checked, with what every default stands for.

A new method adds its own to those that all share, as a class in `SETTINGS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from patchcore_rs._checks import as_stored, numbers
from patchcore_rs.model.parameters import AUTO, METHODS, pair
from patchcore_rs.model.profiles import PROFILES, preset_choices

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_rs.backbones.backbone import Backbone
    from patchcore_rs.model.profiles import Embedding, Projection, ProjectionKind, Size, Start

__all__ = [
    "AUTO",
    "SETTINGS",
    "MahalanobisADSettings",
    "PaDiMSettings",
    "PatchCoreSettings",
    "Settings",
    "SpadeSettings",
    "check",
    "check_number",
    "check_pair",
    "resolve",
]

_finite = numbers()
_NEVER_IN_1 = ("white_level", "value_range", "round_floats", "clip")  # settings that came after files of format 1


@dataclass(frozen=True)
class Settings:
    """Every choice resolved, by the names of the detector's arguments: what a model file stores.

    These are what all methods share; those of `method` stand in a class below this one.
    """

    method: ClassVar[str]

    profile: str
    layers: tuple[str, ...]
    resize: Size
    crop: Size
    resampling: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    white_level: int
    value_range: tuple[float, float] | None
    round_floats: bool
    upsampling: str
    border: str
    sigma: float
    normalize: bool
    clip: bool
    autocast: bool
    seed: int

    def to_json(self) -> dict[str, Any]:
        """The settings as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: object, *, complete: bool = True) -> Self:
        """Check what `to_json` gave after its way through a file.

        A file of format 1 held every setting of its time. Unless it must be `complete`, one that is missing has the
        value `absent` of its parameter. Settings that this version does not know are ignored.

        Raises:
            ValueError: what is wrong, whatever it is; a wrong type too.
        """
        table = {name: METHODS[cls.method][name] for name in (field.name for field in fields(cls))}
        known = dict(stored) if isinstance(stored, Mapping) else {}
        missing = [name for name in table if name not in known and name not in _NEVER_IN_1]
        if missing and complete:
            raise ValueError(f"the settings lack {', '.join(missing)}")
        if not isinstance(stored, Mapping):
            raise ValueError(f"settings must be an object; got {stored!r:.80}")
        values: dict[str, Any] = {}
        for name, parameter in table.items():
            value = known.get(name, parameter.absent)
            if parameter.auto and _is_auto(value):
                raise ValueError(f"{name} must be resolved in a model file; got {AUTO!r}")
            # A backbone that is a plain callable has no layers.
            no_layers = name == "layers" and value in ([], ())
            values[name] = () if no_layers else as_stored(value, name, parameter.check)
        return cls(**values)

    def sees_as(self, other: Settings) -> bool:
        """Whether both see the same part of any image, to within a pixel: the whole, or the centre of one share."""
        (kind, *shares), (other_kind, *other_shares) = _seen_part(self), _seen_part(other)
        return kind == other_kind and all(
            abs(own - theirs) <= 1 / min(side, other_side)
            for (own, side), (theirs, other_side) in zip(shares, other_shares, strict=True)
        )

    def check_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> int:  # noqa: ARG002 - of the methods below
        """The least number of patches that the arrays of a model come from; ValueError where they do not fit these."""
        return 1


@dataclass(frozen=True)
class PatchCoreSettings(Settings):
    """The settings of `PatchCore`."""

    method: ClassVar[str] = "patchcore"

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
    index: str

    def check_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """The rows of the bank; ValueError unless they have the width, and the statistics beside, that these say."""
        rows, dimensions = arrays["bank"].shape
        if self.standardize != ("mean" in arrays):
            raise ValueError(f"standardize is {self.standardize}, mean and deviation say {'mean' in arrays}")
        if self.embedding not in ("concat", dimensions):
            raise ValueError(f"embedding is {self.embedding}, the bank has {dimensions} dimensions")
        return int(rows)


@dataclass(frozen=True)
class PaDiMSettings(Settings):
    """The settings of `PaDiM`."""

    method: ClassVar[str] = "padim"

    channels: int | str
    epsilon: float

    def check_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """The positions; ValueError unless the grid has them, and channels and factors are those that these say."""
        positions, channels = arrays["mean"].shape
        if channels != self.channels or arrays["channels"].max() > 1 or arrays["channels"].sum() != channels:
            raise ValueError(f"channels must mark the {channels} columns of mean, and be that many in the settings")
        if arrays["factors"].shape[1] != channels * (channels + 1) // 2:
            raise ValueError(f"factors must have {channels * (channels + 1) // 2} columns for {channels} channels")
        diagonal = [column * (2 * channels - column + 1) // 2 for column in range(channels)]
        if not (arrays["factors"][:, diagonal] > 0).all():
            raise ValueError("factors must be > 0 on the diagonal")
        grid = arrays["grid"].tolist()
        if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != positions:
            raise ValueError(f"grid must be rows and columns of the {positions} positions; got {grid!r:.80}")
        return int(positions)


@dataclass(frozen=True)
class MahalanobisADSettings(Settings):
    """The settings of `MahalanobisAD`."""

    method: ClassVar[str] = "mahalanobis"

    def check_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """1, a patch of an image; ValueError unless the layers' widths are those of mean and factors."""
        widths = arrays["widths"].tolist()
        if min(widths) < 1 or sum(widths) != len(arrays["mean"]):
            raise ValueError(f"widths must be >= 1 and add up to the {len(arrays['mean'])} values of mean")
        starts, end = [], 0
        for width in widths:
            starts += [end + column * (2 * width - column + 1) // 2 for column in range(width)]
            end += width * (width + 1) // 2
        if len(arrays["factors"]) != end:
            raise ValueError(f"factors must have {end} values, as triangles of these widths do")
        if not (arrays["factors"][starts] > 0).all():
            raise ValueError("factors must be > 0 on the diagonal")
        return 1


@dataclass(frozen=True)
class SpadeSettings(Settings):
    """The settings of `SPADE`."""

    method: ClassVar[str] = "spade"

    neighbours: int
    kappa: int

    def check_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """The rows of the bank; ValueError unless all images have as many of them, and widths are those of both."""
        rows, images = len(arrays["bank"]), len(arrays["images"])
        if rows % images:
            raise ValueError(f"bank must have as many rows for each of the {images} images; got {rows}")
        both, widths = [arrays["bank"].shape[1], arrays["images"].shape[1]], arrays["widths"].tolist()
        if widths != both and not (len(widths) == 1 and widths * 2 == both):
            raise ValueError(f"widths must be the columns of bank and images, {both}; got {widths!r:.80}")
        return rows


# The settings of each method, by the name that stands in the model file.
SETTINGS: Mapping[str, type[Settings]] = {
    settings.method: settings for settings in (PatchCoreSettings, PaDiMSettings, MahalanobisADSettings, SpadeSettings)
}


def check(parameters: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The parameters of that method by name, checked and in plain types, those of its preset in place of "auto".

    "auto" stays where it is for the backbone or the profile to say what it stands for.

    A name that is not in the method's table, as of a subclass of the caller's, is left as it is.

    Raises:
        TypeError: the type of one is wrong: its name, what was expected, what came.
        ValueError: the value of one is wrong, in the same words.
    """
    table = METHODS[method]
    checked = {
        name: value if name not in table or (table[name].auto and _is_auto(value)) else table[name].check(value, name)
        for name, value in parameters.items()
    }
    if "preset" not in table:
        return checked
    chosen = preset_choices(checked.get("preset"), checked.get("backbone"))
    return checked | {name: value for name, value in chosen.items() if _is_auto(checked.get(name))}


def resolve(checked: Mapping[str, Any], backbone: Backbone, method: str) -> Settings:
    """What every "auto" among the checked parameters of that method stands for with this backbone.

    "auto" stays where neither backbone nor profile has an answer, for the method to give one.
    """
    profile, paper = PROFILES[checked["profile"]], PROFILES["paper"]
    recommended = asdict(profile)
    for names in (("resize", "crop"), ("embedding",)):
        own = [getattr(backbone, name) for name in names]
        if own != [getattr(paper, name) for name in names] and checked["backbone"] not in (AUTO, profile.backbone):
            recommended |= dict(zip(names, own, strict=True))
    if checked["profile"] == "inspect":
        recommended |= {"resize": _whole(backbone), "crop": None}
    recommended |= {"mean": backbone.mean, "std": backbone.std}
    values = {
        name: recommended[name] if _is_auto(value) and name in recommended else value for name, value in checked.items()
    }
    values["layers"] = backbone.layers
    values["round_floats"] = _rounds_floats(values)
    settings = SETTINGS[method]
    return settings(**{field.name: values[field.name] for field in fields(settings)})


def _rounds_floats(values: Mapping[str, Any]) -> bool:
    """Whether floating-point images are rounded to 8 bits, as their files are; not where they are finer than these."""
    normalised = not any(values["mean"]) and set(values["std"]) == {1.0}
    if _is_auto(values["round_floats"]):
        return values["resampling"] == "pil" and values["value_range"] is None and not normalised
    if values["round_floats"] and normalised:
        raise ValueError("round_floats must be False where mean=0 and std=1 say that images are normalised; got True")
    return bool(values["round_floats"])


def _whole(backbone: Backbone) -> Size:
    """The size at which the backbone sees the whole of any image: that of the crop which it recommends."""
    size = backbone.resize if backbone.crop is None else backbone.crop
    return (size, size) if isinstance(size, int) else size


def _is_auto(value: object) -> bool:
    return isinstance(value, str) and value == AUTO


def _seen_part(settings: Settings) -> tuple[Any, ...]:
    """What crop and resize keep: of which sides, and for height and width the share of it and its length in pixels."""
    resize, crop = settings.resize, settings.crop
    if crop is None:
        return ("each side", (1.0, 2**31), (1.0, 2**31))
    crops = (crop, crop) if isinstance(crop, int) else crop
    if resize is None:
        return ("pixels", *((float(side), 2**31) for side in crops))
    sides = (resize, resize) if isinstance(resize, int) else resize
    kind = "the shorter side" if isinstance(resize, int) else "each side"
    return (kind, *((kept / side, side) for kept, side in zip(crops, sides, strict=True)))


def check_number(name: str, value: Any) -> float:
    """A finite number out of a model file; ValueError for anything else."""
    return float(as_stored(value, name, _finite))


def check_pair(name: str, value: Any) -> tuple[int, int]:
    """A (height, width) in whole pixels or patches out of a model file; ValueError for anything else."""
    height, width = as_stored(value, name, pair)
    return height, width
