"""Whether the backward() of a torch.autograd.Function of the user's is the derivative of its forward()."""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd_calls import Run, function_calls
from .graph import function_of, is_custom
from .lines import line_of_user

_MOST = 8  # functions that are looked at
_LARGEST = 1 << 22  # elements of an input that is copied
_DIRECTIONS = 3
_STEP = 1e-2  # of an input's root mean square
_AGREE = 0.05  # two difference quotients of one smooth function
_OFF = 0.3  # of a derivative's size: noise of float32 stays below


class BadBackward(NamedTuple):
    """A backward() that is not the derivative.

    Args:
        function: the name of the torch.autograd.Function.
        module: path of the module that calls it; None where that is not known.
        line: of the user's code that calls it; "" where it is not known.
        forgets: whether it gives the same whatever gradient it gets.
        factor: what it gives, in units of the derivative; None where it is no multiple of it.
    """

    function: str
    module: str | None
    line: str = ""
    forgets: bool = False
    factor: float | None = None


class _Call(NamedTuple):
    function: type[torch.autograd.Function]
    args: tuple[Any, ...]
    line: str


class Functions:
    """Records the first call of each torch.autograd.Function that is not torch's own."""

    def __init__(self) -> None:
        self.calls: dict[type, _Call] = {}

    def recorded(self) -> contextlib.AbstractContextManager[None]:
        """Record inside the block."""
        return function_calls(self._called)

    def _called(self, function: type[torch.autograd.Function], run: Run, args: Any, kwargs: Any) -> Any:
        own = not function.__module__.startswith("torch.") and not kwargs
        if own and function not in self.calls and len(self.calls) < _MOST:
            self.calls[function] = _Call(function, tuple(map(_copied, args)), line_of_user())
        return run(*args, **kwargs)


def bad_backward(loss: Tensor, functions: Functions, makers: dict[type, str]) -> BadBackward | None:
    """The first function behind a loss whose backward() is wrong.

    Args:
        functions: that were recorded while the loss was made.
        makers: paths of modules by the functions whose results they put out.
    """
    seen, stack = set(), [loss.grad_fn]
    known: dict[type, Any] = {}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [n for n, _ in node.next_functions]
        if is_custom(node):
            known.setdefault(function_of(node), node)
    for function, node in known.items():
        call = functions.calls.get(function)
        where = function.__name__, makers.get(function), call.line if call is not None else ""
        if _ignores_gradient(node):
            return BadBackward(*where, forgets=True)
        wrong, factor = _compared(call) if call is not None else (False, None)
        if wrong:
            return BadBackward(*where, factor=factor)
    return None


def _ignores_gradient(node: Any) -> bool:
    """Whether a node's gradients are the same, and not 0, for a gradient that is a thousandth as large."""
    try:
        with torch.no_grad():
            ones = [torch.ones(m.shape, dtype=m.dtype, device=m.device) for m in node._input_metadata]
            made = [_as_tuple(node.apply(*(x * size for x in ones))) for size in (1.0, 1e-3)]
            large, small = ([g for g in each if isinstance(g, Tensor)] for each in made)
            return bool(large) and all(
                bool(a.any()) and bool(a.isfinite().all()) and torch.equal(a, b)
                for a, b in zip(large, small, strict=True)
            )
    except Exception:  # a backward() that takes other gradients than these
        return False


def _compared(call: _Call) -> tuple[bool, float | None]:
    """Whether backward() is far from the difference quotients of forward(), and what multiple of them it is.

    A function that is not smooth, as one that rounds, or that gives what it gets, as one that turns a gradient round,
    has no other purpose than another derivative: nothing is said of it.
    """
    inputs = [x for x in call.args if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad]
    if not inputs or any(x.numel() > _LARGEST or x.dtype.itemsize < 4 for x in inputs):
        return False, None
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    def value(args: tuple[Any, ...], weights: list[Tensor]) -> float:
        made = [x for x in _as_tuple(call.function.apply(*args)) if isinstance(x, Tensor) and x.is_floating_point()]
        return sum(float((x.double() * w).sum()) for x, w in zip(made, weights, strict=True))

    factors = []
    try:
        with torch.enable_grad():
            made = [x for x in _as_tuple(call.function.apply(*call.args)) if isinstance(x, Tensor) and x.requires_grad]
            if not made or any(torch.equal(a, b) for a in made for b in inputs if a.shape == b.shape):
                return False, None
            weights = [random(x) for x in made]
            gradients = torch.autograd.grad(made, inputs, weights, allow_unused=True)
        for _ in range(_DIRECTIONS):
            ways = {id(x): random(x) * x.detach().double().square().mean().sqrt().clamp_min(1e-3) for x in inputs}
            with torch.no_grad():
                quotients = []
                for step in (_STEP, _STEP / 2):
                    ends = []
                    for side in (step, -step):
                        moved = tuple(x + side * ways[id(x)].to(x) if id(x) in ways else x for x in call.args)
                        ends.append(value(moved, weights))
                    quotients.append((ends[0] - ends[1]) / (2 * step))
            large, small = quotients
            given = sum(
                float((g.double() * ways[id(x)].double()).sum())
                for g, x in zip(gradients, inputs, strict=True)
                if g is not None
            )
            if not math.isfinite(large) or not small or abs(large - small) > _AGREE * abs(small):
                return False, None
            factors.append(given / small)
    except Exception:  # one that cannot be called by itself
        return False, None
    if not all(abs(factor - 1) > _OFF for factor in factors):
        return False, None
    middle = sum(factors) / len(factors)
    same = all(abs(factor - middle) <= _AGREE * abs(middle) for factor in factors)
    return True, middle if same else None


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.numel() > _LARGEST:
        return value.detach()
    return value.detach().clone().requires_grad_(value.requires_grad)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
