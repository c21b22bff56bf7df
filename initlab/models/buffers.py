"""Buffers on the meta device that no distribution describes: set by the caller, or by their owners' own code."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from initlab.kernels import named_key

from .._console import listing
from ..distributed.shards import local_shards
from .entry_points import owners_of_init_weights
from .layers import reset_function
from .naming import TensorRef, class_name
from .plan import Plan
from .recording import kept_generators, stand_ins
from .swapping import swap

Buffers: TypeAlias = Callable[[str, Tensor], Tensor | float | None]


def set_buffers(
    plan: Plan, new: Mapping[int, Tensor], target: torch.device | None, buffers: Buffers | None
) -> dict[int, Tensor]:
    """Buffers with values, for those on the meta device that the caller or their owners' code sets.

    Args:
        plan: the plan for the model.
        new: empty tensors on the target, by the id of the old.
        target: the device.
        buffers: init_model_'s argument.

    Returns:
        Tensors on the target, by the id of the old.

    Raises:
        ValueError: if nobody sets a buffer that has no distribution, or `buffers` returns a value of another shape.
    """
    found: dict[int, Tensor] = {}
    pending: list[TensorRef] = []
    for task in plan.tasks:
        ref = task.ref
        if target is None or ref.is_parameter or not ref.tensor.is_meta:
            continue
        if buffers is not None:
            with target:
                value = buffers(ref.name, ref.tensor)
            if value is not None:
                found[id(ref.tensor)] = buffer_value(ref, value, new[id(ref.tensor)])
                continue
        if task.spec is None:
            pending.append(ref)
    if not pending or target is None:
        return found
    reasons: dict[int, list[str]] = {id(ref.tensor): [] for ref in pending}
    above = dict(owners_of_init_weights(plan.model))
    for module in dict.fromkeys(ref.module for ref in pending):
        refs = [ref for ref in pending if ref.module is module]
        for where, code in _setters(module, above.get(module)):
            refs = [ref for ref in refs if id(ref.tensor) not in found]
            if refs:
                found |= _run(plan.seed, module, refs, where, code, target, reasons)
            refs = [ref for ref in refs if id(ref.tensor) not in found]
            if refs and any(_asked_for_device(reason) for ref in refs for reason in reasons[id(ref.tensor)][-1:]):
                found |= _run(plan.seed, module, refs, where, code, target, reasons, placed=True)
    missing = [
        f"{ref.name} (in {ref.owner}): {'; '.join(reasons[id(ref.tensor)]) or 'its owner has no code to set it'}"
        for ref in pending
        if id(ref.tensor) not in found
    ]
    if missing:
        raise ValueError(
            f"{len(missing)} buffers on the meta device are set by nobody:{listing(missing)}\n"
            "Give their values with buffers=, a function of name and tensor, or build the model off the meta device"
        )
    return found


def buffer_value(ref: TensorRef, value: Any, buffer: Tensor) -> Tensor:
    """A buffer with the value that the caller's `buffers` returned for it."""
    with torch.no_grad():
        value = torch.as_tensor(value, device=buffer.device)
        try:
            if ref.kind != "dtensor" or type(value) is type(buffer):
                return buffer.copy_(value.expand(buffer.shape))
            whole = value.expand(buffer.shape)
            for shard, region in local_shards(buffer):
                shard.copy_(region.of(whole))
            return buffer
        except RuntimeError:
            raise ValueError(
                f"buffers: {ref.name} has shape {tuple(buffer.shape)}, and the value given has {tuple(value.shape)}"
            ) from None


def _setters(module: nn.Module, above: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Code that may set a module's buffers."""
    if callable(getattr(type(module), "_init_buffers", None)):
        yield f"{class_name(module)}._init_buffers", lambda: type(module)._init_buffers(module)  # type: ignore[attr-defined]
    function = reset_function(module)
    if function is not None:
        yield f"{class_name(module)}.{function.__name__}", lambda: function(module)
    if above is not None:
        yield f"{class_name(above)}._init_weights", lambda: above._init_weights(module)


def _run(
    seed: int,
    module: nn.Module,
    refs: list[TensorRef],
    where: str,
    code: Callable[[], Any],
    target: torch.device,
    reasons: dict[int, list[str]],
    placed: bool = False,
) -> dict[int, Tensor]:
    """Run code that sets buffers of a module, with nothing but these within its reach.

    With `placed`, all else in its reach lies on the target, as code expects that goes by the device of a parameter: it
    is one NaN, without memory for more, and read-only.
    """
    with torch.inference_mode(False):
        fresh = {id(ref.tensor): _poisoned(ref.tensor, target) for ref in refs}
        within = _read_only(module, fresh, target) if placed else fresh
    versions = {key: tensor._version for key, tensor in fresh.items()}
    with ExitStack() as stack:
        stack.enter_context(stand_ins(module, dict(within)))
        stack.enter_context(kept_generators())
        torch.manual_seed(named_key(seed, refs[0].name.rpartition(".")[0]))  # the owner's name
        for context in (torch.inference_mode(False), torch.no_grad(), swap(), target):
            stack.enter_context(context)
        try:
            code()
        except Exception as error:
            for ref in refs:
                reasons[id(ref.tensor)].append(f"{where} raised {type(error).__name__}: {error}".splitlines()[0])
            return {}
        after = {id(ref.tensor): module._buffers.get(ref.attribute) for ref in refs}
    found = {}
    for key, tensor in after.items():
        same = tensor is fresh[key]
        if tensor is None or tensor.is_meta or (same and tensor._version == versions[key] and _is_poisoned(tensor)):
            reasons[key].append(f"{where} does not set it")
        elif placed and tensor.is_floating_point() and bool(tensor.isnan().any()):
            reasons[key].append(f"{where} computes it from parameters")
        else:
            found[key] = tensor.to(target)
    return found


def _asked_for_device(reason: str) -> bool:
    """Whether code failed, or put a buffer on meta, since it goes by the device of a parameter."""
    return "meta" in reason or reason.endswith("does not set it")


def _read_only(module: nn.Module, fresh: Mapping[int, Tensor], target: torch.device) -> dict[int, Tensor]:
    """By id: the buffers that are to be set, and for all else in a module's reach one NaN, expanded."""
    found = dict(fresh)
    for owner in module.modules():
        for tensor in (*owner._parameters.values(), *owner._buffers.values()):
            if tensor is not None and id(tensor) not in found and (tensor.is_floating_point() or tensor.is_complex()):
                one = torch.full((), math.nan, dtype=tensor.dtype, device=target).expand(tensor.shape)
                found[id(tensor)] = nn.Parameter(one, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else one
    return found


def _poisoned(tensor: Tensor, device: torch.device) -> Tensor:
    """A buffer whose contents show that nobody has written to it."""
    empty = torch.empty_like(tensor, device=device)
    vars(empty).update({name: value for name, value in vars(tensor).items() if name != "_is_hf_initialized"})
    return empty.fill_(_poison(tensor.dtype))


def _poison(dtype: torch.dtype) -> float:
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return 0 if dtype == torch.bool else torch.iinfo(dtype).max


def _is_poisoned(tensor: Tensor) -> bool:
    poison = _poison(tensor.dtype)
    return bool((tensor.isnan() if math.isnan(poison) else tensor == poison).all())
