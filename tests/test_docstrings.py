"""Docstrings speak one dialect: Google sections, which ruff checks, and Markdown, which this does."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "python" / "patchcore_rs"
# Double backticks (three fence a block), and roles of reStructuredText such as :func:`name`.
FOREIGN = re.compile(r"(?<!`)``(?!`)|:[a-z]+:`")


def docstrings(text):
    """Line and text of every string that stands alone: docstrings, those of attributes too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


@pytest.mark.parametrize("path", sorted({*PACKAGE.rglob("*.py"), *PACKAGE.glob("*.pyi")}), ids=lambda path: path.name)
def test_docstrings_are_written_in_markdown(path):
    name = path.relative_to(PACKAGE).as_posix()
    found = [
        f"{name}:{line} has {FOREIGN.search(text)[0]}"
        for line, text in docstrings(path.read_text("utf-8"))
        if FOREIGN.search(text)
    ]
    assert not found


def test_what_is_foreign_is_found():
    assert [FOREIGN.search(text)[0] for _, text in docstrings('"""See :func:`f`."""\nx: int\n"""A ``b``."""')] == [
        ":func:`",
        "``",
    ]
    assert not FOREIGN.search("Take `x: int` or `:` from `{'a': b}`.")
