"""The generated inspection set: the same pixels every time, masks that tell the truth, no foreign folder touched."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import pytest

from patchcore_rs.demo.synthetic import KINDS, SURFACES, generate, render
from patchcore_rs.images.files import read_image
from patchcore_rs.images.layouts import load_dataset
from patchcore_rs.images.masks import read_mask

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {"size": 64, "train": 2, "test_good": 1, "test_per_kind": 1}

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.surface}-{kind.name}")


def contents(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def widened(mask: np.ndarray, by: int) -> np.ndarray:
    for axis in (0, 1):
        mask = np.any([np.roll(mask, step, axis) for step in range(-by, by + 1)], axis=0)
    return mask


def test_the_set_has_the_layout_of_mvtec_ad(tmp_path: Path) -> None:
    categories = generate(tmp_path / "set", size=64, train=2, test_good=1, test_per_kind=2)

    assert [category.name for category in categories] == list(SURFACES)
    for category in categories:
        kinds = [kind.name for kind in KINDS if kind.surface == category.name]
        expected = {"train/good/000.png", "train/good/001.png", "test/good/000.png"}
        for kind in kinds:
            for index in ("000", "001"):
                expected |= {f"test/{kind}/{index}.png", f"ground_truth/{kind}/{index}_mask.png"}
        assert contents(category).keys() == expected

        dataset = load_dataset(category, layout="mvtec")
        assert (len(dataset.train), len(dataset.test)) == (2, 1 + 2 * len(kinds))
        assert {sample.kind for sample in dataset.test} == {"good", *kinds}


def test_files_hold_what_render_draws(tmp_path: Path) -> None:
    (category,) = generate(tmp_path, surfaces=["metal"], seed=3, **SMALL)
    image, mask = render("metal", "dent", 0, seed=3, size=64)

    np.testing.assert_array_equal(read_image(category / "test/dent/000.png"), image)
    np.testing.assert_array_equal(read_mask(category / "ground_truth/dent/000_mask.png"), mask)
    assert image.shape == (64, 64, 3)
    assert mask.shape == (64, 64)
    train, _ = render("metal", "good", 1, split="train", seed=3, size=64)
    np.testing.assert_array_equal(read_image(category / "train/good/001.png"), train)


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        generate(tmp_path / name, seed=seed, **SMALL)
    one, same, other = (contents(tmp_path / name) for name in ("one", "same", "other"))

    assert one == same
    assert one.keys() == other.keys()
    pictures = [name for name in one if "ground_truth" not in name]
    assert [name for name in pictures if one[name] == other[name]] == []


def test_a_picture_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    generate(tmp_path / "few", surfaces=["tiles"], **SMALL)
    generate(tmp_path / "more", surfaces=["cloth", "tiles"], size=64, train=3, test_good=2, test_per_kind=2)
    few, more = contents(tmp_path / "few/tiles"), contents(tmp_path / "more/tiles")

    assert few.items() < more.items()


def test_no_two_pictures_are_alike(tmp_path: Path) -> None:
    generate(tmp_path, size=64, train=3, test_good=3, test_per_kind=2)
    pictures = [digest for name, digest in contents(tmp_path).items() if "ground_truth" not in name]

    assert len(set(pictures)) == len(pictures)


@every_kind
@pytest.mark.parametrize("size", [64, 200])
def test_the_mask_is_where_the_picture_changes(kind, size: int) -> None:
    for index in range(4):
        image, mask = render(kind.surface, kind.name, index, size=size)
        clean, _ = render(kind.surface, kind.name, index, size=size, flawless=True)
        change = np.abs(image.astype(int) - clean).max(axis=2)

        assert mask.any()
        assert mask.mean() < 0.1
        # A thread under the others is missing or thin all the same: up to half of its region looks as it should.
        assert (change[mask] > 0).mean() > 0.4
        assert change[mask].mean() > 20 * change[~mask].mean()
        assert change[~widened(mask, 3)].max() <= 6


@every_kind
def test_flaws_vary_in_place_and_strength(kind) -> None:
    masks = [render(kind.surface, kind.name, index, size=64)[1] for index in range(4)]

    assert len({mask.tobytes() for mask in masks}) == 4


@pytest.mark.parametrize("surface", SURFACES)
def test_good_pictures_have_an_empty_mask_and_vary(surface: str) -> None:
    pictures = [render(surface, index=index, size=64) for index in range(6)]

    assert not any(mask.any() for _, mask in pictures)
    brightness = [image.mean() for image, _ in pictures]
    assert np.ptp(brightness) > 2
    assert all(60 < value < 230 for value in brightness)


@pytest.mark.parametrize("surface", SURFACES)
def test_every_surface_has_flaws_of_every_difficulty(surface: str) -> None:
    kinds = [kind for kind in KINDS if kind.surface == surface]

    assert [kind.grade for kind in kinds] == ["obvious", "clear", "subtle", "faint"]
    assert all(kind.description for kind in kinds)


def test_progress_counts_every_picture(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    generate(tmp_path, surfaces=["metal"], progress=lambda *call: calls.append(call), **SMALL)

    assert calls == [(done, 7) for done in range(1, 8)]


def test_an_interrupted_set_can_be_completed(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    settings = {"surfaces": ["metal"], "size": 64, "train": 30, "test_good": 1, "test_per_kind": 1}
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "set", progress=interrupt, **settings)
    assert len(contents(tmp_path / "set")) < 40
    generate(tmp_path / "set", **settings)
    generate(tmp_path / "whole", **settings)

    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_the_same_set_is_written_again_in_place(tmp_path: Path) -> None:
    (category,) = generate(tmp_path, surfaces=["metal"], **SMALL)
    before = contents(tmp_path)
    (category / "test/good/000.png").unlink()
    (category / "train/good/000.png").write_bytes(b"cut short")
    generate(tmp_path, surfaces=["metal"], **SMALL)

    assert contents(tmp_path) == before


def test_a_foreign_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")

    with pytest.raises(FileExistsError, match=r"not empty and holds no inspection set\. Name a new folder"):
        generate(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("manifest", [None, "not json", "[]"])
def test_a_set_of_other_settings_is_refused_untouched(tmp_path: Path, manifest: str | None) -> None:
    generate(tmp_path, surfaces=["metal"], **SMALL)
    if manifest is not None:
        (tmp_path / "inspection_set.json").write_text(manifest)
    before = contents(tmp_path)

    with pytest.raises(FileExistsError, match="holds an inspection set made with other settings"):
        generate(tmp_path, surfaces=["metal"], seed=1, **SMALL)
    assert contents(tmp_path) == before


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("mine")

    with pytest.raises(FileExistsError, match="root must be a folder; got the file"):
        generate(tmp_path / "set", **SMALL)
    assert (tmp_path / "set").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed must be an integer; got 0.5"),
        ({"size": 63}, ValueError, "size"),
        ({"train": 0}, ValueError, "train"),
        ({"test_good": 0}, ValueError, "test_good"),
        ({"test_per_kind": True}, TypeError, "test_per_kind must be an integer; got True"),
        ({"surfaces": ["wood"]}, ValueError, "surfaces must be one of cloth, metal, tiles; got 'wood'"),
        ({"surfaces": []}, ValueError, "surfaces must name at least one"),
        ({"surfaces": "metal"}, TypeError, r"got the string 'metal', pass \['metal'\]"),
    ],
)
def test_bad_arguments_are_refused_before_writing(tmp_path: Path, arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        generate(tmp_path / "set", **(SMALL | arguments))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wood",), "surface must be one of cloth, metal, tiles; got 'wood'"),
        (("metal", "hole"), "kind .* must be one of good, blowholes, scratch, dent, smudge; got 'hole'"),
        (("metal", "dent", -1), "index"),
    ],
)
def test_render_refuses_what_it_cannot_draw(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(*arguments)


def test_only_good_pictures_are_for_training() -> None:
    with pytest.raises(ValueError, match=r"kind \(of metal, in train\) must be one of good; got 'dent'"):
        render("metal", "dent", split="train")
