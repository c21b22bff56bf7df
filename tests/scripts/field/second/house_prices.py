import logging
from typing import Tuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
log = logging.getLogger("prices")


class HouseDataset(Dataset):
    """Synthetic listings: living area, rooms, age, distance to centre, floor."""

    def __init__(self, n: int = 2000, seed: int = 0):
        rng = np.random.default_rng(seed)
        area = rng.normal(110, 35, n).clip(25, 300)
        rooms = (area / 28 + rng.normal(0, 0.7, n)).round().clip(1, 10)
        age = rng.uniform(0, 90, n)
        dist = rng.exponential(7, n)
        floor = rng.integers(0, 12, n)
        price = 2600 * area + 9000 * rooms - 900 * age - 5200 * dist + 1500 * floor + rng.normal(0, 15000, n) + 60000
        feats = np.stack([area, rooms, age, dist, floor], axis=1)
        feats = (feats - feats.mean(0)) / feats.std(0)
        self.x = torch.from_numpy(feats.astype(np.float32))
        self.y = torch.from_numpy(price.astype(np.float32)).unsqueeze(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tuple[torch.Tensor, torch.Tensor]:
        return self.x[i], self.y[i]


class PriceTrainer:
    def __init__(self, model: nn.Module, loader: DataLoader, lr: float = 1e-2):
        self.model = model
        self.loader = loader
        self.loss_fn = nn.MSELoss()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def train_epoch(self) -> float:
        self.model.train()
        total, count = 0.0, 0
        for x, y in self.loader:
            self.optimizer.zero_grad()
            loss = self.loss_fn(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(x)
            count += len(x)
        return total / count

    def fit(self, epochs: int) -> None:
        for e in range(epochs):
            log.info("epoch %d mse %.4g", e, self.train_epoch())


if __name__ == "__main__":
    torch.manual_seed(0)
    ds = HouseDataset()
    model = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    PriceTrainer(model, DataLoader(ds, batch_size=64, shuffle=True)).fit(8)
