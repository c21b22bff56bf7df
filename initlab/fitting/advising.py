"""advise(): runs a model on a batch, says which start each layer asks for, and tries the recipe before it is told.

`_Adviser` has one method for each pass and what follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from initlab.kernels import Constant, Distribution, Normal

from .._console import listing
from .._tree import tensors_in
from ..diagnosis import ranks
from ..diagnosis.batch import leaves
from ..diagnosis.names import is_loss, of_function
from ..diagnosis.probes import LossFn, quiet
from ..diagnosis.state import Snapshot, referenced_modules
from ..models.activations import Activation, activations_after
from ..models.fans import Fans, compute_fans
from ..models.fitted_recipes import lsuv
from ..models.initialization import init_model_
from ..models.naming import TensorRef, tensor_refs, unwrapped
from ..models.parametrized import made_weights
from ..models.recipe_parts import View, by_default, centred
from ..models.recipes import resolve
from ..models.refusals import only_value, with_globs
from ..models.specs import FillSpec, whole_fill
from .advice import Advice, InputAdvice, LayerAdvice
from .calling import call_model, check_batch, in_its_mode, refuse_scripted, speaking_of
from .moments import Moments
from .objectives import HEAD, Loss, Objective, is_close, objective
from .products import LOOKUPS, Key, Products, Unit

_FAR = 30.0  # a signal that has grown or shrunk so much with the schemes alone is fitted to the batch instead
_CLOSE = 0.03  # of the expected loss
_ROUNDS = 6
_NAMES_TOLD = 3
_LISTED = 16  # rules that are shown one by one
_REST = "he"


def advise(model: nn.Module, batch: Any, loss_fn: LossFn | None = None, *, seed: int = 0) -> Advice:
    """Say what each layer of a model has now, which start its activation and this data ask for, and what that does.

    The model is run on the batch as it is, and with the recipe, which is then taken back: what is printed as measured
    was measured. It runs without gradients and without dropout, in the mode that it is in. Afterwards everything is as
    it was, also where something raises: parameters, buffers, gradients, modes, attributes, and the random generators.

    Each weight gets the scheme of the activation that its output meets: He before ReLU's family, Xavier before tanh's
    and sigmoid's, LeCun before SELU and where there is none. The first weights are divided by the scale of the data
    that they read, and the last ones start small, so that the first loss is that of outputs that say nothing yet. Where
    the signal explodes or vanishes under these schemes all the same, the recipe's scales are fitted to the batch.

    Args:
        model: wrapped (DDP) or compiled ones run unwrapped and uncompiled.
        batch: one real batch: tensors, or arrays of numpy's, in tuples, lists, dicts and dataclasses.
        loss_fn: called with the model and the batch, returns the loss, one element, as for `diagnose`. None takes the
            `loss` that the model itself returns, as those of transformers do, or leaves the loss out.
        seed: of the recipe.

    Returns:
        An `Advice`, which prints as tables and a recipe; `.recipe` is for init_model_, `.code` the same to paste.

    Raises:
        TypeError: if an argument, or what loss_fn returns, is of the wrong kind.
        ValueError: if the batch says nothing: no rows that differ, or values that are not finite; for parameters on the
            meta device.
        NotImplementedError: for DTensors, FSDP, what communicates with other ranks, and what torch.jit has made.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
        >>> batch = 255 * torch.rand(64, 8), torch.randint(5, (64,))
        >>> advice = initlab.advise(model, batch, initlab.supervised(torch.nn.CrossEntropyLoss()))
        >>> [row.scheme for row in advice.layers]
        ['He, before ReLU, for data of scale 1...', 'LeCun, a head: small']
        >>> 0.9 < advice.predicted / advice.expected < 1.1
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn is a {type(loss_fn).__name__}; it must be a function of model and batch, or None")
    check_batch(batch)
    inner = unwrapped(model)
    others = referenced_modules(loss_fn) if loss_fn is not None else []
    refuse_scripted(model, *others)
    with speaking_of("advise"):
        ranks.refuse_sharded(model, others, (leaf.tensor for leaf in leaves(batch)))
    parameters, buffers = tensor_refs(inner)
    empty = [ref.name for ref in (*parameters, *buffers) if ref.tensor.is_meta or is_lazy(ref.tensor)]
    if empty:
        raise ValueError(
            f"these have no values, and the model has to run:{listing(empty)}\n"
            "Build it on a device (model.to_empty(device='cpu')), and run lazy modules once"
        )
    with ExitStack() as stack:
        stack.enter_context(speaking_of("advise"))
        mode = in_its_mode(inner)
        stack.enter_context(quiet())
        stack.enter_context(mode)
        stack.enter_context(ranks.without_collectives())
        snapshot = Snapshot([inner, *others], None, [leaf.tensor for leaf in leaves(batch)], [batch, loss_fn])
        stack.callback(snapshot.restore)
        return _Adviser(inner, batch, loss_fn, seed, parameters, snapshot).advice()


@dataclass
class _Seen:
    """What one pass showed.

    Args:
        loss: None where there is none.
        outputs, inputs: by unit, of all its uses.
    """

    loss: float | None
    outputs: dict[Key, Moments]
    inputs: dict[Key, Moments]


class _Observer(Products):
    """Measures what each weight reads and puts out, and notes the calls of loss functions.

    Args:
        quiet_heads: (key of a unit, whether it is looked up): number, by which its outputs are replaced.
    """

    def __init__(self, model: nn.Module, refs: list[TensorRef], quiet_heads: Mapping[tuple[Key, bool], float]) -> None:
        super().__init__(model, refs, self._measure)
        self.quiet_heads = quiet_heads
        self._as_lookup: set[Key] = set()
        self.outputs: dict[Key, list[Moments]] = {}
        self.inputs: dict[Key, list[Moments]] = {}
        self.losses: list[Loss] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = of_function(func)
        if is_loss(name):
            self.losses.append(Loss(name, list(tensors_in((args, kwargs or {}), 3))))
        return super().__torch_function__(func, types, args, kwargs)

    def _measure(
        self, unit: Unit, name: str, signal: Tensor | None, out: Tensor, again: Callable[[], Tensor], direct: bool
    ) -> Tensor:
        if name in LOOKUPS and not unit.is_lookup:
            return out
        if name not in LOOKUPS and unit.key in self._as_lookup:  # the head that is tied to an embedding
            self._as_lookup.discard(unit.key)
            self.outputs.pop(unit.key, None)
        elif name in LOOKUPS:
            self._as_lookup.add(unit.key)
        if out.numel() and out.is_floating_point():
            self.outputs.setdefault(unit.key, []).append(Moments.of(out))
            if signal is not None and signal.is_floating_point():
                self.inputs.setdefault(unit.key, []).append(Moments.of(signal))
        number = self.quiet_heads.get((unit.key, name in LOOKUPS))
        return out if number is None else torch.full_like(out, number)


class _Adviser:
    """The passes behind one advice."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: LossFn | None,
        seed: int,
        refs: list[TensorRef],
        snapshot: Snapshot,
    ) -> None:
        self.model, self.batch, self.loss_fn, self.seed = model, batch, loss_fn, seed
        self.refs, self.snapshot = refs, snapshot
        self.static = activations_after(model)
        self.notes: list[str] = []

    def run(self, quiet_heads: Mapping[tuple[Key, bool], float] | None = None) -> tuple[_Seen, _Observer]:
        """One pass."""
        observer = _Observer(self.model, self.refs, quiet_heads or {})
        self.snapshot.random.restore()
        with torch.no_grad(), observer:
            value = self._loss()
        pooled = [{key: Moments.pooled(parts) for key, parts in d.items()} for d in (observer.outputs, observer.inputs)]
        return _Seen(None if value is None else float(value), *pooled), observer

    def _loss(self) -> Tensor | None:
        if self.loss_fn is None:
            out = call_model(self.model, self.batch)
            loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
            return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
        loss = self.loss_fn(self.model, self.batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TypeError(f"loss_fn returned {what}; it must return the loss, a tensor with one element")
        return loss

    def advice(self) -> Advice:
        """The passes, and what they tell."""
        now, observer = self.run()
        units = [unit for unit in observer.units.values() if unit.key in now.outputs]
        if not units:
            raise ValueError("no weight of the model meets a signal on this batch: there is nothing to advise on")
        heads = [unit for unit in units if observer.is_head(unit)] if now.loss is not None else []
        quiet = {(unit.key, unit.is_lookup): 0.0 for unit in heads}
        expected, goal = None, Objective()
        size = HEAD
        biases: dict[str, Distribution] = {}
        if now.loss is not None:
            bias = _bias_of(heads[0]) if len(heads) == 1 else None
            name = next((ref.name for ref in self.refs if ref.tensor is bias), None)
            goal = objective(observer.losses, None if bias is None or name is None else bias)
            if goal.bias is not None and name is not None:
                biases[name] = Constant(goal.bias)
                quiet[heads[0].key, heads[0].is_lookup] = goal.bias
            size = goal.size
            self.notes += goal.notes
            self.snapshot.restore()
            expected = self.run(quiet)[0].loss
            if expected is None or not math.isfinite(expected):
                expected, heads = None, []
                self.notes.append("outputs of 0 have no finite loss, so the last weights start as the others")
        self.snapshot.restore()
        stds = {unit.ref.tensor: _std(unit.ref.tensor) for unit in units}
        recipe, schemes = self._recipe(units, heads, now, biases, observer.recurrent)
        if observer.recurrent:
            self.notes.append("recurrent weights keep torch's own start")
        by_function: dict[str, list[str]] = {}
        for ref, function in observer.unknown.items():
            by_function.setdefault(function, []).append(ref.name)
        for function, names in by_function.items():
            self.notes.append(
                f"what {function} makes of {_few(names)} is not known: no activation after it is seen for the weights "
                "before it, and what it multiplies gets no scheme"
            )
        seen = self._tried(recipe)
        if self._strays(seen, units, heads):
            self.notes.append(
                "with the schemes alone the signal would grow or shrink by more than a factor of "
                f"{_FAR:g} between layers: the scales are fitted to this batch, layer by layer"
            )
            recipe = self._fitted(recipe, units)
            seen = self._tried(recipe)
        if expected is not None:  # what does not pass through the last weights is that of the recipe too
            expected = self._tried(recipe, quiet).loss
        seen = self._quietened(recipe, heads, size, seen, expected)
        rows = [self._row(unit, unit in heads, now, seen, recipe, schemes, stds) for unit in units]
        inputs = self._inputs(self._made_up(observer, schemes))
        if expected is not None and seen.loss is not None and not is_close(seen.loss, expected, 0.1):
            self.notes.append(
                f"which first loss to expect is not known: it is {expected:.4g} for outputs of 0, and the recipe's "
                f"{seen.loss:.4g} does not come near it, since no factor on the last weights makes the outputs small: "
                "a norm, a temperature or weight_norm has the last word"
            )
            expected = None
        code, short = self._code(recipe, schemes)
        why = "" if expected is None else goal.told(expected)
        return Advice(
            tuple(rows), inputs, now.loss, expected, why, seen.loss, short, code, tuple(self.notes), self.seed
        )

    def _quietened(
        self, recipe: dict[str, Any], heads: list[Unit], size: float, seen: _Seen, expected: float | None
    ) -> _Seen:
        """Make the last weights so small that the first loss is the expected one; what a pass shows then."""
        for _ in range(_ROUNDS if heads else 0):
            for unit in heads:
                out, own = seen.outputs.get(unit.key), recipe.get(unit.ref.name)
                if out is not None and own is not None and out.variance > 0.0 and math.isfinite(out.variance):
                    recipe[unit.ref.name] = Normal(0.0, own.stddev * size / math.sqrt(out.variance))
            seen = self._tried(recipe)
            if expected is None or seen.loss is None or is_close(seen.loss, expected, _CLOSE):
                break
            size /= 4
        return seen

    def _scheme(self, unit: Unit, head: bool, now: _Seen) -> tuple[FillSpec | None, str]:
        """The start of a weight, and what it is called."""
        if unit.is_lookup:
            return (whole_fill(Normal(0.0, 1.0), ""), "a head: small") if head else (None, "rows that are looked up")
        ref = unit.ref
        fans = compute_fans(ref.module, ref.attribute, ref.tensor, ref.module_name)
        if fans is None:
            fan_in = unit.fan_in or ref.tensor.numel() / max(1, ref.tensor.shape[0])
            fans = Fans(fan_in, ref.tensor.numel() / max(1, fan_in))
        known = self.static.get((id(ref.module), ref.attribute))
        if unit.start is not None:
            known = Activation(unit.activation, unit.start)
        elif unit.inner and known is not None and not known.certain:
            known = None  # a guess from the source or the order of modules, and the pass shows none
        data = (
            math.hypot(now.inputs[unit.key].mean, math.sqrt(now.inputs[unit.key].variance))
            if (unit.reads_data and unit.key in now.inputs)
            else 1.0
        )
        scale = 1.0 if 0.5 <= data <= 2.0 or not math.isfinite(data) or data == 0.0 else data
        told = [] if scale == 1.0 else [f"for data of scale {scale:.3g}"]
        if head or known is None:
            spec = centred("normal", 1.0 / scale, fans.fan_in, "")
            return spec, ", ".join(["LeCun, a head: small" if head else "LeCun, before no activation", *told])
        start = known.start
        fan = (fans.fan_in + fans.fan_out) / 2 if start.recipe == "xavier" else fans.fan_in
        spec = centred("uniform" if start.recipe == "xavier" else "normal", start.gain / scale, fan, "")
        scheme = {"he": "He", "xavier": "Xavier", "lecun": "LeCun"}[start.recipe]
        return spec, ", ".join([f"{scheme}, before {_proper(known.name)}", *told])

    def _recipe(
        self,
        units: list[Unit],
        heads: list[Unit],
        now: _Seen,
        biases: Mapping[str, Distribution],
        recurrent: set[TensorRef],
    ) -> tuple[dict[str, Any], dict[Key, str]]:
        """Distributions by name, and the scheme of each unit."""
        recipe: dict[str, Any] = {}
        schemes: dict[Key, str] = {}
        with made_weights(self.model, lambda name: name) as weights:
            parts = {id(getattr(owner, attribute)) for weight in weights for owner, attribute in weight.parts}
        for unit in units:
            spec, schemes[unit.key] = self._scheme(unit, unit in heads, now)
            if id(unit.ref.tensor) in parts:
                schemes[unit.key] = "parts of a weight, by the rest of the recipe"
            elif spec is not None and unit.ref.name not in recipe:
                recipe[unit.ref.name] = spec.distribution
        recipe |= biases
        view = View(self.model, self.refs, False)
        choose = resolve(_REST)(view)
        for ref in self.refs:
            if ref in recurrent and (own := by_default(view, ref)) is not None and ref.name not in recipe:
                recipe[ref.name] = own.distribution
            if ref.name in recipe or id(ref.tensor) in parts or isinstance(choose(ref), FillSpec):
                continue
            value = only_value(ref.tensor)
            recipe[ref.name] = Normal(0.0, _std(ref.tensor)) if value is None else Constant(float(value))
        return recipe, schemes

    def _tried(self, recipe: Mapping[str, Any], quiet: Mapping[tuple[Key, bool], float] | None = None) -> _Seen:
        """What a pass shows with a recipe; `quiet` as for run."""
        self.snapshot.restore()
        init_model_(self.model, self.seed, {**recipe, "*": _REST}, progress=False)
        try:
            return self.run(quiet)[0]
        finally:
            self.snapshot.restore()

    def _strays(self, seen: _Seen, units: list[Unit], heads: list[Unit]) -> bool:
        """Whether the signal leaves the range in which a run can start."""
        sizes = [seen.outputs[u.key].variance for u in units if u.key in seen.outputs and u not in heads]
        return any(not 1 / _FAR**2 <= size <= _FAR**2 for size in sizes)

    def _fitted(self, recipe: Mapping[str, Any], units: list[Unit]) -> dict[str, Any]:
        """The recipe with the scales that give each layer's output a variance of 1."""
        rules = {**recipe, "*": _REST}
        own = {unit.ref.name for unit in units}
        try:
            report = init_model_(
                self.model,
                self.seed,
                lsuv(rules),
                batch=self.batch,
                forward=(lambda model, batch: self._loss()),
                progress=False,
            )
        except (NotImplementedError, ValueError) as error:
            self.notes.append(f"the scales could not be fitted: {str(error).splitlines()[0]}")
            return dict(recipe)
        finally:
            self.snapshot.restore()
        made = dict(recipe)
        for row in report.rows:
            if row.name in own and row.name in made and row.fits:
                factor = math.exp(sum(math.log(fit.factor) for fit in row.fits) / len(row.fits))
                std = made[row.name].stddev * factor
                made[row.name] = Normal(0.0, std) if row.slices else row.distribution or Normal(0.0, std)
        return made

    def _row(
        self,
        unit: Unit,
        head: bool,
        now: _Seen,
        seen: _Seen,
        recipe: Mapping[str, Any],
        schemes: Mapping[Key, str],
        stds: Mapping[Tensor, float],
    ) -> LayerAdvice:
        ref, key = unit.ref, unit.key
        distribution = recipe.get(ref.name)
        wanted = None if distribution is None else distribution.stddev
        fans = compute_fans(ref.module, ref.attribute, ref.tensor, ref.module_name)
        fan_in = None if unit.is_lookup else fans.fan_in if fans is not None else unit.fan_in
        reads = now.inputs.get(key)
        then = seen.inputs.get(key)
        expected = _rms(then) * wanted * math.sqrt(fan_in) if then and wanted is not None and fan_in else None
        out, after = now.outputs[key], seen.outputs.get(key)
        return LayerAdvice(
            unit.name,
            unit.op,
            tuple(ref.tensor.shape),
            fan_in,
            unit.activation,
            schemes[key],
            head,
            unit.reads_data,
            None if reads is None else _rms(reads),
            stds[ref.tensor],
            math.sqrt(out.variance),
            wanted,
            expected,
            None if after is None else math.sqrt(after.variance),
            distribution,
        )

    def _made_up(self, observer: _Observer, schemes: Mapping[Key, str]) -> bool:
        """Whether every weight that reads the data is divided by their scale."""
        reads = [u for u in observer.units.values() if u.reads_data and not u.is_lookup]
        known = not observer.recurrent and not observer.unknown
        return known and bool(reads) and all("for data of scale" in schemes.get(unit.key, "") for unit in reads)

    def _inputs(self, made_up: bool) -> tuple[InputAdvice, ...]:
        found = []
        for leaf in leaves(self.batch):
            x = leaf.tensor
            if leaf.is_target or not x.numel() or not x.is_floating_point():
                continue
            moments = Moments.of(x)
            row = InputAdvice(leaf.code, moments.mean, math.sqrt(moments.variance), float(x.min()), float(x.max()))
            found.append(row)
            if row.unscaled:
                self.notes.append(
                    f"data: {row.code} has mean {row.mean:.4g} and standard deviation {row.std:.4g}, "
                    f"from {row.low:.4g} to {row.high:.4g}: bring each feature to mean 0 and standard deviation 1, "
                    "and ask again"
                )
        if made_up and any(row.unscaled for row in found):
            self.notes.append("the recipe makes up for the scale of the data, and not for the mean")
        return tuple(found)

    def _code(self, recipe: Mapping[str, Any], schemes: Mapping[Key, str]) -> tuple[str, dict[str, Any]]:
        """A recipe as code to paste, and the same as a mapping, with globs for what repeats."""
        every = [name for ref in self.refs for name in ref.names]
        kept = {name: repr(distribution) for name, distribution in recipe.items()}
        short = with_globs(kept, every) if len(kept) > _LISTED else kept
        values = {repr(distribution): distribution for distribution in recipe.values()}
        told: dict[str, str] = {}
        for ref in self.refs:
            own = [text for (tensor, _), text in schemes.items() if tensor == id(ref.tensor)]
            if own:
                told[ref.name] = own[0]
        kinds = sorted({type(distribution).__name__ for distribution in recipe.values()})
        lines = ["import initlab", f"from initlab.kernels import {', '.join(kinds)}", "", "recipe = {"]
        for pattern, rule in short.items():
            under = dict.fromkeys(told[name] for name in told if name not in short and kept.get(name) == rule)
            comment = told.get(pattern, "; ".join(under))
            lines.append(f"    {pattern!r}: {rule}," + (f"  # {comment}" if comment else ""))
        lines += [f"    '*': {_REST!r},", "}", f"initlab.init_model_(model, seed={self.seed}, recipe=recipe)"]
        return "\n".join(lines), {**{p: values[r] for p, r in short.items()}, "*": _REST}


def _bias_of(unit: Unit) -> Tensor | None:
    """The bias that is added to what a unit puts out, where its module has one."""
    bias = unit.ref.module._parameters.get("bias")
    return bias if unit.ref.attribute == "weight" and bias is not None and bias.dim() == 1 else None


def _few(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_TOLD]) + (
        f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
    )


def _rms(moments: Moments) -> float:
    return math.hypot(moments.mean, math.sqrt(moments.variance))


def _std(tensor: Tensor) -> float:
    return math.sqrt(Moments.of(tensor).variance) if tensor.numel() else 0.0


_NAMES = {"relu": "ReLU", "gelu": "GELU", "silu": "SiLU", "selu": "SELU", "elu": "ELU", "leaky_relu": "LeakyReLU"}


def _proper(name: str) -> str:
    """The name of an activation as its class is called, where it was met as a function."""
    return _NAMES.get(name, name)
