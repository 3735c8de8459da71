"""The README's examples run as they stand, and the files it names exist."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from patchcore_rs.demo.synthetic import generate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example, tmp_path, monkeypatch):
    generate(tmp_path / "demo" / "images", train=3, test_good=1, test_per_kind=1)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    if "model" in names:
        assert (tmp_path / "metal.safetensors").stat().st_size > 0
        assert len(names["result"]) == len(names["result"].scores) > 1
    else:
        assert names["distances"].shape == names["indices"].shape == (5000, 3)


def test_there_are_both_kinds_of_example():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_linked_file_exists(name):
    assert (ROOT / name).exists()


def test_the_two_commands_come_first():
    assert README.index("make demo") < README.index("make test") < README.index("```python")


def test_the_performance_section_is_what_its_records_give(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    readme = importlib.import_module("benches.readme")
    section = README.partition(readme.BEGIN)[2].partition(readme.END)[0].strip()
    records = re.findall(r"\]\(benches/records/([^)]+)\.md\)", section)
    assert records
    assert len(re.findall(r"^\| ", section, re.MULTILINE)) == 16, "a head, a rule and fourteen rows"
    found = {name: json.loads((ROOT / "benches" / "records" / f"{name}.json").read_text("utf-8")) for name in records}
    assert readme.replace_section(README, readme.section(found)) == README
