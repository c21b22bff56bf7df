"""InitReport, which says what each parameter was filled with, and the digests that two runs can compare."""

import hashlib
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from initlab.kernels import STREAM_VERSION, Constant, Distribution, Normal, Uniform, content_sum

from .._console import table
from ..distributed.collectives import all_reduce
from ..distributed.dtensors import is_dtensor, local
from ..distributed.fsdp import refuse_hidden_shards, reshard
from ..distributed.groups import MeshDims
from ..distributed.shards import local_shards
from .layers import DimSlice
from .naming import Names, tensor_refs


class Row(NamedTuple):
    """What one parameter or buffer is filled with.

    Args:
        name: its canonical name, from which its key comes.
        aliases: its other names, where it is tied.
        shape: its shape.
        dtype: its dtype.
        distribution: the distribution of the whole tensor, or of its first block; None where the owner's own code fills a buffer.
        blocks: (block, distribution) of the parts that differ, such as the padding row of an embedding.
        fan: the connections that the distribution was derived from; None if it was derived from none.
        std: standard deviation of the distribution.
        key: the 64-bit key of its draws; None where nothing is drawn.
        why: what the distribution was read from.
        guess: whether it was guessed from names or from the order of modules.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    distribution: Distribution | None
    blocks: tuple[tuple[DimSlice, Distribution], ...] = ()
    fan: float | None = None
    std: float | None = None
    key: int | None = None
    why: str = ""
    guess: bool = False

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data, for JSON; the key and the distribution's parameters included."""
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "distribution": None if self.distribution is None else _distribution_to_dict(self.distribution),
            "blocks": [
                {**block._asdict(), "distribution": _distribution_to_dict(distribution)}
                for block, distribution in self.blocks
            ],
            "fan": self.fan,
            "std": self.std,
            "key": None if self.key is None else f"{self.key:016x}",
            "why": self.why,
            "guess": self.guess,
        }


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
    sharded. With DTensors every rank of their meshes calls this: each digests what it holds, nothing is gathered, and
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
    sums = _summed([ref.tensor for ref in parameters], [_content_of(ref.tensor, ref.name) for ref in parameters])
    digests: dict[str, str] = {}
    for ref, contents in zip(parameters, sums, strict=True):
        dtype, shape = str(ref.tensor.dtype), str(tuple(ref.tensor.shape))
        digest = _blake(contents.to_bytes(8, "little"), dtype.encode(), shape.encode())
        digests.update(dict.fromkeys(ref.names, digest))
    digests = dict(sorted(digests.items()))
    lines = (f"{name}\0{digest}\n" for name, digest in digests.items())
    return ModelDigest(_blake(*(line.encode() for line in lines)), digests)


def _content_of(tensor: Tensor, name: str) -> int:
    """The content sum of what this rank holds of a tensor."""
    mine = local(tensor)
    if type(mine).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise NotImplementedError(f"{name} is a {type(mine).__name__}, a wrapper around other tensors: no digest")
    try:
        if not is_dtensor(tensor):
            return content_sum(tensor)
        return sum(content_sum(part, region) for part, region in local_shards(tensor))
    except NotImplementedError as error:
        raise NotImplementedError(f"{name}: {error}") from None


def _summed(tensors: list[Tensor], sums: list[int]) -> list[int]:
    """Content sums added up over the ranks among which tensors are sharded."""
    mesh_dims = MeshDims(tensor if is_dtensor(tensor) else None for tensor in tensors)
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


@dataclass
class InitReport:
    """What init_model_ did, or plan_model says that it would do. Printed, it is a table.

    Args:
        seed: the seed of the keys.
        recipe: the recipe's name.
        rows: one for each parameter that is filled, then one for each buffer, in the order of the model.
        stream: the version of the stream.
    """

    seed: int
    recipe: str
    rows: tuple[Row, ...]
    stream: int = STREAM_VERSION
    digests: ModelDigest | None = None
    _model: Callable[[], nn.Module | None] = field(default=lambda: None, repr=False, compare=False)
    _names: Names | None = field(default=None, repr=False, compare=False)

    def digest(self) -> ModelDigest:
        """Digest the model as it is now; the report shows the digests from then on.

        Raises:
            RuntimeError: if the model no longer exists. The report does not keep it alive.
            NotImplementedError: if a parameter has no digest; see model_digest.

        Example:
            >>> import torch, initlab
            >>> model = torch.nn.Linear(3, 2)
            >>> report = initlab.init_model_(model, seed=0)
            >>> report.digest() == initlab.model_digest(model)
            True
        """
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this report no longer exists; call model_digest(model) while it does")
        self.digests = model_digest(model, self._names)
        return self.digests

    @property
    def guesses(self) -> tuple[Row, ...]:
        """The rows whose distribution was guessed."""
        return tuple(row for row in self.rows if row.guess)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON; with digests once they have been asked for."""
        rows = [row.to_dict() for row in self.rows]
        for row in rows if self.digests is not None else ():
            row["digest"] = self.digests.parameters.get(row["name"])  # type: ignore[union-attr]
        plain: dict[str, Any] = {"seed": self.seed, "recipe": self.recipe, "stream": self.stream, "rows": rows}
        return plain if self.digests is None else plain | {"digest": self.digests.total}

    def __str__(self) -> str:
        total = sum(row.numel for row in self.rows)
        head = ["name", "shape", "dtype", "distribution", "fan", "std", "key", "why"]
        rows = [self._cells(row) for row in self.rows]
        if self.digests is not None:
            head.insert(7, "digest")
            for cells, row in zip(rows, self.rows, strict=True):
                cells.insert(7, self.digests.parameters.get(row.name, ""))
        lines = [table(head, rows)]
        digest = "" if self.digests is None else f", digest {self.digests.total}"
        summary = f"{len(self.rows)} tensors, {total:,} elements: recipe {self.recipe}, seed {self.seed}, "
        lines.append(f"{summary}stream {self.stream}{digest}")
        if self.guesses:
            lines.append(f"* {len(self.guesses)} guessed, from names or from the order of modules")
        return "\n".join(lines)

    def _cells(self, row: Row) -> list[str]:
        distribution = "own code" if row.distribution is None else distribution_text(row.distribution)
        for block, other in row.blocks:
            rows = f"{block.start}" if block.length == 1 else f"{block.start}:{block.start + block.length}"
            distribution += f"; [{':, ' * block.dim}{rows}] {distribution_text(other)}"
        why = row.why + ("".join(f", tied: {alias}" for alias in row.aliases))
        return [
            row.name,
            " x ".join(map(str, row.shape)) or "scalar",
            str(row.dtype).removeprefix("torch."),
            distribution,
            "" if row.fan is None else f"{row.fan:g}",
            "" if row.std is None else f"{row.std:.4g}",
            "" if row.key is None else f"{row.key:016x}",
            f"* {why}" if row.guess else why,
        ]


def report_of(model: nn.Module, names: Names | None, seed: int, recipe: str, rows: Sequence[Row]) -> InitReport:
    """The report on a model, which it does not keep alive."""
    return InitReport(seed, recipe, tuple(rows), _model=weakref.ref(model), _names=names)


def distribution_text(distribution: Distribution) -> str:
    """A distribution in a few characters.

    Example:
        >>> from initlab.kernels import Normal
        >>> from initlab.models.report import distribution_text
        >>> distribution_text(Normal(0.0, 0.02))
        'normal(0, 0.02)'
    """
    if isinstance(distribution, Constant):
        value = distribution.value
        return f"{value:g}" if not isinstance(value, complex) else str(value)
    if isinstance(distribution, Uniform):
        return f"uniform[{distribution.low:.4g}, {distribution.high:.4g})"
    if isinstance(distribution, Normal):
        return f"normal({distribution.mean:.4g}, {distribution.std:.4g})"
    return (
        f"truncated({distribution.mean:.4g}, {distribution.std:.4g}, [{distribution.low:.4g}, {distribution.high:.4g}])"
    )


def distribution_std(distribution: Distribution) -> float:
    """The standard deviation of a distribution.

    Source:
        N. Johnson, S. Kotz and N. Balakrishnan, "Continuous univariate distributions", 1994, 13.10.1, for the
        truncated normal.

    Example:
        >>> from initlab.kernels import TruncatedNormal
        >>> from initlab.models.report import distribution_std
        >>> round(distribution_std(TruncatedNormal(0.0, 1.0, -2.0, 2.0)), 4)
        0.8796
    """
    if isinstance(distribution, Constant):
        return 0.0
    if isinstance(distribution, Uniform):
        return (distribution.high - distribution.low) / math.sqrt(12.0)
    if isinstance(distribution, Normal):
        return distribution.std
    alpha, beta = (
        (distribution.low - distribution.mean) / distribution.std,
        (distribution.high - distribution.mean) / distribution.std,
    )
    if alpha + beta < 0.0:
        alpha, beta = -beta, -alpha  # mirrored, so that a far interval lies in the upper tail, where erfc is exact
    if beta - alpha < 1e-3:
        return (distribution.high - distribution.low) / math.sqrt(12.0)  # the differences below would cancel
    mass = (math.erfc(alpha / math.sqrt(2.0)) - math.erfc(beta / math.sqrt(2.0))) / 2
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0 for x in (alpha, beta)]
    moments = [x * d if math.isfinite(x) else 0.0 for x, d in zip((alpha, beta), density, strict=True)]
    mean = (density[0] - density[1]) / mass
    variance = 1.0 + (moments[0] - moments[1]) / mass - mean * mean
    return distribution.std * math.sqrt(max(variance, 0.0))


def _distribution_to_dict(distribution: Distribution) -> dict[str, Any]:
    fields = {name: getattr(distribution, name) for name in distribution.__dataclass_fields__}
    # JSON has neither complex numbers nor infinities.
    strange = {name: str(v) for name, v in fields.items() if isinstance(v, complex) or not math.isfinite(v)}
    return {"kind": type(distribution).__name__} | fields | strange
