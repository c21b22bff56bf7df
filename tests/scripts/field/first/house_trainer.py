import dataclasses

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


@dataclasses.dataclass
class Config:
    n: int = 1200
    features: int = 10
    lr: float = 0.02
    momentum: float = 0.9
    batch_size: int = 64
    epochs: int = 15
    seed: int = 5


def synthetic_houses(cfg):
    g = torch.Generator().manual_seed(cfg.seed)
    x = torch.randn(cfg.n, cfg.features, generator=g)
    w = torch.randn(cfg.features, 1, generator=g)
    y = x @ w + 0.3 * (x[:, :1] * x[:, 1:2]) + 0.05 * torch.randn(cfg.n, 1, generator=g)
    return TensorDataset(x, y / y.std())


class Trainer:
    def __init__(self, model, optimizer, criterion, loader, log_every=5):
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.loader = loader
        self.log_every = log_every
        self.history = []

    def train_step(self, batch):
        x, y = batch
        out = self.model(x)
        loss = self.criterion(out, y)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def fit(self, epochs):
        for epoch in range(epochs):
            self.model.train()
            losses = [self.train_step(b) for b in self.loader]
            self.history.append(sum(losses) / len(losses))
            print(f"epoch {epoch:3d} | loss {self.history[-1]:.6g}")
        return self.history


def main():
    cfg = Config()
    torch.manual_seed(cfg.seed)
    loader = DataLoader(synthetic_houses(cfg), cfg.batch_size, shuffle=True)
    model = nn.Sequential(nn.Linear(cfg.features, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr, momentum=cfg.momentum)
    Trainer(model, optimizer, nn.MSELoss(), loader).fit(cfg.epochs)


if __name__ == "__main__":
    main()
