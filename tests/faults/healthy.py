"""Training steps with nothing wrong in them, some of which look odd on purpose."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import data
from .case import Built, Healthy, healthy_keeper, supervised, train

HEALTHY: list[Healthy] = []
healthy = healthy_keeper(HEALTHY)

cross_entropy = supervised(nn.CrossEntropyLoss())
mse = supervised(nn.MSELoss())


class Net(nn.Module):
    """`body` and `head`."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def mlp(inputs: int, hidden: int, outputs: int, act: type[nn.Module] = nn.ReLU) -> Net:
    body = nn.Sequential(nn.Linear(inputs, hidden), act(), nn.Linear(hidden, hidden), act())
    return Net(body, nn.Linear(hidden, outputs))


def sgd(model: nn.Module, lr: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


# Feed-forward.


@healthy()
def mlp_digits_sgd() -> Built:
    model = mlp(64, 64, 10)
    return model, data.digits(), cross_entropy, sgd(model)


@healthy(steps=3)
def mlp_digits_adam_large_batch() -> Built:
    model = mlp(64, 128, 10)
    return model, data.digits(256), cross_entropy, adam(model)


@healthy()
def mlp_wine_tanh_xavier() -> Built:
    model = mlp(13, 32, 3, nn.Tanh)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
    return model, data.wine(), cross_entropy, sgd(model)


@healthy()
def logistic_regression() -> Built:
    x, y = data.cancer()
    model = nn.Sequential(nn.Linear(30, 1))
    return model, (x, y.float().unsqueeze(1)), supervised(nn.BCEWithLogitsLoss()), sgd(model, 0.05)


@healthy(steps=2)
def regression_diabetes() -> Built:
    model = mlp(10, 64, 1)
    return model, data.diabetes(), mse, adam(model)


@healthy()
def huber_without_optimizer() -> Built:
    model = mlp(10, 32, 1, nn.SiLU)
    return model, data.diabetes(), supervised(nn.HuberLoss()), None


@healthy()
def selu_lecun() -> Built:
    model = mlp(64, 64, 10, nn.SELU)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
    return model, data.digits(), cross_entropy, sgd(model, 0.05)


class Residual(nn.Module):
    """x + f(norm(x)); the last layer of f may start at zero, as it should in deep networks."""

    def __init__(self, width: int, zero: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        if zero:
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(F.gelu(self.inner(self.norm(x))))


@healthy()
def residual_mlp() -> Built:
    model = Net(nn.Sequential(nn.Linear(64, 48), *(Residual(48, False) for _ in range(8))), nn.Linear(48, 10))
    return model, data.digits(), cross_entropy, adam(model)


@healthy(steps=2)
def zero_started_residuals() -> Built:
    # Zeros on purpose: the last layer of each branch, and the head.
    model = Net(nn.Sequential(nn.Linear(64, 48), *(Residual(48, True) for _ in range(4))), nn.Linear(48, 10))
    nn.init.zeros_(model.head.weight)
    return model, data.digits(), cross_entropy, adam(model)


@healthy(steps=2)
def adamw_dropout_weight_decay() -> Built:
    body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.2))
    model = Net(body, nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    return model, data.digits(), cross_entropy, optimizer


@healthy()
def gradient_accumulation() -> Built:
    # Each of four parts of the batch gives a quarter of the loss.
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y) / 4

    model = mlp(64, 64, 10)
    x, y = data.digits(64)
    return model, (x, y), loss_fn, sgd(model)


@healthy()
def trained_to_almost_zero() -> Built:
    # Sure of itself after training: saturated softmax, tiny gradients, all as it should be.
    model = mlp(13, 32, 3)
    batch = data.wine()
    optimizer = adam(model, 0.01)
    train(model, batch, cross_entropy, optimizer, 150)
    return model, batch, cross_entropy, optimizer


@healthy()
def one_hot_inputs() -> Built:
    # Grey values as one-hot vectors: 94 % zeros, many columns that are all zero in the batch.
    x, y = data.digits(raw=True)
    model = mlp(64 * 17, 32, 10)
    return model, (F.one_hot(x.long(), 17).flatten(1).float(), y), cross_entropy, adam(model)


class Table(nn.Module):
    """Numbers and a category, from a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.category = nn.Embedding(4, 8)
        self.numbers = nn.Linear(13, 24)
        self.head = nn.Linear(32, 3)

    def forward(self, numbers: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.numbers(numbers), self.category(category)], -1)
        return self.head(torch.tanh(joined))


@healthy()
def dict_of_inputs() -> Built:
    x, y = data.wine()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch["numbers"], batch["category"]), batch["label"])

    model = Table()
    return model, {"numbers": x, "category": (x[:, 0] > 0).long(), "label": y}, loss_fn, adam(model, 3e-3)


@healthy()
def double_precision() -> Built:
    x, y = data.diabetes()
    model = mlp(10, 32, 1, nn.Tanh).double()
    return model, (x.double(), y.double()), mse, sgd(model, 0.05)


@healthy()
def frozen_body_unused_head() -> Built:
    # Fine-tuning: the body is frozen, and an auxiliary head takes no part in this loss.
    model = mlp(64, 64, 10)
    model.auxiliary = nn.Linear(64, 2)
    model.body.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return model, data.digits(), cross_entropy, optimizer


@healthy()
def guarded_by_hand() -> Built:
    # log, division and sqrt by hand, each with its guard.
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        x, y = batch
        x = x / (x.norm(dim=-1, keepdim=True) + 1e-6) * 8
        p = torch.softmax(model(x), -1)
        picked = torch.log(p.clamp_min(1e-8))[torch.arange(len(y)), y]
        return torch.sqrt(picked.square() + 1e-6).mean()

    x, y = data.digits()
    x[5] = 0.0
    model = mlp(64, 64, 10)
    return model, (x, y), loss_fn, sgd(model)


@healthy()
def one_sample() -> Built:
    x, y = data.digits(1)
    model = Net(nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU()), nn.Linear(32, 10))
    return model, (x, y), cross_entropy, sgd(model, 0.02)


@healthy()
def soft_targets_and_label_smoothing() -> Built:
    # Targets with exact zeros, in the form of kl_div that allows them.
    x, y = data.digits()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        logits = model(inputs)
        one_hot = F.one_hot(target, 10).float()
        smooth = F.cross_entropy(logits, target, label_smoothing=0.1)
        return smooth + F.kl_div(logits.log_softmax(-1), one_hot, reduction="batchmean")

    model = mlp(64, 64, 10)
    return model, (x, y), loss_fn, adam(model)


@healthy()
def poisson_counts() -> Built:
    # Counts with zeros under the Poisson loss with log_input.
    x, y = data.diabetes()
    counts = (2 + 2 * y).clamp_min(0).floor()
    model = mlp(10, 32, 1)
    return model, (x, counts), supervised(nn.PoissonNLLLoss()), adam(model)


# Convolutions.


def cnn(channels: int = 16) -> Net:
    body = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Net(body, nn.Linear(2 * channels, 10))


@healthy(steps=2)
def cnn_batch_norm() -> Built:
    model = cnn()
    return model, data.images(64), cross_entropy, adam(model, 3e-3)


@healthy()
def cnn_batch_norm_eval() -> Built:
    # Fine-tuning with frozen statistics, after 50 steps of training.
    model = cnn(8)
    batch = data.images(64)
    train(model, batch, cross_entropy, adam(model, 3e-3), 50)
    model.eval()
    return model, batch, cross_entropy, sgd(model, 0.01)


@healthy(steps=3)
def cnn_after_a_hundred_steps() -> Built:
    # Goes on with the momentum of a hundred steps.
    model = cnn(8)
    batch = data.images(64)
    optimizer = sgd(model, 0.02, momentum=0.9, nesterov=True)
    train(model, batch, cross_entropy, optimizer, 100)
    return model, batch, cross_entropy, optimizer


@healthy()
def cnn_bfloat16_autocast() -> Built:
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        x, y = batch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        return F.cross_entropy(out.float(), y)

    model = cnn(8)
    return model, data.images(64), loss_fn, adam(model, 3e-3)


@healthy()
def segmentation_with_void() -> Built:
    # Void pixels carry 255, and the loss knows.
    x, _ = data.images(32)
    mask = (x[:, 0] > 0.5).long()
    mask[(x[:, 0] > 0.45) & (x[:, 0] < 0.55)] = 255
    model = Net(nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()), nn.Conv2d(16, 2, 1))
    return model, (x, mask), supervised(nn.CrossEntropyLoss(ignore_index=255)), adam(model, 3e-3)


@healthy()
def autoencoder() -> Built:
    x, _ = data.images(64)
    x = x.flatten(1)
    model = Net(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), nn.Linear(8, 64))
    return model, (x, x.clone()), supervised(nn.BCEWithLogitsLoss()), adam(model, 3e-3)


# Sequences.


def rows(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = data.images(count)
    return x[:, 0], y


class Reader(nn.Module):
    """A recurrent layer `rnn` and a linear `head` on its last state."""

    def __init__(self, rnn: nn.Module, width: int) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@healthy()
def lstm_rows() -> Built:
    model = Reader(nn.LSTM(8, 48, batch_first=True), 48)
    return model, rows(), cross_entropy, adam(model, 3e-3)


@healthy()
def gru_two_layers_both_ways() -> Built:
    model = Reader(nn.GRU(8, 24, num_layers=2, bidirectional=True, batch_first=True), 48)
    return model, rows(), cross_entropy, adam(model, 3e-3)


@healthy()
def embedding_with_padding() -> Built:
    # Token 0 is padding, and its vector is zero.
    x, y = data.digits(64, raw=True)
    body = nn.Sequential(nn.Embedding(17, 8, padding_idx=0), nn.Flatten())
    model = Net(body, nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 10)))
    return model, (x.long(), y), cross_entropy, adam(model)


class Encoder(nn.Module):
    """torch's transformer encoder over rows; `padding` marks rows to leave out."""

    def __init__(self, depth: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.pos = nn.Parameter(0.02 * torch.randn(1, 8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.encoder(self.embed(x) + self.pos, src_key_padding_mask=padding)
        return self.head(hidden.mean(1))


@healthy()
def transformer_encoder() -> Built:
    model = Encoder(3, 0.0)
    return model, rows(), cross_entropy, adam(model)


@healthy(steps=2)
def transformer_padding_and_dropout() -> Built:
    # Some rows are padding, never all of a sample.
    x, y = rows()
    padding = x.sum(-1) == 0
    padding[:, 3] = False

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, mask, target = batch
        return F.cross_entropy(model(inputs, mask), target)

    model = Encoder(2, 0.1)
    return model, (x, padding, y), loss_fn, adam(model)


class Causal(nn.Module):
    """A small language model whose mask is -inf above the diagonal, on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 32)
        self.qkv = nn.Linear(32, 96)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 17)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / math.sqrt(32)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
        return self.head(self.norm(x + torch.softmax(scores, -1) @ v))


@healthy()
def causal_language_model() -> Built:
    # Some labels, not all, are -100.
    x, _ = data.digits(32, raw=True)
    tokens = x[:, 16:33].long()
    target = tokens[:, 1:].clone()
    target[:, :3] = -100

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, labels = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())

    model = Causal()
    return model, (tokens[:, :-1].clone(), target), loss_fn, adam(model, 3e-3)


# GANs and physics.


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
        self.critic = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.critic(self.generator(z))


def gan_batch() -> dict[str, torch.Tensor]:
    x, _ = data.images(64)
    return {"real": x.flatten(1), "z": torch.randn(64, 16)}


@healthy()
def gan_critic_step() -> Built:
    # The generator takes no part: it has no gradients.
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        on_real = model.critic(batch["real"])
        on_fake = model.critic(model.generator(batch["z"]).detach())
        return F.softplus(-on_real).mean() + F.softplus(on_fake).mean()

    model = Gan()
    return model, gan_batch(), loss_fn, adam(model.critic)


@healthy()
def gan_generator_step() -> Built:
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        return F.softplus(-model(batch["z"])).mean()

    model = Gan()
    return model, gan_batch(), loss_fn, adam(model.generator)


@healthy()
def pinn() -> Built:
    # u' = -u, u(0) = 1, with a derivative inside the loss.
    model = Net(nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()), nn.Linear(32, 1))

    def loss_fn(model: Any, points: Any) -> torch.Tensor:
        points = points.detach().requires_grad_()
        u = model(points)
        (du,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        return (du + u).square().mean() + (u[0] - 1).square().mean()

    return model, torch.linspace(0, 1, 64).unsqueeze(1), loss_fn, adam(model, 3e-3)
