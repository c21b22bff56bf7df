"""Which products end a residual branch, and how many branches are added to the same stream.

A branch is what is added to a signal that it was made from: x + f(x). Each product of a pass has a number, and a set of
products is an integer with their bits: thousands of them cost little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from typing import NamedTuple

SUMS = frozenset(("add", "iadd", "radd", "sub", "isub", "rsub"))


class _Call(NamedTuple):
    """A product: the weights in it, and the products that it was made from."""

    weights: tuple[Hashable, ...]
    ancestors: int


class Branches:
    """The products of one pass, and the sums in which branches end."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._stream: list[int] = []  # by product: one of the same stream, itself where there is none
        self._ends: list[int] = []  # by branch: the products that it ends with, a bit each

    def product(self, weights: Iterator[Hashable], reads: int) -> int:
        """Note a product; returns it as a set.

        Args:
            weights: in it.
            reads: the products that its signal comes from, with none in between.
        """
        number = len(self._calls)
        self._calls.append(_Call(tuple(weights), reads | self._ancestors(reads)))
        self._stream.append(number)
        return 1 << number

    def sum(self, one: int, other: int) -> None:
        """Note a sum of two signals: a branch ends where one of them was made from all that makes up the other."""
        for stream, branch in ((one, other), (other, one)):
            before = self._ancestors(branch)
            if stream and branch & ~stream and stream & before == stream:
                self._ends.append(branch & ~stream)
                first, *others = map(self._root, _bits(stream | branch))
                for root in others:
                    self._stream[root] = first
                return

    def counts(self) -> dict[Hashable, int]:
        """For each weight that ends a branch, how many branches its stream has."""
        streams = [self._root(next(iter(_bits(ends)))) for ends in self._ends]
        sizes = Counter(streams)
        found: dict[Hashable, int] = {}
        for stream, ends in zip(streams, self._ends, strict=True):
            for weight in (weight for number in _bits(ends) for weight in self._calls[number].weights):
                found[weight] = max(found.get(weight, 1), sizes[stream])
        return found

    def _ancestors(self, products: int) -> int:
        found = 0
        for number in _bits(products):
            found |= self._calls[number].ancestors
        return found

    def _root(self, number: int) -> int:
        while self._stream[number] != number:
            self._stream[number] = self._stream[self._stream[number]]
            number = self._stream[number]
        return number


def _bits(products: int) -> Iterator[int]:
    while products:
        lowest = products & -products
        yield lowest.bit_length() - 1
        products ^= lowest
