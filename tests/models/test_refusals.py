"""What a refusal advises is pasted: it works, or says itself what is missing. It never makes a number up."""

import re
import sys
from pathlib import Path

import pytest
import torch
from initlab.kernels import Constant, Normal
from torch import nn

import initlab

sys.path.insert(0, str(Path(__file__).resolve().parent))
from evaluation.zoo import models


def advised(model, recipe="own"):
    """The rules that a refusal shows, as code that was pasted."""
    with pytest.raises(ValueError, match="cannot fill") as caught:
        initlab.init_model_(model, 0, recipe)
    code = re.search(r"^    recipe=(\{.*\})$", str(caught.value), re.MULTILINE)[1]
    return eval(code, {"Constant": Constant, "Normal": Normal, "recipe": recipe}), str(caught.value)


def pasted(model, recipe="own"):
    """Whether the advice fills the model as it was; otherwise it is refused, by what is missing."""
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    rules, _ = advised(model, recipe)
    if ... in rules.values():
        with pytest.raises(TypeError, match=r"is Ellipsis"):
            initlab.init_model_(model, 0, rules)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
        return False
    report = initlab.init_model_(model, 0, rules)
    named = [row for row in report.rows if row.why == "given"]
    assert named
    for row in named:
        assert torch.equal(model.get_parameter(row.name), before[row.name]), row.name
    return True


class Odd(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=tensor.dtype.is_floating_point))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("value", [2.6592600, 0.0, 1.0, -1e-5, 100.0, 1 / 3])
@pytest.mark.parametrize("recipe", ["own", "torch", "he"])
def test_a_constant_is_advised_as_it_is(value, dtype, recipe):
    if recipe == "own" or value == 0.0:
        assert pasted(Odd(scale=torch.full((2, 3), value, dtype=dtype), alone=torch.tensor(value, dtype=dtype)), recipe)


def test_what_is_missing_is_said():
    model = Odd(token=torch.randn(1, 4, 5), scale=torch.full((), 2.5))
    rules, said = advised(model)
    assert rules == {"token": ..., "scale": Constant(2.5), "*": "own"}
    assert "in the place of ..." in said
    assert "record_build()" in said
    assert not pasted(model)
    initlab.init_model_(model, 0, {**rules, "token": Normal(0.0, 0.02)})


def test_without_values_nothing_is_made_up():
    with torch.device("meta"):
        model = Odd(scale=torch.full((), 2.5))
    rules, _ = advised(model)
    assert rules == {"scale": ..., "*": "own"}


def test_alike_names_share_a_rule():
    model = nn.ModuleList(Odd(gamma=torch.ones(3, 3), token=torch.randn(2, 2)) for _ in range(30))
    rules, _ = advised(model)
    assert rules == {"*.gamma": Constant(1.0), "*.token": ..., "*": "own"}
    model[7].gamma.data.zero_()
    rules, _ = advised(model)
    assert list(rules.items())[:2] == [("7.gamma", Constant(0.0)), ("*.gamma", Constant(1.0))]  # the first counts
    model = nn.ModuleList([Odd(gamma=torch.ones(3, 3)), nn.ParameterDict({"gamma": torch.ones(3, 3) * 2}), Odd()])
    assert list(advised(model)[0]) == ["1.gamma", "*.gamma", "*"]
    model = nn.ModuleList(Odd(**{f"w{index}": torch.ones(2, 2) for index in range(20)}) for _ in range(2))
    rules, said = advised(model)
    assert (len(rules), "8 more need a rule" in said) == (13, True)


def test_the_rules_that_were_passed_stay():
    rules, said = advised(Odd(a=torch.ones(2, 2), b=torch.zeros(2, 2)), {"a": Constant(0.5), "*": "he"})
    assert rules["b"] == Constant(0.0)
    assert rules["*"] == {"a": Constant(0.5), "*": "he"}
    assert "where recipe is the one that was passed" in said


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.long  # real libraries
@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "ASTModel", "Dinov2Model", "BeitModel", "MambaModel"])
@pytest.mark.parametrize("recipe", ["own", "torch", "he"])
def test_transformers(name, recipe):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    settings = dict(TINY)
    if name in ("CLIPModel", "SiglipModel"):
        vision = {**TINY, "image_size": 32, "patch_size": 16}
        settings = {"text_config": {**TINY, "vocab_size": 99}, "vision_config": vision}
    model = kind(kind.config_class(**settings))
    try:
        initlab.plan_model(model, 0, recipe)
    except ValueError:
        pasted(model, recipe)


@pytest.mark.long  # real libraries
@pytest.mark.parametrize(
    "name", ["test_vit", "cait_xxs24_224", "convnext_atto", "swinv2_tiny_window8_256", "eva02_tiny_patch14_224"]
)
@pytest.mark.parametrize("recipe", ["own", "torch", "he"])
def test_timm(name, recipe):
    build = models(["timm"]).get(f"timm {name}")
    if build is None:
        pytest.skip("timm is not in the set of packages that `make test-all` has")
    model = build()
    try:
        initlab.plan_model(model, 0, recipe)
    except ValueError:
        pasted(model, recipe)


def test_stacked_experts():
    """DBRX has all experts under each other in two dimensions: nothing tells a fan, and nothing is made up."""

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe_num_experts, self.hidden_size = 4, 16
            for name in ("w1", "v1", "w2"):
                setattr(self, name, nn.Parameter(torch.randn(4 * 24, 16) * 0.02))

    model = nn.ModuleDict({"router": nn.Linear(16, 4), "experts": Stacked()})
    for recipe in ("he", "xavier", "mitchell"):
        rules, said = advised(model, recipe)
        assert rules == {"experts.w1": ..., "experts.v1": ..., "experts.w2": ..., "*": recipe}
        assert "experts.w1 (in Stacked): the weights of experts in one parameter of shape 96 x 16" in said
        assert not pasted(model, recipe)
        report = initlab.init_model_(model, 0, {**rules, **dict.fromkeys(list(rules)[:3], Normal(0.0, 0.02))})
        assert {row.std for row in report.rows if row.why == "given"} == {0.02}
