"""Drop-in for torch.nn.init: its names, signatures, errors and warnings; the values come from initlab's stream.

A call takes one 64-bit key from the generator in force, and the key fixes every value: the same on every device, with
any number of threads, for any strides, and in every dtype the rounding of the same draw. Of a DTensor each rank fills
what it holds, without communication: where ranks agree on `torch.manual_seed`, they hold parts of one tensor. What
draws nothing is torch's own function. docs/init.md lists where a call behaves differently from torch's.

What runs: `_init_draws.sample` turns a call into one draw. `fill_` in kernels/sampling/fill.py checks it and passes it
to the backend of its device: `fill` in kernels/sampling/_triton.py on a GPU, in _numba.py or _torch.py elsewhere.
"""

# This is one file, of over 500 lines, most of them docstrings: every public name of torch.nn.init, with its errors.

import math
import warnings
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.init import calculate_gain, constant_, ones_, zeros_
from torch.nn.init import dirac_ as _torchs_dirac_  # now, since swap() puts ours in their places
from torch.nn.init import eye_ as _torchs_eye_
from torch.overrides import handle_torch_function, has_torch_function_variadic

from initlab.kernels import Normal, TruncatedNormal, Uniform, eagerly

from ._init_draws import fill_by_index, fill_orthogonal, fill_sparse, kaiming_std, sample, xavier_std
from .distributed.dtensors import is_dtensor

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
    return eagerly(sample, tensor, generator, Uniform, a, b)


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
    return eagerly(sample, tensor, generator, Normal, mean, std)


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
    return eagerly(sample, tensor, generator, TruncatedNormal, mean, std, a, b)


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
    x = math.sqrt(3.0) * xavier_std(tensor, gain)
    return eagerly(sample, tensor, generator, Uniform, -x, x)


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
    return eagerly(sample, tensor, generator, Normal, 0.0, xavier_std(tensor, gain))


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
    x = math.sqrt(3.0) * kaiming_std(tensor, a, mode, nonlinearity)
    return eagerly(sample, tensor, generator, Uniform, -x, x)


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
    return eagerly(sample, tensor, generator, Normal, 0.0, kaiming_std(tensor, a, mode, nonlinearity))


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
    return fill_by_index(tensor, lambda row, column: row == column)


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

    def is_one(row: Tensor, column: Tensor, *taps: Tensor) -> Tensor:
        found = (row % each == column) & (row % each < min(each, inputs))
        for tap, size in zip(taps, kernel, strict=True):
            found = found & (tap == size // 2)
        return found

    return fill_by_index(tensor, is_one)


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
    return eagerly(fill_orthogonal, tensor, gain, generator)


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
    return eagerly(fill_sparse, tensor, sparsity, std, generator)


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
