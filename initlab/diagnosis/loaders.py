"""diagnose() on a data loader: the batches that are worth a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from .batch import leaves
from .probes import UsageError
from .report import Diagnosis

_MOST = 5  # batches that are run


def is_loader(batch: Any) -> bool:
    """Whether what was given for a batch gives batches: lists and tuples are batches themselves.

    Example:
        >>> import torch
        >>> from initlab.diagnosis.loaders import is_loader
        >>> data = [(torch.ones(2), torch.ones(1))]
        >>> is_loader(torch.utils.data.DataLoader(data)), is_loader(iter(data)), is_loader(data[0])
        (True, True, False)
    """
    if isinstance(batch, DataLoader | Iterator):
        return True
    return hasattr(batch, "__iter__") and not isinstance(batch, list | tuple | Mapping | str) and not leaves(batch)


def worst_of(loader: Any, budget: float, diagnose: Callable[[Any, float], Diagnosis]) -> Diagnosis:
    """The diagnosis of the first batch that breaks, of those with something extreme and a plain one.

    Args:
        loader: gives batches.
        budget: seconds; half of it for the scan.
        diagnose: called with a batch and the seconds that it may take.

    Raises:
        UsageError: where the loader gives no batch.
    """
    from ..data.scanning import scan_keeping  # it looks into batches as this package does

    report, kept = scan_keeping(loader, budget / 2)
    if not kept:
        raise UsageError("the loader gave no batch; an iterator that has been used up is empty")
    kept = [*kept[: _MOST - 1], kept[-1]] if len(kept) > _MOST else kept
    rank = ("healthy", "warning", "broken")
    best: Diagnosis | None = None
    for index, batch in kept:
        found = diagnose(batch, budget / 2 / len(kept))
        if best is None or rank.index(found.verdict) > rank.index(best.verdict):
            seen = "all" if report.complete else "the first"
            note = f"batch {index} (from 0), one of {len(kept)} that were run after a scan of {seen} {report.batches}"
            best = dataclasses.replace(found, notes=(note, *found.notes), data=report, batch_index=index)
        if best.verdict == "broken":
            break
    assert best is not None
    scanned = tuple(f"scan: {fault.code}: {fault.explanation}" for fault in report.faults)
    return dataclasses.replace(best, notes=(*best.notes, *scanned))
