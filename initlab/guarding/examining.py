"""A bad step, run again: which of its passes it came from, and what a diagnosis, or a watch, says of that one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import watching
from ..clipping import get_total_norm
from ..diagnosis import CommunicatesError, Diagnosis, diagnose
from ..diagnosis.probes import LossFn, quiet
from ..distributed.groups import groups_of
from ..watching import WatchReport
from .passes import ForwardPass, StateKeeper
from .ranks import any_rank_


class Examiner:
    """Runs passes again from the state before them, and puts everything back. All ranks of `across` do so together.

    Args:
        model: as it trains, in its wrappers.
        loss_fn: called with the model and a batch.
        optimizers: of its parameters.
        keeper: of the buffers.
        budget: seconds for a diagnosis.
        across: ranks that step together; None for one rank.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizers: list[torch.optim.Optimizer],
        keeper: StateKeeper,
        budget: float,
        across: Any,
    ) -> None:
        self.model, self.loss_fn, self.optimizers = model, loss_fn, optimizers
        self.keeper, self.budget, self.across = keeper, budget, across
        self.groups = groups_of(across)

    def is_bad(self, ran: ForwardPass) -> bool:
        """Whether a pass, run once more and without a scale, gives a loss or a gradient that is not finite."""
        with self._again(ran):
            loss = self.loss_fn(self.model, ran.batch)
            loss.backward()
            gradients = [p.grad for p in self._parameters() if p.grad is not None]
            bad = ~loss.detach().isfinite().all()
            if gradients:
                flag = get_total_norm(gradients, report=True).flag.to(bad.device)
                bad = bad | (flag != 0)
        return bool(any_rank_(bad.to(torch.int32).reshape(1), self.groups))

    def culprit(self, passes: list[ForwardPass]) -> int | None:
        """The first pass of several that is bad by itself; None where none is."""
        return next((place for place, ran in enumerate(passes) if self.is_bad(ran)), None)

    def diagnose(self, ran: ForwardPass) -> tuple[Diagnosis | None, WatchReport | None, list[str]]:
        """The diagnosis of a pass; where it cannot run, what a watch sees, and a note that says why."""
        notes = []
        if ran.batch_has_changed():
            notes.append("the step wrote to its batch: what ran again, and what was saved, is the batch after that")
        optimizer = self.optimizers[0] if len(self.optimizers) == 1 else None
        if optimizer is None:
            notes.append("several optimizers: the diagnosis ran without them, and took no steps")
        try:
            with self._again(ran):
                found = diagnose(self.model, ran.batch, self.loss_fn, optimizer, budget=self.budget, across=self.across)
            if found.verdict == "healthy":
                notes.append(
                    "the same batch from the same state was finite when it ran again: what was bad came from something "
                    "that is not kept (attributes that a pass changes), or from operations that differ from run to run"
                )
            return found, None, notes
        except CommunicatesError as error:
            reason = str(error).split(", and a diagnosis", 1)[0]
            notes.append(f"no diagnosis: {reason}, and a diagnosis must not communicate; a watch saw the step again")
        except Exception as error:
            notes.append(f"no diagnosis: it raised {type(error).__name__}: {error}")
        watched, note = self._watch(ran)
        return None, watched, [*notes, *note]

    def _watch(self, ran: ForwardPass) -> tuple[WatchReport | None, list[str]]:
        try:
            with self._again(ran), watching.watch(self.model, backward=True) as watch:
                self.loss_fn(self.model, ran.batch).backward()
                own = watch.report()
        except Exception as error:
            return None, [f"nor could it be watched: {type(error).__name__}: {error}"]
        return (watch.report(across=self.across) if self.groups else own), []

    def _parameters(self) -> list[Tensor]:
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        parameters = [*self.model.parameters(), *(p for group in groups for p in group["params"])]
        return list({id(p): p for p in parameters}.values())

    @contextlib.contextmanager
    def _again(self, ran: ForwardPass) -> Iterator[None]:
        """The state before a pass, no gradients, compiled code as it was written, no scale of a GradScaler's."""
        kept = [(p, p.grad) for p in self._parameters()]
        scales: list[dict[str, Any]] = [
            {name: vars(one).pop(name) for name in ("grad_scale", "found_inf") if name in vars(one)}
            for one in self.optimizers
        ]
        with self.keeper.at(ran.state), quiet():
            for p, _ in kept:
                p.grad = None
            try:
                yield
            finally:
                for p, gradient in kept:
                    p.grad = gradient
                for one, given in zip(self.optimizers, scales, strict=True):
                    vars(one).update(given)
