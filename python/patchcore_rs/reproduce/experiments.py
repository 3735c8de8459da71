"""Detectors fitted to categories of a data set and judged there; what is finished is kept in files and not done again.

A category's images pass each backbone once, whatever the number of detectors and ensembles of them: see `cache`. A
result is known by all that decides it: method, arguments, weights, the files of the data set, versions. It is written
as soon as it is there, whole or not at all, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import platform
import shutil
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from patchcore_rs._limits import gigabytes
from patchcore_rs._text import counted, machine
from patchcore_rs._version import LIBRARIES, __version__, installed
from patchcore_rs.backbones.backbone import resolve_device
from patchcore_rs.detector.ivfpq import IVFPQ
from patchcore_rs.evaluation.evaluate import evaluate_detector
from patchcore_rs.evaluation.judging import Metrics
from patchcore_rs.methods.detectors import DETECTORS
from patchcore_rs.methods.ensemble import Ensemble
from patchcore_rs.model.arrays import ENSEMBLE
from patchcore_rs.model.file import whole_file
from patchcore_rs.report.evaluation import EvaluationReport
from patchcore_rs.reproduce.cache import CategoryFolder, MapCache, reserved
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
_WARM = 3  # images, at least, that are inspected before any time is taken


class Reporter(Protocol):
    """Who is told how a run goes."""

    def remark(self, text: str) -> None:
        """A line."""
        ...

    def progress(self, prefix: str = "") -> AbstractContextManager[Progress]:
        """Where calls of (stage, done, total) go, under names that begin with the prefix."""
        ...


@dataclass(frozen=True)
class Part:
    """A detector: its method, its network, and those of its arguments that are not the paper's, by name."""

    method: str
    network: str
    parameters: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Experiment:
    """A detector, or the parts of an ensemble, each of another network."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, network: str, method: str = "patchcore", **parameters: Any) -> Experiment:
        """The experiment with these arguments, in whatever order they come."""
        return cls((Part(method, network, tuple(sorted(parameters.items()))),))

    @classmethod
    def ensemble(cls, members: Iterable[Experiment]) -> Experiment:
        """The detectors of these as one."""
        return cls(tuple(part for member in members for part in member.parts))

    @property
    def networks(self) -> tuple[str, ...]:
        """Those that it needs, each once."""
        return tuple(dict.fromkeys(part.network for part in self.parts))


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

    @property
    def machine(self) -> str:
        """What it runs on and by how many threads, the GPU only where backbones run there."""
        gpu = [torch.cuda.get_device_name(self.device)] if self.device.type == "cuda" else []
        return ", ".join([*filter(None, [_processor(), *gpu]), machine(self.running.get("threads"))])


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
                result = _read(self._path(dataset.name, key), wanted, setup.machine)
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
        # What stays adds up, of what is removed the largest counts; what is there already takes no more.
        stays = largest = taken = peak = 0
        measured: dict[tuple[Any, ...], tuple[str, dict[str, int]]] = {}
        for dataset, experiments in self._work:
            folder = self._folder(dataset)
            size, there = self._cache_size(dataset, experiments, measured)
            peak = max(peak, taken + size - there)
            if folder.kept or self._setup.keep_cache:
                stays, taken = stays + size, taken + size - there
            else:
                largest = max(largest, size)
        if not stays + largest:
            return
        output = self._setup.output
        end = "kept" if not largest else "removed as each category is done"
        end += ", but where an earlier run keeps it" if largest and stays else ""
        reporter.remark(f"the cache of feature maps takes up to {gigabytes(stays + largest)} in {output}, {end}")
        free = shutil.disk_usage(output).free
        if peak > free:
            raise OSError(
                errno.ENOSPC,
                f"the cache of feature maps takes up to {gigabytes(peak)} more, {gigabytes(free)} are free; choose "
                "another --output or fewer tables at once",
                str(output),
            )

    def run(self, reporter: Reporter) -> None:
        """Run what is not finished, one category after the other; what fails takes nothing from the others.

        Raises:
            BlockingIOError: another run works in the output folder.
            OSError: a file of the output cannot be written, or an image is gone.
        """
        if not any(pending for _, pending in self._work):
            return
        with reserved(self._setup.output):
            for dataset, pending in self._work:
                folder = self._folder(dataset)
                if self._setup.keep_cache:
                    folder.keep()
                shared = self._shared(pending)
                for networks in dict.fromkeys(experiment.networks for experiment in pending):
                    mine = {each: wanted for each, wanted in pending.items() if each.networks == networks}
                    caches = self._caches(folder.path, {name: shared[name] for name in networks if name in shared})
                    for number, (experiment, wanted) in enumerate(mine.items(), 1):
                        prefix = f"{dataset.name}, {' + '.join(networks)} {number} of {len(mine)}: "
                        with reporter.progress(prefix) as advance:
                            self._try(dataset, experiment, wanted, caches, advance)
                folder.clear()
            with suppress(OSError):  # not there, or not empty: of other runs
                (self._setup.output / "cache").rmdir()

    def _try(
        self,
        dataset: Dataset,
        experiment: Experiment,
        wanted: Extras,
        caches: Mapping[Part, MapCache],
        progress: Progress,
    ) -> None:
        """Run one and write its result, or note why there is none."""
        on_error = self._setup.on_error
        try:
            detector = self._detector(experiment, caches)
            run = evaluate_detector(detector, dataset, progress=progress, on_error=on_error, pixels="model")
            _require_index(experiment, run)
            seconds = None
            if wanted.timed:
                with ExitStack() as networks:
                    for part in experiment.parts:
                        if part in caches:
                            bypass = self._load(part.network, self._layers([part]))
                            networks.enter_context(caches[part].bypassed(bypass))
                    seconds = _time(detector, dataset, on_error)
        except (ImportError, MemoryError, RuntimeError, ValueError) as error:
            self.failures[dataset.name, experiment] = str(error) or type(error).__name__
            return
        self.results[dataset.name, experiment] = self._write(dataset.name, experiment, run, seconds, wanted)

    def _detector(self, experiment: Experiment, caches: Mapping[Part, MapCache]) -> Detector | Ensemble:
        """An unfitted detector, or an ensemble of such; layers are their backbones'."""
        detectors = []
        for part in experiment.parts:
            layers = self._layers([part])
            backbone = caches[part].view(layers) if part in caches else self._load(part.network, layers)
            constructor: Callable[..., Detector] = DETECTORS[part.method]
            parameters = {name: value for name, value in part.parameters if name != "layers"}
            detectors.append(constructor(backbone=backbone, profile="paper", **self._setup.running, **parameters))
        return detectors[0] if len(detectors) == 1 else Ensemble(detectors)

    def _load(self, name: str, layers: tuple[str, ...]) -> Backbone:
        """A backbone with these layers; the last two are kept: a cache's, and one to measure times with."""
        backbone = self._loaded.pop((name, layers), None)
        if backbone is None:
            backbone = self._setup.networks[name].load(layers, self._setup.device)
        self._loaded = dict([*self._loaded.items()][-1:]) | {(name, layers): backbone}
        return backbone

    # --- the cache ------------------------------------------------------------------------------------------

    def _folder(self, dataset: Dataset) -> CategoryFolder:
        return CategoryFolder(self._setup.output / "cache" / dataset.name)

    def _shared(self, experiments: Iterable[Experiment]) -> dict[str, list[Part]]:
        """By network, the detectors that see images as another one does; all, where the cache is to be kept.

        A member of an ensemble sees its training images twice, the second time for its scale.
        """
        views: dict[Part, tuple[str, tuple[Size, Size]]] = {}
        passes: Counter[tuple[str, tuple[Size, Size]]] = Counter()
        for experiment in experiments:
            for part in experiment.parts:
                views[part] = part.network, self._geometry(part)
                passes[views[part]] += 1 if len(experiment.parts) == 1 else 2
        shared: dict[str, list[Part]] = {}
        for part, view in views.items():
            if self._setup.keep_cache or passes[view] > 1:
                shared.setdefault(part.network, []).append(part)
        return shared

    def _caches(self, folder: Path, shared: Mapping[str, Sequence[Part]]) -> dict[Part, MapCache]:
        """The cache that each of these takes its maps from, one for each network."""
        caches: dict[Part, MapCache] = {}
        for name, parts in shared.items():
            caches |= dict.fromkeys(parts, MapCache(folder, self._load(name, self._layers(parts))))
        return caches

    def _layers(self, parts: Iterable[Part]) -> tuple[str, ...]:
        """All layers that detectors of one network need."""
        own = ((dict(part.parameters), self._setup.networks[part.network].layers) for part in parts)
        return tuple(dict.fromkeys(layer for given, layers in own for layer in given.get("layers", layers)))

    def _geometry(self, part: Part) -> tuple[Size, Size]:
        """The resize and the crop by which its network sees images."""
        network, given = self._setup.networks[part.network], dict(part.parameters)
        return given.get("resize", network.resize), given.get("crop", network.crop)

    def _cache_size(
        self,
        dataset: Dataset,
        experiments: Iterable[Experiment],
        measured: dict[tuple[Any, ...], tuple[str, dict[str, int]]],
    ) -> tuple[int, int]:
        """Bytes of the maps of a category, and of those among them that are there.

        Where a network's are and how large those of an image are is `measured` once.
        """
        folder, images = self._folder(dataset), len(dataset.train) + len(dataset.test)
        total = there = 0
        for name, parts in self._shared(experiments).items():
            layers = self._layers(parts)
            for geometry in dict.fromkeys(map(self._geometry, parts)):
                key = name, layers, geometry
                if key not in measured:
                    backbone = self._load(name, layers)
                    maps = backbone(torch.zeros(1, 3, *seen_size(*geometry), device=self._setup.device))
                    sizes = {layer: 4 * found.numel() for layer, found in zip(layers, maps, strict=True)}
                    measured[key] = MapCache.folder_name(backbone), sizes
                place, sizes = measured[key]
                total += images * sum(sizes.values())
                there += folder.held(place, sizes, images)
        return total, there

    # --- results on disk ------------------------------------------------------------------------------------

    def _key(self, experiment: Experiment, files: str) -> dict[str, Any]:
        """All that decides a result."""
        parts = []
        for part in experiment.parts:
            network = self._setup.networks[part.network]
            parts.append(
                {
                    "method": part.method,
                    "network": network.name,
                    "layers": self._layers([part]),
                    "weights_sha256": network.weights_hash,
                    "parameters": dict(part.parameters),
                }
            )
        return {
            **(parts[0] if len(parts) == 1 else {"method": ENSEMBLE, "members": parts}),
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
            "machine": self._setup.machine,
            "command": self._setup.command,
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return Result(run.metrics, seconds, path.with_suffix(".html") if wanted.pictured else None)


@cache
def versions() -> dict[str, str]:
    """The versions of what computes results."""
    return {"patchcore-rs": __version__, **installed(*LIBRARIES, "faiss-cpu")}


@cache
def _processor() -> str:
    """This machine's CPU; nothing where it has no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # another system
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _require_index(experiment: Experiment, run: Run) -> None:
    """ValueError where the bank was searched exactly since it is too small for the index that the row is about."""
    asked = any(("index", "ivfpq") in part.parameters for part in experiment.parts)
    if asked and run.bank is not None and run.bank[0] < IVFPQ.MINIMUM_ROWS:
        raise ValueError(f"IVFPQ needs a memory bank of at least {IVFPQ.MINIMUM_ROWS} rows; got {run.bank[0]}")


def _read(path: Path, wanted: Extras, machine: str) -> Result | None:
    """The result in a file; None where there is none, or not all that is wanted of it. Times are of this machine."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        interval = record["metrics"]["image_auroc_interval"]
        metrics = Metrics(**record["metrics"] | {"image_auroc_interval": interval and tuple(interval)})
        seconds = record["seconds"] if record["machine"] == machine else None
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


def _time(detector: Detector | Ensemble, dataset: Dataset, on_error: OnError) -> dict[str, float]:
    """Seconds of an image by stage, over all test images, after a whole batch to warm up."""
    images = [sample.path for sample in dataset.test]
    members = detector.members_ if isinstance(detector, Ensemble) else (detector,)
    detector.predict(images[: max(_WARM, *(member.batch_size for member in members))], on_error=on_error)
    before = dict(detector.timings_)
    prediction = detector.predict(images, on_error=on_error)
    spent = {stage: detector.timings_.get(stage, 0.0) - before.get(stage, 0.0) for stage in STAGES}
    return {stage: seconds / len(prediction) for stage, seconds in spent.items()}
