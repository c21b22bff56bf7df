"""init_model_: a whole model filled by name. Plan, materialize, fill, report."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from initlab.kernels import Draw, Region, eagerly, fill_

from .. import _console
from ..distributed.dtensors import count_as_written
from ..distributed.fsdp import reshard
from ..distributed.shards import draws_of_shards, shards_in
from .buffers import Buffers, set_buffers
from .materialize import attach, materialized, resolved_device
from .naming import Names
from .orthogonal import make_orthogonal_
from .parametrized import refresh_hooks
from .plan import Only, Plan, Task, make_plan
from .recipe_parts import RecipeLike, short_repr
from .report import InitReport
from .resolving import DEFAULT
from .values import Values, computed_values, place_values

_LONG = 1 << 28  # elements: a second or more on a CPU, long enough for a progress bar to be welcome


def init_model_(
    model: nn.Module,
    seed: int,
    recipe: RecipeLike = DEFAULT,
    *,
    device: torch.device | str | int | None = None,
    only: Only | None = None,
    names: Names | None = None,
    buffers: Buffers | None = None,
    values: Values | None = None,
    progress: bool | None = None,
    check_ranks: bool = False,
    batch: Any = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> InitReport:
    """Fill a model's parameters from the stream, each keyed by its name: the same bits however the model came about.

    Neither the order of construction, nor the device, the number of threads, wrappers (DDP, FSDP, torch.compile,
    activation checkpointing) nor what else is filled changes a parameter's values. No generator is touched.

    Of a DTensor (FSDP2, HSDP, tensor and expert parallelism) each rank fills its local shard with its part of the whole
    tensor's values. Nothing is communicated, and no rank ever has a whole tensor in memory, also not when it starts
    from the meta device. A DTensor that gets memory stays the same object; where torch does not allow that, it warns.

    Args:
        model: filled in place, outside autograd. Parameters on the meta device become new parameters on `device`, with
            the old ones' attributes; they never lie anywhere else. A tied weight is filled once, keyed by the byte-wise
            smallest of its names, with the distribution of its first owner.
        seed: -2**63 <= seed < 2**64.
        recipe: which distribution each parameter gets: "own", what the model's own code gives it, or "torch", "he",
            "xavier", "lecun", "gpt2", "trunc_normal", "auto", "depth_scaled", "mitchell", "deepnorm",
            "small_embedding", "zero_residual", "lsuv", a recipe made by initlab.recipes, a build that record_build()
            has recorded, a distribution, a function from TensorRef to distribution, the report of another call, or a
            mapping from name patterns to any of these. Of a mapping the first match counts, and "own" serves the rest.
            "own" compares what it reads with the values that are there, and refuses what does not fit, also of a model
            that has been trained since; see recipes.own. "lsuv" is fitted to `batch`; see recipes.lsuv. The padding row
            of an embedding stays 0, but where the model's own code fills it, under "own" and a recorded build. Buffers
            with a distribution in reset_parameters, such as running statistics, are set too.
        device: where the model is to lie afterwards; needed for parameters on the meta device. What is not filled is
            moved there with its values, unless it is on the meta device and not selected. None leaves all where it is.
        only: what to fill: a name pattern (a glob, or the name of a module, which selects all within it), several of
            them, or a function of name and tensor; `initlab.not_loaded`, for example. It applies to buffers too. An
            exact name comes before a glob: "w[0]" is the tensor of that name, where there is one.
        names: maps a name within `model`, a pipeline stage say, to the name in the whole model: a prefix or a function.
            Patterns, distributions and keys go by the mapped names.
        buffers: called with the name and the tensor of each selected buffer on the meta device, in the context of
            `device`; returns its value, or None. A buffer for which it has none is set by its owner's
            `_init_buffers()`, its reset_parameters, or the `_init_weights(owner)` of a module above it, with
            parameters out of reach and random numbers fixed by `seed`.
        values: the caller's own values for parameters, in the place of a distribution: a mapping from name patterns to
            tensors, numbers, or functions from TensorRef to one of these, or one such function for all. None leaves a
            parameter to the recipe. A value has the whole, unsharded parameter's shape; it is cast and placed.
        progress: whether to show a progress bar on stderr; None shows one for 2**28 elements and more in a terminal.
        check_ranks: compare, before anything is written, what ranks are about to fill DTensors with: one all-reduce of
            16 bytes for each dimension of a mesh, in which every rank takes part.
        batch: for recipe "lsuv", one real batch: tensors, or arrays of numpy's, in tuples, lists, dicts, dataclasses.
            The last item of a tuple or list is taken for the target, and is not handed to the model.
        forward: for recipe "lsuv", how the model is called: a function of model and batch. None calls model(x), or with
            the items of a dict or dataclass by name, as its forward() takes them.

    Returns:
        A report, which prints as a table.

    Raises:
        ValueError: before anything is written, listing names: if the recipe has no distribution for a selected
            parameter, a buffer on the meta device is set by nobody, two tensors have one name, two parameters share
            memory, a pattern matches nothing, or a parameter on the meta device has no `device` to go to; or if a
            weight cannot be fitted to the batch, whose rows must differ.
        NotImplementedError: for a DTensor placed by Partial, for other wrappers, and dtypes that a distribution cannot
            fill.
        RuntimeError: for a parameter that overlaps itself, or whose dtype cannot hold its distribution; on every rank,
            if check_ranks finds that seeds, names or distributions differ.
        TypeError: for an argument of another type; the message says what it got and what it takes.

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
            values=values,
            progress=progress,
            check_ranks=check_ranks,
            batch=batch,
            forward=forward,
        ),
        model,
        seed,
        recipe,
    )


def plan_model(
    model: nn.Module,
    seed: int = 0,
    recipe: RecipeLike = DEFAULT,
    *,
    only: Only | None = None,
    names: Names | None = None,
    values: Values | None = None,
) -> InitReport:
    """The report that init_model_ would return, without touching the model. See init_model_ for arguments and errors.

    Example:
        >>> import torch, initlab
        >>> print(initlab.plan_model(torch.nn.Linear(4, 2)))
        name    shape  dtype    distribution        fan  std     key               why
        ------  -----  -------  ------------------  ---  ------  ----------------  ------
        weight  2 x 4  float32  uniform[-0.5, 0.5)  4    0.2887  1ac732b119189998  Linear
        bias    2      float32  uniform[-0.5, 0.5)  4    0.2887  ae3e092c2ca21bcf  Linear
        2 tensors, 10 elements: recipe own, seed 0, stream 1
    """
    return make_plan(model, seed, recipe, only, names, values).report()


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


def _init_model(
    model: nn.Module,
    seed: int,
    recipe: RecipeLike,
    *,
    device: Any,
    only: Only | None,
    names: Names | None,
    buffers: Buffers | None,
    values: Values | None,
    progress: bool | None,
    check_ranks: bool,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any] | None,
) -> InitReport:
    if buffers is not None and not callable(buffers):
        raise TypeError(f"buffers is {short_repr(buffers)}; it must be a function of name and tensor, or None")
    reshard(model)
    plan = make_plan(model, seed, recipe, only, names, values)
    target = None if device is None else resolved_device(device)
    fitted = plan.recipe == "lsuv" or any(task.spec is not None and task.spec.fitted for task in plan.tasks)
    if not fitted:
        plan.refuse_meta(target)
    if check_ranks:
        plan.compare_ranks()
    if fitted:
        return _init_fitted(model, plan, target, buffers, progress, batch, forward)
    if batch is not None or forward is not None:
        raise ValueError(
            f"recipe {plan.recipe!r} is not fitted to data: leave batch= and forward= out, or pass recipe='lsuv'"
        )
    _write(model, plan, target, buffers, progress)
    return plan.report()


def _init_fitted(
    model: nn.Module,
    plan: Plan,
    target: torch.device | None,
    buffers: Buffers | None,
    progress: bool | None,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any] | None,
) -> InitReport:
    """Fit a plan to a batch and carry it out; whatever raises leaves the model as it was."""
    from ..diagnosis.state import Snapshot  # both know models
    from ..fitting.scaling import fitted_plan

    def write_one(task: Task) -> None:
        _fill([task], {}, frozenset(), lambda elements: None)

    def write_all(whole: Plan) -> None:
        _write(model, whole, None, buffers, False)

    fitted = fitted_plan(model, plan, batch, forward, target, write_all, write_one)
    snapshot = Snapshot([model], None, ())
    try:
        _write(model, fitted, None, buffers, progress)
    except BaseException:
        snapshot.restore()
        raise
    return fitted.report()


def _write(
    model: nn.Module, plan: Plan, target: torch.device | None, buffers: Buffers | None, progress: bool | None
) -> None:
    """Carry a plan out."""
    elements = sum(task.numel for task in plan.tasks)
    show = False if progress is None and elements < _LONG else progress
    with _console.progress("initlab", elements, show) as advance:
        new = {} if target is None else materialized((task.ref for task in plan.tasks), target)
        ready = set_buffers(plan, new, target, buffers)
        new |= ready
        computed = computed_values(plan, ready.keys())
        _fill(plan.tasks, new, ready.keys(), advance)
        place_values(plan, new, computed)
    attach((*(task.ref for task in plan.tasks), *plan.others), new, target)
    refresh_hooks(model)


def _fill(tasks: Sequence[Task], new: Mapping[int, Tensor], ready: Set[int], advance: Callable[[int], object]) -> None:
    """Fill what is planned, in the new tensors where there are any, but for the buffers that are ready."""
    current = ""
    dtensors: list[Tensor] = []

    def draws() -> Iterator[Draw]:
        nonlocal current
        for task in tasks:
            old = task.ref.tensor
            if task.spec is None or task.spec.program is not None or id(old) in ready:
                continue
            current = task.ref.name
            tensor = new.get(id(old), old)
            if task.shards is not None:
                dtensors.append(tensor)
            (part, distribution), *others = task.spec.fills
            if part is None and not others and task.ref.kind == "plain":  # nearly every parameter
                yield Draw(tensor, distribution, task.key)
            else:
                yield from _draws_of(task, tensor)
        current = ""

    try:
        fill_(draws(), advance)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if not current:
            raise
        raise type(error)(f"{current}: {error}") from error
    for tensor in dtensors:
        count_as_written(tensor)
    for task in tasks:
        if task.spec is not None and task.spec.orthogonal:
            make_orthogonal_(new.get(id(task.ref.tensor), task.ref.tensor), task.spec)


def _draws_of(task: Task, tensor: Tensor) -> Iterator[Draw]:
    """What fill_ has to do for a task, in its tensor or in the new one that takes its place."""
    assert task.spec is not None
    if task.shards is not None:
        shards = shards_in(task.shards, tensor)
        for part, distribution in task.spec.fills:
            yield from draws_of_shards(shards, distribution, task.key, part)
        return
    tensor = tensor.detach()
    for part, distribution in task.spec.fills:
        if part is None:
            yield Draw(tensor, distribution, task.key)
        else:
            yield Draw(tensor.narrow(*part), distribution, task.key, Region.whole(tensor.shape).narrow(*part))
