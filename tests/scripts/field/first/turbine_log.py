"""Power forecast for a small wind turbine from the SCADA export."""
import io

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, random_split


def export(n=2000, seed=7):
    rng = np.random.default_rng(seed)
    lines = ["wind,dir,temp,rpm,power"]
    for _ in range(n):
        w = rng.gamma(2.0, 3.0)
        d = rng.uniform(0, 360)
        t = rng.normal(12, 6)
        r = 1.6 * w + rng.normal(0, 0.5)
        p = min(1.0, (w / 12) ** 3) * 2.0 + rng.normal(0, 0.02)
        cells = [f"{w:.2f}", f"{d:.0f}", f"{t:.1f}", f"{r:.2f}", f"{p:.3f}"]
        if rng.random() < 0.004:
            cells[2] = ""
        lines.append(",".join(cells))
    return "\n".join(lines)


class Scada(Dataset):
    def __init__(self, text):
        table = np.genfromtxt(io.StringIO(text), delimiter=",", skip_header=1, dtype=np.float32)
        self.x = torch.from_numpy(table[:, :4])
        self.y = torch.from_numpy(table[:, 4:])
        self.mean = torch.tensor([6.0, 180.0, 12.0, 10.0])
        self.std = torch.tensor([4.2, 104.0, 6.0, 7.0])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return (self.x[i] - self.mean) / self.std, self.y[i]


def main():
    torch.manual_seed(1)
    ds = Scada(export())
    train_ds, val_ds = random_split(ds, [1600, 400], generator=torch.Generator().manual_seed(3))
    train_dl = DataLoader(train_ds, batch_size=32, shuffle=True)
    val_dl = DataLoader(val_ds, batch_size=200)

    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    opt = torch.optim.Adam(net.parameters(), lr=1e-3)
    loss_fn = nn.SmoothL1Loss()

    for epoch in range(8):
        net.train()
        running = 0.0
        for xb, yb in train_dl:
            loss = loss_fn(net(xb), yb)
            opt.zero_grad()
            loss.backward()
            opt.step()
            running += loss.item() * len(xb)
        net.eval()
        with torch.no_grad():
            val = sum(loss_fn(net(xb), yb).item() for xb, yb in val_dl) / len(val_dl)
        print(f"[{epoch}] train {running / len(train_ds):.5f}  val {val:.5f}")


if __name__ == "__main__":
    main()
