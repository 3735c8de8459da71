"""A folder in, a data set out: which images are trained on, what the others are, and where their masks lie.

Layouts (any suffix of `IMAGE_SUFFIXES`, for masks too; hidden files are ignored; KIND names a defect):

    mvtec    train/good   test/good   test/KIND   ground_truth/KIND/STEM_mask.png
    btad     train/ok     test/ok     test/ko     ground_truth/ko/STEM.png
    visa     CATEGORY/Data/Images/Normal, CATEGORY/Data/Images/Anomaly, CATEGORY/Data/Masks/Anomaly,
             and split_csv/1cls.csv beside the categories, which says what is trained on
    folder   train (or train/good), and where wanted test/good, test/KIND and ground_truth as in mvtec;
             or good beside the other kinds, which then are the test images
    dagm     Train/STEM.PNG, Test/STEM.PNG and, of flawed images only, Label/STEM_label.PNG in each
    ksdd     kosNN/PartN.jpg and beside each PartN_label.bmp, which is black where there is no flaw. No split is
             published: trained on are good images of every second item, from the first on; the other items are tested
    ksdd2    train/STEM.png, test/STEM.png, and beside each STEM_GT.png, which is black where there is no flaw
    coco     a list as of COCO in train and another in test, beside the images, as Roboflow exports them
    realiad  realiad_RESOLUTION/CATEGORY, and realiad_jsons/realiad_jsons/CATEGORY.json, which lists all

Or `root` is a list of COCO or of Real-IAD itself, or a CSV or JSON file that lists images: path (from the folder of
the file), label (good, 0, 1 or the defect), split (train or test) and, where there are such, mask and part, which the
images of one part share.

MVTec LOCO, MVTec AD 2 (its test_public), MVTec 3D (photographs only) and VisA as converted by its authors' script load
as mvtec; images for validation are not used.

Names of folders count in any case and spelling: `GOOD` holds those of good images (ok, pass, normal, defect-free, ...)
and `MASKS` those of masks (ground_truth, masks, gt, ...), unless `good` or `masks` say others. Masks may lie in
KIND/STEM.png, in STEM.png, in KIND/STEM/ as several files, in test, or with their images: KIND/gt beside KIND/rgb, and
STEM_mask.png beside STEM.png. What the names leave open is refused.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from patchcore_rs._checks import integers
from patchcore_rs._text import counted, listing
from patchcore_rs.images.datasets import (
    LABELS,
    NAMES,
    RESERVED,
    TEST,
    TRAIN,
    VALIDATION,
    Dataset,
    FolderNames,
    Sample,
    composed,
    describe,
    find_images,
    find_parts,
    folder_name,
    has_images,
    is_image,
    listed,
    natural,
    part_stem,
    plain,
    present,
    relative_stem,
    require_flawless,
    require_masks,
    require_own_masks,
    split_masks,
    subfolders,
    tell_unused,
)
from patchcore_rs.images.listings import (
    LIST_SUFFIXES,
    coco_lists,
    load_coco_folders,
    load_list,
    load_realiad,
    load_visa,
    realiad_list,
)
from patchcore_rs.images.masks import read_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_ignored_value = integers(1, 65535)
_logger = logging.getLogger("patchcore_rs.images")

LAYOUTS = ("auto", "mvtec", "visa", "btad", "dagm", "ksdd", "ksdd2", "coco", "realiad", "folder")
_REQUIRED = {"mvtec": ("train/good", "test"), "btad": ("train/ok", "test"), "folder": ()}
_REMEDY = "move what is not, or name the folder of the good images: good='NAME'"
_COLOUR = "rgb"  # the folder of photographs beside those of depth and other channels
_CHANNELS = {_COLOUR, "image", "images", "img", "imgs"}


def load_dataset(
    root: str | os.PathLike[str],
    *,
    layout: str = "auto",
    category: str | None = None,
    good: str | Sequence[str] | None = None,
    masks: str | os.PathLike[str] | None = None,
    ignore: int | None = None,
) -> Dataset:
    """List the training and test images of a data set in one of the layouts above.

    No image is opened, but the masks of ksdd and ksdd2, which say what is flawed.

    Args:
        root: the folder, or a CSV or JSON file that lists images.
        layout: "mvtec", "visa", "btad", "dagm", "ksdd", "ksdd2", "coco", "realiad" or "folder"; "auto" recognises it by
            its folders.
        category: a subfolder of `root` where that holds several data sets, as the MVTec AD, VisA and BTAD downloads do.
        good: further names of folders of good images, where they have none of the usual ones. Given, it settles
            what names leave open.
        masks: the folder of masks, in the data set or by its path, where it has none of the usual names; no other
            folder holds masks then.
        ignore: a value in masks, 1 to 65535, of pixels that count neither as anomalous nor as normal; all others but
            0 are anomalous then.

    Raises:
        TypeError: `ignore` is no integer.
        ValueError: no layout or category fits, `ignore` is out of range, or names leave open what is good or which
            masks count; it names what was found.
        FileNotFoundError: `root`, `masks`, images of a split file, or the masks of some but not all anomalous images
            are missing.
        NotADirectoryError: `root` is a file.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    if ignore is not None:
        ignore = _ignored_value(ignore, "ignore")
    told = [] if good is None else [good] if isinstance(good, str) else list(good)
    names = _names(told)
    root = Path(present(root))
    if root.suffix.lower() in LIST_SUFFIXES and root.is_file():
        _require_none(f"{root} says", category=category, masks=masks)
        return _finished(load_list(root, names), ignore)
    categories = find_categories(root, told)
    folder = root
    if category is not None:
        if category not in categories:
            raise ValueError(
                f"{root}: no category {category!r}; found {listed(categories) if categories else 'none'}"
                + ("" if _detect(root, names) is None else "; this folder is a data set itself, leave category out")
            )
        folder = root / category
    detected = _detect(folder, names)
    if detected is None:
        raise ValueError(_unrecognised(root, categories))
    if layout == "auto":
        layout = detected
    if layout in _FIXED:
        _require_none(f"layout {layout!r} says", good=good, masks=masks)
        if layout != detected:
            raise ValueError(
                f"{folder}: layout {layout!r} has other folders; layout='auto' would read it as {detected!r}"
            )
        return _finished(_FIXED[layout](folder), ignore)
    absent = [name for name in _REQUIRED[layout] if not _has(folder, name)]
    if absent:
        raise ValueError(
            f"{folder}: layout {layout!r} expects the folders {' and '.join(_REQUIRED[layout])}; "
            f"missing {' and '.join(absent)}; layout='auto' would read it as {detected!r}"
        )
    given = None if masks is None else os.fspath(masks)
    return _finished(_load_folders(folder, names, None if good is None else told, given), ignore)


def _require_none(who: str, **arguments: object) -> None:
    """Refuse arguments that would change nothing."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{who} what is good and where masks are: leave {name}= out")


def _finished(dataset: Dataset, ignore: int | None) -> Dataset:
    """With the value that is ignored; ValueError where there is nothing to train on."""
    if not dataset.train:
        raise ValueError(f"{dataset.name}: no good image to train on; found {describe(dataset)}")
    return replace(dataset, test=tuple(replace(sample, ignore=ignore) for sample in dataset.test))


def find_categories(root: Path, good: Sequence[str] = ()) -> list[str]:
    """Subfolders that are data sets themselves; `good` holds further names of folders of good images."""
    names = _names(good)
    return [child.name for child in subfolders(root) if plain(child.name) not in RESERVED and _detect(child, names)]


def _names(good: Sequence[str] | None) -> FolderNames:
    return FolderNames(NAMES.good.union(map(plain, good or ())))


def _load_folders(folder: Path, names: FolderNames, good: Sequence[str] | None, masks: str | None) -> Dataset:
    """The layouts made of folders named after what they hold; `good` are those of the `names` that the caller gave."""
    trains, tests = _called(folder, TRAIN), _called(folder, TEST)
    parts = [place for train in trains for place in subfolders(train)]
    training = [place for place in parts if names.is_good(place.name)] or trains or _called(folder, names.good)
    if not training:
        raise ValueError(
            f"{folder}: layout 'folder' expects images to train on in train or good; found {_found(folder)}"
        )
    if tests:
        _require_kinds(tests)
        kinds = [kind for test in tests for kind in subfolders(test)]
    elif trains:
        kinds = []
    else:  # good beside the other kinds
        kinds = [kind for kind in subfolders(folder) if plain(kind.name) not in TRAIN | TEST | VALIDATION]
    found = list(dict.fromkeys(place.name for place in (*(training if not trains else parts), *kinds)))
    if missing := [name for name in good or () if plain(name) not in map(plain, found)]:
        raise ValueError(f"{folder}: good must name folders of images; got {missing[0]!r}, found {listed(found)}")
    truth = _truth(folder, tests) if masks is None else _given_truth(folder, kinds, masks)
    if masks is not None:
        names = replace(names, masks=frozenset() if truth else frozenset({plain(Path(masks).name)}))
    kinds = [kind for kind in kinds if kind not in (truth, *training) and not names.is_mask(kind.name)]
    train = [image for place in training for image in _training_images(place, names)]
    samples = [sample for kind in kinds for sample in _kind_samples(kind, truth, names)]
    if good is None:
        _require_clear_names([*(kinds if training == trains else (*parts, *kinds))], names)
        if truth is None and masks is None:
            _require_no_masks(folder, kinds, names)
        if tests:
            _require_some_good(kinds, samples)
    require_masks(samples, truth)
    require_own_masks(samples)
    if truth is not None:
        tell_unused(truth, samples, names)
    return Dataset(folder_name(folder), tuple(train), tuple(samples))


def _called(folder: Path, names: frozenset[str]) -> list[Path]:
    """The subfolders that have one of these names, as `plain` leaves them."""
    return [child for child in subfolders(folder) if plain(child.name) in names]


def _truth(folder: Path, tests: Sequence[Path]) -> Path | None:
    """The folder of masks by its name; None where there is none but in the folders of the kinds."""
    places = [place for parent in (folder, *tests) for place in subfolders(parent) if NAMES.is_mask(place.name)]
    places += _called(folder, LABELS) if tests else []
    found = [truth for truth in places if has_images(truth)]
    if len(found) > 1:
        shown = [truth.relative_to(folder).as_posix() for truth in found]
        raise ValueError(f"{folder}: {listing(shown)} may all be the masks; choose one, such as masks={shown[0]!r}")
    return found[0] if found else None


def _given_truth(folder: Path, kinds: Sequence[Path], masks: str) -> Path | None:
    """The folder of masks that the caller means; None where it is one in the folders of the kinds."""
    if (folder / masks).is_dir():
        return folder / masks
    if any((kind / masks).is_dir() for kind in kinds):
        return None
    if Path(masks).is_dir():
        return Path(masks)
    raise FileNotFoundError(
        errno.ENOENT, f"masks must be a folder in the data set or a path; found {_found(folder)}", masks
    )


def _training_images(folder: Path, names: FolderNames) -> list[Path]:
    images, masks = _parts(folder, names)
    require_flawless(images, folder, names, _REMEDY)
    if masks:
        _logger.info("%s: left out %s, masks by their names", folder, counted(len(masks), "file"))
    return images


def _parts(folder: Path, names: FolderNames) -> tuple[list[Path], list[Path]]:
    """The images of parts below a folder, of several channels the colour ones; and the masks that lie among them."""
    parts, masks = find_parts(folder, names)
    colour = [part for part in parts if _COLOUR in map(plain, part.relative_to(folder).parts[:-1])]
    return colour or parts, masks


def _kind_samples(kind: Path, truth: Path | None, names: FolderNames) -> Iterator[Sample]:
    images, among = _parts(kind, names)
    if names.is_good(kind.name):
        require_flawless(images, kind, names, _REMEDY)
        yield from (Sample(image, 0, "good") for image in images)
        return
    inside = {part for image in images for part in image.relative_to(kind).parts[:-1] if names.is_good(part)}
    if inside:
        raise ValueError(
            f"{kind}: holds {listed(sorted(inside))}, whose images would count as flawed; put the folders of good and "
            f"of flawed images right into {kind.parent.name}"
        )
    stems: dict[str, Path] = {}
    for image in images:
        if (other := stems.setdefault(_key(image, kind, names), image)) is not image:
            raise ValueError(
                f"{kind}: {other.name} and {image.name} have one name; if one is the mask of the other, put it into a "
                "folder gt or add _mask to its name, else rename one"
            )
    masks: dict[str, list[Path]] = {}
    several = set()  # stems that name a folder of masks
    for mask, base in (*((mask, kind) for mask in among), *_kind_masks(kind, truth)):
        stem = _key(mask, base, names)
        if stem not in stems:
            whole, _, _ = stem.rpartition("/")
            several |= {whole} & stems.keys()
            stem = whole if whole in stems else part_stem(stem)
        masks.setdefault(stem, []).append(mask)
    for stem, image in stems.items():
        found = masks.get(stem, [])
        if stem in several:
            yield Sample(image, 1, kind.name, tuple(found), mask_threshold=0)
        elif len(found) > 1:
            shown = " and ".join(mask.name for mask in found)
            raise ValueError(f"{found[0].parent}: two masks for one image, {shown}; keep one of them")
        else:
            yield Sample(image, 1, kind.name, found[0] if found else None)


def _kind_masks(kind: Path, truth: Path | None) -> Iterator[tuple[Path, Path]]:
    """The files in the folder of masks that can be of a kind's images, each with the folder its name counts from."""
    if truth is None:
        return
    places = [
        place for base in (truth, *_called(truth, TEST)) for place in _called(base, frozenset({plain(kind.name)}))
    ]
    for place in places:
        if has_images(place):
            yield from ((mask, place) for mask in find_images(place))
    if not places:
        yield from ((mask, truth) for mask in find_images(truth) if mask.parent == truth)


def _key(path: Path, folder: Path, names: FolderNames) -> str:
    """What an image and its mask have in common: the path below the kind without suffix, rgb and gt."""
    stem = Path(composed(relative_stem(path, folder)))
    parents = [part for part in stem.parts[:-1] if plain(part) not in _CHANNELS and not names.is_mask(part)]
    return "/".join((*parents, stem.name))


def _require_kinds(tests: Sequence[Path]) -> None:
    for test in tests:
        loose = [file.name for file in sorted(test.iterdir()) if is_image(file) and not file.is_dir()]
        if loose:
            raise ValueError(
                f"{test}: images outside a subfolder have no label ({len(loose)}): {listed(loose)}; "
                "move them into test/good or a folder named after the defect"
            )


def _require_clear_names(folders: Sequence[Path], names: FolderNames) -> None:
    """Refuse names that may mean good or a kind of flaw."""
    good = [folder.name for folder in folders if names.is_good(folder.name)]
    for folder in folders:
        if plain(folder.name) in _CHANNELS:
            raise ValueError(
                f"{folder}: the name says neither that these images are good nor how they are flawed; put them into "
                "good and a folder named after the flaw, or list them in a CSV file"
            )
        if not names.is_good(folder.name) and names.may_be_good(folder.name):
            raise ValueError(
                f"{folder}: the name leaves open whether these images are good; if they are, say so: "
                f"good={folder.name!r}; if not, " + (f"good={good[0]!r}" if good else "rename the folder")
            )


def _require_no_masks(folder: Path, kinds: Sequence[Path], names: FolderNames) -> None:
    """Refuse names that may mean masks or a kind of flaw, where no folder is called as masks are."""
    for kind in kinds:
        if names.may_be_mask(kind.name):
            raise ValueError(
                f"{kind}: the name leaves open whether these are masks; if they are, say so: "
                f"masks={kind.relative_to(folder).as_posix()!r}; if not, good='good', or the name of the good images"
            )


def _require_some_good(kinds: Sequence[Path], samples: Sequence[Sample]) -> None:
    """Refuse test images of several kinds of which none is good by its name or flawed by its masks."""
    if len(kinds) > 1 and all(sample.label and sample.mask is None for sample in samples):
        shown = [kind.name for kind in kinds]
        raise ValueError(
            f"{kinds[0].parent}: no folder has a name of good images, and none has masks, so all would count as "
            f"flawed: {listed(shown)}; say which are good: good='NAME'"
        )


def _has(folder: Path, path: str) -> bool:
    """Whether there is a folder by this path, names compared as `plain` leaves them."""
    name, _, rest = path.partition("/")
    places = _called(folder, {"train": TRAIN, "test": TEST}.get(name, frozenset({plain(name)})))
    return any(_has(place, rest) for place in places) if rest else bool(places)


def _load_dagm(folder: Path) -> Dataset:
    """An image is flawed where there is a mask of it."""

    def pairs(place: Path) -> Iterator[tuple[Path, Path | None]]:
        masks = {part_stem(mask.stem): mask for label in _called(place, LABELS) for mask in find_images(label)}
        yield from ((image, masks.get(composed(image.stem))) for image in _loose(place))

    return _split_by_masks(folder, pairs)


def _with_masks(place: Path, *, threshold: int = 127) -> Iterator[tuple[Path, Path | None]]:
    """Images with the mask that each has beside it, None where that marks nothing."""
    parts, masks = split_masks(_loose(place), place)
    found = {part_stem(mask.stem): mask for mask in masks}
    absent = [part for part in parts if composed(part.stem) not in found]
    if absent:
        raise FileNotFoundError(f"{place}: images without a mask beside them ({len(absent)}): {listed(absent)}")
    for part in parts:
        mask = found[composed(part.stem)]
        yield part, mask if read_mask(mask, threshold=threshold).any() else None


def _load_ksdd(folder: Path) -> Dataset:
    """Of the items, every second one is trained on and the others are tested: no item is both."""
    items = _items(folder)
    train = [image for item in items[::2] for image, mask in _with_masks(item, threshold=0) if mask is None]
    samples = [
        Sample(image, 0 if mask is None else 1, "good" if mask is None else "defect", mask, 0, part=item.name)
        for item in items[1::2]
        for image, mask in _with_masks(item, threshold=0)
    ]
    return Dataset(folder_name(folder), tuple(train), tuple(samples))


def _items(folder: Path) -> list[Path]:
    """The folders of the items of ksdd."""
    return [child for child in subfolders(folder) if re.fullmatch(r"(?i:kos)\d+", child.name) and has_images(child)]


def _split_by_masks(folder: Path, pairs: Callable[[Path], Iterator[tuple[Path, Path | None]]]) -> Dataset:
    """Train on what has no mask in train; test on all of test, flawed where there is a mask."""
    train = [image for place in _called(folder, TRAIN) for image, mask in pairs(place) if mask is None]
    samples = [
        Sample(image, 0, "good") if mask is None else Sample(image, 1, "defect", mask)
        for place in _called(folder, TEST)
        for image, mask in pairs(place)
    ]
    return Dataset(folder_name(folder), tuple(train), tuple(samples))


_FIXED: dict[str, Callable[[Path], Dataset]] = {  # layouts that leave nothing to say
    "visa": load_visa,
    "dagm": _load_dagm,
    "ksdd": _load_ksdd,
    "ksdd2": partial(_split_by_masks, pairs=_with_masks),
    "coco": load_coco_folders,
    "realiad": load_realiad,
}


def _loose(folder: Path) -> list[Path]:
    """The images right in a folder, in natural order."""
    return sorted((file for file in folder.iterdir() if is_image(file) and file.is_file()), key=natural)


def _detect(folder: Path, names: FolderNames) -> str | None:
    """The layout a folder has by the names of its subfolders; None where it has none."""
    for layout in ("mvtec", "btad"):
        if all(_has(folder, name) for name in _REQUIRED[layout]):
            return layout
    if (folder / "Data" / "Images").is_dir():
        return "visa"
    if _called(folder, TRAIN) and (tests := _called(folder, TEST)):
        if all(_called(test, LABELS) and _loose(test) for test in tests):
            return "dagm"
        if all(split_masks(_loose(test), test)[1] for test in tests):
            return "ksdd2"
    if coco_lists(folder):
        return "coco"
    if _items(folder):
        return "ksdd"
    if _called(folder, names.good) and realiad_list(folder) is not None:
        return "realiad"
    return "folder" if _called(folder, TRAIN | names.good) else None


def _unrecognised(root: Path, categories: list[str]) -> str:
    if categories:
        return f"{root}: holds the data sets {', '.join(categories)}; choose one, such as category={categories[0]!r}"
    if below := [child.name for child in subfolders(root) if find_categories(child)]:
        return f"{root}: no data set here, but in {listed(below)}; pass that, such as {root / below[0]}"
    if lists := sorted(file.name for file in root.iterdir() if file.suffix.lower() in LIST_SUFFIXES):
        return f"{root}: no data set in its folders; pass the list itself, such as {root / lists[0]}"
    return (
        f"{root}: no data set here; expected train/good and test (mvtec), train/ok and test (btad), Data/Images "
        f"(visa), or train or good (folder; good='NAME' where it has another name); found {_found(root)}"
    )


def _found(folder: Path) -> str:
    """What lies in a folder, for an error message."""
    return listed(sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))) or "nothing"
