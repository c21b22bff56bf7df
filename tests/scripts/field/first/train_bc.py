#!/usr/bin/env python
import argparse

import torch
import torch.nn as nn
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler


def get_args():
    p = argparse.ArgumentParser(description="breast cancer classifier")
    p.add_argument("--lr", type=float, default=0.05)
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--hidden", type=int, default=24)
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


def main():
    args = get_args()
    torch.manual_seed(args.seed)
    x, y = load_breast_cancer(return_X_y=True)
    x_tr, x_te, y_tr, y_te = train_test_split(x, y, test_size=0.25, random_state=args.seed, stratify=y)
    scaler = StandardScaler().fit(x_tr)
    x_tr = torch.tensor(scaler.transform(x_tr), dtype=torch.float32)
    x_te = torch.tensor(scaler.transform(x_te), dtype=torch.float32)
    y_tr = torch.tensor(y_tr, dtype=torch.float32).unsqueeze(1)
    y_te = torch.tensor(y_te, dtype=torch.float32).unsqueeze(1)

    model = nn.Sequential(nn.Linear(30, args.hidden), nn.BatchNorm1d(args.hidden), nn.ReLU(), nn.Linear(args.hidden, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-3, nesterov=True)
    criterion = nn.BCEWithLogitsLoss()

    for epoch in range(1, args.epochs + 1):
        model.train()
        for idx in torch.randperm(len(x_tr)).split(args.batch_size):
            optimizer.zero_grad()
            loss = criterion(model(x_tr[idx]), y_tr[idx])
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            out = model(x_te)
            acc = ((out > 0).float() == y_te).float().mean().item()
        print(f"epoch {epoch} train {loss.item():.4f} test {criterion(out, y_te).item():.4f} acc {acc:.3f}")

    total = sum(p.detach().double().sum().item() for p in model.parameters())
    print("RESULT", repr(total), loss.item())


if __name__ == "__main__":
    main()
