"""Layer-sequential unit variance: each weight scaled so that its layer's output has variance 1 on a batch.

The L layers that end residual branches of one stream get 1/L each, so that the stream grows by 1 in all and not by L:
Hanin and Rolnick, "How to Start Training", 2018; GPT-2's 1/sqrt(N), Radford et al., 2019; De and Smith, 2020.

One pass does it for weights that are used once. Where a product meets a weight that is not fitted yet, its output is
measured, the weight is drawn again with a scaled distribution, and the product is computed again before the pass goes
on. Weights that are used several times take further passes, since what a later use sees depends on the factor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .._console import listing
from ..diagnosis import ranks
from ..diagnosis.batch import leaves
from ..diagnosis.probes import quiet
from ..diagnosis.state import Snapshot, referenced_modules
from ..distributed.dtensors import is_dtensor
from ..models.naming import TensorRef, unwrapped
from ..models.plan import Plan, Task
from ..models.refusals import only_value
from ..models.report import Fit
from ..models.specs import FillSpec
from .calling import Forward, call_model, check_batch, in_its_mode, refuse_scripted, speaking_of
from .factors import scaled_spec
from .moments import Moments
from .products import LOOKUPS, Key, Products, Unit

STEPS = 32  # of an octave: factors are powers of 2^(1/32)
LOW, HIGH = 0.9, 1.1  # what an output variance may be in the end, as a multiple of the wanted one
_LEAP, _LEAPS = 8 * STEPS, 8  # of a weight that a bias hides
_TRIES = 20  # changes for each weight, after its first fit, where it is used several times
_DRAWS = 100  # of one weight


class _Restart(Exception):
    """The pass begins anew: a copy of the weight that it works with is out of date."""


class _Weight:
    """How far the fit of one weight has come."""

    def __init__(self, unit: Unit, task: Task) -> None:
        self.unit, self.task = unit, task
        self.is_lookup = unit.is_lookup
        self.draws = 0
        self.branches = 1  # of the stream that its output is added to
        self.exponent = 0  # the factor is 2^(exponent / 32)
        self.before: float | None = None
        self.calls: list[Moments] = []  # of this pass
        self.fitted = False
        self.last: tuple[int, float] | None = None  # exponent and variance
        self.tried: dict[int, float] = {}  # variance by exponent, while nothing else changes

    @property
    def told(self) -> str:
        """The layer, for messages."""
        return f"{self.unit.name} (in {self.unit.ref.owner})"

    @property
    def factor(self) -> float:
        """What the weight is multiplied with."""
        return float(2.0 ** (self.exponent / STEPS))

    def measured(self, moments: Moments) -> float:
        """A variance as a multiple of the wanted one."""
        return moments.variance * self.branches

    def absolute(self, variance: float) -> str:
        """Such a multiple as the variance itself, for messages."""
        return f"{variance / self.branches:.4g}"

    def next_exponent(self, variance: float) -> int:
        """The exponent that should bring the variance to 1, between those that were too small and too large.

        Args:
            variance: as a multiple of the wanted one.
        """
        self.tried[self.exponent] = variance
        wanted = self.exponent - round(math.log2(variance) * STEPS / 2)
        low = max((e for e, v in self.tried.items() if v < 1.0), default=None)
        high = min((e for e, v in self.tried.items() if v >= 1.0), default=None)
        if low is not None and high is not None and low < high:
            if high - low == 1:
                return min((low, high), key=lambda e: abs(math.log(self.tried[e])))
            if not low < wanted < high:
                wanted = (low + high) // 2
        return wanted


class Fitting:
    """The fit of one model to one batch.

    Args:
        model: inside its wrappers.
        plan: what is to be written.
        batch, forward: as for init_model_.
        write: writes a task's values.
        others: by name, other rules for parameters that are guessed to be weights.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        batch: Any,
        forward: Forward,
        write: Callable[[Task], None],
        others: Mapping[str, str],
    ) -> None:
        self.others = others
        self.model, self.plan, self.batch, self.forward, self._write = model, plan, batch, forward, write
        self.tasks = {id(task.ref.tensor): task for task in plan.tasks if _wants_fit(task)}
        self.unwritten = {id(task.ref): task for task in plan.tasks if _is_open(task)}
        refs = [*(task.ref for task in plan.tasks), *plan.others]
        self.products = Products(model, (ref for ref in refs if ref.is_parameter), self._on_product)
        self.products.scaled = self.tasks
        self.weights: dict[Key, _Weight] = {}
        self._redrawn = self._knows_branches = False

    def run(self) -> None:
        """Find the factors. The model is left as the last pass left it.

        Raises:
            ValueError: naming each layer that cannot be fitted, and why.
        """
        changes = 0
        while True:
            self._redrawn = False
            if not self._pass() or self._written_late() or self._redrawn or self._found_branches():
                continue  # what is measured in the end is measured with nothing changing
            if changes > _TRIES * len(self.weights) or not self._adjust():
                break
            changes += 1
        self._check()

    def _pass(self) -> bool:
        """One pass over the batch; False where it has to begin anew."""
        for weight in self.weights.values():
            weight.calls.clear()
        torch.manual_seed(self.plan.seed % 2**63)
        try:
            with torch.no_grad(), self.products:
                self.forward(self.model, self.batch)
        except _Restart:
            return False
        return True

    def _found_branches(self) -> bool:
        """Let what ends a residual branch begin anew with a share of the variance; only after the first whole pass."""
        if self._knows_branches:
            return False
        self._knows_branches = True
        counts = self.products.branches.counts()
        for weight in self.weights.values():
            weight.branches = counts.get(weight.unit.key, 1)
        found = any(weight.branches > 1 for weight in self.weights.values())
        for weight in self.weights.values() if found else ():
            weight.fitted, weight.last = False, None
            weight.tried.clear()
        return found

    def _begin(self, task: Task) -> None:
        """Write the start of a parameter that has turned out to be a weight."""
        del self.unwritten[id(task.ref)]
        self._redrawn = True
        self._write(task)
        torch.clear_autocast_cache()

    def _written_late(self) -> bool:
        """Write those that a pass has used in a weight that several parameters make up."""
        used = {id(unit.ref) for unit in self.products.units.values()}
        late = [task for task in self.unwritten.values() if id(task.ref) in used]
        for task in late:
            self._begin(task)
        for weight in self.weights.values() if late else ():
            weight.fitted, weight.last = False, None
            weight.tried.clear()
        return bool(late)

    def _on_product(
        self, unit: Unit, name: str, signal: Tensor | None, out: Tensor, again: Callable[[], Tensor], direct: bool
    ) -> Tensor:
        task = self.tasks.get(id(unit.ref.tensor))
        if task is None or out.numel() == 0 or (name in LOOKUPS and not unit.is_lookup):
            return out
        assert task.spec is not None
        if task.spec.fitted == "never":
            raise ValueError(
                f"{unit.name} (in {unit.ref.owner}) is a layer's weight, and the rule that the recipe has for it gives "
                f"no distribution, so that it would be scaled after all. {self._way_out([unit.ref.name])}"
            )
        if id(task.ref) in self.unwritten:
            self._begin(task)
            if not direct:
                raise _Restart
            out = again()
        if not out.is_floating_point() or out.layout != torch.strided:
            raise NotImplementedError(
                f"{unit.name}: {name} puts out {out.dtype}, {out.layout}; only dense floats are fitted"
            )
        weight = self.weights.get(unit.key)
        if weight is None:
            weight = self.weights[unit.key] = _Weight(unit, task)
        elif weight.is_lookup and not unit.is_lookup:  # fitted as an embedding before the head tied to it was seen
            self._redraw(weight, 0)
            self.weights[unit.key] = _Weight(unit, task)
            raise _Restart
        weight.calls.append(Moments.of(out))
        if weight.before is None:
            weight.before = weight.calls[0].variance
        if weight.fitted:
            return out
        while True:
            self._refuse_constant(weight, weight.calls[-1], out)
            exponent = self._next(weight, weight.measured(weight.calls[-1]))
            if exponent == weight.exponent:
                break
            self._redraw(weight, exponent)
            if not direct:
                raise _Restart
            torch.clear_autocast_cache()  # of the weight before
            out = again()
            weight.calls[-1] = Moments.of(out)
        weight.fitted = True
        weight.tried.clear()
        return out

    def _next(self, weight: _Weight, variance: float) -> int:
        """The exponent to try next; refuses a weight whose scale does not matter.

        A bias may hide what a weight adds as long as that is small. So a factor that is to grow may leap.
        """
        last = weight.last
        weight.last = weight.exponent, variance
        if last is None or last[0] == weight.exponent:
            return weight.next_exponent(variance)
        octaves = (weight.exponent - last[0]) / STEPS
        if abs(math.log2(variance / last[1])) > 0.05 * abs(octaves):
            return weight.next_exponent(variance)
        if variance < 1.0 and octaves > 0 and weight.exponent < _LEAPS * _LEAP:
            weight.tried[weight.exponent] = variance
            return weight.exponent + _LEAP
        raise ValueError(
            f"{weight.told}: its output's variance is {weight.absolute(variance)} whatever the weight's scale is. "
            f"{self._way_out([weight.unit.ref.name])}"
        )

    def _refuse_constant(self, weight: _Weight, moments: Moments, out: Tensor) -> None:
        if not math.isfinite(moments.variance) or not math.isfinite(moments.mean):
            what = "is not finite"
        elif moments.variance <= (4 * torch.finfo(out.dtype).eps * moments.mean) ** 2:  # 0, or rounding errors
            what = f"is {moments.mean:.4g} everywhere"
        elif out.dim() in (2, 4, 5) and len(out) > 1 and not weight.unit.is_lookup and bool((out == out[:1]).all()):
            what = "is the same for every row"  # three dimensions may be those of learned queries, alike in every row
        else:
            return
        if weight.exponent and weight.last is not None:
            exponent, variance = weight.last
            other = 2.0 ** (exponent / STEPS)
            raise ValueError(
                f"{weight.told}: its output's variance is {weight.absolute(variance)} with a factor of {other:.4g} "
                f"on the weight, and with one of {weight.factor:.4g} the output {what}: "
                f"no factor brings it to {weight.absolute(1.0)}. "
                f"{self._way_out([weight.unit.ref.name])}"
            )
        raise ValueError(f"{weight.told}: its output {what} on this batch. {self._way_out([weight.unit.ref.name])}")

    def _redraw(self, weight: _Weight, exponent: int) -> None:
        """Draw a weight again with another factor."""
        weight.exponent, self._redrawn = exponent, True
        weight.draws += 1
        if weight.draws > _DRAWS:
            raise ValueError(
                f"{weight.told}: no factor brings its output's variance to 1; tried {_DRAWS}. "
                f"{self._way_out([weight.unit.ref.name])}"
            )
        self._write(weight.task._replace(spec=self._spec(weight.task)))

    def _spec(self, task: Task) -> FillSpec:
        assert task.spec is not None
        own = {w.unit.part: w.factor for w in self.weights.values() if w.task is task}
        return scaled_spec(task.spec, own) if own else task.spec

    def _adjust(self) -> bool:
        """Change the first weight whose uses together have another variance than 1; False where none is left."""
        for weight in self.weights.values():
            if not weight.calls:
                continue
            variance = weight.measured(Moments.pooled(weight.calls))
            if not math.isfinite(variance) or variance == 0.0:
                variance = 1e-30 if variance == 0.0 else 1e30
            exponent = weight.next_exponent(variance)
            if exponent == weight.exponent:
                continue
            for other in self.weights.values():
                if other is not weight:
                    other.tried.clear()
                    other.fitted &= len(other.calls) > 1  # the next pass fits the others where it meets them
            self._redraw(weight, exponent)
            return True
        return False

    def _check(self) -> None:
        """Raise where a weight was never used, or its output's variance is not near 1."""
        used = {id(ref) for ref in (unit.ref for unit in self.products.units.values())}
        missing = []
        for task in self.tasks.values():
            assert task.spec is not None
            if task.spec.fitted == "always" and id(task.ref) not in used and not self._is_kept(task):
                why = self._why_unused(task.ref)
                missing.append((task.ref.name, f"{task.ref.name} (in {task.ref.owner}): {why}"))
        for weight in self.weights.values():
            variance = weight.measured(Moments.pooled(weight.calls)) if weight.calls else math.nan
            if not LOW <= variance <= HIGH:
                nearest = f"the nearest variance of its output is {weight.absolute(variance)}"
                missing.append((weight.unit.ref.name, f"{weight.told}: {nearest}"))
        if missing:
            names = [name for name, _ in missing]
            raise ValueError(
                f"recipe 'lsuv' cannot fit {len(missing)} of {len(self.tasks)} weights to this batch, and nothing is "
                f"written:{listing([text for _, text in missing])}\n{self._way_out(names)}"
            )

    def _is_kept(self, task: Task) -> bool:
        """Whether it keeps its values: no code explains them, and it is no weight."""
        ref, seen = task.ref, self.products
        return id(ref) in self.unwritten and ref in seen.elementwise and ref not in seen.unknown

    def _why_unused(self, ref: TensorRef) -> str:
        if ref in self.products.recurrent:
            return "its gates are no sums of unit variance"
        if ref in self.products.unknown:
            return f"what {self.products.unknown[ref]} does, through which it meets a signal, is not known"
        if ref in self.products.elementwise:
            return f"it meets signals element by element only, in {self.products.elementwise[ref]}"
        return "no signal meets it on this batch"

    def _way_out(self, names: list[str]) -> str:
        shown = list(dict.fromkeys(names))[:_NAMED]
        rules = ", ".join(f'"{name}": {self.others.get(name, _TORCH)}' for name in shown)
        more = ", ..." if len(names) > _NAMED else ""
        told = " (the value or the deviation that it has now)" if any(name in self.others for name in shown) else ""
        return f'Give another rule to what is not to be fitted{told}: recipe={{{rules}{more}, "*": "lsuv"}}'

    def result(self) -> Plan:
        """The plan with the scaled distributions, and what was measured."""
        fits: dict[int, list[Fit]] = {}
        for weight in self.weights.values():
            after = Moments.pooled(weight.calls).variance
            assert weight.before is not None
            fits.setdefault(id(weight.task.ref.tensor), []).append(
                Fit(
                    *(weight.unit.part, weight.unit.op, weight.factor, weight.before, after),
                    *(len(weight.calls), weight.branches),
                )
            )
        tasks = list(self.plan.tasks)
        for place, task in enumerate(tasks):
            if (found := fits.get(id(task.ref.tensor))) is not None:
                spec = dataclasses.replace(self._spec(task), guess=False, fitted="")  # the pass has shown: a weight
                tasks[place] = task._replace(spec=spec, fits=tuple(found))
            elif self._is_kept(task):
                why = f"kept as it is: no weight, {self.products.elementwise[task.ref]} element by element"
                tasks[place] = task._replace(spec=None, kept=why)
            elif task.spec is not None and task.spec.fitted:
                tasks[place] = task._replace(spec=dataclasses.replace(task.spec, fitted=""))
        return dataclasses.replace(self.plan, tasks=tasks)


def _wants_fit(task: Task) -> bool:
    return task.spec is not None and bool(task.spec.fitted)


def _is_open(task: Task) -> bool:
    """Whether only a pass can tell if it is a weight: until then it keeps its values."""
    return task.spec is not None and task.spec.fitted in ("always", "never") and task.spec.guess


def fitted_plan(
    model: nn.Module,
    plan: Plan,
    batch: Any,
    forward: Forward | None,
    device: torch.device | None,
    write_all: Callable[[Plan], None],
    write: Callable[[Task], None],
) -> Plan:
    """The plan with the distributions that give each layer's output a variance of 1 on a batch.

    The model is filled and run, and then put back bit for bit: parameters, buffers, gradients, modes, attributes, and
    the random generators; so also where anything raises.

    Args:
        model: as it was given, in its wrappers.
        plan: with tasks that are to be fitted.
        batch, forward, device: as for init_model_.
        write_all: writes a whole plan; `write` one task of it.

    Raises:
        TypeError, ValueError, NotImplementedError: see init_model_.
    """
    if batch is None:
        raise ValueError(
            "recipe 'lsuv' is fitted to data: pass one real batch, init_model_(model, seed, recipe='lsuv', batch=batch)"
        )
    if forward is not None and not callable(forward):
        raise TypeError(f"forward is a {type(forward).__name__}; it must be a function of model and batch, or None")
    check_batch(batch)
    others = referenced_modules(forward) if forward is not None else []
    refuse_scripted(model, *others)
    _refuse(model, plan, batch, device)
    inner = unwrapped(model)
    tensors = [leaf.tensor for leaf in leaves(batch)]
    with ExitStack() as stack:
        stack.enter_context(speaking_of("recipe 'lsuv'"))
        mode = in_its_mode(inner)
        stack.enter_context(quiet())
        stack.enter_context(mode)
        stack.enter_context(ranks.without_collectives())
        snapshot = Snapshot([inner, *others], None, tensors, [batch, forward])
        stack.callback(snapshot.restore)
        kept = _deviations(plan)
        write_all(dataclasses.replace(plan, tasks=[task for task in plan.tasks if not _is_open(task)]))
        fitting = Fitting(inner, plan, batch, forward or call_model, write, kept)
        fitting.run()
        return fitting.result()


def _deviations(plan: Plan) -> dict[str, str]:
    """By name, a rule with the value or the deviation that is there, of what "torch" may have no distribution for."""
    wanted = [(task.ref, task.spec) for task in plan.tasks if _wants_fit(task)]
    return {
        ref.name: _as_it_is(ref.tensor)
        for ref, spec in wanted
        if spec is not None and (spec.guess or only_value(ref.tensor) is not None)
    }


def _as_it_is(tensor: Tensor) -> str:
    """A rule with the one value that a tensor has, or with its deviation."""
    value = only_value(tensor)
    return f"Constant({value})" if value is not None else f"Normal(0.0, {math.sqrt(Moments.of(tensor).variance):.3g})"


def _refuse(model: nn.Module, plan: Plan, batch: Any, device: torch.device | None) -> None:
    """Raise for models that cannot be run here, or whose weights cannot be scaled."""
    for leaf in leaves(batch):
        if is_dtensor(leaf.tensor):
            raise NotImplementedError(f"{leaf.code} is a DTensor; {_UNSHARDED}")
    for ref in [*(task.ref for task in plan.tasks), *plan.others]:
        if ref.kind == "dtensor":
            raise NotImplementedError(f"{ref.name} is a DTensor; {_UNSHARDED}")
        if ref.tensor.is_meta:
            raise ValueError(
                f"{ref.name} is on the meta device, and recipe 'lsuv' runs the model: give it memory first, "
                "model.to_empty(device='cpu')"
            )
    for name, module in model.named_modules():
        if isinstance(module, ranks.sharded_classes()):
            raise NotImplementedError(f"{name or 'the model'} is a {type(module).__name__}; {_UNSHARDED}")
        if "quantized" in type(module).__module__ and type(module).__module__.startswith("torch."):
            raise NotImplementedError(
                f"{name or 'the model'} is a quantised {type(module).__name__}, whose weight cannot be scaled; fit the "
                "model before it is quantised"
            )
    if device is not None:
        raise ValueError("recipe 'lsuv' runs the model where it lies: leave device= out, and move the model before")
    if not any(task.spec is not None and task.spec.fitted not in ("", "never") for task in plan.tasks):
        raise ValueError(f"recipe {plan.recipe!r} found no weight in the model that it could fit to the batch")
    for task in plan.tasks:
        if not _wants_fit(task):
            continue
        assert task.spec is not None
        if task.ref.tensor.numel() == 0:
            raise ValueError(
                f"{task.ref.name} has the shape {tuple(task.ref.tensor.shape)}: it has no elements to scale"
            )
        if task.ref.tensor.is_complex():
            raise NotImplementedError(f"{task.ref.name} is {task.ref.tensor.dtype}; recipe 'lsuv' fits real weights")


_UNSHARDED = (
    "recipe 'lsuv' runs the model on one rank. Fit one unsharded copy, with normal weights, report = "
    "init_model_(copy, seed, recipes.lsuv('lecun'), batch=batch), then fill the sharded model from the same "
    "distributions: init_model_(model, seed, recipe=report)"
)
_TORCH = '"torch"'
_NAMED = 8  # names in an example of a recipe
