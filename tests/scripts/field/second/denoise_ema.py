import copy
import torch
import torch.nn as nn
from sklearn.datasets import load_digits


class EMA:
    """Keeps an exponential moving average of the weights for evaluation."""

    def __init__(self, model, decay=0.98):
        self.decay = decay
        self.shadow = {k: p.detach().clone() for k, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model):
        for k, p in model.named_parameters():
            p.lerp_(self.shadow[k], self.decay)

    @torch.no_grad()
    def averaged(self, model):
        m = copy.deepcopy(model)
        for k, p in m.named_parameters():
            p.copy_(self.shadow[k])
        return m.eval()


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(1, 16, 3, padding=1)
        self.c2 = nn.Conv2d(16, 16, 3, padding=1)
        self.c3 = nn.Conv2d(16, 1, 3, padding=1)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.c3(self.act(self.c2(self.act(self.c1(x)))))


def main():
    torch.manual_seed(12)
    imgs = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
    train, test = imgs[:1600], imgs[1600:]
    net = Denoiser()
    ema = EMA(net)
    opt = torch.optim.AdamW(net.parameters(), lr=3e-3)
    mse = nn.MSELoss()
    for it in range(200):
        clean = train[torch.randint(0, len(train), (64,))]
        noisy = clean + 0.4 * torch.randn_like(clean)
        loss = mse(net(noisy), clean)
        opt.zero_grad()
        loss.backward()
        opt.step()
        ema.update(net)
        if it % 25 == 0 or it == 199:
            with torch.no_grad():
                t = ema.averaged(net)(test + 0.4 * torch.randn_like(test))
            print(f"it {it} loss {loss.item():.4f} ema test {mse(t, test).item():.4f}")


if __name__ == "__main__":
    main()
