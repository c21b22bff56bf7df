"""What is read off a tensor: its range over all elements, its moments over a sample."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from initlab.kernels.torch_internals import physical

from .limits import LIMITS


class Stats(NamedTuple):
    """A tensor in numbers.

    Args:
        low: smallest element; NaN where the tensor holds one.
        high: largest element, likewise.
        mean: over a sample, as all that follows.
        std: about that mean.
        signal: standard deviation over the first dimension, the batch: what tells one row from another.
        zeros: share of exact zeros.
        dead: share of units, columns after the first dimension, that are zero in every row.
        dtype: of the tensor.
    """

    low: float
    high: float
    mean: float
    std: float
    signal: float
    zeros: float
    dead: float
    dtype: torch.dtype
    numel: int
    rows: int

    @property
    def finite(self) -> bool:
        """Whether all elements are."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))

    @property
    def rms(self) -> float:
        """Root mean square."""
        return math.hypot(self.mean, self.std)

    @property
    def headroom(self) -> float:
        """How many times larger the tensor could get before its dtype overflows."""
        if not self.finite:
            return 0.0
        return torch.finfo(self.dtype).max / self.largest if self.largest else math.inf


def spread_out(size: int, count: int) -> Tensor:
    """Some of the indices below a size, in order, at no regular distance.

    Every n-th would fall on one column of every row where n is a multiple of the width. These are multiples of a golden
    section of the size, as Weyl's sequence, which are as even and fall on nothing.
    """
    if count >= size:
        return torch.arange(size)
    step = max(1, round(size * 0.6180339887498949))
    while math.gcd(step, size) > 1:
        step += 1
    return (torch.arange(max(1, count)) * step % size).sort().values


def sample(tensor: Tensor) -> Tensor:
    """Some of a tensor's elements, (rows, columns), float64: rows and columns that are spread out."""
    x = tensor.detach()
    rows = x.shape[0] if x.dim() > 1 else x.numel()
    columns = x.numel() // max(1, rows)
    if x.numel() > LIMITS.sample and x.dim():
        count = max(math.isqrt(LIMITS.sample), LIMITS.sample // max(1, columns))
        x = x[spread_out(rows, count).to(x.device)]
    x = x.reshape(x.shape[0] if x.dim() else 1, -1)
    if x.numel() > LIMITS.sample:
        x = x[:, spread_out(x.shape[1], max(1, LIMITS.sample // x.shape[0])).to(x.device)]
    return x.double()


def stored(tensor: Tensor) -> Tensor:
    """The elements that a tensor stores: a dense one as it is, of a sparse one the values, each index once."""
    if tensor.layout == torch.strided:
        return tensor
    return tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor.values()


def rows_equal(tensor: Tensor) -> bool:
    """Whether all rows of a tensor are equal, bit for bit; the second tells of most that they are not."""
    return bool((tensor[1:2] == tensor[:1]).all()) and bool((tensor == tensor[:1]).all())


def measure(tensor: Tensor) -> Stats | None:
    """The numbers of a tensor; None if it is not floating, or empty, or nowhere."""
    tensor = physical(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta or tensor.layout != torch.strided:
        return None
    low, high = tensor.detach().aminmax()
    x = sample(tensor)
    std, mean = torch.std_mean(x, correction=0)
    signal = x.var(0, correction=0).mean().sqrt() if x.shape[0] > 1 and x.numel() > x.shape[0] else std
    zero = x == 0
    dead = zero.all(0)
    numbers = torch.stack([low.double(), high.double(), mean, std, signal, zero.double().mean(), dead.double().mean()])
    values: list[Any] = [*numbers.tolist(), tensor.dtype, tensor.numel(), x.shape[0]]
    return Stats(*values)


def edge_share(tensor: Tensor, name: str) -> float:
    """The share of an activation's outputs that are within a hundredth of its ends."""
    x = sample(physical(tensor))
    if name == "sigmoid":
        x = 2 * x - 1
    return float((x.abs() > 0.99).double().mean())
