import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits

torch.manual_seed(55)
d = load_digits()
X = torch.tensor(d.data / 16.0, dtype=torch.float32)
Y = torch.tensor(d.target)
Xtr, Ytr, Xte, Yte = X[:1400], Y[:1400], X[1400:], Y[1400:]


def minibatch(n=64):
    i = torch.randint(0, len(Xtr), (n,))
    return Xtr[i], Ytr[i]


def acc(m):
    m.eval()
    with torch.no_grad():
        return (m(Xte).argmax(1) == Yte).float().mean().item()


# ---- teacher ----
teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
opt_t = torch.optim.Adam(teacher.parameters(), lr=3e-3)
for i in range(80):
    xb, yb = minibatch()
    l = F.cross_entropy(teacher(xb), yb)
    opt_t.zero_grad()
    l.backward()
    opt_t.step()
print("teacher loss", l.item(), "acc", acc(teacher))
for p in teacher.parameters():
    p.requires_grad_(False)

# ---- student ----
T, alpha = 3.0, 0.7
student = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
opt_s = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, nesterov=True)
sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt_s, T_max=200)
for i in range(200):
    student.train()
    xb, yb = minibatch()
    with torch.no_grad():
        soft = F.softmax(teacher(xb) / T, dim=1)
    logits = student(xb)
    kd = F.kl_div(F.log_softmax(logits / T, dim=1), soft, reduction="batchmean") * T * T
    loss = alpha * kd + (1 - alpha) * F.cross_entropy(logits, yb)
    opt_s.zero_grad()
    loss.backward()
    opt_s.step()
    sched.step()
    if i % 25 == 0 or i == 199:
        print(f"student step {i} loss {loss.item():.4f} kd {kd.item():.4f}")
print("student acc", acc(student))
