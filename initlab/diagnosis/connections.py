"""What is connected with what: parameters with the loss, rows with one another, gradients with what made them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .._tree import tensors_in
from . import movement
from .batch import Leaf, mapped
from .cuts import Cuts
from .derivatives import Functions, bad_backward
from .evidence import Evidence
from .limits import LIMITS
from .origin import Search
from .probes import FOR_THE_CALLER, TrainingStep, value_of


def find_cut(training_step: TrainingStep, evidence: Evidence) -> None:
    """Where the graph ends, of a loss that no gradient leaves."""
    for compared in (False, True):
        training_step.snapshot.restore()
        learning = [p for p in training_step.model.parameters() if p.requires_grad]
        cuts = Cuts(training_step.model, learning, compared)
        try:
            with cuts:
                training_step.loss()
        except FOR_THE_CALLER:
            raise
        except Exception:  # it is evidence only where it runs
            cuts.found.clear()
        finally:
            training_step.snapshot.restore()
        evidence.cut = evidence.cut or next(iter(cuts.found), None)


def find_deaf_output(training_step: TrainingStep, evidence: Evidence) -> None:
    """Whether the loss changes with what the model puts out, and gives it no gradient: it is run with that moved."""
    outputs: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def keep(module: Any, args: Any, out: Any) -> None:
        outputs.extend(x for x in tensors_in(out) if x.requires_grad)

    def move(module: Any, args: Any, out: Any) -> Any:
        return tree_map(lambda x: _moved(x, generator) if isinstance(x, Tensor) and x.is_floating_point() else x, out)

    model = training_step.model
    training_step.snapshot.restore()
    try:
        model.register_forward_hook(keep)  # goes when the snapshot is restored
        loss = training_step.loss()
        if not outputs or not loss.requires_grad or float(loss.detach()) != evidence.first_loss:
            return
        if any(one is not None for one in torch.autograd.grad(loss, outputs, allow_unused=True)):
            return
        training_step.snapshot.restore()
        model.register_forward_hook(move)
        with torch.no_grad():
            evidence.deaf_output = not _nearly_equal(value_of(training_step), evidence.first_loss)
        training_step.snapshot.restore()
        if evidence.deaf_output:
            with Cuts(model, [p for p in model.parameters() if p.requires_grad], compared=True) as cuts:
                training_step.loss()
            evidence.cut = next(iter(cuts.found), None)
    except FOR_THE_CALLER:
        raise
    except Exception:  # it is evidence only where it runs
        evidence.deaf_output = False
    finally:
        training_step.snapshot.restore()


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Other numbers of the same size."""
    x = x.detach()
    return x[torch.randperm(len(x), generator=generator).to(x.device)] * 1.5 - 0.5 * x if x.dim() else x + 1.0


def find_silent(training_step: TrainingStep, evidence: Evidence) -> None:
    """Look for the operations whose derivative is 0."""
    training_step.snapshot.restore()
    training_step.clear_gradients()
    search = Search(training_step.model, {}, {})
    try:
        evidence.silent = search.graph.silent(search.forward(training_step.loss))
    except FOR_THE_CALLER:
        raise
    except Exception:  # it is evidence only where it runs
        evidence.silent = []
    finally:
        training_step.snapshot.restore()


def find_bad_backward(training_step: TrainingStep, evidence: Evidence) -> None:
    """Look for a torch.autograd.Function of the user's whose backward() is not the derivative of its forward()."""
    training_step.snapshot.restore()
    training_step.clear_gradients()
    functions = Functions()
    try:
        with evidence.trace.modules.hooked(), functions.recorded():
            loss = training_step.loss()
        evidence.backward = bad_backward(loss, functions, evidence.trace.makers)
    except FOR_THE_CALLER:
        raise
    except Exception:
        evidence.backward = None
    finally:
        training_step.snapshot.restore()


def find_mixed(training_step: TrainingStep, evidence: Evidence) -> None:
    """Layers that take the batch for time: whether the output of one row changes with another row of the input.

    It is looked at in eval mode, where neither dropout nor statistics of the batch are at work.
    """
    rows = {len(leaf.tensor) for leaf in evidence.leaves if leaf.tensor.dim()}
    if len(rows) != 1 or (count := rows.pop()) < 2:
        return
    paths = [
        call.path
        for call in evidence.trace.calls
        if call.takes_time_first and call.shape is not None and len(call.shape) == 3
        and call.shape[0] == count != call.shape[1] > 1
    ]  # fmt: skip
    inputs = [leaf for leaf in evidence.leaves if not leaf.is_target and leaf.tensor.dim() > 1]
    if not paths or not inputs:
        return
    kept: list[Tensor] = []
    training_step.snapshot.restore()
    hook = training_step.model.register_forward_hook(lambda module, args, out: kept.extend(tensors_in(out)))
    try:
        training_step.model.eval()
        with torch.no_grad():
            training_step.loss()
            changed = {id(leaf.source): _first_row_changed(leaf) for leaf in inputs}
            batch = mapped(training_step.batch, lambda x: changed.get(id(x), x))
            training_step.snapshot.random.restore()
            training_step.loss_fn(training_step.model, batch)
    except Exception:
        kept.clear()
    finally:
        hook.remove()
        training_step.snapshot.restore()
    outputs = [x for x in kept if x.dim() and len(x) == count and x.is_floating_point()]
    if len(outputs) > 1 and outputs[0].shape == outputs[-1].shape:
        before, after = outputs[0][1:].float(), outputs[len(outputs) // 2][1:].float()
        if float((before - after).abs().max()) > LIMITS.response * float(before.abs().max()):
            evidence.mixed = list(dict.fromkeys(paths))


def _first_row_changed(leaf: Leaf) -> Any:
    """An input whose first row is its last: what comes later in time sees it too."""
    x = leaf.tensor.detach().clone()
    x[0] = x[-1]
    return x if leaf.source is leaf.tensor else x.numpy()


def find_detached(training_step: TrainingStep, evidence: Evidence) -> None:
    """Which of the parameters that got no gradient the loss depends on: it is run again with them moved.

    Modules under no_grad(), or in eval mode in a model that trains, are left alone: teachers, and frozen bodies.
    """
    moves = evidence.movement
    assert moves is not None
    model = training_step.model
    ran = {call.path for call in evidence.trace.calls if call.recorded and call.module.training == model.training}
    names = [n for n in moves.without if n.rpartition(".")[0] in ran]
    training_step.snapshot.restore()
    if not names or value_of(training_step) != evidence.first_loss:  # it is not the same twice
        training_step.snapshot.restore()
        return
    training_step.loss_with_gradients()
    groups = list(movement.groups_to_disturb(model, names))
    for group in groups:
        training_step.snapshot.restore()
        depends = any(_moves_loss(training_step, evidence, group, size) for size in movement.SIZES)
        if group is groups[0] and not depends:
            break
        if depends and (group is not groups[0] or len(groups) == 2):
            moves.detached += group
    training_step.snapshot.restore()
    if moves.detached:
        cuts = Cuts(model, [model.get_parameter(name) for name in moves.detached])
        with cuts:
            training_step.loss()
        evidence.cut = next(iter(cuts.found), None)
        training_step.snapshot.restore()


def _moves_loss(training_step: TrainingStep, evidence: Evidence, names: list[str], size: float) -> bool:
    movement.disturb([training_step.model.get_parameter(name) for name in names], size)
    return not _nearly_equal(value_of(training_step), evidence.first_loss)


def _nearly_equal(loss: float | None, other: float | None) -> bool:
    if loss is None or other is None:
        return loss is other
    return abs(loss - other) <= LIMITS.response * abs(other)
