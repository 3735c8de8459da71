"""The demo: a tour from generated images to a report, with nothing to download.

Generates the inspection set, fits one model per surface to its flawless images, inspects the others, and times the
stages beside plain torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patchcore_rs._limits import usable_threads
from patchcore_rs._text import NOTHING, Table, amount, count, machine, share
from patchcore_rs._version import build_info
from patchcore_rs.cli.terminal import Terminal
from patchcore_rs.demo.synthetic import KINDS, SURFACES, generate
from patchcore_rs.evaluation.evaluate import evaluate
from patchcore_rs.evaluation.judging import mean_metric
from patchcore_rs.evaluation.tables import Row
from patchcore_rs.images.layouts import load_dataset
from patchcore_rs.report.evaluation import EvaluationReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from patchcore_rs.demo.comparison import StageTime
    from patchcore_rs.evaluation.judging import Metrics
    from patchcore_rs.images.datasets import Dataset

BACKBONE = "efficientnet_lite0"
CORESET = 0.1
TIMED = "metal"  # one surface is enough to time the stages on


def tour(output: Path, seed: int, threads: int | None, *, as_json: bool, quiet: bool, **sizes: Any) -> None:
    """Run the demo; images and report go to the folder `output`. `sizes` are those of `generate`.

    Raises:
        FileExistsError: `output` holds images of another set.
    """
    terminal = Terminal(quiet=quiet)
    arguments: dict[str, Any] = {"backbone": BACKBONE, "threads": threads}
    with terminal.progress() as advance:
        folders = generate(
            output / "images", seed=seed, progress=lambda done, total: advance("drawing images", done, total), **sizes
        )
    sets = [load_dataset(folder) for folder in folders]
    page = EvaluationReport("three generated surfaces", sections=len(sets))
    rows = []
    for dataset in sets:
        with terminal.progress(f"{dataset.name}: ") as advance:
            [one] = evaluate(dataset, coresets=[CORESET], seeds=[seed], progress=advance, **arguments)
        rows.append(Row.of(one))
        page.add(one, note=f"{SURFACES[dataset.name].capitalize()}.")
    timed = next((dataset for dataset in sets if dataset.name == TIMED), sets[0])
    with terminal.progress() as advance:
        times = _time_stages(timed, seed, threads, advance)

    tables = [quality_table(rows), stage_table(times, timed, threads)]
    report = (output / "report.html").absolute()
    page.write(report, tables)
    if as_json:
        terminal.json(
            {
                "report": str(report),
                "runs": [row.to_json() for row in rows],
                "stages": [time.to_json() for time in times],
                "build": build_info(),
            }
        )
        return
    for table in tables:
        terminal.table(table)
    terminal.say(f"The images, the heat maps and the mistakes: {report}")
    terminal.say(report.as_uri())


def quality_table(rows: Sequence[Row]) -> Table:
    """How well each kind of flaw is found: rows for each surface's kinds and their sum, and the sum of all."""
    known = {(kind.surface, kind.name): kind for kind in KINDS}
    cells: list[tuple[str, ...]] = []
    totals = []
    for row in rows:
        name, metrics = row.category, row.metrics
        cells.append((name, "good", "", count(metrics.good), "", "", "", count(metrics.false_alarms)))
        for kind in sorted(row.kinds, key=lambda each: known[row.category, each.kind].difficulty):
            numbers = (*map(share, (kind.image_auroc, kind.pixel_auroc, kind.pro)), count(kind.missed))
            grade = known[name, kind.kind].grade
            cells.append((name, kind.kind.replace("_", " "), grade, count(kind.images), *numbers))
        totals.append(len(cells))
        cells.append(_sum(name, [metrics]))
    totals.append(len(cells))
    cells.append(_sum("all", [row.metrics for row in rows]))
    return Table(
        "How well each kind of flaw is found",
        ("surface", "flaw", "difficulty", "images", "image\nAUROC", "pixel\nAUROC", "\nPRO", "mis-\nclassified"),
        tuple(cells),
        words=("surface", "flaw", "difficulty"),
        totals=frozenset(totals),
        note=f"{BACKBONE}, greedy coreset {amount(CORESET)}. Each flaw is judged beside the good images of its "
        "surface. Pixels of all its flaws together are harder: what surrounds an obvious flaw outshines a faint one. "
        "Misclassified at the surface's F1-optimal threshold: good images above it, flaws below it.",
    )


def _sum(surface: str, every: Sequence[Metrics]) -> tuple[str, ...]:
    """The row over all flaws of one surface, or of several: mean metrics, summed counts."""
    misclassified = [metrics.misclassified for metrics in every if metrics.misclassified is not None]
    return (
        surface,
        "all",
        "",
        count(sum(metrics.good + metrics.anomalous for metrics in every)),
        share(mean_metric(metrics.image_auroc for metrics in every)),
        share(mean_metric(metrics.pixel_auroc for metrics in every)),
        share(mean_metric(metrics.pro for metrics in every)),
        count(sum(misclassified)) if misclassified else NOTHING,
    )


def stage_table(times: Sequence[StageTime], timed: Dataset, threads: int | None) -> Table:
    """What a stage takes here and in plain torch."""
    from patchcore_rs.demo import comparison as stages

    used = usable_threads(threads)
    return stages.stage_table(times, f"Surface {timed.name}, {used} threads each. {machine()}")


def _time_stages(
    timed: Dataset, seed: int, threads: int | None, progress: Callable[[str, int, int | None], object]
) -> list[StageTime]:
    from patchcore_rs.backbones.load import load_backbone
    from patchcore_rs.demo.comparison import Comparison
    from patchcore_rs.features.extractor import FeatureExtractor

    backbone = load_backbone(BACKBONE, device="cpu")
    extractor = FeatureExtractor(
        backbone,
        resize=backbone.resize,
        crop=backbone.crop,
        embedding=backbone.embedding,
        device="cpu",
        threads=threads,
    )
    test = [sample.path for sample in timed.test]
    comparison = Comparison(extractor, usable_threads(threads))
    return comparison.run(timed.train, test, coreset=CORESET, seed=seed, progress=progress)
