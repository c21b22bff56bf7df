"""watch(): which module of a model produced the first non-finite value, told apart from those that passed one on.

Hooks inspect every tensor once, when it first comes by: as a module's output, as an input that no module put out, as a
parameter or buffer of a module about to run. An inspection is one read that leaves a flag; on a device it is one
launch, and the flags stay there until somebody asks for them. Which module is to blame is worked out afterwards, on the
host, from the flags and from which module read what.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..distributed.collectives import all_gather_object
from ..distributed.dtensors import is_dtensor
from ..distributed.groups import groups_of
from ..models.naming import class_name, unwrapped, walk
from ..models.patterns import compile_pattern
from .hooks import ModelHooks
from .record import ModuleInfo, module_label
from .report import WatchReport, merge

Selector: TypeAlias = str | type[nn.Module] | nn.Module


class Watch:
    """A watch over a model: what `initlab.watch` returns. A context manager, like the handle of a torch hook.

    It watches from the moment it is made until the `with` block ends, `remove` is called, or it is itself collected.
    """

    def __init__(self, hooks: ModelHooks) -> None:
        self._hooks = hooks
        self._finalizer = weakref.finalize(self, hooks.remove)
        self._finalizer.atexit = False

    def report(self, across: Any = None) -> WatchReport:
        """What has been seen so far, also after the hooks are gone. The only call that waits for the device.

        Across ranks every rank must make the call, and gets the same report: the first fault of the job, and those of
        the other ranks. It gathers small objects once; nothing else of a watch ever communicates. Each rank counts its
        own calls of the model, and ranks need not have seen equally many.

        Faults are ordered so that a cause comes before its consequences:

        1. the earlier step and call of the model, and in it the forward pass before the backward pass;
        2. what comes from the rank's own modules, their parameters and buffers included, before what comes from
           elsewhere: a non-finite input, such as a pipeline stage gets from the one before; a parameter that was
           gathered, where the rank's own shard of it is finite;
        3. what was seen after fewer tensors: tensor-parallel ranks run the same modules, and a rank gets the sum over
           all of them later than the rank that made it non-finite;
        4. a parameter or buffer before what a module produced; the lower rank.

        Where ranks mix their batches inside the model, as SyncBatchNorm does, a bad batch is therefore among `others`.

        Args:
            across: a ProcessGroup or a DeviceMesh, of which this rank is part, or True for all ranks; None reports
                this rank alone. A mesh of several dimensions that does not span all ranks needs a gather for each
                dimension.

        Returns:
            A `WatchReport`.

        Raises:
            TypeError: if `across` is something else.
            ValueError: if this rank is not part of it.
            RuntimeError: if torch.distributed is not initialised.

        Example:
            >>> import torch, initlab
            >>> import torch.distributed as dist
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            >>> model = torch.nn.Linear(2, 1)
            >>> with initlab.watch(model) as watching:
            ...     y = model(torch.tensor([[1.0, float("nan")]]))
            >>> print(watching.report(across=True))
            rank 0, call 1, forward: input 0 of the model holds NaN (float32); no module produced it
              passed on by the model itself
              (1 calls of the model, 1 of its modules, 1 ranks)
            >>> dist.destroy_process_group()
        """
        groups = groups_of(across)
        own = self._hooks.report()
        return merge(all_gather_object(own, groups)) if groups else own

    def remove(self) -> None:
        """Remove every hook now; what was seen can still be reported."""
        self._finalizer()

    def __enter__(self) -> Watch:
        if not self._finalizer.alive:
            raise RuntimeError("this watch has been removed from its model; call initlab.watch again for another")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        due = kind is None and self._hooks.active and self._hooks.every
        self.remove()
        if due and (fault := self._hooks.read_all()) is not None:
            raise FloatingPointError(f"{fault}\n  raised at the end of initlab.watch")


def watch(
    model: nn.Module,
    *,
    modules: Selector | Iterable[Selector] | None = None,
    allow: Selector | Iterable[Selector] = (),
    backward: bool = False,
    every: int | None = None,
) -> Watch:
    """Watch a model for the first NaN or infinity, and for the module that produced it.

    Hooks inspect the inputs, parameters, buffers and outputs of the modules, each tensor once, in forward passes of any
    kind: training or eval, under autocast, no_grad or inference_mode, with activation checkpointing, inside DDP and
    FSDP. Inputs and outputs may be tensors, or tuples, lists, mappings and dataclasses of them. The first non-finite
    *output* is traced back: to the module that made it from finite inputs; to a container's own code, where it was made
    between two of its modules; to a parameter or buffer that was non-finite before; or to the model's input. Once a
    fault is known nothing more is inspected, since what comes later follows from it.

    Nothing waits for the device. The flags stay there, are copied to the host after each call of the model without
    waiting, and are read when they have landed, or by `report`. A backward pass belongs to the call before it. On a CPU
    flags are read as they are found.

    -inf is no fault where masks have it: in a buffer, or in an argument of the model other than its first tensor. A
    module that puts it out on purpose belongs in `allow`.

    Of a DTensor each rank inspects its own part, without communication. Where FSDP has gathered a parameter, each rank
    also inspects its own shard, which tells whose shard is non-finite. `report(across=True)` brings together what all
    ranks have seen.

    Compiled modules are watched at their borders: what goes into them and what comes out. Inside compiled code no hooks
    run. To find the module there, call the model once more under `torch.compiler.set_stance("force_eager")` and watch
    `model._orig_mod`. Watch what you call: where `torch.compile(model)` runs, watch that, and not `model`. What is
    compiled during the watch gets a graph break at each module that is watched, which `fullgraph=True` turns into an
    error. Nothing is inspected under torch.func's transforms, nor inside TorchScript, nor in outputs that hold no
    tensors: the report names what was not inspected. The capture of a CUDA graph is refused.

    Copies and pickles of the model that are made during the watch are not watched, and hold nothing of it.

    A module that finds its own flag, as a fused layer does, may have a method `write_flag_to(flag)`. It is called with
    an int32 tensor of shape (1,) before the module runs, on the device of its first input, to be or-ed with the flag
    (NaN = 1, +inf = 2, -inf = 4) of the module's output, and with None after. That output is then not read again.

    Args:
        model: the model, in its wrappers (DDP, FSDP, ...) or not. The model itself is always watched.
        modules: watch only these modules of it: names or globs ("encoder", "h.*.mlp"; a name includes all within it),
            classes, or modules. What the others do counts as their caller's own code.
        allow: modules, given likewise, that may put out -inf. NaN and +inf from them are still faults.
        backward: watch gradients too: of every input and output of modules, and of parameters.
        every: check every so many calls of the model, and at the end of the `with` block, whether a fault is known, and
            raise it. A
            fault of a forward pass on the CPU is raised by that call of the model, any other by a later one, when its
            flags have landed. None only reports. Use None where there are other ranks, which would wait for the one
            that raises, and let all of them call `report(across=True)` every so often.

    Returns:
        A `Watch`: a context manager with `report()` and `remove()`. Keep it: its hooks go when it does.

    Raises:
        TypeError: if the model is not a module, or a selector is neither a name, nor a class of modules, nor a module.
        ValueError: if a selector selects nothing, or `every` is not positive.
        FloatingPointError: from a call of the model, or at the end of the `with` block, where `every` is given.
        RuntimeError: from a call of the model in the capture of a CUDA graph.

    Example:
        >>> import torch, initlab
        >>> class Log(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.log()
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), Log(), torch.nn.Linear(3, 1))
        >>> weight = torch.nn.init.constant_(model[0].weight, -1.0)
        >>> with initlab.watch(model) as watching:
        ...     y = model(torch.ones(4, 2))
        >>> print(watching.report())
        call 1, forward: module '1' (Log) produced NaN (float32) in its output
          passed on by 2
          (1 calls of the model, 4 of its modules)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if every is not None and (not isinstance(every, int) or every < 1):
        raise ValueError(f"every is {every!r}; it must be a positive number of calls, or None to report only")
    names: dict[nn.Module, str] = {}
    for name, module in walk(model):
        names.setdefault(module, name)
    watched = set(names) if modules is None else _select(names, modules, "modules")
    allowed = _select(names, allow, "allow")
    compiled = _compiled(model)
    inside = {inner for module in compiled for inner in module.modules() if inner is not module}
    hooks = ModelHooks(backward, every, _shards(names), model)
    try:
        hooks.count_steps()
        for module, name in names.items():
            if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                hooks.note_unseen(f"what runs inside {module_label(name)}, which is TorchScript")
            elif module not in inside and (module in watched or not name or module in compiled):
                hooks.register(module, _info(module, name, module in allowed))
        for module in compiled:
            inner = unwrapped(module)
            if inner is not module:  # names has what torch.compile was given; its hooks run inside, if at all
                hooks.register(module, _info(inner, names[inner], inner in allowed))
            hooks.note_unseen(f"what runs inside {module_label(names[inner])}, which is compiled")
    except BaseException:
        hooks.remove()
        raise
    return Watch(hooks)


def _compiled(model: nn.Module) -> list[nn.Module]:
    """The outermost compiled modules: wrapped by torch.compile, or compiled in place by Module.compile."""
    found: list[nn.Module] = []
    for module in model.modules():
        is_compiled = "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        if is_compiled and not any(module in outer.modules() for outer in found):
            found.append(module)
    return found


def _info(module: nn.Module, name: str, may_put_out_negative_inf: bool) -> ModuleInfo:
    writes = callable(getattr(module, "write_flag_to", None))
    return ModuleInfo(name, class_name(module), may_put_out_negative_inf, writes)


def _shards(names: Mapping[nn.Module, str]) -> dict[str, weakref.ref[Tensor]]:
    """The parameters that are DTensors, by name."""
    return {
        f"{name}.{leaf}": weakref.ref(parameter)
        for module, name in names.items()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and is_dtensor(parameter)
    }


def _select(names: dict[nn.Module, str], selectors: Selector | Iterable[Selector], argument: str) -> set[nn.Module]:
    """The modules that any of the selectors selects."""
    if isinstance(selectors, str | type | nn.Module):
        selectors = (selectors,)
    found: set[nn.Module] = set()
    for selector in selectors:
        if isinstance(selector, nn.Module):
            fits = {module for module in names if module is selector}
        elif isinstance(selector, type) and issubclass(selector, nn.Module):
            fits = {module for module in names if isinstance(module, selector)}
        elif isinstance(selector, str):
            is_selected = compile_pattern(selector, names.values())
            fits = {module for module, name in names.items() if is_selected(name)}
        else:
            raise TypeError(
                f"{argument} has {selector!r}; it must be the name of a module, a glob, a class of modules, or a module"
            )
        if not fits:
            raise ValueError(f"{argument} has {selector!r}, which selects no module; see model.named_modules()")
        found |= fits
    return found
