"""The flag word: which kinds of non-finite values were seen. What every op that looks for them reports."""

from __future__ import annotations

import torch
from torch import Tensor

NAN, POSITIVE_INF, NEGATIVE_INF = 1, 2, 4
_NAMES = {NAN: "NaN", POSITIVE_INF: "+inf", NEGATIVE_INF: "-inf"}


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


def flag_of(tensor: Tensor) -> Tensor:
    """Which kinds of non-finite values a tensor holds: the close look, one read for each kind.

    Args:
        tensor: any shape, strides, device and dtype. A complex tensor is read part by part; integers are finite.

    Returns:
        The flag word, 0-d, int32, on the tensor's device; nothing waits for the device.

    Example:
        >>> import torch
        >>> from initlab.kernels import flag_of
        >>> int(flag_of(torch.tensor([1.0, float("nan"), float("-inf")])))
        5
    """
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return torch.zeros((), dtype=torch.int32, device=tensor.device)
    flag = tensor.isnan().any().to(torch.int32) * NAN
    flag += tensor.isposinf().any().to(torch.int32) * POSITIVE_INF
    flag += tensor.isneginf().any().to(torch.int32) * NEGATIVE_INF
    return flag
