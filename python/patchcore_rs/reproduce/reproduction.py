"""One call of `patchcore-rs reproduce`: what is needed is looked for and said, then run, then written."""

from __future__ import annotations

import csv
import json
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from patchcore_rs._text import Table
from patchcore_rs.images.datasets import describe
from patchcore_rs.images.layouts import find_categories, load_dataset
from patchcore_rs.methods.detectors import DETECTORS
from patchcore_rs.model.file import whole_file
from patchcore_rs.reproduce.experiments import Extras, Runner, versions
from patchcore_rs.reproduce.networks import Network
from patchcore_rs.reproduce.page import write_page
from patchcore_rs.reproduce.studies import STUDIES, SWEEPS, Builder, Study, names_of_networks
from patchcore_rs.reproduce.tables import Number, best_row, left_out, numbers, tables_of
from patchcore_rs.reproduce.validation import validation_set

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from patchcore_rs.images.datasets import Dataset
    from patchcore_rs.reproduce.experiments import Experiment, Part, Reporter, Setup


class Reproduction:
    """Studies of one data set.

    Attributes:
        studies: what was asked for.
        categories: their names.
        runner: results and failures.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        setup: Setup,
        reporter: Reporter,
        *,
        categories: Sequence[str] = (),
        backbones: Sequence[str] = (),
        weights_dir: Path | None = None,
        seeds: Sequence[int] = (),
        sweep: bool = False,
    ) -> None:
        """Look for everything that `name`, a study or "all", needs of the data set at `root`, and say what is missing.

        Args:
            name: of `STUDIES`, or "all": each of them, "mtd" where `root` is one data set and no folder of several.
            root: what `load_dataset` takes, or a folder of such.
            setup: without its networks, which are looked for.
            reporter: who is told.
            categories: those of `root` to take; none for all.
            backbones: in place of the paper's; the first is that of all tables.
            weights_dir: where torchvision's weights lie under their own names; None for torch's cache, into which they
                are fetched.
            seeds: of every row, which is the mean over them; none for 0, in "mtd" 0, 1 and 2.
            sweep: choose settings instead, on training images that are held out and synthetic flaws; "mtd" alone.

        Raises:
            ValueError: there is nothing to test on, or no network at all; a sweep of another study.
            OSError: a folder is missing or cannot be written, or its disk is too small.
        """
        if sweep and name not in SWEEPS:
            raise ValueError(f"sweep= is of {', '.join(SWEEPS)} alone; got {name}. Leave it out")
        datasets = _datasets(root, categories, tested=not sweep)
        if sweep:
            folder = setup.output / "validation"
            datasets = [validation_set(each, folder / each.name, 0, setup.on_error) for each in datasets]
        self.name, self.root = f"{name}-sweep" if sweep else name, root
        self.categories = [dataset.name for dataset in datasets]
        chosen = [name] if name != "all" else [each for each in STUDIES if each != "mtd" or len(datasets) == 1]
        for dataset in datasets:
            bare = "" if any(sample.mask for sample in dataset.test) else "; without masks no metric of pixels"
            reporter.remark(f"{dataset.name}: {describe(dataset)}{bare}")
        networks: dict[str, Network] = {}
        missing: dict[str, str] = {}
        for network in names_of_networks(chosen, backbones, sweep=sweep):
            try:
                networks[network] = Network.find(network, weights_dir)
            except (ImportError, RuntimeError, ValueError) as error:
                missing[network] = str(error)
                reporter.remark(f"left out, all of {network}: {error}")
        builder = Builder(networks, missing, backbones, seeds, setup.machine)
        self.studies = [(SWEEPS if sweep else STUDIES)[each](builder) for each in chosen]
        wanted: dict[Experiment, Extras] = {}
        for study in self.studies:
            for experiment in study.experiments:
                timed, pictured = wanted.get(experiment, Extras())
                wanted[experiment] = Extras(timed or study.timed, pictured or experiment in study.pictured)
        if not wanted:
            raise ValueError(
                f"no backbone of {name} can be had; the first: {next(iter(missing.values()))}. Give weights_dir=, the "
                'folder of its weights, or backbone="efficientnet_lite0", whose weights are a package'
            )
        setup.output.mkdir(parents=True, exist_ok=True)
        self._setup = replace(setup, networks=networks)
        self.runner = Runner(self._setup, wanted, datasets)
        self.runner.announce(reporter)

    def run(self, reporter: Reporter) -> None:
        """Run what is not finished; see `Runner.run`."""
        self.runner.run(reporter)

    def tables(self) -> list[Table]:
        """The tables of all studies, as far as there are results, and last that of what is left out."""
        made = []
        for study in self.studies:
            found = self._numbers(study)
            made += [table for group in study.groups for table in tables_of(study, group, found, self.categories)]
        return [*made, *self._left_out_table()]

    def best(self) -> dict[str, str]:
        """The best row of each table of a sweep, by its title; nothing where there is no sweep.

        As the options that `fit` and `evaluate` take, or, where it is an ensemble, as Python.
        """
        best = {}
        for study in self.studies:
            if study.ranked:
                found = self._numbers(study)
                for group in study.groups:
                    row = best_row(study, group, found)
                    if row is not None:
                        best[group.title] = _asked_for(row.experiments[0])
        return best

    def left_out(self) -> list[tuple[str, str]]:
        """Rows that lack a number, with the reason."""
        found = [row for study in self.studies for row in left_out(study, self.runner.failures)]
        return list(dict.fromkeys(found))

    def _left_out_table(self) -> list[Table]:
        rows = tuple(self.left_out())
        return [Table("Left out", ("row", "reason"), rows, words=("row", "reason"))] if rows else []

    def to_json(self) -> dict[str, Any]:
        """Every number with what made it."""
        return {
            "data": str(self.root),
            "categories": self.categories,
            "studies": {study.name: [number._asdict() for number in self._numbers(study)] for study in self.studies},
            "left_out": [{"row": row, "reason": reason} for row, reason in self.left_out()],
            "weights_sha256": {name: network.weights_hash for name, network in self._setup.networks.items()},
            "seeds": self._seeds(),
            "command": self._setup.command,
            "machine": self._setup.machine,
            "versions": versions(),
        }

    def write(self) -> list[Path]:
        """Write the CSV, the JSON and the page of these studies into the output folder; the files."""
        files = [self._setup.output / f"{self.name}{suffix}" for suffix in (".csv", ".json", ".html")]
        with whole_file(files[0]) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["study", *Number._fields])
            for study in self.studies:
                writer.writerows([study.name, *number] for number in self._numbers(study))
        with whole_file(files[1]) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        with whole_file(files[2]) as temporary:
            write_page(
                temporary,
                f"{self.name} on {self.root.absolute().name}",
                self.studies,
                self.runner.results,
                self.categories,
                left_out=self._left_out_table(),
                facts=self._facts(),
                mistakes=self._mistakes(),
            )
        return files

    def _facts(self) -> list[tuple[str, str]]:
        """How the page was made."""
        return [
            ("Data", f"{self.root.absolute().name}: {', '.join(self.categories)}"),
            *((name, f"weights {network.weights_hash[:16]}") for name, network in self._setup.networks.items()),
            ("Seeds", ", ".join(map(str, self._seeds()))),
            ("Command", self._setup.command),
            ("Machine", self._setup.machine),
            ("Versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
        ]

    def _mistakes(self) -> list[str]:
        """The pages that picture mistakes, from the output folder."""
        pages = [result.pictures for result in self.runner.results.values() if result.pictures]
        return [page.relative_to(self._setup.output).as_posix() for page in pages]

    def _seeds(self) -> list[int]:
        """Those of all detectors; 0 is the one that they have by default."""
        experiments = [experiment for study in self.studies for experiment in study.experiments]
        return sorted({dict(part.parameters).get("seed", 0) for each in experiments for part in each.parts})

    def _numbers(self, study: Study) -> list[Number]:
        return numbers(study, self.runner.results, self.categories)


def _asked_for(experiment: Experiment) -> str:
    """An experiment as one asks for it: the options of the command line, or an ensemble in Python."""
    if len(experiment.parts) == 1:
        return _options(experiment.parts[0])
    members = []
    for part in experiment.parts:
        given = {"backbone": part.network, **dict(part.parameters)}
        words = ", ".join(f"{name}={value!r}" for name, value in given.items())
        members.append(f"{DETECTORS[part.method].__name__}({words})")
    return f"Ensemble([{', '.join(members)}])"


def _options(part: Part) -> str:
    """The arguments of a detector as the command line takes them."""
    words = ["--backbone", part.network]
    for name, value in part.parameters:
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [option] if value else []
        elif isinstance(value, tuple):
            words += [option, ("x" if name in ("resize", "crop") else ",").join(map(str, value))]
        else:
            words += [option, "none" if value is None else str(value)]
    return shlex.join(words)


def _datasets(root: Path, categories: Sequence[str], *, tested: bool) -> list[Dataset]:
    """The categories of a folder that are asked for, else all of them; the folder itself where it has none."""
    found = find_categories(root) if root.is_dir() else []
    names: list[str | None] = [*(categories or found)]
    datasets = [load_dataset(root, category=name) for name in names or [None]]
    for dataset in datasets:
        if tested and not dataset.test:
            raise ValueError(f"{root}: {dataset.name} has no test images to judge by")
    return datasets
