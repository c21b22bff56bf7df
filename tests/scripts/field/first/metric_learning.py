import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler


def pairwise_distances(z):
    diff = z.unsqueeze(1) - z.unsqueeze(0)
    return diff.pow(2).sum(-1).sqrt()


def batch_hard_triplet(z, labels, margin=0.5):
    d = pairwise_distances(z)
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    hardest_pos = (d * same.float()).max(dim=1).values
    d_neg = d + same.float() * 1e4
    hardest_neg = d_neg.min(dim=1).values
    return F.relu(hardest_pos - hardest_neg + margin).mean()


def main():
    torch.manual_seed(21)
    digits = load_digits()
    x = torch.tensor(StandardScaler().fit_transform(digits.data), dtype=torch.float32)
    y = torch.tensor(digits.target)
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
    opt = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    for it in range(200):
        idx = torch.randint(0, len(x), (48,))
        z = F.normalize(encoder(x[idx]), dim=1)
        loss = batch_hard_triplet(z, y[idx])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if it % 20 == 0:
            print(f"iter {it:4d} triplet {loss.item():.4f}")


if __name__ == "__main__":
    main()
