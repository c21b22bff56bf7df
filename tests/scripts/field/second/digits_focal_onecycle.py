import argparse
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


class FocalLoss(nn.Module):
    def __init__(self, gamma=2.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, logits, target):
        logp = F.log_softmax(logits, dim=1)
        logpt = logp.gather(1, target.unsqueeze(1)).squeeze(1)
        pt = logpt.exp()
        return (-((1 - pt) ** self.gamma) * logpt).mean()


class ConvNet(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(1, ch, 3, padding=1, bias=False), nn.BatchNorm2d(ch), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(ch, 2 * ch, 3, padding=1, bias=False), nn.BatchNorm2d(2 * ch), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.c = nn.Linear(2 * ch * 4, 10)

    def forward(self, x):
        return self.c(self.f(x).flatten(1))


def main():
    ap = argparse.ArgumentParser(description="digits with focal loss")
    ap.add_argument("--epochs", type=int, default=8)
    ap.add_argument("--bs", type=int, default=64)
    ap.add_argument("--max-lr", type=float, default=1e-2)
    ap.add_argument("--gamma", type=float, default=2.0)
    args = ap.parse_args()

    torch.manual_seed(77)
    d = load_digits()
    x = torch.tensor(d.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(d.target)
    loader = DataLoader(TensorDataset(x[:1500], y[:1500]), batch_size=args.bs, shuffle=True, drop_last=True)
    net = ConvNet(12)
    opt = torch.optim.AdamW(net.parameters(), lr=args.max_lr / 25, weight_decay=1e-2)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=args.max_lr, total_steps=args.epochs * len(loader))
    crit = FocalLoss(args.gamma)

    for ep in range(args.epochs):
        net.train()
        tot = 0.0
        for xb, yb in loader:
            loss = crit(net(xb), yb)
            opt.zero_grad()
            loss.backward()
            opt.step()
            sched.step()
            tot += loss.item()
        net.eval()
        with torch.no_grad():
            acc = (net(x[1500:]).argmax(1) == y[1500:]).float().mean().item()
        print(f"epoch {ep + 1}: loss {tot / len(loader):.4f} val acc {acc:.3f} lr {sched.get_last_lr()[0]:.5f}")


if __name__ == "__main__":
    main()
