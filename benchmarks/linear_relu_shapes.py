"""linear_relu on the CPU by shape: with flags and without, against the same step by torch's own functions.

``python benchmarks/linear_relu_shapes.py [--threads 1] [--seconds 1.0] [--largest 1e12]`` prints a table in Markdown.
Contestants take turns, and each cell is the median over turns of a ratio of CPU times, torch's over ours: 1.00 is as
fast, more is faster. A shape is measured for `--seconds`, with three turns at least.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from initlab import LinearReLU, linear_relu

SHAPES = [  # M, N, K
    *((1, 64, 64), (1, 1024, 256), (32, 256, 256), (256, 256, 64), (256, 1024, 1024), (2048, 1024, 64)),
    *((2048, 2048, 512), (8192, 1024, 1024), (8192, 8192, 64), (8192, 8192, 1024)),
]
ACTIVATIONS = {"relu": torch.relu, "relu_squared": lambda x: torch.relu(x).square()}


class Squared(nn.Module):
    """What follows ReLU where it is squared."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square()


def turns(contestants: dict[str, Callable[[], None]], seconds: float) -> list[dict[str, float]]:
    """Seconds of the CPU for a call, by contestant, turn by turn."""
    start = time.perf_counter()
    for call in contestants.values():
        call()
    calls = max(1, int(0.002 * len(contestants) / (time.perf_counter() - start)))  # of small ones many at once
    found: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 3:
        times = {}
        for name, call in contestants.items():
            start = time.process_time()
            for _ in range(calls):
                call()
            times[name] = time.process_time() - start
        found.append(times)
    return found


def ratios(
    shape: tuple[int, int, int], dtype: torch.dtype, activation: str, train: bool, seconds: float
) -> list[float]:
    """torch's time over ours with flags, over ours without; torch's time with a check that waits, over ours with flags;
    and that of nn.Linear and nn.ReLU over that of LinearReLU with flags.
    """
    M, N, K = shape
    torch.manual_seed(0)
    x, w, b = ((torch.randn(s) / s[-1] ** 0.5).to(dtype).requires_grad_(train) for s in ((M, K), (N, K), (N,)))
    grad = torch.ones(M, N, dtype=dtype)
    flags = torch.zeros(1, dtype=torch.int32)

    def step(function: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            y = function()
            if train:
                x.grad = w.grad = b.grad = None
                y.backward(grad)

        return call

    def checked() -> torch.Tensor:
        y = F.linear(x, w, b)
        bool(torch.isfinite(y).all())
        return ACTIVATIONS[activation](y)

    ours, theirs = LinearReLU(K, N, activation=activation), nn.Sequential(nn.Linear(K, N), nn.ReLU())
    ours.weight, ours.bias, ours.flags = nn.Parameter(w, train), nn.Parameter(b, train), flags
    theirs[0].weight, theirs[0].bias = ours.weight, ours.bias
    if activation == "relu_squared":
        theirs.append(Squared())

    found = turns(
        {
            "torch": step(lambda: ACTIVATIONS[activation](F.linear(x, w, b))),
            "flags": step(lambda: linear_relu(x, w, b, flags=flags, activation=activation)),
            "none": step(lambda: linear_relu(x, w, b, activation=activation)),
            "checked": step(checked),
            "modules": step(lambda: theirs(x)),
            "module": step(lambda: ours(x)),
        },
        seconds,
    )
    assert int(flags) == 0
    pairs = ("torch", "flags"), ("torch", "none"), ("checked", "flags"), ("modules", "module")
    return [statistics.median(times[one] / times[other] for times in found) for one, other in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--activation", choices=ACTIVATIONS, action="append")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--largest", type=float, default=1e12, help="leave out shapes of more multiplications")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    columns = "M x N x K", "", "", "with flags", "without", "with flags, torch with isfinite", "modules"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for activation in arguments.activation or ACTIVATIONS:
        for dtype in [getattr(torch, name) for name in arguments.dtype or ("float32", "bfloat16")]:
            for train in (False, True):
                what = f"{activation}, {str(dtype)[6:]}", "training" if train else "inference"
                for shape in [shape for shape in SHAPES if math.prod(shape) <= arguments.largest]:
                    cells = [f"{ratio:.2f}" for ratio in ratios(shape, dtype, activation, train, arguments.seconds)]
                    print(f"| {' x '.join(map(str, shape))} | {' | '.join([*what, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
