"""What goes by depth: the signal's scale, the gradients', the weights' and their updates'."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..diagnosis.limits import LIMITS
from ..languages import Say
from .marks import band, legend, log_limits, point_out, series, subplot, whole_ticks
from .panel import Panel, number, span
from .style import HEALTHY, MUTED, SECOND

if TYPE_CHECKING:
    from ..diagnosis import Diagnosis, LayerRow
    from ..diagnosis.measurements import WeightRow

_HEIGHT = 235
_FLOAT16 = 65504.0  # the largest number of a dtype that training often reaches


def in_depth(layers: Sequence[LayerRow]) -> list[LayerRow]:
    """Layers in the order in which they finish: a container after what it holds, unless it puts out the same again.

    Example:
        >>> from initlab.diagnosis import LayerRow
        >>> from initlab.plots.depth import in_depth
        >>> def row(name, std):
        ...     return LayerRow(name, "Linear", "float32", std, None, 1.0, 1.0, None)
        >>> [one.name for one in in_depth([row("", 2.0), row("a", 3.0), row("a.b", 1.0), row("c", 2.0)])]
        ['a.b', 'a', 'c']
    """
    ordered: list[LayerRow] = []
    open_rows: list[LayerRow] = []

    def close(name: str | None) -> None:
        while open_rows and (name is None or not _holds(open_rows[-1].name, name)):
            row = open_rows.pop()
            last = ordered[-1] if ordered else None
            if last is None or (row.std, row.largest) != (last.std, last.largest) or not _holds(row.name, last.name):
                ordered.append(row)

    for row in layers:
        close(row.name)
        open_rows.append(row)
    close(None)
    return ordered


def _holds(outer: str, inner: str) -> bool:
    return inner != outer and (not outer or inner.startswith(f"{outer}."))


def signal_panel(diagnosis: Diagnosis, say: Say) -> Panel | None:
    """Standard deviation and largest magnitude of each layer's output."""
    rows = in_depth(diagnosis.layers)
    if not rows:
        return None
    stds = [row.std for row in rows]
    low, high = 1 / LIMITS.growth_suspect, LIMITS.growth_suspect

    def draw(figure: Any) -> None:
        axes, x = subplot(figure), range(1, len(rows) + 1)
        largest = [row.largest for row in rows]
        narrow = any(row.dtype == "float16" for row in rows)
        log_limits(axes, [*stds, *largest], (low, high, *([_FLOAT16] if narrow else [])))
        band(axes, low, high, say("healthy range"))
        axes.plot(
            x, [_drawn(v) for v in largest], color=MUTED, linewidth=1, linestyle=(0, (4, 2)), label=say("largest")
        )
        series(axes, x, stds, say("std"))
        if narrow:
            axes.axhline(_FLOAT16, color=SECOND, linewidth=1, linestyle=(0, (1, 1)), label=say("float16 ends"))
        _finish(axes, [row.name for row in rows], diagnosis, say)

    return Panel(
        key="signal",
        title=say("Signal by depth"),
        about=say(
            "What each layer puts out, in the order in which layers finish. A triangle at the bottom is 0, a cross at "
            "the top is not finite."
        ),
        alt=_alt(say, [row.name for row in rows], stds, say("std of the outputs")),
        head=("#", *map(say, ("layer", "kind", "std", "largest", "gradient"))),
        rows=tuple(
            (str(at), row.name or say("(model)"), row.kind, number(row.std), number(row.largest), number(row.gradient))
            for at, row in enumerate(rows, 1)
        ),
        draw=draw,
        height=_HEIGHT,
    )


def gradient_panel(diagnosis: Diagnosis, say: Say) -> Panel | None:
    """The norm of each layer's gradients."""
    rows = [(row.name, row.gradient) for row in in_depth(diagnosis.layers) if row.gradient is not None]
    if not rows:
        return None
    names, norms = [name for name, _ in rows], [norm for _, norm in rows]
    # Gradients come from the end, so the last one that there is tells what the others should be like.
    last = next((norm for norm in reversed(norms) if norm > 0 and math.isfinite(norm)), 1.0)
    reach = math.sqrt(LIMITS.gradient_ratio)

    def draw(figure: Any) -> None:
        axes = subplot(figure)
        ends = (last / reach, last * reach)
        log_limits(axes, norms, ends)
        band(axes, *ends, say("healthy range"))
        series(axes, range(1, len(norms) + 1), norms, say("norm of the gradient"))
        _finish(axes, names, diagnosis, say)

    return Panel(
        key="gradient",
        title=say("Gradients by depth"),
        about=say(
            "Norm of the gradient of each layer's own parameters, in the first step; the range is about the last one's."
        ),
        alt=_alt(say, names, norms, say("norms of the gradients")),
        head=("#", say("layer"), say("gradient")),
        rows=tuple((str(at), name, number(norm)) for at, (name, norm) in enumerate(rows, 1)),
        draw=draw,
        height=_HEIGHT,
    )


def weight_panel(diagnosis: Diagnosis, say: Say) -> Panel | None:
    """Each weight's standard deviation, and what its layer's activation asks for."""
    rows = () if diagnosis.measurements is None else diagnosis.measurements.weights
    if not rows:
        return None
    factor = LIMITS.distribution_factor

    def draw(figure: Any) -> None:
        axes = subplot(figure)
        wanted = [row.wanted for row in rows if row.wanted]
        log_limits(axes, [row.std for row in rows], [v for w in wanted for v in (w / factor, w * factor)])
        label = say("healthy range")
        for at, row in enumerate(rows, 1):
            if row.wanted:
                ends = [row.wanted / factor, row.wanted * factor]
                width = min(9.0, 300 / len(rows))
                axes.plot(
                    [at, at], ends, color=HEALTHY, alpha=0.25, linewidth=width, solid_capstyle="butt", label=label
                )
                label = "_"
        x = range(1, len(rows) + 1)
        series(axes, x, [row.std for row in rows], say("std"), line=False)
        _finish(axes, [row.name for row in rows], diagnosis, say)

    return Panel(
        key="weights",
        title=say("Weights by depth"),
        about=say(
            "Standard deviation of each weight before the first step, and what its layer and activation ask for."
        ),
        alt=_alt(say, [row.name for row in rows], [row.std for row in rows], say("std of the weights")),
        head=("#", *map(say, ("name", "std", "wanted", "update"))),
        rows=_cells(rows, lambda row: (number(row.std), number(row.wanted), number(row.update))),
        draw=draw,
        height=_HEIGHT,
    )


def update_panel(diagnosis: Diagnosis, say: Say) -> Panel | None:
    """How large the first update of each weight was against it."""
    weights = () if diagnosis.measurements is None else diagnosis.measurements.weights
    rows = [row for row in weights if row.update is not None]
    ratios = [row.update for row in rows if row.update is not None]
    if not rows:
        return None

    def draw(figure: Any) -> None:
        axes = subplot(figure)
        log_limits(axes, ratios, (LIMITS.slow_update, LIMITS.update_ratio))
        band(axes, LIMITS.slow_update, LIMITS.update_ratio, say("healthy range"))
        series(axes, range(1, len(rows) + 1), ratios, say("update to weight"), line=False)
        _finish(axes, [row.name for row in rows], diagnosis, say)

    return Panel(
        key="updates",
        title=say("Updates"),
        about=say("Size of the first step's update of each weight against the weight itself; about 1e-3 is usual."),
        alt=_alt(say, [row.name for row in rows], ratios, say("updates against weights")),
        head=("#", say("name"), say("update")),
        rows=_cells(rows, lambda row: (number(row.update),)),
        draw=draw,
        height=_HEIGHT,
    )


def _cells(rows: Sequence[WeightRow], numbers: Callable[[WeightRow], tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    return tuple((str(at), row.name, *numbers(row)) for at, row in enumerate(rows, 1))


def _finish(axes: Any, names: Sequence[str], diagnosis: Diagnosis, say: Say) -> None:
    whole_ticks(axes, len(names))
    axes.set_xlabel(say("layer, by depth"))
    legend(axes, 3)
    point_out(axes, _named(names, diagnosis), len(names))


def _named(names: Sequence[str], diagnosis: Diagnosis) -> list[tuple[int, str]]:
    """The places, from 1, that causes name."""
    places: dict[int, str] = {}
    for cause in diagnosis.causes:
        for name in (cause.place.parameter, cause.place.module):
            if name:
                found = [at for at, one in enumerate(names, 1) if name in (one, one.rpartition(".")[0])][:1]
                places.update((at, names[at - 1]) for at in found if at not in places)
    return list(places.items())


def _alt(say: Say, names: Sequence[str], values: Sequence[float], what: str) -> str:
    """Between which values it moves, and what is out of order."""
    finite = [v for v in values if math.isfinite(v)]
    text = f"{what}{say(': ')}{say(f'{len(values)} layers, {span(finite)}')}"
    bad = [name or say("(model)") for name, v in zip(names, values, strict=True) if not math.isfinite(v)]
    return text + (say("; ") + say(f"not finite from {bad[0]} on") if bad else "")


def _drawn(value: float) -> float:
    return value if value > 0 and math.isfinite(value) else math.nan
