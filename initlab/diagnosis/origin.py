"""Where the first value that is not finite comes from: the operation, the module, the phase.

Every operation's output is read. A tensor that is not finite is traced to the operation that made the first such value
from finite ones; an infinity that a mask holds on purpose is none, until an operation makes NaN of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from initlab.kernels import NAN, NEGATIVE_INF, describe, nonfinite_flag

from .._tree import tensors_in
from . import names
from .trace import Modules


@dataclass
class Origin:
    """An operation that made the first value that is not finite, or the tensor that had it from the start.

    Args:
        source: "op", "leaf" or "parameter": an operation, a tensor of the batch, or a parameter or buffer.
        phase: "forward" or "backward".
        op: name of the operation.
        module: path of the module that ran; None outside the model.
        flag: NaN = 1, +inf = 2, -inf = 4, or-ed.
        sources: names of batch tensors ("batch[0]") that its inputs were computed from.
        weights: whether its inputs were computed with parameters.
        facts: about its inputs.
        intended: whether it may be a mask.
        dtype: of the tensor.
    """

    source: str
    phase: str
    op: str
    module: str | None
    flag: int
    dtype: torch.dtype
    sources: frozenset[str] = frozenset()
    weights: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    intended: bool = False

    @property
    def grown(self) -> bool:
        """Whether it is only a number that has grown too large, and not one that the operation makes of ordinary ones.

        A NaN in the backward pass that ordinary gradients go into comes of a derivative that is infinite: 0 * inf.
        """
        before = self.facts.get("largest gradient before it", float("inf"))
        hidden = self.phase == "backward" and bool(self.flag & NAN) and before < 1e19  # a root of float32's largest
        return self.source == "op" and self.op not in names.UNSAFE and not hidden


class _Provenance:
    """What is known of the tensors in one storage."""

    __slots__ = ("made_by", "origin", "ref", "sources", "weights")

    def __init__(self, tensor: Tensor) -> None:
        self.ref = StorageWeakRef(tensor.untyped_storage())  # its address is not used again while this lives
        self.sources: frozenset[str] = frozenset()
        self.weights = False
        self.origin: Origin | None = None
        self.made_by = ""  # the operation


class Search:
    """Follows a forward and a backward pass operation by operation.

    Args:
        model: the model.
        leaves: names and tensors of the batch.
        parameters: names and tensors of parameters and buffers.
    """

    def __init__(self, model: nn.Module, leaves: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        self.modules = Modules(model)
        self.provenance: dict[int, _Provenance] = {}
        self.nodes: dict[Any, tuple[str, str | None]] = {}
        self.function = ""
        self.first: Origin | None = None  # the first that is no mask, whether or not it reached the loss
        self.largest = 0.0  # magnitude in a 16-bit tensor before the first infinity
        for name, tensor in leaves.items():
            self._start(name, tensor, "leaf")
        for name, tensor in parameters.items():
            self._start(name, tensor, "parameter")

    def _start(self, name: str, tensor: Tensor, source: str) -> None:
        if tensor.layout != torch.strided or tensor.is_meta:
            return
        entry = self._entry(tensor)
        if source == "leaf":
            entry.sources |= {name}
        else:
            entry.weights |= tensor.requires_grad
        flag = int(nonfinite_flag(tensor))
        if flag:
            entry.origin = Origin(source, "forward", name, None, flag, tensor.dtype, intended=flag == NEGATIVE_INF)

    def _entry(self, tensor: Tensor) -> _Provenance:
        key = tensor.untyped_storage()._cdata
        entry = self.provenance.get(key)
        if entry is None:
            entry = self.provenance[key] = _Provenance(tensor)
        return entry

    def _find(self, tensor: Tensor) -> _Provenance | None:
        try:
            return self.provenance.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):
            return None

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """The result of `run`, with every operation of it inspected."""
        with self.modules.hooked(), _Functions(self), _Operations(self):
            return run()

    def origin(self, loss: Tensor) -> Origin | None:
        """Where the loss's own value, not finite, comes from."""
        entry = self._find(loss)
        found = entry.origin if entry is not None else None
        return found or self.first

    def inspect(self, op: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """One operation has run."""
        known = [entry for t in inputs if (entry := self._find(t)) is not None]
        sources = frozenset().union(*(entry.sources for entry in known))
        weights = any(entry.weights for entry in known)
        for out in outputs:
            entry = self._entry(out)
            entry.sources |= sources
            entry.weights |= weights
            if op not in names.COPYING:
                entry.made_by = op
            else:
                entry.made_by = next((m.made_by for m in known), "")
            if not out.is_floating_point() or out.numel() == 0:
                continue
            low, high = (float(x) for x in out.aminmax())
            if abs(low) != float("inf") and abs(high) != float("inf") and low == low:
                if out.dtype in (torch.float16, torch.bfloat16) and self.first is None:
                    self.largest = max(self.largest, abs(low), abs(high))
                if not any(out is t for t in inputs):  # an update of a part leaves the rest as it was
                    entry.origin = None
                continue
            flag = int(nonfinite_flag(out))
            bad = [(t, m.origin) for t in inputs if (m := self._find(t)) is not None and m.origin is not None]
            bad = [(t, origin) for t, origin in bad if t is out or int(nonfinite_flag(t))]
            inherited = next((origin for _, origin in bad if not origin.intended), None)
            if inherited is None and bad and not flag & ~NEGATIVE_INF:
                inherited = bad[0][1]
            elif inherited is None and bad and _is_no_mask(op, bad[0][1]):
                inherited = replace(bad[0][1], intended=False)
            entry.origin = inherited or self._made(op, inputs, out, flag, sources, weights)

    def _made(
        self, op: str, inputs: list[Tensor], out: Tensor, flag: int, sources: frozenset[str], weights: bool
    ) -> Origin:
        node = torch._C._current_autograd_node()
        function, module = self.function or op, self.modules.current
        if node is not None and node in self.nodes:  # inside a gradient that the loss itself computes
            function, module = self.nodes[node]
            op = names.of_node(node.name())
        name = op if op in names.UNSAFE and function not in names.UNSAFE else function
        facts: dict[str, Any] = {"made": describe(flag)}
        for number, tensor in enumerate(t for t in inputs if t.is_floating_point() and t.numel()):
            low, high = tensor.aminmax()
            facts[f"input {number}"] = f"{float(low):.4g} to {float(high):.4g}"
        if not any(t.numel() for t in inputs):
            facts["elements"] = 0
        if op == "div" and len(inputs) > 1 and inputs[1].numel() == 1 and not inputs[1].is_meta and not bool(inputs[1]):
            below = self._find(inputs[1])
            facts["divided by"] = f"0, made by {below.made_by}" if below is not None and below.made_by else "0"
        if op == "reciprocal" and inputs and inputs[0].numel() == 1 and not inputs[0].is_meta and not bool(inputs[0]):
            facts["divided by"] = "0"
        masks = flag == NEGATIVE_INF and op in names.MASKING
        origin = Origin("op", "forward", name, module, flag, out.dtype, sources, weights, facts, intended=masks)
        if not masks and self.first is None:
            self.first = origin
        return origin

    def called(self, name: str, out: Any) -> None:
        """A function of torch has returned: its part of the graph is its own."""
        for tensor in tensors_in(out):
            stack = [tensor.grad_fn] if tensor.grad_fn is not None else []
            while stack:
                node = stack.pop()
                if node not in self.nodes:
                    self.nodes[node] = name, self.modules.current
                    stack += [n for n, _ in node.next_functions if n is not None and n.name() != _LEAF]

    def backward(self, loss: Tensor) -> Origin | None:
        """The first node of the graph that makes a gradient that is not finite; runs the pass.

        What reached it was finite, or a node before it would have been the first.
        """
        found: list[Origin] = []
        hooks = []
        seen, stack = set(), [loss.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen or node.name() == _LEAF:
                continue
            seen.add(node)
            stack += [n for n, _ in node.next_functions]
            hooks.append(node.register_hook(self._watcher(node, found)))
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else None

    def _watcher(self, node: Any, found: list[Origin]) -> Callable[[Any, Any], None]:
        def inspect(to_inputs: Any, from_outputs: Any) -> None:
            if found:
                return
            flags = [int(nonfinite_flag(g)) for g in to_inputs if isinstance(g, Tensor)]
            flag = next(filter(None, flags), 0)
            if not flag:
                return
            function, module = self.nodes.get(node, ("", None))
            own = names.of_node(node.name())
            name = own if own in names.UNSAFE and function not in names.UNSAFE else function or own
            dtype = next(g.dtype for g in to_inputs if isinstance(g, Tensor))
            largest = max(
                (float(g.abs().max()) for g in from_outputs if isinstance(g, Tensor) and g.numel()), default=0
            )
            facts = {"made": describe(flag), "largest gradient before it": largest}
            found.append(Origin("op", "backward", name, module, flag, dtype, weights=True, facts=facts))

        return inspect


def _is_no_mask(op: str, origin: Origin) -> bool:
    """Whether -inf of which an operation made NaN was no mask: masks go into a softmax."""
    return origin.source != "op" and op not in ("softmax", "log_softmax", "logsumexp")


_LEAF = "torch::autograd::AccumulateGrad"


class _Functions(TorchFunctionMode):
    def __init__(self, search: Search) -> None:
        super().__init__()
        self.search = search

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        search, name = self.search, names.of_function(func)
        if name == "get":  # an attribute, such as grad_fn
            return func(*args, **(kwargs or {}))
        search.function = name
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            search.function = ""
        search.called(name, out)
        return out


class _Operations(TorchDispatchMode):
    def __init__(self, search: Search) -> None:
        super().__init__()
        self.search = search

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = [t for t in tensors_in(out) if t.layout == torch.strided and not t.is_meta]
        if outputs:
            inputs = [t for t in tensors_in((args, kwargs)) if t.layout == torch.strided]
            self.search.inspect(names.plain(func.overloadpacket.__name__), inputs, outputs)
        return out
