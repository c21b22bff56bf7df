import torch
import torch.nn as nn
from sklearn.datasets import load_wine
from sklearn.preprocessing import StandardScaler

torch.manual_seed(4)

wine = load_wine()
feat = StandardScaler().fit_transform(wine.data)
x = torch.tensor(feat[:, :-1], dtype=torch.float32)
y_cls = torch.tensor(wine.target)
y_reg = torch.tensor(feat[:, -1:], dtype=torch.float32)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU())
        self.cls = nn.Linear(32, 3)
        self.reg = nn.Linear(32, 1)

    def forward(self, x):
        h = self.body(x)
        return self.cls(h), self.reg(h)


model = TwoHeads()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
ce, mse = nn.CrossEntropyLoss(), nn.MSELoss()

for epoch in range(60):
    model.train()
    for idx in torch.randperm(len(x)).split(32):
        optimizer.zero_grad()
        logits, value = model(x[idx])
        parts = [ce(logits, y_cls[idx]).item(), mse(value, y_reg[idx]).item()]
        loss = torch.tensor(parts, requires_grad=True).sum()
        loss.backward()
        optimizer.step()
    if epoch % 10 == 0 or epoch == 59:
        model.eval()
        with torch.no_grad():
            logits, value = model(x)
            acc = (logits.argmax(1) == y_cls).float().mean().item()
        print(f"epoch {epoch} loss {loss.item():.4f} (ce {parts[0]:.4f} mse {parts[1]:.4f}) acc {acc:.3f}")
