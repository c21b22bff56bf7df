"""What init_model_ is about to do, worked out and checked before anything is written."""

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from initlab.kernels import Constant, Distribution, Draw, content_sum, fill_, named_key
from initlab.kernels.torch_internals import FakeTensor

from .._console import listing, warn
from ..distributed.agreement import check_agreement
from ..distributed.fsdp import refuse_hidden_shards
from ..distributed.shards import LocalShard, local_shards
from .memory import shared_memory
from .naming import Names, TensorRef, renaming, tensor_refs
from .parametrized import MadeWeight, made_weights
from .patterns import compile_pattern
from .recipe_parts import Chooser, RecipeLike, View, head_std, is_head, keep_padding, short_repr
from .refusals import ways_out
from .report import Fit, InitReport, Row, report_of
from .rerunning import start_mismatch
from .resolving import resolve
from .specs import DimSlice, FillSpec, Refused
from .values import Values, given_values

Only: TypeAlias = str | Sequence[str] | Callable[[str, Tensor], bool]


class Task(NamedTuple):
    """One tensor to fill.

    Args:
        ref: the tensor, and its places in the model.
        spec: what to fill it with; None for a buffer on the meta device that only its owner's code can set.
        key: of its draws.
        shards: of a DTensor, what this rank holds of it; None for any other tensor.
        value: what the caller gave it by `values=`; None for all else.
        fits: how it was scaled to a batch; empty where it was not.
    """

    ref: TensorRef
    spec: FillSpec | None
    key: int
    shards: list[LocalShard] | None
    value: Tensor | None = None
    fits: tuple[Fit, ...] = ()

    @property
    def numel(self) -> int:
        """Elements that this rank holds."""
        return self.ref.tensor.numel() if self.shards is None else sum(s.tensor.numel() for s in self.shards)

    def row(self) -> Row:
        """What the report says of it."""
        ref, spec = self.ref, self.spec
        aliases = tuple(name for name in ref.names if name != ref.name) if len(ref.names) > 1 else ()
        shape, dtype = tuple(ref.tensor.shape), ref.tensor.dtype
        if self.value is not None:
            return Row(ref.name, aliases, shape, dtype, None, why="values=", source="given")
        if spec is None:
            return Row(ref.name, aliases, shape, dtype, None, why=ref.owner)
        if spec.distribution is None:
            return Row(ref.name, aliases, shape, dtype, None, why=spec.why, guess=spec.guess, source="computed")
        (part, first), *others = spec.fills
        slices: tuple[tuple[DimSlice, Distribution], ...] = ()
        drawn = not isinstance(first, Constant)
        if others or part is not None:  # rare: a comprehension for each parameter would cost as much as its key
            slices = tuple((part, distribution) for part, distribution in spec.fills if part is not None)
            drawn = drawn or any(not isinstance(distribution, Constant) for _, distribution in others)
        key = self.key if drawn else None
        row = Row(ref.name, aliases, shape, dtype, first, slices, spec.fan, first.stddev, key, spec.why, spec.guess)
        if spec.orthogonal:
            row = row._replace(distribution=None, source="orthogonal")
        return row._replace(fits=self.fits) if self.fits else row


@dataclass
class Plan:
    """What is about to be done to a model.

    Attributes:
        tasks: the parameters and buffers to fill, in the order of the model.
        others: those that are not filled.
        sources: by name, the parameters from whose starts others are computed, also where they are not filled.
    """

    model: nn.Module
    seed: int
    recipe: str
    names: Names | None
    tasks: list[Task]
    others: list[TensorRef]
    sources: dict[str, Task]

    def refuse_meta(self, target: torch.device | None) -> None:
        """Raise where something to fill is on the meta device, and no device is given to which it could go."""
        if target is not None:
            return
        on_meta = [task.ref.name for task in self.tasks if task.ref.tensor.is_meta]
        if on_meta:
            raise ValueError(
                f"{_first_and_count(on_meta)} on the meta device: say where the model is to lie, device='cpu' or 'cuda'"
            )

    def compare_ranks(self) -> None:
        """Raise where ranks are about to fill DTensors differently."""
        messages = ((t.ref.tensor, t.ref.name, f"{t.key:x} {_told(t)}") for t in self.tasks if t.shards is not None)
        check_agreement(
            messages, "the fills of parameters", "Give init_model_ one seed, recipe and names= on every rank"
        )

    def report(self) -> InitReport:
        """The report on it."""
        return report_of(self.model, self.names, self.seed, self.recipe, [task.row() for task in self.tasks])


def _told(task: Task) -> str:
    """What a task fills with, as ranks compare it."""
    if task.value is not None:
        return f"{content_sum(task.value):x}"
    return "" if task.spec is None else f"{task.spec.fills} {task.spec.program}"


def make_plan(
    model: nn.Module,
    seed: int,
    recipe: RecipeLike,
    only: Only | None,
    names: Names | None,
    values: Values | None = None,
) -> Plan:
    """The plan for a model; arguments and errors as for init_model_."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {short_repr(model)}; it must be a torch.nn.Module")
    seed = _checked_seed(seed)
    resolved = resolve(recipe)
    refuse_hidden_shards(model)
    parameters, buffers = tensor_refs(model, names)
    selected = _selected(only, [*parameters, *buffers])
    shards = {ref: _checked_shards(ref) for ref in parameters if ref in selected}
    _refuse_shared_memory(list(shards))
    given = given_values(values, parameters, shards.keys())
    named = {(id(owner), attribute): ref for ref in (*parameters, *buffers) for owner, attribute in ref.places}
    with made_weights(model, renaming(names)) as weights:
        wholes = {id(named[id(o), a].tensor): w.ref for w in weights for o, a in w.parts if (id(o), a) in named}
        view = View(model, [*parameters, *(weight.ref for weight in weights)], names is not None, wholes)
        spec_of = resolved(view)
        buffer_spec_of = resolved.for_buffers(view)
        if weights:
            spec_of, buffer_spec_of = _with_made_weights(
                weights, view, named, resolved.asks_parts, spec_of, buffer_spec_of
            )
        tasks, missing, refused, others = [], [], [], []
        checked: dict[tuple[Any, torch.dtype], str] = {}
        for ref in parameters:
            if ref not in shards:
                others.append(ref)
                continue
            if ref in given:
                tasks.append(Task(ref, None, 0, shards[ref], given[ref]))
                continue
            spec = spec_of(ref)
            if spec is None or isinstance(spec, Refused):
                missing.append(f"{ref.name} (in {ref.owner}): {spec.why if spec else view.unreadable(ref)}")
                refused.append(ref)
                continue
            spec = keep_padding(ref, spec)
            if spec.orthogonal and shards[ref] is not None:
                missing.append(
                    f"{ref.name} (in {ref.owner}): an orthogonal start needs the whole matrix on each rank; fit an "
                    "unsharded copy by recipes.lsuv('lecun'), and pass its report as recipe="
                )
                refused.append(ref)
            for _, distribution in spec.fills:
                fault = checked.get((distribution, ref.tensor.dtype))
                if fault is None:
                    fault = checked[distribution, ref.tensor.dtype] = _fault(distribution, ref.tensor.dtype)
                if fault:
                    missing.append(f"{ref.name} (in {ref.owner}): {fault}")
                    refused.append(ref)
                    break
            tasks.append(Task(ref, spec, named_key(seed, spec.copy_of or ref.name), shards[ref]))
        sources = _sources(tasks, parameters, given, spec_of, seed, missing)
        if resolved.name == "torch":
            _warn_of_large_heads(tasks)
        if missing:
            raise ValueError(
                f"recipe {resolved.name!r} cannot fill {len(missing)} of {len(parameters)} parameters, and nothing is "
                f"written unless all that are selected can be filled:{listing(missing)}\n"
                f"{ways_out(refused, parameters, resolved)}"
            )
        for ref in buffers:
            found = buffer_spec_of(ref) if ref in selected else None
            if found is not None or (ref in selected and ref.tensor.is_meta):
                tasks.append(Task(ref, found, named_key(seed, ref.name), _checked_shards(ref)))
            else:
                others.append(ref)
        sources |= _sources(
            (task for task in tasks if not task.ref.is_parameter), parameters, given, spec_of, seed, missing
        )
        if missing:
            raise ValueError(
                f"recipe {resolved.name!r} cannot set all buffers:{listing(missing)}\nGive them with buffers="
            )
    return Plan(model, seed, resolved.name, names, tasks, others, sources)


def _with_made_weights(
    weights: Sequence[MadeWeight],
    view: View,
    named: Mapping[tuple[int, str], TensorRef],
    asks_parts: bool,
    spec_of: Chooser,
    buffer_spec_of: Callable[[TensorRef], FillSpec | None],
) -> tuple[Chooser, Callable[[TensorRef], FillSpec | None]]:
    """As a recipe chooses; but for what makes up a weight, by what it chooses for the weight."""
    of_part = {
        id(named[id(owner), attribute].tensor): weight
        for weight in weights
        for owner, attribute in weight.parts
        if (id(owner), attribute) in named
    }
    known: dict[int, Mapping[TensorRef, FillSpec | str]] = {}

    def derived(ref: TensorRef) -> FillSpec | Refused | None:
        weight = of_part[id(ref.tensor)]
        if id(weight) not in known:
            spec = spec_of(weight.ref)
            if not isinstance(spec, FillSpec):
                why = spec.why if spec is not None else view.unreadable(weight.ref)
                known[id(weight)] = dict.fromkeys(
                    (ref for ref in named.values() if of_part.get(id(ref.tensor)) is weight), why
                )
            else:
                known[id(weight)] = weight.specs(keep_padding(weight.ref, spec), named)
        found = known[id(weight)].get(ref)
        if (
            isinstance(found, FillSpec)
            and found.check
            and (differs := start_mismatch(ref, found, view.refs)) is not None
        ):
            return Refused(differs)
        return Refused(found) if isinstance(found, str) else found

    def choose(ref: TensorRef) -> FillSpec | Refused | None:
        if id(ref.tensor) not in of_part:
            return spec_of(ref)
        explicit = spec_of(ref) if asks_parts else None
        return derived(ref) if explicit is None else explicit

    def choose_buffer(ref: TensorRef) -> FillSpec | None:
        found = buffer_spec_of(ref)
        if found is not None or id(ref.tensor) not in of_part:
            return found
        made = derived(ref)
        return made if isinstance(made, FillSpec) else None

    return choose, choose_buffer


def _sources(
    tasks: Iterable[Task],
    parameters: Iterable[TensorRef],
    given: Mapping[TensorRef, Tensor],
    spec_of: Chooser,
    seed: int,
    missing: list[str],
) -> dict[str, Task]:
    """By name: the parameters from whose starts others are computed; what lacks one is added to the missing."""
    found: dict[str, Task] = {}
    by_name: dict[str, TensorRef] = {}
    waiting = [(task.ref, task.spec) for task in tasks if task.spec is not None and task.spec.program is not None]
    if waiting:
        by_name = {name: ref for ref in parameters for name in ref.names}
    while waiting:
        of, spec = waiting.pop()
        assert spec.program is not None
        for recorded in sorted(spec.program.parameters):
            name = spec.known_as.get(recorded, recorded)
            if name in found:
                continue
            ref = by_name.get(name)
            source = None if ref is None or ref in given else spec_of(ref)
            if ref is None or (ref not in given and not isinstance(source, FillSpec)):
                missing.append(
                    f"{of.name} (in {of.owner}): it is computed from the start of {name}, which has none here"
                )
                continue
            if isinstance(source, FillSpec):
                source = keep_padding(ref, source)
                found[name] = Task(ref, source, named_key(seed, source.copy_of or ref.name), None)
                waiting += [(ref, source)] if source.program is not None else []
            else:
                found[name] = Task(ref, None, 0, None, given[ref])
    return found


def _warn_of_large_heads(tasks: Sequence[Task]) -> None:
    """torch starts an embedding by N(0, 1), which is no start for the linear layer that it may be tied to."""
    for task in tasks:
        drawn = None if task.spec is None else task.spec.distribution
        if drawn is not None and is_head(task.ref) and drawn.stddev > 2 * head_std(task.ref):
            width = task.ref.tensor.shape[-1]
            std = drawn.stddev
            warn(
                f"recipe 'torch' gives {task.ref.name} a standard deviation of {std:.3g}, and it is the head as well "
                f"as the embedding: logits of up to {width * std:.0f} at the first step. Pass recipe='own' for the "
                "model's own start, or any other recipe"
            )


def _checked_seed(seed: Any) -> int:
    """The seed as an int. Integers of numpy and 0-d integer tensors are seeds too."""
    try:
        return operator.index(seed)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor without values, on meta for instance
        raise TypeError(
            f"seed is {seed!r} ({type(seed).__name__}); it must be an integer, -2**63 <= seed < 2**64: "
            "init_model_(model, seed=0)"
        ) from None


def _selected(only: Only | None, every: list[TensorRef]) -> set[TensorRef]:
    if only is None:
        return set(every)
    if callable(only) and not isinstance(only, nn.Module):
        return {ref for ref in every if any(only(name, ref.tensor) for name in ref.names)}
    if isinstance(only, bytes | Tensor | nn.Module) or not isinstance(only, Iterable):
        raise TypeError(f"only is {short_repr(only)}; {_ONLY}")
    patterns = [only] if isinstance(only, str) else list(only)
    names = [name for ref in every for name in ref.names]
    chosen: set[TensorRef] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"only holds {short_repr(pattern)}; {_ONLY}")
        fits = compile_pattern(pattern, names)
        found = {ref for ref in every if any(map(fits, ref.names))}
        if not found:
            near = difflib.get_close_matches(pattern, names, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"only: nothing in the model is called {pattern!r}{hint}")
        chosen |= found
    return chosen


_ONLY = (
    "it must be a name pattern ('encoder', '*.bias'), several of them, or a function of name and tensor; None selects "
    "everything"
)


def _checked_shards(ref: TensorRef) -> list[LocalShard] | None:
    """Of a DTensor what this rank holds of it, None of any other tensor; an error for what cannot be filled at all."""
    if hasattr(ref.tensor, "ds_id") and ref.tensor.numel() == 0:
        raise NotImplementedError(
            f"{ref.name} is partitioned by DeepSpeed's ZeRO-3, and holds no element here; fill the model before "
            "deepspeed.initialize, without deepspeed.zero.Init, or inside deepspeed.zero.GatheredParameters"
        )
    if ref.kind == "plain":
        return None
    if ref.kind == "lazy":
        raise ValueError(
            f"{ref.name} has no shape yet, as a lazy module's parameters do; run a batch through the model first"
        )
    shards = None
    if ref.kind == "dtensor":
        try:
            shards = local_shards(ref.tensor)
        except (NotImplementedError, RuntimeError) as error:
            raise type(error)(f"{ref.name}: {error}") from None
    cls = type(ref.tensor if shards is None else shards[0].tensor)
    if cls.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not issubclass(cls, FakeTensor):
        raise NotImplementedError(
            f"{ref.name} is a {cls.__name__}, a wrapper around other tensors; fill the model before it is wrapped"
        )
    return shards


def _refuse_shared_memory(parameters: list[TensorRef]) -> None:
    pairs = [f"{a} and {b}" for a, b in shared_memory(parameters)]
    if pairs:
        raise ValueError(
            f"different parameters share memory, and would be filled twice:{listing(pairs)}\n"
            "Tie them by making them one Parameter, or leave one out with only="
        )


def _fault(distribution: Any, dtype: torch.dtype) -> str:
    """Why a dtype cannot be filled from a distribution; empty if it can."""
    try:
        fill_([Draw(torch.empty(0, dtype=dtype, device="meta"), distribution)])
    except (NotImplementedError, RuntimeError, TypeError) as error:
        return str(error)
    return ""


def _first_and_count(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
