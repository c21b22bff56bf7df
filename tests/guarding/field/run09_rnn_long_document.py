"""Text by characters, an RNN of ReLUs, float32, guard.step with clipping."""
import torch

import common

NAME = "run09_rnn_long_document"
STEPS, LONG = 50, 32


class CharRNN(torch.nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.embed = torch.nn.Embedding(common.VOCABULARY, width)
        self.rnn = torch.nn.RNN(width, width, nonlinearity="relu", batch_first=True)
        self.head = torch.nn.Linear(width, common.VOCABULARY)
        torch.nn.init.normal_(self.rnn.weight_hh_l0, std=0.25)

    def forward(self, codes):
        return self.head(self.rnn(self.embed(codes))[0])


def data():
    generator = torch.Generator().manual_seed(4)
    batches = []
    for step in range(1, STEPS + 1):
        # pieces of 12 characters; now and then whole documents
        length = 900 if step == LONG else 12
        batches.append(common.windows(length, 4 if step == LONG else 16, generator))
    return batches


def loss_fn(model, batch):
    codes, following = batch
    return torch.nn.functional.cross_entropy(model(codes).flatten(0, 1), following.flatten())


def main():
    torch.manual_seed(0)
    model = CharRNN()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    if common.PLAIN:
        probe = common.Probe(model)
        for batch in data():
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            probe.see(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return probe.print(NAME)
    import initlab

    done = 0
    where = common.folder(NAME)
    with initlab.guard(model, optimizer, loss_fn=loss_fn, folder=str(where), max_norm=1.0) as guard:
        for batch in data():
            guard.step(batch)
            done += 1
    common.emit(NAME, guard.report(), where, done, STEPS, common.finite(model))


if __name__ == "__main__":
    main()
