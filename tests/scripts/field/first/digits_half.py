import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SEED = 11
BATCH_SIZE = 64
EPOCHS = 6
DTYPE = torch.float16

torch.manual_seed(SEED)
digits = load_digits()
x_tr, x_te, y_tr, y_te = train_test_split(
    digits.data / 16.0, digits.target, test_size=0.25, random_state=SEED, stratify=digits.target
)
x_tr = torch.tensor(x_tr, dtype=DTYPE)
x_te = torch.tensor(x_te, dtype=DTYPE)
y_tr, y_te = torch.tensor(y_tr), torch.tensor(y_te)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


net = Net().to(DTYPE)
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)


def accuracy():
    with torch.inference_mode():
        return (net(x_te).argmax(1) == y_te).float().mean().item()


print("before:", accuracy())
for epoch in range(EPOCHS):
    order = torch.randperm(len(x_tr))
    for idx in order.split(BATCH_SIZE):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(net(x_tr[idx]).float(), y_tr[idx])
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}/{EPOCHS} loss={loss.item():.4f} acc={accuracy():.4f}")
