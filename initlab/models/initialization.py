"""init_model_: a whole model filled by name. Plan, materialise, fill, report."""

import difflib
import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.parameter import is_lazy

from initlab.kernels import Constant, Draw, eagerly, fill_, named_key

from .. import _console
from .._console import listing
from ..distributed.agreement import check_agreement
from ..distributed.dtensors import count_as_written, is_dtensor, local
from ..distributed.fsdp import refuse_hidden_shards, reshard
from ..distributed.shards import draws as draws_of
from ..distributed.shards import local_shards
from .layers import FillSpec, reset_function
from .naming import Names, TensorRef, class_name, matches, shared_memory, tensor_refs
from .recipes import RecipeLike, View, keep_padding, resolve
from .recording import kept_generators, owners_of_init_weights, stand_ins
from .report import InitReport, Row, distribution_std, report_of
from .swapping import swap

Only: TypeAlias = str | Sequence[str] | Callable[[str, Tensor], bool]
Buffers: TypeAlias = Callable[[str, Tensor], Tensor | float | None]

_LONG = 1 << 28  # elements: a second or more on a CPU, long enough for a progress bar to be welcome


def init_model_(
    model: nn.Module,
    seed: int,
    recipe: RecipeLike = "torch",
    *,
    device: torch.device | str | int | None = None,
    only: Only | None = None,
    names: Names | None = None,
    buffers: Buffers | None = None,
    progress: bool | None = None,
    check_ranks: bool = False,
) -> InitReport:
    """Fill a model's parameters from the stream, each keyed by its name: the same bits however the model came about.

    Neither the order of construction, nor the device, the number of threads, wrappers (DDP, FSDP, torch.compile,
    activation checkpointing) nor what else is filled changes a parameter's values. No generator is touched.

    Of a DTensor (FSDP2, HSDP, tensor and expert parallelism) each rank fills what it holds, its part of the values of
    the whole; nothing is communicated, and no rank ever holds a whole tensor, from the meta device neither. A DTensor
    that gets memory stays the same object, with a warning where torch does not allow it.

    Args:
        model: filled in place, outside autograd. Parameters on the meta device become new parameters on `device`, with
            the old ones' attributes; they never lie anywhere else. A tied weight is filled once, keyed by the byte-wise
            smallest of its names, with the distribution of its first owner.
        seed: -2**63 <= seed < 2**64.
        recipe: which distribution each parameter gets: "torch", "own", "he", "xavier", "lecun", "gpt2", "trunc_normal", "auto",
            a recipe made by initlab.recipes, a distribution, a function from TensorRef to distribution, or a mapping from name patterns to
            any of these, the first match counting and "torch" serving the rest. The padding row of an embedding stays
            0 under all of them. Buffers with a distribution in reset_parameters, such as running statistics, are set too.
        device: where the model is to lie afterwards; needed for parameters on the meta device. What is not filled is
            moved there with its values, unless it is on the meta device and not selected. None leaves all where it is.
        only: what to fill: a name pattern (a glob, or the name of a module, which selects all within it), several of
            them, or a function of name and tensor; `initlab.not_loaded`, for example. It applies to buffers too.
        names: maps a name within `model`, a pipeline stage say, to the name in the whole model: a prefix or a function.
            Patterns, distributions and keys go by the mapped names.
        buffers: called with the name and the tensor of each selected buffer on the meta device, in the context of
            `device`; returns its value, or None. A buffer for which it has none is set by its owner's
            `_init_buffers()`, its reset_parameters, or the `_init_weights(owner)` of a module above it, with
            parameters out of reach and random numbers fixed by `seed`.
        progress: whether to show a progress bar on stderr; None shows one for 2**28 elements and more in a terminal.
        check_ranks: compare, before anything is written, what ranks are about to fill DTensors with: one all-reduce of
            16 bytes for each dimension of a mesh, in which every rank takes part.

    Returns:
        A report, which prints as a table.

    Raises:
        ValueError: before anything is written, listing names: if the recipe has no distribution for a selected parameter, a
            buffer on the meta device is set by nobody, two tensors have one name, two parameters share memory, a
            pattern matches nothing, or a parameter on the meta device has no `device` to go to.
        NotImplementedError: for a DTensor placed by Partial, for other wrappers, and dtypes that a distribution cannot fill.
        RuntimeError: for a parameter that overlaps itself, or whose dtype cannot hold its distribution; on every rank, if
            check_ranks finds that seeds, names or distributions differ.

    Source:
        docs/stream.md, "Keys"; docs/models.md.

    Example:
        >>> import torch, initlab
        >>> with torch.device("meta"):
        ...     model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = initlab.init_model_(model, seed=0, recipe={"2": "xavier", "*": "he"}, device="cpu")
        >>> [(row.name, round(row.std, 3)) for row in report.rows]
        [('0.weight', 0.707), ('0.bias', 0.0), ('2.weight', 0.447), ('2.bias', 0.0)]
    """
    return eagerly(
        functools.partial(
            _init_model,
            device=device,
            only=only,
            names=names,
            buffers=buffers,
            progress=progress,
            check_ranks=check_ranks,
        ),
        model,
        seed,
        recipe,
    )


def _init_model(
    model: nn.Module,
    seed: int,
    recipe: RecipeLike,
    *,
    device: Any,
    only: Only | None,
    names: Names | None,
    buffers: Buffers | None,
    progress: bool | None,
    check_ranks: bool,
) -> InitReport:
    reshard(model)
    plan = _plan(model, seed, recipe, only, names)
    target = None if device is None else _resolved(device)
    plan.refuse_meta(target)
    if check_ranks:
        plan.compare_ranks()
    elements = sum(local(task.ref.tensor).numel() for task in plan.tasks)
    show = False if progress is None and elements < _LONG else progress
    with _console.progress("initlab", elements, show) as advance:
        new = plan.materialised(target)
        ready = _own_code(plan, new, target, buffers)
        new |= ready
        _fill(plan, new, ready.keys(), advance)
    _attach(plan, new, target)
    return plan.report()


def plan_model(
    model: nn.Module,
    seed: int = 0,
    recipe: RecipeLike = "torch",
    *,
    only: Only | None = None,
    names: Names | None = None,
) -> InitReport:
    """The report that init_model_ would return, without touching the model. See init_model_ for arguments and errors.

    Example:
        >>> import torch, initlab
        >>> print(initlab.plan_model(torch.nn.Linear(4, 2)))
        name    shape  dtype    distribution                 fan  std     key               why
        ------  -----  -------  ------------------  ---  ------  ----------------  ------
        weight  2 x 4  float32  uniform[-0.5, 0.5)  4    0.2887  1ac732b119189998  Linear
        bias    2      float32  uniform[-0.5, 0.5)  4    0.2887  ae3e092c2ca21bcf  Linear
        2 tensors, 10 elements: recipe torch, seed 0, stream 1
    """
    return _plan(model, seed, recipe, only, names).report()


def not_loaded(name: str, tensor: Tensor) -> bool:
    """For `only=`: what transformers has not loaded from a checkpoint, going by its `_is_hf_initialized` marks.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Linear(2, 2)
        >>> model.weight._is_hf_initialized = True
        >>> [row.name for row in initlab.init_model_(model, seed=0, only=initlab.not_loaded).rows]
        ['bias']
    """
    return not getattr(tensor, "_is_hf_initialized", False)


# ---------------------------------------------------------------------------------------------------------------
# Plan


class _Task(NamedTuple):
    """One tensor to fill: `spec` is None for a buffer on the meta device that only its owner's code can set."""

    ref: TensorRef
    spec: FillSpec | None
    key: int

    def row(self) -> Row:
        ref, spec = self.ref, self.spec
        aliases = tuple(name for name in ref.names if name != ref.name) if len(ref.names) > 1 else ()
        shape, dtype = tuple(ref.tensor.shape), ref.tensor.dtype
        if spec is None:
            return Row(ref.name, aliases, shape, dtype, distribution=None, why=ref.owner)
        blocks = tuple((block, distribution) for block, distribution in spec.fills if block is not None)
        drawn = any(not isinstance(distribution, Constant) for _, distribution in spec.fills)
        key = self.key if drawn else None
        std = distribution_std(spec.distribution)
        return Row(ref.name, aliases, shape, dtype, spec.distribution, blocks, spec.fan, std, key, spec.why, spec.guess)


@dataclass
class _Plan:
    model: nn.Module
    seed: int
    recipe: str
    names: Names | None
    tasks: list[_Task]
    others: list[TensorRef] = field(default_factory=list)  # parameters and buffers that are not filled

    def refuse_meta(self, target: torch.device | None) -> None:
        on_meta = [task.ref.name for task in self.tasks if task.ref.tensor.is_meta]
        if on_meta and target is None:
            raise ValueError(
                f"{_first_and_count(on_meta)} on the meta device: say where the model is to lie, device='cpu' or 'cuda'"
            )

    def compare_ranks(self) -> None:
        said = ((t.ref.tensor, t.ref.name, f"{t.key:x} {t.spec and t.spec.fills}") for t in self.tasks)
        check_agreement(said, "the fills of parameters", "Give init_model_ one seed, recipe and names= on every rank")

    def materialised(self, target: torch.device | None) -> dict[int, Tensor]:
        """By the id of the old: new tensors for what is filled and does not lie on the target yet."""
        if target is None:
            return {}
        with torch.inference_mode(False):
            return {
                id(task.ref.tensor): _like(task.ref.tensor, target)
                for task in self.tasks
                if task.ref.tensor.device != target
            }

    def report(self) -> InitReport:
        return report_of(self.model, self.names, self.seed, self.recipe, [task.row() for task in self.tasks])


def _plan(model: nn.Module, seed: int, recipe: RecipeLike, only: Only | None, names: Names | None) -> _Plan:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    seed = operator.index(seed)
    chosen = resolve(recipe)
    refuse_hidden_shards(model)
    parameters, buffers = tensor_refs(model, names)
    selected = _selection(only, [*parameters, *buffers])
    _refuse(parameters, selected)
    view = View(model, parameters, stage=names is not None)
    rule_of = chosen(view)
    tasks, missing = [], []
    checked: dict[tuple[Any, torch.dtype], str] = {}
    others = []
    for ref in parameters:
        if ref not in selected:
            others.append(ref)
            continue
        spec = rule_of(ref)
        if spec is None:
            missing.append(f"{ref.name} (in {ref.owner}): {view.unreadable(ref)}")
            continue
        spec = keep_padding(ref, spec)
        for _, distribution in spec.fills:
            fault = checked.get((distribution, ref.tensor.dtype))
            if fault is None:
                fault = checked[distribution, ref.tensor.dtype] = _fault(distribution, ref.tensor.dtype)
            if fault:
                missing.append(f"{ref.name} (in {ref.owner}): {fault}")
                break
        tasks.append(_Task(ref, spec, named_key(seed, ref.name)))
    if missing:
        example = missing[0].split(" ")[0]
        raise ValueError(
            f"recipe {chosen.name!r} cannot fill {len(missing)} of {len(parameters)} parameters, and nothing is "
            f"written unless all that are selected can be filled:{listing(missing)}\n"
            f'Give them a distribution by name, recipe={{"{example}": Normal(0.0, 0.02), "*": ...}}, or leave them out with '
            "only="
        )
    for ref in buffers:
        found = view.resets.complete(ref.tensor) if ref in selected else None
        if found is not None or (ref in selected and ref.tensor.is_meta):
            tasks.append(_Task(ref, found, named_key(seed, ref.name)))
        else:
            others.append(ref)
    return _Plan(model, seed, chosen.name, names, tasks, others)


def _fault(distribution: Any, dtype: torch.dtype) -> str:
    """Why a dtype cannot be filled from a distribution; empty if it can."""
    try:
        fill_([Draw(torch.empty(0, dtype=dtype, device="meta"), distribution)])
    except (NotImplementedError, RuntimeError, TypeError) as error:
        return str(error)
    return ""


def _selection(only: Only | None, every: list[TensorRef]) -> set[TensorRef]:
    if only is None:
        return set(every)
    if callable(only):
        return {ref for ref in every if any(only(name, ref.tensor) for name in ref.names)}
    patterns = [only] if isinstance(only, str) else list(only)
    chosen: set[TensorRef] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"only holds a {type(pattern).__name__}; it must be a name pattern, several, or a function")
        found = {ref for ref in every if any(matches(name, pattern) for name in ref.names)}
        if not found:
            near = difflib.get_close_matches(pattern, [name for ref in every for name in ref.names], cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"only: nothing in the model is called {pattern!r}{hint}")
        chosen |= found
    return chosen


def _refuse(parameters: list[TensorRef], selected: set[TensorRef]) -> None:
    """What cannot be filled at all."""
    for ref in parameters:
        if ref not in selected:
            continue
        tensor = ref.tensor
        if is_lazy(tensor):
            raise ValueError(
                f"{ref.name} has no shape yet, as a lazy module's parameters do; run a batch through the model first"
            )
        if is_dtensor(tensor):
            try:
                local_shards(tensor)
            except (NotImplementedError, RuntimeError) as error:
                raise type(error)(f"{ref.name}: {error}") from None
            tensor = local(tensor)
        kind = type(tensor)
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not isinstance(tensor, FakeTensor):
            raise NotImplementedError(
                f"{ref.name} is a {kind.__name__}, a wrapper around other tensors; fill the model before it is wrapped"
            )
    shared = shared_memory([ref for ref in parameters if ref in selected])
    if shared:
        pairs = [f"{a} and {b}" for a, b in shared]
        raise ValueError(
            f"different parameters share memory, and would be filled twice:{listing(pairs)}\n"
            "Tie them by making them one Parameter, or leave one out with only="
        )


def _first_and_count(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


# ---------------------------------------------------------------------------------------------------------------
# Materialise


def _resolved(device: torch.device | str | int) -> torch.device:
    target = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
    if target.type == "meta":
        raise ValueError("device is meta, where nothing can be filled; plan_model shows what would be")
    return target


def _like(tensor: Tensor, device: torch.device) -> Tensor:
    """An empty twin on another device: class, requires_grad and attributes are kept."""
    empty = torch.empty_like(tensor, device=device, requires_grad=False)
    if is_dtensor(tensor):
        empty = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    elif isinstance(tensor, nn.Parameter):
        empty = Tensor._make_subclass(type(tensor), empty.detach().as_subclass(Tensor), tensor.requires_grad)
    vars(empty).update(vars(tensor))
    return empty


def _own_code(
    plan: _Plan, new: dict[int, Tensor], target: torch.device | None, buffers: Buffers | None
) -> dict[int, Tensor]:
    """The buffers on the meta device that have no distribution, by the id of the old: from the caller or their owners' code."""
    found: dict[int, Tensor] = {}
    pending: list[TensorRef] = []
    for task in plan.tasks:
        ref = task.ref
        if target is None or ref.is_parameter or not ref.tensor.is_meta:
            continue
        if buffers is not None:
            with target:
                value = buffers(ref.name, ref.tensor)
            if value is not None:
                found[id(ref.tensor)] = _given(ref, value, new[id(ref.tensor)])
                continue
        if task.spec is None:
            pending.append(ref)
    if not pending or target is None:
        return found
    reasons: dict[int, list[str]] = {id(ref.tensor): [] for ref in pending}
    above = dict(owners_of_init_weights(plan.model))
    for module in dict.fromkeys(ref.module for ref in pending):
        mine = [ref for ref in pending if ref.module is module]
        for where, code in _setters(module, above.get(module)):
            mine = [ref for ref in mine if id(ref.tensor) not in found]
            if mine:
                found |= _run(plan, module, mine, where, code, target, reasons)
    missing = [
        f"{ref.name} (in {ref.owner}): {'; '.join(reasons[id(ref.tensor)]) or 'its owner has no code to set it'}"
        for ref in pending
        if id(ref.tensor) not in found
    ]
    if missing:
        raise ValueError(
            f"{len(missing)} buffers on the meta device are set by nobody:{listing(missing)}\n"
            "Give their values with buffers=, a function of name and tensor, or build the model off the meta device"
        )
    return found


def _given(ref: TensorRef, value: Any, buffer: Tensor) -> Tensor:
    with torch.no_grad():
        value = torch.as_tensor(value, device=buffer.device)
        try:
            if not is_dtensor(buffer) or is_dtensor(value):
                return buffer.copy_(value.expand(buffer.shape))
            whole = value.expand(buffer.shape)
            for mine, region in local_shards(buffer):
                mine.copy_(region.of(whole))
            return buffer
        except RuntimeError:
            raise ValueError(
                f"buffers: {ref.name} has shape {tuple(buffer.shape)}, and the value given has {tuple(value.shape)}"
            ) from None


def _setters(module: nn.Module, above: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Code that may set a module's buffers."""
    if callable(getattr(type(module), "_init_buffers", None)):
        yield f"{class_name(module)}._init_buffers", lambda: type(module)._init_buffers(module)  # type: ignore[attr-defined]
    function = reset_function(module)
    if function is not None:
        yield f"{class_name(module)}.{function.__name__}", lambda: function(module)
    if above is not None:
        yield f"{class_name(above)}._init_weights", lambda: above._init_weights(module)


def _run(
    plan: _Plan,
    module: nn.Module,
    mine: list[TensorRef],
    where: str,
    code: Callable[[], Any],
    target: torch.device,
    reasons: dict[int, list[str]],
) -> dict[int, Tensor]:
    """Run code that sets buffers of a module, with nothing but these within its reach."""
    with torch.inference_mode(False):
        fresh = {id(ref.tensor): _poisoned(ref.tensor, target) for ref in mine}
    versions = {key: tensor._version for key, tensor in fresh.items()}
    with ExitStack() as stack:
        stack.enter_context(stand_ins(module, fresh))
        stack.enter_context(kept_generators())
        torch.manual_seed(named_key(plan.seed, mine[0].name.rpartition(".")[0]))  # the owner's name
        for context in (torch.inference_mode(False), torch.no_grad(), swap(), target):
            stack.enter_context(context)
        try:
            code()
        except Exception as error:
            for ref in mine:
                reasons[id(ref.tensor)].append(f"{where} raised {type(error).__name__}: {error}".splitlines()[0])
            return {}
        after = {id(ref.tensor): module._buffers.get(ref.leaf) for ref in mine}
    found = {}
    for key, tensor in after.items():
        same = tensor is fresh[key]
        if tensor is None or tensor.is_meta or (same and tensor._version == versions[key] and _is_poisoned(tensor)):
            reasons[key].append(f"{where} does not set it")
        else:
            found[key] = tensor.to(target)
    return found


def _poisoned(tensor: Tensor, device: torch.device) -> Tensor:
    """A buffer whose contents show that nobody has written to it."""
    empty = torch.empty_like(tensor, device=device)
    vars(empty).update({name: value for name, value in vars(tensor).items() if name != "_is_hf_initialized"})
    return empty.fill_(_poison(tensor.dtype))


def _poison(dtype: torch.dtype) -> float:
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return 0 if dtype == torch.bool else torch.iinfo(dtype).max


def _is_poisoned(tensor: Tensor) -> bool:
    poison = _poison(tensor.dtype)
    return bool((tensor.isnan() if math.isnan(poison) else tensor == poison).all())


def _attach(plan: _Plan, new: dict[int, Tensor], target: torch.device | None) -> None:
    """Put new tensors in the place of the old ones, and move what else there is to the target."""
    recurrent = set()
    for ref in (*(task.ref for task in plan.tasks), *plan.others):
        old = ref.tensor
        moved = new.get(id(old))
        if moved is None:
            if target is None or old.is_meta or old.device == target or is_lazy(old):
                continue
            moved = old.detach().to(target)
        if is_dtensor(old):
            moved = _swapped(old, moved, ref.name)
        elif ref.is_parameter and torch._has_compatible_shallow_copy_type(old, moved):
            old.data = moved.detach()  # the same Parameter, as Module.to keeps it for an optimizer
            if old.grad is not None:
                old.grad.data = old.grad.to(target)
            continue
        if ref.is_parameter and not isinstance(moved, nn.Parameter):
            moved = nn.Parameter(moved, old.requires_grad)
        for owner, leaf in ref.places:
            (owner._parameters if ref.is_parameter else owner._buffers)[leaf] = moved  # type: ignore[assignment]
            if isinstance(owner, nn.RNNBase):
                recurrent.add(owner)
    for module in recurrent:
        module._init_flat_weights()  # it keeps a list of its parameters


def _swapped(old: Tensor, new: Tensor, name: str) -> Tensor:
    """A DTensor that is `old` to those who hold it and has what `new` has, as Module.to leaves it for an optimizer."""
    gradient, old.grad = old.grad, None  # which would keep it from being swapped
    if not isinstance(new, nn.Parameter) and isinstance(old, nn.Parameter):
        new = nn.Parameter(new, old.requires_grad)
    try:
        torch.utils.swap_tensors(old, new)
    except RuntimeError as error:
        warnings.warn(
            f"{name} is a new parameter now, as torch could not change the old one in place ({error}); make anew what "
            "holds the old one, such as an optimizer",
            stacklevel=2,
        )
        return new
    if gradient is not None and not gradient.is_meta:
        old.grad = gradient.to(old.device)
    return old


# ---------------------------------------------------------------------------------------------------------------
# Fill


def _fill(plan: _Plan, new: dict[int, Tensor], ready: Set[int], advance: Callable[[int], object]) -> None:
    """Fill what is planned, but for the tensors that are ready."""
    current = ""
    filled: list[Tensor] = []

    def draws() -> Iterator[Draw]:
        nonlocal current
        for task in plan.tasks:
            if task.spec is None or id(task.ref.tensor) in ready:
                continue
            current = task.ref.name
            tensor = new.get(id(task.ref.tensor), task.ref.tensor)
            filled.append(tensor)
            if not is_dtensor(tensor):  # which inference mode would not let detach
                tensor = tensor.detach()
            for block, distribution in task.spec.fills:
                yield from draws_of(tensor, distribution, task.key, block)
        current = ""

    try:
        fill_(draws(), advance)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if not current:
            raise
        raise type(error)(f"{current}: {error}") from error
    for tensor in filled:
        count_as_written(tensor)
