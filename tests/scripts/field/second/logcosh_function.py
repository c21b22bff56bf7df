"""Regression with a hand written log-cosh loss (own forward and backward, saves memory)."""
import math

import torch
from sklearn.datasets import make_friedman1
from torch import nn
from torch.autograd import Function


class LogCosh(Function):
    @staticmethod
    def forward(ctx, pred, target):
        diff = target - pred
        ctx.save_for_backward(diff)
        a = diff.abs()
        return (a + torch.nn.functional.softplus(-2 * a) - math.log(2.0)).mean()

    @staticmethod
    def backward(ctx, grad_output):
        (diff,) = ctx.saved_tensors
        grad = torch.tanh(diff) / diff.numel()
        return grad_output * grad, None


def logcosh_loss(pred, target):
    return LogCosh.apply(pred, target)


def main():
    torch.manual_seed(6)
    X, y = make_friedman1(n_samples=1000, n_features=8, noise=0.5, random_state=6)
    X = torch.tensor(X, dtype=torch.float32) * 2 - 1
    y = torch.tensor(y, dtype=torch.float32)
    y = ((y - y.mean()) / y.std()).unsqueeze(1)
    Xtr, ytr, Xva, yva = X[:800], y[:800], X[800:], y[800:]

    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    opt = torch.optim.Adam(net.parameters(), lr=5e-3)

    for step in range(200):
        idx = torch.randint(0, 800, (64,))
        loss = logcosh_loss(net(Xtr[idx]), ytr[idx])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 25 == 0 or step == 199:
            with torch.no_grad():
                val = logcosh_loss(net(Xva), yva)
            print(f"{step:3d} train {loss.item():.4f} val {val.item():.4f}")


main()
