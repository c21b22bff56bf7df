"""fuse_linear_relu and unfuse: which Linear layers of a model can be swapped for LinearReLU layers, and the swaps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..nn import LinearReLU
from .applied import AppliedFunction, AppliedReLU, FusedLinear
from .following import Followed, follow
from .report import FuseReport
from .symbolic import Reader
from .usage import RELU_FUNCTIONS, Use


def fuse_linear_relu(model: nn.Module, example: Any = None) -> FuseReport:
    """Swap every nn.Linear whose output goes to a ReLU, and nowhere else, for a LinearReLU.

    The LinearReLU takes the Linear's place and parameters, the same objects, so that optimizers and the names in the
    state dict stay as they are. An nn.ReLU, or a function that the owner holds, passes on what is relu'd already. In
    code such as `F.relu(self.fc1(x))` ReLU runs once more, which changes nothing.

    Where outputs go is read off every module's forward by torch.fx, on all its paths; nothing is computed. Code that
    cannot be followed so (loops over tensors, sizes used as numbers) is named in the report; with an example, what its
    run shows stands in for it. Code outside of the model that calls its layers cannot be seen. A Linear is left alone,
    too, if it is more than an nn.Linear (parametrised, quantised, wrapped), has hooks other than tensor parallelism's,
    or lies in a module that is compiled, or sharded by FSDP: fuse before those, and after tensor parallelism.

    Args:
        model: changed in place; it may itself be a container. No other thread may run modules meanwhile.
        example: an input to the model, a tuple of arguments or a dict of named ones. The model is run on it once, in
            its present mode, without gradients; buffers, attributes and torch's generators are put back.

    Returns:
        The report: every Linear, fused or with the reason why not. `unfuse(model)` takes all of it back.

    Raises:
        TypeError: if the model is no nn.Module.
        Exception: what the model raises on the example. Nothing has been changed then.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> print(initlab.fuse_linear_relu(model))
        1 fused, 1 left alone; 67% of the matrix products are flagged
          0: LinearReLU
          2: left alone, Sequential.forward returns its output
        >>> initlab.unfuse(model)
        >>> model[1]
        ReLU()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_linear_relu got a {type(model).__name__}; it needs an nn.Module")
    reader = Reader(model)
    followed = None if example is None else follow(model, example)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    enclosing, held = _enclosing_reasons(model), _held_elsewhere(model)
    fused: dict[nn.Module, Use] = {}
    skipped: dict[str, str] = {}
    for module, places in names.items():
        if not isinstance(module, nn.Linear):
            if "Linear" in type(module).__name__ and not isinstance(module, LinearReLU) and not module._modules:
                skipped[places[0]] = f"a {type(module).__name__} is not an nn.Linear"
            continue
        use, why = _agreed(reader, followed, module)
        why = why or enclosing.get(module) or _why_not(module) or held.get(module)
        why = why or next((f"its ReLU has hooks ({h[0]})" for relu in use.modules if (h := _hooks(relu))), None)
        if "" in places:
            why = "it is the model itself"
        if why is None:
            fused[module] = use
        else:
            skipped[places[0]] = why
    share = _share(names, fused, followed)
    notes = {}
    with torch.random.fork_rng(devices=[]):  # a layer draws its start before it takes over another's parameters
        swapped: dict[nn.Module, nn.Module] = {linear: _fused(linear) for linear in fused}
    for linear, use in fused.items():
        swapped |= {relu: _relu(relu, AppliedReLU) for relu in use.modules if type(relu) is nn.ReLU}
        again = [names.get(module, ["a module"])[0] for module in use.modules if type(module) is not nn.ReLU]
        again += [name for owner, code in use.callers if (name := _pass_on(owner, code))]
        again += ["a view of its output"] if use.viewed else []
        if again:
            where = ", ".join(dict.fromkeys(again))
            notes[names[linear][0]] = f"its ReLU runs once more in {where}, and changes nothing"
    _swap_modules(model, swapped)
    return FuseReport(tuple(names[linear][0] for linear in fused), skipped, notes, share)


def unfuse(model: nn.Module) -> None:
    """Put nn.Linear layers and activations back where fuse_linear_relu swapped them, in this model or its original.

    The Linear layers get the parameters, the mode and the attributes that the fused ones have by now.

    Args:
        model: changed in place. One in which nothing is fused stays as it is.

    Raises:
        TypeError: if the model is no nn.Module.
        RuntimeError: if a fused layer has got hooks since; nothing is put back.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = initlab.fuse_linear_relu(model)
        >>> initlab.unfuse(model)
        >>> type(model[0]) is torch.nn.Linear
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse got a {type(model).__name__}; it needs an nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, FusedLinear | AppliedReLU) and (hooks := _hooks(module)):
            raise RuntimeError(f"{name} has got hooks since it was fused ({hooks[0]}); remove them first")
    originals: dict[nn.Module, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        for module in model.modules():
            if isinstance(module, FusedLinear):
                originals[module] = _linear(module)
            elif isinstance(module, AppliedReLU):
                originals[module] = _relu(module, nn.ReLU)
    _swap_modules(model, originals)
    for module in model.modules():
        for key, value in list(module.__dict__.items()):
            if isinstance(value, AppliedFunction):
                module.__dict__[key] = value.original


def _agreed(reader: Reader, followed: Followed | None, linear: nn.Linear) -> tuple[Use, str | None]:
    """What is known of a Linear's use, and why that forbids to fuse it; None where it does not."""
    read = reader.uses[linear]
    seen = followed.uses.get(linear) if followed is not None else None
    others = [*read.others, *(seen.others if seen is not None else ())]
    if others:
        return read, others[0]
    if read.unknown and seen is None:
        return read, next(iter(read.unknown))
    if not (read.relu or (seen is not None and seen.relu)):
        return read, "no call of it was seen"
    if seen is not None:
        read.modules.update(seen.modules)
        read.callers.update(seen.callers)
        read.viewed |= seen.viewed
    return read, None


def _held_elsewhere(model: nn.Module) -> dict[nn.Module, str]:
    """By Linear, where an attribute holds it that no swap of modules reaches."""
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key != "_modules":
                where = f"{name}.{key}".lstrip(".")
                found |= dict.fromkeys(_modules_in(value), f"{where} holds it too")
    return found


def _modules_in(value: Any, depth: int = 3) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(item, depth - 1)


def _enclosing_reasons(model: nn.Module) -> dict[nn.Module, str]:
    """By Linear, why a module around it forbids to swap it."""
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            why = "it is compiled; fuse before torch.compile"
        elif any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(module).__mro__):
            why = f"a {type(module).__name__} around it handles its parameters; fuse before the model is sharded"
        else:
            continue
        reasons |= {inner: why for inner in module.modules() if isinstance(inner, nn.Linear)}
    return reasons


def _why_not(linear: nn.Linear) -> str | None:
    """Why a Linear cannot be swapped by itself; None if it can."""
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__} is more than an nn.Linear"
    if hooks := _hooks(linear):
        return f"it has hooks ({hooks[0]})"
    own = {*linear.__dict__} - _OF_LINEAR
    if clash := sorted(name for name in own if callable(linear.__dict__[name]) or name in _OF_FUSED):
        return f"it has attributes of its own that a LinearReLU cannot take over: {', '.join(clash)}"
    if linear._modules or linear._buffers or {*linear._parameters} != {"weight", "bias"}:
        return "it has parameters, buffers or modules that an nn.Linear does not have"
    weight = linear._parameters["weight"]
    if weight is None or is_lazy(weight) or weight.dim() != 2:
        return "its weight is no matrix yet"
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return f"its weight is {weight.dtype}, which has no ReLU"
    return None


def _hooks(module: nn.Module) -> list[str]:
    """The hooks on a module by where they come from, without those of tensor parallelism, which are taken over."""
    found = []
    for name, hooks in module.__dict__.items():
        for hook in hooks.values() if name.endswith("_hooks") and hooks else ():
            origin = getattr(hook, "__module__", None) or ""
            if not origin.startswith("torch.distributed.tensor."):
                found.append(f"{origin}.{getattr(hook, '__qualname__', type(hook).__name__)}")
    return found


def _fused(linear: nn.Module) -> nn.Module:
    assert isinstance(linear, nn.Linear)
    fused = FusedLinear(linear.in_features, linear.out_features, linear._parameters["bias"] is not None, device="meta")
    return _taking_over(fused, linear, _OF_LINEAR)


def _linear(fused: FusedLinear) -> nn.Module:
    linear = nn.Linear(fused.in_features, fused.out_features, fused._parameters["bias"] is not None, device="meta")
    return _taking_over(linear, fused, _OF_FUSED)


def _relu(relu: nn.Module, kind: type[nn.ReLU]) -> nn.Module:
    assert isinstance(relu, nn.ReLU)
    return _taking_over(kind(relu.inplace), relu, _OF_RELU)


def _taking_over(new: nn.Module, old: nn.Module, usual: set[str]) -> nn.Module:
    """A module with another's parameters, mode, hooks and attributes beyond the usual ones."""
    new._parameters.update(old._parameters)
    new.__dict__.update({name: value for name, value in old.__dict__.items() if name not in usual or "_hooks" in name})
    return new.train(old.training)


with torch.random.fork_rng(devices=[]):
    _OF_LINEAR = {*nn.Linear(1, 1, device="meta").__dict__}
    _OF_RELU = {*nn.ReLU().__dict__}
    _OF_FUSED = {*FusedLinear(1, 1, device="meta").__dict__, "_watch_flag"}


def _swap_modules(model: nn.Module, others: dict[nn.Module, Any]) -> None:
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is not None and child in others:
                module._modules[key] = others[child]


def _pass_on(owner: nn.Module, code: Any) -> str | None:
    """Let a function that a module holds pass on what is done; the name of code that calls ReLU by itself."""
    held = [key for key, value in owner.__dict__.items() if any(value is function for function in RELU_FUNCTIONS)]
    for key in held:
        owner.__dict__[key] = AppliedFunction(owner.__dict__[key])
    if held or any(isinstance(value, AppliedFunction) for value in owner.__dict__.values()):
        return None
    return f"{type(owner).__name__}.{getattr(code, 'co_name', 'forward')}"


def _share(names: dict[nn.Module, list[str]], fused: dict[nn.Module, Use], followed: Followed | None) -> float:
    if followed is not None:
        return sum(followed.flops.get(linear, 0) for linear in fused) / max(followed.all_flops, 1)
    sizes = {m: m.in_features * m.out_features for m in names if isinstance(m, nn.Linear | LinearReLU)}
    return sum(sizes[m] for m in sizes if m in fused or isinstance(m, LinearReLU)) / max(sum(sizes.values()), 1)
