"""What a diagnosis costs against a plain forward and backward pass, on models of ten million parameters.

``pytest benchmarks/bench_diagnose.py --benchmark-only``. `healthy` is the screening, with and without an optimizer,
whose step is no part of the peer's pass; the others add closer looks: the search by operation, the replay in float32,
the line search, the trial of a remedy. The ratio is the peer's time over the doctor's: 0.25 is four passes.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import initlab


class Transformer(nn.Module):
    def __init__(self, width=384, heads=6, layers=5, words=1000):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, words)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x)))


def mlp():
    widths = [256, 1792, 1792, 1792, 1792]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    batch = torch.randn(256, 256), torch.randint(10, (256,))
    return nn.Sequential(*layers, nn.Linear(1792, 10)), batch, lambda m, b: F.cross_entropy(m(b[0]), b[1])


def transformer():
    x = torch.randint(1000, (8, 64))
    return Transformer(), x, lambda m, b: F.cross_entropy(m(b).flatten(0, 1), b.flatten())


def no_fault(loss_fn):
    return loss_fn


def at_the_end(loss_fn):
    """The log of a number below zero, after everything else."""
    return lambda model, batch: loss_fn(model, batch) + torch.log(loss_fn(model, batch).detach() * 0 - 1.0)


def in_half(loss_fn):
    """Float16 overflows, float32 does not: the replay in float32 is needed too."""

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return (loss_fn(model, batch).half() * 60000.0).float()

    return loss


CASES = {
    "healthy": (no_fault, None, "healthy"),
    "healthy, optimizer": (no_fault, 1e-4, "healthy"),
    "learning rate": (no_fault, 10.0, "broken"),
    "log": (at_the_end, None, "broken"),
    "precision": (in_half, None, "broken"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("build", [mlp, transformer])
def test_diagnose(versus, build, case):
    torch.manual_seed(0)
    model, batch, loss_fn = build()
    fault, lr, verdict = CASES[case]
    loss_fn = fault(loss_fn)
    optimizer = None if lr is None else torch.optim.AdamW(model.parameters(), lr=lr)
    found = initlab.diagnose(model, batch, loss_fn, optimizer)
    assert found.verdict == verdict, str(found)
    size = sum(p.numel() for p in model.parameters())
    assert math.isclose(size, 1e7, rel_tol=0.05)
    flat = torch.empty(size)

    def passes():
        model.zero_grad()
        loss_fn(model, batch).backward()

    versus(
        ours=lambda: initlab.diagnose(model, batch, loss_fn, optimizer),
        peer=passes,
        floor=lambda: flat.fill_(1.0),
        elements=size,
        element_size=4,
        rounds=3,
    )
