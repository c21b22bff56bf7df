"""Why is my loss inf? A run that breaks, its diagnosis, and the cure: python examples/loss_is_inf.py

The net is deep, its weights are drawn from N(0, 1), and scikit-learn's diabetes data are used as they come: blood
values up to 300, targets up to 346. The command asks the same question of the same file, about what `setup` returns:

    initlab doctor examples/loss_is_inf.py:setup
"""

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import initlab

Batch = tuple[Tensor, Tensor]

loss_fn = initlab.supervised(nn.MSELoss())  # of a model and a batch of (x, y)


def setup():
    """The run as it is: what `initlab doctor FILE:setup` and `initlab.diagnose` take."""
    x, y = load_diabetes(return_X_y=True, scaled=False)
    batch = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None]
    hidden = [layer for _ in range(24) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), *hidden, nn.Linear(64, 1))
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # the mistake: each layer multiplies the signal by about 6
    return model, batch, loss_fn, torch.optim.SGD(model.parameters(), lr=0.01)


def train(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    model, batch, _, optimizer = setup()
    print("the first losses as it is:", train(model, batch, optimizer, steps=3))

    # From the start again: weights that are NaN have nothing to tell. A diagnosis changes nothing of yours.
    model, batch, _, optimizer = setup()
    diagnosis = initlab.diagnose(model, batch, loss_fn, optimizer)
    print(f"\n{diagnosis}")
    while diagnosis.verdict == "broken":  # one fault may hide behind another
        cause = diagnosis.causes[0]
        print(f"\n{cause.explanation}\n{cause.remedy}")
        # A remedy is code to paste, with model, batch and optimizer in scope. Here it is run as it is printed.
        scope = {"torch": torch, "initlab": initlab, "model": model, "batch": batch, "optimizer": optimizer}
        exec(cause.remedy, scope)
        batch = scope["batch"]
        diagnosis = initlab.diagnose(model, batch, loss_fn, optimizer)
        print("now:", diagnosis.text().splitlines()[0])

    losses = train(model, batch, optimizer, steps=100)
    print(f"\ncured: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")


if __name__ == "__main__":
    main()
