"""Every table once, small: that it can be made, checks its answers, and can be rendered."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benches import goals, record, render
from benches.tables import coreset, search
from benches.tables.__main__ import PARTS
from benches.timing import exponent, interleave
from patchcore_rs import build_info

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
    text = json.dumps(found) + render.markdown(found) + render.section({"name": found})
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
    assert render.replace_section(text, render.listing(found), "records") == text


def test_goals_are_those_of_cases() -> None:
    assert {*goals.SEARCH} <= {case.key for case in search.CASES}
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


def test_calls_take_turns_and_the_best_counts() -> None:
    turns: list[str] = []
    times = interleave({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")})
    assert turns[:2] == ["a", "b"]
    assert turns.count("a") == turns.count("b") >= 16
    assert all(0 < took < 1e3 for took in times.values())


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
    text = f"before\n{render.BEGIN}\nold\n{render.END}\nafter"
    replaced = render.replace_section(text, "new")
    assert replaced == f"before\n{render.BEGIN}\nnew\n{render.END}\nafter"
    with pytest.raises(ValueError, match="once each"):
        render.replace_section("no markers", "new")
