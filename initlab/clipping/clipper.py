"""GradClipper: clips in an optimizer's step. Each step measures the gradients, decides, and applies the decision."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from initlab.kernels import EPSILON, clip_coefficient

from ..distributed.dtensors import classify
from ..distributed.groups import pp_mesh_dim_of
from ..distributed.norm import MeshTensors
from .counts import StepCounts
from .functional import (
    LabelledTensors,
    StepPolicy,
    check_policy,
    gradients_of,
    mesh_tensors_of,
    nonfinite_error,
    report_of,
)
from .optimizers import (
    OptimizerCopy,
    SkippedStep,
    changes_more,
    hooked_optimizer,
    make_momentum_buffers,
    refuse_partitioned,
    skips_on_device,
    starts_dampened_momentum,
    versions_of,
    waits_for_unscale,
)
from .parameters import OptimizerParameters
from .report import ClipReport, ClipStats, label
from .spikes import SpikePolicy
from .steps import Decision, GradientMarks, Measurement, Round, Step, as_0d, runs_inside_another


class GradClipper:
    """Clips the gradients of an optimizer's parameters in every step, and keeps bad steps out of weights and moments.

    From then on `optimizer.step()` clips; call nothing else. With an optimizer of torch whose groups are all fused
    (SGD, Adam, AdamW, Adagrad with fused=True) gradients are read once, for the norm. The optimizer applies the
    coefficient in its own pass, as its grad_scale, and skips bad steps by its found_inf: no pass that scales, no wait
    for a GPU. With others gradients are scaled in place, and "skip" waits for the device once a step; "raise" always
    does.

    A closure that is passed to step(), as Lightning does always, is run by the optimizer as before, and clipped each
    time it has run. Compiled steps are clipped too: torch.compile breaks the graph at the hook, so fullgraph=True
    raises. Wrappers of accelerate and Lightning are looked into.

    Works under torch.amp.GradScaler: the norm of gradients that are still scaled is that of the unscaled ones, and a
    step that the scaler skips stays skipped. Parameter groups count as one vector; parameters without a gradient are
    passed over, and one that is passed twice counts once. Sparse gradients count by their coalesced values.

    Works with DTensors on any meshes (FSDP2, tensor, expert and hybrid parallelism): every rank of the meshes takes the
    same norm, and a NaN on one makes all skip the step. Ranks that share no mesh know nothing of each other, unless
    pp_group joins them. See `get_total_norm`.

    Args:
        optimizer: one, or several whose gradients count as one vector, as with Muon for matrices and AdamW for the
            rest. All must step after one backward pass; the first that does takes the norm and decides for all.
        max_norm: more than 0; inf only measures and guards. The attribute may be set at any time, as `nonfinite` and
            `norm_type` may.
        nonfinite: what to do in a step with NaN or inf in a gradient. "skip": no parameter, moment, counter or other
            value that the optimizer holds changes; "raise": RuntimeError before anything changes, naming the
            parameter; "zero": step with gradients of zero; "propagate": as if nothing was wrong.
        norm_type: p, any number, or "inf".
        named_parameters: (name, parameter) pairs, for reports; without it the optimizer's own names, if it was made of
            named_parameters().
        pp_group: pipeline stages to take the norm over; as for `get_total_norm`. All stages must step, whether they
            have gradients or not. torch.amp.GradScaler goes by each stage's own gradients, so scales drift apart; use
            torch's ShardedGradScaler with the process group of the stages, and call its unscale_ before each step.
        scaler: the torch.amp.GradScaler whose step() steps the optimizer. With optimizers that are not fused it does
            not call their step() where it has found an inf: with it passed, such steps are counted too.
        per_parameter: keep the norm of each gradient, for `norms` and `top`. It comes out of the same read. p = 2 only.
        spikes: a policy beside max_norm for norms far above those before, such as `ZScoreSpikes()`.

    Attributes:
        max_norm: the largest norm.
        report: the ClipReport of the last step; None before it, and after a step in which no parameter had a gradient,
            which is not counted. Its norm is that before clipping.

    Raises:
        ValueError: for a max_norm that is not positive, an unknown policy for nonfinite, per_parameter with a norm_type
            other than 2, no optimizer, or a pp_group that is neither a ProcessGroup nor a DeviceMesh with one
            dimension. Also when an attribute is set so.
        TypeError: for what is no optimizer, and wraps none, whose step() runs hooks; for arguments of other kinds.
        RuntimeError: if an optimizer has a GradClipper already.
        NotImplementedError: for DeepSpeed's ZeRO, of whose gradients a rank sees a part.

    Source:
        R. Pascanu, T. Mikolov and Y. Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.named_parameters(), fused=True)
        >>> clipper = initlab.GradClipper(optimizer, max_norm=1.0)
        >>> for x in (1.0, 50.0, float("nan")):
        ...     optimizer.zero_grad()
        ...     model(torch.tensor([[0.1, x]])).sum().backward()
        ...     optimizer.step()
        >>> clipper.stats()
        ClipStats(steps=3, clipped=2, nonfinite=1, first_bad_step=3, first_bad_parameter='weight')
        >>> bool(model.weight.isfinite().all())
        True
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        max_norm: float,
        nonfinite: StepPolicy = "skip",
        *,
        norm_type: float = 2.0,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        pp_group: Any = None,
        scaler: torch.amp.GradScaler | None = None,
        per_parameter: bool = False,
        spikes: SpikePolicy | None = None,
    ) -> None:
        if spikes is not None and not isinstance(spikes, SpikePolicy):
            raise TypeError(f"spikes is {spikes!r}; it must be a policy, such as initlab.ZScoreSpikes()")
        if scaler is not None and not callable(getattr(scaler, "step", None)):
            raise TypeError(
                f"scaler is {scaler!r}; it must be the torch.amp.GradScaler whose step() steps the optimizer"
            )
        optimizers = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
        self._optimizers = list(dict.fromkeys(map(hooked_optimizer, optimizers)))
        if not self._optimizers:
            raise ValueError("optimizer is an empty list; pass one optimizer, or those whose gradients count as one")
        self._per_parameter = per_parameter
        self.max_norm, self.nonfinite, self.norm_type = max_norm, nonfinite, norm_type
        if any(getattr(one, "_initlab_clipper", None) is not None for one in self._optimizers):
            raise RuntimeError("this optimizer has a GradClipper already; remove() that one first")
        self.report: ClipReport | None = None
        self._pp_mesh_dim = pp_mesh_dim_of(pp_group)
        self._parameters = OptimizerParameters(self._optimizers, named_parameters)
        refuse_partitioned(self._parameters.labelled().passed)
        self._counts = StepCounts(spikes)
        self._hook_runs = 0
        self._norms: tuple[Sequence[int], Tensor] | None = None  # parameters by index, and their gradients' norms
        self._step: Step | None = None  # that is going on, or was interrupted
        self._round: Round | None = None  # of several optimizers
        self._run_closures: set[torch.optim.Optimizer] = set()  # that have run one, so that no more is asked
        self._scaler = scaler
        self._attach()

    def _attach(self) -> None:
        """Register the hooks, and take the scaler's step over."""
        self._scaler_step = None if self._scaler is None else self._scaler.step
        self._hooks = []
        for one in self._optimizers:
            # A traced hook would set grad_scale too late for the step that is traced with it.
            self._hooks.append(one.register_step_pre_hook(torch.compiler.disable(self._before_step)))
            self._hooks.append(one.register_step_post_hook(torch.compiler.disable(self._after_step)))
            one._initlab_clipper = self  # type: ignore[attr-defined]
        if self._scaler is not None:
            self._scaler.step = self._step_of_scaler  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which have hooks of their own on the optimizers that are copied with it."""
        if self._scaler is not None:
            raise TypeError("a GradClipper with a scaler cannot be copied; save its state_dict(), and make another one")
        return vars(self) | {"_hooks": [], "_step": None, "_round": None, "_run_closures": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._attach()

    @property
    def max_norm(self) -> float:
        """The largest norm."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, max_norm: float) -> None:
        number = _number("max_norm", max_norm)
        if not number > 0.0:
            raise ValueError(f"max_norm is {max_norm}; it must be more than 0; inf only measures and guards")
        self._max_norm = number

    @property
    def nonfinite(self) -> StepPolicy:
        """What to do in a step with NaN or inf in a gradient."""
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, nonfinite: StepPolicy) -> None:
        check_policy(nonfinite, StepPolicy)
        self._nonfinite = nonfinite

    @property
    def norm_type(self) -> float:
        """The order of the norm."""
        return self._norm_type

    @norm_type.setter
    def norm_type(self, norm_type: float) -> None:
        number = _number("norm_type", norm_type)
        if math.isnan(number):
            raise ValueError(f"norm_type is {norm_type}; it must be a number, or inf")
        if self._per_parameter and number != 2.0:
            raise ValueError(f"norm_type is {norm_type}, and per_parameter=True gives norms of order 2; leave it out")
        self._norm_type = number

    def stats(self) -> ClipStats:
        """The counts so far, read from the device."""
        return self._counts.stats(self._parameters.labelled().labels())

    def norms(self) -> dict[str, float]:
        """The norm of each parameter's gradient in the last step, by name, before clipping. Waits for the device.

        Parameters without a gradient are left out; of a DTensor it is the norm of the whole.

        Raises:
            RuntimeError: without per_parameter=True.
        """
        if not self._per_parameter:
            raise RuntimeError("norms are kept only where asked for: GradClipper(..., per_parameter=True)")
        if self._norms is None:
            return {}
        labels = self._parameters.labelled().labels()
        indices, norms = self._norms
        return {label(labels, index): norm for index, norm in zip(indices, norms.tolist(), strict=True)}

    def top(self, count: int) -> list[tuple[str, float]]:
        """The largest norms of the last step, with names, in descending order; NaN before all. See `norms`."""
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"count is {count!r}; it must be how many norms to return, 0 or more")
        items = self.norms().items()
        return sorted(items, key=lambda item: math.inf if math.isnan(item[1]) else item[1], reverse=True)[:count]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from: counts, and the statistics of spikes with their policy. Plain numbers."""
        return self._counts.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: if it was saved with another policy for spikes than this clipper has: statistics of one say
                nothing to another. Also if it is no state of a GradClipper.
        """
        self._counts.load_state_dict(state_dict)

    def remove(self) -> None:
        """Leave the optimizers, and the scaler, as they were before."""
        for hook in self._hooks:
            hook.remove()
        self._end_interrupted()
        for one in self._optimizers:
            if getattr(one, "_initlab_clipper", None) is self:
                del vars(one)["_initlab_clipper"]
        scaler, self._scaler = self._scaler, None
        if scaler is not None and vars(scaler).get("step") == self._step_of_scaler:
            del vars(scaler)["step"]
            below: Any = self._scaler_step
            while getattr(below, "__func__", None) is GradClipper._step_of_scaler and below.__self__._scaler is None:
                below = below.__self__._scaler_step  # of a clipper that was removed before
            if below != scaler.step:
                scaler.step = below  # type: ignore[method-assign]

    @torch.no_grad()
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if runs_inside_another(optimizer):
            return None
        self._end_interrupted()
        self._hook_runs += 1
        self._step = Step(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._clip(self._step)
            return None
        if changes_more(optimizer) and (self.nonfinite == "skip" or self._counts.skips_spikes):
            self._step.before = OptimizerCopy(optimizer, everything=True)
        if optimizer not in self._run_closures:
            self._step.versions = versions_of(optimizer)
        clipping = functools.partial(self._run_closure, self._step, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": clipping}
        return (args[0], clipping, *args[2:]), kwargs

    def _run_closure(self, step: Step, closure: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A closure, and then clipping; as often as the optimizer calls it."""
        self._run_closures.add(step.optimizer)
        if step.skipped is not None:
            step.skipped.show()
        loss = closure(*args, **kwargs)
        with torch.no_grad():
            self._clip(step)
        return loss

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self._step
        if step is None or runs_inside_another(optimizer):
            return
        self._step = None
        step.take_back_scale()
        if step.skipped is not None:
            step.skipped.end()
        before = None if optimizer in self._run_closures else step.versions
        if before is not None and before != versions_of(optimizer):
            raise RuntimeError(
                f"{type(optimizer).__name__} has moved its parameters without running the closure that was passed to "
                "its step(), so their gradients were not clipped, nor looked at; call step() without a closure, after "
                "backward()"
            )
        if self._round is not None:
            self._round.stepped[optimizer] = GradientMarks(optimizer)

    def _end_interrupted(self) -> None:
        """What is left of a step that raised. Gradients that it hid are gone: there may be others by now."""
        if self._step is not None:
            self._step.take_back_scale()
        self._step = None

    def _clip(self, step: Step) -> None:
        step.take_back_scale()  # of an earlier call of the same closure
        measured = self._measure() if len(self._optimizers) == 1 else self._measure_together(step.optimizer)
        if measured is not None:
            self._apply(step, measured, self._decide(step.optimizer, measured))

    def _measure(self) -> Measurement | None:
        """Read all gradients, report and count. None where there is no gradient, and no other stage may have one."""
        gradients = gradients_of(self._parameters.labelled())
        if not gradients.tensors and self._pp_mesh_dim is None:
            self.report = self._norms = None  # of this step, and not of one before
            return None
        classified = classify(gradients.tensors)
        if classified.has_wrapper_subclass:
            raise NotImplementedError("GradClipper takes no gradients that wrap other tensors, except DTensors")
        scales = [as_0d(getattr(one, "grad_scale", None)) for one in self._optimizers]  # of a GradScaler
        if len(scales) > 1 and (scales != [None] * len(scales) or waits_for_unscale(self._scaler, self._optimizers)):
            raise RuntimeError(
                "gradients are still multiplied by the GradScaler's scale, perhaps not those of all optimizers, so "
                "they have no common norm; call scaler.unscale_(optimizer) for each before the first one steps"
            )
        mesh_tensors = mesh_tensors_of(gradients, classified, self._pp_mesh_dim, takes_sparse=True)
        total = mesh_tensors.norm(self.norm_type, per_tensor=self._per_parameter)
        scale = scales[0]
        if scale is not None:
            scale64 = scale.to(total.norm64)
            norm64 = total.norm64 / scale64
            norms = None if total.tensor_norms is None else total.tensor_norms / scale64
            total = total._replace(norm64=norm64, norm=norm64.to(total.norm.dtype), tensor_norms=norms)
        assert total.flag is not None
        limit: float | Tensor = self.max_norm
        spike = self._counts.judge(total.norm64)
        if spike is not None and not self._counts.skips_spikes:
            limit = spike.limit.clamp(max=self.max_norm)
        coefficient = clip_coefficient(total.norm64, limit)
        measured = Measurement(gradients, mesh_tensors, total, total.flag != 0, coefficient, spike, scale)
        self._record(measured)
        return measured

    def _measure_together(self, optimizer: torch.optim.Optimizer) -> Measurement | None:
        """One measurement for several optimizers: the first of them to step makes it, the others go by it."""
        current = self._round
        if current is not None and optimizer not in current.stepped:
            if current.marks[optimizer].hold():
                return current.measured
            if any(marks.are_some() and marks.hold() for marks in current.stepped.values()):
                raise RuntimeError(
                    f"the gradients of {type(optimizer).__name__} changed after the norm of all was taken; unscale, "
                    "accumulate or change gradients before the first optimizer steps, or make one GradClipper for each"
                )
        measured = self._measure()
        marks = {one: GradientMarks(one) for one in self._optimizers}
        self._round = None if measured is None else Round(measured, marks, {})
        return measured

    def _record(self, measured: Measurement) -> None:
        """The report of this step, and the counts."""
        self.report = report_of(measured.total, measured.gradients.labels())
        if measured.total.tensor_norms is not None:
            self._norms = measured.gradients.indices, measured.total.tensor_norms
        bad = measured.nonfinite
        clipped = ~bad & (measured.coefficient < 1.0)
        self._counts.record(bad, self.report.first_nonfinite_index, clipped, measured.spike)

    def _decide(self, optimizer: torch.optim.Optimizer, measured: Measurement) -> Decision:
        """What happens in this step. Nothing has been changed so far; under "raise" this is where it ends."""
        bad, found_inf = measured.nonfinite, as_0d(getattr(optimizer, "found_inf", None))  # of a GradScaler
        policy: str = self.nonfinite
        if policy == "raise" and found_inf is not None:
            policy = "skip"  # the scaler sees to infs
        if policy == "raise" and bool(bad):
            raise nonfinite_error(measured.total, measured.mesh_tensors, measured.gradients, self.norm_type)
        skip = bad if policy == "skip" else None
        if found_inf is not None:  # the scaler, or we, or both
            skip = bad | (found_inf.to(bad.device) != 0)
        if measured.spike is not None and self._counts.skips_spikes:
            skip = measured.spike.spike if skip is None else skip | measured.spike.spike
        on_device = skips_on_device(optimizer)
        skips_by_itself = on_device and not starts_dampened_momentum(optimizer)
        return Decision(
            on_device=on_device,
            skip=skip,
            hide=skip is not None and not skips_by_itself and bool(skip),
            zero=policy == "zero",
            coefficient=measured.coefficient if policy == "propagate" else torch.where(bad, 1.0, measured.coefficient),
        )

    def _apply(self, step: Step, measured: Measurement, decision: Decision) -> None:
        """Carry a decision out: in the gradients, or by what a fused optimizer reads in its step."""
        optimizer = step.optimizer
        if decision.hide:
            if step.skipped is None:
                step.skipped = SkippedStep(optimizer, step.before)
            else:
                step.skipped.hide()
        if not decision.on_device:
            if not decision.hide:
                self._scale(optimizer, measured, decision)
            return
        if decision.zero:
            self._mesh_tensors(optimizer, measured).clip_(measured.total.norm64, math.inf, nonfinite="zero")
        if decision.skip is not None and not decision.hide:
            make_momentum_buffers(optimizer)
        # Both 0-d: vectors of one element do not go with DTensors.
        scale = 1.0 if measured.scale is None else measured.scale.to(decision.coefficient.device)
        grad_scale = (scale / decision.coefficient).to(torch.float32)
        found_inf = None if decision.skip is None else decision.skip.to(torch.float32)
        step.give_scale(grad_scale, found_inf)

    def _scale(self, optimizer: torch.optim.Optimizer, measured: Measurement, decision: Decision) -> None:
        """Scale an optimizer's gradients in place."""
        mesh_tensors, norm = self._mesh_tensors(optimizer, measured), measured.total.norm64
        if decision.zero or self.nonfinite == "propagate":
            how = "zero" if decision.zero else "propagate"
        else:  # what is skipped is hidden; a NaN keeps what is not from being written
            how, norm = "keep", torch.where(measured.nonfinite, math.nan, norm)
        if measured.spike is None or self._counts.skips_spikes:
            mesh_tensors.clip_(norm, self.max_norm, nonfinite=how)
        else:  # by a norm that comes to the same coefficient
            norm = torch.where(norm.isfinite(), 1.0 / decision.coefficient - EPSILON, norm)
            mesh_tensors.clip_(norm, 1.0, nonfinite=how)

    def _mesh_tensors(self, optimizer: torch.optim.Optimizer, measured: Measurement) -> MeshTensors:
        """An optimizer's own gradients, prepared for scaling."""
        if len(self._optimizers) == 1:
            return measured.mesh_tensors
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = gradients_of(LabelledTensors(parameters, range(len(parameters)), parameters, None))
        return mesh_tensors_of(gradients, classify(gradients.tensors), takes_sparse=True)

    @torch.no_grad()
    def _step_of_scaler(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """GradScaler.step, which does not call that of an optimizer if it has found an inf: then we count it."""
        assert self._scaler_step is not None
        before = self._hook_runs
        with torch.enable_grad():
            result = self._scaler_step(optimizer, *args, **kwargs)
        if self._scaler is None:  # removed, while another clipper had wrapped it
            return result
        if hooked_optimizer(optimizer) in self._optimizers and self._hook_runs == before:
            self._measure() if len(self._optimizers) == 1 else self._measure_together(hooked_optimizer(optimizer))
        return result


def _number(name: str, value: Any) -> float:
    """A number that was passed, or a string that says one."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} is {value!r}; it must be a number, or inf ({error})") from None
