"""What initlab knows of layers, against torch: distributions, fans, and what it reads off a reset_parameters.

Torch's distributions come from torch twice: from values that it draws, and from the arguments that reach its kernels.
"""

import contextlib
import functools
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from initlab.kernels import Constant, Normal, Uniform
from scipy import stats
from torch import nn
from torch.nn import init
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import initlab
from initlab.models.fans import compute_fans
from initlab.models.specs import DimSlice, InitTrace

SEEDS = range(16)
SAMPLE = 30_000  # values of each side in a Kolmogorov-Smirnov test
ALARM = 1e-10  # p-value; with some 500 comparisons a false alarm is one in 10^7, were the seeds not fixed
RECIPES = ("torch", "own", "he", "xavier", "lecun", "gpt2", "trunc_normal", "auto", "depth_scaled", "mitchell")


def spoil(model):
    """Something that no distribution gives."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_distributions(theirs, ours):
    """Two samples of a model's tensors: constants and rows of zeros are exact, the rest has one distribution."""
    for name in theirs[0]:
        a, b = (torch.stack([each[name] for each in sample]) for sample in (theirs, ours))
        if a.min() == a.max():
            assert torch.equal(a, b), name
            continue
        assert torch.equal(zero_rows(a), zero_rows(b)), name
        a, b = a.flatten()[:SAMPLE], b.flatten()[:SAMPLE]
        assert stats.ks_2samp(a.numpy(), b.numpy(), method="asymp").pvalue > ALARM, name


def zero_rows(stacked):
    return (stacked == 0).flatten(2).all(2) if stacked.dim() > 2 else torch.tensor(False)


# ---------------------------------------------------------------------------------------------------------------
# The distributions of torch.nn


def transformer():
    return nn.Transformer(32, 2, 2, 1, 64, batch_first=True)


def transformer_encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2)


def transformer_decoder():
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 2, 64), 1)


def layer(build, *arguments, **named):
    settings = ", ".join([*map(str, arguments), *(f"{name}={value}" for name, value in named.items())])
    return pytest.param(functools.partial(build, *arguments, **named), id=f"{build.__name__}({settings})")


LAYERS = [
    layer(nn.Linear, 96, 64),
    layer(nn.Linear, 96, 64, bias=False),
    layer(NonDynamicallyQuantizableLinear, 96, 64),
    layer(nn.Bilinear, 24, 20, 64),
    layer(nn.Bilinear, 24, 20, 64, bias=False),
    layer(nn.Conv1d, 32, 64, 5),
    layer(nn.Conv1d, 32, 64, 5, groups=4, bias=False),
    layer(nn.Conv2d, 16, 64, 3, stride=2, padding=1),
    layer(nn.Conv2d, 64, 128, (3, 5), groups=64),
    layer(nn.Conv2d, 16, 64, 3, dilation=2, padding=2, padding_mode="circular"),
    layer(nn.Conv3d, 6, 64, (1, 2, 3)),
    layer(nn.ConvTranspose1d, 48, 32, 4, stride=2),
    layer(nn.ConvTranspose2d, 32, 64, 3, stride=2, groups=4),
    layer(nn.ConvTranspose2d, 32, 64, 3, bias=False),
    layer(nn.ConvTranspose3d, 8, 64, 2),
    layer(nn.BatchNorm1d, 64),
    layer(nn.BatchNorm1d, 64, affine=False),
    layer(nn.BatchNorm2d, 64, track_running_stats=False),
    layer(nn.BatchNorm3d, 64, momentum=None),
    layer(nn.SyncBatchNorm, 64),
    layer(nn.InstanceNorm1d, 64),
    layer(nn.InstanceNorm1d, 64, affine=True),
    layer(nn.InstanceNorm2d, 64, affine=True, track_running_stats=True),
    layer(nn.InstanceNorm3d, 64, track_running_stats=True),
    layer(nn.GroupNorm, 4, 64),
    layer(nn.GroupNorm, 4, 64, affine=False),
    layer(nn.LayerNorm, (8, 16)),
    layer(nn.LayerNorm, 64, bias=False),
    layer(nn.LayerNorm, 64, elementwise_affine=False),
    layer(nn.RMSNorm, 64),
    layer(nn.RMSNorm, (8, 16), elementwise_affine=False),
    layer(nn.Embedding, 80, 48),
    layer(nn.Embedding, 80, 48, padding_idx=0),
    layer(nn.Embedding, 80, 48, padding_idx=-3, max_norm=1.0),
    layer(nn.EmbeddingBag, 80, 48),
    layer(nn.EmbeddingBag, 80, 48, mode="sum", padding_idx=5),
    layer(nn.RNN, 24, 40, num_layers=2, nonlinearity="relu"),
    layer(nn.RNN, 24, 40, bias=False, bidirectional=True),
    layer(nn.LSTM, 24, 40, num_layers=2, bidirectional=True),
    layer(nn.LSTM, 24, 40, proj_size=16),
    layer(nn.GRU, 24, 40),
    layer(nn.RNNBase, "GRU", 24, 40),
    layer(nn.RNNCell, 24, 80),
    layer(nn.LSTMCell, 24, 40),
    layer(nn.GRUCell, 24, 40, bias=False),
    layer(nn.RNNCellBase, 24, 40, True, num_chunks=3),
    layer(nn.MultiheadAttention, 48, 4),
    layer(nn.MultiheadAttention, 48, 4, bias=False),
    layer(nn.MultiheadAttention, 48, 4, add_bias_kv=True),
    layer(nn.MultiheadAttention, 48, 4, kdim=32, vdim=80),
    layer(transformer),
    layer(transformer_encoder),
    layer(transformer_decoder),
    layer(nn.PReLU),
    layer(nn.PReLU, 64, init=0.1),
    layer(nn.AdaptiveLogSoftmaxWithLoss, 48, 200, [40, 100]),
    layer(nn.AdaptiveLogSoftmaxWithLoss, 48, 200, [40], div_value=2.0, head_bias=True),
]
# A lazy class, its arguments once the size of the input is left out, and the shape of an input of size 64.
LAZY = [
    (nn.LazyLinear, (48,), (2, 64)),
    (nn.LazyConv1d, (48, 3), (2, 64, 5)),
    (nn.LazyConv2d, (48, 3), (2, 64, 5, 5)),
    (nn.LazyConv3d, (48, 3), (2, 64, 5, 5, 5)),
    (nn.LazyConvTranspose1d, (48, 3), (2, 64, 5)),
    (nn.LazyConvTranspose2d, (48, 3), (2, 64, 5, 5)),
    (nn.LazyConvTranspose3d, (48, 3), (2, 64, 5, 5, 5)),
    (nn.LazyBatchNorm1d, (), (2, 64)),
    (nn.LazyBatchNorm2d, (), (2, 64, 5, 5)),
    (nn.LazyBatchNorm3d, (), (2, 64, 5, 5, 5)),
    (nn.LazyInstanceNorm1d, (1e-5, 0.1, True, True), (2, 64, 5)),
    (nn.LazyInstanceNorm2d, (1e-5, 0.1, True, True), (2, 64, 5, 5)),
    (nn.LazyInstanceNorm3d, (1e-5, 0.1, True, True), (2, 64, 5, 5, 5)),
]
lazy = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")


def reset_of(kind):
    return getattr(kind, "reset_parameters", None) or getattr(kind, "_reset_parameters", None)


def test_no_layer_of_torch_is_missing_from_the_tables():
    rooms = [nn, nn.modules]
    rooms += [importlib.import_module(f"torch.nn.modules.{m.name}") for m in pkgutil.iter_modules(nn.modules.__path__)]
    found = {kind for room in rooms for kind in vars(room).values() if inspect.isclass(kind) and reset_of(kind)}
    public = {kind for kind in found if issubclass(kind, nn.Module) and not kind.__name__.startswith("_")}
    assert len(public) > 45
    built = {type(module) for case in LAYERS for module in case.values[0]().modules()}
    assert public - built - {kind for kind, *_ in LAZY} == set()


@pytest.mark.parametrize("build", LAYERS)
def test_values_have_the_distributions_of_torchs(build):
    model = build()
    theirs, ours = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        theirs.append(copied(build()))
        spoil(model)
        report = initlab.init_model_(model, seed, "torch")
        ours.append(copied(model))
    same_distributions(theirs, ours)
    for row in report.rows:
        values = ours[-1][row.name]
        if isinstance(row.distribution, Uniform) and values.numel():
            assert row.distribution.low <= values.min() <= values.max() < row.distribution.high, row.name


class Watch(TorchDispatchMode):
    """Notes the distribution of the last write to each memory, below torch.nn.init and all that Python can redirect."""

    KERNELS = {torch.ops.aten.uniform_.default: Uniform, torch.ops.aten.normal_.default: Normal}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.drawn = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.endswith("_"):
            place = args[0].data_ptr(), args[0].numel()
            self.drawn[place] = self.KERNELS[func](*args[1:]) if func in self.KERNELS else None  # defaults agree
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("build", LAYERS)
def test_distributions_are_torchs_to_the_last_digits(build):
    model = build()
    spoil(model)
    with Watch() as watch:
        model.apply(lambda module: (reset_of(type(module)) or (lambda module: None))(module))
    rows = {row.name: row for row in initlab.plan_model(model, 0, "torch").rows}
    tensors = model.state_dict(keep_vars=True)
    assert rows.keys() == tensors.keys()
    for name, tensor in tensors.items():
        row, distribution = rows[name], watch.drawn.get((tensor.data_ptr(), tensor.numel()))
        if distribution is None:
            assert isinstance(row.distribution, Constant), name
            assert (tensor == row.distribution.value).all(), name
        else:
            assert type(row.distribution) is type(distribution), name
            for field in distribution.__dataclass_fields__:
                assert getattr(row.distribution, field) == pytest.approx(
                    getattr(distribution, field), rel=1e-14, abs=0.0
                ), name
            zeros = zero_rows(tensor.detach()[None]).nonzero()[:, -1].tolist() if tensor.dim() > 1 else []
            assert row.slices == tuple((DimSlice(0, row, 1), Constant(0.0)) for row in zeros), name


@lazy
@pytest.mark.parametrize(("kind", "arguments", "shape"), LAZY)
def test_lazy_layers(kind, arguments, shape):
    model = nn.Sequential(nn.Linear(3, 3), kind(*arguments))
    with pytest.raises(ValueError, match=r"^1\.(weight|bias) has no shape yet.*run a batch"):
        initlab.init_model_(model, 0)
    assert len(initlab.plan_model(model, only="0").rows) == 2
    model[1](torch.zeros(shape))
    assert type(model[1]) is not kind
    ordinary = nn.Sequential(nn.Linear(3, 3), type(model[1])(64, *arguments))
    assert initlab.init_model_(model, 0).rows == initlab.plan_model(ordinary).rows


def test_channels_last_and_subclasses_have_the_distribution_of_the_layer():
    class Mine(nn.Conv2d):
        pass

    conv = nn.Conv2d(16, 24, 3)
    rows = initlab.plan_model(conv).rows
    assert initlab.plan_model(conv.to(memory_format=torch.channels_last)).rows == rows
    assert [row.distribution for row in initlab.plan_model(Mine(16, 24, 3)).rows] == [row.distribution for row in rows]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("recipe", RECIPES)
def test_empty_shapes(recipe):
    builds = [
        lambda: nn.Linear(0, 3),
        lambda: nn.Linear(3, 0),
        lambda: nn.Embedding(0, 4),
        lambda: nn.Embedding(4, 0, padding_idx=1),
        lambda: nn.Bilinear(3, 0, 4),
        lambda: nn.RNNCell(0, 3),
        lambda: nn.RNNCell(3, 0),
        lambda: nn.BatchNorm1d(0),
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 20, [5, 10]),  # div_value leaves nothing of the second tail
    ]
    model = nn.ModuleList(build() for build in builds)
    model.append(nn.Sequential(nn.Linear(0, 3), nn.ReLU(), nn.Linear(3, 0), nn.Tanh()))
    spoil(model)
    initlab.init_model_(model, 0, initlab.recipes.own(check=False) if recipe == "own" else recipe)
    for name, tensor in model.state_dict().items():
        assert not (tensor == 7).any(), name
    assert (model[0].bias == 0).all()  # torch's bound is 0 where nothing comes in


# ---------------------------------------------------------------------------------------------------------------
# Fans


class Wire(NamedTuple):
    """A weight in use: `run` sends a signal through it. Connections are counted away from the edges."""

    layer: nn.Module
    shape: tuple[int, ...]
    leaf: str = "weight"
    run: Callable[[Any, torch.Tensor], torch.Tensor] = lambda module, x: module(x)
    path: str = ""
    transposed_by: int = 1
    backwards: bool = True  # a strided convolution's inputs do not all reach the same number of outputs

    @property
    def fans(self):
        return compute_fans(self.layer, self.leaf, getattr(self.layer, self.leaf), self.path)

    def signal(self, draw, scale):
        """Outputs and what comes back to the inputs, where every number is drawn and every weight scaled."""
        module = self.layer.double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
            getattr(module, self.leaf).copy_(draw(getattr(module, self.leaf).shape) * scale)
        x = draw(self.shape).requires_grad_()
        y = self.run(module, x)
        y.backward(draw(y.shape))
        return self._inner(y.detach(), self.transposed_by), self._inner(x.grad, 1)

    def _inner(self, x, stride):
        return x[(..., *[slice(4 * stride, 8 * stride)] * (len(self.shape) - 2))] if len(self.shape) > 2 else x


def part(leaf, number, parts):
    return lambda module, x: F.linear(x, getattr(module, leaf)).chunk(parts, -1)[number]


def transposed(kernel, stride, groups=1):
    layer = nn.ConvTranspose2d(32, 64, kernel, stride, groups=groups, bias=False)
    return Wire(layer, (8, 32, 12, 12), transposed_by=stride)


WIRES = {
    "Linear": Wire(nn.Linear(192, 96), (512, 192)),
    "Bilinear": Wire(nn.Bilinear(48, 24, 32), (4096, 48), run=lambda m, x: m(x, signs(len(x), 24))),
    "Conv1d": Wire(nn.Conv1d(96, 64, 3), (8, 96, 12)),
    "Conv2d": Wire(nn.Conv2d(32, 64, (3, 4)), (8, 32, 12, 12)),
    "Conv2d, strided": Wire(nn.Conv2d(32, 64, 4, stride=2), (8, 32, 30, 30), backwards=False),
    "Conv2d, dilated": Wire(nn.Conv2d(32, 64, 2, dilation=3), (8, 32, 12, 12)),
    "Conv2d, grouped": Wire(nn.Conv2d(64, 128, 3, groups=4), (8, 64, 12, 12)),
    "Conv2d, depthwise": Wire(nn.Conv2d(1024, 1024, 3, groups=1024), (8, 1024, 12, 12)),
    "Conv2d, depthwise, two each": Wire(nn.Conv2d(512, 1024, 3, groups=512), (8, 512, 12, 12)),
    "Conv3d": Wire(nn.Conv3d(16, 32, 3), (2, 16, 12, 12, 12)),
    "ConvTranspose2d, 3 by 1": transposed(3, 1),
    "ConvTranspose2d, 3 by 2": transposed(3, 2),
    "ConvTranspose2d, 3 by 3": transposed(3, 3),
    "ConvTranspose2d, 4 by 1": transposed(4, 1),
    "ConvTranspose2d, 4 by 2": transposed(4, 2),
    "ConvTranspose2d, 4 by 3": transposed(4, 3),
    "ConvTranspose2d, 4 by 2, grouped": transposed(4, 2, groups=4),
    "RNNCell": Wire(nn.RNNCell(192, 96), (512, 192), "weight_ih", part("weight_ih", 0, 1)),
    "LSTM, input": Wire(nn.LSTM(192, 96), (512, 192), "weight_ih_l0", part("weight_ih_l0", 3, 4)),
    "LSTM, hidden": Wire(nn.LSTM(192, 96, proj_size=64), (512, 64), "weight_hh_l0", part("weight_hh_l0", 0, 4)),
    "LSTM, projection": Wire(nn.LSTM(192, 96, proj_size=64), (512, 96), "weight_hr_l0", part("weight_hr_l0", 0, 1)),
    "GRU": Wire(
        nn.GRU(192, 96, bidirectional=True), (512, 192), "weight_ih_l0_reverse", part("weight_ih_l0_reverse", 2, 3)
    ),
    "GRUCell": Wire(nn.GRUCell(192, 96), (512, 96), "weight_hh", part("weight_hh", 1, 3)),
    "MultiheadAttention, query": Wire(
        nn.MultiheadAttention(96, 2), (512, 96), "in_proj_weight", part("in_proj_weight", 0, 3)
    ),
    "MultiheadAttention, value": Wire(
        nn.MultiheadAttention(96, 2), (512, 96), "in_proj_weight", part("in_proj_weight", 2, 3)
    ),
    "MultiheadAttention, keys of another size": Wire(
        nn.MultiheadAttention(96, 2, kdim=160, vdim=32), (512, 160), "k_proj_weight", part("k_proj_weight", 0, 1)
    ),
    "fused": Wire(nn.Linear(96, 288), (512, 96), run=part("weight", 1, 3), path="h.3.attn.qkv"),
    "not fused, by name": Wire(nn.Linear(96, 288), (512, 96), path="h.3.mlp.up"),
    "not fused, by shape": Wire(nn.Linear(96, 192), (512, 96), path="h.3.attn.qkv"),
}


def signs(*shape):
    """White, and of square 1: a second input that adds nothing to the variance."""
    return torch.where(torch.arange(math.prod(shape)).view(shape) % 2 == 0, 1.0, -1.0).double()


@pytest.fixture(params=WIRES)
def wire(request):
    return WIRES[request.param]


def test_fans_are_the_connections_counted_one_by_one(wire):
    """Where all is one, an output is the number of inputs that meet in it, a gradient that of the outputs reached."""
    if isinstance(wire.layer, nn.Bilinear):
        wire = wire._replace(run=lambda module, x: module(x, torch.ones(len(x), 24, dtype=x.dtype)))
    outputs, inputs = wire.signal(lambda shape: torch.ones(shape, dtype=torch.float64), 1.0)
    assert wire.fans.fan_in == outputs.mean()
    assert wire.fans.fan_out == inputs.mean() or not wire.backwards


def test_variance_survives_in_both_directions(wire):
    generator = torch.Generator().manual_seed(8)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    outputs, _ = wire.signal(draw, wire.fans.fan_in**-0.5)
    assert outputs.square().mean().item() == pytest.approx(1.0, rel=0.1)
    if wire.backwards:
        _, inputs = wire.signal(draw, wire.fans.fan_out**-0.5)
        assert inputs.square().mean().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.long
def test_fans_of_the_linear_layer_of_transformers():
    from transformers.pytorch_utils import Conv1D  # its arguments are (out, in)

    wire = Wire(Conv1D(96, 192), (512, 192))
    outputs, inputs = wire.signal(lambda shape: torch.ones(shape, dtype=torch.float64), 1.0)
    assert wire.fans == (outputs.mean(), inputs.mean()) == (192, 96)
    fused = Conv1D(288, 96)
    assert compute_fans(fused, "weight", fused.weight, "transformer.h.0.attn.c_attn") == (96, 96)
    assert compute_fans(fused, "weight", fused.weight, "transformer.h.0.mlp.c_fc") == (96, 288)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, nn.LSTM, nn.GRU, nn.Conv2d, nn.Linear])
def test_a_subclass_has_the_fans_of_its_layer(kind):
    arguments = (6, 10, 3) if kind is nn.Conv2d else (6, 10)
    mine, plain = type("Mine", (kind,), {})(*arguments), kind(*arguments)
    for leaf, weight in plain.named_parameters():
        assert compute_fans(mine, leaf, weight) == compute_fans(plain, leaf, weight), leaf


@pytest.mark.parametrize(
    ("module", "leaf"),
    [
        (nn.Linear(6, 10), "weight"),
        (nn.Conv1d(6, 10, 3), "weight"),
        (nn.Conv2d(6, 10, (3, 5), stride=2, dilation=2), "weight"),
        (nn.Conv3d(6, 10, 3), "weight"),
        (nn.Bilinear(6, 7, 10), "weight"),
        (nn.RNNCell(6, 10), "weight_ih"),
        (nn.RNN(6, 10, 2), "weight_hh_l1"),
        (nn.MultiheadAttention(12, 2, kdim=5), "k_proj_weight"),
        (nn.MultiheadAttention(12, 2).out_proj, "weight"),
    ],
)
def test_fans_of_ordinary_layers_are_torchs(module, leaf):
    weight = getattr(module, leaf)
    assert compute_fans(module, leaf, weight) == init._calculate_fan_in_and_fan_out(weight)


def test_what_has_no_fans():
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    for module, leaf in [
        (nn.Linear(3, 4), "bias"),
        (nn.Embedding(3, 4), "weight"),
        (nn.EmbeddingBag(3, 4), "weight"),
        (nn.LayerNorm((3, 4)), "weight"),
        (nn.GRU(3, 4), "bias_ih_l0"),
        (attention, "bias_k"),
        (attention, "in_proj_bias"),
        (nn.PReLU(4), "weight"),
    ]:
        assert compute_fans(module, leaf, getattr(module, leaf)) is None, (module, leaf)
    with_more = nn.Linear(3, 4)
    with_more.extra = nn.Parameter(torch.ones(3, 4))
    assert compute_fans(with_more, "extra", with_more.extra) is None
    assert compute_fans(nn.Module(), "weight", torch.ones(3, 4)) is None


# ---------------------------------------------------------------------------------------------------------------
# The trace


@pytest.mark.parametrize(
    ("blocks", "whole"),
    [
        ([(0, 0, 4)], True),
        ([(0, 0, 2), (0, 2, 2)], True),
        ([(0, 2, 2), (0, 0, 2)], True),
        ([(0, 0, 3), (0, 1, 3)], True),
        ([(0, 0, 4), (1, 0, 1)], True),
        ([(1, 0, 5), (1, 5, 1)], True),
        ([(0, 0, 3)], False),
        ([(0, 1, 3)], False),
        ([(0, 0, 1), (0, 2, 2)], False),
        ([(0, 0, 3), (1, 0, 3)], False),
        ([(0, 0, 2), (1, 0, 3), (1, 3, 2)], False),
    ],
)
def test_blocks_make_a_whole_or_do_not(blocks, whole):
    trace, tensor = InitTrace(), torch.empty(4, 6)
    for number, block in enumerate(blocks):
        trace.write(tensor, Normal(0.0, number), "test", DimSlice(*block))
    rule = trace.complete(tensor)
    assert (rule is not None) == whole
    assert rule is None or [(tuple(block), distribution.std) for block, distribution in rule.fills] == [
        (block, number) for number, block in enumerate(blocks)
    ]


def test_the_last_word_counts():
    trace, tensor, row = InitTrace(), torch.empty(4, 6), DimSlice(0, 0, 1)
    trace.write(tensor, Uniform(), "a", fan=6)
    trace.write(tensor, Constant(1.0), "b", row)
    assert trace.complete(tensor).fills == ((None, Uniform()), (row, Constant(1.0)))
    trace.write(tensor, Normal(), "c")
    assert trace.complete(tensor).fills == ((None, Normal()),)
    trace.give_up(tensor, "because")
    trace.write(tensor, Normal(), "d", row)  # a part of what is not known
    assert trace.complete(tensor) is None
    assert trace.unreadable[id(tensor)] == "because"
    trace.write(tensor, Normal(), "e")
    assert trace.complete(tensor).distribution == Normal()
    assert not trace.unreadable
    assert trace.complete(torch.empty(4, 6)) is None


# ---------------------------------------------------------------------------------------------------------------
# A reset_parameters of one's own


class Photograph:
    """All that a plan must leave alone: tensors, their values and versions, modules' dictionaries, the generator."""

    def __init__(self, model):
        self.model = model
        self.kept = [vars(module).copy() for module in model.modules()]  # alive, so that no id is given away twice
        self.before = self.facts()

    def facts(self):
        facts = {"generator": torch.get_rng_state().tolist()}
        for path, module in self.model.named_modules():
            for name, value in vars(module).items():
                inside = (
                    value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
                )
                facts[f"{path}: {name}"] = id(value), [(key, id(entry)) for key, entry in inside]
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            values = tensor.detach().numpy().tobytes()
            labels = tensor.requires_grad, tensor.grad_fn, *vars(tensor).items()
            facts[name] = id(tensor), tensor._version, tensor.data_ptr(), values, labels
        return facts

    def changes(self):
        now = self.facts()
        return [name for name in self.before.keys() | now.keys() if self.before.get(name) != now.get(name)]


def own_linear(code, size=(48, 64)):
    """A linear layer that starts itself by `code`."""

    class Own(nn.Linear):
        started = False

        def reset_parameters(self):
            init.zeros_(self.bias)
            if self.started:
                code(self)

    module = Own(*size)
    module.weight.data.fill_(2.0)
    Own.started = True
    return module


def each(code, parts):
    for view in parts:
        code(view)


def halves(module):
    init.normal_(module.weight[:20], std=0.1)
    init.uniform_(module.weight[20:], 1.0, 3.0)


def columns(module):
    init.normal_(module.weight[:, :30], std=0.1)
    module.weight.data[:, 30:].zero_()


def rows_and_columns(module):
    init.normal_(module.weight)
    with torch.no_grad():
        module.weight[3] = 0
        module.weight[-2:] = 0.0
        module.weight[:, 5] = 0.5
        module.weight[..., -1:].fill_(-1)


def operators(module):
    weight = module.weight.data
    weight.uniform_()
    weight -= 0.5
    weight *= 4
    weight += 1
    weight /= -2


def copied_scaled(module):
    drawn = torch.empty(module.weight.shape, device=module.weight.device)
    module.weight.data.copy_(init.normal_(drawn, std=4.0).div_(8))


def copied_double(module):
    with torch.no_grad():
        module.weight.copy_(torch.empty_like(module.weight, dtype=torch.float64).uniform_(-3, -1))


def part_of_a_temporary(module):
    both = torch.empty(2, *module.weight.shape, device=module.weight.device)
    init.normal_(both, std=0.1)
    both[0].fill_(0.0)
    module.weight.data.copy_(both[1])


def copied_twice(module):
    drawn = init.normal_(torch.empty_like(module.weight[:32]))
    module.weight.data[:32].copy_(drawn)
    module.weight.data[32:].copy_(drawn)  # each half has a distribution, both together are not independent


def orthogonal_temporary(module):
    drawn = init.normal_(torch.empty_like(module.weight))
    module.weight.data.copy_(init.orthogonal_(drawn))


def read_what_was_not_drawn(module):
    std = init.uniform_(torch.empty(1, device="cpu"), 0.5, 1.0)  # drawn by nobody while the code is only read
    init.normal_(module.weight, std=std.item())


def change_of_mind(module):
    init.orthogonal_(module.weight)
    module.weight.data.clamp_(-1, 1)
    init.xavier_normal_(module.weight, gain=2.0)


def as_timm(weight, mean=0.0, std=0.02, a=-2.0, b=2.0):
    """The steps of timm.layers.trunc_normal_."""
    lower, upper = (torch.special.ndtr(torch.tensor((x - mean) / std, device="cpu")).item() for x in (a, b))
    with torch.no_grad():
        weight.uniform_(2 * lower - 1, 2 * upper - 1)
        weight.erfinv_()
        weight.mul_(std * math.sqrt(2.0))
        weight.add_(mean)
        weight.clamp_(min=a, max=b)


READ = {
    "timm's trunc_normal_": lambda m: as_timm(m.weight),
    "timm's trunc_normal_, cut": lambda m: as_timm(m.weight, 0.3, 1.0, -0.5, 1.5),
    "another shape": lambda m: init.normal_(m.weight.view(-1), 0.5, 0.3),
    "another order": lambda m: init.xavier_uniform_(m.weight.t()),
    "normal_": lambda m: init.normal_(m.weight, 0.5, 0.3),
    "uniform_, method": lambda m: m.weight.data.uniform_(to=0.5),
    "uniform_, every parameter": lambda m: each(lambda p: init.uniform_(p, -0.1, 0.1), m.parameters()),
    "trunc_normal_": lambda m: init.trunc_normal_(m.weight, std=0.5, a=-0.5, b=1.0),
    "xavier_uniform_": lambda m: init.xavier_uniform_(m.weight, gain=3.0),
    "kaiming_normal_": lambda m: init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu"),
    "kaiming_uniform_": lambda m: init.kaiming_uniform_(m.weight, a=0.5, mode="fan_out"),
    "zeros_": lambda m: init.zeros_(m.weight),
    "constant_": lambda m: init.constant_(m.weight, 0.125),
    "fill_, of data": lambda m: m.weight.data.fill_(3),
    "super": lambda m: (nn.Linear.reset_parameters(m), init.ones_(m.bias)),
    "scaled": lambda m: m.weight.data.normal_().mul_(0.5),
    "scaled, off zero": lambda m: m.weight.data.normal_(2.0, 1.0).mul_(-0.5).add_(3),
    "shifted and mirrored": lambda m: m.weight.data.uniform_(0, 1).sub_(0.25).div_(-0.1).add_(1),
    "truncated, scaled": lambda m: init.trunc_normal_(m.weight, a=-0.5, b=1.0).data.mul_(-0.5),
    "operators": operators,
    "chunks": lambda m: each(init.xavier_uniform_, m.weight.chunk(4)),
    "rows": lambda m: each(lambda row: init.uniform_(row, -2.0, 1.0), m.weight),
    "halves": halves,
    "columns": columns,
    "rows and columns": rows_and_columns,
    "copied, scaled": copied_scaled,
    "copied, double": copied_double,
    "view": lambda m: init.xavier_uniform_(m.weight.view(len(m.weight), -1)),
    "change of mind": change_of_mind,
}
# Code that computes what no distribution describes.
COMPUTED = {
    "orthogonal_": lambda m: init.orthogonal_(m.weight),
    "sparse_": lambda m: init.sparse_(m.weight, 0.5),
    "eye_": lambda m: init.eye_(m.weight),
    "copy_ of other draws": lambda m: m.weight.data.copy_(torch.randn(64, 48)),
    "copy_ of what is computed": lambda m: m.weight.data.copy_(torch.empty(64, 48).normal_() * 2),
    "copy_ of a temporary, changed": orthogonal_temporary,
    "draws on another device": lambda m: m.weight.data.copy_(torch.randn(64, 48, device="cpu")),
    "clamp_": lambda m: m.weight.data.normal_().clamp_(-1, 1),
    "mul_ by a tensor": lambda m: m.weight.data.normal_().mul_(torch.ones(48)),
    "part scaled": lambda m: m.weight.data.normal_()[:3].mul_(2),
    "copied twice": copied_twice,
    "exponential_": lambda m: m.weight.data.exponential_(),
    "relu, in place": lambda m: F.relu(m.weight.data.normal_(), inplace=True),
    "out=": lambda m: torch.normal(0.0, 1.0, (64, 48), out=m.weight.data),
    "foreach": lambda m: torch._foreach_mul_([m.weight.data.normal_()], 2.0),
    "mask": lambda m: m.weight.data.normal_().__setitem__(torch.ones(64) > 0, 0),
    "one element": lambda m: m.weight.data.normal_().__setitem__((0, 0), 1),
    "replaced, data": lambda m: setattr(m.weight, "data", torch.randn(64, 48)),
}
# Code that neither can be read nor run on stand-ins, and what the error should say.
UNREAD = {
    "a value of another device": (read_what_was_not_drawn, "cannot be read"),
    "apply_": (lambda m: m.weight.data.normal_().apply_(lambda x: max(x, 0.0)), "by apply_"),  # silent on meta
    "map_": (lambda m: m.weight.data.normal_().map_(m.weight.data, lambda x, y: 0.0), "by map_"),
    "every second row": (lambda m: init.normal_(m.weight[::2]), "no slice of one dimension"),
    "half of it": (lambda m: init.normal_(m.weight[:32]), "no code of the model"),
    "nothing": (lambda m: None, "no code of the model"),
    "item": (lambda m: m.weight.data.fill_(m.weight.sum().item()), r"RuntimeError: .*item\(\)"),
    "a branch on values": (lambda m: m.weight.data.normal_() if m.weight.sum() > 0 else None, "cannot be read"),
    "raising": (lambda m: [][0], "IndexError: list index out of range"),
    "a distribution that is none": (lambda m: m.weight.data.normal_(0, -1), "RuntimeError: normal expects std"),
    "replaced": (lambda m: setattr(m, "weight", nn.Parameter(torch.randn(64, 48))), "replaces it"),
    "deleted": (lambda m: delattr(m, "weight"), "replaces it"),
}


@pytest.mark.parametrize("code", (READ | COMPUTED).values(), ids=READ | COMPUTED)
def test_an_override_has_its_own_distribution(code):
    model, real = own_linear(code), own_linear(code)
    theirs, ours = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        real.reset_parameters()
        theirs.append(copied(real))
        spoil(model)
        initlab.init_model_(model, seed, "torch")
        ours.append(copied(model))
    same_distributions(theirs, ours)
    # Row by row and column by column, where two distributions may meet.
    theirs, ours = (torch.stack([each["weight"] for each in sample]) for sample in (theirs, ours))
    for others in ((0, 1), (0, 2)):
        for measure, tolerance in ((torch.mean, {"rtol": 0.0, "atol": 0.5}), (torch.std, {"rtol": 0.3, "atol": 0.0})):
            scale = theirs.std().clamp(min=1e-3)
            torch.testing.assert_close(measure(ours, others) / scale, measure(theirs, others) / scale, **tolerance)


@pytest.mark.parametrize(("code", "reason"), UNREAD.values(), ids=UNREAD)
def test_what_cannot_be_read_is_named_with_the_reason(code, reason):
    model = nn.Sequential(nn.Linear(3, 3), own_linear(code))
    for recipe in ("torch", "own"):
        with pytest.raises(ValueError, match=rf"\n  1\.weight \(in Own\): .*{reason}"):
            initlab.init_model_(model, 0, recipe)
    initlab.init_model_(model, 0, {"1.weight": Normal(0.0, 0.1)}, only="1.weight")  # the way out that the error offers


def attributes_and_more(module):
    module.flag = True
    module.scratch = module.weight * 2
    module.weight.marked = True
    module.register_buffer("extra", torch.zeros(3), persistent=False)
    module.register_parameter("more", nn.Parameter(torch.zeros(3)))
    module.add_module("child", nn.Linear(2, 2))
    module.weight.requires_grad_(False)
    module.bias = None
    init.normal_(module.weight)


def containers(module):
    module.register_forward_hook(lambda *arguments: None)
    module.notes.append("reset")
    init.normal_(module.weight)


def seeding(module):
    torch.manual_seed(3)
    init.normal_(module.weight)


OTHERS = {
    "attributes": attributes_and_more,
    "containers": containers,
    "seeding": seeding,
    "drawing": lambda m: torch.rand(3, device="cpu"),
}


@pytest.mark.parametrize(
    "code",
    [*READ.values(), *(code for code, _ in UNREAD.values()), *OTHERS.values()],
    ids=[*READ, *UNREAD, *OTHERS],
)
def test_a_plan_leaves_no_trace(code):
    model = own_linear(code)
    model.notes = []
    torch.manual_seed(11)
    before = Photograph(model)
    for recipe in ("torch", "own", "he"):
        try:
            initlab.plan_model(model, recipe=recipe)
        except ValueError as error:
            assert re.search(r" \(in Own\): (by )?Own.reset_parameters", str(error)) or "no code" in str(error)  # noqa: PT017
        assert before.changes() == [], recipe


def keeping(code):
    """A layer that has its weight in a list too, where no stand-in takes its place; `code` gets that list's weight."""
    module = own_linear(lambda m: code(m.kept[0]))
    module.kept = [module.weight]
    return module


@pytest.mark.parametrize(
    "code",
    [
        lambda w: init.normal_(w),
        lambda w: w.data.zero_(),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.__setitem__(w > 0, 0.0),
        lambda w: w.__setitem__(0, torch.zeros(48, device="cpu")),
        lambda w: F.relu(w.data.sub_(5), inplace=True),
        lambda w: torch.add(w, 1, out=w.data),
        lambda w: torch._foreach_zero_([w]),
        lambda w: setattr(w, "data", torch.zeros(64, 48, device="cpu")),
        lambda w: w.requires_grad_(False),
    ],
    ids=[*("normal_", "zero_", "row", "mask", "copied row", "relu", "out=", "foreach", "data=", "requires_grad_")],
)
def test_a_weight_kept_elsewhere_is_out_of_reach(code):
    model = keeping(code)
    before = Photograph(model)
    with pytest.raises(ValueError, match=r"\n  weight \(in Own\): "):
        initlab.init_model_(model, 0)
    assert before.changes() == []


@pytest.mark.parametrize("write", [init.normal_, lambda w: w.data.mul_(2), lambda w: w.data.clamp_(0, 1)])
def test_what_is_no_part_of_the_model_is_out_of_reach(write):
    other = nn.Linear(3, 3)
    before = Photograph(other)
    with pytest.raises(ValueError, match=r"\n  weight \(in Own\): .*cannot be read"):
        initlab.init_model_(own_linear(lambda module: write(other.weight)), 0)
    assert before.changes() == []


def test_the_flat_weights_of_an_rnn_stay_what_they_are():
    class Own(nn.GRU):
        def reset_parameters(self):
            for name, weight in list(self.named_parameters()):
                setattr(self, name, nn.Parameter(torch.zeros_like(weight)))  # nn.RNNBase enters it in a list too

    model = Own(3, 4)
    before = Photograph(model)
    with pytest.raises(ValueError, match=r"weight_ih_l0 \(in Own\): .*replaces it"):
        initlab.init_model_(model, 0)
    assert before.changes() == []


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("beside", [nn.Identity(), own_linear(lambda m: init.normal_(m.weight))])
@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda module: prune.l1_unstructured(module, "weight", 0.5), ["weight_orig"]),
    ],
    ids=["prune"],
)
def test_a_weight_that_is_computed_from_others(change, names, beside):
    """Nobody draws it; what it is computed from has no distribution, and reading it must start no power iteration."""
    model = nn.Sequential(beside, change(nn.Linear(3, 4)))
    before = Photograph(model)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        initlab.init_model_(model, 0)
    assert before.changes() == []
    for name in names:
        assert f"\n  1.{name} (in " in str(caught.value)
    assert "1.bias" not in str(caught.value)


class Composite(nn.Module):
    """Starts what its children have started already."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(48, 64), nn.LayerNorm(64))
        self.last = nn.Linear(64, 48)
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self):
        init.zeros_(self.last.weight)
        self.body[0].bias.data.mul_(0.25)
        init.constant_(self.body[1].weight, 0.5)
        init.normal_(self.scale)


def test_a_module_above_has_the_last_word():
    model = Composite()
    theirs, ours = [], []
    for seed in range(200):
        torch.manual_seed(seed)
        theirs.append(copied(Composite()))
        spoil(model)
        report = initlab.init_model_(model, seed, "torch")
        ours.append(copied(model))
    assert len({float(each["scale"]) for each in theirs}) == 200
    same_distributions(theirs, ours)
    rows = {row.name: row for row in report.rows}
    assert rows["last.weight"].distribution == Constant(0.0)
    assert rows["body.0.bias"].distribution.high == pytest.approx(0.25 / math.sqrt(48))
    assert rows["last.weight"].why == "Composite.reset_parameters"
    assert rows["last.weight"].fan is None  # a constant comes from no fan


def test_a_reset_that_needs_more_than_the_module():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def reset_parameters(self, std):
            init.normal_(self.inner.weight, std=std)

    model = nn.Sequential(nn.Linear(3, 3), Own())
    with pytest.raises(ValueError, match=r"1\.inner\.weight \(in Linear\): .*TypeError.*'std'") as caught:
        initlab.init_model_(model, 0)
    assert "\n  0.weight" not in str(caught.value)  # what lies beside it is not in doubt


def test_without_any_reset_a_norm_and_a_bias_are_guessed():
    class SomeNorm(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(shape))

    model = SomeNorm(5)
    report = initlab.init_model_(model, 0, "torch")
    assert (model.weight == 1).all()
    assert (model.bias == 0).all()
    assert [row.name for row in report.guesses] == ["weight", "bias"]
    with pytest.raises(ValueError, match=r"2 of 2 (?s:.*)weight \(in SomeNorm\): no code"):
        initlab.init_model_(SomeNorm((5, 5)), 0)


def test_parts_of_a_temporary_are_told_apart():
    with contextlib.suppress(ValueError):  # to say that it cannot be read is fine too
        assert initlab.plan_model(own_linear(part_of_a_temporary)).rows[0].distribution == Normal(0.0, 0.1)


def test_a_generator_of_its_own_is_not_asked():
    generator = torch.Generator().manual_seed(5)
    model = own_linear(lambda m: init.normal_(m.weight, generator=generator))
    before = generator.get_state()
    assert initlab.init_model_(model, 0, "torch").rows[0].distribution == Normal(0.0, 1.0)
    assert torch.equal(generator.get_state(), before)


def test_code_is_read_the_same_on_the_meta_device():
    for code in READ.values():
        real = own_linear(code)
        rows = initlab.plan_model(real, 0, "torch").rows
        assert initlab.plan_model(real.to("meta"), 0, "torch").rows == rows
