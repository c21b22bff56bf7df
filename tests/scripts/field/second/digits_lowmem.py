# small net for the raspberry pi, memory is tight so everything is kept small
import torch
import torch.nn as nn
from sklearn.datasets import load_digits

device = "cpu"


class TinyNet(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.body(x))


def get_data(dtype):
    d = load_digits()
    x = torch.tensor(d.data / 16.0).to(dtype)
    y = torch.tensor(d.target)
    return x[:1500], y[:1500], x[1500:], y[1500:]


def run():
    torch.manual_seed(8)
    model = TinyNet().to(device).half()
    xtr, ytr, xte, yte = get_data(torch.float16)
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    lossf = nn.CrossEntropyLoss()
    for epoch in range(6):
        order = torch.randperm(len(xtr))
        tot, nb = 0.0, 0
        for i in range(0, len(xtr), 50):
            j = order[i:i + 50]
            logits = model(xtr[j]).float()
            loss = lossf(logits, ytr[j])
            opt.zero_grad()
            loss.backward()
            opt.step()
            tot += loss.item()
            nb += 1
        with torch.no_grad():
            acc = (model(xte).argmax(1) == yte).float().mean().item()
        print(f"epoch {epoch} loss {tot / nb:.4f} acc {acc:.3f}")


run()
