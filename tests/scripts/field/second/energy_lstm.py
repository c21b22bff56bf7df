# hourly load forecast, one step ahead
import numpy as np
import torch
import torch.nn as nn


def make_series(n=1500, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(n)
    s = 50 + 10 * np.sin(2 * np.pi * t / 24) + 4 * np.sin(2 * np.pi * t / 168) + rng.normal(0, 1.0, n)
    return s.astype(np.float32)


def windows(series, lookback):
    xs, ys = [], []
    for i in range(len(series) - lookback):
        xs.append(series[i:i + lookback])
        ys.append(series[i + lookback])
    return torch.tensor(np.array(xs)).unsqueeze(-1), torch.tensor(np.array(ys)).unsqueeze(-1)


class Forecaster(nn.Module):
    def __init__(self, hidden=32):
        super().__init__()
        self.lstm = nn.LSTM(1, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, 1)

    def forward(self, x):
        out, _ = self.lstm(x)
        return self.fc(out[:, -1, :])


def train():
    torch.manual_seed(0)
    series = make_series()
    split = 1200
    mean, std = series[:split].mean(), series[:split].std()
    norm = (series - mean) / std
    xtr, ytr = windows(norm[:split], 24)
    xva, yva = windows(norm[split - 24:], 24)
    model = Forecaster()
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    sched = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=2)
    mse = nn.MSELoss()
    bs = 64
    for epoch in range(9):
        model.train()
        perm = torch.randperm(len(xtr))
        ep = []
        for i in range(0, len(perm) - bs + 1, bs):
            idx = perm[i:i + bs]
            loss = mse(model(xtr[idx]), ytr[idx])
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            ep.append(loss.item())
        model.eval()
        with torch.no_grad():
            val = mse(model(xva), yva).item()
        sched.step(val)
        print(f"epoch {epoch}: train {np.mean(ep):.4f} val {val:.4f}")


if __name__ == "__main__":
    train()
