#!/usr/bin/env python
"""Memory benchmark: the class is given by the first symbol of the sequence, all the rest is noise."""
import argparse
import torch
from torch import nn


def parse_args():
    p = argparse.ArgumentParser()
    p.add_argument("--length", type=int, default=160)
    p.add_argument("--hidden", type=int, default=64)
    p.add_argument("--classes", type=int, default=4)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=11)
    return p.parse_args()


class Reader(nn.Module):
    def __init__(self, vocab, hidden, classes):
        super().__init__()
        self.emb = nn.Embedding(vocab, 16)
        self.rnn = nn.RNN(16, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, tokens):
        out, h = self.rnn(self.emb(tokens))
        return self.fc(out[:, -1])


def batch(args):
    y = torch.randint(0, args.classes, (args.batch,))
    noise = torch.randint(args.classes, args.classes + 8, (args.batch, args.length))
    noise[:, 0] = y
    return noise, y


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    net = Reader(args.classes + 8, args.hidden, args.classes)
    opt = torch.optim.Adam(net.parameters(), lr=args.lr)
    ce = nn.CrossEntropyLoss()
    avg = None
    for step in range(1, args.steps + 1):
        x, y = batch(args)
        logits = net(x)
        loss = ce(logits, y)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        avg = loss.item() if avg is None else 0.95 * avg + 0.05 * loss.item()
        if step % 20 == 0:
            acc = (logits.argmax(1) == y).float().mean().item()
            print(f"[{step}/{args.steps}] loss={avg:.4f} acc={acc:.2f}")


if __name__ == "__main__":
    main()
