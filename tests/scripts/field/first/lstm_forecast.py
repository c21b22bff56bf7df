import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, DataLoader

np.random.seed(0)
torch.manual_seed(0)


class Windows(Dataset):
    def __init__(self, series, length=24):
        self.series = torch.tensor(series, dtype=torch.float32)
        self.length = length

    def __len__(self):
        return len(self.series) - self.length

    def __getitem__(self, i):
        w = self.series[i:i + self.length]
        return w.unsqueeze(-1), self.series[i + self.length].unsqueeze(-1)


t = np.arange(900)
passengers = 5000 + 8 * t + 1500 * np.sin(2 * np.pi * t / 24) + 200 * np.random.randn(len(t))
split = 720
mean, std = passengers[:split].mean(), passengers[:split].std()
series = (passengers - mean) / std


class Forecaster(nn.Module):
    def __init__(self, hidden=24):
        super().__init__()
        self.lstm = nn.LSTM(1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x):
        out, _ = self.lstm(x)
        return x[:, -1] + self.head(out[:, -1])


def run_epoch(model, loader, opt=None):
    losses = []
    for x, y in loader:
        with torch.set_grad_enabled(opt is not None):
            loss = nn.functional.mse_loss(model(x), y)
        if opt is not None:
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
        losses.append(loss.item())
    return losses


train_loader = DataLoader(Windows(series[:split]), batch_size=32, shuffle=True)
valid_loader = DataLoader(Windows(series[split - 24:]), batch_size=64)
model = Forecaster()
opt = torch.optim.Adam(model.parameters(), lr=5e-3)
sched = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=2)

for epoch in range(8):
    tr = run_epoch(model, train_loader, opt)
    va = run_epoch(model, valid_loader)
    sched.step(np.mean(va))
    print(f"epoch {epoch} train mse {np.mean(tr):.4f} valid mse {np.mean(va):.4f}")

total = sum(p.detach().double().sum().item() for p in model.parameters())
print("RESULT", repr(total), tr[-1])
