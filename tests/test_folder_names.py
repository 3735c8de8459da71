"""What names of folders say: which images are good, where masks lie; and what they leave open is refused."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from detectors import detector, normal, write_folder
from image_folders import make, names, table

from patchcore_rs.images.datasets import GOOD, MASKS, describe, find_images, not_flawless
from patchcore_rs.images.layouts import load_dataset

if TYPE_CHECKING:
    from pathlib import Path

SPELLINGS = "good Good GOOD OK pass Passed nominal normal defect-free Defect_Free defectfree i.O."


def tree(good: str = "good", masks: str = "ground_truth") -> list[str]:
    return [
        f"train/{good}/0.png",
        *(f"test/{good}/{i}.png" for i in range(2)),
        *(f"test/hole/{i}.png" for i in range(3)),
        *(f"{masks}/hole/{i}_mask.png" for i in range(3)),
    ]


@pytest.mark.parametrize("good", SPELLINGS.split())
def test_good_images_are_good_by_every_usual_name(tmp_path: Path, good: str) -> None:
    dataset = load_dataset(make(tmp_path, tree(good)))
    assert describe(dataset) == "train: 1, good: 2, hole: 3, masks: 3 of 3"
    assert [(sample.kind, sample.label) for sample in dataset.test if sample.path.parent.name == good] == [
        ("good", 0)
    ] * 2


@pytest.mark.parametrize(
    "masks", ["ground_truth", "Ground_Truth", "GroundTruth", "mask", "masks", "Masks", "gt", "GT", "annotations"]
)
def test_masks_are_found_by_every_usual_name(tmp_path: Path, masks: str) -> None:
    dataset = load_dataset(make(tmp_path, tree(masks=masks)))
    assert describe(dataset) == "train: 1, good: 2, hole: 3, masks: 3 of 3"
    assert table(tmp_path, dataset)[-1] == ("test/hole/2.png", 1, "hole", f"{masks}/hole/2_mask.png")


def test_train_and_test_may_be_written_with_capitals(tmp_path: Path) -> None:
    root = make(tmp_path, ["Train/Good/0.png", "Test/Good/1.png", "Test/Hole/2.png", "Masks/hole/2.png"])
    for layout in ("auto", "mvtec", "folder"):
        assert table(root, load_dataset(root, layout=layout)) == [
            ("Test/Good/1.png", 0, "good", None),
            ("Test/Hole/2.png", 1, "Hole", "Masks/hole/2.png"),
        ]


MASKED = [("crack/1.png", 1, "crack", "mask/crack/1.png"), ("hole/1.png", 1, "hole", "mask/hole/1.png")]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        # Beside the kinds, in folders of their names or right in the folder of masks.
        (["good/0.png", "crack/1.png", "hole/1.png", "mask/crack/1.png", "mask/hole/1.png"], MASKED),
        (["good/0.png", "crack/1.png", "masks/1_GT.png"], [("crack/1.png", 1, "crack", "masks/1_GT.png")]),
        # In test, and mirrored from test.
        (["train/0.png", "test/ok/0.png", "test/hole/1.png", "test/gt/hole/1.png"],
         [("test/hole/1.png", 1, "hole", "test/gt/hole/1.png"), ("test/ok/0.png", 0, "good", None)]),
        (["train/0.png", "test/hole/1.png", "masks/test/hole/1.png"],
         [("test/hole/1.png", 1, "hole", "masks/test/hole/1.png")]),
        # With their images.
        (["train/good/rgb/0.png", "train/good/xyz/0.tiff", "test/good/rgb/0.png", "test/good/gt/0.png",
          "test/hole/rgb/1.png", "test/hole/xyz/1.tiff", "test/hole/gt/1.png"],
         [("test/good/rgb/0.png", 0, "good", None), ("test/hole/rgb/1.png", 1, "hole", "test/hole/gt/1.png")]),
        (["train/0.png", "test/hole/images/day1/1.png", "test/hole/masks/day1/1.png"],
         [("test/hole/images/day1/1.png", 1, "hole", "test/hole/masks/day1/1.png")]),
        (["train/0.png", "train/0_mask.png", "test/good/0.png", "test/good/0_gt.png", "test/hole/1.png",
          "test/hole/1_GT.png", "test/hole/2.png", "test/hole/2_label.bmp"],
         [("test/good/0.png", 0, "good", None), ("test/hole/1.png", 1, "hole", "test/hole/1_GT.png"),
          ("test/hole/2.png", 1, "hole", "test/hole/2_label.bmp")]),
        (["train/0.png", "train/mask_0.png", "test/hole/1.png", "test/hole/mask_1.png"],
         [("test/hole/1.png", 1, "hole", "test/hole/mask_1.png")]),
        # Labels are masks where no flaw can be called so.
        (["train/0.png", "test/label/1.png", "test/good/2.png", "labels/label/1.png"],
         [("test/good/2.png", 0, "good", None), ("test/label/1.png", 1, "label", "labels/label/1.png")]),
        (["good/0.png", "label/1.png"], [("label/1.png", 1, "label", None)]),
        # A name that ends like that of a mask is no mask where no image is called like the rest of it.
        (["good/part_gt.png", "hole/side_mask.png"], [("hole/side_mask.png", 1, "hole", None)]),
        (["good/0.png", "hole/a_gt.png", "masks/hole/a_gt.png"], [("hole/a_gt.png", 1, "hole", "masks/hole/a_gt.png")]),
    ],
)  # fmt: skip
def test_masks_are_no_parts_wherever_they_lie(tmp_path: Path, files: list[str], found: list[object]) -> None:
    dataset = load_dataset(make(tmp_path, files))
    assert table(tmp_path, dataset) == found
    assert [path.name for path in dataset.train] in (["0.png"], ["part_gt.png"])


def test_several_masks_of_an_image_are_one(tmp_path: Path) -> None:
    """As MVTec LOCO has them: a folder for each image, a file for each flaw."""
    files = ["train/good/0.png", "validation/good/0.png", "test/good/0.png", "test/logical_anomalies/7.png"]
    masks = [f"ground_truth/logical_anomalies/7/00{i}.png" for i in range(2)]
    [_, sample] = load_dataset(make(tmp_path, files + masks)).test
    assert isinstance(sample.mask, tuple)
    assert names(tmp_path, sample.mask) == masks
    assert sample.mask_threshold == 0


def test_the_caller_names_good_images_and_masks(tmp_path: Path) -> None:
    root = make(tmp_path / "set", [*tree("Gutteil", "pixel"), "gt/stray.png"])
    with pytest.raises(
        ValueError,
        match=r"none has masks.*: Gutteil, hole; say which are good: good='NAME'",
    ):
        load_dataset(root)
    for masks in ("pixel", root / "pixel", str(root / "pixel")):
        dataset = load_dataset(root, good="gutteil", masks=masks)
        assert describe(dataset) == "train: 1, good: 2, hole: 3, masks: 3 of 3"
        assert names(root, dataset.train) == ["train/Gutteil/0.png"]
    assert load_dataset(root, good=["Gutteil"], masks="pixel") == dataset
    with pytest.raises(ValueError, match=r"good must name folders of images; got 'Gut', found Gutteil, hole"):
        load_dataset(root, good="Gut")
    with pytest.raises(FileNotFoundError, match=r"masks must be a folder .*found gt, pixel, test, train.*'nowhere'"):
        load_dataset(root, good="Gutteil", masks="nowhere")


def test_masks_outside_the_data_set_and_in_folders_of_the_kinds_can_be_named(tmp_path: Path) -> None:
    root = make(tmp_path / "set", ["train/0.png", "test/hole/1.png"])
    make(tmp_path / "hole", ["1.png"])
    assert load_dataset(root, masks=tmp_path / "hole").test[0].mask == tmp_path / "hole" / "1.png"
    root = make(tmp_path / "other", ["train/0.png", "test/hole/rgb/1.png", "test/hole/truth/1.png"])
    [sample] = load_dataset(root, masks="truth").test
    assert sample.mask == root / "test/hole/truth/1.png"


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (["train/0.png", "test/perfection/1.png", "test/hole/2.png"], ValueError,
         r"test: no folder has a name of good images, and none has.*hole, perfection; say which are good: good='NAME'"),
        (["train/0.png", "test/perfection/1.png", "test/hole/2.png", "gt/hole/2.png"], FileNotFoundError,
         r"1 of 2 anomalous images have no mask.*or, where the images of perfection are good.*good='perfection'"),
        (["train/0.png", "test/good/1.png", "test/good_2/1.png"], ValueError,
         r"test.good_2: the name leaves open .*good='good_2'; if not, good='good'"),
        (["train/good/0.png", "train/good_2/0.png"], ValueError, r"train.good_2: the name leaves open"),
        (["train/images/0.png", "test/images/1.png", "test/masks/1.png"], ValueError,
         r"test.images: the name says neither .*list them in a CSV file"),
        (["good/0.png", "OK lot 7/1.png"], ValueError, r"OK lot 7: the name leaves open"),
        (["train/0.png", "test/day1/good/1.png", "test/day1/hole/1.png"], ValueError,
         r"day1: holds good, whose images would count as flawed; .*right into test"),
        (["train/0.png", "test/good/1.png", "test/good/bad/1.png"], ValueError, r"good: holds bad, so not all"),
        (["train/day1/good/0.png", "train/day1/hole/0.png"], ValueError, r"train: holds day1/hole, so not all"),
        (["train/a/0.png", "train/NG/0.png"], ValueError, r"train: holds NG, so not all.*good='NAME'"),
        (["train/0.png", "test/hole/1.png", "gt/hole/1.png", "masks/hole/1.png"], ValueError,
         r"gt and masks may all be the masks; choose one, such as masks='gt'"),
        (["train/0.png", "test/hole/1.png", "test/dent/1.png", "gt/1.png"], ValueError,
         r"1\.png: may be the mask of .*dent.1\.png and of .*hole.1\.png; put masks into folders"),
        (["train/0.png", "test/hole/1.png", "test/hole/1_mask.png", "gt/hole/1.png"], ValueError,
         r"two masks for one image"),
        (["train/0.png", "test/hole/1.png", "test/hole/1_mask.png", "test/hole/2.png"], FileNotFoundError,
         r"hole: 1 of 2 anomalous images have no mask"),
        (["train/0.png", "test/hole/gt/1.png"], ValueError, r"hole: no images in this folder but masks"),
        (["train/0.png", "test/hole/1.png", "test/hole/1.jpg"], ValueError,
         r"hole: 1\.jpg and 1\.png have one name; if one is the mask of the other, put it into a folder gt or add"),
        (["a/b/good/0.png"], ValueError, r"no data set here, but in a; pass that, such as .*a$"),
        (["images/0.png", "a.csv"], ValueError, r"no data set in its folders; pass the list itself, such as .*a\.csv$"),
    ],
)  # fmt: skip
def test_trees_in_doubt_are_refused_with_the_choices(
    tmp_path: Path, files: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_dataset(make(tmp_path, files))


NFC, NFD = "L\u00f6cher", "Lo\u0308cher"  # one word as two systems write it


@pytest.mark.parametrize(
    ("files", "mask"),
    [
        (["train/0.png", f"test/{NFC}/1.png", f"ground_truth/{NFD}/1.png"], f"ground_truth/{NFD}/1.png"),
        (["train/0.png", f"test/hole/{NFC}.png", f"gt/hole/{NFD}_mask.png"], f"gt/hole/{NFD}_mask.png"),
        (["train/0.png", f"test/hole/{NFD}.png", f"test/hole/{NFC}_mask.png"], f"test/hole/{NFC}_mask.png"),
        (["train/0.png", "test/hole/1.png", "gt_2/hole/1.png"], "gt_2/hole/1.png"),
        (["train/0.png", "test/hole/1.png", "test/hole/1.mask.png"], "test/hole/1.mask.png"),
        (["train/0.png", "test/hole/1.png", "test/hole/1_segmentation.png"], "test/hole/1_segmentation.png"),
        (["train/0.png", "test/hole/_mask.png", "gt/hole/_mask.png"], "gt/hole/_mask.png"),
    ],
)
def test_names_spelled_otherwise_are_the_same(tmp_path: Path, files: list[str], mask: str) -> None:
    [sample] = load_dataset(make(tmp_path, files)).test
    assert sample.mask == tmp_path / mask


def test_good_may_be_spelled_otherwise(tmp_path: Path) -> None:
    make(tmp_path, ["train/0.png", f"test/{NFD}/1.png"])
    assert load_dataset(tmp_path, good=NFC).test[0].label == 0


def test_names_that_may_mean_masks_are_refused_where_no_others_do(tmp_path: Path) -> None:
    root = make(tmp_path, ["train/0.png", "test/good/1.png", "test/hole/1.png", "test/hole_masks/1.png"])
    message = (
        "hole_masks: the name leaves open whether these are masks; if they are, say so: masks='test/hole_masks'; if"
    )
    with pytest.raises(ValueError, match=message):
        load_dataset(root)
    assert describe(load_dataset(root, masks="test/hole_masks")) == "train: 1, good: 1, hole: 1, masks: 1 of 1"
    assert describe(load_dataset(root, good="good")).endswith("hole: 1, hole_masks: 1, masks: 0 of 2")


def test_masks_of_no_image_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    load_dataset(make(tmp_path, [*tree(), "ground_truth/good/1.png"]))
    assert not caplog.records
    load_dataset(make(tmp_path, ["ground_truth/hole/10_mask.png", "ground_truth/dent/2.png"]))
    [record] = caplog.records
    assert record.getMessage().endswith("truth: left out 2 masks of no test image: dent/2.png, hole/10_mask.png")


def test_what_was_named_good_is_in_doubt_no_more(tmp_path: Path) -> None:
    root = make(tmp_path, ["train/good/0.png", "train/good_2/0.png", "test/good/1.png", "test/ok_scratch/2.png"])
    assert describe(load_dataset(root, good="good_2")) == "train: 2, good: 1, ok_scratch: 1, masks: 0 of 1"
    assert describe(load_dataset(root, good="good")) == "train: 1, good: 1, ok_scratch: 1, masks: 0 of 1"


def test_one_folder_of_flawed_images_needs_no_good_ones(tmp_path: Path) -> None:
    root = make(tmp_path, ["train/0.png", "test/hole/1.png"])
    assert describe(load_dataset(root)) == "train: 1, good: 0, hole: 1, masks: 0 of 1"


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        (["good/0.png"], []),
        (["0.png", "day1/0.png", "Bad_Homburg/0.png"], []),
        (["good/0.png", "OK/0.png", "good_2/1.png"], []),
        (["good/0.png", "crack/0.png"], ["crack"]),
        (["a/good/0.png", "a/crack/0.png", "b/test/hole/0.png"], ["a/crack", "b/test"]),
        (["0.png", "Masks/0.png", "gt/x/0.png"], ["Masks", "gt"]),
        (["0.png", "0_mask.png", "1_mask.png"], ["0_mask.png"]),
        (["0.png", "NG/0.png", "not ok/0.png"], ["NG", "not ok"]),
    ],
)
def test_folders_that_hold_no_flawless_images_are_told(tmp_path: Path, files: list[str], wrong: list[str]) -> None:
    assert not_flawless(find_images(make(tmp_path, files)), tmp_path) == wrong


def test_no_name_means_two_things() -> None:
    assert not GOOD & MASKS


@pytest.mark.parametrize("inside", ["masks/0.png", "0_mask.png", "bad/0.png"])
def test_nothing_is_learnt_from_a_folder_that_holds_masks_or_flaws(tmp_path: Path, inside: str) -> None:
    good = write_folder(tmp_path / "good", normal(3))
    wrong = write_folder(tmp_path / "wrong", normal(1))
    make(wrong, [inside])
    message = f"wrong: holds {inside.removesuffix('/0.png')}, so not all of its images are flawless; pass the folder"
    with pytest.raises(ValueError, match=message):
        detector().fit(wrong)
    model = detector().fit(good)
    for call in model.fit, model.partial_fit, model.calibrate:
        with pytest.raises(ValueError, match=message):
            call(wrong)
    assert len(model.predict(str(good)).scores) == 3


def test_a_doubtful_folder_is_refused_before_an_image_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "in", normal(2))
    make(folder, ["bad/0.png"])
    model = detector(white_level="auto")
    monkeypatch.setattr("patchcore_rs.detector.extraction.to_pixels", None)  # a call would be another error
    with pytest.raises(ValueError, match="in: holds bad, so not all of its images are flawless"):
        model.fit(folder)
    for call in model.fit, model.extract:
        with pytest.raises(ValueError, match="channels must be"):
            call(folder / "0.png", channels="gbr")  # type: ignore[arg-type]


# A folder to predict


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        (["hole/rgb/0.png", "hole/gt/0.png", "good/rgb/0.png", "good/GT/0.png"], "2 images, .*: good/GT, hole/gt;"),
        (["test/good/0.png", "test/hole/1.png", "Ground_Truth/hole/1_mask.png"], "1 image, .*: Ground_Truth;"),
        (["1.png", "2.png", "masks/a/1.png", "masks/b/2.png"], "2 images, masks by their names: masks; pass what"),
        (
            ["1.png", "2_gt.png", "1_mask.png", "day/2.png", "day/mask_2.png"],
            "2 images, .*: 1_mask.png, day/mask_2.png",
        ),
    ],
)
def test_masks_in_a_folder_are_not_scored_and_told(
    tmp_path: Path, files: list[str], left_out: str, caplog: pytest.LogCaptureFixture
) -> None:
    parts = find_images(make(tmp_path / "in", files))
    model = detector(resize=(32, 32)).fit(list(normal(3)))
    expected = [part for part in parts if not re.search(r"gt/|truth/|mask", str(part.relative_to(tmp_path)).lower())]
    for call in model.predict, model.extract:
        caplog.clear()
        assert list(call(tmp_path / "in").paths) == expected
        [record] = caplog.records
        assert record.levelname == "WARNING"
        assert re.search(rf"in: left out {left_out}", record.getMessage())
    caplog.clear()
    make(tmp_path / "in", ["GT3/0.png"])  # a product
    assert tmp_path / "in/GT3/0.png" in model.predict(tmp_path / "in").paths
    caplog.clear()
    assert len(model.predict(parts)) == len(parts)  # whoever lists them means them
    assert not caplog.records


def test_a_folder_of_masks_alone_is_refused_but_by_its_own_path(tmp_path: Path) -> None:
    make(tmp_path / "in", ["gt/0.png", "x/masks/0.png"])
    model = detector(resize=(32, 32)).fit(list(normal(3)))
    with pytest.raises(ValueError, match=r"in: no images in this folder but masks, by their names: gt, x/masks$"):
        model.predict(tmp_path / "in")
    assert len(model.predict(tmp_path / "in/gt")) == len(model.predict(str(tmp_path / "in/gt/0.png"))) == 1
