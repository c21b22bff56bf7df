"""Digests of a model's parameters, which two runs, machines or shardings can compare: equal digests mean equal bits."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from initlab.kernels import content_sum

from ..distributed.collectives import all_reduce
from ..distributed.fsdp import refuse_hidden_shards, reshard
from ..distributed.groups import MeshDims
from ..distributed.shards import local_shards
from .naming import Names, TensorRef, tensor_refs


@dataclass(frozen=True)
class ModelDigest:
    """Digests of a model's parameters, 64 bits each in hexadecimal.

    Args:
        total: of all parameters and their names.
        parameters: of each parameter, by canonical name; of a tied one, by the byte-wise smallest.
    """

    total: str
    parameters: dict[str, str]

    def __str__(self) -> str:
        return self.total

    def differing(self, other: "ModelDigest") -> list[str]:
        """Names whose parameters differ between two models, or that only one of them has, in order.

        Example:
            >>> import torch, initlab
            >>> a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
            >>> report = initlab.init_model_(a, seed=0), initlab.init_model_(b, seed=0, only="weight")
            >>> initlab.model_digest(a).differing(initlab.model_digest(b))
            ['bias']
        """
        names = sorted(self.parameters.keys() | other.parameters.keys())
        return [name for name in names if self.parameters.get(name) != other.parameters.get(name)]


def model_digest(model: nn.Module, names: Names | None = None) -> ModelDigest:
    """One digest for each parameter of a model and one for all: equal digests mean equal weights, bit for bit.

    They depend on names, shapes, dtypes and elements only: not on the device, the memory format, wrappers, the order in
    which the model was built, whether weights are tied by identity or by value under the same names, or how they are
    sharded. With DTensors every rank of their meshes calls this: each digests its own part, nothing is gathered, and
    one all-reduce of 16 bytes a parameter for each dimension of a mesh adds the sums up. Copies are not compared.

    Args:
        model: a module without parameters on the meta device; wrapped or not.
        names: maps the names of a part of a model to those in the whole; see init_model_.

    Returns:
        The digests. A parameter's is BLAKE2b, digest size 8, of kernels.content_sum (8 bytes, little-endian), dtype
        and shape; the model's is that of names and digests in byte order.

    Raises:
        NotImplementedError: for a parameter on the meta device, a sparse one, a DTensor placed by Partial, or another
            wrapper.
        ValueError: if two parameters have one name.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Linear(3, 2)
        >>> report = initlab.init_model_(model, seed=0)
        >>> str(initlab.model_digest(model))
        '01b61b64d6384019'
    """
    reshard(model)
    refuse_hidden_shards(model)
    parameters = tensor_refs(model, names)[0]
    sums = _all_reduced(parameters, [_content_of(ref) for ref in parameters])
    digests: dict[str, str] = {}
    for ref, contents in zip(parameters, sums, strict=True):
        dtype, shape = str(ref.tensor.dtype), str(tuple(ref.tensor.shape))
        digest = _blake(contents.to_bytes(8, "little"), dtype.encode(), shape.encode())
        digests.update(dict.fromkeys(ref.names, digest))
    digests = dict(sorted(digests.items()))
    lines = (f"{name}\0{digest}\n" for name, digest in digests.items())
    return ModelDigest(_blake(*(line.encode() for line in lines)), digests)


def _content_of(ref: TensorRef) -> int:
    """The content sum of what this rank holds of a tensor."""
    try:
        shards = local_shards(ref.tensor) if ref.kind == "dtensor" else None
        cls = type(ref.tensor if shards is None else shards[0].tensor)
        if cls.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise NotImplementedError(f"a {cls.__name__} is a wrapper around other tensors, and has no digest")
        if shards is None:
            return content_sum(ref.tensor)
        return sum(content_sum(shard, region) for shard, region in shards)
    except NotImplementedError as error:
        raise NotImplementedError(f"{ref.name}: {error}") from None


def _all_reduced(parameters: list[TensorRef], sums: list[int]) -> list[int]:
    """Content sums added up over the ranks among which tensors are sharded."""
    mesh_dims = MeshDims(ref.tensor if ref.kind == "dtensor" else None for ref in parameters)
    if mesh_dims.dims:  # in halves: no sum over ranks may overflow int64
        halves = torch.tensor([half for total in sums for half in (total & _HALF, (total >> 32) & _HALF)])
        reduce_over = [dims for dims in mesh_dims.sharded for _ in range(2)]
        added = all_reduce(halves, reduce_over, mesh_dims.dims).tolist()
        sums = [low + (high << 32) for low, high in zip(added[::2], added[1::2], strict=True)]
    return [total & ((1 << 64) - 1) for total in sums]


_HALF = (1 << 32) - 1


def _blake(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
