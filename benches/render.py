"""Markdown out of records: one as a whole, and the README's performance section. Standard library only."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from benches import goals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Row = dict[str, Any]
    Cell = Callable[[Row], str]


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


BEGIN, END = _markers("performance")


# --- Cells -------------------------------------------------------------------------------------------------


def figure(value: float | None, digits: int = 3) -> str:
    """A number with three significant digits, never in powers of ten; empty for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text
    return _spaced(round(value, -len(str(int(abs(value)))) + digits)) if abs(value) >= 1 else f"{value:.1e}"


def _spaced(value: float) -> str:
    """A whole number in groups of three digits."""
    return f"{round(value):,}".replace(",", " ")


def _times(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}x" if value < 10 else f"{_spaced(value)}x"


def _percent(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def _number(key: str) -> Cell:
    return lambda row: figure(row[key])


def _ratio(key: str) -> Cell:
    return lambda row: _times(row[key])


def _share(key: str, digits: int = 0) -> Cell:
    return lambda row: _percent(row[key], digits)


def _fine_share(key: str) -> Cell:
    """A share that may be very small."""
    return lambda row: f"{figure(100 * row[key], 2)} %"


def _word(key: str) -> Cell:
    return lambda row: str(row[key])


def _whole(key: str) -> Cell:
    return lambda row: _spaced(row[key])


def _each(key: str, unit: str) -> Cell:
    return lambda row: "; ".join(f"{name} {figure(value)}{unit}" for name, value in row[key].items())


def _fastest(row: Row) -> str:
    return f"{row['fastest']} {figure(row['fastest_ms'])}"


def _rivals(row: Row) -> str:
    """The times of all rivals, and those whose answers were wrong."""
    wrong = (f"{name} is off by {_percent(row['rival_errors'][name], 1)}" for name in row["disagree"])
    return "; ".join([_each("rivals_ms", "")(row), *wrong])


def _goal(row: Row) -> str:
    if row["goal"] is None:
        return ""
    return f"≥ {row['goal']:g}x: " + ("reached" if row["reached"] else "**missed**")


def _within(key: str, limit: float) -> Cell:
    """A share that should be at most `limit`."""

    def cell(row: Row) -> str:
        text = _percent(row[key])
        return f"**{text}**" if row[key] is not None and row[key] > limit else text

    return cell


def _forecast(row: Row) -> str:
    return ", ".join(_times(value) if value else "none" for value in row["forecasts"])


def _searched(row: Row) -> str:
    k = f", k = {row['k']}" if row["k"] > 1 else ""
    return f"{row['queries']} x {_spaced(row['rows'])} x {row['width']}{k}"


def _selected(row: Row) -> str:
    return f"{_spaced(row['picks'])} of {_spaced(row['rows'])} x {row['width']}"


# --- Tables ------------------------------------------------------------------------------------------------

_SEARCH: dict[str, Cell] = {
    "queries x bank x d": _searched,
    "data": _word("data"),
    "ours, ms": _number("ours_ms"),
    "fastest rival, ms": _fastest,
    "faster": _ratio("ratio"),
}
_CORESET: dict[str, Cell] = {
    "picks of rows x d": _selected,
    "data": _word("data"),
    "ours, s": _number("ours_s"),
    "distances evaluated": _fine_share("evaluated"),
}
_AGAINST: dict[str, Cell] = {
    "anomalib (inexact)": _ratio("ratio"),
    "patchcore-inspection (inexact)": _ratio("approximate_ratio"),
    "naive loop": _ratio("naive_ratio"),
}
_INSPECT: dict[str, Cell] = {
    "stage": _word("stage"),
    "ours, ms": _number("ours_ms"),
    "plain torch, ms": _number("fastest_ms"),
    "faster": _ratio("ratio"),
}

TABLES: dict[str, tuple[str, dict[str, Cell]]] = {
    "search": (
        "Search: the patches of an image in a memory bank",
        {
            **_SEARCH,
            "goal": _goal,
            "all rivals, ms": _rivals,
            "build, ms": _number("build_ms"),
            f"build / {goals.BUILD_IMAGES} rival images": _within("build_share", 1.0),
            "memory over the rows": _within("overhead", goals.OVERHEAD),
        },
    ),
    "search-hostile": (
        "Search: hostile data beside the plain tile of distances, without codes",
        {
            "queries x bank x d": _searched,
            "data": _word("data"),
            "ours, ms": _number("ours_ms"),
            "plain tile, ms": _number("plain_ms"),
            "faster": _ratio("ratio"),
            "goal": _goal,
        },
    ),
    "float16": (
        "Search: rows stored in float16, exact with respect to what is stored",
        {
            "queries x bank x d": _searched,
            "data": _word("data"),
            "float16, ms": _number("ours_ms"),
            "float32, ms": _number("float32_ms"),
            "memory of the float32 rows": _within("size", goals.HALF),
        },
    ),
    "ivfpq": (
        'Search: the hand-off to FAISS, `index="ivfpq"`',
        {
            "queries x bank x d": _searched,
            "data": _word("data"),
            "exact, ms": _number("ours_ms"),
            "IVFPQ, ms": _number("ivfpq_ms"),
            "exact is faster": _ratio("ratio"),
            "recall@1": _share("recall", 1),
            "mean distance error": _share("error", 2),
            "build, ms": _number("build_ms"),
        },
    ),
    "coreset": (
        "Coreset: the exact greedy sequence; how many times faster than each rival",
        {
            **_CORESET,
            **_AGAINST,
            "goal (anomalib)": _goal,
            "rivals, s": _each("rivals_s", ""),
            "picks that rivals did": _whole("rival_picks"),
        },
    ),
    "coreset-hostile": (
        "Coreset: hostile data beside the naive loop in float32",
        {**_CORESET, "naive, s": _number("naive_s"), "faster": _ratio("ratio"), "goal": _goal},
    ),
    "coreset-projected": (
        "Coreset: in a projection to 128 channels",
        {
            **_CORESET,
            "projected, s": _number("projected_s"),
            "distances evaluated, projected": _fine_share("projected_evaluated"),
            "projected is faster": _ratio("ratio"),
            "goal": _goal,
        },
    ),
    "search-curve": (
        "Search time by rows of the bank",
        {
            "queries x bank x d": _searched,
            "data": _word("data"),
            "ours, ms": _number("ours_ms"),
            "ns for a query and a row": _number("per_row_ns"),
        },
    ),
    "coreset-by-rows": ("Selection time by rows", _CORESET),
    "coreset-by-picks": ("Selection time by picks", _CORESET),
    "scale": (
        "Selection from many rows",
        {
            **_CORESET,
            "peak memory of the process / features": _ratio("memory"),
            "time forecast at a tenth, half of the picks / taken": _forecast,
        },
    ),
    "aggregate": (
        "Aggregation: 3 x 3 neighbourhoods",
        {
            "network": _word("data"),
            "images": _word("images"),
            "d": _word("width"),
            "ours, ms": _number("ours_ms"),
            "fastest form of torch, ms": _fastest,
            "faster": _ratio("ratio"),
            "goal": _goal,
            "all forms, ms": _each("rivals_ms", ""),
        },
    ),
    "maps": (
        "Anomaly maps, sigma 4",
        {
            "images": _word("images"),
            "patches a side": _word("grid"),
            "pixels a side": _word("size"),
            "ours, ms": _number("ours_ms"),
            "torch, ms": _number("fastest_ms"),
            "faster": _ratio("ratio"),
        },
    ),
    "inspect": ("Inspection of an image in memory, from pixels to score and map", _INSPECT),
}

_FACTS: dict[str, Callable[[Any], str]] = {
    "exponent": lambda value: f"exponent {value}",
    "exponent_goal": lambda value: f"goal: at most {value:g}",
    "skipped": lambda value: f"skipped: {value}",
    "rival_share": lambda value: f"rivals did one of {value} picks, timed and scaled to all",
    "rival_least": lambda value: f"at least {value}",
    "data": lambda value: f"features: {value}",
    "rows": lambda value: f"bank: {_spaced(value)} rows",
}


def table_markdown(table: dict[str, Any]) -> str:
    """A table with its title and what holds for all of it."""
    title, columns = TABLES[table["name"]]
    facts = ", ".join(say(table["facts"][name]) for name, say in _FACTS.items() if table["facts"].get(name) is not None)
    parts = [f"**{title}**" + (f" ({facts})" if facts else "")]
    if table["rows"]:
        parts.append(_grid(columns, table["rows"]))
    return "\n\n".join(parts)


def _grid(columns: dict[str, Cell], rows: list[Row]) -> str:
    lines = [[*columns], ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- Records -----------------------------------------------------------------------------------------------


def run_markdown(run: dict[str, Any]) -> str:
    """The tables of one process, and the environment it had."""
    head = f"## {run['part']}: {run['level']}, {_threads(run['threads'])}"
    environment = " ".join(f"{name}={value}" for name, value in run["environment"].items())
    note = f"Took {run['seconds']} s; load at the start {run['load'][0]:g}. Environment: `{environment}`."
    used = ", ".join(f"{name} {value}" for name, value in run["in_effect"].items())
    return "\n\n".join([head, f"{note} In effect: {used}.", *map(table_markdown, run["tables"])]) + "\n"


def markdown(record: dict[str, Any]) -> str:
    """All of a record."""
    machine = record["machine"]
    head = [
        f"# Tables of {record['date'][:10]}",
        f"`{record['command']}`" + (" (quick: sizes are a sixteenth, times mean nothing)" if record["quick"] else ""),
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB, {machine['system']}; load at the "
        f"start {record['load'][0]:g}; commit {record['commit'] or 'unknown'}.",
        f"Flags: {' '.join(machine['flags'])}.",
        f"Versions: {_versions(record)}.",
    ]
    if data := record.get("data"):
        head.append(f"Images: {data['images']}, {data['training_images']} of them. SqueezeNet: {data['squeezenet']}.")
    return "\n\n".join(head) + "\n\n" + "\n".join(map(run_markdown, record["runs"]))


# --- READMEs -----------------------------------------------------------------------------------------------

# The rows that the README shows, by table, size and where the data begin. Some gain much; some are there because they
# gain little: noise leaves nothing to skip, a few patches little to share, and not every stage is ours.
_SHOWN = (
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
    "search": _searched,
    "coreset": _selected,
    "aggregate": lambda row: f"{row['images']} images",
    "inspect": _word("stage"),
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
    head = ("task", "data", "ours", "fastest rival", "faster")
    table = "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))
    # In the order given, which says whose rows are shown where two records have them.
    shown = {name: record for name, record in records.items() if name in used}
    links = ", ".join(f"[{name}](benches/records/{name}.md)" for name in shown)
    places = "; ".join(dict.fromkeys(map(_place, shown.values())))
    return (
        "## Performance\n\n"
        "Beside the fastest rival in the same run, on the same threads, our answers checked first. Sizes are queries x "
        f"bank x channels, and picks of rows x channels.\n\n{table}\n\n"
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


def _compared(row: Row) -> tuple[str, str, str]:
    """Our time, the fastest rival's, and the ratio."""
    if "rivals_s" not in row:
        return f"{figure(row['ours_ms'])} ms", f"{_fastest(row)} ms", _times(row["ratio"])
    rival = min(row["rivals_s"], key=lambda name: row["rivals_s"][name])
    took, inexact = row["rivals_s"][rival], " (inexact)" if rival in _INEXACT else ""
    return f"{figure(row['ours_s'])} s", f"{rival} {figure(took)} s{inexact}", _times(took / row["ours_s"])


def _place(record: dict[str, Any]) -> str:
    """Machine, levels, threads and images."""
    machine, runs = record["machine"], record["runs"]
    levels = " and ".join(dict.fromkeys(run["level"] for run in runs))
    threads = " and ".join(dict.fromkeys(_threads(run["threads"]) for run in runs))
    return f"{machine['cpu']}, {machine['cores']} cores, {levels}, {threads}, {record['data']['images']} images"


def _versions(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items())


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")
