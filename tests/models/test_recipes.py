"""Recipes: distributions against torch.nn.init, transformers and closed forms; what becomes of names and patterns."""

import functools
import json
import math

import pytest
import torch
from initlab.kernels import Constant, Normal, TruncatedNormal, Uniform
from scipy import stats
from torch import nn
from torch.nn import init
from torch.nn.modules import activation as activations

import initlab
from initlab import recipes

NAMES = ("torch", "own", "he", "xavier", "lecun", "gpt2", "trunc_normal", "auto", "depth_scaled", "mitchell")
ALARM = 1e-10  # p-value of a Kolmogorov-Smirnov test; the seeds are fixed
SCORE = 7.0  # standard errors
UNCHECKED = initlab.recipes.own(check=False)  # of models that their own code has not started


def rows(model, recipe, **named):
    return {row.name: row for row in initlab.plan_model(model, 0, recipe, **named).rows}


def frozen(distribution):
    """A distribution, as scipy has it."""
    if isinstance(distribution, Uniform):
        return stats.uniform(distribution.low, distribution.high - distribution.low)
    if isinstance(distribution, Normal):
        return stats.norm(distribution.mean, distribution.std)
    low, high = ((bound - distribution.mean) / distribution.std for bound in (distribution.low, distribution.high))
    return stats.truncnorm(low, high, distribution.mean, distribution.std)


def same_distribution(distribution, other):
    """Equal distributions, but for the last digits."""
    return type(distribution) is type(other) and all(
        getattr(distribution, field) == pytest.approx(getattr(other, field), rel=1e-12)
        for field in distribution.__dataclass_fields__
    )


def same_sample(a, b):
    """Two samples: one constant, or one distribution with one mean and one standard deviation."""
    a, b = (x.detach().flatten().double() for x in (a, b))
    if a.min() == a.max():
        assert torch.equal(a, b)
        return
    error = a.std() / len(a) ** 0.5
    assert abs(a.mean() - b.mean()) < SCORE * 2**0.5 * error
    assert abs(a.std() - b.std()) < SCORE * error  # sqrt 2 of the error of each, which is 1 / sqrt 2 of the mean's
    assert stats.ks_2samp(a.numpy(), b.numpy(), method="asymp").pvalue > ALARM


# ---------------------------------------------------------------------------------------------------------------
# Against torch.nn.init


@pytest.mark.parametrize(
    ("recipe", "theirs"),
    [
        ("he", functools.partial(init.kaiming_normal_, nonlinearity="relu")),
        (recipes.he("fan_out"), functools.partial(init.kaiming_normal_, mode="fan_out", nonlinearity="relu")),
        (recipes.he(nonlinearity="tanh"), functools.partial(init.kaiming_normal_, nonlinearity="tanh")),
        (
            recipes.he(nonlinearity="leaky_relu", a=0.3, distribution="uniform"),
            functools.partial(init.kaiming_uniform_, a=0.3),
        ),
        ("xavier", init.xavier_uniform_),
        (recipes.xavier(gain=5 / 3, distribution="normal"), functools.partial(init.xavier_normal_, gain=5 / 3)),
        (recipes.xavier(gain=0.0), init.zeros_),
        ("lecun", functools.partial(init.kaiming_normal_, nonlinearity="linear")),
        (recipes.lecun("uniform"), functools.partial(init.kaiming_uniform_, nonlinearity="linear")),
        ("gpt2", functools.partial(init.normal_, std=0.02)),
        (recipes.gpt2(std=0.5), functools.partial(init.normal_, std=0.5)),
        ("trunc_normal", functools.partial(init.trunc_normal_, std=0.02)),
        (recipes.trunc_normal(0.5, -0.5, 1.0), functools.partial(init.trunc_normal_, std=0.5, a=-0.5, b=1.0)),
    ],
)
@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(300, 100), lambda: nn.Conv2d(24, 96, (3, 5)), lambda: nn.Bilinear(20, 30, 50)]
)
def test_values_are_those_of_torchs_functions(recipe, theirs, build):
    layer = build()
    initlab.init_model_(layer, 0, recipe)
    generator = torch.Generator().manual_seed(1)
    named = {} if theirs is init.zeros_ else {"generator": generator}
    same_sample(theirs(torch.empty(layer.weight.shape), **named), layer.weight)
    assert (layer.bias == 0).all()


@pytest.mark.parametrize("distribution", ["normal", "uniform", "truncated_normal"])
@pytest.mark.parametrize(
    ("recipe", "std"),
    [
        (recipes.he, math.sqrt(2 / 300)),
        (functools.partial(recipes.he, "fan_out"), math.sqrt(2 / 100)),
        (functools.partial(recipes.he, nonlinearity="leaky_relu", a=0.5), math.sqrt(2 / 1.25 / 300)),
        (recipes.xavier, math.sqrt(2 / 400)),
        (functools.partial(recipes.xavier, 3.0), 3 * math.sqrt(2 / 400)),
        (recipes.lecun, math.sqrt(1 / 300)),
    ],
)
def test_every_distribution_has_the_same_std(recipe, std, distribution):
    layer = nn.Linear(300, 100)
    row = initlab.init_model_(layer, 0, recipe(distribution=distribution)).rows[0]
    distribution = frozen(row.distribution)
    assert distribution.std() == pytest.approx(std, rel=1e-12)
    assert row.std == pytest.approx(std, rel=1e-12)
    assert distribution.mean() == pytest.approx(0.0, abs=1e-12)
    kurtosis = 3 + float(distribution.stats("k"))
    assert layer.weight.std().item() == pytest.approx(std, rel=5 * math.sqrt((kurtosis - 1) / 4 / 30_000))
    if distribution == "truncated_normal":
        assert (
            row.distribution.low / row.distribution.std,
            row.distribution.high / row.distribution.std,
        ) == pytest.approx((-2.0, 2.0), rel=1e-12)
        assert layer.weight.abs().max() <= row.distribution.high


@pytest.mark.parametrize(
    ("recipe", "model", "name", "std"),
    [
        ("he", nn.Conv2d(64, 64, 3, groups=64), "weight", math.sqrt(2 / 9)),
        (recipes.he("fan_out"), nn.Conv2d(64, 128, 3, groups=64), "weight", math.sqrt(2 / 18)),
        ("lecun", nn.Conv2d(64, 128, 3, groups=4), "weight", math.sqrt(1 / 16 / 9)),
        ("lecun", nn.ConvTranspose2d(64, 128, 4, stride=2), "weight", math.sqrt(1 / 64 / 4)),
        ("lecun", nn.ConvTranspose2d(64, 128, 4, stride=2, groups=2), "weight", math.sqrt(1 / 32 / 4)),
        ("xavier", nn.MultiheadAttention(48, 2), "in_proj_weight", math.sqrt(2 / 96)),
        ("xavier", nn.ModuleDict({"qkv": nn.Linear(48, 144)}), "qkv.weight", math.sqrt(2 / 96)),
        ("xavier", nn.LSTM(48, 32), "weight_ih_l0", math.sqrt(2 / 80)),
        ("lecun", nn.LSTM(48, 32, proj_size=16), "weight_hh_l0", math.sqrt(1 / 16)),
        ("lecun", nn.LSTM(48, 32, proj_size=16), "weight_hr_l0", math.sqrt(1 / 32)),
        (recipes.he("fan_out"), nn.GRUCell(48, 32), "weight_ih", math.sqrt(2 / 32)),
    ],
)
def test_recipes_go_by_the_fans_of_the_layer(recipe, model, name, std):
    assert frozen(rows(model, recipe)[name].distribution).std() == pytest.approx(std, rel=1e-12)


def zoo():
    return nn.ModuleDict(
        {
            "linear": nn.Linear(8, 8),
            "conv": nn.Conv1d(8, 8, 3),
            "bilinear": nn.Bilinear(8, 8, 8),
            "lstm": nn.LSTM(8, 8, proj_size=4),
            "cell": nn.GRUCell(8, 8),
            "attention": nn.MultiheadAttention(8, 2, add_bias_kv=True),
            "norm": nn.BatchNorm1d(8),
            "rms": nn.RMSNorm(8),
            "prelu": nn.PReLU(8),
            "emb": nn.Embedding(50, 8, padding_idx=-2),
            "bag": nn.EmbeddingBag(50, 8, padding_idx=3, mode="sum"),
        }
    )


@pytest.mark.parametrize("name", ["he", "xavier", "lecun", "gpt2", "trunc_normal"])
def test_biases_are_zero_and_the_rest_is_as_torch_has_it(name):
    model, found, torchs = zoo(), rows(zoo(), name), rows(zoo(), "torch")
    biases = {n for n, p in model.named_parameters() if p.dim() == 1 and "bias" in n and not n.startswith("norm")}
    assert len(biases) == 9
    assert {found[bias].distribution for bias in biases} == {Constant(0.0)}
    others = {n for n in found if n.startswith(("norm", "rms", "prelu"))}
    embeddings = {"emb.weight", "bag.weight"} if name in ("he", "xavier", "lecun") else set()
    assert {n: found[n].distribution for n in others | embeddings} == {
        n: torchs[n].distribution for n in others | embeddings
    }
    assert torchs["linear.bias"].distribution == Uniform(-1 / math.sqrt(8), 1 / math.sqrt(8))  # torch's own is not zero


@pytest.mark.parametrize(
    "recipe",
    [
        *NAMES,
        Normal(1.0, 0.1),
        lambda ref: Constant(3.0),
        {"emb": Uniform(1.0, 2.0), "bag.weight": Constant(2.0)},
        {"*": lambda ref: Normal(5.0, 1.0)},
    ],
)
def test_padding_rows_are_zero_under_every_recipe(recipe):
    model = zoo()
    initlab.init_model_(model, 0, recipe)
    for weight, padding in ((model["emb"].weight, 48), (model["bag"].weight, 3)):
        assert (weight == 0).all(1).nonzero().tolist() == [[padding]]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: recipes.he("fan_avg"), ValueError, "mode is 'fan_avg'"),
        (lambda: recipes.he(nonlinearity="swish"), ValueError, "swish"),
        (lambda: recipes.he(distribution="cauchy"), ValueError, "distribution is 'cauchy'"),
        (lambda: recipes.xavier(gain=-1.0), ValueError, r"gain is -1\.0"),
        (lambda: recipes.xavier(gain=math.nan), ValueError, "gain is nan"),
        (lambda: recipes.xavier(gain="2"), TypeError, r"gain is '2' \(str\); it must be a number"),
        (lambda: recipes.xavier(gain=None), TypeError, r"gain is None \(NoneType\)"),
        (lambda: recipes.gpt2(std=None), TypeError, r"std is None"),
        (lambda: recipes.gpt2(layers=-1), ValueError, r"layers is -1; it must be the number of blocks"),
        (lambda: recipes.gpt2(layers=1.5), ValueError, r"layers is 1\.5"),
        (lambda: recipes.trunc_normal(std=None), TypeError, r"std is None"),
        (lambda: recipes.trunc_normal(b="2"), TypeError, r"b is '2'"),
        (lambda: recipes.he(distribution=None), ValueError, "distribution is None"),
        (lambda: recipes.xavier(gain=math.inf), ValueError, "gain is inf"),
        (lambda: recipes.xavier(distribution="laplace"), ValueError, "distribution is 'laplace'"),
        (lambda: recipes.lecun("laplace"), ValueError, "distribution is 'laplace'"),
        (lambda: recipes.gpt2(std=-0.02), RuntimeError, "std"),
        (lambda: recipes.trunc_normal(std=0.0), ValueError, r"std is 0\.0"),
        (lambda: recipes.trunc_normal(0.02, 0.5, 1.0), ValueError, "standard deviations from the mean"),
        (lambda: recipes.trunc_normal(0.02, 1.0, -1.0), RuntimeError, "low must not exceed high"),
    ],
)
def test_settings_that_make_no_sense(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_trunc_normal_keeps_its_bounds():
    model = zoo()
    initlab.init_model_(model, 0, recipes.trunc_normal(std=0.5, a=-0.25, b=1.0))
    for name in ("linear.weight", "emb.weight", "lstm.weight_hh_l0", "attention.in_proj_weight"):
        values = model.get_parameter(name)
        assert values.min() >= -0.25
        assert values.max() <= 1.0
        assert values.max() > 0.5  # and are not cut at one of their own


# ---------------------------------------------------------------------------------------------------------------
# Transformers


def configured(name):
    """A small model of transformers, built by transformers."""
    import transformers

    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 200, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings = {
        "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 32, **tokens},
        "LlamaForCausalLM": {**small, "num_key_value_heads": 2, **tokens},
        "BertForMaskedLM": {**small, **tokens},
        "ViTModel": {**small, "image_size": 32, "patch_size": 8},
        "T5ForConditionalGeneration": {
            "d_model": 64,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "d_kv": 16,
            **tokens,
        },
        "GemmaForCausalLM": {**small, "num_key_value_heads": 2, "head_dim": 16, **tokens},
    }[name]
    kind = getattr(transformers, name)
    return kind(kind.config_class(**settings))


MODELS = ("GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM", "ViTModel", "T5ForConditionalGeneration")
MODELS += ("GemmaForCausalLM",)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.long
def test_own_is_what_transformers_does(name):
    torch.manual_seed(0)
    theirs = configured(name)
    with torch.device("meta"):
        ours = configured(name)
    report = initlab.init_model_(ours, 0, "own", device="cpu")
    assert report.guesses == ()
    found = dict(ours.named_parameters(remove_duplicate=False))
    expected = dict(theirs.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    for parameter in expected:
        same_sample(expected[parameter], found[parameter])
    buffers = dict(ours.named_buffers())
    assert buffers.keys() == dict(theirs.named_buffers()).keys()
    for buffer, values in theirs.named_buffers():
        assert torch.equal(buffers[buffer], values), buffer
        assert buffers[buffer].dtype == values.dtype
    assert ours.state_dict().keys() == theirs.state_dict().keys()  # so what is not persistent has stayed so
    assert rows(theirs, "own") == {row.name: row for row in report.rows if row.distribution is not None}


@pytest.mark.long  # transformers
def test_what_was_loaded_is_read_as_well():
    """Transformers marks loaded weights, and its init functions pass over them."""
    model = configured("LlamaForCausalLM")
    fresh = rows(model, "own")
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    assert rows(model, "own") == fresh
    assert all(parameter._is_hf_initialized for parameter in model.parameters())


@pytest.mark.long  # transformers
def test_the_norms_of_gemma_start_at_zero():
    model = configured("GemmaForCausalLM")
    initlab.init_model_(model, 0, "own")
    assert {float(p.detach().abs().max()) for n, p in model.named_parameters() if "norm" in n} == {0.0}


@pytest.mark.long  # transformers
def test_gpt2_is_what_the_published_code_does():
    torch.manual_seed(0)
    theirs = configured("GPT2LMHeadModel")
    ours = configured("GPT2LMHeadModel")
    report = initlab.init_model_(ours, 0, "gpt2")
    found, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for name in expected:
        same_sample(expected[name], found[name])
    assert ours.lm_head.weight is ours.transformer.wte.weight
    own = rows(ours, "own")
    for row in report.rows:
        assert row.distribution == own[row.name].distribution, row.name
    scaled = {row.name.split(".", 3)[3] for row in report.rows if row.std == pytest.approx(0.02 / math.sqrt(6))}
    assert scaled == {"attn.c_proj.weight", "mlp.c_proj.weight"}


def encoder(layers):
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(block, layers, enable_nested_tensor=False)


def residual_std(model, recipe="gpt2", **named):
    (std,) = {row.std for name, row in rows(model, recipe, **named).items() if "linear2.weight" in name}
    return std


def test_how_many_layers_gpt2_counts():
    model = encoder(3)
    assert residual_std(model) == pytest.approx(0.02 / math.sqrt(2 * 3))
    assert residual_std(model, recipes.gpt2(layers=8)) == pytest.approx(0.02 / math.sqrt(2 * 8))
    for number, setting in enumerate(("num_hidden_layers", "n_layer"), 20):
        model.config = type("Config", (), {setting: number})()
        assert residual_std(model) == pytest.approx(0.02 / math.sqrt(2 * number))
        assert residual_std(model, names="stage") == pytest.approx(0.02 / math.sqrt(2 * number))
    model.config = type("Config", (), {"n_layer": "many"})()
    assert residual_std(model) == pytest.approx(0.02 / math.sqrt(2 * 3))
    assert residual_std(model, recipes.gpt2(std=0.1, layers=2)) == pytest.approx(0.05)


def test_gpt2_counts_blocks_wherever_they_are():
    """The first number in a name need not be a block's."""
    assert residual_std(nn.Sequential(nn.Embedding(9, 16), encoder(3))) == pytest.approx(0.02 / math.sqrt(2 * 3))
    assert residual_std(nn.ModuleDict({"stack": encoder(4)})) == pytest.approx(0.02 / math.sqrt(2 * 4))
    assert residual_std(nn.ModuleDict({"stack": nn.Sequential(*encoder(5).layers)})) == pytest.approx(
        0.02 / math.sqrt(10)
    )
    experts = lambda: nn.ModuleList(nn.ModuleDict({"linear2": nn.Linear(4, 4)}) for _ in range(8))  # noqa: E731
    mixture = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"experts": experts()}) for _ in range(2))})
    assert residual_std(mixture) == pytest.approx(0.02 / math.sqrt(2 * 2))


def test_gpt2_does_not_count_the_blocks_of_a_stage():
    stage = encoder(2).layers
    names = lambda name: f"layers.{4 + int(name[0])}{name[1:]}"  # noqa: E731
    with pytest.raises(ValueError, match=r"a stage shows 2 blocks.*gpt2\(layers=L\)"):
        initlab.plan_model(stage, 0, "gpt2", names=names)
    assert residual_std(stage, recipes.gpt2(layers=8), names=names) == pytest.approx(0.005)
    embedding = initlab.plan_model(nn.Embedding(5, 4), 0, "gpt2", names="wte")  # nothing to count
    assert embedding.rows[0].distribution == Normal(0.0, 0.02)


def test_gpt2_reaches_experts_in_one_tensor():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.empty(4, 8, 32))
            self.down_proj = nn.Parameter(torch.empty(4, 16, 8))
            self.down_proj_bias = nn.Parameter(torch.empty(4, 8))

    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"experts": Experts()}) for _ in range(2))})
    found = rows(model, "gpt2")
    assert found["layers.1.experts.down_proj"].distribution == Normal(0.0, 0.01)
    assert found["layers.1.experts.gate_up_proj"].distribution == Normal(0.0, 0.02)
    assert found["layers.1.experts.down_proj"].guess  # nobody says that it is a weight
    found = rows(model, recipes.gpt2(residual=["*.gate_up_proj"]))
    assert found["layers.0.experts.down_proj"].distribution == Normal(0.0, 0.02)
    assert found["layers.0.experts.gate_up_proj"].distribution == Normal(0.0, 0.01)


# ---------------------------------------------------------------------------------------------------------------
# own


def small(module):
    if isinstance(module, nn.Linear):
        init.normal_(module.weight, std=0.02)


class Method(nn.Sequential):
    def _init_weights(self, module):
        small(module)


class Static(nn.Sequential):
    @staticmethod
    def _init_weights(module):
        small(module)


class Optional(nn.Sequential):
    def _init_weights(self, module, name=""):
        small(module)


class OfClass(nn.Sequential):
    @classmethod
    def _init_weights(cls, module):
        small(module)


@pytest.mark.parametrize("kind", [Method, Static, Optional, OfClass])
def test_own_comes_after_reset_parameters(kind):
    found = rows(kind(nn.Linear(16, 16), nn.LayerNorm(16)), UNCHECKED)
    assert found["0.weight"].distribution == Normal(0.0, 0.02)
    assert found["0.bias"].distribution == Uniform(-0.25, 0.25)
    assert found["1.weight"].distribution == Constant(1.0)
    assert same_distribution(rows(kind(nn.Linear(16, 16)), "torch")["0.weight"].distribution, Uniform(-0.25, 0.25))


def test_own_asks_the_nearest_module_above():
    class Inner(nn.Sequential):
        def _init_weights(self, module):
            if isinstance(module, nn.Linear):
                init.constant_(module.weight, 2.0)

    class Outer(nn.Sequential):
        def _init_weights(self, module):
            if isinstance(module, nn.Linear):
                init.constant_(module.weight, 1.0)
            if isinstance(module, Outer):
                init.zeros_(self[0].bias)

    found = rows(Outer(nn.Linear(3, 3), Inner(nn.Linear(3, 3)), nn.Linear(3, 3)), UNCHECKED)
    weights = [found[name].distribution.value for name in ("0.weight", "1.0.weight", "2.weight")]
    assert weights == [1.0, 2.0, 1.0]
    assert found["0.bias"].distribution == Constant(0.0)
    assert found["0.bias"].why == "Outer._init_weights"


def test_own_without_such_a_method_is_torch():
    assert [row.distribution for row in rows(zoo(), "own").values()] == [
        row.distribution for row in rows(zoo(), "torch").values()
    ]


def test_torch_takes_from_init_weights_what_no_reset_covers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.token = nn.Linear(16, 16), nn.Parameter(torch.zeros(1, 4))

        def _init_weights(self, module):
            if isinstance(module, Model):
                init.normal_(module.token, std=0.5)
            small(module)

    found = rows(Model(), "torch")
    assert found["token"].distribution == Normal(0.0, 0.5)
    assert same_distribution(found["linear.weight"].distribution, Uniform(-0.25, 0.25))


def test_what_a_constructor_draws_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 4))

        def _init_weights(self, module):
            small(module)

    with pytest.raises(ValueError, match=r"token \(in Model\): no code of the model"):
        initlab.plan_model(Model(), 0, "own")


def test_init_weights_that_cannot_be_read():
    class Model(nn.Sequential):
        def _init_weights(self, module):
            if isinstance(module, nn.Linear):
                init.constant_(module.weight, torch.rand(1).item())

    model = Model(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"0\.weight \(in Linear\): Model\._init_weights cannot be read: .*item"):
        initlab.plan_model(model, 0, "own")
    initlab.plan_model(model, 0, {"0": "xavier", "*": "own"})


@pytest.mark.parametrize("recipe", NAMES)
def test_nothing_is_guessed_against_code_that_cannot_be_read(recipe):
    class SomeNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))

        def reset_parameters(self):
            self.weight.data.fill_(torch.rand(1).item())
            init.zeros_(self.bias)

    with pytest.raises(ValueError, match=r"2 of 2 (?s:.*)weight \(in SomeNorm\): .*cannot be read"):
        initlab.plan_model(SomeNorm(), 0, UNCHECKED if recipe == "own" else recipe)


@pytest.mark.parametrize("recipe", NAMES)
def test_what_code_computes_is_nobodys_guess(recipe):
    class SomeNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.empty(500)), nn.Parameter(torch.empty(5))
            self.reset_parameters()

        def reset_parameters(self):
            self.weight.data.exponential_(2.0)
            init.orthogonal_(self.bias.data.view(5, 1))

    model = SomeNorm()
    report = initlab.init_model_(model, 0, recipe)
    assert [row.source for row in report.rows] == ["computed", "computed"]
    assert 0.4 < model.weight.mean() < 0.6
    assert model.bias.norm().item() == pytest.approx(1.0, abs=1e-5)
    kept = model.weight.detach().clone()
    with torch.no_grad():
        model.weight *= 3
    if recipe == "own":
        with pytest.raises(ValueError, match="its values are of another distribution"):
            initlab.init_model_(model, 0, recipe)
    initlab.init_model_(model, 0, UNCHECKED if recipe == "own" else recipe)
    assert torch.equal(model.weight, kept)


# ---------------------------------------------------------------------------------------------------------------
# auto

HE = ("ReLU", "ReLU6", "ELU", "CELU", "GELU", "SiLU", "Mish", "Hardswish", "Softplus")
TANH = ("Tanh", "Hardtanh", "Tanhshrink", "Softsign")
SIGMOID = ("Sigmoid", "Hardsigmoid", "LogSigmoid", "Softmax", "LogSoftmax")
SLOPES = {"LeakyReLU": ({"negative_slope": 0.3}, 0.3), "PReLU": ({"init": 0.4}, 0.4), "RReLU": ({"upper": 0.375}, 0.25)}
NO_RULE = ("GLU", "Hardshrink", "MultiheadAttention", "Softmax2d", "Softmin", "Softshrink", "Threshold")
ARGUMENTS = {
    "Softmax": (1,),
    "LogSoftmax": (1,),
    "Softmin": (1,),
    "Threshold": (0.1, 0.0),
    "MultiheadAttention": (8, 2),
}


def before(name, **named):
    model = nn.Sequential(nn.Linear(48, 24), getattr(nn, name)(*ARGUMENTS.get(name, ()), **named), nn.Linear(24, 48))
    return rows(model, "auto")


def test_no_activation_of_torch_is_missing():
    known = {*HE, *TANH, *SIGMOID, *SLOPES, "SELU", *NO_RULE}
    assert known == set(activations.__all__)


@pytest.mark.parametrize("name", HE)
def test_auto_takes_he_before_the_relu_family(name):
    found = before(name)
    assert same_distribution(found["0.weight"].distribution, Normal(0.0, math.sqrt(2 / 48)))
    assert found["0.weight"].why == f"He, before {name}"
    assert found["0.bias"].distribution == Constant(0.0)
    assert not any(row.guess for row in found.values())


@pytest.mark.parametrize("name", SLOPES)
def test_auto_takes_the_slope_of_a_leaky_relu(name):
    arguments, slope = SLOPES[name]
    assert same_distribution(
        before(name, **arguments)["0.weight"].distribution, Normal(0.0, math.sqrt(2 / (1 + slope**2) / 48))
    )


@pytest.mark.parametrize("name", [*TANH, *SIGMOID])
def test_auto_takes_xavier_before_tanh_and_sigmoid(name):
    found = before(name)
    std = math.sqrt(2 / 72) * (5 / 3 if name in TANH else 1)
    assert frozen(found["0.weight"].distribution).std() == pytest.approx(std)
    assert isinstance(found["0.weight"].distribution, Uniform)
    assert found["0.weight"].why == f"Xavier, before {name}"
    assert found["0.bias"].distribution == Constant(0.0)


def test_auto_takes_lecun_before_selu():
    assert same_distribution(before("SELU")["0.weight"].distribution, Normal(0.0, math.sqrt(1 / 48)))


@pytest.mark.parametrize("name", [*NO_RULE, "Identity"])
def test_without_an_activation_auto_is_torch_and_says_so(name):
    found, torchs = before(name), rows(nn.Linear(48, 24), "torch")
    for leaf in ("weight", "bias"):
        assert found[f"0.{leaf}"].distribution == torchs[leaf].distribution
    assert found["0.weight"].why == "no activation seen: Linear's own distribution"
    assert not found["0.weight"].guess


def test_auto_skips_what_is_no_activation():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3),
        *(nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LocalResponseNorm(2), nn.Identity()),
        *(nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(8), nn.Upsample(8)),
        *(nn.ZeroPad2d(1), nn.PixelShuffle(2), nn.ChannelShuffle(1), nn.Flatten(), nn.Unflatten(1, (1, 100))),
        *(nn.LayerNorm(100), nn.RMSNorm(100), nn.ReLU(), nn.Linear(100, 3)),
    )
    found = rows(model, "auto")["0.weight"]
    assert (found.why, found.guess) == ("He, before ReLU", False)


def test_an_activation_that_is_shared_counts_each_time():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(8, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 8))
    found = rows(model, "auto")
    assert [found[f"{i}.weight"].why[:2] for i in (0, 2, 4)] == ["He", "He", "no"]
    assert not any(row.guess for row in found.values())


def test_auto_looks_no_further_than_the_next_weight():
    found = rows(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Tanh(), nn.ReLU()), "auto")
    assert found["0.weight"].why.startswith("no activation seen")
    assert found["1.weight"].why == "Xavier, before Tanh"  # the first of two


class Gated(nn.Module):
    """Registers its activation where it does not use it."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8)

    def forward(self, x):
        return self.act(self.down(self.up(x)))


class Leaf(nn.Module):
    def forward(self, x):
        return x.abs()


class Container(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return torch.tanh(self.norm(x))


class Reversed(nn.Sequential):
    def forward(self, x):
        return functools.reduce(lambda x, module: module(x), reversed(self), x)


@pytest.mark.parametrize(
    ("model", "weight"),
    [
        (Gated(), "down.weight"),
        (nn.Sequential(nn.Linear(8, 8), Leaf(), nn.ReLU()), "0.weight"),
        (nn.Sequential(nn.Linear(8, 8), Container(), nn.ReLU()), "0.weight"),
        (nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.ReLU()), "0.0.weight"),
        (nn.ModuleList([nn.Linear(8, 8), nn.ReLU()]), "0.weight"),
        (Reversed(nn.Linear(8, 8), nn.ReLU()), "0.weight"),
        (nn.TransformerEncoderLayer(8, 2, 8, activation=nn.ReLU()), "linear1.weight"),
    ],
    ids=["custom", "unknown leaf", "unknown container", "nested", "list", "a forward of its own", "transformer"],
)
def test_auto_marks_what_it_guesses(model, weight):
    report = initlab.plan_model(model, 0, "auto")
    row = next(row for row in report.rows if row.name == weight)
    assert row.guess
    assert row.why.startswith(("He, before ReLU", "Xavier, before Sigmoid", "Xavier, before tanh"))
    line = next(line for line in str(report).splitlines() if line.startswith(weight))
    assert line.endswith(f"* {row.why}")
    assert "guessed" in str(report).splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------
# What the distributions are for


def signal(recipe, activation):
    """Standard deviation over inputs of what comes out of each of 30 layers of a net, on average over its units."""
    layers = [module for _ in range(30) for module in (nn.Linear(256, 256), activation())]
    model = nn.Sequential(*layers)
    initlab.init_model_(model, 0, recipe)
    x, stds = torch.randn(512, 256, generator=torch.Generator().manual_seed(0)), []
    with torch.no_grad():
        for module in model:
            x = module(x)
            if isinstance(module, activation):
                stds.append(float(x.std()))
    return stds, float(x.std(0).mean())


@pytest.mark.parametrize("recipe", ["he", "auto", recipes.he(distribution="truncated_normal")])
def test_relus_keep_their_signal(recipe):
    stds, _ = signal(recipe, nn.ReLU)
    assert all(0.2 < std < 5.0 for std in stds)


def test_without_them_it_fades():
    stds, over_inputs = signal("torch", nn.ReLU)
    assert stds[-1] < 0.05
    assert over_inputs < 1e-6  # what is left are biases, the same for every input
    _, over_inputs = signal("xavier", nn.ReLU)
    assert over_inputs < 1e-3


def test_residual_layers_by_any_pattern():
    """One pattern is a pattern, not its letters; an exact name is one too."""
    model = nn.ModuleDict({"in": nn.Linear(4, 4), "out": nn.Linear(4, 4)})
    for residual in ("out", ["out"], "*.out", ("nothing", "o*")):
        report = initlab.plan_model(model, 0, recipes.gpt2(layers=2, residual=residual))
        assert {row.name: row.std for row in report.rows if row.std} == {"in.weight": 0.02, "out.weight": 0.01}


def test_selus_normalise_themselves():
    stds, _ = signal("auto", nn.SELU)
    assert all(0.7 < std < 1.3 for std in stds)


# ---------------------------------------------------------------------------------------------------------------
# Names, functions and patterns


def test_every_recipe_has_its_name():
    for name in NAMES:
        assert initlab.plan_model(nn.Linear(3, 3), 0, name).recipe == name
        made = getattr(recipes, name)()
        assert initlab.plan_model(nn.Linear(3, 3), 0, made) == initlab.plan_model(nn.Linear(3, 3), 0, name)


@pytest.mark.parametrize(
    ("recipe", "error", "match"),
    [
        ("kaiming", ValueError, "recipe is 'kaiming'; it must be one of torch, own, he, "),
        ("", ValueError, "recipe is ''"),
        ("He", ValueError, "recipe is 'He'"),
        ({"*": "kaiming"}, ValueError, r"recipe\['\*'\] is 'kaiming'"),
        (None, TypeError, r"recipe is None \(NoneType\)"),
        (0.02, TypeError, r"recipe is 0\.02 \(float\)"),
        (["he"], TypeError, r"recipe is \['he'\] \(list\)"),
        ({"weight": 0.0}, TypeError, r"recipe\['weight'\] is 0\.0 \(float\)"),
        ({"weight": None}, TypeError, r"recipe\['weight'\] is None \(NoneType\)"),
        ({"weights": "he"}, ValueError, "no parameter is called 'weights'"),
        ({"weight": "he", "1.*": "he"}, ValueError, r"no parameter is called '1\.\*'"),
        (
            lambda ref: 0.02,
            TypeError,
            r"recipe <lambda> returned 0\.02 \(float\) for weight; it must return a distribution, .* or None",
        ),
        (lambda ref: "he", TypeError, r"returned 'he' \(str\) for weight"),
        (lambda ref: (Normal(), Normal()), TypeError, "returned .* for weight"),
        (lambda ref: None, ValueError, r"weight \(in Linear\)"),
        (lambda: Normal(), TypeError, "must take one argument"),
    ],
)
def test_recipes_that_are_none(recipe, error, match):
    model = nn.Linear(3, 3)
    before = copy_of(model)
    with pytest.raises(error, match=match):
        initlab.init_model_(model, 0, recipe)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def copy_of(model):
    return {name: values.clone() for name, values in model.state_dict().items()}


def net():
    return nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "bodyguard": nn.Linear(8, 8)}
    )


def test_the_first_pattern_that_matches_counts():
    found = rows(net(), {"body.0.weight": Constant(1.0), "body": Constant(2.0), "*.weight": Constant(3.0)})
    values = {name: getattr(row.distribution, "value", None) for name, row in found.items()}
    assert values == {
        "body.0.weight": 1.0,
        "body.0.bias": 2.0,
        "body.2.weight": 2.0,
        "body.2.bias": 2.0,
        "bodyguard.weight": 3.0,
        "bodyguard.bias": None,
    }
    assert found["bodyguard.bias"].distribution == Uniform(
        -1 / math.sqrt(8), 1 / math.sqrt(8)
    )  # "torch" serves the rest


def test_none_falls_through_to_the_next_pattern():
    asked = []

    def weights(ref):
        asked.append(ref.name)
        return Constant(1.0) if ref.attribute == "weight" else None

    found = rows(net(), {"body.0": weights, "body": Constant(2.0), "bodyguard": weights})
    assert asked == ["body.0.weight", "body.0.bias", "bodyguard.weight", "bodyguard.bias"]
    assert [
        found[name].distribution for name in ("body.0.weight", "body.0.bias", "body.2.bias", "bodyguard.weight")
    ] == [*(Constant(1.0), Constant(2.0), Constant(2.0), Constant(1.0))]
    assert found["bodyguard.bias"].distribution == Uniform(-1 / math.sqrt(8), 1 / math.sqrt(8))


def test_recipes_and_mappings_within_mappings():
    plain, nested = net(), {"body": {"*.2": "lecun", "*": "he"}, "*": recipes.xavier(2.0)}
    found = rows(plain, nested)
    stds = [found[f"{name}.weight"].std for name in ("body.0", "body.2", "bodyguard")]
    assert stds == pytest.approx([math.sqrt(2 / 8), math.sqrt(1 / 8), 2 * math.sqrt(2 / 16)])
    assert initlab.plan_model(plain, 0, nested).recipe == "xavier with rules for body"
    assert initlab.plan_model(plain, 0, {}).recipe == "own"
    assert initlab.plan_model(plain, 0, {}).rows == initlab.plan_model(plain).rows


def test_patterns_go_by_every_name_and_by_mapped_names():
    tied = nn.ModuleDict({"emb": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    tied["head"].weight = tied["emb"].weight
    for name in ("emb", "head", "*d*"):
        assert rows(tied, {name: Constant(1.0)})["emb.weight"].distribution == Constant(1.0)
    assert rows(net(), {"stage.2.body": Constant(1.0)}, names="stage.2")[
        "stage.2.body.0.bias"
    ].distribution == Constant(1.0)
    with pytest.raises(ValueError, match="no parameter is called 'body'"):
        rows(net(), {"body": Constant(1.0)}, names="stage.2")


def test_a_function_gets_the_tensor_ref():
    model = net()

    def distribution(ref):
        assert ref.tensor is getattr(ref.module, ref.attribute)
        assert model.get_submodule(ref.module_name) is ref.module
        assert ref.name == f"{ref.module_name}.{ref.attribute}"
        return Constant(len(ref.tensor.shape))

    report = initlab.init_model_(model, 0, distribution)
    assert all((parameter == parameter.dim()).all() for parameter in model.parameters())
    assert report.recipe == "distribution"
    assert {row.why for row in report.rows} == {"distribution"}


def test_a_distribution_fills_everything():
    model = net()
    report = initlab.init_model_(model, 0, Normal(3.0, 0.001))
    assert all(abs(p - 3).max() < 0.01 for p in model.parameters())
    assert not report.guesses


# ---------------------------------------------------------------------------------------------------------------
# Reports


@pytest.mark.parametrize("recipe", [*NAMES, {"emb": TruncatedNormal(0.0, 1.0, -math.inf, 0.5)}])
def test_reports_are_plain_data(recipe):
    report = initlab.plan_model(zoo(), 0, recipe)
    plain = json.loads(json.dumps(report.to_dict()))
    assert [row["name"] for row in plain["rows"]] == [row.name for row in report.rows]
    assert [row["guess"] for row in plain["rows"]] == [row.guess for row in report.rows]
    assert len(str(report).splitlines()) == len(report.rows) + 3 + bool(report.guesses)


@pytest.mark.parametrize(
    ("distribution", "accuracy"),
    [
        (Uniform(-3.0, 5.0), 1e-15),
        (Uniform(2.0, 2.0), 1e-15),
        (Normal(4.0, 0.3), 1e-15),
        (TruncatedNormal(0.0, 1.0, -2.0, 2.0), 1e-14),
        (TruncatedNormal(0.5, 0.2, 0.1, 0.6), 1e-13),
        (TruncatedNormal(0.0, 0.02, -2.0, 2.0), 1e-14),
        (TruncatedNormal(1.0, 3.0, -math.inf, math.inf), 1e-14),
        (TruncatedNormal(0.0, 1.0, 0.0, math.inf), 1e-14),
        (TruncatedNormal(0.0, 1.0, -math.inf, -5.0), 1e-10),
        (TruncatedNormal(0.0, 2.0, 23.8, math.inf), 1e-8),
        (TruncatedNormal(0.0, 1.0, -50.0, -11.0), 1e-8),
        (TruncatedNormal(0.0, 1.0, 10.0, 10.5), 1e-8),
        (TruncatedNormal(0.0, 1.0, -9.0, 8.0), 1e-12),
        (TruncatedNormal(0.0, 1.0, 0.3, 0.3005), 1e-4),
        (TruncatedNormal(0.0, 1.0, 0.3, 0.302), 1e-5),
        (TruncatedNormal(0.0, 1.0, 10.0, 10.002), 1e-4),
    ],
)
def test_std_of_a_distribution_is_scipys(distribution, accuracy):
    expected = (
        frozen(distribution).std()
        if not (isinstance(distribution, Uniform) and distribution.low == distribution.high)
        else 0.0
    )
    assert distribution.stddev == pytest.approx(expected, rel=accuracy, abs=0.0)
    assert Constant(3.0).stddev == 0.0


def test_std_of_a_narrow_distribution_is_a_uniforms():
    """Where scipy's own cancels."""
    for low in (-12.0, 0.3, 5.0):
        assert TruncatedNormal(0.0, 1.0, low, low + 1e-6).stddev == pytest.approx(1e-6 / math.sqrt(12), rel=1e-5)


class TiedModel(nn.Module):
    """A decoder's embedding and head around one normalised residual block."""

    def __init__(self, width, vocabulary, head_first=False):
        super().__init__()
        if head_first:
            self.head = nn.Linear(width, vocabulary, bias=False)
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        if not head_first:
            self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x)
        x = x + self.down(torch.relu(self.up(nn.functional.layer_norm(x, x.shape[-1:]))))
        return self.head(nn.functional.layer_norm(x, x.shape[-1:], eps=1e-9))


@pytest.mark.parametrize(
    "recipe",
    [
        *("he", "xavier", "lecun", "gpt2", "trunc_normal", "auto", "depth_scaled", "mitchell", "small_embedding"),
        recipes.zero_residual("down", "he"),
    ],
)
@pytest.mark.parametrize(("width", "head_first"), [(64, False), (256, True), (768, False)])
def test_the_first_loss_of_a_tied_head_is_that_of_knowing_nothing(recipe, width, head_first):
    model = TiedModel(width, 1000, head_first)
    report = initlab.init_model_(model, seed=0, recipe=recipe)
    torch.manual_seed(0)
    x = torch.randint(1, 1000, (256,))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(x), x.roll(1))
    assert float(loss) == pytest.approx(math.log(1000), rel=0.2)
    row = next(row for row in report.rows if row.aliases)
    assert row.std <= 4 / width * 1.0001
    by_itself = recipe == "small_embedding" or (recipe in ("gpt2", "trunc_normal", "depth_scaled") and width < 200)
    assert ("embedding and head" in row.why) != by_itself


def test_torchs_start_of_a_tied_head_is_warned_of():
    model = TiedModel(64, 1000)
    message = r"embedding\.weight a standard deviation of 1,.*logits of up to 64 "
    with pytest.warns(UserWarning, match=message) as w:
        initlab.init_model_(model, seed=0, recipe="torch")
    assert w[0].filename == __file__
    initlab.init_model_(model, seed=0, recipe={"embedding": Normal(0.0, 0.01), "*": "torch"})
    initlab.init_model_(model, seed=0, recipe="torch", only="up")


class Blocks(nn.Module):
    def __init__(self, down, wrap=lambda layer: layer):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(4, 16), down: wrap(nn.Linear(16, 4))}) for _ in range(3)
        )


def test_gpt2_says_where_no_residual_layer_is_known_by_name():
    message = r"no layer that adds to the residual stream in blocks: none of its blocks.*residual='\*\.down'"
    with pytest.warns(UserWarning, match=message):
        initlab.init_model_(Blocks("back"), seed=0, recipe="gpt2")
    report = initlab.init_model_(Blocks("back"), seed=0, recipe=recipes.gpt2(residual="*.back"))
    assert {row.std for row in report.rows if "back.weight" in row.name} == {0.02 / math.sqrt(6)}
    initlab.init_model_(Blocks("back"), seed=0, recipe=recipes.gpt2(residual=()))
    initlab.init_model_(nn.Sequential(nn.Linear(3, 3)), seed=0, recipe=recipes.gpt2(residual=()))


@pytest.mark.parametrize("name", ["c_proj", "o_proj", "down_proj", "down", "out", "proj", "dense", "to_out", "w2"])
def test_residual_layers_that_are_known_by_name(name):
    """Also where they are the layer before last, as in to_out = Sequential(Linear, Dropout)."""
    for build in (Blocks, lambda name: Blocks(name, lambda layer: nn.Sequential(layer, nn.Dropout()))):
        found = rows(build(name), "gpt2")
        assert {row.std for key, row in found.items() if f".{name}." in key and "weight" in key} == {0.02 / 6**0.5}
        assert found["blocks.0.up.weight"].std == 0.02


def test_what_widens_or_lies_in_no_block_is_no_residual_layer():
    """BERT's intermediate.dense, a patch embedding's proj."""
    model = Blocks("down")
    model.proj = nn.Linear(4, 4)
    model.blocks.extend(nn.ModuleDict({"up": nn.Linear(4, 16), "dense": nn.Linear(4, 16)}) for _ in range(1))
    found = rows(model, "gpt2")
    assert found["proj.weight"].std == found["blocks.3.dense.weight"].std == 0.02
