"""Files of several pages: the first is read and the others are told of, or each is an image."""

from __future__ import annotations

import csv
import io
import shutil
import warnings

import numpy as np
import pytest
from click.testing import CliRunner
from detectors import detector, flawed, normal, same
from PIL import Image

from patchcore_rs.cli import main as cli
from patchcore_rs.images.datasets import find_images
from patchcore_rs.images.files import ImageError, all_pages, check_header, read_image
from patchcore_rs.images.pixels import to_pixels
from patchcore_rs.images.sources import open_source

PAGES = normal(3, seed=5)
FORMATS = {"stack.tif": {}, "stack.png": {}, "stack.webp": {"lossless": True}, "stack.gif": {}}


def write_pages(path, pages=PAGES):
    pictures = [Image.fromarray(page) for page in pages]
    options = FORMATS.get(f"stack{path.suffix}", {})
    if path.suffix == ".gif":  # a colour a page, which a palette keeps
        pictures = [Image.new("RGB", (8, 8), (int(page[0, 0, 0]), 0, 0)) for page in pages]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)
    return path


def expected(name):
    return PAGES if name != "stack.gif" else [np.full((8, 8, 3), (page[0, 0, 0], 0, 0), np.uint8) for page in PAGES]


@pytest.fixture
def folder(tmp_path):
    """Two pictures of a page each, and between them one of three."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, image in zip(("a.png", "c.png"), normal(2, seed=6), strict=True):
        Image.fromarray(image).save(folder / name)
    write_pages(folder / "b.tif")
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_the_first_page_is_read_and_the_others_are_told_of(name, tmp_path):
    path = write_pages(tmp_path / name)
    with pytest.warns(UserWarning, match=rf"{name}: the first of 3 pages is read, 2 are left out; pages='all' takes"):
        image = read_image(path)
    np.testing.assert_array_equal(image, expected(name)[0])


@pytest.mark.parametrize("name", FORMATS)
def test_a_page_is_named_by_its_number(name, tmp_path):
    path = write_pages(tmp_path / name)
    assert all_pages([path]) == [tmp_path / f"{name}#{page}" for page in (1, 2, 3)]
    for page, image in zip(all_pages([path]), expected(name), strict=True):
        assert check_header(page) == image.shape[:2]
        np.testing.assert_array_equal(read_image(page), image)
    for page in (0, 4):
        with pytest.raises(ImageError, match=rf"{name}#{page}: the page after # must be .*3 pages; got {page}\. Name"):
            read_image(f"{path}#{page}")
        with pytest.raises(ImageError, match=rf"{name}#{page}: the page"):
            check_header(f"{path}#{page}")


@pytest.mark.parametrize("name", [*FORMATS, "one.jpg", "one.bmp"])
def test_of_a_file_with_one_page_nothing_is_said(name, tmp_path):
    Image.fromarray(PAGES[0]).save(tmp_path / name)
    read_image(tmp_path / name)
    assert all_pages([tmp_path / name]) == [tmp_path / name]


def test_a_file_that_is_called_like_a_page_is_that_file(tmp_path):
    path = write_pages(tmp_path / "stack.tif")
    Image.fromarray(PAGES[0]).save(tmp_path / "other.png")
    shutil.move(tmp_path / "other.png", tmp_path / "stack.tif#2")
    np.testing.assert_array_equal(read_image(f"{path}#2"), PAGES[0])
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "nothing.tif#1")


def test_a_damaged_later_page_takes_nothing_from_the_first(tmp_path):
    path = write_pages(tmp_path / "stack.tif")
    content = path.read_bytes()
    first = int.from_bytes(content[4:8], "little")
    entries = int.from_bytes(content[first : first + 2], "little")
    following = first + 2 + 12 * entries
    path.write_bytes(content[:following] + (len(content) - 3).to_bytes(4, "little") + content[following + 4 :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of the damage
        np.testing.assert_array_equal(read_image(path), PAGES[0])
        assert all_pages([path]) == [path]


def test_bytes_of_several_pages_are_told_of_too(tmp_path):
    content = write_pages(tmp_path / "stack.tif").read_bytes()
    with pytest.warns(UserWarning, match="bytes: the first of 3 pages is read"):
        np.testing.assert_array_equal(to_pixels(content), PAGES[0])


def test_each_page_is_an_image_where_that_is_asked_for(folder):
    images = [*normal(2, seed=6)[:1], *PAGES, *normal(2, seed=6)[1:]]
    names = ["a.png", "b.tif#1", "b.tif#2", "b.tif#3", "c.png"]
    whole = detector().fit(images).calibrate(flawed(9), false_alarm_rate=0.2)
    for given in (folder, sorted(folder.iterdir()), (path for path in sorted(folder.iterdir()))):
        model = detector().fit(given, pages="all")
        assert model.training_.images == 5
        np.testing.assert_array_equal(model.memory_bank_.features, whole.memory_bank_.features)
    model.calibrate(flawed(9), false_alarm_rate=0.2)
    result = model.predict(folder, pages="all")
    same(result, whole.predict(images))
    assert [path.name for path in result.paths] == names
    rows = list(csv.reader(io.StringIO(result.to_csv())))
    assert [row[0] for row in rows[1:]] == [str(folder / name) for name in names]
    same(model.predict(list(result.paths)), result)  # what was told is what may be asked for


def test_pages_of_other_calls(folder):
    assert len(detector().extract(folder, pages="all")) == 5
    model = detector().fit(normal(4)).partial_fit(folder, pages="all")
    assert model.training_.images == 9
    model = detector().fit(normal(4)).calibrate(folder, pages="all", false_alarm_rate=0.5)
    assert model.calibration_.images == 5


def test_how_many_pages_there_are_is_known_before_they_are_read(folder):
    assert open_source(folder, pages="all").count == 5
    assert open_source([*folder.iterdir()], pages="all").count == 5
    assert open_source([PAGES[0], str(folder / "b.tif")], pages="all").count is None
    assert open_source(PAGES, pages="all").count == 3
    with pytest.raises(ValueError, match="pages must be one of 'first', 'all'; got 'last'"):
        open_source(folder, pages="last")


def test_what_cannot_be_read_is_left_out_as_before(folder):
    (folder / "d.tif").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="1 of 6 images were left out"):
        assert detector().fit(folder, pages="all", on_error="skip").training_.images == 5
    with pytest.raises(ImageError, match=r"d\.tif"):
        detector().fit(folder, pages="all")


@pytest.mark.usefixtures("one_load_per_backbone")
def test_the_command_line_takes_pages(folder, tmp_path):
    def run(*arguments):
        result = CliRunner().invoke(cli.main, list(map(str, arguments)))
        assert result.exit_code == 0, result.stderr
        return result

    options = ("--backbone", "efficientnet_lite0", "--resize", "32x32", "--coreset", "20")
    told = run("fit", folder, "-o", tmp_path / "first.safetensors", *options).stderr
    assert "b.tif: the first of 3 pages is read, 2 are left out; --pages all takes each page" in told
    model = tmp_path / "all.safetensors"
    assert "from 5 images" in run("fit", folder, "-o", model, "--pages", "all", *options).stdout
    out, report = tmp_path / "out", tmp_path / "report.html"
    told = run("predict", model, folder, "--pages", "all", "--csv", "-o", out, "--report", report).stdout
    names = ["a.png", "b.tif#1", "b.tif#2", "b.tif#3", "c.png"]
    assert [line.split(",")[0] for line in told.splitlines()[1:]] == [str(folder / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.overlay.png" for name in names]
    assert "b.tif#2" in report.read_text("utf-8")
    assert len({(out / f"{name}.overlay.png").read_bytes() for name in names}) == 5


def test_the_report_never_takes_the_place_of_a_file_of_pages(folder, tmp_path):
    from patchcore_rs.cli.predict import list_images

    assert [name.name for _, name in list_images([folder], "all")][1:4] == ["b.tif#1", "b.tif#2", "b.tif#3"]
    detector().fit(normal(3)).save(tmp_path / "m.safetensors")
    arguments = ["predict", tmp_path / "m.safetensors", folder, "--pages", "all", "--report", folder / "b.tif"]
    result = CliRunner().invoke(cli.main, list(map(str, arguments)))
    assert result.exit_code == 2
    assert "--report" in result.stderr


def test_a_page_is_an_image_by_its_own_path(tmp_path):
    stack = write_pages(tmp_path / "stack.tif")
    [path] = find_images(f"{stack}#2")
    assert str(path) == f"{stack}#2"
    with pytest.raises(FileNotFoundError):
        find_images(f"{stack.with_name('none.tif')}#2")


def test_a_folder_has_no_pages(folder):
    for call in (find_images, detector().fit(normal(3)).predict):
        with pytest.raises(FileNotFoundError, match="images#2"):
            call(f"{folder}#2")


@pytest.mark.usefixtures("one_load_per_backbone")
def test_the_command_line_takes_a_page_by_its_path(folder, tmp_path):
    def run(*arguments, code=0, content=b""):
        result = CliRunner().invoke(cli.main, list(map(str, arguments)), input=content)
        assert result.exit_code == code, result.output
        return result

    stack, model, out = folder / "b.tif", tmp_path / "m.safetensors", tmp_path / "out"
    options = ("--backbone", "efficientnet_lite0", "--resize", "32x32", "--coreset", "4")
    run("fit", folder, "-o", model, "--pages", "all", *options)
    run("fit", f"{stack}#1", "-o", tmp_path / "page.safetensors", "--calibrate", f"{stack}#3", *options)
    (tmp_path / "list").write_text(f"{stack}#2\n")
    whole = csv.DictReader(io.StringIO(run("predict", model, folder, "--pages", "all", "--csv").stdout))
    second = {row["path"]: row["score"] for row in whole}[f"{stack}#2"]
    for given in ((f"{stack}#2",), ("-",), ("--from-file", tmp_path / "list"), (f"{stack}#2", "--pages", "all")):
        told = run("predict", model, *given, "--csv", "-o", out, "--report", tmp_path / "r.html", content=f"{stack}#2")
        [row] = csv.DictReader(io.StringIO(told.stdout))
        assert (row["path"], row["score"]) == (f"{stack}#2", second)
    assert [path.name for path in out.iterdir()] == ["b.tif#2.overlay.png"]

    told = run("predict", model, folder / "none.tif#2", code=2).stderr
    assert "none.tif#2' does not exist" in told
    assert "images#2' does not exist" in run("predict", model, f"{folder}#2", code=2).stderr
    told = run("predict", model, f"{stack}#4", code=2).stderr
    assert "b.tif#4: the page after # must be one of the file, which has 3 pages; got 4" in told
    shutil.copy(folder / "a.png", f"{stack}#2")
    assert "expected a folder or an image file" in run("predict", model, f"{stack}#2", code=2).stderr


def test_pages_in_memory_are_told_to_be_given_by_a_path(tmp_path):
    stack = write_pages(tmp_path / "stack.tif")
    with pytest.warns(UserWarning, match="bytes: the first of 3 pages is read.*where the path of a file is given"):
        to_pixels(stack.read_bytes())
