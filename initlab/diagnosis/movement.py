"""What an optimizer moves: which parameters it has, which of them get a gradient, and whether a step changes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .limits import LIMITS
from .stats import stored


@dataclass
class Movement:
    """The first step of an optimizer.

    Args:
        driven: how many of its parameters got a gradient that is not all 0.
        moved: how many changed.
        strange: how many have no gradient, and are in no model that ran.
        left_out: parameters of the model with such a gradient that it does not have.
        without: parameters of the model that it has, that want a gradient, and got none.
        detached: of those, the ones that the loss depends on.
        rounded: share of elements of 16 bits with a gradient that stayed as they were; None where there are none.
    """

    driven: int = 0
    moved: int = 0
    strange: int = 0
    left_out: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    detached: list[str] = field(default_factory=list)
    rounded: float | None = None


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters in an optimizer's groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def of_step(
    optimizer: Optimizer, model: nn.Module, others: Sequence[nn.Module], before: Sequence[tuple[Tensor, Tensor]]
) -> Movement:
    """What a step did that has just been taken.

    Args:
        others: models that run beside it.
        before: parameters that have a gradient, each with a copy from before the step.
    """
    found = Movement()
    names = {id(p): name for name, p in model.named_parameters()}
    known = names.keys() | {id(p) for other in others for p in other.parameters()}
    kept = total = 0
    for p, old in before:
        now = p.detach()
        found.driven += _is_driven(p)
        found.moved += not torch.equal(now, old)
        if p.dtype in (torch.float16, torch.bfloat16) and p.grad is not None and p.grad.layout == torch.strided:
            wanted = p.grad != 0
            total += int(wanted.sum())
            kept += int((wanted & (now == old)).sum())
    found.rounded = kept / total if total else None
    held = {id(p): p for p in parameters_of(optimizer)}
    found.strange = sum(p.grad is None and key not in known for key, p in held.items())
    found.without = [names[key] for key, p in held.items() if key in names and p.grad is None and p.requires_grad]
    found.left_out = [name for name, p in model.named_parameters() if id(p) not in held and _is_driven(p)]
    return found


def _is_driven(parameter: Tensor) -> bool:
    gradient = parameter.grad
    return gradient is not None and bool(stored(gradient).any())


def groups_to_disturb(model: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Parameters that no gradient reaches: all of them, and then those of one module at a time.

    Copies that a loss only looks up, such as a target network, are no fault: each of theirs has a counterpart of the
    same name and shape that learns.
    """
    learning = {
        (name.split(".")[-1], p.shape) for name, p in model.named_parameters() if p.grad is not None and p.dim() > 1
    }
    shapes = {name: p.shape for name, p in model.named_parameters()}
    matrices = [name for name in names if len(shapes[name]) > 1]
    if matrices and all((name.split(".")[-1], shapes[name]) in learning for name in matrices):
        return
    yield list(names)
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    yield from list(modules.values())[: LIMITS.disturbed]


SIZES = (0.1, 3.0)  # of a disturbance; what picks the nearest of some rows does not notice a small one


@torch.no_grad()
def disturb(parameters: Sequence[Tensor], part: float) -> None:
    """Move parameters by a part of their size, and a little where they are 0."""
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        size = part * float(p.float().square().mean().sqrt()) + 0.01
        if math.isfinite(size):
            p.add_(size * torch.randn(p.shape, generator=generator).to(p))
