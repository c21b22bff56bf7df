# the adding problem: sum the two marked numbers of a sequence
import torch
import torch.nn as nn

torch.manual_seed(3)
T = 120
HID = 64


def batch(n):
    vals = torch.rand(n, T)
    marks = torch.zeros(n, T)
    for i in range(n):
        a, b = torch.randperm(T)[:2]
        marks[i, a] = 1
        marks[i, b] = 1
    return torch.stack([vals, marks], -1), (vals * marks).sum(1, keepdim=True)


class MyRNN(nn.Module):
    def __init__(self, n_in, n_hid, n_out):
        super().__init__()
        self.n_hid = n_hid
        self.U = nn.Parameter(torch.randn(n_in, n_hid) * 0.3)
        self.W = nn.Parameter(torch.randn(n_hid, n_hid) * 0.3)
        self.b = nn.Parameter(torch.zeros(n_hid))
        self.out = nn.Linear(n_hid, n_out)

    def forward(self, x):
        h = torch.zeros(x.size(0), self.n_hid)
        for t in range(x.size(1)):
            h = torch.relu(x[:, t] @ self.U + h @ self.W + self.b)
        return self.out(h)


rnn = MyRNN(2, HID, 1)
opt = torch.optim.RMSprop(rnn.parameters(), lr=1e-3)
for step in range(60):
    x, y = batch(32)
    loss = ((rnn(x) - y) ** 2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    if step % 10 == 0:
        print("step", step, "mse", loss.item())
