"""Weights that parameters make up start as the recipe says of the weight: torch's own parametrisations."""

import math

import pytest
import torch
from initlab.kernels import Constant, Normal
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

import initlab

RECIPES = ("torch", "own", "he", "xavier", "lecun", "gpt2", "trunc_normal", "auto")
NORMS = {
    "hook": lambda layer: weight_norm(layer, dim=0),
    "hook, dim 1": lambda layer: weight_norm(layer, dim=1),
    "hook, one g": lambda layer: weight_norm(layer, dim=None),
    "parametrization": parametrizations.weight_norm,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def std_of(recipe: object, wrap: object = None, kind: type[nn.Module] = nn.Linear) -> tuple[float, nn.Module]:
    layer = kind(64, 48) if kind is nn.Linear else kind(16, 24, 5)
    model = nn.Sequential(wrap(layer) if wrap else layer)
    initlab.init_model_(model, 0, recipe)
    return float(model[0].weight.detach().std()), model


@pytest.mark.parametrize("wrap", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_weight_norm(recipe, wrap):
    for kind in (nn.Linear, nn.Conv1d):
        wanted, _ = std_of(recipe, kind=kind)
        got, model = std_of(recipe, wrap, kind)
        assert got == pytest.approx(wanted, rel=0.1)
        v = next(p for name, p in model.named_parameters() if name.endswith(("weight_v", "original1")))
        weight = model[0].weight.detach()
        torch.testing.assert_close(weight, v.detach(), rtol=1e-5, atol=1e-7)
        model(torch.ones(2, 64) if kind is nn.Linear else torch.ones(2, 16, 9))
        torch.testing.assert_close(model[0].weight.detach(), weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrap", NORMS.values(), ids=NORMS)
def test_from_meta_and_recorded(wrap):
    def build() -> nn.Module:
        return nn.Sequential(wrap(nn.Linear(6, 4)))

    found = []
    for device in ("cpu", "meta"):
        for recipe in ("torch", "own", "build"):
            with initlab.record_build() as made, torch.device(device):
                model = build()
            report = initlab.init_model_(model, 1, made if recipe == "build" else recipe, device="cpu")
            found.append(initlab.model_digest(model))
            assert sorted(row.source for row in report.rows if row.distribution is None) == ["computed"]
    assert len({digest.total for digest in found}) == 1


def test_rules_for_the_weight_and_for_its_parts():
    model = nn.Sequential(weight_norm(nn.Linear(8, 4)))
    initlab.init_model_(model, 0, {"0.weight": Normal(0.0, 3.0), "*": "torch"})
    assert model[0].weight_v.std() > 1.5
    torch.testing.assert_close(model[0].weight_g[:, 0], model[0].weight_v.norm(dim=1))
    initlab.init_model_(model, 0, {"*.weight_g": Constant(2.0), "*": "torch"})
    assert torch.equal(model[0].weight_g, torch.full((4, 1), 2.0))
    initlab.init_model_(model, 0, {"*.weight_v": Constant(1.0), "*": "torch"})
    torch.testing.assert_close(model[0].weight_g.detach(), torch.full((4, 1), math.sqrt(8)))
    for recipe in (Normal(0.0, 3.0), lambda ref: Normal(0.0, 3.0) if ref.tensor.dim() > 1 else Constant(0.0)):
        initlab.init_model_(model, 0, recipe)
        torch.testing.assert_close(model[0].weight_g[:, 0], model[0].weight_v.norm(dim=1))
    v = model[0].weight_v.detach().clone()
    initlab.init_model_(model, 0, recipe, only="0.weight_g", values={"0.weight_g": 1.0})
    assert torch.equal(model[0].weight_v, v)


def test_own_compares_with_what_is_there():
    model = nn.Sequential(weight_norm(nn.Linear(64, 64)))
    initlab.init_model_(model, 0, "own")
    with torch.no_grad():
        model[0].weight_g *= 2
    with pytest.raises(ValueError, match=r"0.weight_g .*its values are not what is computed"):
        initlab.init_model_(model, 0, "own")
    with torch.no_grad():
        model[0].weight_v *= 2
    with pytest.raises(ValueError, match=r"0.weight_v .*its values"):
        initlab.init_model_(model, 0, "own")


class Exp(nn.Module):
    def forward(self, x):
        return x.exp()

    def right_inverse(self, weight):
        return weight.abs().log()


class Halves(nn.Module):
    """Two originals, from data-dependent code."""

    def forward(self, a, b):
        return a + b

    def right_inverse(self, weight):
        return (weight / 2, weight - weight / 2) if float(weight.sum()) < 1e9 else (weight, weight * 0)


class Square(nn.Module):
    def forward(self, x):
        return x**2


@pytest.mark.parametrize("recipe", ["torch", "he"])
def test_other_parametrisations(recipe):
    plain = nn.Sequential(nn.Linear(6, 6))
    initlab.init_model_(plain, 0, recipe)
    for parametrisation in (Exp(), Halves()):
        model = nn.Sequential(nn.Linear(6, 6))
        parametrize.register_parametrization(model[0], "weight", parametrisation)
        initlab.init_model_(model, 0, recipe)
        scale = model[0].weight.detach().square().mean().sqrt()
        assert float(scale) == pytest.approx(float(plain[0].weight.detach().std()), rel=0.4)
    orthogonal = parametrizations.orthogonal(nn.Linear(6, 6))
    initlab.init_model_(orthogonal, 0, recipe)
    torch.testing.assert_close(orthogonal.weight @ orthogonal.weight.t(), torch.eye(6), rtol=0, atol=1e-5)
    model = nn.Sequential(nn.Linear(6, 6))
    parametrize.register_parametrization(model[0], "weight", Square())
    with pytest.raises(ValueError, match=r"0.weight is made of it by Square, and Square has no right_inverse"):
        initlab.init_model_(model, 0, recipe)


def test_spectral_norm_begins_with_vectors_of_its_weight():
    layer = parametrizations.spectral_norm(nn.Linear(12, 8))
    initlab.init_model_(layer, 0, "he")
    assert float(torch.linalg.matrix_norm(layer.eval().weight.detach(), 2)) == pytest.approx(1.0, abs=0.1)
    older = spectral_norm(nn.Linear(12, 8))
    initlab.init_model_(older, 0, "he")
    assert float(older.weight_u.norm()) == pytest.approx(1.0, abs=1e-5)
    assert float(older.weight_orig.detach().std()) == pytest.approx((2 / 12) ** 0.5, rel=0.3)


def test_filling_a_temporary_is_refused():
    for layer in (weight_norm(nn.Linear(4, 4)), parametrizations.weight_norm(nn.Linear(4, 4))):
        for fill in (initlab.init.normal_, initlab.init.xavier_uniform_, initlab.init.orthogonal_):
            with pytest.raises(RuntimeError, match=r"weight_norm or another parametrization(?s:.)*right_inverse"):
                fill(layer.weight)
            with pytest.raises(RuntimeError, match="would change none of them"):
                fill(layer.weight[:2])
            with initlab.swap():
                nn.init.normal_(layer.weight)  # library code goes on
    initlab.init.normal_(nn.Parameter(torch.ones(3, 3))[:2])
    initlab.init.normal_(torch.ones(3, requires_grad=True) * 2)
