"""advise(): the scheme of each layer, the loss that it expects, and a recipe that does what it says when pasted."""

import json
import math

import pytest
import torch
from initlab.kernels import Normal, Uniform
from torch import nn
from torch.nn import functional as F

import initlab

pytestmark = pytest.mark.usefixtures("one_thread")


def ce(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def classes(count, rows=128, width=20, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(rows, width, generator=generator)
    return x, torch.randint(count, (rows,), generator=generator)


def pasted(advice, model, batch, loss_fn):
    """The loss that the recipe gives, as code and as a mapping."""
    exec(advice.code, {"model": model})
    loss = loss_fn(model, batch).item()
    initlab.init_model_(model, advice.seed, advice.recipe)
    assert loss_fn(model, batch).item() == loss
    return loss


def schemes(advice):
    return {row.name: row.scheme.partition(", for data")[0] for row in advice.layers}


def test_mixed_activations():
    widths = [nn.Linear(64, 64) for _ in range(8)]
    acts = [nn.ReLU(), nn.Tanh(), nn.GELU(), nn.SiLU(), nn.SELU(), nn.Sigmoid(), nn.LeakyReLU(0.2), nn.ELU()]
    model = nn.Sequential(*[m for pair in zip(widths, acts, strict=True) for m in pair], nn.Linear(64, 10))
    batch = classes(10, width=64)
    advice = initlab.advise(model, batch, ce)
    assert [row.scheme for row in advice.layers] == [
        *("He, before ReLU", "Xavier, before Tanh", "He, before GELU", "He, before SiLU", "LeCun, before SELU"),
        *("Xavier, before Sigmoid", "He, before LeakyReLU", "He, before ELU", "LeCun, a head: small"),
    ]
    stds = [row.wanted for row in advice.layers[:-1]]
    gains = [2**0.5, 5 / 3, 2**0.5, 2**0.5, 1.0, 1.0, (2 / 1.04) ** 0.5, 2**0.5]
    assert stds == pytest.approx([gain / 8 for gain in gains])  # fan_in = fan_out = 64
    assert isinstance(advice.recipe["2.weight"], Uniform)
    assert isinstance(advice.recipe["0.weight"], Normal)
    assert advice.expected == pytest.approx(math.log(10))
    assert "ln 10" in advice.why
    assert pasted(advice, model, batch, ce) == advice.predicted == pytest.approx(advice.expected, rel=0.1)


def test_numbers_are_measured():
    model, batch = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)), classes(5, scale=50.0)
    advice = initlab.advise(model, batch, ce)
    first = advice.layers[0]
    with torch.no_grad():
        out = F.linear(batch[0], model[0].weight, model[0].bias)
        assert advice.loss == ce(model, batch).item()
    assert first.output == pytest.approx(float(out.std(correction=0)), rel=1e-4)
    assert first.input == pytest.approx(float(batch[0].square().mean().sqrt()), rel=1e-4)
    assert first.std == pytest.approx(float(model[0].weight.detach().std(correction=0)), rel=1e-4)
    assert first.wanted == pytest.approx(math.sqrt(2 / 20) / first.input)
    assert first.expected == pytest.approx(2**0.5)
    initlab.init_model_(model, 0, advice.recipe)
    assert first.measured == pytest.approx(float(model[0](batch[0]).detach().std(correction=0)), rel=1e-4)
    assert first.reads_data
    assert not first.is_head
    assert advice.layers[1].is_head
    assert "batch[0] has mean" in advice.notes[0]
    assert advice.inputs[0].std == pytest.approx(50, rel=0.1)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(20, 64)), nn.Parameter(torch.zeros(64))
        self.c, self.d = nn.Parameter(0.1 * torch.randn(64, 64)), nn.Parameter(torch.randn(7, 64))
        self.e = nn.Parameter(0.1 * torch.randn(64, 64))

    def forward(self, x):
        h = torch.relu(x @ self.a + self.b)
        g = h @ self.c
        h = torch.einsum("bi,ij->bj", g * torch.sigmoid(g), self.e)
        h = 0.5 * h * (1 + torch.tanh(0.7978845608 * (h + 0.044715 * h**3)))
        return F.log_softmax(F.linear(h, self.d), 1)


class Residual(nn.Module):
    def __init__(self, norm, depth=30):
        super().__init__()
        self.inp, self.out = nn.Linear(20, 32), nn.Linear(32, 7)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(depth))
        self.norms = nn.ModuleList(norm(32) for _ in range(depth))

    def forward(self, x):
        x = self.inp(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + F.relu(layer(norm(x)))
        return self.out(x)


class Language(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.emb, self.pos = nn.Embedding(100, 32), nn.Parameter(0.02 * torch.randn(16, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True, activation="gelu")
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 100, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, t):
        return self.head(self.norm(self.blocks(self.emb(t) + self.pos[: t.shape[1]])))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


def language(model, batch):
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def images():
    return 255 * torch.rand(16, 3, 12, 12), torch.randint(10, (16,))


def targets(columns, mean, std):
    x = torch.randn(128, 8)
    return x, mean + std * torch.randn(128, columns)


CASES = {
    "functional": (Functional, lambda: classes(7, scale=30.0), lambda m, b: F.nll_loss(m(b[0]), b[1])),
    "residual": (lambda: Residual(nn.LayerNorm), lambda: classes(7, scale=30.0), ce),
    "explodes": (lambda: Residual(nn.Identity), lambda: classes(7, scale=1e-3), ce),
    "convolution": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.SiLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
        ),
        images,
        ce,
    ),
    "one target": (
        lambda: nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 1)), lambda: targets(1, 50.0, 3.0), mse
    ),
    "targets by hand": (
        lambda: nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3)),
        lambda: targets(3, 0.0, 1e-3),
        lambda m, b: ((m(b[0]) - b[1]) ** 2).mean(),
    ),
    "probabilities": (
        lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid()),
        lambda: (torch.randn(64, 8), torch.randint(2, (64, 1)).float()),
        lambda m, b: F.binary_cross_entropy(m(b[0]), b[1]),
    ),
    "language": (lambda: Language(False), lambda: torch.randint(100, (8, 17)), language),
    "tied": (lambda: Language(True), lambda: torch.randint(100, (8, 17)), language),
    "recurrent": (Recurrent, lambda: (torch.randn(32, 5, 8), torch.randint(3, (32,))), ce),
    "weight_norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(20, 16)), nn.ReLU(), nn.Linear(16, 3)
        ),
        lambda: classes(3),
        ce,
    ),
    "lookup": (lambda: nn.Embedding(20, 20), lambda: (torch.randint(20, (64,)), torch.randint(20, (64,))), ce),
}  # fmt: skip
EXPECTED = {"functional": math.log(7), "one target": None, "probabilities": math.log(2), "tied": math.log(100)}


@pytest.mark.long_if(lambda case: case not in ("functional", "one target", "tied"))
@pytest.mark.parametrize("case", CASES)
def test_pasted(case):
    torch.manual_seed(0)
    build, data, loss_fn = CASES[case]
    model, batch = build(), data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = torch.get_rng_state()
    advice = initlab.advise(model, batch, loss_fn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seen)
    assert advice.predicted == pytest.approx(advice.expected, rel=0.1)
    assert pasted(advice, model, batch, loss_fn) == pytest.approx(advice.predicted, rel=0.01)
    if EXPECTED.get(case) is not None:
        assert advice.expected == pytest.approx(EXPECTED[case], rel=1e-5)
    if case == "one target":
        assert advice.expected == pytest.approx(float(batch[1].var(correction=0)), rel=1e-4)
    json.loads(advice.to_json())
    for lang in ("en", "zh"):
        assert advice.code.splitlines()[0] in advice.text(lang, 80)


def test_schemes_of_functions():
    advice = initlab.advise(Functional(), classes(7), lambda m, b: F.nll_loss(m(b[0]), b[1]))
    found = ["He, before ReLU", "He, before SiLU", "He, before GELU", "LeCun, a head: small"]
    assert list(schemes(advice).values()) == found
    advice = initlab.advise(Language(True), torch.randint(100, (8, 17)), language)
    found = schemes(advice)
    assert found["emb.weight"] == "LeCun, a head: small"
    assert found["blocks.layers.0.linear1.weight"] == "He, before GELU"
    advice = initlab.advise(Residual(nn.Identity), classes(7), ce)
    assert "fitted to this batch" in advice.notes[0]
    share = {row.name: 30**0.5 if row.name.startswith("layers") else 1.0 for row in advice.layers}  # of 30 branches
    assert all(0.5 < row.measured * share[row.name] < 2 for row in advice.layers if not row.is_head)


def bce(model, batch):
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


def with_bias(layer, value):
    nn.init.constant_(layer.bias, value)
    return layer


def test_words_are_true():
    torch.manual_seed(0)
    x, y = classes(10)
    plain = nn.Linear(20, 10)
    summed = initlab.advise(plain, (x, y), lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"))
    assert summed.expected == pytest.approx(128 * math.log(10), rel=1e-5)
    assert summed.why == "the loss of outputs that are 0"
    assert initlab.advise(plain, (x, y), ce).why == "ln 10 for cross_entropy over 10 classes"
    more = initlab.advise(plain, (x, y), lambda m, b: ce(m, b) + 1.0)
    assert more.expected == pytest.approx(1 + math.log(10), rel=1e-5)
    assert more.why == "the loss of outputs that are 0"
    weighted = initlab.advise(
        nn.Linear(20, 3),
        (x, torch.randint(2, (128, 3)).float()),
        lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1], pos_weight=torch.full((3,), 9.0)),
    )
    assert weighted.why == "the loss of outputs that are 0"
    head = nn.utils.parametrizations.weight_norm(nn.Linear(16, 10))
    parts = initlab.advise(nn.Sequential(nn.Linear(20, 16), nn.ReLU(), head), (x, y), ce)
    assert "something" not in str(parts)
    said = initlab.advise(Recurrent(), (255 * torch.rand(32, 5, 8), y[:32] % 3), ce).notes
    assert any("has mean 12" in note for note in said)
    assert not any("makes up" in note for note in said)
    scaled = initlab.advise(
        nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 10)), (255 * torch.rand(128, 20), y), ce
    )
    assert any("makes up for the scale" in note for note in scaled.notes)


def test_targets():
    torch.manual_seed(0)
    net = lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))  # noqa: E731
    advice = initlab.advise(net(), targets(1, 0.0, 1e5), mse)
    assert any("the targets have mean" in note and "e+0" in note for note in advice.notes)
    assert not any("targets" in note for note in initlab.advise(net(), targets(1, 0.0, 1.0), mse).notes)
    for value in (0.0, 7.0):
        advice = initlab.advise(net(), targets(1, value, 0.0), mse)
        assert advice.expected == pytest.approx(0.0, abs=1e-9)
        assert advice.predicted < 1e-3
        assert advice.notes == ()


def test_rare_positives():
    torch.manual_seed(0)
    x, y = torch.randn(500, 8), torch.zeros(500, 1)
    y[:10] = 1
    advice = initlab.advise(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), (x, y), bce)
    assert advice.recipe["2.bias"].value == pytest.approx(math.log(0.02 / 0.98), rel=1e-5)
    assert advice.expected == pytest.approx(-0.02 * math.log(0.02) - 0.98 * math.log(0.98), rel=1e-4)
    assert advice.predicted == pytest.approx(advice.expected, rel=0.1)
    for columns, rare in ((3, y.expand(-1, 3)), (1, torch.zeros(500, 1))):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), with_bias(nn.Linear(16, columns), -4.6))
        advice = initlab.advise(model, (x, rare), bce)
        assert advice.recipe["2.bias"].value == pytest.approx(-4.6)
        assert "the head's own bias" in advice.why
    advice = initlab.advise(nn.Linear(8, 1), (x, (torch.rand(500, 1) < 0.4).float()), bce)
    assert advice.why == "ln 2 for binary cross entropy"


def test_without_a_loss():
    model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3))
    advice = initlab.advise(model, classes(3))
    assert advice.loss is advice.expected is advice.predicted is None
    assert schemes(advice) == {"0.weight": "He, before ReLU", "2.weight": "LeCun, before no activation"}
    assert "no loss function" in str(advice)
    initlab.init_model_(model, 0, advice.recipe)


@pytest.mark.parametrize(
    ("model", "batch", "loss_fn", "error", "message"),
    [
        (3, torch.randn(4, 8), None, TypeError, "model is a int"),
        (nn.Linear(8, 8), torch.randn(4, 8), 3, TypeError, "loss_fn is a int"),
        (nn.Linear(8, 8), torch.ones(4, 8), None, ValueError, "no two rows of batch differ"),
        (nn.Linear(8, 8, device="meta"), torch.randn(4, 8), None, ValueError, "weight\n"),
        (nn.Linear(8, 8), torch.randn(4, 8), lambda m, b: m(b), TypeError, "one element"),
        (nn.ReLU(), torch.randn(4, 8), None, ValueError, "no weight"),
    ],
)
def test_refused(model, batch, loss_fn, error, message):
    with pytest.raises(error, match=message):
        initlab.advise(model, batch, loss_fn)


def test_sharded_models_are_refused(tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = fsdp.fully_shard(nn.Linear(20, 3), mesh=mesh)
        with pytest.raises(NotImplementedError, match="and advise runs passes") as caught:
            initlab.advise(model, classes(3), ce)
        assert "diagnos" not in str(caught.value).lower()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.long
def test_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=100, n_positions=32)
    t = torch.randint(100, (4, 16))
    model = transformers.GPT2LMHeadModel(config).eval()
    batch = {"input_ids": t, "labels": t}
    advice = initlab.advise(model, batch)
    assert advice.expected == pytest.approx(math.log(100), rel=1e-4)
    assert pasted(advice, model, batch, lambda m, b: m(**b).loss) == pytest.approx(advice.predicted, rel=0.01)
    assert schemes(advice)["transformer.h.0.mlp.c_fc.weight"].startswith("He, before NewGELU")


class Contrastive(nn.Module):
    """Two towers whose outputs are normalised, and a temperature, as in CLIP."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(20, 16), nn.Linear(20, 16)
        self.temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, x):
        a, b = F.normalize(self.a(x), dim=-1), F.normalize(self.b(x.roll(1, 1)), dim=-1)
        logits, target = self.temperature.exp() * a @ b.T, torch.arange(len(x))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Variational(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.mean, self.log = nn.Linear(20, 64), nn.Linear(64, 8), nn.Linear(64, 8)
        self.decoder, self.out = nn.Linear(8, 64), nn.Linear(64, 20)

    def forward(self, x):
        h = F.relu(self.inp(x))
        mean, log = self.mean(h), self.log(h)
        made = self.out(F.relu(self.decoder(mean + torch.randn_like(mean) * (log / 2).exp())))
        return F.mse_loss(made, x) - 0.5 * (1 + log - mean**2 - log.exp()).sum(1).mean()


@pytest.mark.parametrize("kind", ["contrastive", "variational", "weight_norm"])
def test_the_first_loss_is_met_or_said_to_be_unknown(kind):
    """Where heads are normalised no factor on them counts; what does not pass through a head is the recipe's own."""
    torch.manual_seed(0)
    x, y = classes(7)
    if kind == "weight_norm":
        head = nn.utils.parametrizations.weight_norm(nn.Linear(32, 7))
        model, loss_fn = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), head), ce
    else:
        model = Contrastive() if kind == "contrastive" else Variational()
        loss_fn = lambda m, b: m(b[0])  # noqa: E731
    advice = initlab.advise(model, (x, y), loss_fn)
    if kind == "variational":
        assert advice.predicted == pytest.approx(advice.expected, rel=0.1)
    else:
        assert advice.expected is None
        assert "which first loss to expect is not known" in str(advice)
    initlab.init_model_(model, 0, advice.recipe)
    torch.manual_seed(0)
    with torch.no_grad():
        assert float(loss_fn(model, (x, y))) == pytest.approx(advice.predicted, rel=0.1)
