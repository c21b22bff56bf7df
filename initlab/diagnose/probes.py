"""The passes: one of the user's code under observation, and closer looks where that one leaves a suspicion."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..naming import slots
from .batch import Leaf, features, leaves, standardised
from .evidence import (
    Evidence,
    Held,
    Replay,
    Step,
    half,
    law_of,
    nearly_alike,
    rows_alike,
    state_faults,
    tiny_share,
    zero_share,
)
from .origin import Search
from .ranks import CommunicatesError
from .signs import gains
from .state import Snapshot, companions
from .stats import measure
from .trace import Trace, storage_of

LossFn = Callable[[Any, Any], Any]


class Patient:
    """The user's objects, and a snapshot that every probe starts from and returns to."""

    def __init__(self, model: nn.Module, batch: Any, loss_fn: LossFn, optimizer: Optimizer | None) -> None:
        self.model, self.batch, self.loss_fn, self.optimizer = model, batch, loss_fn, optimizer
        self.leaves = leaves(batch)
        self.companions = companions(loss_fn)
        self.snapshot = Snapshot([model, *self.companions], optimizer, [leaf.tensor for leaf in self.leaves])

    def loss(self) -> Tensor:
        """The user's loss, from the same random numbers each time."""
        self.snapshot.random.restore()
        loss = self.loss_fn(self.model, self.batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise UsageError(f"loss_fn returned {what}; it must return the loss, a tensor with one element")
        return loss

    def gradients_anew(self) -> Tensor:
        """The loss, with its gradients and no others."""
        self.forget_gradients()
        loss = self.loss()
        loss.backward()
        return loss

    def forget_gradients(self) -> None:
        """Detach all gradients; the snapshot keeps them."""
        groups = self.optimizer.param_groups if self.optimizer is not None else ()
        parameters: list[Tensor] = [p for m in (self.model, *self.companions) for p in m.parameters()]
        parameters += [p for group in groups for p in group["params"]]
        parameters += [leaf.tensor for leaf in self.leaves if leaf.tensor.is_leaf]
        for parameter in parameters:
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that there are, by name."""
        return {
            name: p.grad for name, p in self.model.named_parameters() if p.grad is not None and not p.grad.is_sparse
        }


class UsageError(TypeError):
    """The arguments of diagnose break its contract: raised to the caller, never a diagnosis."""


_FOR_THE_CALLER = (CommunicatesError, UsageError)


@contextmanager
def quiet() -> Iterator[None]:
    """Gradients on, warnings off, compiled code run as it was written."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "_dynamo" in vars(torch):  # nothing is compiled where this has not been imported, and it is slow to
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


# ---------------------------------------------------------------------------------------------------------------
# Before anything runs


def gather(patient: Patient) -> Evidence:
    """What the batch, the parameters and the optimizer say at rest."""
    for leaf in patient.leaves:
        leaf.features = features(leaf.tensor)
    parameters, buffers = slots(patient.model)
    held = [Held(s, None if is_lazy(s.tensor) else measure(s.tensor)) for s in (*parameters, *buffers)]
    for one in held:
        if one.stats is not None and one.slot.is_parameter:
            one.tiny = tiny_share(one.slot.tensor)
        if patient.optimizer is not None:
            one.state = state_faults(patient.optimizer.state.get(one.slot.tensor, {}))
    storages = {storage_of(leaf.tensor): leaf.path for leaf in patient.leaves}
    return Evidence(
        patient.model, patient.batch, patient.optimizer, patient.leaves, held, Trace(patient.model, storages)
    )


def runnable(evidence: Evidence) -> bool:
    """Whether the model can run at all: nothing on the meta device, nothing lazy."""
    return not any(h.slot.tensor.is_meta or is_lazy(h.slot.tensor) for h in evidence.held)


# ---------------------------------------------------------------------------------------------------------------
# Screening


def screen(patient: Patient, evidence: Evidence, steps: int) -> None:
    """Take the steps that were asked for, the first under observation, until something breaks."""
    for number in range(1, steps + 1):
        patient.forget_gradients()
        first = number == 1
        step = Step(None)
        evidence.steps.append(step)
        try:
            if first:
                with evidence.trace:
                    loss = patient.loss()
            else:
                loss = patient.loss()
            step.before = float(loss)
            loss.backward()
        except _FOR_THE_CALLER:
            raise
        except Exception as error:
            evidence.error, evidence.broke_at = error, number
            if first:
                _roles(evidence)
            return
        del loss
        gradients = patient.gradients()
        step.gradient = _norm(list(gradients.values()))
        if first:
            _roles(evidence)
            _read_gradients(evidence)
        if not step.finite:
            evidence.broke_at = number
            return
        if patient.optimizer is None:
            return
        try:
            step.update = _update(patient)
        except _FOR_THE_CALLER:
            raise
        except Exception as error:
            evidence.error, evidence.broke_at = error, number
            return
    evidence.after = _value(patient)
    if evidence.after is None or not math.isfinite(evidence.after):
        evidence.broke_at = steps + 1


def _roles(evidence: Evidence) -> None:
    """What modules read as it lies in the batch is input, and then the rest is target."""
    read = {path for call in evidence.trace.calls for path in call.reads_batch}
    for leaf in evidence.leaves:
        if leaf.path in read:
            leaf.is_target = False


def _read_gradients(evidence: Evidence) -> None:
    activations = {call.path: call.activation for call in evidence.layers}
    with torch.no_grad():
        norms = _norms([h.slot.tensor.grad for h in evidence.parameters if h.slot.tensor.grad is not None])
        for held in evidence.parameters:
            tensor, grad = held.slot.tensor, held.slot.tensor.grad
            held.law = law_of(held.slot, activations.get(held.slot.path, ""))
            if grad is not None and grad.layout == torch.strided:
                held.grad_norm, held.grad = next(norms), measure(grad)
            if rows_alike(tensor):
                held.alike = grad is not None and nearly_alike(grad)


def _norms(tensors: list[Any]) -> Iterator[float]:
    """2-norms of dense tensors; infinite only where an element is."""
    dense = [t.float() if half(t.dtype) else t for t in tensors if t.layout == torch.strided]
    for tensor, norm in zip(dense, torch._foreach_norm(dense) if dense else (), strict=True):
        size = float(norm)
        yield size if math.isfinite(size) else float(torch.linalg.vector_norm(_wide(tensor)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _norm(tensors: list[Any]) -> float | None:
    return math.hypot(*_norms(tensors)) if tensors else None


def _update(patient: Patient) -> float | None:
    """Let the optimizer take its step; the size of the update against the weights."""
    assert patient.optimizer is not None
    weights = [p for g in patient.optimizer.param_groups for p in g["params"] if p.dim() > 1 and p.grad is not None]
    with torch.no_grad():
        before = [p.detach().clone() for p in weights]
    _step(patient.optimizer, patient.gradients_anew)
    with torch.no_grad():
        moved = torch._foreach_sub([p.detach() for p in weights], before) if weights else []
        size = _norm(before)
        change = _norm(list(moved))
    return change / size if size and change is not None else None


def _step(optimizer: Optimizer, again: Callable[[], Tensor]) -> None:
    """Let an optimizer take its step; `again` computes loss and gradients anew, for those that search a line."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        optimizer.step(again)  # type: ignore[arg-type]
    else:
        optimizer.step()


def _value(patient: Patient) -> float | None:
    """The loss as it is now; None where an error is raised."""
    try:
        return float(patient.loss())
    except _FOR_THE_CALLER:
        raise
    except Exception:
        return None


# ---------------------------------------------------------------------------------------------------------------
# Closer looks. Each begins and ends with the patient as the snapshot has it.


def find_origin(patient: Patient, evidence: Evidence) -> None:
    """Look for the operation behind the first value that is not finite, in the step that broke, or in the first."""
    patient.snapshot.restore()
    for _ in range((evidence.broke_at or 1) - 1):
        patient.gradients_anew()
        assert patient.optimizer is not None
        _step(patient.optimizer, patient.gradients_anew)
    patient.forget_gradients()
    held = dict((*patient.model.named_parameters(), *patient.model.named_buffers()))
    search = Search(patient.model, {leaf.code: leaf.tensor for leaf in patient.leaves}, held)
    try:
        loss = search.forward(patient.loss)
        if evidence.broke_at is None:  # it is hidden: nothing that is not finite reaches the loss
            evidence.origin = search.first
        elif math.isfinite(float(loss)):
            evidence.origin = search.backward(loss)
        else:
            evidence.origin = search.origin(loss)
    except Exception:
        evidence.origin = search.first
    evidence.largest_low = search.largest
    patient.snapshot.restore()


class _InFloat32(TorchDispatchMode):
    """Casts to 16-bit floats give float32: autocast and .half() do nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in (torch.float16, torch.bfloat16):
            kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)


def replay_in_float32(patient: Patient, evidence: Evidence) -> None:
    """Run the same pass with every 16-bit number as float32."""
    patient.snapshot.restore()
    patient.forget_gradients()
    for tensor in (*patient.model.parameters(), *patient.model.buffers()):
        if half(tensor.dtype):
            tensor.data = tensor.data.float()
    widened = tree_map(lambda x: x.float() if isinstance(x, Tensor) and half(x.dtype) else x, patient.batch)
    evidence.float32 = _pass(patient, widened, _InFloat32())
    patient.snapshot.restore()


def replay_standardised(patient: Patient, evidence: Evidence, leaf: Leaf) -> None:
    """Run the same pass on an input that is brought to mean 0 and standard deviation 1."""
    patient.snapshot.restore()
    patient.forget_gradients()
    batch = tree_map(lambda x: standardised(x) if x is leaf.tensor else x, patient.batch)
    evidence.standardised = _pass(patient, batch, None)
    patient.snapshot.restore()


def _pass(patient: Patient, batch: Any, mode: Any) -> Replay:
    patient.snapshot.random.restore()
    loss = None
    try:
        with mode if mode is not None else ExitStack():
            value = patient.loss_fn(patient.model, batch)
            loss = float(value)
            value.backward()
    except Exception:
        return Replay(loss if loss is not None and not math.isfinite(loss) else None, None, {})
    gradients = patient.gradients()
    zeros = {name: zero_share(g) for name, g in gradients.items()}
    return Replay(loss, _norm(list(gradients.values())), zeros)


def search_rates(patient: Patient, evidence: Evidence) -> None:
    """The loss along the first update, shorter and shorter, until it falls."""
    assert patient.optimizer is not None
    patient.snapshot.restore()
    patient.gradients_anew()
    parameters = [p for group in patient.optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        start = [p.detach().clone() for p in parameters]
        _step(patient.optimizer, patient.gradients_anew)
        moved = [p.detach() - before for p, before in zip(parameters, start, strict=True)]
    evidence.rates.append((1.0, _or_inf(evidence.losses[1] if len(evidence.losses) > 1 else None)))
    for factor in (0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6):
        with torch.no_grad():
            for p, before, move in zip(parameters, start, moved, strict=True):
                p.copy_(before + factor * move)
        evidence.rates.append((factor, _or_inf(_value(patient))))
        first = evidence.first_loss
        if first is not None and evidence.rates[-1][1] < first:
            break
    patient.snapshot.restore()


def _or_inf(loss: float | None) -> float:
    """A loss that compares as it should: none and NaN are larger than any."""
    return math.inf if loss is None or math.isnan(loss) else loss


def keep_going(patient: Patient, evidence: Evidence, steps: int) -> None:
    """Losses of further steps from the start, at the rate in use."""
    patient.snapshot.restore()
    evidence.further = train(patient, steps)
    patient.snapshot.restore()


def train(patient: Patient, steps: int) -> list[float]:
    """Losses before each of some steps and after the last; they end where one is not finite or an error is raised."""
    losses: list[float] = []
    try:
        for _ in range(steps):
            losses.append(float(patient.gradients_anew()))
            if not math.isfinite(losses[-1]):
                return losses
            if patient.optimizer is not None:
                _step(patient.optimizer, patient.gradients_anew)
            else:
                _small_step(patient.model)
        losses.append(float(patient.loss()))
    except Exception:
        losses.append(math.nan)
    return losses


@torch.no_grad()
def _small_step(model: nn.Module) -> None:
    """A step down the gradient by a thousandth of the weights' norm."""
    pairs = [(p, p.grad) for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]
    size, slope = _norm([p for p, _ in pairs]), _norm([g for _, g in pairs])
    if size and slope:
        for p, g in pairs:
            p.sub_(g, alpha=1e-3 * size / slope)


_NAMES = ("model", "batch", "loss_fn", "optimizer")  # what a remedy may change, beside using torch and initlab


@contextmanager
def under(patient: Patient, remedy: str) -> Iterator[Patient]:
    """The patient after a remedy that is pasted as it is; all is put back afterwards."""
    import initlab

    patient.snapshot.restore()
    scope: dict[str, Any] = {"torch": torch, "initlab": initlab, **{name: getattr(patient, name) for name in _NAMES}}
    try:
        exec(remedy, scope)
        cured = copy.copy(patient)
        cured.model, cured.batch, cured.loss_fn, cured.optimizer = (scope[name] for name in _NAMES)
        yield cured
    finally:
        patient.snapshot.restore()


def growth_under(patient: Patient, remedy: str) -> float | None:
    """How far the signal grows from the input to the worst layer after a remedy; None where that cannot be said."""
    with under(patient, remedy) as cured:
        evidence = gather(cured)
        with evidence.trace:
            cured.loss()
        return max((total for _, _, total in gains(evidence)), default=None)


def effect(patient: Patient, remedy: str, steps: int = 2) -> str:
    """What a remedy does for the loss: "falls", "finite", or "" where it does not even run."""
    try:
        with under(patient, remedy) as cured:
            losses = train(cured, steps)
    except Exception:
        return ""
    if len(losses) <= steps or not all(map(math.isfinite, losses)):
        return "finite" if losses and math.isfinite(losses[0]) else ""
    return "falls" if losses[-1] < losses[0] else "finite"
