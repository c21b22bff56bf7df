"""What a guard logs: to TensorBoard, W&B, a CSV file, or a function. Values stay on the device for many steps."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..clipping import GradClipper

_TOP = 5  # gradients that are logged by name
_COLUMNS = ("step", "loss", "norm", "norm_max", "clipped_share", "bad_share", "spikes", "top")


class Metrics:
    """Collects a few numbers of each step, and writes them every so many.

    Args:
        log: a path of a CSV file; or an object with `add_scalar(tag, value, step)`, as TensorBoard's SummaryWriter; or
            one with `log(dict)`, as a run of W&B; or a function of a dict; or a list of these. None for none.
        every: steps between two rows.

    Raises:
        TypeError: for something else.
        ValueError: if `every` is not positive.
    """

    def __init__(self, log: Any, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"log_every is {every!r}; it must be a positive number of steps")
        sinks = [] if log is None else list(log) if isinstance(log, list | tuple) else [log]
        self._sinks = [_sink(one) for one in sinks]
        self._every = every
        self._rows: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._before = 0, 0  # clipped, spikes
        self._last: tuple[int, GradClipper] | None = None

    def record(self, step: int, clipper: GradClipper, flags: Tensor, losses: list[Tensor]) -> None:
        """One more step; nothing waits for the device until a row is due."""
        if not self._sinks:
            return
        assert clipper.report is not None
        self._rows.append(torch.stack([clipper.report.norm.double(), (flags.amax() > 0).double()]))
        self._losses += losses
        self._last = step, clipper
        if len(self._rows) >= self._every:
            self._write()

    def close(self) -> None:
        """Write what is left."""
        if self._rows:
            self._write()

    def _write(self) -> None:
        assert self._last is not None
        step, clipper = self._last
        rows = torch.stack(self._rows).cpu()
        norms, bad = rows[:, 0], rows[:, 1]
        stats = clipper.stats()
        losses = torch.stack([loss.reshape(()).double() for loss in self._losses]).tolist() if self._losses else []
        values: dict[str, Any] = {
            "step": step,
            "loss": sum(losses) / len(losses) if losses else None,
            "norm": float(norms[-1]),
            "norm_max": float(norms.max()),
            "clipped_share": (stats.clipped - self._before[0]) / len(norms),
            "bad_share": float(bad.mean()),
            "spikes": stats.spikes - self._before[1],
            "top": dict(clipper.top(_TOP)),
        }
        self._before = stats.clipped, stats.spikes
        self._rows, self._losses = [], []
        for sink in self._sinks:
            sink(values)


def _sink(log: Any) -> Callable[[dict[str, Any]], object]:
    """What writes a row."""
    if isinstance(log, str | os.PathLike):
        return _csv(Path(log))
    if callable(getattr(log, "add_scalar", None)):

        def add_scalars(values: dict[str, Any]) -> None:
            for name, value in _flat(values).items():
                if name != "step":
                    log.add_scalar(f"initlab/{name}", value, values["step"])

        return add_scalars
    if callable(getattr(log, "log", None)):
        if callable(getattr(log, "define_metric", None)):
            # The run's own step may count something else, and rows that come late would be dropped.
            log.define_metric("initlab/*", step_metric="initlab/step")
        return lambda values: log.log({f"initlab/{name}": value for name, value in _flat(values).items()})
    if callable(log):
        return lambda values: log(dict(values))
    raise TypeError(
        f"log is a {type(log).__name__}; it must be the path of a CSV file, an object with add_scalar() or log(), or a "
        "function of a dict"
    )


def _flat(values: dict[str, Any]) -> dict[str, float]:
    """The numbers that there are, those of the largest gradients by name."""
    found = {name: value for name, value in values.items() if name != "top" and value is not None}
    return found | {f"top/{name}": value for name, value in values["top"].items()}


def _csv(path: Path) -> Callable[[dict[str, Any]], object]:
    """What adds a row to a CSV file, with a head where there is no file yet."""

    def write(values: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists() or path.stat().st_size == 0
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(_COLUMNS)
            top = " ".join(f"{name}={value:.6g}" for name, value in values["top"].items())
            row = {name: "" if value is None else value for name, value in values.items()} | {"top": top}
            writer.writerow([row[name] for name in _COLUMNS])

    return write
