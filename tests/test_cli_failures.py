"""The command line where something fails: finished work is told, files are whole or absent, codes are right."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.backbones.weights import WeightsError
from patchcore_rs.cli import main as cli
from patchcore_rs.cli import predict as cli_predict
from patchcore_rs.cli.program import ExitCode, in_shell_words
from patchcore_rs.detector import extraction
from patchcore_rs.detector.patchcore import PatchCore as Detector
from patchcore_rs.images.datasets import find_images
from patchcore_rs.images.files import IMAGE_SUFFIXES, read_image
from patchcore_rs.model.file import whole_file

TINY = ["--backbone", "efficientnet_lite0", "--coreset", "8", "--resize", "32x32", "--crop", "none"]
SHELL = [sys.executable, "-c", "from patchcore_rs.cli.main import main; main()"]
unix = pytest.mark.skipif(os.name != "posix", reason="pipes and devices are others elsewhere")


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def draw(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG" if path.suffix == ".png" else None)
    return path


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    for seed in range(3):
        draw(root / "good" / f"{seed}.png", seed)
    result = run("fit", root / "good", "-o", root / "m.safetensors", *TINY, "-q")
    assert result.exit_code == 0, result.output
    return root / "m.safetensors"


@pytest.fixture
def belt(tmp_path):
    """Three images, the last of them truncated."""
    for seed in range(3):
        draw(tmp_path / "belt" / f"{seed}.png", seed)
    truncate(tmp_path / "belt" / "2.png")
    return tmp_path / "belt"


@pytest.fixture
def categories(tmp_path):
    """Two data sets with a mask each."""
    for name in ("bolt", "nut"):
        root = tmp_path / "set" / name
        for seed in range(3):
            draw(root / "train" / "good" / f"{seed}.png", seed)
        draw(root / "test" / "good" / "0.png", 7)
        draw(root / "test" / "cut" / "0.png", 8)
        draw(root / "test" / "cut" / "1.png", 9)
        mask = np.zeros((32, 32), np.uint8)
        mask[8:16, 8:16] = 255
        for i in range(2):
            path = root / "ground_truth" / "cut" / f"{i}_mask.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    return tmp_path / "set"


# --- images that cannot be read ----------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [False, True])
def test_a_broken_image_takes_no_score_from_the_others(model, belt, tmp_path, flag):
    command = ["predict", model, belt, *(["--skip-unreadable"] if flag else [])]
    code = ExitCode.OK if flag else ExitCode.USAGE
    table = run(*command)
    assert table.exit_code == code
    assert "2 images" in table.stdout
    assert "2.png" in table.stderr
    assert ("error: " in table.stderr) is not flag

    rows = run(*command, "--csv")
    assert rows.exit_code == code
    assert [Path(row["path"]).name for row in csv.DictReader(io.StringIO(rows.stdout))] == ["0.png", "1.png"]

    pages = ["-o", tmp_path / "out", "--report", tmp_path / "r.html"]
    answer = run(*command, "--json", *pages)
    assert answer.exit_code == code
    said = json.loads(answer.stdout)
    assert [Path(image["path"]).name for image in said["images"]] == ["0.png", "1.png"]
    assert all(Path(image["files"]["overlay"]).is_file() for image in said["images"])
    assert [Path(image["path"]).name for image in said["skipped"]] == ["2.png"]
    assert (said["error"] is None) is flag
    assert flag or "2.png" in said["error"]
    assert (tmp_path / "r.html").read_text("utf-8").endswith("</html>\n")


def test_no_output_takes_the_place_of_what_is_read(model, belt, tmp_path):
    kept = shutil.copy(model, tmp_path / "m.safetensors")
    link = tmp_path / "link.html"
    link.symlink_to(kept)
    image = belt / "0.png"
    before = Path(kept).read_bytes(), image.read_bytes()
    for command in (
        ("predict", kept, belt, "--report", kept),
        ("predict", kept, belt, "--report", link),
        ("predict", kept, image, "--report", image),
        ("fit", belt, "-o", image, *TINY),
        ("fit", model.parent / "good", "-o", image, "--calibrate", belt, *TINY),
    ):
        result = run(*command)
        assert result.exit_code == ExitCode.USAGE, command
        assert "must be a file that this command does not read; got" in result.stderr
    assert before == (Path(kept).read_bytes(), image.read_bytes())


def test_no_readable_image_at_all_is_an_error_and_still_json(model, tmp_path):
    truncate(draw(tmp_path / "in" / "0.png"))
    for flags in ([], ["--skip-unreadable"]):
        result = run("predict", model, tmp_path / "in", "--json", *flags)
        assert result.exit_code == ExitCode.USAGE
        assert "none of the 1 image can be read" in json.loads(result.stdout)["error"]
        assert "--skip-unreadable" not in result.stderr


def test_csv_comes_out_while_images_are_scored(model, tmp_path, monkeypatch):
    for seed in range(3):
        draw(tmp_path / "in" / f"{seed}.png", seed)
    monkeypatch.setattr(cli_predict, "_CHUNK", 1)
    predict, calls = Detector.predict, []

    def fail_at_the_third(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the device is gone")
        return predict(self, *arguments, **named)

    monkeypatch.setattr(Detector, "predict", fail_at_the_third)
    result = run("predict", model, tmp_path / "in", "--csv")
    assert result.exit_code == ExitCode.FAILURE
    assert len(result.stdout.splitlines()) == 3
    calls.clear()
    answer = json.loads(run("predict", model, tmp_path / "in", "--json", "-o", tmp_path / "out").stdout)
    assert len(answer["images"]) == 2
    assert answer["error"] == "the device is gone (--debug shows where)"
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_fit_skips_unreadable_images_on_request(belt, tmp_path):
    command = ["fit", belt, "-o", tmp_path / "m.safetensors", *TINY]
    result = run(*command)
    assert result.exit_code == ExitCode.USAGE
    assert "2.png" in result.stderr
    assert "--skip-unreadable leaves such images out" in result.stderr
    assert not (tmp_path / "m.safetensors").exists()
    result = run(*command, "--skip-unreadable", "--json")
    assert result.exit_code == ExitCode.OK, result.stderr
    answer = json.loads(result.stdout)
    assert answer["images"] == 2
    assert [Path(image["path"]).name for image in answer["skipped"]] == ["2.png"]


def test_fit_reads_the_images_of_the_calibration_before_it_begins(belt, tmp_path, monkeypatch):
    draw(tmp_path / "good" / "0.png")
    command = ["fit", tmp_path / "good", "-o", tmp_path / "m.safetensors", *TINY, "--calibrate", belt]

    def fit(*_, **__):
        raise AssertionError("the fit began")

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "partial_fit", fit)
        result = run(*command)
    assert result.exit_code == ExitCode.USAGE
    assert "2.png" in result.stderr
    assert run(*command, "--skip-unreadable").exit_code == ExitCode.OK


def test_evaluate_keeps_the_categories_that_are_finished(categories, tmp_path):
    broken = truncate(categories / "bolt" / "test" / "good" / "0.png")
    command = ["evaluate", categories, "--category", "all", *TINY]
    result = run(*command, "--json", "--report", tmp_path / "r.html")
    assert result.exit_code == ExitCode.USAGE
    answer = json.loads(result.stdout)
    assert [one["category"] for one in answer["runs"]] == ["nut"]
    assert str(broken) in answer["error"]
    assert (tmp_path / "r.html").read_text("utf-8").count("<section") == 1
    table = run(*command)
    assert table.exit_code == ExitCode.USAGE
    assert "nut" in table.stdout


def test_evaluate_skips_unreadable_images_and_masks_on_request(categories):
    truncate(categories / "bolt" / "ground_truth" / "cut" / "1_mask.png")
    truncate(categories / "bolt" / "train" / "good" / "1.png")
    result = run("evaluate", categories / "bolt", *TINY, "--skip-unreadable", "--json")
    assert result.exit_code == ExitCode.OK, result.stderr
    answer = json.loads(result.stdout)
    assert answer["runs"][0]["metrics"]["anomalous"] == 1
    assert answer["error"] is None
    assert "1_mask.png" in result.stderr


def test_a_bad_mask_is_found_before_the_fit(categories, monkeypatch):
    truncate(categories / "bolt" / "ground_truth" / "cut" / "1_mask.png")

    def fit(*_, **__):
        raise AssertionError("the fit began")

    monkeypatch.setattr(Detector, "fit", fit)
    result = run("evaluate", categories / "bolt", *TINY)
    assert result.exit_code == ExitCode.USAGE
    assert "1_mask.png" in result.stderr
    assert result.stdout == ""


# --- what is written ---------------------------------------------------------------------------------------


def test_what_predict_drew_is_not_inspected_again(model, tmp_path):
    draw(tmp_path / "belt" / "0.png")
    saves = ["--save", "overlay", "--save", "png16", "--save", "npy"]
    for output in ("belt/out", "belt"):
        for _ in range(2):
            result = run("predict", model, tmp_path / "belt", "-o", tmp_path / output, *saves, "--json")
            assert len(json.loads(result.stdout)["images"]) == 1
    assert "left out 6 files, no images: 4 pictures drawn of images, 2 .npy" in result.stderr
    drawn = tmp_path / "belt" / "0.png.overlay.png"
    assert find_images(tmp_path / "belt") == [tmp_path / "belt" / "0.png"]
    assert find_images(drawn) == [drawn]
    shutil.copy(drawn, tmp_path / "belt" / "an.overlay.png")
    assert len(find_images(tmp_path / "belt")) == 2


def test_a_full_disk_is_told_with_the_file_and_the_scores(model, tmp_path, monkeypatch):
    for seed in range(2):
        draw(tmp_path / "in" / f"{seed}.png", seed)
    write = Path.write_bytes

    def full(self, contents):
        if self.name.startswith(".1.png.map"):
            write(self, contents[:5])
            raise OSError(28, "No space left on device")
        return write(self, contents)

    monkeypatch.setattr(Path, "write_bytes", full)
    result = run("predict", model, tmp_path / "in", "-o", tmp_path / "out", "--save", "npy", "--csv")
    assert result.exit_code == ExitCode.FAILURE
    assert result.stderr.splitlines() == [
        f"patchcore-rs: error: {tmp_path / 'out' / '1.png.map.npy'}: No space left on device"
    ]
    assert [row["npy"] != "" for row in csv.DictReader(io.StringIO(result.stdout))] == [True, False]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.png.map.npy"]


@unix
def test_no_file_is_left_half_written(model, tmp_path):
    import resource

    for seed in range(2):
        draw(tmp_path / "in" / f"{seed}.png", seed)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for arguments in (["-o", "out", "--save", "overlay"], ["-o", "out", "--save", "png16"], ["--report", "r.html"]):
        option, name, *rest = arguments
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))  # Python ignores the signal of it
        try:
            result = run("predict", model, tmp_path / "in", "--json", option, tmp_path / name, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert result.exit_code == ExitCode.FAILURE
        assert result.stderr.startswith(f"patchcore-rs: error: {tmp_path / name}")
        assert result.stderr.endswith(": File too large\n")
        assert len(json.loads(result.stdout)["images"]) == 2
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "in"] == []


def fail_to_write(target, error):
    with whole_file(target) as temporary:
        temporary.write_text("half")
        raise error


def test_a_failed_write_names_its_target_whatever_the_encoder_says(tmp_path):
    target = tmp_path / "map.png"
    target.write_text("before")
    for error in (OSError(28, "No space left on device"), OSError("encoder error -2 when writing image file")):
        with pytest.raises(OSError, match=r"(No space left|encoder error).*map\.png") as caught:
            fail_to_write(target, error)
        assert caught.value.filename == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    assert target.read_text() == "before"


def test_files_that_are_no_images_are_counted(model, tmp_path):
    draw(tmp_path / "in" / "0.png")
    (tmp_path / "in" / "a.txt").touch()
    (tmp_path / "in" / "b.heic").touch()
    result = run("predict", model, tmp_path / "in")
    assert f"note: {tmp_path / 'in'}: left out 2 files, no images: 1 .heic, 1 .txt" in result.stderr
    assert run("predict", model, tmp_path / "in", "-q").stderr == ""
    result = run("fit", tmp_path / "in", "-o", tmp_path / "m.safetensors", *TINY, "--coreset", "2")
    assert "left out 2 files" in result.stderr


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".gif", ".pgm", ".ppm", ".pnm"])
def test_well_known_kinds_are_images(tmp_path, suffix):
    pixels = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 8
    kind = {".jfif": "JPEG", ".jpe": "JPEG", ".gif": "GIF"}.get(suffix, "PPM")
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}", format=kind)
    assert find_images(tmp_path) == [tmp_path / f"a{suffix}"]
    read = read_image(tmp_path / f"a{suffix}")
    assert np.abs(read[:, :, 0].astype(int) - pixels).max() <= (8 if kind == "JPEG" else 0)
    assert suffix in IMAGE_SUFFIXES


def test_a_deep_pgm_keeps_its_levels(tmp_path):
    values = (np.arange(256) * 257).astype(">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 16 16 65535\n" + values.tobytes())
    (tmp_path / "b.pgm").write_bytes(b"P5 16 16 1023\n" + (np.arange(256) * 4).astype(">u2").tobytes())
    assert read_image(tmp_path / "a.pgm")[:, :, 0].ravel().tolist() == list(range(256))
    assert np.abs(read_image(tmp_path / "b.pgm")[:, :, 0].ravel() - np.arange(256.0)).max() <= 1


# --- the terminal ------------------------------------------------------------------------------------------


def test_without_a_command_the_help_is_shown_as_it_is():
    result = run()
    assert result.exit_code == ExitCode.USAGE
    assert result.stdout == ""
    assert result.stderr == run("--help").stdout


@unix
@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["--version"], ["info", "--json"]])
def test_an_output_that_fails_is_no_anomaly_and_no_traceback(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    gone = subprocess.run([*SHELL, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (gone.returncode, gone.stderr) == (ExitCode.FAILURE, "")
    closed = subprocess.run(
        ["sh", "-c", 'exec "$0" "$@" >&-', *SHELL, *arguments], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (closed.returncode, closed.stderr) == (ExitCode.OK, "")
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run([*SHELL, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == ExitCode.FAILURE
        assert done.stderr == "patchcore-rs: error: the output: No space left on device\n"


# --- words that lead to the remedy -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message", "said"),
    [
        ("evaluate", "choose one, such as category='tile'", "choose one, such as --category tile"),
        ("evaluate", "layout='auto' would read it as 'mvtec'", "--layout auto would read it as 'mvtec'"),
        ("fit", "fewer or smaller images (crop=, resize=)", "fewer or smaller images (--crop, --resize)"),
        ("fit", "use backbone='efficientnet_lite0'", "use --backbone efficientnet_lite0"),
        ("fit", "a narrower embedding=", "a narrower --embedding"),
        ("fit", "normalize=True needs", "--normalize needs"),
        ("predict", "set crop= to an exact pair", "set crop= to an exact pair"),
        ("fit", "the score is a=b", "the score is a=b"),
    ],
)  # fmt: skip
def test_messages_name_the_options_of_the_command(command, message, said):
    assert in_shell_words(message, cli.main.commands[command]) == said


def test_a_choice_of_categories_is_said_as_the_shell_says_it(categories):
    line = run("evaluate", categories).stderr
    assert "choose one, such as --category bolt" in line


def test_a_threshold_that_does_not_hold_is_told_with_the_option(model, tmp_path):
    loaded = Detector.load(model)
    loaded.threshold_ = 1.0
    loaded.save(tmp_path / "m.safetensors")
    result = run(
        "fit", model.parent / "good", "-o", tmp_path / "m2.safetensors", "--add-to", tmp_path / "m.safetensors"
    )
    assert "this call makes: give --calibrate\n" in result.stderr


def test_memory_that_a_fit_lacks_is_told_with_the_way_in_parts(tmp_path, monkeypatch):
    draw(tmp_path / "in" / "0.png")
    monkeypatch.setattr("patchcore_rs._limits.available_memory", lambda: 0)
    result = run("fit", tmp_path / "in", "-o", tmp_path / "m.safetensors", *TINY)
    assert result.exit_code == ExitCode.FAILURE
    assert "(--crop, --resize)" in result.stderr
    assert "let fit --add-to learn from the rest in parts" in result.stderr
    with pytest.raises(MemoryError, match="let partial_fit learn from the rest in parts"):
        Detector(backbone="efficientnet_lite0").fit(tmp_path / "in")


def test_a_model_of_own_weights_is_not_told_to_fetch_others(model, tmp_path, monkeypatch):
    def fetch(*_, **__):
        raise WeightsError("cannot fetch the weights of backbone 'x': download them")

    monkeypatch.setattr(extraction, "load_backbone", fetch)
    with pytest.raises(RuntimeError, match=r"m\.safetensors: pass weights=PATH with the weights it was"):
        Detector.load(model)
    result = run("predict", model, model.parent / "good")
    assert result.exit_code == ExitCode.FAILURE
    assert "m.safetensors: pass --weights PATH with the weights it was fitted with; where those were" in result.stderr
    assert "WeightsError" not in result.stderr


def test_info_says_that_a_threshold_was_set_by_hand(model, tmp_path):
    detector = Detector.load(model)
    detector.threshold_ = 12.5
    detector.save(tmp_path / "hand.safetensors")
    assert json.loads(run("info", tmp_path / "hand.safetensors", "--json").stdout)["threshold_origin"] == "hand"


def test_scores_are_not_normalised_by_nothing(model, tmp_path):
    target = tmp_path / "m.safetensors"
    result = run("fit", model.parent / "good", "-o", target, *TINY, "--normalize")
    assert result.exit_code == ExitCode.USAGE
    assert "--normalize needs the scores of flawless images: pass --calibrate DIR too" in result.stderr
    assert not target.exists()


def test_one_image_is_no_range_to_normalise_by(model, tmp_path):
    good = model.parent / "good"
    command = ["fit", good, "-o", tmp_path / "m.safetensors", *TINY, "--normalize", "--calibrate", good / "0.png"]
    result = run(*command)
    assert result.exit_code == ExitCode.USAGE
    assert "--normalize needs at least two images to calibrate with; got one" in result.stderr
    detector = Detector(backbone="efficientnet_lite0", coreset=9, resize=(32, 32), normalize=True).fit(good)
    with pytest.raises(ValueError, match="at least two different scores; got 1 image, with the score"):
        detector.calibrate(draw(tmp_path / "3.png", 3), false_alarm_rate=0)
    assert detector.calibration_ is None
    assert detector.threshold_ is None


def test_a_threshold_set_by_hand_is_not_called_calibrated(model, tmp_path):
    good, page = model.parent / "good", tmp_path / "r.html"
    detector = Detector.load(model).calibrate([draw(tmp_path / f"{i}.png", i) for i in (3, 4, 5)], false_alarm_rate=0)
    said = []
    for by_hand in (False, True):
        if by_hand:
            detector.threshold_ = 1.5
        detector.save(tmp_path / "m.safetensors")
        assert run("predict", tmp_path / "m.safetensors", good, "--report", page).exit_code == ExitCode.OK
        said.append("calibrated on 3 flawless images" in page.read_text("utf-8"))
    assert said == [True, False]


def test_timm_asks_a_hub_that_does_not_answer_once(monkeypatch):
    hub, constants = pytest.importorskip("huggingface_hub"), pytest.importorskip("huggingface_hub.constants")
    offline = []

    def create(*_, **__):
        offline.append(constants.HF_HUB_OFFLINE)
        raise OSError("nothing in the cache")

    class Silent:
        def head(self, *_, **__):
            raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", Silent)
    timm = SimpleNamespace(is_model=lambda _: True, create_model=create)  # importing the real one takes seconds
    monkeypatch.setitem(sys.modules, "timm", timm)
    with pytest.raises(RuntimeError, match=r"cannot build backbone 'timm:resnet18' \(nothing in the cache\)"):
        load_backbone("timm:resnet18")
    assert offline == [True]
    assert constants.HF_HUB_OFFLINE is False
