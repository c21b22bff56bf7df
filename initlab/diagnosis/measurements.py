"""What a report page plots and no cause needs: distributions, scales by feature, sizes of updates. Plain data.

Nothing here runs the model. What a pass has to tell was counted while it ran; the rest is read off the batch and the
parameters, as they were before the first step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from initlab.kernels.torch_internals import physical

from .._console import plain_data
from .batch import Leaf
from .evidence import Evidence, ParameterStats
from .histograms import Histogram, count, read, some
from .limits import LIMITS
from .stats import spread_out
from .trace import Call

if TYPE_CHECKING:
    from .report import Cause


@dataclass(frozen=True)
class WeightRow:
    """A weight matrix, before the first step.

    Args:
        name: of the parameter.
        std: of its elements.
        wanted: the standard deviation that its layer's activation asks for; None if unknown.
        update: size of the first step's update against its own, 2-norms; None where no step was taken.
        histogram: of its elements; None where it is not one of those that matter.
    """

    name: str
    std: float
    wanted: float | None
    update: float | None
    histogram: Histogram | None


@dataclass(frozen=True)
class ActivationRow:
    """What a layer put out in the first pass.

    Args:
        name: path of the module, or name of the parameter where a model multiplies with it by itself.
        kind: its class.
        function: the activation that its output went through, "" if none was seen.
        output: before that function.
        activated: after it.
    """

    name: str
    kind: str
    function: str
    output: Histogram | None
    activated: Histogram | None


@dataclass(frozen=True)
class TensorScale:
    """The scale of a tensor of the batch.

    Args:
        code: the tensor, as an expression: "batch[0]".
        role: whether the model reads it, or the loss compares with it.
        what: what the numbers are of: features (the last dimension), channels, the whole tensor, or classes.
        total: how many of them there are.
        index: which of them are here: all, or the extremes and some between.
        mean: of the finite values of each; of a class the share of the elements that it has.
        std: about that mean; 0 for classes.
        bad: whether each has NaN or infinities.
    """

    code: str
    role: Literal["input", "target"]
    what: Literal["feature", "channel", "values", "class"]
    total: int
    index: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bad: tuple[bool, ...]


@dataclass(frozen=True)
class Measurements:
    """What a report page plots beside the layers.

    Args:
        weights: every weight matrix, in the order of the model.
        activations: of the layers that matter: those of causes, the first, the last, the extremes.
        scales: of the tensors of the batch.
    """

    weights: tuple[WeightRow, ...] = ()
    activations: tuple[ActivationRow, ...] = ()
    scales: tuple[TensorScale, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The measurements as plain data, for JSON."""
        return plain_data(dataclasses.asdict(self))


@torch.no_grad()
def collect(evidence: Evidence, causes: Sequence[Cause]) -> Measurements:
    """What the evidence has to plot, with the parameters restored.

    Args:
        evidence: of a run.
        causes: what was found; their layers matter most.
    """
    calls = _calls_that_matter(evidence, causes)
    weights = [one for one in evidence.parameters if one.stats is not None and one.ref.tensor.dim() > 1]
    chosen = {id(one) for one in _weights_that_matter(weights, calls, causes)}
    kept = [some(one.ref.tensor) if id(one) in chosen else None for one in weights]
    kept += [elements for call in calls for elements in (call.some, call.some_activated)]
    found = iter(read([count(elements) for elements in kept]))
    return Measurements(
        tuple(_weight(one, next(found)) for one in weights),
        tuple(ActivationRow(call.path, call.kind, call.activation, next(found), next(found)) for call in calls),
        tuple(scale for leaf in evidence.leaves for scale in _scales(leaf)),
    )


def _weight(one: ParameterStats, histogram: Histogram | None) -> WeightRow:
    assert one.stats is not None
    return WeightRow(one.name, one.stats.std, one.distribution, one.update, histogram)


def _calls_that_matter(evidence: Evidence, causes: Sequence[Cause]) -> list[Call]:
    """In order of depth, the calls of the modules that causes name, the first and the last, and the extremes."""
    layers = evidence.layers
    by_path: dict[str, Call] = {}
    for call in (*layers, *evidence.trace.calls):
        if call.some is not None:
            by_path.setdefault(call.path, call)
    named = [by_path[path] for path in _modules_named(causes) if path in by_path]
    sizes = [(call, call.output) for call in layers if call.output is not None and call.some is not None]
    finite = [(call, out) for call, out in sizes if out.finite]
    extremes = [call for call, out in sizes if not out.finite][:1]
    if finite:
        extremes.append(min(finite, key=lambda one: one[1].headroom)[0])
        extremes.append(min(finite, key=lambda one: one[1].std)[0])
    ends = [call for call, _ in (*sizes[:1], *sizes[-1:])]
    chosen = list(dict.fromkeys((*named, *ends, *extremes)))[: LIMITS.plotted]
    return [call for call in dict.fromkeys((*evidence.trace.calls, *chosen)) if call in chosen]


def _weights_that_matter(
    weights: Sequence[ParameterStats], calls: Sequence[Call], causes: Sequence[Cause]
) -> list[ParameterStats]:
    """Those that causes name, then those of the layers that matter."""
    by_name = {name: one for one in weights for name in one.ref.names}
    chosen = [by_name[name] for cause in causes if (name := cause.place.parameter) in by_name]
    for path in (*_modules_named(causes), *(call.path for call in calls)):
        chosen += [one for one in weights if one.ref.module_name == path or path in one.ref.names]
    known = [*chosen, *weights[:1], *weights[-1:]]
    return list({id(one): one for one in known}.values())[: LIMITS.plotted]


def _modules_named(causes: Sequence[Cause]) -> Iterator[str]:
    for cause in causes:
        if cause.place.module is not None:
            yield cause.place.module
        elif cause.place.parameter is not None:
            yield cause.place.parameter
            yield cause.place.parameter.rpartition(".")[0]


def _scales(leaf: Leaf) -> Iterator[TensorScale]:
    """The scale of one tensor of the batch, if it has any."""
    tensor = physical(leaf.tensor.detach())
    if tensor.numel() == 0 or tensor.is_meta or tensor.layout != torch.strided or tensor.is_complex():
        return
    role: Literal["input", "target"] = "target" if leaf.is_target else "input"
    if not tensor.is_floating_point():
        if leaf.is_target:
            yield from _classes(leaf.code, role, tensor)
        return
    known = leaf.features
    if tensor.dim() > 3 or known is None:
        # An image's last dimension is its width; what is wider than any table is taken as a whole.
        channels = tensor.dim() > 3 and tensor.shape[1] <= LIMITS.plotted_columns
        rows = (
            tensor.detach()[spread_out(len(tensor), LIMITS.scaled_rows).to(tensor.device)] if tensor.dim() else tensor
        )
        x = (rows.transpose(0, 1).flatten(1) if channels else rows.reshape(1, -1)).double()
        finite = x.isfinite()
        size = finite.sum(1).clamp_min(1)
        mean = torch.where(finite, x, 0.0).sum(1) / size
        std = (torch.where(finite, x - mean[:, None], 0.0).square().sum(1) / size).sqrt()
        what: Literal["channel", "values"] = "channel" if channels else "values"
        means, stds, bad = torch.stack([mean, std, (~finite).any(1).double()]).tolist()
        index = tuple(range(len(means)))
        yield TensorScale(leaf.code, role, what, len(means), index, tuple(means), tuple(stds), tuple(map(bool, bad)))
        return
    spread = (known.rms.square() - known.mean.square()).clamp_min(0.0).sqrt()
    shown = _some(spread + known.mean.abs(), known.bad)
    means, stds = torch.stack([known.mean[shown], spread[shown]]).tolist()
    index = tuple(shown.tolist())
    found = set(known.bad)
    bad = tuple(column in found for column in index)
    yield TensorScale(leaf.code, role, "feature", len(spread), index, tuple(means), tuple(stds), bad)


def _some(size: Tensor, bad: Sequence[int]) -> Tensor:
    """Which features are shown: all; or the first bad ones, the largest, the smallest and some between."""
    most = LIMITS.plotted_columns
    if len(size) <= most:
        return torch.arange(len(size))
    size = size.clone()
    size[list(bad[: most // 4])] = torch.inf
    order = size.argsort(stable=True)
    ends = torch.cat([order[: most // 4], order[-(most // 4) :]])
    between = order[most // 4 : -(most // 4)]
    return torch.cat([ends, between[spread_out(len(between), most - len(ends))]]).sort().values


def _classes(code: str, role: Literal["input", "target"], tensor: Tensor) -> Iterator[TensorScale]:
    """The classes of a target: what share of the elements each has."""
    x = tensor.reshape(-1)
    if x.numel() > LIMITS.sample:
        x = x[spread_out(x.numel(), LIMITS.sample).to(x.device)]
    labels, counts = x.cpu().unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[: LIMITS.plotted_columns].sort().values
    shares = tuple((counts[order].double() / x.numel()).tolist())
    index = tuple(int(label) for label in labels[order])
    yield TensorScale(code, role, "class", len(labels), index, shares, (0.0,) * len(index), (False,) * len(index))
