"""AnomalyDINO of anomalib, accelerated, beside anomalib's own. Needs anomalib 2.3 or newer."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("anomalib.models.image.anomaly_dino", reason="needs anomalib 2.3 or newer: make test-peers")
pytestmark = pytest.mark.filterwarnings("ignore")

from anomalib_models import anomaly_dino, images, in_float64, outcome, plain, present, same, seed_all, traced

from patchcore_rs.compat.anomalib import accelerate


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("side", [140, 150])
def test_scores_and_maps_are_the_formula_in_float64(monkeypatch, k, side):
    model = accelerate(anomaly_dino(monkeypatch, num_neighbours=k))
    batch = images(side=side)
    ours, expected = model(batch), in_float64(model)(batch.double())
    for name in ("pred_score", "anomaly_map"):
        value, wanted = getattr(ours, name), getattr(expected, name)
        assert (value.shape, value.dtype) == (wanted.shape, torch.float32)
        # Features and their lengths are float32, which moves 1 - cos by some 1e-7.
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=3e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_the_search_takes_the_place_of_the_whole_product(monkeypatch):
    model = accelerate(anomaly_dino(monkeypatch, num_neighbours=2))
    shapes = []
    topk = torch.topk
    monkeypatch.setattr(
        torch, "topk", lambda values, *rest, **more: (shapes.append(values.shape), topk(values, *rest, **more))[1]
    )
    model(images(side=140))
    assert shapes[0] == (200, 2)


def test_near_rows_are_told_apart_where_the_product_rounds(monkeypatch):
    model = accelerate(anomaly_dino(monkeypatch))
    batch = images(4, side=140, seed=1)  # the training images: half of the patches are in the bank
    ours, expected = model(batch), in_float64(model)(batch.double())
    theirs = plain(model)(batch)
    error = [(value.anomaly_map.double() - expected.anomaly_map).abs().max() for value in (ours, theirs)]
    assert error[0] <= error[1] + 1e-7


def test_a_bank_of_any_length_is_searched(monkeypatch):
    model = accelerate(anomaly_dino(monkeypatch))
    model.memory_bank = model.memory_bank * torch.linspace(0.2, 1.0, len(model.memory_bank))[:, None]
    batch = images(side=140)
    torch.testing.assert_close(
        model(batch).pred_score.double(), in_float64(model)(batch.double()).pred_score, rtol=1e-5, atol=3e-7
    )


def test_more_neighbours_than_rows_are_refused_as_by_anomalib(monkeypatch):
    model = accelerate(anomaly_dino(monkeypatch, rows=5, num_neighbours=6))
    assert same(*(outcome(lambda m=m: tuple(m(images(side=140)))) for m in (model, plain(model))))


def test_no_bank_is_refused_as_by_anomalib(monkeypatch):
    model = accelerate(anomaly_dino(monkeypatch))
    model.memory_bank = torch.empty(0)
    assert same(*(outcome(lambda m=m: tuple(m(images(side=140)))) for m in (model, plain(model))))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_come_to_what_they_do_in_anomalib(monkeypatch, value):
    model = accelerate(anomaly_dino(monkeypatch))
    batch = images(side=140).index_fill(0, torch.tensor([0]), value)
    assert same(*(outcome(lambda m=m: tuple(m(batch))) for m in (model, plain(model))))


def test_half_precision_is_anomalibs(monkeypatch):
    model = accelerate(anomaly_dino(monkeypatch).half())
    assert same(*(outcome(lambda m=m: tuple(m(images(side=140)))) for m in (model, plain(model))))


def test_fitting_selects_the_rows_of_anomalib(monkeypatch):
    banks = []
    for make in (lambda model: model, accelerate):
        model = make(anomaly_dino(monkeypatch, coreset_subsampling=True)).train()
        model(images(4, side=140, seed=1))
        seed_all()
        model.fit()
        banks.append(model.memory_bank)
    assert torch.equal(*banks)


def test_a_changed_bank_is_searched_as_it_is_now(monkeypatch):
    model = accelerate(anomaly_dino(monkeypatch))
    batch = images(side=140)
    before = model(batch).pred_score
    model.memory_bank.data.mul_(0.5)
    after = model(batch).pred_score
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, plain(model)(batch).pred_score, rtol=1e-5, atol=1e-6)


def test_a_pickle_and_a_copy_are_anomalibs_own(monkeypatch):
    model = accelerate(anomaly_dino(monkeypatch))
    model(images(side=140))
    assert b"patchcore_rs" not in pickle.dumps(model)
    assert not any(type(part).__module__.startswith("patchcore_rs") for part in copy.deepcopy(model).modules())


def test_a_traced_model_is_anomalibs(monkeypatch):
    model = accelerate(anomaly_dino(monkeypatch))
    batch = images(side=140)
    assert same(traced(model, batch)(batch), present(plain(model)(batch)))
