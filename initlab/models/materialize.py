"""Memory for what lies on the meta device or elsewhere: new tensors, and how they take the places of the old ones."""

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from initlab.kernels.torch_internals import can_take_data

from .naming import TensorRef


def resolved_device(device: torch.device | str | int) -> torch.device:
    """The device that tensors made on `device` have: "cuda" is "cuda:0", for instance."""
    target = torch.empty(0, device=device).device
    if target.type == "meta":
        raise ValueError("device is meta, where nothing can be filled; plan_model shows what would be")
    return target


def materialized(refs: Iterable[TensorRef], device: torch.device) -> dict[int, Tensor]:
    """Empty tensors on a device for those of a model that lie elsewhere, by the id of the old."""
    with torch.inference_mode(False):
        return {id(ref.tensor): _empty_twin(ref, device) for ref in refs if ref.tensor.device != device}


def _empty_twin(ref: TensorRef, device: torch.device) -> Tensor:
    """An empty tensor on another device: class, requires_grad and attributes are kept."""
    tensor = ref.tensor
    empty = torch.empty_like(tensor, device=device, requires_grad=False)
    if ref.kind == "dtensor":
        empty = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    elif isinstance(tensor, nn.Parameter):
        empty = Tensor._make_subclass(type(tensor), empty.detach().as_subclass(Tensor), tensor.requires_grad)
    vars(empty).update(vars(tensor))
    return empty


def attach(refs: Iterable[TensorRef], new: Mapping[int, Tensor], target: torch.device | None) -> None:
    """Put new tensors in the places of the old ones, and move what else there is to the target.

    Args:
        refs: all parameters and buffers of a model.
        new: tensors on the target, by the id of the old.
        target: the device; None leaves all others where they are.
    """
    recurrent = set()
    for ref in refs:
        old = ref.tensor
        moved = new.get(id(old))
        if moved is None:
            if target is None or old.is_meta or old.device == target or ref.kind == "lazy":
                continue
            moved = old.detach().to(target)
        if ref.kind == "dtensor":
            moved = _swapped(old, moved, ref.name)
        elif ref.is_parameter and can_take_data(old, moved):
            old.data = moved.detach()  # the same Parameter, as Module.to keeps it for an optimizer
            if old.grad is not None:
                old.grad.data = old.grad.to(target)
            continue
        if ref.is_parameter and not isinstance(moved, nn.Parameter):
            moved = nn.Parameter(moved, old.requires_grad)
        for owner, attribute in ref.places:
            (owner._parameters if ref.is_parameter else owner._buffers)[attribute] = moved  # type: ignore[assignment]
            if isinstance(owner, nn.RNNBase):
                recurrent.add(owner)
    for module in recurrent:
        module._init_flat_weights()  # it keeps a list of its parameters


def _swapped(old: Tensor, new: Tensor, name: str) -> Tensor:
    """A DTensor that is `old` to those who hold it and has what `new` has, as Module.to leaves it for an optimizer."""
    gradient, old.grad = old.grad, None  # which would keep it from being swapped
    if not isinstance(new, nn.Parameter) and isinstance(old, nn.Parameter):
        new = nn.Parameter(new, old.requires_grad)
    try:
        torch.utils.swap_tensors(old, new)
    except RuntimeError as error:
        warnings.warn(
            f"{name} is a new parameter now, as torch could not change the old one in place ({error}); make anew what "
            "holds the old one, such as an optimizer",
            stacklevel=2,
        )
        return new
    if gradient is not None and not gradient.is_meta:
        old.grad = gradient.to(old.device)
    return old
