"""A training step of a 10-layer MLP (width 1024, batch 256) under watch(), against the same step without it.

``pytest benchmarks/bench_watch.py --benchmark-only``. The table's ratio is unwatched over watched: 0.91 is an overhead
of 10 %. Its floor is a forward pass alone.
"""

import pytest
import torch
from torch import nn

import initlab

WIDTH, BATCH, LAYERS = 1024, 256, 10


def mlp():
    torch.manual_seed(0)
    layers = [module for _ in range(LAYERS) for module in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers)


def stepper(model):
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    x = torch.randn(BATCH, WIDTH)

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("backward", [False, True], ids=["watch()", "watch(backward=True)"])
def test_training_step(versus, backward):
    watched, plain = mlp(), mlp()
    step, x = stepper(plain), torch.randn(BATCH, WIDTH)
    with initlab.watch(watched, backward=backward) as watch:
        versus(
            ours=stepper(watched),
            peer=step,
            floor=lambda: plain(x),
            elements=BATCH * WIDTH * LAYERS,
            element_size=4,
            rounds=25,
        )
        assert watch.report().fault is None
