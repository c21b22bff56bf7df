"""Loss functions in place of the user's: the same objective, written so that it stays finite."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .evidence import Evidence
from .losses import LossCall

_F = "torch.nn.functional"


class Rewrite(NamedTuple):
    """A loss function that may be offered where its values are those of the user's own.

    Args:
        code: of the remedy.
        same_as: code whose values are compared in its place: what the user seems to have written, where that was wrong.
        at: path of the module that the comparison gives ordinary numbers to; "" for the model's output.
        divided: the code with logits divided by "{}": a temperature, which the comparison finds.
    """

    code: str
    same_as: str = ""
    at: str = ""
    divided: str = ""


def _supervised(function: str) -> str:
    return f"loss_fn = initlab.supervised({function})"


def equivalents(evidence: Evidence) -> list[Rewrite]:
    """The stable forms of the usual losses by hand: of log(softmax), of log(sigmoid), of log(sum(exp))."""
    if not _is_pair(evidence):
        return []
    y = evidence.leaves[-1].tensor
    found = []
    last = last_of(evidence.model, (nn.Softmax, nn.LogSoftmax, nn.Sigmoid))
    for function in _ON_CLASSES if not y.is_floating_point() and y.dim() == 1 else _ON_LABELS:
        code = _supervised(function)
        if last:
            found.append(Rewrite(f"{leave_out(last)}\n{code}", at=last))
        criterion = function if function.startswith("lambda") else f"{function}(z, y)"
        divided = _supervised(f"lambda z, y: {criterion.replace('(z', '(z / {}')}")
        found.append(Rewrite(code, divided=divided if "(z" in criterion and "lambda" not in function else ""))
    return found


_ON_CLASSES = (
    "torch.nn.CrossEntropyLoss()",
    'torch.nn.CrossEntropyLoss(reduction="sum")',
    f"lambda p, y: {_F}.nll_loss(p.clamp_min(1e-7).log(), y)",
)
_ON_LABELS = (
    "torch.nn.BCEWithLogitsLoss()",
    f"lambda z, y: {_F}.binary_cross_entropy_with_logits(z.flatten(), y.float().flatten())",
    f"lambda p, y: {_F}.binary_cross_entropy(p.flatten(), y.float().flatten())",
)


def _is_pair(evidence: Evidence) -> bool:
    targets = [leaf for leaf in evidence.leaves if leaf.is_target]
    return type(evidence.batch) in (tuple, list) and len(evidence.batch) == 2 and targets == evidence.leaves[-1:]


def leave_out(path: str) -> str:
    """The model without its last module."""
    return f"model.set_submodule({path!r}, torch.nn.Identity())  # the loss takes logits"


def in_right_space(evidence: Evidence, call: LossCall) -> tuple[list[str], list[Rewrite]]:
    """For a loss that gets logits for probabilities, or the other way round: what it takes, for the same loss."""
    softmax = last_of(evidence.model, (nn.Softmax,))
    last = last_of(evidence.model, (nn.Softmax, nn.LogSoftmax, nn.Sigmoid))
    wants_logits = call.name in ("cross_entropy", "binary_cross_entropy_with_logits")
    remedies, loss = [], []
    if wants_logits and last:
        remedies.append(leave_out(last))
    elif call.name in ("nll_loss", "kl_div") and call.problem == "probabilities" and softmax:
        dim = evidence.model.get_submodule(softmax).dim
        remedies.append(f"model.set_submodule({softmax!r}, torch.nn.LogSoftmax({dim}))  # the loss takes logarithms")
    elif call.problem == "logits":
        layer = "Sigmoid()" if call.name == "binary_cross_entropy" else "LogSoftmax(1)"
        with_logits = "BCEWithLogitsLoss" if call.name == "binary_cross_entropy" else "CrossEntropyLoss"
        remedies.append(f"model = torch.nn.Sequential(model, torch.nn.{layer})  # or {with_logits}, which takes logits")
    if call.name == "kl_div" and _is_pair(evidence):
        options = ", ".join(f"{name}={value!r}" for name, value in call.options.items())
        right, wrong = (
            _supervised(f"lambda z, y: {_F}.kl_div(z.{function}(-1), y, {options})".replace(", )", ")"))
            for function in ("log_softmax", "softmax")
        )
        loss.append(Rewrite(right, same_as=wrong))
    return [*remedies, f"# {_IN_WORDS[call.name]}"], loss


def together(evidence: Evidence, call: LossCall, last: str | None) -> list[str]:
    """A head and a loss that belong together, where they do not."""
    if call.problem == "several classes":
        advice = "# binary_cross_entropy_with_logits, which asks for each class by itself"
        return [_supervised("torch.nn.BCEWithLogitsLoss()") if _is_pair(evidence) else advice]
    if call.name == "binary_cross_entropy":
        if last:
            return [f"model.set_submodule({last!r}, torch.nn.Sigmoid())"]
        return ["# a sigmoid in place of the softmax before the loss"]
    if call.problem == "squashed":
        return [leave_out(last)] if last else [f"# {_IN_WORDS['cross_entropy']}"]
    if call.problem == "one unit":
        return [
            "# two outputs in the last layer, or one and binary_cross_entropy_with_logits with labels of 0.0 and 1.0"
        ]
    if call.problem == "one class":
        return [
            "# look at the labels: count them with .unique(return_counts=True), and shuffle before batches are made"
        ]
    return ["# class numbers as integers: .argmax(1) of one-hot rows; or a regression loss, if these are no classes"]


_IN_WORDS = {
    "cross_entropy": "leave the softmax, or the sigmoid, before the loss out: cross_entropy takes logits",
    "binary_cross_entropy_with_logits": "leave the sigmoid before the loss out: this loss takes logits",
    "nll_loss": "give the loss log-probabilities: z.log_softmax(1), or use cross_entropy, which takes logits",
    "binary_cross_entropy": "give the loss probabilities: z.sigmoid(), or use binary_cross_entropy_with_logits",
    "kl_div": "give kl_div the logarithm of the probabilities: z.log_softmax(-1) in place of z.softmax(-1)",
}


def last_of(model: nn.Module, kinds: tuple[type, ...]) -> str | None:
    """The path of the last leaf module, if it is one of some kinds."""
    leaves = [(path, module) for path, module in model.named_modules() if not module._modules and path]
    return leaves[-1][0] if leaves and isinstance(leaves[-1][1], kinds) else None
