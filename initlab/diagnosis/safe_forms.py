"""Safe forms of the operations that can fail: the code to write, and a function that does the same in a trial.

A safe form belongs into the user's own forward() or loss function, where no pasted code reaches. It is printed as a
comment, and what it would do is seen by running it in place of the operation: `Substitution`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import names
from .trace import ModuleMode

Change = Callable[[Any], Any]


class SafeForm(NamedTuple):
    """What to write in place of an operation.

    Args:
        code: an expression, and what to look at; x is what the operation gets.
        call: does the same, called with the operation's function, its arguments and its keyword arguments; None where
            only the user can tell what should stand there.
    """

    code: str
    call: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any] | None = None


EVERYWHERE = "*"  # no path of a module


class Substitution(ModuleMode):
    """Runs the safe form of an operation wherever one module, or the loss function, calls it. A context manager.

    Args:
        model: the model.
        module: path of the module; None for the loss function; EVERYWHERE for all of them.
        op: short name of the operation.
        form: its safe form.

    Attributes:
        count: of calls that it has replaced.
    """

    def __init__(self, model: nn.Module, module: str | None, op: str, form: SafeForm) -> None:
        super().__init__(model)
        self.module, self.op, self.form = module, op, form
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = self.module == EVERYWHERE or self.modules.current == self.module
        if self.form.call is None or not here or names.of_function(func) != self.op:
            return func(*args, **kwargs)
        self.count += 1
        return self.form.call(func, args, kwargs)


SUM_OF_MASKED = SafeForm(
    "sum over what is not masked; label smoothing sums over all classes, so mask with -1e4 in place of -inf there"
)


def is_reversed(func: Any) -> bool:
    """Whether a function is Python's reflected operator, whose operands are the other way round."""
    return getattr(func, "__name__", "").strip("_") in ("rdiv", "rtruediv", "rpow", "rsub", "reciprocal", "rsqrt")


def small(dtype: torch.dtype) -> float:
    """A number to add to what must not be 0, which the dtype can hold and whose reciprocal it can hold too."""
    return 1e-4 if dtype == torch.float16 else 1e-8


def edge(dtype: torch.dtype) -> float:
    """A distance from 1 that the dtype can tell from 1."""
    return {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-6)


def on_first(change: Change) -> Callable[..., Any]:
    """A call with the first argument changed."""

    def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return func(change(args[0]), *args[1:], **kwargs)
        return func(**{**kwargs, "input": change(kwargs["input"])})

    return call


def on_divisor(change: Change) -> Callable[..., Any]:
    """A division with its divisor changed."""

    def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_reversed(func) or len(args) < 2:
            return func(change(args[0]), *args[1:], **kwargs)
        return func(args[0], change(args[1]), *args[2:], **kwargs)

    return call


def on_base(change: Change) -> Callable[..., Any]:
    """A power with its base changed."""

    def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_reversed(func):
            return func(args[0], change(args[1]), *args[2:], **kwargs)
        return func(change(args[0]), *args[1:], **kwargs)

    return call


def with_options(**options: Any) -> Callable[..., Any]:
    """A call with other keyword arguments."""
    return lambda func, args, kwargs: func(*args, **{**kwargs, **options})


def passing_on(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call whose value is its own and whose derivative is 1: the straight-through estimator."""
    out = func(*args, **kwargs)
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not isinstance(out, Tensor) or x.shape != out.shape or not x.is_floating_point():
        return out
    return x + (out - x).detach()


def at_least(low: float) -> Change:
    """x.clamp_min(low)."""
    return lambda x: x.clamp_min(low) if isinstance(x, Tensor) else max(x, low)


def inside(low: float, high: float) -> Change:
    """x.clamp(low, high)."""
    return lambda x: x.clamp(low, high)


def replacing(bad: Callable[[Tensor], Tensor], by: float) -> Change:
    """torch.where(bad(x), by, x)."""
    return lambda x: torch.where(bad(x), torch.as_tensor(by, dtype=x.dtype, device=x.device), x)


def away_from_0(eps: float) -> Change:
    """Small magnitudes become eps, with their sign."""

    def change(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x or eps
        x = x.to(torch.get_default_dtype()) if not x.is_floating_point() else x
        return torch.where(x.abs() < eps, torch.where(x < 0, -eps, eps).to(x.dtype), x)

    return change


def unmasked(dim: int) -> Change:
    """Rows that hold nothing but -inf become rows of 0."""

    def change(x: Tensor) -> Tensor:
        nothing = (x == -torch.inf).all(dim, keepdim=True)
        return x.masked_fill(nothing, 0.0)

    return change


# The forms, by the operation and what is wrong with what it gets. A check prints `code`; see reasons.py.


def division(made_by: str, dtype: torch.dtype) -> SafeForm:
    """Of x / d where d is 0."""
    eps = small(dtype)
    if made_by == "count":
        return SafeForm("total / count.clamp_min(1), or skip a batch of which nothing counts", on_divisor(at_least(1)))
    if made_by in ("std", "var"):
        return SafeForm(f"x / (x.{made_by}() + {eps:g})", on_divisor(away_from_0(eps)))
    if made_by in ("norm", "sqrt"):
        return SafeForm(f"x / (d + {eps:g}), with d the {made_by}", on_divisor(away_from_0(eps)))
    return SafeForm(
        f"x / d.clamp_min({eps:g}), or torch.where(d > 0, x / torch.where(d > 0, d, 1.0), 0.0)",
        on_divisor(away_from_0(eps)),
    )


def logarithm(op: str, dtype: torch.dtype) -> SafeForm:
    """Of log(x) where x is 0."""
    eps = small(dtype)
    more = ", or a loss that takes logits: log_softmax, logsigmoid"
    if op == "log1p":
        return SafeForm(f"torch.log1p(x.clamp_min({eps:g} - 1))", on_first(at_least(edge(dtype) - 1)))
    return SafeForm(f"torch.{op}(x.clamp_min({eps:g})){more}", on_first(at_least(eps)))


def negative_logarithm(op: str) -> SafeForm:
    """Of log(x) where x is negative: no form is safe."""
    return SafeForm(
        f"a number below 0 has no {op}: look at the formula of x. What must be positive is made so: "
        "torch.nn.functional.softplus(x), or the network predicts the logarithm itself"
    )


def root(op: str, dtype: torch.dtype) -> SafeForm:
    """Of sqrt(x) where x is 0."""
    eps = small(dtype)
    return SafeForm(f"torch.{op}(x + {eps:g}): at 0 its slope is infinite", on_first(at_least(eps)))


def power(exponent: str, dtype: torch.dtype) -> SafeForm:
    """Of x ** p where x is 0."""
    eps = small(dtype)
    return SafeForm(f"x.clamp_min({eps:g}).pow({exponent})", on_base(at_least(eps)))


def negative_root(op: str, exponent: str = "") -> SafeForm:
    """Of a root, or a fractional power, of a negative number."""
    of = f"x.abs() ** {exponent} * x.sign()" if exponent else f"torch.{op}(x.clamp_min(0) + eps) where rounding made it"
    return SafeForm(f"a number below 0 has none: look at the formula of x; {of}")


_GUARDS: dict[str, tuple[Callable[[Change], Callable[..., Any]], Callable[[Tensor], Tensor], float, str]] = {
    "div": (on_divisor, lambda x: x == 0, 1.0, "x / torch.where(ok, d, 1.0)"),
    "reciprocal": (on_divisor, lambda x: x == 0, 1.0, "1 / torch.where(ok, d, 1.0)"),
    "pow": (on_base, lambda x: ~(x > 0), 1.0, "torch.where(ok, x, 1.0) ** p"),
    **{
        op: (on_first, lambda x: ~(x > 0), 1.0, f"torch.{op}(torch.where(ok, x, 1.0))")
        for op in ("log", "log2", "log10", "sqrt", "rsqrt")
    },
    **{
        op: (on_first, lambda x: ~(x.abs() < 1), 0.0, f"torch.{op}(torch.where(ok, x, 0.0))")
        for op in ("acos", "asin", "atanh", "log1p")
    },
    "exp": (on_first, lambda x: x > 20, 0.0, "torch.exp(torch.where(ok, x, 0.0))"),
    "logit": (on_first, lambda x: ~((x > 0) & (x < 1)), 0.5, "torch.logit(torch.where(ok, x, 0.5))"),
}


def guarded(op: str) -> SafeForm | None:
    """Of f(x) that a mask hides afterwards, as in torch.where(ok, f(x), 0): the argument is replaced first."""
    if op not in _GUARDS:
        return None
    on, bad, by, code = _GUARDS[op]
    return SafeForm(
        f"replace the argument before, and not only the result: torch.where(ok, {code}, 0.0)", on(replacing(bad, by))
    )


def angle(op: str, dtype: torch.dtype) -> SafeForm:
    """Of acos, asin, atanh at the ends of [-1, 1]."""
    e = edge(dtype)
    other = ", or torch.atan2 of sine and cosine" if op in ("acos", "asin") else ""
    return SafeForm(f"torch.{op}(x.clamp(-1 + {e:g}, 1 - {e:g})){other}", on_first(inside(-1 + e, 1 - e)))


def logit(dtype: torch.dtype) -> SafeForm:
    """Of logit at 0 and 1."""
    return SafeForm(f"torch.logit(x, eps={edge(dtype):g})", on_first(inside(edge(dtype), 1 - edge(dtype))))


def masked_softmax(op: str, dim: int) -> SafeForm:
    """Of softmax over a row of -inf."""
    return SafeForm(
        "leave one entry of each row unmasked: scores.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0), "
        f"then {op}; what such a row then gives is to be ignored",
        on_first(unmasked(dim)),
    )


ATTENTION = SafeForm(
    "let every query see one key: pad = pad & ~pad.all(-1, keepdim=True), or drop rows that are padding only"
)


def exponential(op: str, dtype: torch.dtype) -> SafeForm:
    """Of exp(x) for large x."""
    high = 10.0 if dtype == torch.float16 else 20.0  # what comes after may square it
    if op in ("cosh", "sinh"):
        code = f"torch.{op}(x.clamp(-{high:g}, {high:g})); log(cosh(x)) is x.abs() + F.softplus(-2 * x.abs()) - log(2)"
        return SafeForm(code, on_first(inside(-high, high)))
    code = f"torch.softmax or torch.logsumexp, which subtract the maximum, or {op} of x.clamp_max({high:g})"
    return SafeForm(code, on_first(lambda x: x.clamp_max(high)))


def singular_values(op: str) -> SafeForm:
    """Of decompositions where values are equal: their vectors have no derivative."""
    only = {"linalg_eigh": "torch.linalg.eigvalsh", "linalg_eig": "torch.linalg.eigvals"}.get(
        op, "torch.linalg.svdvals"
    )

    def change(x: Tensor) -> Tensor:
        rows, columns = x.shape[-2:]
        step = 1e-3 * torch.arange(1, columns + 1, dtype=x.dtype, device=x.device)
        return x + torch.eye(rows, columns, dtype=x.dtype, device=x.device) * step

    code = f"{only}(x), whose derivative exists, or values apart: x + torch.diag(1e-3 * torch.arange(n))"
    return SafeForm(code, on_first(change))


def diagonal(op: str, dtype: torch.dtype) -> SafeForm:
    """Of what needs a matrix that is positive definite, or not singular."""
    eps = 1e-4 if dtype in (torch.float32, torch.float16, torch.bfloat16) else 1e-8
    call = on_first(lambda x: x + eps * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))
    name = op.replace("linalg_", "linalg.")
    return SafeForm(f"torch.{name}(x + {eps:g} * torch.eye(n)), with an x that is symmetric and built as A @ A.T", call)


def epsilon(op: str) -> SafeForm:
    """Of what has an eps of 0."""
    return SafeForm(
        f"{op} with its usual eps, above 0: 1e-5 for a normalisation, 1e-8 for a norm", with_options(eps=1e-5)
    )


CTC = SafeForm(
    "torch.nn.CTCLoss(zero_infinity=True), or leave out rows with more labels, and repeats, than frames",
    with_options(zero_infinity=True),
)
IGNORED = SafeForm("skip such a batch, or reduction='sum' divided by max(1, count)")
NO_WEIGHT = SafeForm("give each class that occurs a weight above 0, or reduction='sum' divided by max(1e-8, weight)")
ONE_VALUE = SafeForm("x.std(correction=0), or more than one sample", with_options(correction=0))
NOTHING = SafeForm("x.sum() / max(1, x.numel()), for a selection that may be empty; or skip such a batch")
INF_LESS_INF = SafeForm(
    "mask after the arithmetic, not before it; or mask with a large finite number: torch.finfo(x.dtype).min / 2"
)
ZERO_TIMES_INF = SafeForm("x.masked_fill(mask, -torch.inf), and not mask * -inf, which is NaN where the mask is 0")
LOGITS = SafeForm("give kl_div the logarithm of the probabilities: z.log_softmax(-1)")
PRODUCT = SafeForm("add logarithms in place of multiplying: x.log().sum(), and torch.exp at the end where it is needed")
DEFAULT = {
    "square": "a smaller x: its square must fit",
    "mean": NOTHING.code,
    "where": "replace the argument first: torch.log(torch.where(ok, x, 1.0)), then torch.where(ok, ..., 0.0)",
    "batch_norm": "more than one value per channel: drop_last=True, GroupNorm, or eval mode",
    "norm": "torch.sqrt(x.square().sum(-1) + eps)",
    "xlogy": "torch.xlogy(p, p.clamp_min(eps))",
    "kl_div": LOGITS.code,
    "ctc_loss": CTC.code,
    "cosine_similarity": "its own eps, above 0",
    "softmax": "leave one entry of each row unmasked",
    "div": "x / d.clamp_min(eps)",
    "linalg_svd": "torch.linalg.svdvals(x), or values apart: x + torch.diag(1e-3 * torch.arange(n))",
    "linalg_eigh": "torch.linalg.eigvalsh(x), or values apart: x + torch.diag(1e-3 * torch.arange(n))",
    "cdist": "(x[:, None] - y).square().sum(-1).add(eps).sqrt()",
}  # for what no reason was found
