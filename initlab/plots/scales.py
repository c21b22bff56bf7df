"""The scales of inputs and targets, feature by feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._console import inline_listing
from ..diagnosis.limits import LIMITS
from ..languages import Say
from .marks import band, edge, log_limits, series
from .panel import Panel, number, span
from .style import FIRST, SECOND

if TYPE_CHECKING:
    from ..diagnosis import Diagnosis
    from ..diagnosis.measurements import TensorScale

_MOST = 4  # tensors that are drawn
_ROWS = 200  # of the table
_ROW = 165  # pixels of one tensor


def scale_panel(diagnosis: Diagnosis, say: Say) -> Panel | None:
    """Mean and standard deviation of the features of a batch; the shares of its classes."""
    scales = () if diagnosis.measurements is None else diagnosis.measurements.scales[:_MOST]
    if not scales:
        return None
    return Panel(
        key="scales",
        title=say("Inputs and targets"),
        about=say(
            "Each feature of the batch; weights in use expect inputs of a size near 1. A triangle at the bottom is 0, "
            "a cross at the top has values that are not finite."
        ),
        alt=say("; ").join(_alt(scale, say) for scale in scales),
        head=tuple(map(say, ("tensor", "column", "mean", "std", "not finite"))),
        rows=tuple(
            (
                scale.code,
                f"{say(scale.what)} {index}",
                number(mean),
                "" if scale.what == "class" else number(std),
                "x" * bad,
            )
            for scale in scales
            for index, mean, std, bad in zip(scale.index, scale.mean, scale.std, scale.bad, strict=True)
        )[:_ROWS],
        draw=lambda figure: _draw(figure, scales, say),
        height=_ROW * len(scales) + 40,
    )


def _alt(scale: TensorScale, say: Say) -> str:
    name = f"{say(scale.role)} {scale.code}{say(': ')}"
    if scale.what == "class":
        return name + say(f"{scale.total} classes, shares {span(scale.mean)}")
    if scale.what == "values":
        return name + say(f"mean {number(scale.mean[0])}, std {number(scale.std[0])}")
    bad = [str(index) for index, one in zip(scale.index, scale.bad, strict=True) if one]
    worst = say("; ") + say(f"not finite in {inline_listing(bad, 6)}") if bad else ""
    return name + say(f"std of {scale.total} columns {span(scale.std)}") + worst


def _draw(figure: Any, scales: Sequence[TensorScale], say: Say) -> None:
    handles: dict[str, Any] = {}
    for place, scale in enumerate(scales):
        axes = figure.add_subplot(len(scales), 1, place + 1)
        axes.grid(axis="x", visible=False)
        x = range(len(scale.index))
        if scale.what == "class":
            axes.bar(x, [100 * share for share in scale.mean], color=FIRST, alpha=0.55)
            axes.set_ylabel(say("% of the targets"))
        else:
            sizes = [abs(mean) for mean in scale.mean]
            ends = (1 / LIMITS.input_rms_suspect, LIMITS.input_rms_suspect)
            log_limits(axes, [*sizes, *scale.std], ends if scale.role == "input" else ())
            if scale.role == "input":
                band(axes, *ends, say("healthy range"))
            edge(axes, [at for at in x if scale.bad[at]], 0.97, SECOND, "X")
            series(axes, x, scale.std, say("std"), line=False)
            series(axes, x, sizes, say("size of the mean"), color=SECOND, marker="D", line=False, filled=False)
            handles.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.set_xlim(-0.7, len(scale.index) - 0.3)
        shown = range(0, len(scale.index), max(1, (len(scale.index) + 9) // 10))
        axes.set_xticks(shown, [str(scale.index[at]) for at in shown] if scale.what != "values" else [""])
        axes.set_xlabel(say(scale.what))
        axes.set_title(f"{say(scale.role)} {scale.code}")
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, borderpad=0)
