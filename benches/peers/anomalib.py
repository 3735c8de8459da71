"""anomalib's Patchcore, plain and accelerated, by stage.

    python -m benches.peers.anomalib predict --network lite0         predict at 10 %, good and defective images
    python -m benches.peers.anomalib fit --network squeezenet        fit and coreset stage on 100 images
    python -m benches.peers.anomalib small                           tiny banks, k from 1 to 50: what must not be slower

Both models have the same network, weights, bank and images. Answers are compared before times: see `agree`. The plain
coreset is measured for some picks and scaled: its time is a constant, then so much a pick.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benches.data import Array, Features
from benches.images import GOOD, Image, spread
from benches.peers.contests import Call, pair, without_gradients
from benches.peers.networks import LAYERS, network, prepare
from benches.timing import interleave, seconds, timed
from patchcore_rs import MemoryBank
from patchcore_rs.compat.anomalib import accelerate
from patchcore_rs.images.datasets import find_images

if TYPE_CHECKING:
    from collections.abc import Sequence

IMAGES, PICKS = 100, (50, 250)
BATCH = 8
ROUNDING = 1e-3  # relative, between float32 answers: anomalib's own squared distances cancel
PLAIN, OURS = "plain", "accelerated"


def patchcore(name: str) -> Any:
    """anomalib's torch model on that network, without a bank."""
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    return PatchcoreModel(layers=list(LAYERS[name]), backbone=network(name), pre_trained=False).eval()


def both(name: str, bank: Array) -> dict[str, Any]:
    """The two models with that bank."""
    models = {PLAIN: patchcore(name)}
    models[PLAIN].memory_bank = torch.from_numpy(np.ascontiguousarray(bank))
    models[OURS] = accelerate(copy.deepcopy(models[PLAIN]))
    return models


def agree(models: dict[str, Any], batch: Tensor) -> dict[str, float]:
    """The largest relative differences of scores and maps; AssertionError beyond `ROUNDING`."""
    with torch.inference_mode():
        plain, ours = (models[name](batch) for name in (PLAIN, OURS))
    found = {}
    for part in ("pred_score", "anomaly_map"):
        one, other = getattr(plain, part), getattr(ours, part)
        found[part] = float(((one - other).abs() / one.abs().clamp_min(1e-6)).max())
        assert found[part] < ROUNDING, (part, found[part])
    return found


def stages(model: Any, batch: Tensor) -> dict[str, Call]:
    """Each stage as a call of its own on what the one before gave, and the forward pass as a whole."""
    size = batch.shape[-2:]
    features = model.feature_extractor(batch)
    embedding = model.reshape_embedding(_embed(model, features))
    scores, places = (part.reshape(len(batch), -1) for part in model.nearest_neighbors(embedding, 1))
    side = next(iter(features.values())).shape[-2:]
    grid = scores.reshape(len(batch), 1, *side)
    calls: dict[str, Call] = {
        "backbone": lambda: model.feature_extractor(batch),
        "embedding": lambda: model.reshape_embedding(_embed(model, features)),
        "search": lambda: model.nearest_neighbors(embedding, 1),
        "score": lambda: model.compute_anomaly_score(scores, places, embedding),
        "map": lambda: model.anomaly_map_generator(grid, size),
        "predict": lambda: model(batch),
    }
    return {name: without_gradients(call) for name, call in calls.items()}


def host_steps(model: Any, batch: Tensor) -> dict[str, Call]:
    """What anomalib does before and after the model in either case: preparation of 256 x 256 pixels, and judgement."""
    from anomalib.models.image.patchcore.lightning_model import Patchcore

    before, after = Patchcore.configure_pre_processor(tuple(batch.shape[-2:])), Patchcore.configure_post_processor()
    pixels = torch.rand(len(batch), 3, 256, 256)
    with torch.inference_mode():
        found = model(batch)
    calls: dict[str, Call] = {"host: before": lambda: before(pixels), "host: after": lambda: after(found)}
    return {name: without_gradients(call) for name, call in calls.items()}


def _embed(model: Any, features: dict[str, Tensor]) -> Tensor:
    """Pooling and joining as the forward pass does them."""
    from patchcore_rs.compat.anomalib_models import Accelerated, unpooled_maps

    accelerated = isinstance(model, Accelerated)
    if not accelerated:
        pooled = {layer: model.feature_pooler(layer_map) for layer, layer_map in features.items()}
        return _joined(model, pooled)
    with unpooled_maps():
        pooled = {layer: model.feature_pooler(layer_map) for layer, layer_map in features.items()}
        return _joined(model, pooled)


def _joined(model: Any, pooled: dict[str, Tensor]) -> Tensor:
    embedding: Tensor = model.generate_embedding(pooled)
    return embedding


def _chosen(images: Sequence[Image], least: int) -> list[Image]:
    """As many of each kind; a good and a flawed one where two are asked for."""
    found = spread(images, least)
    return (
        [next(each for each in found if (each.kind == GOOD) == good) for good in (True, False)] if least == 2 else found
    )


def predict(name: str, *, images: int, quick: bool) -> list[dict[str, Any]]:
    """A row for good and for defective images: milliseconds by stage, an image at a time."""
    data = Features(quick=quick)
    # A tenth of all rows; SqueezeNet's, 555 498, are a sample: the greedy bank of it has as many as one of them all.
    bank = data.bank_of_everything() if name == "lite0" else data.bank("squeezenet", data.size(55_549))
    models, ready = both(name, bank), prepare(name)
    chosen = _chosen(data.test_images, images)
    batches = [ready(image.source) for image in chosen]
    differences = [agree(models, batch) for batch in batches]
    calls = [
        {f"{kind}: {stage}": call for kind, model in models.items() for stage, call in stages(model, batch).items()}
        | host_steps(models[OURS], batch)
        for batch in batches
    ]
    best = interleave(calls, quick=quick)
    rows = []
    for label, wanted in (("good", True), ("defective", False)):
        times = [each for each, image in zip(best, chosen, strict=True) if (image.kind == GOOD) == wanted]
        row: dict[str, Any] = {"network": name, "bank": len(bank), "images": f"{len(times)} {label}"}
        for stage in ("backbone", "embedding", "search", "score", "map", "predict"):
            plain, ours = (median(each[f"{kind}: {stage}"] for each in times) for kind in (PLAIN, OURS))
            row[stage] = pair(plain, ours, "ms")
        added = sum(median(each[name] for each in times) for name in ("host: before", "host: after"))
        row["host adds"] = f"{added:.3g} ms"
        row["with what the host adds"] = pair(plain + added, ours + added, "ms")
        whole = [(each[f"{PLAIN}: predict"] + added) / (each[f"{OURS}: predict"] + added) for each in times]
        row["with what the host adds, least of any image"] = f"{min(whole):.3g} times"
        rows.append(row)
    worst = {part: max(each[part] for each in differences) for part in differences[0]}
    rows.append({"network": name, "differences": worst})
    tensor = torch.from_numpy(bank)
    built = min(1e3 * seconds(partial(MemoryBank, tensor)) for _ in range(3))
    two = 2 * median(each[f"{PLAIN}: predict"] for each in best)
    rows.append({"network": name, "two images, plain -> the bank built of a tensor": pair(two, built, "ms")})
    return rows


def fit(name: str, *, quick: bool) -> list[dict[str, Any]]:
    """One row: seconds of the embedding of some images, of the coreset at 10 %, and of both."""
    root = Path(os.environ["PATCHCORE_BENCH_DATA"])
    ready = prepare(name)
    count = IMAGES // 10 if quick else IMAGES
    shots = [ready(path) for path in find_images(root / "train")[:count]]
    batches = [torch.cat(shots[i : i + BATCH]) for i in range(0, count, BATCH)]
    plain, ours = patchcore(name).train(), accelerate(patchcore(name)).train()
    took: dict[str, float] = {}
    with torch.no_grad():
        embeddings = {}
        for kind, model in ((PLAIN, plain), (OURS, ours)):
            model(batches[0])
            took[f"{kind} embedding"], parts = timed(partial(_all, model, batches))
            embeddings[kind] = torch.vstack(parts)
    embedding = embeddings[OURS]
    assert torch.allclose(embedding, embeddings[PLAIN], rtol=1e-4, atol=1e-4)
    picks = len(embedding) // 10
    took["accelerated coreset"], chosen = timed(lambda: _select(OURS, embedding, picks))
    few, more = (timed(partial(_select, PLAIN, embedding, size)) for size in PICKS)
    shared = next((i for i, (a, b) in enumerate(zip(more[1], chosen, strict=False)) if a != b), PICKS[1])
    each = (more[0] - few[0]) / (PICKS[1] - PICKS[0])
    took["plain coreset"] = few[0] + (picks - PICKS[0]) * each
    row: dict[str, Any] = {"network": name, "images": count, "rows": len(embedding), "picks": picks}
    row["plain measured for picks"], row["equal picks"] = PICKS[1], f"{shared} of {PICKS[1]}"
    for stage in ("embedding", "coreset"):
        one, other = took[f"{PLAIN} {stage}"], took[f"{OURS} {stage}"]
        row[stage] = pair(one, other, "s")
    one, other = (sum(took[f"{kind} {stage}"] for stage in ("embedding", "coreset")) for kind in (PLAIN, OURS))
    row["fit"] = pair(one, other, "s")
    return [row]


def _all(model: Any, batches: list[Tensor]) -> list[Tensor]:
    return [model(batch) for batch in batches]


def _select(kind: str, embedding: Tensor, picks: int) -> list[int]:
    from anomalib.models.components.sampling.k_center_greedy import KCenterGreedy

    from patchcore_rs.compat import anomalib as face

    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - anomalib's projection draws from it
    sampler = (KCenterGreedy if kind == PLAIN else face.KCenterGreedy)(embedding, picks / len(embedding) + 1e-9)
    chosen: list[int] = sampler.select_coreset_idxs()
    return chosen


def small(*, quick: bool) -> list[dict[str, Any]]:
    """A row for each tiny bank: milliseconds of a forward pass with 1, 9 and 50 neighbours, and of its search alone."""
    rows = []
    for name in ("squeezenet",) if quick else ("squeezenet", "lite0"):
        shot = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        model = patchcore(name).train()
        with torch.no_grad():
            asked, held = model(shot), model(shot.roll(7, -1))
        for size in (10, 100, 700):
            calls: dict[str, Call] = {}
            for k in (1, 9, 50):
                for kind, each in both(name, held[torch.randperm(len(held))[:size]].numpy()).items():
                    each.eval().num_neighbors = k
                    calls[f"{kind}: predict, k = {k}"] = without_gradients(partial(each, shot))
                    if k == 1:
                        calls[f"{kind}: search"] = without_gradients(partial(each.nearest_neighbors, asked, 1))
            best = interleave([calls], quick=quick)[0]
            row: dict[str, Any] = {"network": name, "bank": size}
            for what in dict.fromkeys(call.partition(": ")[2] for call in calls):
                row[what] = pair(best[f"{PLAIN}: {what}"], best[f"{OURS}: {what}"], "ms")
            rows.append(row)
    return rows


def main() -> int:
    """The program; prints rows as they are made, and JSON at the end."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["predict", "fit", "small"])
    parser.add_argument("--network", choices=list(LAYERS), default="lite0")
    parser.add_argument("--images", type=int, default=30, help="test images at least, as many of each kind")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = perf_counter()
    make: Any = {"predict": predict, "fit": fit, "small": small}[arguments.part]
    given = {"name": arguments.network, "images": arguments.images}
    named = {name: given[name] for name in inspect.signature(make).parameters if name in given}
    rows = make(**named, quick=arguments.quick)
    print(
        json.dumps({"part": arguments.part, "threads": arguments.threads, "rows": rows}, indent=1, ensure_ascii=False)
    )
    print(f"{perf_counter() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
