"""What was observed, for the checks to read. Nothing in this module decides anything."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..models.activations import ACTIVATIONS
from ..models.fans import compute_fans
from ..models.naming import TensorRef
from .batch import Leaf
from .cuts import Cut
from .derivatives import BadBackward
from .graph import SilentNode
from .limits import LIMITS
from .movement import Movement
from .origin import Origin
from .outcomes import Outcome
from .stats import Stats, rows_equal, sample, stored
from .trace import Call, Trace

if TYPE_CHECKING:
    from .recall import Forgotten


@dataclass
class ParameterStats:
    """A parameter or a buffer.

    Args:
        stats: of its starting values; None where it has none to read.
        grad: of its gradient in the first step.
        grad_norm: 2-norm of that gradient.
        update: 2-norm of that step's update against its own; of a weight matrix that is not 0, where one was taken.
        distribution: the standard deviation that its layer's activation wants (He's, Xavier's or LeCun's); None if
            unknown.
        alike: whether all its rows are equal, and those of its gradient too.
        tiny: share of its non-zero elements that are smaller than any distribution draws.
        state: names of its entries in the optimizer that are not finite, or negative where they cannot be.
    """

    ref: TensorRef
    stats: Stats | None
    grad: Stats | None = None
    grad_norm: float | None = None
    update: float | None = None
    distribution: float | None = None
    alike: bool = False
    tiny: float = 0.0
    state: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its name in the model."""
        return self.ref.names[0]


@dataclass
class Step:
    """One step of training.

    Args:
        before: the loss; None where an error was raised.
        gradient: norm of all gradients; None where there was no backward pass.
        update: norm of the update against that of the weights, over weight matrices.
    """

    before: float | None
    gradient: float | None = None
    update: float | None = None

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are."""
        return self.before is not None and math.isfinite(self.before) and math.isfinite(self.gradient or 0.0)


class Replay(NamedTuple):
    """The same pass under other circumstances."""

    loss: float | None
    gradient: float | None
    zeros: dict[str, float]  # share of zeros in each parameter's gradient

    @property
    def finite(self) -> bool:
        """Whether it ran, with a finite loss and finite gradients."""
        return self.loss is not None and math.isfinite(self.loss) and math.isfinite(self.gradient or 0.0)


class BadUpdate(NamedTuple):
    """Parameters that a step of the optimizer made not finite, of gradients that were.

    Args:
        eps: of the optimizer's group; None where it has none.
        eps_in_dtype: what it is in the dtype of the parameter.
    """

    names: list[str]
    step: int
    dtype: torch.dtype
    eps: float | None
    eps_in_dtype: float


@dataclass
class Evidence:
    """Everything that the checks may read."""

    model: nn.Module
    batch: Any
    optimizer: Optimizer | None
    leaves: list[Leaf]
    parameters_and_buffers: list[ParameterStats]
    trace: Trace
    steps: list[Step] = field(default_factory=list)
    after: float | None = None  # the loss after the last step
    error: Exception | None = None
    broke_at: int | None = None
    origin: Origin | None = None
    largest_low: float = 0.0  # magnitude of 16-bit values before the first infinity
    float32: Replay | None = None
    rates: list[tuple[float, float]] = field(default_factory=list)  # (factor on the update, loss along it)
    further: list[float] = field(default_factory=list)  # losses of steps beyond those asked for
    standardised: Replay | None = None
    bad_update: BadUpdate | None = None
    fresh_optimizer: bool = True  # whether it had taken no step before
    mixed: list[str] = field(default_factory=list)  # layers that take the batch for time
    custom: bool = False  # whether the graph has a torch.autograd.Function of the user's
    backward: BadBackward | None = None  # of an autograd.Function of the user's
    kept_graph: str = ""  # a tensor of a module that has a graph of an earlier step
    cut: Cut | None = None  # the first operation that a gradient should pass and does not
    deaf_output: bool = False  # whether the loss depends on the model's output, and gives it no gradient
    forgotten: Forgotten | None = None  # a recurrence whose first steps get no gradient
    constant_derivative: bool = False  # whether the loss uses a derivative that has no graph
    negated: bool = False  # whether the loss begins with a minus
    movement: Movement | None = None  # of the first step that an optimizer took
    silent: list[SilentNode] = field(default_factory=list)  # operations that make a gradient of 0 of one that is not
    nodes: set[str] = field(default_factory=set)  # names of the nodes of the loss's graph, where a second one is taken
    untreated: Outcome | None = None  # the run as it is, in as many steps as a trial has

    @property
    def losses(self) -> list[float | None]:
        """Before the first step, and after each."""
        known: list[float | None] = [step.before for step in self.steps]
        return [*known, self.after] if self.after is not None else known

    @property
    def layers(self) -> list[Call]:
        """The first call of each layer that has a weight, in order."""
        seen: dict[str, Call] = {}
        for call in self.trace.calls:
            if call.is_layer and call.output is not None:
                seen.setdefault(call.path, call)
        return list(seen.values())

    @property
    def parameters(self) -> list[ParameterStats]:
        """Parameters only."""
        return [one for one in self.parameters_and_buffers if one.ref.is_parameter]

    def weights_of(self, path: str) -> list[ParameterStats]:
        """The weight matrices of a module, or a parameter that a model holds by itself."""
        matrices = [one for one in self.parameters if one.ref.tensor.dim() > 1]
        return [one for one in matrices if one.ref.module_name == path or path in one.ref.names]

    @property
    def first_loss(self) -> float | None:
        """The loss at the start."""
        return self.steps[0].before if self.steps else None

    @property
    def baseline(self) -> float | None:
        """The loss of a model that knows nothing, where the loss function tells."""
        known = [call.baseline for call in self.trace.losses if call.baseline]
        return sum(known) * self._share if known else None

    @property
    def _share(self) -> float:
        """What the loss is of the only loss function in it, where that is divided: by accumulated batches, say."""
        loss = self.first_loss
        if len(self.trace.losses) != 1 or loss is None or not loss > 0 or not self.trace.losses[0].value > 0:
            return 1.0
        share = loss / self.trace.losses[0].value
        return share if share < LIMITS.divided else 1.0

    @property
    def excess(self) -> float:
        """The first loss against that baseline; 1 where it is not known."""
        loss, baseline = self.first_loss, self.baseline
        if loss is None or not baseline:
            return 1.0
        return loss / baseline if math.isfinite(loss) else math.inf


def expected_std(ref: TensorRef, activation: str) -> float | None:
    """The standard deviation that keeps the size of the signal through a weight and the activation after it.

    Args:
        ref: the weight.
        activation: the function's name in torch.nn.functional; "" where none was seen, which asks for a gain of 1.
    """
    counted = compute_fans(ref.module, ref.attribute, ref.tensor, ref.module_name)
    if counted is None or counted.fan_in <= 0:
        return None
    start = ACTIVATIONS.get(activation)
    return (start.gain if start is not None else 1.0) / math.sqrt(counted.fan_in)


def rows_alike(tensor: Tensor) -> bool:
    """Whether all rows of a tensor are equal, bit for bit; one row is not."""
    if tensor.dim() < 2 or tensor.shape[0] < 2 or tensor.numel() == 0:
        return False
    return rows_equal(tensor)


def nearly_alike(tensor: Tensor) -> bool:
    """Whether all rows of a gradient are equal but for the order of summation."""
    if tensor.dim() < 2 or tensor.shape[0] < 2 or tensor.numel() == 0:
        return False
    spread = (tensor - tensor[:1]).abs().amax()
    return bool(spread <= 1e-5 * tensor.abs().amax())


def state_faults(state: Any) -> list[str]:
    """The entries of an optimizer's state for one parameter that cannot be right."""
    found = []
    for name, value in state.items() if isinstance(state, dict) else ():
        if isinstance(value, Tensor) and value.is_floating_point() and stored(value.detach()).numel():
            low, high = (float(x) for x in stored(value.detach()).aminmax())
            squares = name in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
            if not (math.isfinite(low) and math.isfinite(high)) or (squares and low < 0):
                found.append(name)
    return found


def zero_share(tensor: Tensor) -> float:
    """The share of exact zeros."""
    return float((tensor == 0).sum()) / max(1, tensor.numel())


def half(dtype: torch.dtype) -> bool:
    """Whether a dtype is one of the 16-bit floats."""
    return dtype in (torch.float16, torch.bfloat16)


def tiny_share(tensor: Tensor) -> float:
    """The share of a sample's non-zero elements that are smaller than any distribution draws."""
    x = sample(tensor).abs()
    return float(((x > 0) & (x < LIMITS.denormal)).sum() / (x > 0).sum().clamp_min(1))
