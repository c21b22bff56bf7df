"""Checks of the order of dimensions: tensors that torch refuses for their shape, batches that are read as time.

What is proposed is run: another order of the dimensions of the batch, or of what the model puts out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .. import fixes
from ..batch import Leaf
from ..evidence import Evidence
from ..limits import LIMITS
from ..report import Kind, Place
from ..safe_forms import SafeForm
from ..stats import rows_equal
from ..trace import LOSSY
from .finding import Finding, severity_of_step, short

_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_TRANSPOSED = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_REFUSED = (
    "shape",
    "size",
    "dimension",
    "channels",
    "expected input",
    "batches",
    "target tensor",
    "class probabilities",
)


def refused_shape(evidence: Evidence) -> Finding | None:
    """A shape that torch refuses, where another order of dimensions, or one more, fits."""
    error, failed = evidence.error, evidence.trace.failed
    order = next((call for call in evidence.trace.losses if call.problem == "order"), None)
    if order is not None and failed is not None:
        return _of_loss(evidence, ValueError("its classes have to be dimension 1, and are the last"))
    if not isinstance(error, RuntimeError | ValueError | IndexError | AssertionError) or failed is None:
        return None
    text = str(error).lower()
    if not any(words in text for words in _REFUSED) or "more than 1 value per channel" in text:
        return None
    if failed[0] is None:
        return _of_loss(evidence, error)
    codes: dict[str, str] = {}
    for leaf in evidence.leaves:
        if leaf.is_target or not leaf.tensor.is_floating_point():
            continue
        for expression, change in _orders(evidence, leaf, *failed):
            codes.setdefault(leaf.rebind(evidence.batch, f"{leaf.value}{expression}"), f"{leaf.code}{change}")
    if not codes:
        return None
    return Finding(
        "input",
        "broken",
        Place(module=failed[0], op=failed[1] or None),
        f"{failed[1] or 'it'} in {failed[0] or 'the model itself'!r} does not take the shape that it gets: "
        f"{short(error)}",
        {"error": short(error), **{leaf.code: tuple(leaf.tensor.shape) for leaf in evidence.leaves}},
        [*codes],
        tries=len(codes),
        change="its dimensions in another order",
    )


def _orders(evidence: Evidence, leaf: Leaf, path: str | None, op: str) -> Iterator[tuple[str, str]]:
    """Expressions that give a tensor the shape that the operation takes, the smallest change first."""
    shape, dims = tuple(leaf.tensor.shape), leaf.tensor.dim()
    wanted, place, rank = _wanted(evidence, path, op)
    if wanted is None:
        return
    place = place % rank if rank else dims - 1
    if rank and dims == rank - 1 and wanted == 1:
        yield f".unsqueeze({place})", " with a dimension of channels"
    if rank and dims == rank and shape[place] == 1 != wanted:
        sizes = ", ".join(str(wanted) if d == place else "-1" for d in range(dims))
        yield f".expand({sizes})", f" with its one channel {wanted} times"
    if not rank or dims == rank:
        for d in (*range(dims - 1, 0, -1), 0):
            if d != place and shape[d] == wanted:
                yield f".movedim({d}, {place})", f" with dimension {d} at place {place}"
    for d in range(1, dims - 1) if not rank else ():
        if math.prod(shape[d:]) == wanted:
            yield f".flatten({d})", " flattened"
    if rank and dims == 2 and shape[1] % wanted == 0:
        yield (f".reshape(-1, {wanted}, {shape[1] // wanted})" if rank == 3 else ""), " as channels"


def _wanted(evidence: Evidence, path: str | None, op: str) -> tuple[int | None, int, int]:
    """The size that an operation wants of a dimension, which one it is, and how many there are; 0 where any number."""
    weight = next((x for x in evidence.trace.arguments[1:2] if isinstance(x, Tensor) and x.is_floating_point()), None)
    module = evidence.model.get_submodule(path) if path else evidence.model
    if op in _CONVOLUTIONS and weight is not None:
        groups = next((x for x in evidence.trace.arguments[6:7] if isinstance(x, int)), 1)
        return weight.shape[1] * groups, 1, _CONVOLUTIONS[op] + 2
    if op in _TRANSPOSED and weight is not None:
        return weight.shape[0], 1, _TRANSPOSED[op] + 2
    if op == "linear" and weight is not None:
        return weight.shape[-1], -1, 0
    if isinstance(module, nn.RNNBase):
        return module.input_size, -1, 0
    if isinstance(module, nn.modules.batchnorm._NormBase):
        dims = 4 if isinstance(module, nn.BatchNorm2d) else 5 if isinstance(module, nn.BatchNorm3d) else 3
        return module.num_features, 1, dims
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1], -1, 0
    return None, 0, 0


def _of_loss(evidence: Evidence, error: BaseException) -> Finding | None:
    """A loss function that does not take the model's output beside the target."""
    tensors: list[Any] = [x for x in evidence.trace.arguments if isinstance(x, Tensor)][:2]
    op = evidence.trace.failed[1] if evidence.trace.failed is not None else ""
    if len(tensors) < 2:
        return None
    prediction, target = tensors
    leaf = next((one for one in evidence.leaves if one.is_target and one.tensor.numel() == target.numel()), None)
    codes: list[str] = []
    kind: Kind = "loss"
    if prediction.numel() == target.numel() and leaf is not None and prediction.shape != target.shape:
        sizes = ", ".join(map(str, (-1, *prediction.shape[1:])))
        codes.append(leaf.rebind(evidence.batch, f"{leaf.value}.reshape({sizes})"))
        kind = "target"
    whole = not target.is_floating_point()
    if op in ("cross_entropy", "nll_loss") and whole and prediction.dim() == target.dim() + 1 and target.dim() > 1:
        hook = "model.register_forward_hook(lambda module, args, out: out.movedim(-1, 1))"
        codes.append(f"{hook}  # or in the loss: classes are dimension 1")
    if op in ("cross_entropy", "nll_loss") and whole and leaf is not None and target.dim() > 1:
        one = next((d for d in range(1, target.dim()) if target.shape[d] == 1), None)
        if one is not None:
            codes.insert(0, leaf.rebind(evidence.batch, f"{leaf.value}.squeeze({one})"))
            kind = "target"
        elif target.dim() == prediction.dim() == 2 and bool((target.sum(1) == 1).all()):
            codes.insert(
                0, leaf.rebind(evidence.batch, f"{leaf.value}.argmax(1)") + "  # class numbers of one-hot rows"
            )
            kind = "target"
    if not codes:
        return None
    shapes = f"{tuple(prediction.shape)} of the model and {tuple(target.shape)} of the target"
    return Finding(
        kind,
        "broken",
        Place(op=op or None),
        f"{op or 'the loss'} does not take the shapes {shapes} together: {short(error)}",
        {"error": short(error)},
        codes,
        tries=len(codes),
        change="the shapes made to fit",
    )


def batch_as_time(evidence: Evidence) -> Finding | None:
    """A recurrent or attention layer that takes dimension 0 for time, and gets the batch there."""
    if not evidence.mixed:
        return None
    paths = evidence.mixed
    kind = type(evidence.model.get_submodule(paths[0])).__name__
    code = f"for path in {paths!r}:\n    model.get_submodule(path).batch_first = True"
    return Finding(
        "input",
        severity_of_step(evidence),
        Place(module=paths[0]),
        f"{kind} in {paths[0]!r} takes dimension 0 for time (batch_first=False), and gets the batch there: what the "
        "model puts out for one row changes with the other rows of the batch.",
        {"layers": len(paths)},
        [code],
        change="batch_first=True",
    )


def single_numbers(evidence: Evidence) -> Finding | None:
    """A normalisation of one number at a time: less its own mean it is 0, whatever it was."""
    if not evidence.trace.singles:
        return None
    path, op = evidence.trace.singles[0]
    module = evidence.model.get_submodule(path) if path is not None else None
    grouped = isinstance(module, nn.GroupNorm) and module.num_groups > 1
    code = f"model.get_submodule({path!r}).num_groups = 1" if grouped else f"# in {fixes.code_of(path)}: leave it out"
    return Finding(
        "operation",
        severity_of_step(evidence),
        Place(module=path, op=op),
        f"{op} in {fixes.code_of(path)} normalises one number at a time: less its own mean each is 0, and nothing of "
        "the input is left.",
        {},
        [code, *(["# larger maps, or fewer groups"] if grouped else [])],
        change="one group",
    )


def softmax_over_rows(evidence: Evidence) -> Finding | None:
    """A softmax over the batch: the numbers of a row depend on the other rows, and do not sum to 1."""
    rows = {len(leaf.tensor) for leaf in evidence.leaves if leaf.tensor.dim()}
    found = [one for one in evidence.trace.over_rows if rows == {one[2][0]} and one[2][0] != one[2][1]]
    if not found:
        return None
    path, op, shape = found[0]
    module = evidence.model.get_submodule(path) if path else None
    of_module = isinstance(module, nn.Softmax | nn.LogSoftmax)
    code = f"model.get_submodule({path!r}).dim = -1" if of_module else f"# in {fixes.code_of(path)}: {op}(x, dim=-1)"
    return Finding(
        "loss" if path is None else "operation",
        severity_of_step(evidence),
        Place(module=path, op=op),
        f"{op} in {fixes.code_of(path)} runs over dimension 0 of {tuple(shape)}, the batch: the numbers of a row "
        "depend on the other rows, and do not sum to 1. Over the classes it is dim=-1.",
        {"shape": tuple(shape)},
        [code],
        suspicion=True,
        structural=True,
        change="softmax over the last dimension",
        form=None if of_module else SafeForm(f"{op}(x, dim=-1)", _over_last),
    )


def merged_rows(evidence: Evidence) -> Finding | None:
    """A reduction over the batch, behind which every row has the same output, in a run that hardly learns."""
    run, flow = evidence.untreated, evidence.trace.flow
    if run is None or flow is None or evidence.broke_at is not None or not run.constant or run.fallen > LIMITS.learns:
        return None
    inputs = [leaf for leaf in evidence.leaves if leaf.path in flow.inputs and leaf.tensor.dim()]
    rows = {len(leaf.tensor) for leaf in inputs}
    found = [one for one in evidence.trace.merged if rows == {one[2][0]}]
    output = next((call.output for call in reversed(evidence.trace.calls) if not call.path), None)
    if not found or output is None or output.signal or not output.largest:
        return None
    if rows.pop() < LIMITS.several_rows or all(rows_equal(leaf.tensor) for leaf in inputs):
        return None
    path, op, shape = found[0]
    where = fixes.code_of(path)
    if op in LOSSY:
        why = (
            f"after {op} in {where} all {shape[0]} rows are equal, which they were not before: every row gets the same "
            "output, and targets differ."
        )
        advice = f"# look at the scale of what {op} gets: numbers between 0 and 1 are all 0 as integers"
    else:
        why = (
            f"{op} in {where} runs over dimension 0 of {tuple(shape)}, the batch: every row gets the same output, and "
            "targets differ."
        )
        advice = f"# in {where}: {op}(x, dim=1), or the dimension that is meant; dimension 0 is the batch"
    return Finding(
        "operation",
        "warning",
        Place(module=path, op=op),
        why,
        {"shape": tuple(shape)},
        [advice],
    )


def _over_last(func: Any, args: Any, kwargs: Any) -> Any:
    """A softmax over the last dimension, whichever it was called for."""
    return func(
        *args[:1],
        *((-1,) if len(args) > 1 else ()),
        *args[2:],
        **({**kwargs, "dim": -1} if "dim" in kwargs else kwargs),
    )
