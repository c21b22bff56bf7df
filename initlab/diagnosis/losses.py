"""What the arguments of torch's loss functions tell: wrong targets, wrong spaces, empty reductions."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Stopped(Exception):
    """The pass was stopped before a call that cannot succeed; on a GPU it would take the process's context along."""


@dataclass
class LossCall:
    """A call of a loss function.

    Args:
        name: of the function.
        baseline: its value for a model that knows nothing about the inputs; None where that is not known.
        problem: what is wrong with it: "classes", "range", "empty", "probabilities", "logits", "shapes", "one unit",
            "several classes", "no distribution", "squashed", "one class", "signs", "order"; "" if nothing.
        facts: numbers about the problem.
        fatal: whether the call cannot succeed.
        options: its keyword arguments that are no tensors and not None.
        classes: how many the prediction has; 0 where it has none.
        spread: standard deviation of a row's logits over the classes.
        value: what it gave; NaN where it gave no single number.
        turned: whether a gradient goes to the target, and none to the prediction.
    """

    name: str
    baseline: float | None = None
    problem: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    fatal: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    classes: int = 0
    spread: float = 0.0
    value: float = math.nan
    turned: bool = False


def loss_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LossCall | None:
    """What the arguments of a call tell; None for a function that is not a known loss."""
    reader = _READERS.get(name)
    prediction = args[0] if args else kwargs.get("input", kwargs.get("log_probs", kwargs.get("input1")))
    place = 2 if name in _OF_PAIRS else 1
    target = args[place] if len(args) > place else kwargs.get("target", kwargs.get("targets"))
    if reader is None or not isinstance(prediction, Tensor) or not isinstance(target, Tensor):
        return None
    with torch.no_grad():
        call = reader(name, prediction, target, args, kwargs)
    call.turned = target.requires_grad and not prediction.requires_grad
    call.options = {k: v for k, v in kwargs.items() if isinstance(v, str | int | float)}
    if call.baseline is not None and kwargs.get("reduction") == "sum":
        call.baseline *= target.numel()
    return call


_ROWS = 64  # enough for a mean


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _classes(name: str, prediction: Tensor, target: Tensor, args: Any, kwargs: Any) -> LossCall:
    dim = 1 if prediction.dim() > 1 else 0
    count = prediction.shape[dim] if prediction.dim() else 1
    call = LossCall(name, baseline=math.log(count) if count > 1 else None, classes=count)
    if count > 1 and prediction.numel():
        call.spread = float(prediction[:_ROWS].detach().float().std(dim).mean())
    last_is_classes = (
        target.dim() > 1 and target.shape == prediction.shape[:-1] != prediction.shape[:1] + prediction.shape[2:]
    )
    if not target.is_floating_point() and last_is_classes:
        call.problem, call.fatal = "order", True
        call.facts = {"prediction": tuple(prediction.shape), "target": tuple(target.shape)}
        return call
    if not target.is_floating_point():
        ignored = _argument(args, kwargs, 4, "ignore_index", -100)
        kept = target[target != ignored]
        if kept.numel() == 0:
            call.problem, call.facts = "empty", {"ignored": target.numel(), "ignore_index": ignored}
            return call
        wrong = (kept < 0) | (kept >= count)
        if wrong.any():
            call.problem, call.fatal = "classes", True
            call.facts = {"classes": count, "smallest": int(kept.min()), "largest": int(kept.max())}
            call.facts["rows"] = int(wrong.sum())
            call.facts["outside"] = kept[wrong].unique()[:8].tolist()
            return call
    last = last_activation(prediction)
    _labels(call, target, count, dim)
    if call.problem or prediction.numel() == 0:
        return call
    if name == "cross_entropy" and last in ("sigmoid", "tanh", "relu"):
        call.problem, call.facts = "squashed", {"activation": last}
        return call
    prediction = prediction.detach().float()
    if count < 2 or not prediction.isfinite().all():
        return call
    sums = prediction.sum(dim)
    if bool((prediction >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all()):
        call.problem, call.facts = "probabilities", {"row sums": float(sums.mean())}
    elif name == "nll_loss" and prediction.dim() > 1 and bool((prediction.logsumexp(0).abs() < 1e-2).all()):
        pass  # a log_softmax over the batch, which has a check of its own
    elif name == "nll_loss" and bool((prediction.logsumexp(dim).abs() > 0.1).any()):
        call.problem, call.facts = "logits", {"largest log-probability": float(prediction.max())}
    return call


def _labels(call: LossCall, target: Tensor, count: int, dim: int) -> None:
    """What is wrong with the labels of a classification, if anything is."""
    if count == 1:
        call.problem, call.facts = "one unit", {"units": 1}
    elif target.is_floating_point() and target.dim() > dim and target.numel():
        sums = target.sum(dim)
        if bool(((target == 0) | (target == 1)).all()) and bool((sums > 1).any()):
            call.problem, call.facts = "several classes", {"most in a row": int(sums.max())}
        elif bool((target < 0).any()) or bool(((sums - 1).abs() > 1e-2).any()):
            call.problem = "no distribution"
            call.facts = {"smallest": float(target.min()), "largest": float(target.max())}
    elif not target.is_floating_point() and target.dim() == 1 and len(target) >= _SEVERAL:
        first = int(target[0])
        if first >= 0 and bool((target == first).all()):
            call.problem, call.facts = "one class", {"class": first, "rows": len(target)}


_SEVERAL = 16  # rows that are not of one class by chance


def _bce(name: str, prediction: Tensor, target: Tensor, args: Any, kwargs: Any) -> LossCall:
    call = LossCall(name, baseline=math.log(2.0))
    if prediction.numel() == 0:
        call.problem = "empty"
    elif name == "binary_cross_entropy" and bool(((prediction < 0) | (prediction > 1)).any()):
        call.problem, call.fatal = "logits", True
        call.facts = {"smallest": float(prediction.min()), "largest": float(prediction.max())}
    elif name == "binary_cross_entropy" and last_activation(prediction) == "softmax":
        call.problem = "one unit" if prediction.shape[-1] == 1 else "squashed"
        call.facts = {"activation": "softmax", "units": prediction.shape[-1]}
    elif bool(((target < 0) | (target > 1)).any()):
        call.problem, call.fatal = "range", name == "binary_cross_entropy"
        call.facts = {"smallest": float(target.min()), "largest": float(target.max())}
    elif name == "binary_cross_entropy_with_logits" and last_activation(prediction) == "sigmoid":
        call.problem, call.facts = "probabilities", {"largest": float(prediction.max())}
    return call


def _distance(name: str, prediction: Tensor, target: Tensor, args: Any, kwargs: Any) -> LossCall:
    call = LossCall(name)
    if prediction.numel() == 0:
        call.problem = "empty"
    elif multiplies(prediction, target):
        call.problem, call.facts = "shapes", shapes(prediction, target)
    elif name == "mse_loss" and target.numel() > 1 and target.is_floating_point():
        call.baseline = float(target.float().square().mean())
    return call


def multiplies(prediction: Tensor, target: Tensor) -> bool:
    """Whether tensors of equally many elements make more of them when they are broadcast: (n, 1) against (n,)."""
    if prediction.shape == target.shape or prediction.numel() != target.numel() or target.numel() < 2:
        return False
    try:
        return math.prod(torch.broadcast_shapes(prediction.shape, target.shape)) > target.numel()
    except RuntimeError:
        return False


def shapes(prediction: Tensor, target: Tensor) -> dict[str, Any]:
    """The facts about two tensors that are broadcast."""
    both = tuple(torch.broadcast_shapes(prediction.shape, target.shape))
    return {"prediction": tuple(prediction.shape), "target": tuple(target.shape), "broadcast": both}


def _kl_div(name: str, prediction: Tensor, target: Tensor, args: Any, kwargs: Any) -> LossCall:
    call = LossCall(name)
    if prediction.numel() and bool((prediction > 1e-4).any()) and bool((prediction >= 0).all()):
        call.problem, call.facts = "probabilities", {"largest": float(prediction.max())}
    return call


def _ctc(name: str, prediction: Tensor, target: Tensor, args: Any, kwargs: Any) -> LossCall:
    call = LossCall(name)
    x = prediction.detach().float()
    if x.numel() == 0 or x.shape[-1] < 2 or not bool(x.isfinite().all()):
        return call
    sums = x.sum(-1)
    if bool((x >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all()):
        call.problem, call.facts = "probabilities", {"row sums": float(sums.mean())}
    elif bool((x.logsumexp(-1).abs() > 0.1).any()):
        call.problem, call.facts = "logits", {"largest log-probability": float(x.max())}
    return call


def _signs(name: str, prediction: Tensor, target: Tensor, args: Any, kwargs: Any) -> LossCall:
    call = LossCall(name)
    if target.numel() and bool(((target == 0) | (target == 1)).all()) and bool((target == 0).any()):
        call.problem, call.facts = "signs", {"zeros": int((target == 0).sum()), "ones": int((target == 1).sum())}
    return call


def hinge_of_bits(name: str, argument: Any) -> LossCall | None:
    """A hinge loss by hand, max(0, 1 - y * z), whose y are 0 and 1: what the maximum is taken of tells."""
    node = argument.grad_fn if isinstance(argument, Tensor) else None
    if node is None or not node.name().startswith(("Rsub", "Sub")):
        return None
    for product, _ in node.next_functions:
        if product is None or not product.name().startswith("MulBackward"):
            continue
        factors = (getattr(product, f"_saved_{name}", None) for name in ("self", "other"))
        for y in factors:
            if isinstance(y, Tensor) and not y.requires_grad and y.shape == argument.shape and y.numel() > 1:
                call = _signs(name, argument, y, (), {})
                return call if call.problem and call.facts["ones"] else None
    return None


_PASSING = ("View", "UnsafeView", "Squeeze", "Unsqueeze", "Select", "Reshape", "Clamp", "Clone", "ToCopy", "Index")


_ACTIVATIONS = {
    "SigmoidBackward0": "sigmoid",
    "TanhBackward0": "tanh",
    "ReluBackward0": "relu",
    "SoftmaxBackward0": "softmax",
    "LogSoftmaxBackward0": "log_softmax",
    "SoftplusBackward0": "softplus",
}


def last_activation(tensor: Tensor) -> str:
    """The activation that made a tensor, as it is or reshaped; "" where none did."""
    node = tensor.grad_fn
    while node is not None:
        name = node.name()
        if name in _ACTIVATIONS:
            return _ACTIVATIONS[name]
        if not name.startswith(_PASSING) or not node.next_functions:
            return ""
        node = node.next_functions[0][0]
    return ""


_Reader = Callable[[str, Tensor, Tensor, Any, Any], LossCall]
_READERS: dict[str, _Reader] = {
    "cross_entropy": _classes,
    "nll_loss": _classes,
    "binary_cross_entropy": _bce,
    "binary_cross_entropy_with_logits": _bce,
    "mse_loss": _distance,
    "l1_loss": _distance,
    "smooth_l1_loss": _distance,
    "huber_loss": _distance,
    "poisson_nll_loss": _distance,
    "kl_div": _kl_div,
    "ctc_loss": _ctc,
    "hinge_embedding_loss": _signs,
    "soft_margin_loss": _signs,
    "margin_ranking_loss": _signs,
    "cosine_embedding_loss": _signs,
}
_OF_PAIRS = ("margin_ranking_loss", "cosine_embedding_loss")
