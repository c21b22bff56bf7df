from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split
import torch
import torch.nn as nn
import torch.optim as optim

torch.manual_seed(1)

wine = load_wine()
Xtr, Xte, ytr, yte = train_test_split(wine.data, wine.target, test_size=0.25, random_state=1, stratify=wine.target)

Xtr = torch.FloatTensor(Xtr)
Xte = torch.FloatTensor(Xte)
ytr = torch.LongTensor(ytr)
yte = torch.LongTensor(yte)


class Net(nn.Module):
    def __init__(self):
        super(Net, self).__init__()
        self.fc1 = nn.Linear(13, 64)
        self.fc2 = nn.Linear(64, 64)
        self.fc3 = nn.Linear(64, 3)

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        x = torch.relu(self.fc2(x))
        x = self.fc3(x)
        return x


net = Net()
criterion = nn.CrossEntropyLoss()
optimizer = optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

losses = []
for epoch in range(200):
    optimizer.zero_grad()
    output = net(Xtr)
    loss = criterion(output, ytr)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if (epoch + 1) % 20 == 0:
        acc = (net(Xte).argmax(1) == yte).float().mean().item()
        print('Epoch {}/200 Loss: {:.4f} Acc: {:.3f}'.format(epoch + 1, loss.item(), acc))
