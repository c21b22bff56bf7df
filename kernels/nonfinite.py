"""The flag word: which kinds of non-finite values were seen. What every op that looks for them shares."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backends

NAN, POSITIVE_INF, NEGATIVE_INF = 1, 2, 4
_NAMES = {NAN: "NaN", POSITIVE_INF: "+inf", NEGATIVE_INF: "-inf"}
_WIDE = (torch.float32, torch.bfloat16, torch.float64)  # their sums stay finite where the values are ordinary
_PLAIN = (Tensor, torch.nn.Parameter)


def describe(flag: int) -> str:
    """A flag word in words.

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
    """Which kinds of non-finite values a tensor holds: the close look, one read for each kind.

    Args:
        tensor: any shape, strides, layout, device and dtype. A complex one is read part by part; integers are finite.

    Returns:
        The flag word, 0-d, int32, on the tensor's device; nothing waits for the device.

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

    The sum of a tensor is non-finite whenever an element is; of finite elements near the largest it may be too, so what
    it says then is for `nonfinite_flag` to decide. float16 is asked for its extremes, since sums beyond 65,504 are common.

    Args:
        tensor: as for `nonfinite_flag`, and not traced by torch.compile. On a device this waits for it.

    Example:
        >>> import torch
        >>> from initlab.kernels import all_finite_fast
        >>> all_finite_fast(torch.ones(3)), all_finite_fast(torch.tensor([float("inf"), float("-inf")]))
        (True, False)
    """
    reals = _reals(tensor)
    if reals is None:
        return True
    if reals.dtype in _WIDE:
        return math.isfinite(reals.sum().item())
    if reals.dtype == torch.float16:
        low, high = reals.aminmax()  # both are NaN where an element is
        return math.isfinite(low.item()) and math.isfinite(high.item())
    return False


def nonfinite_flag_fast(tensor: Tensor) -> Tensor:
    """`nonfinite_flag`, at the cost of one read where all is finite.

    On a CPU one cheap read (see `all_finite_fast`), then the close look only where that is in doubt; on a GPU one launch,
    for which nothing waits. Under torch.compile, and for subclasses of Tensor, it is `nonfinite_flag`, which has no branches.

    Args:
        tensor: as for `nonfinite_flag`.

    Returns:
        The flag word, 0-d, int32, on the tensor's device.

    Example:
        >>> import torch
        >>> from initlab.kernels import nonfinite_flag_fast
        >>> int(nonfinite_flag_fast(torch.full((1000,), 3e38)))  # the sum overflows, no element does
        0
    """
    if torch.compiler.is_compiling() or type(tensor) not in _PLAIN:
        return nonfinite_flag(tensor)
    return add_flag_(torch.zeros((), dtype=torch.int32, device=tensor.device), tensor)


def add_flag_(flags: Tensor, tensor: Tensor) -> Tensor:
    """Or a tensor's flag word into `flags`; nothing waits for the device.

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
    if torch.compiler.is_compiling() or type(tensor) not in _PLAIN:
        return flags.bitwise_or_(nonfinite_flag(tensor))
    if tensor.device.type != "cpu" or backends.requested() == "triton":
        _add(flags, tensor)
    elif not all_finite_fast(tensor):
        flags.bitwise_or_(nonfinite_flag(tensor))
    return flags


def _add(flags: Tensor, tensor: Tensor) -> None:
    module = backends.load(tensor.device, _MODULES).module
    if module is None:
        flags.bitwise_or_(nonfinite_flag(tensor))
        return
    reals = _reals(tensor)
    if reals is not None:
        if reals.itemsize == 1:
            reals = reals.to(torch.float32)
        module.launch(flags, reals if is_dense(reals) else reals.contiguous())


_MODULES = {"triton": "._nonfinite_triton"}


def _reals(tensor: Tensor) -> Tensor | None:
    """What there is to look at: a strided, real, floating tensor, outside autograd; None if there is nothing."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_nested:
        if tensor.layout == torch.sparse_coo:
            tensor = tensor._values()  # values() asks for a coalesced tensor, which would be a copy
        else:
            tensor = tensor.to_dense() if tensor.is_mkldnn else tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.is_floating_point() and tensor.numel() > 0 else None


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
    """Flag words on one device, handed out in order, read all at once.

    Args:
        device: where they are.

    Example:
        >>> import torch
        >>> from initlab.kernels import FlagBuffer, add_flag_
        >>> buffer = FlagBuffer(torch.device("cpu"))
        >>> for value in (1.0, float("inf")):
        ...     _ = add_flag_(buffer.new_flag(), torch.tensor([value]))
        >>> buffer.send()
        >>> buffer.landed(), buffer.words()
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
        """The next word, of shape (1,), zero."""
        place = self._used % self._SIZE
        if place == 0:  # a further block, not a larger one: flags that were handed out stay what they are
            with torch.inference_mode(False):
                self._blocks.append(torch.zeros(self._SIZE, dtype=torch.int32, device=self.device))
        self._used += 1
        return self._blocks[-1][place : place + 1]

    def send(self) -> None:
        """Start the copy of all words to the host, behind what the device has been told to do; nothing waits for it."""
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

    def words(self) -> list[int]:
        """The words as they were at `send`; waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        return [word for block in self._sent for word in block.tolist()][: self._used]
