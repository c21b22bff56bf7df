"""Breast cancer, MLP on a table and its squares, float16 autocast with a GradScaler, guard.step."""
import numpy
import torch
from sklearn.datasets import load_breast_cancer

import common

NAME = "run06_mlp_fp16_raw_table"
STEPS = 60


class Squares(torch.nn.Module):
    """A table and its squares, before the first layer."""

    def __init__(self, features):
        super().__init__()
        self.first = torch.nn.Linear(2 * features, 64)
        self.rest = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))

    def forward(self, x):
        return self.rest(self.first(torch.cat([x, x * x], 1)))


def data():
    table = load_breast_cancer()
    y = torch.from_numpy(table.target.astype("float32"))[:, None]
    x = common.standardised(table.data)
    raw = torch.from_numpy(table.data.astype("float32"))
    both = common.split(torch.cat([x, raw], 1), y, 32, STEPS)
    # batch 33 came past the scaler, from another worker: as it was measured
    return [(b[:, 30:] if step == 33 else b[:, :30], t) for step, (b, t) in enumerate(both, 1)]


def loss_fn(model, batch):
    with torch.autocast("cpu", torch.float16):
        logits = model(batch[0])
    return torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), batch[1])


def main():
    torch.manual_seed(0)
    numpy.random.seed(0)
    model = Squares(30)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    if common.PLAIN:
        probe = common.Probe(model)
        for batch in data():
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            scaler.scale(loss).backward()
            probe.see(loss, scaled=True)
            scaler.step(optimizer)
            scaler.update()
        return probe.print(NAME)
    import initlab

    done = 0
    where = common.folder(NAME)
    with initlab.guard(model, optimizer, loss_fn=loss_fn, scaler=scaler, folder=str(where)) as guard:
        for batch in data():
            guard.step(batch)
            done += 1
    common.emit(NAME, guard.report(), where, done, STEPS, common.finite(model))


if __name__ == "__main__":
    main()
