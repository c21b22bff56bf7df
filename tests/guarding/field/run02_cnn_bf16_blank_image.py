"""Digits, CNN that normalises every image by its own contrast, bfloat16 autocast, a loop of its own."""
import torch
from sklearn.datasets import load_digits

import common

NAME = "run02_cnn_bf16_blank_image"
STEPS = 50


class ContrastNorm(torch.nn.Module):
    def forward(self, x):
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        spread = x.std(dim=(1, 2, 3), keepdim=True)
        return (x - mean) / spread


def build():
    return torch.nn.Sequential(
        ContrastNorm(),
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(32, 10),
    )


def data():
    digits = load_digits()
    x = torch.from_numpy(digits.images.astype("float32"))[:, None] / 16
    batches = common.split(x, torch.from_numpy(digits.target).long(), 32, STEPS)
    for step in (21, 36):  # the camera's shutter was closed
        batches[step - 1][0][11] = 0.0
    return batches


def loss_fn(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch[0])
    return torch.nn.functional.cross_entropy(logits.float(), batch[1])


def main():
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
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
        for batch in map(guard.batch, data()):
            optimizer.zero_grad()
            loss = guard.loss(loss_fn(model, batch))
            loss.backward()
            optimizer.step()
            done += 1
    common.emit(NAME, guard.report(), where, done, STEPS, common.finite(model))


if __name__ == "__main__":
    main()
