"""Checks of the loss function, by the arguments that torch's own were called with."""

from __future__ import annotations

from torch import nn

from .. import fixes, rewrites
from ..evidence import Evidence
from ..limits import LIMITS
from ..report import Kind, Place, Severity
from ..symptoms import diverges
from .finding import Finding, parameters_held, target_of

_PROBLEMS = {
    "cross_entropy, probabilities": "cross_entropy takes logits and gets probabilities: a softmax of a softmax.",
    "nll_loss, probabilities": "nll_loss takes log-probabilities and gets probabilities: it takes no logarithm itself.",
    "nll_loss, logits": "nll_loss takes log-probabilities and gets logits: it has no minimum.",
    "binary_cross_entropy, logits": "binary_cross_entropy takes probabilities and gets raw outputs.",
    "binary_cross_entropy_with_logits, probabilities": "binary_cross_entropy_with_logits applies a sigmoid itself "
    "and gets the output of another.",
    "ctc_loss, probabilities": "ctc_loss takes log-probabilities and gets probabilities: it takes no logarithm itself.",
    "ctc_loss, logits": "ctc_loss takes log-probabilities and gets logits: it has no minimum.",
    "kl_div, probabilities": "kl_div takes log-probabilities as its input and gets probabilities.",
}


def wrong_space(evidence: Evidence) -> Finding | None:
    """A loss function that gets logits for probabilities, or the other way round."""
    for call in evidence.trace.losses:
        why = _PROBLEMS.get(f"{call.name}, {call.problem}")
        if why is not None:
            written, losses = rewrites.in_right_space(evidence, call)
            fails = call.fatal or evidence.broke_at is not None or diverges(evidence)
            severity: Severity = "broken" if fails else "warning"
            return Finding("loss", severity, Place(op=call.name), why, dict(call.facts), written, losses)
    return None


_APART = {
    "cross_entropy, one unit": "cross_entropy over one logit is 0, whatever the model puts out: it needs one logit for "
    "each class, so two for yes and no.",
    "nll_loss, one unit": "nll_loss over one class is 0, whatever the model puts out: it needs one output for each.",
    "binary_cross_entropy, one unit": "a softmax over one unit is 1, whatever goes in, and its gradient exactly 0.",
    "binary_cross_entropy, squashed": "a softmax makes the outputs of a row sum to 1, and binary_cross_entropy asks "
    "each of them by itself.",
    "cross_entropy, several classes": "rows of the target have several classes, and cross_entropy takes one, or a "
    "distribution: its softmax cannot give 1 to all of them.",
    "cross_entropy, no distribution": "the target's rows do not sum to 1: cross_entropy takes class numbers, or "
    "distributions.",
    "cross_entropy, one class": "all labels are of one class: there is nothing to tell apart. Look at how they are "
    "made: an integer cast of values below 1 makes them all 0.",
}


def apart(evidence: Evidence) -> Finding | None:
    """A head, a loss and labels that do not belong together."""
    flow = evidence.trace.flow
    for call in evidence.trace.losses:
        why = _APART.get(f"{call.name}, {call.problem}")
        if call.name == "cross_entropy" and call.problem == "squashed":
            why = f"cross_entropy takes logits, and gets the output of a {call.facts['activation']}, which limits them."
        made_up = call.problem == "one class" and flow is not None and call.name not in flow.comparing
        if why is None or made_up:  # labels that the code makes, as contrastive losses do, are meant
            continue
        last = rewrites.last_of(evidence.model, (nn.Softmax, nn.Sigmoid, nn.Tanh, nn.ReLU))
        place = Place(module=last if "activation" in call.facts else None, op=call.name)
        stuck = bool(evidence.steps) and evidence.steps[0].gradient == 0
        kind: Kind = "target" if call.problem in ("one class", "no distribution") else "loss"
        severity: Severity = "broken" if stuck else "warning"
        written = rewrites.together(evidence, call, last)
        limited = call.facts.get("activation") == "tanh"  # it may be meant: logits from -1 to 1
        return Finding(kind, severity, place, why, dict(call.facts), written, suspicion=limited)
    return None


def unreachable(evidence: Evidence) -> Finding | None:
    """Targets that the last activation cannot put out."""
    flow = evidence.trace.flow
    for leaf in evidence.leaves:
        comparison = flow.compared.get(leaf.path) if flow is not None else None
        if comparison is None or comparison.target is None or not comparison.distance:
            continue
        name = comparison.activation
        single = name == "softmax" and comparison.columns == 1
        if not single and comparison.outside < LIMITS.outside:
            continue
        target = comparison.target
        why = f"a {name} last cannot put out {leaf.code}, whose values run from {target.low:.4g} to {target.high:.4g}."
        if single:
            why = "a softmax over one unit is 1, whatever goes in, and its gradient exactly 0."
        last = rewrites.last_of(evidence.model, (nn.Softmax, nn.Sigmoid, nn.Tanh, nn.ReLU, nn.Softplus))
        written = [f"model.set_submodule({last!r}, torch.nn.Identity())"] if last else []
        facts = {"activation": name, "share of targets outside": comparison.outside}
        stuck = bool(evidence.steps) and evidence.steps[0].gradient == 0
        return Finding(
            "loss",
            "broken" if stuck else "warning",
            Place(module=last, op=name),
            why,
            facts,
            [*written, f"# leave out the {name} before the loss"],
            change=f"without the {name}",
        )
    return None


def broadcast(evidence: Evidence) -> Finding | None:
    """A prediction and a target that are broadcast against each other: every row is compared with every other."""
    for call in evidence.trace.losses:
        if call.problem == "shapes":
            prediction, target = call.facts["prediction"], call.facts["target"]
            leaf = next((one for one in evidence.leaves if tuple(one.tensor.shape) == target), None)
            name = "the difference" if call.name == "sub" else call.name
            why = (
                f"{name} gets shapes {prediction} and {target}, which broadcast to {call.facts['broadcast']}: every "
                "row's prediction is compared with every row's target."
            )
            severity: Severity = "warning" if evidence.broke_at is None else "broken"
            written = fixes.reshape(leaf, evidence.batch, prediction)
            return Finding("loss", severity, Place(op=call.name), why, dict(call.facts), written)
    return None


def unseen_noise(evidence: Evidence) -> Finding | None:
    """A target that is drawn in the loss function, and that nothing the model gets is made of."""
    flow = evidence.trace.flow
    if flow is None or not flow.noise or evidence.broke_at is not None:
        return None  # a trial repeats its random draws, and learns them by heart: that it falls says nothing
    return Finding(
        "target",
        "warning",
        Place(op=flow.noise),
        f"the target of {flow.noise} is noise that is drawn in the loss function, and nothing that the model gets is "
        "made of it: the best answer is 0, and the loss stays at the variance of the noise.",
        {"loss": evidence.first_loss},
        ["# in the loss function: draw the noise once, make the model's input with it, and compare with the same one"],
    )


def constant_derivative(evidence: Evidence) -> Finding | None:
    """A loss that is made of a derivative without a graph: its part of the loss teaches nothing."""
    if not evidence.constant_derivative:
        return None
    return Finding(
        "gradient",
        "warning" if evidence.broke_at is None else "broken",
        Place(op="autograd.grad"),
        "the loss uses a derivative that torch.autograd.grad() gave without create_graph=True: to the optimizer it is "
        "a constant, and that part of the loss teaches nothing.",
        {},
        ["# in the loss function: torch.autograd.grad(..., create_graph=True), at each derivative that the loss uses"],
    )


def pushes_away(evidence: Evidence) -> Finding | None:
    """A loss that asks for more of what it is to make smaller: a sign is wrong."""
    held = parameters_held(evidence)
    groups = evidence.optimizer.param_groups if evidence.optimizer is not None else []
    if any(group.get("maximize") for group in groups):
        return None
    wrong = evidence.trace.slopes.wrong
    others = any(one.grad_norm and id(one.ref.tensor) not in held for one in evidence.parameters)
    if (
        wrong is None or evidence.broke_at == 1 or (others and wrong.what == "loss")
    ):  # a generator, against a discriminator that is not trained
        return None
    run = evidence.untreated
    fails = evidence.broke_at is not None or (run is not None and run.fails)
    what, advice = _AWAY[wrong.what]
    return Finding(
        "loss",
        "broken" if fails else "warning",
        Place(op=wrong.op),
        what.format(op=wrong.op) + ": it falls without end, and nothing is learned. A sign is wrong.",
        {"loss": evidence.first_loss},
        [f"# in the loss function: {advice.format(op=wrong.op)}"],
    )


_AWAY = {
    "distance": (
        "the loss pushes what the model puts out away from the targets",
        "add the square of the difference, or minus the log-likelihood",
    ),
    "loss": ("the loss subtracts the result of {op}", "add {op}"),
    "likelihood": ("the loss adds the log-probability of the labels", "a minus in front of the log-probability"),
    "divergence": (
        "the loss subtracts the divergence of the Gaussians, whose terms are 1 + log(v) - m ** 2 - v",
        "kl = -0.5 * (1 + logvar - mu ** 2 - logvar.exp()).sum(), and loss = reconstruction + kl",
    ),
}


def empty_reduction(evidence: Evidence) -> Finding | None:
    """A mean over nothing."""
    if evidence.broke_at is None:
        return None
    for call in evidence.trace.losses:
        if call.problem == "empty":
            empty = [leaf.code for leaf in evidence.leaves if leaf.tensor.numel() == 0]
            of = f"{empty[0]} is empty, and " if empty else ""
            if "ignored" in call.facts:
                of = f"all {call.facts['ignored']} labels are {call.facts['ignore_index']}, which is ignore_index: "
            why = f"{of}{call.name} averages over no elements: 0 / 0."
            advice = "# skip such a batch, or give the loss a sum and divide it by max(1, count)"
            labels = target_of(evidence, call.name) if "ignored" in call.facts else None
            place = Place(op=call.name, tensor=labels.code if labels is not None else None)
            return Finding("loss", "broken", place, why, dict(call.facts), [advice])
    return None
