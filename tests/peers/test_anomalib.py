"""What anomalib's classes promise, asked of the accelerated ones, beside anomalib's own. Needs anomalib."""

import copy
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("anomalib", reason="needs anomalib: make test-peers")
pytestmark = pytest.mark.filterwarnings("ignore")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from anomalib.models.components.sampling.k_center_greedy import KCenterGreedy
    from anomalib.models.image.patchcore import torch_model
    from anomalib.models.image.patchcore.anomaly_map import AnomalyMapGenerator

from anomalib_models import (
    BACKBONE,
    LAYERS,
    images,
    in_float64,
    outcome,
    patchcore,
    plain,
    present,
    same,
    seed_all,
    states,
    subsample,
    traced,
)
from imagenet import GOOD, TESTS, network, prepared
from imagenet import LAYERS as IMAGENET

from patchcore_rs.compat import anomalib as face
from patchcore_rs.compat.anomalib import accelerate

# --- selection ----------------------------------------------------------------------------------------------


def rows(count=400, width=32, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def select(kind, embedding, ratio):
    seed_all()
    return kind(embedding=embedding, sampling_ratio=ratio).select_coreset_idxs()


@pytest.mark.parametrize(("count", "width", "ratio"), [(400, 32, 0.1), (1000, 152, 0.05), (150, 4, 0.5), (50, 8, 0.02)])
def test_the_picks_are_those_of_anomalib(count, width, ratio):
    embedding = rows(count, width)
    assert select(face.KCenterGreedy, embedding, ratio) == select(KCenterGreedy, embedding, ratio)


def test_the_generators_are_left_as_anomalib_leaves_them():
    embedding = rows()
    select(KCenterGreedy, embedding, 0.1)
    expected = states()
    select(face.KCenterGreedy, embedding, 0.1)
    assert states() == expected


def test_the_start_is_drawn_by_torch_at_call_time(monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(7))
    assert select(face.KCenterGreedy, rows(100), 0.1) == select(KCenterGreedy, rows(100), 0.1)


@pytest.mark.parametrize("ratio", [0.1, 0.9, 1.0])
def test_rows_are_distinct_and_as_many_as_asked_for_among_equal_ones(ratio):
    embedding = rows(6)[torch.arange(120) % 6]
    picks = select(face.KCenterGreedy, embedding, ratio)
    assert len(set(picks)) == len(picks) == int(120 * ratio)
    assert all(type(pick) is int and 0 <= pick < 120 for pick in picks)
    # From 2.4 on the start is one of the picks; before, it is what the first pick is far from.
    assert len(embedding[picks[:6]].unique(dim=0)) >= 5


def test_an_embedding_of_three_dimensions_is_selected_from_as_by_anomalib():
    embedding = rows(200).reshape(200, 4, 8)
    assert select(face.KCenterGreedy, embedding, 0.2) == select(KCenterGreedy, embedding, 0.2)


@pytest.mark.parametrize("ratio", [0.001, 0.0, -0.1, 1.5])
def test_a_size_out_of_range_comes_to_what_it_does_in_anomalib(ratio):
    embedding = rows(60)
    expected = outcome(lambda: select(KCenterGreedy, embedding, ratio))
    assert outcome(lambda: select(face.KCenterGreedy, embedding, ratio)) == expected


@pytest.mark.parametrize(
    "change", [torch.Tensor.double, torch.Tensor.half, lambda e: e.index_fill(0, torch.tensor([3]), torch.nan)]
)
def test_other_values_are_selected_from_by_anomalib_itself(change):
    embedding = change(rows(80))
    expected = outcome(lambda: select(KCenterGreedy, embedding, 0.1))
    assert same(outcome(lambda: select(face.KCenterGreedy, embedding, 0.1)), expected)


def test_the_coreset_is_made_of_unprojected_rows():
    embedding = rows()
    seed_all()
    coreset = face.KCenterGreedy(embedding=embedding, sampling_ratio=0.1).sample_coreset()
    assert torch.equal(coreset, embedding[select(KCenterGreedy, embedding, 0.1)])


def test_single_steps_are_those_of_anomalib():
    samplers = [kind(embedding=rows(), sampling_ratio=0.1) for kind in (KCenterGreedy, face.KCenterGreedy)]
    for sampler in samplers:
        sampler.features = sampler.embedding
        sampler.reset_distances()
        try:
            sampler.update_distances(5)
        except TypeError:  # before 2.2
            sampler.update_distances([5])
    assert torch.equal(samplers[0].min_distances, samplers[1].min_distances)
    assert int(samplers[0].get_new_idx()) == int(samplers[1].get_new_idx())


def test_a_model_fills_its_bank_with_the_rows_that_anomalib_chooses():
    banks = []
    for make in (lambda model: model, accelerate):
        model = make(patchcore())
        seed_all()
        subsample(model, rows(500, 16), 0.1)
        banks.append(model.memory_bank)
    assert torch.equal(*banks)
    assert torch_model.KCenterGreedy is KCenterGreedy


# --- search -------------------------------------------------------------------------------------------------


def queries(model, count=70):
    more = torch.randn(count, model.memory_bank.shape[1], generator=torch.Generator().manual_seed(7))
    return more * model.memory_bank.std() + model.memory_bank.mean()


@pytest.mark.parametrize("k", [1, 2, 9, 50])
def test_distances_are_those_of_the_formula_in_float64(k):
    model = accelerate(patchcore())
    asked = queries(model)
    distances, indices = model.nearest_neighbors(asked, k)
    expected, _ = in_float64(model).nearest_neighbors(asked.double(), k)
    assert distances.shape == indices.shape == ((70,) if k == 1 else (70, k))
    assert (distances.dtype, indices.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=1e-9)
    at = (asked[:, None].double() - model.memory_bank[indices.reshape(70, k)].double()).norm(dim=-1)
    torch.testing.assert_close(distances.reshape(70, k).double(), at, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [1, 5])
def test_distances_are_within_the_rounding_of_anomalibs_own(k):
    """Its squared distance is a sum of three terms in float32, each of d products: off by (d + 3) 2^-24 of them."""
    model = accelerate(patchcore())
    asked = model.memory_bank[:60] + 1e-3  # near rows, where the terms cancel
    ours, theirs = (m.nearest_neighbors(asked, k)[0].double().square() for m in (model, plain(model)))
    bank = model.memory_bank.double()
    bound = (bank.shape[1] + 3) * 2.0**-24 * (asked.double().norm(dim=1) + bank.norm(dim=1).max()).square()
    assert ((ours - theirs).abs() <= bound.reshape(-1, *[1] * (ours.ndim - 1))).all()


CASES = {
    "more neighbours than rows": lambda model: model.nearest_neighbors(queries(model), 301),
    "no neighbours": lambda model: model.nearest_neighbors(queries(model), 0),
    "no queries": lambda model: model.nearest_neighbors(queries(model)[:0], 1),
    "no queries, several": lambda model: model.nearest_neighbors(queries(model)[:0], 3),
    "NaN": lambda model: model.nearest_neighbors(queries(model) * torch.nan, 1),
    "infinity": lambda model: model.nearest_neighbors(queries(model) / 0, 2),
    "float64": lambda model: model.nearest_neighbors(queries(model).double(), 1),
    "float16": lambda model: model.nearest_neighbors(queries(model).half(), 1),
    "another width": lambda model: model.nearest_neighbors(queries(model)[:, 1:], 1),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_kernels_refuse_is_answered_by_anomalib(case):
    model = accelerate(patchcore())
    assert same(outcome(lambda: CASES[case](model)), outcome(lambda: CASES[case](plain(model))))


@pytest.mark.parametrize(
    "change", [lambda b: b.fill_(torch.nan), lambda b: b.resize_(0), lambda b: b.double(), lambda b: b.t()]
)
def test_a_bank_that_the_kernels_refuse_is_searched_by_anomalib(change):
    model = accelerate(patchcore(rows=192))
    asked = queries(model)
    model.memory_bank = change(model.memory_bank)
    assert same(*(outcome(lambda m=m: m.nearest_neighbors(asked, 1)) for m in (model, plain(model))))


def test_no_bank_is_refused_as_by_anomalib():
    model = accelerate(patchcore())
    model.memory_bank = torch.empty(0)
    assert same(*(outcome(lambda m=m: m(images())) for m in (model, plain(model))))


CHANGES = {
    "replaced": lambda model: setattr(model, "memory_bank", model.memory_bank[:40].clone()),
    "in place": lambda model: model.memory_bank.mul_(3),
    "one row in place": lambda model: model.memory_bank.__setitem__(5, 0.5),
    "unseen by torch": lambda model: model.memory_bank.data.mul_(3),
    "through numpy": lambda model: np.multiply(model.memory_bank.numpy(), 3, out=model.memory_bank.numpy()),
    "a state dict": lambda model: model.load_state_dict(patchcore(rows=77).state_dict()),
    "values elsewhere": lambda model: setattr(model.memory_bank, "data", model.memory_bank.data * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_bank_is_searched_as_it_is_now(change):
    model = accelerate(patchcore())
    asked = queries(model)
    before = model.nearest_neighbors(asked, 1)[0]
    CHANGES[change](model)
    after = model.nearest_neighbors(asked, 1)[0]
    expected = in_float64(model).nearest_neighbors(asked.double(), 1)[0]
    torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=1e-9)
    assert not torch.equal(after, before) or change == "one row in place"


def test_a_bank_made_in_inference_mode_is_searched():
    model = accelerate(patchcore())
    with torch.inference_mode():
        model.memory_bank = model.memory_bank * 1
        scores = model.nearest_neighbors(queries(model), 1)[0].clone()
        model.memory_bank.mul_(2)
        again = model.nearest_neighbors(queries(model), 1)[0]
    assert torch.equal(scores * 2, again)


# --- scores and maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [{}, {"num_neighbors": 1}, {"num_neighbors": 3}, {"num_neighbors": 50}, {"rows": 5}]
)
def test_a_forward_pass_is_the_formula_in_float64(arguments):
    model = accelerate(patchcore(**arguments))
    batch = images()
    ours, expected = model(batch), in_float64(model)(batch.double())
    assert type(ours) is type(expected)
    for name in ("pred_score", "anomaly_map"):
        value, wanted = getattr(ours, name), getattr(expected, name)
        assert (value.shape, value.dtype) == (wanted.shape, torch.float32)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", IMAGENET)
def test_scores_and_maps_of_trained_networks_are_the_formula_in_float64(name):
    theirs = torch_model.PatchcoreModel(layers=IMAGENET[name], backbone=network(name), pre_trained=False).train()
    theirs.memory_bank = theirs(prepared(GOOD))[::20].clone()
    theirs.eval()
    batch = prepared(TESTS)
    ours, expected = accelerate(plain(theirs))(batch), in_float64(theirs)(batch.double())
    for part in ("pred_score", "anomaly_map"):
        torch.testing.assert_close(getattr(ours, part).double(), getattr(expected, part), rtol=1e-5, atol=0)


@pytest.mark.parametrize("b", [2, 9])
def test_image_scores_are_eq_7_of_the_given_distances(b):
    model = accelerate(patchcore(num_neighbors=b))
    embedding = queries(model, 60)
    distances, indices = (part.reshape(3, 20) for part in model.nearest_neighbors(embedding, 1))
    score = model.compute_anomaly_score(distances, indices, embedding)
    expected = in_float64(model).compute_anomaly_score(distances.double(), indices, embedding.double())
    assert (score.shape, score.dtype) == ((3,), torch.float32)
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("grid", "size"),
    [
        ((8, 8), (64, 64)),
        ((7, 9), (50, 61)),
        ((28, 28), (224, 224)),
        ((5, 5), None),
        ((30, 40), None),
        ((13, 11), (17, 100)),
        ((3, 3), (16, 16)),
    ],
)
def test_maps_are_the_formula_in_float64(grid, size):
    scores = torch.rand(2, 1, *grid, generator=torch.Generator().manual_seed(1))
    generator = AnomalyMapGenerator()
    ours = outcome(lambda: face_map()(scores, size))
    expected = outcome(lambda: copy.deepcopy(generator).double()(scores.double(), size))
    if isinstance(expected, tuple):  # too small for the border
        assert ours == outcome(lambda: generator(scores, size))
        return
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)


def face_map(sigma=4):
    """The accelerated generator, as a model holds it."""
    model = patchcore()
    model.anomaly_map_generator = AnomalyMapGenerator(sigma=sigma)
    return accelerate(model).anomaly_map_generator


@pytest.mark.parametrize("sigma", [1, 2, 4, 6])
def test_maps_of_another_deviation_are_too(sigma):
    scores = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    expected = AnomalyMapGenerator(sigma=sigma).double()(scores.double(), (96, 96))
    torch.testing.assert_close(face_map(sigma)(scores, (96, 96)).double(), expected, rtol=1e-5, atol=0)


def test_a_kernel_of_ones_own_blurs_as_in_anomalib():
    generator = face_map()
    generator.blur.kernel = generator.blur.kernel.flip(-1).roll(3, -1)
    scores = torch.rand(1, 1, 12, 12)
    assert torch.equal(generator(scores, (96, 96)), copy.deepcopy(generator)(scores, (96, 96)))


def test_nearest_upsampling_takes_the_pixels_that_torch_takes():
    """torch multiplies by a ratio in float32 and rounds down: no grid up to 64 and size up to 512 may differ."""
    generator = face_map(1)
    for grid, size in [(g, s) for g in range(4, 65, 3) for s in range(17, 513, 31)]:
        scores = torch.arange(grid, dtype=torch.float32).expand(1, 1, 4, grid).contiguous()
        ours, theirs = (g(scores, (17, size)) for g in (generator, copy.deepcopy(generator)))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4, msg=f"{grid} to {size}")


def test_images_are_ranked_as_by_anomalib():
    """Two images change places only where their scores lie within the rounding of anomalib's distances."""
    model = accelerate(patchcore(num_neighbors=1))
    batch = images(24) * torch.linspace(0.9, 1.1, 24)[:, None, None, None]
    ours, theirs = (each(batch).pred_score.double() for each in (model, plain(model)))
    lengths = plain(model).train()(batch).double().norm(dim=1).max() + model.memory_bank.double().norm(dim=1).max()
    bound = (model.memory_bank.shape[1] + 3) * 2.0**-24 * lengths.square() / (2 * theirs.min())
    gaps = theirs[:, None] - theirs
    apart = gaps.abs() > 2 * bound
    assert apart.sum() > 200
    assert torch.equal((ours[:, None] - ours).sign()[apart], gaps.sign()[apart])


# --- embedding ----------------------------------------------------------------------------------------------


def test_an_embedding_that_is_asked_for_is_anomalibs_to_the_bit():
    model = accelerate(patchcore())
    maps = {"layer1": torch.rand(2, 8, 12, 12), "layer2": torch.rand(2, 16, 6, 6)}
    assert torch.equal(model.generate_embedding(maps), plain(model).generate_embedding(maps))
    assert torch.equal(model.feature_pooler(maps["layer1"]), plain(model).feature_pooler(maps["layer1"]))


def test_training_gives_the_embedding_of_anomalib():
    model = accelerate(patchcore()).train()
    ours, theirs = model(images()), plain(model)(images())
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_come_to_what_they_do_in_anomalib(value):
    model = accelerate(patchcore())
    batch = images().index_fill(0, torch.tensor([0]), value)
    assert same(*(outcome(lambda m=m: tuple(m(batch))) for m in (model, plain(model))))


# --- what a model remains -----------------------------------------------------------------------------------


def test_an_accelerated_model_is_the_same_object_of_the_same_kind():
    model = patchcore()
    assert accelerate(accelerate(model)) is model
    assert isinstance(model, torch_model.PatchcoreModel)
    assert type(model).__name__ == "PatchcoreModel"
    assert list(model.state_dict()) == list(patchcore().state_dict())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_names_nothing_of_this_package(protocol):
    model = accelerate(patchcore())
    expected = model(images())
    written = pickle.dumps(model, protocol)
    assert b"patchcore_rs" not in written
    read = pickle.loads(written)
    assert type(read) is torch_model.PatchcoreModel
    assert torch.allclose(read(images()).pred_score, expected.pred_score, rtol=1e-4)


def test_a_copy_is_anomalibs_own_in_all_its_parts():
    model = accelerate(patchcore())
    model(images())
    for module in copy.deepcopy(model).modules():
        assert not type(module).__module__.startswith("patchcore_rs"), type(module)


def test_what_torch_saves_names_nothing_of_this_package():
    model, file = accelerate(patchcore()), io.BytesIO()
    model(images())
    torch.save({"model": model}, file)
    assert b"patchcore_rs" not in file.getvalue()


def test_the_class_begins_accelerated_and_takes_the_same_arguments():
    model = face.PatchcoreModel(layers=list(LAYERS), backbone=BACKBONE, pre_trained=False, num_neighbors=2)
    model.load_state_dict(patchcore().state_dict())
    held = {type(module).__name__ for module in model.modules() if type(module).__module__.startswith("patchcore_rs")}
    assert held == {"PatchcoreModel", "AvgPool2d", "AnomalyMapGenerator"}
    assert type(copy.deepcopy(model)) is torch_model.PatchcoreModel


def test_a_traced_model_is_anomalibs():
    model = accelerate(patchcore(num_neighbors=1))
    batch = images()
    found = traced(model, batch)
    assert "aten::matmul" in str(found.inlined_graph)
    assert same(found(batch), present(plain(model)(batch)))


def test_a_compiled_model_is_anomalibs():
    model = accelerate(patchcore())
    compiled = torch.compile(lambda q: model.nearest_neighbors(q, 3), backend="eager", fullgraph=True)
    asked = queries(model)
    assert same(compiled(asked), plain(model).nearest_neighbors(asked, 3))


def test_gradients_flow_as_in_anomalib():
    model = accelerate(patchcore())
    asked = queries(model).requires_grad_()
    scores, _ = model.nearest_neighbors(asked, 3)
    scores.sum().backward()
    assert asked.grad is not None
    with torch.no_grad():
        assert torch.equal(*(model.nearest_neighbors(values, 3)[0] for values in (asked, asked.detach())))


def test_half_precision_is_anomalibs():
    model = accelerate(patchcore().half())
    asked = queries(model).half()
    assert same(*(outcome(lambda m=m: m.nearest_neighbors(asked, 2)) for m in (model, plain(model))))


def test_a_model_without_values_is_anomalibs():
    found = present(accelerate(patchcore()).to("meta")(images().to("meta")))
    assert {value.device.type for value in found} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_a_model_on_a_gpu_is_anomalibs_until_it_comes_back():
    model, batch = accelerate(patchcore()), images()
    before = tuple(model(batch))
    model.cuda()
    found, expected = (present(each(batch.cuda())) for each in (model, plain(model)))
    assert all(value.is_cuda for value in found)
    assert same([value.cpu() for value in found], [value.cpu() for value in expected])
    assert select(face.KCenterGreedy, model.memory_bank, 0.1) == select(KCenterGreedy, model.memory_bank, 0.1)
    assert same(tuple(model.cpu()(batch)), before)


def test_many_threads_may_predict_at_once():
    model = accelerate(patchcore())
    batches = [images(seed=seed) for seed in range(8)]
    expected = [tuple(model(batch)) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: tuple(accelerate(model)(batch)), batches))
    assert same(found, expected)


def test_another_model_is_refused():
    with pytest.raises(TypeError, match=r"model must be a Patchcore, .*; got Linear"):
        accelerate(torch.nn.Linear(2, 2))


def test_a_subclass_is_accelerated_unless_it_overrides_what_would_be_replaced():
    class Named(torch_model.PatchcoreModel):
        def describe(self):
            return "mine"

    class Searching(torch_model.PatchcoreModel):
        def nearest_neighbors(self, embedding, n_neighbors):
            return super().nearest_neighbors(embedding, n_neighbors)

    arguments = {"layers": list(LAYERS), "backbone": BACKBONE, "pre_trained": False}
    model = accelerate(Named(**arguments))
    assert model.describe() == "mine"
    assert type(copy.deepcopy(model)) is Named
    with pytest.raises(
        TypeError, match="must leave nearest_neighbors as PatchcoreModel of anomalib has it; got Search"
    ):
        accelerate(Searching(**arguments))
