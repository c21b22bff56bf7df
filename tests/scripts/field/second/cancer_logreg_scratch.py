"""Logistic regression from scratch, only tensors and autograd (exercise 3)."""
import torch
from torch import nn
from sklearn.datasets import load_breast_cancer


def load():
    ds = load_breast_cancer()
    X = torch.tensor(ds.data, dtype=torch.float32)
    y = torch.tensor(1 - ds.target, dtype=torch.float32)   # 1 = malignant
    g = torch.Generator().manual_seed(0)
    perm = torch.randperm(len(X), generator=g)
    X, y = X[perm], y[perm]
    n = int(0.8 * len(X))
    mean, std = X[:n].mean(0), X[:n].std(0)
    X = (X - mean) / std
    return X[:n], y[:n], X[n:], y[n:]


def sigmoid(t):
    return 1.0 / (1.0 + torch.exp(-t))


def bce(p, y):
    return -(y * torch.log(p) + (1 - y) * torch.log(1 - p)).mean()


Xtr, ytr, Xte, yte = load()
torch.manual_seed(0)
w = nn.Parameter(0.01 * torch.randn(Xtr.shape[1]))
b = nn.Parameter(torch.zeros(()))
opt = torch.optim.SGD([w, b], lr=0.3)

for it in range(300):
    p = sigmoid(Xtr @ w + b)
    loss = bce(p, ytr)
    opt.zero_grad()
    loss.backward()
    opt.step()
    if it % 30 == 0 or it == 299:
        with torch.no_grad():
            acc = ((sigmoid(Xte @ w + b) > 0.5).float() == yte).float().mean()
        print(f"it {it:3d}   loss {loss.item():.5f}   test acc {acc.item():.3f}")
