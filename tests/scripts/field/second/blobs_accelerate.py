import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def make_blobs(n_per_class=1200, n_classes=5, dim=16):
    centers = 2.0 * torch.randn(n_classes, dim)
    x = torch.cat([c + torch.randn(n_per_class, dim) for c in centers])
    y = torch.arange(n_classes).repeat_interleave(n_per_class)
    return x, y


def shuffle(*tensors):
    return [t[torch.randperm(len(t))] for t in tensors]


def main():
    set_seed(21)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)

    x, y = shuffle(*make_blobs())
    n_val = 1000
    train = DataLoader(TensorDataset(x[n_val:], y[n_val:]), batch_size=32, shuffle=True)
    val = DataLoader(TensorDataset(x[:n_val], y[:n_val]), batch_size=250)

    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=160)
    model, optimizer, train, val, scheduler = accelerator.prepare(model, optimizer, train, val, scheduler)
    criterion = nn.CrossEntropyLoss()

    for epoch in range(2):
        model.train()
        seen = 0.0
        for i, (xb, yb) in enumerate(train):
            with accelerator.accumulate(model):
                loss = criterion(model(xb), yb)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            seen += loss.item()
            if (i + 1) % 40 == 0:
                accelerator.print(f"epoch {epoch} batch {i + 1} loss {seen / 40:.4f}")
                seen = 0.0
        model.eval()
        hits = 0
        with torch.no_grad():
            for xb, yb in val:
                pred = model(xb).argmax(1)
                pred, yb = accelerator.gather_for_metrics((pred, yb))
                hits += (pred == yb).sum().item()
        accelerator.print(f"epoch {epoch} val acc {hits / n_val:.3f}")


if __name__ == "__main__":
    main()
