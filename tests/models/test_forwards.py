"""Which activation a weight meets, read off forward functions: every way in which one writes them."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import initlab
from initlab.models.activations import activations_after


class Net(nn.Module):
    """Two layers, and a forward that is given."""

    def __init__(self, forward, **attributes):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        for name, value in attributes.items():
            setattr(self, name, value)
        self.__class__ = type("Net", (Net,), {"forward": forward})


def seen(model):
    """By the name of the layer, the activation that it meets."""
    after = activations_after(model)
    names = {id(module): name for name, module in model.named_modules()}
    return {f"{names[module]}.{attribute}": activation.name for (module, attribute), activation in after.items()}


def functional(self, x):
    return self.b(F.relu(self.a(x)))


def of_torch(self, x):
    return self.b(torch.tanh(self.norm(self.a(x))))


def by_method(self, x):
    x = self.a(x).relu_()
    return self.b(x).view(-1).sigmoid()


def by_attribute(self, x):
    hidden = self.a(x)
    hidden = self.norm(hidden) if self.training else hidden
    return self.b(self.activation_fn(hidden))


def in_a_helper(self, x):
    return self.b(self.feed(self.a(x), act=F.gelu))


def by_configuration(self, x):
    return self.b(TABLE[self.config.hidden_act](self.a(x)))


def over_a_list(self, x):
    for layer in [self.a, self.b]:
        x = F.silu(layer(x))
    return x


def over_a_module_list(self, x):
    for index, layer in enumerate(self.layers[:-1]):
        x = F.elu(layer(x)) + index
    return self.layers[-1](x)


def after_a_sum(self, x):
    out = self.norm(self.a(x))
    out += x
    return F.relu(out)


def gated(self, x):
    gate, up = self.a(x).chunk(2, dim=-1)
    return self.b(F.silu(gate) * up)


def silu_written_out(self, x):
    x = self.a(x)
    return self.b(x * torch.sigmoid(1.702 * x))


def raw_parameter(self, x):
    return torch.tanh(F.linear(x, self.a.weight) @ self.b.weight)


def on_one_side(self, x):
    if x.shape[0] > 3:
        y = self.a(x)
    else:
        z = self.b(x)
        y = self.norm(z)
    return F.softplus(y)


def attention(self, x):
    scores = self.a(x) @ self.b(x).transpose(-1, -2)
    return F.softmax(scores / x.size(-1), dim=-1)


def not_python(self, x):
    return eval("F.relu(self.a(x))")


TABLE = {"gelu": nn.GELU()}


@pytest.mark.parametrize(
    ("forward", "attributes", "expected"),
    [
        (functional, {}, {"a.weight": "relu"}),
        (of_torch, {}, {"a.weight": "tanh"}),
        (by_method, {}, {"a.weight": "relu", "b.weight": "sigmoid"}),
        (by_attribute, {"activation_fn": nn.SELU()}, {"a.weight": "SELU"}),
        (by_attribute, {"activation_fn": F.leaky_relu}, {"a.weight": "leaky_relu"}),
        (in_a_helper, {"feed": lambda x, act: act(x)}, {}),
        (by_configuration, {"config": SimpleNamespace(hidden_act="gelu")}, {"a.weight": "GELU"}),
        (over_a_list, {}, {"a.weight": "silu", "b.weight": "silu"}),
        (
            over_a_module_list,
            {"layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))},
            {"layers.0.weight": "elu", "layers.1.weight": "elu"},
        ),
        (after_a_sum, {}, {"a.weight": "relu"}),
        (gated, {}, {"a.weight": "silu"}),
        (silu_written_out, {}, {"a.weight": "silu"}),
        (raw_parameter, {}, {"b.weight": "tanh"}),
        (on_one_side, {}, {"a.weight": "softplus", "b.weight": "softplus"}),
        (attention, {}, {}),
        (not_python, {}, {}),
    ],
)
def test_what_a_forward_says(forward, attributes, expected):
    model = Net(forward, **attributes)
    assert seen(model) == expected
    row = next(row for row in initlab.plan_model(model, 0, "auto").rows if row.name == "a.weight")
    assert row.guess == ("a.weight" in expected)


def test_what_a_method_of_the_model_does_counts():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

        def feed(self, x, act=torch.relu):
            return act(self.norm(x))

        def forward(self, x):
            return self.b(self.feed(x=self.a(x)))

    assert seen(Own()) == {"a.weight": "relu"}


@pytest.mark.parametrize(
    ("name", "mean_square"),
    [("ReLUSquaredActivation", 1.0), ("NewGELUActivation", None), ("QuickGELUActivation", None), ("SiLU", None)],
)
def test_activations_of_others_are_known_by_name(name, mean_square):
    kind = type(name, (nn.Module,), {"forward": lambda self, x: torch.relu(x) ** 2})
    row = initlab.plan_model(nn.Sequential(nn.Linear(256, 8), kind()), 0, "auto").rows[0]
    assert row.why == f"He, before {name}"
    assert row.guess
    if mean_square is None:
        assert row.std == pytest.approx(math.sqrt(2 / 256))
    else:  # the activation keeps the mean square of its input
        x = torch.randn(1 << 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * row.std * 16
        assert float((torch.relu(x) ** 2).square().mean()) == pytest.approx(mean_square, rel=0.02)


def test_what_is_no_activation_is_not_taken_for_one():
    class ReLUAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x)

    assert seen(nn.Sequential(nn.Linear(8, 8), ReLUAttention())) == {}


@pytest.mark.long  # transformers
@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 2}, {"mlp.c_fc": "NewGELUActivation"}),
        ("LlamaForCausalLM", {}, {"mlp.gate_proj": "SiLUActivation"}),
        (
            "BertForMaskedLM",
            {},
            {"intermediate.dense": "GELUActivation", "predictions.transform.dense": "GELUActivation"},
        ),
        ("T5ForConditionalGeneration", {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2}, {".wi": "ReLU"}),
        ("OPTForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32}, {"fc1": "ReLU"}),
        ("MixtralForCausalLM", {"num_key_value_heads": 2}, {"experts.gate_up_proj": "SiLUActivation"}),
    ],
)
def test_transformers(name, settings, expected):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    common = {} if "d_model" in settings or "n_embd" in settings else common
    model = kind(kind.config_class(vocab_size=64, **common, **settings))
    found = seen(model)
    assert found
    for weight, activation in found.items():
        assert any(part in weight and activation == name for part, name in expected.items()), weight
    assert all(any(part in weight for weight in found) for part in expected)
