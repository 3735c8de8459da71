"""`reproduce` as one runs it: EfficientNet-Lite0 on a few generated images, and on magnetic tiles where they are."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from reproductions import numbers, read, succeed

from patchcore_rs.demo.synthetic import generate
from patchcore_rs.reproduce.studies import STUDIES

DEFAULT = Path(__file__).parents[2] / "shared" / "data" / "magnetic-tile"
TILES = Path(os.environ.get("PATCHCORE_RS_MAGNETIC_TILE", DEFAULT))
needs_tiles = pytest.mark.skipif(
    not TILES.is_dir(), reason="needs the magnetic tile data set; set PATCHCORE_RS_MAGNETIC_TILE to its folder"
)


def generated(root):
    [category] = generate(root, size=96, train=6, test_good=2, test_per_kind=1, surfaces=["cloth"])
    return category


def few_tiles(root):
    """Six images to learn from, two good ones and one of each kind of flaw to inspect, as links."""
    counts = {"train/good": 6, "test/good": 2}
    for kind in sorted(path.relative_to(TILES) for path in TILES.glob("*/*") if path.is_dir()):
        (root / kind).mkdir(parents=True)
        for file in sorted((TILES / kind).iterdir())[: counts.get(kind.as_posix(), 1)]:
            (root / kind / file.name).symlink_to(file)
    return root


@pytest.mark.filterwarnings("ignore")  # of so few images
@pytest.mark.parametrize("few", [generated, pytest.param(few_tiles, marks=[needs_tiles, pytest.mark.slow])])
def test_every_study_runs_with_a_real_network(few, tmp_path):
    root, output = few(tmp_path / "few"), tmp_path / "out"
    succeed("all", root, "--backbone", "efficientnet_lite0", "--output", output)
    report = read(output, "all")
    assert list(report["studies"]) == list(STUDIES)
    for study, found in report["studies"].items():
        means = [each["ours"] for each in found if each["category"] == "mean" and each["ours"] is not None]
        assert len(means) >= 3, study
        assert all(map(math.isfinite, means))
    assert report["seeds"] == [0, 1, 2]  # of "mtd"


@pytest.mark.slow
@needs_tiles
def test_the_magnetic_tiles_give_the_numbers_of_the_readme(tmp_path):
    succeed("mtd", TILES, "--backbone", "efficientnet_lite0", "--output", tmp_path, "--seed", 0)
    found = numbers(tmp_path, "mtd")
    for share, expected in (("1 %", 97.14), ("10 %", 98.04)):
        key = ("mtd", f"Magnetic tile defects, PatchCore {share}", "seed 0", "mean", "image_auroc")
        assert found[key] == pytest.approx(expected, abs=0.02)
