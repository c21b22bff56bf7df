"""Refine candidate boxes; only candidates that overlap the object enough are used."""
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(8)


def make_candidates(n=4000):
    feats = torch.randn(n, 16)
    proj = torch.randn(16, 4) / 4
    offsets = torch.tanh(feats @ proj)
    iou = torch.rand(n)
    return feats, offsets, iou


feats, offsets, iou = make_candidates()


class BoxHead(nn.Module):
    def __init__(self, d=16, hidden=64):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(d, hidden), nn.LeakyReLU(0.1), nn.Linear(hidden, hidden), nn.LeakyReLU(0.1))
        self.reg = nn.Linear(hidden, 4)

    def forward(self, x):
        return self.reg(self.trunk(x))


head = BoxHead()
opt = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=1e-2)
B = 8
step = 0
for epoch in range(3):
    perm = torch.randperm(len(feats))
    for s in range(0, len(perm), B):
        idx = perm[s:s + B]
        keep = (iou[idx] > 0.5).float()
        pred = head(feats[idx])
        per_box = F.l1_loss(pred, offsets[idx], reduction="none").mean(1)
        loss = (per_box * keep).sum() / keep.sum()
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 5.0)
        opt.step()
        if step % 50 == 0:
            print(f"step {step} l1 {loss.item():.4f} positives {int(keep.sum())}")
        step += 1
