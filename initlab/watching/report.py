"""What a watch reports: the first fault of a rank, or of a job."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from initlab.kernels import describe

from .._console import inline_listing
from ..distributed.collectives import listed
from ..languages import Say, translator

_OTHERS = 3  # different faults of other ranks that a printed report shows


@dataclasses.dataclass(frozen=True)
class Fault:
    """The first non-finite value that a watch saw, and where it comes from.

    Args:
        step: the training step in which it appeared, from 1: the steps of the optimizers that hold the model's
            parameters are counted while it is watched.
        model_call: the call of the model in which it appeared, from 1; the backward pass after a call belongs to it.
        phase: "forward" or "backward".
        cause: "produced": by a module whose inputs, parameters and buffers were finite. "parameter": a parameter or
            buffer of the module was non-finite before. "input": an input of the model was, or a gradient that reached
            the model from outside.
        module: the name of the module to blame, "" for the model itself; None where the cause is "input".
        kind: its class; "" without a module.
        call: which of its calls in this call of the model, from 1; 0 without a module.
        tensor: what was non-finite: "output", "output[1]", "weight", "input 0", "gradient of input 0", ...
        flag: NaN = 1, +inf = 2, -inf = 4, or-ed.
        dtype: of that tensor.
        notes: further facts, a sentence each.
        passed_on: modules whose outputs, or in the backward pass gradients, became non-finite later in this
            call of the model because of this value.
        from_all_gather: whether the value is in a parameter that was gathered from several ranks, and this rank's own
            shard of it is finite: the value comes from another rank.
        after: how many tensors, parameters and buffers aside, had been inspected in this call of the model and phase
            before it.
            Ranks that run the same modules count alike.
        rank: the global rank that saw it; None in a report of one rank alone.
    """

    step: int
    model_call: int
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
        return "\n  ".join(self.lines(translator("en")))

    def lines(self, say: Say) -> list[str]:
        """The fault as it is printed, line by line.

        Args:
            say: translates it.
        """
        where = "" if self.rank is None else say(f"rank {self.rank}") + say(", ")
        lines = [f"{where}{self.said(say)}", *map(say, self.notes)]
        if self.passed_on:
            names = [name or say("the model itself") for name in self.passed_on]
            lines.append(say(f"passed on by {inline_listing(names, 5)}"))
        return lines

    @property
    def headline(self) -> str:
        """When, who and what, in one line; without the rank."""
        return self.said(translator("en"))

    def said(self, say: Say) -> str:
        """The headline in a language.

        Args:
            say: translates it.
        """
        what = f"{describe(self.flag)} ({str(self.dtype).removeprefix('torch.')})"
        if self.module is None:
            text = f"{self.tensor} holds {what}; no module produced it"
        else:
            name = f"module {self.module!r}" if self.module else "the model itself"
            who = f"{name} ({self.kind}{f', its call {self.call}' if self.call > 1 else ''})"
            tensor = f"{'the' if self.tensor.startswith('gradient') else 'its'} {self.tensor}"
            produced = self.cause == "produced"
            text = f"{who} produced {what} in {tensor}" if produced else f"{who}: {tensor} holds {what}"
        when = f"step {self.step}, call {self.model_call}" if self.step > 1 else f"call {self.model_call}"
        return say(when) + say(", ") + say(self.phase) + say(": ") + say(text)


@dataclasses.dataclass(frozen=True)
class WatchReport:
    """What a watch has seen so far, on this rank or across ranks.

    Args:
        fault: the first fault; None if there was none.
        steps: of optimizers that hold the model's parameters, while it was watched; across ranks the most of any rank.
        model_calls: calls of the model that were watched; across ranks the most of any rank.
        calls: calls of its modules that were watched; across ranks the sum.
        others: across ranks, the first fault of each other rank that has one, in the order of `Watch.report`.
        ranks: the global ranks that took part; empty in a report of one rank alone.
        unseen: what was not inspected, a sentence each.
        inspected: how many tensors were; across ranks the sum.
    """

    fault: Fault | None
    steps: int
    model_calls: int
    calls: int
    others: tuple[Fault, ...] = ()
    ranks: tuple[int, ...] = ()
    unseen: tuple[str, ...] = ()
    inspected: int = 0

    def __str__(self) -> str:
        return self.text()

    def text(self, lang: str = "en") -> str:
        """The report as it is printed.

        Args:
            lang: "en", or "zh" for Chinese.

        Raises:
            ValueError: for another language.
        """
        say = translator(lang)
        counts = [f"{self.model_calls} calls of the model", f"{self.calls} of its modules"]
        if self.steps:
            counts.insert(0, f"{self.steps} steps")
        if self.ranks:
            counts.append(f"{len(self.ranks)} ranks")
        seen = say(", ").join(map(say, counts))
        unseen = [say(f"not inspected: {what}") for what in self.unseen]
        if self.fault is None:
            first = f"nothing non-finite in {seen}" if self.inspected else f"nothing was inspected in {seen}"
            return "\n  ".join([say(first), *unseen])
        lines = self.fault.lines(say)
        alike: dict[str, list[int]] = {}
        for fault in self.others:
            assert fault.rank is not None
            alike.setdefault(fault.said(say), []).append(fault.rank)
        for headline, ranks in list(alike.items())[:_OTHERS]:
            lines.append(say(f"also rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}") + say(", ") + headline)
        if more := [rank for ranks in list(alike.values())[_OTHERS:] for rank in ranks]:
            lines.append(say(f"and {len(more)} more: rank{'s' if len(more) > 1 else ''} {listed(more)}"))
        return "\n  ".join([*lines, *unseen, f"({seen})"])


def merge(reports: Mapping[int, WatchReport]) -> WatchReport:
    """One report of those of several ranks; `Watch.report` says which fault comes first."""
    faults = [dataclasses.replace(one.fault, rank=rank) for rank, one in reports.items() if one.fault is not None]
    faults.sort(key=_order)
    return WatchReport(
        faults[0] if faults else None,
        max(one.steps for one in reports.values()),
        max(one.model_calls for one in reports.values()),
        sum(one.calls for one in reports.values()),
        tuple(faults[1:]),
        tuple(sorted(reports)),
        tuple(dict.fromkeys(what for one in reports.values() for what in one.unseen)),
        sum(one.inspected for one in reports.values()),
    )


def _order(fault: Fault) -> tuple[Any, ...]:
    from_elsewhere = fault.cause == "input" or fault.from_all_gather
    return (
        fault.step,
        fault.model_call,
        fault.phase == "backward",
        from_elsewhere,
        fault.after,
        fault.cause != "parameter",
        fault.rank,
    )
