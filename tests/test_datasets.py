"""Folders in each layout become the same dataclass; folders that fit none are refused with what was found."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from image_folders import IMAGE, MASK, make, names, table

from patchcore_rs.images.datasets import Sample, find_images
from patchcore_rs.images.files import ImageError, read_image, write_image
from patchcore_rs.images.layouts import load_dataset
from patchcore_rs.images.masks import read_sample_mask

MVTEC = [
    "train/good/000.png",
    "train/good/001.png",
    "test/good/000.png",
    "test/crack/000.png",
    "test/crack/001.png",
    "ground_truth/crack/000_mask.png",
    "ground_truth/crack/001_mask.png",
]
BTAD = ["train/ok/0.png", "test/ok/1.png", "test/ko/2.png", "ground_truth/ko/2.png"]
VISA = ["Data/Images/Normal/0.png", "Data/Images/Normal/1.png", "Data/Images/Anomaly/0.png", "Data/Masks/Anomaly/0.png"]
VISA_SPLIT = """object,split,label,image,mask
candle,train,normal,candle/Data/Images/Normal/0.png,
candle,test,normal,candle/Data/Images/Normal/1.png,
candle,test,anomaly,candle/Data/Images/Anomaly/0.png,candle/Data/Masks/Anomaly/0.png
"""


def make_visa(root: Path, split: str = VISA_SPLIT) -> Path:
    make(root / "candle", VISA)
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_bytes(split.replace("\n", "\r\n").encode())
    return root


# find_images


def test_images_are_found_in_natural_order_at_any_depth(tmp_path: Path) -> None:
    wanted = ["1.png", "2.PNG", "10.jpeg", "a/b/3.webp", "a2.bmp", "a10.tif", "b.tiff"]
    make(tmp_path, [*reversed(wanted), "notes.txt", ".hidden.png", ".cache/x.png", "a/._3.webp", "Thumbs.db"])
    assert names(tmp_path, find_images(tmp_path)) == ["1.png", "2.PNG", "10.jpeg", *wanted[3:]]
    assert find_images(str(tmp_path / "a2.bmp")) == [tmp_path / "a2.bmp"]


def test_equal_numbers_are_ordered_by_their_spelling(tmp_path: Path) -> None:
    make(tmp_path, ["1.png", "01.png", "x1/0.png", "x01/0.png"])
    assert names(tmp_path, find_images(tmp_path)) == ["01.png", "1.png", "x01/0.png", "x1/0.png"]


def test_a_hidden_parent_does_not_hide_its_images(tmp_path: Path) -> None:
    make(tmp_path, [".cache/set/1.png"])
    assert names(tmp_path, find_images(tmp_path / ".cache" / "set")) == [".cache/set/1.png"]


@pytest.mark.skipif(os.name == "nt", reason="making links needs a privilege on Windows")
def test_links_are_followed_and_a_link_to_a_parent_ends_the_walk(tmp_path: Path) -> None:
    make(tmp_path, ["set/1.png", "elsewhere/2.png"])
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "3.png").symlink_to(tmp_path / "gone.png")
    # The dangling link is listed: reading it names the file, where leaving it out would lose an image in silence.
    assert names(tmp_path, find_images(tmp_path / "set")) == ["set/1.png", "set/3.png", "set/linked/2.png"]


@pytest.mark.parametrize(
    ("files", "path", "error", "message"),
    [
        ([], "gone", FileNotFoundError, "No such file or directory: .*gone"),
        (
            ["a.txt"],
            "a.txt",
            ValueError,
            r"a\.txt: expected a folder or an image file \(\.bmp, .*\); got suffix '\.txt'",
        ),
        ([], "", ValueError, r"no images in this folder or its subfolders; looked for .* found no files"),
        ([".a.png"], "", ValueError, r"found no files \(hidden files are ignored\)"),
        (
            ["a.csv", "b/c.csv", "b/README"],
            "",
            ValueError,
            r"looked for \.bmp, \.gif, .*found 2 \.csv, 1 without suffix",
        ),
    ],
)
def test_find_images_refuses_with_what_it_found(
    tmp_path: Path, files: list[str], path: str, error: type[Exception], message: str
) -> None:
    make(tmp_path, files)
    with pytest.raises(error, match=message) as caught:
        find_images(tmp_path / path)
    assert str(tmp_path / path) in str(caught.value)


# load_dataset: layouts


@pytest.mark.parametrize("layout", ["auto", "mvtec", "folder"])
def test_mvtec(tmp_path: Path, layout: str) -> None:
    dataset = load_dataset(make(tmp_path / "bottle", MVTEC), layout=layout)
    root = tmp_path / "bottle"
    assert dataset.name == "bottle"
    assert names(root, dataset.train) == ["train/good/000.png", "train/good/001.png"]
    assert table(root, dataset) == [
        ("test/crack/000.png", 1, "crack", "ground_truth/crack/000_mask.png"),
        ("test/crack/001.png", 1, "crack", "ground_truth/crack/001_mask.png"),
        ("test/good/000.png", 0, "good", None),
    ]


def test_masks_are_found_with_another_suffix_without_mask_in_the_name_and_in_subfolders(tmp_path: Path) -> None:
    files = ["train/good/0.jpg", "test/cut/1.jpg", "test/cut/2.tif", "test/cut/day1/1.bmp"]
    masks = ["ground_truth/cut/1_mask.tiff", "ground_truth/cut/2.bmp", "ground_truth/cut/day1/1_mask.PNG"]
    dataset = load_dataset(make(tmp_path, files + masks))
    assert table(tmp_path, dataset) == [(image, 1, "cut", mask) for image, mask in zip(files[1:], masks, strict=True)]


@pytest.mark.parametrize("layout", ["auto", "btad"])
@pytest.mark.parametrize("mask", ["bmp", "png"])
def test_btad(tmp_path: Path, layout: str, mask: str) -> None:
    root = make(tmp_path / "01", ["train/ok/0.bmp", "test/ok/1.bmp", "test/ko/2.bmp", f"ground_truth/ko/2.{mask}"])
    dataset = load_dataset(root, layout=layout)
    assert dataset.name == "01"
    assert names(root, dataset.train) == ["train/ok/0.bmp"]
    assert table(root, dataset) == [
        ("test/ko/2.bmp", 1, "ko", f"ground_truth/ko/2.{mask}"),
        ("test/ok/1.bmp", 0, "good", None),
    ]


@pytest.mark.parametrize("layout", ["auto", "visa"])
@pytest.mark.parametrize("inside", [True, False])
def test_visa(tmp_path: Path, layout: str, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_visa(tmp_path / "VisA")
    if inside:
        monkeypatch.chdir(root / "candle")
        dataset, base = load_dataset(".", layout=layout), Path()
    else:
        dataset, base = load_dataset(root, layout=layout, category="candle"), root / "candle"
    assert dataset.name == "candle"
    assert names(base, dataset.train) == ["Data/Images/Normal/0.png"]
    assert table(base, dataset) == [
        ("Data/Images/Anomaly/0.png", 1, "anomaly", "Data/Masks/Anomaly/0.png"),
        ("Data/Images/Normal/1.png", 0, "good", None),
    ]
    assert {sample.mask_threshold for sample in dataset.test if sample.label} == {0}


@pytest.mark.parametrize(
    ("files", "train", "test"),
    [
        (["train/1.png", "train/a/2.png"], ["train/1.png", "train/a/2.png"], []),
        (
            ["train/1.png", "test/good/2.png", "test/dent/3.png", "test/.cache/4.png"],
            ["train/1.png"],
            [("dent", 1), ("good", 0)],
        ),
        (["good/1.png", "test/normal/2.png", "test/dent/3.png"], ["good/1.png"], [("dent", 1), ("good", 0)]),
        (["good/1.png", "dent/2.png", "scratch/3.png"], ["good/1.png"], [("dent", 1), ("scratch", 1)]),
        (["normal/1.png", "broken/2.png"], ["normal/1.png"], [("broken", 1)]),
        (["train/good/1.png", "train/bad/2.png"], ["train/good/1.png"], []),
        (["good/1.png"], ["good/1.png"], []),
    ],
)
@pytest.mark.parametrize("layout", ["auto", "folder"])
def test_plain_folders(
    tmp_path: Path, layout: str, files: list[str], train: list[str], test: list[tuple[str, int]]
) -> None:
    dataset = load_dataset(make(tmp_path, files), layout=layout)
    assert names(tmp_path, dataset.train) == train
    assert [(sample.kind, sample.label) for sample in dataset.test] == test
    assert all(sample.mask is None for sample in dataset.test)


def test_ground_truth_beside_a_good_folder_is_no_defect(tmp_path: Path) -> None:
    dataset = load_dataset(make(tmp_path, ["good/1.png", "dent/2.png", "ground_truth/dent/2_mask.png"]))
    assert table(tmp_path, dataset) == [("dent/2.png", 1, "dent", "ground_truth/dent/2_mask.png")]


def test_without_ground_truth_no_sample_has_a_mask(tmp_path: Path) -> None:
    dataset = load_dataset(make(tmp_path, [name for name in MVTEC if "ground_truth" not in name]))
    assert [sample.mask for sample in dataset.test] == [None] * 3


# load_dataset: categories


def test_a_root_of_several_data_sets_asks_for_a_category(tmp_path: Path) -> None:
    for category in ("cable", "bottle"):
        make(tmp_path / category, MVTEC)
    make(tmp_path, ["license.txt"])
    for layout in ("auto", "mvtec"):
        message = r"holds the data sets bottle, cable; choose one, such as category='bottle'"
        with pytest.raises(ValueError, match=message):
            load_dataset(tmp_path, layout=layout)
    assert load_dataset(tmp_path, category="cable").name == "cable"
    with pytest.raises(ValueError, match=r"no category 'bootle'; found bottle, cable$"):
        load_dataset(tmp_path, category="bootle")
    with pytest.raises(ValueError, match=re.escape("no category '../x'; found bottle, cable")):
        load_dataset(tmp_path, category="../x")
    message = "no category 'bottle'; found none; this folder is a data set itself, leave category out"
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path / "bottle", category="bottle")


def test_a_visa_root_asks_for_a_category(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds the data sets candle; choose one, such as category='candle'"):
        load_dataset(make_visa(tmp_path))


# load_dataset: refusals


@pytest.mark.parametrize(
    ("files", "layout", "error", "message"),
    [
        (
            MVTEC,
            "mvtech",
            ValueError,
            "layout must be one of auto, mvtec, visa, .*, folder; got 'mvtech'",
        ),
        (
            ["a.png", "b/c.png"],
            "auto",
            ValueError,
            r"no data set here; expected train/good and test .*found a\.png, b$",
        ),
        ([".hidden.png"], "auto", ValueError, "no data set here; .*found nothing"),
        (
            BTAD,
            "mvtec",
            ValueError,
            "expects the folders train/good and test; missing train/good; .* read it as 'btad'",
        ),
        (["good/1.png"], "btad", ValueError, "missing train/ok and test; layout='auto' would read it as 'folder'"),
        (VISA, "folder", ValueError, "layout 'folder' expects images to train on in train or good; found Data"),
        (VISA, "auto", FileNotFoundError, r"1cls\.csv is missing: layout 'visa' takes the training images from it"),
        (
            [*MVTEC, "test/loose.png"],
            "auto",
            ValueError,
            r"images outside a subfolder have no label \(1\): loose\.png; move them into test/good",
        ),
        (
            [*MVTEC, "test/empty/notes.txt"],
            "auto",
            ValueError,
            r"no images in this folder or its subfolders; .*found 1 \.txt",
        ),
        (
            [name for name in MVTEC if not name.endswith("001_mask.png")],
            "auto",
            FileNotFoundError,
            r"ground_truth: 1 of 2 anomalous images have no mask: .*001\.png; .*or remove ground_truth",
        ),
        (
            [*MVTEC, *(f"test/cut/{number}.png" for number in range(8))],
            "auto",
            FileNotFoundError,
            r"8 of 10 anomalous images have no mask: .*0\.png, .*4\.png and 3 more; a mask has the image's name",
        ),
        (
            [*MVTEC, "ground_truth/crack/000_mask.bmp"],
            "auto",
            ValueError,
            r"two masks for one image, 000_mask\.\w+ and 000_mask\.\w+; keep one of them",
        ),
    ],
)
def test_load_dataset_refuses_with_what_it_found(
    tmp_path: Path, files: list[str], layout: str, error: type[Exception], message: str
) -> None:
    make(tmp_path, files)
    with pytest.raises(error, match=message):
        load_dataset(tmp_path, layout=layout)


def test_a_root_that_is_missing_or_a_file_keeps_its_python_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*gone"):
        load_dataset(tmp_path / "gone")
    make(tmp_path, ["a.png"])
    with pytest.raises(NotADirectoryError, match=r"Not a directory: .*a\.png"):
        load_dataset(tmp_path / "a.png")


HEADER = "object,split,label,image,mask\n"


@pytest.mark.parametrize(
    ("split", "error", "message"),
    [
        (
            "object,split,image\n",
            ValueError,
            "expected the columns object, split, label, image, mask; got object, split,",
        ),
        ("", ValueError, "expected the columns .* got none"),
        (HEADER, ValueError, "no row for 'candle' in column object"),
        (HEADER + "candle,train,anomaly,candle/a.png,\n", ValueError, "line 2: .*1-class split.*got train,anomaly"),
        (HEADER + "candle,train\n", ValueError, "line 2: .*1-class split.*got train,$"),
        (
            HEADER + "candle,train,normal,/etc/a.png,\n",
            ValueError,
            "line 2: expected a path that starts with candle/; got",
        ),
        (
            HEADER + "candle,train,normal,candle/../a.png,\n",
            ValueError,
            "line 2: expected a path that starts with candle/",
        ),
        (
            HEADER + "candle,train,normal,candle/a.png,\n",
            FileNotFoundError,
            r"images it lists are missing \(1\): .*a\.png",
        ),
        (
            VISA_SPLIT + "candle,test,anomaly,candle/Data/Images/Normal/0.png,\n",
            FileNotFoundError,
            r"Masks: 1 of 2 anomalous images have no mask: .*0\.png",
        ),
    ],
)
def test_a_visa_split_file_is_checked(tmp_path: Path, split: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_dataset(make_visa(tmp_path, split), category="candle")


def test_a_visa_split_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    root = make_visa(tmp_path)
    (root / "split_csv" / "1cls.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match=r"1cls\.csv: not a CSV file .*copy it from the VisA archive"):
        load_dataset(root, category="candle")


# read_sample_mask


def test_masks_of_samples_have_the_size_of_their_image(tmp_path: Path) -> None:
    dataset = load_dataset(make(tmp_path, MVTEC))
    masks = {sample.path.parent.name: read_sample_mask(sample) for sample in dataset.test}
    np.testing.assert_array_equal(masks["crack"], MASK > 0)
    np.testing.assert_array_equal(masks["good"], np.zeros((4, 6), np.bool_))


def test_the_defect_numbers_of_a_visa_mask_are_anomalous(tmp_path: Path) -> None:
    root = make_visa(tmp_path)
    write_image(root / "candle/Data/Masks/Anomaly/0.png", MASK // 255 * 3)
    anomalous = load_dataset(root, category="candle").test[0]
    np.testing.assert_array_equal(read_sample_mask(anomalous), MASK > 0)


def test_a_mask_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    write_image(image, IMAGE)
    write_image(mask, MASK[:, :5])
    with pytest.raises(
        ImageError, match=r"mask\.png: the mask is 4 x 5 .*image\.png is 4 x 6; save the mask in the size"
    ):
        read_sample_mask(Sample(image, 1, "dent", mask))
    with pytest.raises(ValueError, match=r"image\.png: no ground truth; pixel metrics need a mask"):
        read_sample_mask(Sample(image, 1, "dent"))


# A real data set


def test_the_magnetic_tile_data_set_loads() -> None:
    default = Path(__file__).parents[2] / "shared" / "data" / "magnetic-tile"
    root = Path(os.environ.get("PATCHCORE_RS_MAGNETIC_TILE", default))
    if not root.is_dir():
        pytest.skip("needs the magnetic tile data set; set PATCHCORE_RS_MAGNETIC_TILE to its folder")
    dataset = load_dataset(root)
    assert len(dataset.train) == 762
    kinds = Counter(sample.kind for sample in dataset.test)
    assert kinds["good"] == 190
    assert sum(kinds.values()) - kinds["good"] == 392
    assert set(kinds) == {"good", "blowhole", "break", "crack", "fray", "uneven"}
    for sample in [next(sample for sample in dataset.test if sample.kind == kind) for kind in kinds]:
        mask = read_sample_mask(sample)
        assert mask.shape == read_image(sample.path).shape[:2]
        assert mask.any() == bool(sample.label)
