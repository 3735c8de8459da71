"""Markdown out of records. Standard library only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benches import goals

if TYPE_CHECKING:
    from collections.abc import Callable

    Row = dict[str, Any]
    Cell = Callable[[Row], str]


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
    return spaced(round(value, -len(str(int(abs(value)))) + digits)) if abs(value) >= 1 else f"{value:.1e}"


def spaced(value: float) -> str:
    """A whole number in groups of three digits."""
    return f"{round(value):,}".replace(",", " ")


def factor(value: float | None) -> str:
    """How many times faster; empty for None."""
    if value is None:
        return ""
    return f"{value:.2f}x" if value < 10 else f"{spaced(value)}x"


def _percent(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def _number(key: str) -> Cell:
    return lambda row: figure(row[key])


def _ratio(key: str) -> Cell:
    return lambda row: factor(row[key])


def _share(key: str, digits: int = 0) -> Cell:
    return lambda row: _percent(row[key], digits)


def _fine_share(key: str) -> Cell:
    """A share that may be very small."""
    return lambda row: f"{figure(100 * row[key], 2)} %"


def word(key: str) -> Cell:
    return lambda row: str(row[key])


def _whole(key: str) -> Cell:
    return lambda row: spaced(row[key])


def _each(key: str, unit: str) -> Cell:
    return lambda row: "; ".join(f"{name} {figure(value)}{unit}" for name, value in row[key].items())


def fastest(row: Row) -> str:
    return f"{row['fastest']} {figure(row['fastest_ms'])}"


def mean_and_worst(times: Row) -> str:
    """Times over images: their mean and the worst; one figure for one image."""
    mean = figure(times["mean"])
    return mean if times["images"] == 1 else f"{mean} / {figure(times['worst'])}"


def _images(key: str) -> Cell:
    """Times over images, with the median."""
    return lambda row: ("" if row["images"] == 1 else f"{figure(row[key]['median'])} / ") + mean_and_worst(row[key])


def _fastest_over(row: Row) -> str:
    return f"{row['fastest']} {_images('fastest_ms')(row)}"


def smallest(row: Row) -> str:
    """The smallest ratio of any image, and what kind of image that is; empty where there is one."""
    return "" if row["images"] == 1 else f"{factor(row['smallest'])} ({row['smallest_kind']})"


def _kinds(row: Row) -> str:
    """How many images there are of each kind, and their times; empty for one image."""
    if row["images"] == 1:
        return ""
    return "; ".join(f"{kind} {found['images']}: {mean_and_worst(found)}" for kind, found in row["kinds"].items())


def _rivals_over(row: Row) -> str:
    """The times of all rivals, on how many images where not on all, and the rivals whose answers were wrong."""
    right = (
        f"{name} {mean_and_worst(times)}" + ("" if times["images"] == row["images"] else f" ({times['images']} images)")
        for name, times in row["rivals_ms"].items()
    )
    wrong = (f"{name} is off by {_percent(row['rival_errors'][name], 1)}" for name in row.get("disagree", ()))
    return "; ".join([*right, *wrong])


def _goal(row: Row) -> str:
    if row["goal"] is None:
        return ""
    return f"≥ {row['goal']:g}x: {_reached(row['reached'])}"


def _goals(row: Row) -> str:
    """Of the mean, and of every image."""
    every = row["every_goal"]
    return _goal(row) + (f"; every image ≥ {every:g}x: {_reached(row['every_reached'])}" if every else "")


def _reached(reached: bool) -> str:
    return "reached" if reached else "**missed**"


def _within(key: str, limit: float) -> Cell:
    """A share that should be at most `limit`."""

    def cell(row: Row) -> str:
        text = _percent(row[key])
        return f"**{text}**" if row[key] is not None and row[key] > limit else text

    return cell


def _forecast(row: Row) -> str:
    return ", ".join(factor(value) if value else "none" for value in row["forecasts"])


def searched(row: Row) -> str:
    k = f", k = {row['k']}" if row["k"] > 1 else ""
    return f"{row['queries']} x {spaced(row['rows'])} x {row['width']}{k}"


def selected(row: Row) -> str:
    return f"{spaced(row['picks'])} of {spaced(row['rows'])} x {row['width']}"


# --- Tables ------------------------------------------------------------------------------------------------

_WHAT: dict[str, Cell] = {"queries x bank x d": searched, "data": word("data")}
_BY_KIND: dict[str, Cell] = {"ours by kind, images: mean / worst, ms": _kinds}
_CORESET: dict[str, Cell] = {
    "picks of rows x d": selected,
    "data": word("data"),
    "ours, s": _number("ours_s"),
    "distances evaluated": _fine_share("evaluated"),
}
_AGAINST: dict[str, Cell] = {
    "anomalib (inexact)": _ratio("ratio"),
    "patchcore-inspection (inexact)": _ratio("approximate_ratio"),
    "naive loop": _ratio("naive_ratio"),
}
_MEASURED = "median / mean / worst image, ms"
_FASTER: dict[str, Cell] = {"faster: means": _ratio("ratio"), "least of any image": smallest}

TABLES: dict[str, tuple[str, dict[str, Cell]]] = {
    "search": (
        "Search: the patches of an image in a memory bank",
        {
            **_WHAT,
            "images": word("images"),
            f"ours: {_MEASURED}": _images("ours_ms"),
            f"fastest rival: {_MEASURED}": _fastest_over,
            **_FASTER,
            "goal": _goals,
            **_BY_KIND,
            "all rivals: mean / worst, ms": _rivals_over,
            "build, ms": _number("build_ms"),
            f"build / {goals.BUILD_IMAGES} rival images": _within("build_share", 1.0),
            "memory over the rows": _within("overhead", goals.OVERHEAD),
        },
    ),
    "search-hostile": (
        "Search: hostile data beside the plain tile of distances, without codes",
        {
            **_WHAT,
            "ours, ms": _number("ours_ms"),
            "plain tile, ms": _number("plain_ms"),
            "faster": _ratio("ratio"),
            "goal": _goal,
        },
    ),
    "float16": (
        "Search: rows stored in float16, exact with respect to what is stored",
        {
            **_WHAT,
            "images": word("images"),
            f"float16: {_MEASURED}": _images("ours_ms"),
            f"float32: {_MEASURED}": _images("fastest_ms"),
            **_BY_KIND,
            "memory of the float32 rows": _within("size", goals.HALF),
        },
    ),
    "ivfpq": (
        'Search: the hand-off to FAISS, `index="ivfpq"`',
        {
            **_WHAT,
            "images": word("images"),
            f"exact: {_MEASURED}": _images("ours_ms"),
            f"IVFPQ: {_MEASURED}": _images("fastest_ms"),
            "exact is faster: means": _ratio("ratio"),
            "least of any image": smallest,
            **_BY_KIND,
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
            **_WHAT,
            "images": word("images"),
            f"ours: {_MEASURED}": _images("ours_ms"),
            **_BY_KIND,
            "ns for a query and a row, mean": _number("per_row_ns"),
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
            "network": word("data"),
            "images": word("images"),
            "d": word("width"),
            "ours, ms": _number("ours_ms"),
            "fastest form of torch, ms": fastest,
            "faster": _ratio("ratio"),
            "goal": _goal,
            "all forms, ms": _each("rivals_ms", ""),
        },
    ),
    "maps": (
        "Anomaly maps, sigma 4",
        {
            "images": word("images"),
            "patches a side": word("grid"),
            "pixels a side": word("size"),
            "ours, ms": _number("ours_ms"),
            "torch, ms": _number("fastest_ms"),
            "faster": _ratio("ratio"),
        },
    ),
    "inspect": (
        "Inspection of an image in memory, from pixels to score and map",
        {
            "stage": word("stage"),
            "images": word("images"),
            f"ours: {_MEASURED}": _images("ours_ms"),
            f"plain torch: {_MEASURED}": _fastest_over,
            **_FASTER,
            **_BY_KIND,
            "all forms of torch: mean / worst, ms": _rivals_over,
        },
    ),
}

_FACTS: dict[str, Callable[[Any], str]] = {
    "exponent": lambda value: f"exponent {value}",
    "exponent_goal": lambda value: f"goal: at most {value:g}",
    "skipped": lambda value: f"skipped: {value}",
    "rival_share": lambda value: f"rivals did one of {value} picks, timed and scaled to all",
    "rival_least": lambda value: f"at least {value}",
    "data": lambda value: f"features: {value}",
    "rows": lambda value: f"bank: {spaced(value)} rows",
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
    head = f"## {run['part']}: {run['level']}, {thread_count(run['threads'])}"
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
        kinds = ", ".join(f"{count} {kind}" for kind, count in data.get("test_images", {}).items())
        tested = f"; test images: {kinds}" if kinds else ""
        head.append(
            f"Images: {data['images']}, {data['training_images']} of them{tested}. SqueezeNet: {data['squeezenet']}."
        )
    return "\n\n".join(head) + "\n\n" + "\n".join(map(run_markdown, record["runs"]))


def _versions(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items())


def thread_count(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")
