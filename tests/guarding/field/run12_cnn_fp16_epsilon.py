"""Digits, CNN with a one-against-all loss written by hand, float16 autocast with a GradScaler, a loop of its own."""
import torch
from sklearn.datasets import load_digits

import common

NAME = "run12_cnn_fp16_epsilon"
STEPS = 120


def build():
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32 * 16, 10),
    )


def data():
    digits = load_digits()
    x = torch.from_numpy(digits.images.astype("float32"))[:, None] / 16
    return common.split(x, torch.from_numpy(digits.target).long(), 32, STEPS)


def loss_fn(model, batch):
    x, y = batch
    with torch.autocast("cpu", torch.float16):
        p = torch.sigmoid(model(x))
        hot = torch.nn.functional.one_hot(y, 10).to(p.dtype)
        loss = -(hot * torch.log(p + 1e-8) + (1 - hot) * torch.log(1 - p + 1e-8))
    return loss.float().mean()


def main():
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
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
    with initlab.guard(model, optimizer, loss_fn=loss_fn, scaler=scaler, folder=str(where), limit=1) as guard:
        for batch in map(guard.batch, data()):
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            scaler.scale(guard.loss(loss)).backward()
            scaler.step(optimizer)
            scaler.update()
            done += 1
    common.emit(NAME, guard.report(), where, done, STEPS, common.finite(model))


if __name__ == "__main__":
    main()
