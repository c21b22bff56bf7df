import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(5)

# stochastic block model, 3 communities
N, K = 210, 3
block = torch.arange(N) % K
same = block[:, None] == block[None, :]
P = torch.where(same, torch.tensor(0.04), torch.tensor(0.004))
upper = torch.triu((torch.rand(N, N) < P).float(), diagonal=1)
A = upper + upper.T

feats = F.one_hot(block, K).float() + 1.0 * torch.randn(N, K)
feats = torch.cat([feats, torch.randn(N, 5)], dim=1)

train_idx = torch.randperm(N)[:90]
test_idx = torch.tensor([i for i in range(N) if i not in set(train_idx.tolist())])


def normalize_adj(adj):
    deg = adj.sum(dim=1)
    d_inv_sqrt = torch.diag(deg.pow(-0.5))
    return d_inv_sqrt @ adj @ d_inv_sqrt


class GCNLayer(nn.Module):
    def __init__(self, fin, fout):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fin, fout))
        self.bias = nn.Parameter(torch.zeros(fout))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, a_hat, h):
        return a_hat @ (h @ self.weight) + self.bias


class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.g1 = GCNLayer(feats.size(1), 16)
        self.g2 = GCNLayer(16, K)

    def forward(self, a_hat, x):
        h = F.relu(self.g1(a_hat, x))
        h = F.dropout(h, 0.2, self.training)
        return self.g2(a_hat, h)


a_hat = normalize_adj(A)
net = GCN()
optim = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=5e-4)

for ep in range(150):
    net.train()
    optim.zero_grad()
    out = net(a_hat, feats)
    loss = F.cross_entropy(out[train_idx], block[train_idx])
    loss.backward()
    optim.step()
    if ep % 30 == 0 or ep == 149:
        net.eval()
        with torch.no_grad():
            acc = (net(a_hat, feats)[test_idx].argmax(1) == block[test_idx]).float().mean()
        print("epoch", ep, "loss %.4f" % loss.item(), "test acc %.3f" % acc.item())
