"""What GradClipper counts over steps: tensors on the gradients' device, which nothing waits for until they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .report import ON_ANOTHER_RANK, ClipStats, label
from .spikes import SpikePolicy, SpikeStep, spike_differences

_SPIKE_STEPS = 16  # of so many spikes, the last ones, the steps are kept
# Places in the counts. FIRST_STEP is 0 where there is none.
_CLIPPED, _NONFINITE, _FIRST_STEP, _FIRST_PARAMETER, _SPIKES = range(5)


class StepCounts:
    """Counts of steps, and the statistics of a policy for spikes.

    Args:
        spikes: the policy, or None.

    Attributes:
        spikes: the policy.
        steps: how many steps were recorded.
    """

    def __init__(self, spikes: SpikePolicy | None) -> None:
        self.spikes = spikes
        self.steps = 0
        self._counts = torch.tensor([0, 0, 0, -1, 0], device="cpu")
        self._spike_state = None if spikes is None else spikes.new_state(torch.device("cpu"))
        self._spike_steps = torch.zeros(_SPIKE_STEPS, dtype=torch.int64, device="cpu")  # a ring

    @property
    def skips_spikes(self) -> bool:
        """Whether a spike is a reason to skip a step."""
        return self.spikes is not None and self.spikes.action == "skip"

    def judge(self, norm: Tensor) -> SpikeStep | None:
        """What the policy says of a norm, which enters its statistics; None without a policy."""
        if self.spikes is None or self._spike_state is None:
            return None
        step = self.spikes.step(self._spike_state.to(norm.device, non_blocking=True), norm)
        self._spike_state = step.state
        return step

    def record(self, bad: Tensor, first_index: Tensor, clipped: Tensor, spike: SpikeStep | None) -> None:
        """One more step: whether a gradient was not finite, and of which parameter; whether gradients were scaled."""
        self.steps += 1
        counts = self._counts.to(bad.device, non_blocking=True)
        is_first = bad & (counts[_FIRST_STEP] == 0)
        step = torch.where(is_first, self.steps, counts[_FIRST_STEP])
        parameter = torch.where(is_first, first_index, counts[_FIRST_PARAMETER])
        spikes = counts[_SPIKES]
        if spike is not None:
            ring = self._spike_steps.to(bad.device, non_blocking=True)
            is_next = torch.arange(_SPIKE_STEPS, device=bad.device) == spikes % _SPIKE_STEPS
            self._spike_steps = torch.where(is_next & spike.spike, self.steps, ring)
            spikes = spikes + spike.spike
            if self.skips_spikes:
                clipped = clipped & ~spike.spike
        self._counts = torch.stack([counts[_CLIPPED] + clipped, counts[_NONFINITE] + bad, step, parameter, spikes])

    def stats(self, labels: Sequence[str | torch.Size]) -> ClipStats:
        """The counts so far, read from the device; `labels` names parameters by index."""
        clipped, nonfinite, step, parameter, spikes = self._counts.tolist()
        name = None
        if step > 0:
            name = label(labels, parameter) if parameter >= 0 else ON_ANOTHER_RANK
        last = tuple(sorted(self._spike_steps.tolist())[-min(spikes, _SPIKE_STEPS) :]) if spikes else ()
        return ClipStats(self.steps, clipped, nonfinite, step or None, name, spikes, last)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; see GradClipper.state_dict."""
        state: dict[str, Any] = {"steps": self.steps, "counts": self._counts.tolist()}
        if self.spikes is not None and self._spike_state is not None:
            state["spike_steps"] = self._spike_steps.tolist()
            state["spikes"] = {"policy": self.spikes.config(), "statistics": self._spike_state.tolist()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See GradClipper.load_state_dict."""
        missing = {"steps", "counts"} - state_dict.keys()
        if missing:
            raise ValueError(
                f"the state has no {' and no '.join(sorted(missing, reverse=True))}, so it is none of a GradClipper; "
                "pass what its state_dict() returned"
            )
        saved = state_dict.get("spikes")
        differences = spike_differences(self.spikes, None if saved is None else saved["policy"])
        if differences:
            raise ValueError(
                f"the state was saved with another policy for spikes: {', '.join(differences)}; make the clipper with "
                "the same, or take 'spikes' out of the state to begin with new statistics"
            )
        spike_state = None
        if saved is not None and self.spikes is not None:
            spike_state = self.spikes.restored_state(saved["statistics"], "cpu")
            self._spike_steps = torch.tensor(state_dict["spike_steps"], dtype=torch.int64, device="cpu")
        self.steps, self._spike_state = int(state_dict["steps"]), spike_state
        self._counts = torch.tensor(state_dict["counts"], dtype=torch.int64, device="cpu")
