"""The private names of torch that this package uses: all of them, and what serves where torch no longer has one.

The rest of the package imports them from here; tests/test_layering.py sees to it. tests/kernels/test_torch_internals.py
hides each of them in turn and holds what serves then to torch's own. A fallback uses public names only. Where none can
do the same, it is on the safe side: it says that a mode may be active, or leaves something to torch that raises.

Not here: torch.utils._pytree and TorchDispatchMode, which torch's own documentation tells users of; and private
attributes of tensors and modules, such as `t._version` and `module._parameters`.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

T = TypeVar("T")

NAMES: dict[str, str] = {}  # by path below torch: its name here


def _own(name: str, path: str, fallback: T) -> T:
    """What torch has at a path; the fallback where a part of it is gone."""
    NAMES[path] = name
    found: Any = torch
    for part in path.split("."):
        if not hasattr(found, part):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except (ImportError, AttributeError):
                return fallback
        found = getattr(found, part, None)
    return fallback if found is None else found


# Modes and transforms: who follows what is done to a tensor.


class _WithoutSetup(torch.autograd.Function):
    """A function that no transform can take: torch raises for it under any."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _a_function_is_refused() -> bool:
    try:
        _WithoutSetup.apply(torch.zeros(()))
    except RuntimeError:
        return True
    return False


def _has_no_memory(tensor: Tensor) -> bool:
    """As a tensor that a transform has wrapped."""
    if tensor.is_meta or tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return False
    try:
        return tensor.data_ptr() == 0 and tensor.numel() > 0 and _a_function_is_refused()
    except RuntimeError:
        return True


def _is_fake_here() -> bool:
    return isinstance(torch.empty(0), FakeTensor)


class _NoFakeTensor:
    """A class without instances."""


def _meta_mode() -> contextlib.AbstractContextManager[Any]:
    return torch.device("meta")


def _wraps_others(tensor: object) -> bool:
    return all(hasattr(type(tensor), name) for name in ("__tensor_flatten__", "__tensor_unflatten__"))


FakeTensor: Any = _own("FakeTensor", "_subclasses.fake_tensor.FakeTensor", _NoFakeTensor)
FakeTensorMode: Callable[[], contextlib.AbstractContextManager[Any]] = _own(
    "FakeTensorMode", "_subclasses.fake_tensor.FakeTensorMode", _meta_mode
)
# How many dispatch modes are active. It is asked for each call: where torch doesn't tell, there may always be one.
count_dispatch_modes: Callable[[], int] = _own("count_dispatch_modes", "_C._len_torch_dispatch_stack", lambda: 1)
count_function_modes: Callable[[], int] = _own("count_function_modes", "_C._len_torch_function_stack", lambda: 0)
pop_function_mode: Callable[[], Any] = _own("pop_function_mode", "overrides._pop_mode", lambda: None)
push_function_mode: Callable[[Any], None] = _own("push_function_mode", "overrides._push_mode", lambda mode: None)
without_dispatch_modes: Callable[[], contextlib.AbstractContextManager[Any]] = _own(
    "without_dispatch_modes", "utils._python_dispatch._disable_current_modes", contextlib.nullcontext
)
without_functions: Callable[[], contextlib.AbstractContextManager[Any]] = _own(
    "without_functions", "_C.DisableTorchFunction", contextlib.nullcontext
)
is_transforming: Callable[[], bool] = _own(
    "is_transforming", "_C._are_functorch_transforms_active", _a_function_is_refused
)
is_transformed: Callable[[Tensor], bool] = _own(
    "is_transformed", "_C._functorch.is_functorch_wrapped_tensor", _has_no_memory
)
is_functional: Callable[[Tensor], bool] = _own("is_functional", "_is_functional_tensor", _has_no_memory)
is_wrapper: Callable[[object], bool] = _own(
    "is_wrapper", "utils._python_dispatch.is_traceable_wrapper_subclass", _wraps_others
)
tracing_state: Callable[[], Any] = _own(
    "tracing_state",
    "_C._get_tracing_state",
    lambda: torch.jit.is_tracing() or None,  # type: ignore[attr-defined]
)
is_tracing: Callable[[], bool] = _own("is_tracing", "_C._is_tracing", lambda: tracing_state() is not None)
_mode_of: Callable[[Any], Any] | None = _own("_mode_of", "_C._get_dispatch_mode", None)
_FAKE: Any = _own("_FAKE", "_C._TorchDispatchModeKey.FAKE", None)


def has_tangents() -> bool:
    """Whether tensors may carry derivatives forward, outside of torch.func. Where torch doesn't tell, they may."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def fake_mode_is_active() -> bool:
    """Whether new tensors are fake."""
    return _is_fake_here() if _mode_of is None or _FAKE is None else _mode_of(_FAKE) is not None


# What a transform has wrapped. Where torch doesn't tell, a wrapped tensor is taken as it is, and what reads its values
# raises.
_is_batched: Callable[[Tensor], bool] = _own("_is_batched", "_C._functorch.is_batchedtensor", lambda tensor: False)
_batch_dim: Callable[[Tensor], int] = _own("_batch_dim", "_C._functorch.maybe_get_bdim", lambda tensor: -1)
_unwrapped: Callable[[Tensor], Tensor] | None = _own("_unwrapped", "_C._functorch.get_unwrapped", None)


def physical(tensor: Tensor) -> Tensor:
    """The tensor behind torch.func's wrappers, with all the rows of a vmap; others as they are."""
    while _unwrapped is not None and is_transformed(tensor):
        rows = _batch_dim(tensor) if _is_batched(tensor) else -1
        tensor = _unwrapped(tensor)
        if rows > 0:
            tensor = tensor.movedim(rows, 0)
    return tensor


# Autograd.


def _keep_version(tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Nothing: a backward that needs the old version raises, as after any write in place."""


def _a_backward_runs() -> int:
    try:
        torch.autograd.Variable._execution_engine.queue_callback(lambda: None)
    except RuntimeError:
        return -1
    return 0


set_versions: Callable[[Sequence[Tensor], Sequence[int]], None] = _own(
    "set_versions", "_C._autograd._unsafe_set_version_counter", _keep_version
)
backward_id: Callable[[], int] = _own("backward_id", "_C._current_graph_task_id", _a_backward_runs)  # -1 outside
# Of a gradient's computation that runs; where it is None, an operation is named as one of the forward pass.
current_node: Callable[[], Any] = _own("current_node", "_C._current_autograd_node", lambda: None)


# Memory, and many tensors at once.


def _overlap(tensor: Tensor) -> int:
    """1 where two indices meet in memory for certain, 2 where it is not known."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 if tensor.numel() and any(size > 1 and stride == 0 for size, stride in sides) else 2


def _same_device_type(old: Tensor, new: Tensor) -> bool:
    plain = {type(old), type(new)} <= {Tensor, nn.Parameter} and old.layout == new.layout == torch.strided
    return plain and old.device.type == new.device.type


def _is_common(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")


overlap: Callable[[Tensor], int] = _own("overlap", "_debug_has_internal_overlap", _overlap)
can_take_data: Callable[[Tensor, Tensor], bool] = _own(
    "can_take_data", "_has_compatible_shallow_copy_type", _same_device_type
)
has_foreach: Callable[[torch.device], bool] = _own(
    "has_foreach", "utils._foreach_utils._device_has_foreach_support", _is_common
)
foreach_norm: Callable[[Sequence[Tensor]], Sequence[Tensor]] = _own(
    "foreach_norm", "_foreach_norm", lambda tensors: [torch.linalg.vector_norm(t) for t in tensors]
)
foreach_sub: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]] = _own(
    "foreach_sub", "_foreach_sub", lambda a, b: [x - y for x, y in zip(a, b, strict=True)]
)


# Modules, and fans of weights.


def _fans_of(tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() < 2:
        raise ValueError("Fan in and fan out can not be computed for tensor with fewer than 2 dimensions")
    field = math.prod(tensor.shape[2:])
    return tensor.shape[1] * field, tensor.shape[0] * field


def _fan(tensor: Tensor, mode: str) -> int:
    mode = mode.lower()
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"Mode {mode} not supported, please use one of ['fan_in', 'fan_out']")
    return _fans_of(tensor)[mode == "fan_out"]


fan_in_and_out: Callable[[Tensor], tuple[int, int]] = _own(
    "fan_in_and_out", "nn.init._calculate_fan_in_and_fan_out", _fans_of
)
fan_by_mode: Callable[[Tensor, str], int] = _own("fan_by_mode", "nn.init._calculate_correct_fan", _fan)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Convolution: Any = _own(
    "Convolution", "nn.modules.conv._ConvNd", (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
)  # for isinstance
TransposedConvolution: Any = _own("TransposedConvolution", "nn.modules.conv._ConvTransposeNd", _TRANSPOSED)
