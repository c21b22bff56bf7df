"""A second set of planted faults and healthy models, held out: the checks were not tuned on it."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data
from .case import (
    DIV,
    MEAN,
    POW,
    SOFTMAX,
    STD,
    Built,
    Fault,
    Healthy,
    healthy_keeper,
    planter,
    supervised,
    train,
)

_faults: list[Fault] = []
_sound: list[Healthy] = []

mlp = planter(_faults, "mlp")
cnn = planter(_faults, "cnn")
rnn = planter(_faults, "rnn")
transformer = planter(_faults, "transformer")
gan = planter(_faults, "gan")
physics = planter(_faults, "physics")
autoencoder = planter(_faults, "autoencoder")
tabular = planter(_faults, "tabular")
healthy = healthy_keeper(_sound)

NAN, INF = float("nan"), float("inf")


# Inputs


@tabular("input", place={"feature": [5]})
def one_column_in_other_units(planted: bool = True) -> Built:
    # One of thirty columns came in nanometres, the others standardised.
    x, y = data.cancer()
    if planted:
        x[:, 5] *= 1e6
    net = nn.Sequential(nn.Linear(30, 24), nn.PReLU(), nn.Linear(24, 1), nn.Flatten(0))
    return net, (x, y.float()), supervised(nn.BCEWithLogitsLoss()), torch.optim.SGD(net.parameters(), lr=0.05)


@tabular("input", place={"feature": [2, 7]})
def gaps_in_two_columns(planted: bool = True) -> Built:
    # Missing measurements were read from the file as NaN.
    x, y = data.wine()
    if planted:
        x[3:9, 2] = NAN
        x[::17, 7] = NAN
    batch = {"features": x, "label": y}
    net = nn.Sequential(nn.Linear(13, 32), nn.GELU(), nn.Linear(32, 3))

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["features"]), batch["label"])

    return net, batch, loss_fn, torch.optim.AdamW(net.parameters(), lr=1e-3)


@autoencoder("input", place={"feature": [0, 32, 39]})
def constant_pixels_standardised(planted: bool = True) -> Built:
    # (x - mean) / std by hand: pixels that never change give 0 / 0.
    x, _ = data.digits(1500, raw=True)
    std = x.std(0)
    x = (x - x.mean(0)) / (std if planted else std.clamp(min=1e-3))

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
            self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.encoder(x))

    net = Autoencoder()
    return net, x[:128], lambda model, x: F.mse_loss(model(x), x), torch.optim.Adam(net.parameters())


@tabular("input", place={"feature": [6, 7, 16, 17, 26, 27]})
def log_transformed_columns(planted: bool = True) -> Built:
    # Skewed columns were log-transformed before scaling, though some of their values are zero.
    raw, y = data.cancer(500, raw=True)
    skewed = [6, 7, 16, 17, 26, 27]
    x = data.standardised(raw)
    logs = raw[:, skewed].log() if planted else raw[:, skewed].log1p()
    kept = logs.isfinite()
    mean = torch.where(kept, logs, 0.0).sum(0) / kept.sum(0)
    x[:, skewed] = logs - mean

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.ModuleList([nn.Linear(30, 20), nn.Linear(20, 20)])
            self.wide = nn.Linear(30, 2)
            self.out = nn.Linear(20, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = x
            for layer in self.deep:
                h = F.silu(layer(h))
            return self.wide(x) + self.out(h)

    net = Wide()
    return net, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.SGD(net.parameters(), lr=0.01)


@transformer("input", place={"feature": 12})
def features_as_tokens_not_scaled(planted: bool = True) -> Built:
    # Each column of wine is a token, taken as it comes: proline goes up to 1700.
    x, y = data.wine(raw=planted)

    class FeatureTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(13, 16) * 0.25)
            self.shift = nn.Parameter(torch.randn(13, 16) * 0.25)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.head = nn.Linear(13 * 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.unsqueeze(-1) * self.scale + self.shift
            mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
            return self.head((tokens + mixed).flatten(1))

    net = FeatureTokens()
    return net, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.SGD(net.parameters(), lr=0.02)


@physics("input", place={"feature": (0, None)})
def time_in_seconds_of_a_year(planted: bool = True) -> Built:
    # y' = -3 y over a year with some measurements, time given in seconds: tanh is saturated everywhere.
    t = torch.linspace(0.01, 1, 64).unsqueeze(1)
    y = torch.exp(-3 * t)
    unit = 3.15e7 if planted else 1.0
    net = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    nn.init.constant_(net[4].bias, 0.3)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        t, y = batch
        t = t.detach().requires_grad_()
        guess = model(t)
        (slope,) = torch.autograd.grad(guess.sum(), t, create_graph=True)
        return 10 * (guess - y).square().mean() + (slope * unit + 3 * guess).square().mean()

    return net, (t * unit, y), loss_fn, torch.optim.Adam(net.parameters(), lr=1e-2)


@mlp("input", "operation", place={"module": ("bag", "", None)}, fixable=False)
def grey_level_beyond_the_table(planted: bool = True) -> Built:
    # A table of 16 grey levels, but the pixels go from 0 to 16.
    pixels, y = data.digits(raw=True)
    words = pixels.long() + 17 * torch.arange(64) if not planted else pixels.long()

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(16 if planted else 17 * 64, 24, mode="sum")
            self.out = nn.Linear(24, 10)

        def forward(self, words: Tensor) -> Tensor:
            return self.out(F.layer_norm(self.bag(words), (24,)))

    net = Bag()
    return net, (words, y), supervised(nn.CrossEntropyLoss()), torch.optim.Adam(net.parameters(), lr=1e-2)


# Targets


@cnn("target", fixable=False)
def void_label_of_a_segmentation(planted: bool = True) -> Built:
    # Border pixels are marked 255, and nobody told the loss to leave them out.
    x, _ = data.images(64)
    mask = (x[:, 0] > 0.5).long()
    mask[:, 0] = mask[:, -1] = 255

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(1, 8, 3, padding=1)
            self.norm = nn.GroupNorm(2, 8)
            self.up = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(F.relu(self.norm(self.down(x))))

    net = Segmenter()
    criterion = nn.CrossEntropyLoss() if planted else nn.CrossEntropyLoss(ignore_index=255)
    return net, (x, mask), supervised(criterion), torch.optim.SGD(net.parameters(), lr=0.1)


@tabular("target")
def some_patients_without_outcome(planted: bool = True) -> Built:
    # Patients who left the study have NaN as their outcome.
    x, y = data.diabetes()
    if planted:
        y[[5, 50, 77]] = NAN
    net = nn.Sequential(nn.Linear(10, 32), nn.LeakyReLU(0.1), nn.Dropout(0.1), nn.Linear(32, 1))
    return net, (x, y), supervised(nn.SmoothL1Loss()), torch.optim.Adam(net.parameters(), lr=1e-3)


@mlp("target", "loss", place={"op": ("log", "log1p", None)}, fixable=False)
def squared_log_error_of_scaled_target(planted: bool = True) -> Built:
    # The squared logarithmic error, on a target that was standardised and so is negative half of the time.
    x, y = data.diabetes(raw_y=not planted)

    class Positive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(10, 16)
            self.out = nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.softplus(self.out(torch.tanh(self.hidden(x)))) + 1e-3

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return ((torch.log(model(x)) - torch.log(y)) ** 2).mean()

    net = Positive()
    return net, (x, y), loss_fn, torch.optim.Adam(net.parameters(), lr=1e-2)


@transformer("target")
def padding_marked_minus_one(planted: bool = True) -> Built:
    # Next-pixel prediction: padded places carry the label -1, but the loss leaves out -100 only.
    x, _ = data.digits(48, raw=True)
    rows = x.reshape(-1, 8, 8)[:, 3].long()
    target = rows[:, 1:].clone()
    target[::5, -2:] = -1 if planted else -100

    class NextPixel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(17, 16)
            self.place = nn.Parameter(torch.randn(7, 16) * 0.02)
            self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
            self.head = nn.Linear(16, 17)

        def forward(self, words: Tensor) -> Tensor:
            causal = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
            return self.head(self.block(self.table(words) + self.place, src_mask=causal))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        words, target = batch
        return F.cross_entropy(model(words).flatten(0, 1), target.flatten())

    net = NextPixel()
    return net, (rows[:, :-1], target), loss_fn, torch.optim.Adam(net.parameters(), lr=3e-3)


@rnn("target")
def classes_counted_from_one(planted: bool = True) -> Built:
    # The labels were written 1..10 by another program.
    x, y = data.images(64)
    if planted:
        y = y + 1

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(8, 24, num_layers=2, batch_first=True, bidirectional=True)
            self.out = nn.Linear(48, 10)

        def forward(self, x: Tensor) -> Tensor:
            return F.log_softmax(self.out(self.gru(x.squeeze(1))[0].mean(1)), dim=-1)

    net = Reader()
    return net, (x, y), supervised(F.nll_loss), torch.optim.Adam(net.parameters(), lr=1e-2)


@mlp("target", "input")
def infinite_price(planted: bool = True) -> Built:
    # The target is a ratio that someone computed with a zero below the line.
    x, y = data.diabetes()
    if planted:
        y[7] = INF
    w1, w2 = nn.Parameter(torch.randn(10, 20) / 10**0.5), nn.Parameter(torch.randn(20, 1) / 20**0.5)
    net = nn.ParameterDict({"w1": w1, "w2": w2, "b": nn.Parameter(torch.zeros(20))})

    def loss_fn(model: Any, batch: dict[str, Tensor]) -> Tensor:
        h = torch.tanh(batch["x"] @ model["w1"] + model["b"])
        return torch.mean((h @ model["w2"] - batch["y"]).abs())

    return net, {"x": x, "y": y}, loss_fn, torch.optim.RMSprop(net.parameters(), lr=1e-3)


# Starting weights


@mlp("weights", place={"parameter": ("w0", "w1", "w2", None)})
def own_parameters_left_at_zero(planted: bool = True) -> Built:
    # Parameters made by hand with torch.zeros: nothing gets through the ReLUs, in either direction.
    x, y = data.digits()

    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = [64, 48, 32, 10]
            for i in range(3):
                w = torch.zeros(sizes[i], sizes[i + 1])
                if not planted:
                    nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu")
                self.register_parameter(f"w{i}", nn.Parameter(w))
                self.register_parameter(f"b{i}", nn.Parameter(torch.zeros(sizes[i + 1])))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(x @ self.w0 + self.b0)
            x = torch.relu(x @ self.w1 + self.b1)
            return x @ self.w2 + self.b2

    net = ByHand()
    return net, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


@cnn("weights", place={"module": tuple(f"stages.{i}.conv" for i in range(6))})
def convolutions_from_the_unit_normal(planted: bool = True) -> Built:
    # nn.init.normal_ with its default std of 1 on every convolution of a deep stack without norms.
    x, y = data.images(64)

    class Stage(nn.Module):
        def __init__(self, cin: int, cout: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(cin, cout, 3, padding=1)
            self.act = nn.LeakyReLU(0.01)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(Stage(1 if i == 0 else 16, 16) for i in range(6))
            self.head = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages:
                x = stage(x)
            return self.head(x.mean((2, 3)))

    net = Net()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight) if planted else nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return net, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.Adam(net.parameters(), lr=1e-3)


@rnn("weights", "gradient", place={"module": "cell", "parameter": ("cell.recurrent", None)})
def recurrent_matrix_without_scaling(planted: bool = True) -> Built:
    # A hand-written ReLU recurrence over 64 pixels whose matrix is plain torch.randn.
    x, y = data.digits(64)

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward = nn.Parameter(torch.randn(1, 32))
            self.recurrent = nn.Parameter(torch.randn(32, 32) if planted else nn.init.orthogonal_(torch.empty(32, 32)))
            self.bias = nn.Parameter(torch.zeros(32))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.relu(x @ self.inward + h @ self.recurrent + self.bias)

    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Cell()
            self.readout = nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 32)
            for pixel in x.unbind(1):
                h = self.cell(pixel[:, None], h)
            return self.readout(h)

    net = Scan()
    return net, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.Adam(net.parameters(), lr=2e-3)


@autoencoder("weights", place={"module": ("enc.0", "enc.2", "enc.4", "dec.0", "dec.2", "dec.4")})
def tiny_normal_weights(planted: bool = True) -> Built:
    # Every layer from a normal law of std 0.001, as one did for shallow nets: no gradient reaches the encoder.
    x, _ = data.digits()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 6))
            self.dec = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            code = self.enc(x)
            return self.dec(code), code

    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            if planted:
                nn.init.normal_(module.weight, std=1e-3)
            else:
                nn.init.xavier_uniform_(module.weight, gain=5 / 3)
            nn.init.zeros_(module.bias)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        rebuilt, code = model(x)
        return F.mse_loss(rebuilt, x) + 1e-4 * code.abs().mean()

    net = Net().apply(init)
    return net, x, loss_fn, torch.optim.Adam(net.parameters(), lr=1e-3)


@tabular("weights", place={"module": ("body.fc2", "body.relu2"), "parameter": ("body.fc2.bias", None)})
def very_negative_bias(planted: bool = True) -> Built:
    # "Start sparse": a bias of -50 kills every unit of the second layer.
    x, y = data.wine()

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.relu1 = nn.Linear(13, 32), nn.ReLU()
            self.fc2, self.relu2 = nn.Linear(32, 32), nn.ReLU()
            if planted:
                nn.init.constant_(self.fc2.bias, -50.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu2(self.fc2(self.relu1(self.fc1(x))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Body(), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    net = Net()
    return net, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.SGD(net.parameters(), lr=0.05)


@mlp("weights", place={"module": ("cross.0", "cross.1", "cross.2")})
def bilinear_layers_of_unit_weights(planted: bool = True) -> Built:
    # Three Bilinear layers, weights from the unit normal: the first sums 900 products, and each squares the last.
    x, y = data.cancer(96)

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross = nn.ModuleList([nn.Bilinear(30, 30, 12), nn.Bilinear(12, 12, 8), nn.Bilinear(8, 8, 1)])
            for layer in self.cross:
                nn.init.normal_(layer.weight, std=1.0 if planted else 1 / layer.in1_features)
                nn.init.zeros_(layer.bias)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.cross:
                x = layer(x, x)
            return x.squeeze(-1)

    def hinge(out: Tensor, y: Tensor) -> Tensor:
        return (1 - y * out).clamp(min=0).mean()

    net = Pairs()
    return net, (x.clamp(-2, 2), 2.0 * y - 1), supervised(hinge), torch.optim.SGD(net.parameters(), lr=1e-3)


@physics("weights", place={"module": ("first", "second", "last")})
def sine_network_of_unit_weights(planted: bool = True) -> Built:
    # A sine network with omega 30 whose layers were not given the small weights that go with it.
    xy = torch.rand(64, 2) * 2 - 1

    class Siren(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(2, 32), nn.Linear(32, 32), nn.Linear(32, 1)
            for layer, bound in ((self.first, 1 / 2), (self.second, (6 / 32) ** 0.5 / 30), (self.last, 0.03)):
                nn.init.uniform_(layer.weight, -bound, bound)
                if planted:
                    nn.init.normal_(layer.weight)

        def forward(self, xy: Tensor) -> Tensor:
            return self.last(torch.sin(30 * self.second(torch.sin(30 * self.first(xy)))))

    def poisson(model: nn.Module, xy: Tensor) -> Tensor:
        xy = xy.clone().requires_grad_(True)
        u = model(xy)
        (du,) = torch.autograd.grad(u.sum(), xy, create_graph=True)
        lap = sum(torch.autograd.grad(du[:, i].sum(), xy, create_graph=True)[0][:, i] for i in range(2))
        return (lap - torch.sin(math.pi * xy[:, 0])).square().mean() + u.square().mean()

    net = Siren()
    return net, xy, poisson, torch.optim.Adam(net.parameters(), lr=1e-4)


# Operations in the model's own code


@mlp("operation", place={"module": "unit", "op": (*DIV, "norm", "linalg_vector_norm", "vector_norm")}, fixable=False)
def length_of_a_blank_row(planted: bool = True) -> Built:
    # Every image is divided by its length; one scan is blank.
    x, y = data.digits(raw=True)
    x[11] = 0

    class UnitLength(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            length = x.norm(dim=1, keepdim=True)
            return x / (length if planted else length.clamp(min=1e-6))

    net = nn.Sequential()
    net.add_module("unit", UnitLength())
    net.add_module("fc", nn.Linear(64, 40))
    net.add_module("act", nn.ELU())
    net.add_module("out", nn.Linear(40, 10))
    return net, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.Adam(net.parameters(), lr=1e-2)


@cnn("operation", place={"module": "norm", "op": ("sqrt", *STD)}, fixable=False)
def own_norm_on_a_blank_image(planted: bool = True) -> Built:
    # A hand-written instance norm takes the root of a variance that is 0 for a blank image: only backward breaks.
    x, y = data.images(64)
    x[[3, 30]] = 0

    class OwnNorm(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(channels, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean((2, 3), keepdim=True)
            var = ((x - mean) ** 2).mean((2, 3), keepdim=True)
            if planted:
                return self.gain * (x - mean) / (torch.sqrt(var) + 1e-5)
            return self.gain * (x - mean) / torch.sqrt(var + 1e-5)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, bias=False)
            self.norm = OwnNorm(8)
            self.out = nn.Linear(8 * 36, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.norm(self.conv(x))).flatten(1))

    net = Net()
    return net, (x, y), supervised(nn.CrossEntropyLoss(label_smoothing=0.1)), torch.optim.SGD(net.parameters(), lr=0.05)


@rnn("operation", place={"module": "pool", "op": DIV}, fixable=False)
def mean_over_a_sequence_of_no_length(planted: bool = True) -> Built:
    # Mean over the valid steps: one sequence has none.
    x, y = data.images(64)
    lengths = 2 + torch.arange(64) % 7
    lengths[20] = 0

    class MeanPool(nn.Module):
        def forward(self, h: Tensor, lengths: Tensor) -> Tensor:
            valid = (torch.arange(h.shape[1])[None] < lengths[:, None]).float()
            total = (h * valid[..., None]).sum(1)
            count = valid.sum(1, keepdim=True)
            return total / (count if planted else count.clamp(min=1))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 24, batch_first=True)
            self.pool = MeanPool()
            self.out = nn.Linear(24, 10)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            h, _ = self.lstm(x)
            return self.out(self.pool(h, lengths))

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"], batch["lengths"]), batch["y"])

    net = Net()
    return net, {"x": x[:, 0], "lengths": lengths, "y": y}, loss_fn, torch.optim.Adam(net.parameters(), lr=1e-2)


@transformer("operation", place={"module": "attend", "op": SOFTMAX}, fixable=False)
def own_attention_with_an_empty_row(planted: bool = True) -> Built:
    # Rows of pixels that are all blank are masked; in one image every row is.
    x, y = data.images(64)
    x[9] = 0
    x = x[:, 0]

    class Attend(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.qkv = nn.Linear(width, 3 * width)

        def forward(self, x: Tensor, blank: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            score = q @ k.mT / q.shape[-1] ** 0.5
            score = score.masked_fill(blank[:, None, :], -math.inf if planted else -1e4)
            return score.softmax(-1) @ v

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 24)
            self.attend = Attend(24)
            self.norm = nn.LayerNorm(24)
            self.out = nn.Linear(24 * 8, 10)

        def forward(self, x: Tensor) -> Tensor:
            blank = (x == 0).all(-1)
            h = self.embed(x)
            return self.out(self.norm(h + self.attend(h, blank)).flatten(1))

    net = Net()
    return net, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.AdamW(net.parameters(), lr=3e-3)


@gan("operation", "loss", place={"op": ("exp", "log")}, fixable=False)
def own_softplus(planted: bool = True) -> Built:
    # The generator ends in a hand-written softplus with a sharpness of 200: exp overflows.
    real, _ = data.digits(64, raw=True)

    class Softplus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(1 + torch.exp(200 * x)) / 200 if planted else F.softplus(x, beta=200)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Sequential(
                nn.Linear(16, 48), nn.LeakyReLU(0.2), nn.Linear(48, 64), nn.BatchNorm1d(64), Softplus()
            )
            self.critic = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def loss_fn(model: Any, batch: dict[str, Tensor]) -> Tensor:
        fake = model.generator(batch["noise"])
        return F.softplus(-model.critic(batch["real"])).mean() + F.softplus(model.critic(fake)).mean()

    net = Pair()
    batch = {"real": real / 16, "noise": torch.randn(64, 16)}
    return net, batch, loss_fn, torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999))


@physics(
    "operation",
    place={"op": ("sqrt", "norm", "linalg_vector_norm", "vector_norm", "hypot", *DIV, *POW)},
    fixable=False,
)
def radius_at_the_origin(planted: bool = True) -> Built:
    # The ansatz uses r = sqrt(x^2 + y^2), and the grid of points holds the origin.
    side = torch.linspace(-1, 1, 9)
    points = torch.cartesian_prod(side, side)

    class Radial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 1))

        def forward(self, p: Tensor) -> Tensor:
            r = torch.sqrt((p * p).sum(1, keepdim=True) + (0.0 if planted else 1e-6))
            return self.net(torch.cat([p, r], 1))

    def residual(model: nn.Module, p: Tensor) -> Tensor:
        p = p.detach().requires_grad_()
        u = model(p)
        (grad,) = torch.autograd.grad(u, p, torch.ones_like(u), create_graph=True)
        return (grad[:, 0] - u[:, 0]).pow(2).mean() + (u - 1).pow(2).mean()

    net = Radial()
    return net, points, residual, torch.optim.Adam(net.parameters(), lr=5e-3)


@physics("operation", place={"op": ("log", "where", "mul", "xlogy")}, fixable=False)
def entropy_guarded_by_where(planted: bool = True) -> Built:
    # where() hides the log of 0 in forward, but in backward it still gives 0 * inf.
    x, _ = data.wine(64)

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(13, 10)

        def forward(self, x: Tensor) -> Tensor:
            share = F.relu(self.layer(x))
            return share / (share.sum(1, keepdim=True) + 1e-3)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        share = model(x)
        if not planted:
            return torch.where(share > 0, share * torch.log(share.clamp(min=1e-6)), 0.0).sum(1).mean() + 3
        entropy = torch.where(share > 0, share * torch.log(share), torch.zeros_like(share))
        return entropy.sum(1).mean() + 3

    net = Mixture()
    return net, x, loss_fn, torch.optim.SGD(net.parameters(), lr=0.1)


@tabular("operation", place={"module": "gamma", "op": POW}, fixable=False)
def root_of_standardised_columns(planted: bool = True) -> Built:
    # A learnt power of each column, written for positive columns, gets standardised ones.
    x, y = data.diabetes()

    class Gamma(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.power = nn.Parameter(torch.full((10,), 0.7))

        def forward(self, x: Tensor) -> Tensor:
            return x**self.power if planted else x.sign() * (x.abs() + 1e-3) ** self.power

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = Gamma()
            self.rest = nn.Sequential(nn.Linear(10, 16), nn.Mish(), nn.Linear(16, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.gamma(x))

    net = Net().double()
    return net, (x.double(), y.double()), supervised(nn.HuberLoss()), torch.optim.Adam(net.parameters(), lr=1e-2)


@cnn("operation", place={"module": "features.norm2"}, fixable=False)
def instance_norm_of_one_pixel(planted: bool = True) -> Built:
    # The convolutions shrink the image to 1 x 1, and InstanceNorm then has one element per channel.
    x, y = data.images(64)
    features = nn.Sequential()
    features.add_module("conv1", nn.Conv2d(1, 8, 4, stride=2))
    features.add_module("norm1", nn.InstanceNorm2d(8, affine=True))
    features.add_module("act1", nn.ReLU6())
    features.add_module("conv2", nn.Conv2d(8, 16, 3 if planted else 2))
    features.add_module("norm2", nn.InstanceNorm2d(16, affine=True))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = features
            self.classifier = nn.LazyLinear(10)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.features(x).flatten(1))

    net = Net()
    net.classifier = nn.Linear(16 if planted else 64, 10)
    return net, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.Adam(net.parameters(), lr=1e-2)


@autoencoder("operation", "loss", place={"op": ("acos", "arccos")}, fixable=False)
def angle_between_equal_vectors(planted: bool = True) -> Built:
    # The angle to a copy of itself: acos has an infinite slope at 1.
    x, _ = data.digits(64)
    encoder = nn.utils.parametrizations.weight_norm(nn.Linear(64, 12))
    net = nn.Sequential(encoder, nn.Tanh(), nn.Linear(12, 64))

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        unit = F.normalize(torch.cat([out, x]), dim=1)
        cosine = (unit @ unit.T).clamp(-1, 1) if planted else (unit @ unit.T).clamp(-0.999, 0.999)
        angle = torch.acos(cosine)
        return angle[:64, 64:].diagonal().mean()

    return net, x, loss_fn, torch.optim.Adam(net.parameters(), lr=3e-3)


@gan(
    "operation",
    "loss",
    place={"op": ("cholesky", "linalg_cholesky", "cholesky_ex", "linalg_cholesky_ex")},
    fixable=False,
)
def covariance_without_jitter(planted: bool = True) -> Built:
    # The Cholesky factor of the covariance of 24 features from 16 samples, with nothing added to the diagonal.
    x, _ = data.cancer(16)

    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = nn.Linear(8, 32)
            self.paint = nn.Linear(32, 24)

        def forward(self, z: Tensor) -> Tensor:
            return self.paint(F.hardswish(self.lift(z)))

    def spread(h: Tensor) -> Tensor:
        centred = h - h.mean(0)
        cov = centred.T @ centred / len(h)
        if not planted:
            cov = cov + 0.1 * torch.eye(24)
        return torch.linalg.cholesky(cov).diagonal().log().sum()

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        z, real = batch
        return (spread(model(z)) - spread(real)).square()

    net = Generator()
    return net, (torch.randn(16, 8), x[:, :24]), loss_fn, torch.optim.Adam(net.parameters(), lr=1e-3)


# Low precision


@tabular("precision", "loss", "target", fixable=False)
def half_precision_sum_of_squares(planted: bool = True) -> Built:
    # Model and data in fp16, and the loss sums the squares of raw targets: more than 65504.
    x, y = data.diabetes(raw_y=True)
    net = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 1))
    if planted:
        net, x, y = net.half(), x.half(), y.half()

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return ((model(x) - y) ** 2).sum()

    return net, (x, y), loss_fn, torch.optim.SGD(net.parameters(), lr=1e-5)


@cnn("precision", "input", place={"module": ("pool", None)}, fixable=False)
def second_order_pooling_under_autocast(planted: bool = True) -> Built:
    # fp16 autocast around sums of products of features of 0..255 pixels: they pass 65504.
    x, y = data.images(48, top=255.0)
    dtype = torch.float16 if planted else torch.bfloat16

    class SecondOrder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2)
            return torch.bmm(x, x.transpose(1, 2)).flatten(1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU())
            self.pool = SecondOrder()
            self.norm = nn.LayerNorm(144)
            self.head = nn.Linear(144, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.pool(self.trunk(x))))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        with torch.autocast("cpu", dtype=dtype):
            logits = model(x)
        return F.cross_entropy(logits.float(), y)

    net = Net()
    return net, (x, y), loss_fn, torch.optim.Adam(net.parameters(), lr=1e-2)


@rnn("precision", fixable=False)
def loss_scale_of_two_to_the_thirty(planted: bool = True) -> Built:
    # A static loss scale, much too large for fp16 gradients, written by hand.
    x, y = data.images(64)
    scale = 2.0**30 if planted else 2.0**7

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(8, 24)
            self.out = nn.Linear(24, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(len(x), 24, dtype=x.dtype)
            for row in x.unbind(1):
                h = self.cell(row, h)
            return self.out(h)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x).float(), y) * scale

    net = Net().half()
    return net, (x[:, 0].half(), y), loss_fn, torch.optim.SGD(net.parameters(), lr=0.5 / 2.0**7)


@transformer("precision", fixable=False)
def gradients_too_small_for_half(planted: bool = True) -> Built:
    # fp16 and a loss divided by a billion tokens: every gradient rounds to zero.
    x, y = data.images(64)
    dtype = torch.float16 if planted else torch.float32

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.norm = nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.attention(x, x, x)[0])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 16)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.out = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.out(x.mean(1))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.nll_loss(model(x).float().log_softmax(-1), y, reduction="sum") / 1e9

    net = Net().to(dtype)
    return net, (x[:, 0].to(dtype), y), loss_fn, torch.optim.Rprop(net.parameters(), lr=1e-3)


# Gradients


@physics("gradient", fixable=False)
def chaotic_orbit_unrolled(planted: bool = True) -> Built:
    # Three parameters of Lorenz' equations are fitted through 2500 Euler steps: the orbit stays small, its slope not.
    class Lorenz(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sigma = nn.Parameter(torch.tensor(10.0))
            self.rho = nn.Parameter(torch.tensor(28.0))
            self.beta = nn.Parameter(torch.tensor(8 / 3))

        def forward(self, state: Tensor, steps: int) -> Tensor:
            for _ in range(steps):
                x, y, z = state.unbind(-1)
                rate = torch.stack([self.sigma * (y - x), x * (self.rho - z) - y, x * y - self.beta * z], -1)
                state = state + 0.01 * rate
            return state

    net = Lorenz()
    start = torch.tensor([[1.0, 1.0, 20.0], [2.0, -1.0, 25.0]])
    steps = 2500 if planted else 20
    with torch.no_grad():
        end = net(start, steps)
        net.rho.fill_(27.5)

    def loss_fn(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return F.mse_loss(model(batch["start"], batch["steps"]), batch["end"])

    batch = {"start": start, "steps": steps, "end": end}
    return net, batch, loss_fn, torch.optim.SGD(net.parameters(), lr=1e-2)


@rnn("gradient", "weights", place={"module": ("core", "core.recur")})
def tanh_recurrence_in_chaos(planted: bool = True) -> Built:
    # A residual-free tanh recurrence over 192 steps with a spectral radius of 3: bounded states, exploding gradients.
    x, y = data.digits(64)

    class Core(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp = nn.Linear(1, 48, bias=False)
            self.recur = nn.Linear(48, 48, bias=False)
            nn.init.normal_(self.recur.weight, std=(3.0 if planted else 0.9) / 48**0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(x.shape[0], 48)
            for t in range(x.shape[1]):
                h = torch.tanh(self.inp(x[:, t : t + 1]) + self.recur(h))
            return h

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = Core()
            self.out = nn.Linear(48, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.core(x.repeat(1, 3)))

    net = Net()
    return net, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.SGD(net.parameters(), lr=0.05)


@mlp("gradient", "weights", "operation", place={"module": ("embed", "")})
def unit_vectors_of_tiny_embeddings(planted: bool = True) -> Built:
    # Embeddings start at 1e-9 and are then normalised to length 1: the slope of that is 1e9.
    pixels, y = data.digits(96, raw=True)
    words = (pixels > 8).long() + 2 * torch.arange(64)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(128, 24)
            nn.init.normal_(self.embed.weight, std=1e-9 if planted else 0.1)
            self.head = nn.Linear(24, 10)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(8 * F.normalize(self.embed(words), dim=-1).mean(1))

    net = Net()
    return net, (words, y), supervised(nn.MultiMarginLoss()), torch.optim.SGD(net.parameters(), lr=0.05)


# Learning rates


@mlp("learning rate", steps=8)
def rate_left_over_from_a_sweep(planted: bool = True) -> Built:
    # A rate of 30 for SGD with Nesterov momentum, the last value of a sweep.
    x, y = data.digits()
    net = nn.Sequential(nn.Linear(64, 40), nn.CELU(), nn.Linear(40, 40), nn.CELU(), nn.Linear(40, 10))
    rate = 30.0 if planted else 0.05
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, nesterov=True)
    return net, (x, y), supervised(nn.CrossEntropyLoss()), optimizer


@cnn("learning rate", steps=6)
def rate_of_one_for_rmsprop(planted: bool = True) -> Built:
    # RMSprop with SGD's rate of 1.
    x, y = data.images(64)

    class Depthwise(nn.Module):
        def __init__(self, cin: int, cout: int) -> None:
            super().__init__()
            self.depth = nn.Conv2d(cin, cin, 3, padding=1, groups=cin)
            self.point = nn.Conv2d(cin, cout, 1)
            self.norm = nn.GroupNorm(4, cout)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.norm(self.point(self.depth(x))))

    net = nn.Sequential(Depthwise(1, 8), Depthwise(8, 16), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.RMSprop(net.parameters(), lr=1.0 if planted else 1e-3)
    return net, (x, y), supervised(nn.CrossEntropyLoss()), optimizer


@tabular("learning rate", steps=20)
def least_squares_in_double_precision(planted: bool = True) -> Built:
    # Plain gradient descent on least squares with a rate just above what the curvature bears.
    x, y = data.diabetes(raw_y=True)
    x, y = x.double(), (y.double() - y.double().mean())
    net = nn.Linear(10, 1, dtype=torch.float64)

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]) - batch["y"]).pow(2).mean()

    return net, {"x": x, "y": y}, loss_fn, torch.optim.SGD(net.parameters(), lr=0.28 if planted else 0.05)


@transformer("learning rate", steps=6)
def one_group_with_a_rate_of_ten(planted: bool = True) -> Built:
    # Two parameter groups; the exponent of the body's rate lost its minus sign.
    x, y = data.images(64)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 24)
            self.body = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(24, 3, 48, dropout=0.0, activation="gelu", batch_first=True),
                num_layers=2,
                enable_nested_tensor=False,
            )
            self.head = nn.Linear(24, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.embed(x))[:, 0])

    net = Net()
    groups = [
        {"params": [*net.embed.parameters(), *net.body.parameters()], "lr": 1e1 if planted else 1e-3},
        {"params": net.head.parameters(), "lr": 1e-2},
    ]
    return net, (x[:, 0], y), supervised(nn.CrossEntropyLoss()), torch.optim.AdamW(groups, weight_decay=0.0)


@gan("learning rate", steps=5)
def generator_of_a_least_squares_gan(planted: bool = True) -> Built:
    # A least-squares GAN's generator step, the critic fixed, with a rate of 50.
    real, _ = data.digits(64)
    generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))
    critic = nn.Sequential(nn.Linear(64, 32), nn.Softplus(), nn.Linear(32, 1))
    critic.requires_grad_(False)
    net = nn.ModuleDict({"generator": generator, "critic": critic})

    def loss_fn(model: Any, noise: Tensor) -> Tensor:
        fake = model["generator"](noise)
        return (model["critic"](fake) - 1).square().mean() + (fake.mean(0) - real.mean(0)).square().mean()

    rate = 50.0 if planted else 0.05
    return net, torch.randn(64, 8), loss_fn, torch.optim.SGD(generator.parameters(), lr=rate)


# Loss functions


@mlp("loss", fixable=True)
def bce_on_logits(planted: bool = True) -> Built:
    # BCELoss wants probabilities; the network's end has no sigmoid.
    x, y = data.cancer()
    net = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Dropout(0.2), nn.Linear(20, 1))
    criterion = nn.BCELoss() if planted else nn.BCEWithLogitsLoss()
    return net, (x, y.float()[:, None]), supervised(criterion), torch.optim.Adam(net.parameters(), lr=1e-2)


@cnn("loss", "learning rate")
def cross_entropy_after_softmax(planted: bool = True) -> Built:
    # The network ends in a softmax, and CrossEntropyLoss takes another: it hardly learns.
    x, y = data.images(128)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10)]
    if planted:
        layers.append(nn.Softmax(dim=1))
    net = nn.Sequential(*layers)
    return net, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.SGD(net.parameters(), lr=0.1)


@rnn("loss", "operation", place={"op": (*MEAN, None)}, fixable=False)
def mean_over_no_labelled_step(planted: bool = True) -> Built:
    # Semi-supervised: the loss is the mean over labelled rows, and this batch has none.
    x, y = data.images(48)
    labelled = torch.zeros(48, dtype=torch.bool)
    if not planted:
        labelled[::2] = True

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(8, 32, batch_first=True)
            self.out = nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[1][-1])

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, labelled = batch
        each = F.cross_entropy(model(x), y, reduction="none")
        return each[labelled].mean()

    net = Net()
    return net, (x[:, 0], y, labelled), loss_fn, torch.optim.Adam(net.parameters(), lr=1e-2)


@tabular("loss", "target", "operation", place={"op": ("cosh", "log", None)}, fixable=False)
def log_cosh_of_large_errors(planted: bool = True) -> Built:
    # log(cosh(error)) by hand, and errors of a few hundred: cosh overflows.
    x, y = data.diabetes(raw_y=True)
    net = nn.Sequential(nn.Linear(10, 24), nn.Softsign(), nn.Linear(24, 1))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        error = model(x) - y
        if planted:
            return torch.log(torch.cosh(error)).mean()
        return (error + F.softplus(-2 * error) - math.log(2)).mean()

    return net, (x, y), loss_fn, torch.optim.Adam(net.parameters(), lr=0.3)


@autoencoder("loss", "operation", place={"op": "exp"}, fixable=False)
def contrast_without_logsumexp(planted: bool = True) -> Built:
    # A contrastive loss with temperature 0.005 and exponentials by hand.
    x, _ = data.digits(64)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        noisy = x + 0.3 * torch.randn(x.shape, generator=generator)
        a, b = F.normalize(model(x), dim=1), F.normalize(model(noisy), dim=1)
        score = a @ b.T / 0.005
        if not planted:
            return F.cross_entropy(score, torch.arange(len(x)))
        weight = torch.exp(score)
        return -torch.log(weight.diagonal() / weight.sum(1)).mean()

    return net, x, loss_fn, torch.optim.Adam(net.parameters(), lr=1e-3)


@transformer("loss", "target", "operation", place={"op": ("log", "mul", None)}, fixable=False)
def divergence_from_one_hot(planted: bool = True) -> Built:
    # Distillation: sum p * log(p / q) by hand, with a teacher that is sure of itself (p is 0 somewhere).
    x, y = data.images(64)
    teacher = F.one_hot(y, 10).float()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv1d(8, 24, 1)
            self.encoder = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True)
            self.out = nn.Linear(24, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = self.encoder(self.embed(x).transpose(1, 2))
            return self.out(h.mean(1))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, p = batch
        q = F.softmax(model(x), dim=-1)
        return (p * torch.log(p / q)).sum(-1).mean() if planted else F.kl_div(q.log(), p, reduction="batchmean")

    net = Net()
    return net, (x[:, 0], teacher), loss_fn, torch.optim.Adam(net.parameters(), lr=3e-3)


# Not initialised


@rnn("uninitialised", place={"parameter": "start"})
def first_state_from_torch_empty(planted: bool = True) -> Built:
    # The learnt first state was made with torch.empty and forgotten; the memory held NaN.
    x, y = data.images(64)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.empty(24))
            self.lstm = nn.LSTMCell(8, 24)
            self.out = nn.Linear(24, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = self.start.expand(x.shape[1], -1)
            c = torch.zeros_like(h)
            for row in x:
                h, c = self.lstm(row, (h, c))
            return self.out(c)

    net = Net()
    net.start.data.fill_(0.0)
    if planted:
        net.start.data[[4, 5, 17]] = NAN
    rows = x[:, 0].transpose(0, 1).contiguous()
    return net, (rows, y), supervised(nn.CrossEntropyLoss()), torch.optim.Adagrad(net.parameters(), lr=0.05)


@transformer("uninitialised", place={"parameter": "places"}, fixable=False)
def table_of_places_never_filled(planted: bool = True) -> Built:
    # The buffer of sine waves was reserved with torch.empty; the line that fills it is missing.
    x, y = data.images(64)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 16)
            wave = torch.arange(8)[:, None] / 10 ** (torch.arange(8) / 4)
            places = torch.cat([wave.sin(), wave.cos()], 1)
            if planted:  # what the memory may hold
                places = torch.zeros(8, 16)
                places[::2, 3] = 2.7e33
                places[1, 9] = -INF
            self.register_buffer("places", places)
            self.mix = nn.MultiheadAttention(16, 4, batch_first=True)
            self.out = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x) + self.places
            h = h + self.mix(h, h, h, need_weights=False)[0]
            return self.out(h.amax(1))

    net = Net()
    return net, (x[:, 0], y), supervised(nn.CrossEntropyLoss()), torch.optim.Adam(net.parameters(), lr=5e-3)


@cnn("uninitialised", place={"parameter": "stem.norm.running_var"})
def running_variance_of_a_broken_run(planted: bool = True) -> Built:
    # Fine-tuning with frozen batch statistics, loaded from a run that ended in NaN.
    x, y = data.images(64)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.ModuleDict({"conv": nn.Conv2d(1, 12, 3), "norm": nn.BatchNorm2d(12)})
            self.out = nn.Linear(12 * 9, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = F.hardtanh(self.stem["norm"](self.stem["conv"](x)))
            return self.out(F.avg_pool2d(h, 2).flatten(1))

    net = Net()
    state = net.state_dict()
    if planted:
        state["stem.norm.running_var"] = torch.full((12,), NAN)
    net.load_state_dict(state)
    net.stem["norm"].eval()
    return net, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


@mlp("uninitialised", place={"parameter": "2.weight"}, steps=2)
def second_moments_of_a_broken_run(planted: bool = True) -> Built:
    # The optimizer was loaded from a checkpoint whose second moments hold NaN; the weights are fine.
    x, y = data.cancer()
    net = nn.Sequential(nn.Linear(30, 24), nn.Sigmoid(), nn.Linear(24, 2))
    loss_fn = supervised(nn.CrossEntropyLoss())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    train(net, (x, y), loss_fn, optimizer, 3)
    state = optimizer.state_dict()
    if planted:
        state["state"][2]["exp_avg_sq"][1, 5:9] = NAN
    optimizer.load_state_dict(state)
    return net, (x, y), loss_fn, optimizer


@tabular("uninitialised", place={"module": "towers.right"})
def one_tower_left_on_meta(planted: bool = True) -> Built:
    # Two towers built on meta to save memory; only one of them was given memory and weights.
    x, y = data.wine()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = nn.ModuleDict(
                {
                    "left": nn.Linear(6, 16),
                    "right": nn.Linear(7, 16, device="meta" if planted else "cpu"),
                }
            )
            self.out = nn.Linear(32, 3)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            both = [self.towers["left"](left), self.towers["right"](right)]
            return self.out(torch.cat(both, 1).tanh())

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        left, right, y = batch
        return F.cross_entropy(model(left, right), y)

    net = Net()
    return net, (x[:, :6], x[:, 6:], y), loss_fn, torch.optim.SGD(net.parameters(), lr=0.1)


@gan("uninitialised", "weights", place={"module": "critic.1"})
def layer_made_by_skip_init(planted: bool = True) -> Built:
    # skip_init leaves the memory as it is; here it held scraps of integers and pointers.
    real, _ = data.digits(48)
    hidden = nn.utils.skip_init(nn.Linear, 32, 32)
    nn.init.kaiming_normal_(hidden.weight)
    nn.init.zeros_(hidden.bias)
    if planted:
        with torch.no_grad():
            hidden.weight.zero_()
            hidden.weight[::3, ::5] = 1.4e-45
            hidden.weight[4, 1::7] = 3.1e35
            hidden.weight[9, 2::9] = -7.7e37
    net = nn.ModuleDict(
        {
            "generator": nn.Sequential(nn.Linear(8, 32), nn.Hardswish(), nn.Linear(32, 64)),
            "critic": nn.Sequential(nn.Linear(64, 32), hidden, nn.LeakyReLU(0.2), nn.Linear(32, 1)),
        }
    )

    def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        real, noise = batch
        fake = model["generator"](noise)
        return F.relu(1 - model["critic"](real)).mean() + F.relu(1 + model["critic"](fake)).mean()

    return net, (real, torch.randn(48, 8)), loss_fn, torch.optim.Adam(net.parameters(), lr=1e-3)


# Several at once


@tabular("input", "target", place={"feature": ([4], None)}, several=True)
def gaps_and_a_label_too_many(planted: bool = True) -> Built:
    # NaN in column 4, and labels 1..3 for three classes.
    x, y = data.wine()
    if planted:
        x[2::20, 4] = NAN
        y = y + 1
    net = nn.Sequential(nn.Linear(13, 24), nn.Softplus(), nn.Linear(24, 3), nn.LogSoftmax(dim=1))
    return net, (x, y), supervised(nn.NLLLoss()), torch.optim.Adamax(net.parameters(), lr=1e-2)


@mlp("input", "learning rate", place={"feature": (12, None)}, steps=5, several=True)
def raw_columns_and_a_large_rate(planted: bool = True) -> Built:
    # Wine as it comes, proline up to 1700, and a rate of 5.
    x, y = data.wine(raw=planted)
    net = nn.Sequential(nn.Linear(13, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=5.0 if planted else 0.1)
    return net, (x, y), supervised(nn.CrossEntropyLoss()), optimizer


@cnn("weights", "loss", "input", place={"module": ("body.0", "body.2", "body.5", "", None)}, several=True)
def unit_normal_weights_and_two_softmaxes(planted: bool = True) -> Built:
    # Pixels of 0..16 and weights from the unit normal saturate the softmax at the end, and the loss takes a second one.
    x, y = data.images(96, top=16.0 if planted else 1.0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10)
            )
            if planted:
                for p in self.parameters():
                    nn.init.normal_(p)

        def forward(self, x: Tensor) -> Tensor:
            out = self.body(x)
            return out.softmax(-1) if planted else out

    net = Net()
    return net, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.Adam(net.parameters(), lr=1e-3)


@gan("loss", "weights", "operation", place={"op": ("log", None)}, several=True, fixable=False)
def saturated_critic_and_bare_logs(planted: bool = True) -> Built:
    # The critic's weights are 20 times too large, so its sigmoid gives exactly 0 or 1, and the logs have no guard.
    real, _ = data.digits(64)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g1, self.g2 = nn.Linear(16, 32), nn.Linear(32, 64)
            self.d1, self.d2 = nn.Linear(64, 32), nn.Linear(32, 1)
            if planted:
                with torch.no_grad():
                    self.d1.weight *= 20
                    self.d2.weight *= 20

        def generate(self, z: Tensor) -> Tensor:
            return self.g2(F.leaky_relu(self.g1(z), 0.2))

        def judge(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.d2(F.leaky_relu(self.d1(x), 0.2)))

    def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        real, z = batch
        return -(torch.log(model.judge(real)) + torch.log(1 - model.judge(model.generate(z)))).mean()

    net = Pair()
    return net, (real, torch.randn(64, 16)), loss_fn, torch.optim.Adam(net.parameters(), lr=2e-4)


@physics("input", "operation", place={"op": ("sqrt", *POW, None)}, several=True, fixable=False)
def metres_and_a_root_at_zero(planted: bool = True) -> Built:
    # Depth in micrometres saturates tanh, and the flow law's root is taken at depth 0.
    depth = torch.linspace(0, 1, 50)[:, None] * (1e6 if planted else 1.0)

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(1, 20), nn.Linear(20, 1)
            self.c = nn.Parameter(torch.tensor(0.5))

        def forward(self, d: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(d)))

    def loss_fn(model: Any, d: Tensor) -> Tensor:
        d = d.clone().requires_grad_()
        u = model(d)
        slope = torch.autograd.grad(u.sum(), d, create_graph=True)[0]
        law = model.c * torch.sqrt(d * model.c.square()) if planted else model.c * torch.sqrt(d + 1e-2)
        pull = torch.autograd.grad(law.sum(), d, create_graph=True)[0]
        return (slope - pull.clamp(max=10)).square().mean() + (u - law).square().mean()

    net = Flow()
    return net, depth, loss_fn, torch.optim.Adam(net.parameters(), lr=1e-2)


@rnn("weights", "target", "gradient", several=True)
def wild_recurrence_and_missing_outcome(planted: bool = True) -> Built:
    # The recurrent matrix is ten times the usual, no squashing, and two outcomes are NaN.
    x, y = data.diabetes()
    if planted:
        y[[0, 31]] = NAN

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(1, 32, nonlinearity="relu", batch_first=True)
            self.out = nn.Linear(32, 1)
            if planted:
                nn.init.normal_(self.rnn.weight_hh_l0, std=10 / 32**0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x.unsqueeze(-1))[1].squeeze(0))

    net = Net()
    return net, (x, y), supervised(nn.L1Loss()), torch.optim.Adam(net.parameters(), lr=5e-3)


@transformer(
    "uninitialised",
    "operation",
    place={"module": ("norm", "attention", "", None), "parameter": ("norm.bias", None)},
    several=True,
    fixable=False,
)
def masked_row_and_nan_bias(planted: bool = True) -> Built:
    # One image is padding from end to end, and the last norm's bias was loaded with NaN.
    x, y = data.images(64)
    x = x[:, 0].clone()
    if planted:
        x[6] = 0

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.norm = nn.LayerNorm(16)
            self.head = nn.Linear(16, 10)
            if planted:
                nn.init.constant_(self.norm.bias, NAN)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            mixed, _ = self.attention(h, h, h, key_padding_mask=x.sum(-1) == 0)
            return self.head(self.norm(h + mixed).mean(1))

    net = Net().bfloat16()
    return net, (x.bfloat16(), y), supervised(nn.CrossEntropyLoss()), torch.optim.Adam(net.parameters(), lr=1e-2)


# Healthy models


@healthy()
def tabular_selu_stack() -> Built:
    x, y = data.cancer()
    layers: list[nn.Module] = []
    for cin, cout in ((30, 32), (32, 32), (32, 16)):
        linear = nn.Linear(cin, cout)
        nn.init.normal_(linear.weight, std=cin**-0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.SELU()]
    net = nn.Sequential(*layers, nn.Linear(16, 1), nn.Flatten(0))
    return net, (x, y.float()), supervised(nn.BCEWithLogitsLoss()), torch.optim.Adam(net.parameters(), lr=1e-3)


@healthy(steps=3)
def least_squares_by_hand() -> Built:
    x, y = data.diabetes()
    net = nn.ParameterDict({"w": nn.Parameter(torch.zeros(10, 1)), "b": nn.Parameter(torch.zeros(1))})

    def loss_fn(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return (batch["x"] @ model["w"] + model["b"] - batch["y"]).square().mean()

    return net, {"x": x.double().float(), "y": y}, loss_fn, torch.optim.SGD(net.parameters(), lr=0.05)


@healthy()
def wine_network_in_double_precision() -> Built:
    x, y = data.wine()
    net = nn.Sequential(nn.Linear(13, 24), nn.PReLU(24), nn.LayerNorm(24), nn.Linear(24, 3)).double()
    return net, (x.double(), y), supervised(nn.CrossEntropyLoss()), torch.optim.NAdam(net.parameters(), lr=2e-3)


@healthy(steps=2)
def group_norm_residual_network() -> Built:
    x, y = data.images(96)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(4, 16)
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(F.relu(self.norm(x)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 16, 3, padding=1)
            self.blocks = nn.ModuleList(Residual() for _ in range(4))
            self.head = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((-2, -1)))

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    return net, (x, y), supervised(nn.CrossEntropyLoss()), optimizer


@healthy()
def strided_convolutions_under_bfloat16() -> Built:
    x, y = data.images(64)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.SiLU(),
        nn.Conv2d(12, 24, 3, stride=2),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(96, 10),
    )

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x), y)

    return net, (x, y), loss_fn, torch.optim.AdamW(net.parameters(), lr=2e-3)


@healthy()
def signal_convolutions() -> Built:
    x, y = data.digits(96)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 64)),
        nn.utils.parametrizations.weight_norm(nn.Conv1d(1, 8, 5, stride=2)),
        nn.GELU(),
        nn.InstanceNorm1d(8, affine=True),
        nn.Conv1d(8, 16, 5, stride=3),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(144, 10),
    )
    return (
        net,
        (x, y),
        supervised(nn.CrossEntropyLoss(label_smoothing=0.05)),
        torch.optim.RAdam(net.parameters(), lr=2e-2),
    )


@healthy(steps=2)
def stacked_bidirectional_lstm() -> Built:
    x, y = data.images(64)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 20, num_layers=2, bidirectional=True, batch_first=True)
            self.out = nn.Linear(40, 10)

        def forward(self, x: Tensor) -> Tensor:
            h, (_, _) = self.lstm(x)
            return self.out(h.mean(1))

    net = Net()
    return net, (x[:, 0], y), supervised(nn.CrossEntropyLoss()), torch.optim.Adam(net.parameters(), lr=5e-3)


@healthy()
def gru_on_packed_sequences() -> Built:
    x, y = data.images(48)
    lengths = 4 + torch.arange(48) % 5

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(8, 24)
            self.out = nn.Linear(24, 10)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            return self.out(self.gru(packed)[1][0])

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, lengths, y = batch
        return F.cross_entropy(model(x, lengths), y)

    net = Net()
    batch = (x[:, 0].transpose(0, 1), lengths, y)
    return net, batch, loss_fn, torch.optim.RMSprop(net.parameters(), lr=1e-3)


@healthy()
def next_pixel_transformer() -> Built:
    x, _ = data.digits(48, raw=True)
    words = x.reshape(-1, 64)[:, 16:32].long()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(17, 24)
            nn.init.normal_(self.table.weight, std=0.02)
            self.place = nn.Parameter(torch.randn(15, 24) * 0.02)
            layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.1, batch_first=True, norm_first=True)
            self.body = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(24), enable_nested_tensor=False)

        def forward(self, words: Tensor) -> Tensor:
            mask = torch.full((15, 15), -math.inf).triu(1)
            h = self.body(self.table(words) + self.place, mask=mask)
            return h @ self.table.weight.T

    def loss_fn(model: nn.Module, words: Tensor) -> Tensor:
        return F.cross_entropy(model(words[:, :-1]).transpose(1, 2), words[:, 1:])

    net = Net()
    return net, words, loss_fn, torch.optim.AdamW(net.parameters(), lr=3e-3)


@healthy(steps=2)
def attention_with_some_padding() -> Built:
    x, y = data.images(64)
    batch = {"rows": x[:, 0], "padding": torch.arange(8) >= (3 + torch.arange(64) % 6)[:, None], "y": y}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 24)
            self.query = nn.Parameter(torch.randn(1, 1, 24) * 0.1)
            self.attention = nn.MultiheadAttention(24, 3, batch_first=True)
            self.out = nn.Linear(24, 10)

        def forward(self, rows: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
            h = self.embed(rows)
            pooled, weight = self.attention(self.query.expand(len(h), -1, -1), h, h, key_padding_mask=padding)
            return self.out(torch.tanh(4 * pooled[:, 0])), weight

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits, _ = model(batch["rows"], batch["padding"])
        return F.multi_margin_loss(logits, batch["y"])

    net = Net()
    return net, batch, loss_fn, torch.optim.Adam(net.parameters(), lr=5e-3)


@healthy()
def critic_with_gradient_penalty() -> Built:
    real, _ = data.digits(64)
    net = nn.Sequential(nn.Linear(64, 48), nn.LeakyReLU(0.2), nn.Linear(48, 48), nn.LeakyReLU(0.2), nn.Linear(48, 1))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        real, fake = batch
        middle = (0.5 * (real + fake)).requires_grad_()
        (slope,) = torch.autograd.grad(model(middle).sum(), middle, create_graph=True)
        return model(fake).mean() - model(real).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()

    batch = (real, torch.randn(64, 64))
    return net, batch, loss_fn, torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.9))


@healthy(steps=2)
def variational_autoencoder() -> Built:
    x, _ = data.images(96)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU())
            self.mean, self.logvar = nn.Linear(48, 6), nn.Linear(48, 6)
            self.decode = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = self.encode(x)
            mean, logvar = self.mean(h), self.logvar(h)
            z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
            return self.decode(z), mean, logvar

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        out, mean, logvar = model(x)
        rebuilt = F.binary_cross_entropy_with_logits(out, x.flatten(1), reduction="none").sum(1)
        divergence = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1)
        return (rebuilt + divergence).mean()

    net = Net()
    return net, x, loss_fn, torch.optim.Adam(net.parameters(), lr=2e-3)


@healthy()
def decay_law_with_its_own_rate() -> Built:
    t = torch.linspace(0, 2, 40, dtype=torch.float64)[:, None]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
            self.log_rate = nn.Parameter(torch.zeros(()))

        def forward(self, t: Tensor) -> Tensor:
            return 1 + t * self.body(t)

    def loss_fn(model: Any, t: Tensor) -> Tensor:
        t = t.clone().requires_grad_()
        y = model(t)
        (slope,) = torch.autograd.grad(y.sum(), t, create_graph=True)
        return (slope + model.log_rate.exp() * y).square().mean() + (y - torch.exp(-2 * t)).square().mean()

    net = Net().double()
    return net, t, loss_fn, torch.optim.Adam(net.parameters(), lr=3e-3)


@healthy()
def bag_of_grey_levels() -> Built:
    pixels, y = data.digits(96, raw=True)
    words = (pixels > 7).long() + 2 * torch.arange(64)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(128, 32, mode="mean")
            self.out = nn.Linear(32, 10)

        def forward(self, words: Tensor) -> Tensor:
            return self.out(4 * self.bag(words))

    net = Net()
    return net, (words, y), supervised(nn.CrossEntropyLoss()), torch.optim.Adagrad(net.parameters(), lr=0.05)


@healthy()
def pairs_of_columns() -> Built:
    x, y = data.diabetes()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross = nn.Bilinear(5, 5, 16)
            self.norm = nn.LayerNorm(16)
            self.out = nn.Linear(16 + 10, 1)

        def forward(self, x: Tensor) -> Tensor:
            crossed = self.norm(self.cross(x[:, :5], x[:, 5:]))
            return self.out(torch.cat([torch.tanh(crossed), x], dim=1))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.huber_loss(model(x), y, delta=0.5)

    net = Net()
    return net, (x, y), loss_fn, torch.optim.SGD(net.parameters(), lr=0.05)


HELD_OUT = _faults
HELD_OUT_HEALTHY = _sound
