"""What the tests of `reproduce` share: the command, what it wrote, and a data set of many categories."""

from __future__ import annotations

import json

from click.testing import CliRunner
from small_networks import write_category

from patchcore_rs.cli import main as cli
from patchcore_rs.reproduce import paper


def run(*arguments):
    return CliRunner().invoke(cli.main, ["reproduce", *map(str, arguments)])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def read(output, name):
    return json.loads((output / f"{name}.json").read_text("utf-8"))


def numbers(output, name):
    """Ours by study, group, row, category and metric."""
    return {
        (study, each["group"], each["row"], each["category"], each["metric"]): each["ours"]
        for study, found in read(output, name)["studies"].items()
        for each in found
    }


def write_mvtec(root):
    """The categories of MVTec AD in small."""
    for seed, name in enumerate(paper.CATEGORIES):
        write_category(root / name, 10 * seed)
    return root
