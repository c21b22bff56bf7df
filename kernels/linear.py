"""linear_relu: a linear layer and its ReLU, and a flag for what is not finite between the two.

Without flags it is torch's linear and an in-place ReLU. With flags, three ways lead to the same values:

- eagerly on the CPU, torch's GEMM, one cheap read (`add_flag_`), ReLU in place; autograd is torch's own;
- eagerly on a GPU, the kernels of _linear_triton.py, forward and backward;
- where a compiler, a transform of torch.func or a dispatch mode intercepts operations, the registered op
  `initlab::linear_relu`, which changes nothing in place: it returns (y, flag), and the wrapper ors flag into `flags`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import backends
from .nonfinite import NAN as NAN  # for the backend too, which imports its own op alone
from .nonfinite import NEGATIVE_INF as NEGATIVE_INF
from .nonfinite import POSITIVE_INF as POSITIVE_INF
from .nonfinite import add_flag_, nonfinite_flag
from .tensors import all_plain
from .torch_internals import count_dispatch_modes, is_transforming, is_wrapper

_MODULES = {"numba": None, "triton": "._linear_triton"}  # on a CPU nothing betters torch's GEMM
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, flags: Tensor | None = None) -> Tensor:
    """relu(input @ weight.T + bias); what is not finite before ReLU is flagged, without waiting for the device.

    Args:
        input: (..., K), any strides, any number of leading dimensions, none of them or empty ones too. float32,
            bfloat16, float16 or float64; autocast converts it as it does for torch.nn.functional.linear.
        weight: (N, K), of input's dtype and on its device.
        bias: (N,), likewise, or None.
        flags: int32, shape (1,), on input's device. NaN = 1, +inf = 2 and -inf = 4 are or-ed into it, as the value
            before ReLU has them once it is rounded to the output's dtype: an overflow of float16 counts, and so does
            a -inf that ReLU turns into 0. None checks nothing.

    Returns:
        (..., N), of input's dtype. NaN stays NaN, as in torch.

    Raises:
        ValueError: if the shapes do not fit, or flags has another dtype, shape or device.
        TypeError: if input is not real and floating, or is float8.
        NotImplementedError: if flags is given for tensors that wrap others, such as DTensor.
        RuntimeError: if dtypes or devices differ, as torch.nn.functional.linear has it, or INITLAB_BACKEND names a
            backend that this op does not have.

    Source:
        Nair and Hinton, "Rectified linear units improve restricted Boltzmann machines", ICML 2010, for ReLU.

    Example:
        >>> import torch
        >>> from initlab.kernels import describe, linear_relu
        >>> flags = torch.zeros(1, dtype=torch.int32)
        >>> x = torch.tensor([[1.0, -float("inf")]])
        >>> linear_relu(x, torch.ones(3, 2), flags=flags)
        tensor([[0., 0., 0.]])
        >>> describe(int(flags))
        '-inf'
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(linear_relu, (input, weight, bias), input, weight, bias, flags=flags)
    _check_shapes(input, weight, bias, flags)
    if needs_registered_op(input, weight, bias):
        if flags is None:
            return F.linear(input, weight, bias).relu_()
        op = _FunctorchLinearReLU.apply if is_transforming() else _op
        y, flag = op(*_operands(input, weight, bias))
        flags.bitwise_or_(flag)
        return y
    if backends.load(input.device, _MODULES).module is not None:
        input, weight, bias = _operands(input, weight, bias)
        if input.dtype in _TRITON_DTYPES:
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias)):
                return _TritonLinearReLU.apply(input, weight, bias, flags)
            return _triton_forward(input, weight, bias, flags)
    y = F.linear(input, weight, bias)
    if flags is not None:
        add_flag_(flags, y)
    return y.relu_()


def _check_shapes(input: Tensor, weight: Tensor, bias: Tensor | None, flags: Tensor | None) -> None:
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input is {tuple(input.shape)} and weight {tuple(weight.shape)}; they must be (..., K) and (N, K)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias is {tuple(bias.shape)}; it must have one number for each row of weight: ({weight.shape[0]},)"
        )
    if not input.is_floating_point() or input.dtype.itemsize == 1:  # float8 has no ReLU in torch
        raise TypeError(f"input is {input.dtype}; linear_relu needs a real floating-point tensor: convert it")
    for t in (weight, bias):
        # With a meta weight torch's linear returns what memory holds. A meta input asks for shapes alone.
        if t is not None and t.device != input.device and not input.is_meta:
            raise RuntimeError(f"input is on {input.device}, weight or bias on {t.device}: move them to one device")
    if flags is not None and (flags.dtype != torch.int32 or flags.shape != (1,) or flags.device != input.device):
        raise ValueError(
            f"flags is {flags.dtype}, {tuple(flags.shape)}, on {flags.device}; "
            f"make it by torch.zeros(1, dtype=torch.int32, device={str(input.device)!r})"
        )


def needs_registered_op(*tensors: Tensor | None) -> bool:
    """Whether a compiler, a transform, a dispatch mode or a subclass intercepts operations and must see the op."""
    return torch.compiler.is_compiling() or is_transforming() or count_dispatch_modes() > 0 or not all_plain(tensors)


def _operands(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What torch's linear would compute with under autocast, checked as it would."""
    tensors = (input, weight) if bias is None else (input, weight, bias)
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)  # type: ignore[assignment]
    for t in tensors:
        if bool(is_wrapper(t)):
            raise NotImplementedError(
                f"flags do not work with a {type(t).__name__}, which wraps other tensors; "
                "leave flags out, or call linear_relu on the tensors inside"
            )
        if t.dtype != tensors[0].dtype or t.device != input.device:
            raise RuntimeError(
                f"input is {tensors[0].dtype} on {input.device}, weight or bias {t.dtype} on {t.device}; "
                "they must agree: convert them, or use autocast"
            )
    return tensors if bias is not None else (*tensors, None)


@torch.library.custom_op("initlab::linear_relu", mutates_args=())
def _op(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The registered op: (relu(input @ weight.T + bias), the flag before ReLU)."""
    flag = torch.zeros(1, dtype=torch.int32, device=input.device)
    if backends.load(input.device, _MODULES).module is not None and input.dtype in _TRITON_DTYPES:
        return _triton_forward(input, weight, bias, flag), flag
    y = F.linear(_as_matrix(input), weight, bias)
    add_flag_(flag, y)
    return y.relu_().view(*input.shape[:-1], weight.shape[0]), flag


@_op.register_fake
def _fake(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return input.new_empty(*input.shape[:-1], weight.shape[0]), input.new_empty(1, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[0])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias. The mask is read off the output: beside it only the operands are saved."""
    input, weight, y = ctx.saved_tensors
    grad, grad_bias = _mask_and_sum(_as_matrix(grad), _as_matrix(y), ctx.needs_input_grad[2])
    grad_input = (grad @ weight).view(input.shape) if ctx.needs_input_grad[0] else None
    grad_weight = grad.t() @ _as_matrix(input) if ctx.needs_input_grad[1] else None
    return grad_input, grad_weight, None if grad_bias is None else grad_bias.to(weight.dtype)


def _mask_and_sum(grad: Tensor, y: Tensor, summed: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient where ReLU let the value pass, and its sum over the rows."""
    differentiable = torch.is_grad_enabled() and grad.requires_grad  # a second derivative will be asked for
    if summed and y.numel() > 0 and not differentiable and not needs_registered_op(grad, y):
        module = backends.load(y.device, _MODULES).module
        if module is not None and y.dtype in _TRITON_DTYPES:
            result: tuple[Tensor, Tensor] = module.mask_and_sum(grad, y)
            return result
    grad = torch.ops.aten.threshold_backward(grad, y, 0)
    return grad, grad.sum(0) if summed else None


_op.register_autograd(_backward, setup_context=_setup_context)


class _FunctorchLinearReLU(torch.autograd.Function):
    """The op for torch.func, whose transforms of reverse mode do not see an op's registered gradient."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return _op(input, weight, bias)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, int | None, int | None], input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
        """One flag for the whole batch."""
        if dims[1] is None and dims[2] is None:
            assert dims[0] is not None
            return _FunctorchLinearReLU.apply(input.movedim(dims[0], 0), weight, bias), (0, None)
        input, weight = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in ((input, dims[0]), (weight, dims[1]))
        )
        x = input.reshape(info.batch_size, math.prod(input.shape[1:-1]), input.shape[-1])
        if bias is None:
            y = x @ weight.mT
        else:
            bias = bias.expand(info.batch_size, -1) if dims[2] is None else bias.movedim(dims[2], 0)
            y = torch.baddbmm(bias[:, None], x, weight.mT)
        flag = nonfinite_flag(y).view(1)
        return (y.relu_().view(*input.shape[:-1], weight.shape[1]), flag), (0, None)


def _as_matrix(tensor: Tensor) -> Tensor:
    """(..., n) -> (m, n). reshape(-1, n) would not do where there are no elements."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _triton_forward(input: Tensor, weight: Tensor, bias: Tensor | None, flags: Tensor | None) -> Tensor:
    y: Tensor = backends.load(input.device, _MODULES).module.forward(_as_matrix(input), weight, bias, flags)
    return y.view(*input.shape[:-1], weight.shape[0])


class _TritonLinearReLU(torch.autograd.Function):
    """What the registered op is to autograd, without the cost of its call, and with flags or-ed where they lie."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, flags: Tensor | None) -> Tensor:
        y = _triton_forward(input, weight, bias, flags)
        ctx.save_for_backward(input, weight, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, grad), None)
