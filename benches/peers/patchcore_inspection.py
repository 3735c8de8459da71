"""patchcore-inspection as it is and with this package's search and sampler inside, by stage.

    python -m benches.peers.patchcore_inspection                             all of it
    python -m benches.peers.patchcore_inspection predict --network lite0     good and bad images, one at a time
    python -m benches.peers.patchcore_inspection fit --network squeezenet    fit and coreset stage on 100 images

`PATCHCORE_INSPECTION` names a checkout of it. Both have the same network, weights, bank and images, and answers are
compared before times. Its coreset is measured for some picks and scaled: a pick takes the same time as the one before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benches.data import CACHE, Array, Features
from benches.images import GOOD, spread
from benches.peers.networks import LAYERS, network, prepare
from benches.timing import interleave, timed
from patchcore_rs.compat import patchcore_inspection as face
from patchcore_rs.images.datasets import find_images

WIDTH, SIDE = 1024, 224  # its own defaults
IMAGES, PICKS, BATCH = 100, (50, 250), 8
ROUNDING = 1e-3  # relative, between float32 answers: FAISS's squared distances cancel
CPU = torch.device("cpu")
PLAIN, OURS = "plain", "ours inside"

Call = Callable[[], object]


def build(name: str, kind: str, threads: int) -> Any:
    """Its PatchCore on that network, with its own search or ours."""
    import patchcore.common
    import patchcore.patchcore
    import patchcore.sampler

    search = patchcore.common.FaissNN if kind == PLAIN else face.FaissNN
    model = patchcore.patchcore.PatchCore(CPU)
    model.load(
        backbone=network(name),
        layers_to_extract_from=list(LAYERS[name]),
        device=CPU,
        input_shape=(3, SIDE, SIDE),
        pretrain_embed_dimension=WIDTH,
        target_embed_dimension=WIDTH,
        featuresampler=patchcore.sampler.IdentitySampler(),
        nn_method=search(False, threads),
    )
    return model


def stages(model: Any, batch: Tensor) -> dict[str, Call]:
    """Each stage as a call of its own on what the one before gave, and the whole."""
    features = np.asarray(model._embed(batch))
    scores, shapes = model.anomaly_scorer.predict([features])[0], model._embed(batch, provide_patch_shapes=True)[1]
    grid = scores.reshape(1, *shapes[0])
    return {
        "embedding": lambda: model._embed(batch),
        "search": lambda: model.anomaly_scorer.predict([features]),
        "map": lambda: model.anomaly_segmentor.convert_to_segmentation(grid),
        "predict": lambda: model.predict(batch),
    }


def agree(models: dict[str, Any], batch: Tensor) -> dict[str, float]:
    """The largest relative differences of scores and maps; AssertionError beyond `ROUNDING`."""
    plain, ours = (models[name].predict(batch) for name in (PLAIN, OURS))
    found = {}
    for part, one, other in zip(("score", "map"), map(np.asarray, plain), map(np.asarray, ours), strict=True):
        found[part] = float(np.abs(one - other).max() / one.max())
        assert found[part] < ROUNDING, (part, found[part])
    return found


def bank_of(model: Any, name: str, count: int | None) -> Array:
    """A bank of a tenth of the patches of so many training images, or of all, selected by our sampler.

    It is kept in a folder that git ignores.
    """
    kept = CACHE / f"patchcore-inspection-{name}-{count or 'all'}.npy"
    if kept.exists():
        bank: Array = np.load(kept)
        return bank
    ready = prepare(name)
    paths = find_images(Path(os.environ["PATCHCORE_BENCH_DATA"], "train"))[:count]
    with torch.no_grad():
        parts = [
            np.asarray(model._embed(torch.cat([ready(path) for path in paths[i : i + BATCH]])))
            for i in range(0, len(paths), BATCH)
        ]
    rows: Array = np.concatenate(parts)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - its sampler draws from it
    bank = face.ApproximateGreedyCoresetSampler(0.1, CPU).run(rows)
    CACHE.mkdir(exist_ok=True)
    np.save(kept, bank)
    return bank


def predict(
    name: str, *, quick: bool, threads: int, images: int = 30, learnt: int | None = None
) -> list[dict[str, Any]]:
    """A row for good and for bad images: milliseconds by stage, an image at a time; `learnt` images make the bank."""
    models = {kind: build(name, kind, threads) for kind in (PLAIN, OURS)}
    took, bank = timed(lambda: bank_of(models[OURS], name, IMAGES // 5 if quick else learnt))
    print(f"{name}: a bank of {len(bank)} rows, {took:.0f} s", file=sys.stderr)
    for model in models.values():
        model.anomaly_scorer.fit([bank])
    chosen, ready = spread(Features(quick=quick).test_images, images), prepare(name)
    batches = [ready(image.source) for image in chosen]
    differences = [agree(models, batch) for batch in batches]
    calls = [
        {f"{kind}: {stage}": call for kind, model in models.items() for stage, call in stages(model, batch).items()}
        for batch in batches
    ]
    best = interleave(calls, quick=quick)
    rows: list[dict[str, Any]] = []
    for label, wanted in (("good", True), ("defective", False)):
        times = [each for each, image in zip(best, chosen, strict=True) if (image.kind == GOOD) == wanted]
        row: dict[str, Any] = {"network": name, "bank": len(bank), "images": f"{len(times)} {label}"}
        for stage in ("embedding", "search", "map", "predict"):
            plain, ours = (median(each[f"{kind}: {stage}"] for each in times) for kind in (PLAIN, OURS))
            row[stage] = f"{plain:.2f} → {ours:.2f} ({plain / ours:.1f}x)"
        least = min(each[f"{PLAIN}: predict"] / each[f"{OURS}: predict"] for each in times)
        row["predict, least of any image"] = f"{least:.1f}x"
        rows.append(row)
    worst = {part: max(each[part] for each in differences) for part in differences[0]}
    return [*rows, {"network": name, "differences": worst}]


def fit(name: str, *, quick: bool, threads: int) -> list[dict[str, Any]]:
    """One row: seconds of the embedding of some images, of the coreset at 10 %, and of both."""
    import patchcore.sampler

    model, ready = build(name, PLAIN, threads), prepare(name)
    count = IMAGES // 10 if quick else IMAGES
    root = Path(os.environ["PATCHCORE_BENCH_DATA"])
    shots = [ready(path) for path in find_images(root / "train")[:count]]
    batches = [torch.cat(shots[i : i + BATCH]) for i in range(0, count, BATCH)]
    model._embed(batches[0])
    embedding, parts = timed(lambda: [model._embed(batch) for batch in batches])
    rows = np.concatenate(parts)
    picks = len(rows) // 10
    ours, chosen = timed(lambda: _select(face, rows, picks))
    few, more = (timed(partial(_select, patchcore.sampler, rows, size)) for size in PICKS)
    same = (more[1] == chosen[: PICKS[1]]).all(axis=1)
    shared = len(same) if same.all() else int(np.argmin(same))
    plain = few[0] + (picks - PICKS[0]) * (more[0] - few[0]) / (PICKS[1] - PICKS[0])
    return [
        {
            "network": name,
            "images": count,
            "rows": len(rows),
            "picks": picks,
            "plain measured for picks": PICKS[1],
            "equal picks": f"{shared} of {PICKS[1]}",
            "embedding": f"{embedding:.2f} s, the same in both",
            "coreset": f"{plain:.2f} s → {ours:.2f} s ({plain / ours:.1f}x)",
            "fit": f"{embedding + plain:.2f} s → {embedding + ours:.2f} s "
            f"({(embedding + plain) / (embedding + ours):.1f}x)",
        }
    ]


def _select(samplers: Any, rows: Array, picks: int) -> Array:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - its sampler draws from it
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):  # its bar
        chosen: Array = samplers.ApproximateGreedyCoresetSampler((picks + 0.5) / len(rows), CPU).run(rows)
    return chosen


def main() -> int:
    """The program; prints JSON at the end."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["predict", "fit", "all"], nargs="?", default="all")
    parser.add_argument("--network", choices=list(LAYERS), help="both if not given")
    parser.add_argument("--images", type=int, default=30, help="test images at least, as many of each kind")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learnt", type=int, help="training images of the bank that is searched, all if not given")
    arguments = parser.parse_args()
    checkout = os.environ.get("PATCHCORE_INSPECTION")
    if not checkout:
        print("PATCHCORE_INSPECTION must name a checkout of patchcore-inspection; nothing is timed", file=sys.stderr)
        return 0
    sys.path.insert(0, str(Path(checkout, "src")))
    torch.set_num_threads(arguments.threads)
    began = perf_counter()
    parts: dict[str, Callable[..., list[dict[str, Any]]]] = {
        "predict": partial(predict, images=arguments.images, learnt=arguments.learnt)
    }
    parts["fit"] = fit
    chosen = parts if arguments.part == "all" else {arguments.part: parts[arguments.part]}
    for part, make in chosen.items():
        for name in [arguments.network] if arguments.network else list(LAYERS):
            rows = make(name, quick=arguments.quick, threads=arguments.threads)
            answer = {"part": part, "threads": arguments.threads, "rows": rows}
            print(json.dumps(answer, indent=1, ensure_ascii=False))
    print(f"{perf_counter() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
