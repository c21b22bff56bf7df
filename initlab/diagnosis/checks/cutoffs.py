"""Where the gradient ends: operations whose derivative is 0, noise that drops nearly all, second derivatives of ReLU.

Part of a model stays as it is, and the rest makes the loss fall a little. Each is tried in the user's own run: the same
operation with a derivative of 1, without the noise, or a smooth one.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .. import fixes, safe_forms
from ..evidence import Evidence
from ..limits import LIMITS
from ..outcomes import Outcome
from ..report import Place
from ..safe_forms import EVERYWHERE, SafeForm
from .finding import Finding, parameters_held, severity_of, severity_of_step

STEPS = ("round", "floor", "ceil", "trunc", "sign", "sgn", "heaviside", "frac", "fix")  # constant between their jumps
_ENDS = ("clamp", "clamp_min", "clamp_max", "clip", "hardtanh", "relu6", "hardsigmoid", "hardswish", "threshold")
_OF_ONE = ("layer_norm", "group_norm", "instance_norm", "batch_norm", "softmax", "log_softmax")
_NOT_SMOOTH = ("ThresholdBackwardBackward", "LeakyReluBackwardBackward", "HardtanhBackwardBackward")
_NOT_SMOOTH_MODULES = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh)


_LEFT_OUT = SafeForm("x", lambda func, args, kwargs: args[0] if args else kwargs["input"])


def flat(evidence: Evidence) -> Finding | None:
    """An operation whose derivative is 0 for all that it gets, with parameters behind it that get no other."""
    if not evidence.steps or evidence.steps[0].gradient == 0:
        return None
    held = parameters_held(evidence)
    silent = {
        id(one.ref.tensor): one.name
        for one in evidence.parameters
        if one.grad_norm == 0 and (not held or id(one.ref.tensor) in held)
    }
    for one in evidence.silent:
        behind = [name for key, name in silent.items() if key in one.leaves]
        if not behind or one.op not in (*STEPS, *_ENDS, *_OF_ONE) or _is_scaled_by_0(evidence, one.call.module):
            continue
        everywhere = any(other.op == one.op and other.call.module != one.call.module for other in evidence.silent)
        where = fixes.code_of(one.call.module)
        why, instead = _of_flat(one.op)
        return Finding(
            "gradient",
            severity_of_step(evidence),
            Place(module=one.call.module, op=one.op),
            f"the derivative of {one.op} is 0 for all that it gets: {why}. No gradient reaches {behind[0]}"
            + (f" and {len(behind) - 1} more." if behind[1:] else "."),
            {"parameters behind it": len(behind), **({"line": one.call.line} if one.call.line else {})},
            [f"# in {where}: {instead}"],
            suspicion=one.op not in STEPS,
            change=f"{one.op} with a derivative of 1" if one.op in STEPS else f"without {one.op}",
            form=SafeForm("x + (f(x) - x).detach()", safe_forms.passing_on) if one.op in STEPS else _LEFT_OUT,
            within=EVERYWHERE if everywhere else None,
            structural=True,
        )
    return None


def _is_scaled_by_0(evidence: Evidence, path: str | None) -> bool:
    """Whether a module's own weight is 0, as of a residual branch that begins as nothing: it learns first."""
    weight = getattr(evidence.model.get_submodule(path), "weight", None) if path else None
    return isinstance(weight, nn.Parameter) and weight.requires_grad and not bool(weight.detach().any())


def _of_flat(op: str) -> tuple[str, str]:
    """Why such a derivative is 0, and what to write in its place."""
    if op in STEPS:
        return "it is constant between its jumps", f"x + ({op}(x) - x).detach(), or something else with a derivative"
    if op in _ENDS:
        return "all of that is beyond its ends", f"leave {op} out, or give it ends that its values lie between"
    if "softmax" in op:
        return "it puts out nothing but 0 and 1", "smaller numbers before the softmax, or more than one of them"
    return "it runs over one element", f"leave {op} out: over one element its result does not depend on x"


def not_smooth(evidence: Evidence) -> Finding | None:
    """A loss of second derivatives, of a model whose activations have none, where the run hardly learns from it."""
    run = evidence.untreated
    if evidence.broke_at is not None or not any(name.startswith(_NOT_SMOOTH) for name in evidence.nodes):
        return None
    if run is not None and run.fallen > LIMITS.learns:
        return None
    modules = [path for path, module in evidence.model.named_modules() if isinstance(module, _NOT_SMOOTH_MODULES)]
    op = next((c.activation for c in evidence.layers if c.activation in ("relu", "leaky_relu", "relu6")), "relu")
    code = f"for path in {modules!r}:\n    model.set_submodule(path, torch.nn.Tanh())"
    stuck = bool(evidence.steps) and evidence.steps[0].gradient == 0
    return Finding(
        "gradient",
        "broken" if stuck else "warning",
        Place(module=modules[0] if modules else "", op=op),
        f"the loss takes derivatives of the model's derivatives, and the second derivative of {op} is 0 "
        "everywhere: no gradient comes of that part of the loss.",
        {"activation": op},
        [code] if modules else [f"# in the model's forward(): torch.tanh(x), or another smooth one, in place of {op}"],
        suspicion=True,
        change=f"tanh in place of {op}",
        form=None if modules else SafeForm("torch.tanh(x)", lambda func, args, kwargs: args[0].tanh()),
        within=EVERYWHERE,
    )


def wrong_backward(evidence: Evidence) -> Finding | None:
    """A torch.autograd.Function of the user's whose backward() is not the derivative of its forward()."""
    bad = evidence.backward
    if bad is None:
        return None
    op = bad.function
    if bad.forgets:
        why = "gives the same for a gradient that is a thousandth as large: it forgets to multiply by grad_output"
        advice = f"# in {op}.backward(): return grad_output * the derivative"
    elif bad.factor is not None and bad.factor < 0:
        why = f"has the wrong sign: it gives {bad.factor:.3g} times the derivative of forward(), so steps go uphill"
        advice = (
            f"# in {op}.backward(): change the sign; torch.autograd.gradcheck({op}.apply, ...) in float64 checks it"
        )
    else:
        times = f"{bad.factor:.3g} times" if bad.factor is not None else "something other than"
        why = f"gives {times} the derivative of forward()"
        advice = f"# correct {op}.backward(); torch.autograd.gradcheck({op}.apply, ...) in float64 checks it"
    return Finding(
        "gradient",
        severity_of(evidence.untreated) if evidence.broke_at is None and evidence.untreated else "broken",
        Place(module=bad.module, op=op),
        f"backward() of {op} {why}. All gradients behind it are wrong.",
        {"line": bad.line} if bad.line else {},
        [advice],
    )


def much_noise(evidence: Evidence) -> Finding | None:
    """Dropout of nine in ten and more, which a few steps with one and the same mask need not show."""
    if evidence.broke_at is not None:
        return None
    found = next(iter(noise(evidence, evidence.untreated or Outcome())), None)
    if found is None or found.evidence["dropped"] < LIMITS.nearly_all:
        return None
    found.structural = True
    return found


def noise(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    """Dropout that leaves nearly nothing: of a module, or of a function that a forward() calls."""
    for path, module in evidence.model.named_modules():
        for name in ("p", "dropout"):
            share = getattr(module, name, None)
            if not isinstance(module, _NOISY) or not isinstance(share, float) or share < LIMITS.much_noise:
                continue
            code = f"model.get_submodule({path!r}).{name} = 0.0  # 0.1 to 0.5 is usual"
            yield _noise(run, Place(module=path), repr(path), share, [code], None)
    for where, op, share in evidence.trace.dropped:
        if share >= LIMITS.much_noise:
            code = f"# in {fixes.code_of(where)}: {op} with p of 0.1 to 0.5, and training=self.training"
            yield _noise(run, Place(module=where, op=op), fixes.code_of(where), share, [code], _LEFT_OUT)


_NOISY = (nn.modules.dropout._DropoutNd, nn.RNNBase, nn.MultiheadAttention)


def _noise(run: Outcome, place: Place, where: str, share: float, written: list[str], form: SafeForm | None) -> Finding:
    return Finding(
        "gradient",
        severity_of(run),
        place,
        f"dropout in {where} drops {share:.0%} of what it gets, and of the gradient.",
        {"dropped": share},
        written,
        suspicion=True,
        change=f"no dropout in {where}",
        form=form,
    )
