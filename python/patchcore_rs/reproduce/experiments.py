"""Detectors fitted to categories of a data set and judged there; what is finished is kept in files and not done again.

A category's images pass each backbone once, whatever the number of detectors: see `cache`. A result is known by all
that decides it: method, arguments, weights, the files of the data set, versions. It is written as soon as it is there,
whole or not at all, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import platform
import shutil
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from patchcore_rs._limits import gigabytes
from patchcore_rs._text import counted, machine
from patchcore_rs._version import __version__, installed
from patchcore_rs.backbones.backbone import resolve_device
from patchcore_rs.detector.ivfpq import IVFPQ
from patchcore_rs.evaluation.evaluate import evaluate_detector
from patchcore_rs.evaluation.judging import Metrics
from patchcore_rs.methods.detectors import DETECTORS
from patchcore_rs.model.file import whole_file
from patchcore_rs.report.evaluation import EvaluationReport
from patchcore_rs.reproduce.cache import MapCache
from patchcore_rs.reproduce.networks import seen_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from patchcore_rs._types import OnError, Progress
    from patchcore_rs.backbones.backbone import Backbone
    from patchcore_rs.detector.base import Detector
    from patchcore_rs.evaluation.evaluate import Run
    from patchcore_rs.images.datasets import Dataset
    from patchcore_rs.model.profiles import Size
    from patchcore_rs.reproduce.networks import Network

STAGES = ("backbone", "aggregation", "scoring")
_WARM = 3  # images that are inspected before any time is taken
_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "faiss-cpu")


class Reporter(Protocol):
    """Who is told how a run goes."""

    def remark(self, text: str) -> None:
        """A line."""
        ...

    def progress(self, prefix: str = "") -> AbstractContextManager[Progress]:
        """Where calls of (stage, done, total) go, under names that begin with the prefix."""
        ...


@dataclass(frozen=True)
class Experiment:
    """A detector: its method, its network, and those of its arguments that are not the paper's, by name."""

    method: str
    network: str
    parameters: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, network: str, method: str = "patchcore", **parameters: Any) -> Experiment:
        """The experiment with these arguments, in whatever order they come."""
        return cls(method, network, tuple(sorted(parameters.items())))


class Extras(NamedTuple):
    """What is wanted of an experiment besides its metrics: times, and a page with pictures of its mistakes."""

    timed: bool = False
    pictured: bool = False


@dataclass(frozen=True)
class Result:
    """What an experiment gave on a category.

    `seconds` an image by stage and `pictures`, the page of its mistakes, are None where they were not asked for.
    """

    metrics: Metrics
    seconds: Mapping[str, float] | None = None
    pictures: Path | None = None


@dataclass(frozen=True)
class Setup:
    """What is the same for all experiments.

    `output` is the folder of results and caches, `running` are arguments of detectors that say how they run (device,
    threads, batch_size), `command` is what results record as having asked for them.
    """

    output: Path
    networks: Mapping[str, Network]
    running: Mapping[str, Any] = field(default_factory=dict)
    on_error: OnError = "raise"
    keep_cache: bool = False
    command: str = ""

    @property
    def device(self) -> torch.device:
        """Where backbones run."""
        return resolve_device(self.running.get("device", "auto"))


class Runner:
    """Runs experiments on the categories of a data set.

    Attributes:
        results: what is finished, by category and experiment, that of earlier runs too.
        failures: why there is no result, by category and experiment.
    """

    def __init__(self, setup: Setup, experiments: Mapping[Experiment, Extras], datasets: Sequence[Dataset]) -> None:
        """Find what is finished of these experiments."""
        self.results: dict[tuple[str, Experiment], Result] = {}
        self.failures: dict[tuple[str, Experiment], str] = {}
        self._setup = setup
        self._loaded: dict[tuple[str, tuple[str, ...]], Backbone] = {}
        self._work: list[tuple[Dataset, dict[Experiment, Extras]]] = []
        self._keys: dict[tuple[str, Experiment], dict[str, Any]] = {}
        for dataset in datasets:
            files, pending = _digest_of(dataset), {}
            for experiment, wanted in experiments.items():
                key = self._key(experiment, files)
                self._keys[dataset.name, experiment] = key
                result = _read(self._path(dataset.name, key), wanted)
                if result is None:
                    pending[experiment] = wanted
                else:
                    self.results[dataset.name, experiment] = result
            self._work.append((dataset, pending))

    def announce(self, reporter: Reporter) -> None:
        """Say, before any work, what there is to do and how large the cache of maps gets.

        Raises:
            OSError: its disk has not so much room.
        """
        pending = sum(len(pending) for _, pending in self._work)
        done = f", {len(self.results):,} finished earlier" if self.results else ""
        reporter.remark(f"{counted(pending, 'experiment')} to run{done}")
        measured: dict[tuple[Any, ...], int] = {}
        sizes = [self._cache_size(dataset, pending, measured) for dataset, pending in self._work]
        needed = sum(sizes) if self._setup.keep_cache else max(sizes, default=0)
        if not needed:
            return
        output = self._setup.output
        kept = "kept" if self._setup.keep_cache else "removed as each category is done"
        reporter.remark(f"the cache of feature maps takes up to {gigabytes(needed)} in {output}, {kept}")
        there = sum(file.stat().st_size for file in (output / "cache").rglob("*.npy"))
        free = shutil.disk_usage(output).free + there
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"the cache of feature maps takes up to {gigabytes(needed)}, {gigabytes(free)} are free; choose "
                "another --output or fewer tables at once",
                str(output),
            )

    def run(self, reporter: Reporter) -> None:
        """Run what is not finished, one category after the other; what fails takes nothing from the others.

        Raises:
            OSError: a file of the output cannot be written, or an image is gone.
        """
        for dataset, pending in self._work:
            folder = self._setup.output / "cache" / dataset.name
            for name in dict.fromkeys(experiment.network for experiment in pending):
                mine = {experiment: wanted for experiment, wanted in pending.items() if experiment.network == name}
                shared = self._shared(mine)
                cache = MapCache(folder, self._load(name, self._layers(shared))) if shared else None
                for number, (experiment, wanted) in enumerate(mine.items(), 1):
                    with reporter.progress(f"{dataset.name}, {name} {number} of {len(mine)}: ") as advance:
                        self._try(dataset, experiment, wanted, cache if experiment in shared else None, advance)
            if not self._setup.keep_cache:
                shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # not there, or not empty: of other runs
            (self._setup.output / "cache").rmdir()

    def _try(
        self, dataset: Dataset, experiment: Experiment, wanted: Extras, cache: MapCache | None, progress: Progress
    ) -> None:
        """Run one and write its result, or note why there is none."""
        layers, on_error = self._layers([experiment]), self._setup.on_error
        try:
            backbone = self._load(experiment.network, layers) if cache is None else cache.view(layers)
            detector = self._detector(experiment, backbone)
            run = evaluate_detector(detector, dataset, progress=progress, on_error=on_error, pixels="model")
            _require_index(experiment, run)
            seconds = None
            if wanted.timed:
                with nullcontext() if cache is None else cache.bypassed(self._load(experiment.network, layers)):
                    seconds = _time(detector, dataset, on_error)
        except (ImportError, MemoryError, RuntimeError, ValueError) as error:
            self.failures[dataset.name, experiment] = str(error) or type(error).__name__
            return
        self.results[dataset.name, experiment] = self._write(dataset.name, experiment, run, seconds, wanted)

    def _detector(self, experiment: Experiment, backbone: Backbone) -> Detector:
        """An unfitted detector; the layers are the backbone's."""
        constructor: Callable[..., Detector] = DETECTORS[experiment.method]
        parameters = {name: value for name, value in experiment.parameters if name != "layers"}
        return constructor(backbone=backbone, profile="paper", **self._setup.running, **parameters)

    def _load(self, name: str, layers: tuple[str, ...]) -> Backbone:
        """A backbone with these layers; the last two are kept: a cache's, and one to measure times with."""
        backbone = self._loaded.pop((name, layers), None)
        if backbone is None:
            backbone = self._setup.networks[name].load(layers, self._setup.device)
        self._loaded = dict([*self._loaded.items()][-1:]) | {(name, layers): backbone}
        return backbone

    # --- the cache ------------------------------------------------------------------------------------------

    def _shared(self, experiments: Iterable[Experiment]) -> list[Experiment]:
        """Those that see images as another one does; all, where the cache is to be kept."""
        views = {experiment: (experiment.network, self._geometry(experiment)) for experiment in experiments}
        counts = Counter(views.values())
        return [experiment for experiment, view in views.items() if self._setup.keep_cache or counts[view] > 1]

    def _layers(self, experiments: Iterable[Experiment]) -> tuple[str, ...]:
        """All layers that experiments of one network need."""
        own = ((dict(each.parameters), self._setup.networks[each.network].layers) for each in experiments)
        return tuple(dict.fromkeys(layer for given, layers in own for layer in given.get("layers", layers)))

    def _geometry(self, experiment: Experiment) -> tuple[Size, Size]:
        """The resize and the crop by which its network sees images."""
        network, given = self._setup.networks[experiment.network], dict(experiment.parameters)
        return given.get("resize", network.resize), given.get("crop", network.crop)

    def _cache_size(
        self, dataset: Dataset, experiments: Iterable[Experiment], measured: dict[tuple[Any, ...], int]
    ) -> int:
        """Bytes of the maps of a category; those of an image are `measured` once."""
        shared, total = self._shared(experiments), 0
        for name in dict.fromkeys(experiment.network for experiment in shared):
            mine = [experiment for experiment in shared if experiment.network == name]
            layers = self._layers(mine)
            for geometry in {self._geometry(experiment) for experiment in mine}:
                if (name, layers, geometry) not in measured:
                    images = torch.zeros(1, 3, *seen_size(*geometry), device=self._setup.device)
                    maps = self._load(name, layers)(images)
                    measured[name, layers, geometry] = sum(4 * layer_map.numel() for layer_map in maps)
                total += measured[name, layers, geometry]
        return total * (len(dataset.train) + len(dataset.test))

    # --- results on disk ------------------------------------------------------------------------------------

    def _key(self, experiment: Experiment, files: str) -> dict[str, Any]:
        """All that decides a result."""
        network = self._setup.networks[experiment.network]
        return {
            "method": experiment.method,
            "network": network.name,
            "layers": self._layers([experiment]),
            "weights_sha256": network.weights_hash,
            "parameters": dict(experiment.parameters),
            "batch_size": self._setup.running.get("batch_size"),
            "device": self._setup.device.type,
            "on_error": self._setup.on_error,
            "files_sha256": files,
            "versions": versions(),
        }

    def _path(self, category: str, key: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self._setup.output / "results" / category / f"{digest[:24]}.json"

    def _write(
        self, category: str, experiment: Experiment, run: Run, seconds: Mapping[str, float] | None, wanted: Extras
    ) -> Result:
        """Write what a run gave; its result."""
        key = self._keys[category, experiment]
        path = self._path(category, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        if wanted.pictured:
            page = EvaluationReport(category, sections=max(1, len(self._work)))
            page.add(run)
            with whole_file(path.with_suffix(".html")) as temporary:
                page.write(temporary, [])
        record = {
            "category": category,
            **key,
            "settings": run.settings.to_json(),
            "learnt": run.summary,
            "trained_on": run.trained_on,
            "metrics": asdict(run.metrics),
            "seconds": seconds,
            "machine": here(),
            "command": self._setup.command,
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return Result(run.metrics, seconds, path.with_suffix(".html") if wanted.pictured else None)


@cache
def versions() -> dict[str, str]:
    """The versions of what computes results."""
    return {"patchcore-rs": __version__, **installed(*_PACKAGES)}


@cache
def here() -> str:
    """This machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")][:1]
    except OSError:  # another system
        found = [platform.processor()]
    processors = [*found, *([torch.cuda.get_device_name()] if torch.cuda.is_available() else [])]
    return ", ".join([*filter(None, processors), machine()])


def _require_index(experiment: Experiment, run: Run) -> None:
    """ValueError where the bank was searched exactly since it is too small for the index that the row is about."""
    if ("index", "ivfpq") in experiment.parameters and run.bank is not None and run.bank[0] < IVFPQ.MINIMUM_ROWS:
        raise ValueError(f"IVFPQ needs a memory bank of at least {IVFPQ.MINIMUM_ROWS} rows; got {run.bank[0]}")


def _read(path: Path, wanted: Extras) -> Result | None:
    """The result in a file; None where there is none, or not all that is wanted of it. Times are of one machine."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        interval = record["metrics"]["image_auroc_interval"]
        metrics = Metrics(**record["metrics"] | {"image_auroc_interval": interval and tuple(interval)})
        seconds = record["seconds"] if record["machine"] == here() else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # not there, or not what was written
        return None
    pictures = path.with_suffix(".html") if path.with_suffix(".html").exists() else None
    complete = (seconds or not wanted.timed) and (pictures or not wanted.pictured)
    return Result(metrics, seconds, pictures) if complete else None


def _digest_of(dataset: Dataset) -> str:
    """The files of a data set by name, size and time of change, and what is said of them."""
    digest = hashlib.sha256()

    def add(path: Path) -> None:
        found = path.stat()
        digest.update(f"{path.parent.name}/{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())

    for path in dataset.train:
        add(path)
    for sample in dataset.test:
        add(sample.path)
        digest.update(f"{sample.label} {sample.kind} {sample.mask_threshold} {sample.ignore} {sample.part}\n".encode())
        files = sample.mask if isinstance(sample.mask, tuple) else (sample.mask,)
        for mask in files:
            if isinstance(mask, Path):
                add(mask)
            else:  # none, or what a list states
                digest.update(f"{mask}\n".encode())
    return digest.hexdigest()


def _time(detector: Detector, dataset: Dataset, on_error: OnError) -> dict[str, float]:
    """Seconds of an image by stage, over all test images, after a few to warm up."""
    images = [sample.path for sample in dataset.test]
    detector.predict(images[:_WARM], on_error=on_error)
    before = dict(detector.timings_)
    prediction = detector.predict(images, on_error=on_error)
    spent = {stage: detector.timings_.get(stage, 0.0) - before.get(stage, 0.0) for stage in STAGES}
    return {stage: seconds / len(prediction) for stage, seconds in spent.items()}
