"""The parts of READMEs that are made from records. Standard library only."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from benches.render import (
    factor,
    fastest,
    figure,
    mean_and_worst,
    searched,
    selected,
    smallest,
    spaced,
    thread_count,
    word,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benches.render import Cell, Row


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


BEGIN, END = _markers("performance")

# The rows that the README shows, by table, size and where the data begin. Some gain much; some are there because they
# gain little: noise leaves nothing to skip, a few patches little to share, and not every stage is ours.
_SHOWN = (
    ("search", "784 x 59 740 x 344", "Lite0"),
    ("search", "784 x 59 740 x 344, k = 9", "Lite0"),
    ("search", "784 x 59 740 x 344", "hardest"),
    ("search", "784 x 59 740 x 344", "foreign"),
    ("search", "729 x 1 600 x 768", "SqueezeNet"),
    ("search", "729 x 16 000 x 768", "SqueezeNet"),
    ("search", "729 x 160 000 x 768", "SqueezeNet"),
    ("search", "784 x 16 000 x 1024", "Gaussian noise"),
    ("search", "2 x 16 000 x 1024", "Gaussian noise"),
    ("coreset", "16 000 of 160 000 x 768", "SqueezeNet"),
    ("coreset", "4 000 of 40 000 x 1024", "Gaussian noise"),
    ("aggregate", "32 images", "EfficientNet-Lite0"),
    ("inspect", "prepare", "Lite0"),
    ("inspect", "whole", "Lite0"),
)
_SIZES: dict[str, Cell] = {
    "search": searched,
    "coreset": selected,
    "aggregate": lambda row: f"{row['images']} images",
    "inspect": word("stage"),
}
_TASKS = {
    "search": "search {}",
    "coreset": "coreset, {}",
    "aggregate": "aggregate {}",
    "inspect": "inspect an image: {}",
}
_INEXACT = ("anomalib", "patchcore-inspection", "patchcore-inspection, streamlined")


def section(records: Mapping[str, dict[str, Any]]) -> str:
    """The README's performance section from records by name: the level in use, all threads."""
    lines, used = [], set()
    for name, size, data in _SHOWN:
        for record_name, record in records.items():
            row = next((row for row in _rows(record, name) if _SIZES[name](row) == size and _data(row, data)), None)
            if row:
                lines.append([_TASKS[name].format(size), row["data"], *_compared(row)])
                used.add(record_name)
                break
    head = (
        "task",
        "data",
        "images",
        "ours: mean / worst",
        "fastest rival: mean / worst",
        "faster",
        "least of any image",
    )
    table = "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))
    # In the order given, which says whose rows are shown where two records have them.
    shown = {name: record for name, record in records.items() if name in used}
    links = ", ".join(f"[{name}](benches/records/{name}.md)" for name in shown)
    places = "; ".join(dict.fromkeys(map(_place, shown.values())))
    return (
        "## Performance\n\n"
        "Beside the fastest rival in the same run, on the same threads, our answers checked first. Search and "
        "inspection run over images of the test set, good ones and every kind of flaw: the mean time of an image and "
        "the worst image, the ratio of the means, and the smallest ratio of any image. Sizes are queries x bank x "
        f"channels, and picks of rows x channels.\n\n{table}\n\n"
        f"Measured on {places}; from the records {links}. Selections marked inexact run in a projection; rivals' are "
        "timed on a share of the picks and scaled. All rivals, one thread, other SIMD levels, hostile data, goals and "
        "how all this is measured: [benches/](benches/README.md)."
    )


def listing(records: Mapping[str, dict[str, Any]]) -> str:
    """A line for each record, for the README of the benches."""
    return "\n".join(
        f"- [{name}](records/{name}.md): {_place(record)}, commit {record['commit'] or 'unknown'}; "
        f"`{record['command']}`"
        for name, record in sorted(records.items())
    )


def replace_section(text: str, made: str, name: str = "performance") -> str:
    """A README with the section between the markers of that name replaced."""
    begin, end = _markers(name)
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the README must have {begin} and {end} once each")
    return pattern.sub(lambda _: f"{begin}\n{made}\n{end}", text)


def _rows(record: dict[str, Any], name: str) -> list[Row]:
    """The rows of a table at the first level of the record, with the most threads; each says its data."""
    runs = [run for run in record["runs"] if run["level"] == record["runs"][0]["level"]]
    found = [(run["threads"], table) for run in runs for table in run["tables"] if table["name"] == name]
    if not found:
        return []
    table = max(found, key=lambda each: each[0])[1]
    return [{"data": table["facts"].get("data"), **row} for row in table["rows"]]


def _data(row: Row, begin: str) -> bool:
    return str(row["data"]).startswith(begin)


def _compared(row: Row) -> tuple[str, str, str, str, str]:
    """How many images, our time, the fastest rival's, the ratio, and the smallest of any image."""
    if "smallest" in row:
        images = spaced(row["images"]) if row["images"] > 1 else ""
        if (beside := row["fastest_ms"]["images"]) != row["images"]:
            images += f", {beside} beside the rival"
        ours, rival = (f"{mean_and_worst(row[key])} ms" for key in ("ours_ms", "fastest_ms"))
        return images, ours, f"{row['fastest']} {rival}", factor(row["ratio"]), smallest(row)
    if "rivals_s" not in row:
        return "", f"{figure(row['ours_ms'])} ms", f"{fastest(row)} ms", factor(row["ratio"]), ""
    rival = min(row["rivals_s"], key=lambda name: row["rivals_s"][name])
    took, inexact = row["rivals_s"][rival], " (inexact)" if rival in _INEXACT else ""
    return "", f"{figure(row['ours_s'])} s", f"{rival} {figure(took)} s{inexact}", factor(took / row["ours_s"]), ""


def _place(record: dict[str, Any]) -> str:
    """Machine, levels, threads and images."""
    machine, runs = record["machine"], record["runs"]
    levels = " and ".join(dict.fromkeys(run["level"] for run in runs))
    threads = " and ".join(dict.fromkeys(thread_count(run["threads"]) for run in runs))
    return f"{machine['cpu']}, {machine['cores']} cores, {levels}, {threads}, {record['data']['images']} images"
