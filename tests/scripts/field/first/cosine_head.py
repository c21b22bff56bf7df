# digits -> 3-d unit sphere, classes as directions (for plotting)
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits

torch.manual_seed(2)
d = load_digits()
images = torch.tensor(d.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(d.target)


class SphereNet(nn.Module):
    def __init__(self, n_classes=10, scale=64.0):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 16, 3)
        self.centers = nn.Parameter(torch.randn(n_classes, 3))
        self.scale = scale

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        z = F.normalize(self.fc(x.flatten(1)))
        return F.softmax(self.scale * z @ F.normalize(self.centers).T, dim=1)


model = SphereNet()
opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for epoch in range(4):
    perm = torch.randperm(len(images))
    for k, idx in enumerate(perm.split(64)):
        p = model(images[idx])
        one_hot = F.one_hot(labels[idx], 10).float()
        loss = -(one_hot * torch.log(p)).sum(1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    acc = (p.argmax(1) == labels[idx]).float().mean().item()
    print("epoch", epoch, "loss", round(loss.item(), 4), "acc", round(acc, 3))
