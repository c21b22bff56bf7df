"""Why an operation fails on what it gets: the numbers that it cannot take, how many, and its safe form.

A reason is a clause that follows the operation's name: "gets 0 in 3 of 64 elements, and log of 0 is -inf".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import safe_forms
from .safe_forms import SafeForm


@dataclass
class Operation:
    """An operation as torch's dispatcher ran it.

    Args:
        name: its short name.
        args: its positional arguments.
        made_by: what made each tensor among them that is 0, by position: "count", "norm", ...
        parameters: the names of those that are parameters, by position.
        overload: torch's name of the variant.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made_by: dict[int, str] = field(default_factory=dict)
    parameters: dict[int, str] = field(default_factory=dict)
    overload: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Of its first floating tensor."""
        found = (a.dtype for a in self.args if isinstance(a, Tensor) and a.is_floating_point())
        return next(found, torch.float32)

    def get(self, place: int, name: str, default: Any = None) -> Any:
        """An argument."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


class Reason(NamedTuple):
    """Why an operation fails.

    Args:
        text: a clause that follows the operation's name.
        form: what to write instead.
        facts: numbers, for the evidence.
        parameter: the parameter that is to blame.
        op: a better name for the operation than its own.
        rows: of the batch, that it fails for, where leaving them out is a way.
        below: whether it gets numbers, or a determinant, below what it takes.
    """

    text: str
    form: SafeForm | None = None
    facts: dict[str, Any] = {}  # noqa: RUF012
    parameter: str | None = None
    op: str | None = None
    rows: tuple[int, ...] = ()
    below: bool = False


def reason(operation: Operation, backward: bool = False) -> Reason | None:
    """Why an operation's result, or in the backward pass its derivative, is not finite; None where that is unknown."""
    reader = _READERS.get(operation.name)
    if reader is None:
        return None
    try:
        with torch.no_grad():
            return reader(operation, backward)
    except Exception:  # arguments of a kind that the reader does not know
        return None


def known(name: str) -> bool:
    """Whether there may be a reason for an operation."""
    return name in _READERS


def counted(mask: Tensor) -> str:
    """Where a mask is True, in words."""
    n, of = int(mask.sum()), mask.numel()
    if of == 1:
        return ""
    if n == of:
        return f" in all {of} elements"
    place = "" if mask.dim() == 0 else f", the first in row {int(mask.nonzero()[0, 0])}"
    return f" in {n} of {of} elements{place}"


def _plain(x: Any) -> Tensor:
    return x.detach() if isinstance(x, Tensor) else torch.as_tensor(float(x))


def _number(x: float) -> str:
    return f"{x:.7g}"


def _division(op: Operation, backward: bool) -> Reason | None:
    x, d = (None, op.args[0]) if op.name in ("reciprocal", "rsqrt") else (op.args[0], op.args[1])
    place = 0 if x is None else 1
    made, parameter, size = op.made_by.get(place, ""), op.parameters.get(place), _plain(d)
    zero = size == 0
    if op.name == "rsqrt" and bool((size < 0).any()):
        text = f"gets numbers below 0, down to {_number(float(size.min()))}{counted(size < 0)}"
        return Reason(text, safe_forms.negative_root("rsqrt"), below=True)
    if bool(zero.any()):
        what = _of_zero(made, parameter, isinstance(d, Tensor))
        verb = "divides by" if op.name != "rsqrt" else "gets"
        facts = {"divided by": f"0, made by {made}" if made else "0"}
        form = safe_forms.division(made if isinstance(d, Tensor) else "count", op.dtype)
        if op.name == "rsqrt":
            form = safe_forms.root("rsqrt", op.dtype)
        if parameter is not None:
            form = SafeForm(f"start {parameter!r} above 0, and keep it there: its exponential, or .clamp_min(0.01)")
        where = counted(zero)
        return Reason(f"{verb} {what}{',' if where and ',' in what else ''}{where}", form, facts, parameter)
    if not bool(size.isfinite().all()):
        return Reason(f"divides by numbers that are not finite{counted(~size.isfinite())}")
    least = float(size.abs().min())
    if least < (1e-3 if op.dtype == torch.float16 else 1e-18):
        bad = size.abs() == least
        why = "the quotient overflows" if not backward else "the slope, 1 / d², overflows"
        form = safe_forms.division(made, op.dtype)
        return Reason(f"divides by {_number(least)}{counted(bad)}: {why}", form, {}, parameter)
    return None


def _of_zero(made: str, parameter: str | None, is_tensor: bool) -> str:
    if parameter is not None:
        return f"the parameter {parameter!r}, which is 0"
    if made == "count" or not is_tensor:
        return "a count of 0, or a sum of nothing"
    if made in ("std", "var"):
        return f"0, the {made} of equal numbers"
    if made in ("norm", "sqrt"):
        return f"0, the {made} of zeros"
    return f"0, made by {made}" if made else "0"


def _logarithm(op: Operation, backward: bool) -> Reason | None:
    x = _plain(op.args[0])
    x = x + 1 if op.name == "log1p" else x
    if bool((low := x < 0).any()):
        least = float(_plain(op.args[0]).min())
        text = f"gets numbers below {'-1' if op.name == 'log1p' else '0'}, down to {_number(least)}{counted(low)}"
        form = safe_forms.negative_logarithm(op.name)
        return Reason(f"{text}, which have no logarithm", form, {"smallest": least}, below=True)
    if bool((zero := x == 0).any()):
        what = "-1" if op.name == "log1p" else "0"
        return Reason(f"gets {what}{counted(zero)}: its logarithm is -inf", safe_forms.logarithm(op.name, op.dtype))
    if backward and float(x.min()) < 1e-18:
        text = f"gets {_number(float(x.min()))}: the slope, 1 / x, overflows"
        return Reason(text, safe_forms.logarithm(op.name, op.dtype))
    return None


def _root(op: Operation, backward: bool) -> Reason | None:
    x = _plain(op.args[0])
    if bool((low := x < 0).any()):
        least = float(x.min())
        text = f"gets numbers below 0, down to {_number(least)}{counted(low)}"
        return Reason(text, safe_forms.negative_root("sqrt"), {"smallest": least}, below=True)
    if backward and bool((zero := x == 0).any()):
        return Reason(f"gets 0{counted(zero)}, where its slope is infinite", safe_forms.root("sqrt", op.dtype))
    return None


def _power(op: Operation, backward: bool) -> Reason | None:
    base, exponent = _plain(op.args[0]), _plain(op.args[1])
    written = f"{float(exponent):g}" if exponent.numel() == 1 else "p"
    low = (base < 0) & (exponent != exponent.round())
    if bool(low.any()):
        text = f"gets numbers below 0, down to {_number(float(base.min()))}, and the exponent {written}{counted(low)}"
        return Reason(text, safe_forms.negative_root("pow", written), below=True)
    if bool((zero := (base == 0) & (exponent < 0)).any()):
        return Reason(f"gets 0 and the exponent {written}{counted(zero)}", safe_forms.power(written, op.dtype))
    if backward and bool((zero := (base == 0) & (exponent < 1) & (exponent != 0)).any()):
        text = f"gets 0 and the exponent {written}{counted(zero)}, where its slope is infinite"
        return Reason(text, safe_forms.power(written, op.dtype))
    return None


_LARGEST_EXPONENT = {torch.float16: 11.0, torch.float64: 709.0}


def _exponential(op: Operation, backward: bool) -> Reason | None:
    x = _plain(op.args[0])
    limit = _LARGEST_EXPONENT.get(op.dtype, 88.7) / (math.log(2.0) if op.name == "exp2" else 1.0)
    size = x.abs() if op.name in ("cosh", "sinh") else x
    if not bool((large := size > limit).any()):
        return None
    dtype = str(op.dtype).removeprefix("torch.")
    text = (
        f"gets numbers up to {_number(float(size.max()))}{counted(large)}, and {dtype} ends at {op.name} of {limit:g}"
    )
    parameter = op.parameters.get(0)
    if parameter is not None:
        text = f"gets the parameter {parameter!r}, which is {float(size.max()):.4g}, and {dtype} ends at {limit:g}"
    return Reason(text, safe_forms.exponential(op.name, op.dtype), {"largest": float(size.max())}, parameter)


def _softmax(op: Operation, backward: bool) -> Reason | None:
    x, dim = _plain(op.args[0]), op.args[1]
    dim = dim[0] if isinstance(dim, list | tuple) else dim
    nothing = (x == -math.inf).all(dim)
    if bool(nothing.any()):
        rows = f"{int(nothing.sum())} of {nothing.numel()} rows"
        first = nothing.nonzero()[0].tolist()
        form = safe_forms.masked_softmax(op.name, dim)
        return Reason(f"gets nothing but -inf in {rows}, the first at {first}: all of it is masked", form)
    if bool((x == math.inf).any()):
        return Reason(f"gets +inf{counted(x == math.inf)}")
    return None


def _attention(op: Operation, backward: bool) -> Reason | None:
    mask = op.kwargs.get("attn_mask", op.get(3, "attn_mask"))
    if isinstance(mask, Tensor):
        nothing = (~mask if mask.dtype == torch.bool else mask == -math.inf).all(-1)
        if bool(nothing.any()):
            rows = f"{int(nothing.sum())} of {nothing.numel()} rows"
            return Reason(f"gets a mask that leaves no key in {rows}", safe_forms.ATTENTION, op="softmax")
    return Reason("puts out NaN: in some row every key is masked", safe_forms.ATTENTION)


def _angle(op: Operation, backward: bool) -> Reason | None:
    x = _plain(op.args[0])
    size = x.abs()
    if bool((beyond := size > 1).any()):
        text = f"gets numbers outside [-1, 1], as {_number(float(x[beyond].flatten()[0]))}{counted(beyond)}"
        return Reason(text, safe_forms.angle(op.name, op.dtype))
    if (backward or op.name == "atanh") and bool((end := size == 1).any()):
        what = "its value" if op.name == "atanh" else "its slope"
        return Reason(f"gets 1 or -1{counted(end)}, where {what} is infinite", safe_forms.angle(op.name, op.dtype))
    return None


def _acosh(op: Operation, backward: bool) -> Reason | None:
    x = _plain(op.args[0])
    bad = x < 1 if not backward else x <= 1
    form = SafeForm("torch.acosh(x.clamp_min(1 + 1e-6))", safe_forms.on_first(safe_forms.at_least(1 + 1e-6)))
    return (
        Reason(f"gets {_number(float(x.min()))}{counted(bad)}, and begins above 1", form) if bool(bad.any()) else None
    )


def _logit(op: Operation, backward: bool) -> Reason | None:
    x = _plain(op.args[0])
    form = safe_forms.logit(op.dtype)
    if bool((outside := (x < 0) | (x > 1)).any()):
        return Reason(f"gets numbers outside [0, 1]{counted(outside)}", form)
    ends = (x == 0) | (x == 1)
    return Reason(f"gets 0 or 1{counted(ends)}, where it is infinite", form) if bool(ends.any()) else None


def _spread(op: Operation, backward: bool) -> Reason | None:
    x, dims = _plain(op.args[0]), op.get(1, "dim")
    correction = op.kwargs.get("correction")
    correction = (1 if correction is None else correction) if "correction" in op.overload else 1
    dims = range(x.dim()) if dims is None or isinstance(dims, bool) or dims == [] else dims
    count = math.prod(x.shape[d] for d in dims)
    if count <= correction:
        form = (
            safe_forms.ONE_VALUE
            if op.name == "std"
            else SafeForm("x.var(correction=0), or more than one sample", safe_forms.with_options(correction=0))
        )
        values = "one value" if count == 1 else f"{count} values"
        return Reason(f"is of {values}, and divides by {count} - {correction}", form, {"values": count})
    return None


def _mean(op: Operation, backward: bool) -> Reason | None:
    if op.args[0].numel() == 0:
        return Reason("is of no elements: 0 / 0", safe_forms.NOTHING, {"elements": 0})
    return None


def _norm(op: Operation, backward: bool) -> Reason | None:
    x, dims = _plain(op.args[0]), op.get(2, "dim")
    if x.numel() == 0:
        return Reason("is of no elements", safe_forms.NOTHING, {"elements": 0})
    zero = (x == 0).all(dims[0] if len(dims) == 1 else -1) if dims else (x == 0).all()
    if bool(zero.any()):
        eps = safe_forms.small(op.dtype)
        return Reason(f"is of zeros{counted(zero)}", SafeForm(f"torch.sqrt(x.square().sum(-1) + {eps:g})"))
    return None


def _distance(op: Operation, backward: bool) -> Reason | None:
    a, b = _plain(op.args[0]), _plain(op.args[1])
    same = (a[..., :, None, :] == b[..., None, :, :]).all(-1)
    if bool(same.any()):
        eps = safe_forms.small(op.dtype)
        form = SafeForm(f"(x[:, None] - y).square().sum(-1).add({eps:g}).sqrt()")
        return Reason(f"is of equal points{counted(same)}, where it has no slope", form)
    return None


def _decomposition(op: Operation, backward: bool) -> Reason | None:
    x = _plain(op.args[0]).double()
    if not bool(x.isfinite().all()):
        return Reason("gets numbers that are not finite")
    values = torch.linalg.eigvalsh(x) if op.name == "linalg_eigh" else torch.linalg.svdvals(x).flip(-1)
    name = "eigenvalues" if op.name == "linalg_eigh" else "singular values"
    gap = float(values.diff(dim=-1).abs().min()) if values.shape[-1] > 1 else math.inf
    form = safe_forms.singular_values(op.name)
    if gap <= 1e-6 * max(1e-30, float(values.abs().max())) or gap == 0:
        return Reason(f"gets a matrix with equal {name}, whose vectors have no derivative", form, {"smallest gap": gap})
    if op.name == "linalg_svd" and float(values.min()) < 1e-12:
        return Reason("gets a matrix with a singular value of 0", form)
    return None


def _determinant(op: Operation, backward: bool) -> Reason | None:
    sign = torch.linalg.slogdet(_plain(op.args[0]).double()).sign
    form = safe_forms.diagonal("logdet", op.dtype)
    if bool((sign < 0).any()):
        return Reason(f"gets a matrix whose determinant is below 0{counted(sign < 0)}", form, below=True)
    return (
        Reason(f"gets a matrix whose determinant is 0{counted(sign == 0)}", form) if bool((sign == 0).any()) else None
    )


def _weight_norm(op: Operation, backward: bool) -> Reason | None:
    v = _plain(op.args[0])
    dim = op.get(2, "dim", 0)
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    zero = (v == 0).all(others[0]) if len(others) == 1 else (v == 0).flatten(1).all(1)
    if not bool(zero.any()):
        return None
    parameter = op.parameters.get(0)
    rows = f"row {int(zero.nonzero()[0, 0])}" if int(zero.sum()) < zero.numel() else "every row"
    form = SafeForm("start the weight with random numbers: a row of zeros has no direction")
    return Reason(f"divides each row of the weight by its norm, which is 0 in {rows}", form, {}, parameter)


def _normalisation(op: Operation, backward: bool) -> Reason | None:
    eps = op.get({"layer_norm": 4, "group_norm": 7, "batch_norm": 7}[op.name], "eps")
    if eps is None or eps > 1e-30:
        return None
    return Reason(
        f"has eps={eps:g}, and divides by the spread of numbers that are all equal", safe_forms.epsilon(op.name)
    )


def _ctc(op: Operation, backward: bool) -> Reason | None:
    frames, targets, lengths, labels = op.args[:4]
    lengths, labels = (x.tolist() if isinstance(x, Tensor) else list(x) for x in (lengths, labels))
    start, first = 0, ""
    bad: list[int] = []
    for row, (length, count) in enumerate(zip(lengths, labels, strict=True)):
        sequence = targets[row, :count] if targets.dim() > 1 else targets[start : start + count]
        start += count
        repeats = int((sequence[1:] == sequence[:-1]).sum()) if count > 1 else 0
        if count + repeats > length:
            bad.append(row)
            again = f" and {repeats} repeats" if repeats else ""
            first = (
                first or f"row {row} has {count} labels{again}, which need {count + repeats} frames, and has {length}"
            )
    if not bad:
        return None
    return Reason(
        f"has no path for {len(bad)} of {len(lengths)} rows: {first}",
        safe_forms.CTC,
        {"rows": len(bad), "frames": frames.shape[0]},
        rows=tuple(bad),
    )


def _nll(op: Operation, backward: bool) -> Reason | None:
    target, weight, ignored = op.args[1], op.get(2, "weight"), op.get(4, "ignore_index", -100)
    kept = target[target != ignored]
    if kept.numel() == 0:
        text = f"averages over nothing: all {target.numel()} labels are {ignored}, which is ignore_index"
        return Reason(text, safe_forms.IGNORED, {"ignored": target.numel()})
    if weight is not None and float(weight[kept].sum()) == 0:
        classes = sorted(set(kept.flatten().tolist()))[:8]
        text = f"averages with weights that are all 0: the classes that occur, {classes}, have no weight"
        return Reason(text, safe_forms.NO_WEIGHT)
    return None


def _difference(op: Operation, backward: bool) -> Reason | None:
    a, b = _plain(op.args[0]), _plain(op.args[1])
    sign = -1 if op.name == "sub" else 1
    both = a.isinf() & b.isinf() & (a.sign() == -sign * b.sign())
    if not bool(both.any()):
        return None
    what = "inf less inf" if op.name == "sub" else "inf plus -inf"
    return Reason(f"gets infinities: {what} is NaN{counted(both)}", safe_forms.INF_LESS_INF)


def _product(op: Operation, backward: bool) -> Reason | None:
    a, b = _plain(op.args[0]), _plain(op.args[1])
    both = (a.isinf() & (b == 0)) | ((a == 0) & b.isinf())
    return Reason(f"multiplies 0 and inf{counted(both)}", safe_forms.ZERO_TIMES_INF) if bool(both.any()) else None


def _running_product(op: Operation, backward: bool) -> Reason | None:
    x = _plain(op.args[0])
    count = x.numel() if op.name == "prod" and len(op.args) == 1 else x.shape[op.args[1]]
    if not bool(x.isfinite().all()):
        return None
    return Reason(f"multiplies {count} numbers as large as {float(x.abs().max()):.4g}", safe_forms.PRODUCT)


def _gamma(op: Operation, backward: bool) -> Reason | None:
    x = _plain(op.args[0])
    bad = (x <= 0) & (x == x.round())
    form = SafeForm(f"torch.{op.name}(torch.nn.functional.softplus(x) + 1e-6)")
    return Reason(f"gets 0 or a negative whole number{counted(bad)}", form) if bool(bad.any()) else None


_READERS: dict[str, Callable[[Operation, bool], Reason | None]] = {
    **dict.fromkeys(("div", "reciprocal", "rsqrt"), _division),
    **dict.fromkeys(("log", "log2", "log10", "log1p"), _logarithm),
    **dict.fromkeys(("exp", "exp2", "expm1", "cosh", "sinh"), _exponential),
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp"), _softmax),
    **dict.fromkeys(("acos", "asin", "atanh"), _angle),
    **dict.fromkeys(("std", "var"), _spread),
    **dict.fromkeys(("linalg_eigh", "linalg_svd"), _decomposition),
    **dict.fromkeys(("layer_norm", "group_norm", "batch_norm"), _normalisation),
    **dict.fromkeys(("add", "sub"), _difference),
    **dict.fromkeys(("prod", "cumprod"), _running_product),
    **dict.fromkeys(("lgamma", "digamma"), _gamma),
    **dict.fromkeys(("attention", "transformer_encoder_layer_fwd", "native_multi_head_attention"), _attention),
    "acosh": _acosh,
    "cdist": _distance,
    "ctc_loss": _ctc,
    "linalg_slogdet": _determinant,
    "logit": _logit,
    "mean": _mean,
    "mse_loss": _mean,
    "mul": _product,
    "nll_loss": _nll,
    "norm": _norm,
    "pow": _power,
    "sqrt": _root,
    "weight_norm": _weight_norm,
}
