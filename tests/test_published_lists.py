"""Lists as data sets come with: COCO's images, outlines and runs, and the parts and views of Real-IAD."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from detectors import flawed, normal, pyramid
from image_folders import make, names, table
from PIL import Image

from patchcore_rs import evaluate
from patchcore_rs.images.datasets import Polygon, Regions, Runs, Sample, describe
from patchcore_rs.images.files import ImageError, write_image
from patchcore_rs.images.layouts import load_dataset
from patchcore_rs.images.masks import read_sample_marks, read_sample_mask

if TYPE_CHECKING:
    from pathlib import Path

# COCO: images of 4 x 6 pixels (height x width)

SQUARE = [1, 1, 4, 1, 4, 3, 1, 3]
CATEGORIES = [{"id": 0, "name": "parts"}, {"id": 1, "name": "hole"}, {"id": 2, "name": "dent"}, {"id": 3, "name": "OK"}]


def annotation(image: int, category: int = 1, segmentation: object = (SQUARE,), **more: object) -> dict[str, object]:
    return {"id": 70 + image, "image_id": image, "category_id": category, "segmentation": segmentation} | more


def write_coco(file: Path, paths: list[str], annotations: list[dict[str, object]], **change: object) -> Path:
    """Images are numbered from 0 in the order of their paths."""
    images = [{"id": i, "file_name": path, "height": 4, "width": 6} for i, path in enumerate(paths)]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES} | change
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), "utf-8")
    return file


@pytest.mark.parametrize(
    ("file", "images"),
    [("coco.json", "."), ("coco.json", "images"), ("annotations/instances.json", "."), ("ann/a.json", "images")],
)
def test_coco_says_what_every_image_is(tmp_path: Path, file: str, images: str) -> None:
    paths = ["train/0.png", "train/1.png", "test/2.png", "3.png", "Valid/4.png", "a/5.png", "test/6.png"]
    make(tmp_path / images, paths)
    marks = [annotation(1), annotation(3), annotation(5, 2), annotation(5), annotation(5, 2), annotation(6, 3)]
    dataset = load_dataset(write_coco(tmp_path / file, paths, marks))
    assert describe(dataset) == "train: 1, good: 2, hole: 1, dent+hole: 1, masks: 2 of 2"
    root = tmp_path / images
    assert names(root, dataset.train) == ["train/0.png"]
    assert [path.relative_to(root).as_posix() for path in (sample.path for sample in dataset.test)] == [
        "test/2.png",
        "3.png",
        "a/5.png",
        "test/6.png",
    ]
    assert [sample.kind for sample in dataset.test] == ["good", "hole", "dent+hole", "good"]
    expected = np.zeros((4, 6), np.bool_)
    expected[1:3, 1:4] = True
    np.testing.assert_array_equal(read_sample_mask(dataset.test[1]), expected)


def test_a_split_written_to_the_images_of_coco_counts(tmp_path: Path) -> None:
    make(tmp_path, ["train/0.png", "train/1.png"])
    images = [
        {"id": i, "file_name": f"train/{i}.png", "height": 4, "width": 6, "split": split}
        for i, split in enumerate(["train", "test"])
    ]
    dataset = load_dataset(write_coco(tmp_path / "coco.json", [], [annotation(1, 3)], images=images), good="ok")
    assert describe(dataset) == "train: 1, good: 1, masks: 0 of 0"


@pytest.mark.parametrize("layout", ["auto", "coco"])
def test_coco_lists_in_train_and_test(tmp_path: Path, layout: str) -> None:
    for place in ("train", "valid", "test"):
        root = make(tmp_path / place, ["0.png", "1.png"])
        write_coco(root / "_annotations.coco.json", ["0.png", "1.png"], [annotation(1)])
    dataset = load_dataset(tmp_path, layout=layout)
    assert names(tmp_path, dataset.train) == ["train/0.png"]
    assert [(*names(tmp_path, [sample.path]), sample.kind) for sample in dataset.test] == [
        ("test/0.png", "good"),
        ("test/1.png", "hole"),
    ]
    with pytest.raises(ValueError, match="layout 'coco' says what is good and where masks are: leave masks= out"):
        load_dataset(tmp_path, masks="x")
    write_coco(tmp_path / "train/_annotations.coco.json", ["0.png", "1.png"], [annotation(0), annotation(1)])
    with pytest.raises(ValueError, match="every image in train has annotations, so none is good"):
        load_dataset(tmp_path)


def test_coco_lists_that_leave_images_out_or_are_several(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for place in ("train", "test"):
        root = make(tmp_path / place, ["0.png", "1.png"])
        write_coco(root / "instances.json", ["0.png"], [])
    (tmp_path / "train" / "readme.json").write_text("[]", "utf-8")
    assert describe(load_dataset(tmp_path)) == "train: 1, good: 1, masks: 0 of 0"
    assert [record.getMessage().rpartition("/")[2] for record in caplog.records] == [
        "instances.json: left out 1 image that it does not list"
    ] * 2
    write_coco(tmp_path / "test/coco.json", ["1.png"], [])
    with pytest.raises(ValueError, match=r"test: expected one list of COCO; found .*coco\.json, .*instances\.json"):
        load_dataset(tmp_path)
    for file in (tmp_path / "test").glob("*.json"):
        file.unlink()
    with pytest.raises(ValueError, match="test: expected one list of COCO; found none"):
        load_dataset(tmp_path)


def test_paths_of_windows_and_whole_paths_are_read(tmp_path: Path) -> None:
    root = make(tmp_path / "train", ["train/0.png", "test/1.png", "test/1_mask.png"])
    paths = [str(root / "train/0.png"), "test\\1.png"]
    assert describe(load_dataset(write_coco(root / "coco.json", paths, []))) == "train: 1, good: 1, masks: 0 of 0"
    rows = "path,label,split,mask\ntrain\\0.png,good,train,\ntest\\1.png,hole,test,test\\1_mask.png\n"
    (root / "list.csv").write_text(rows, "utf-8")
    assert table(root, load_dataset(root / "list.csv")) == [("test/1.png", 1, "hole", "test/1_mask.png")]


def sample(tmp_path: Path, *shapes: Polygon | Runs, size: tuple[int, int] = (4, 6), **more: Any) -> Sample:
    write_image(tmp_path / "part.png", np.full((*size, 3), 90, np.uint8))
    return Sample(tmp_path / "part.png", 1, "hole", Regions("coco.json, part.png", size, shapes, **more))


@pytest.mark.parametrize(
    ("points", "rows"),
    [
        ([(1, 1), (4, 1), (4, 3), (1, 3)], ["......", ".###..", ".###..", "......"]),
        ([(1, 3), (4, 3), (4, 1), (1, 1), (1, 3)], ["......", ".###..", ".###..", "......"]),  # closed, the other way
        ([(0, 0), (4, 0), (0, 4)], ["###...", "##....", "#.....", "......"]),
        ([(-2, -2), (2, -2), (2, 2), (-2, 2)], ["##....", "##....", "......", "......"]),
        ([(4, 2), (9, 2), (9, 9), (4, 9)], ["......", "......", "....##", "....##"]),
        ([(7, 7), (9, 7), (9, 9)], ["......"] * 4),
        ([(0.6, 0.6), (2.4, 0.6), (2.4, 2.4), (0.6, 2.4)], ["......", ".#....", "......", "......"]),
        ([(0, 0), (6, 0), (6, 4), (4, 4), (4, 1), (2, 1), (2, 4), (0, 4)], ["######", "##..##", "##..##", "##..##"]),
    ],
)
def test_a_polygon_holds_the_pixels_whose_centres_it_encloses(
    tmp_path: Path, points: list[tuple[float, float]], rows: list[str]
) -> None:
    mask = read_sample_mask(sample(tmp_path, Polygon(tuple(points))))
    assert ["".join(".#"[int(value)] for value in row) for row in mask] == rows


RUNS = [6, 1, 40, 4, 5, 4, 5, 4, 21]  # the same as "61X13mN000`0"


@pytest.mark.parametrize("counts", [RUNS, "61X13mN000`0"])
def test_runs_of_coco_go_down_the_columns(tmp_path: Path, counts: object) -> None:
    paths = ["train/0.png", "1.png"]
    make(tmp_path, paths)
    write_image(tmp_path / "1.png", np.zeros((9, 10, 3), np.uint8))
    images = [{"id": i, "file_name": path, "height": 9, "width": 10} for i, path in enumerate(paths)]
    runs = annotation(1, segmentation={"size": [9, 10], "counts": counts})
    [one] = load_dataset(write_coco(tmp_path / "coco.json", [], [runs], images=images)).test
    expected = np.zeros((9, 10), np.bool_)
    expected[6, 0] = True
    expected[2:6, 5:8] = True
    np.testing.assert_array_equal(read_sample_mask(one), expected)


def test_crowds_count_in_no_pixel_metric(tmp_path: Path) -> None:
    paths = ["train/0.png", "1.png", "2.png"]
    make(tmp_path, paths)
    crowd = annotation(1, segmentation={"size": [4, 6], "counts": [0, 8, 16]}, iscrowd=1)
    file = write_coco(tmp_path / "coco.json", paths, [annotation(1), crowd, crowd | {"image_id": 2}])
    both, alone = load_dataset(file).test
    marks = read_sample_marks(both)
    assert ["".join(".#"[int(value)] for value in row) for row in marks.anomalous] == [
        "......",
        ".###..",
        ".###..",
        "......",
    ]
    assert ["".join(".#"[int(value)] for value in row) for row in marks.ignored] == [
        "##....",
        "#.....",
        "#.....",
        "##....",
    ]
    assert alone.label == 1
    assert read_sample_marks(alone).ignored.all()


def test_outlines_are_turned_with_their_image_or_refused_naming_it(tmp_path: Path) -> None:
    one = sample(tmp_path, Polygon(((0, 0), (2, 0), (2, 1), (0, 1))))
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn to the right shows it upright
    Image.fromarray(np.full((4, 6, 3), 90, np.uint8)).save(one.path, exif=exif)
    mask = read_sample_mask(one)
    assert mask.shape == (6, 4)
    assert np.argwhere(mask).tolist() == [[0, 3], [1, 3]]
    write_image(one.path, np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(ImageError, match=r"coco\.json, part\.png: the mask is 4 x 6 \(height x width\)"):
        read_sample_mask(one)


BOX = (
    "annotation 71: no segmentation, and a box marks flawless pixels too; draw outlines, or list path, label and split"
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": []}, BOX),
        ({"segmentation": None, "bbox": [1, 1, 3, 2]}, BOX),
        ({"segmentation": SQUARE}, r"annotation 71: a polygon must be x, y, x, y, .*; got 1"),
        ({"segmentation": [[1, 1, 4, 1]]}, r"a polygon must be .* three points or more; got \[1, 1, 4, 1\]"),
        ({"segmentation": [[*SQUARE, 1]]}, "a polygon must be"),
        ({"segmentation": [[1, 1, 4, 1, 4, "3"]]}, "a polygon must be"),
        ({"segmentation": {"size": [4, 6], "counts": [3, 2]}}, r"its runs must fill 4 x 6 pixels \(height x width\)"),
        ({"segmentation": {"size": [6, 4], "counts": [3, 21]}}, "its runs must fill 4 x 6"),
        ({"segmentation": {"size": [4, 6], "counts": [30, -6]}}, "its runs must fill"),
        ({"segmentation": {"size": [4, 6], "counts": "6X"}}, "its runs must fill"),
        ({"segmentation": {"size": [4, 6], "counts": "6 "}}, "its runs must fill"),
        ({"image_id": 9}, "annotation 71: image_id 9 is not listed"),
        ({"category_id": 9}, "annotation 71: category_id 9 is not listed"),
        ({"image_id": [1]}, "expected COCO's images"),
    ],
)
def test_annotations_that_say_no_pixels_are_refused_by_number(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    paths = ["train/0.png", "1.png"]
    with pytest.raises(ValueError, match=message):
        load_dataset(write_coco(make(tmp_path, paths) / "coco.json", paths, [annotation(1) | change]))


def test_what_is_coco_by_half_is_refused(tmp_path: Path) -> None:
    make(tmp_path, ["0.png", "train/1.png"])
    file = tmp_path / "coco.json"
    with pytest.raises(ValueError, match="says of no good image that it is to train on, for which COCO has no word"):
        load_dataset(write_coco(file, ["0.png"], []))
    with pytest.raises(FileNotFoundError, match=r"images or masks that it lists are missing \(1\): .*2\.png"):
        load_dataset(write_coco(file, ["0.png", "2.png"], []))
    with pytest.raises(ValueError, match=r"split must be train or test \(or val, which is left out\); got 'holdout'"):
        load_dataset(
            write_coco(
                file,
                [],
                [],
                images=[{"id": 0, "file_name": "train/1.png", "height": 4, "width": 6, "split": "holdout"}],
            )
        )
    with pytest.raises(ValueError, match="an image stands in it twice"):
        load_dataset(write_coco(file, ["0.png", "0.png"], []))
    for entry in ({"id": 0, "file_name": "0.png"}, 3, {"id": 0, "file_name": 1, "height": 4, "width": 6}):
        with pytest.raises(ValueError, match=r"coco\.json: expected COCO's images \(id, file_name, width, height\)"):
            load_dataset(write_coco(file, [], [], images=[entry]))
    with pytest.raises(ValueError, match="says what is good and where masks are: leave masks= out"):
        load_dataset(file, masks="gt")


def test_an_evaluation_by_coco_is_that_by_masks(tmp_path: Path) -> None:
    images = {"train": normal(6, 1), "test": np.concatenate([normal(2, 2), flawed(2)])}
    paths = []
    for name, several in images.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(several):
            write_image(tmp_path / name / f"{i}.png", image)
            paths.append(f"{name}/{i}.png")
    entries = [{"id": i, "file_name": path, "height": 32, "width": 32} for i, path in enumerate(paths)]
    hole = [[4, 8, 16, 8, 16, 20, 4, 20]]
    file = write_coco(tmp_path / "coco.json", [], [annotation(i, 1, hole) for i in (8, 9)], images=entries)
    for i in (2, 3):
        mask = np.zeros((32, 32), np.uint8)
        mask[8:20, 4:16] = 255
        write_image(tmp_path / f"{i}_mask.png", mask)
    rows = [f"{path},{int(i in (8, 9))},{path.split('/')[0]},{f'{i - 6}_mask.png' if i > 7 else ''}"
            for i, path in enumerate(paths)]  # fmt: skip
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split,mask", *rows]), "utf-8")
    found = []
    for listed in (file, tmp_path / "list.csv"):
        [run] = evaluate(load_dataset(listed), backbone=pyramid, resize=None, crop=None)
        found.append((run.metrics.image_auroc, run.metrics.pixel_auroc, run.metrics.pro))
    assert found[0] == found[1]
    assert found[0][1] is not None


# Real-IAD

OK, NG = "OK/S0001", "NG/AK/S0001"
VIEWS = {
    "train": [("OK/S0002/toy_0002_OK_C1_1.jpg", "OK", None)],
    "test": [
        (f"{OK}/toy_0001_OK_C1_1.jpg", "OK", None),
        (f"{NG}/toy_0001_NG_AK_C1_1.jpg", "AK", f"{NG}/toy_0001_NG_AK_C1_1.png"),
        (f"{NG}/toy_0001_NG_AK_C2_1.jpg", "OK", None),
    ],
}


def write_realiad(
    root: Path, resolution: str = "realiad_256", jsons: str = "realiad_jsons/realiad_jsons", **change: object
) -> Path:
    rows = {
        split: [
            {"category": "toy", "anomaly_class": kind, "image_path": image, "mask_path": mask}
            for image, kind, mask in views
        ]
        for split, views in VIEWS.items()
    }
    paths = [path for views in VIEWS.values() for image, _, mask in views for path in (image, mask) if path]
    make(root / resolution / "toy", paths)
    file = root / jsons / "toy.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"meta": {"prefix": "toy/", "normal_class": "OK", "pre_transform": None}} | rows | change
    file.write_text(json.dumps(content), "utf-8")
    return file


@pytest.mark.parametrize("jsons", ["realiad_jsons/realiad_jsons", "realiad_jsons"])
def test_real_iad_by_its_folder_and_by_its_list(tmp_path: Path, jsons: str) -> None:
    file = write_realiad(tmp_path, jsons=jsons)
    dataset = load_dataset(file)
    root = tmp_path / "realiad_256" / "toy"
    assert dataset.name == "toy"
    assert names(root, dataset.train) == ["OK/S0002/toy_0002_OK_C1_1.jpg"]
    assert table(root, dataset) == [
        (f"{OK}/toy_0001_OK_C1_1.jpg", 0, "good", None),
        (f"{NG}/toy_0001_NG_AK_C1_1.jpg", 1, "AK", f"{NG}/toy_0001_NG_AK_C1_1.png"),
        (f"{NG}/toy_0001_NG_AK_C2_1.jpg", 0, "good", None),
    ]
    assert [one.part for one in dataset.test] == [OK, NG, NG]
    assert load_dataset(root) == load_dataset(root.parent, category="toy", layout="realiad") == dataset


def test_real_iad_in_two_sizes_and_other_splits(tmp_path: Path) -> None:
    write_realiad(tmp_path)
    single = write_realiad(tmp_path, "realiad_1024", jsons="realiad_jsons/realiad_jsons_sv", test=[])
    with pytest.raises(
        ValueError,
        match=r"toy\.json: its images must lie in one folder .*found .*256/toy, .*Load one by its own path, or",
    ):
        load_dataset(single)
    large = load_dataset(tmp_path / "realiad_1024", category="toy")
    assert large.train[0].is_relative_to(tmp_path / "realiad_1024")
    assert len(large.test) == 3
    noisy = [{"category": "toy", "anomaly_class": "AK", "image_path": "x.jpg", "mask_path": None}]
    for change, message in (
        ({"train": noisy}, r"images to train on must be of the class OK; 1 are not: x\.jpg"),
        (
            {"train": [{}]},
            r"expected Real-IAD's meta \(prefix, normal_class\), train and test .*KeyError: 'image_path'",
        ),
        ({"meta": {"prefix": "pcb/", "normal_class": "OK"}}, r"such as realiad_1024/pcb/; found none$"),
    ):
        with pytest.raises(ValueError, match=message):
            load_dataset(write_realiad(tmp_path / "one", **change))


def test_flawed_views_of_real_iad_need_a_mask_where_others_have_one(tmp_path: Path) -> None:
    content = json.loads((file := write_realiad(tmp_path)).read_text("utf-8"))
    content["test"][2]["anomaly_class"] = "AK"
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 anomalous images have no mask: .*_C2_1\.jpg"):
        load_dataset(file)
