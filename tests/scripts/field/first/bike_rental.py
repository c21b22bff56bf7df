"""Hourly bike rentals: small MLP baseline."""
import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import Dataset, DataLoader


class Rentals(Dataset):
    def __init__(self, n=2400, seed=0):
        rng = np.random.RandomState(seed)
        hour = rng.randint(0, 24, n)
        temp = rng.normal(15, 8, n)
        rain = rng.binomial(1, 0.2, n)
        weekend = rng.binomial(1, 2 / 7, n)
        cnt = 200 + 120 * np.sin((hour - 6) / 24 * 2 * np.pi) + 6 * temp - 90 * rain + 30 * weekend
        cnt = cnt + rng.normal(0, 15, n)
        self.x = np.stack([np.sin(hour / 24 * 2 * np.pi), np.cos(hour / 24 * 2 * np.pi),
                           (temp - 15) / 8, rain, weekend], 1).astype("float32")
        self.y = ((cnt - cnt.mean()) / cnt.std()).astype("float32")

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def loss_fn(pred, target):
    return ((pred - target) ** 2).mean()


torch.manual_seed(0)
loader = DataLoader(Rentals(), batch_size=48, shuffle=True)
net = nn.Sequential(nn.Linear(5, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 1))
opt = torch.optim.Adam(net.parameters(), lr=2e-3)

for epoch in range(12):
    losses = []
    for xb, yb in loader:
        opt.zero_grad()
        loss = loss_fn(net(xb), yb)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    print(f"epoch {epoch}: mse {np.mean(losses):.4f}")
