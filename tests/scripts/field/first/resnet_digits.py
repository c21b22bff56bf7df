"""Small residual CNN on scikit-learn digits with a one-cycle schedule."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from sklearn.datasets import load_digits

torch.manual_seed(2024)


class ResBlock(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.c1 = nn.Conv2d(ch, ch, 3, padding=1, bias=False)
        self.b1 = nn.BatchNorm2d(ch)
        self.c2 = nn.Conv2d(ch, ch, 3, padding=1, bias=False)
        self.b2 = nn.BatchNorm2d(ch)
        nn.init.zeros_(self.b2.weight)

    def forward(self, x):
        y = F.relu(self.b1(self.c1(x)))
        return F.relu(x + self.b2(self.c2(y)))


class Net(nn.Module):
    def __init__(self, ch=12):
        super().__init__()
        self.stem = nn.Conv2d(1, ch, 3, padding=1)
        self.layer1 = ResBlock(ch)
        self.layer2 = ResBlock(ch)
        self.fc = nn.Linear(ch * 4, 10)

    def forward(self, x):
        x = self.layer1(F.relu(self.stem(x)))
        x = self.layer2(F.max_pool2d(x, 2))
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


def augment(x):
    return torch.roll(x, int(torch.randint(-1, 2, (1,))), dims=3)


d = load_digits()
x = torch.tensor(d.images, dtype=torch.float32).unsqueeze(1)
x = (x - x.mean()) / x.std()
y = torch.tensor(d.target)
train_loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True, drop_last=True)

model = Net()
EPOCHS = 5
opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
sched = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.2, epochs=EPOCHS, steps_per_epoch=len(train_loader))
criterion = nn.CrossEntropyLoss(label_smoothing=0.05)

for epoch in range(EPOCHS):
    model.train()
    for xb, yb in train_loader:
        loss = criterion(model(augment(xb)), yb)
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
    model.eval()
    with torch.no_grad():
        acc = (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
    print(f"epoch {epoch} loss {loss.item():.4f} acc {acc:.3f} lr {sched.get_last_lr()[0]:.4f}")

total = sum(p.detach().double().sum().item() for p in model.parameters())
print("RESULT", repr(total), loss.item())
