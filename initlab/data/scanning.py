"""scan_data(): one pass over a loader, within a budget."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._console import inline_listing, progress
from ..diagnosis.batch import Leaf, leaves
from .columns import FloatColumns, IntegerLabels
from .report import ColumnRow, DataFault, DataReport

_SCALE = 100.0  # between the columns of one tensor, in standard deviations
_LARGE = 30.0  # root mean square of what a first layer takes
_CHANGE, _CERTAINTY = 4.0, 10.0  # of a column's root mean square: its factor; in standard errors
_IGNORED = -100  # torch's ignore_index
_RARE = 1e-3  # share of the rows of a label that stands apart
_IMBALANCE = 100.0  # between the most and the least frequent class


def scan_data(
    loader: Iterable[Any],
    *,
    budget: float = 60.0,
    classes: int | None = None,
    show_progress: bool | None = None,
) -> DataReport:
    """Go through a data loader once, and say what a training run would stumble over, in which batch and row.

    Looks for NaN and inf; for features or channels whose scales differ, are large, constant, or change from some batch
    on; for labels out of range, apart from the others or out of balance; for empty and repeated batches.

    Args:
        loader: a DataLoader or any iterable of batches: tensors, tuples, dicts, nested or not. Targets are what is
            named so, or stands last in a tuple or list. An iterator is used up.
        budget: seconds. What was not reached is said.
        classes: how many the model has outputs for; labels outside 0 to classes - 1 are faults, but torch's -100.
            None takes what stands apart from all other labels.
        show_progress: whether to show a bar on stderr; None shows it in a terminal.

    Returns:
        A report; `report.columns` has the statistics of every column, `report.to_frame()` gives them to pandas.

    Raises:
        TypeError: where the loader is no iterable of batches.

    Example:
        >>> import torch, initlab
        >>> x, y = torch.randn(64, 3), torch.randint(0, 2, (64,))
        >>> x[40, 1] = float("nan")
        >>> data = torch.utils.data.TensorDataset(x, y)
        >>> report = initlab.scan_data(torch.utils.data.DataLoader(data, batch_size=16))
        >>> report.faults[0].kind, report.faults[0].places, report.faults[0].columns
        ('not finite', ((2, 8),), (1,))
    """
    return scan_keeping(loader, budget, classes, show_progress)[0]


def scan_keeping(
    loader: Iterable[Any], budget: float, classes: int | None = None, show_progress: bool | None = None
) -> tuple[DataReport, list[tuple[int, Any]]]:
    """`scan_data`, and the batches to look at with their indices: the oddest first, a plain one last."""
    if isinstance(loader, Tensor) or not hasattr(loader, "__iter__"):
        raise TypeError(
            f"loader is a {type(loader).__name__}; scan_data() takes an iterable of batches, as a DataLoader or "
            f"[(x, y), ...]. Wrap a single batch: [batch]"
        )
    scan = _Scan(classes)
    begin = time.monotonic()
    complete = True
    try:
        total = len(loader)  # type: ignore[arg-type]
    except TypeError:
        total = 0
    with progress("initlab scan_data", total, show_progress) as advance:
        for index, batch in enumerate(loader):
            scan.add(index, batch)
            advance(1)
            if time.monotonic() - begin > budget:
                complete = total == index + 1
                break
    return scan.report(complete), scan.kept()


class _Scan:
    """What has been seen so far."""

    def __init__(self, classes: int | None) -> None:
        self.classes = classes
        self.floats: dict[str, FloatColumns] = {}
        self.integers: dict[str, IntegerLabels] = {}
        self.targets: set[str] = set()
        self.digests: dict[bytes, int] = {}
        self.repeated: list[tuple[int, int]] = []
        self.empty: list[int] = []
        self.batches = self.rows = 0
        self.extremes: dict[str, tuple[float, int, Any]] = {}  # by what is extreme: how much, which batch

    def kept(self) -> list[tuple[int, Any]]:
        """The batches with something extreme, each once; a plain one last, where there is one."""
        order = ("not finite", "empty", "lowest", "highest", "largest", "plain")
        whats = sorted(self.extremes, key=lambda what: [what.startswith(start) for start in order].index(True))
        found = {self.extremes[what][1]: self.extremes[what][2] for what in whats}
        plain = found.pop(self.extremes["plain"][1]) if "plain" in self.extremes else None
        return [*found.items(), *([(self.extremes["plain"][1], plain)] if plain is not None else [])]

    def _keep(self, what: str, extent: float, index: int, batch: Any) -> None:
        if what not in self.extremes or extent > self.extremes[what][0]:
            self.extremes[what] = (extent, index, batch)

    def add(self, index: int, batch: Any) -> None:
        """Take in one batch."""
        found = [_dense(leaf) for leaf in leaves(batch) if not leaf.tensor.is_meta]
        self.batches += 1
        if not found or all(leaf.tensor.numel() == 0 for leaf in found):
            self.empty.append(index)
            self._keep("empty", 0, index, batch)
            return
        self.rows += max(len(leaf.tensor) if leaf.tensor.dim() else 1 for leaf in found)
        digest = _digest(found)
        if digest in self.digests:
            self.repeated.append((self.digests[digest], index))
        self.digests.setdefault(digest, index)
        for leaf in found:
            tensor = leaf.tensor
            if leaf.is_target:
                self.targets.add(leaf.code)
            if tensor.is_floating_point():
                if leaf.code not in self.floats:
                    self.floats[leaf.code] = FloatColumns(leaf.code, tuple(tensor.shape))
                columns = self.floats[leaf.code]
                rows = columns.bad.rows
                columns.add(index, tensor)
                if columns.bad.rows > rows:
                    self._keep(f"not finite {leaf.code}", 0, index, batch)
                elif tensor.numel():
                    self._keep(f"largest {leaf.code}", float(tensor.detach().abs().max()), index, batch)
            elif not tensor.is_complex():
                self.integers.setdefault(leaf.code, IntegerLabels(leaf.code)).add(index, tensor)
                if tensor.numel():
                    low, high = (int(value) for value in tensor.detach().to(torch.int64).aminmax())
                    self._keep(f"highest {leaf.code}", high, index, batch)
                    self._keep(f"lowest {leaf.code}", -low, index, batch)
        if not any(index == at for _, at, _ in self.extremes.values()):
            self._keep("plain", 0, index, batch)

    def report(self, complete: bool) -> DataReport:
        """What all of it amounts to."""
        faults = [*self._whole()]
        rows: list[ColumnRow] = []
        for columns in self.floats.values():
            faults += self._of_floats(columns)
            rows += _float_rows(columns)
        for labels in self.integers.values():
            faults += self._of_labels(labels)
            if labels.counts:
                rows.append(_label_row(labels, labels.code in self.targets))
        faults.sort(key=lambda fault: fault.severity != "broken")
        worst = next((fault.places[0][0] for fault in faults if fault.places), None)
        return DataReport(self.batches, self.rows, complete, tuple(rows), tuple(faults), worst)

    def _whole(self) -> list[DataFault]:
        faults = []
        if not self.batches:
            faults.append(DataFault("empty", "broken", "batch", "the loader gave no batch at all."))
        if self.empty:
            names = inline_listing([str(index) for index in self.empty], 5)
            why = f"batch {names} has no rows: a mean over it is NaN."
            faults.append(DataFault("empty", "broken", "batch", why, tuple((index, -1) for index in self.empty[:5])))
        if self.repeated:
            pairs = inline_listing([f"{later} equals batch {first}" for first, later in self.repeated], 3)
            why = f"batch {pairs}, bit for bit: {len(self.repeated)} of {self.batches} batches were seen before."
            places = tuple((later, -1) for _, later in self.repeated[:5])
            faults.append(DataFault("duplicate", "warning", "batch", why, places))
        return faults

    def _of_floats(self, columns: FloatColumns) -> list[DataFault]:
        faults = []
        bad = columns.bad
        what = columns.what
        if bad.rows:
            names = inline_listing([f"batch {batch}, row {row}" for batch, row in bad.places], 5)
            more = f" and {bad.rows - len(bad.places)} more rows" if bad.rows > len(bad.places) else ""
            why = f"NaN or inf in {names}{more}; every row that has one makes the mean loss NaN."
            faults.append(
                DataFault("not finite", "broken", columns.code, why, tuple(bad.places), tuple(sorted(bad.columns)))
            )
        if not columns.means:
            return faults
        mean, std = columns.totals()
        scale = (std.square() + mean.square()).sqrt()
        constant = (columns.highest == columns.lowest).nonzero().flatten().tolist()
        is_target = columns.code in self.targets
        if change := columns.change(_CHANGE, _CERTAINTY):
            column, batch, before, after = change
            name = f"{what} {column}" if columns.count > 1 else "the values"
            why = f"{name}: root mean square {before:.3g} before batch {batch}, {after:.3g} from there on."
            chosen = (column,) if columns.count > 1 else ()
            faults.append(DataFault("change", "warning", columns.code, why, ((batch, -1),), chosen))
        if columns.count > 1 and constant and len(constant) < columns.count and not is_target:
            names = inline_listing([str(column) for column in constant], 6)
            why = f"{what} {names}: the same value in every row, of no use to the model."
            faults.append(DataFault("constant", "warning", columns.code, why, (), tuple(constant)))
        known = std[std > 0]
        largest = float(scale.max())
        if largest > _LARGE or (len(known) > 1 and float(known.max() / known.min()) > _SCALE):
            top = (scale > scale.max() / 10).nonzero().flatten().tolist()
            names = f"{what} {inline_listing([str(column) for column in top], 6)}: " if columns.count > 1 else ""
            reads = "a loss against them" if is_target else "weights as they usually start"
            why = f"{names}root mean square up to {largest:.3g}; {reads} expect{'s' * is_target} about 1. Standardise."
            faults.append(DataFault("scale", "warning", columns.code, why, (), tuple(top) if columns.count > 1 else ()))
        return faults

    def _of_labels(self, labels: IntegerLabels) -> list[DataFault]:
        if labels.code not in self.targets or not labels.complete or not labels.counts:
            return []
        faults = []
        counts = {label: count for label, count in labels.counts.items() if label != _IGNORED}
        outside = self._outside(counts)
        if outside:
            inside = [label for label in counts if label not in outside]
            span = f"; the others run from {min(inside)} to {max(inside)}" if inside else ""
            rule = "it stands apart"
            if self.classes is not None:
                rule = f"the model has the classes 0 to {self.classes - 1}"
            elif outside[0] < 0:
                rule = "cross_entropy ignores -100 only, unless it is given ignore_index"
            batch, row = labels.places[outside[0]]
            names = inline_listing([str(label) for label in outside], 5)
            why = f"label {names}, first in batch {batch}, row {row}: {rule}{span}."
            places = tuple(labels.places[label] for label in outside[:5])
            faults.append(DataFault("labels", "broken", labels.code, why, places))
        kept = [count for label, count in counts.items() if label not in outside]
        if len(kept) == 1 and self.batches > 1:
            why = "all labels are the same: there is nothing to learn."
            faults.append(DataFault("labels", "warning", labels.code, why))
        elif len(kept) in range(2, 50) and max(kept) > _IMBALANCE * min(kept):
            why = f"the most frequent class has {max(kept):,} rows, the least frequent {min(kept):,}."
            faults.append(DataFault("labels", "warning", labels.code, why))
        return faults

    def _outside(self, counts: dict[int, int]) -> list[int]:
        if self.classes is not None:
            return sorted(label for label in counts if not 0 <= label < self.classes)
        negative = sorted(label for label in counts if label < 0)
        found = negative if len(negative) < len(counts) else []
        positive = sorted(label for label in counts if label >= 0)
        total = sum(counts.values())
        while len(positive) > 2 and counts[positive[-1]] <= max(1, _RARE * total):
            gap, width = positive[-1] - positive[-2], positive[-2] - positive[0] + 1
            if gap <= 1 or gap <= width / 2 or len(positive) - 1 < width / 2:
                break
            found.append(positive.pop())
        return found


def _dense(leaf: Leaf) -> Leaf:
    """A leaf with all of its elements: a sparse tensor's zeros belong to its columns."""
    if leaf.tensor.layout == torch.strided:
        return leaf
    if leaf.tensor.numel() > _MOST_DENSE:
        raise ValueError(
            f"{leaf.code} is sparse, of shape {tuple(leaf.tensor.shape)}; scan_data() looks at tensors of at most "
            f"{_MOST_DENSE:,} elements with their zeros. Leave it out: [batch[1:] for batch in loader]"
        )
    return dataclasses.replace(leaf, tensor=leaf.tensor.detach().to_dense())


_MOST_DENSE = 1 << 26  # elements, which are then held in memory


def _digest(found: list[Leaf]) -> bytes:
    """Of all bits of a batch."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in found:
        tensor = leaf.tensor.detach().to("cpu", copy=True).contiguous()  # numpy() marks the memory that it shares
        digest.update(repr((leaf.code, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.digest()


def _float_rows(columns: FloatColumns) -> list[ColumnRow]:
    if not columns.means:
        return []
    mean, std = columns.totals()
    return [
        ColumnRow(
            columns.code,
            column if columns.count > 1 else None,
            float(mean[column]),
            float(std[column]),
            float(columns.lowest[column]),
            float(columns.highest[column]),
            columns.what,
        )
        for column in range(columns.count)
    ]


def _label_row(labels: IntegerLabels, is_target: bool) -> ColumnRow:
    total = sum(labels.counts.values())
    mean = sum(label * count for label, count in labels.counts.items()) / total
    square = sum(label * label * count for label, count in labels.counts.items()) / total
    std = math.sqrt(max(0.0, square - mean * mean))
    what = "labels" if is_target else "indices"
    return ColumnRow(labels.code, None, mean, std, float(labels.lowest), float(labels.highest), what)
