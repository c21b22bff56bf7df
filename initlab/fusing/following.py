"""Follows the outputs of Linear layers through one run of a model on an example."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._tree import tensors_in
from .restoring import restored
from .usage import QUESTIONS, RELU_FUNCTIONS, VIEWS, Use, called, frames, name_of


class Followed(NamedTuple):
    """What a run showed.

    Args:
        uses: by Linear layer that was called, what its output went to.
        flops: by Linear layer, the floating-point operations of its calls.
        all_flops: of the whole run.
    """

    uses: dict[nn.Module, Use]
    flops: dict[nn.Module, int]
    all_flops: int


def follow(model: nn.Module, example: Any) -> Followed:
    """Run a model on an example, without gradients, and put it back as it was.

    Args:
        model: called with the example in the mode, training or not, that it is in.
        example: its argument; a tuple of them; or a dict of named ones.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    arguments = example if isinstance(example, tuple) else () if isinstance(example, Mapping) else (example,)
    named = dict(example) if isinstance(example, Mapping) else {}
    mode = _Follow()
    counter = FlopCounterMode(display=False)
    handles = [m.register_forward_hook(mode.note_call) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with restored(model, values=True), torch.no_grad(), counter, mode:
            output = model(*arguments, **named)
            mode.finish(output)
    finally:
        for handle in handles:
            handle.remove()
    return Followed(mode.uses, mode.flops, counter.get_total_flops())


class _Follow(TorchFunctionMode):
    """Sees each function of torch, and knows the outputs of Linear layers and the views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[nn.Module, Use] = {}
        self.flops: dict[nn.Module, int] = {}
        self.known: dict[int, tuple[weakref.ref[Tensor], nn.Module, bool]] = {}

    def note_call(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Begin to follow what a Linear put out."""
        self.uses.setdefault(module, Use())
        self.flops[module] = self.flops.get(module, 0) + 2 * output.numel() * args[0].shape[-1]
        self.follow(output, module)

    def follow(self, tensor: Tensor, module: nn.Module) -> None:
        """Follow a tensor that holds a Linear's output."""
        self.known[id(tensor)] = weakref.ref(tensor), module, False

    def source(self, value: Any) -> nn.Module | None:
        """The Linear that a tensor comes from as it is."""
        reference, module, _ = self.known.get(id(value), (None, None, False))
        return module if reference is not None and reference() is value else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [(t, m) for t in tensors_in((args, kwargs)) if (m := self.source(t)) is not None]
        result = func(*args, **kwargs)
        name = name_of(func)
        for tensor, module in read:
            use = self.uses[module]
            if name in QUESTIONS:
                continue
            if func in RELU_FUNCTIONS:
                in_module = self.note_caller(use)
                if use.relu and self.known[id(tensor)][2]:
                    use.others["more than one ReLU reads its output"] = None
                use.relu = True
                if result is tensor:  # in place: whoever reads it from here on reads what ReLU left
                    if use.viewed or not in_module:
                        use.others["its ReLU works in place"] = None
                    del self.known[id(tensor)]
                else:
                    self.known[id(tensor)] = (*self.known[id(tensor)][:2], True)
            elif name in VIEWS and args and args[0] is tensor and isinstance(result, Tensor):
                use.viewed = True
                self.follow(result, module)
            else:
                use.others[f"its output goes to {called(name)}"] = None
        return result

    def note_caller(self, use: Use) -> bool:
        """Note the module and the code that applied ReLU; whether it is an nn.ReLU."""
        frame = next(frames(), None)
        owner = None if frame is None else frame.f_locals.get("self")
        if frame is None or not isinstance(owner, nn.Module):
            return False
        if type(owner) is nn.ReLU:
            use.modules[owner] = None
            return True
        use.callers[owner, frame.f_code] = None
        return False

    def finish(self, output: Any) -> None:
        """What is left of the outputs at the end is returned by the model, or kept by it."""
        returned = {id(t) for t in tensors_in(output)}
        for key, (reference, module, _) in self.known.items():
            if reference() is not None:
                self.uses[module].others["the model returns it" if key in returned else "the model keeps it"] = None
        for use in self.uses.values():
            if not use.relu and not use.others:
                use.others["nothing reads its output"] = None
