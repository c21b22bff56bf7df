"""Train a bit, save a checkpoint, come back later and go on."""
import os
import tempfile

import torch
import torch.nn as nn
from sklearn.datasets import load_digits


def build_model():
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Dropout(0.1), nn.Linear(96, 10))


def data():
    d = load_digits()
    return torch.tensor(d.data / 16.0, dtype=torch.float32), torch.tensor(d.target)


def save_checkpoint(path, model, optimizer, step):
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, path)


def load_checkpoint(path, optimizer):
    ckpt = torch.load(path, map_location="cpu")
    model = build_model()
    model.load_state_dict(ckpt["model"])
    optimizer.load_state_dict(ckpt["optimizer"])
    print("resumed at step", ckpt["step"])
    return model, ckpt["step"]


def train(model, optimizer, x, y, start, stop):
    model.train()
    crit = nn.CrossEntropyLoss()
    for step in range(start, stop):
        idx = torch.randint(0, len(x), (64,))
        loss = crit(model(x[idx]), y[idx])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.4f}")
    return stop


def main():
    torch.manual_seed(2024)
    x, y = data()
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "last.pt")
        # first session
        model = build_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        step = train(model, optimizer, x, y, 0, 20)
        save_checkpoint(path, model, optimizer, step)
        del model, optimizer

        # second session
        model = build_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        if os.path.exists(path):
            model, step = load_checkpoint(path, optimizer)
        train(model, optimizer, x, y, step, 240)
        model.eval()
        print("train acc", (model(x).argmax(1) == y).float().mean().item())


if __name__ == "__main__":
    main()
