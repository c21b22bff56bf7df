"""A training step under guard(), against the same step with torch.nn.utils.clip_grad_norm_, and without any clipping.

``pytest benchmarks/bench_guard.py --benchmark-only``. The table's ratio is unguarded over guarded: 0.97 is an overhead
of 3 %. Its floor is a forward pass alone.

``python benchmarks/bench_guard.py`` compares seconds of the CPU, on one thread, which other work on the machine hardly
changes: the median over rounds of guarded over unguarded, both in each round. ``--rows 256 512 1024`` does so for
the MLP alone, against no clipping, by the rows of a batch: the guard reads the gradients, whatever their number.
"""

import statistics
import sys
import time

import pytest
import torch
from torch import nn

import initlab


def mlp(width, norm, rows=256):
    torch.manual_seed(0)
    layers = [
        module
        for _ in range(4)
        for module in (nn.Linear(width, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.ReLU())
    ]
    return nn.Sequential(*layers), (torch.randn(rows, width),)


def transformer(width):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 16, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.randn(4, 64, width),)


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


def seconds_of_cpu(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def main(rounds=40):
    torch.set_num_threads(1)
    rows = [int(number) for number in sys.argv[2:]] if sys.argv[1:2] == ["--rows"] else []
    by_rows = {f"MLP of width 1024, {n} rows": lambda n=n: mlp(1024, norm=False, rows=n) for n in rows}
    for name, make in (by_rows or MODELS).items():
        for clips in (False,) if by_rows else (True, False):
            guarded, batch = make()
            plain, _ = make()
            optimizer, theirs = (torch.optim.AdamW(model.parameters(), 1e-5) for model in (plain, guarded))
            with initlab.guard(guarded, theirs, loss_fn=loss_fn, max_norm=1.0 if clips else float("inf")) as guard:

                def step(plain=plain, batch=batch, optimizer=optimizer, clips=clips):
                    optimizer.zero_grad()
                    loss_fn(plain, batch).backward()
                    if clips:
                        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
                    optimizer.step()

                pairs = []
                for number in range(rounds + 2):
                    calls = [lambda guard=guard, batch=batch: guard.step(batch), step]
                    order = calls if number % 2 else calls[::-1]
                    spent = [seconds_of_cpu(call) for call in order]
                    pairs.append(spent if number % 2 else spent[::-1])
                ratios = sorted(mine / other for mine, other in pairs[2:])
                quartiles = ratios[rounds // 4], ratios[3 * rounds // 4]
                against = "clip_grad_norm_" if clips else "no clipping"
                print(
                    f"{name:34s} against {against:16s} {statistics.median(ratios):.3f} "
                    f"(quartiles {quartiles[0]:.3f} to {quartiles[1]:.3f}), step {pairs[-1][1] * 1e3:.0f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
