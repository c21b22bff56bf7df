"""linear_relu's look at a product on the CPU, and its ReLU, in one pass over memory."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray

from ._common_numba import SOURCE, called_directly, pointer
from .linear import NAN, NEGATIVE_INF, POSITIVE_INF, SQUARE_LIMITS

_SMALL = 1 << 15  # elements: what is larger torch shares among threads
_CHUNK = 4096  # elements that stay in the first cache between the look and ReLU
_FINGERPRINT = zlib.crc32(SOURCE + repr((NAN, POSITIVE_INF, NEGATIVE_INF)).encode())


def _make(integer: Any, fingerprint: int) -> Any:
    zero, magnitude, sign = integer(0), integer(np.iinfo(integer).max), integer(np.iinfo(integer).min)
    size = np.dtype(integer).itemsize

    def look(address, num_bytes, infinity, limit, activate):
        """The flag of numbers, read as integers, positive ones from `limit` on counting as +inf; and their ReLU in
        place, if `activate`."""
        _ = fingerprint
        flag, n = 0, num_bytes // size
        for start in range(0, n, _CHUNK):
            x = carray(pointer(address + start * size, zero), min(_CHUNK, n - start))
            largest = zero
            for i in range(len(x)):
                largest = max(largest, integer(x[i] & magnitude))
            if largest >= limit:
                for i in range(len(x)):
                    if x[i] & magnitude > infinity:
                        flag |= NAN
                    elif x[i] >= limit:
                        flag |= POSITIVE_INF
                    elif x[i] & magnitude == infinity:
                        flag |= NEGATIVE_INF
            if activate and largest > infinity:
                for i in range(len(x)):
                    if x[i] < 0 and 0 < x[i] & magnitude <= infinity:  # a NaN stays one
                        x[i] = zero
            elif activate:
                for i in range(len(x)):  # in this form it is done with many at once
                    x[i] = integer(max(x[i], zero) | (sign if x[i] == sign else zero))  # -0 stays, as in torch
        return flag

    return called_directly(look, "intp(intp, intp, int64, int64, boolean)")


_BY_SIZE = {np.dtype(integer).itemsize: _make(integer, _FINGERPRINT) for integer in (np.int16, np.int32, np.int64)}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Look(NamedTuple):
    """How a dtype is looked at.

    Attributes:
        kernel: kernel(address, num_bytes, infinity, limit, activate) -> flag.
        infinity: the bits of +inf. Those of positive numbers are in the order of their values.
        limit: the bits from which on a positive number counts as +inf.
        small: bytes: torch shares what is larger among its threads.
    """

    kernel: Callable[[int, int, int, int, bool], int]
    infinity: int
    limit: int
    small: int


def _look(dtype: torch.dtype, limit: float) -> Look:
    numbers = torch.tensor([math.inf, limit], dtype=dtype, device="cpu")
    infinity, first = numbers.view(_INTEGERS[dtype.itemsize]).tolist()
    return Look(_BY_SIZE[dtype.itemsize], infinity, first, _SMALL * dtype.itemsize)


# By whether the square of ReLU is to be finite too, and dtype.
LOOKS = {
    squared: {dtype: _look(dtype, limit if squared else math.inf) for dtype, limit in SQUARE_LIMITS.items()}
    for squared in (False, True)
}
