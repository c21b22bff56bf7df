"""LinearReLU: nn.Linear's state and He's distribution."""

import copy
import pickle

import pytest
import torch
from torch import nn

import initlab
from initlab import LinearReLU, fuse_linear_relu


@pytest.mark.parametrize("bias", [True, False])
def test_the_state_is_that_of_a_linear_layer(bias):
    ours, theirs = LinearReLU(5, 3, bias), nn.Linear(5, 3, bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 5)
    assert torch.equal(ours(x), theirs(x).relu())
    theirs.load_state_dict(LinearReLU(5, 3, bias).state_dict())
    assert repr(ours) == repr(theirs).replace("Linear", "LinearReLU")
    assert not isinstance(ours, nn.Linear)  # what swaps those would lose the ReLU


def test_he_distribution_from_the_stream():
    torch.manual_seed(3)
    layer = LinearReLU(400, 300)
    torch.manual_seed(3)
    assert torch.equal(layer.weight, initlab.init.kaiming_normal_(torch.empty(300, 400), nonlinearity="relu"))
    assert layer.weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert not layer.bias.any()
    x = layer(torch.randn(2000, 400))
    assert x.square().mean().item() == pytest.approx(1.0, rel=0.05)  # it keeps the signal's mean square


def test_squared_relu_is_shown_initialised_and_refused():
    layer = LinearReLU(400, 300, activation="relu_squared")
    assert repr(layer) == "LinearReLU(in_features=400, out_features=300, bias=True, activation='relu_squared')"
    x = torch.randn(2000, 400)
    assert torch.equal(layer(x), torch.relu(torch.nn.functional.linear(x, layer.weight, layer.bias)).square())
    assert layer(x).square().mean().item() == pytest.approx(1.0, rel=0.1)  # it keeps the signal's mean square
    with pytest.raises(ValueError, match="""activation is 'gelu'; it must be "relu" or "relu_squared\""""):
        LinearReLU(2, 2, activation="gelu")


@pytest.mark.parametrize("recipe", ["own", "auto", "torch"])
def test_recipes_know_squared_relu(recipe):
    model = nn.Sequential(LinearReLU(400, 400, activation="relu_squared"), nn.Linear(400, 400))
    initlab.init_model_(model, seed=0, recipe=recipe)
    assert model[0].weight.std().item() == pytest.approx((2 / 3) ** 0.25 / 20, rel=0.02)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "relu_squared"])
def test_torchscript(activation, bias, tmp_path):
    """Values and flags, after a round trip through a file too, which needs no initlab."""
    layer = LinearReLU(4, 4, bias, activation=activation)
    layer.flags = torch.zeros(1, dtype=torch.int32)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
    torch.jit.script(layer).save(tmp_path / "layer.pt")
    scripted = torch.jit.load(tmp_path / "layer.pt")
    for planted in (1.0, float("nan"), float("inf"), float("-inf"), 2.0**64, -(2.0**64)):
        x = torch.randn(3, 4)
        x[1, 2] = planted
        layer.flags.zero_()
        scripted.flags.zero_()
        torch.testing.assert_close(scripted(x), layer(x), equal_nan=True)
        assert int(scripted.flags) == int(layer.flags), planted
    layer.flags = None
    assert torch.equal(torch.jit.script(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*quantiz:DeprecationWarning", "ignore:.*quantiz:UserWarning")
def test_what_quantisation_passes_over_is_said():
    model = nn.Sequential(LinearReLU(4, 3), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="does not know LinearReLU and leaves it as it is; put Linear and ReLU back"):
        quantised = torch.ao.quantization.quantize_dynamic(model)
    assert type(quantised[0]) is LinearReLU
    assert quantised(torch.randn(2, 4)).shape == (2, 2)


def test_where_and_in_what():
    layer = LinearReLU(4, 3, device="meta", dtype=torch.bfloat16)
    assert layer.weight.is_meta
    assert layer.bias.dtype == torch.bfloat16
    with torch.device("meta"):
        assert LinearReLU(4, 3).weight.is_meta


def test_flags_of_a_module():
    layer = LinearReLU(4, 3)
    assert layer.flags is None
    layer.flags = torch.zeros(1, dtype=torch.int32)
    layer(torch.full((2, 4), float("nan")))
    assert int(layer.flags) == 1
    assert list(layer.state_dict()) == ["weight", "bias"]
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    again(torch.zeros(2, 4))
    assert int(again.flags) == 1


def test_in_a_model_that_is_compiled_or_called_functionally():
    torch._dynamo.reset()
    model = nn.Sequential(LinearReLU(4, 3), nn.Linear(3, 2))
    model[0].flags = torch.zeros(1, dtype=torch.int32)
    x = torch.randn(5, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    assert int(model[0].flags) == 0
    doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
    torch.func.functional_call(model, doubled, (x,)).sum().backward()
    compiled(x * float("inf"))
    assert int(model[0].flags)


@pytest.mark.parametrize("recipe", ["torch", "own", "he", "xavier", "lecun", "auto", "gpt2", "trunc_normal"])
def test_recipes_know_the_module(recipe):
    """Fused or not, a model gets the same values; but recipes that ask the module give it its own distribution."""

    def model():
        layers = (nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 8), nn.ReLU(), nn.Tanh())
        return nn.Sequential(*layers)

    plain, fused = model(), model()
    assert fuse_linear_relu(fused).fused == ("0", "3")
    named = recipe
    recipe = initlab.recipes.own(check=False) if recipe == "own" else recipe  # fusing keeps the values of Linear
    rows = zip(initlab.plan_model(fused, 0, recipe).rows, initlab.plan_model(plain, 0, recipe).rows, strict=True)
    for ours, theirs in rows:
        if named in ("torch", "own") and ours.name[0] in "03":
            fan_in = 64 if ours.name[0] == "0" else 16
            assert ours.std == (0 if "bias" in ours.name else pytest.approx((2 / fan_in) ** 0.5))
        else:
            assert (ours.name, ours.distribution, ours.fan) == (theirs.name, theirs.distribution, theirs.fan)


def test_watch_reads_the_layers_own_flag():
    """The flag of the value before ReLU: a -inf that ReLU hides is found, in the layer that made it."""
    model = nn.Sequential(nn.Linear(3, 4), LinearReLU(4, 5), nn.Linear(5, 2))
    model[1].flags = torch.zeros(1, dtype=torch.int32)
    with torch.no_grad():
        model[1].weight.fill_(-3e38)
        model[0].weight.fill_(1.0)
    with initlab.watch(model) as watching:
        assert bool(model(torch.full((2, 3), 2.0)).isfinite().all())
    fault = watching.report().fault
    assert (fault.module, fault.cause, fault.flag) == ("1", "produced", 4)
    assert int(model[1].flags) == 4
    assert model[1]._watch_flag is None
    model(torch.ones(2, 3))
