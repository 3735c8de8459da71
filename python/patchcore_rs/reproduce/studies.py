"""What each subcommand runs: the rows of the paper's tables, and the points of its figures.

A study is groups of rows, a group one table. A row is a detector or an ensemble by its experiments, one a seed, and
what the paper states of it; a row without experiments is cited. Where `x` is set, the group is drawn too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

from patchcore_rs._text import listing
from patchcore_rs.methods.detectors import DETECTORS
from patchcore_rs.model.parameters import METHODS
from patchcore_rs.reproduce import paper
from patchcore_rs.reproduce.experiments import STAGES, Experiment
from patchcore_rs.reproduce.networks import seen_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from patchcore_rs.reproduce.networks import Network

BACKBONE = "wide_resnet50_2"
# What the paper's ensemble is made of, 384 channels each.
MEMBERS = ("wide_resnet101_2", "resnext101_32x8d", "densenet201")
# Networks whose weights are packages, of which sweeps are. Where one of them is asked for alone, they make the ensemble
# together.
PACKAGED = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
OTHERS = ("wide_resnet50_2", "wide_resnet101_2", "resnet50", "resnet18", "resnext101_32x8d", "densenet201")

QUALITY = ("image_auroc", "pixel_auroc", "pro")
_TILE_SEEDS = (0, 1, 2)
_SHARES = (0.25, 0.1, 0.01)
_SIDES = (224, 256, 320)  # of a sweep, beside the network's own


@dataclass(frozen=True)
class Row:
    """A line of a table.

    `paper` is what the paper states by metric, `by_category` the same by category; `missing` says why there are no
    experiments where there should be. `series` and `x` are its place in a chart, `tick` what stands at x in place of
    the number.
    """

    label: str
    experiments: tuple[Experiment, ...] = ()
    paper: Mapping[str, float] = field(default_factory=dict)
    by_category: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    missing: str = ""
    series: str = ""
    x: float | None = None
    tick: str = ""


@dataclass(frozen=True)
class Group:
    """A table of rows; `axis` names x where the group is drawn."""

    title: str
    rows: tuple[Row, ...]
    axis: str = ""
    note: str = ""
    logarithmic: bool = False


@dataclass(frozen=True)
class Study:
    """The tables of a subcommand: their `columns` by the names of metrics, and whether times are among them.

    `by_category` is the metric of a table with a line a category, for studies that have one; the mistakes of
    `pictured` are shown. Rows of a `ranked` study stand in the order of its first column, the best first.
    """

    name: str
    columns: tuple[str, ...]
    groups: tuple[Group, ...]
    by_category: str = ""
    timed: bool = False
    pictured: tuple[Experiment, ...] = ()
    ranked: bool = False

    @property
    def experiments(self) -> tuple[Experiment, ...]:
        """All of its rows, in their order."""
        return tuple(each for group in self.groups for row in group.rows for each in row.experiments)


class Builder:
    """The networks that studies may use, the first asked for being that of all tables, and the seeds asked for."""

    def __init__(
        self,
        networks: Mapping[str, Network],
        missing: Mapping[str, str],
        backbones: Sequence[str],
        seeds: Sequence[int],
        machine: str,
    ) -> None:
        """`missing` says why some networks cannot be had; `backbones` and `seeds` are empty where none are given.

        `machine` is what times are of.
        """
        self.networks, self.missing = networks, missing
        self.backbones, self.seeds, self.machine = tuple(backbones), tuple(seeds), machine
        self.backbone = self.backbones[0] if self.backbones else BACKBONE
        self.note = f"Ours with {self.backbone}, the paper's with WideResNet50 at 224 pixels."

    def row(
        self,
        label: str,
        network: str = "",
        *,
        method: str = "patchcore",
        seeds: Sequence[int] = (),
        paper: Mapping[str, float] | None = None,
        by_category: Mapping[str, Mapping[str, float]] | None = None,
        series: str = "",
        x: float | None = None,
        tick: str = "",
        **parameters: Any,
    ) -> Row:
        """A row that is measured, where its network can be had; parameters are of the method's detector."""
        name = network or self.backbone
        experiments: tuple[Experiment, ...] = ()
        missing = self.missing.get(name, "")
        found = self.networks.get(name)
        if found is not None:
            # What is the same has one name, whoever asks for it.
            usual: dict[str, Any] = {parameter.name: parameter.default for parameter in METHODS[method].values()}
            usual |= {"layers": found.layers, "resize": found.resize, "crop": found.crop}
            try:
                given: dict[str, Any] = {"layers": found.layers_at(DETECTORS[method].strides), **parameters}
            except ValueError as error:
                missing = str(error)
            else:
                chosen = {key: value for key, value in given.items() if value != usual[key]}
                experiments = tuple(
                    Experiment.of(name, method, **chosen | ({"seed": seed} if seed else {}))
                    for seed in seeds or self.seeds or (0,)
                )
        return Row(label, experiments, paper or {}, by_category or {}, missing, series, x, tick)

    def ensemble(self, label: str, members: Mapping[str, Row], stated: Mapping[str, float]) -> tuple[Row, list[str]]:
        """A row of those of these rows, by name, that are measured, as one detector; and the names of those.

        They are two at least, or the row is not measured.
        """
        found = {name: row.experiments for name, row in members.items() if row.experiments}
        if len(found) < 2:
            return Row(label, paper=stated, missing=f"needs two networks; there is {', '.join(found) or 'none'}"), []
        return Row(label, tuple(map(Experiment.ensemble, zip(*found.values(), strict=True))), stated), [*found]

    def at(self, side: int, network: str = "") -> dict[str, Any]:
        """The arguments that show images of another size to a network; none where it cannot be had."""
        found = self.networks.get(network or self.backbone)
        return {} if found is None else found.at(side)


def names_of_networks(studies: Sequence[str], backbones: Sequence[str], *, sweep: bool = False) -> list[str]:
    """The networks that these studies, or sweeps, need, `backbones` in place of the usual ones where they are given."""
    if sweep:
        return list(backbones or PACKAGED)
    wanted = [backbones[0] if backbones else BACKBONE]
    if "backbones" in studies:
        wanted += backbones or OTHERS
    if "table4" in studies:
        wanted += _members(backbones)
    return list(dict.fromkeys(wanted))


def _members(backbones: Sequence[str]) -> Sequence[str]:
    """The networks of table 4's ensemble where these are asked for."""
    if len(backbones) == 1 and backbones[0] in PACKAGED:
        return PACKAGED
    return backbones or MEMBERS


def _percent(share: float | None) -> str:
    return "100 %" if share is None else f"{100 * share:g} %"


def _patchcore(builder: Builder) -> list[Row]:
    """PatchCore with the coresets of tables 1 to 3, and with all patches."""
    rows = [
        builder.row(
            f"PatchCore {_percent(share)}",
            coreset=share,
            paper=paper.PATCHCORE_MEANS[share],
            by_category=paper.PATCHCORE[share],
        )
        for share in _SHARES
    ]
    return [*rows, builder.row("PatchCore 100 %", coreset=None)]


# The rivals that are methods here, by the paper's names. Mahalanobis-AD says whether, not where: it has no maps.
_METHODS = {"SPADE": "spade", "PaDiM": "padim", "Mahalanobis-AD": "mahalanobis"}
_WITHOUT_MAPS = frozenset({"Mahalanobis-AD"})


def _rivals(builder: Builder, metric: str) -> list[Row]:
    """The others of a table: those that are methods here, and what the paper cites of the rest."""
    cited = paper.CITED[metric]
    measured = [name for name in _METHODS if metric == "image_auroc" or name not in _WITHOUT_MAPS]
    rows = []
    for name in dict.fromkeys([*measured, *cited]):
        stated = {metric: cited[name]} if name in cited else {}
        if name in measured:
            rows.append(builder.row(name, method=_METHODS[name], paper=stated))
        else:
            rows.append(Row(f"{name} (cited)", paper=stated))
    return rows


def _quality_table(name: str, title: str, metric: str, *further: str) -> Callable[[Builder], Study]:
    def build(builder: Builder) -> Study:
        group = Group(title, (*_patchcore(builder), *_rivals(builder, metric)), note=builder.note)
        return Study(name, (metric, *further), (group,), by_category=metric)

    return build


def _table4(builder: Builder) -> Study:
    own = [builder.row(f"{builder.backbone}, {side} px", coreset=0.01, **builder.at(side)) for side in (224, 280, 320)]
    members = {
        name: builder.row(f"{name}, 384 channels, 320 px", name, coreset=0.01, embedding=384, **builder.at(320, name))
        for name in _members(builder.backbones)
    }
    ensemble, of = builder.ensemble("ensemble, 384 channels each, 320 px", members, paper.ENSEMBLE_320)
    note = f"The paper's ensemble is of {listing(MEMBERS)}{', ours of ' if of else ''}{listing(of)}."
    group = Group("Table 4: larger images, 1 %", (*own, *members.values(), ensemble), note=note)
    return Study("table4", QUALITY, (group,))


def _table5(builder: Builder) -> Study:
    rows = []
    for suffix, index in (("", "exact"), (" + IVFPQ", "ivfpq")):
        for share in (None, 0.1, 0.01):
            label = f"PatchCore {_percent(share)}{suffix}"
            rows.append(builder.row(label, paper=paper.TIMES.get(label), coreset=share, index=index))
    rows += [builder.row(name, method=_METHODS[name], paper=paper.TIMES[name]) for name in ("SPADE", "PaDiM")]
    columns = ("seconds", *(f"{stage}_ms" for stage in STAGES), *QUALITY)
    note = f"{builder.note} Times are of an image of the test set, reading included, warm, on {builder.machine}"
    group = Group("Table 5: mean time of an image", tuple(rows), note=note)
    return Study("table5", columns, (group,), timed=True)


def _figure4(builder: Builder) -> Study:
    network, own = builder.networks.get(builder.backbone), f"With {builder.backbone}."
    depths = network.depths if network else ()
    layers = [
        builder.row(
            " + ".join(span),
            coreset=0.1,
            layers=span,
            series="PatchCore 10 %",
            x=place,
            tick="+".join(str(1 + depths.index(layer)) for layer in span),
        )
        for place, span in enumerate(_spans(depths))
    ]
    counted_layers = listing([f"{number} is {layer}" for number, layer in enumerate(depths, 1)])
    sizes = [
        builder.row(f"p = {p}", coreset=0.1, patch_size=p, series="PatchCore 10 %", x=p) for p in (1, 3, 5, 7, 9, 11)
    ]
    chosen = [
        builder.row(f"{_percent(share)}, {method}", coreset=share, coreset_method=method, series=method, x=100 * share)
        for method in ("greedy", "random")
        for share in (0.25, 0.1, 0.05, 0.01, 0.001)
    ]
    everything = builder.row("100 %, no selection", coreset=None, series="none", x=100)
    sides = [
        builder.row(f"{side} px", coreset=0.1, series="PatchCore 10 %", x=side, **builder.at(side))
        for side in (160, 224, 280, 320)
    ]
    return Study(
        "figure4",
        (*QUALITY, "misclassified"),
        (
            Group("Figure 4: side p of the neighbourhood, 10 %", tuple(sizes), axis="p", note=own),
            Group(
                "Figure 4: layers, 10 %", tuple(layers), axis="layers", note=f"{own} In the charts {counted_layers}."
            ),
            Group(
                "Section 4.4: patches that the memory bank keeps",
                (*chosen, everything),
                axis="% of all patches",
                note=own,
                logarithmic=True,
            ),
            Group("Section 4.4: size of the images, 10 %", tuple(sides), axis="pixels", note=own),
        ),
        pictured=builder.row("", coreset=0.1).experiments[:1],
    )


def _backbones(builder: Builder) -> Study:
    names = builder.backbones or OTHERS
    rows = [builder.row(name, name, coreset=0.1) for name in names]
    return Study("backbones", (*QUALITY, "misclassified"), (Group("Section 4.4: backbones, 10 %", tuple(rows)),))


def _mtd(builder: Builder) -> Study:
    groups, seeds = [], builder.seeds or _TILE_SEEDS
    for share in (0.01, 0.1):
        stated = {"image_auroc": paper.MAGNETIC_TILES["PatchCore"]}
        rows = [builder.row(f"seed {seed}", coreset=share, seeds=(seed,)) for seed in seeds]
        rows.append(builder.row("mean of the seeds", coreset=share, seeds=seeds, paper=stated))
        rows.append(Row("DifferNet (cited)", paper={"image_auroc": paper.MAGNETIC_TILES["DifferNet"]}))
        groups.append(Group(f"Magnetic tile defects, PatchCore {_percent(share)}", tuple(rows), note=builder.note))
    return Study("mtd", (*QUALITY, "misclassified", "full_recall_false_alarms"), tuple(groups))


def _sweep(builder: Builder) -> Study:
    """Settings to choose among: layers by sizes by standardisation, other settings one at a time, and ensembles."""
    grid, single, together = [], [], []
    whole: dict[str, Row] = {}  # each network on images of its own size
    for name in builder.backbones or PACKAGED:
        network = builder.networks.get(name)
        if network is None:
            grid.append(builder.row(name, name))
            continue
        own = seen_size(network.resize, network.crop)[0]
        sides = sorted({*_SIDES, own})
        for span in _spans(network.layers):
            for side in sides:
                for standardize in (False, True):
                    label = ", ".join([name, "+".join(span), f"{side} px", *(["standardized"] if standardize else [])])
                    grid.append(_whole(builder, label, name, side, layers=span, standardize=standardize))
        others: tuple[dict[str, Any], ...] = (
            *({"patch_size": p} for p in (1, 5)),
            *({"reweight": b} for b in (None, 3)),
            *({"embedding": width} for width in (128, 256, "concat")),
            {"coreset_method": "random"},
        )
        for changed in others:
            words = ", ".join(f"{key} {value}" for key, value in changed.items())
            single.append(_whole(builder, f"{name}, {own} px, {words}", name, own, **changed))
        scales = {f"{side} px": _whole(builder, "", name, side) for side in sides}
        whole[name] = scales[f"{own} px"]
        for chosen in [*combinations(scales, 2), tuple(scales)]:
            members = {scale: scales[scale] for scale in chosen}
            together.append(builder.ensemble(f"{name}, {listing(chosen)}", members, {})[0])
    if len(whole) > 1:
        together.append(builder.ensemble(f"{listing(list(whole))}, each at its own size", whole, {})[0])
    note = "Training images only: a part of them is held out, and has synthetic flaws in copies."
    groups = {"Settings": grid, "One setting changed": single, "Several scales, or networks, as one": together}
    return Study(
        "sweep",
        QUALITY,
        tuple(Group(f"{title}, 1 %", tuple(rows), note=note) for title, rows in groups.items() if rows),
        ranked=True,
    )


def _whole(builder: Builder, label: str, network: str, side: int, **parameters: Any) -> Row:
    """A row of `_sweep`, which sees images whole."""
    return builder.row(label, network, coreset=0.01, resize=(side, side), crop=None, **parameters)


def _spans(layers: Sequence[str]) -> list[tuple[str, ...]]:
    """All runs of neighbouring layers, short ones first."""
    spans = [tuple(layers[i:j]) for i in range(len(layers)) for j in range(i + 1, len(layers) + 1)]
    return sorted(spans, key=len)


STUDIES: Mapping[str, Callable[[Builder], Study]] = {
    "table1": _quality_table(
        "table1",
        "Table 1: image AUROC",
        "image_auroc",
        "misclassified",
        "full_recall_false_alarms",
    ),
    "table2": _quality_table("table2", "Table 2: pixel AUROC", "pixel_auroc"),
    "table3": _quality_table("table3", "Table 3: PRO", "pro"),
    "table4": _table4,
    "table5": _table5,
    "figure4": _figure4,
    "backbones": _backbones,
    "mtd": _mtd,
}
SWEEPS: Mapping[str, Callable[[Builder], Study]] = {"mtd": _sweep}
