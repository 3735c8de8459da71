"""What a DataLoader may give: items one by one, collated by torch or as a list, of whatever the Dataset holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectors import detector, normal, write_folder
from PIL import Image
from torch.utils.data import DataLoader

from patchcore_rs.images.read_ahead import iterate_images

IMAGES = normal(5)


class Items(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Batches(torch.utils.data.IterableDataset):
    """Batches that are made already."""

    def __iter__(self):
        yield TENSORS[:3], torch.zeros(3)
        yield TENSORS[3:], torch.zeros(2)


PILLOW = [Image.fromarray(image) for image in IMAGES]
TENSORS = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)


@pytest.fixture
def files(tmp_path):
    folder = write_folder(tmp_path / "images", IMAGES)
    return [str(folder / f"{i}.png") for i in range(len(IMAGES))]


def labelled(items):
    return Items([(item, 0) for item in items])


def named(items):
    return Items([{"image": item, "label": 0} for item in items])


def transposed(batch):
    return tuple(zip(*batch, strict=True))


LOADERS = {
    "paths": lambda files: DataLoader(files, batch_size=2),
    "paths one by one": lambda files: DataLoader(files, batch_size=None),
    "paths with labels": lambda files: DataLoader(labelled(files), batch_size=2),
    "paths with labels, as a list": lambda files: DataLoader(labelled(files), batch_size=2, collate_fn=list),
    "mappings of paths": lambda files: DataLoader(named(files), batch_size=2),
    "encoded files": lambda files: DataLoader([Path(file).read_bytes() for file in files], batch_size=2),
    "Pillow images": lambda _: DataLoader(PILLOW, batch_size=2, collate_fn=list),
    "Pillow images one by one": lambda _: DataLoader(PILLOW, batch_size=None),
    "Pillow images with labels": lambda _: DataLoader(labelled(PILLOW), batch_size=2, collate_fn=list),
    "Pillow images, then labels": lambda _: DataLoader(labelled(PILLOW), batch_size=2, collate_fn=transposed),
    "Pillow images with labels one by one": lambda _: DataLoader(labelled(PILLOW), batch_size=None),
    "mappings of Pillow images": lambda _: DataLoader(named(PILLOW), batch_size=2, collate_fn=list),
    "arrays": lambda _: DataLoader(IMAGES, batch_size=2, collate_fn=list),
    "arrays with labels": lambda _: DataLoader(labelled(IMAGES), batch_size=2, collate_fn=list),
    "tensors with labels": lambda _: DataLoader(labelled(TENSORS), batch_size=2, collate_fn=list),
    "tensors one by one": lambda _: DataLoader(labelled(TENSORS), batch_size=None),
    "batches made already": lambda _: DataLoader(Batches(), batch_size=None),
}


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_gives_the_same_images_in_order(name, files):
    found = list(iterate_images(LOADERS[name](files)))
    assert len(found) == len(IMAGES)
    np.testing.assert_array_equal([image for _, image in found], IMAGES)
    assert [path and str(path) for path, _ in found] == (files if "paths" in name else [None] * len(files))


def test_a_detector_names_the_files_that_a_loader_lists(files):
    model = detector().fit(DataLoader(files, batch_size=2))
    assert [str(path) for path in model.predict(DataLoader(files, batch_size=3)).paths] == files
    with open(files[3], "wb") as file:
        file.write(b"no image")
    with pytest.raises(ValueError, match=r"3\.png: not a PNG"):
        model.predict(DataLoader(files, batch_size=3))


@pytest.mark.parametrize(
    ("loader", "shape"),
    [
        (lambda: DataLoader(IMAGES, batch_size=2), r"a batch of a DataLoader .*\(n, 3, H, W\); got \(2, 32, 32, 3\)"),
        (lambda: DataLoader(labelled(IMAGES), batch_size=2), r"\(n, 3, H, W\); got \(2, 32, 32, 3\)"),
        (lambda: DataLoader(IMAGES[..., 0], batch_size=3), r"\(n, 3, H, W\); got \(3, 32, 32\)"),
        (lambda: DataLoader(IMAGES, batch_size=None), r"an image of a DataLoader .*\(3, H, W\); got \(32, 32, 3\)"),
    ],
)
def test_channels_in_another_place_are_refused_with_what_mends_it(loader, shape):
    with pytest.raises(ValueError, match=shape + r".*tensor\.permute\(2, 0, 1\).*collate_fn=list"):
        list(iterate_images(loader()))


def test_both_remedies_mend_it():
    for loader in (DataLoader(TENSORS, batch_size=2), DataLoader(IMAGES, batch_size=2, collate_fn=list)):
        np.testing.assert_array_equal([image for _, image in iterate_images(loader)], IMAGES)


@pytest.mark.parametrize("collate", [list, transposed])
def test_images_are_not_confused_with_their_masks(collate):
    loader = DataLoader(Items([(image, image) for image in PILLOW]), batch_size=2, collate_fn=collate)
    with pytest.raises(ValueError, match=r"nothing but lists of Pillow images\. Let collate_fn give the images alone"):
        list(iterate_images(loader))
