import torch
import torch.nn.functional as F
from torch.nn import Parameter
from sklearn.datasets import load_digits

torch.manual_seed(99)
digits = load_digits()
X = torch.tensor(digits.data, dtype=torch.float32)
X = (X - X.mean()) / X.std()
Y = torch.tensor(digits.target)

sizes = [64, 128, 128, 128, 128, 128, 128, 10]
Ws = [Parameter(torch.randn(a, b) * 0.01) for a, b in zip(sizes[:-1], sizes[1:])]
Bs = [Parameter(torch.zeros(b)) for b in sizes[1:]]


def forward(x):
    for i, (w, b) in enumerate(zip(Ws, Bs)):
        x = x @ w + b
        if i < len(Ws) - 1:
            x = F.relu(x)
    return x


opt = torch.optim.SGD(Ws + Bs, lr=0.05, momentum=0.9)

for step in range(240):
    idx = torch.randint(0, len(X), (128,))
    logits = forward(X[idx])
    loss = F.cross_entropy(logits, Y[idx])
    opt.zero_grad()
    loss.backward()
    opt.step()
    if step % 30 == 0 or step == 239:
        with torch.no_grad():
            acc = (forward(X).argmax(1) == Y).float().mean().item()
        print("step", step, "loss", loss.item(), "acc", acc)
