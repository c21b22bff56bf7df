"""The table of signals in docs/my-loss-is-inf.md: how large a signal is after 20 layers, by weights and activation.

``python tools/starting_signals.py`` prints, for 20 layers of 512 units and 256 inputs from N(0, 1), in float64, the
root mean square of the last activations; and, for sigmoids, the standard deviation over the inputs, which tells them
apart.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import initlab

DEPTH, WIDTH, INPUTS = 20, 512, 256

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": torch.relu,
    "leaky ReLU 0.2": lambda x: F.leaky_relu(x, 0.2),
    "GELU": F.gelu,
    "SiLU": F.silu,
    "tanh": torch.tanh,
    "SELU": torch.selu,
    "none": lambda x: x,
    "sigmoid": torch.sigmoid,
}
DISTRIBUTIONS: dict[str, Callable[[Tensor], object]] = {
    "torch's default": lambda w: initlab.init.kaiming_uniform_(w, a=math.sqrt(5)),
    "He": lambda w: initlab.init.kaiming_normal_(w, nonlinearity="relu"),
    "Xavier": initlab.init.xavier_normal_,
    "Xavier, gain 5/3": lambda w: initlab.init.xavier_normal_(w, gain=5 / 3),
    "N(0, 0.02)": lambda w: initlab.init.normal_(w, std=0.02),
    "N(0, 1)": initlab.init.normal_,
}


def signal(distribution: Callable[[Tensor], object], activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The activations after the last layer."""
    torch.manual_seed(0)
    x = torch.randn(INPUTS, WIDTH, dtype=torch.float64)
    for _ in range(DEPTH):
        w = torch.empty(WIDTH, WIDTH, dtype=torch.float64)
        distribution(w)
        x = activation(x @ w.T)
    return x


def main() -> None:
    print("| activation |", " | ".join(DISTRIBUTIONS), "|")
    print("|---" * (len(DISTRIBUTIONS) + 1) + "|")
    for name, activation in ACTIVATIONS.items():
        last = [signal(distribution, activation) for distribution in DISTRIBUTIONS.values()]
        print(f"| {name} |", " | ".join(f"{float(x.square().mean().sqrt()):.2g}" for x in last), "|")
    print("| sigmoid, over the inputs |", " | ".join(f"{float(x.std(0).mean()):.2g}" for x in last), "|")


if __name__ == "__main__":
    main()
