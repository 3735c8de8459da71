"""Images of every kind become the same tensors and features, lazily, in order, and an error names its image."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset

from patchcore_rs import _native
from patchcore_rs.backbones.backbone import Backbone
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.features.aggregation import aggregate_tensors
from patchcore_rs.features.extractor import FeatureExtractor
from patchcore_rs.images.files import ImageError, read_image, write_image
from patchcore_rs.images.pixels import to_pixels
from patchcore_rs.images.read_ahead import iterate_images

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (5, 40, 50, 3), dtype=np.uint8)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def pyramid(batch: Tensor) -> list[Tensor]:
    """Maps at strides 2 and 4 whose values depend on the image."""
    fine = functional.avg_pool2d(batch, 2)
    return [fine, torch.cat([functional.max_pool2d(fine, 2), functional.avg_pool2d(fine, 2)], dim=1)]


def extractor(network: Callable[[Tensor], Any] = pyramid, **options: Any) -> FeatureExtractor:
    backbone = Backbone("pyramid", network, (), mean=MEAN, std=STD)
    defaults: dict[str, Any] = {"resize": None, "crop": None, "embedding": "concat", "device": "cpu"}
    return FeatureExtractor(backbone, **(defaults | options))


def normalise(scaled: Tensor) -> Tensor:
    return (scaled - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)


def floats(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 255)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "parts").mkdir()
    for i, image in enumerate(IMAGES):
        write_image(tmp_path / "parts" / f"{i}.png", image)
    return tmp_path / "parts"


# ------------------------------------------------------------------------------------------------------------- prepare


def test_files_arrays_and_tensors_of_8_bits_prepare_alike(folder: Path) -> None:
    way = extractor(resize=30, crop=24)
    expected = way.prepare(folder / "0.png")
    assert expected.shape == (3, 24, 24)
    assert expected.dtype == torch.float32
    tensor = torch.from_numpy(IMAGES[0]).permute(2, 0, 1)
    for image in (str(folder / "0.png"), IMAGES[0], IMAGES[0].copy(order="F"), tensor, tensor.contiguous()):
        assert torch.equal(way.prepare(image), expected)


def test_8_bit_images_are_resized_as_torchvision_does_with_pillow() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    pillow = pytest.importorskip("PIL.Image")
    reference = transforms.Compose(
        [
            transforms.Resize(30),
            transforms.CenterCrop(24),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    expected = reference(pillow.fromarray(IMAGES[0]))
    assert torch.equal(extractor(resize=30, crop=24).prepare(IMAGES[0]), expected)


@pytest.mark.parametrize(("resize", "crop"), [(30, 24), ((30, 33), None), (None, (20, 31)), (None, None), (63, 63)])
def test_floats_are_resized_as_torchvision_does_with_tensors(resize: Any, crop: Any) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    steps = [] if resize is None else [transforms.Resize(resize, antialias=True)]
    steps += [] if crop is None else [transforms.CenterCrop(crop)]
    expected = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])(floats(IMAGES[0]))
    way = extractor(resize=resize, crop=crop)
    for image in (floats(IMAGES[0]), IMAGES[0].astype(np.float32) / 255, floats(IMAGES[0]).double()):
        torch.testing.assert_close(way.prepare(image), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        extractor(resize=resize, crop=crop, antialias_tensor=True).prepare(IMAGES[0]), way.prepare(floats(IMAGES[0]))
    )


def test_grey_images_fill_three_channels() -> None:
    grey = IMAGES[0, :, :, 0]
    expected = normalise(floats(np.repeat(grey[:, :, None], 3, axis=2)))
    for image in (grey, grey[:, :, None], torch.from_numpy(grey)[None], grey.astype(np.float32) / 255):
        torch.testing.assert_close(extractor().prepare(image), expected)


def test_16_bits_are_scaled_not_clipped() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for image in (ramp, ramp.astype(">u2"), ramp[:, :, None]):
        pixels = to_pixels(image)
        assert isinstance(pixels, np.ndarray)
        assert np.array_equal(pixels[:, :, 0], np.round(ramp / 257).astype(np.uint8))


def test_16_bit_arrays_and_files_are_scaled_alike(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pillow.fromarray(ramp).save(tmp_path / "ramp.png")
    assert np.array_equal(read_image(tmp_path / "ramp.png"), to_pixels(ramp))
    assert np.array_equal(to_pixels(pillow.open(tmp_path / "ramp.png")), to_pixels(ramp))


def test_normalised_images_pass_with_mean_0_and_std_1() -> None:
    image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3
    for mean, std in ((0, 1), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))):
        assert torch.equal(extractor(mean=mean, std=std).prepare(image), image)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]; got \[-.*pass mean=0, std=1"):
        extractor().prepare(image)
    with pytest.raises(ValueError, match="must be finite"):
        extractor(mean=0, std=1).prepare(torch.full((3, 2, 2), torch.nan))


def test_images_are_never_changed() -> None:
    image, tensor = IMAGES[0].copy(), floats(IMAGES[0])
    image.setflags(write=False)
    before = tensor.clone()
    for option in (False, True):
        way = extractor(antialias_tensor=option)
        way.prepare(image)
        way.prepare(image.astype(np.float64) / 255)
        way.prepare(tensor)
        way.extract(way.prepare(tensor)[None])
    assert np.array_equal(image, IMAGES[0])
    assert torch.equal(tensor, before)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"array image must have shape .*channels last; got \(4, 4, 2\)"),
        (np.zeros((3, 9, 9), np.uint8), ValueError, r"channels last; got \(3, 9, 9\)"),
        (np.zeros(9, np.uint8), ValueError, r"got \(9,\)"),
        (np.zeros((4, 4), np.int64), TypeError, r"uint8, uint16 or floating point in \[0, 1\]; got int64"),
        (np.zeros((4, 4), bool), TypeError, "got bool"),
        (np.ma.zeros((4, 4)), TypeError, "got MaskedArray"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), TypeError, "got int32"),
        (torch.zeros(4, 4, 3), ValueError, r"tensor image must have shape \(3, H, W\) .* got \(4, 4, 3\)"),
        (np.full((4, 4), 2.0), ValueError, r"must lie in \[0, 1\]; got \[2, 2\]. Scale it"),
        (np.full((4, 4), np.nan), ValueError, "must be finite"),
        (np.zeros((0, 4, 3)), ValueError, "at least one pixel"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "at least one pixel"),
        (np.zeros((4, 4, 3), np.uint8), ValueError, "crop=6 needs at least 6 x 6"),
        (np.zeros((4, 4, 3)), ValueError, "crop=6 needs at least 6 x 6"),
        ([[1, 2]], TypeError, "an image must be a path, .* a numpy array.*got list"),
    ],
)
def test_images_that_do_not_fit_are_refused(image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        extractor(crop=6).prepare(image)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embedding": 0}, ValueError, "embedding must be at least 1"),
        ({"embedding": "sum"}, TypeError, "embedding must be an integer"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1"),
        ({"stride": 0.5}, TypeError, "stride must be an integer"),
        ({"threads": 0}, ValueError, "threads must be at least 1"),
        ({"mean": (1, 2)}, ValueError, "mean must be a finite number, or three"),
        ({"std": 0}, ValueError, "std must be positive"),
        ({"device": "gpu"}, ValueError, "device='gpu' cannot be used"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        extractor(**options)


# ------------------------------------------------------------------------------------------------------------- sources


class Items(Dataset[Any]):
    """A Dataset that counts what was taken out of it."""

    def __init__(self, item: Callable[[int], Any], size: int = 5) -> None:
        self.item, self.size, self.taken = item, size, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        self.taken += 1
        return self.item(index)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return ((floats(image), 0) for image in IMAGES)


def labelled(index: int) -> tuple[Tensor, int]:
    return floats(IMAGES[index]), 0


def mapped(index: int) -> dict[str, Any]:
    return {"label": 0, "image": floats(IMAGES[index]), "image_path": f"{index}.png"}


STACK = torch.stack([floats(image) for image in IMAGES])

SOURCES: dict[str, Callable[[], Any]] = {
    "array": lambda: IMAGES,
    "float array": lambda: IMAGES / np.float64(255),
    "list of arrays": lambda: list(IMAGES),
    "tensor": lambda: STACK,
    "8-bit tensor": lambda: torch.from_numpy(IMAGES).permute(0, 3, 1, 2),
    "tuple of tensors": lambda: tuple(STACK),
    "dataset of tensors": lambda: Items(lambda i: STACK[i]),
    "dataset of arrays": lambda: Items(lambda i: IMAGES[i]),
    "dataset of pairs": lambda: Items(labelled),
    "dataset of mappings": lambda: Items(mapped),
    "iterable dataset": Stream,
    "loader of tensors": lambda: DataLoader(Items(lambda i: STACK[i]), batch_size=2),
    "loader of pairs": lambda: DataLoader(Items(labelled), batch_size=2),
    "loader of mappings": lambda: DataLoader(Items(mapped), batch_size=2),
    "loader of lists": lambda: DataLoader(
        Items(mapped), batch_size=2, collate_fn=lambda items: {"image": [item["image"] for item in items]}
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_images_in_order(name: str) -> None:
    expected = [extractor().prepare(image) for image in IMAGES]
    items = list(iterate_images(SOURCES[name](), extractor().prepare))
    assert len(items) == len(IMAGES)
    for i, (path, image) in enumerate(items):
        torch.testing.assert_close(image, expected[i])
        assert (path is not None and path.name == f"{i}.png") == (name in ("dataset of mappings", "loader of mappings"))


def test_grey_stacks_and_single_images() -> None:
    assert [image.shape for _, image in iterate_images(IMAGES[:, :, :, :1])] == [(40, 50, 3)] * 5
    for single in (IMAGES[0], IMAGES[0, :, :, 0], IMAGES[0] / 255, STACK[0]):
        assert len(list(iterate_images(single))) == 1


def test_files_come_sorted_with_their_paths(folder: Path) -> None:
    write_image(folder / "10.png", IMAGES[0, :20])
    names = ["0.png", "1.png", "2.png", "3.png", "4.png", "10.png"]
    for source in (folder, str(folder), [folder / name for name in names]):
        items = list(iterate_images(source))
        assert [path.name for path, _ in items if path is not None] == names
        for (_, image), expected in zip(items, [*IMAGES, IMAGES[0, :20]], strict=True):
            assert np.array_equal(image, expected)
    ((path, image),) = iterate_images(folder / "3.png")
    assert path == folder / "3.png"
    assert np.array_equal(image, IMAGES[3])


@pytest.mark.parametrize("source", [[], (), np.zeros((0, 4, 4, 3)), torch.zeros(0, 3, 4, 4), Items(labelled, size=0)])
def test_an_empty_source_is_refused(source: Any) -> None:
    with pytest.raises(ValueError, match="there are no images in this source"):
        list(iterate_images(source))
    with pytest.raises(ValueError, match="there are no images in this source"):
        list(extractor().batches(source, 4))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no .*image"):
        iterate_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        iterate_images(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, TypeError, "images must be a folder, a file.*got int"),
        (np.zeros((1, 2, 3, 4, 5)), ValueError, r"array image must have shape .* got \(1, 2, 3, 4, 5\)"),
        (torch.zeros(4, 4), ValueError, r"tensor image must have shape .* got \(4, 4\)"),
        ([IMAGES[0], IMAGES[1] / 128], ValueError, r"images\[1\]: .* must lie in \[0, 1\]"),
        ([IMAGES[0], None], TypeError, r"images\[1\]: an image must be a path"),
        (IMAGES.transpose(0, 3, 1, 2), ValueError, r"channels last; got \(5, 3, 40, 50\). Move the channels last"),
        (Items(lambda i: IMAGES[i] if i < 3 else {}[i]), ValueError, r"source failed at images\[3\]: KeyError"),
        (Items(lambda i: {"picture": 0}), ValueError, r"images\[0\].* must hold 'image'; got picture"),
        (Items(lambda i: ()), ValueError, r"images\[0\].* must begin with the image"),
        (
            DataLoader(Items(lambda i: IMAGES[i]), batch_size=2),
            ValueError,
            r"must have shape \(n, 3, H, W\); got \(2, 40, 50, 3\)",
        ),
    ],
)
def test_what_cannot_be_read_is_named(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(iterate_images(source))


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "2.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"2\.png"):
        list(iterate_images(folder))
    with pytest.raises(ValueError, match=r"0\.png: .*crop=90 needs at least"):
        list(extractor(crop=90).batches([folder / "0.png"], 2))
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        list(iterate_images([folder / "0.png", folder / "none.png"]))


def test_images_are_read_no_further_ahead_than_needed() -> None:
    source = Items(lambda i: IMAGES[i % 5], size=100)
    images = iterate_images(source, threads=2)
    for _ in range(3):
        next(images)
    assert 3 <= source.taken <= 3 + 2 + 1
    source.taken = 0
    batches = extractor(threads=2).batches(source, 4)
    next(batches)
    assert 4 <= source.taken <= 4 + 1 + 4 + 2 + 1


def test_images_are_prepared_beside_the_caller() -> None:
    seen: set[str] = set()
    both = threading.Barrier(2, timeout=60)

    def prepare(image: Any) -> Any:
        seen.add(threading.current_thread().name)
        both.wait()  # passes only where two images are prepared at once
        return image

    assert len(list(iterate_images(IMAGES[:4], prepare, threads=2))) == 4
    assert threading.current_thread().name not in seen


def test_batches_hold_images_of_one_size(folder: Path) -> None:
    sizes = [(8, 8), (8, 8), (8, 8), (8, 9), (8, 9), (8, 8)]
    source = [IMAGES[0, :height, :width] for height, width in sizes]
    batches = list(extractor().batches(source, 2))
    assert [tuple(batch.images.shape) for batch in batches] == [(2, 3, 8, 8), (1, 3, 8, 8), (2, 3, 8, 9), (1, 3, 8, 8)]
    assert [batch.names for batch in batches][2] == ("images[3]", "images[4]")
    assert all(path is None for batch in batches for path in batch.paths)
    (batch,) = extractor().batches(folder, 8)
    assert batch.paths == tuple(folder / f"{i}.png" for i in range(5))
    assert batch.names == tuple(str(path) for path in batch.paths)
    assert torch.equal(batch.images[4], extractor().prepare(IMAGES[4]))


# ------------------------------------------------------------------------------------------------------------ features


def test_features_are_the_aggregated_maps() -> None:
    way = extractor()
    batch = torch.stack([way.prepare(image) for image in IMAGES])
    features, grid = way.extract(batch)
    assert grid == (20, 25)
    assert features.shape == (5 * 20 * 25, 3 + 6)
    assert features.dtype == np.float32
    fine = functional.avg_pool2d(functional.avg_pool2d(batch, 2), 3, 1, 1).permute(0, 2, 3, 1).reshape(-1, 3)
    np.testing.assert_allclose(features[:, :3], fine.numpy(), rtol=1e-5, atol=1e-6)
    wide, _ = extractor(embedding=6, patch_size=1).extract(batch)
    assert wide.shape == (5 * 20 * 25, 6)
    _, coarse = extractor(stride=2).extract(batch)
    assert coarse == (10, 13)


@pytest.mark.parametrize("embedding", ["concat", 16])
def test_the_batch_does_not_matter(embedding: Any) -> None:
    way = extractor(load_backbone("squeezenet1_1", weights=None).module, embedding=embedding)
    batch = torch.stack([way.prepare(image) for image in IMAGES])
    together, grid = way.extract(batch)
    alone = np.concatenate([way.extract(image[None])[0] for image in batch])
    assert together.shape == (5 * grid[0] * grid[1], 256 + 512 if embedding == "concat" else 16)
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5 * np.abs(alone).mean())


def test_threads_share_one_extractor() -> None:
    way = extractor()
    batches = [way.prepare(image)[None] for image in IMAGES] * 4
    expected = [way.extract(batch)[0] for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        results = [features for features, _ in pool.map(way.extract, batches)]
    assert all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_name_their_image(value: float) -> None:
    def broken(batch: Tensor) -> list[Tensor]:
        maps = [layer_map.clone() for layer_map in pyramid(batch)]
        maps[1][1, 0, 0, 0] = value
        return maps

    batch = torch.rand(3, 3, 32, 32)
    for names, name in ((None, "image 1 of the batch"), (["a.png", "b.png", "c.png"], r"b\.png")):
        with pytest.raises(ValueError, match=rf"^{name}: layer 1 of backbone 'pyramid' gave NaN or infinite"):
            extractor(broken).extract(batch, names)


def test_batches_that_do_not_fit_are_refused() -> None:
    for batch in (torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="batch must be prepared images"):
            extractor().extract(batch)
    way = extractor(load_backbone("squeezenet1_1", weights=None).module)
    with pytest.raises(ValueError, match=r"fails on images of 5 x 40 .* Resize them to 32 or more"):
        way.extract(torch.rand(1, 3, 5, 40))


# --------------------------------------------------------------------------------------------------------- aggregation


def random_maps(*shapes: tuple[int, int, int], count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(count, *shape, generator=generator) for shape in shapes]


CASES = [
    (((8, 12, 10), (16, 6, 5)), 3, 1, None),
    (((8, 12, 10), (16, 6, 5)), 3, 1, 8),
    (((8, 12, 10), (16, 6, 5)), 3, 1, 24),
    (((5, 9, 7), (7, 5, 4), (3, 2, 2)), 3, 1, 11),
    (((5, 9, 7), (7, 5, 4), (3, 2, 2)), 5, 2, None),
    (((5, 9, 7), (7, 5, 4)), 2, 2, 9),
    (((6, 4, 4), (6, 8, 8)), 1, 1, 6),
    (((4, 1, 1),), 3, 1, 50),
]


@pytest.mark.parametrize(("shapes", "patch_size", "stride", "width"), CASES)
def test_torch_and_the_kernel_aggregate_alike(shapes: Any, patch_size: int, stride: int, width: int | None) -> None:
    maps = random_maps(*shapes)
    features, grid = aggregate_tensors(maps, patch_size, stride, width)
    arrays = [layer_map.permute(0, 2, 3, 1).contiguous().numpy() for layer_map in maps]
    expected, expected_grid = _native.aggregate(arrays, patch_size, stride, width, 1)
    assert grid == tuple(expected_grid)
    np.testing.assert_allclose(features.numpy(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("shapes", "patch_size", "stride", "width"), CASES)
def test_torch_aggregates_by_the_definition(shapes: Any, patch_size: int, stride: int, width: int | None) -> None:
    """Neighbourhoods are cut out, interpolated to the first grid, and only then pooled, all in float64."""
    maps = [layer_map.double() for layer_map in random_maps(*shapes)]
    padding = (patch_size - 1) // 2
    layers: list[Tensor] = []
    for layer_map in maps:
        padded = functional.pad(layer_map, [padding] * 4)
        taps = padded.unfold(2, patch_size, stride).unfold(3, patch_size, stride)  # n, c, gh, gw, p, p
        taps = taps.permute(0, 1, 4, 5, 2, 3).flatten(1, 3)  # n, c * p * p, gh, gw
        if layers:
            taps = functional.interpolate(taps, layers[0].shape[2:], mode="bilinear", align_corners=False)
        layers.append(taps)
    vectors = [layer.permute(0, 2, 3, 1).flatten(0, 2) for layer in layers]
    if width is None:
        expected = torch.cat([vector.unflatten(1, (-1, patch_size**2)).mean(dim=2) for vector in vectors], dim=1)
    else:
        pooled = [functional.adaptive_avg_pool1d(vector[:, None], width) for vector in vectors]
        joined = torch.stack([vector[:, 0] for vector in pooled], dim=1).flatten(1)
        expected = functional.adaptive_avg_pool1d(joined[:, None], width)[:, 0]
    features, _ = aggregate_tensors(random_maps(*shapes), patch_size, stride, width)
    torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=2e-6)
