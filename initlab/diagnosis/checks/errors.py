"""Checks of the errors that torch raises, with what the failing call was given: which number, and what it may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import fixes, safe_forms
from ..evidence import Evidence
from ..report import Kind, Place
from ..safe_forms import SafeForm
from .finding import Finding, short


def bad_index(evidence: Evidence) -> Finding | None:
    """An index of an embedding that is out of range."""
    failed = evidence.trace.failed
    if evidence.error is None or failed is None or failed[1] not in ("embedding", "embedding_bag"):
        return None
    tensors = [x for x in evidence.trace.arguments if isinstance(x, Tensor)]
    ids = next((x for x in tensors if not x.is_floating_point()), None)
    table = next((x for x in tensors if x.is_floating_point()), None)
    facts: dict[str, Any] = {"error": short(evidence.error)}
    if ids is None or table is None or not ids.numel():
        return None
    low, high, rows = int(ids.min()), int(ids.max()), len(table)
    if low >= 0 and high < rows:
        return None
    wrong = int(((ids < 0) | (ids >= rows)).sum())
    facts |= {"smallest": low, "largest": high, "rows": rows, "out of range": wrong}
    where = f"torch.nn.Embedding({high + 1}, {table.shape[-1]})"
    if low < 0:
        why = f"index {low} is below 0, and the embedding's {rows} rows are 0 to {rows - 1}"
        advice = f"# mark padding with an index of the table, and not {low}: padding_idx=0, and ids from 1"
    else:
        why = f"index {high} is {high - rows + 1} beyond the embedding's last, {rows - 1}"
        advice = (
            f"# {failed[0] or 'the embedding'} needs a row for each index: {where}; or the ids are of another table"
        )
    why += f": {wrong} of {ids.numel()} indices are out of range."
    return Finding("input", "broken", Place(module=failed[0], op=failed[1]), why, facts, [advice])


def bad_matrix(evidence: Evidence) -> Finding | None:
    """A matrix that cannot be inverted or decomposed."""
    error, failed = evidence.error, evidence.trace.failed
    if not isinstance(error, torch.linalg.LinAlgError) or failed is None:  # type: ignore[attr-defined]
        return None
    module, op = failed
    matrix = next((x for x in evidence.trace.arguments if isinstance(x, Tensor) and x.dim() > 1), None)
    if matrix is None:
        return None
    what, facts = _of_matrix(matrix.detach().double(), op)
    form = safe_forms.diagonal(op, matrix.dtype)
    facts["error"] = short(error)
    kind: Kind = "loss" if module is None else "operation"
    where = {None: "the loss function", "": "the model's own code"}.get(module, repr(module))
    written = fixes.advice(form, op, module)
    why = f"{op} in {where} gets {what}."
    return Finding(kind, "broken", Place(module=module, op=op), why, facts, written, form=form)


def _of_matrix(matrix: Tensor, op: str) -> tuple[str, dict[str, Any]]:
    """What is wrong with a matrix, in words."""
    if not bool(matrix.isfinite().all()):
        return "numbers that are not finite", {}
    if "cholesky" in op:
        if not torch.allclose(matrix, matrix.mT, rtol=1e-4, atol=1e-6):
            return "a matrix that is not symmetric", {}
        least = float(torch.linalg.eigvalsh(matrix).min())
        text = f"a matrix that is not positive definite: its smallest eigenvalue is {least:.3g}"
        return text, {"smallest eigenvalue": least}
    values = torch.linalg.svdvals(matrix)
    least = float(values.min())
    return f"a singular matrix: its smallest singular value is {least:.3g}", {"smallest singular value": least}


_FORMS = {
    "var has negative entr": (
        "gets a variance below 0",
        SafeForm("torch.nn.functional.softplus(v) + 1e-6, or v.exp(), for a variance that a network puts out"),
    ),
    "probability tensor contains": (
        "gets probabilities that are not finite, or below 0",
        SafeForm("torch.softmax(logits, -1), or Categorical(logits=...) in place of probs"),
    ),
}


def bad_argument(evidence: Evidence) -> Finding | None:
    """An argument of the wrong sign, of which torch says so."""
    error, failed = evidence.error, evidence.trace.failed
    if error is None or failed is None:
        return None
    found = next((entry for words, entry in _FORMS.items() if words in str(error)), None)
    if found is None:
        return None
    (text, form), (module, op) = found, failed
    kind: Kind = "loss" if module is None else "operation"
    where = {None: "the loss function", "": "the model's own code"}.get(module, repr(module))
    written = fixes.advice(form, op, module)
    facts = {"error": short(error)}
    return Finding(kind, "broken", Place(module=module, op=op or None), f"{op} in {where} {text}.", facts, written)
