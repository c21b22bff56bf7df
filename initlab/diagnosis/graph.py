"""The autograd graph of a loss: which call made each node, and the first node that makes a gradient not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from initlab.kernels import NAN, describe, nonfinite_flag

from . import names
from .reasons import Operation
from .stats import stored

_LEAF = "torch::autograd::AccumulateGrad"


@dataclass
class FunctionCall:
    """A call of a function of torch.

    Args:
        name: of the function; "" where none was seen to make a node.
        module: path of the module that ran; None outside the model.
        line: of the user's code, "train.py:12: return x / n"; "" where another library made the call.
        operations: of it, those that may fail.
        bad: what made the values that are not finite among what went in or came out, if any did.
        objective: whether it takes the log of a softmax, of a sigmoid, or of a sum of exponentials.
    """

    name: str
    module: str | None
    line: str = ""
    operations: list[Operation] = field(default_factory=list)
    bad: Any = None
    objective: bool = False


@dataclass
class BadNode:
    """A node that makes a gradient that is not finite from what reached it.

    Args:
        op: its own operation; of a torch.autograd.Function the class's name.
        custom: whether it is of such a class, outside torch.
        call: that made it.
        flag: of the gradient: NaN = 1, +inf = 2, -inf = 4, or-ed.
        largest: magnitude in what reached it; infinite where gradients that meet there overflow.
    """

    op: str
    custom: bool
    call: FunctionCall
    flag: int
    dtype: torch.dtype
    largest: float

    @property
    def hidden(self) -> bool:
        """Whether ordinary gradients became NaN: a derivative is infinite, 0 * inf."""
        return bool(self.flag & NAN) and self.largest < 1e19  # a root of float32's largest

    @property
    def facts(self) -> dict[str, Any]:
        """For the evidence."""
        return {"made": describe(self.flag), "largest gradient before it": self.largest}


@dataclass
class SilentNode:
    """A node that makes a gradient of nothing but 0 of one that is not, for some of its inputs.

    Args:
        op: the function that was called; of a torch.autograd.Function the class's name.
        call: that made it.
        whole: whether it does so for all of its inputs.
        leaves: ids of the tensors that these gradients would have reached.
    """

    op: str
    call: FunctionCall
    whole: bool
    leaves: set[int]


_MOST_SILENT = 64


class Graph:
    """The nodes of a graph, by the calls that made them."""

    def __init__(self) -> None:
        self.calls: dict[Any, FunctionCall] = {}

    def add(self, tensors: Iterable[Tensor], call: FunctionCall) -> None:
        """All nodes behind some tensors that are not known yet are a call's own."""
        for tensor in tensors:
            stack = [tensor.grad_fn] if tensor.grad_fn is not None else []
            while stack:
                node = stack.pop()
                if node not in self.calls:
                    self.calls[node] = call
                    stack += [n for n, _ in node.next_functions if n is not None and n.name() != _LEAF]

    def backward(self, loss: Tensor) -> BadNode | None:
        """The first node that makes a gradient that is not finite; runs the pass.

        What reached it was finite, or a node before it would have been the first.
        """
        found: list[BadNode] = []
        self._backward(loss, lambda node: self._watcher(node, found))
        return found[0] if found else None

    def silent(self, loss: Tensor) -> list[SilentNode]:
        """The operations that make a gradient of nothing but 0 of one that is not, the first first; runs the pass."""
        found: list[SilentNode] = []

        def watch(node: Any) -> Any:
            def inspect(to_inputs: Any, from_outputs: Any) -> None:
                made = [(n, g) for (n, _), g in zip(node.next_functions, to_inputs, strict=False) if g is not None]
                given = any(isinstance(g, Tensor) and bool(g.any()) for g in from_outputs)
                silent = [n for n, g in made if n is not None and not bool(g.any())]
                if len(found) < _MOST_SILENT and silent and given:
                    op = function_of(node).__name__ if is_custom(node) else names.of_node(node.name())
                    call = self.calls.get(node) or FunctionCall("", None)
                    op = op if is_custom(node) or not call.name else call.name
                    found.append(SilentNode(op, call, len(silent) == len(made), _leaves_behind(silent)))

            return inspect

        self._backward(loss, watch)
        return found

    def _backward(self, loss: Tensor, watcher: Callable[[Any], Any]) -> None:
        """Runs the pass with a hook on each node."""
        hooks = []
        seen, stack = set(), [loss.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen or node.name() == _LEAF:
                continue
            seen.add(node)
            stack += [n for n, _ in node.next_functions]
            hooks.append(node.register_hook(watcher(node)))
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()

    def _watcher(self, node: Any, found: list[BadNode]) -> Any:
        def inspect(to_inputs: Any, from_outputs: Any) -> None:
            if found:
                return
            gradients = [stored(g) for g in to_inputs if isinstance(g, Tensor) and g.is_floating_point()]
            flag, dtype = next(((f, g.dtype) for g in gradients if (f := int(nonfinite_flag(g)))), (0, torch.float32))
            if flag:
                reached = (stored(g) for g in from_outputs if isinstance(g, Tensor))
                before = (float(g.abs().max()) for g in reached if g.numel())
                call = self.calls.get(node) or FunctionCall("", None)
                custom = is_custom(node)
                op = function_of(node).__name__ if custom else names.of_node(node.name())
                found.append(BadNode(op, custom, call, flag, dtype, max(before, default=0.0)))

        return inspect


def is_negated(loss: Tensor) -> bool:
    """Whether a loss begins with a minus: its first term does, up to factors and means.

    Example:
        >>> import torch
        >>> from initlab.diagnosis.graph import is_negated
        >>> x = torch.ones(3, requires_grad=True)
        >>> is_negated(-x.mean() - 0.1 * x.sum()), is_negated(x.mean() - x.sum())
        (True, False)
    """
    node = loss.grad_fn
    while node is not None and node.name() != _LEAF:
        if node.name().startswith("NegBackward"):
            return True
        if not node.name().startswith(("Sub", "Add", "Mul", "Div", "Mean", "Sum", "Squeeze", "View")):
            return False
        node = node.next_functions[0][0] if node.next_functions else None
    return False


def has_custom(loss: Tensor) -> bool:
    """Whether a torch.autograd.Function of the user's is behind a loss."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if is_custom(node):
            return True
        seen.add(node)
        stack += [n for n, _ in node.next_functions]
    return False


def names_of_nodes(loss: Tensor) -> set[str]:
    """The names of all nodes behind a loss."""
    found, seen, stack = set(), set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(node.name())
            stack += [n for n, _ in node.next_functions]
    return found


def _leaves_behind(nodes: Iterable[Any]) -> set[int]:
    """The ids of the leaf tensors that the gradients of some nodes go to."""
    found, seen, stack = set(), set(), list(nodes)
    while stack:
        one = stack.pop()
        if one is None or one in seen:
            continue
        seen.add(one)
        if one.name() == _LEAF:
            found.add(id(one.variable))
        stack += [n for n, _ in one.next_functions]
    return found


def is_custom(node: Any) -> bool:
    """Whether a node is of a torch.autograd.Function that is not torch's own."""
    return isinstance(node, BackwardCFunction) and not function_of(node).__module__.startswith("torch.")


def function_of(node: Any) -> type:
    """The torch.autograd.Function that a node is of."""
    return node._forward_cls
