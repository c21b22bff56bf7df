"""Which module is to blame for the first non-finite value. Works on the record of a call whose flags have been read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from initlab.kernels import NEGATIVE_INF, describe

from .record import ModuleCall, Observation, PassRecord
from .report import Fault


class _Blame(NamedTuple):
    """Where a non-finite value comes from.

    Args:
        cause: as in Fault.
        call: of the module to blame; None where no module is.
        tensor: as in Fault.
        observation: the first tensor that had the value.
        notes: as in Fault.
    """

    cause: str
    call: ModuleCall | None
    tensor: str
    observation: Observation
    notes: tuple[str, ...] = ()


def first_fault(record: PassRecord) -> Fault | None:
    """The first fault of a call of the model; None if there is none."""
    if not record.suspect:
        return None
    for place, made in enumerate(record.observations):
        if made.role == "output" and made.flag and (blame := _blame(record, made.call, made, made.label)) is not None:
            outputs = (x for x in record.observations[place:] if x.role == "output" and x.flag)
            before = sum(x.role in ("data", "input", "output") for x in record.observations[:place])
            return _fault(record, "forward", before, blame, [x.call for x in outputs if _read_nonfinite(record, x)])
    for place, (gradient, of) in enumerate(record.gradients):
        if gradient.flag:
            reached = [x.call for g, x in record.gradients[place:] if g.flag and x.role == "output"]
            return _fault(record, "backward", place, _blame_for_gradient(gradient, of), reached)
    return None


def _fault(record: PassRecord, phase: str, after: int, blame: _Blame, later: list[ModuleCall]) -> Fault:
    call, made = blame.call, blame.observation
    from_all_gather = blame.cause == "parameter" and made.shard is not None and not made.shard.flag
    if call is None:
        module, number = None, 0
    else:
        module = call.module
        calls = [c for c in record.calls if c.module is module]
        number = calls.index(call) + 1 if call in calls else 1  # a gradient may go back to an earlier call of the model
    return Fault(
        model_call=record.number,
        step=record.step,
        phase=phase,
        cause=blame.cause,
        module=module and module.name,
        kind=module.kind if module else "",
        call=number,
        tensor=blame.tensor,
        flag=made.flag,
        dtype=made.dtype,
        notes=(*blame.notes, "this rank's own shard of it is finite") if from_all_gather else blame.notes,
        passed_on=tuple(dict.fromkeys(c.module.name for c in later if c.module is not module)),
        from_all_gather=from_all_gather,
        after=after,
    )


def _sources(record: PassRecord, call: ModuleCall, made: Observation) -> Iterator[Observation]:
    """What a call could read when it made a tensor: its inputs, and the outputs of the calls inside it."""
    yield from call.inputs
    for observation in record.observations:
        if observation is made:
            return
        if observation.role == "output" and observation.call.parent is call:
            yield observation


def _read_nonfinite(record: PassRecord, made: Observation) -> bool:
    return any(source.flag for source in _sources(record, made.call, made))


def _explains(source: Observation, flag: int) -> bool:
    """Whether a tensor's flag explains another's. -inf alone, as in masks, explains only -inf; in a weight, any."""
    return source.role in ("data", "parameter") or source.flag != NEGATIVE_INF or flag == NEGATIVE_INF


def _blame(record: PassRecord, call: ModuleCall, made: Observation, tensor: str) -> _Blame | None:
    """Who is to blame for a non-finite tensor that a call made; None if it is there on purpose."""
    if call.module.may_put_out_negative_inf and made.flag == NEGATIVE_INF:
        return None
    notes = [
        f"the output of module {child.module.name!r} ({child.unseen}) cannot be inspected, and may have held it"
        for child in record.calls
        if child.unseen and child.parent is call
    ]
    for source in _sources(record, call, made):
        if source.flag:
            if _explains(source, made.flag):
                return _blame_for_source(record, source)
            notes.append(f"it also read {describe(source.flag)}: {source.full_label}")
    for state in call.state:
        if state.flag:
            if _explains(state, made.flag):
                return _blame_state(state)
            notes.append(f"its {state.role} {state.label} holds {describe(state.flag)}")
    return _Blame("produced", call, tensor, made, tuple(notes))


def _blame_for_source(record: PassRecord, source: Observation) -> _Blame | None:
    """Who is to blame for a non-finite tensor that a call read; None if it is there on purpose."""
    if source.role == "output":
        return None  # it was allowed, or it would have been found before
    if source.role in ("parameter", "buffer"):
        return _blame_state(source)
    maker = source.call.parent
    if maker is not None:
        return _blame(record, maker, source, f"own code, before it called {source.call.module.name!r}")
    if source.role == "input" and source.flag == NEGATIVE_INF:
        return None  # a mask
    return _Blame("input", None, source.full_label, source)


def _blame_state(state: Observation) -> _Blame | None:
    if state.role == "buffer" and state.flag == NEGATIVE_INF:
        return None  # a mask
    return _Blame("parameter", state.call, state.label, state)


def _blame_for_gradient(gradient: Observation, of: Observation) -> _Blame:
    """Who is to blame for the first non-finite gradient: whoever read the tensor, whose own gradient was finite."""
    outer = {id(user.parent) for user in of.users}
    users = [user for user in of.users if id(user) not in outer]
    if users:
        call = users[-1]  # of several the last, which is the first in the backward pass
        others = dict.fromkeys(repr(user.module.name) for user in users if user.module is not call.module)
        notes = (f"{', '.join(others)} also read the tensor and may have produced it too",) if others else ()
        own = of.role in ("parameter", "buffer") or of.call is call
        what = of.label if own else f"input, which was {of.full_label}"
        return _Blame("produced", call, f"gradient of its {what}", gradient, notes)
    maker = of.call.parent
    while maker is not None and of in maker.outputs:
        maker = maker.parent
    if maker is None:
        return _Blame("input", None, f"gradient of {of.full_label}", gradient)
    return _Blame("produced", maker, f"own code, in the gradient of {of.full_label}", gradient)
