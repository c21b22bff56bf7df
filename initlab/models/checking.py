"""Whether the values that a tensor has can have come from what its code was read to write.

Each test is exact for any number of elements, with no approximation of a distribution of its own: what is refused with
probability less than a level, if the code was read rightly, is refused with less than that level.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from initlab.kernels import Constant, Distribution, Normal, TruncatedNormal, Uniform

from ..distributed.dtensors import local
from .entry_points import uncounted_code
from .naming import TensorRef
from .specs import FillSpec

LEVEL = 1e-4  # false refusals, of a whole model
_TESTS = 3  # of a tensor
_CELLS = 256
_SAMPLE = 1 << 15  # elements that are looked at
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
    tensor = ref.tensor.detach()
    values = local(tensor)
    if values.layout != torch.strided or values.numel() == 0:
        return None
    level = LEVEL / (max(1, tensors) * _TESTS)
    whole = values is tensor
    for index, (part, distribution) in enumerate(spec.fills):
        if part is None and len(spec.fills) > 1:
            continue  # later fills have changed a part of it
        if part is not None and (not whole or any(other != part for other, _ in spec.fills[index + 1 :])):
            continue
        found = _differs(values if part is None else values.narrow(*part), distribution, level)
        if found:
            return f"by {spec.why} it would be {distribution}, and {found}"
    return None


def two_sample_mismatch(held: Tensor, drawn: Tensor, level: float) -> bool:
    """Whether two tensors' values cannot come from one distribution, by Kolmogorov's and Smirnov's distance.

    The bound is Massart's for each of the two samples.
    """
    a, b = (_sample(t).sort().values for t in (held, drawn))
    ends = torch.cat([a, b])
    distance = max(
        float(
            (torch.searchsorted(a, ends, right=right) / len(a) - torch.searchsorted(b, ends, right=right) / len(b))
            .abs()
            .max()
        )
        for right in (False, True)
    )
    size = 1 / (len(a) ** -0.5 + len(b) ** -0.5) ** 2
    return bool(a.isnan().any()) or 4 * math.exp(-2 * size * distance**2) < level


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
        version, explained = _version(ref.tensor), self.explained(ref.tensor)
        if version <= explained:
            return None
        return f"it has been written {version} times, and the code that was read explains {explained}"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _differs(values: Tensor, distribution: Distribution, level: float) -> str:
    """What is wrong with values that should come from a distribution; empty if nothing is."""
    if isinstance(distribution, Constant):
        wanted = torch.full((), distribution.value, dtype=values.dtype, device=values.device)
        same = (
            torch.isclose(values, wanted, rtol=1e-5, atol=0.0) if values.dtype.is_floating_point else values == wanted
        )
        return "" if bool(same.all()) else "its values are not"
    if not values.dtype.is_floating_point or distribution.stddev == 0:
        return ""
    sample = _sample(values)
    if bool(sample.isnan().any()):
        return "it holds NaN"
    count = len(sample)
    if not bool(sample.any()) and (count > 3 or values.element_size() > 2):
        return "it is zero"
    # A value in a tensor is one that was rounded: what was drawn lies within half a step of it.
    step = sample.abs() * torch.finfo(values.dtype).eps
    low, high = _cumulative(distribution, sample - step), _cumulative(distribution, sample + step)
    if low is None or high is None:
        return ""
    if not _is_within(distribution, sample, step):
        return "its values lie outside"
    # The least chance of a value as far out as the one farthest out, of so many.
    if 2 * count * float(torch.minimum(high, 1 - low).clamp_min(0).min()) < level:
        return "some of its values lie much too far out"
    # All of them between two values with so little chance between them.
    width = float(high.max() - low.min())
    if count > 1 and count * width ** (count - 1) < level:
        return "its values lie much too close to each other"
    # Kolmogorov and Smirnov's distance, with Massart's bound on it: P(distance > d) <= 2 exp(-2 count d^2). It is taken
    # at the ends of cells of equal chance, where it is no larger than anywhere: that needs no sorting.
    ends = torch.arange(1, _CELLS + 1, dtype=torch.float64, device=sample.device) / _CELLS
    at_most, at_least = _share(low), _share(high)
    distance = max(float((ends - at_most).max()), float((at_least - ends).max()))
    return "its values are another distribution's" if 2 * math.exp(-2 * count * max(0.0, distance) ** 2) < level else ""


def _share(chances: Tensor) -> Tensor:
    """Which share of the values lies below the end of each cell."""
    cells = (chances * _CELLS).floor_().clamp_(0, _CELLS - 1).long()
    return torch.bincount(cells, minlength=_CELLS).cumsum(0) / len(chances)


def _sample(values: Tensor) -> Tensor:
    """Some of the values: all of a small tensor, every few of a large one."""
    count = values.numel()
    if count <= _SAMPLE:
        return values.reshape(-1).double()
    places = (torch.arange(_SAMPLE, device=values.device) * _SPREAD) % count
    places = (places,) if values.is_contiguous() else torch.unravel_index(places, values.shape)  # type: ignore[assignment]
    return (values.view(-1) if values.is_contiguous() else values)[places].double()


def _cumulative(distribution: Distribution, x: Tensor) -> Tensor | None:
    """The chance of a value up to x; None where float64 does not tell it well."""
    if isinstance(distribution, Uniform):
        return ((x - distribution.low) / (distribution.high - distribution.low)).clamp(0, 1)
    if isinstance(distribution, Normal):
        return torch.special.ndtr((x - distribution.mean) / distribution.std)
    if not isinstance(distribution, TruncatedNormal):
        return None
    bounds = torch.tensor([distribution.low, distribution.high], dtype=torch.float64, device=x.device)
    ends = torch.special.ndtr((bounds - distribution.mean) / distribution.std)
    mass = float(ends[1] - ends[0])
    if mass < 1e-9:
        return None
    return ((torch.special.ndtr((x - distribution.mean) / distribution.std) - ends[0]) / mass).clamp(0, 1)


def _is_within(distribution: Distribution, x: Tensor, step: Tensor) -> bool:
    if not isinstance(distribution, Uniform | TruncatedNormal):
        return True
    slack = step + 1e-6 * max(abs(distribution.low), abs(distribution.high), distribution.stddev)
    slack = slack if math.isfinite(float(slack.max())) else step
    return bool(((x + slack >= distribution.low) & (x - slack <= distribution.high)).all())
