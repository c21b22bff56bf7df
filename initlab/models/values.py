"""Values that no distribution makes: those that a model's code computes, and the caller's own; how they are placed."""

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from initlab.kernels import Draw, Region, fill_

from ..distributed.dtensors import count_as_written, is_dtensor, placements_text
from ..distributed.shards import shards_in
from .naming import TensorRef
from .patterns import compile_pattern
from .programs import Parameter, call_key
from .recipe_parts import short_repr
from .specs import FillSpec

if TYPE_CHECKING:
    from .plan import Plan, Task

Values: TypeAlias = Mapping[str, Any] | Callable[[TensorRef], Any]


def given_values(
    values: Values | None, parameters: Sequence[TensorRef], selected: Collection[TensorRef]
) -> dict[TensorRef, Tensor]:
    """What the caller gives to parameters, checked.

    Args:
        values: init_model_'s argument.
        parameters: those of the model.
        selected: those that are to be filled.

    Returns:
        A tensor for each of those that get one, of their shape or of one element.

    Raises:
        TypeError: if `values` or a value is of a type that is not understood.
        ValueError: if a pattern fits no parameter, or a value has another shape, or is on the meta device.
        RuntimeError: if a value cannot be cast to the parameter's dtype without loss of its kind.
    """
    if values is None:
        return {}
    if isinstance(values, Mapping):
        choose = _by_pattern(values, parameters)
    elif callable(values) and not isinstance(values, nn.Module | Tensor):
        choose = values
    else:
        raise TypeError(
            f"values is {short_repr(values)}; it must be a mapping from name patterns to tensors or functions, such as "
            "{'*.A_log': tensor}, or a function from a TensorRef to a tensor or None"
        )
    found: dict[TensorRef, Tensor] = {}
    for ref in parameters:
        if ref in selected and (value := choose(ref)) is not None:
            found[ref] = _checked(ref, value)
    return found


def _by_pattern(values: Mapping[str, Any], parameters: Sequence[TensorRef]) -> Callable[[TensorRef], Any]:
    names = [name for ref in parameters for name in ref.names]
    fits = []
    for pattern, value in values.items():
        if not isinstance(pattern, str):
            raise TypeError(f"values has the key {short_repr(pattern)}; keys are name patterns: 'head.bias', '*.A_log'")
        fit = compile_pattern(pattern, names)
        if not any(map(fit, names)):
            near = difflib.get_close_matches(pattern, names, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "; for buffers there is buffers="
            raise ValueError(f"values: no parameter is called {pattern!r}{hint}")
        fits.append((fit, value))

    def choose(ref: TensorRef) -> Any:
        for fit, value in fits:
            if any(map(fit, ref.names)):
                found = value(ref) if callable(value) and not isinstance(value, Tensor) else value
                if found is not None:
                    return found
        return None

    return choose


def _checked(ref: TensorRef, value: Any) -> Tensor:
    """The caller's value for a parameter, as a tensor that can be copied into it."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(
            f"values: {ref.name} gets {short_repr(value)}; it must be a tensor, a number, or a function from a "
            "TensorRef to one of these"
        ) from None
    if tensor.is_meta:
        raise ValueError(
            f"values: the tensor for {ref.name} is on the meta device, and has no values; make it elsewhere"
        )
    shape, wanted = tuple(tensor.shape), tuple(ref.tensor.shape)
    if shape != wanted and shape != ():
        whole = ", the whole parameter's, of which each rank takes its part" if ref.kind == "dtensor" else ""
        turned = "; its transpose would fit: .t()" if shape == wanted[::-1] else ""
        raise ValueError(
            f"values: {ref.name} has shape {wanted}{whole}, and the value given has {shape}{turned}; give one of that "
            "shape, or one number for all elements"
        )
    if not torch.can_cast(tensor.dtype, ref.tensor.dtype):
        raise RuntimeError(
            f"values: {ref.name} is {ref.tensor.dtype}, and the value given is {tensor.dtype}, which does not fit; "
            f"cast it yourself: .to({ref.tensor.dtype})"
        )
    if is_dtensor(tensor) and not _is_placed_alike(tensor, ref.tensor):
        raise ValueError(
            f"values: the value for {ref.name} is a DTensor placed {placements_text(tensor.placements)}, not as the "  # type: ignore[attr-defined]
            "parameter is; give the whole tensor, value.full_tensor()"
        )
    return tensor.detach()


def _is_placed_alike(a: Any, b: Any) -> bool:
    return is_dtensor(b) and a.placements == b.placements and a.device_mesh == b.device_mesh


def computed_values(plan: "Plan", ready: Collection[int]) -> dict[int, Tensor]:
    """The values of what a plan computes, in main memory.

    Args:
        plan: the plan for a model.
        ready: ids of tensors that have their values.

    Returns:
        By the id of a tensor, its whole value: of a DTensor too.

    Raises:
        ValueError: if torch cannot compute one on the CPU; it names the parameter and the ways out.
    """
    found: dict[int, Tensor] = {}
    for task in plan.tasks:
        if task.spec is None or task.spec.program is None or id(task.ref.tensor) in ready:
            continue
        try:
            value = _start(plan, task)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, ArithmeticError) as error:
            argument = "values" if task.ref.is_parameter else "buffers"
            raise ValueError(
                f"{task.ref.name} (in {task.ref.owner}) cannot be computed on the CPU ({task.spec.why}): "
                f"{error or type(error).__name__}".splitlines()[0]
                + f". Give its values with {argument}="
            ) from error
        if value.shape != task.ref.tensor.shape:
            raise ValueError(
                f"{task.ref.name} has shape {tuple(task.ref.tensor.shape)}, computed is {tuple(value.shape)}"
            )
        found[id(task.ref.tensor)] = value
    return found


def _start(plan: "Plan", task: "Task", step: Parameter | None = None) -> Tensor:
    """What a parameter starts with, all of it, in main memory; in the form in which a program takes it."""
    if task.value is not None:
        value = task.value.full_tensor() if is_dtensor(task.value) else task.value  # type: ignore[attr-defined]
        value = value.to("cpu").expand(task.ref.tensor.shape)
        return value if step is None else value.to(step.dtype)
    spec = task.spec
    assert spec is not None
    if spec.program is None:
        assert step is not None
        return _filled(spec, task.key, step.shape, step.dtype)
    known_as = spec.known_as

    def key_of(name: str, n: int) -> int:
        return call_key(plan.seed, known_as.get(name, name), n)

    def start_of(other: Parameter) -> Tensor:
        return _start(plan, plan.sources[known_as.get(other.name, other.name)], other)

    value = spec.program.run(key_of, start_of)
    return value if step is None else value.to(step.dtype)


def sample_of(spec: FillSpec, like: Tensor) -> Tensor:
    """Values of a spec under the seed 0, in main memory, for a look at what code does with such."""

    def missing(other: Parameter) -> Tensor:
        raise NotImplementedError(f"it is computed from the start of {other.name}")

    if spec.program is not None:
        return spec.program.run(lambda name, n: call_key(0, name, n), missing)
    return _filled(spec, 0, tuple(like.shape), like.dtype)


def _filled(spec: FillSpec, key: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    fill_(
        Draw(tensor, distribution, key)
        if part is None
        else Draw(tensor.narrow(*part), distribution, key, Region.whole(shape).narrow(*part))
        for part, distribution in spec.fills
    )
    return tensor


def place_values(plan: "Plan", new: Mapping[int, Tensor], computed: Mapping[int, Tensor]) -> None:
    """Copy values, computed and given, into the model's tensors or into the new ones that take their places."""
    with torch.inference_mode(False), torch.no_grad():
        for task in plan.tasks:
            old = task.ref.tensor
            value = computed.get(id(old), task.value)
            if value is not None:
                place(new.get(id(old), old), value, task)


def place(tensor: Tensor, value: Tensor, task: "Task") -> None:
    """Copy a value into a tensor: of a DTensor each rank takes its part."""
    if task.shards is None:
        tensor.detach().copy_(value)
    elif is_dtensor(value):
        tensor._local_tensor.copy_(value._local_tensor)  # type: ignore[attr-defined]
        count_as_written(tensor)
    else:
        whole = value.expand(tensor.shape)
        for shard, region in shards_in(task.shards, tensor):
            shard.copy_(region.of(whole))
        count_as_written(tensor)
