"""What a model file says besides its arrays: the settings, the backbone's identity, training and calibration."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from patchcore_rs._checks import as_stored, one_of
from patchcore_rs._text import listing
from patchcore_rs.model.arrays import ENSEMBLE, member_arrays
from patchcore_rs.model.calibration import Calibration
from patchcore_rs.model.file import ModelFileError, model_name, read_model
from patchcore_rs.model.map_values import MapValues
from patchcore_rs.model.parameters import score_settings
from patchcore_rs.model.settings import SETTINGS, PatchCoreSettings, check_number, check_pair

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from typing import IO

    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_rs.backbones.backbone import Backbone
    from patchcore_rs.model.file import ModelFile
    from patchcore_rs.model.map_values import MapScale
    from patchcore_rs.model.settings import Settings

# A name only: a path, an address or a second scheme must not come out of a stranger's file.
_NAME = re.compile(r"(timm:)?[A-Za-z0-9_.]{1,100}")
# Settings of the selection, and of what is made of the bank afterwards: models that merge may differ in these.
_MAY_DIFFER = {field.name for field in fields(PatchCoreSettings)} - set(score_settings("patchcore")) | {
    "normalize",
    "clip",
    "index",
    "seed",
}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_WORD = re.compile(r"[A-Za-z0-9_.+!-]{1,80}")  # a library's name or its version
_LIBRARY_LIMIT = 32
_ENSEMBLE_SETTINGS = ("combine",)

check_combine = one_of("minmax", "zscore")


@dataclass(frozen=True)
class Training:
    """What a detector learnt from: by `fit`, and by every `partial_fit` and `merge` since.

    `images` is their number, None where a model file of format 1.0 does not say; `patches` that of their patches, then
    the least that the bank can come from. No patch of theirs is farther than `cover` (Euclidean, in standardised
    channels where the model standardises) from a row of the bank; None where that is not known, as of a random bank, or
    of a selection in a projection or from a beginning with means, and of methods without a bank.
    """

    images: int | None
    patches: int
    cover: float | None

    @classmethod
    def from_json(cls, stored: Any, rows: int, coreset: float | None) -> Training:
        """Check what `dataclasses.asdict` gave after its way through a file, or say what a bank of `rows` implies.

        There are at least as many patches as `rows`.

        A file of format 1.0 has nothing stored, None. ValueError names what is wrong.
        """
        if stored is None:
            # The least n with floor(n * fraction) rows; rounding may ask for one more.
            least = math.ceil(min(rows / coreset, 2.0**62)) if isinstance(coreset, float) else rows
            return cls(None, least, 0.0 if coreset is None else None)
        if not isinstance(stored, dict):
            raise ValueError(f"training must be an object; got {stored!r:.80}")
        images, patches, cover = (stored.get(name) for name in ("images", "patches", "cover"))
        if images is not None and (type(images) is not int or not 1 <= images < 2**63):
            raise ValueError(f"training images must be an integer >= 1 or null; got {images!r:.80}")
        if type(patches) is not int or not rows <= patches < 2**63:
            raise ValueError(
                f"training patches must be an integer >= {rows}, as the arrays come from no fewer; got {patches!r:.80}"
            )
        if cover is not None and check_number("training cover", cover) < 0:
            raise ValueError(f"training cover must be a number >= 0 or null; got {cover!r:.80}")
        return cls(images, patches, None if cover is None else float(cover))


@dataclass(frozen=True)
class Description:
    """Everything but arrays that a fitted detector consists of.

    `backbone` is a name that `load_backbone` knows where `named`, else what the caller's own network calls itself;
    `weights_hash` is empty for a plain callable. `image_size` is the (height, width) of images after resizing and
    cropping. `unseen` is the largest share of a training image that the crop cut off, None where that is not known.
    `map_values` are those of normal images, of the calibration where there was one, None where they are not known;
    `map_calibration` is the threshold of maps. `libraries` are the versions it was fitted with, empty where that is not
    known. `precision` is what the process of the fit let the backbone compute in
    (`backbones/host.py`), None where that is not known.
    """

    settings: Settings
    backbone: str
    named: bool
    weights_hash: str
    image_size: tuple[int, int]
    training: Training
    threshold: float | None = None
    calibration: Calibration | None = None
    unseen: float | None = None
    map_values: MapValues | None = None
    map_calibration: Calibration | None = None
    libraries: Mapping[str, str] = field(default_factory=dict)
    precision: dict[str, str] | None = None

    @property
    def map_scale(self) -> MapScale | None:
        """The colours of maps, None where too little is known."""
        return None if self.map_values is None else self.map_values.scale(self.map_calibration)

    def to_json(self) -> dict[str, Any]:
        """The description as a JSON object."""
        settings = self.settings.to_json()
        requires = settings.keys() & set(score_settings(self.settings.method))
        if self.settings.clip or not self.settings.normalize:  # readers that do not know `clip` do the same
            requires -= {"clip"}
        return {
            "settings": settings,
            "requires": sorted(requires),
            "backbone": {
                "name": self.backbone,
                "named": self.named,
                "weights_sha256": self.weights_hash,
                **({} if self.precision is None else {"precision": self.precision}),
            },
            "image_size": list(self.image_size),
            "unseen": self.unseen,
            "training": asdict(self.training),
            "libraries": dict(self.libraries),
            **self._decided_to_json(),
        }

    def _decided_to_json(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "map_values": None if self.map_values is None else self.map_values.to_json(),
            "map_calibration": None if self.map_calibration is None else self.map_calibration.to_json(),
        }

    @classmethod
    def from_json(
        cls, stored: dict[str, Any], method: str, arrays: Mapping[str, NDArray[Any]], *, complete: bool = False
    ) -> Description:
        """Check what `to_json` gave after its way through a file, and that it fits the method's arrays beside it.

        No setting may be missing where it must be `complete`.

        Raises:
            TypeError, ValueError: what is wrong, what was expected, what came.
        """
        settings = SETTINGS[method].from_json(stored.get("settings"), complete=complete)
        patches = settings.check_arrays(arrays)
        coreset = settings.coreset if isinstance(settings, PatchCoreSettings) else 1.0
        backbone = stored.get("backbone")
        if not isinstance(backbone, dict):
            raise ValueError(f"backbone must be an object; got {backbone!r:.80}")
        name, named, digest = (backbone.get(key) for key in ("name", "named", "weights_sha256"))
        if not isinstance(named, bool) or not isinstance(name, str) or (named and not _NAME.fullmatch(name)):
            raise ValueError(f"backbone must have a plain name and say whether it is a known one; got {backbone!r:.80}")
        if not isinstance(digest, str) or (not _DIGEST.fullmatch(digest) and (named or digest)):
            raise ValueError(f"backbone weights_sha256 must be 64 hexadecimal digits; got {digest!r:.80}")
        precision = backbone.get("precision")
        if precision is not None and not (
            isinstance(precision, dict) and all(isinstance(value, str) for value in precision.values())
        ):
            raise ValueError(f"backbone precision must be an object of texts; got {precision!r:.80}")
        unseen = stored.get("unseen", 0.0 if settings.crop is None else None)
        if unseen is not None and not 0 <= check_number("unseen", unseen) < 1:
            raise ValueError(f"unseen must be a share from 0 to below 1, or null; got {unseen!r:.80}")
        return cls(
            settings=settings,
            backbone=name,
            named=named,
            weights_hash=digest,
            image_size=check_pair("image_size", stored.get("image_size")),
            training=Training.from_json(stored.get("training"), patches, coreset),
            unseen=None if unseen is None else float(unseen),
            libraries=_libraries_from_json(stored.get("libraries", {})),
            precision=precision,
            **_decided_from_json(stored),
        )

    def check_mergeable(self, other: Description) -> None:
        """ValueError naming the first choice in which `other` differs, of those that decide features and scores."""
        ours, theirs = self.settings.to_json(), other.settings.to_json()
        pairs = {
            "backbone": (self.backbone, other.backbone),
            "weights_sha256": (self.weights_hash, other.weights_hash),
            **{name: (ours[name], theirs[name]) for name in ours if name not in _MAY_DIFFER},
            "image_size": (self.image_size, other.image_size),
        }
        for name, (own, their) in pairs.items():
            if own != their:
                raise ValueError(
                    f"other must have the same {name}, {own!r:.80}; got {their!r:.80}. Only models that see and "
                    "measure patches alike can be merged"
                )

    def check_backbone(self, loaded: Backbone) -> None:
        """ValueError unless `loaded` is the backbone the bank was built with, as far as its layers and weights tell."""
        if loaded.layers != self.settings.layers:
            raise ValueError(
                f"it was fitted on the layers {self.settings.layers}, those of the backbone given are {loaded.layers}; "
                f"{self.remedy}"
            )
        if loaded.weights_hash != self.weights_hash:
            raise ValueError(
                f"it was fitted with weights of the sha256 {self.weights_hash or 'of a plain callable'}, those of "
                f"backbone {loaded.name!r} have {loaded.weights_hash or 'none'}; {self.remedy}"
            )

    @property
    def remedy(self) -> str:
        """What a caller does who has not got the right backbone."""
        if self.named:
            return "pass weights=PATH with the weights it was fitted with"
        return f"pass backbone= with the network it was fitted with, {self.backbone}"


@dataclass(frozen=True)
class EnsembleDescription(Description):
    """That of an ensemble, whose scores are `combine`d ones of `members`.

    Images, and so maps, are as the first member sees them: settings, size and training are its. `backbone` names all.
    """

    combine: str = ""
    members: tuple[Description, ...] = ()

    @classmethod
    def of(cls, members: Sequence[Description], combine: str, **decided: Any) -> Self:
        """The description of an ensemble of these; `decided` are the threshold and what belongs to it."""
        first, unseen = members[0], [member.unseen for member in members]
        return cls(
            settings=first.settings,
            backbone=" + ".join(member.backbone for member in members),
            named=all(member.named for member in members),
            weights_hash="",
            image_size=first.image_size,
            training=first.training,
            unseen=None if None in unseen else max(filter(None, unseen), default=0.0),
            combine=combine,
            members=tuple(members),
            **decided,
        )

    def to_json(self) -> dict[str, Any]:
        """The description as a JSON object, with those of the members."""
        return {
            "settings": {"combine": self.combine},
            "requires": list(_ENSEMBLE_SETTINGS),
            "members": [{"method": member.settings.method, **member.to_json()} for member in self.members],
            **self._decided_to_json(),
        }

    @classmethod
    def from_json(
        cls,
        stored: dict[str, Any],
        method: str,  # noqa: ARG003 - an ensemble's, each member has its own
        arrays: Mapping[str, NDArray[Any]],
        *,
        complete: bool = False,
    ) -> EnsembleDescription:
        """Check what `to_json` gave after its way through a file, and that it fits the members' arrays beside it.

        Raises:
            TypeError, ValueError: what is wrong, what was expected, what came.
        """
        settings = stored.get("settings")
        combine = as_stored(settings.get("combine") if isinstance(settings, dict) else None, "combine", check_combine)
        members: list[Description] = []
        for i, (name, part, entry) in enumerate(_members(stored, arrays)):
            try:
                members.append(Description.from_json(entry, name, part, complete=complete))
            except (TypeError, ValueError) as error:
                raise ValueError(f"member {i}: {error}") from error
        check_members([member.settings for member in members])
        return cls.of(members, combine, **_decided_from_json(stored))


def check_members(settings: Sequence[Settings]) -> None:
    """ValueError unless detectors of these settings can be members of an ensemble: they see the same of an image."""
    for i, member in enumerate(settings):
        if member.normalize:
            raise ValueError(f"detectors[{i}] must have normalize=False; an ensemble has a scale of its own")
        if not member.sees_as(settings[0]):
            raise ValueError(
                f"detectors[{i}] must see the same part of an image as detectors[0], with resize="
                f"{settings[0].resize} and crop={settings[0].crop}; got resize={member.resize} and crop={member.crop}. "
                "Leave out all crops, or give resize and crop the same proportion"
            )


def _members(
    stored: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> list[tuple[str, dict[str, NDArray[Any]], dict[str, Any]]]:
    """Method, arrays and stored description of each member of an ensemble; ValueError where they do not fit."""
    entries, (_, members) = stored.get("members"), member_arrays(arrays)
    methods = [method for method, _ in members]
    if not isinstance(entries, list) or methods != [
        isinstance(entry, dict) and entry.get("method") for entry in entries
    ]:
        raise ValueError(f"members must be one object for each, of the methods {listing(methods)}; got {entries!r:.80}")
    return [(method, part, entry) for (method, part), entry in zip(members, entries, strict=True)]


def _libraries_from_json(stored: Any) -> dict[str, str]:
    """Versions by the names of libraries, as a file says them: nothing but `info` shows them."""
    plain = isinstance(stored, dict) and all(
        isinstance(word, str) and _WORD.fullmatch(word) for pair in stored.items() for word in pair
    )
    if not plain or len(stored) > _LIBRARY_LIMIT:
        raise ValueError(
            f"libraries must be an object of at most {_LIBRARY_LIMIT} versions by plain names; got {stored!r:.80}"
        )
    return dict(stored)


def _decided_from_json(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The threshold and what belongs to it, checked."""
    threshold, calibration = stored.get("threshold"), stored.get("calibration")
    map_values, map_calibration = stored.get("map_values"), stored.get("map_calibration")
    if map_values is None and map_calibration is not None:
        raise ValueError("map_calibration must come with map_values; got null for these")
    return {
        "threshold": None if threshold is None else check_number("threshold", threshold),
        "calibration": None if calibration is None else Calibration.from_json(calibration),
        "map_values": None if map_values is None else MapValues.from_json(map_values),
        "map_calibration": None
        if map_calibration is None
        else Calibration.from_json(map_calibration, "map_calibration"),
    }


def read_description(path: str | os.PathLike[str] | bytes | IO[bytes]) -> tuple[ModelFile, Description]:
    """What a model file holds, and its description: both checked, and that they fit each other.

    That of an ensemble is an `EnsembleDescription`. `path` is what `read_model` takes.

    Raises:
        ModelFileError: the path and the reason.
        TypeError: it is neither a path, nor bytes, nor a file object.
        FileNotFoundError, IsADirectoryError, PermissionError: it cannot be opened.
    """
    stored, path = read_model(path), model_name(path)
    ensemble = stored.method == ENSEMBLE
    kind = EnsembleDescription if ensemble else Description
    try:
        if stored.version >= (2, 0):
            _check_requires(path, stored, stored.metadata, stored.method)
        for method, _, entry in _members(stored.metadata, stored.arrays) if ensemble else ():
            _check_requires(path, stored, entry, method)
        description = kind.from_json(stored.metadata, stored.method, stored.arrays, complete=stored.version < (2, 0))
    except ModelFileError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelFileError(path, f"{error}; save the model again") from error
    return stored, description


def _check_requires(
    path: str | os.PathLike[str], stored: ModelFile, description: Mapping[str, Any], method: str
) -> None:
    """Refuse a file whose scores need a setting that is not known here, or not there."""
    names, settings = description.get("requires"), description.get("settings")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelFileError(path, f"requires must be a list of settings; got {names!a:.80}. Save the model again")
    known = _ENSEMBLE_SETTINGS if method == ENSEMBLE else {field.name for field in fields(SETTINGS[method])}
    for name in names:
        if name not in known:
            raise ModelFileError(
                path, f"its scores need the setting {name!a:.80}, unknown to this patchcore-rs; {stored.later_reader}"
            )
        if isinstance(settings, dict) and name not in settings:
            raise ModelFileError(path, f"it requires {name}, which the settings lack; save the model again")
