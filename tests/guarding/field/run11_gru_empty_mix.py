"""Digits read row by row, a GRU with a squared ReLU before its head, float32, a loop of its own."""
import torch
from sklearn.datasets import load_digits

import common

NAME = "run11_gru_empty_mix"
STEPS = 30


def as_memory_is(tensor, seed=5):
    """What torch.empty finds in memory that others have used: any size. Here the same one each time, so that the run can be repeated."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.rand(tensor.shape, generator=generator) * 76.4 - 38
    sign = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
    with torch.no_grad():
        tensor.copy_(sign * 10.0**exponent)
    return tensor


class Reader(torch.nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.gru = torch.nn.GRU(8, width, batch_first=True)
        self.mix = torch.nn.Parameter(as_memory_is(torch.empty(width, 32)))  # the author forgot to initialise it
        self.head = torch.nn.Linear(32, 10)

    def forward(self, rows):
        mixed = self.gru(rows)[0][:, -1] @ self.mix
        return self.head(torch.relu(mixed).square())


def data():
    digits = load_digits()
    return common.split(torch.from_numpy(digits.images.astype("float32")) / 16, torch.from_numpy(digits.target).long(), 32, STEPS)


def loss_fn(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def main():
    torch.manual_seed(0)
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
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
    with initlab.guard(model, optimizer, loss_fn=loss_fn, folder=str(where), limit=1) as guard:
        for batch in map(guard.batch, data()):
            optimizer.zero_grad()
            loss = guard.loss(loss_fn(model, batch))
            loss.backward()
            optimizer.step()
            done += 1
    common.emit(NAME, guard.report(), where, done, STEPS, common.finite(model))


if __name__ == "__main__":
    main()
