"""Data sets as their authors publish them, each as a tiny tree, and lists of images in CSV and JSON."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from image_folders import IMAGE, MASK, make, names, table
from PIL import Image

from patchcore_rs.images.datasets import describe, find_images, not_flawless
from patchcore_rs.images.files import write_image
from patchcore_rs.images.layouts import load_dataset
from patchcore_rs.images.masks import read_sample_mask

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("files", "train", "test"),
    [
        # MVTec LOCO: folders of masks by image, images for validation
        (["train/good/000.png", "validation/good/000.png", "test/good/000.png", "test/logical_anomalies/000.png",
          "test/structural_anomalies/000.png", "ground_truth/logical_anomalies/000/000.png",
          "ground_truth/logical_anomalies/000/001.png", "ground_truth/structural_anomalies/000/000.png"],
         ["train/good/000.png"], ["good", "logical_anomalies", "structural_anomalies"]),
        # MVTec AD 2: masks inside the public test set, private ones without labels
        (["train/good/000_regular.png", "validation/good/000_regular.png", "test_public/good/000_regular.png",
          "test_public/bad/000_overexposed.png", "test_public/ground_truth/bad/000_overexposed_mask.png",
          "test_private/000_regular.png", "test_private_mixed/000_mixed.png"],
         ["train/good/000_regular.png"], ["bad", "good"]),
        # VisA as its authors' script converts it
        (["train/good/0000.JPG", "test/good/0001.JPG", "test/bad/000.JPG", "ground_truth/bad/000.png"],
         ["train/good/0000.JPG"], ["bad", "good"]),
        # MVTec 3D: photographs beside depth
        (["train/good/rgb/000.png", "train/good/xyz/000.tiff", "validation/good/rgb/000.png", "test/good/rgb/000.png",
          "test/good/gt/000.png", "test/hole/rgb/000.png", "test/hole/xyz/000.tiff", "test/hole/gt/000.png"],
         ["train/good/rgb/000.png"], ["good", "hole"]),
    ],
)  # fmt: skip
def test_layouts_that_are_like_mvtec(tmp_path: Path, files: list[str], train: list[str], test: list[str]) -> None:
    for layout in ("auto", "mvtec"):
        dataset = load_dataset(make(tmp_path / "set", files), layout=layout)
        assert names(tmp_path / "set", dataset.train) == train
        assert [(sample.kind, sample.label, sample.mask is not None) for sample in dataset.test] == [
            (kind, int(kind != "good"), kind != "good") for kind in test
        ]


@pytest.mark.parametrize("layout", ["auto", "dagm"])
def test_dagm(tmp_path: Path, layout: str) -> None:
    files = [f"{part}/{i:04}.PNG" for part in ("Train", "Test") for i in (9, 10, 11)]
    root = make(
        tmp_path / "Class1",
        [*files, "Train/Label/0010_label.PNG", "Test/Label/0011_label.PNG", "Test/Label/Labels.txt"],
    )
    dataset = load_dataset(root, layout=layout)
    assert names(root, dataset.train) == ["Train/0009.PNG", "Train/0011.PNG"]
    assert table(root, dataset) == [
        ("Test/0009.PNG", 0, "good", None),
        ("Test/0010.PNG", 0, "good", None),
        ("Test/0011.PNG", 1, "defect", "Test/Label/0011_label.PNG"),
    ]
    assert load_dataset(tmp_path, category="Class1", layout=layout) == dataset
    assert not_flawless(find_images(root / "Train"), root / "Train") == ["Label/0010_label.PNG"]


@pytest.mark.parametrize("layout", ["auto", "ksdd2"])
def test_kolektor_sdd2(tmp_path: Path, layout: str) -> None:
    root = make(tmp_path, [f"{part}/1000{i}.png" for part in ("train", "test") for i in range(2)])
    for part in ("train", "test"):
        for i in range(2):
            write_image(root / f"{part}/1000{i}_GT.png", MASK * i)
    dataset = load_dataset(root, layout=layout)
    assert names(root, dataset.train) == ["train/10000.png"]
    assert table(root, dataset) == [
        ("test/10000.png", 0, "good", None),
        ("test/10001.png", 1, "defect", "test/10001_GT.png"),
    ]
    np.testing.assert_array_equal(read_sample_mask(dataset.test[1]), MASK > 0)
    (root / "test/10000_GT.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"images without a mask beside them \(1\): .*10000\.png"):
        load_dataset(root, layout=layout)


@pytest.mark.parametrize("layout", ["auto", "ksdd"])
def test_kolektor_sdd(tmp_path: Path, layout: str) -> None:
    """Every second item is trained on, but for its flawed images; the others are tested, as parts of several views."""
    for item in ("kos01", "kos02", "kos3", "kos10"):
        (tmp_path / item).mkdir()
        for i in range(2):
            write_image(tmp_path / item / f"Part{i}.png", IMAGE)
            mask = MASK // 255 * i if item != "kos02" else MASK * 0
            Image.fromarray(mask).save(tmp_path / item / f"Part{i}_label.bmp")
    dataset = load_dataset(tmp_path, layout=layout)
    assert names(tmp_path, dataset.train) == ["kos01/Part0.png", "kos3/Part0.png"]
    assert table(tmp_path, dataset) == [
        ("kos02/Part0.png", 0, "good", None),
        ("kos02/Part1.png", 0, "good", None),
        ("kos10/Part0.png", 0, "good", None),
        ("kos10/Part1.png", 1, "defect", "kos10/Part1_label.bmp"),
    ]
    assert [sample.part for sample in dataset.test] == ["kos02", "kos02", "kos10", "kos10"]
    np.testing.assert_array_equal(read_sample_mask(dataset.test[3]), MASK > 0)
    (tmp_path / "kos00").mkdir()  # holds nothing, so is no item
    assert load_dataset(tmp_path, layout=layout) == dataset
    (tmp_path / "kos10/Part0_label.bmp").unlink()
    with pytest.raises(FileNotFoundError, match=r"kos10: images without a mask beside them \(1\): .*Part0\.png"):
        load_dataset(tmp_path)


def test_a_data_set_without_an_image_to_train_on_is_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "set", ["Train/1.PNG", "Test/1.PNG", "Train/Label/1_label.PNG", "Test/Label/1_label.PNG"])
    with pytest.raises(
        ValueError, match="set: no good image to train on; found train: 0, good: 0, defect: 1, masks: 1 of 1"
    ):
        load_dataset(root)


def test_layouts_that_say_all_take_no_names(tmp_path: Path) -> None:
    root = make(tmp_path / "set", ["Train/1.png", "Test/1.png", "Train/Label/x.txt", "Test/Label/1_label.png"])
    for argument in ("good", "masks"):
        message = f"layout 'dagm' says what is good and where masks are: leave {argument}= out"
        with pytest.raises(ValueError, match=message):
            load_dataset(root, **{argument: "x"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layout 'ksdd2' has other folders; layout='auto' would read it as 'dagm'"):
        load_dataset(root, layout="ksdd2")


# Lists

ROWS = [
    {"path": "a/1.png", "label": "good", "split": "train"},
    {"path": "a/2.png", "label": "OK", "split": "test"},
    {"path": "b/3.png", "label": "hole", "split": "test", "mask": "ground_truth/3.png"},
    {"path": "b/4.png", "label": "good", "split": "val"},
]


def write_list(file: Path, rows: list[dict[str, str]], delimiter: str = ",") -> Path:
    make(file.parent, [row[key] for row in rows for key in ("path", "mask") if row.get(key)])
    if file.suffix == ".json":
        file.write_text(json.dumps(rows), "utf-8")
        return file
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [delimiter.join(columns), *(delimiter.join(row.get(key, "") for key in columns) for row in rows)]
    file.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    return file


@pytest.mark.parametrize(("name", "delimiter"), [("list.csv", ","), ("list.CSV", ";"), ("list.json", "")])
def test_a_list_says_what_every_image_is(tmp_path: Path, name: str, delimiter: str) -> None:
    dataset = load_dataset(write_list(tmp_path / name, ROWS, delimiter))
    assert dataset.name == "list"
    assert names(tmp_path, dataset.train) == ["a/1.png"]
    assert table(tmp_path, dataset) == [("a/2.png", 0, "good", None), ("b/3.png", 1, "hole", "ground_truth/3.png")]


@pytest.mark.parametrize("name", ["list.csv", "list.json"])
def test_a_list_says_which_images_are_of_one_part(tmp_path: Path, name: str) -> None:
    rows = [ROWS[0], ROWS[1] | {"part": "7"}, ROWS[2] | {"part": "7"}, ROWS[1] | {"path": "a/5.png", "part": ""}]
    dataset = load_dataset(write_list(tmp_path / name, rows))
    assert [sample.part for sample in dataset.test] == ["7", "7", None]


def test_labels_of_a_list_may_be_numbers_and_the_callers_words(tmp_path: Path) -> None:
    make(tmp_path, [f"{i}.png" for i in range(4)])
    labels = [0, 1, "Gut", False]
    rows = [
        {"path": f"{i}.png", "label": label, "split": "train" if i == 3 else "test"} for i, label in enumerate(labels)
    ]
    (tmp_path / "l.json").write_text(json.dumps(rows), "utf-8")
    dataset = load_dataset(tmp_path / "l.json", good="gut", ignore=7)
    assert describe(dataset) == "train: 1, good: 2, anomaly: 1, masks: 0 of 1"
    assert {sample.ignore for sample in dataset.test} == {7}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"split": ""}, ValueError, r"line 3: expected path, label, split and perhaps mask and part; split is missing"),
        ({"label": ""}, ValueError, r"line 3: .*label is missing"),
        ({"split": "train", "label": "dent"}, ValueError,
         r"line 3: images to train on must be good; got label 'dent'\. If it is, say good='dent'"),
        ({"split": "check"}, ValueError, r"line 3: split must be train or test .*; got 'check'"),
        ({"path": "a/1.png"}, ValueError, r"line 3: a/1\.png stands in .*line 2 too; list every image once"),
        ({"label": "dent"}, FileNotFoundError, r"1 of 2 anomalous images have no mask: .*2\.png"),
    ],
)  # fmt: skip
def test_a_list_that_says_something_else_is_refused_by_line(
    tmp_path: Path, change: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_dataset(write_list(tmp_path / "list.csv", [ROWS[0], ROWS[1] | change, *ROWS[2:]]))


def test_what_is_no_list_or_lists_what_is_not_there_is_refused(tmp_path: Path) -> None:
    file = write_list(tmp_path / "list.csv", ROWS)
    with pytest.raises(ValueError, match=r"list\.csv says what is good and where masks are: leave masks= out"):
        load_dataset(file, masks="gt")
    (tmp_path / "b/3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"images or masks that it lists are missing \(1\): .*3\.png"):
        load_dataset(file)
    with pytest.raises(ValueError, match="lists no image to train on"):
        load_dataset(write_list(tmp_path / "test.csv", ROWS[1:3]))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"list\.csv: not a CSV file in UTF-8"):
        load_dataset(file)
    for text, got in (('{"images": [], "labels": []}', "got dict"), ("[1]", "got list"), ("[", "not a JSON file")):
        (tmp_path / "coco.json").write_text(text, "utf-8")
        with pytest.raises(ValueError, match=re.escape(got)):
            load_dataset(tmp_path / "coco.json")


def test_a_visa_category_without_masks_is_scored_by_image(tmp_path: Path) -> None:
    make(tmp_path / "candle/Data/Images", ["Normal/0.png", "Anomaly/0.png"])
    (tmp_path / "split_csv").mkdir()
    rows = (
        "candle,train,normal,candle/Data/Images/Normal/0.png,\ncandle,test,anomaly,candle/Data/Images/Anomaly/0.png,\n"
    )
    (tmp_path / "split_csv/1cls.csv").write_text("object,split,label,image,mask\n" + rows, "utf-8")
    assert describe(load_dataset(tmp_path, category="candle")) == "train: 1, good: 0, anomaly: 1, masks: 0 of 1"
