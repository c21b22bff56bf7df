"""Reads distributions off a model's own code: runs it on stand-ins without memory, and records what it would write.

The code runs on the meta device, so it takes no time, draws nothing and writes nothing. Recorded are sampling calls,
constants, and what scales or shifts them. Whatever else is written has no distribution, and is recorded as unreadable.
"""

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from initlab.kernels import Constant, Distribution, Normal, TruncatedNormal, Uniform
from initlab.kernels.torch_internals import fan_by_mode

from .._init_draws import kaiming_std
from .arithmetic import affine, clamped, inverse_error
from .entry_points import children_first, owners_of_init_weights, public_starts, run_init_weights, unmark
from .layers import reader, reset_function
from .memory import Layout, slice_of
from .naming import class_name
from .redirection import Redirect, skipped_on_meta
from .specs import FillSpec, InitTrace


class _Refused(Exception):
    """The code wrote to a tensor that is not a stand-in."""


def read_resets(model: nn.Module, trace: InitTrace) -> None:
    """Enter into a trace what calling every module's reset_parameters, children first, would write.

    Those of torch.nn are known; any other is run and recorded.
    """
    modules = [(module, function) for module in children_first(model) if (function := reset_function(module))]
    tied = owned_by_another(model)
    if all(reader(function) for _, function in modules):
        _read(modules, tied, trace, None)
        return
    with stand_ins(model) as recorder:
        _read(modules, tied, trace, recorder)


def _read(
    modules: list[tuple[nn.Module, Callable[..., Any]]],
    tied: dict[int, frozenset[int]],
    trace: InitTrace,
    recorder: "_Recorder | None",
) -> None:
    for module, function in modules:
        trace.ignored = tied.get(id(module), frozenset())
        why = class_name(module)
        known = reader(function)
        if known is None:
            assert recorder is not None
            recorder.run(lambda: function(module), module, f"{why}.{function.__name__}", trace)  # noqa: B023
        elif recorder is None:
            known(module, trace, why)
        else:  # it reads the stand-ins of the module's tensors
            found = InitTrace()
            known(module, found, why)
            recorder.transfer(found, trace)


def owned_by_another(model: nn.Module) -> dict[int, frozenset[int]]:
    """By the id of a module: the ids of its tensors that another module, registered before it, has already.

    A tied weight has the distribution of its first owner; what the other owners would do to it does not count.
    """
    first: dict[int, nn.Module] = {}
    found: dict[int, frozenset[int]] = {}
    for module in model.modules():
        own = [t for tensors in registered(module)[:2] for t in tensors.values() if t is not None]
        others = [id(t) for t in own if first.setdefault(id(t), module) is not module]
        if others:
            found[id(module)] = frozenset(others)
    return found


def read_init_weights(model: nn.Module, trace: InitTrace) -> None:
    """Enter into a trace what `_init_weights(module)`, as transformers and timm have it, would write.

    Each module, children first, goes to the nearest `_init_weights` above it, itself included.
    """
    above = list(owners_of_init_weights(model))
    if not above:
        return
    tied = owned_by_another(model)
    with stand_ins(model) as recorder:
        unmark(model)
        for module, owner in above:
            trace.ignored = tied.get(id(module), frozenset())
            where = f"{class_name(owner)}._init_weights"
            recorder.run(lambda: run_init_weights(owner, module), module, where, trace)  # noqa: B023


def read_public_starts(model: nn.Module, trace: InitTrace) -> bool:
    """Enter into a trace what the public functions that start a model write, children first.

    These are `init_weights()`, `init_states()` and `initialize_weights()`, as timm and torchtitan have them, where they
    need no arguments. Those of transformers come to `_init_weights`, and mmengine's may load files: neither is run.

    Returns:
        Whether there is any. One that does not run to its end is left out, with all that it wrote.
    """
    found = False
    tied = owned_by_another(model)
    for module, name in list(public_starts(model)):
        attempt = trace.copy()
        attempt.ignored = tied.get(id(module), frozenset())
        with stand_ins(model) as recorder:
            if recorder.run(getattr(module, name), module, f"{class_name(module)}.{name}", attempt):
                trace.recorded, trace.unreadable, trace.writes = attempt.recorded, attempt.unreadable, attempt.writes
                found = True
        trace.failed |= attempt.failed
    return found


@contextmanager
def stand_ins(model: nn.Module, replacements: dict[int, Tensor] | None = None) -> Iterator["_Recorder"]:
    """Every parameter and buffer of a model replaced by a stand-in on the meta device, and all put back afterwards.

    Args:
        model: the model.
        replacements: tensors to put there instead of stand-ins, by the id of what they replace. With them, attributes
            that code sets meanwhile are kept; without, everything that lies in the modules' dictionaries is put back.
    """
    put_all_back = replacements is None
    modules = list(model.modules())
    saved = [
        (vars(module).copy(), [(group, group.copy()) for group in _groups(module, put_all_back)]) for module in modules
    ]
    recorder = _Recorder()
    replacements = replacements or {}
    try:
        for module in modules:
            for tensors in registered(module)[:2]:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        replacement = replacements.get(id(tensor))
                        tensors[name] = recorder.stand_in(tensor) if replacement is None else replacement
        yield recorder
    finally:
        for module, (everything, groups) in zip(modules, saved, strict=True):
            if put_all_back:
                vars(module).clear()
                vars(module).update(everything)
            for group, before in groups:
                group.clear()
                group.extend(before) if isinstance(group, list) else group.update(before)


def _groups(module: nn.Module, attributes: bool) -> list[Any]:
    """What a module keeps in containers: its tensors and children, and with `attributes` all else."""
    if not attributes:
        return registered(module)
    return [group for group in vars(module).values() if isinstance(group, dict | list | set)]


def registered(module: nn.Module) -> list[Any]:
    """What a module keeps of its tensors and children, tensors first."""
    return [module._parameters, module._buffers, module._modules, module._non_persistent_buffers_set]


def kept_generators() -> AbstractContextManager[None]:
    """Torch's default generators are afterwards where they were before."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.random.fork_rng(devices)


class _Recorder(Redirect):
    """Records what is written to the stand-ins.

    Attributes:
        real: by the id of a stand-in, the tensor that it stands for.
        standing: by the id of that tensor, its stand-in.
        by_storage: by the storage of a stand-in, the stand-in.
        real_storages: storages of the tensors that stand-ins stand for.
        temporaries: by the storage of any other tensor, it and the distribution that it was filled with.
    """

    def __init__(self) -> None:
        super().__init__(_RecordingSink(self))
        self.real: dict[int, Tensor] = {}
        self.standing: dict[int, Tensor] = {}
        self.by_storage: dict[int, Tensor] = {}
        self.real_storages: set[int] = set()
        self.temporaries: dict[int, tuple[Tensor, Distribution]] = {}
        self.trace = InitTrace()
        self.where = ""

    def stand_in(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.standing:
            if tensor.layout != torch.strided or nn.parameter.is_lazy(tensor):
                return tensor
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            stand_in = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            # Labels that the code may go by; transformers' own would make it skip what it takes for loaded.
            labels = {name: value for name, value in vars(tensor).items() if name != "_is_hf_initialized"}
            vars(stand_in).update(labels)
            self.standing[id(tensor)] = stand_in
            self.real[id(stand_in)] = tensor
            self.by_storage[_storage(stand_in)] = stand_in
            self.real_storages.add(_storage(tensor))
        return self.standing[id(tensor)]

    def transfer(self, found: InitTrace, trace: InitTrace) -> None:
        """Enter what was found for stand-ins into a trace, for the tensors they stand for."""
        for key, spec in found.recorded.items():
            for dim_slice, distribution in spec.fills if key in self.real else ():
                trace.write(self.real[key], distribution, spec.why, dim_slice, spec.fan)
            if key in self.real:
                trace.count(self.real[key], found.writes[key] - len(spec.fills))

    def run(self, code: Callable[[], Any], module: nn.Module, where: str, trace: InitTrace) -> bool:
        """Run code of a module, which may reach everything below it; its writes go into the trace.

        Returns:
            Whether it ran to its end.
        """
        done = False
        self.trace, self.where = trace, where
        places = [
            (tensors, name, tensor, _storage(tensor))
            for owner in module.modules()
            for tensors in registered(owner)[:2]
            for name, tensor in tensors.items()
            if tensor is not None and id(tensor) in self.real
        ]
        try:
            with warnings.catch_warnings(), kept_generators(), torch.no_grad(), torch.device("meta"), self:
                warnings.simplefilter("ignore")
                code()
            done = True
        except _Refused as error:
            self._give_up((place[2] for place in places), f"{where} cannot be read: {error}")
        except Exception as error:
            self._give_up(
                (place[2] for place in places),
                f"{where} cannot be read: {type(error).__name__}: {error}".splitlines()[0],
            )
        for tensors, name, tensor, storage in places:
            if tensors.get(name) is not tensor or _storage(tensor) != storage:
                self._give_up([tensor], f"{where} replaces it instead of filling it")
                tensors[name] = tensor
        self.temporaries.clear()
        if not done:
            trace.failed.add((id(module), where))
        return done

    def _give_up(self, stand_ins: Iterable[Tensor], why: str) -> None:
        for stand_in in stand_ins:
            self.trace.give_up(self.real[id(stand_in)], why)

    def sampled(self, tensor: Tensor, distribution: Distribution, fan: float | None = None) -> Tensor:
        """A sampling call, or a constant."""
        storage = _storage(tensor)
        stand_in = self.by_storage.get(storage)
        if stand_in is None:
            if not tensor.is_meta:
                raise _Refused(f"it draws into a tensor on {tensor.device} that is no part of the model")
            whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
            self.temporaries.pop(storage, None)
            if whole:
                self.temporaries[storage] = tensor, distribution
            return tensor
        dim_slice = slice_of(Layout.of(tensor), Layout.of(stand_in))
        if dim_slice is False:
            self._give_up([stand_in], f"{self.where} fills a part of it that is no slice of one dimension")
        else:
            fan = None if isinstance(distribution, Constant) else fan
            self.trace.write(self.real[id(stand_in)], distribution, self.where, dim_slice, fan)
        return tensor

    def no_distribution(self, tensor: Tensor, how: str) -> None:
        """A tensor is written in a way that no distribution describes."""
        self.temporaries.pop(_storage(tensor), None)
        if (stand_in := self.by_storage.get(_storage(tensor))) is not None:
            self._give_up([stand_in], f"{self.where} writes it by {how}, which is no distribution")

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name not in _HARMLESS:
            for tensor in tensors:
                if not tensor.is_meta and _storage(tensor) in self.real_storages:
                    raise _Refused("it uses a parameter or buffer that it keeps elsewhere as well")
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if (
            name == "dim"
            and target is not None
            and target.is_meta
            and (skipped := skipped_on_meta(sys._getframe(1))[0])
        ):
            self.no_distribution(target, skipped)
        if target is not None:
            distribution = self._distribution_after(name, target, args[1:], kwargs)
            if distribution is not None:
                return self.sampled(target, distribution, self._fan(target))
            if name == "__setitem__" and _is_basic(args[1]) and isinstance(args[2], int | float):
                return self.sampled(target[args[1]], Constant(args[2]))
            if name in _IN_PLACE or (name.endswith("_") and not name.startswith("_") and name not in _KEEPING):
                if not target.is_meta:
                    raise _Refused(
                        f"it writes to a tensor on {target.device} that is no parameter or buffer, by {name}"
                    )
                self.no_distribution(target, name)  # also where that shows in no version counter, as with apply_
        before = [x._version for x in tensors]
        result = func(*args, **kwargs)
        for tensor, version in zip(tensors, before, strict=True):
            if tensor._version != version:
                self.no_distribution(tensor, name)
        return result

    def _distribution_after(
        self, name: str, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Distribution | None:
        """The distribution of a tensor after an in-place call, where the call is one of the few that have any."""
        operand = args[0] if args else kwargs.get("value", kwargs.get("src", kwargs.get("other")))
        if name == "zero_":
            return Constant(0.0)
        if name == "fill_" and isinstance(operand, int | float | complex):
            return Constant(operand)
        if name == "copy_" and isinstance(operand, Tensor):
            # Copied once: two copies of one draw would be equal, and two draws are not.
            source, distribution = self.temporaries.pop(_storage(operand), (None, None))
            return distribution if source is not None and source.shape == operand.shape == target.shape else None
        number = operand if isinstance(operand, int | float) and not kwargs and len(args) == 1 else None
        distribution = self._distribution(target)
        if distribution is None:
            return None
        if name == "erfinv_":
            return inverse_error(distribution)
        if name == "clamp_":
            bounds = dict(zip(("min", "max"), args, strict=False)) | kwargs
            low, high = bounds.get("min"), bounds.get("max")
            numbers = isinstance(low, int | float | None) and isinstance(high, int | float | None)
            return (
                clamped(distribution, -math.inf if low is None else low, math.inf if high is None else high)
                if numbers
                else None
            )
        if number is None:
            return None
        if name in ("mul_", "__imul__"):
            return affine(distribution, float(number), 0.0)
        if name in ("div_", "__itruediv__") and number != 0:
            return affine(distribution, 1.0 / number, 0.0)
        if name in ("add_", "__iadd__"):
            return affine(distribution, 1.0, float(number))
        if name in ("sub_", "__isub__"):
            return affine(distribution, 1.0, -float(number))
        return None

    def _distribution(self, tensor: Tensor) -> Distribution | None:
        """The one distribution that all of a tensor has been filled with, if there is one."""
        found = self._whole_spec(tensor)
        if found is not None:
            return found.distribution
        source, distribution = self.temporaries.get(_storage(tensor), (None, None))
        return distribution if source is not None and source.shape == tensor.shape else None

    def _fan(self, tensor: Tensor) -> float | None:
        found = self._whole_spec(tensor)
        return found.fan if found is not None else None

    def _whole_spec(self, tensor: Tensor) -> FillSpec | None:
        stand_in = self.by_storage.get(_storage(tensor))
        if stand_in is None or stand_in.shape != tensor.shape:
            return None
        found = self.trace.recorded.get(id(self.real[id(stand_in)]))
        return found if found is not None and len(found.fills) == 1 and found.fills[0][0] is None else None


def _writes_of_trunc_normal() -> int:
    probe = torch.empty(2, device="meta")
    nn.init.trunc_normal_(probe)
    return probe._version


_TRUNC_NORMAL_WRITES = _writes_of_trunc_normal()  # newer torch leaves tensors on the meta device alone: 0


class _RecordingSink:
    """The sink of a recorder: the functions of torch.nn.init, which record the distribution of what they would draw."""

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def uniform_(self, tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Any = None) -> Tensor:
        return self.recorder.sampled(tensor, Uniform(a, b))

    def normal_(self, tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Tensor:
        return self.recorder.sampled(tensor, Normal(mean, std))

    def constant_(self, tensor: Tensor, val: float) -> Tensor:
        return self.recorder.sampled(tensor, Constant(val))

    def kaiming_uniform_(
        self,
        tensor: Tensor,
        a: float = 0,
        mode: Any = "fan_in",
        nonlinearity: Any = "leaky_relu",
        generator: Any = None,
    ) -> Tensor:
        if 0 in tensor.shape:
            return self.recorder.sampled(tensor, Constant(0.0))
        bound = 3.0**0.5 * kaiming_std(tensor, a, mode, nonlinearity)
        return self.recorder.sampled(tensor, Uniform(-bound, bound), fan_by_mode(tensor, mode))

    def trunc_normal_(
        self,
        tensor: Tensor,
        mean: float = 0.0,
        std: float = 1.0,
        a: float = -2.0,
        b: float = 2.0,
        generator: Any = None,
    ) -> Tensor:
        stand_in = self.recorder.by_storage.get(_storage(tensor))
        if stand_in is not None:
            self.recorder.trace.count(self.recorder.real[id(stand_in)], _TRUNC_NORMAL_WRITES - 1)
        return self.recorder.sampled(tensor, TruncatedNormal(mean, std, a, b))

    def orthogonal_(self, tensor: Tensor, gain: float = 1, generator: Any = None) -> Tensor:
        self.recorder.no_distribution(tensor, "orthogonal_")
        return tensor

    def sparse_(self, tensor: Tensor, sparsity: float, std: float = 0.01, generator: Any = None) -> Tensor:
        self.recorder.no_distribution(tensor, "sparse_")
        return tensor

    def eye_(self, tensor: Tensor) -> Tensor:
        self.recorder.no_distribution(tensor, "eye_")
        return tensor

    def dirac_(self, tensor: Tensor, groups: int = 1) -> Tensor:
        self.recorder.no_distribution(tensor, "dirac_")
        return tensor


_IN_PLACE = ("__setitem__", "__set__", "__imul__", "__itruediv__", "__iadd__", "__isub__")

_KEEPING = ("detach_", "requires_grad_", "share_memory_")  # in place, but not the values

# What only looks at a tensor: at its shape, its device, a property.
_HARMLESS = frozenset(
    {
        *("__get__", "__hash__", "__len__", "__repr__", "data_ptr", "untyped_storage"),
        *("dim", "element_size", "ndimension", "nelement", "numel", "size", "storage_offset", "stride"),
        *("is_complex", "is_contiguous", "is_floating_point"),
    }
)


def _is_basic(index: Any) -> bool:
    """Whether an index makes a view."""
    return all((isinstance(i, int | slice) and not isinstance(i, bool)) or i is ... for i in _as_tuple(index))


def _as_tuple(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, or a wrapper around other tensors
        return -id(tensor)
