"""The hooks of a watch: they inspect each tensor once, when it first comes by, and record its flag."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from initlab.kernels import PLAIN, add_flag_, all_finite_fast, eagerly, nonfinite_flag
from initlab.kernels.torch_internals import backward_id, count_dispatch_modes, is_transforming, without_dispatch_modes

from .._tree import Path, tensors_in, tensors_with_paths
from ..distributed.dtensors import local as local_part
from .blame import first_fault
from .record import ModuleCall, ModuleInfo, Observation, PassRecord
from .report import Fault, WatchReport

_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_SYNCHRONOUS = ("cpu",)  # devices whose flags the host reads as they are found
_WITHOUT_TENSORS = (type(None), int, float, bool, str)  # outputs in which there is nothing to inspect


class Hook:
    """One hook on one module. A copy or a pickle of the module gets the standard library's no-op in its place.

    Args:
        function: called with the module's info, the module, and what the hook is called with.
        module: the only one for which the hook does anything, with its replicas in nn.DataParallel.
        info: of the module.
    """

    def __init__(self, function: Callable[..., None], module: nn.Module, info: ModuleInfo) -> None:
        self.function = function
        self.module = weakref.ref(module)
        self.info = info

    def __call__(self, module: nn.Module, *arguments: Any) -> None:
        if module is self.module() or getattr(module, "_is_replica", False):
            eagerly(self.function, self.info, module, *arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return contextlib.nullcontext().__exit__

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class ModelHooks:
    """The hooks on a model, and what they record. Holds no module, and tensors by weak references only.

    Args:
        backward: whether to inspect gradients too.
        every: as for `watch`.
        shards: by name, what this rank itself has of parameters that are sharded over several.
        model: whose optimizers' steps are counted.

    Attributes:
        active: whether the hooks still inspect anything.
        fault: the first fault that the host knows of.
        record: of the current call of the model.
        calls: how many calls of modules were watched.
        inspected: how many tensors were inspected.
        steps: how many steps optimizers of the model's parameters have taken.
        unseen: what was not inspected, in sentences.
    """

    def __init__(
        self, backward: bool, every: int | None, shards: Mapping[str, weakref.ref[Tensor]], model: nn.Module
    ) -> None:
        self.backward = backward
        self.every = every
        self.shards = shards
        self.active = True
        self.fault: Fault | None = None
        self.calls = 0
        self.inspected = 0
        self.steps = 0
        self.unseen: dict[str, None] = {}  # in order, each once
        self.model = weakref.ref(model)
        # By optimizer: how many groups it had when it was looked at, and whether it has parameters of the model.
        self.optimizers: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, bool]] = (
            weakref.WeakKeyDictionary()
        )
        self.record = PassRecord(0, 1)
        self.pending: deque[PassRecord] = deque()  # calls whose flags are on their way to the host
        self.observed: dict[int, tuple[weakref.ref[Tensor], int, Observation]] = {}  # this call's tensors, by id
        self.handles: list[RemovableHandle | _Restore] = []
        self.tensor_handles: list[tuple[bool, RemovableHandle]] = []  # (whether on a leaf, handle)
        self.running = 0  # outermost calls; more than one where threads overlap
        self.lock = threading.RLock()
        self.local = threading.local()

    def register(self, module: nn.Module, info: ModuleInfo) -> None:
        """Put the hooks on a module."""
        if getattr(module, "_compiled_call_impl", None) is not None:
            self.handles.append(_watch_compiled_call(module, info, self))
            return
        before, after = Hook(self.before_call, module, info), Hook(self.after_call, module, info)
        self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self.handles.append(module.register_forward_hook(after, always_call=True))  # an exception ends a call too

    def count_steps(self) -> None:
        """Count the steps of optimizers that hold a parameter of the model."""
        hooks = weakref.ref(self)  # the registry is global

        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if (own := hooks()) is not None and own.active:
                own.steps += own.is_of_model(optimizer)

        self.handles.append(register_optimizer_step_post_hook(after_step))

    def is_of_model(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer holds a parameter of the model. Found once for as many groups: models are large."""
        groups, found = self.optimizers.get(optimizer, (0, False))
        model = self.model()
        if groups != len(optimizer.param_groups) and model is not None:
            own = {id(parameter) for parameter in model.parameters()}
            found = any(id(p) in own for group in optimizer.param_groups for p in group["params"])
            self.optimizers[optimizer] = len(optimizer.param_groups), found
        return found

    def note_unseen(self, what: str) -> None:
        """Note what is not inspected."""
        self.unseen[what] = None

    def report(self) -> WatchReport:
        """What has been seen so far; waits for the device."""
        fault = self.read_all()
        unseen = tuple(self.unseen)
        if not self.record.number:
            unseen += (
                "the model was not called. If torch.compile(model) is what runs, watch that; if a copy of it does, "
                "watch the copy",
            )
        return WatchReport(fault, self.steps, self.record.number, self.calls, unseen=unseen, inspected=self.inspected)

    def remove(self) -> None:
        """Remove every hook; what was recorded can still be reported."""
        self.active = False
        for handle in (*self.handles, *(handle for _, handle in self.tensor_handles)):
            handle.remove()
        self.handles.clear()
        self.tensor_handles.clear()
        self.observed.clear()

    # One call of a module

    def call_stack(self) -> list[ModuleCall]:
        """The calls that run in this thread, the outermost first."""
        try:
            stack: list[ModuleCall] = self.local.stack
        except AttributeError:
            stack = self.local.stack = []
        return stack

    def before_call(self, info: ModuleInfo, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.active:
            return
        stack = self.call_stack()
        if stack and info is stack[0].module and _frame_depth() <= self.local.depth:
            stack.clear()  # a KeyboardInterrupt, say, ended the call before, and no hook was told
            with self.lock:
                self.running -= 1
        if stack:
            call = ModuleCall(info, stack[-1])
            stack[-1].called_children = True
        elif self.begin_call_of_model():
            call = ModuleCall(info, None)
            self.local.depth = _frame_depth()
        else:
            return
        stack.append(call)
        self.record.calls.append(call)
        self.calls += 1
        role = "input" if call.parent else "data"  # the first tensor of an outermost call; others may be masks
        arguments: Iterable[tuple[int | str, Any]] = (*enumerate(args), *kwargs.items()) if kwargs else enumerate(args)
        for argument, value in arguments:
            for path, tensor in tensors_with_paths(value):
                self.observe(call.inputs, tensor, call, role, argument, path)
                role = "input"
        for name, parameter in module._parameters.items():
            # Where the host reads flags as they are found, parameters can wait until an output turns out to be bad.
            # Not what was gathered for this call: FSDP frees it as soon as the module has run.
            if parameter is not None and (
                self.backward
                or parameter.device.type not in _SYNCHRONOUS
                or (self.shards and self.shard_of(info, name, parameter) is not None)
            ):
                self.observe(call.state, parameter, call, "parameter", name)
        for name, buffer in module._buffers.items():  # running statistics change in the call, so they cannot wait
            if buffer is not None:
                self.observe(call.state, buffer, call, "buffer", name)
        if info.writes_flag:
            output = Observation(call, "output", "output", (), torch.float32)
            device = _device_of(module, args, kwargs)
            if device.type in _SYNCHRONOUS:
                flag = torch.zeros(1, dtype=torch.int32, device="cpu")
            else:
                flag = self.record.new_flag(device, output)
            call.own_flag = output, flag
            module.write_flag_to(flag)  # type: ignore[operator]

    def after_call(self, info: ModuleInfo, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stack = self.call_stack()
        if not any(call.module is info for call in stack):
            return  # it began before the watch did, or is not watched
        call = stack.pop()
        while call.module is not info:  # it raised an error that the model itself has caught
            call = stack.pop()
        if call.own_flag is not None:
            module.write_flag_to(None)  # type: ignore[operator]
        if self.active:
            self.observe_output(call, module, output)
        if not stack:
            self.end_call_of_model(output)

    def observe_output(self, call: ModuleCall, module: nn.Module, output: Any) -> None:
        """Inspect what a call put out, and then its parameters, if that was not done before it began."""
        if call.own_flag is not None:
            observation, flag = call.own_flag
            self.record.observations.append(observation)
            if flag.device.type in _SYNCHRONOUS:
                self.record.set_flag(observation, int(flag))
        seen = False
        for path, tensor in tensors_with_paths(output):
            seen = True
            if call.own_flag is None:
                self.observe(call.outputs, tensor, call, "output", "output", path)
            elif tensor.is_floating_point():
                self.remember(tensor, call.own_flag[0])
                call.outputs.append(call.own_flag[0])
        if not seen and not isinstance(output, _WITHOUT_TENSORS):
            call.unseen = type(output).__name__
            self.note_unseen(f"the output of {call.module.label}, a {call.unseen}")
        for name, parameter in module._parameters.items():
            if parameter is not None and self.record.suspect and not self.backward:
                self.observe(call.state, parameter, call, "parameter", name)
        if module._modules and not call.called_children:  # it used their weights itself, as MultiheadAttention does
            for child_name, child in module.named_children():
                for name, parameter in child.named_parameters():
                    if self.record.suspect or self.backward or parameter.device.type not in _SYNCHRONOUS:
                        self.observe(call.state, parameter, call, "parameter", f"{child_name}.{name}")

    # One tensor

    def observe(
        self,
        into: list[Observation],
        tensor: Tensor,
        call: ModuleCall,
        role: str,
        name: int | str,
        path: Path = (),
    ) -> None:
        """Inspect a tensor, unless that was done since it last changed, and add the observation to the call's."""
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return
        known = self.observed.get(id(tensor))
        # An inference tensor counts no versions: it is inspected each time.
        if known is not None and known[0]() is tensor and not tensor.is_inference() and known[1] == tensor._version:
            observation = known[2]
        else:
            if is_transforming():
                self.note_unseen(f"what {call.module.label} computes under torch.func's transforms")
                return
            local = tensor if type(tensor) in PLAIN else _local(tensor)
            if local is None:
                self.note_unseen(f"{name} of {call.module.label}, a {type(tensor).__name__}")
                return
            self.inspected += 1
            observation = Observation(call, role, name, path, tensor.dtype)
            self.record.observations.append(observation)
            self.find_flag(observation, local)
            if self.shards and role == "parameter":
                self.find_flag_of_shard(observation, tensor)
            self.remember(tensor, observation)
        if role != "output" or self.backward:
            into.append(observation)
        if self.backward and role != "output":
            observation.users.append(call)

    def remember(self, tensor: Tensor, observation: Observation) -> None:
        """Note that a tensor has been inspected; hook its gradient, where gradients are watched."""
        observation.dtype = tensor.dtype
        version = -1 if tensor.is_inference() else tensor._version
        self.observed[id(tensor)] = weakref.ref(tensor), version, observation
        if self.backward and tensor.requires_grad and torch.is_grad_enabled():
            handle = tensor.register_hook(functools.partial(self.observe_gradient, observation))
            self.tensor_handles.append((tensor.is_leaf, handle))

    def find_flag(self, observation: Observation, tensor: Tensor) -> None:
        """Find a tensor's flag, or launch what finds it on its device."""
        device = tensor.device
        try:
            with _without_dispatch_modes():
                if device.type in _SYNCHRONOUS:
                    if not all_finite_fast(tensor):
                        self.record.set_flag(observation, int(nonfinite_flag(tensor)))
                elif device.type != "meta":
                    add_flag_(self.record.new_flag(device, observation), tensor)
        except (NotImplementedError, RuntimeError, TypeError):
            if type(tensor) in PLAIN:
                raise
            # Of a subclass that cannot say what is finite, a quantised weight for instance, nothing is known.

    def shard_of(self, info: ModuleInfo, name: str, parameter: Tensor) -> Tensor | None:
        """The DTensor from which a parameter was gathered; None where it was not."""
        shard = self.shards.get(f"{info.name}.{name}", _dead_reference)()
        return None if shard is parameter else shard

    def find_flag_of_shard(self, observation: Observation, parameter: Tensor) -> None:
        """Inspect this rank's shard of a gathered parameter too: once it is gathered, all ranks see the same."""
        shard = self.shard_of(observation.call.module, str(observation.name), parameter)
        # What was offloaded to the host would cost it a read in each call.
        if shard is not None and shard.device == parameter.device:
            observation.shard = Observation(observation.call, "shard", observation.name, observation.path, shard.dtype)
            local = local_part(shard)
            if torch.finfo(parameter.dtype).max < torch.finfo(torch.bfloat16).max:  # the cast may have made the inf
                with _without_dispatch_modes():
                    local = local.to(parameter.dtype)
            self.find_flag(observation.shard, local)

    def observe_gradient(self, of: Observation, gradient: Tensor) -> None:
        """Inspect the gradient of a tensor."""
        if self.active:
            observation = Observation(of.call, "gradient", of.name, of.path, gradient.dtype)
            self.record.gradients.append((observation, of))
            local = gradient if type(gradient) in PLAIN else _local(gradient)
            if local is not None:
                self.find_flag(observation, local)

    # One call of the model

    def begin_call_of_model(self) -> bool:
        """Begin an outermost call; False if it is not to be watched."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a watched model cannot be captured in a CUDA graph, whose replays run no hooks; watch calls before "
                "the capture, and remove the watch for it"
            )
        with self.lock:
            if self.running == 0:
                if backward_id() == -1:
                    self.end_pass()
                    if not self.active:
                        return False
                    self.next_pass()
                elif not self.backward:  # activation checkpointing runs again what has been inspected
                    return False
            self.running += 1
        return True

    def end_call_of_model(self, output: Any) -> None:
        """End an outermost call."""
        with self.lock:
            self.running -= 1
            if self.running == 0 and self.active and not self.record.buffers and not self.pending:
                self.fault = self.fault or first_fault(self.record)
                if output is not None:  # after an exception nobody would see one that is raised here
                    self.stop_if_due()

    def next_pass(self) -> None:
        """Begin the record of a call."""
        self.record = PassRecord(self.record.number + 1, self.steps + 1)
        self.observed.clear()
        kept: list[tuple[bool, RemovableHandle]] = []
        for on_leaf, handle in self.tensor_handles:
            if on_leaf:  # parameters, which get a new one in each call
                handle.remove()
            elif handle.hooks_dict_ref() is not None:  # its backward pass may be still to come
                kept.append((on_leaf, handle))
        self.tensor_handles = kept

    def end_pass(self) -> None:
        """Send the flags of the call that is over, and read those that have landed."""
        if self.fault is None and self.record.number:
            self.record.send()
            self.pending.append(self.record)
            self.read_pending()
        self.stop_if_due()

    def read_pending(self, wait: bool = False) -> None:
        """Read the flags of calls that are over, up to the first fault."""
        while self.fault is None and self.pending and (wait or self.pending[0].landed()):
            record = self.pending.popleft()
            record.read_flags()
            self.fault = first_fault(record)

    def read_all(self) -> Fault | None:
        """The first fault so far; waits for the device."""
        with self.lock:
            self.read_pending(wait=True)
            if self.fault is None:
                self.record.send()
                self.record.read_flags()
                self.fault = first_fault(self.record)
            if self.fault is not None and self.every is None:
                self.active = False
            return self.fault

    def stop_if_due(self) -> None:
        """Stop inspecting once a fault is known; raise it, if `every` says so."""
        if self.fault is None or not self.active or (self.every and self.record.number % self.every):
            return
        self.active = False  # what comes later follows from it
        self.pending.clear()
        if self.every:
            raise FloatingPointError(f"{self.fault}\n  raised by initlab.watch(every={self.every})")


def _watch_compiled_call(module: nn.Module, info: ModuleInfo, hooks: ModelHooks) -> _Restore:
    """Watch a module that is compiled in place: its own hooks would run in compiled code, or not at all."""
    compiled: Callable[..., Any] = module._compiled_call_impl  # type: ignore[assignment]

    def watched(*args: Any, **kwargs: Any) -> Any:
        hooks.before_call(info, module, args, kwargs)
        output = None
        try:
            output = compiled(*args, **kwargs)
        finally:
            hooks.after_call(info, module, args, output)
        return output

    module._compiled_call_impl = watched
    return _Restore(module, compiled)


class _Restore:
    """Puts a compiled call back, as a RemovableHandle does a hook."""

    def __init__(self, module: nn.Module, compiled: Callable[..., Any]) -> None:
        self.module, self.compiled = weakref.ref(module), compiled

    def remove(self) -> None:
        """Put it back."""
        if (module := self.module()) is not None:
            module._compiled_call_impl = self.compiled


def _frame_depth() -> int:
    """How many calls deep this thread is: a model that calls itself is deeper inside the second time."""
    frame: FrameType | None = sys._getframe()
    depth = 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


def _device_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where a call computes: the device of its first input, or else of its first parameter."""
    for tensor in tensors_in((args, kwargs)):
        return tensor.device
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _local(tensor: Tensor) -> Tensor | None:
    """This process's part of a tensor of a subclass: a shard of a DTensor; None for fake and lazy tensors."""
    return None if is_lazy(tensor) or hasattr(tensor, "fake_mode") else local_part(tensor)


def _without_dispatch_modes() -> contextlib.AbstractContextManager[Any]:
    """Hides our operations from modes that count or cache what the model does, as selective checkpointing does."""
    return without_dispatch_modes() if count_dispatch_modes() else _NOTHING


def _dead_reference() -> None:
    """A weak reference to nothing."""
