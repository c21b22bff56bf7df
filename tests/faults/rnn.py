"""Faults in recurrent networks: digits as sequences of rows or of pixels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import data
from .case import DIV, Built, Fault, planter, supervised

FAULTS: list[Fault] = []
fault = planter(FAULTS, "rnn")


class Reader(nn.Module):
    """A recurrent layer `rnn` over a sequence and a linear `head` on its last state."""

    def __init__(self, rnn: nn.Module, outputs: int = 10) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def rows(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits as sequences of 8 rows of 8 pixels in 0..1."""
    x, y = data.images(count)
    return x[:, 0], y


def pixels(count: int = 32, repeats: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits as sequences of 64 standardised pixels, one a step, read `repeats` times."""
    x, y = data.digits(count)
    return x.repeat(1, repeats).unsqueeze(-1), y


cross_entropy = supervised(nn.CrossEntropyLoss())
mse = supervised(nn.MSELoss())


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


# Input.


@fault("input", place={"feature": 2})
def sensor_gaps(planted: bool = True) -> Built:
    # Gaps in one channel of the series stay NaN after the resampling.
    x, y = rows()
    if planted:
        x[10, 3:6, 2] = torch.nan
        x[41, 0, 2] = torch.nan
    model = Reader(nn.LSTM(8, 32, batch_first=True))
    return model, (x, y), cross_entropy, adam(model)


class Tokens(nn.Module):
    """Embedded tokens, a GRU, a head."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16)
        self.reader = Reader(nn.GRU(16, 32, batch_first=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reader(self.embedding(x))


@fault("input", "operation", place={"module": "embedding"}, fixable=False)
def token_past_the_vocabulary(planted: bool = True) -> Built:
    # Grey values 0..16 are 17 tokens, the embedding has 16.
    x, y = data.digits(64, raw=True)
    model = Tokens(16 if planted else 17)
    return model, (x.long(), y), cross_entropy, adam(model)


@fault("input", place={"feature": 5}, steps=5)
def one_channel_in_other_units(planted: bool = True) -> Built:
    # One channel in pascal, the others in bar; a ReLU RNN with SGD diverges.
    x, y = rows()
    if planted:
        x[:, :, 5] *= 1e5
    model = Reader(nn.RNN(8, 32, batch_first=True, nonlinearity="relu"))
    return model, (x, y), cross_entropy, sgd(model, 0.05)


# Target.


@fault("target")
def infinite_target(planted: bool = True) -> Built:
    # The next value of a series of ratios, one of them x / 0.
    x, _ = rows()
    target = x[:, -1].mean(1, keepdim=True)
    if planted:
        target[17] = torch.inf
    model = Reader(nn.GRU(8, 32, batch_first=True), outputs=1)
    return model, (x, target), mse, adam(model)


# Starting weights.


@fault("weights", "gradient", place={"module": "rnn"}, steps=2)
def standard_normal_recurrence(planted: bool = True) -> Built:
    # N(0, 1) for the recurrent weights of a ReLU RNN with 64 units: the state grows about 6 times a step.
    x, y = pixels(repeats=1)
    model = Reader(nn.RNN(1, 64, batch_first=True, nonlinearity="relu"))
    nn.init.orthogonal_(model.rnn.weight_hh_l0)
    if planted:
        nn.init.normal_(model.rnn.weight_hh_l0)
    return model, (x, y), cross_entropy, sgd(model, 0.001)


@fault("weights", place={"module": ("", "rnn", "head")})
def all_zero(planted: bool = True) -> Built:
    # Every parameter of a GRU and its head set to 0: the units never come to differ.
    x, y = rows()
    model = Reader(nn.GRU(8, 32, batch_first=True))
    if planted:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    return model, (x, y), cross_entropy, adam(model, 0.02)


# Gradient.


@fault("gradient", "weights", place={"module": "rnn"}, fixable=False, steps=2)
def spectral_radius_above_one(planted: bool = True) -> Built:
    # 192 steps through a tanh RNN whose recurrent matrix has radius 1.5: chaos, and gradients of 1.5**192.
    x, y = pixels()
    model = Reader(nn.RNN(1, 64, batch_first=True))
    nn.init.orthogonal_(model.rnn.weight_hh_l0, gain=1.5 if planted else 1.0)
    nn.init.normal_(model.rnn.weight_ih_l0, std=0.01)
    return model, (0.1 * x, y), cross_entropy, sgd(model, 0.01)


class SineRnn(nn.Module):
    """h <- sin(frequency * (A h + B x)), written out step by step; the last state is read by `head`."""

    def __init__(self, frequency: float) -> None:
        super().__init__()
        self.cell = nn.Linear(32, 32, bias=False)
        self.into = nn.Linear(8, 32)
        self.head = nn.Linear(32, 10)
        self.frequency = frequency
        nn.init.orthogonal_(self.cell.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(x.shape[0], 32)
        for step in range(x.shape[1]):
            state = torch.sin(self.frequency * (self.cell(state) + self.into(x[:, step])))
        return self.head(state)


@fault("gradient", place={"module": ("cell", "into", "")}, fixable=False)
def sine_recurrence(planted: bool = True) -> Built:
    # The factor of a SIREN inside a recurrence of 24 steps: states within -1..1, gradients of about 1e8.
    x, y = rows(32)
    model = SineRnn(3.0 if planted else 1.0)
    return model, (x.repeat(1, 3, 1), y), cross_entropy, sgd(model, 0.05)


class Filter(nn.Module):
    """A linear state-space layer h <- A h + B x, written out, and a linear reader of its last state."""

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.cell = nn.Linear(32, 32, bias=False)
        self.into = nn.Linear(8, 32)
        self.head = nn.Linear(32, 1)
        nn.init.orthogonal_(self.cell.weight, gain=radius)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(x.shape[0], 32)
        for step in range(x.shape[1]):
            state = self.cell(state) + self.into(x[:, step])
        return self.head(state)


@fault("gradient", "weights", place={"module": ("cell", "into", "head", "")}, steps=2)
def long_linear_recurrence(planted: bool = True) -> Built:
    # A state-space layer of radius 1.05: harmless over the 8 steps it was tested on, not over 160.
    x, _ = rows()
    target = x.mean((1, 2)).unsqueeze(1)
    model = Filter(1.05)
    return model, (x.repeat(1, 20, 1) if planted else x, target), mse, sgd(model, 0.01)


# Operations.


class MeanOverTime(nn.Module):
    """Mean of the states before each sequence's end."""

    def forward(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        inside = torch.arange(states.shape[1])[None] < lengths[:, None]
        return (states * inside[..., None]).sum(1) / lengths[:, None]


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 32, batch_first=True)
        self.pool = MeanOverTime()
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.rnn(x)[0], lengths))


@fault("operation", place={"module": "pool", "op": DIV}, fixable=False)
def empty_sequence(planted: bool = True) -> Built:
    # A batch with a sequence of length 0: its mean state is 0 / 0.
    x, y = rows()
    lengths = 1 + torch.arange(len(x)) % 8
    if planted:
        lengths[9] = 0
    model = Pooled()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch["x"], batch["lengths"]), batch["y"])

    return model, {"x": x, "lengths": lengths, "y": y}, loss_fn, adam(model)


class Returns(nn.Module):
    """Logarithms of the ratios of successive values."""

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.floor
        return torch.log(x[:, 1:] / x[:, :-1])


class Market(nn.Module):
    def __init__(self, floor: float) -> None:
        super().__init__()
        self.returns = Returns(floor)
        self.reader = Reader(nn.LSTM(8, 32, batch_first=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reader(self.returns(x))


@fault("operation", place={"module": "returns", "op": (*DIV, "log")}, fixable=False)
def log_returns_of_zeros(planted: bool = True) -> Built:
    # log(x[t] / x[t - 1]) where prices are 0 on days without trade.
    x, y = rows()
    model = Market(0.0 if planted else 0.1)
    return model, (x, y), cross_entropy, adam(model)


class ExpGate(nn.Module):
    """Exponential input gates, normalised by their running sum, without the running maximum."""

    def __init__(self, stable: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 1)
        self.value = nn.Linear(8, 32)
        self.stable = stable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.gate(x).cumsum(1)
        if self.stable:
            gates = gates - gates.amax(1, keepdim=True)
        gates = torch.exp(gates)
        return (gates * self.value(x)).sum(1) / gates.sum(1)


class Gated(nn.Module):
    def __init__(self, stable: bool) -> None:
        super().__init__()
        self.mix = ExpGate(stable)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(x)))


@fault("operation", place={"module": "mix", "op": "exp"}, fixable=False)
def exponential_gate(planted: bool = True) -> Built:
    # exp of gates that add up over a long sequence (an xLSTM without its stabiliser).
    x, y = rows()
    model = Gated(not planted)
    nn.init.constant_(model.mix.gate.bias, 1.0)
    return model, (x.repeat(1, 16, 1), y), cross_entropy, adam(model)


# Precision.


@fault("precision", place={"module": "total", "op": ("cumsum", "sum")})
def half_running_total(planted: bool = True) -> Built:
    # A running total of counts in float16 passes 65504 before it is divided by the time.
    x, y = data.digits(32, raw=True)
    x = 40 * x.reshape(-1, 64, 1).repeat(1, 8, 1)

    class Total(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(1)

    class Averages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.total = Total()
            self.norm = nn.LayerNorm(8)
            self.head = nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.total(x)[:, 63::64, 0]))

    model = Averages()
    if planted:
        model.half()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        return F.cross_entropy(model(inputs.to(next(model.parameters()).dtype)).float(), target)

    return model, (x, y), loss_fn, sgd(model, 0.01)


# Learning rate.


@fault("learning rate", steps=6)
def lstm_adam_lr_1(planted: bool = True) -> Built:
    # lr=1.0 left over from a test with Adadelta.
    x, y = rows()
    model = Reader(nn.LSTM(8, 64, batch_first=True))
    return model, (x, y), cross_entropy, adam(model, 1.0 if planted else 3e-3)


# Loss.


@fault("loss", "target", place={"op": "ctc_loss"}, fixable=False)
def ctc_target_too_long(planted: bool = True) -> Built:
    # CTC loss is inf where a transcript is longer than the network's output (and zero_infinity is not set).
    x, y = rows(16)
    targets = torch.stack([y % 9 + 1] * 6, 1)
    targets[:, 1::2] = (targets[:, 1::2] + 1) % 9 + 1
    x = x if planted else x.repeat(1, 3, 1)

    class Transcriber(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(8, 32, batch_first=True)
            self.head = nn.Linear(32, 11)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x[:, ::2])[0]).log_softmax(-1)

    model = Transcriber()
    criterion = nn.CTCLoss()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, transcripts = batch
        logs = model(inputs).transpose(0, 1)
        count = logs.shape[1]
        return criterion(logs, transcripts, torch.full((count,), logs.shape[0]), torch.full((count,), 6))

    return model, (x, targets), loss_fn, adam(model)


@fault("loss", "operation", place={"op": "exp"}, fixable=False)
def perplexity_before_the_mean(planted: bool = True) -> Built:
    # The loss is the perplexity of whole sequences: exp of a sum over 64 tokens.
    x, _ = data.digits(64, raw=True)
    tokens = x.long()

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(17, 16)
            self.rnn = nn.GRU(16, 32, batch_first=True)
            self.head = nn.Linear(32, 17)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(self.embedding(x))[0])

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        losses = F.cross_entropy(model(inputs).transpose(1, 2), target, reduction="none")
        return torch.exp(losses.sum(1)).mean() if planted else torch.exp(losses.mean(1)).mean()

    model = Language()
    return model, (tokens[:, :-1], tokens[:, 1:]), loss_fn, adam(model)


# Uninitialised.


class LearntStart(Reader):
    """A reader whose first state is a parameter."""

    def __init__(self) -> None:
        super().__init__(nn.GRU(8, 32, batch_first=True))
        self.h0 = nn.Parameter(torch.empty(1, 1, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x, self.h0.expand(1, x.shape[0], 32).contiguous())[0][:, -1])


@fault("uninitialised", place={"parameter": "h0"})
def empty_first_state(planted: bool = True) -> Built:
    # nn.Parameter(torch.empty(...)) and no line that fills it: what the memory held before.
    x, y = rows()
    model = LearntStart()
    nn.init.zeros_(model.h0)
    if planted:
        with torch.no_grad():
            model.h0[0, 0, ::3] = torch.nan
            model.h0[0, 0, 1::3] = 1.1e37
    return model, (x, y), cross_entropy, adam(model)


# Several at once.


@fault("input", place={"feature": [6]}, several=True, steps=2)
def sensor_gaps_and_chaos(planted: bool = True) -> Built:
    # NaN in one channel, and a recurrent matrix of radius 3.
    x, y = rows()
    if planted:
        x[5, 2, 6] = torch.nan
    model = Reader(nn.RNN(8, 32, batch_first=True))
    nn.init.orthogonal_(model.rnn.weight_hh_l0, gain=3.0 if planted else 1.0)
    return model, (x, y), cross_entropy, adam(model)
