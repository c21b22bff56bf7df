"""Diagnoses of runs as people have them, for the tests of pages."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

import initlab

HOSTILE = "<script>document.title='ran'</script><img src=http://example.com/x.png onerror=alert(1)>\"'&"


def _net(*sizes, activation=nn.ReLU):
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), activation())]
    return nn.Sequential(*layers[:-1])


def _classifier(model, x, y, rate, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    return initlab.diagnose(model, (x, y), initlab.supervised(nn.CrossEntropyLoss()), optimizer, **options)


def digits():
    """Pixels as they are read: 0 to 255."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _classifier(_net(64, 64, 10), torch.tensor(x[:128] * 16).float(), torch.tensor(y[:128]), 0.1)


class _Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x):
        query, key, value = self.attention(self.norm(x)).chunk(3, -1)
        x = x + functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.contract(functional.gelu(self.expand(x)))


def gpt():
    """Weights of standard deviation 1."""
    model = nn.Sequential(nn.Embedding(40, 32), *(_Block(32) for _ in range(4)), nn.Linear(32, 40))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter)
    tokens = torch.randint(40, (8, 17))

    def loss_fn(model, batch):
        return functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    return initlab.diagnose(model, tokens, loss_fn, torch.optim.AdamW(model.parameters(), lr=1e-3))


def cnn():
    """Nothing wrong."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )
    return _classifier(model, torch.randn(32, 3, 12, 12), torch.randint(4, (32,)), 0.1)


def vae():
    """The logarithm of a variance that may be 0."""
    model = nn.ModuleDict({"encode": nn.Linear(16, 8), "variance": nn.Linear(16, 8), "decode": nn.Linear(8, 16)})

    def loss_fn(model, x):
        mean, variance = model["encode"](x), model["variance"](x).relu()
        back = model["decode"](mean + variance.sqrt() * torch.randn_like(mean))
        return functional.mse_loss(back, x) - 0.5 * (1 + torch.log(variance) - mean**2 - variance).mean()

    return initlab.diagnose(model, torch.rand(32, 16), loss_fn, torch.optim.Adam(model.parameters(), lr=1e-3))


def rate():
    """A learning rate that is far too large."""
    x = torch.randn(64, 13)
    return _classifier(_net(13, 64, 3, activation=nn.Tanh), x, x[:, :3].argmax(1), 500.0)


def float16():
    """An overflow in float16."""
    model = _net(32, 64, 64, 1).half()
    batch = (torch.randn(64, 32) * 900).half(), torch.randn(64, 1).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    return initlab.diagnose(model, batch, initlab.supervised(nn.MSELoss()), optimizer)


def deep():
    """200 layers."""
    x = torch.randn(64, 16)
    return _classifier(_net(16, *[16] * 199, 2, activation=nn.Tanh), x, (x[:, 0] > 0).long(), 0.1, budget=10.0)


def single():
    """One layer."""
    x = torch.randn(64, 2)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return initlab.diagnose(model, (x, x.sum(1, keepdim=True)), initlab.supervised(nn.MSELoss()), optimizer)


def hostile():
    """Names that are HTML, very long, and of other scripts."""
    model = nn.Sequential()
    for name in (HOSTILE.replace(".", ""), "very_long_name_" * 12, "x $a_b$ \u4e2d\u6587 \u202e\u0001"):
        model.add_module(name, nn.Linear(8, 8))
        nn.init.normal_(model[-1].weight, std=50.0)
    batch = {HOSTILE: torch.randn(32, 8), "y": torch.randn(32, 8)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return initlab.diagnose(model, batch, lambda m, b: functional.mse_loss(m(b[HOSTILE]), b["y"]), optimizer)


def missing():
    """A value that is missing in the data."""
    x = torch.randn(32, 4)
    x[3, 2] = float("nan")
    return initlab.diagnose(_net(4, 16, 1), (x, torch.randn(32, 1)), initlab.supervised(nn.MSELoss()))


def loader():
    """A loader of features of many scales."""
    data = torch.utils.data.TensorDataset(torch.randn(128, 12) * torch.logspace(-2, 4, 12), torch.randn(128, 1))
    model = _net(12, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batches = torch.utils.data.DataLoader(data, batch_size=32)
    return initlab.diagnose(model, batches, initlab.supervised(nn.MSELoss()), optimizer)


CASES = {case.__name__: case for case in (digits, gpt, cnn, vae, rate, float16, deep, single, hostile, missing, loader)}


def made(name):
    """The diagnosis of a case."""
    torch.manual_seed(0)
    return CASES[name]()
