"""linear_relu: a linear layer and its ReLU, or squared ReLU, and a flag for what is not finite between the two.

Without flags it is torch's linear and an in-place ReLU. With flags, four ways lead to the same values:

- eagerly on the CPU, torch's GEMM, one cheap read (`add_flag_`), ReLU in place; autograd is torch's own;
- eagerly on a GPU, the kernels of _linear_triton.py, forward and backward;
- where a compiler, a transform of torch.func or a dispatch mode intercepts operations, the registered op
  `initlab::linear_relu`, which changes nothing in place: it returns (y, flag), and the wrapper ors flag into `flags`;
- operands that wrap other tensors (DTensor, quantised weights): their own linear and ReLU, and the flag of the product.

Gradients of squared ReLU need ReLU's value r: a root of the rounded square has lost what underflowed and overflowed.
So where gradients are asked for r is what is kept; elsewhere the GPU's epilogue stores the square alone.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import backends
from .nonfinite import NAN as NAN  # for the backend too, which imports its own op alone
from .nonfinite import NEGATIVE_INF as NEGATIVE_INF
from .nonfinite import POSITIVE_INF as POSITIVE_INF
from .nonfinite import add_flag_, nonfinite_flag
from .tensors import PLAIN, all_plain, settled, wraps_tensors
from .torch_internals import count_dispatch_modes, has_tangents, is_tracing, is_transforming

_MODULES = {"numba": None, "triton": "._linear_triton"}  # on a CPU nothing betters torch's GEMM
_LOOKS = {"numba": "._linear_numba"}  # but what follows it there
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The smallest number of a dtype whose square is rounded to an infinity: 2^(e/2), where its numbers end at 2^e. That
# before it, smaller by a part s, has a square that is smaller by 2s - s^2, more than half a step.
SQUARE_LIMITS = {
    dtype: 2.0 ** (math.frexp(torch.finfo(dtype).max)[1] // 2) for dtype in (*_TRITON_DTYPES, torch.float64)
}


def linear_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    flags: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """relu(input @ weight.T + bias); what is not finite before ReLU is flagged, without waiting for the device.

    Args:
        input: (..., K), any strides, any number of leading dimensions, none of them or empty ones too. float32,
            bfloat16, float16 or float64; autocast converts it as it does for torch.nn.functional.linear.
        weight: (N, K), of input's dtype and on its device.
        bias: (N,), likewise, or None.
        flags: int32, shape (1,), on input's device. NaN = 1, +inf = 2 and -inf = 4 are or-ed into it, as the value
            before ReLU has them once it is rounded to the output's dtype: an overflow of float16 counts, and so does
            a -inf that ReLU turns into 0. None checks nothing.
        activation: "relu", or "relu_squared", relu(...) ** 2: ReLU rounded to the output's dtype, and its square
            rounded once more. A square that overflows is flagged as +inf too: from 2^64 on in float32 and bfloat16, 256
            in float16 and 2^512 in float64.

    Returns:
        (..., N), of input's dtype. NaN stays NaN, as in torch.

    Raises:
        ValueError: if the shapes do not fit, flags has another dtype, shape or device, or activation is unknown.
        TypeError: if input is not real and floating, or is float8.
        NotImplementedError: if flags is given and the product wraps other tensors in a way that is not known here.
            DTensors are known: each rank flags the elements that it holds, and sums over ranks (Partial) are reduced
            before ReLU, as DTensor's own ReLU has it.
        RuntimeError: if dtypes or devices differ, as torch.nn.functional.linear has it, or INITLAB_BACKEND names a
            backend that this op does not have.

    Source:
        Nair and Hinton, "Rectified linear units improve restricted Boltzmann machines", ICML 2010, for ReLU. So et
        al., "Primer: searching for efficient transformers for language modeling", NeurIPS 2021, for its square.

    Example:
        >>> import torch
        >>> from initlab.kernels import describe, linear_relu
        >>> flags = torch.zeros(1, dtype=torch.int32)
        >>> x = torch.tensor([[1.0, -float("inf")]])
        >>> linear_relu(x, torch.ones(3, 2), flags=flags)
        tensor([[0., 0., 0.]])
        >>> describe(int(flags))
        '-inf'
        >>> linear_relu(torch.tensor([1.0, 2.0]), torch.ones(3, 2), activation="relu_squared")
        tensor([9., 9., 9.])
    """
    squared = activation == "relu_squared"
    if not squared and activation != "relu":
        raise ValueError(f'activation is {activation!r}; it must be "relu" or "relu_squared"')
    if _is_ordinary(input, weight, bias, flags):
        return _on_cpu(input, weight, bias, flags, squared)
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            linear_relu, (input, weight, bias), input, weight, bias, flags=flags, activation=activation
        )
    _check_operands(input, weight, bias, flags)
    if needs_registered_op(input, weight, bias):
        if flags is None:
            r = F.linear(input, weight, bias).relu()
        elif any(map(wraps_tensors, (input, weight, bias))):
            r, held = settled(F.linear(input, weight, bias))
            if needs_registered_op(held):
                flags.bitwise_or_(_square_flag(held) if squared else nonfinite_flag(held))
            else:
                _add_flag_(flags, held, squared)
            r = r.relu()
        else:
            op = _FunctorchLinearReLU.apply if is_transforming() else _op
            r, flag = op(*_operands(input, weight, bias), squared)
            if not is_compiling() and is_tracing():
                warnings.warn("torch.jit.trace drops flags that are no input of what it traces", stacklevel=2)
            flags.bitwise_or_(flag)
        return r.square() if squared else r
    if backends.load(input.device, _MODULES).module is not None:
        input, weight, bias = _operands(input, weight, bias)
        if input.dtype in _TRITON_DTYPES:
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias)):
                y: Tensor = _TritonLinearReLU.apply(input, weight, bias, flags, squared)[0]
                return y
            return _triton_forward(input, weight, bias, flags, squared, squared)
    return _on_cpu(input, weight, bias, flags, squared)


def _is_ordinary(input: Tensor, weight: Tensor, bias: Tensor | None, flags: Tensor | None) -> bool:
    """Whether nothing stands between plain tensors on the CPU and torch's linear, which finds what else is wrong.

    Most calls go this way, and small ones are as long as what Python asks before them: so each thing is asked once.
    """
    return not (
        is_dynamo_compiling()
        or is_transforming()
        or count_dispatch_modes()
        or is_tracing()
        or type(input) not in PLAIN
        or type(weight) not in PLAIN
        or not input.is_cpu
        or not weight.is_cpu
        or weight.dim() != 2
        # Where a bias lies torch asks as well. One number it would add to all: so where there may be one, ask more.
        or (bias is not None and (type(bias) not in PLAIN or bias.dim() != 1 or bias.nbytes <= 8))
        or (
            flags is not None
            and (flags.dtype != torch.int32 or not flags.is_cpu or flags.dim() != 1 or flags.nbytes != 4)
        )
        or backends.requested() == "triton"
    )


def _on_cpu(input: Tensor, weight: Tensor, bias: Tensor | None, flags: Tensor | None, squared: bool) -> Tensor:
    """By torch's GEMM, which nothing betters there, and torch's autograd; on other devices, where Triton is absent."""
    try:
        y = F.linear(input, weight, bias)
    except RuntimeError:
        _check_operands(input, weight, bias, flags)  # which may say more clearly what is wrong
        raise
    recorded = y.requires_grad or has_tangents()
    flag = None if recorded else _one_pass(y, squared, True)
    if flag is None:
        if not y.is_floating_point():
            _check_operands(input, weight, bias, flags)
        if flags is not None:
            _add_flag_(flags, y, squared)
        y = y.relu_()
    elif flag and flags is not None:
        flags.bitwise_or_(flag)
    if not squared:
        return y
    return y.square() if recorded else y.square_()


def _one_pass(y: Tensor, flag_square: bool, activate: bool) -> int | None:
    """The flag of y, which has become its ReLU if `activate`. None if this is not for y, and nothing was done."""
    look = _looks(backends.requested(), flag_square).get(y.dtype)
    if look is None or type(y) not in PLAIN or not y.is_cpu:
        return None
    try:
        size, address = y.nbytes if y.is_contiguous() else 0, y.data_ptr()
    except RuntimeError:  # of sparse and mkldnn's layouts
        return None
    # Those of functionalization have no memory.
    if size == 0 or address == 0 or (size > look.small and torch.get_num_threads() > 1):
        return None
    flag: int = look.kernel(address, size, look.infinity, look.limit, activate)
    return flag


@functools.cache
def _looks(requested: str, flag_square: bool) -> Mapping[torch.dtype, Any]:
    """What the numba backend has for dtypes: its `Look`s."""
    module = None if requested == "triton" else backends.load(torch.device("cpu"), _LOOKS).module
    return {} if module is None else module.LOOKS[flag_square]


def _add_flag_(flags: Tensor, y: Tensor, flag_square: bool) -> None:
    """Or the flag of y, plain, into `flags`, and if flag_square +inf where the square of ReLU overflows."""
    flag = _one_pass(y, flag_square, False)
    if flag is not None:
        if flag:
            flags.bitwise_or_(flag)
        return
    y = y.detach()
    if flag_square:
        if not _squares_fit(y):
            flags.bitwise_or_(_square_flag(y))
    else:
        add_flag_(flags, y)


def _squares_fit(y: Tensor) -> bool:
    """Whether one cheap read finds squares finite, and so y: False where in doubt."""
    if not y.is_cpu:
        return False  # it would wait for the device
    limit = SQUARE_LIMITS[y.dtype]
    if y.dtype == torch.float16:  # norms beyond 256 are common
        return y.numel() == 0 or max(abs(extreme.item()) for extreme in y.aminmax()) < limit
    norm: float = torch.linalg.vector_norm(y).item()
    return norm < limit


def _square_flag(y: Tensor) -> Tensor:
    """The flag of y, and +inf where the square of ReLU overflows."""
    return nonfinite_flag(y) | (y >= SQUARE_LIMITS[y.dtype]).any().to(torch.int32) * POSITIVE_INF


def _check_operands(input: Tensor, weight: Tensor, bias: Tensor | None, flags: Tensor | None) -> None:
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
    return _is_intercepted() or not all_plain(tensors)


def _is_intercepted() -> bool:
    return is_compiling() or is_transforming() or count_dispatch_modes() > 0 or is_tracing()


def _operands(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What torch's linear would compute with under autocast, checked as it would."""
    tensors = (input, weight) if bias is None else (input, weight, bias)
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)  # type: ignore[assignment]
    for t in tensors:
        if t.dtype != tensors[0].dtype or t.device != input.device:
            raise RuntimeError(
                f"input is {tensors[0].dtype} on {input.device}, weight or bias {t.dtype} on {t.device}; "
                "they must agree: convert them, or use autocast"
            )
    return tensors if bias is not None else (*tensors, None)


@torch.library.custom_op("initlab::linear_relu", mutates_args=())
def _op(input: Tensor, weight: Tensor, bias: Tensor | None, flag_square: bool = False) -> tuple[Tensor, Tensor]:
    """The registered op: (relu(input @ weight.T + bias), the flag before ReLU, with flag_square of a square too)."""
    flag = torch.zeros(1, dtype=torch.int32, device=input.device)
    if backends.load(input.device, _MODULES).module is not None and input.dtype in _TRITON_DTYPES:
        return _triton_forward(input, weight, bias, flag, flag_square, False), flag
    y = F.linear(_as_matrix(input), weight, bias)
    _add_flag_(flag, y, flag_square)
    return y.relu_().view(*input.shape[:-1], weight.shape[0]), flag


@_op.register_fake
def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, flag_square: bool = False) -> tuple[Tensor, Tensor]:
    return input.new_empty(*input.shape[:-1], weight.shape[0]), input.new_empty(1, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[0])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias. The mask is read off the output: beside it only the operands are saved."""
    input, weight, r = ctx.saved_tensors
    grad, grad_bias = _mask_and_sum(_as_matrix(grad), _as_matrix(r), ctx.needs_input_grad[2])
    return (*_product_gradients(ctx, grad, input, weight), grad_bias, None)


def _product_gradients(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and weight, grad being that of their product, (M, N)."""
    grad_input = (grad @ weight).view(input.shape) if ctx.needs_input_grad[0] else None
    grad_weight = grad.t() @ _as_matrix(input) if ctx.needs_input_grad[1] else None
    return grad_input, grad_weight


def _mask_and_sum(grad: Tensor, r: Tensor, summed: bool, squared: bool = False) -> tuple[Tensor, Tensor | None]:
    """The gradient where ReLU let the value pass, of the square if squared, and its sum over the rows."""
    # Whether a second derivative may be asked for: that of ReLU's square depends on r, that of ReLU on grad alone.
    differentiable = torch.is_grad_enabled() and (grad.requires_grad or squared)
    if (summed or squared) and r.numel() > 0 and not differentiable and not needs_registered_op(grad, r):
        module = backends.load(r.device, _MODULES).module
        if module is not None and r.dtype in _TRITON_DTYPES:
            grad, sums = module.mask_and_sum(grad, r, squared)
            return grad, sums.to(r.dtype) if summed else None
    if squared:
        grad = grad * (r + r)
    grad = torch.ops.aten.threshold_backward(grad, r, 0)
    return grad, grad.sum(0) if summed else None


_op.register_autograd(_backward, setup_context=_setup_context)


class _FunctorchLinearReLU(torch.autograd.Function):
    """The op for torch.func, whose transforms of reverse mode do not see an op's registered gradient."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, flag_square: bool) -> tuple[Tensor, Tensor]:
        return _op(input, weight, bias, flag_square)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], input: Tensor, weight: Tensor, bias: Tensor | None, flag_square: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
        """One flag for the whole batch."""
        if dims[1] is None and dims[2] is None:
            assert dims[0] is not None
            return _FunctorchLinearReLU.apply(input.movedim(dims[0], 0), weight, bias, flag_square), (0, None)
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
        flag = (_square_flag(y) if flag_square else nonfinite_flag(y)).view(1)
        return (y.relu_().view(*input.shape[:-1], weight.shape[1]), flag), (0, None)


def _as_matrix(tensor: Tensor) -> Tensor:
    """(..., n) -> (m, n). reshape(-1, n) would not do where there are no elements."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _triton_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, flags: Tensor | None, flag_square: bool, squared: bool
) -> Tensor:
    module = backends.load(input.device, _MODULES).module
    y: Tensor = module.forward(_as_matrix(input), weight, bias, flags, flag_square, squared)
    return y.view(*input.shape[:-1], weight.shape[0])


class _TritonLinearReLU(torch.autograd.Function):
    """What the registered op is to autograd, without the cost of its call, with flags or-ed where they lie.

    Returns (y, r), r the value of ReLU that is saved, and y its square; or (r,). That r is an output lets second
    derivatives reach it.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, flags: Tensor | None, squared: bool
    ) -> tuple[Tensor, ...]:
        r = _triton_forward(input, weight, bias, flags, squared, False)
        ctx.save_for_backward(input, weight, r)
        ctx.squared = squared
        ctx.set_materialize_grads(False)
        return (r.square(), r) if squared else (r,)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        input, weight, r = ctx.saved_tensors
        squared, summed = ctx.squared, ctx.needs_input_grad[2]
        parts = []
        for grad, of_square in zip(grads, (squared, False), strict=False):
            if grad is not None:
                parts.append(_mask_and_sum(_as_matrix(grad), _as_matrix(r), summed, of_square))
        if not parts:
            return (None,) * 5
        grad, grad_bias = parts[0]
        for more, more_bias in parts[1:]:
            grad = grad + more
            grad_bias = None if grad_bias is None or more_bias is None else grad_bias + more_bias
        return (*_product_gradients(ctx, grad, input, weight), grad_bias, None, None)
