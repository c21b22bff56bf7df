import math
import torch
from torch import nn
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

torch.manual_seed(31)
bc = load_breast_cancer()
x = torch.tensor(StandardScaler().fit_transform(bc.data), dtype=torch.float32)
y = torch.tensor(1 - bc.target, dtype=torch.float32)
train, test = torch.arange(0, 455), torch.arange(455, len(x))


class Screen(nn.Module):
    def __init__(self, prior=0.01):
        super().__init__()
        self.fc1 = nn.Linear(30, 32)
        self.fc2 = nn.Linear(32, 32)
        self.fc3 = nn.Linear(32, 16)
        self.head = nn.Linear(16, 1)
        bias = -math.log((1 - prior) / prior)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight, gain=0.5)
                nn.init.constant_(m.bias, bias)

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        x = torch.relu(self.fc2(x))
        x = torch.relu(self.fc3(x))
        return self.head(x).squeeze(1)


model = Screen()
opt = torch.optim.Adam(model.parameters(), lr=5e-3)
criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(1.7))
for epoch in range(30):
    order = train[torch.randperm(len(train))]
    for idx in order.split(35):
        loss = criterion(model(x[idx]), y[idx])
        opt.zero_grad()
        loss.backward()
        opt.step()
    if epoch % 5 == 4:
        with torch.no_grad():
            p = torch.sigmoid(model(x[test]))
        print(f"epoch {epoch + 1} loss {loss.item():.4f} min p {p.min():.3f} max p {p.max():.3f}")
