"""Whether the values that a tensor has can have come from what its code was read to write.

Each test is exact for any number of elements, with no approximation of a distribution of its own: what is refused with
probability less than a level, if the code was read rightly, is refused with less than that level.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from initlab.kernels import Constant, Distribution, Normal, TruncatedNormal, Uniform

from ..distributed.dtensors import is_dtensor, local
from .entry_points import uncounted_code
from .naming import TensorRef
from .specs import FillSpec

LEVEL = 1e-4  # false refusals, of a whole model
_TESTS = 3  # of a tensor
_CELLS = 256
_SAMPLE = 1 << 15  # elements that are looked at
_GROUP = 16  # neighbours in memory, which cost one read of it
_SPREAD = 2654435761  # odd, 2^32 / golden ratio: its multiples reach all rows and columns


def mismatch(ref: TensorRef, spec: FillSpec, tensors: int) -> str | None:
    """Why a tensor's values cannot be what a spec says; None where they can, or nothing tells.

    Args:
        ref: the parameter.
        spec: what the model's code was read to fill it with.
        tensors: how many tensors the model has, over which the level is spread.

    Example:
        >>> import torch
        >>> from initlab.kernels import Uniform
        >>> from initlab.models.checking import mismatch
        >>> from initlab.models.naming import tensor_refs
        >>> from initlab.models.specs import whole_fill
        >>> layer = torch.nn.Linear(64, 1024)
        >>> ref = tensor_refs(layer)[0][0]
        >>> mismatch(ref, whole_fill(Uniform(-0.125, 0.125), "Linear"), 2)
        >>> print(mismatch(ref, whole_fill(Uniform(-0.13, 0.13), "Linear"), 2))
        by Linear it would be uniform[-0.13, 0.13), and its values lie much too close to each other
    """
    values = local(ref.tensor).detach()  # in this order: detach fails for a DTensor made in inference mode
    if values.layout != torch.strided or values.numel() == 0:
        return None
    level = LEVEL / (max(1, tensors) * _TESTS)
    whole = ref.kind != "dtensor"
    for index, (part, distribution) in enumerate(spec.fills):
        if part is None and len(spec.fills) > 1:
            continue  # later fills have changed a part of it
        if part is not None and (not whole or any(other != part for other, _ in spec.fills[index + 1 :])):
            continue
        found = _differs(values if part is None else values.narrow(*part), distribution, level)
        if found:
            return f"by {spec.why} it would be {distribution}, and {found}"
    return None


_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")


def two_sample_mismatch(held: Tensor, drawn: Tensor, level: float) -> bool:
    """Whether two tensors' values cannot come from one distribution, by Kolmogorov's and Smirnov's distance.

    The bound is Massart's for each of the two samples.
    """
    a, b = (_sorted_sample(t) for t in (held, drawn))
    ends = np.concatenate([a, b])
    distance = max(
        float(np.abs(np.searchsorted(a, ends, side) / len(a) - np.searchsorted(b, ends, side) / len(b)).max())
        for side in _SIDES
    )
    size = 1 / (len(a) ** -0.5 + len(b) ** -0.5) ** 2
    return bool(np.isnan(a).any()) or 4 * math.exp(-2 * size * distance**2) < level


class MetaWrites:
    """On the meta device there are no values: only how often a tensor has been written to in place tells.

    Args:
        model: the model.
        refs: its parameters.
        resets: by the id of a tensor, how often reset_parameters writes to it.
        every: the same, with all other code that was read.
    """

    def __init__(
        self, model: nn.Module, refs: Sequence[TensorRef], resets: Mapping[int, int], every: Mapping[int, int]
    ) -> None:
        self.unseen = uncounted_code(model)
        self.unseen_of_shards = uncounted_code(model, sharded=True) if any(is_dtensor(r.tensor) for r in refs) else {}
        self.resets, self.every = resets, every
        alone = [ref for ref in refs if ref.tensor.is_meta and len(ref.places) == 1]
        self.skipped = any(_version(ref.tensor) < every.get(id(ref.tensor), 0) for ref in alone)

    def explained(self, tensor: Tensor) -> int:
        """How many writes to a tensor the code that was read explains.

        transformers does not call `_init_weights` on the meta device. Then that explains none, but a single one in the
        constructor of a layer that is not torch's does not matter to a tensor that `_init_weights` would write anew.
        """
        resets, every = (counts.get(id(tensor), 0) for counts in (self.resets, self.every))
        return max(resets, 1) if self.skipped and every > resets else every

    def mismatch(self, ref: TensorRef, spec: FillSpec) -> str | None:
        """Why a parameter may hold something else than a spec says; None where nothing tells."""
        if spec.guess:
            return "no code that can be read writes it, and on the meta device it has no values to check a guess by"
        for owner, _ in ref.places:
            if id(owner) in self.unseen:
                return f"{self.unseen[id(owner)]} may write to it, and on the meta device that shows nowhere"
            # What `_init_weights` writes it writes after a constructor.
            written_anew = self.every.get(id(ref.tensor), 0) > self.resets.get(id(ref.tensor), 0)
            if is_dtensor(ref.tensor) and id(owner) in self.unseen_of_shards and not written_anew:
                return (
                    f"{self.unseen_of_shards[id(owner)]} may write to it, and of a sharded parameter on the meta "
                    "device that shows nowhere: record the build before sharding"
                )
        version, explained = _version(ref.tensor), self.explained(ref.tensor)
        if version <= explained:
            return None
        return f"it has been written {version} times, and the code that was read explains {explained}"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _differs(values: Tensor, distribution: Distribution, level: float) -> str:
    """What is wrong with values that should come from a distribution; empty if nothing is."""
    if isinstance(distribution, Constant):
        return "" if _all_are(values, distribution.value) else "its values are not"
    if not values.dtype.is_floating_point or distribution.stddev == 0:
        return ""
    x = _sorted_sample(values)
    count, eps = len(x), torch.finfo(values.dtype).eps
    least, most = float(x[0]), float(x[-1])
    if math.isnan(most):  # NaN is sorted last
        return "it holds NaN"
    if least == most == 0.0 and (count > 3 or values.element_size() > 2):
        return "it is zero"
    limits = _limits(distribution, eps)
    if limits is None:
        return ""
    # A value in a tensor is one that was rounded: what was drawn lies within half a step of it. All of this rises with
    # the value, so that the ends of the sorted sample decide for every value between them.
    step_of_least, step_of_most = (abs(end) * eps if math.isfinite(end) else 0.0 for end in (least, most))
    if not _is_within(distribution, least + step_of_least, most - step_of_most):
        return "its values lie outside"
    # The least chance of a value as far out as the one farthest out, of so many.
    below, above = _below(distribution, least + step_of_least), 1 - _below(distribution, most - step_of_most)
    if 2 * count * max(0.0, min(below, above)) < level:
        return "some of its values lie much too far out"
    # All of them between two values with so little chance between them.
    width = _below(distribution, most + step_of_most) - _below(distribution, least - step_of_least)
    if count > 1 and count * width ** (count - 1) < level:
        return "its values lie much too close to each other"
    # Kolmogorov and Smirnov's distance, with Massart's bound on it: P(distance > d) <= 2 exp(-2 count d^2). It is taken
    # at the ends of cells of equal chance, where it is no larger than anywhere.
    at_most, at_least = np.searchsorted(x, limits) / count
    distance = max(0.0, float((_ENDS - at_most).max()), float((at_least - _ENDS).max()))
    return "its values are another distribution's" if 2 * math.exp(-2 * count * distance**2) < level else ""


def _all_are(values: Tensor, constant: complex) -> bool:
    wanted = torch.full((), constant, dtype=values.dtype, device=values.device)
    if not values.dtype.is_floating_point:
        return bool((values == wanted).all())
    least, most = (float(end) for end in torch.aminmax(values))  # NaN if there is one
    value = float(wanted)
    near = 1e-5 * abs(value) if math.isfinite(value) else 0.0
    return value - near <= least and most <= value + near


def _sorted_sample(values: Tensor) -> np.ndarray[Any, Any]:
    """Some of the values, in float32 or float64: all of a small tensor, every few of a large one."""
    count = values.numel()
    if count <= _SAMPLE:
        sample = values.reshape(-1)
    elif values.is_contiguous():
        groups = values.view(-1)[: count // _GROUP * _GROUP].view(-1, _GROUP)
        sample = groups[_groups(len(groups)).to(values.device)].view(-1)
    else:
        places = (_groups(count // _GROUP)[:, None] * _GROUP + torch.arange(_GROUP, device="cpu")).flatten()
        sample = values[torch.unravel_index(places.to(values.device), values.shape)]
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    # A copy: numpy() makes the memory that it shares one that cannot be resized, which FSDP does with its parameters.
    x: np.ndarray[Any, Any] = sample.to("cpu", dtype, copy=True).resolve_neg().numpy()
    x.sort()
    return x


@functools.lru_cache(maxsize=32)
def _groups(count: int) -> Tensor:
    """Which of `count` groups of neighbouring elements are looked at."""
    return torch.from_numpy(np.arange(_SAMPLE // _GROUP, dtype=np.int64) * _SPREAD % count)


# Distributions: chances in float64.

_ENDS = np.arange(1, _CELLS) / _CELLS  # of cells of equal chance; below the last end lies all


@functools.lru_cache(maxsize=256)
def _limits(distribution: Distribution, eps: float) -> np.ndarray[Any, Any] | None:
    """At each end of a cell, below what a value lies if what was drawn may lie below the end, and if it must.

    None where float64 does not tell it well.
    """
    if isinstance(distribution, Uniform):
        ends = distribution.low + _ENDS * (distribution.high - distribution.low)
    elif isinstance(distribution, Normal):
        ends = distribution.mean + distribution.std * _normal_ends(0.0, 1.0)
    elif isinstance(distribution, TruncatedNormal):
        below, above = (_normal_below(distribution, bound) for bound in (distribution.low, distribution.high))
        if above - below < 1e-9:
            return None
        ends = distribution.mean + distribution.std * _normal_ends(below, above)
    else:
        return None
    smaller, larger = ends / (1 + eps), ends / (1 - eps)  # in magnitude
    return np.stack([np.maximum(smaller, larger), np.minimum(smaller, larger)])


def _normal_ends(below: float, above: float) -> np.ndarray[Any, Any]:
    """What a standard normal stays below with chances from `below` to `above`, as far apart as the ends of cells."""
    chances = torch.from_numpy(below + _ENDS * (above - below))
    ends: np.ndarray[Any, Any] = torch.special.ndtri(chances).numpy()
    return ends


def _normal_below(distribution: Normal | TruncatedNormal, x: float) -> float:
    return 0.5 * math.erfc((distribution.mean - x) / (distribution.std * math.sqrt(2.0)))


def _below(distribution: Any, x: float) -> float:
    """The chance of a value up to x."""
    if isinstance(distribution, Normal):
        return _normal_below(distribution, x)
    if isinstance(distribution, Uniform):
        chance = (x - distribution.low) / (distribution.high - distribution.low)
    else:
        low, high = (_normal_below(distribution, bound) for bound in (distribution.low, distribution.high))
        chance = (_normal_below(distribution, x) - low) / (high - low)
    return min(max(chance, 0.0), 1.0)


def _is_within(distribution: Distribution, least: float, most: float) -> bool:
    if not isinstance(distribution, Uniform | TruncatedNormal):
        return True
    slack = 1e-6 * max(abs(distribution.low), abs(distribution.high), distribution.stddev)
    slack = slack if math.isfinite(slack) else 0.0
    return least + slack >= distribution.low and most - slack <= distribution.high
