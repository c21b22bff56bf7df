"""Running statistics of one tensor of the batches: by column, by batch, by label."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_COLUMNS = 4096  # of a tensor whose columns are looked at one by one
_MOST_LABELS = 100_000  # different ones that are counted
_MOST_PLACES = 5  # of bad values that are remembered


@dataclass
class BadRows:
    """Rows that hold NaN or inf, or a label that cannot be one."""

    rows: int = 0
    places: list[tuple[int, int]] = field(default_factory=list)  # (batch, row) of the first ones
    columns: set[int] = field(default_factory=set)

    def add(self, batch: int, rows: list[int]) -> None:
        """Remember rows of a batch."""
        self.rows += len(rows)
        self.places += [(batch, row) for row in rows[: max(0, _MOST_PLACES - len(self.places))]]


class FloatColumns:
    """Floating values: by the last dimension of rows and sequences, by the channels of images, or all together.

    Args:
        code: the tensor's place, as an expression.
        shape: of one batch.
    """

    def __init__(self, code: str, shape: tuple[int, ...]) -> None:
        self.code = code
        self.is_image = len(shape) > 3
        self.dim = 1 if self.is_image else len(shape) - 1
        self.count = shape[self.dim] if len(shape) > 1 else 1
        self.by_column = len(shape) > 1 and self.count <= MOST_COLUMNS
        if not self.by_column:
            self.count = 1
        self.lowest = torch.full((self.count,), math.inf, dtype=torch.float64)
        self.highest = torch.full((self.count,), -math.inf, dtype=torch.float64)
        self.means: list[Tensor] = []  # of each batch: [columns], float64
        self.squares: list[Tensor] = []  # mean squares
        self.weights: list[int] = []  # elements of a column
        self.batches: list[int] = []
        self.bad = BadRows()

    @property
    def what(self) -> str:
        """What a column is."""
        return "values" if self.count == 1 else "channel" if self.is_image else "feature"

    def add(self, batch: int, values: Tensor) -> None:
        """Take in one batch's tensor."""
        x = values.detach().to("cpu", torch.float64)
        finite = x.isfinite()
        if not bool(finite.all()):
            rows = (~finite).reshape(len(x), -1).any(1) if x.dim() else ~finite.reshape(1)
            self.bad.add(batch, rows.nonzero().flatten().tolist())
        flat = self._flat(x)
        known = flat.isfinite()
        if not bool(known.all()):
            self.bad.columns |= set((~known).any(0).nonzero().flatten().tolist()) if self.by_column else set()
        if not flat.numel():
            return
        self.lowest = torch.minimum(self.lowest, torch.where(known, flat, math.inf).amin(0))
        self.highest = torch.maximum(self.highest, torch.where(known, flat, -math.inf).amax(0))
        zeroed = torch.where(known, flat, 0.0)
        count = known.sum(0).clamp_min(1)
        self.means.append(zeroed.sum(0) / count)
        self.squares.append(zeroed.square().sum(0) / count)
        self.weights.append(len(flat))
        self.batches.append(batch)

    def _flat(self, x: Tensor) -> Tensor:
        if not self.by_column or x.dim() < 2 or x.shape[self.dim] != self.count:
            return x.reshape(-1, 1) if self.count == 1 else x.reshape(-1, self.count)
        return x.movedim(self.dim, -1).reshape(-1, self.count)

    def totals(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each column over all batches."""
        weights = torch.tensor(self.weights, dtype=torch.float64)[:, None]
        means, squares = torch.stack(self.means), torch.stack(self.squares)
        mean = (means * weights).sum(0) / weights.sum()
        square = (squares * weights).sum(0) / weights.sum()
        return mean, (square - mean.square()).clamp_min(0).sqrt()

    def change(self, ratio: float, certainty: float) -> tuple[int, int, float, float] | None:
        """The clearest change of a column's scale or place from one batch on: column, batch, rms before, rms after.

        The root mean square has to change `ratio`-fold, by more than twice its spread from batch to batch, and by
        `certainty` standard errors: its logarithm is what is compared.
        """
        if len(self.batches) < 6:
            return None
        squares = torch.stack(self.squares).clamp_min(1e-60)
        logs = squares.log() / 2
        n = len(logs)
        head = logs.cumsum(0)[:-1]
        at = torch.arange(1, n, dtype=torch.float64)[:, None]
        before, after = head / at, (logs.sum(0) - head) / (n - at)
        gap = (after - before).abs()
        total = logs.square().cumsum(0)
        left = total[:-1] - at * before.square()
        right = total[-1] - total[:-1] - (n - at) * after.square()
        spread = ((left + right).clamp_min(0) / max(1, n - 2)).sqrt()
        error = spread * (1 / at + 1 / (n - at)).sqrt()
        clear = (gap >= math.log(ratio)) & (gap >= 2 * spread) & (gap >= certainty * error) & (at >= 2) & (n - at >= 2)
        if not bool(clear.any()):
            return None
        score = torch.where(clear, gap / (error + 1e-3), -1.0)
        split, column = divmod(int(score.argmax()), logs.shape[1])
        old, new = float(before[split, column].exp()), float(after[split, column].exp())
        return column, self.batches[split + 1], old, new


class IntegerLabels:
    """Integers: classes, tokens or indices; how often each occurs, while there are not too many."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.counts: Counter[int] = Counter()
        self.places: dict[int, tuple[int, int]] = {}  # the first (batch, row) of each label
        self.rows = 0
        self.complete = True
        self.lowest, self.highest = math.inf, -math.inf

    def add(self, batch: int, values: Tensor) -> None:
        """Take in one batch's tensor."""
        if not values.numel():
            return
        x = values.detach().to("cpu", torch.int64)
        self.rows += len(x) if x.dim() else 1
        low, high = (int(v) for v in x.aminmax())
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        if not self.complete:
            return
        labels, counts = x.unique(return_counts=True)
        for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
            if label not in self.counts:
                row = int((x == label).reshape(len(x), -1).any(1).nonzero()[0]) if x.dim() else 0
                self.places[label] = (batch, row)
            self.counts[label] += count
        if len(self.counts) > _MOST_LABELS:
            self.complete = False
