"""A step of a script: its model, optimizer and names, and its state as it was when the step began."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import keystr

from .._tree import tensors_with_paths
from .tape import Event, Replay


@dataclass
class Step:
    """A step that the doctor can run again, and the names of its parts in the script."""

    model: nn.Module
    replay: Replay
    optimizer: Optimizer | None
    preamble: str


class Start:
    """A step with weights, buffers and optimizer state as they were before it."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.tensors = [(t, t.detach().clone()) for t in (*step.model.parameters(), *step.model.buffers())]
        self.values = {id(tensor): value for tensor, value in self.tensors}
        self.state, self.groups = _optimizer_state(step.optimizer)

    def moved(self, parameter: Tensor) -> bool:
        """Whether a parameter is another than it was at that step."""
        return not torch.equal(parameter.detach(), self.values[id(parameter)])

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        """Everything as it was at that step, inside the block."""
        now = [(tensor, tensor.detach().clone()) for tensor, _ in self.tensors]
        optimizer = self.step.optimizer
        state, groups = (None, None) if optimizer is None else (optimizer.state, _settings(optimizer))
        try:
            self._write(self.tensors)
            if optimizer is not None:
                optimizer.state = _copied(self.state)
                _set(optimizer, self.groups)
            yield
        finally:
            self._write(now)
            if optimizer is not None and state is not None and groups is not None:
                optimizer.state = state
                _set(optimizer, groups)

    @staticmethod
    def _write(tensors: list[tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.data.copy_(value)


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _set(optimizer: Optimizer, settings: list[dict[str, Any]]) -> None:
    for group, values in zip(optimizer.param_groups, settings, strict=False):
        group.update(values)


def _optimizer_state(optimizer: Optimizer | None) -> tuple[Any, list[dict[str, Any]]]:
    if optimizer is None:
        return None, []
    return _copied(optimizer.state), _settings(optimizer)


def _copied(state: Any) -> Any:
    """An optimizer's state, which goes by the parameters themselves: those are not copied."""
    kept: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for parameter, values in state.items():
        kept[parameter] = {k: v.clone() if isinstance(v, Tensor) else copy.copy(v) for k, v in values.items()}
    return kept


def variables(frames: list[FrameType]) -> Iterator[tuple[str, Any]]:
    """Names and values that the user's code has, the innermost frame first; attributes of `self` too."""
    for frame in frames:
        for name, value in frame.f_locals.items():
            yield name, value
            if name == "self" and not isinstance(value, nn.Module):
                yield from (
                    ((f"self.{key}", item) for key, item in vars(value).items()) if hasattr(value, "__dict__") else ()
                )
    if frames:
        yield from list(frames[-1].f_globals.items())


def names_of(frames: list[FrameType]) -> dict[int, str]:
    """By id, the names of tensors in the user's code, also those in tuples, lists and dicts."""
    found: dict[int, str] = {}
    for name, value in variables(frames):
        if isinstance(value, Tensor):
            found.setdefault(id(value), name)
        elif isinstance(value, dict):
            for key, item in value.items():
                if isinstance(item, Tensor):
                    found.setdefault(id(item), str(key))
        elif isinstance(value, list | tuple) and len(value) < 100:
            for path, item in tensors_with_paths(value, depth=2):
                found.setdefault(id(item), name + keystr(path))
    return found


def names_of_values(frames: list[FrameType]) -> dict[int, str]:
    """By id, the names of all values in the user's code."""
    found: dict[int, str] = {}
    for name, value in variables(frames):
        found.setdefault(id(value), name)
    return found


def leaves_of(loss: Tensor | None) -> dict[int, Tensor]:
    """The tensors that a loss's graph ends in, by id: parameters, as a rule."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    stack = [None if loss is None else loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        stack += [following for following, _ in node.next_functions]
    return found


class Tensors(nn.Module):
    """The tensors that a script learns without a module, as one.

    Args:
        tensors: by their names in the script.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._parameters.update(tensors)  # type: ignore[arg-type]  # no nn.Parameter would be the script's own tensor


def model_of(events: list[Event], frames: list[FrameType], reached: dict[int, Tensor]) -> tuple[nn.Module | None, str]:
    """What was called and has parameters that the loss reaches, with its name in the script.

    Of several modules it is the smallest one of the script that holds them all, else a ModuleDict of them. Where no
    module was called it is the tensors that the loss reaches.
    """
    called = [event.function for event in events if isinstance(event.function, nn.Module)]
    roots = [root for root in dict.fromkeys(called) if any(id(p) in reached for p in root.parameters())]
    if not roots:  # an error was raised before there was a loss, or the loss is cut off from all of them
        roots = [root for root in dict.fromkeys(called) if any(p.requires_grad for p in root.parameters())]
    roots = [root for root in roots if not any(root in set(other.modules()) - {other} for other in roots)]
    named = [(name, value) for name, value in variables(frames) if isinstance(value, nn.Module)]
    if len(roots) == 1:
        return roots[0], next((name for name, value in named if value is roots[0]), "")
    parameters = {id(p) for root in roots for p in root.parameters()} or set(reached)
    holders = [(n, v) for n, v in named if parameters and parameters <= {id(p) for p in v.parameters()}]
    if holders:
        name, smallest = min(holders, key=lambda pair: sum(1 for _ in pair[1].modules()))
        return smallest, name
    if not roots:
        known = names_of(frames)
        own = {known[key].replace(".", "_"): tensor for key, tensor in reached.items() if key in known}
        return (Tensors(own) if own else None), ""
    names = [next((n for n, v in named if v is root), f"module{i}").replace(".", "_") for i, root in enumerate(roots)]
    return nn.ModuleDict(dict(zip(names, roots, strict=True))), ""


def optimizer_of(parameters: set[int], frames: list[FrameType]) -> tuple[Optimizer | None, str]:
    """The optimizer that holds most of these parameters, with its name in the script; else the script's only one."""

    def share(optimizer: Optimizer) -> int:
        return sum(id(p) in parameters for group in optimizer.param_groups for p in group["params"])

    named = [(name, value) for name, value in variables(frames) if isinstance(value, Optimizer)]
    if named:
        name, best = max(named, key=lambda pair: share(pair[1]))
        if share(best) or len(set(map(id, (value for _, value in named)))) == 1:
            return best, name
    # By type: isinstance() would ask objects that stand for deprecated ones, and warn.
    others = [o for o in gc.get_objects() if issubclass(type(o), Optimizer) and share(o)]
    return (max(others, key=share), "") if others else (None, "")
