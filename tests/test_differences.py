"""The examples of DIFFERENCES.md run as they stand, and every difference it names has the test it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "DIFFERENCES.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
EXAMPLES = {name: re.findall(r"```python\n(.*?)```", section, re.DOTALL) for name, section in SECTIONS.items()}
NEEDS = {"anomalib": "anomalib", "scikit-learn": "sklearn"}


@pytest.mark.parametrize("name", SECTIONS)
def test_example_runs(name, tmp_path, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    for example in EXAMPLES[name]:
        exec(compile(example, f"DIFFERENCES.md: {name}", "exec"), {})


@pytest.mark.parametrize("name", SECTIONS)
def test_there_is_an_example_of_ten_lines_at_most(name):
    assert EXAMPLES[name], name
    for example in EXAMPLES[name]:
        assert len(list(filter(None, example.splitlines()))) <= 10


def test_every_test_that_is_named_is_there():
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    text = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 10
    assert not named - set(re.findall(r"^def (test_\w+)\(", text, re.MULTILINE))


@pytest.mark.parametrize("name", SECTIONS)
def test_every_difference_has_a_test(name):
    table = re.search(r"^\|.*\| test \|\n\|[- |]+\n((?:\|.*\n?)+)", SECTIONS[name], re.MULTILINE)
    assert table, name
    for row in table[1].splitlines():
        assert "`test_" in row.rstrip(" |").rpartition(" | ")[2], row
