"""anomalib's face on the smallest classes that promise what anomalib's do; `make test-peers` asks anomalib itself."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import stand_in_anomalib
import torch
from stand_in_anomalib import KCenterGreedy, Patchcore, PatchcoreModel

from patchcore_rs import MemoryBank
from patchcore_rs.compat import anomalib as face
from patchcore_rs.compat import anomalib_models
from patchcore_rs.compat.anomalib import accelerate, from_anomalib
from patchcore_rs.compat.torch_banks import BankCache, CosineBank, nearest


@pytest.fixture
def anomalib(monkeypatch):
    stand_in_anomalib.install(monkeypatch)
    for cached in (anomalib_models._parts, anomalib_models.subclass):
        cached.cache_clear()
    yield
    for cached in (anomalib_models._parts, anomalib_models.subclass):
        cached.cache_clear()


def rows(count=60, width=12, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def images(seed=1):
    return torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(seed))


def fitted(kind=PatchcoreModel, **arguments):
    model = kind(**arguments).train()
    bank = getattr(model, "model", model)(images(seed=2))
    getattr(model, "model", model).memory_bank = bank[::3].clone()
    return model.eval()


def without_anomalib(code):
    blocked = "import sys; sys.modules['anomalib'] = None; "
    return subprocess.run(
        [sys.executable, "-c", blocked + code], capture_output=True, text=True, timeout=60, check=False
    )


# --- without anomalib ---------------------------------------------------------------------------------------


def test_the_face_imports_neither_anomalib_nor_torch():
    done = without_anomalib("import patchcore_rs.compat.anomalib; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    "use",
    [
        "from patchcore_rs.compat.anomalib import KCenterGreedy",
        "from patchcore_rs.compat.anomalib import accelerate; accelerate(3)",
    ],
)
def test_the_error_names_the_extra_to_install(use):
    done = without_anomalib(use)
    assert done.returncode == 1
    assert "ImportError: " in done.stderr
    assert "pip install 'patchcore-rs[anomalib]'" in done.stderr


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'Padim'"):
        _ = face.Padim


def test_another_object_is_not_taken_over():
    with pytest.raises(TypeError, match=r"must be a Patchcore or PatchcoreModel of anomalib, .*; got Linear"):
        from_anomalib(torch.nn.Linear(2, 2))


# --- a model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"num_neighbors": 1}, {"num_neighbors": 99}])
def test_an_accelerated_model_scores_as_before(anomalib, arguments):
    model = fitted(**arguments)
    expected = model(images())
    assert accelerate(model) is model
    for value, wanted in zip(model(images()), expected, strict=True):
        assert (value.shape, value.dtype) == (wanted.shape, wanted.dtype)
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def test_the_kernels_do_the_work(anomalib, monkeypatch):
    model = accelerate(fitted())
    for name in ("nearest_neighbors", "compute_anomaly_score", "generate_embedding"):
        monkeypatch.setattr(PatchcoreModel, name, None)
    monkeypatch.setattr(stand_in_anomalib.AnomalyMapGenerator, "compute_anomaly_map", None)
    assert model(images())[0].isfinite().all()


def test_the_lightning_module_keeps_its_class(anomalib):
    model = accelerate(fitted(Patchcore))
    assert type(model) is Patchcore
    assert type(model.model) is face.PatchcoreModel


def test_a_model_made_by_the_face_is_accelerated(anomalib):
    model = fitted(face.Patchcore)
    expected = fitted()(images())
    assert type(model.model) is face.PatchcoreModel
    torch.testing.assert_close(model(images())[0], expected[0], rtol=1e-5, atol=1e-6)


def test_training_collects_the_same_embedding(anomalib):
    ours, theirs = accelerate(fitted()).train(), fitted().train()
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-5, atol=1e-6)


def test_copies_and_pickles_are_of_the_hosts_classes(anomalib):
    model = accelerate(fitted())
    model(images())
    assert b"patchcore_rs" not in pickle.dumps(model)
    copied = copy.deepcopy(model)
    assert type(copied) is PatchcoreModel
    assert type(copied.feature_pooler) is torch.nn.AvgPool2d
    torch.testing.assert_close(copied(images())[0], model(images())[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and warns of what it fixes
def test_a_traced_model_is_the_hosts(anomalib):
    model = accelerate(fitted(num_neighbors=1))
    traced = torch.jit.trace(model, images(), check_trace=False)
    assert torch.equal(traced(images())[0], copy.deepcopy(model)(images())[0])


def test_gradients_and_other_dtypes_are_the_hosts(anomalib):
    model = accelerate(fitted())
    asked = model.memory_bank[:4].clone().requires_grad_()
    model.nearest_neighbors(asked, 2)[0].sum().backward()
    assert asked.grad is not None
    assert model.double().nearest_neighbors(asked.detach().double(), 2)[0].dtype == torch.float64


def test_a_subclass_that_overrides_what_is_replaced_is_refused(anomalib):
    class Searching(PatchcoreModel):
        def nearest_neighbors(self, embedding, n_neighbors):
            raise NotImplementedError

    with pytest.raises(
        TypeError, match="must leave nearest_neighbors as PatchcoreModel of anomalib has it; got Searching"
    ):
        accelerate(Searching())


def test_another_model_is_refused(anomalib):
    with pytest.raises(TypeError, match=r"model must be a Patchcore, .*; got Linear"):
        accelerate(torch.nn.Linear(2, 2))


# --- selection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("ratio", [0.02, 0.3, 1.0])
def test_the_picks_are_the_hosts(anomalib, monkeypatch, counts, ratio):
    monkeypatch.setattr(KCenterGreedy, "start_counts", counts)
    picks = []
    for kind in (KCenterGreedy, face.KCenterGreedy):
        torch.manual_seed(3)
        picks.append((kind(rows(), ratio).select_coreset_idxs(), torch.get_rng_state().tolist()))
    if ratio < 1:
        assert picks[0] == picks[1]
    assert sorted(set(picks[1][0])) == sorted(picks[1][0])
    assert len(picks[1][0]) == len(picks[0][0]) == int(60 * ratio)


def test_a_model_selects_its_bank_by_the_kernels(anomalib, monkeypatch):
    banks = []
    for model in (PatchcoreModel(), accelerate(PatchcoreModel())):
        model.embedding_store.append(rows())
        torch.manual_seed(5)
        model.subsample_embedding(0.2)
        banks.append(model.memory_bank)
    assert torch.equal(*banks)
    monkeypatch.setattr(KCenterGreedy, "update_distances", None)  # the host's own steps are not taken
    model.embedding_store.append(rows())
    model.subsample_embedding(0.2)
    assert len(model.memory_bank) == 12
    assert sys.modules[PatchcoreModel.__module__].KCenterGreedy is KCenterGreedy


# --- banks --------------------------------------------------------------------------------------------------

CHANGES = {
    "counted by torch": lambda bank: bank.mul_(2),
    "not counted": lambda bank: bank.data.mul_(2),
    "through numpy": lambda bank: np.negative(bank.numpy(), out=bank.numpy()),
    "one counted value": lambda bank: bank.__setitem__((0, 0), 9.0),
    "to fewer rows": lambda bank: bank.resize_(30, 12),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_bank_is_noticed(change):
    built = []
    cache = BankCache(lambda bank: built.append(bank.clone()) or MemoryBank(bank))
    bank = rows(5000)
    first = cache.find(bank)
    assert cache.find(bank) is first
    CHANGES[change](bank)
    second = cache.find(bank)
    assert second is not first
    assert np.array_equal(second.features, bank.numpy())
    assert len(built) == 2


def test_another_bank_at_the_same_address_is_noticed():
    cache = BankCache(MemoryBank)
    storage = rows(100)
    first = cache.find(storage[:50])
    assert cache.find(storage[:50]) is first
    assert len(cache.find(storage[:60])) == 60


def test_a_bank_without_a_count_of_changes_is_kept_and_noticed():
    cache = BankCache(MemoryBank)
    with torch.inference_mode():
        bank = rows() * 1
        first = cache.find(bank)
        assert cache.find(bank) is first
        bank.mul_(2)
        assert cache.find(bank) is not first


@pytest.mark.parametrize(
    "bank",
    [
        rows().double(),
        rows()[:0],
        rows()[:, ::2],
        rows() * torch.nan,
        rows().to("meta"),
        rows()[0],
        rows().requires_grad_(),
    ],
)
def test_a_bank_that_the_kernels_cannot_search_has_no_structure(bank):
    assert BankCache(MemoryBank).find(bank) is None


@pytest.mark.parametrize(
    ("queries", "k"),
    [(rows(0), 1), (rows(), 61), (rows(), 0), (rows(width=3), 1), (rows() / 0, 1), (rows().half(), 1), (rows()[0], 1)],
)
def test_queries_that_the_kernels_refuse_have_no_answer(queries, k):
    assert nearest(MemoryBank(rows()), queries, k) is None
    assert CosineBank(rows()).smallest(queries, k) is None


def test_answers_are_tensors_of_the_kernels_values():
    distances, indices = nearest(MemoryBank(rows()), rows(seed=1), 3)
    expected = MemoryBank(rows()).kneighbors(rows(seed=1).numpy(), 3)
    assert np.array_equal(distances.numpy(), expected[0])
    assert np.array_equal(indices.numpy(), expected[1])


@pytest.mark.parametrize("scale", ["normalised", "any length"])
@pytest.mark.parametrize("k", [1, 7])
def test_cosine_distances_are_those_in_float64(scale, k):
    bank, queries = rows(500, 48), rows(90, 48, seed=1)
    queries[:20] = bank[:20] + 1e-4 * rows(20, 48, seed=2)  # near ones, which a product in float32 cannot tell apart
    if scale == "normalised":
        bank, queries = (torch.nn.functional.normalize(values, dim=1) for values in (bank, queries))
    expected = (1 - queries.double() @ bank.double().T).topk(k, largest=False).values
    found = CosineBank(bank).smallest(queries, k)
    assert (found.shape, found.dtype) == ((90, k), torch.float32)
    lengths = 1 if scale == "normalised" else float(bank.double().square().sum(1).max())
    torch.testing.assert_close(
        found.double(), expected, rtol=2e-7, atol=4e-12 if scale == "normalised" else 3e-7 * lengths
    )
