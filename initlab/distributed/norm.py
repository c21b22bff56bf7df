"""The norm of gradients that are spread over ranks, on which all of them agree, and scaling what this rank holds.

Each rank reads its local tensors once, by the same backends as plain ones. What travels is a handful of numbers: one
all-reduce for each axis on which gradients lie, whatever their number, and no part of a gradient but of those that are
Partial. Plain tensors count as whole on every rank; alone, without stages, they go straight to the backends.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from initlab.kernels import NAN, NEGATIVE_INF, POSITIVE_INF, Norm, TensorGroups, clip_, grad_norm

from .collectives import MeshDim, MeshDims, all_gather, all_mesh_dims, gather, group_axis, listed, mesh_axis, reduced
from .shards import is_dtensor, local

_PLAIN = {Tensor, torch.nn.Parameter}
_WIDE = {torch.float64, torch.complex128}
_BITS = (NAN, POSITIVE_INF, NEGATIVE_INF)


class _Part(NamedTuple):
    """Tensors that the same axes shard."""

    over: frozenset[int]
    partial: bool  # they are terms of sums: the norm is that of the sums
    tensors: list[Tensor]  # as given
    numbers: list[int]
    held: TensorGroups  # what this rank holds of them


class MeshTensors:
    """Gradients, as far as this rank holds them, sorted out once for the norm of all and for scaling.

    Args:
        tensors: plain tensors and DTensors, on any meshes. All ranks of a mesh must give those on it, in one order.
        numbers: by which Norm.first_nonfinite_index names them, ascending.
        stages: pipeline stages over which to take the norm as well; their ranks may hold other tensors, or none.

    Raises:
        RuntimeError: for a tensor that is neither floating nor complex.
        NotImplementedError: for one that is not strided, or Partial with another operation than a sum or an average.
        ValueError: if a mesh spreads a tensor over ranks that are stages.

    Example:
        >>> import torch
        >>> from initlab.distributed.norm import MeshTensors
        >>> x = torch.tensor([3.0, 4.0])
        >>> shares = MeshTensors([x], [0])
        >>> shares.clip_(shares.norm(2.0).norm64, max_norm=2.5)
        >>> x
        tensor([1.5000, 2.0000])
    """

    def __init__(self, tensors: Sequence[Tensor], numbers: Sequence[int], stages: MeshDim | None = None) -> None:
        self.given, self.numbers, self.stages = tensors, numbers, stages
        self.axes: list[MeshDim] = []
        self.spread = [] if set(map(type, tensors)) <= _PLAIN else [t for t in tensors if is_dtensor(t)]
        self.alone = stages is None and not self.spread
        if self.alone:
            self.local = tensors
            self._scaled: TensorGroups | None = TensorGroups(tensors, numbers)
            return
        places: dict[tuple[frozenset[int], bool], list[int]] = {}
        found = MeshDims(tensors)
        for i, (tensor, over) in enumerate(zip(tensors, found.sharded, strict=True)):
            places.setdefault((over, _is_partial(tensor)), []).append(i)
        self.local = [local(t) for t in tensors]
        self.axes = found.axes
        if stages is not None:
            _refuse_overlap(stages, self.axes)
        self._parts = []
        for key, of in places.items():
            named = [numbers[i] for i in of]
            held = TensorGroups([self.local[i] for i in of], named)
            self._parts.append(_Part(*key, [tensors[i] for i in of], named, held))
        self._scaled = self._parts[0].held if len(self._parts) == 1 else None

    def norm(self, p: float, *, detect_nonfinite: bool = True) -> Norm:
        """The p-norm of the whole tensors as one vector: the same on every rank.

        Which collectives it takes depends on p and on the tensors' dtypes and placements alone.

        Args:
            p: any number.
            look: as for `grad_norm`; away from plain tensors alone there is always a look.

        Returns:
            As from `grad_norm`, but `exact` is not rounded to float32. The flag word is or-ed over ranks; `first` is
            the first on this rank, -1 if what the flag tells of lies elsewhere. What one rank has seen makes the norm
            non-finite on all.
        """
        if self.alone:
            assert self._scaled is not None
            return grad_norm(self._scaled, p, detect_nonfinite=detect_nonfinite)
        home = self.local[0].device if self.local else torch.device("cpu")
        found = [(over, _moved(norm, home)) for over, norm in self._norms(p)]
        if found:
            exact, bits = self._over_meshes(found, p)
            first = _first([norm.first_nonfinite_index for _, norm in found])
        else:
            exact = torch.full((), 0.0 if p >= 0.0 else math.inf, dtype=torch.float64)
            bits, first = exact.new_zeros(len(_BITS)), torch.full((), -1)
        if self.stages is not None:
            rows = all_gather(torch.cat([exact[None], bits]), self.stages)
            exact, bits = _combined(rows[:, 0], p), rows[:, 1:].amax(0)
        if p != 0.0:  # which counts them
            if p > 0.0:
                exact = torch.where((bits[1] + bits[2]) > 0.0, math.inf, exact)
            exact = torch.where(bits[0] > 0.0, math.nan, exact)
        wide = not _WIDE.isdisjoint(t.dtype for t in self.given)
        power = exact if p == 0.0 or math.isinf(p) else exact.pow(p)
        flag = sum((bits[i] > 0.0).to(torch.int32) * bit for i, bit in enumerate(_BITS))
        assert isinstance(flag, Tensor)
        norm = exact.to(torch.float64 if wide else torch.float32)
        return Norm(norm, exact, power, flag, first)

    def clip_(self, norm: Tensor, max_norm: float, *, nonfinite: str = "propagate") -> None:
        """Multiply what this rank holds by min(1, max_norm / (norm + 1e-6)); as `clip_` of initlab.kernels."""
        if self._scaled is None:
            self._scaled = TensorGroups(self.local, self.numbers)
        if self.alone or torch.is_inference_mode_enabled():
            clip_(self._scaled, norm, max_norm, nonfinite=nonfinite)
            return
        pairs = zip(self.given, self.local, strict=True)
        wrapped = [(t, mine, mine._version) for t, mine in pairs if t is not mine and not mine.is_inference()]
        clip_(self._scaled, norm, max_norm, nonfinite=nonfinite)
        # Autograd goes by a DTensor's own version, and what is written to its local tensor does not change that.
        torch.autograd.graph.increment_version([t for t, mine, before in wrapped if mine._version != before])

    def as_given(self, norm: Tensor) -> Tensor:
        """The norm as torch returns it: a replicated DTensor where all tensors are DTensors on one mesh."""
        if not self.spread or len(self.spread) < len(self.given):
            return norm
        mesh, *others = {t.device_mesh for t in self.spread}  # type: ignore[attr-defined]
        if others or mesh.get_coordinate() is None:
            return norm
        module = sys.modules["torch.distributed.tensor"]
        placements = [module.Replicate()] * mesh.ndim
        replicated: Tensor = module.DTensor.from_local(norm, mesh, placements, run_check=False)
        return replicated

    def lowest(self, word: str | None) -> tuple[int, str] | None:
        """The lowest rank that has a word to tell, and its word: a collective on each axis. None if there is none."""
        stages = [] if self.stages is None else [self.stages]
        words = gather(word, [axis.group for axis in (*self.axes, *stages)])
        return next(((rank, one) for rank, one in words.items() if one is not None), None)

    def _norms(self, p: float) -> Iterator[tuple[frozenset[int], Norm]]:
        """This rank's norms, and the axes over which each is to be taken further."""
        for part in self._parts:
            held = part.held
            if part.partial:
                held = TensorGroups([local(_summed(t)) for t in part.tensors], part.numbers)
            if p == 0.0:  # how many tensors hold a non-zero: that is not to be told from how many shards do
                for tensor, number in zip(held.tensors, part.numbers, strict=True):
                    yield part.over, grad_norm(TensorGroups([tensor], [number]), p)
            else:
                yield part.over, grad_norm(held, p)

    def _over_meshes(self, found: Sequence[tuple[frozenset[int], Norm]], p: float) -> tuple[Tensor, Tensor]:
        """The norm over all meshes, and how often each non-finite value was seen there."""
        over = [places for places, _ in found]
        exact, bits = torch.stack([norm.norm64 for _, norm in found]), _bits([norm.flag for _, norm in found])
        if p == 1.0 or (p == 2.0 and _WIDE.isdisjoint(t.dtype for t in self.spread)):
            power, bits = self._reduced(torch.stack([norm.sum_of_powers for _, norm in found]), over, bits, "sum")
            whole = power.pow(1.0 / p)
            # The power of a plain tensor may overflow; its norm is known.
            exact = torch.stack([whole[i] if places else exact[i] for i, places in enumerate(over)])
        elif p == 0.0 or p == math.inf:
            exact, bits = self._reduced(exact, over, bits, "max")
        elif p == -math.inf:
            exact, bits = self._reduced(exact, over, -bits, "min")
            bits = -bits
        else:
            exact, bits = self._gathered(exact, over, bits, p)
        return _combined(exact, p), bits

    def _reduced(self, numbers: Tensor, over: Sequence[frozenset[int]], bits: Tensor, op: str) -> tuple[Tensor, Tensor]:
        whole = reduced(torch.cat([numbers, bits]), [*over, *[all_mesh_dims(self.axes)] * len(bits)], self.axes, op)
        return whole[: len(numbers)], whole[len(numbers) :]

    def _gathered(self, exact: Tensor, over: Sequence[frozenset[int]], bits: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """Where sums of powers could overflow: the norms themselves, of every rank along an axis."""
        norms = list(exact.unbind())
        for place, axis in enumerate(self.axes):
            mine = [i for i, places in enumerate(over) if place in places]  # ranks need not hold equally many others
            rows = all_gather(torch.stack([*(norms[i] for i in mine), *bits.unbind()]), axis)
            for column, i in enumerate(mine):
                norms[i] = _combined(rows[:, column], p)
            bits = rows[:, len(mine) :].amax(0)
        return torch.stack(norms), bits


def pp_mesh_dim_of(group: Any) -> MeshDim | None:
    """The axis of a process group, or of a mesh with one dimension, of pipeline stages; None for one rank alone.

    Raises:
        ValueError: if it is something else, or this rank does not belong to it.

    Example:
        >>> import torch.distributed as dist
        >>> from initlab.distributed.norm import pp_mesh_dim_of
        >>> dist.init_process_group("fake", rank=1, world_size=4)  # no network: collectives do nothing
        >>> mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
        >>> pp_mesh_dim_of(mesh["pp"]).ranks, pp_mesh_dim_of(dist.group.WORLD).ranks
        ((1, 3), (0, 1, 2, 3))
        >>> dist.destroy_process_group()
    """
    if isinstance(group, torch.distributed.ProcessGroup):
        axis = group_axis(group)
    elif getattr(group, "ndim", None) == 1 and hasattr(group, "get_group"):
        if group.get_coordinate() is None:
            raise ValueError(f"pp_group is {group}, to which this rank does not belong; give it that of its own stages")
        axis = mesh_axis(group, 0)
    else:
        raise ValueError(
            f"pp_group is {group!r}; it must be a ProcessGroup to which this rank belongs, or a DeviceMesh with one "
            "dimension, as mesh['pp'] is"
        )
    return axis if len(axis.ranks) > 1 else None


def _refuse_overlap(stages: MeshDim, axes: Sequence[MeshDim]) -> None:
    """Raise where ranks that hold parts or copies of the same tensors are to count as stages, which hold others."""
    for axis in axes:
        both = set(stages.ranks).intersection(axis.ranks)
        if len(both) > 1:
            raise ValueError(
                f"pp_group has ranks {listed(both)}, and the mesh of a gradient spreads it over these: it would count "
                f"{len(both)} times. Give the group of ranks that hold other stages, as mesh['pp'] is, or leave it out"
            )


def _is_partial(tensor: Tensor) -> bool:
    """Whether ranks hold terms of a sum, which scales as they do."""
    if not is_dtensor(tensor):
        return False
    found = [p for p in tensor.placements if p.is_partial()]  # type: ignore[attr-defined]
    for placement in found:
        if type(placement).__name__ != "Partial" or placement.reduce_op not in ("sum", "avg"):
            raise NotImplementedError(
                f"a DTensor of shape {tuple(tensor.shape)} is placed {placement}, so what ranks hold is neither its "
                "elements nor terms of a sum; redistribute it to Shard or Replicate"
            )
    return bool(found)


def _summed(tensor: Any) -> Tensor:
    """A Partial DTensor with its sums carried out: a collective."""
    replicate = sys.modules["torch.distributed.tensor"].Replicate()
    summed: Tensor = tensor.redistribute(placements=[replicate if p.is_partial() else p for p in tensor.placements])
    return summed


def _moved(norm: Norm, home: torch.device) -> Norm:
    def moved(x: Any) -> Tensor:
        there: Tensor = x.to(home, non_blocking=home.type != "cpu")
        return there

    return Norm(*map(moved, norm))


def _combined(norms: Tensor, p: float) -> Tensor:
    """The norm of things whose norms these are, scaled so that nothing overflows."""
    if len(norms) == 1:
        return norms[0]
    return norms.sum() if p == 0.0 else grad_norm([norms], p, detect_nonfinite=False).norm64


def _bits(flags: Sequence[Any]) -> Tensor:
    words = torch.stack(list(flags))
    return torch.stack([((words & bit) != 0).any() for bit in _BITS]).to(torch.float64)


def _first(firsts: Sequence[Any]) -> Tensor:
    nowhere = torch.iinfo(torch.int64).max
    places = torch.stack(list(firsts))
    first = torch.where(places < 0, nowhere, places).amin()
    return torch.where(first == nowhere, -1, first)
