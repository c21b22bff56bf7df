"""What each tensor of a model is to be filled with, by what its memory holds: a distribution, or else a program."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..distributed.dtensors import is_dtensor
from .contents import Fills
from .programs import LIMIT, Node, Parameter, Untraceable, draws_of, program_of
from .specs import DimSlice, FillSpec, computed_spec


@dataclass
class Entry:
    """What a build wrote to one parameter or buffer.

    Args:
        shape: its shape.
        spec: what it was filled with; None if no distribution describes it.
        why: the reason, where there is no spec.
        copies: names of the tensors that hold the same random numbers, itself included; empty for most.
        name: its smallest name in the model that was built.
    """

    shape: tuple[int, ...]
    spec: FillSpec | None
    why: str = ""
    copies: tuple[str, ...] = ()
    name: str = ""


class Found(NamedTuple):
    """A tensor when its build is over: the smallest of its names, and what it holds."""

    tensor: Tensor
    name: str
    fills: Fills | None
    node: Node


def _copies(found: Mapping[Any, Found]) -> tuple[dict[Any, tuple[str, ...]], dict[Any, tuple[str, ...]]]:
    """Names of the tensors that are made of the same random numbers, by place.

    Returns:
        (those that are equal, those that share some of their random numbers and are not equal).
    """
    by_draw: dict[int, dict[Any, list[tuple[Any, ...]]]] = {}
    for place, each in found.items():
        for _, value in each.fills or ():
            for draw in value.draws:
                by_draw.setdefault(draw, {}).setdefault(place, []).append(value.path)
    equal: dict[Any, tuple[str, ...]] = {}
    shared: dict[Any, tuple[str, ...]] = {}
    for places in by_draw.values():
        groups: dict[Any, list[Any]] = {}
        for place in places:
            groups.setdefault(_content(found[place]), []).append(place)
        parts = [{path for place in group for path in places[place]} for group in groups.values()]
        names = tuple(found[place].name for place in places)
        lost = len(places) > 1 and any("?" in path for paths in parts for path in paths)
        if lost or not _are_disjoint(parts):
            shared |= dict.fromkeys(places, names)
            continue
        for group in groups.values():
            if len(group) > 1:
                equal |= dict.fromkeys(group, tuple(found[place].name for place in group))
    return equal, shared


def _content(found: Found) -> Any:
    """What has to be equal for two tensors to hold equal random numbers."""
    return tuple(found.tensor.shape), tuple((part, v.distribution, v.draws, v.path) for part, v in found.fills or ())


def _are_disjoint(groups: list[set[tuple[Any, ...]]]) -> bool:
    """Whether tensors took different parts of one draw: each group one slice, of the same dimension."""
    if len(groups) < 2:
        return True
    if any(len(paths) != 1 for paths in groups):
        return False
    firsts = [next(iter(paths))[:1] for paths in groups]
    if not all(first and isinstance(first[0], DimSlice) for first in firsts):
        return False
    spans = sorted(first[0] for first in firsts)
    return all(a.dim == b.dim and a.start + a.length <= b.start for a, b in itertools.pairwise(spans))


def entries_of(found: Mapping[Any, Found]) -> dict[Any, Entry]:
    """What each tensor is to be filled with: a distribution, or else a program.

    Args:
        found: by any key, the tensors of a model.

    Returns:
        By the same keys.
    """
    equal, shared = _copies(found)
    entries = {key: _entry(found[key], equal.get(key, ()), shared.get(key, ())) for key in found}
    computed = {key for key, entry in entries.items() if entry.spec is None and found[key].fills}
    # A tensor with a distribution has its own numbers. Where a computed one takes numbers from which that was made,
    # and not its values, both have to be computed.
    while True:
        known = {
            id(each.node): Parameter(each.name, tuple(each.tensor.shape), each.tensor.dtype)
            for key, each in found.items()
            if key not in computed and any(value.draws for _, value in each.fills or ())
        }
        users: dict[int, set[str]] = {}
        for key in computed:
            for draw in draws_of(found[key].node, known):
                users.setdefault(draw, set()).add(found[key].name)
        more = {
            key
            for key, each in found.items()
            if key not in computed and any(draw in users for _, value in each.fills or () for draw in value.draws)
        }
        if not more:
            break
        computed |= more
    owners: dict[int, tuple[str, int]] = {}
    count: dict[str, int] = {}
    for draw in sorted(users):
        name = min(users[draw])
        owners[draw] = name, count.get(name, 0)
        count[name] = owners[draw][1] + 1
    for key in computed:
        entries[key] = _computed(found[key], entries[key], known, owners)
    for key, entry in entries.items():
        entry.name = found[key].name
    return entries


def _computed(
    found: Found, entry: Entry, known: Mapping[int, Parameter], owners: Mapping[int, tuple[str, int]]
) -> Entry:
    """The entry of a tensor whose values are computed, with the reason where they cannot be."""
    shape = tuple(found.tensor.shape)
    why = entry.why or (entry.spec.why if entry.spec is not None else "")
    try:
        program = program_of(found.node, known, owners)
    except Untraceable as reason:
        return Entry(shape, None, f"{why}: {reason}" if str(reason) not in why else why)
    if program.elements > LIMIT:
        return Entry(
            shape, None, f"{why}, through {program.elements:,} elements, and no more than {LIMIT:,} are computed"
        )
    return Entry(shape, computed_spec(program, why))


def _entry(found: Found, copies: tuple[str, ...], shared: tuple[str, ...]) -> Entry:
    tensor, name, fills, _ = found
    shape = tuple(tensor.shape)
    if fills is None:
        return Entry(shape, None, "it was made outside the recorded build")
    if not fills:
        return Entry(shape, None, "nothing was written to it during the recorded build")
    bad = next((value for _, value in fills if value.distribution is None), None)
    if bad is not None:
        return Entry(shape, None, bad.why)
    if is_dtensor(tensor) and any(part is not None for part, _ in fills):
        return Entry(shape, None, "a part of a DTensor was written")
    if shared:
        others = ", ".join(other for other in shared if other != name)
        return Entry(shape, None, f"it is computed from the random numbers of {others}, or shares a part of them")
    pairs = tuple((part, value.distribution) for part, value in fills if value.distribution is not None)
    return Entry(shape, FillSpec(pairs, fills[0][1].fan, fills[-1][1].why, exact=True), "", copies)
