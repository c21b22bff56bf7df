"""A training step under guard(), against the same step with torch.nn.utils.clip_grad_norm_, and without any clipping.

``pytest benchmarks/bench_guard.py --benchmark-only``. The table's ratio is unguarded over guarded: 0.97 is an overhead
of 3 %. Its floor is a forward pass alone.
"""

import pytest
import torch
from torch import nn

import initlab


def mlp(width, norm):
    torch.manual_seed(0)
    layers = [
        module
        for _ in range(4)
        for module in (nn.Linear(width, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.ReLU())
    ]
    return nn.Sequential(*layers), (torch.randn(128, width),)


def transformer(width):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 16, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.randn(2, 64, width),)


MODELS = {
    "MLP of width 1024": lambda: mlp(1024, norm=False),
    "MLP of width 1024 with BatchNorm": lambda: mlp(1024, norm=True),
    "Transformer of width 1024": lambda: transformer(1024),
}


def loss_fn(model, batch):
    return model(batch[0]).square().mean()


@pytest.mark.parametrize("clips", [True, False], ids=["clip_grad_norm_", "no clipping"])
@pytest.mark.parametrize("name", MODELS)
def test_training_step(versus, name, clips):
    guarded, batch = MODELS[name]()
    plain, _ = MODELS[name]()
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-5)

    def step():
        optimizer.zero_grad()
        loss_fn(plain, batch).backward()
        if clips:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()

    max_norm = 1.0 if clips else float("inf")
    theirs = torch.optim.AdamW(guarded.parameters(), 1e-5)
    with initlab.guard(guarded, theirs, loss_fn=loss_fn, max_norm=max_norm) as guard:
        versus(
            ours=lambda: guard.step(batch),
            peer=step,
            floor=lambda: plain(batch[0]),
            elements=sum(p.numel() for p in plain.parameters()),
            element_size=4,
            rounds=15,
        )
        assert guard.report().bad_steps == 0
