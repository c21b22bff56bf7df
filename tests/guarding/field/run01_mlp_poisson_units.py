"""Diabetes, MLP, Poisson regression, float32, guard.step."""
import torch
from sklearn.datasets import load_diabetes

import common

NAME = "run01_mlp_poisson_units"
STEPS = 60


def data():
    raw = load_diabetes(scaled=False)
    x, y = raw.data.astype("float32"), torch.from_numpy(raw.target.astype("float32"))[:, None]
    mean, std = torch.from_numpy(x.mean(0)), torch.from_numpy(x.std(0))
    batches = common.split(torch.from_numpy(x), y, 32, STEPS)
    # from batch 40 on one laboratory's file, in which cholesterol (column 4) is in another unit
    batches[39][0][:, 4] *= 1000
    return [((x - mean) / std, y) for x, y in batches]


def loss_fn(model, batch):
    x, y = batch
    return torch.nn.functional.poisson_nll_loss(model(x), y, log_input=True)


def main():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    if common.PLAIN:
        probe = common.Probe(model)
        for batch in data():
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            probe.see(loss)
            optimizer.step()
        return probe.print(NAME)
    import initlab

    done = 0
    where = common.folder(NAME)
    with initlab.guard(model, optimizer, loss_fn=loss_fn, folder=str(where)) as guard:
        for batch in data():
            guard.step(batch)
            done += 1
    common.emit(NAME, guard.report(), where, done, STEPS, common.finite(model))


if __name__ == "__main__":
    main()
