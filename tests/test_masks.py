"""Masks: what is anomalous in a file, how it lies on its image, and masks that cannot be meant as they are."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from patchcore_rs.images.datasets import Sample
from patchcore_rs.images.files import ImageError
from patchcore_rs.images.layouts import load_dataset
from patchcore_rs.images.masks import judge_masks, measure_mask, read_mask, read_sample_marks, read_sample_mask

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 127, 128, 255]], np.uint8), [False, False, True, True]),
        (np.array([[0, 127 * 257, 127 * 257 + 1, 65535]], np.uint16), [False, False, True, True]),
        (np.array([[False, True, False, True]]), [False, True, False, True]),
        # The red channel alone, and a mark that is fully transparent.
        (np.array([[[0, 0, 0], [255, 0, 0], [0, 127, 0], [0, 0, 128]]], np.uint8), [False, True, False, True]),
        (np.array([[[255, 255], [255, 0], [0, 0], [0, 255]]], np.uint8), [True, False, False, False]),
        (np.zeros((1, 4), np.uint8), [False, False, False, False]),
    ],
)
def test_a_mask_is_true_above_the_threshold(tmp_path: Path, values: np.ndarray, expected: list[bool]) -> None:
    mask = read_mask(save(tmp_path / "mask.png", values))
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, [expected])


def test_a_mask_of_class_numbers_is_refused_unless_the_threshold_says_so(tmp_path: Path) -> None:
    path = save(tmp_path / "mask.png", np.array([[0, 1, 3]], np.uint8))
    with pytest.raises(ImageError, match=r"mask\.png: the largest value of this mask is 3 of 255.*> 127.*as 0 and 255"):
        read_mask(path)
    np.testing.assert_array_equal(read_mask(path, threshold=0), [[False, True, True]])
    for threshold, error in ((-1, ValueError), (255, ValueError), (0.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"threshold must be an integer from 0 to 254; got {threshold}"):
            read_mask(path, threshold=threshold)  # type: ignore[arg-type]


def test_class_numbers_and_a_third_value_beside_white_are_refused_by_file(tmp_path: Path) -> None:
    cases = [([0, 1, 255], 1), ([1, 2, 255], 1), ([0, 2, 15, 255], 2), ([0, 64, 255], 64), ([0, 100, 128], 100)]
    for values, low in cases:
        path = save(tmp_path / "mask.png", np.array([values], np.uint8))
        said = rf"mask\.png: this mask holds {low} beside {values[-1]}, .*: ignore={values[-1]} or ignore={low}$"
        with pytest.raises(ImageError, match=said):
            read_mask(path)
        np.testing.assert_array_equal(read_mask(path, threshold=0), [[value > 0 for value in values]])
    deep = save(tmp_path / "deep.png", np.array([[0, 1, 65535]], np.uint16))
    with pytest.raises(ImageError, match="holds 1 beside 65535"):
        read_mask(deep)
    for values in ([0, 128, 255], [0, 64, 128, 191, 255], [0, 1, 90, 255], [0, 16, 20, 255]):
        kinds = save(tmp_path / "kinds.png", np.array([values], np.uint8))
        np.testing.assert_array_equal(read_mask(kinds), [[value > 127 for value in values]])
    # A JPEG has values near those that were saved.
    checked = np.zeros((8, 8), np.uint8)
    checked[2, 2] = 3
    lossy = save(tmp_path / "mask.jpg", np.hstack([checked, np.full((8, 8), 255, np.uint8)]), quality=100)
    assert set(np.unique(np.asarray(Image.open(lossy)))) <= {*range(8), 255}
    assert read_mask(lossy).mean() == 0.5


# Turned images


TURNS: list[tuple[int, Callable[[np.ndarray], np.ndarray]]] = [
    (2, lambda stored: stored[:, ::-1]),
    (3, lambda stored: stored[::-1, ::-1]),
    (4, lambda stored: stored[::-1]),
    (5, lambda stored: stored.T),
    (6, lambda stored: stored.T[:, ::-1]),
    (7, lambda stored: stored[::-1, ::-1].T),
    (8, lambda stored: stored.T[::-1]),
]


def turned_sample(
    folder: Path, shape: tuple[int, int], orientation: int, mask: np.ndarray, **options: object
) -> Sample:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = save(folder / "image.jpg", np.full((*shape, 3), 90, np.uint8), exif=exif)
    return Sample(image, 1, "hole", save(folder / "mask.png", mask, **options))


def drawn(shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[0, :2] = 255
    return mask


@pytest.mark.parametrize(("orientation", "turn"), TURNS)
def test_a_mask_drawn_before_the_turn_of_its_image_is_turned_with_it(
    tmp_path: Path, orientation: int, turn: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Where the size tells; else it is refused, naming EXIF."""
    sample = turned_sample(tmp_path, (16, 24), orientation, drawn((16, 24)))
    if orientation > 4:
        np.testing.assert_array_equal(read_sample_mask(sample), turn(drawn((16, 24))) > 0)
        after = turned_sample(tmp_path, (16, 24), orientation, drawn((24, 16)))
        np.testing.assert_array_equal(read_sample_mask(after), drawn((24, 16)) > 0)
    else:
        with pytest.raises(
            ImageError, match=rf"mask\.png: its image .*image\.jpg has an EXIF orientation, {orientation},"
        ):
            read_sample_mask(sample)
    square = turned_sample(tmp_path, (16, 16), orientation, drawn((16, 16)))
    with pytest.raises(ImageError, match=r"before that turn or after; save the image turned, without EXIF orientation"):
        read_sample_mask(square)


def test_a_mask_that_states_its_own_orientation_is_laid_as_it_says(tmp_path: Path) -> None:
    for own, expected in ((6, drawn((16, 16)).T[:, ::-1]), (1, drawn((16, 16)))):
        exif = Image.Exif()
        exif[0x0112] = own
        sample = turned_sample(tmp_path, (16, 16), 6, drawn((16, 16)), exif=exif)
        np.testing.assert_array_equal(read_sample_mask(sample), expected > 0)


def test_a_mask_that_looks_the_same_turned_needs_no_answer(tmp_path: Path) -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[6:10, 6:10] = 255
    np.testing.assert_array_equal(read_sample_mask(turned_sample(tmp_path, (16, 16), 3, mask)), mask > 0)


def test_a_mask_of_another_size_is_refused_naming_the_turn(tmp_path: Path) -> None:
    sample = turned_sample(tmp_path, (16, 24), 6, drawn((16, 20)))
    with pytest.raises(ImageError, match=r"the mask is 16 x 20 .* is 24 x 16 \(turned by its EXIF orientation, 6\)"):
        read_sample_mask(sample)


# Several files, pixels to ignore, marks nowhere


def test_masks_in_several_files_are_united(tmp_path: Path) -> None:
    image = save(tmp_path / "image.png", np.zeros((4, 6), np.uint8))
    parts = [np.zeros((4, 6), np.uint8) for _ in range(2)]
    parts[0][1], parts[1][:, 2] = 255, 254
    files = tuple(save(tmp_path / f"{i}.png", part) for i, part in enumerate(parts))
    mask = read_sample_mask(Sample(image, 1, "hole", files, mask_threshold=0))
    np.testing.assert_array_equal(mask, (parts[0] > 0) | (parts[1] > 0))


@pytest.mark.parametrize(
    ("ignore", "anomalous", "ignored"),
    [(255, [0, 1, 1, 0], [0, 0, 0, 1]), (1, [0, 0, 1, 1], [0, 1, 0, 0]), (7, [0, 1, 1, 1], [0, 0, 0, 0])],
)
def test_a_value_to_ignore_is_left_out_and_all_others_but_0_are_anomalous(
    tmp_path: Path, ignore: int, anomalous: list[int], ignored: list[int]
) -> None:
    image = save(tmp_path / "image.png", np.zeros((1, 4), np.uint8))
    mask = save(tmp_path / "mask.png", np.array([[0, 1, 2, 255]], np.uint8))
    marks = read_sample_marks(Sample(image, 1, "hole", mask, ignore=ignore))
    np.testing.assert_array_equal(marks.anomalous, [np.array(anomalous, bool)])
    np.testing.assert_array_equal(marks.ignored, [np.array(ignored, bool)])
    lossy = save(tmp_path / "mask.jpg", np.array([[0, 1, 2, 255]], np.uint8))
    with pytest.raises(ImageError, match=rf"mask\.jpg: a JPEG keeps values only nearly, so ignore={ignore} "):
        read_sample_marks(Sample(image, 1, "hole", lossy, ignore=ignore))


def test_the_value_to_ignore_is_of_the_data_set(tmp_path: Path) -> None:
    for name in ("train/0.png", "test/good/1.png", "test/hole/2.png", "masks/hole/2.png"):
        save(tmp_path / name, np.zeros((4, 4), np.uint8))
    assert {sample.ignore for sample in load_dataset(tmp_path, ignore=255).test} == {255}
    assert {sample.ignore for sample in load_dataset(tmp_path).test} == {None}
    for wrong, error in ((0, ValueError), (65536, ValueError), ("255", TypeError)):
        with pytest.raises(error, match=f"ignore must be an integer from 1 to 65535; got {wrong!r}"):
            load_dataset(tmp_path, ignore=wrong)  # type: ignore[arg-type]


def test_all_pixels_of_a_flawed_image_without_a_mark_are_left_out(tmp_path: Path) -> None:
    image = save(tmp_path / "image.png", np.zeros((4, 4), np.uint8))
    black = save(tmp_path / "mask.png", np.zeros((4, 4), np.uint8))
    marks = read_sample_marks(Sample(image, 1, "hole", black))
    assert (marks.anomalous.any(), marks.ignored.all()) == (False, True)
    good = read_sample_marks(Sample(image, 0, "good"))
    assert (good.anomalous.any(), good.ignored.any()) == (False, False)


# Test sets


def samples(folder: Path, shares: list[float], ignore: int | None = None) -> list[Sample]:
    found = []
    for i, share in enumerate(shares):
        mask = np.zeros((10, 10), np.uint8)
        mask.reshape(-1)[: round(100 * share)] = 255
        image = save(folder / f"{i}.png", np.zeros((10, 10), np.uint8))
        found.append(Sample(image, 1, "hole", save(folder / f"{i}_mask.png", mask), ignore=ignore))
    return found


def judge(found: list[Sample]) -> None:
    judge_masks({sample: measure_mask(sample) for sample in found})


def test_masks_that_seem_inverted_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is marked in 2 of 3 masks, .*: .*0_mask\.png, .*1_mask\.png; save them"):
        judge(samples(tmp_path, [0.9, 0.51, 0.1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge(samples(tmp_path, [0.9, 0.5, 0.1]))
        judge(samples(tmp_path, [0.9, 0.1]))
        judge_masks({})


def test_masks_of_flawed_images_that_are_black_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"2 of 3 masks of flawed images mark nothing: .*0_mask\.png, .*2_mask\.png;"):
        judge(samples(tmp_path, [0, 0.1, 0]))


def test_a_value_to_ignore_that_no_mask_holds_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no mask holds the value to ignore, ignore=128"):
        judge(samples(tmp_path, [0.1, 0.2], ignore=128))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = samples(tmp_path, [0.1, 0.2], ignore=128)
        mask = np.asarray(Image.open(found[1].mask)).copy()  # type: ignore[arg-type]
        mask[9, 9] = 128
        save(found[1].mask, mask)  # type: ignore[arg-type]
        judge(found)
