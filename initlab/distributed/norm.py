"""One norm for plain tensors and DTensors together, the same on all ranks, and scaling them by it.

Each rank reads its local tensors once, by the same backends as plain ones. What is communicated is a handful of
numbers: one all-reduce for each mesh dimension on which tensors lie, whatever their number. Only tensors that are
Partial are communicated themselves. Plain tensors count as whole on every rank.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from initlab.kernels import NAN, NEGATIVE_INF, POSITIVE_INF, Norm, TensorGroups, clip_, combine_norms, grad_norm

from .collectives import all_gather, all_gather_object, all_mesh_dims, all_reduce_parts, listed
from .dtensors import ClassifiedTensors, local
from .groups import MeshDim, MeshDims

_WIDE = {torch.float64, torch.complex128}
_BITS = (NAN, POSITIVE_INF, NEGATIVE_INF)


class _Group(NamedTuple):
    """Tensors that are sharded over the same mesh dimensions."""

    sharded: frozenset[int]  # indices of these dimensions
    partial: bool  # they are terms of sums: the norm is that of the sums
    tensors: list[Tensor]  # as passed
    places: list[int]  # among all tensors
    indices: list[int]
    local: TensorGroups


class MeshTensors:
    """Tensors of one call, prepared once for the norm of all and for scaling.

    Args:
        tensors: plain tensors and DTensors, on any meshes. All ranks of a mesh must pass those on it, in one order.
        indices: by which Norm.first_nonfinite_index names them, ascending.
        pp_mesh_dim: pipeline stages over which to take the norm as well; their ranks may hold other tensors, or none.

    Attributes:
        mesh_dims: the mesh dimensions of the DTensors, each once.
        communicates: whether the norm takes collectives; False for plain tensors without pipeline stages.

    Raises:
        RuntimeError: for a tensor that is neither floating nor complex.
        NotImplementedError: for one that is not strided, or Partial with another operation than a sum or an average.
        ValueError: if a mesh spreads a tensor over ranks that are pipeline stages.

    Example:
        >>> import torch
        >>> from initlab.distributed.dtensors import classify
        >>> from initlab.distributed.norm import MeshTensors
        >>> x = torch.tensor([3.0, 4.0])
        >>> mesh_tensors = MeshTensors(classify([x]), [0])
        >>> mesh_tensors.clip_(mesh_tensors.norm(2.0).norm64, max_norm=2.5)
        >>> x
        tensor([1.5000, 2.0000])
    """

    def __init__(self, tensors: ClassifiedTensors, indices: Sequence[int], pp_mesh_dim: MeshDim | None = None) -> None:
        self.tensors, self.local, self.indices, self.pp_mesh_dim = tensors.tensors, tensors.local, indices, pp_mesh_dim
        self.mesh_dims: list[MeshDim] = []
        self.communicates = tensors.has_dtensor or pp_mesh_dim is not None
        self._all_local: TensorGroups | None = None  # for clip_
        if not self.communicates:
            self._all_local = TensorGroups(self.local, indices)
            return
        self._dtensors = tensors.dtensors()
        mesh_dims = MeshDims(self._dtensors)
        self.mesh_dims = mesh_dims.dims
        if pp_mesh_dim is not None:
            _refuse_overlap(pp_mesh_dim, self.mesh_dims)
        places: dict[tuple[frozenset[int], bool], list[int]] = {}
        for i, (dtensor, sharded) in enumerate(zip(self._dtensors, mesh_dims.sharded, strict=True)):
            places.setdefault((sharded, dtensor is not None and _is_partial(dtensor)), []).append(i)
        self._groups = []
        for (sharded, partial), members in places.items():
            group_indices = [indices[i] for i in members]
            prepared = TensorGroups([self.local[i] for i in members], group_indices)
            group_tensors = [self.tensors[i] for i in members]
            self._groups.append(_Group(sharded, partial, group_tensors, members, group_indices, prepared))
        if len(self._groups) == 1:
            self._all_local = self._groups[0].local

    def norm(self, p: float, *, detect_nonfinite: bool = True, per_tensor: bool = False) -> Norm:
        """The p-norm of the whole tensors as one vector: the same on every rank.

        Which collectives it takes depends on p and on the tensors' dtypes and placements alone.

        Args:
            p: any number.
            detect_nonfinite: as for `grad_norm`; where it communicates, non-finite values are always looked for.
            per_tensor: whether to return the norm of each tensor too, of p = 2 alone; by the same collectives.

        Returns:
            As from `grad_norm`, but where it communicates `norm64` is not rounded to float32. The flag word is or-ed
            over ranks; `first_nonfinite_index` is the first on this rank, -1 if the flag speaks of another rank. A
            non-finite value that one rank has seen makes the norm non-finite on all. `tensor_norms` holds the norm of
            the whole tensor for each of this rank's DTensors, of copies that of this rank's; no other stage's tensors.

        Raises:
            ValueError: for per_tensor with another p than 2.
        """
        if not self.communicates:
            assert self._all_local is not None
            return grad_norm(self._all_local, p, detect_nonfinite=detect_nonfinite, per_tensor=per_tensor)
        if per_tensor and p != 2.0:
            raise ValueError(f"per_tensor=True goes with p = 2 alone, and p is {p}; pass each tensor alone")
        device = self.local[0].device if self.local else torch.device("cpu")
        norms = [(sharded, _moved(norm, device)) for sharded, norm in self._local_norms(p, per_tensor)]
        each: list[Tensor] = []
        if norms:
            norm64, each, counts = self._over_meshes(norms, p, per_tensor)
            first = _first([norm.first_nonfinite_index for _, norm in norms])
        else:
            norm64 = torch.full((), 0.0 if p >= 0.0 else math.inf, dtype=torch.float64, device="cpu")
            counts, first = norm64.new_zeros(len(_BITS)), torch.full((), -1, device="cpu")
        if self.pp_mesh_dim is not None:
            rows = all_gather(torch.cat([norm64[None], counts]), self.pp_mesh_dim)
            norm64, counts = combine_norms(rows[:, 0], p), rows[:, 1:].amax(0)
        if p != 0.0:  # which counts them
            if p > 0.0:
                norm64 = torch.where((counts[1] + counts[2]) > 0.0, math.inf, norm64)
            norm64 = torch.where(counts[0] > 0.0, math.nan, norm64)
        wide = not _WIDE.isdisjoint(t.dtype for t in self.tensors)
        sum_of_powers = norm64 if p == 0.0 or math.isinf(p) else norm64.pow(p)
        flag = sum((counts[i] > 0.0).to(torch.int32) * bit for i, bit in enumerate(_BITS))
        assert isinstance(flag, Tensor)
        tensor_norms = _in_order(each, [group.places for group in self._groups], norm64) if per_tensor else None
        norm = norm64.to(torch.float64 if wide else torch.float32)
        return Norm(norm, norm64, sum_of_powers, flag, first, tensor_norms)

    def clip_(self, norm: Tensor, max_norm: float, *, nonfinite: str = "propagate") -> None:
        """Multiply what this rank holds by min(1, max_norm / (norm + 1e-6)); as `clip_` of initlab.kernels."""
        if self._all_local is None:
            self._all_local = TensorGroups(self.local, self.indices)
        if not self.communicates or torch.is_inference_mode_enabled():
            clip_(self._all_local, norm, max_norm, nonfinite=nonfinite)
            return
        pairs = zip(self._dtensors, self.local, strict=True)
        written = [(t, part, part._version) for t, part in pairs if t is not None and not part.is_inference()]
        clip_(self._all_local, norm, max_norm, nonfinite=nonfinite)
        # Autograd goes by a DTensor's own version, and what is written to its local tensor does not change that.
        torch.autograd.graph.increment_version([t for t, part, before in written if part._version != before])

    def replicated(self, norm: Tensor) -> Tensor:
        """The norm as torch returns it: a replicated DTensor where all tensors are DTensors on one mesh."""
        dtensors = self._dtensors if self.communicates else []
        if not dtensors or any(t is None for t in dtensors):
            return norm
        mesh, *others = {t.device_mesh for t in dtensors}  # type: ignore[union-attr]
        if others or mesh.get_coordinate() is None:
            return norm
        module = sys.modules["torch.distributed.tensor"]
        placements = [module.Replicate()] * mesh.ndim
        wrapped: Tensor = module.DTensor.from_local(norm, mesh, placements, run_check=False)
        return wrapped

    def lowest(self, message: str | None) -> tuple[int, str] | None:
        """The lowest rank with a message, and its message; None if no rank has one. A collective on each dimension."""
        dims = [*self.mesh_dims, *([] if self.pp_mesh_dim is None else [self.pp_mesh_dim])]
        messages = all_gather_object(message, [mesh_dim.group for mesh_dim in dims])
        return next(((rank, one) for rank, one in messages.items() if one is not None), None)

    def _local_norms(self, p: float, per_tensor: bool) -> Iterator[tuple[frozenset[int], Norm]]:
        """This rank's norms, and the mesh dimensions over which each is to be taken further."""
        for group in self._groups:
            prepared = group.local
            if group.partial:
                prepared = TensorGroups([local(_summed(t)) for t in group.tensors], group.indices)
            if p == 0.0:  # how many tensors hold a non-zero: how many shards do would not tell
                for tensor, index in zip(prepared.tensors, group.indices, strict=True):
                    yield group.sharded, grad_norm(TensorGroups([tensor], [index]), p)
            else:
                yield group.sharded, grad_norm(prepared, p, per_tensor=per_tensor)

    def _over_meshes(
        self, norms: Sequence[tuple[frozenset[int], Norm]], p: float, per_tensor: bool
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Over all meshes the norm, each tensor's norm by groups, and how often each non-finite value was seen."""
        sharded = [dims for dims, _ in norms]
        norm64 = torch.stack([norm.norm64 for _, norm in norms])
        each = [norm.tensor_norms for _, norm in norms if norm.tensor_norms is not None]
        counts = _counts([norm.flag for _, norm in norms])
        if p == 1.0 or (p == 2.0 and _WIDE.isdisjoint(t.dtype for t in self._dtensors if t is not None)):
            powers = torch.stack([norm.sum_of_powers for _, norm in norms])
            powers, squares, counts = self._all_reduce(powers, sharded, counts, "sum", [x.square() for x in each])
            roots = powers.pow(1.0 / p)
            # The power of a plain tensor may overflow; its norm is known.
            norm64 = torch.stack([roots[i] if dims else norm64[i] for i, dims in enumerate(sharded)])
            if per_tensor:
                each = [squares[i].sqrt() if dims else each[i] for i, dims in enumerate(sharded)]
        elif p == 0.0 or p == math.inf:
            norm64, _, counts = self._all_reduce(norm64, sharded, counts, "max")
        elif p == -math.inf:
            norm64, _, counts = self._all_reduce(norm64, sharded, -counts, "min")
            counts = -counts
        else:
            norm64, each, counts = self._all_gather(norm64, sharded, counts, p, each)
        return combine_norms(norm64, p), each, counts

    def _all_reduce(
        self, numbers: Tensor, sharded: Sequence[frozenset[int]], counts: Tensor, op: str, each: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Numbers of groups, and of each tensor, over the dimensions that shard them; counts over all dimensions."""
        reduce_over = [*sharded, *(sharded if each else ()), all_mesh_dims(self.mesh_dims)]
        parts = [*numbers.split(1), *each, counts]
        results = all_reduce_parts(parts, reduce_over, self.mesh_dims, op)
        return torch.cat(results[: len(numbers)]), results[len(numbers) : -1], results[-1]

    def _all_gather(
        self, norm64: Tensor, sharded: Sequence[frozenset[int]], counts: Tensor, p: float, each: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Where sums of powers could overflow: the norms themselves, of every rank along a dimension."""
        norms, each = list(norm64.unbind()), list(each)
        for i, mesh_dim in enumerate(self.mesh_dims):
            taking_part = [k for k, dims in enumerate(sharded) if i in dims]  # ranks need not hold equally many others
            parts = [counts, *(norms[k][None] for k in taking_part), *(each[k] for k in taking_part if each)]
            columns = iter(all_gather(torch.cat(parts), mesh_dim).split([len(part) for part in parts], dim=1))
            counts = next(columns).amax(0)
            for k in taking_part:
                norms[k] = combine_norms(next(columns)[:, 0], p)
            for k in taking_part if each else ():
                each[k] = _combined(next(columns))
        return torch.stack(norms), each, counts


def _refuse_overlap(pp_mesh_dim: MeshDim, mesh_dims: Sequence[MeshDim]) -> None:
    """Raise where ranks that hold parts or copies of the same tensors are to count as stages, which hold others."""
    for mesh_dim in mesh_dims:
        both = set(pp_mesh_dim.ranks).intersection(mesh_dim.ranks)
        if len(both) > 1:
            raise ValueError(
                f"pp_group has ranks {listed(both)}, and the mesh of a gradient spreads it over these: it would count "
                f"{len(both)} times. Pass the group of ranks that hold other stages, as mesh['pp'] is, or leave it out"
            )


def _is_partial(dtensor: Any) -> bool:
    """Whether ranks hold terms of a sum, which scales as they do."""
    partial = [p for p in dtensor.placements if p.is_partial()]
    for placement in partial:
        if type(placement).__name__ != "Partial" or placement.reduce_op not in ("sum", "avg"):
            raise NotImplementedError(
                f"a DTensor of shape {tuple(dtensor.shape)} is placed {placement}, so what ranks hold is neither its "
                "elements nor terms of a sum; redistribute it to Shard or Replicate"
            )
    return bool(partial)


def _summed(dtensor: Any) -> Tensor:
    """A Partial DTensor with its sums carried out: a collective."""
    replicate = sys.modules["torch.distributed.tensor"].Replicate()
    placements = [replicate if p.is_partial() else p for p in dtensor.placements]
    summed: Tensor = dtensor.redistribute(placements=placements)
    return summed


def _combined(rows: Tensor) -> Tensor:
    """The 2-norms of vectors whose parts have these norms: a vector in each column, a part of it in each row."""
    largest = rows.amax(0)
    scale = torch.where((largest > 0.0) & largest.isfinite(), largest, 1.0)
    return (rows / scale).square().sum(0).sqrt() * scale


def _in_order(each: Sequence[Tensor], places: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """One number for each tensor, by their places; an index would have to be copied to the device."""
    if len(each) == 1:
        return each[0]
    numbers = {
        i: x for part, where in zip(each, places, strict=True) for i, x in zip(where, part.unbind(), strict=True)
    }
    return torch.stack([numbers[i] for i in range(len(numbers))]) if numbers else like.new_zeros(0)


def _moved(norm: Norm, device: torch.device) -> Norm:
    def moved(x: Any) -> Any:
        return None if x is None else x.to(device, non_blocking=device.type != "cpu")

    return Norm(*map(moved, norm))


def _counts(flags: Sequence[Any]) -> Tensor:
    """For each kind of non-finite value 1.0 where a flag word tells of it, else 0.0."""
    stacked = torch.stack(list(flags))
    return torch.stack([((stacked & bit) != 0).any() for bit in _BITS]).to(torch.float64)


def _first(indices: Sequence[Any]) -> Tensor:
    none = torch.iinfo(torch.int64).max
    stacked = torch.stack(list(indices))
    first = torch.where(stacked < 0, none, stacked).amin()
    return torch.where(first == none, -1, first)
