"""Drop-in for torch.nn.init: its names, signatures, errors and warnings; the values come from initlab's stream.

A call takes one 64-bit key from the generator in force, and the key fixes every value: the same on every device, with
any number of threads, for any strides, and in every dtype the rounding of the same draw. Of a DTensor each rank fills
what it holds, without communication: where ranks agree on `torch.manual_seed`, they hold parts of one tensor. What
draws nothing is torch's own function. docs/init.md lists where a call behaves differently from torch's.
"""

import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.init import (
    _calculate_correct_fan,
    _calculate_fan_in_and_fan_out,
    calculate_gain,
    constant_,
    ones_,
    zeros_,
)
from torch.nn.init import dirac_ as _torchs_dirac_  # now, since swap() puts ours in their places
from torch.nn.init import eye_ as _torchs_eye_
from torch.overrides import handle_torch_function, has_torch_function_variadic

from initlab.kernels import Distribution, Draw, Normal, Region, TruncatedNormal, Uniform, eagerly, fill_, generator_key

from .distributed.dtensors import count_as_written, is_dtensor, local
from .distributed.shards import draws, local_shards

__all__ = [
    "calculate_gain",
    "constant",
    "constant_",
    "dirac",
    "dirac_",
    "eye",
    "eye_",
    "kaiming_normal",
    "kaiming_normal_",
    "kaiming_uniform",
    "kaiming_uniform_",
    "normal",
    "normal_",
    "ones_",
    "orthogonal",
    "orthogonal_",
    "sparse",
    "sparse_",
    "trunc_normal_",
    "uniform",
    "uniform_",
    "xavier_normal",
    "xavier_normal_",
    "xavier_uniform",
    "xavier_uniform_",
    "zeros_",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_FanMode = Literal["fan_in", "fan_out"]
_NonlinearityType = Literal[
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "sigmoid",
    "tanh",
    "relu",
    "leaky_relu",
    "selu",
]

_PLAIN = (Tensor, Parameter)
_QR_DTYPE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}  # LAPACK and cuSOLVER have neither


def uniform_(
    tensor: Tensor,
    a: float = 0.0,
    b: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a tensor with values uniform on [a, b).

    Args:
        tensor: any shape and strides; float64, float32, bfloat16, float16, or complex, where the real and the
            imaginary part are drawn each on its own.
        a: lower bound, included.
        b: upper bound, left out; with a == b every element is a.
        generator: where the key is drawn from; None is torch's default CPU generator, whatever the device.

    Returns:
        The tensor itself, filled in place outside autograd.

    Raises:
        RuntimeError: if a > b, a bound or b - a is not finite in the dtype, or the tensor overlaps itself.
        NotImplementedError: for an integer, bool or float8 dtype, or a wrapper other than DTensor.

    Source:
        docs/stream.md, "uniform".

    Example:
        >>> import torch, initlab
        >>> w = initlab.init.uniform_(torch.empty(3, 5), -0.1, 0.1)
        >>> w.abs().max().item() <= 0.1
        True
    """
    if has_torch_function_variadic(tensor):
        return handle_torch_function(uniform_, (tensor,), tensor=tensor, a=a, b=b, generator=generator)
    return eagerly(_sample, tensor, generator, Uniform, a, b)


def normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a tensor with normal deviates.

    Args:
        tensor: any shape and strides; float64, float32, bfloat16, float16, or complex, where the variance is
            shared equally by the real and the imaginary part.
        mean: mean of the distribution.
        std: standard deviation, >= 0; with 0 every element is the mean.
        generator: where the key is drawn from; None is torch's default CPU generator, whatever the device.

    Returns:
        The tensor itself, filled in place outside autograd.

    Raises:
        RuntimeError: if std is negative or NaN, or the tensor overlaps itself.
        NotImplementedError: for an integer, bool or float8 dtype, or a wrapper other than DTensor.

    Source:
        G. E. P. Box and M. E. Muller, "A note on the generation of random normal deviates", 1958; docs/stream.md.

    Example:
        >>> import torch, initlab
        >>> seed = torch.manual_seed(0)
        >>> w = initlab.init.normal_(torch.empty(3, 5), std=0.02)
        >>> again = initlab.init.normal_(torch.empty(3, 5), std=0.02, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(w, again)
        True
    """
    if has_torch_function_variadic(tensor):
        return handle_torch_function(normal_, (tensor,), tensor=tensor, mean=mean, std=std, generator=generator)
    return eagerly(_sample, tensor, generator, Normal, mean, std)


def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a tensor with normal deviates conditioned on [a, b], in one pass, without rejection.

    Args:
        tensor: any shape and strides; float64, float32, bfloat16 or float16.
        mean: mean of the normal distribution before it is cut.
        std: standard deviation of the normal distribution before it is cut, > 0.
        a: smallest value, in the units of the tensor; -inf is allowed.
        b: largest value, in the units of the tensor; inf is allowed.
        generator: where the key is drawn from; None is torch's default CPU generator, whatever the device.

    Returns:
        The tensor itself, filled in place outside autograd.

    Raises:
        ValueError: if std is not positive, a parameter is NaN, or the nearer bound lies beyond 12 std.
        RuntimeError: if a > b, or the tensor overlaps itself.
        NotImplementedError: for any other dtype, or a wrapper other than DTensor.

    Source:
        L. Devroye, "Non-Uniform Random Variate Generation", 1986, II.2 (inversion); docs/stream.md.

    Example:
        >>> import torch, initlab
        >>> w = initlab.init.trunc_normal_(torch.empty(3, 5), std=0.02, a=-0.04, b=0.04)
        >>> w.abs().max().item() <= 0.04
        True
    """
    if not tensor.is_meta and (mean < a - 2 * std or mean > b + 2 * std):
        warnings.warn(
            "mean is more than 2 std from [a, b] in nn.init.trunc_normal_. "
            "The values follow the truncated distribution, which crowds at the nearer bound.",
            stacklevel=2,
        )
    return eagerly(_sample, tensor, generator, TruncatedNormal, mean, std, a, b)


def xavier_uniform_(
    tensor: Tensor,
    gain: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with values uniform on [-x, x), x = gain * sqrt(6 / (fan_in + fan_out)).

    Args:
        tensor: shape (out, in, *kernel), two dimensions or more; dtypes as in uniform_.
        gain: factor on the standard deviation, >= 0; see calculate_gain.
        generator: where the key is drawn from; None is torch's default CPU generator, whatever the device.

    Returns:
        The tensor itself, filled in place outside autograd.

    Raises:
        ValueError: if the tensor has fewer than two dimensions.
        ZeroDivisionError: if both fans are 0.
        RuntimeError: if the gain is negative or not finite.

    Source:
        X. Glorot and Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010.

    Example:
        >>> import torch, initlab
        >>> w = initlab.init.xavier_uniform_(torch.empty(2, 4), gain=5 / 3)
        >>> w.abs().max().item() <= 5 / 3
        True
    """
    x = math.sqrt(3.0) * _xavier_std(tensor, gain)
    return eagerly(_sample, tensor, generator, Uniform, -x, x)


def xavier_normal_(
    tensor: Tensor,
    gain: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with normal deviates, std = gain * sqrt(2 / (fan_in + fan_out)).

    Args:
        tensor: shape (out, in, *kernel), two dimensions or more; dtypes as in normal_.
        gain: factor on the standard deviation, >= 0; see calculate_gain.
        generator: where the key is drawn from; None is torch's default CPU generator, whatever the device.

    Returns:
        The tensor itself, filled in place outside autograd.

    Raises:
        ValueError: if the tensor has fewer than two dimensions.
        ZeroDivisionError: if both fans are 0.
        RuntimeError: if the gain is negative or NaN.

    Source:
        X. Glorot and Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010.

    Example:
        >>> import torch, initlab
        >>> w = initlab.init.xavier_normal_(torch.empty(300, 200))
        >>> round(w.std().item(), 2)  # sqrt(2 / 500) is 0.063
        0.06
    """
    return eagerly(_sample, tensor, generator, Normal, 0.0, _xavier_std(tensor, gain))


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0,
    mode: _FanMode = "fan_in",
    nonlinearity: _NonlinearityType = "leaky_relu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with values uniform on [-x, x), x = gain * sqrt(3 / fan).

    Args:
        tensor: shape (out, in, *kernel), two dimensions or more; dtypes as in uniform_.
        a: negative slope of the leaky_relu that follows; unused for other nonlinearities.
        mode: "fan_in" keeps the variance of activations, "fan_out" that of gradients.
        nonlinearity: what follows the layer; sets the gain, see calculate_gain.
        generator: where the key is drawn from; None is torch's default CPU generator, whatever the device.

    Returns:
        The tensor itself, filled in place outside autograd. Without elements: untouched, with a UserWarning.

    Raises:
        ValueError: if the tensor has fewer than two dimensions, or mode, nonlinearity or a is not valid.

    Source:
        K. He, X. Zhang, S. Ren and J. Sun, "Delving deep into rectifiers", 2015.

    Example:
        >>> import torch, initlab
        >>> w = initlab.init.kaiming_uniform_(torch.empty(8, 6), nonlinearity="relu")
        >>> w.abs().max().item() <= 1.0  # sqrt(2) * sqrt(3 / 6)
        True
    """
    if has_torch_function_variadic(tensor):
        return handle_torch_function(
            kaiming_uniform_,
            (tensor,),
            tensor=tensor,
            a=a,
            mode=mode,
            nonlinearity=nonlinearity,
            generator=generator,
        )
    if 0 in tensor.shape:
        warnings.warn("Initializing zero-element tensors is a no-op", stacklevel=2)
        return tensor
    x = math.sqrt(3.0) * _kaiming_std(tensor, a, mode, nonlinearity)
    return eagerly(_sample, tensor, generator, Uniform, -x, x)


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0,
    mode: _FanMode = "fan_in",
    nonlinearity: _NonlinearityType = "leaky_relu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with normal deviates, std = gain / sqrt(fan).

    Args:
        tensor: shape (out, in, *kernel), two dimensions or more; dtypes as in normal_.
        a: negative slope of the leaky_relu that follows; unused for other nonlinearities.
        mode: "fan_in" keeps the variance of activations, "fan_out" that of gradients.
        nonlinearity: what follows the layer; sets the gain, see calculate_gain.
        generator: where the key is drawn from; None is torch's default CPU generator, whatever the device.

    Returns:
        The tensor itself, filled in place outside autograd. Without elements: untouched, with a UserWarning.

    Raises:
        ValueError: if the tensor has fewer than two dimensions, or mode, nonlinearity or a is not valid.

    Source:
        K. He, X. Zhang, S. Ren and J. Sun, "Delving deep into rectifiers", 2015.

    Example:
        >>> import torch, initlab
        >>> w = initlab.init.kaiming_normal_(torch.empty(256, 200), nonlinearity="relu")
        >>> round(w.std().item(), 1)  # sqrt(2 / 200) is 0.1
        0.1
    """
    if 0 in tensor.shape:
        warnings.warn("Initializing zero-element tensors is a no-op", stacklevel=2)
        return tensor
    return eagerly(_sample, tensor, generator, Normal, 0.0, _kaiming_std(tensor, a, mode, nonlinearity))


def eye_(tensor: Tensor) -> Tensor:
    """Fill a matrix with the identity, as torch.nn.init.eye_ does, and of a DTensor each rank its part of it.

    Args:
        tensor: shape (rows, columns); any dtype.

    Returns:
        The tensor itself, filled in place outside autograd.

    Raises:
        ValueError: if the tensor is not two-dimensional.

    Example:
        >>> import torch, initlab
        >>> initlab.init.eye_(torch.empty(2, 3))
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    if not is_dtensor(tensor) or tensor.ndimension() != 2:
        return _torchs_eye_(tensor)
    return _fill_by_place(tensor, lambda row, column: row == column)


def dirac_(tensor: Tensor, groups: int = 1) -> Tensor:
    """Fill a convolution's weight so that it passes its inputs on, as torch.nn.init.dirac_ does; DTensors in parts.

    Args:
        tensor: shape (out, in, *kernel), three to five dimensions; any dtype.
        groups: of the convolution; `out` is a multiple of it.

    Returns:
        The tensor itself, filled in place outside autograd.

    Raises:
        ValueError: if the tensor has another number of dimensions, or groups does not divide `out`.

    Example:
        >>> import torch, initlab
        >>> initlab.init.dirac_(torch.empty(2, 2, 3))[:, :, 1]
        tensor([[1., 0.],
                [0., 1.]])
    """
    if not is_dtensor(tensor):
        return _torchs_dirac_(tensor, groups)
    _torchs_dirac_(torch.empty(tensor.shape, device="meta"), groups)  # for its errors
    out, inputs, *kernel = tensor.shape
    each = out // groups

    def hit(row: Tensor, column: Tensor, *place: Tensor) -> Tensor:
        found = (row % each == column) & (row % each < min(each, inputs))
        for at, size in zip(place, kernel, strict=True):
            found = found & (at == size // 2)
        return found

    return _fill_by_place(tensor, hit)


def orthogonal_(
    tensor: Tensor,
    gain: float = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with a random (semi-)orthogonal matrix, uniform over all such matrices.

    The Gaussian matrix comes from the stream; its QR factorisation is torch's, so the last bits depend on the
    linear algebra library. bfloat16 and float16 weights hold the rounding of the float32 result.

    Args:
        tensor: shape (rows, *columns), two dimensions or more, any strides; columns count as flattened.
        gain: factor on the orthogonal matrix.
        generator: where the key is drawn from; None is torch's default CPU generator, whatever the device.

    Returns:
        The tensor itself, filled in place outside autograd: gain * Q with orthonormal rows, or columns where
        there are more rows than columns.

    Raises:
        ValueError: if the tensor has fewer than two dimensions.
        NotImplementedError: for an integer, bool or float8 dtype, a DTensor or another wrapper.

    Source:
        A. Saxe, J. McClelland and S. Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep
        linear neural networks", 2013; F. Mezzadri, "How to generate random matrices from the classical compact
        groups", 2007, for the signs.

    Example:
        >>> import torch, initlab
        >>> w = initlab.init.orthogonal_(torch.empty(3, 5))
        >>> torch.allclose(w @ w.T, torch.eye(3), atol=1e-5)
        True
    """
    if tensor.ndimension() < 2:
        raise ValueError("Only tensors with 2 or more dimensions are supported")
    return eagerly(_orthogonal, tensor, gain, generator)


def sparse_(
    tensor: Tensor,
    sparsity: float,
    std: float = 0.01,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a matrix with normal deviates and set ceil(sparsity * rows) of each column to zero.

    Values and places both come from the one key of the call. The places are those of the smallest of `rows`
    uniform draws, ranked by torch's sort.

    Args:
        tensor: shape (rows, columns), any strides; dtypes as in normal_.
        sparsity: fraction of each column to set to zero, in [0, 1].
        std: standard deviation of the other values, >= 0.
        generator: where the key is drawn from; None is torch's default CPU generator, whatever the device.

    Returns:
        The tensor itself, filled in place outside autograd.

    Raises:
        ValueError: if the tensor is not two-dimensional, or sparsity is NaN.
        RuntimeError: if std is negative or NaN, or the tensor overlaps itself.
        NotImplementedError: for an integer, bool or float8 dtype, a DTensor or another wrapper.

    Source:
        J. Martens, "Deep learning via Hessian-free optimization", 2010.

    Example:
        >>> import torch, initlab
        >>> w = initlab.init.sparse_(torch.empty(10, 4), sparsity=0.25)
        >>> (w == 0).sum(dim=0).tolist()
        [3, 3, 3, 3]
    """
    if tensor.ndimension() != 2:
        raise ValueError("Only tensors with 2 dimensions are supported")
    return eagerly(_sparse, tensor, sparsity, std, generator)


# ---------------------------------------------------------------------------------------------------------------
# From a distribution to a filled tensor


def _sample(
    tensor: Tensor, generator: torch.Generator | None, distribution: Callable[..., Distribution], *parameters: float
) -> Tensor:
    drawn = distribution(*parameters)
    if type(tensor) in _PLAIN:
        fill_((Draw(tensor, drawn, _key(tensor, generator)),))  # of a meta or fake tensor it checks the dtype only
    elif not tensor.is_meta:
        parts = list(draws(tensor, drawn, 0))  # raises before a key is drawn
        fill_(replace(part, key=key) for key in (_key(tensor, generator),) for part in parts)
        count_as_written(tensor)
    _zero_tangent(tensor)
    return tensor


def _zero_tangent(tensor: Tensor) -> None:
    """As torch's samplers do in forward-mode differentiation: what was drawn depends on no input."""
    if forward_ad._current_level >= 0 and (tangent := forward_ad.unpack_dual(tensor).tangent) is not None:
        tangent.zero_()


def _orthogonal(tensor: Tensor, gain: float, generator: torch.Generator | None) -> Tensor:
    if not _holds_values(tensor) or tensor.numel() == 0:
        return tensor
    _refuse_dtensor(tensor, "orthogonal_")
    if tensor.layout != torch.strided:
        raise NotImplementedError(f"cannot fill a tensor of layout {tensor.layout}; fill its dense values")
    _refuse_inference(tensor)
    rows = tensor.size(0)
    with torch.no_grad():
        flat = torch.empty(
            (rows, tensor.numel() // rows), dtype=_QR_DTYPE.get(tensor.dtype, tensor.dtype), device=tensor.device
        )
        _sample(flat, generator, Normal, 0.0, 1.0)
        wide = flat.size(0) < flat.size(1)
        q, r = torch.linalg.qr(flat.t() if wide else flat)
        q *= r.diagonal().sgn()  # without it Q is not uniform: LAPACK fixes the signs of R
        q *= gain
        tensor.copy_((q.t() if wide else q).reshape(tensor.shape))
    return tensor


def _sparse(tensor: Tensor, sparsity: float, std: float, generator: torch.Generator | None) -> Tensor:
    distribution = Normal(0.0, std)
    if not _holds_values(tensor):
        return tensor
    _refuse_dtensor(tensor, "sparse_")
    rows, cols = tensor.shape
    zeros = math.ceil(sparsity * rows)
    key = _key(tensor, generator)
    # The places come from the same stream, from rows below those whose words the values take: rows of them, or twice
    # as many in a complex matrix. Four divides their number, so that no block of four words serves both.
    below = -(-rows // 2) * 4
    ranks = torch.empty((rows, cols), dtype=torch.float32, device=tensor.device)
    region = Region((below + rows, cols), (below, 0), (rows, cols))
    fill_((Draw(tensor, distribution, key), Draw(ranks, Uniform(0.0, 1.0), key, region)))
    places = ranks.argsort(dim=0, stable=True)[:zeros]
    with torch.no_grad():
        if tensor.is_complex():  # part by part: torch's scatter_ knows no complex32
            parts = torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)
            parts.scatter_(0, places.unsqueeze(-1).expand(-1, -1, 2), 0)
        else:
            tensor.scatter_(0, places, 0)
    _zero_tangent(tensor)
    return tensor


def _fill_by_place(tensor: Tensor, hit: Callable[..., Tensor]) -> Tensor:
    """Fill a DTensor with 1 where `hit` is true of an element's place in the logical tensor, else with 0."""
    _refuse_inference(local(tensor))
    with torch.no_grad():
        for mine, region in local_shards(tensor):
            places = [
                torch.arange(offset, offset + size, device=mine.device).view(-1, *(1,) * (mine.ndim - 1 - dim))
                for dim, (offset, size) in enumerate(zip(region.offsets, region.sizes, strict=True))
            ]
            mine.copy_(hit(*places))
    count_as_written(tensor)
    return tensor


def _refuse_inference(tensor: Tensor) -> None:
    """Before copy_ is called: on an inference tensor outside inference mode it writes, and then raises."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed; "
            "fill it inside torch.inference_mode(), or fill a clone"
        )


def _refuse_dtensor(tensor: Tensor, name: str) -> None:
    if is_dtensor(tensor):
        raise NotImplementedError(
            f"{name} needs the whole matrix, and of a DTensor a rank holds a part. Fill a plain tensor with it on "
            "every rank, from equal seeds, and pass that to distribute_tensor, or fill the model before it is sharded"
        )


def _xavier_std(tensor: Tensor, gain: float) -> float:
    fan_in, fan_out = _calculate_fan_in_and_fan_out(tensor)
    return gain * math.sqrt(2.0 / float(fan_in + fan_out))


def _kaiming_std(tensor: Tensor, a: float, mode: _FanMode, nonlinearity: _NonlinearityType) -> float:
    return calculate_gain(nonlinearity, a) / math.sqrt(_calculate_correct_fan(tensor, mode))


def _key(tensor: Tensor, generator: torch.Generator | None) -> int:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, not {type(generator).__name__}")
    if not _holds_values(tensor) or tensor.numel() == 0:
        return 0  # nothing to draw: the generator stays where it is
    if generator is None and tensor.device.type == "cuda" and not is_dtensor(tensor):
        _check_rank_seeds(tensor.device)
    key = generator_key(generator)
    log = getattr(_here, "log", None)
    if log is not None:
        log.append((tensor, generator, key))
    return key


_here = threading.local()


@contextmanager
def noting() -> Iterator[list[tuple[Tensor, torch.Generator | None, int]]]:
    """Inside it, this thread's draws are noted: (tensor, generator, key) each. swap() compares them across ranks."""
    before = getattr(_here, "log", None)
    log: list[tuple[Tensor, torch.Generator | None, int]] = []
    _here.log = log
    try:
        yield log
    finally:
        _here.log = before


def _holds_values(tensor: Tensor) -> bool:
    """False on meta and for fakes; raises for a wrapper, whose memory is not the tensor's, and in a traced graph."""
    if tensor.is_meta:
        return False
    if torch._C._get_tracing_state() is not None or (torch._C._len_torch_dispatch_stack() and _is_traced()):
        raise NotImplementedError(
            "initlab.init cannot be recorded by torch.export or make_fx, nor by torch.jit.trace: the graph would lack "
            "the draw. Fill the tensor outside what is traced"
        )
    kind = type(tensor)
    if kind not in _PLAIN:
        if isinstance(tensor, FakeTensor):
            return False
        if is_dtensor(tensor):
            return _holds_values(local(tensor))
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise NotImplementedError(
                f"initlab.init does not fill a {kind.__name__}, a wrapper around other tensors. Fill the plain tensor "
                "before it is wrapped, or use torch.nn.init for it, outside swap()"
            )
    if is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        raise NotImplementedError(
            "initlab.init does not fill a tensor that a torch.func transform (vmap, grad, functionalize, ...) has "
            "wrapped. Fill it before the transform"
        )
    if torch._C._len_torch_dispatch_stack() and _fake_mode_is_active():
        tensor.detach()  # for torch's own error, where the mode does not let real tensors in
        raise NotImplementedError(
            "initlab.init does not fill a real tensor under FakeTensorMode, where no value can be drawn. Fill it "
            "outside the mode"
        )
    return True


def _fake_mode_is_active() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _is_traced() -> bool:
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tracer is not None and tracer.get_proxy_mode() is not None


def _check_rank_seeds(device: torch.device) -> None:
    """Refuse to give ranks equal values where their CUDA seeds ask for different ones, as in Megatron's code."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    if not torch.cuda.is_initialized():
        return
    seed, cuda_seed = torch.initial_seed(), torch.cuda.default_generators[device.index].initial_seed()
    if seed != cuda_seed:
        raise RuntimeError(
            f"the CUDA seed of {device} is {cuda_seed}, the CPU seed {seed}, and there are "
            f"{distributed.get_world_size()} ranks. Without generator= the CPU generator gives the key, so ranks "
            "that differ by their CUDA seeds alone, as tensor-parallel ranks do, would get identical values. Pass "
            f"generator=torch.cuda.default_generators[{device.index}] for the rank's own values, or "
            "generator=torch.default_generator for the values that every rank shares"
        )


# ---------------------------------------------------------------------------------------------------------------
# Deprecated aliases


def _deprecated(function: Callable[_P, _R]) -> Callable[_P, _R]:
    new_name = function.__name__
    old_name = new_name[:-1]

    def alias(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        warnings.warn(
            f"`nn.init.{old_name}` is now deprecated in favor of `nn.init.{new_name}`.", FutureWarning, stacklevel=2
        )
        return function(*args, **kwargs)

    alias.__doc__ = f"Deprecated name of {new_name}; warns, then calls it."
    alias.__name__ = alias.__qualname__ = old_name
    return alias


uniform = _deprecated(uniform_)
normal = _deprecated(normal_)
constant = _deprecated(constant_)
eye = _deprecated(eye_)
dirac = _deprecated(dirac_)
xavier_uniform = _deprecated(xavier_uniform_)
xavier_normal = _deprecated(xavier_normal_)
kaiming_uniform = _deprecated(kaiming_uniform_)
kaiming_normal = _deprecated(kaiming_normal_)
orthogonal = _deprecated(orthogonal_)
sparse = _deprecated(sparse_)
