"""scan_checkpoint(): finds the files, goes through their tensors, judges each."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from .._console import progress
from .formats import CheckpointError, StoredTensor, stored_tensors
from .report import CheckpointReport, TensorRow
from .statistics import Statistics, statistics_of

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_MOMENTS = (
    "exp_avg",
    "exp_avg_sq",
    "momentum_buffer",
    "max_exp_avg_sq",
    "exp_inf",
    "square_avg",
    "sum",
    "master_param",
)
_HUGE = 1e6  # a magnitude that no trained weight and no moment should have
_HUGE_SHARE = 0.1  # of what the dtype can hold, where that is less
_SUBNORMAL_SHARE = 0.1  # of the elements that are not 0


def scan_checkpoint(
    path: str | os.PathLike[str], since: str | os.PathLike[str] | None = None, *, show_progress: bool | None = None
) -> CheckpointReport:
    """Say which tensors of a checkpoint are NaN, inf, huge, subnormal, all zero or untouched, without building a model.

    Files are read in parts of 1 MB, so a checkpoint may be larger than the memory. No code in them is run: what is not
    a tensor, a number or a container is refused.

    Args:
        path: a .safetensors file, a file of `torch.save`, a folder of `torch.distributed.checkpoint`, or a folder that
            holds such files, as those of transformers and Lightning do.
        since: an older checkpoint of the same run. Tensors that have not changed are named, and what has become
            non-finite since.
        show_progress: whether to show a bar on stderr; None shows it in a terminal.

    Returns:
        A report with a row for each tensor of each file.

    Raises:
        FileNotFoundError: where there is nothing.
        CheckpointError: a ValueError; where a file is damaged or no checkpoint, or holds code. In a folder of several
            files such a file is listed in `report.refused`, and the others are scanned.

    Example:
        >>> import tempfile, torch, initlab
        >>> path = f"{tempfile.mkdtemp()}/weights.pt"
        >>> torch.save({"weight": torch.tensor([1.0, float("nan")]), "bias": torch.ones(1)}, path)
        >>> report = initlab.scan_checkpoint(path)
        >>> report.verdict, report.problems[0].name, report.problems[0].faults
        ('broken', 'weight', ('1 NaN',))
    """
    stored, refused = _collected(Path(path))
    older: dict[tuple[str, tuple[int, ...]], StoredTensor] = {}
    if since is not None:
        before, unread = _collected(Path(since))
        refused |= unread
        older = {(tensor.name, tensor.begin): tensor for tensor in before}
    rows = []
    total = sum(math.prod(tensor.shape) for tensor in stored)
    with progress("initlab scan", total, show_progress) as advance:
        for tensor in stored:
            before_it = older.get((tensor.name, tensor.begin))
            rows.append(_row(tensor, before_it, since is not None))
            advance(math.prod(tensor.shape))
    gone = sorted({name for name, _ in older} - {tensor.name for tensor in stored})
    return CheckpointReport(str(path), tuple(rows), refused, None if since is None else str(since), tuple(gone))


def _collected(path: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors of a file or folder, and the files that cannot be read, with the reason."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if not path.is_dir() or (path / ".metadata").is_file():
        return stored_tensors(path), {}
    files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    folders = sorted(file.parent for file in path.rglob(".metadata"))
    if not files and not folders:
        raise CheckpointError(
            f"{path} holds no checkpoint: no {', '.join(_SUFFIXES)} file, "
            "and no .metadata of torch.distributed.checkpoint"
        )
    stored: list[StoredTensor] = []
    refused: dict[str, str] = {}
    for place in [*folders, *files]:
        try:
            stored += stored_tensors(place)
        except CheckpointError as error:
            refused[str(place)] = str(error)
    if not stored and refused:
        raise CheckpointError("\n".join(refused.values()))
    return stored, refused


def _row(stored: StoredTensor, before: StoredTensor | None, compared: bool) -> TensorRow:
    fits = before is not None and (before.shape, before.dtype, before.strides) == (
        stored.shape,
        stored.dtype,
        stored.strides,
    )
    counts = statistics_of(stored.parts(), before.parts() if before is not None and fits else None)
    faults, notes = _judged(stored, counts)
    change = None
    if compared and before is None:
        notes.append("not in the older checkpoint")
    elif compared and not fits:
        assert before is not None
        notes.append(f"was {str(before.dtype).removeprefix('torch.')} {list(before.shape)} before")
    elif compared:
        change = (
            math.sqrt(counts.change_squares) / counts.rms / math.sqrt(max(1, counts.elements)) if counts.rms else 0.0
        )
        if not counts.changed and counts.elements:
            notes.append("unchanged")
    return TensorRow(
        stored.name,
        stored.file.name,
        stored.begin,
        stored.dtype,
        stored.shape,
        counts.rms,
        counts.largest,
        counts.nonfinite,
        change,
        tuple(faults),
        tuple(notes),
    )


def _judged(stored: StoredTensor, counts: Statistics) -> tuple[list[str], list[str]]:
    """What is wrong with a tensor, and what is worth a note."""
    if not counts.elements or not (stored.dtype.is_floating_point or stored.dtype.is_complex):
        return [], []
    real = counts.zeros + counts.neginf == counts.elements
    if counts.neginf and real and not counts.nan:
        return [], ["a mask of -inf"]
    limit = torch.finfo(stored.dtype).max
    if counts.lowest <= -limit / 2 and counts.highest <= 0:
        return [], ["a mask"]
    faults = [
        f"{n:,} {what}" for n, what in ((counts.nan, "NaN"), (counts.posinf, "inf"), (counts.neginf, "-inf")) if n
    ]
    notes = []
    if counts.largest >= min(_HUGE, _HUGE_SHARE * limit):
        faults.append(f"huge: up to {counts.largest:.3g}")
    nonzero = counts.elements - counts.nonfinite - counts.zeros
    if counts.subnormal and counts.subnormal >= _SUBNORMAL_SHARE * nonzero:
        notes.append(f"{counts.subnormal / counts.elements:.0%} subnormal")
    if counts.zeros == counts.elements:
        if stored.name.rpartition(".")[2] in _MOMENTS:
            faults.append("untouched: the optimizer never had a gradient for it")
        elif len(stored.shape) > 1:
            notes.append("all zero")
    return faults, notes
