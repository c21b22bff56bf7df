# neural net "from scratch", only autograd is used
import torch
from sklearn.datasets import load_digits

torch.manual_seed(0)
data = load_digits()
X = torch.tensor(data.data, dtype=torch.float32) / 16
X = X - X.mean(0)
Y = torch.tensor(data.target)
n_train = 1400

sizes = [64, 128, 128, 128, 10]
params = []
for n_in, n_out in zip(sizes[:-1], sizes[1:]):
    W = torch.randn(n_in, n_out)
    b = torch.zeros(n_out)
    W.requires_grad_()
    b.requires_grad_()
    params.append((W, b))


def forward(x):
    for i, (W, b) in enumerate(params):
        x = x @ W + b
        if i < len(params) - 1:
            x = torch.relu(x)
    return x


def cross_entropy(logits, y):
    logits = logits - logits.max(1, keepdim=True).values
    logp = logits - logits.exp().sum(1, keepdim=True).log()
    return -logp[torch.arange(len(y)), y].mean()


opt = torch.optim.Adam([p for pair in params for p in pair], lr=1e-3)
for epoch in range(12):
    perm = torch.randperm(n_train)
    total = 0.0
    for i in range(0, n_train, 50):
        j = perm[i:i + 50]
        loss = cross_entropy(forward(X[j]), Y[j])
        opt.zero_grad()
        loss.backward()
        opt.step()
        total += loss.item() * len(j)
    with torch.no_grad():
        acc = (forward(X[n_train:]).argmax(1) == Y[n_train:]).float().mean().item()
    print(f"epoch {epoch}: train loss {total / n_train:.3f}, test acc {acc:.3f}")
