"""Checks of runs that are finite and do not learn: nothing moves, or the wrong way."""

from __future__ import annotations

import math
from typing import Any

from .. import fixes
from ..evidence import Evidence
from ..limits import LIMITS
from ..report import Place
from .cutoffs import STEPS
from .finding import Finding


def no_rate(evidence: Evidence) -> Finding | None:
    """A learning rate of 0: its own, or a schedule's."""
    optimizer = evidence.optimizer
    if optimizer is None or evidence.movement is None:
        return None
    groups = [group for group in optimizer.param_groups if "lr" in group]
    if not groups or any(float(group["lr"]) != 0 for group in groups) or evidence.movement.moved:
        return None
    planned = max(float(group.get("initial_lr", 0.0)) for group in groups)
    if planned and evidence.fresh_optimizer:
        return None  # a warm-up begins there: a note says so
    if planned:
        return Finding(
            "learning rate",
            "warning",
            Place(),
            "the learning rate is 0: its schedule has come to its end, and no step changes anything. The optimizer was "
            f"made with {planned:g}.",
            {"rate": 0.0, "rate it was made with": planned},
            [fixes.planned_rate(), *fixes.usual_rates(optimizer)],
            change=f"rate {planned:g}",
        )
    return Finding(
        "learning rate",
        "broken",
        Place(),
        "the learning rate is 0: no step changes anything.",
        {"rate": 0.0},
        fixes.usual_rates(optimizer),
    )


def turned_round(evidence: Evidence) -> Finding | None:
    """A loss whose target gets the gradient, and whose prediction, of what the optimizer has, runs without one."""
    moves = evidence.movement
    call = next((call for call in evidence.trace.losses if call.turned), None)
    if moves is None or call is None or moves.driven or not moves.left_out:
        return None
    names = {one.name: one.ref.module_name for one in evidence.parameters}
    ran = {one.path for one in evidence.trace.calls if not one.recorded}
    first = next((name for name in moves.without if names[name] in ran), None)
    if first is None:
        return None
    return Finding(
        "gradient",
        "broken",
        Place(module=names[first], parameter=first, op=call.name),
        f"{call.name} takes a prediction and then a target. The prediction is made with {first}, which the optimizer "
        f"has, and runs without a gradient; the target is made with {moves.left_out[0]}, and gets one: no_grad() or "
        "detach() is at the wrong one of the two.",
        {"parameters without a gradient": len(moves.without)},
        ["# in the loss function: torch.no_grad() round what makes the target, not round what makes the prediction"],
    )


def own_step(evidence: Evidence) -> Finding | None:
    """A step() that is not torch's, and changes nothing, or makes of finite gradients what is not finite."""
    optimizer, moves, bad = evidence.optimizer, evidence.movement, evidence.bad_update
    if optimizer is None or type(optimizer).__module__.startswith("torch.optim") or _has_no_rate(evidence):
        return None
    name = type(optimizer).__name__
    if bad is not None and bad.step == 1:
        why = f"{name}.step() makes {bad.names[0]} not finite in step 1, of finite gradients and weights."
    elif moves is not None and moves.driven and not moves.moved and not moves.rounded and _is_level(evidence):
        why = f"{name}.step() changes no parameter, though {moves.driven} of those that it has get a gradient."
    else:
        return None
    rate = max((float(group.get("lr", 1e-3)) for group in optimizer.param_groups), default=1e-3)
    return Finding(
        "optimizer",
        "broken",
        Place(),
        why,
        {"rate": rate},
        [f"optimizer = torch.optim.Adam(model.parameters(), lr={min(rate, 1e-2):g})  # or mend {name}.step()"],
    )


def _is_level(evidence: Evidence) -> bool:
    """Whether the loss is the same before and after all steps: what steps it."""
    run = evidence.untreated
    return run is not None and len(set(run.losses)) == 1


def other_parameters(evidence: Evidence) -> Finding | None:
    """An optimizer that was made for other parameters than those that learn here."""
    moves = evidence.movement
    if moves is None or not moves.left_out or (moves.driven and not moves.strange):
        return None
    if (moves.detached and not moves.strange) or turned_round(evidence) is not None:
        return None  # it has the right ones: the gradient does not reach them
    names = {one.name: one.ref.module_name for one in evidence.parameters}
    first = moves.left_out[0]
    what = "nothing that the optimizer has gets a gradient" if not moves.driven else "the optimizer has old parameters"
    return Finding(
        "optimizer",
        "broken" if not moves.driven else "warning",
        Place(module=names.get(first), parameter=first),
        f"{what}, and it does not have {first}, which does: it was made for another model, or before a part of this "
        "one was replaced.",
        {"parameters it does not have": len(moves.left_out), "of no model that ran": moves.strange},
        [fixes.add_parameters()],
    )


def rounded_away(evidence: Evidence) -> Finding | None:
    """Updates that are smaller than half the distance to the next 16-bit number."""
    moves = evidence.movement
    if moves is None or moves.rounded is None or moves.rounded < LIMITS.rounded_away or _has_no_rate(evidence):
        return None
    if evidence.optimizer is None or not type(evidence.optimizer).__module__.startswith("torch.optim"):
        return None  # it may keep weights of more bits elsewhere
    worst = next((one for one in evidence.parameters if one.grad_norm and one.ref.tensor.dtype.itemsize == 2), None)
    return Finding(
        "precision",
        "broken" if moves.moved == 0 else "warning",
        Place(
            module=worst.ref.module_name if worst is not None else None,
            parameter=worst.name if worst is not None else None,
        ),
        f"{moves.rounded:.0%} of the 16-bit weights stay as they are: the updates are smaller than what 16 bits can "
        "add to them, and are rounded away.",
        {"share of weights": moves.rounded, "update against weights": evidence.steps[0].update},
        [*fixes.in_float32(evidence), *fixes.usual_rates(evidence.optimizer)],
    )


def upside_down(evidence: Evidence) -> Finding | None:
    """An optimizer that maximises a loss."""
    optimizer, first = evidence.optimizer, evidence.first_loss
    if optimizer is None or evidence.movement is None or not evidence.trace.losses or first is None or first <= 0:
        return None  # a likelihood or a reward may be meant to grow; a loss function of torch's is not
    if not all(group.get("maximize") for group in optimizer.param_groups):
        return None
    last = evidence.losses[-1]
    if last is not None and last <= first:
        return None
    return Finding(
        "optimizer",
        "broken",
        Place(),
        "the optimizer maximises: maximize=True makes the loss rise in every step.",
        {"losses": " -> ".join("none" if x is None else f"{x:.4g}" for x in evidence.losses)},
        [fixes.minimise()],
    )


def detached(evidence: Evidence) -> Finding | None:
    """Parameters that the loss depends on, and that no gradient reaches."""
    moves = evidence.movement
    if moves is None or not moves.detached:
        return _deaf_output(evidence)
    names = {one.name: one.ref.module_name for one in evidence.parameters}
    first = moves.detached[0]
    where = repr(names[first]) if names[first] else "the model itself"
    why, advice = "something after it is detached, or runs under no_grad()", ""
    cut = evidence.cut
    facts: dict[str, Any] = {"parameters without a gradient": len(moves.without)}
    if cut is not None:
        inside = " under no_grad()" if cut.no_grad else ""
        why = f"{cut.op} in {fixes.code_of(cut.module)} passes none on{inside}"
        advice = fixes.passing_on(cut)
        facts |= {"line": cut.line} if cut.line else {}
    return Finding(
        "gradient",
        "broken" if not moves.driven else "warning",
        Place(module=names[first], parameter=first, op=cut.op if cut is not None else None),
        f"the loss depends on {first}, which the optimizer has, and no gradient reaches it: {why}.",
        facts,
        [advice or f"# take out .detach(), .data, .item() or torch.no_grad() behind {where}"],
    )


def _deaf_output(evidence: Evidence) -> Finding | None:
    """An output that the loss depends on and gives no gradient to."""
    cut = evidence.cut
    if not evidence.deaf_output or cut is None:
        return None
    return Finding(
        "gradient",
        "warning" if evidence.steps[0].gradient else "broken",
        Place(op=cut.op),
        "the loss depends on what the model puts out, and gives it no gradient: "
        f"{cut.op} in {fixes.code_of(cut.module)} passes none on. What gradient there is comes of something else, such "
        "as a penalty on the weights.",
        {"line": cut.line} if cut.line else {},
        [fixes.passing_on(cut)],
    )


def too_slow(evidence: Evidence) -> Finding | None:
    """Steps in 32 bits or more that change nothing."""
    moves, optimizer = evidence.movement, evidence.optimizer
    if moves is None or optimizer is None or not moves.driven or moves.moved or _has_no_rate(evidence):
        return None
    if len(set(evidence.losses)) > 1 or any(group.get("initial_lr", 0) for group in optimizer.param_groups):
        return None
    rate = max((float(group["lr"]) for group in optimizer.param_groups if "lr" in group), default=math.nan)
    if not 0 < rate < LIMITS.slow_rate:
        return None  # something else holds the weights
    return Finding(
        "learning rate",
        "broken",
        Place(),
        f"the learning rate {rate:g} is too low: a step is smaller than what the weights can be changed by.",
        {"rate": rate},
        fixes.usual_rates(optimizer),
    )


def no_gradient(evidence: Evidence) -> Finding | None:
    """Gradients that are all exactly 0, and a loss that is not."""
    if evidence.broke_at is not None or not evidence.steps or evidence.steps[0].gradient != 0:
        return None
    first = next((one for one in evidence.parameters if one.grad_norm is not None), None)
    if first is None or not evidence.first_loss:
        return None
    silent = next((one for one in evidence.silent if one.whole), None)
    if silent is not None:
        op, call = silent.op, silent.call
        where = f"{call.module!r}" if call.module else "the model's own code" if call.module == "" else "the loss"
        return Finding(
            "gradient",
            "broken",
            Place(module=call.module, op=op),
            f"all gradients are exactly 0: {op} in {where} has a derivative of 0 for all that it gets, and no step "
            "changes anything.",
            {"loss": evidence.first_loss, **({"line": call.line} if call.line else {})},
            [
                f"# in {where}: something with a derivative in place of {op}"
                + (f", or x + ({op}(x) - x).detach()" if op in STEPS else "")
            ],
        )
    return Finding(
        "gradient",
        "broken",
        Place(module=first.ref.module_name, parameter=first.name),
        "all gradients are exactly 0: no step changes anything.",
        {"loss": evidence.first_loss},
    )


def _has_no_rate(evidence: Evidence) -> bool:
    groups = evidence.optimizer.param_groups if evidence.optimizer is not None else []
    return not any(float(group.get("lr", 1.0)) for group in groups)
