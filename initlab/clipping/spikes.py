"""Spike policies: a limit for the gradient norm that comes from the norms of earlier steps.

A policy is a frozen dataclass and holds no numbers of a run: these are its state, one vector on the device of the
norms. A step makes a new state of it, with tensor operations only, so nothing waits for a GPU. Each operation is one
IEEE operation in a fixed order: on every device a run has the same limits, bit for bit.

>>> import torch
>>> from initlab.clipping import MedianSpikes
>>> policy = MedianSpikes(factor=3.0, window=4, warmup=2)
>>> state = policy.new_state("cpu")
>>> for norm in (1.0, 2.0, 1.5, 60.0):
...     limit, spike, state = policy.step(state, torch.tensor(norm))
...     print(float(limit), bool(spike))
inf False
inf False
4.5 False
4.5 True
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

Action = Literal["clip", "skip"]
_ACTIONS = ("clip", "skip")


class SpikeStep(NamedTuple):
    """What a spike policy says about one norm. All are on the norm's device.

    Attributes:
        limit: the largest norm that this step may have, 0-d, in the dtype of the state; inf where nothing is limited:
            in the warm-up, for a norm that is NaN or inf, and where there is nothing to limit by (only zeros, a
            variance of 0). ZScoreSpikes names no limit for norms that are not spikes.
        spike: whether the norm is beyond the limit, 0-d, bool.
        state: the statistics, this norm included. NaN and inf leave them as they were.
    """

    limit: Tensor
    spike: Tensor
    state: Tensor


class SpikePolicy(ABC):
    """What the spike policies share. Policies are immutable, can be pickled, and are equal where their fields are.

    Attributes:
        kind: what `config` calls the policy.
        action: what is done with a step whose norm is a spike: "clip" scales it down to the limit, "skip" leaves it
            out. The statistics take the norm in the same way under both.
        warmup: how many finite norms come first that are not limited.
    """

    kind: ClassVar[str]
    action: Action
    warmup: int

    @abstractmethod
    def step(self, state: Tensor, norm: Tensor) -> SpikeStep:
        """The limit for a norm, and the statistics after it. `state` is not changed.

        Args:
            state: of `new_state`, `restored_state` or the step before; it is moved to the norm's device.
            norm: 0-d, floating, 0 or more, on any device.

        Raises:
            ValueError: for a state of another length than this policy's.
        """

    @abstractmethod
    def _first_state(self) -> list[float]:
        """The state before the first norm. Its first number counts the finite norms."""

    def new_state(self, device: torch.device | str) -> Tensor:
        """The statistics before the first norm: a vector of fixed length, float64, or float32 on mps."""
        return self.restored_state(self._first_state(), device)

    def restored_state(self, numbers: Sequence[float], device: torch.device | str) -> Tensor:
        """The state whose `tolist()` was saved.

        Raises:
            ValueError: for another number of numbers than this policy's state has.
        """
        device = torch.device(device)
        wide = torch.float32 if device.type == "mps" else torch.float64  # which has no float64
        state = torch.tensor(numbers, dtype=wide, device=device)
        self._check_state(state)
        return state

    def config(self) -> dict[str, Any]:
        """The kind and the fields, as a dict of plain strings and numbers: for checkpoints and `spike_differences`."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]

    def _check_state(self, state: Tensor) -> None:
        length = len(self._first_state())
        if tuple(state.shape) != (length,):
            raise ValueError(
                f"a state of shape {tuple(state.shape)} was passed, and that of {self} has shape ({length},); "
                "begin with new_state(), or use the policy that the state was made by"
            )

    def _begin(self, state: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """State and norm on one device, in one dtype."""
        self._check_state(state)
        state = state.to(norm.device, non_blocking=norm.device.type != "cpu")
        return state, norm.detach().to(state.dtype)

    def _end(self, old: Tensor, new: Tensor, norm: Tensor, limit: Tensor) -> SpikeStep:
        """Leaves the limit out where there is none, and the norm out of the statistics where it is no number."""
        finite = norm.isfinite()
        limits = finite & (old[0] >= self.warmup) & (limit > 0.0)  # a limit of 0 would leave nothing of any gradient
        limit = torch.where(limits, limit, math.inf)
        return SpikeStep(limit, finite & (norm > limit), torch.where(finite, new, old))


@dataclass(frozen=True)
class QuantileSpikes(SpikePolicy):
    """AutoClip: the limit is a quantile of the norms seen so far, the current one included.

    Args:
        q: the quantile, from 0 to 1, interpolated linearly, as numpy.quantile does. The paper's best is 0.1, which
            clips nine of ten steps; 1 limits nothing.
        window: how many of the last norms count. The paper keeps all.
        warmup: how many finite norms come first that are not limited. The paper has none.
        action: "clip" or "skip".

    Raises:
        ValueError: for a q outside [0, 1], a window below 1, a warmup below 0 or an unknown action.

    Source:
        P. Seetharaman, G. Wichern, B. Pardo and J. Le Roux, "AutoClip: Adaptive gradient clipping for source separation
        networks", MLSP 2020.

    Example:
        >>> import torch
        >>> from initlab.clipping import QuantileSpikes
        >>> policy = QuantileSpikes(0.5)
        >>> state = policy.new_state("cpu")
        >>> limits = []
        >>> for norm in (4.0, 2.0, 3.0):
        ...     limit, spike, state = policy.step(state, torch.tensor(norm))
        ...     limits.append(float(limit))
        >>> limits
        [4.0, 3.0, 3.0]
    """

    kind: ClassVar[str] = "quantile"

    q: float
    window: int = 1000
    warmup: int = 0
    action: Action = "clip"

    def __post_init__(self) -> None:
        _set_float(self, "q", lambda q: 0.0 <= q <= 1.0, "from 0 to 1; a percentile is divided by 100")
        _set_int(self, "window", 1)
        _set_int(self, "warmup", 0)
        _check_action(self.action)

    def _first_state(self) -> list[float]:
        return [0.0] + [math.inf] * self.window

    @torch.no_grad()
    def step(self, state: Tensor, norm: Tensor) -> SpikeStep:
        old, norm = self._begin(state, norm)
        new = _pushed(old, norm)
        return self._end(old, new, norm, _quantile(new, self.q))


@dataclass(frozen=True)
class MedianSpikes(SpikePolicy):
    """The limit is a multiple of the median of the last norms, the current one not included.

    A median stays where it is until half of the window is spikes. So the limit also follows a lasting rise, after half
    a window.

    Args:
        factor: more than 0. From norms that are spread as usual, few go beyond 3 medians.
        window: how many of the last norms count.
        warmup: how many finite norms come first that are not limited.
        action: "clip" or "skip".

    Raises:
        ValueError: for a factor that is not a finite number above 0, a window or warmup below 1, or an unknown action.

    Example:
        >>> import torch
        >>> from initlab.clipping import MedianSpikes
        >>> policy = MedianSpikes(2.0, warmup=1)
        >>> state = policy.step(policy.new_state("cpu"), torch.tensor(1.5)).state
        >>> limit, spike, _ = policy.step(state, torch.tensor(7.0))
        >>> limit, spike
        (tensor(3., dtype=torch.float64), tensor(True))
    """

    kind: ClassVar[str] = "median"

    factor: float = 3.0
    window: int = 100
    warmup: int = 25
    action: Action = "clip"

    def __post_init__(self) -> None:
        _set_float(self, "factor", lambda x: 0.0 < x < math.inf, "a finite number above 0")
        _set_int(self, "window", 1)
        _set_int(self, "warmup", 1)
        _check_action(self.action)

    def _first_state(self) -> list[float]:
        return [0.0] + [math.inf] * self.window

    @torch.no_grad()
    def step(self, state: Tensor, norm: Tensor) -> SpikeStep:
        old, norm = self._begin(state, norm)
        return self._end(old, _pushed(old, norm), norm, _quantile(old, 0.5) * self.factor)


@dataclass(frozen=True)
class ZScoreSpikes(SpikePolicy):
    """ZClip: the limit comes from running mean and deviation of the norms.

    A norm x with z = (x - mean) / std beyond the threshold is a spike. Its limit is mean + threshold^2 / z * std: the
    farther out, the closer to the mean. For other norms the limit is inf. Mean and variance are those of the warm-up,
    then moving averages, into which a spike goes with its limit in its place.

    So a lasting rise far beyond the threshold moves them little, and under "skip" every step may be left out from then
    on; MedianSpikes follows it. The paper's code adds 1e-6 to std. Here a std of 0 limits nothing.

    Args:
        threshold: of z; more than 0.
        decay: of the moving averages, between 0 and 1.
        warmup: how many finite norms come first that are not limited.
        action: "clip" or "skip".

    Raises:
        ValueError: for a threshold that is not a finite number above 0, a decay that is not between 0 and 1, a warmup
            below 2 or an unknown action.

    Source:
        A. Kumar, L. Owen, N. R. Chowdhury and F. Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training",
        arXiv 2504.02507, 2025.

    Example:
        >>> import torch
        >>> from initlab.clipping import ZScoreSpikes
        >>> policy = ZScoreSpikes(threshold=2.0, warmup=2)
        >>> state = policy.new_state("cpu")
        >>> for norm in (4.0, 6.0, 9.0):  # the mean of the first two is 5, std is 1, so z of the third is 4
        ...     limit, spike, state = policy.step(state, torch.tensor(norm))
        >>> limit, spike
        (tensor(6., dtype=torch.float64), tensor(True))
    """

    kind: ClassVar[str] = "zscore"

    threshold: float = 2.5
    decay: float = 0.97
    warmup: int = 25
    action: Action = "clip"

    def __post_init__(self) -> None:
        _set_float(self, "threshold", lambda x: 0.0 < x < math.inf, "a finite number above 0")
        _set_float(self, "decay", lambda x: 0.0 < x < 1.0, "more than 0 and less than 1")
        _set_int(self, "warmup", 2)  # one norm has no deviation
        _check_action(self.action)

    def _first_state(self) -> list[float]:
        return [0.0, 0.0, 0.0]  # count, mean, variance

    @torch.no_grad()
    def step(self, state: Tensor, norm: Tensor) -> SpikeStep:
        old, norm = self._begin(state, norm)
        count, mean, variance = old.unbind()
        above = norm - mean
        # threshold^2 / z * std without a root, which torch does not round alike everywhere. It is less than the norm
        # just where z is beyond the threshold.
        limit = mean + variance * self.threshold * self.threshold / above
        limit = torch.where((variance > 0.0) & (above > 0.0) & (norm > limit), limit, math.inf)
        warm = count < self.warmup
        x = torch.where(warm, norm, torch.minimum(norm, limit))
        # As steps towards x, so that equal norms have exactly their mean, and a variance of 0.
        weight = torch.where(warm, 1.0 / (count + 1.0), 1.0 - self.decay)
        deviation = x - mean
        new_mean = mean + weight * deviation
        rest = x - new_mean
        square = torch.where(warm, deviation, rest) * rest  # Welford's in the warm-up, then the paper's
        new_variance = variance + weight * (square - variance)
        new = torch.stack([count + 1.0, new_mean, new_variance])
        # A square may overflow, and no limit would ever come of an infinite variance.
        return self._end(old, torch.where(new_variance.isfinite(), new, old), norm, limit)


def spike_differences(policy: SpikePolicy | None, config: Mapping[str, Any] | None) -> list[str]:
    """How a policy differs from one whose `config()` was saved, a phrase for each field; empty where they are equal.

    Args:
        policy: the policy in force; None for none.
        config: the saved one; None for none.

    Example:
        >>> from initlab.clipping import MedianSpikes, spike_differences
        >>> saved = MedianSpikes(window=50).config()
        >>> spike_differences(MedianSpikes(window=80), saved)
        ['window is 80, and was 50']
    """
    now = {"kind": None} if policy is None else policy.config()
    then = {"kind": None} if config is None else dict(config)
    if now["kind"] != then.get("kind"):
        return [f"kind is {now['kind']!r}, and was {then.get('kind')!r}"]
    names = [*now, *(name for name in then if name not in now)]
    return [
        f"{name} is {now.get(name)!r}, and was {then.get(name)!r}" for name in names if now.get(name) != then.get(name)
    ]


def _pushed(state: Tensor, norm: Tensor) -> Tensor:
    """Count and ring of norms with one more norm, in the place of the oldest. Places not yet filled hold inf."""
    count, ring = state[0], state[1:]
    places = torch.arange(len(ring), dtype=state.dtype, device=state.device)
    ring = torch.where(places == torch.remainder(count, len(ring)), norm, ring)
    return torch.cat([(count + 1.0).reshape(1), ring])


def _quantile(state: Tensor, q: float) -> Tensor:
    """numpy.quantile(norms in the ring, q), bit for bit; NaN of none."""
    ring = state[1:].sort().values
    last = torch.clamp(state[0], max=len(ring)) - 1.0
    place = last.clamp(min=0.0) * q
    below = place.floor()
    ends = torch.stack([below, torch.minimum(below + 1.0, last.clamp(min=0.0))])
    low, high = ring.gather(0, ends.long()).unbind()
    part, step = place - below, high - low
    return torch.where(part >= 0.5, high - step * (1.0 - part), low + step * part)


def _set_float(policy: SpikePolicy, name: str, fits: Callable[[float], bool], rule: str) -> None:
    value = getattr(policy, name)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; it must be a number: {rule}") from None
    if not fits(number):
        raise ValueError(f"{name} is {number}; it must be {rule}")
    object.__setattr__(policy, name, number)


def _set_int(policy: SpikePolicy, name: str, least: int) -> None:
    value = getattr(policy, name)
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, {least} or more") from None
    if number < least:
        raise ValueError(f"{name} is {number}; it must be {least} or more")
    object.__setattr__(policy, name, number)


def _check_action(action: str) -> None:
    if action not in _ACTIONS:
        raise ValueError(f"action is {action!r}; it must be one of {', '.join(_ACTIONS)}")
