"""Text by characters, GRU, float32, gradient accumulation over four micro-batches in a loop of its own."""
import torch

import common

NAME = "run03_gru_accumulation_padding"
STEPS, MICRO = 25, 4
IGNORE = -100


class CharGRU(torch.nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.embed = torch.nn.Embedding(common.VOCABULARY, width)
        self.gru = torch.nn.GRU(width, width, batch_first=True)
        self.head = torch.nn.Linear(width, common.VOCABULARY)

    def forward(self, codes):
        return self.head(self.gru(self.embed(codes))[0])


def data():
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(STEPS * MICRO):
        x, y = common.windows(32, 8, generator)
        for row in range(8):  # only answers are learned: what comes before them does not count
            y[row, : int(torch.randint(8, 24, (1,), generator=generator))] = IGNORE
        batches.append((x, y))
    # the third micro-batch of step 15: prompts that were so long that all of the answers were cut off
    batches[14 * MICRO + 2][1][:] = IGNORE
    return batches


def loss_fn(model, batch):
    codes, following = batch
    return torch.nn.functional.cross_entropy(model(codes).flatten(0, 1), following.flatten(), ignore_index=IGNORE)


def main():
    torch.manual_seed(0)
    model = CharGRU()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    if common.PLAIN:
        probe = common.Probe(model)
        total = 0.0
        for number, batch in enumerate(data(), 1):
            loss = loss_fn(model, batch) / MICRO
            loss.backward()
            total += float(loss)
            if number % MICRO == 0:
                probe.see(total)
                optimizer.step()
                optimizer.zero_grad()
                total = 0.0
        return probe.print(NAME)
    import initlab

    done = 0
    where = common.folder(NAME)
    with initlab.guard(model, optimizer, loss_fn=loss_fn, folder=str(where)) as guard:
        for number, batch in enumerate(map(guard.batch, data()), 1):
            loss = guard.loss(loss_fn(model, batch) / MICRO)
            loss.backward()
            if number % MICRO == 0:
                optimizer.step()
                optimizer.zero_grad()
                done += 1
    common.emit(NAME, guard.report(), where, done, STEPS, common.finite(model))


if __name__ == "__main__":
    main()
