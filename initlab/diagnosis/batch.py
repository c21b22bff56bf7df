"""The tensors of a batch: where they lie in it, which of them the model reads, how each feature is scaled."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, SequenceKey

from .._tree import tensors_with_paths
from .limits import LIMITS

_TARGET_NAMES = ("target", "targets", "label", "labels", "y", "y_true", "classes")


@dataclass
class Features:
    """The features of a floating tensor: its last dimension.

    Args:
        bad: features that hold NaN or infinities.
        bad_rows: how many rows do.
        mean: of the finite values of each feature.
        reach: the largest distance from that mean.
        rms: root mean square of each feature.
    """

    bad: list[int]
    bad_rows: int
    rows: int
    mean: Tensor
    reach: Tensor
    rms: Tensor


@dataclass
class Leaf:
    """One tensor of the batch.

    Args:
        path: keys and indices that lead to it; empty where the batch is the tensor.
        is_target: whether the model does not read it.
    """

    path: tuple[Any, ...]
    tensor: Tensor
    is_target: bool
    features: Features | None = field(default=None, repr=False)

    @property
    def code(self) -> str:
        """An expression for it."""
        return "batch" + "".join(f"[{key!r}]" for key in self.path)

    def rebind(self, batch: Any, expression: str) -> str:
        """A statement that puts a new tensor in its place."""
        if not self.path:
            return f"batch = {expression}"
        key = self.path[0]
        if len(self.path) == 1 and type(batch) is tuple:
            before = f"*batch[:{key}], " if key else ""
            after = f"*batch[{key + 1}:]" if key + 1 < len(batch) else ""
            return f"batch = ({before}{expression}, {after})"
        if len(self.path) == 1 and isinstance(batch, dict):
            return f"batch = batch | {{{key!r}: {expression}}}"
        return f"{self.code}.copy_({expression})"


def leaves(batch: Any) -> list[Leaf]:
    """The tensors of a batch; targets are those named so, and the last of a tuple or list."""
    found = []
    for path, tensor in tensors_with_paths(batch):
        if not any(isinstance(key, GetAttrKey) for key in path):  # probes cannot replace what a dataclass has
            keys = tuple(key.idx if isinstance(key, SequenceKey) else key.key for key in path)
            found.append(Leaf(keys, tensor, False))
    for leaf in found:
        if leaf.path and isinstance(leaf.path[-1], str):
            leaf.is_target = leaf.path[-1].lower() in _TARGET_NAMES
        elif leaf.path and isinstance(batch, list | tuple):
            leaf.is_target = leaf.path[0] == len(batch) - 1 > 0
    return found


def features(tensor: Tensor) -> Features | None:
    """What there is to know of a floating tensor's features; None where it has none."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta or tensor.dim() == 0:
        return None
    x = tensor.detach()
    x = x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(-1, 1)
    if x.shape[1] > LIMITS.most_features:
        return None
    if x.shape[0] * x.shape[1] > LIMITS.most_input_elements:
        x = x[:: -(-x.shape[0] * x.shape[1] // LIMITS.most_input_elements)]
    x = x.double()
    finite = x.isfinite()
    bad = ~finite
    known = torch.where(finite, x, 0.0)
    count = finite.sum(0).clamp_min(1)
    mean = known.sum(0) / count
    reach = torch.where(finite, (x - mean).abs(), 0.0).amax(0)
    rms = (known.square().sum(0) / count).sqrt()
    return Features(
        bad=bad.any(0).nonzero().flatten().tolist(),
        bad_rows=int(bad.any(1).sum()),
        rows=x.shape[0],
        mean=mean.cpu(),
        reach=reach.cpu(),
        rms=rms.cpu(),
    )


def standardised(tensor: Tensor) -> Tensor:
    """An input with mean 0 and standard deviation 1 in each feature; as a whole where it is an image."""
    rows = tuple(range(tensor.dim())) if tensor.dim() > 3 else tuple(range(max(1, tensor.dim() - 1)))
    x = tensor.detach().double()
    spread = x.std(rows, correction=0, keepdim=True)
    made = (x - x.mean(rows, keepdim=True)) / torch.where(spread > 0, spread, 1.0)
    return made.to(tensor.dtype).requires_grad_(tensor.requires_grad)
