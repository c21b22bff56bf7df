"""How initlab.init fills one tensor: what it refuses, where its key comes from, and the fill.

initlab.init has the functions and their documentation; this has what they share.
"""

import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.init import calculate_gain

from initlab.kernels import PLAIN, Distribution, Draw, Normal, Region, Uniform, fill_, generator_key
from initlab.kernels.torch_internals import (
    FakeTensor,
    count_dispatch_modes,
    fake_mode_is_active,
    fan_by_mode,
    fan_in_and_out,
    is_functional,
    is_transformed,
    tracing_state,
)

from .distributed.dtensors import count_as_written, is_dtensor, local
from .distributed.shards import draws, local_shards

_QR_DTYPE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}  # LAPACK and cuSOLVER have neither


def sample(
    tensor: Tensor, generator: torch.Generator | None, distribution: Callable[..., Distribution], *parameters: float
) -> Tensor:
    """Fill a tensor from `distribution(*parameters)`, by a key from the generator.

    Args:
        tensor: plain, a DTensor, fake or on meta; the latter two are checked only.
        generator: None is torch's default CPU generator.
        distribution: the class.
        parameters: its parameters.

    Returns:
        The tensor itself.
    """
    cached = _NUMBERS.issuperset(map(type, parameters))
    drawn = _made(distribution, *parameters) if cached else distribution(*parameters)
    if tensor.requires_grad and not tensor.is_leaf:
        _refuse_made(tensor)
    if type(tensor) in PLAIN:
        fill_((Draw(tensor, drawn, draw_key(tensor, generator)),))  # of a meta or fake tensor it checks the dtype only
    elif not tensor.is_meta:
        parts = list(draws(tensor, drawn, 0))  # raises before a key is drawn
        fill_(replace(part, key=key) for key in (draw_key(tensor, generator),) for part in parts)
        count_as_written(tensor)
    for observe in observers():
        observe(tensor, drawn)
    _zero_tangent(tensor)
    return tensor


def _refuse_made(tensor: Tensor) -> None:
    """Refuse a tensor that is computed from parameters: what is written to it changes none of them.

    The weight of a layer under weight_norm or another parametrisation is such a tensor. Inside swap() nothing is
    refused: code that calls torch's own functions on such a weight has to go on as it does without.
    """
    from .models.patches import sinks

    root = tensor._base if tensor._base is not None else tensor
    if root.grad_fn is None or sinks():
        return
    waiting: list[Any] = [root.grad_fn]
    seen: set[Any] = set()
    while waiting and len(seen) < 256:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), torch.nn.Parameter):
            raise RuntimeError(
                f"this tensor, of shape {tuple(tensor.shape)}, is computed from parameters ({root.grad_fn.name()}), "
                "as the weight of a layer is under weight_norm or another parametrization: filling it would change "
                "none of them. Assign what was drawn, layer.weight = init.normal_(torch.empty(...)), which goes "
                "through right_inverse (torch.nn.utils.parametrize); for the older torch.nn.utils.weight_norm fill "
                "weight_v, and set weight_g to its norm; or call init_model_, which does both"
            )
        waiting += [source for source, _ in node.next_functions]


_NUMBERS = frozenset({int, float})  # what is its own key to a cache; a tensor, say, may change


@functools.lru_cache(maxsize=1024)
def _made(distribution: Callable[..., Distribution], *parameters: float) -> Distribution:
    return distribution(*parameters)


def observers() -> list[Callable[[Tensor, Distribution], object]]:
    """What this thread's draws are told to: our kernels write where no dispatch mode of torch sees it."""
    if _thread.observers is None:
        _thread.observers = []
    return _thread.observers


def _zero_tangent(tensor: Tensor) -> None:
    """As torch's samplers do in forward-mode differentiation: what was drawn depends on no input."""
    if forward_ad._current_level >= 0 and (tangent := forward_ad.unpack_dual(tensor).tangent) is not None:
        tangent.zero_()


def fill_orthogonal(tensor: Tensor, gain: float, generator: torch.Generator | None) -> Tensor:
    """Fill with `gain` times a random orthogonal matrix: Q of the QR decomposition of a Gaussian one."""
    if not has_values(tensor) or tensor.numel() == 0:
        return tensor
    if tensor.requires_grad and not tensor.is_leaf:
        _refuse_made(tensor)
    _refuse_dtensor(tensor, "orthogonal_")
    if tensor.layout != torch.strided:
        raise NotImplementedError(f"cannot fill a tensor of layout {tensor.layout}; fill its dense values")
    _refuse_inference(tensor)
    rows = tensor.size(0)
    with torch.no_grad():
        flat = torch.empty(
            (rows, tensor.numel() // rows), dtype=_QR_DTYPE.get(tensor.dtype, tensor.dtype), device=tensor.device
        )
        sample(flat, generator, Normal, 0.0, 1.0)
        tensor.copy_((orthogonal_factor(flat) * gain).reshape(tensor.shape))
    return tensor


def orthogonal_factor(matrix: Tensor) -> Tensor:
    """The orthogonal factor of a matrix, with orthonormal rows, or columns where there are more rows than columns."""
    wide = matrix.size(0) < matrix.size(1)
    q, r = torch.linalg.qr(matrix.t() if wide else matrix)
    q *= r.diagonal().sgn()  # without it Q is not uniform: LAPACK fixes the signs of R
    return q.t() if wide else q


def fill_sparse(tensor: Tensor, sparsity: float, std: float, generator: torch.Generator | None) -> Tensor:
    """Fill with normal deviates, and ceil(sparsity * rows) elements of each column with zeros."""
    distribution = Normal(0.0, std)
    if not has_values(tensor):
        return tensor
    _refuse_dtensor(tensor, "sparse_")
    rows, cols = tensor.shape
    zeros = math.ceil(sparsity * rows)
    key = draw_key(tensor, generator)
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


def fill_by_index(tensor: Tensor, is_one: Callable[..., Tensor]) -> Tensor:
    """Fill a DTensor with 1 where `is_one` is true of an element's index in the logical tensor, else with 0."""
    _refuse_inference(local(tensor))
    with torch.no_grad():
        for shard, region in local_shards(tensor):
            indices = [
                torch.arange(offset, offset + size, device=shard.device).view(-1, *(1,) * (shard.ndim - 1 - dim))
                for dim, (offset, size) in enumerate(zip(region.offsets, region.sizes, strict=True))
            ]
            shard.copy_(is_one(*indices))
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


def xavier_std(tensor: Tensor, gain: float) -> float:
    """gain * sqrt(2 / (fan_in + fan_out))."""
    fan_in, fan_out = fan_in_and_out(tensor)
    return gain * math.sqrt(2.0 / float(fan_in + fan_out))


def kaiming_std(tensor: Tensor, a: float, mode: Any, nonlinearity: Any) -> float:
    """gain / sqrt(fan), as torch counts both."""
    return calculate_gain(nonlinearity, a) / math.sqrt(fan_by_mode(tensor, mode))


def draw_key(tensor: Tensor, generator: torch.Generator | None) -> int:
    """A key for a tensor from the generator; 0, and nothing drawn, where the tensor has no values to draw."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, not {type(generator).__name__}")
    if not has_values(tensor) or tensor.numel() == 0:
        return 0
    if generator is None and tensor.device.type == "cuda" and not is_dtensor(tensor):
        _check_rank_seeds(tensor.device)
    key = generator_key(generator)
    if _thread.log is not None:
        _thread.log.append((tensor, generator, key))
    return key


class _Thread(threading.local):
    """What a thread's draws are told to, and where they are recorded."""

    observers: list[Callable[[Tensor, Distribution], object]] | None = None
    log: list[tuple[Tensor, torch.Generator | None, int]] | None = None


_thread = _Thread()


@contextmanager
def record_draws() -> Iterator[list[tuple[Tensor, torch.Generator | None, int]]]:
    """Inside it, this thread's draws are recorded: (tensor, generator, key) each. swap() compares them across ranks."""
    before = _thread.log
    log: list[tuple[Tensor, torch.Generator | None, int]] = []
    _thread.log = log
    try:
        yield log
    finally:
        _thread.log = before


def has_values(tensor: Tensor) -> bool:
    """False on meta and for fakes; raises for a wrapper, whose memory is not the tensor's, and in a traced graph."""
    if tensor.is_meta:
        return False
    modes = count_dispatch_modes()
    if tracing_state() is not None or (modes and _is_traced()):
        raise NotImplementedError(
            "initlab.init cannot be recorded by torch.export or make_fx, nor by torch.jit.trace: the graph would lack "
            "the draw. Fill the tensor outside what is traced"
        )
    kind = type(tensor)
    if kind not in PLAIN:
        if isinstance(tensor, FakeTensor):
            return False
        if is_dtensor(tensor):
            return has_values(local(tensor))
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise NotImplementedError(
                f"initlab.init does not fill a {kind.__name__}, a wrapper around other tensors. Fill the plain tensor "
                "before it is wrapped, or use torch.nn.init for it, outside swap()"
            )
    if is_transformed(tensor) or is_functional(tensor):
        raise NotImplementedError(
            "initlab.init does not fill a tensor that a torch.func transform (vmap, grad, functionalize, ...) has "
            "wrapped. Fill it before the transform"
        )
    if modes and fake_mode_is_active():
        tensor.detach()  # for torch's own error, where the mode does not let real tensors in
        raise NotImplementedError(
            "initlab.init does not fill a real tensor under FakeTensorMode, where no value can be drawn. Fill it "
            "outside the mode"
        )
    return True


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
