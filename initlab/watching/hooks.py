"""watch(): which module of a model produced the first non-finite value, told apart from those that passed one on.

Hooks look at every tensor once, when it first comes by: as a module's output, as an input that no module put out, as a
parameter or buffer of a module about to run. A look is a cheap read that leaves a flag word; on a device it is one
launch, and the words stay there until they are asked for. Which module is to blame is worked out afterwards, on the
host, from the words and from who got what from whom.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from initlab.kernels import NEGATIVE_INF, FlagBuffer, add_flag_, all_finite_fast, describe, eagerly, nonfinite_flag

from ..distributed.collectives import all_gather_object, listed
from ..distributed.dtensors import is_dtensor
from ..distributed.dtensors import local as local_part
from ..distributed.groups import groups_of
from ..models.naming import class_name, walk
from ..models.patterns import compile_pattern

Selector: TypeAlias = str | type[nn.Module] | nn.Module

_PLAIN = (Tensor, nn.Parameter)
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_AT_ONCE = ("cpu",)  # devices whose words the host reads as they are found
_OTHERS = 3  # kinds of faults of other ranks that a printed report tells


# ---------------------------------------------------------------------------------------------------------------
# What a report says


@dataclasses.dataclass(frozen=True)
class Fault:
    """The first non-finite value of a watch, and where it comes from.

    Args:
        step: the call of the model in which it appeared, from 1; the backward pass after a call belongs to it.
        phase: "forward" or "backward".
        cause: "produced": by a module whose inputs, parameters and buffers were finite. "parameter": by a parameter or
            buffer of the module. "given": from outside, by an input of the model, or by a gradient that reached it.
        module: the name of the module to blame, "" for the model itself; None where the cause is "given".
        kind: its class; "" without a module.
        call: which of its calls in this step, from 1; 0 without a module.
        tensor: what was non-finite: "output", "output[1]", "weight", "input 0", "gradient of input 0", ...
        flag: NaN = 1, +inf = 2, -inf = 4, or-ed.
        dtype: of that tensor.
        notes: what else is known about it.
        passed_on: modules whose outputs, or in the backward pass gradients, were non-finite later in this step and
            followed from what they got.
        from_all_gather: whether it is held by a parameter that was gathered from several ranks, and this rank's own shard of
            it is finite: another rank holds it.
        after: how many tensors, parameters and buffers aside, had been looked at in this step and phase before it
            showed. Ranks that run the same modules count alike.
        rank: the global rank that saw it; None in a report of one rank alone.
    """

    step: int
    phase: str
    cause: str
    module: str | None
    kind: str
    call: int
    tensor: str
    flag: int
    dtype: torch.dtype
    notes: tuple[str, ...] = ()
    passed_on: tuple[str, ...] = ()
    from_all_gather: bool = False
    after: int = 0
    rank: int | None = None

    def __str__(self) -> str:
        where = "" if self.rank is None else f"rank {self.rank}, "
        lines = [f"{where}{self.headline}", *self.notes]
        if self.passed_on:
            names = [name or "the model itself" for name in self.passed_on[:5]]
            more = len(self.passed_on) - len(names)
            lines.append(f"passed on by {', '.join(names)}{f' and {more} more' if more else ''}")
        return "\n  ".join(lines)

    @property
    def headline(self) -> str:
        """When, who and what, in one line; without the rank."""
        what = f"{describe(self.flag)} ({str(self.dtype).removeprefix('torch.')})"
        if self.module is None:
            text = f"{self.tensor} was given with {what}; no module produced it"
        else:
            name = f"module {self.module!r}" if self.module else "the model itself"
            who = f"{name} ({self.kind}{f', call {self.call}' if self.call > 1 else ''})"
            text = (
                f"{who} {self.cause} {what} in {'the' if self.tensor.startswith('gradient') else 'its'} {self.tensor}"
            )
        return f"step {self.step}, {self.phase}: {text}"


@dataclasses.dataclass(frozen=True)
class WatchReport:
    """What a watch has seen so far, on this rank or across ranks.

    Args:
        fault: the first fault; None if there was none.
        steps: calls of the model that were looked at; across ranks the most of any rank.
        calls: calls of its modules that were looked at; across ranks of all together.
        others: across ranks, the first fault of each other rank that has one, in the order in which they may follow
            from each other.
        ranks: the global ranks that took part; empty in a report of one rank alone.
    """

    fault: Fault | None
    steps: int
    calls: int
    others: tuple[Fault, ...] = ()
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        seen = f"{self.steps} steps, {self.calls} module calls"
        if self.ranks:
            seen = f"{seen}, {len(self.ranks)} ranks"
        if self.fault is None:
            return f"nothing non-finite in {seen}"
        lines = [str(self.fault)]
        alike: dict[str, list[int]] = {}
        for fault in self.others:
            assert fault.rank is not None
            alike.setdefault(fault.headline, []).append(fault.rank)
        for headline, ranks in list(alike.items())[:_OTHERS]:
            lines.append(f"also rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}, {headline}")
        if more := [rank for ranks in list(alike.values())[_OTHERS:] for rank in ranks]:
            lines.append(f"and {len(more)} more: rank{'s' if len(more) > 1 else ''} {listed(more)}")
        return "\n  ".join([*lines, f"({seen})"])


def _first_of(reports: Mapping[int, WatchReport]) -> WatchReport:
    """One report of those of several ranks; see `Watch.report` for what comes first."""
    faults = [dataclasses.replace(one.fault, rank=rank) for rank, one in reports.items() if one.fault is not None]
    faults.sort(key=_order)
    return WatchReport(
        faults[0] if faults else None,
        max(one.steps for one in reports.values()),
        sum(one.calls for one in reports.values()),
        tuple(faults[1:]),
        tuple(sorted(reports)),
    )


def _order(fault: Fault) -> tuple[Any, ...]:
    follows = fault.cause == "given" or fault.from_all_gather
    return fault.step, fault.phase == "backward", follows, fault.after, fault.cause != "parameter", fault.rank


# ---------------------------------------------------------------------------------------------------------------
# What is remembered of a step


class _Place(NamedTuple):
    """A module of the model, without the module."""

    name: str
    kind: str
    allowed: bool
    flags_itself: bool


class _Call:
    """One call of a module."""

    __slots__ = ("flagged", "held", "inputs", "outputs", "parent", "place", "used_children")

    def __init__(self, place: _Place, parent: _Call | None) -> None:
        self.place = place
        self.parent = parent
        self.used_children = False
        self.inputs: list[_Look] = []
        self.held: list[_Look] = []  # its parameters and buffers
        self.outputs: list[_Look] = []  # kept where gradients are watched
        self.flagged: tuple[_Look, Tensor] | None = None  # where the module itself writes its flag word


class _Look:
    """One look at one tensor, and the flag word that it found, once that is known on the host."""

    __slots__ = ("call", "dtype", "name", "path", "role", "shard", "users", "word")

    def __init__(self, call: _Call, role: str, name: int | str, path: str, dtype: torch.dtype) -> None:
        self.call = call  # whose output, input or parameter it was when it first came by
        self.role = role  # data, input, parameter, shard, buffer, output, gradient
        self.name = name
        self.path = path
        self.dtype = dtype
        self.word = 0
        self.shard: _Look | None = None  # at what this rank itself holds of a parameter that was gathered
        self.users: list[_Call] = []  # calls that took or held it; kept where gradients are watched

    @property
    def label(self) -> str:
        return f"{'input ' if self.role in ('data', 'input') else ''}{self.name}{self.path}"

    @property
    def origin(self) -> str:
        name = self.call.place.name
        return f"{self.label} of {f'module {name!r}' if name else 'the model'}"

    def calls_for_blame(self) -> bool:
        """Whether its word, not 0, may be a fault by itself."""
        if self.role == "output":
            return self.word != NEGATIVE_INF or not self.call.place.allowed
        return self.role == "gradient"


class _Step:
    """A call of the model and the backward pass that follows."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.calls: list[_Call] = []
        self.looks: list[_Look] = []  # in the order of execution
        self.gradients: list[tuple[_Look, _Look]] = []  # (look at a gradient, the tensor's own look), likewise
        self.buffers: dict[torch.device, tuple[FlagBuffer, list[_Look]]] = {}
        self.suspect = False  # whether the host knows of a word that may be a fault

    def new_flag(self, device: torch.device, look: _Look) -> Tensor:
        """Where on a device a look leaves its word."""
        held = self.buffers.get(device)
        if held is None:
            held = self.buffers[device] = FlagBuffer(device), []
        held[1].append(look)
        return held[0].new_flag()

    def note(self, look: _Look, word: int) -> None:
        """Tell a look its word."""
        if word:
            look.word = word
            self.suspect |= look.calls_for_blame()

    def send(self) -> None:
        for buffer, _ in self.buffers.values():
            buffer.send()

    def landed(self) -> bool:
        return all(buffer.landed() for buffer, _ in self.buffers.values())

    def fault(self) -> Fault | None:
        """The first fault, by the words that were sent; waits for them."""
        for buffer, looks in self.buffers.values():
            for look, word in zip(looks, buffer.words(), strict=False):  # looks may have joined since
                self.note(look, word)
        return _first_fault(self) if self.suspect else None


# ---------------------------------------------------------------------------------------------------------------
# Who is to blame


class _Verdict(NamedTuple):
    cause: str
    call: _Call | None
    tensor: str
    look: _Look
    notes: tuple[str, ...] = ()


def _first_fault(step: _Step) -> Fault | None:
    for place, look in enumerate(step.looks):
        if look.role == "output" and look.word and (verdict := _blame(step, look.call, look, look.label)) is not None:
            outputs = (x for x in step.looks[place:] if x.role == "output" and x.word)
            before = sum(x.role in ("data", "input", "output") for x in step.looks[:place])
            return _fault(step, "forward", before, verdict, [x.call for x in outputs if _had_one(step, x)])
    for place, (gradient, of) in enumerate(step.gradients):
        if gradient.word:
            reached = [x.call for g, x in step.gradients[place:] if g.word and x.role == "output"]
            return _fault(step, "backward", place, _blame_for_gradient(gradient, of), reached)
    return None


def _fault(step: _Step, phase: str, after: int, verdict: _Verdict, others: list[_Call]) -> Fault:
    call, look = verdict.call, verdict.look
    elsewhere = verdict.cause == "parameter" and look.shard is not None and not look.shard.word
    if call is None:
        place, number = None, 0
    else:
        place = call.place
        calls = [c for c in step.calls if c.place is place]
        number = calls.index(call) + 1 if call in calls else 1  # a gradient may go back to a call of an earlier step
    return Fault(
        step=step.number,
        phase=phase,
        cause=verdict.cause,
        module=place and place.name,
        kind=place.kind if place else "",
        call=number,
        tensor=verdict.tensor,
        flag=look.word,
        dtype=look.dtype,
        notes=(*verdict.notes, "this rank's own shard of it is finite") if elsewhere else verdict.notes,
        passed_on=tuple(dict.fromkeys(c.place.name for c in others if c.place is not place)),
        from_all_gather=elsewhere,
        after=after,
    )


def _sources(step: _Step, call: _Call, made: _Look) -> Iterator[_Look]:
    """What a call had to work with when it made a tensor: its inputs, and the outputs of the calls inside it."""
    yield from call.inputs
    for look in step.looks:
        if look is made:
            return
        if look.role == "output" and look.call.parent is call:
            yield look


def _had_one(step: _Step, made: _Look) -> bool:
    return any(source.word for source in _sources(step, made.call, made))


def _explains(source: _Look, word: int) -> bool:
    """Whether a tensor's word makes another's a consequence. -inf alone, as masks hold it, explains only itself."""
    return source.role == "data" or source.word != NEGATIVE_INF or word == NEGATIVE_INF


def _blame(step: _Step, call: _Call, made: _Look, what: str) -> _Verdict | None:
    """Who is to blame for a non-finite tensor that a call made; None if it is there on purpose."""
    if call.place.allowed and made.word == NEGATIVE_INF:
        return None
    notes = []
    for source in _sources(step, call, made):
        if source.word:
            if _explains(source, made.word):
                return _trace(step, source)
            notes.append(f"it had {describe(source.word)} to work with: {source.origin}")
    for held in call.held:
        if held.word:
            if _explains(held, made.word):
                return _holder(held)
            notes.append(f"its {held.role} {held.label} holds {describe(held.word)}")
    return _Verdict("produced", call, what, made, tuple(notes))


def _trace(step: _Step, source: _Look) -> _Verdict | None:
    """Where a non-finite tensor that a call had to work with comes from."""
    if source.role == "output":
        return None  # it was excused, or it would have been found before
    if source.role in ("parameter", "buffer"):
        return _holder(source)
    maker = source.call.parent
    if maker is not None:
        return _blame(step, maker, source, f"own code, before that called {source.call.place.name!r}")
    if source.role == "input" and source.word == NEGATIVE_INF:
        return None  # a mask
    return _Verdict("given", None, source.origin, source)


def _holder(held: _Look) -> _Verdict | None:
    if held.role == "buffer" and held.word == NEGATIVE_INF:
        return None  # a mask
    return _Verdict("parameter", held.call, held.label, held)


def _blame_for_gradient(gradient: _Look, of: _Look) -> _Verdict:
    """Who is to blame for the first non-finite gradient: whoever used the tensor, since what came back was finite."""
    outer = {id(user.parent) for user in of.users}
    users = [user for user in of.users if id(user) not in outer]
    if users:
        call = users[-1]  # of several the last, which is the first in the backward pass
        others = dict.fromkeys(repr(user.place.name) for user in users if user.place is not call.place)
        notes = (f"{', '.join(others)} used the tensor too, and may have produced it as well",) if others else ()
        mine = of.role in ("parameter", "buffer")
        what = of.label if mine else f"input, which was {of.origin}" if of.call is not call else of.label
        return _Verdict("produced", call, f"gradient of its {what}", gradient, notes)
    maker = of.call.parent
    while maker is not None and of in maker.outputs:
        maker = maker.parent
    if maker is None:
        return _Verdict("given", None, f"gradient of {of.origin}", gradient)
    return _Verdict("produced", maker, f"own code, in the gradient of {of.origin}", gradient)


# ---------------------------------------------------------------------------------------------------------------
# Hooks


class _Watcher:
    """What the hooks feed. It holds no module, and tensors by weak references only."""

    def __init__(self, backward: bool, every: int | None, shards: Mapping[str, weakref.ref[Tensor]]) -> None:
        self.backward = backward
        self.every = every
        self.shards = shards  # by name: what this rank itself holds of parameters that are spread over several
        self.looking = True
        self.fault: Fault | None = None
        self.calls = 0
        self.step = _Step(0)
        self.sent: deque[_Step] = deque()  # steps whose words are on their way to the host
        self.known: dict[int, tuple[weakref.ref[Tensor], int, _Look]] = {}  # by id: tensors that this step has seen
        self.hooks: list[RemovableHandle] = []
        self.tensor_hooks: list[tuple[bool, RemovableHandle]] = []  # (whether on a leaf, hook)
        self.running = 0  # outermost calls; more than one where threads overlap
        self.lock = threading.RLock()
        self.local = threading.local()

    def attach(self, module: nn.Module, place: _Place) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            eagerly(self.before, place, module, args, kwargs)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            eagerly(self.after, place, module, output)

        self.hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self.hooks.append(module.register_forward_hook(after, always_call=True))  # an exception must not leave it open

    def close(self) -> None:
        """Remove every hook; what was seen stays to be reported."""
        self.looking = False
        for hook in (*self.hooks, *(hook for _, hook in self.tensor_hooks)):
            hook.remove()
        self.hooks.clear()
        self.tensor_hooks.clear()
        self.known.clear()

    # One call of a module

    def stack(self) -> list[_Call]:
        try:
            stack: list[_Call] = self.local.stack
        except AttributeError:
            stack = self.local.stack = []
        return stack

    def before(self, place: _Place, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.looking:
            return
        stack = self.stack()
        if stack and place is stack[0].place and _depth() <= self.local.depth:
            stack.clear()  # it was left by a KeyboardInterrupt, say, which no hook hears of
            with self.lock:
                self.running -= 1
        if stack:
            call = _Call(place, stack[-1])
            stack[-1].used_children = True
        elif self.enter():
            call = _Call(place, None)
            self.local.depth = _depth()
        else:
            return
        stack.append(call)
        self.step.calls.append(call)
        self.calls += 1
        role = "input" if call.parent else "data"  # the first tensor of an outermost call; others may be masks
        given: Iterable[tuple[int | str, Any]] = (*enumerate(args), *kwargs.items()) if kwargs else enumerate(args)
        for name, value in given:
            for tensor, path in ((value, ""),) if isinstance(value, Tensor) else _tensors(value):
                self.take(call.inputs, tensor, call, role, name, path)
                role = "input"
        for name, parameter in module._parameters.items():
            # Where words are read at once there is time enough when an output turns out to be bad. Not for what was
            # gathered for this call: FSDP lets go of it as soon as the module is through.
            if parameter is not None and (
                self.backward
                or parameter.device.type not in _AT_ONCE
                or (self.shards and self.shard_of(place, name, parameter) is not None)
            ):
                self.take(call.held, parameter, call, "parameter", name, "")
        for name, buffer in module._buffers.items():  # running statistics change in the call, so they cannot wait
            if buffer is not None:
                self.take(call.held, buffer, call, "buffer", name, "")
        if place.flags_itself:
            look, device = _Look(call, "output", "output", "", torch.float32), _device_of(module, args, kwargs)
            flag = torch.zeros(1, dtype=torch.int32) if device.type in _AT_ONCE else self.step.new_flag(device, look)
            call.flagged = look, flag
            module.write_flag_to(flag)  # type: ignore[operator]

    def after(self, place: _Place, module: nn.Module, output: Any) -> None:
        stack = self.stack()
        if not any(call.place is place for call in stack):
            return  # it began before the watch did, or is not looked at
        call = stack.pop()
        while call.place is not place:  # likewise, but the model itself has caught it
            call = stack.pop()
        if call.flagged is not None:
            module.write_flag_to(None)  # type: ignore[operator]
        if self.looking:
            self.judge(call, module, output)
        if not stack:
            self.leave(output)

    def judge(self, call: _Call, module: nn.Module, output: Any) -> None:
        """Look at what a call put out, and then at what it held, if that was not done before it began."""
        if call.flagged is not None:
            look, flag = call.flagged
            self.step.looks.append(look)
            if flag.device.type in _AT_ONCE:
                self.step.note(look, int(flag))
        for tensor, path in ((output, ""),) if isinstance(output, Tensor) else _tensors(output):
            if call.flagged is None:
                self.take(call.outputs, tensor, call, "output", "output", path)
            elif tensor.is_floating_point():
                self.remember(tensor, call.flagged[0])
                call.outputs.append(call.flagged[0])
        for name, parameter in module._parameters.items():
            if parameter is not None and self.step.suspect and not self.backward:
                self.take(call.held, parameter, call, "parameter", name, "")
        if module._modules and not call.used_children:  # it used their weights itself, as MultiheadAttention does
            for child_name, child in module.named_children():
                for name, parameter in child.named_parameters():
                    if self.step.suspect or self.backward or parameter.device.type not in _AT_ONCE:
                        self.take(call.held, parameter, call, "parameter", f"{child_name}.{name}", "")

    # One look at a tensor

    def take(self, into: list[_Look], tensor: Tensor, call: _Call, role: str, name: int | str, path: str) -> None:
        """Look at a tensor, unless that has been done since it last changed, and note it with the call."""
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return
        known = self.known.get(id(tensor))
        # An inference tensor counts no versions: it is looked at each time.
        if known is not None and known[0]() is tensor and not tensor.is_inference() and known[1] == tensor._version:
            look = known[2]
        else:
            local = tensor if type(tensor) in _PLAIN else _local(tensor)
            if local is None or torch._C._are_functorch_transforms_active():
                return
            look = _Look(call, role, name, path, tensor.dtype)
            self.step.looks.append(look)
            self.find(look, local)
            if self.shards and role == "parameter":
                self.find_in_shard(look, tensor)
            self.remember(tensor, look)
        if role != "output" or self.backward:
            into.append(look)
        if self.backward and role != "output":
            look.users.append(call)

    def remember(self, tensor: Tensor, look: _Look) -> None:
        look.dtype = tensor.dtype
        version = -1 if tensor.is_inference() else tensor._version
        self.known[id(tensor)] = weakref.ref(tensor), version, look
        if self.backward and tensor.requires_grad and torch.is_grad_enabled():
            hook = tensor.register_hook(functools.partial(self.gradient, look))
            self.tensor_hooks.append((tensor.is_leaf, hook))

    def find(self, look: _Look, tensor: Tensor) -> None:
        """Find a tensor's flag word, or have the device find it."""
        device = tensor.device
        try:
            with _unseen():
                if device.type in _AT_ONCE:
                    if not all_finite_fast(tensor):
                        self.step.note(look, int(nonfinite_flag(tensor)))
                elif device.type != "meta":
                    add_flag_(self.step.new_flag(device, look), tensor)
        except (NotImplementedError, RuntimeError, TypeError):
            if type(tensor) in _PLAIN:
                raise
            # Of a subclass that cannot say what is finite, a quantised weight for instance, nothing is known.

    def shard_of(self, place: _Place, name: str, parameter: Tensor) -> Tensor | None:
        """The DTensor from which a parameter was gathered; None where it was not."""
        shard = self.shards.get(f"{place.name}.{name}", _nothing)()
        return None if shard is parameter else shard

    def find_in_shard(self, look: _Look, parameter: Tensor) -> None:
        """Look at what this rank holds of a gathered parameter too: all ranks see the same once it is gathered."""
        shard = self.shard_of(look.call.place, str(look.name), parameter)
        # What was offloaded to the host would cost it a read in each step.
        if shard is not None and shard.device == parameter.device:
            look.shard = _Look(look.call, "shard", look.name, look.path, shard.dtype)
            mine = local_part(shard)
            if torch.finfo(parameter.dtype).max < torch.finfo(torch.bfloat16).max:  # the cast may have made the inf
                with _unseen():
                    mine = mine.to(parameter.dtype)
            self.find(look.shard, mine)

    def gradient(self, of: _Look, gradient: Tensor) -> None:
        if self.looking:
            look = _Look(of.call, "gradient", of.name, of.path, gradient.dtype)
            self.step.gradients.append((look, of))
            local = gradient if type(gradient) in _PLAIN else _local(gradient)
            if local is not None:
                self.find(look, local)

    # One step

    def enter(self) -> bool:
        """Begin an outermost call; False if it is not to be looked at."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a watched model cannot be captured in a CUDA graph, whose replays run no hooks; watch steps before "
                "the capture, and remove the watch for it"
            )
        with self.lock:
            if self.running == 0:
                if torch._C._current_graph_task_id() == -1:
                    self.end_step()
                    if not self.looking:
                        return False
                    self.next_step()
                elif not self.backward:  # activation checkpointing repeats what has been looked at
                    return False
            self.running += 1
        return True

    def leave(self, output: Any) -> None:
        """End an outermost call."""
        with self.lock:
            self.running -= 1
            if self.running == 0 and self.looking and not self.step.buffers and not self.sent:
                self.fault = self.fault or self.step.fault()
                if output is not None:  # after an exception nothing that is raised here would be heard
                    self.stop_if_due()

    def next_step(self) -> None:
        self.step = _Step(self.step.number + 1)
        self.known.clear()
        kept: list[tuple[bool, RemovableHandle]] = []
        for on_leaf, hook in self.tensor_hooks:
            if on_leaf:  # parameters, which get a new one each step
                hook.remove()
            elif hook.hooks_dict_ref() is not None:  # its backward pass may be still to come
                kept.append((on_leaf, hook))
        self.tensor_hooks = kept

    def end_step(self) -> None:
        """Send the words of the step that is over, and read those that have landed."""
        if self.fault is None and self.step.number:
            self.step.send()
            self.sent.append(self.step)
            self.read()
        self.stop_if_due()

    def read(self, wait: bool = False) -> None:
        """Read the words of steps that are over, up to the first fault."""
        while self.fault is None and self.sent and (wait or self.sent[0].landed()):
            self.fault = self.sent.popleft().fault()

    def read_all(self) -> Fault | None:
        """The first fault so far; waits for the device."""
        with self.lock:
            self.read(wait=True)
            if self.fault is None:
                self.step.send()
                self.fault = self.step.fault()
            if self.fault is not None and self.every is None:
                self.looking = False
            return self.fault

    def stop_if_due(self) -> None:
        if self.fault is None or not self.looking or (self.every and self.step.number % self.every):
            return
        self.looking = False  # what comes later follows from it
        self.sent.clear()
        if self.every:
            raise FloatingPointError(f"{self.fault}\n  raised by initlab.watch(every={self.every})")


def _tensors(value: Any, path: str = "") -> Iterator[tuple[Tensor, str]]:
    """The tensors in a structure of tuples, lists, mappings and dataclasses, and where in it they are."""
    if isinstance(value, Tensor):
        yield value, path
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _tensors(item, f"{path}[{place}]")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{path}[{key!r}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name, None), f"{path}.{field.name}")


def _depth() -> int:
    """How many calls deep this thread is: a model that calls itself is deeper inside the second time."""
    frame: FrameType | None = sys._getframe()
    depth = 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


def _device_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where a call computes: the device of its first input, or else of its first parameter."""
    for tensor, _ in _tensors((args, kwargs)):
        return tensor.device
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _local(tensor: Tensor) -> Tensor | None:
    """What this process holds of a tensor of a subclass: a shard of a DTensor; nothing of fake and lazy tensors."""
    return None if is_lazy(tensor) or hasattr(tensor, "fake_mode") else local_part(tensor)


def _unseen() -> contextlib.AbstractContextManager[Any]:
    """Modes that count or cache what the model does, as selective checkpointing does, must not see what we do."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else _NOTHING


def _nothing() -> None:
    """A reference to a tensor that there is not."""


# ---------------------------------------------------------------------------------------------------------------
# watch()


class Watch:
    """A watch over a model: what `initlab.watch` returns. A context manager, like the handle of a torch hook.

    It watches from the moment it is made until the `with` block ends, `remove` is called, or it is itself collected.
    """

    def __init__(self, watcher: _Watcher) -> None:
        self._watcher = watcher
        self._finalizer = weakref.finalize(self, watcher.close)
        self._finalizer.atexit = False

    def report(self, across: Any = None) -> WatchReport:
        """What has been seen so far; the only call that waits for the device. Also after the hooks are gone.

        Across ranks every rank must make the call, and gets the same report: the first fault of the job, and those of
        the other ranks. One gather of small objects; nothing else of a watch ever communicates. Each rank counts its
        own steps, and ranks need not have seen equally many.

        First comes what others may follow from:

        1. the earliest step, and in it the forward pass before the backward pass;
        2. what a rank's modules produced or held, before what came from elsewhere: an input that was non-finite when
           the model was given it, as the next stage of a pipeline is given what the one before produced; a parameter
           that was gathered, where the rank's own shard of it is finite;
        3. what showed after fewer tensors: tensor-parallel ranks run the same modules, and one has the sum of all in
           its hands later than the rank that made it non-finite;
        4. what a module held before what it produced; the lowest rank.

        So where ranks mix their batches inside the model, as SyncBatchNorm does, a bad batch is among `others`.

        Args:
            across: a ProcessGroup or a DeviceMesh, of which this rank is part, or True for all ranks; None asks no
                one. A mesh of more dimensions that does not span all ranks needs a gather for each dimension.

        Returns:
            A `WatchReport`.

        Raises:
            TypeError: if `across` is something else.
            ValueError: if this rank is no part of it.
            RuntimeError: if torch.distributed is not initialised.

        Example:
            >>> import torch, initlab
            >>> import torch.distributed as dist
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            >>> model = torch.nn.Linear(2, 1)
            >>> with initlab.watch(model) as watching:
            ...     y = model(torch.tensor([[1.0, float("nan")]]))
            >>> print(watching.report(across=True))
            rank 0, step 1, forward: input 0 of the model was given with NaN (float32); no module produced it
              passed on by the model itself
              (1 steps, 1 module calls, 1 ranks)
            >>> dist.destroy_process_group()
        """
        watcher = self._watcher
        groups = groups_of(across)
        mine = WatchReport(watcher.read_all(), watcher.step.number, watcher.calls)
        return _first_of(all_gather_object(mine, groups)) if groups else mine

    def remove(self) -> None:
        """Remove every hook, now; what was seen can still be reported."""
        self._finalizer()

    def __enter__(self) -> Watch:
        if not self._finalizer.alive:
            raise RuntimeError("this watch has been removed from its model; call initlab.watch again for another")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        due = kind is None and self._watcher.looking and self._watcher.every
        self.remove()
        if due and (fault := self._watcher.read_all()) is not None:
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

    Hooks look at what the modules take, hold and put out, each tensor once, in forward passes of any kind: training or
    eval, under autocast, no_grad or inference_mode, with activation checkpointing, inside DDP and FSDP. Outputs and
    inputs may be tensors, or tuples, lists, mappings and dataclasses of them. The first non-finite *output* is traced
    back: to the module that made it from finite inputs; to a container's own code, where it was made between two of its
    modules; to a parameter or buffer that was non-finite before; or to the model's input. Once a fault is known nothing
    more is looked at, since what comes later follows from it.

    Nothing waits for the device. The words stay there, are copied to the host at the end of each step without waiting,
    and are read when they have landed, or by `report`. A *step* is a call of the model, with its backward pass. On a
    CPU words are read at once.

    -inf is no fault where masks have it: in a buffer, or in an argument of the model other than its first tensor. A
    module that puts it out on purpose belongs in `allow`.

    Of a DTensor each rank looks at its own part, and no look communicates. Where FSDP has gathered a parameter, its own
    shard of it tells which rank held the fault. `report(across=True)` brings together what all ranks have seen.

    What torch.compile has compiled calls no hooks that come later, so a compiled model is refused: watch the module
    that was compiled, `model._orig_mod`, and call the model under `torch.compiler.set_stance("force_eager")`. What is
    compiled while it is watched gets a graph break at each module, which `fullgraph=True` turns into an error. Nothing
    is looked at under torch.func's transforms, nor inside TorchScript. The capture of a CUDA graph is refused.

    A module that knows its own flag word, as a fused layer does, may have a method `write_flag_to(flag)`. It is called with
    an int32 tensor of shape (1,) before the module runs, on the device of its first input, to be or-ed with the word
    (NaN = 1, +inf = 2, -inf = 4) of the module's output, and with None after. That output is then not read again.

    Args:
        model: the model. It is always watched itself, as far as its wrappers (DDP, FSDP, ...) hand on to it.
        modules: watch only these modules of it: names or globs ("encoder", "h.*.mlp"; a name includes all within it),
            classes, or modules. What the others do counts as their caller's own code.
        allow: modules, likewise, that may put out -inf. NaN and +inf from them are still faults.
        backward: watch gradients too: of every tensor that modules take and put out, and of parameters.
        every: raise the fault that is known at the end of every so many steps, and at the end of the `with` block.
            A fault of a forward pass on the CPU is raised by that call of the model, any other by a later one, when its
            words have landed. None only reports: so where there are other ranks, which would wait for the one that
            raises. Let all of them call `report(across=True)` every so many steps.

    Returns:
        A `Watch`: a context manager with `report()` and `remove()`. Keep it: its hooks go when it does.

    Raises:
        TypeError: if the model is no module, or a selector is neither a name, nor a class of modules, nor a module.
        ValueError: if a selector selects nothing, `every` is not positive, or the model has compiled parts.
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
        step 1, forward: module '1' (Log) produced NaN (float32) in its output
          passed on by 2
          (1 steps, 4 module calls)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if every is not None and (not isinstance(every, int) or every < 1):
        raise ValueError(f"every is {every!r}; it must be a positive number of steps, or None to report only")
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{repr(name) if name else 'the model'} is compiled, and compiled code calls no hooks that come later; "
                "watch the module that torch.compile was given (model._orig_mod), and call the model under "
                "torch.compiler.set_stance('force_eager')"
            )
    names: dict[nn.Module, str] = {}
    for name, module in walk(model):
        names.setdefault(module, name)
    watched = set(names) if modules is None else _select(names, modules, "modules")
    allowed = _select(names, allow, "allow")
    watcher = _Watcher(backward, every, _shards(names))
    try:
        for module, name in names.items():
            scripted = isinstance(module, torch.jit.ScriptModule)  # it takes no hooks
            if not scripted and (module in watched or not name):
                writes = callable(getattr(module, "write_flag_to", None))
                watcher.attach(module, _Place(name, class_name(module), module in allowed, writes))
    except BaseException:
        watcher.close()
        raise
    return Watch(watcher)


def _shards(names: Mapping[nn.Module, str]) -> dict[str, weakref.ref[Tensor]]:
    return {
        f"{name}.{leaf}": weakref.ref(parameter)
        for module, name in names.items()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and is_dtensor(parameter)
    }


def _select(names: dict[nn.Module, str], selectors: Selector | Iterable[Selector], argument: str) -> set[nn.Module]:
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
