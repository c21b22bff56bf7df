"""Recording: in its modes, what code writes to tensors is recorded as it happens. For builds, and for code run again.

Two modes of torch watch the thread. A dispatch mode sees every operator, and so every write, also through views and
`.data`. A function mode sees what operators do not show: the numbers given to torch.tensor on the meta device, the
fans of kaiming_uniform_, and torch's functions that do nothing there. Nothing that is called gets another result.
"""

import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from initlab.kernels import Distribution, TruncatedNormal
from initlab.kernels.torch_internals import fan_by_mode, without_functions

from .._init_draws import observers
from .contents import Contents, Value, computed, literal, whole
from .naming import class_name
from .operations import Operations
from .patches import INIT_PATCHES, Observer, sinks
from .programs import Filled
from .redirection import skipped_on_meta


class Recording(Observer):
    """What is recorded while code runs, in the thread that entered its modes.

    Args:
        guarded: storages that the code must not reach, as where it runs on stand-ins; nor may it write to memory that
            was there before, then. None lets it do as it likes.
    """

    def __init__(self, guarded: Collection[int] | None = None) -> None:
        self.contents = Contents()
        self.operations = Operations(self.contents, self.where, guarded)
        self.modules: dict[int, weakref.ref[nn.Module]] = {}
        self.thread = threading.get_ident()
        self.suspended = 0
        self.in_init = ""  # the function of torch.nn.init that runs now, where its operations count as one

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Inside it, what this thread's code writes is recorded."""
        with ExitStack() as stack:
            for register in (
                hooks.register_module_parameter_registration_hook,
                hooks.register_module_buffer_registration_hook,
                hooks.register_module_module_registration_hook,
            ):
                stack.callback(register(self.registered).remove)
            INIT_PATCHES.add()
            stack.callback(INIT_PATCHES.remove)
            sinks().append(self)
            stack.callback(sinks().remove, self)
            observers().append(self.drawn)
            stack.callback(observers().remove, self.drawn)
            stack.enter_context(_Operators(self))
            stack.enter_context(_Functions(self))
            yield

    def where(self) -> str:
        """The code that is running: class and method of the innermost module, or a function."""
        return _running_code(sys._getframe(1))

    def registered(self, module: nn.Module, name: str, child: Any) -> None:
        """A hook of torch: a module is about to get a parameter, a buffer or a child."""
        if threading.get_ident() == self.thread:
            self.modules.setdefault(id(module), weakref.ref(module))

    def drawn(self, tensor: Tensor, distribution: Distribution) -> None:
        """A function of initlab.init has filled a tensor."""
        if not self.suspended:
            draw = self.contents.new_draw()
            node = Filled(tuple(tensor.shape), tensor.dtype, distribution, *draw)
            self.contents.write(tensor, whole(Value(distribution, self.where(), draws=draw)), node)

    def made_of(self, tensor: Tensor, data: Any) -> None:
        """A tensor was made of numbers, which it does not hold where it is on the meta device."""
        self.suspended += 1
        try:
            values = torch.as_tensor(data, dtype=tensor.dtype, device="cpu") if tensor.is_meta else tensor.detach()
            self.contents.write(tensor, literal(data, self.where()), self.contents.literal(values))
        finally:
            self.suspended -= 1

    def observe(self, target: str, call: Callable[[], Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """A function of torch.nn.init, of which operators show too little: on meta these do nothing."""
        if self.suspended:
            return call()
        tensor = args[0] if args else kwargs["tensor"]
        if target != "trunc_normal_":
            nothing = tensor.is_meta and target in ON_META  # they leave it alone
            self.suspended += nothing
            try:
                result = call()
            finally:
                self.suspended -= nothing
            self.computed_by(
                target, tensor, {"gain": 1.0} | dict(zip(_AFTER_TENSOR[target], args[1:], strict=False)) | kwargs
            )
            return result
        self.suspended += 1
        try:
            result = call()
        finally:
            self.suspended -= 1
        names = ("tensor", "mean", "std", "a", "b", "generator")
        given = {"generator": None} | dict(zip(names, args, strict=False)) | kwargs
        numbers = [float(given[name]) for name in names[1:5]]
        count = self.contents.draws
        fills = self.operations._sampled(lambda: TruncatedNormal(*numbers), {"generator": given["generator"]})
        distribution = fills[0][1].distribution
        node = None
        if self.contents.draws > count and distribution is not None:
            node = Filled(tuple(tensor.shape), tensor.dtype, distribution, self.contents.draws)
        self.contents.write(tensor, fills, node)
        return result

    def computed_by(self, target: str, tensor: Tensor, given: dict[str, Any]) -> None:
        """A function of torch.nn.init has computed a tensor; on the meta device some do nothing."""
        if tensor.is_meta and target in ON_META and tensor.numel() and given.get("generator") is None:
            with torch.no_grad():
                ON_META[target](tensor, **given)
        fills = self.contents.read(tensor)
        if fills is not None and any(value.distribution is None for _, value in fills):
            node = self.contents.node(tensor)
            self.contents.write(tensor, computed(f"{self.where()} writes it by {target}"), node)


def _orthogonal_on_meta(tensor: Tensor, gain: float = 1.0, **_: Any) -> None:
    """The operators that torch's orthogonal_ calls elsewhere."""
    rows = tensor.size(0)
    flattened = tensor.new_empty((rows, tensor.numel() // rows)).normal_(0, 1)
    turned = rows < flattened.size(1)
    q, r = torch.linalg.qr(flattened.t_() if turned else flattened)
    q *= torch.diag(r, 0).sign()
    if turned:
        q.t_()
    tensor.view_as(q).copy_(q)
    tensor.mul_(gain)


def _sparse_on_meta(tensor: Tensor, sparsity: float, std: float = 0.01, **_: Any) -> None:
    """The operators that torch's sparse_ calls elsewhere."""
    rows, columns = tensor.shape
    tensor.normal_(0, std)
    for column in range(columns):
        tensor[torch.randperm(rows, device=tensor.device)[: math.ceil(sparsity * rows)], column] = 0


ON_META: dict[str, Callable[..., None]] = {"orthogonal_": _orthogonal_on_meta, "sparse_": _sparse_on_meta}
_AFTER_TENSOR = {
    "orthogonal_": ("gain", "generator"),
    "sparse_": ("sparsity", "std", "generator"),
    "eye_": (),
    "dirac_": ("groups",),
}


class _Operators(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.recording.suspended:
            return func(*args, **kwargs)
        with without_functions():  # the function mode has no part in what is looked at here
            return self.recording.operations.follow(func, args, kwargs, lambda: func(*args, **kwargs))


class _Functions(TorchFunctionMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        recording = self.recording
        if func is torch.tensor and _asks_whether_to_start(sys._getframe(1)):
            kwargs = kwargs | {"device": "cpu"}
        result = func(*args, **kwargs)
        if recording.suspended:
            return result
        if func in _OF_DATA and isinstance(result, Tensor):
            data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
            if not isinstance(data, Tensor):
                recording.made_of(result, data)
        elif func in _UNSEEN:
            why = f"{recording.where()} writes it by {func.__name__}, element by element"
            recording.contents.write(args[0], computed(why))
        elif func is vars(torch.nn.init).get("kaiming_uniform_"):
            tensor = args[0] if args else kwargs["tensor"]
            mode = args[2] if len(args) > 2 else kwargs.get("mode", "fan_in")
            if 0 not in tensor.shape:
                recording.contents.note_fan(tensor, fan_by_mode(tensor, mode))
        elif func is Tensor.dim and args[0].is_meta:
            name, given = skipped_on_meta(sys._getframe(1))
            if name:
                recording.computed_by(name, args[0], given)
        return result


_UNSEEN = (Tensor.apply_, Tensor.map_, Tensor.map2_)  # they call no operator, and do nothing on the meta device
_OF_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor)


def _asks_whether_to_start(frame: FrameType | None) -> bool:
    """Whether transformers asks if it builds on the meta device, where it leaves `_init_weights` out.

    It goes by the device of a tensor without elements. What would be left out is what has to be recorded.
    """
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_code.co_name == "get_torch_context_manager_or_global_device":
            return frame.f_back is not None and frame.f_back.f_code.co_name == "init_weights"
        frame = frame.f_back
    return False


_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(os.path.dirname(__file__))
_PLUMBING = (
    *(os.path.join(_TORCH, *path) for path in (("nn", "init.py"), ("nn", "parameter.py"), ("utils", ""), ("_",))),
    *(os.path.join(_TORCH, name) for name in ("overrides.py", "functional.py")),
    os.path.join(_HERE, "models", ""),
    os.path.join(_HERE, "_init_draws.py"),
    os.path.join(_HERE, "init.py"),
)


def _running_code(frame: FrameType | None) -> str:
    function = ""
    for _ in range(24):
        if frame is None:
            break
        code = frame.f_code
        if not code.co_filename.startswith(_PLUMBING):
            function = function or code.co_name
            if code.co_varnames[:1] == ("self",) and isinstance(owner := frame.f_locals.get("self"), nn.Module):
                return f"{class_name(owner)}.{code.co_name}"
        frame = frame.f_back
    return function or "code of the model"
