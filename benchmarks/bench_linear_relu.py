"""initlab.linear_relu against F.relu(F.linear) on the CPU, with and without a check of the result.

``pytest benchmarks/bench_linear_relu.py --benchmark-only``. Peers: "plain" is F.relu(F.linear), "checked" the same and
torch.isfinite(y).all(), which it waits for. In the table the column fill_ is the GEMM alone. Nothing is timed before
the flagged op has given torch's values and a flag that is exact.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initlab import fuse_linear_relu, linear_relu

SHAPES = {"K=1024": (4096, 1024, 1024), "K=128": (4096, 128, 1024), "K=64": (4096, 64, 1024)}  # M, K, N
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plain(x, w, b):
    return F.relu(F.linear(x, w, b))


def checked(x, w, b):
    y = plain(x, w, b)
    bool(torch.isfinite(y).all())
    return y


PEERS = {"plain": plain, "checked": checked}


def operands(shape, dtype):
    M, K, N = SHAPES[shape]
    torch.manual_seed(0)
    w = torch.randn(N, K) / K**0.5
    return [t.to(dtype) for t in (torch.randn(M, K), w, torch.randn(N))]


def gate(x, w, b):
    flags = torch.zeros(1, dtype=torch.int32)
    assert torch.equal(linear_relu(x, w, b, flags=flags), plain(x, w, b))
    assert int(flags) == 0
    bad = b.clone()
    bad[-1] = float("-inf")
    linear_relu(x, w, bad, flags=flags)
    assert int(flags) == 4
    return flags.zero_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peer", PEERS)
def test_forward(versus, peer, shape, dtype):
    x, w, b = operands(shape, DTYPES[dtype])
    flags = gate(x, w, b)
    versus(
        ours=lambda: linear_relu(x, w, b, flags=flags),
        peer=lambda: PEERS[peer](x, w, b),
        floor=lambda: F.linear(x, w, b),
        elements=x.shape[0] * w.shape[0],
        element_size=x.element_size(),
        rounds=15,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peer", PEERS)
def test_training_step(versus, peer, shape):
    operand = operands(shape, torch.float32)
    flags = gate(*operand)
    x, w, b = (t.requires_grad_() for t in operand)
    grad = torch.randn(x.shape[0], w.shape[0])

    def step(function):
        x.grad = w.grad = b.grad = None
        function(x, w, b).backward(grad)

    versus(
        ours=lambda: step(lambda x, w, b: linear_relu(x, w, b, flags=flags)),
        peer=lambda: step(PEERS[peer]),
        floor=lambda: step(F.linear),
        elements=grad.numel(),
        element_size=4,
        rounds=11,
    )


@pytest.mark.parametrize("peer", PEERS)
def test_small_call(versus, peer):
    """What a call costs: 8 x 8 by 8 x 8, 1,000 calls."""
    x, w, b = torch.randn(8, 8), torch.randn(8, 8), torch.randn(8)
    flags = gate(x, w, b)

    def calls(function):
        for _ in range(1000):
            function(x, w, b)

    row = versus(
        ours=lambda: calls(lambda x, w, b: linear_relu(x, w, b, flags=flags)),
        peer=lambda: calls(PEERS[peer]),
        floor=lambda: calls(F.linear),
        elements=1000,
        element_size=x.numel() * x.element_size(),
    )
    row["case"] = f"{peer}, a call of 8 x 8 by 8 x 8"


class Block(nn.Module):
    """Of a GPT without attention, width 768: what is left is nearly all matrix products, as it is with attention."""

    def __init__(self, activation):
        super().__init__()
        self.up, self.down = nn.Linear(768, 3072), nn.Linear(3072, 768)
        self.act = nn.ReLU() if activation == "nn.ReLU" else None

    def forward(self, x):
        h = self.up(F.layer_norm(x, (768,)))
        return x + self.down(F.relu(h).square() if self.act is None else self.act(h))


@pytest.mark.parametrize("activation", ["nn.ReLU", "F.relu, squared"])
@pytest.mark.parametrize("peer", PEERS)
def test_fused_model(versus, peer, activation):
    """A training step of four blocks, 256 tokens, by fuse_linear_relu and without."""
    torch.manual_seed(0)
    x, models = torch.randn(256, 768), {"peer": nn.Sequential(*(Block(activation) for _ in range(4)))}
    models["ours"] = copy.deepcopy(models["peer"])
    flag = torch.zeros(1, dtype=torch.int32)
    for name in fuse_linear_relu(models["ours"]).fused:
        models["ours"].get_submodule(name).flags = flag
        if peer == "checked":
            look = models["peer"].get_submodule(name).register_forward_hook
            look(lambda module, args, y: None if torch.isfinite(y).all() else y)
    assert torch.equal(models["ours"](x), models["peer"](x))

    def step(model):
        model.zero_grad()
        model(x).square().mean().backward()

    versus(
        ours=lambda: step(models["ours"]),
        peer=lambda: step(models["peer"]),
        floor=lambda: step(models["peer"]),
        elements=x.numel(),
        element_size=4,
        rounds=21,
    )
