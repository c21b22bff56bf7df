"""Checks of recurrences: a state that one matrix multiplies in every step."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor, nn

from ..evidence import Evidence, ParameterStats
from ..limits import LIMITS
from ..report import Place
from .finding import Finding

_GATES: dict[type, int] = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}


def growing_state(evidence: Evidence) -> Finding | None:
    """A state that its recurrent matrix makes larger in every step, until it overflows."""
    origin = evidence.origin
    if origin is None or origin.phase != "forward" or not origin.grown or evidence.broke_at != 1:
        return None
    found = [(one, n, radius) for one, n, radius in recurrent(evidence) if radius**n >= LIMITS.growth]
    if not found:
        return _iterated(evidence)
    one, steps, radius = max(found, key=lambda each: math.log(each[2]) * each[1])
    return Finding(
        "weights",
        "broken",
        Place(module=one.ref.module_name, parameter=one.name),
        f"the state overflows in the forward pass: {one.name} multiplies it in each of {steps} steps, and its largest "
        f"eigenvalue is {radius:.3g}. Clipping gradients does not help: smaller weights do, or fewer steps.",
        {"largest eigenvalue": radius, "steps in time": steps},
        remedies(evidence, [each[0] for each in found]),
    )


def _iterated(evidence: Evidence) -> Finding | None:
    """Layers that are applied again and again to what they put out, as in a solver of a differential equation."""
    counts = {path: n for path, n in evidence.trace.repeats.items() if n >= LIMITS.recurrence}
    found = [
        (one, one.stats.std / (one.distribution or one.stats.std or 1.0))
        for one in evidence.parameters
        if one.ref.module_name in counts and one.ref.tensor.dim() > 1 and one.stats is not None and one.stats.finite
    ]
    if not found:
        return None
    one, ratio = max(found, key=lambda each: each[1])
    steps = counts[one.ref.module_name]
    get = f"model.get_parameter({one.name!r})"
    smaller = f"{get}.data.mul_({1 / max(ratio, 1.0):.3g})"
    return Finding(
        "weights",
        "broken",
        Place(module=one.ref.module_name, parameter=one.name),
        f"the state overflows in the forward pass: {one.name} is used in each of {steps} steps, each on what the one "
        "before put out, and it grows. Clipping gradients does not help: smaller weights, a smaller step or fewer "
        "steps do.",
        {"steps in time": steps, "times too large": ratio},
        [smaller, f"{get}.data.mul_({0.1 / max(ratio, 1.0):.3g})"] if ratio > 1 else [f"{get}.data.mul_(0.1)"],
    )


def forgotten(evidence: Evidence) -> Finding | None:
    """A run that stands still, of a recurrence whose first steps get no gradient."""
    one = evidence.forgotten
    if one is None:
        return None
    return Finding("gradient", "warning", Place(module=one.module), one.explanation, one.facts, [one.remedy])


def recurrent(evidence: Evidence) -> list[tuple[ParameterStats, int, float]]:
    """Matrices that multiply a state again and again: (parameter, steps in time, largest eigenvalue)."""
    counts = Counter(name for name, _ in evidence.trace.products)
    repeats = evidence.trace.repeats
    found = []
    for one in evidence.parameters:
        tensor, module = one.ref.tensor, one.ref.module
        if tensor.dim() != 2 or one.stats is None or not one.stats.finite:
            continue
        steps = max(counts.get(one.name, 0), repeats.get(one.ref.module_name, 0))
        if isinstance(module, nn.RNNBase | nn.RNNCellBase) and not one.ref.attribute.startswith("weight_hh"):
            continue
        gates = next((n for kind, n in _GATES.items() if isinstance(module, kind)), 1)
        if steps >= LIMITS.recurrence and tensor.shape[0] == gates * tensor.shape[1]:
            found.append((one, steps, _radius(tensor, gates)))
    return found


def _radius(matrix: Tensor, gates: int) -> float:
    """The largest magnitude among the eigenvalues of a matrix, or of each gate's."""
    with torch.no_grad():
        parts = matrix.detach().to("cpu", torch.float64).chunk(gates)
        return max(float(torch.linalg.eigvals(part).abs().max()) for part in parts)


def remedies(evidence: Evidence, matrices: list[ParameterStats]) -> list[str]:
    """Orthogonal matrices, which leave a state's size as it is; or such as shrink it a little."""
    lines = []
    for one in matrices:
        gates = next((n for kind, n in _GATES.items() if isinstance(one.ref.module, kind)), 1)
        get = f"model.get_parameter({one.name!r})"
        if gates == 1:
            lines.append(f"torch.nn.init.orthogonal_({get})")
        else:
            lines.append(f"for gate in {get}.data.chunk({gates}):\n    torch.nn.init.orthogonal_(gate)")
    half = "\n".join(
        f"torch.nn.init.orthogonal_(model.get_parameter({one.name!r}), gain=0.5)"
        for one in matrices
        if type(one.ref.module) not in _GATES
    )
    return [code for code in ("\n".join(lines), half) if code]
