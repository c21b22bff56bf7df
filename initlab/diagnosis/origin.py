"""Where the first value that is not finite comes from: the operation, the module, the phase.

Every operation's output is read. A tensor that is not finite is traced to the operation that made the first such value
from finite ones; an infinity that a mask holds on purpose is none, until an operation makes NaN of it. What a mask
hides from the loss is found too: its gradient is 0 times what is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from initlab.kernels import NAN, NEGATIVE_INF, POSITIVE_INF, describe, nonfinite_flag
from initlab.kernels.torch_internals import current_node

from .._tree import tensors_in
from . import names, safe_forms
from .graph import BadNode, FunctionCall, Graph
from .limits import LIMITS
from .lines import line_of_user
from .narrow import LostConstant, in_float32, lost_constants
from .reasons import Operation, Reason, known, reason
from .trace import Modules


@dataclass
class Origin:
    """An operation that made the first value that is not finite, or the tensor that had it from the start.

    Args:
        source: "op", "leaf" or "parameter": an operation, a tensor of the batch, or a parameter or buffer.
        phase: "forward" or "backward".
        op: name of the operation; of a torch.autograd.Function the class's.
        module: path of the module that ran; None outside the model.
        flag: NaN = 1, +inf = 2, -inf = 4, or-ed.
        sources: names of batch tensors ("batch[0]") that its inputs were computed from.
        weights: whether its inputs were computed with parameters.
        facts: about its inputs.
        intended: whether it may be a mask.
        dtype: of the tensor.
        reason: why it is not finite; None where that is unknown.
        custom: whether it is a torch.autograd.Function of the user's.
        masked: whether it never reached the loss, only the gradients.
        finite: whether what it got was finite.
        largest: magnitude in what it got.
        in_float32: the largest magnitude of the operation's result in float32 where 16 bits overflow, infinite where
            float32 is no better; None for other dtypes.
        elements: how many it puts out.
        hidden: whether ordinary gradients became NaN, in the backward pass.
        constant: a number of the code that 16 bits cannot hold, where one was used before it in the same module.
        rows: indices into the first dimension of what it puts out, where that is not finite; empty where all of them
            are, and where there are many.
        count: how many such indices there are in all.
        objective: whether it is part of a formula that torch has in a stable form: one of its loss functions, the log
            of a softmax, of a sigmoid, or of a sum of exponentials.
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
    reason: Reason | None = None
    custom: bool = False
    masked: bool = False
    finite: bool = True
    largest: float = 0.0
    in_float32: float | None = None
    constant: LostConstant | None = None
    hidden: bool = False
    elements: int = 0
    rows: tuple[int, ...] = ()
    count: int = 0
    objective: bool = False

    @property
    def grown(self) -> bool:
        """Whether it is only a number that has grown too large, and not one that the operation makes of ordinary ones.

        A NaN in the backward pass that ordinary gradients go into comes of a derivative that is infinite: 0 * inf.
        """
        ordinary = self.op in names.UNSAFE and not (self.op in names.POWERS and self.largest > _HUGE)
        return self.source == "op" and self.reason is None and not (ordinary or self.hidden or self.custom)


_HUGE = 1e15  # no ordinary activation; its square is near float32's largest
_SELECTING = ("index", "select", "slice", "gather", "max", "min", "amax", "amin", "split", "narrow", "unbind")
_COUNTS = ("sum", "count_nonzero", "bincount")


class _Provenance:
    """What is known of the tensors in one storage."""

    __slots__ = ("made_by", "name", "of", "origin", "ref", "sources", "weights")

    def __init__(self, tensor: Tensor) -> None:
        self.ref = StorageWeakRef(tensor.untyped_storage())  # its address is not used again while this lives
        self.sources: frozenset[str] = frozenset()
        self.weights = False
        self.origin: Origin | None = None
        self.made_by = ""  # the operation, or "count"
        self.name = ""  # of the parameter
        self.of: frozenset[str] = frozenset()  # which of softmax, sigmoid, exp and sum it was made with, and no others


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
        self.graph = Graph()
        self.call = FunctionCall("", None)
        self.first: Origin | None = None  # the first that is no mask, whether or not it reached the loss
        self.summed: Origin | None = None  # the first that adds up what a mask holds
        self.largest = 0.0  # magnitude in a 16-bit tensor before the first infinity
        self.lost: list[LostConstant] = []
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
            entry.name = name
        flag = int(nonfinite_flag(tensor))
        if flag:
            mask = flag == NEGATIVE_INF and _may_mask(tensor)
            entry.origin = Origin(source, "forward", name, None, flag, tensor.dtype, intended=mask)

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

    def _constant(self, tensor: Tensor) -> _Provenance | None:
        """A tensor that was made before the pass, where it holds what is not finite: a mask, most often."""
        if not tensor.is_floating_point() or tensor.is_meta or not (flag := int(nonfinite_flag(tensor))):
            return None
        entry = self._entry(tensor)
        mask = flag in (NEGATIVE_INF, POSITIVE_INF) and _may_mask(tensor)
        entry.origin = Origin("op", "forward", "constant", self.modules.current, flag, tensor.dtype, intended=mask)
        entry.origin.facts["made"] = describe(flag)
        return entry

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """The result of `run`, with every operation of it inspected."""
        with self.modules.hooked(self._entered, self._left), _Functions(self), _Operations(self):
            return run()

    def _entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """What a module gets has been made by its caller."""
        outer = self.modules.stack[-2] if len(self.modules.stack) > 1 else None
        self.graph.add(tensors_in((args, kwargs)), FunctionCall("", outer))

    def _left(self, module: nn.Module, output: Any) -> None:
        self.graph.add(tensors_in(output), FunctionCall("", self.modules.current))

    def origin(self, loss: Tensor) -> Origin | None:
        """Where the loss's own value, not finite, comes from."""
        entry = self._find(loss)
        found = entry.origin if entry is not None else None
        if found is not None and found.intended and self.summed is not None:
            return self.summed
        return found or self.first

    def inspect(self, operation: Operation, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """One operation has run."""
        op = operation.name
        entries = [(t, entry) for t in inputs if (entry := self._find(t) or self._constant(t)) is not None]
        sources = frozenset().union(*(entry.sources for _, entry in entries))
        weights = any(entry.weights for _, entry in entries)
        self._remember(operation)
        of = _formula(op, [entry.of for _, entry in entries])
        if op in _LOGS and any(entry.of & _PROBABILITIES or entry.of >= _SUM_OF_EXP for _, entry in entries):
            self.call.objective = True
            for _, before in entries:
                if before.origin is not None and before.origin.op == "exp":
                    before.origin.objective = True
        for out in outputs:
            made_by = self._made_by(op, inputs, entries)
            entry = self._entry(out)
            entry.sources |= sources
            entry.weights |= weights
            entry.made_by = made_by
            entry.of = of if all(entry is not one for _, one in entries) else entry.of | of  # a view, or in place
            if not out.is_floating_point() or out.numel() == 0:
                continue
            low, high = (float(x) for x in out.aminmax())
            if math.isfinite(low) and math.isfinite(high):
                if out.dtype in (torch.float16, torch.bfloat16):
                    self.lost += lost_constants(operation, out.dtype, self.call)
                    if self.first is None:
                        self.largest = max(self.largest, abs(low), abs(high))
                if not any(out is t for t in inputs):  # an update of a part leaves the rest as it was
                    entry.origin = None
                self._note(next((e.origin for _, e in entries if e.origin is not None and not e.origin.intended), None))
                continue
            flag = int(nonfinite_flag(out))
            bad = [(t, e.origin) for t, e in entries if e.origin is not None]
            bad = [(t, origin) for t, origin in bad if t is out or int(nonfinite_flag(t))]
            inherited = next((origin for _, origin in bad if not origin.intended), None)
            if inherited is None and bad and _still_masks(bad[0][1], flag):
                inherited = bad[0][1]
                if self.summed is None and out.numel() < bad[0][0].numel() and op not in _SELECTING:
                    self.summed = self._summed(op, bad[0][1], out, flag)
            elif inherited is None and bad and _is_no_mask(op, bad[0][1]):
                inherited = replace(bad[0][1], intended=False)
            entry.origin = inherited or self._made(operation, func, inputs, out, flag, sources, weights, bad)
            self._note(entry.origin)

    def _summed(self, op: str, mask: Origin, out: Tensor, flag: int) -> Origin:
        """An operation that adds up what a mask holds."""
        call = self.call
        facts = {"made": describe(flag), "-inf made by": mask.op, **({"line": call.line} if call.line else {})}
        why = Reason("adds up numbers among which a mask wrote -inf", safe_forms.SUM_OF_MASKED)
        function = call.name or op
        return replace(
            mask,
            op=function,
            module=self.modules.current,
            flag=flag,
            dtype=out.dtype,
            facts=facts,
            intended=False,
            reason=why,
            objective=names.is_loss(function),
        )

    def _note(self, origin: Origin | None) -> None:
        """The call that is running has met what an operation made."""
        if origin is not None and not origin.intended and self.call.bad is None:
            self.call.bad = origin

    def _remember(self, operation: Operation) -> None:
        if not known(operation.name):
            return
        for place, argument in enumerate(operation.args):
            entry = self._find(argument) if isinstance(argument, Tensor) else None
            if entry is not None:
                operation.made_by[place] = entry.made_by
                if entry.name:
                    operation.parameters[place] = entry.name
        self.call.operations.append(operation)

    def _made_by(self, op: str, inputs: list[Tensor], entries: list[tuple[Tensor, _Provenance]]) -> str:
        """The operation that made what is 0 of a result, or "count" for a number of things."""
        if op in names.COPYING:
            zeros = (
                [e.made_by for t, e in entries if e.made_by and t.numel() and not bool(t.all())]
                if len(entries) > 1
                else [e.made_by for _, e in entries]
            )
            return next(iter(zeros), "")
        if op in _COUNTS:
            counts = any(not t.is_floating_point() for t in inputs) or not any(e.weights for _, e in entries)
            return "count" if counts or op != "sum" else "sum"
        return op

    def _made(
        self,
        operation: Operation,
        func: Any,
        inputs: list[Tensor],
        out: Tensor,
        flag: int,
        sources: frozenset[str],
        weights: bool,
        masks: list[tuple[Tensor, Origin]],
    ) -> Origin:
        op, call = operation.name, self.call
        function, module = call.name or op, self.modules.current
        why = reason(operation) or next(filter(None, map(reason, call.operations)), None)
        node = current_node()
        if node is not None and node in self.graph.calls:  # inside a gradient that the loss itself computes
            call = self.graph.calls[node]
            function, module = call.name, call.module
            op = names.of_node(node.name())
            why = self._reason(call, op) or why
        facts: dict[str, Any] = {"made": describe(flag)}
        floating = [t for t in inputs if t.is_floating_point() and t.numel()]
        ranges = [tuple(float(x) for x in t.aminmax()) for t in floating]
        for number, (low, high) in enumerate(ranges):
            facts[f"input {number}"] = f"{low:.4g} to {high:.4g}"
        if not any(t.numel() for t in inputs):
            facts["elements"] = 0
        if masks:
            facts["-inf made by"] = masks[0][1].op
        if why is not None:
            facts |= why.facts
        if call.line:
            facts["line"] = call.line
        masking = op in names.MASKING and (flag == NEGATIVE_INF or op not in ("to_copy", "copy"))
        intended = flag in (NEGATIVE_INF, POSITIVE_INF) and (masking or not (weights or sources))
        origin = Origin(
            "op",
            "forward",
            _named(op, function, why),
            module,
            flag,
            out.dtype,
            sources,
            weights,
            facts,
            intended=intended,
            reason=why,
            finite=all(math.isfinite(x) for pair in ranges for x in pair),
            largest=max((abs(x) for pair in ranges for x in pair), default=0.0),
            elements=out.numel(),
            rows=_bad_rows(out),
            count=out.shape[0] if out.dim() else 0,
            objective=call.objective or names.is_loss(function),
        )
        if not intended and self.first is None:
            self.first = origin
            if out.dtype in (torch.float16, torch.bfloat16):
                origin.in_float32 = in_float32(func, operation, out)
                origin.constant = next((c for c in reversed(self.lost) if c.module == module), None)
        return origin

    def _reason(self, call: FunctionCall, op: str) -> Reason | None:
        """Why the derivative of an operation, of those in one call, is not finite."""
        found = (reason(one, backward=True) for one in call.operations if one.name == op)
        return next((why for why in found if why is not None), None)

    def backward(self, loss: Tensor) -> Origin | None:
        """What makes the first gradient that is not finite; runs the pass.

        Where values that are not finite went through the operation in the forward pass, whatever made those.
        """
        found = self.graph.backward(loss)
        if found is None:
            return None
        if isinstance(found.call.bad, Origin) and not found.custom:
            return _masked(found.call.bad)
        return self._of_node(found)

    def _of_node(self, found: BadNode) -> Origin:
        call = found.call
        why = None if found.custom else self._reason(call, found.op)
        facts = dict(found.facts)
        if why is not None:
            facts |= why.facts
        if call.line:
            facts["line"] = call.line
        return Origin(
            "op",
            "backward",
            found.op if found.custom else _named(found.op, call.name, why),
            call.module,
            found.flag,
            found.dtype,
            weights=True,
            facts=facts,
            reason=why,
            custom=found.custom,
            finite=math.isfinite(found.largest),
            largest=found.largest,
            hidden=found.hidden,
            objective=call.objective or names.is_loss(call.name),
            constant=next((c for c in reversed(self.lost) if c.module == call.module), None),
        )


def _bad_rows(out: Tensor) -> tuple[int, ...]:
    if not out.dim() or out.layout != torch.strided:
        return ()
    bad = ~out.isfinite().reshape(out.shape[0], -1).all(1)
    rows = bad.nonzero().flatten()[: LIMITS.bad_rows + 1].tolist()
    return tuple(rows) if len(rows) <= min(LIMITS.bad_rows, out.shape[0] - 1) else ()


_LOGS = ("log", "log2", "log10", "log1p")
_PROBABILITIES = frozenset(("softmax", "sigmoid"))
_SUM_OF_EXP = frozenset(("exp", "sum"))


def _formula(op: str, of: list[frozenset[str]]) -> frozenset[str]:
    """What a result was made with, where an operation begins such a formula or hands one on."""
    if op in (*_PROBABILITIES, "exp"):
        return frozenset((op,))
    if op not in names.COPYING and op not in ("gather", "mean", "sub", "sum"):
        return frozenset()
    summed = op in ("mean", "sum") or (op == "add" and sum("exp" in one for one in of) > 1)
    return frozenset(("sum",) if summed else ()).union(*of)


def _masked(origin: Origin) -> Origin:
    """An origin whose values a mask keeps from the loss: what it gets there is to be replaced before it."""
    why, form = origin.reason, safe_forms.guarded(origin.op)
    if why is not None and form is not None:
        why = why._replace(form=form)
    return replace(origin, masked=True, reason=why)


def _named(op: str, function: str, why: Reason | None) -> str:
    """The name under which the user knows an operation: the function that was called, or what failed inside of it."""
    if why is not None and why.op is not None:
        return why.op
    if op in names.UNSAFE and function not in names.UNSAFE:
        return op
    return function or op


def _may_mask(tensor: Tensor) -> bool:
    """Whether a tensor with infinities of one sign is a mask: no parameter, and ordinary numbers beside them."""
    finite = tensor.detach()[tensor.detach().isfinite()]
    return not isinstance(tensor, nn.Parameter) and (finite.numel() == 0 or float(finite.abs().max()) < _HUGE)


def _still_masks(mask: Origin, flag: int) -> bool:
    """Whether what was made of a mask is one: with the same sign, or another where an operation wrote it."""
    return not flag & NAN and (mask.source == "op" or not flag & ~mask.flag)


def _is_no_mask(op: str, origin: Origin) -> bool:
    """Whether -inf of which an operation made NaN was no mask: masks go into a softmax."""
    return origin.source != "op" and op not in ("softmax", "log_softmax", "logsumexp", "attention")


class _Functions(TorchFunctionMode):
    def __init__(self, search: Search) -> None:
        super().__init__()
        self.search = search

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        search, name = self.search, names.of_function(func)
        if name == "get":  # an attribute, such as grad_fn
            return func(*args, **(kwargs or {}))
        module = search.modules.current
        # Nodes that no function of torch has made are those of a torch.autograd.Function.
        search.graph.add(tensors_in((args, kwargs)), FunctionCall("", module))
        outer, search.call = search.call, FunctionCall(name, module, line_of_user())
        try:
            out = func(*args, **(kwargs or {}))
            search.graph.add(tensors_in(out), search.call)
        finally:
            search.call = outer
        return out


class _Operations(TorchDispatchMode):
    def __init__(self, search: Search) -> None:
        super().__init__()
        self.search = search

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = names.plain(func.overloadpacket.__name__)
        before = args
        if func._schema.is_mutable and known(name) and isinstance(args[0], Tensor):
            before = (args[0].clone(), *args[1:])  # what it overwrites
        out = func(*args, **(kwargs or {}))
        outputs = [t for t in tensors_in(out) if t.layout == torch.strided and not t.is_meta]
        if outputs:
            inputs = [t for t in tensors_in((args, kwargs)) if t.layout == torch.strided]
            operation = Operation(name, before, kwargs or {}, overload=func._overloadname)
            self.search.inspect(operation, func, inputs, outputs)
        return out
