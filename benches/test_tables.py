"""Every table once, small: that it can be made, checks its answers, and can be rendered."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from benches import checks, goals, images, readme, record, render
from benches.data import Features, noise
from benches.images import Image
from benches.rivals import search as rivals
from benches.run import OURS, Run, compare
from benches.tables import coreset, search
from benches.tables.__main__ import PARTS
from benches.timing import exponent, interleave
from patchcore_rs import MemoryBank, build_info

if TYPE_CHECKING:
    from benches.data import Array

ROOT = Path(__file__).resolve().parents[1]


def make(part: str, folder: Path, *options: str) -> dict[str, Any]:
    """The record of a quick run, which must succeed."""
    path = folder / "record.json"
    command = [sys.executable, "-m", "benches.tables", part, "--quick", "--threads", "1", "--output", str(path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = record.read(path)
    assert path.with_suffix(".md").read_text("utf-8") == render.markdown(found)
    assert render.run_markdown(found["runs"][0]) in done.stdout
    return found


@pytest.mark.parametrize("part", PARTS)
def test_part(part: str, tmp_path: Path) -> None:
    found = make(part, tmp_path, "--levels", "best")
    made = found["runs"][0]["tables"]
    assert all(table["rows"] or table["facts"].get("skipped") for table in made)
    text = json.dumps(found) + render.markdown(found) + readme.section({"name": found})
    assert not re.search(r"(?<![\w.~*}])/(work|root|home|tmp|Users)(?![\w.-])", text)
    assert str(Path.home()) not in text


@pytest.mark.skipif("avx2" not in build_info()["simd_available"], reason="no AVX2")
def test_rivals_are_held_to_the_level(tmp_path: Path) -> None:
    found = make("aggregate", tmp_path, "--levels", "avx2")
    in_effect = found["runs"][0]["in_effect"]
    assert in_effect["torch"] == "AVX2"
    assert in_effect.get("FAISS", "AVX2") == "AVX2"
    assert "SkylakeX" not in in_effect.get("openblas", "")


@pytest.mark.parametrize("path", sorted(record.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_the_page_of_a_record_is_what_it_gives(path: Path) -> None:
    assert path.with_suffix(".md").read_text("utf-8") == render.markdown(record.read(path))


def test_the_readme_lists_all_records() -> None:
    found = {path.stem: record.read(path) for path in record.FOLDER.glob("*.json")}
    text = (ROOT / "benches" / "README.md").read_text("utf-8")
    assert readme.replace_section(text, readme.listing(found), "records") == text


def test_goals_are_those_of_cases() -> None:
    assert {*goals.SEARCH_EVERY} <= {*goals.SEARCH} <= {case.key for case in search.CASES}
    assert {*goals.CORESET} == {case.key for case in coreset.CASES}
    assert {*goals.APPROXIMATE} <= {*goals.CORESET}


def test_a_goal_depends_on_the_level() -> None:
    assert goals.at(goals.SEARCH, "squeezenet 1600", "avx512vnni") == 6
    assert goals.at(goals.SEARCH, "squeezenet 1600", "avx512") is None
    assert goals.at(goals.SEARCH, "squeezenet 1600", "neon") is None
    assert goals.at(goals.SEARCH, "lite0 16000", "avx512vnni") is None
    assert goals.judged(6.0, 6.0)["reached"] is True
    assert goals.judged(5.9, 6.0)["reached"] is False
    assert goals.judged(5.9, None)["reached"] is None
    assert goals.judged_every(3.0, 3.0)["every_reached"] is True
    assert goals.judged_every(2.9, 3.0)["every_reached"] is False
    assert goals.judged_every(2.9, None)["every_reached"] is None


def test_calls_take_turns_and_the_best_counts() -> None:
    turns: list[str] = []
    (times,) = interleave([{"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}])
    assert turns[:2] == ["a", "b"]
    assert turns.count("a") == turns.count("b") >= 16
    assert all(0 < took < 1e3 for took in times.values())


def test_passes_go_over_all_images() -> None:
    turns: list[str] = []
    images = [{name: lambda name=name: turns.append(name) for name in names} for names in ("ab", "c", "a")]
    times = interleave(images)
    assert turns[:3] == ["a", "b", "c"]
    assert turns[3:15] == [*"aaabbbccc", *"aaa"]
    assert turns[3:15] * 3 == turns[3:39]
    assert [[*each] for each in times] == [["a", "b"], ["c"], ["a"]]


def test_a_row_compares_the_same_images() -> None:
    times = [
        {OURS: 1.0, "dense": 8.0, "slow": 30.0},
        {OURS: 4.0, "dense": 8.0},
        {OURS: 2.0, "dense": 9.0, "slow": 30.0},
    ]
    row = compare(("good", "fray", "fray"), times)
    assert row["images"] == 3
    assert row["ours_ms"] == {"images": 3, "median": 2, "mean": 7 / 3, "worst": 4}
    assert row["kinds"] == {
        "good": {"images": 1, "median": 1, "mean": 1, "worst": 1},
        "fray": {"images": 2, "median": 3, "mean": 3, "worst": 4},
    }
    assert row["rivals_ms"]["slow"] == {"images": 2, "median": 30, "mean": 30, "worst": 30, "ratio": 20}
    assert (row["fastest"], row["ratio"]) == ("dense", 25 / 7)
    assert (row["smallest"], row["smallest_kind"]) == (2, "fray")


def test_the_smallest_ratio_is_to_any_rival() -> None:
    row = compare(("good", "fray"), [{OURS: 1.0, "a": 4.0, "b": 9.0}, {OURS: 1.0, "a": 4.0, "b": 3.0}])
    assert (row["fastest"], row["ratio"]) == ("a", 4)
    assert (row["smallest"], row["smallest_kind"]) == (3, "fray")


def test_our_answers_are_checked_on_every_image() -> None:
    rows, images = noise(50, 8, 0), noise(30, 8, 1).reshape(3, 10, 8)
    bank = MemoryBank(rows)
    found = [bank.kneighbors(queries) for queries in images]
    assert checks.check_ours(found, images, rows, 1, each=10) >= 27
    assert 3 <= checks.check_ours(found, images, rows, 1) <= 6
    for distances, indices in found:
        farthest = distances[:, 0].argmax()
        indices[farthest, 0] += 1
        with pytest.raises(checks.WrongAnswerError):
            checks.check_ours(found, images, rows, 1, each=1)
        indices[farthest, 0] -= 1


def test_a_slow_dense_rival_runs_on_one_image_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "torch matmul"
    monkeypatch.setattr(search, "seconds", lambda call: 9.0 if "torch_matmul" in call.func.__qualname__ else 1.0)
    match = search.contest(Run(Features(quick=True), 1, "any"), search.Case("lite0", 16_000), rivals.ALL)
    assert slow in rivals.DENSE
    has = [slow in calls for calls in match.calls]
    assert has == [kind not in match.kinds[:i] for i, kind in enumerate(match.kinds)]
    assert all("FAISS flat" in calls for calls in match.calls)


def test_a_rival_that_is_wrong_on_one_image_does_not_count() -> None:
    def wrong(rows: Array, k: int, threads: int) -> rivals.Search:
        right = rivals.torch_matmul(rows, k, threads)
        calls: list[int] = []

        def found(queries: Array) -> rivals.Found:
            calls.append(1)
            distances, indices = right(queries)
            return distances * (1.1 if len(calls) == 3 else 1), indices

        return found

    case = search.Case("lite0", 16_000)
    match = search.contest(Run(Features(quick=True), 1, "any"), case, {"wrong": wrong, **rivals.FLAT})
    assert all([*calls] == [OURS, "FAISS flat"] for calls in match.calls)
    assert match.errors["wrong"] == pytest.approx(0.1, rel=1e-3)


def test_images_are_spread_over_kinds() -> None:
    made = [
        Image(kind, Path(str(i))) for kind, count in (("good", 100), ("fray", 3), ("crack", 20)) for i in range(count)
    ]
    found = images.spread(made)
    assert Counter(image.kind for image in found) == {"good": 10, "fray": 3, "crack": 10}
    assert [str(image.source) for image in found if image.kind == "good"] == [str(10 * i + 5) for i in range(10)]
    assert [image.kind for image in images.spread(made, 1)] == ["good", "fray", "crack"]


def test_generated_images_are_of_every_kind() -> None:
    made = images.test_images(None)
    assert made[0].kind == "good"
    assert Counter(image.kind for image in images.spread(made)) == dict.fromkeys(
        ("good", "hole", "stain", "missing_thread", "thin_thread"), 6
    )


def test_images_of_a_folder_have_its_kinds(tmp_path: Path) -> None:
    for kind in ("blowhole", "good"):
        (tmp_path / "test" / kind).mkdir(parents=True)
        PillowImage.new("L", (8, 8), 7).save(tmp_path / "test" / kind / "0.png")
    made = images.test_images(tmp_path)
    assert [image.kind for image in made] == ["good", "blowhole"]
    assert (made[0].pixels == 7).all()


def test_foreign_images_are_of_every_kind() -> None:
    made = images.foreign_images()
    assert Counter(image.kind for image in made) == dict.fromkeys(("noise", "colours", "metal", "tiles"), 8)
    assert all(image.pixels.shape == (256, 256, 3) and image.pixels.dtype == np.uint8 for image in made)
    assert not np.array_equal(made[0].pixels, made[1].pixels)


def test_a_quick_run_has_a_good_image_and_two_flawed_ones() -> None:
    features = Features(quick=True)
    for which in ("test", "foreign"):
        found = features.images("lite0", which)
        assert len(found.kinds) == len({*found.kinds}) == len(found.patches) == 3
    assert [kind == "good" for kind in features.images("lite0").kinds] == [True, False, False]
    assert features.images("lite0", "hardest").patches.shape == (1, 49, 344)


def test_the_hardest_patches_are_those_farthest_from_the_bank() -> None:
    features = Features(quick=True)
    bank = MemoryBank(features.bank_of_everything())
    hardest = bank.kneighbors(features.images("lite0", "hardest").patches[0])[0]
    others = features.images("lite0").patches.reshape(-1, 344)
    assert hardest.mean() > bank.kneighbors(others)[0].mean()


def test_exponent() -> None:
    assert exponent([10, 100, 1000], [1, 10, 100]) == 1
    assert exponent([10], [1]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0, "0"), (1234.5, "1 230"), (123456, "123 000"), (0.0123, "0.0123"), (1e-7, "1.0e-07")],
)
def test_figures(value: float | None, text: str) -> None:
    assert render.figure(value) == text


def test_the_section_lies_between_its_markers() -> None:
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter"
    replaced = readme.replace_section(text, "new")
    assert replaced == f"before\n{readme.BEGIN}\nnew\n{readme.END}\nafter"
    with pytest.raises(ValueError, match="once each"):
        readme.replace_section("no markers", "new")
