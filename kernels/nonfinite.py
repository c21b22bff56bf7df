"""The non-finite flag: which kinds of non-finite values were seen. What every op that looks for them shares."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import backends
from .tensors import PLAIN
from .torch_internals import is_transforming

NAN, POSITIVE_INF, NEGATIVE_INF = 1, 2, 4  # the bits of a flag

_MODULES = {"numba": "._nonfinite_numba", "triton": "._nonfinite_triton"}
_NAMES = {NAN: "NaN", POSITIVE_INF: "+inf", NEGATIVE_INF: "-inf"}
_SUMMABLE = (torch.float32, torch.bfloat16, torch.float64)  # their sums stay finite where the values are ordinary


def describe(flag: int) -> str:
    """A flag in words.

    Args:
        flag: NaN = 1, +inf = 2 and -inf = 4, or-ed.

    Example:
        >>> from initlab.kernels import describe
        >>> describe(1 | 4), describe(0)
        ('NaN and -inf', 'nothing non-finite')
    """
    found = [name for bit, name in _NAMES.items() if flag & bit]
    if not found:
        return "nothing non-finite"
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def nonfinite_flag(tensor: Tensor) -> Tensor:
    """Which kinds of non-finite values a tensor holds, exactly, by one read for each kind.

    Args:
        tensor: any shape, strides, layout, device and dtype. A complex one is read part by part; integers are finite.

    Returns:
        NaN = 1, +inf = 2 and -inf = 4, or-ed: 0-d, int32, on the tensor's device; nothing waits for the device.

    Example:
        >>> import torch
        >>> from initlab.kernels import nonfinite_flag
        >>> int(nonfinite_flag(torch.tensor([1.0, float("nan"), float("-inf")])))
        5
    """
    reals = _reals(tensor)
    if reals is None:
        return torch.zeros((), dtype=torch.int32, device=tensor.device)
    if reals.itemsize == 1:  # torch has no comparisons for float8
        reals = reals.to(torch.float32)
    flag = reals.isnan().any().to(torch.int32) * NAN
    flag += reals.isposinf().any().to(torch.int32) * POSITIVE_INF
    flag += reals.isneginf().any().to(torch.int32) * NEGATIVE_INF
    return flag


def all_finite_fast(tensor: Tensor) -> bool:
    """Whether one cheap read finds nothing non-finite: never True where there is something, False where in doubt.

    The sum of a tensor is non-finite whenever an element is. Of finite elements near the largest it may be too: then
    `nonfinite_flag` decides. float16 is read for its extremes, since sums beyond 65,504 are common. On a CPU with numba
    a small tensor's magnitudes are compared instead, for a tenth of what a call of torch costs.

    Args:
        tensor: as for `nonfinite_flag`, and not traced by torch.compile. On a device this waits for it.

    Example:
        >>> import torch
        >>> from initlab.kernels import all_finite_fast
        >>> all_finite_fast(torch.ones(3)), all_finite_fast(torch.tensor([float("inf"), float("-inf")]))
        (True, False)
    """
    reals = _reals(tensor)
    return reals is None or finite_at_a_look(reals)


def finite_at_a_look(tensor: Tensor) -> bool:
    """`all_finite_fast` of a real, floating, strided tensor outside autograd, with memory of its own.

    Example:
        >>> import torch
        >>> from initlab.kernels.nonfinite import finite_at_a_look
        >>> finite_at_a_look(torch.ones(3))
        True
    """
    if (finite := _small_is_finite(tensor)) is not None:
        return finite
    if tensor.dtype in _SUMMABLE:
        return math.isfinite(tensor.sum().item())
    if tensor.dtype == torch.float16 and tensor.numel() > 0:
        low, high = tensor.aminmax()  # both are NaN where an element is
        return math.isfinite(low.item()) and math.isfinite(high.item())
    return False


def _small_is_finite(tensor: Tensor) -> bool | None:
    """Whether a small tensor is finite, exactly; None where this look is not for it."""
    if type(tensor) not in PLAIN or not tensor.is_cpu or not tensor.is_contiguous() or tensor.dtype.itemsize == 1:
        return None  # what wraps others has no memory that could be read
    requested = backends.requested()
    if requested not in _small_looks:  # to choose again each time would cost more than the look
        module = None if requested == "triton" else backends.load(tensor.device, _MODULES).module
        _small_looks[requested] = (0, None) if module is None else (module.SMALL, module.all_finite)
    small, all_finite = _small_looks[requested]
    return all_finite(tensor) if all_finite is not None and tensor.numel() <= small else None


_small_looks: dict[str, tuple[int, Callable[[Tensor], bool] | None]] = {}


def nonfinite_flag_fast(tensor: Tensor) -> Tensor:
    """`nonfinite_flag`, at the cost of one read where all is finite.

    On a CPU one cheap read (see `all_finite_fast`), then a rescan only where that is in doubt; on a GPU one launch, for
    which nothing waits. Under torch.compile, and for subclasses of Tensor, it is `nonfinite_flag`, which has no
    branches.

    Args:
        tensor: as for `nonfinite_flag`.

    Returns:
        As `nonfinite_flag`.

    Example:
        >>> import torch
        >>> from initlab.kernels import nonfinite_flag_fast
        >>> int(nonfinite_flag_fast(torch.full((1000,), 3e38)))  # the sum overflows, no element does
        0
    """
    if torch.compiler.is_compiling() or type(tensor) not in PLAIN:
        return nonfinite_flag(tensor)
    return add_flag_(torch.zeros((), dtype=torch.int32, device=tensor.device), tensor)


def add_flag_(flags: Tensor, tensor: Tensor) -> Tensor:
    """Or a tensor's flag into `flags`; nothing waits for the device.

    Args:
        flags: int32, one element, on the tensor's device.
        tensor: as for `nonfinite_flag`.

    Returns:
        flags.

    Raises:
        ValueError: if `flags` has another dtype, another number of elements, or lies elsewhere.

    Example:
        >>> import torch
        >>> from initlab.kernels import add_flag_, describe
        >>> flags = torch.zeros(1, dtype=torch.int32)
        >>> for x in (torch.tensor([2.0]).log(), torch.tensor([0.0]).log(), torch.tensor([-1.0]).log()):
        ...     _ = add_flag_(flags, x)
        >>> describe(int(flags))
        'NaN and -inf'
    """
    if flags.dtype != torch.int32 or flags.numel() != 1 or flags.device != tensor.device:
        raise ValueError(
            f"flags is {flags.dtype} with {flags.numel()} elements on {flags.device}; it must be int32, one element, "
            f"on {tensor.device}, where the tensor is: torch.zeros(1, dtype=torch.int32, device=tensor.device)"
        )
    if torch.compiler.is_compiling() or type(tensor) not in PLAIN:
        return flags.bitwise_or_(nonfinite_flag(tensor))
    if tensor.device.type != "cpu" or backends.requested() == "triton":
        _add_by_backend(flags, tensor)
    elif not all_finite_fast(tensor):
        flags.bitwise_or_(nonfinite_flag(tensor))
    return flags


def _add_by_backend(flags: Tensor, tensor: Tensor) -> None:
    module = backends.load(tensor.device, _MODULES).module
    if module is None:
        flags.bitwise_or_(nonfinite_flag(tensor))
        return
    reals = _reals(tensor)
    if reals is not None:
        if reals.itemsize == 1:
            reals = reals.to(torch.float32)
        module.launch(flags, reals if is_dense(reals) else reals.contiguous())


def _reals(tensor: Tensor) -> Tensor | None:
    """A tensor's elements: strided, real, floating, outside autograd; None if it has none that can be non-finite."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_nested:
        if tensor.layout == torch.sparse_coo:
            tensor = tensor._values()  # values() asks for a coalesced tensor, which would be a copy
        else:
            tensor = tensor.to_dense() if tensor.is_mkldnn else tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    check_memory(tensor)
    return tensor


def check_memory(tensor: Tensor) -> None:
    """Raise where a tensor's storage was freed: to read it would end the process, in torch as well."""
    if torch.compiler.is_compiling() or type(tensor) not in PLAIN or is_transforming():
        return
    if tensor.data_ptr() != 0 or tensor.numel() == 0 or tensor.is_meta:
        return
    raise RuntimeError(
        f"a tensor of shape {tuple(tensor.shape)} has no memory: its storage was freed, as FSDP does with parameters "
        "that are not gathered; read it while it has some"
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill numel() places in memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


class FlagBuffer:
    """Flags on one device, handed out in order, read all at once.

    Args:
        device: where they are.

    Example:
        >>> import torch
        >>> from initlab.kernels import FlagBuffer, add_flag_
        >>> buffer = FlagBuffer(torch.device("cpu"))
        >>> for value in (1.0, float("inf")):
        ...     _ = add_flag_(buffer.new_flag(), torch.tensor([value]))
        >>> buffer.send()
        >>> buffer.landed(), buffer.flags()
        (True, [0, 2])
    """

    _SIZE = 1024

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._blocks: list[Tensor] = []
        self._used = 0
        self._sent: list[Tensor] = []
        self._event: torch.Event | None = None

    def new_flag(self) -> Tensor:
        """The next flag, of shape (1,), zero."""
        i = self._used % self._SIZE
        if i == 0:  # a further block, not a larger one: flags that were handed out stay what they are
            with torch.inference_mode(False):
                self._blocks.append(torch.zeros(self._SIZE, dtype=torch.int32, device=self.device))
        self._used += 1
        return self._blocks[-1][i : i + 1]

    def send(self) -> None:
        """Start the copy of all flags to the host, behind what the device has queued; nothing waits for it."""
        asynchronous = self.device.type == "cuda"
        with torch.inference_mode(False):
            self._sent = [
                torch.empty(self._SIZE, dtype=torch.int32, device="cpu", pin_memory=asynchronous) for _ in self._blocks
            ]
        for host, block in zip(self._sent, self._blocks, strict=True):
            host.copy_(block, non_blocking=asynchronous)
        if asynchronous:
            self._event = torch.Event(self.device)
            self._event.record(torch.accelerator.current_stream(self.device))

    def landed(self) -> bool:
        """Whether the copy that `send` started has arrived."""
        return self._event is None or self._event.query()

    def flags(self) -> list[int]:
        """The flags as they were at `send`; waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        return [flag for block in self._sent for flag in block.tolist()][: self._used]
