import math
import torch
import torch.nn as nn
from torch.optim.lr_scheduler import LambdaLR

torch.manual_seed(17)
EPOCHS = 25
WARMUP_EPOCHS = 30


def spirals(n=400, k=3):
    xs, ys = [], []
    for c in range(k):
        r = torch.linspace(0.05, 1, n)
        t = torch.linspace(c * 4, (c + 1) * 4, n) + 0.2 * torch.randn(n)
        xs.append(torch.stack([r * t.sin(), r * t.cos()], 1))
        ys.append(torch.full((n,), c))
    return torch.cat(xs), torch.cat(ys)


def lr_factor(epoch):
    if epoch < WARMUP_EPOCHS:
        return (epoch + 1) // WARMUP_EPOCHS
    return 0.5 * (1 + math.cos(math.pi * (epoch - WARMUP_EPOCHS) / 100))


X, y = spirals()
model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = LambdaLR(optimizer, lr_factor)
loss_fn = nn.CrossEntropyLoss()

for epoch in range(EPOCHS):
    perm = torch.randperm(len(X))
    tot = 0.0
    for b in perm.split(64):
        optimizer.zero_grad()
        loss = loss_fn(model(X[b]), y[b])
        loss.backward()
        optimizer.step()
        tot += loss.item() * len(b)
    scheduler.step()
    acc = (model(X).argmax(1) == y).float().mean().item()
    print(f"epoch {epoch:2d}  loss {tot / len(X):.4f}  acc {acc:.3f}")
