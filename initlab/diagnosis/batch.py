"""The tensors of a batch: where they lie in it, which of them the model reads, how each feature is scaled."""

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, SequenceKey, tree_map

from initlab.kernels.torch_internals import physical

from .._tree import items_in
from .limits import LIMITS
from .stats import spread_out

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
    """One tensor of the batch, or one array of numpy's.

    Args:
        path: keys, indices and names of attributes that lead to it; empty where the batch is the tensor.
        tensor: it, or a view of the array.
        is_target: whether the model does not read it.
        source: what the batch holds.
    """

    path: tuple[Any, ...]
    tensor: Tensor
    is_target: bool
    source: Any = field(default=None, repr=False)
    features: Features | None = field(default=None, repr=False)

    @property
    def code(self) -> str:
        """An expression for what the batch holds."""
        return "batch" + "".join(f".{key.name}" if isinstance(key, GetAttrKey) else f"[{key!r}]" for key in self.path)

    @property
    def value(self) -> str:
        """An expression for it as a tensor."""
        return f"torch.from_numpy({self.code})" if self._is_array else self.code

    @property
    def _is_array(self) -> bool:
        return self.source is not None and not isinstance(self.source, Tensor)

    def rebind(self, batch: Any, expression: str) -> str:
        """A statement that puts a new tensor in its place."""
        made = f"({expression}).numpy()" if self._is_array else expression
        if not self.path:
            return f"batch = {made}"
        key, holder = self.path[-1], self._holder(batch)
        if len(self.path) == 1 and type(batch) is tuple:
            before = f"*batch[:{key}], " if key else ""
            after = f"*batch[{key + 1}:]" if key + 1 < len(batch) else ""
            return f"batch = ({before}{made}, {after})"
        if len(self.path) == 1 and isinstance(batch, dict) and type(batch) is dict:
            return f"batch = batch | {{{key!r}: {made}}}"
        if len(self.path) == 1 and isinstance(batch, tuple) and hasattr(batch, "_fields"):
            return f"batch = batch._replace({batch._fields[key]}={made})"
        if len(self.path) == 1 and isinstance(key, GetAttrKey) and _is_frozen(batch):
            return f"import dataclasses\nbatch = dataclasses.replace(batch, {key.name}={made})"
        if type(holder) is tuple:  # inside something else, which gets another one
            outer = dataclasses.replace(self, path=self.path[:-1], source=None)
            before = f"*{outer.code}[:{key}], " if key else ""
            after = f"*{outer.code}[{key + 1}:]" if key + 1 < len(holder) else ""
            return outer.rebind(batch, f"({before}{made}, {after})")
        if isinstance(holder, tuple) or _is_frozen(holder):
            return f"{self.value}.copy_({expression})"
        return f"{self.code} = {made}"

    def _holder(self, batch: Any) -> Any:
        """What holds it directly."""
        for key in self.path[:-1]:
            batch = getattr(batch, key.name) if isinstance(key, GetAttrKey) else batch[key]
        return batch


def _is_frozen(value: Any) -> bool:
    """Whether a value is a dataclass whose fields cannot be assigned."""
    return dataclasses.is_dataclass(value) and getattr(value, "__dataclass_params__").frozen  # noqa: B009


def _is_array(value: Any) -> bool:
    """Whether a value is an array of numpy's that a tensor can be a view of."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc" and value.ndim > 0


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.from_numpy(value)
    except (TypeError, ValueError):  # big-endian, negative strides, uint16
        return torch.tensor(value.astype("f8") if value.dtype.kind == "f" else value.astype("i8"))


def _held(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The tensors and arrays in a batch, each with its path."""
    if isinstance(value, Tensor) or _is_array(value):
        yield path, value
        return
    for key, item in items_in(value):
        step = key if isinstance(key, GetAttrKey) else key.idx if isinstance(key, SequenceKey) else key.key
        yield from _held(item, (*path, step))


def leaves(batch: Any) -> list[Leaf]:
    """The tensors of a batch; targets are those named so, and the last of a tuple or list."""
    found = [Leaf(path, _as_tensor(held), False, held) for path, held in _held(batch)]
    for leaf in found:
        if not leaf.path:
            continue
        last, first = leaf.path[-1], leaf.path[0]
        name = last.name if isinstance(last, GetAttrKey) else last
        if isinstance(batch, tuple) and hasattr(batch, "_fields") and len(leaf.path) == 1:
            name = batch._fields[first]
        if isinstance(name, str):
            leaf.is_target = name.lower() in _TARGET_NAMES
        elif isinstance(batch, list | tuple):
            leaf.is_target = first == len(batch) - 1 > 0
    return found


def mapped(batch: Any, change: Callable[[Any], Any]) -> Any:
    """A batch of the same kind whose tensors and arrays are what `change` makes of them."""
    if isinstance(batch, Tensor) or _is_array(batch):
        return change(batch)
    if isinstance(batch, tuple):
        made = [mapped(item, change) for item in batch]
        return type(batch)(*made) if hasattr(batch, "_fields") else tuple(made)
    if isinstance(batch, list):
        return [mapped(item, change) for item in batch]
    if isinstance(batch, Mapping):
        twin = copy.copy(batch)
        if hasattr(twin, "data") and isinstance(twin.data, dict):  # a UserDict, whose copy may share it
            twin.data = dict(twin.data)
        for key, item in batch.items():
            twin[key] = mapped(item, change)  # type: ignore[index]
        return twin
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        copied: Any = copy.copy(batch)
        for each in dataclasses.fields(batch):
            if hasattr(batch, each.name):
                object.__setattr__(copied, each.name, mapped(getattr(batch, each.name), change))
        return copied
    return tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, batch)


def features(tensor: Tensor) -> Features | None:
    """What there is to know of a floating tensor's features; None where it has none."""
    tensor = physical(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta or tensor.dim() == 0:
        return None
    if tensor.layout != torch.strided:  # a sparse matrix has no columns to look at
        return None
    x = tensor.detach()
    x = x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(-1, 1)
    if x.shape[1] > LIMITS.most_features:
        return None
    if x.shape[0] * x.shape[1] > LIMITS.most_input_elements:
        x = x[spread_out(x.shape[0], LIMITS.most_input_elements // x.shape[1])]
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
