"""Checks of what ran when something broke: an operation, an exception, something unknown."""

from __future__ import annotations

import re
from typing import Any

from .. import fixes, names, rewrites
from ..evidence import Evidence
from ..origin import Origin
from ..report import Kind, Place
from ..symptoms import ran_away
from ..trace import Write
from .finding import Finding, short


def unsafe(evidence: Evidence) -> Finding | None:
    """The operation that made the first value that is not finite, in the model or in the loss function."""
    origin = evidence.origin
    if evidence.broke_at is None or origin is None or origin.source != "op" or ran_away(evidence):
        return None
    kind: Kind = "loss" if origin.module is None and origin.objective else "operation"
    why = origin.reason
    form = why.form if why is not None else None
    parameter = why.parameter if why is not None else None
    written = [*_bias_of_head(evidence, origin.op), *fixes.advice(form, origin.op, origin.module)]
    if parameter is not None:
        written = [*_restarted(evidence, parameter, origin.op), *written]
    return Finding(
        kind,
        "broken",
        Place(module=_owner(origin.module), parameter=parameter, op=origin.op),
        f"{origin.op} in {_where(origin)} {_what(origin)}.{_aside(origin)}",
        _facts(origin),
        written,
        rewrites.equivalents(evidence) if origin.module is None else [],
        form=form,
    )


def _where(origin: Origin) -> str:
    return {None: "the loss function", "": "the model's own code"}.get(origin.module, repr(_owner(origin.module)))


def _owner(module: str | None) -> str | None:
    """The module that a parametrization belongs to, for one inside of it."""
    return module.partition(".parametrizations")[0].removeprefix("parametrizations") if module else module


def _what(origin: Origin) -> str:
    """What happens there, as a clause after the operation's name."""
    made = origin.facts["made"]
    if origin.reason is not None:
        return origin.reason.text
    if origin.custom:
        return (
            f"is a torch.autograd.Function whose backward() makes {made} of finite gradients: its formula is to blame"
        )
    if origin.phase == "backward" and not origin.finite:
        return "gets gradients that overflow where they are added up"
    if origin.phase == "backward":
        return f"makes the first gradient that is not finite ({made}) of finite ones; the forward pass is finite"
    if origin.finite:
        return f"makes the first value that is not finite ({made}) of finite ones"
    return f"makes {made} of infinities, which a mask wrote"


def _aside(origin: Origin) -> str:
    """Why it matters, where the loss itself does not show it."""
    if origin.masked:
        return " That is masked out before the loss, which stays finite; its gradient is 0 times it, and that is NaN."
    if origin.phase == "backward" and origin.reason is not None:
        return " Its value is finite, its gradient is not."
    return ""


def _facts(origin: Origin) -> dict[str, Any]:
    """The evidence: ranges of what it gets are left out where the reason gives them."""
    if origin.reason is None:
        return dict(origin.facts)
    return {name: value for name, value in origin.facts.items() if not name.startswith("input ")}


def _restarted(evidence: Evidence, name: str, op: str) -> list[str]:
    """A new start for a parameter that is 0 where it must not be, or too large for its exponential."""
    found = [one for one in evidence.parameters if name in one.ref.names]
    if not found or found[0].ref.tensor.dim() > 1:
        return [fixes.fresh(evidence, found)] if found else []
    if op == "exp":
        return [f"model.get_parameter({name!r}).data.log_()  # it is a logarithm: forward() takes its exponential"]
    return [f"torch.nn.init.ones_(model.get_parameter({name!r}))"]


def _bias_of_head(evidence: Evidence, op: str) -> list[str]:
    """A bias at which the exponential of what comes out is too large, before any training."""
    if op not in ("exp", "poisson_nll_loss") or not evidence.layers:
        return []
    path = evidence.layers[-1].path
    large = [
        one
        for one in evidence.parameters
        if one.ref.module_name == path and one.ref.attribute == "bias" and one.stats and one.stats.largest > _LARGE_BIAS
    ]
    return [fixes.fresh(evidence, large)] if large else []


_LARGE_BIAS = 20.0  # its exponential is 5e8


def raised(evidence: Evidence) -> Finding | None:
    """An exception in the user's code."""
    error, failed = evidence.error, evidence.trace.failed
    if error is None:
        return None
    module, op = failed if failed is not None else (None, "")
    text = short(error)
    written = []
    if "more than 1 value per channel" in text:
        op = "batch_norm"
        written = [fixes.drop_batch_statistics(module)] if module else []
    kind: Kind = "loss" if module is None else "operation"
    why = f"{type(error).__name__}: {text}"
    if "backward through the graph a second time" in text:
        return _kept_graph(evidence, text)
    if _WRITTEN_OVER in text:
        return _written_over(evidence, text)
    if "does not require grad" in text:
        return _without_gradients(evidence, text)
    leaf, casts = fixes.casts(evidence, text)
    if leaf is not None:
        kind, written = "target" if leaf.is_target else "input", casts
        why = f"{why} ({leaf.code} is {str(leaf.tensor.dtype).removeprefix('torch.')})"
    elif "shapes cannot be multiplied" in text and module is not None:
        written = [fixes.width(evidence.model, module, text)]
    return Finding(kind, "broken", Place(module=module, op=op or None), why, {"error": text}, written)


def _kept_graph(evidence: Evidence, text: str) -> Finding:
    """A tensor that is kept from one step to the next, with the graph that made it."""
    held = evidence.kept_graph
    name = held or "something"
    return Finding(
        "gradient",
        "broken",
        Place(module=held.rpartition(".")[0] if held else None, parameter=held or None),
        f"{name} is kept from one step to the next with the graph that made it, and the second step's gradient goes "
        "back through the first, whose graph is gone.",
        {"error": text},
        [f"# where {name} is kept: .detach(), so that a step ends there; or retain_graph=True, where it is meant"],
    )


def _written_over(evidence: Evidence, text: str) -> Finding:
    """A tensor that the backward pass needs, and that was changed in place after it was used."""
    size, node = shape_written_over(text), re.search(r"is output \d+ of (\w+),", text)
    written = [one for one in evidence.trace.writes if list(one.shape) == size]
    by_node = [one for one in written if node is not None and one.op.strip("_") == names.of_node(node[1])]
    write = next(reversed(by_node or written), None)
    if write is None:
        return Finding("loss", "broken", Place(), f"RuntimeError: {text}", {"error": text}, [_NEW_TENSOR[""], _STEPPED])
    facts: dict[str, Any] = {"error": text, **({"line": write.line} if write.line else {})}
    kind: Kind = "operation" if write.module is not None else "loss"
    return Finding(
        kind,
        "broken",
        Place(module=write.module, op=write.op),
        f"{write.op} in {fixes.code_of(write.module)} changes a tensor in place that an operation before it keeps for "
        "its gradient: the backward pass has only the new values.",
        facts,
        [_out_of_place(evidence, write)],
    )


def shape_written_over(text: str) -> list[int] | None:
    """The shape of what was changed before a backward pass needed it, of torch's error; None of another error."""
    shape = re.search(r"\[[\w.]+ \[([\d, ]*)\]\]", text) if _WRITTEN_OVER in text else None
    return [int(n) for n in shape[1].split(", ") if n] if shape is not None else None


def _out_of_place(evidence: Evidence, write: Write) -> str:
    """What makes a new tensor: a module's own switch, or advice."""
    module = evidence.model.get_submodule(write.module) if write.module else None
    if getattr(module, "inplace", False) is True:
        return f"model.get_submodule({write.module!r}).inplace = False"
    return _NEW_TENSOR.get(write.op, _NEW_TENSOR[""])


_WRITTEN_OVER = "modified by an inplace operation"
_STEPPED = "# if it is a weight: optimizer.step() only after each backward() that goes through it"
_NEW_TENSOR = {
    "": "# make a new tensor: x = x + y in place of x += y, .mul() in place of .mul_()",
    "mul_": "# make a new tensor: x = x * y in place of x *= y or x.mul_(y)",
    "add_": "# make a new tensor: x = x + y in place of x += y or x.add_(y)",
    "sub_": "# make a new tensor: x = x - y in place of x -= y or x.sub_(y)",
    "div_": "# make a new tensor: x = x / y in place of x /= y or x.div_(y)",
    "truediv_": "# make a new tensor: x = x / y in place of x /= y or x.div_(y)",
    "relu": "# make a new tensor: relu without inplace=True",
    "__setitem__": "# make a new tensor: torch.where, masked_fill or torch.cat in place of x[...] = y",
}


def _without_gradients(evidence: Evidence, text: str) -> Finding:
    """A loss that no parameter can learn from."""
    frozen = [one for one in evidence.parameters if not one.ref.tensor.requires_grad]
    if frozen and len(frozen) == len(evidence.parameters):
        why = "no parameter of the model requires a gradient: there is nothing to learn."
        first = frozen[0]
        place = Place(module=first.ref.module_name, parameter=first.name)
        return Finding("gradient", "broken", place, why, {"error": text}, ["model.requires_grad_(True)"])
    cut = evidence.cut
    if cut is not None:
        learning = [one.name for one in evidence.parameters if one.ref.tensor.requires_grad]
        inside = cut.module is not None
        place = Place(module=cut.module, parameter=next(iter(learning), None) if inside else None, op=cut.op)
        why = f"the loss has no gradient: {cut.op} in {fixes.code_of(cut.module)} passes none on."
        facts = {"error": text, **({"line": cut.line} if cut.line else {})}
        kind: Kind = "gradient" if inside else "loss"
        return Finding(kind, "broken", place, why, facts, [fixes.passing_on(cut)])
    why = "the loss has no gradient: it is detached from every parameter."
    advice = "# in the loss function or forward(): take out .detach(), .item(), .data or torch.no_grad()"
    return Finding("loss", "broken", Place(), why, {"error": text}, [advice])


def unexplained(evidence: Evidence) -> Finding | None:
    """A run that broke, and no other check knows why."""
    if evidence.broke_at is None or evidence.error is not None:
        return None
    origin = evidence.origin
    place = Place(module=origin.module, op=origin.op) if origin is not None and origin.source == "op" else Place()
    why = "the loss or a gradient is not finite, and nothing shows where that begins."
    return Finding("operation", "broken", place, why, {"loss": evidence.first_loss})
