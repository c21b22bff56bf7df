import numpy as np
import torch
from torch import nn
from sklearn.datasets import load_diabetes
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler


def load():
    x, y = load_diabetes(return_X_y=True)
    x_tr, x_te, y_tr, y_te = train_test_split(x, y, test_size=0.2, random_state=10)
    sc = StandardScaler().fit(x_tr)
    to = lambda a: torch.from_numpy(np.asarray(a, dtype=np.float32))
    return to(sc.transform(x_tr)), to(sc.transform(x_te)), to(y_tr).unsqueeze(1), to(y_te).unsqueeze(1)


def build(width=32):
    return nn.Sequential(
        nn.Linear(10, width), nn.Tanh(),
        nn.Linear(width, width), nn.Tanh(),
        nn.Linear(width, 1),
    )


def train(model, x, y, epochs=40, lr=1e-3, bs=32):
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    crit = nn.MSELoss()
    for ep in range(epochs):
        for idx in torch.randperm(len(x)).split(bs):
            loss = crit(model(x[idx]), y[idx])
            opt.zero_grad()
            loss.backward()
            opt.step()
        if ep % 10 == 9:
            print(f"epoch {ep + 1}: mse {loss.item():.2f}")


def main():
    torch.manual_seed(10)
    x_tr, x_te, y_tr, y_te = load()
    model = build()
    train(model, x_tr, y_tr)
    with torch.no_grad():
        print("R2 on test:", r2_score(y_te.numpy(), model(x_te).numpy()))


main()
