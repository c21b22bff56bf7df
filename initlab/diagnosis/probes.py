"""The passes over the user's code: one under observation, and further ones where that one leaves a suspicion."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from initlab.kernels.torch_internals import foreach_norm, foreach_sub

from .._tree import tensors_in
from ..models.naming import tensor_refs
from . import graph, movement
from .batch import Leaf, features, leaves, mapped, standardised
from .evidence import (
    BadUpdate,
    Evidence,
    ParameterStats,
    Replay,
    Step,
    expected_std,
    half,
    nearly_alike,
    rows_alike,
    state_faults,
    tiny_share,
    zero_share,
)
from .flow import Flow, ParameterCall
from .origin import Search
from .ranks import CommunicatesError
from .state import Snapshot, referenced_modules
from .stats import measure, stored
from .trace import Trace, storage_of

LossFn = Callable[[Any, Any], Any]


class TrainingStep:
    """The user's objects, and a snapshot that every probe starts from and returns to."""

    def __init__(self, model: nn.Module, batch: Any, loss_fn: LossFn, optimizer: Optimizer | None) -> None:
        self.model, self.batch, self.loss_fn, self.optimizer = model, batch, loss_fn, optimizer
        self.leaves = leaves(batch)
        self.referenced_modules = referenced_modules(loss_fn)
        tensors = [leaf.tensor for leaf in self.leaves]
        self.snapshot = Snapshot([model, *self.referenced_modules], optimizer, tensors, [batch, loss_fn])

    def loss(self) -> Tensor:
        """The user's loss, from the same random numbers each time."""
        self.snapshot.random.restore()
        loss = self.loss_fn(self.model, self.batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise UsageError(f"loss_fn returned {what}; it must return the loss, a tensor with one element")
        return loss

    def loss_with_gradients(self) -> Tensor:
        """The loss, with its gradients and no others."""
        self.clear_gradients()
        loss = self.loss()
        loss.backward()
        return loss

    def clear_gradients(self) -> None:
        """Detach all gradients; the snapshot keeps them."""
        groups = self.optimizer.param_groups if self.optimizer is not None else ()
        parameters: list[Tensor] = [p for m in (self.model, *self.referenced_modules) for p in m.parameters()]
        parameters += [p for group in groups for p in group["params"]]
        parameters += [leaf.tensor for leaf in self.leaves if leaf.tensor.is_leaf]
        for parameter in parameters:
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that there are, by name; of sparse ones their values."""
        return {name: stored(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}


class UsageError(TypeError):
    """The arguments of diagnose break its contract: raised to the caller, never a diagnosis."""


FOR_THE_CALLER = (CommunicatesError, UsageError)


@contextmanager
def quiet() -> Iterator[None]:
    """Gradients on, compiled code run as it was written; of the warnings, torch's of shapes is given once, at the end.

    The others were seen when the model ran by itself, and would be repeated by every pass.
    """
    with ExitStack() as stack:
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", "Using a target size", UserWarning)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "_dynamo" in vars(torch):  # nothing is compiled where this has not been imported, and it is slow to
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
    for text, one in {str(one.message): one for one in reversed(caught)}.items():
        warnings.warn_explicit(text, one.category, one.filename, one.lineno)


def observe_at_rest(training_step: TrainingStep, histograms: bool = False) -> Evidence:
    """What the batch, the parameters and the optimizer show before anything runs.

    Args:
        histograms: whether its trace keeps elements of outputs.
    """
    for leaf in training_step.leaves:
        leaf.features = features(leaf.tensor)
    parameters, buffers = tensor_refs(training_step.model)
    both = [ParameterStats(s, None if is_lazy(s.tensor) else measure(s.tensor)) for s in (*parameters, *buffers)]
    for one in both:
        if one.stats is not None and one.ref.is_parameter:
            one.tiny = tiny_share(one.ref.tensor)
        if training_step.optimizer is not None:
            one.state = state_faults(training_step.optimizer.state.get(one.ref.tensor, {}))
    storages = {storage_of(leaf.tensor): leaf.path for leaf in training_step.leaves}
    return Evidence(
        training_step.model,
        training_step.batch,
        training_step.optimizer,
        [leaf for leaf in training_step.leaves if leaf.tensor.layout == torch.strided],  # what checks can read
        both,
        Trace(training_step.model, storages, Flow(training_step.model, training_step.leaves), histograms),
        fresh_optimizer=training_step.optimizer is None or not training_step.optimizer.state,
    )


def runnable(evidence: Evidence) -> bool:
    """Whether the model can run at all: nothing on the meta device, nothing lazy."""
    return not any(h.ref.tensor.is_meta or is_lazy(h.ref.tensor) for h in evidence.parameters_and_buffers)


def observe_steps(
    training_step: TrainingStep,
    evidence: Evidence,
    steps: int,
    end: float = math.inf,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Take steps, the first under observation, until something breaks; none begins after the time `end`."""
    for number in range(1, steps + 1):
        tick()
        if number > 1 and time.monotonic() > end:
            break
        training_step.clear_gradients()
        first = number == 1
        step = Step(None)
        evidence.steps.append(step)
        try:
            if first:
                with evidence.trace:
                    loss = training_step.loss()
                evidence.negated = graph.is_negated(loss)
                evidence.custom = graph.has_custom(loss)
                if evidence.trace.flow is not None:
                    evidence.constant_derivative = evidence.trace.flow.uses_constant_derivative(loss)
                if evidence.trace.differentiates:
                    evidence.nodes = graph.names_of_nodes(loss)
            else:
                loss = training_step.loss()
            step.before = float(loss)
            loss.backward()
        except FOR_THE_CALLER:
            raise
        except Exception as error:
            evidence.error, evidence.broke_at = error, number
            evidence.kept_graph = _with_a_graph(training_step.model)
            if first:
                _roles(evidence)
            return
        finally:
            if first:
                evidence.trace.slopes.close()
        del loss
        gradients = training_step.gradients()
        step.gradient = norm_of(list(gradients.values()))
        if first:
            _roles(evidence)
            _read_gradients(evidence)
        if not step.finite:
            evidence.broke_at = number
            return
        if training_step.optimizer is None:
            return
        driven = _driven(training_step, evidence)
        try:
            take_step(training_step.optimizer, training_step.loss_with_gradients)
        except FOR_THE_CALLER:
            raise
        except Exception as error:
            evidence.error, evidence.broke_at = error, number
            return
        step.update = _update(training_step, evidence, driven)
    evidence.after = value_of(training_step)
    if evidence.after is None or not math.isfinite(evidence.after):
        evidence.broke_at = len(evidence.steps) + 1


def _with_a_graph(model: nn.Module) -> str:
    """The first tensor that a module keeps with the graph that made it, by name; "" if there is none."""
    for path, module in model.named_modules():
        for name, held in (*module._buffers.items(), *vars(module).items()):
            tensors = [held] if isinstance(held, Tensor) else tensors_in(held, 2) if name[0] != "_" else []
            if any(x.grad_fn is not None for x in tensors):
                return f"{path}.{name}".lstrip(".")
    return ""


def _roles(evidence: Evidence) -> None:
    """What modules read as it lies in the batch is input, and then the rest is target."""
    read = {path for call in evidence.trace.calls for path in call.reads_batch}
    flow = evidence.trace.flow
    for leaf in evidence.leaves:
        if leaf.path in read or (flow is not None and leaf.path in flow.inputs):
            leaf.is_target = False
        elif flow is not None and leaf.path in flow.compared:
            leaf.is_target = True


def _read_gradients(evidence: Evidence) -> None:
    activations = {call.path: call.activation for call in evidence.layers}
    wanted = {call.path: call.wanted for call in evidence.layers if isinstance(call, ParameterCall)}
    with torch.no_grad():
        norms = _norms([h.ref.tensor.grad for h in evidence.parameters if h.ref.tensor.grad is not None])
        for parameter in evidence.parameters:
            tensor, grad = parameter.ref.tensor, parameter.ref.tensor.grad
            parameter.distribution = expected_std(parameter.ref, activations.get(parameter.ref.module_name, ""))
            if parameter.distribution is None:
                parameter.distribution = next((wanted[name] for name in parameter.ref.names if name in wanted), None)
            if grad is not None:
                grad = stored(grad)
                parameter.grad_norm, parameter.grad = next(norms), measure(grad)
            if rows_alike(tensor):
                parameter.alike = grad is not None and nearly_alike(grad)


def _norms(tensors: list[Any]) -> Iterator[float]:
    """2-norms of tensors; infinite only where an element is."""
    dense = [t.float() if half(t.dtype) else t for t in map(stored, tensors)]
    for tensor, norm in zip(dense, foreach_norm(dense) if dense else (), strict=True):
        size = float(norm)
        yield size if math.isfinite(size) else float(torch.linalg.vector_norm(_wide(tensor)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def norm_of(tensors: list[Any]) -> float | None:
    """The 2-norm of all elements; None of no tensors."""
    return math.hypot(*_norms(tensors)) if tensors else None


def _driven(training_step: TrainingStep, evidence: Evidence) -> list[tuple[Tensor, Tensor]]:
    """The optimizer's parameters that have a gradient, with copies: all before a first step, then weight matrices."""
    assert training_step.optimizer is not None
    first = evidence.movement is None
    driven = [
        p for p in movement.parameters_of(training_step.optimizer) if p.grad is not None and (first or p.dim() > 1)
    ]
    with torch.no_grad():
        return [(p, p.detach().clone()) for p in driven]


def _update(training_step: TrainingStep, evidence: Evidence, before: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """The size of the update that a step has made, against the weights."""
    assert training_step.optimizer is not None
    first = evidence.movement is None
    if first:
        evidence.movement = movement.of_step(
            training_step.optimizer, training_step.model, training_step.referenced_modules, before
        )
    weights = [(p, old) for p, old in before if p.dim() > 1]
    with torch.no_grad():
        moved = foreach_sub([p.detach() for p, _ in weights], [old for _, old in weights]) if weights else []
        sizes, changes = list(_norms([old for _, old in weights])), list(_norms(list(moved)))
    if first:
        known = zip(weights, sizes, changes, strict=True)
        ratios = {id(p): change / size for (p, _), size, change in known if size}
        for one in evidence.parameters:
            one.update = ratios.get(id(one.ref.tensor))
    return math.hypot(*changes) / math.hypot(*sizes) if any(sizes) else None


def take_step(optimizer: Optimizer, closure: Callable[[], Tensor]) -> None:
    """Let an optimizer take its step; `closure` computes loss and gradients again, for those that search a line."""
    argument = inspect.signature(optimizer.step).parameters.get("closure")
    if argument is not None and argument.default is inspect.Parameter.empty:
        optimizer.step(closure)  # type: ignore[arg-type]
    else:
        optimizer.step()


def value_of(training_step: TrainingStep) -> float | None:
    """The loss as it is now; None where an error is raised."""
    try:
        return float(training_step.loss())
    except FOR_THE_CALLER:
        raise
    except Exception:
        return None


def find_origin(training_step: TrainingStep, evidence: Evidence) -> None:
    """Look for the operation behind the first value that is not finite, in the step that broke, or in the first."""
    training_step.snapshot.restore()
    for number in range(1, evidence.broke_at or 1):
        training_step.loss_with_gradients()
        assert training_step.optimizer is not None
        sound = math.isfinite(norm_of(list(training_step.gradients().values())) or 0.0)
        take_step(training_step.optimizer, training_step.loss_with_gradients)
        if sound and evidence.bad_update is None:
            evidence.bad_update = _bad_update(training_step, number)
    training_step.clear_gradients()
    parameters = dict((*training_step.model.named_parameters(), *training_step.model.named_buffers()))
    search = Search(training_step.model, {leaf.code: leaf.tensor for leaf in training_step.leaves}, parameters)
    try:
        loss = search.forward(training_step.loss)
        if evidence.broke_at is None:  # it is hidden: nothing that is not finite reaches the loss
            evidence.origin = search.first
        elif math.isfinite(float(loss)):
            evidence.origin = search.backward(loss)
        else:
            evidence.origin = search.origin(loss)
    except Exception:
        evidence.origin = search.first
    evidence.largest_low = search.largest
    training_step.snapshot.restore()


def _bad_update(training_step: TrainingStep, step: int) -> BadUpdate | None:
    """The parameters that are not finite after a step."""
    assert training_step.optimizer is not None
    names = {p: name for name, p in training_step.model.named_parameters()}
    bad: list[str] = []
    eps: float | None = None
    dtype = torch.float32
    for group in training_step.optimizer.param_groups:
        for p in group["params"]:
            if p in names and not bool(p.isfinite().all()):
                if not bad:
                    eps, dtype = group.get("eps"), p.dtype
                bad.append(names[p])
    if not bad:
        return None
    eps = float(eps) if isinstance(eps, int | float) else None
    return BadUpdate(bad, step, dtype, eps, float(torch.tensor(eps or 0.0, dtype=torch.float64).to(dtype)))


class _InFloat32(TorchDispatchMode):
    """Casts to 16-bit floats give float32: autocast and .half() do nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in (torch.float16, torch.bfloat16):
            kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)


def replay_in_float32(training_step: TrainingStep, evidence: Evidence) -> None:
    """Run the same pass with every 16-bit number as float32."""
    training_step.snapshot.restore()
    training_step.clear_gradients()
    for tensor in (*training_step.model.parameters(), *training_step.model.buffers()):
        if half(tensor.dtype):
            tensor.data = tensor.data.float()
    widened = mapped(training_step.batch, lambda x: x.float() if isinstance(x, Tensor) and half(x.dtype) else x)
    evidence.float32 = _pass(training_step, widened, _InFloat32())
    training_step.snapshot.restore()


def replay_standardised(training_step: TrainingStep, evidence: Evidence, leaf: Leaf) -> None:
    """Run the same pass on an input that is brought to mean 0 and standard deviation 1."""
    training_step.snapshot.restore()
    training_step.clear_gradients()
    made = standardised(leaf.tensor)
    new = made if leaf.source is leaf.tensor else made.numpy()
    batch = mapped(training_step.batch, lambda x: new if x is leaf.source else x)
    evidence.standardised = _pass(training_step, batch, None)
    training_step.snapshot.restore()


def _pass(training_step: TrainingStep, batch: Any, mode: Any) -> Replay:
    training_step.snapshot.random.restore()
    loss = None
    try:
        with mode if mode is not None else ExitStack():
            value = training_step.loss_fn(training_step.model, batch)
            loss = float(value)
            value.backward()
    except Exception:
        return Replay(loss if loss is not None and not math.isfinite(loss) else None, None, {})
    gradients = training_step.gradients()
    zeros = {name: zero_share(g) for name, g in gradients.items()}
    return Replay(loss, norm_of(list(gradients.values())), zeros)


def search_rates(training_step: TrainingStep, evidence: Evidence) -> None:
    """The loss along the first update, shorter and shorter, until it falls."""
    assert training_step.optimizer is not None
    training_step.snapshot.restore()
    training_step.loss_with_gradients()
    parameters = [p for group in training_step.optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        start = [p.detach().clone() for p in parameters]
        take_step(training_step.optimizer, training_step.loss_with_gradients)
        moved = [p.detach() - before for p, before in zip(parameters, start, strict=True)]
    evidence.rates.append((1.0, _or_inf(evidence.losses[1] if len(evidence.losses) > 1 else None)))
    for factor in (0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6):
        with torch.no_grad():
            for p, before, move in zip(parameters, start, moved, strict=True):
                p.copy_(before + factor * move)
        evidence.rates.append((factor, _or_inf(value_of(training_step))))
        first = evidence.first_loss
        if first is not None and evidence.rates[-1][1] < first:
            break
    training_step.snapshot.restore()


def _or_inf(loss: float | None) -> float:
    """A loss that compares as it should: none and NaN are larger than any."""
    return math.inf if loss is None or math.isnan(loss) else loss
