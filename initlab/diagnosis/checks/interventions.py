"""Interventions: what usually sets a run going that stands still, or calms one that its optimizer's settings drive off.

Each is one change, the smallest first. None is a suspicion from numbers alone: only the experiment speaks for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import fixes
from ..evidence import Evidence, ParameterStats, half
from ..limits import LIMITS
from ..outcomes import Outcome
from ..report import Kind, Place
from ..safe_forms import SafeForm
from ..stats import stored
from .cutoffs import noise
from .finding import Finding, course, parameters_held, severity_of

_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta")
_MEANS = ("exp_avg", "momentum_buffer", "grad_avg")
_NAMED = 8  # features that a place lists
_TORCHS = frozenset(vars(nn.Module()))  # attributes that every module has


def of_optimizer(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    """Settings and state of the optimizer that may be what a run fails from, each undone alone.

    Args:
        run: the run as it is.
    """
    groups = evidence.optimizer.param_groups if evidence.optimizer is not None else []
    rises = run.effect in ("breaks", "rises", "plateau")
    turned = _blows_up(run) or (evidence.negated and run.losses[-1] > max(0.0, run.losses[0]))
    if any(group.get("maximize") for group in groups) and rises and turned:
        yield _of_optimizer(
            run,
            f"the optimizer maximises{', and the loss has a minus in front' * evidence.negated}",
            {"maximize": True},
            "maximize=False",
            fixes.minimise(),
        )
    for name, usual in _USUAL.items():
        given = [group[name] for group in groups if name in group]
        odd = next((value for value in given if _is_odd(name, value)), None)
        if odd is not None:
            change = f"{name}={usual}"
            why = f"{name} is {odd}, which lets the steps grow or holds them back"
            yield _of_optimizer(run, why, {name: odd}, change, fixes.set_in_groups(name, usual))
    yield from _stale_state(evidence, run)
    decay = max((float(group.get("weight_decay") or 0.0) for group in groups), default=0.0)
    if decay and (not rises or _outweighs(evidence, decay)):
        why = f"weight_decay is {decay:g}, and outweighs the gradients"
        code = fixes.set_in_groups("weight_decay", 0.0)
        yield _of_optimizer(run, why, {"weight decay": decay}, "weight_decay=0", code)


def _stale_state(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    """State of the optimizer that does not fit the gradients."""
    stale = _stale(evidence)
    if stale is not None:
        parameter, name, ratio = stale
        yield Finding(
            "optimizer",
            severity_of(run),
            Place(module=parameter.ref.module_name, parameter=parameter.name),
            f"{course(run)}; without the optimizer's state it falls. "
            + (
                f"Its {name} of {parameter.name} is {ratio:.2g} times the gradient's size: it is of another scale "
                "of the loss, or of another run."
                if ratio
                else f"Its {name} of {parameter.name} is all 0, and its mean of the gradients is not: an update "
                "divides by it. It was lost, or saved in 16 bits."
            ),
            {"state against gradient": ratio},
            ["optimizer.state.clear()"],
            suspicion=True,
            change="the optimizer's state cleared",
        )


def lost_moments(evidence: Evidence) -> Finding | None:
    """Second moments of 0 beside a mean of the gradients that is not: the first update divides by eps."""
    stale = _stale(evidence)
    if stale is None or stale[2] or evidence.broke_at == 1:
        return None
    found = next(iter(_stale_state(evidence, evidence.untreated or Outcome())))
    found.structural = True
    return found


def of_rise(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    """What may drive a run off, and a smaller rate only hides: settings of the optimizer, extreme noise, rewards."""
    if run.effect == "plateau":
        yield from _evaluating(evidence, run)
    yield from of_optimizer(evidence, run)
    yield from noise(evidence, run)
    yield from _parts_of_targets(evidence, run)


def of_standstill(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    """What may set a run going: tensors to learn, the rate, the optimizer, precision, inputs, weights, noise."""
    parts = _unregistered, _left_out, _evaluating, _rates
    for part in (*parts, of_optimizer, _precision, _inputs, _weights, noise, _flat_logits):
        yield from part(evidence, run)


def of_little(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    """What may hold a run back that learns a little: only where something shows that part of the model stays still."""
    for part in (_unregistered, _left_out, _evaluating, _stale_state, _precision, noise):
        yield from part(evidence, run)


def _of_optimizer(run: Outcome, why: str, facts: dict[str, Any], change: str, code: str) -> Finding:
    text = f"{course(run)}; with {change} it falls: {why}."
    return Finding("optimizer", severity_of(run), Place(), text, facts, [code], suspicion=True, change=change)


# Settings by their name in an optimizer's groups, with what torch gives them by default, or what is usual.
_USUAL: dict[str, Any] = {"momentum": 0.9, "betas": (0.9, 0.999), "dampening": 0.0, "eps": 1e-8}


def _is_odd(name: str, value: Any) -> bool:
    """Whether a setting is outside what an optimizer can run with, or extreme."""
    if name == "betas":
        known = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(x, int | float) for x in value)
        return known and not (0 <= value[0] < LIMITS.highest_momentum and 0 <= value[1] < 1 - 1e-5)
    if not isinstance(value, int | float):
        return False
    if name == "momentum":
        return not 0 <= value < LIMITS.highest_momentum
    if name == "dampening":
        return value >= LIMITS.highest_momentum
    return value > LIMITS.highest_eps


def _stale(evidence: Evidence) -> tuple[ParameterStats, str, float] | None:
    """The parameter whose state is furthest above its gradient, the state's name, and how far."""
    state = evidence.optimizer.state if evidence.optimizer is not None else {}
    found = []
    for one in evidence.parameters:
        held = state.get(one.ref.tensor) if one.grad is not None and one.grad.rms else None
        for name, value in held.items() if isinstance(held, dict) else ():
            if name in (*_SQUARES, *_MEANS) and isinstance(value, Tensor) and value.numel():
                assert one.grad is not None
                x = stored(value.detach()).float()
                size = float(x.mean().clamp_min(0).sqrt() if name in _SQUARES else x.square().mean().sqrt())
                if math.isfinite(size) and size > LIMITS.stale * one.grad.rms:
                    found.append((one, name, size / one.grad.rms))
                elif name in _SQUARES[:3] and not size and bool(stored((held or {}).get("exp_avg", value)).any()):
                    found.append((one, name, 0.0))
    return max(found, key=lambda each: each[2], default=None)


def _outweighs(evidence: Evidence, decay: float) -> bool:
    """Whether weight decay is larger than the gradients, or takes a large part of the weights in each step."""
    groups = evidence.optimizer.param_groups if evidence.optimizer is not None else []
    rate = max((float(group.get("lr", 0.0)) for group in groups), default=0.0)
    sizes = [s.rms * math.sqrt(s.numel) for one in evidence.parameters if (s := one.stats) is not None]
    gradient = evidence.steps[0].gradient if evidence.steps else None
    return rate * decay >= LIMITS.large_decay or decay * math.hypot(*sizes) > (gradient or 0.0)


def _blows_up(run: Outcome) -> bool:
    """Whether a loss that is never negative leaves its size behind; a reward grows, and does not explode."""
    known = [x for x in run.losses if math.isfinite(x)]
    return bool(known) and min(known) >= 0 and (run.effect == "breaks" or known[-1] > LIMITS.blow_up * known[0])


def _unregistered(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    """Tensors that modules hold to learn, and that are neither parameters nor in the optimizer."""
    found = unregistered(evidence)
    if found:
        first = next(iter(found))
        code = list(dict.fromkeys(found.values()))
        in_list = any(one.startswith("*") for one in code)
        why = (
            "it is of a module in a plain list or dict, which model.parameters() does not give"
            if in_list
            else "it wants a gradient, and is no nn.Parameter, so model.parameters() does not give it"
        )
        instead = "put the modules into an nn.ModuleList" if in_list else "make them nn.Parameters"
        yield Finding(
            "optimizer",
            severity_of(run),
            Place(parameter=first),
            f"{course(run)}; with {first} in the optimizer it falls: {why}.",
            {"tensors": len(found)},
            [f'optimizer.add_param_group({{"params": [{", ".join(code)}]}})  # or {instead}'],
            suspicion=True,
            change=f"{first} in the optimizer",
        )


def _left_out(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    """Parameters of the model that get a gradient, and are not in the optimizer."""
    left = evidence.movement.left_out if evidence.movement is not None else []
    if left:
        first = next((name for name in left if evidence.model.get_parameter(name).dim() > 1), left[0])
        yield Finding(
            "optimizer",
            severity_of(run),
            Place(parameter=first),
            f"{course(run)}; with {first} in the optimizer it falls: it gets a gradient, and the optimizer does not "
            "have it.",
            {"parameters it does not have": len(left)},
            [fixes.add_parameters()],
            suspicion=True,
            change=f"{first} in the optimizer",
        )


def unregistered(evidence: Evidence) -> dict[str, str]:
    """What modules hold to learn, as no parameter of the model's and in no optimizer: code by name."""
    if evidence.optimizer is None:
        return {}
    known = {id(p) for group in evidence.optimizer.param_groups for p in group["params"]}
    known |= {id(leaf.tensor) for leaf in evidence.leaves} | set(map(id, evidence.model.modules()))
    known |= set(map(id, evidence.model.parameters()))
    found: dict[str, str] = {}
    for path, module in evidence.model.named_modules():
        for name, held in vars(module).items():
            if name in _TORCHS:
                continue
            items = (
                enumerate(held) if isinstance(held, list | tuple) else held.items() if isinstance(held, dict) else ()
            )
            owner = f"model.get_submodule({path!r})" if path else "model"
            for at, x in [("", held), *((f"[{key!r}]", value) for key, value in items)]:
                name_of, code = f"{path}.{name}{at}".lstrip("."), f"{owner}.{name}{at}"
                if isinstance(x, nn.Module) and id(x) not in known:
                    learning = [one for one, p in x.named_parameters() if p.requires_grad and id(p) not in known]
                    found |= {f"{name_of}.{one}": f"*{code}.parameters()" for one in learning}
                elif isinstance(x, Tensor) and x.is_leaf and x.requires_grad and id(x) not in known:
                    found[name_of] = code
                known.add(id(x))
    return found


def _evaluating(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    """Norms that take their running statistics for the batch's: the model was left in evaluation mode."""
    norms = [
        path
        for path, module in evidence.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats and not module.training
    ]
    if norms:
        yield Finding(
            "operation",
            severity_of(run),
            Place(module=norms[0]),
            f"{course(run)}; in training mode it falls: {norms[0]} and the model are in evaluation mode, and running "
            "statistics that are not the batch's stand in for them.",
            {"norms in evaluation mode": len(norms)},
            ["model.train()  # before each epoch, and after each evaluation"],
            suspicion=True,
            change="model.train()",
        )


def _flat_logits(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    """Logits that hardly differ, whatever is learned: cosines without a scale, or divided where they are multiplied."""
    for call in evidence.trace.losses:
        if call.name == "cross_entropy" and call.classes > 1 and 0 < call.spread < LIMITS.flat_logits:
            factor = float(f"{min(100.0, 1.0 / call.spread):.1g}")
            form = SafeForm(
                f"torch.nn.functional.cross_entropy({factor:g} * x, y): cosines are divided by a temperature below 1, "
                "or multiplied with a scale above 1",
                functools.partial(_of_larger_logits, factor),
            )
            yield Finding(
                "loss",
                severity_of(run),
                Place(op="cross_entropy"),
                f"{course(run)}; with {factor:g} times the logits it falls: those of a row differ by "
                f"{call.spread:.2g}, so that their softmax is flat.",
                {"spread of logits": call.spread},
                fixes.advice(form, "cross_entropy", None),
                suspicion=True,
                change=f"logits times {factor:g}",
                form=form,
            )


def _of_larger_logits(factor: float, func: Any, args: Any, kwargs: Any) -> Any:
    return func(factor * args[0], *args[1:], **kwargs)


def _rates(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    optimizer = evidence.optimizer
    groups = [group for group in optimizer.param_groups if "lr" in group] if optimizer is not None else []
    rate = max((float(group["lr"]) for group in groups), default=0.0)
    if not rate or not evidence.steps:
        return
    planned = max(float(group.get("initial_lr", 0.0)) for group in groups)
    if rate < planned and (rate > LIMITS.nearly_no_rate * planned or run.effect != "stays"):
        return  # a schedule will raise it, or has brought it to its end
    slow = LIMITS.slow_update if run.effect == "stays" else LIMITS.hardly_an_update
    if (evidence.steps[0].update or 0.0) > slow:
        return  # slow, and as many tune a trained model
    codes = [(x * rate, fixes.smaller_rate(x, optimizer)) for x in (10.0, 100.0, 1e3) if x * rate <= 1.0]
    if planned > rate:
        codes.append((planned, fixes.planned_rate()))
    known = fixes.usual_rates(optimizer)
    codes += [(usual, code) for code in known[:1] if (usual := float(code.rpartition(" ")[2])) > 1e3 * rate]
    whence = f", of {planned:g} that its schedule begins or began with," if planned > rate else ""
    for new, code in codes:
        yield Finding(
            "learning rate",
            "warning",
            Place(),
            f"{course(run)}: the rate {rate:g}{whence} is too low, a step hardly changes the weights.",
            {"rate": rate, "rate that was tried": new},
            [code],
            suspicion=True,
            change=f"rate {float(f'{new:.1g}'):g}",
        )


def _precision(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    low = [one for one in evidence.parameters if half(one.ref.tensor.dtype) and one.grad_norm]
    moves = evidence.movement
    if not low or moves is None or not moves.rounded:
        return
    yield _of_parameter(
        "precision",
        low[0],
        run,
        f"{moves.rounded:.0%} of the 16-bit weights stay as they are in a step: the updates are rounded away",
        fixes.in_float32(evidence)[0],
        "float32 weights",
    )


def _inputs(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    for leaf in evidence.leaves:
        x = leaf.tensor
        if leaf.is_target or not x.is_floating_point() or x.dim() < 2 or x.shape[0] < 2 or not x.numel():
            continue
        with torch.no_grad():
            rows = x.detach().float().reshape(-1, x.shape[-1]) if x.dim() <= 3 else x.detach().float().reshape(-1, 1)
            spread, size = rows.std(0, correction=0), rows.square().mean(0).sqrt()
            varies = spread > 0
            odd = varies & ((size > LIMITS.ordinary * 2) | (size < 0.1) | (size > LIMITS.target_offset * spread))
        if not bool(odd.any()):
            continue
        matter = (odd & (size >= 0.1 * size[odd].max())).nonzero().flatten().tolist()
        some = matter[:_NAMED] if x.dim() <= 3 and len(matter) < x.shape[-1] else None
        feature = some[0] if some and len(some) == 1 else some
        saturated = next((c for c in evidence.layers if c.activation in ("tanh", "sigmoid") and c.edge), None)
        why = f"root mean squares of its features run from {float(size.min()):.3g} to {float(size.max()):.3g}"
        facts: dict[str, Any] = {"largest feature": float(size.max()), "smallest feature": float(size.min())}
        if saturated is not None and saturated.edge >= LIMITS.saturated / 2:
            why += f", and {saturated.edge:.0%} of the {saturated.activation}s behind {saturated.path!r} are saturated"
            facts["saturated"] = saturated.edge
        yield Finding(
            "input",
            severity_of(run),
            Place(feature=feature, tensor=leaf.code),
            f"{course(run)}; with {leaf.code} standardised it falls: {why}.",
            facts,
            [fixes.standardise(leaf, evidence.batch)],
            suspicion=True,
            change=f"{leaf.code} standardised",
        )


def _parts_of_targets(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    """Large numbers of the batch that the loss makes its targets of, beside what a model puts out: rewards."""
    flow = evidence.trace.flow
    for leaf in evidence.leaves:
        x = leaf.tensor
        if flow is None or not x.is_floating_point() or not x.numel() or leaf.path not in flow.read:
            continue
        if leaf.path in flow.inputs or leaf.path in flow.compared:
            continue
        size = float(x.detach().float().square().mean().sqrt())
        if not LIMITS.target_rms <= size < math.inf or not bool((x != x.flatten()[0]).any()):
            continue
        yield Finding(
            "target",
            severity_of(run),
            Place(tensor=leaf.code),
            f"{course(run)}; with {leaf.code} standardised it falls: the targets are made with it, its root mean "
            f"square is {size:.3g}, and the loss and its gradients grow with that.",
            {"root mean square": size},
            [fixes.standardise_targets(leaf, evidence.batch)],
            suspicion=True,
            change=f"{leaf.code} standardised",
        )


def _weights(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    """Fresh starts of single parameters: constant ones, dead ones, and those far from their distribution."""
    suspects: list[tuple[float, ParameterStats, str]] = []
    held = parameters_held(evidence)
    for one in evidence.parameters:
        stats, wide = one.stats, one.ref.tensor.dim() > 1
        if stats is None or not stats.finite:
            continue
        if wide and not stats.largest and not one.ref.tensor.requires_grad and one.ref.tensor.shape[-1] > 1:
            suspects.append((math.inf, one, "all of it is 0, and it is frozen"))
        if not one.ref.tensor.requires_grad or id(one.ref.tensor) not in held:
            continue  # of another network, or as it was trained
        far = abs(math.log(stats.rms / one.distribution)) if one.distribution and stats.rms else 0.0
        if wide and stats.numel > 1 and not stats.std:
            suspects.append((math.inf, one, f"all of it is {stats.mean:g}"))
        elif not wide and one.ref.attribute != "bias" and not stats.largest:
            suspects.append((math.inf, one, "all of it is 0"))
        elif one.ref.attribute == "bias" and stats.largest > LIMITS.large_bias:
            suspects.append((math.log(stats.largest), one, f"it reaches {stats.largest:.3g}"))
        elif wide and far > math.log(LIMITS.distribution_factor):
            suspects.append((far, one, f"its root mean square is {stats.rms:.2g}, and {one.distribution:.2g} is usual"))
    suspects.sort(key=lambda each: -each[0])
    for _, one, why in suspects[: LIMITS.restarted]:
        code = fixes.fresh(evidence, [one])
        if code.startswith("initlab.init.zeros_") and one.ref.attribute != "bias":
            code = f"torch.nn.init.ones_(model.get_parameter({one.name!r}))"
        yield _of_parameter("weights", one, run, why, code, f"a fresh {one.name}")


def _of_parameter(kind: Kind, one: ParameterStats, run: Outcome, why: str, code: str, change: str) -> Finding:
    return Finding(
        kind,
        severity_of(run),
        Place(module=one.ref.module_name, parameter=one.name),
        f"{course(run)}; with {change} it falls. {one.name}: {why}.",
        {"root mean square": one.stats.rms if one.stats is not None else None},
        [code],
        suspicion=True,
        change=change,
    )
