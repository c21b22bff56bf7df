"""watch(): it names the module that produced the first non-finite value, in models of every kind."""

import copy
import dataclasses
import functools
import gc
import math
import threading
import warnings
from collections import OrderedDict, namedtuple

import pytest
import torch
from initlab.kernels import add_flag_
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import initlab
from initlab.watching import Fault, WatchReport, hooks
from initlab.watching.report import merge

NAN, INF = math.nan, math.inf


class Apply(nn.Module):
    """A module that is one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.fixture(params=["at once", "buffered"])
def how(request, monkeypatch):
    """Flags read as they are found, as on a CPU, and flags that stay in a device's buffer until they are asked for."""
    if request.param == "buffered":
        monkeypatch.setattr(hooks, "_SYNCHRONOUS", ())
    return request.param


def fault_of(model, *args, **options):
    with initlab.watch(model, **options) as watch:
        model(*args)
    assert hooks_of(model) == 0
    return watch.report().fault


def mlp(middle, dtype=torch.float32):
    torch.manual_seed(0)
    names = ("fc1", "act", "fc2", "middle", "fc3", "out")
    layers = (nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), middle, nn.Linear(16, 16), nn.Sigmoid())
    return nn.Sequential(OrderedDict(zip(names, layers, strict=True))).to(dtype)


class Block(nn.Module):
    def __init__(self, width, dropout=0.1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.softmax = nn.Softmax(-1)
        self.register_buffer("causal", torch.full((64, 64), -INF).triu(1))
        self.multiply_mask = False

    def forward(self, x, keep=None):
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / 10 + self.causal[:n, :n]
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None, :], -INF)
        if self.multiply_mask:
            scores = scores * (scores > -1e9)  # -inf * 0
        return self.proj((self.softmax(scores) @ v).transpose(1, 2).reshape(b, n, width))


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln1, self.attn, self.ln2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, keep=None):
        x = x + self.attn(self.ln1(x), keep=keep)
        return x + self.mlp(self.ln2(x))


class Transformer(nn.Module):
    def __init__(self, width=8, layers=3):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, 11)

    def forward(self, ids, keep=None):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, keep)
        return self.head(x)


class RNN(nn.Module):
    def __init__(self, cell):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.cell, self.read = nn.Linear(3, 5), cell, nn.Linear(5, 2)

    def forward(self, x):
        h = torch.zeros(x.shape[1], 5)
        for step in x:
            h = self.cell(self.embed(step), h)
        return self.read(h)


class Doubling(nn.Module):
    """A cell whose state doubles its exponent."""

    def forward(self, x, h):
        return (h + 16.0).pow(2)


IDS = torch.arange(12).view(2, 6) % 11


def planted(name):
    """(model, arguments, the module to blame, cause, tensor, flag)"""
    x, image = torch.randn(4, 8), torch.randn(2, 3, 9, 9)
    if name == "log of a negative":
        return mlp(Apply(lambda x: torch.log(-x.abs()))), (x,), "middle", "produced", "output", 1
    if name == "division by zero":
        return mlp(Apply(lambda x: 1 / (x - x))), (x,), "middle", "produced", "output", 2
    if name == "exp in float16":
        model = mlp(Apply(lambda x: torch.exp(x.abs() + 12)), torch.float16)
        return model, (x.half(),), "middle", "produced", "output", 2
    if name == "root of a negative":
        model = CNN()
        model.blocks[1].bn1 = Apply(lambda x: torch.sqrt(x - x.mean()))
        return model, (image,), "blocks.1.bn1", "produced", "output", 1
    if name == "softmax over a row of -inf":
        keep = torch.ones(2, 6, dtype=torch.bool)
        keep[1, 0] = False  # the first token sees itself only
        return Transformer(), (IDS, keep), "layers.0.attn.softmax", "produced", "output", 1
    if name == "NaN in running statistics":
        model = CNN().eval()
        model.blocks[0].bn2.running_mean[3] = NAN
        return model, (image,), "blocks.0.bn2", "parameter", "running_mean", 1
    if name == "inf in a weight":
        model = Transformer()
        with torch.no_grad():
            model.layers[1].mlp[2].weight[0, 0] = INF
        return model, (IDS,), "layers.1.mlp.2", "parameter", "weight", 2
    if name == "bad batch":
        image[1, 2, 8, 8] = NAN
        return CNN(), (image,), None, "input", "input 0 of the model", 1
    if name == "0 * -inf in an attention mask":
        model = Transformer()
        model.layers[2].attn.multiply_mask = True
        return model, (IDS,), "layers.2.attn", "produced", "own code, before it called 'layers.2.attn.softmax'", 1
    if name == "overflow in a float16 matmul":
        model = mlp(nn.Identity(), torch.float16)
        with torch.no_grad():
            model.fc2.weight.fill_(3e4)
            model.fc1.bias.fill_(10)
        return model, (x.half(),), "fc2", "produced", "output", 2
    if name == "overflow in a bfloat16 matmul":
        model = Transformer().bfloat16()
        with torch.no_grad():
            model.head.weight.fill_(3e38)
            model.layers[2].mlp[2].bias.fill_(100)
        return model, (IDS,), "head", "produced", "output", 2
    if name == "a state that explodes":
        return RNN(Doubling()), (torch.randn(9, 4, 3),), "cell", "produced", "output", 2
    if name == "NaN in an LSTM's weights":
        model = nn.Sequential(nn.Linear(3, 5), nn.LSTM(5, 5), Apply(lambda out: out[0]), nn.Linear(5, 2))
        with torch.no_grad():
            model[1].weight_hh_l0[0, 0] = NAN
        return model, (torch.randn(7, 4, 3),), "1", "parameter", "weight_hh_l0", 1
    raise AssertionError(name)


FAULTS = (
    *("log of a negative", "division by zero", "exp in float16", "root of a negative", "softmax over a row of -inf"),
    *("NaN in running statistics", "inf in a weight", "bad batch", "0 * -inf in an attention mask"),
    *("overflow in a float16 matmul", "overflow in a bfloat16 matmul", "a state that explodes"),
    "NaN in an LSTM's weights",
)


@pytest.mark.parametrize("mode", ["train", "no_grad", "inference", "backward=True"])
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults(name, mode, how):
    model, args, module, cause, tensor, flag = planted(name)
    with torch.set_grad_enabled(mode != "no_grad"), torch.inference_mode(mode == "inference"):
        fault = fault_of(model, *args, backward=mode == "backward=True")
    assert fault is not None
    assert (fault.phase, fault.module, fault.cause, fault.tensor) == ("forward", module, cause, tensor)
    assert fault.flag & flag
    assert fault.model_call == 1
    assert fault.module not in fault.passed_on
    if name == "a state that explodes":
        assert fault.call == 5  # 16, 2^10, 2^20, 2^40, 2^80, 2^160
    if module is not None:
        assert fault.kind == type(model.get_submodule(module)).__name__


@pytest.mark.parametrize("model", [CNN(), Transformer(), RNN(nn.GRUCell(5, 5)), mlp(nn.Tanh())])
@pytest.mark.parametrize("training", [True, False])
def test_healthy_models_have_no_fault(model, training, how):
    model.train(training)
    args = {CNN: torch.randn(2, 3, 9, 9), Transformer: IDS, RNN: torch.randn(9, 4, 3)}.get(
        type(model), torch.randn(4, 8)
    )
    with initlab.watch(model, backward=True) as watch:
        for _ in range(3):
            model(args).sum().backward()
    report = watch.report()
    assert report.fault is None
    assert report.model_calls == 3
    assert str(report) == f"nothing non-finite in 3 calls of the model, {report.calls} of its modules"


def test_what_only_passed_it_on(how):
    model = mlp(Apply(torch.log))
    fault = fault_of(model, torch.randn(4, 8))
    assert fault.module == "middle"
    assert fault.passed_on == ("fc3", "out")
    assert str(fault).splitlines() == [
        "call 1, forward: module 'middle' (Apply) produced NaN (float32) in its output",
        "  passed on by fc3, out",
    ]
    nested = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Sequential(Apply(lambda x: x / 0.0)), nn.ReLU()))
    fault = fault_of(nested, torch.randn(4, 8))
    assert fault.module == "0.1.0"
    assert fault.flag == 6
    assert fault.passed_on == ("0.2",)


def test_a_parameter_or_buffer_is_named_as_such(how):
    model = nn.Sequential(OrderedDict(down=nn.Linear(4, 4), norm=nn.BatchNorm1d(4))).eval()
    for module, name in (("norm", "running_mean"), ("down", "weight")):
        with torch.no_grad():
            getattr(model.get_submodule(module), name).view(-1)[0] = NAN
        kind = type(model.get_submodule(module)).__name__
        headline = f"call 1, forward: module '{module}' ({kind}): its {name} holds NaN (float32)"
        assert fault_of(model, torch.randn(2, 4)).headline == headline


def test_the_first_of_two(how):
    """What comes after the first and owes nothing to it is not said to pass it on."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (Apply(lambda x: x / 0.0) for _ in range(3))

        def forward(self, x):
            return self.c(self.a(x)), self.b(x)

    fault = fault_of(nn.Sequential(nn.Linear(8, 8), Two()), torch.randn(4, 8))
    assert (fault.module, fault.flag, fault.passed_on) == ("1.a", 6, ("1.c",))


def test_inputs_are_judged_before_modules_change_them(how):
    """A ReLU in place turns -inf into 0, and what its input was is still known."""
    model = nn.Sequential(nn.Linear(4, 4), Apply(lambda x: x * INF), nn.ReLU(inplace=True), nn.Linear(4, 4))
    assert fault_of(model, torch.randn(2, 4)).module == "1"
    hidden = nn.Sequential(Apply(lambda x: x.fill_(NAN)), nn.ReLU())
    fault = fault_of(hidden, torch.ones(3))
    assert (fault.module, fault.cause) == ("0", "produced")
    with torch.inference_mode():  # no version counters there
        assert fault_of(nn.Sequential(nn.Linear(2, 2), Apply(lambda x: x.fill_(NAN))), torch.ones(3, 2)).module == "1"


def test_a_containers_own_code(how):
    class Own(nn.Module):
        def __init__(self, place):
            super().__init__()
            self.a, self.b, self.place = nn.Linear(4, 4), nn.Linear(4, 4), place

        def forward(self, x):
            x = self.a(x)
            if self.place == "between":
                x = x.abs().neg().log()
            x = self.b(x)
            return x.abs().neg().log() if self.place == "end" else x

    for place, tensor in (("between", "own code, before it called '1.b'"), ("end", "output")):
        fault = fault_of(nn.Sequential(nn.Linear(4, 4), Own(place), nn.Linear(4, 4)), torch.randn(2, 4))
        assert (fault.module, fault.kind, fault.cause, fault.tensor) == ("1", "Own", "produced", tensor)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, 3),
        lambda x: [x],
        lambda x: {"a": (1, [x])},
        lambda x: namedtuple("Out", "first second")(None, x),
        lambda x: dataclasses.make_dataclass("Out", ["logits", "extra"])(x, "text"),
        lambda x: dataclasses.make_dataclass("Out", ["logits"], frozen=True)({"deep": x}),
    ],
)
def test_outputs_of_any_structure(wrap, how):
    def unwrap(x):
        while not isinstance(x, torch.Tensor):
            items = x.values() if isinstance(x, dict) else vars(x).values() if dataclasses.is_dataclass(x) else x
            x = next(i for i in items if not isinstance(i, int | str | None))
        return x

    model = nn.Sequential(nn.Linear(2, 2), Apply(lambda x: wrap(x / 0.0)), Apply(lambda x: unwrap(x) + 1))
    fault = fault_of(model, torch.ones(3, 2))
    assert (fault.module, fault.passed_on) == ("1", ("2",))
    model = nn.Sequential(Apply(lambda x: unwrap(x) + 1))
    assert fault_of(model, wrap(torch.tensor([NAN]))).cause == "input"


@pytest.mark.long
def test_huggingface_outputs(how):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    assert fault_of(model, IDS) is None
    with torch.no_grad():
        model.transformer.h[1].ln_2.weight[0] = INF
    fault = fault_of(model, IDS)
    assert (fault.module, fault.cause, fault.tensor) == ("transformer.h.1.ln_2", "parameter", "weight")


def test_weights_of_children_that_are_not_called(how):
    """MultiheadAttention multiplies by its out_proj's weight itself."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with torch.no_grad():
        model.self_attn.out_proj.weight[0, 0] = NAN
    for training in (True, False):
        fault = fault_of(model.train(training), torch.randn(2, 3, 8))
        assert (fault.module, fault.cause, fault.tensor) == ("self_attn", "parameter", "out_proj.weight")


def test_a_bad_weight_that_did_no_harm_is_not_to_blame(how):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(3, 4)

        def forward(self, ids):
            return self.embed(ids).abs().neg().log()

    model = nn.Sequential(Own())
    with torch.no_grad():
        model[0].embed.weight[2] = NAN
    fault = fault_of(model, torch.tensor([0, 1]))
    assert (fault.module, fault.cause) == ("0", "produced")
    fault = fault_of(model, torch.tensor([0, 2]))
    assert (fault.module, fault.cause, fault.tensor) == ("0.embed", "parameter", "weight")


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.mask = Apply(lambda x: x.masked_fill(x > 0, -INF))
        self.drop, self.sum = nn.Dropout(0.0), Apply(lambda x: x.exp().sum(-1))

    def forward(self, x):
        return self.sum(self.drop(self.mask(x)))


@pytest.mark.parametrize("allow", ["body.mask", ["first", "*.mask"], Apply, (Apply,)])
def test_allowed_modules(allow, how):
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), body=Masked()))
    x = torch.randn(3, 4)
    fault = fault_of(model, x)
    assert (fault.module, fault.flag) == ("body.mask", 4)
    assert fault_of(model, x, allow=allow) is None
    assert fault_of(model, x, allow=model.body.mask) is None
    model.body.mask.function = lambda x: x.masked_fill(x > 0, NAN)
    assert fault_of(model, x, allow=allow).module == "body.mask"
    model.body.mask.function = lambda x: x.masked_fill(x > 0, -INF)
    model.body.drop = Apply(lambda x: x * 0)
    fault = fault_of(model, x, allow="body.mask")
    assert (fault.module, fault.flag) == ("body.drop", 1)
    assert fault.notes == ("it also read -inf: output of module 'body.mask'",)


def test_masks_are_no_fault(how):
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((4, 4), -INF).triu(1))
            self.add = Apply(lambda x, mask: x + mask)

        def forward(self, x, mask):
            return self.add(self.add(x, mask), self.mask).softmax(-1)

    mask = torch.full((4, 4), -INF).triu(2)
    model = nn.Sequential()
    model.scores, model.forward = Scores(), lambda x, mask: model.scores(x, mask)
    assert fault_of(model, torch.randn(4, 4), mask) is None
    own = Apply(lambda x: model.scores.add(x, model.scores.mask))
    own.scores = model.scores
    own.register_buffer("mask", mask)
    assert fault_of(own, torch.randn(4, 4)) is None
    own.function = lambda x: x + own.mask
    assert fault_of(own, torch.randn(4, 4)) is None
    transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    x = torch.randn(2, 5, 8)
    with initlab.watch(transformer) as watch:
        transformer(x, x, src_mask=mask, tgt_mask=mask)
    assert watch.report().fault is None
    # But in the data, or where all of a row is masked, it is one.
    fault = fault_of(mlp(nn.Tanh()), torch.randn(4, 8).log())
    assert (fault.cause, fault.tensor) == ("input", "input 0 of the model")
    data = torch.randn(4, 8)
    data[0, 0] = -INF
    fault = fault_of(nn.Sequential(Apply(lambda x: x - x.mean())), data)
    assert (fault.cause, fault.flag) == ("input", 4)
    assert fault_of(model, torch.full((4, 4), -INF), mask[:4, :4]).cause == "input"
    fault = fault_of(model, torch.randn(4, 4), torch.full((4, 4), -INF))
    assert (fault.module, fault.flag) == ("scores", 1)


class Bad(torch.autograd.Function):
    """The identity; its gradient is divided by zero."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 0.0


def backward_fault(model, x, loss=lambda y: y.sum()):
    with initlab.watch(model, backward=True) as watch:
        loss(model(x)).backward()
    assert hooks_of(model) == 0
    assert not any(p._backward_hooks for p in model.parameters())
    return watch.report().fault


def test_gradients(how):
    model = mlp(Apply(Bad.apply))
    fault = backward_fault(model, torch.randn(4, 8))
    assert (fault.phase, fault.module, fault.cause) == ("backward", "middle", "produced")
    assert fault.tensor == "gradient of its input, which was output of module 'fc2'"
    assert fault.flag & 6
    assert fault.passed_on[0] == "fc2"
    with initlab.watch(model) as watch:  # only on request
        model(torch.randn(4, 8)).sum().backward()
    assert watch.report().fault is None


def test_the_root_of_zero_is_finite_and_its_gradient_is_not(how):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), Apply(torch.sqrt), nn.Linear(4, 1))
    nn.init.constant_(model[0].bias, -100.0)
    fault = backward_fault(model, torch.randn(3, 4))
    assert (fault.phase, fault.module) == ("backward", "2")


class BadWeight(nn.Linear):
    def forward(self, x):
        return F.linear(x, Bad.apply(self.weight), self.bias)


@pytest.mark.parametrize("place", [0, 2])
def test_gradients_of_parameters(place, how):
    """The first layer's input needs no gradient: the one of its weight is the only one."""
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)]
    layers[place] = BadWeight(4, 4)
    fault = backward_fault(nn.Sequential(*layers), torch.randn(3, 4))
    assert (fault.phase, fault.module, fault.cause) == ("backward", str(place), "produced")
    assert fault.tensor == "gradient of its weight"


def test_gradients_from_outside(how):
    fault = backward_fault(nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4), lambda y: (y - y).abs().sqrt().sum())
    assert (fault.phase, fault.module, fault.cause) == ("backward", None, "input")
    assert fault.tensor == "gradient of output of module '0'"


def test_gradients_of_a_containers_own_code(how):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(x) + Bad.apply(self.a(x))

    fault = backward_fault(nn.Sequential(nn.Linear(4, 4), Own(), nn.Linear(4, 4)), torch.randn(3, 4))
    assert (fault.module, fault.tensor) == ("1", "own code, in the gradient of output of module '1.a'")


def test_gradients_past_a_residual(how):
    class Residual(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return x + self.inner(x)

    model = nn.Sequential(nn.Linear(4, 4), Residual(Apply(Bad.apply)), Residual(nn.Linear(4, 4)))
    assert backward_fault(model, torch.randn(3, 4)).module == "1.inner"


def test_a_forward_fault_comes_before_a_backward_one(how):
    model = mlp(Apply(lambda x: x / 0.0))
    fault = backward_fault(model, torch.randn(4, 8))
    assert (fault.phase, fault.module) == ("forward", "middle")


def test_two_forwards_and_one_backward(how):
    model = mlp(Apply(Bad.apply))
    with initlab.watch(model, backward=True) as watch:
        (model(torch.randn(4, 8)).sum() + 0 * model(torch.randn(4, 8)).sum()).backward()
        assert watch.report().fault.module == "middle"


def training(model, steps, bad_at=None, **options):
    """Steps of SGD; at one of them the middle's bias of the second layer becomes NaN."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with initlab.watch(model, **options) as watch:
        for step in range(1, steps + 1):
            if step == bad_at:
                with torch.no_grad():
                    model.fc2.bias[0] = NAN
            optimizer.zero_grad()
            model(torch.randn(4, 8)).sum().backward()
            optimizer.step()
    return watch


def test_the_first_of_many_steps(how):
    """From the second bad step on every weight is NaN."""
    fault = training(mlp(nn.Tanh()), 9, 4).report().fault
    assert (fault.model_call, fault.module, fault.cause, fault.tensor) == (4, "fc2", "parameter", "bias")


def test_report_in_the_middle_changes_nothing(how):
    model = mlp(Apply(lambda x: x))
    with initlab.watch(model) as watch:
        for _ in range(3):
            y = model(torch.randn(4, 8))
            assert watch.report().fault is None
            y.sum().backward()
            assert watch.report().fault is None
        model.middle.function = lambda x: x * NAN
        model(torch.randn(4, 8))
        reports = [watch.report() for _ in range(3)]
    assert reports[0] == reports[1] == reports[2] == watch.report()
    assert (reports[0].fault.model_call, reports[0].model_calls, reports[0].calls) == (4, 4, 28)
    assert "call 4" in str(reports[0])


def test_every(how):
    with pytest.raises(FloatingPointError, match=r"(?s)call 4.*'fc2'.*bias") as raised:
        training(mlp(nn.Tanh()), 9, 4, every=3)
    assert "call 4" in str(raised.value)
    model = mlp(Apply(lambda x: x / 0.0))
    with pytest.raises(FloatingPointError, match="middle"):  # noqa: SIM117 - at the end of the block at the latest
        with initlab.watch(model, every=100):
            model(torch.randn(4, 8))
    assert hooks_of(model) == 0
    assert training(mlp(nn.Tanh()), 9, None, every=2).report().fault is None


def test_when_every_raises():
    model = mlp(Apply(lambda x: x / 0.0))
    watch = initlab.watch(model, every=1)
    with pytest.raises(FloatingPointError):
        model(torch.randn(4, 8))
    model(torch.randn(4, 8))  # once
    watch.remove()
    model = mlp(Apply(Bad.apply))
    watch = initlab.watch(model, every=2, backward=True)
    model(torch.randn(4, 8)).sum().backward()
    with pytest.raises(FloatingPointError, match=r"call 1, backward: .* in the gradient of its input"):
        model(torch.randn(4, 8))
    watch.remove()


def test_an_error_of_the_models_own_is_not_replaced(how):
    model = mlp(Apply(lambda x: x / 0.0))
    with pytest.raises(ZeroDivisionError), initlab.watch(model, every=100) as watch:  # noqa: PT012
        model(torch.randn(4, 8))
        raise ZeroDivisionError
    assert hooks_of(model) == 0
    assert watch.report().fault.module == "middle"


def test_hooks_are_removed():
    model = mlp(nn.Tanh())
    watch = initlab.watch(model)
    assert hooks_of(model) == 14
    watch.remove()
    assert hooks_of(model) == 0
    watch.remove()
    with pytest.raises(RuntimeError, match="has been removed"), watch:
        pass
    watch = initlab.watch(model, backward=True)
    y = model(torch.randn(4, 8))
    assert any(p._backward_hooks for p in model.parameters())
    assert y._backward_hooks
    del watch
    gc.collect()
    assert hooks_of(model) == 0
    assert not any(p._backward_hooks for p in model.parameters())
    assert not y._backward_hooks
    y.sum().backward()


def test_the_watch_keeps_no_model_and_no_tensor_alive():
    import weakref

    model = mlp(nn.Tanh())
    watch = initlab.watch(model)
    y = model(torch.randn(4, 8))
    gone = weakref.ref(model), weakref.ref(y)
    del model, y
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert watch.report().fault is None


def test_hooks_on_parameters_do_not_pile_up():
    model = mlp(nn.Tanh())
    with initlab.watch(model, backward=True):
        for _ in range(5):
            model(torch.randn(4, 8)).sum().backward()
        assert max(len(p._backward_hooks) for p in model.parameters()) == 1


def test_exceptions_in_a_module(how):
    """The failed call is closed: what follows is not taken for something inside it."""

    class Silent(BaseException):
        """Like a KeyboardInterrupt: no hook hears of it."""

    class Catching(nn.Module):
        def __init__(self, error):
            super().__init__()
            self.fails, self.error, self.good = nn.Sequential(Apply(self.fail)), error, nn.Linear(2, 2)

        def fail(self, x):
            raise self.error

        def forward(self, x):
            try:
                return self.fails(x)
            except self.error:
                return self.good(x)

    for error in (IndexError, Silent):
        model = nn.Sequential(nn.Linear(2, 2), Catching(error), Apply(lambda x: x / 0.0))
        with initlab.watch(model) as watch:
            model(torch.ones(1, 2))
            assert not watch._hooks.local.stack
        assert watch.report().fault.module == "2"
    model = mlp(Apply(lambda x: [][0]))
    with initlab.watch(model) as watch:
        with pytest.raises(IndexError):
            model(torch.randn(4, 8))
        model.middle.function = lambda x: x / 0.0
        model(torch.randn(4, 8))
    fault = watch.report().fault
    assert (fault.model_call, fault.module) == (2, "middle")


def test_interrupted_calls_are_closed(how):
    """No hook hears of a KeyboardInterrupt; the next call of the model is a new step all the same."""

    def interrupt(x):
        raise KeyboardInterrupt

    model = mlp(Apply(interrupt))
    with initlab.watch(model) as watch:
        for attempt in range(3):
            model.middle.function = interrupt
            with pytest.raises(KeyboardInterrupt):
                model(torch.randn(4, 8))
            model.middle.function = lambda x: x
            model(torch.randn(4, 8))
            assert watch.report().model_calls == 2 * attempt + 2
        model.middle.function = lambda x: x / 0.0
        model(torch.randn(4, 8))
    fault = watch.report().fault
    assert (fault.model_call, fault.module) == (7, "middle")


def test_models_that_call_themselves(how):
    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaf = Apply(lambda x: x + 1)

        def forward(self, x, depth=4):
            return self.leaf(x) if depth == 0 else self(x, depth - 1) - 1

    model = Tree()
    with initlab.watch(model) as watch:
        model(torch.ones(2))
        assert (watch.report().model_calls, watch.report().calls) == (1, 6)
        model.leaf.function = lambda x: x.neg().log()
        model(torch.ones(2))
    fault = watch.report().fault
    assert (fault.model_call, fault.module, fault.call, fault.passed_on) == (2, "leaf", 1, ("",))


def test_nested_watches(how):
    model = mlp(Apply(lambda x: x / 0.0))
    with initlab.watch(model) as outer, initlab.watch(model[3:], allow=()) as inner:
        model(torch.randn(4, 8))
        assert hooks_of(model) > 14
    assert hooks_of(model) == 0
    assert outer.report().fault.module == "middle"
    assert inner.report().fault.module == "middle"
    with initlab.watch(model) as outer:
        with initlab.watch(model):
            model(torch.randn(4, 8))
        assert hooks_of(model) == 14
    assert outer.report().fault.module == "middle"


def test_shared_modules_and_modules_not_called(how):
    shared = Apply(lambda x: x - 1)
    root = Apply(torch.log)
    model = nn.Sequential(OrderedDict(a=root, b=shared, c=root, unused=nn.Linear(1, 1)))
    model.forward = lambda x: model.c(model.b(model.a(x)))
    fault = fault_of(model, torch.tensor([2.0]))
    assert (fault.module, fault.call) == ("a", 2)
    assert "call 2" in str(fault)


def test_submodules_called_from_outside(how):
    model = nn.ModuleDict({"encode": nn.Linear(2, 2), "decode": Apply(lambda x: x / 0.0)})
    with initlab.watch(model) as watch:
        model["decode"](model["encode"](torch.randn(3, 2)))
    fault = watch.report().fault
    assert (fault.model_call, fault.module) == (2, "decode")


def test_filtered_modules(how):
    model = Transformer()
    with torch.no_grad():
        model.layers[1].mlp[2].weight[0, 0] = INF
    assert fault_of(model, IDS, modules=Layer).module == "layers.1"
    assert fault_of(model, IDS, modules="layers.1").module == "layers.1.mlp.2"
    assert fault_of(model, IDS, modules=["layers.2", "head"]).module == ""
    with initlab.watch(model, modules=(nn.LayerNorm, "head")):
        assert hooks_of(model) == 2 * (1 + 6 + 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"modules": "fc9"}, ValueError, "modules has 'fc9', which selects no module"),
        ({"allow": nn.Conv2d}, ValueError, "allow has <class"),
        ({"allow": [3]}, TypeError, "allow has 3; it must be the name of a module"),
        ({"allow": nn.ReLU()}, ValueError, "selects no module"),
        ({"every": 0}, ValueError, "every is 0; it must be a positive number of calls"),
        ({"every": 1.5}, ValueError, "every is 1.5"),
    ],
)
def test_bad_arguments(options, error, message):
    model = mlp(nn.Tanh())
    with pytest.raises(error, match=message):
        initlab.watch(model, **options)
    assert hooks_of(model) == 0
    with pytest.raises(TypeError, match=r"model is a function; it must be a torch\.nn\.Module"):
        initlab.watch(test_bad_arguments)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_activation_checkpointing(reentrant, backward, how):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(4, 4), inner, nn.Linear(4, 1)

        def forward(self, x):
            return self.last(checkpoint(self.inner, self.first(x), use_reentrant=reentrant))

    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), Apply(lambda x: x))
    model = Checkpointed(inner)
    gradients = []
    for watched in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        watch = initlab.watch(model, backward=backward) if watched else None
        for _ in range(2):
            model(torch.randn(3, 4)).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
    report = watch.report()
    assert (report.fault, report.model_calls) == (None, 2)
    assert report.calls > 16 if backward else report.calls == 16  # repeated calls are looked at for gradients only
    if backward:
        inner[3].function = Bad.apply
        model(torch.randn(3, 4)).sum().backward()
        fault = watch.report().fault
        assert (fault.phase, fault.module, fault.model_call) == ("backward", "inner.3", 3)
    else:
        inner[3].function = lambda x: x / 0.0
        model(torch.randn(3, 4)).sum().backward()
        fault = watch.report().fault
        assert (fault.phase, fault.module, fault.model_call) == ("forward", "inner.3", 3)
    watch.remove()


@pytest.mark.parametrize("backward", [True, False])
def test_selective_checkpointing_does_not_cache_what_watch_computes(backward, how):
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), Apply(lambda x: x * x.sum()), Apply(lambda x: x * x.sum().exp()))

        def forward(self, x):
            save = functools.partial(
                create_selective_checkpoint_contexts, lambda *args, **kw: CheckpointPolicy.MUST_SAVE
            )
            return checkpoint(self.body, x, use_reentrant=False, context_fn=save)

    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 4)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with initlab.watch(model, backward=backward) as watch, FlopCounterMode(display=False) as flops:
        model(x).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    assert watch.report().fault is None
    assert flops.get_total_flops() == 3 * 4 * 4 * 2 * 2  # forward, and the weight's gradient


def test_words_found_by_the_gpu_backend(serving, monkeypatch):
    """A device's whole path, with the kernel in its interpreter where there is no GPU."""
    monkeypatch.setattr(hooks, "_SYNCHRONOUS", ())
    model, args, module, cause, tensor, _ = planted("inf in a weight")
    with serving("triton"):
        fault = fault_of(model, *args, backward=True)
    assert (fault.module, fault.cause, fault.tensor, fault.flag) == (module, cause, tensor, 2)


def test_wrappers_give_no_names(how):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(nn.Linear(4, 4), checkpoint_wrapper(nn.Sequential(nn.ReLU(), Apply(lambda x: x / 0.0))))
    assert fault_of(model, torch.randn(3, 4)).module == "1.1"


def test_results_and_gradients_are_what_they_were(how):
    for model, x in ((CNN(), torch.randn(2, 3, 9, 9)), (Transformer(), IDS)):
        plain, watched = copy.deepcopy(model), model
        plain(x).sum().backward()
        with initlab.watch(watched, backward=True):
            watched(x).sum().backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))
        assert all(torch.equal(p, q) for p, q in zip(plain.buffers(), watched.buffers(), strict=True))


def test_autocast(how):
    model = nn.Sequential(nn.Linear(4, 4), Apply(lambda x: x * 3e38 * 10), nn.Linear(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert fault_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)) is None
        fault = fault_of(model, torch.randn(2, 4))
    assert (fault.module, fault.dtype) == ("1", torch.bfloat16)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, when it meets a graph break
def test_compiled_models(how):
    """Compiled code calls no new hooks: it is watched at its borders. What is compiled during the watch has breaks."""
    torch.compiler.reset()
    model = mlp(Apply(lambda x: x / (x - x)))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 8)
    compiled(x)
    with initlab.watch(compiled) as watch:
        compiled(x)
    report = watch.report()
    assert (report.fault.module, report.fault.cause, report.calls) == ("", "produced", 1)
    assert report.unseen == ("what runs inside the model, which is compiled",)
    with torch.compiler.set_stance("force_eager"), initlab.watch(compiled._orig_mod) as watch:
        compiled(x)
    assert watch.report().fault.module == "middle"
    assert hooks_of(model) == hooks_of(compiled) == 0

    torch.compiler.reset()
    with initlab.watch(model) as watch:
        compiled = torch.compile(model, backend="eager")
        compiled(x)
    report = watch.report()
    assert (report.fault.module, report.calls) == ("middle", 7)
    torch.compiler.reset()
    with initlab.watch(model), pytest.raises(Exception, match=r"(?i)torch\.compiler\.disable"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.compiler.reset()
    torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.compiler.reset()


def test_a_graph_cannot_capture_a_watched_model(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model = mlp(nn.Tanh())
    with initlab.watch(model), pytest.raises(RuntimeError, match=r"cannot be captured.*before the capture"):
        model(torch.randn(4, 8))


def test_lazy_modules_meta_tensors_and_transforms(how):
    model = nn.Sequential(nn.LazyLinear(4), Apply(lambda x: x / 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fault_of(model, torch.ones(2, 3)).module == "1"
    meta = mlp(nn.Tanh()).to("meta")
    assert fault_of(meta, torch.empty(4, 8, device="meta")) is None
    model = mlp(nn.Tanh())
    with initlab.watch(model) as watch:
        torch.func.vmap(model)(torch.randn(3, 4, 8))
        torch.func.jacrev(lambda x: model(x).sum())(torch.randn(4, 8))
    assert watch.report().fault is None


def test_subclasses_that_cannot_be_read(how):
    class Opaque(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func in (torch.Tensor.sum, torch.Tensor.isnan):
                raise NotImplementedError("no sum of these")
            return super().__torch_function__(func, types, args, kwargs or {})

    model = nn.Sequential(nn.Linear(2, 2), Apply(lambda x: x.as_subclass(torch.Tensor) / 0.0))
    x = torch.ones(3, 2).as_subclass(Opaque)
    assert fault_of(model, x).module == "1"


def test_scripted_parts_are_left_alone(how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(nn.Linear(2, 2))
    model = nn.Sequential(scripted, Apply(lambda x: x / 0.0))
    assert fault_of(model, torch.ones(3, 2)).module == "1"


def test_integers_sparse_tensors_and_nothing_at_all(how):
    class Odd(nn.Module):
        def forward(self, x, nothing=None):
            return {"n": None, "s": torch.eye(2).to_sparse(), "i": torch.arange(3), "c": x * 1j, "e": x[:0]}

    with initlab.watch(Odd()) as watch:
        pass
    assert watch.report().calls == 0
    assert fault_of(Odd(), torch.ones(2)) is None
    assert fault_of(Odd(), torch.tensor([1.0, NAN])).cause == "input"


def test_threads(how):
    """Calls that overlap are one step; each thread keeps its own account of what is inside what."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Apply(lambda x: x + 1), nn.Linear(4, 4)))
    errors = []

    def run():
        try:
            for _ in range(30):
                model(torch.randn(3, 4))
        except BaseException as error:
            errors.append(error)

    with initlab.watch(model) as watch:
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert watch.report().calls == 3 * 30 * 5
        model[1][0].function = lambda x: x / 0.0
        model(torch.randn(3, 4))
    assert not errors
    assert watch.report().fault.module == "1.0"


def test_tensors_are_read_once(monkeypatch):
    """The batch, and each module's output; not what one hands on to the next, nor a container's output."""
    read = []
    monkeypatch.setattr(hooks, "all_finite_fast", lambda tensor: not read.append(tuple(tensor.shape)))
    model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.ReLU(inplace=True), nn.Identity()), nn.Linear(5, 3))
    with initlab.watch(model):
        model(torch.randn(2, 4))
        assert read == [(2, 4), (2, 5), (2, 5), (2, 3)]


class Flagging(nn.Linear):
    """A stand-in for a fused layer: relu(linear), whose word is that of the value before ReLU."""

    flag = None

    def write_flag_to(self, flag):
        assert flag is None or (flag.dtype, flag.shape) == (torch.int32, (1,))
        self.flag = flag

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.flag is not None:
            add_flag_(self.flag, y)
        return y.relu_()


def test_modules_that_flag_themselves(how):
    model = nn.Sequential(nn.Linear(4, 4), Flagging(4, 4), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    assert fault_of(model, x) is None
    assert model[1].flag is None
    with torch.no_grad():
        model[0].bias.fill_(1e38)
        model[1].weight.fill_(-1e38)
    with torch.inference_mode():
        fault = fault_of(model, x)
    assert (fault.module, fault.flag, fault.cause) == ("1", 4, "produced")  # which ReLU has hidden
    assert model[1].flag is None
    model[1].forward = lambda x: [][0]
    with pytest.raises(IndexError):
        fault_of(model, x)
    assert model[1].flag is None


def test_their_outputs_are_not_read_again(monkeypatch):
    read = []
    monkeypatch.setattr(hooks, "all_finite_fast", lambda tensor: not read.append(tuple(tensor.shape)))
    model = nn.Sequential(Flagging(4, 5), nn.Linear(5, 3))
    with initlab.watch(model):
        model(torch.randn(2, 4))
    assert read == [(2, 4), (2, 3)]


def seen(**what):
    """What a rank reports that has seen one fault."""
    usual = {
        "step": 1,
        "model_call": 3,
        "phase": "forward",
        "cause": "produced",
        "module": "h.1",
        "kind": "MLP",
        "call": 1,
    }
    fault = Fault(**{**usual, "tensor": "output", "flag": 1, "dtype": torch.float32, **what})
    return WatchReport(fault, steps=0, model_calls=4, calls=10, inspected=20)


FROM_OUTSIDE = {"cause": "input", "module": None, "kind": "", "call": 0, "tensor": "input 0 of the model"}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"model_call": 2, "phase": "backward", **FROM_OUTSIDE}, {"model_call": 3}, id="call"),
        pytest.param({"step": 1, "model_call": 4}, {"step": 2, "model_call": 3}, id="step"),
        pytest.param({"phase": "forward", **FROM_OUTSIDE}, {"phase": "backward", "cause": "parameter"}, id="phase"),
        pytest.param({"after": 9}, {"after": 0, **FROM_OUTSIDE}, id="a stage gets what another produced"),
        pytest.param({"after": 9}, {"cause": "parameter", "from_all_gather": True}, id="a shard of another rank's"),
        pytest.param(
            {"cause": "parameter", "after": 4},
            {"cause": "parameter", "after": 1, "from_all_gather": True},
            id="the rank whose shard it is",
        ),
        pytest.param({"after": 4}, {"cause": "parameter", "after": 5}, id="the sum over ranks comes later"),
        pytest.param({"cause": "parameter", "after": 4}, {"after": 4}, id="parameter"),
        pytest.param({**FROM_OUTSIDE, "after": 0}, {**FROM_OUTSIDE, "after": 1}, id="both from outside"),
    ],
)
def test_what_comes_first(first, second):
    for ranks in ((0, 1), (5, 2)):
        reports = dict(sorted(zip(ranks, (seen(**first), seen(**second)), strict=True)))
        found = merge(reports)
        assert [found.fault.rank, *(fault.rank for fault in found.others)] == list(ranks)
        assert dataclasses.replace(found.fault, rank=None) == reports[ranks[0]].fault


def test_of_equals_the_lowest_rank():
    found = merge({3: seen(), 1: seen(), 7: WatchReport(None, 0, 9, 2)})
    assert [found.fault.rank, *(fault.rank for fault in found.others)] == [1, 3]
    assert (found.ranks, found.model_calls, found.calls) == ((1, 3, 7), 9, 22)


def test_a_printed_report_of_ranks():
    reports = {rank: seen(module="h.2", after=5) for rank in (0, 2, 3)}
    reports |= {1: seen(passed_on=("h.2", "")), 4: seen(**FROM_OUTSIDE), 5: WatchReport(None, 0, 4, 10, inspected=20)}
    assert str(merge(reports)).splitlines() == [
        "rank 1, call 3, forward: module 'h.1' (MLP) produced NaN (float32) in its output",
        "  passed on by h.2, the model itself",
        "  also ranks 0, 2-3, call 3, forward: module 'h.2' (MLP) produced NaN (float32) in its output",
        "  also rank 4, call 3, forward: input 0 of the model holds NaN (float32); no module produced it",
        "  (4 calls of the model, 60 of its modules, 6 ranks)",
    ]
    many = merge({rank: seen(module=f"h.{rank}", after=rank) for rank in range(9)})
    assert str(many).splitlines()[-2:] == [
        "  and 5 more: ranks 4-8",
        "  (4 calls of the model, 90 of its modules, 9 ranks)",
    ]
    none = merge({rank: WatchReport(None, 0, 4, 10, inspected=20) for rank in range(2)})
    assert str(none) == "nothing non-finite in 4 calls of the model, 20 of its modules, 2 ranks"


def test_across_needs_other_ranks():
    with initlab.watch(nn.Linear(2, 2)) as watch:
        with pytest.raises(RuntimeError, match="not initialised: call init_process_group first"):
            watch.report(across=True)
        assert watch.report(across=False) == watch.report(across=None) == watch.report()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match=r"across is 1; it must be a ProcessGroup, a DeviceMesh, True"):
            watch.report(across=1)
        assert watch.report(across=torch.distributed.group.WORLD).ranks == (0,)
        mesh = torch.distributed.init_device_mesh("cpu", (1, 1))
        assert watch.report(across=mesh).ranks == (0,)
    finally:
        torch.distributed.destroy_process_group()
