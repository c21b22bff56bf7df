"""What guard() takes, checked."""

from __future__ import annotations

import inspect
from typing import Any, Literal, TypeAlias, get_args

from torch import nn
from torch.optim import Optimizer

Policy: TypeAlias = Literal["skip", "raise", "propagate"]


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step() cannot do without a closure."""
    parameters = inspect.signature(inspect.unwrap(type(optimizer).step)).parameters
    return "closure" in parameters and parameters["closure"].default is inspect.Parameter.empty


def check(model: Any, loss_fn: Any, nonfinite: Any, budget: Any, limit: Any) -> None:
    """Raise for arguments of the wrong kind, before anything is attached."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if isinstance(loss_fn, nn.modules.loss._Loss):
        raise TypeError(f"loss_fn is {type(loss_fn).__name__}, a criterion; pass initlab.supervised(criterion)")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is a {type(loss_fn).__name__}; it must be a function of model and batch")
    if nonfinite not in get_args(Policy):
        raise ValueError(f"nonfinite is {nonfinite!r}; it must be one of {', '.join(get_args(Policy))}")
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0:
        raise ValueError(f"budget is {budget!r}; it must be a positive number of seconds")
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ValueError(f"limit is {limit!r}; it must be how many bad steps to diagnose, 0 or more")
