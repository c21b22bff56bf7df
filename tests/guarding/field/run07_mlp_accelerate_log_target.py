"""Diabetes, MLP that predicts on a logarithmic scale, float32, accelerate."""
import torch
from accelerate import Accelerator
from sklearn.datasets import load_diabetes

import common

NAME = "run07_mlp_accelerate_log_target"
STEPS = 50


def data():
    table = load_diabetes()
    x, y = common.standardised(table.data), torch.from_numpy(table.target.astype("float32"))[:, None]
    batches = common.split(x, y, 32, STEPS)
    for step in (18, 44):  # a patient without a score, entered as 0
        batches[step - 1][1][9] = 0.0
    return batches


def loss_fn(model, batch):
    """Squared logarithmic error, as it is common for prices and counts."""
    x, y = batch
    return ((model(x) - torch.log(y)) ** 2).mean()


def main():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 64), torch.nn.SiLU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    accelerator = Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(data(), batch_size=None)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if common.PLAIN:
        probe = common.Probe(model)
        for batch in loader:
            loss = loss_fn(prepared, batch)
            accelerator.backward(loss)
            probe.see(loss)
            optimizer.step()
            optimizer.zero_grad()
        return probe.print(NAME)
    from initlab.integrations.accelerate import AcceleratedGuard

    done = 0
    where = common.folder(NAME)
    with AcceleratedGuard(accelerator, prepared, optimizer, loss_fn=loss_fn, folder=str(where)) as guard:
        for batch in loader:
            guard.step(batch)
            done += 1
    common.emit(NAME, guard.report(), where, done, STEPS, common.finite(model))


if __name__ == "__main__":
    main()
