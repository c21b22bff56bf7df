"""Whether all ranks mean the same: messages compared by their hash, and an error that lists where they differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .._console import listing
from .collectives import all_gather_object, all_mesh_dims, all_reduce, listed
from .dtensors import is_dtensor
from .groups import MeshDim, MeshDims


def differing(messages: Mapping[str, str], mesh_dims: Sequence[MeshDim]) -> dict[str, dict[int, str | None]]:
    """What ranks do not agree on. One all-reduce of 16 bytes for each mesh dimension where they agree on everything.

    Args:
        messages: this rank's, by name.
        mesh_dims: of one mesh.

    Returns:
        By name: each rank's message, None where it does not know the name; without the names on which all agree. The
        same on every rank.

    Example:
        >>> from initlab.distributed.agreement import differing
        >>> differing({"seed": "1"}, [])
        {}
    """
    text = "\0".join(f"{name}\0{message}" for name, message in sorted(messages.items()))
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
    extremes = all_reduce(
        torch.tensor([digest, -digest], device="cpu"), [all_mesh_dims(mesh_dims)] * 2, mesh_dims, "max"
    ).tolist()
    if extremes[0] == -extremes[1]:
        return {}
    ranks = all_gather_object(messages, [mesh_dim.group for mesh_dim in mesh_dims])
    names = dict.fromkeys(name for known in ranks.values() for name in known)
    by_name = {name: {rank: known.get(name) for rank, known in ranks.items()} for name in names}
    return {name: by_rank for name, by_rank in by_name.items() if len(set(by_rank.values())) > 1}


def check_agreement(messages: Iterable[tuple[Tensor, str, str]], what: str, advice: str) -> None:
    """Compare messages about DTensors, mesh by mesh. Every rank of the meshes calls this.

    Args:
        messages: (tensor, name, this rank's message about it); plain tensors are passed over.
        what: is compared, and `advice`: what to do about it; for the error.

    Raises:
        RuntimeError: on every rank, if they differ; it lists names and ranks.
    """
    meshes: dict[object, tuple[list[Tensor], dict[str, str]]] = {}
    for tensor, name, message in messages:
        if is_dtensor(tensor):
            tensors, by_name = meshes.setdefault(tensor.device_mesh, ([], {}))  # type: ignore[attr-defined]
            tensors.append(tensor)
            by_name[name] = by_name.get(name, "") + message
    for tensors, by_name in meshes.values():
        refuse_differing(differing(by_name, MeshDims(tensors).dims), what, advice)


def refuse_differing(found: Mapping[str, Mapping[int, str | None]], what: str, advice: str) -> None:
    """Raise a RuntimeError that names what `differing` found, unless it is nothing."""
    if not found:
        return
    lines = []
    for name, by_rank in found.items():
        usual = max(by_rank.values(), key=list(by_rank.values()).count)
        others = [rank for rank, message in by_rank.items() if message != usual]
        lines.append(f"{name}: rank{'s' if len(others) > 1 else ''} {listed(others)} of {len(by_rank)}")
    raise RuntimeError(f"{what} differ between ranks:{listing(lines)}\n{advice}")
