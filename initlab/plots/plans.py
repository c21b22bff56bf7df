"""The panels of an InitReport."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ..languages import Say
from .marks import legend, log_limits, series, subplot, whole_ticks
from .panel import Panel, number, span
from .style import HEALTHY, MUTED, SECOND

if TYPE_CHECKING:
    from ..models import InitReport


def plan_panels(report: InitReport, say: Say) -> list[Panel]:
    """What there is to plot of an InitReport: the standard deviation of each weight, beside what its fan asks for.

    Args:
        report: of init_model_ or plan_model.
        say: translates what is written.
    """
    rows = [row for row in report.rows if row.std is not None and len(row.shape) > 1]
    if not rows:
        return []
    current = values_now(report)

    def draw(figure: Any) -> None:
        axes, x = subplot(figure), range(1, len(rows) + 1)
        fans = [(at, row.fan) for at, row in zip(x, rows, strict=True) if row.fan]
        asked = [v for _, fan in fans for v in (1 / math.sqrt(fan), math.sqrt(2 / fan))]
        now = [current.get(row.name, math.nan) for row in rows]
        log_limits(axes, [*(row.std or 0.0 for row in rows), *now], asked)
        label = say("1/sqrt(fan) to sqrt(2/fan)")
        width = min(9.0, 300 / len(rows))
        for at, fan in fans:
            ends = [1 / math.sqrt(fan), math.sqrt(2 / fan)]
            axes.plot([at, at], ends, color=HEALTHY, alpha=0.35, linewidth=width, solid_capstyle="butt", label=label)
            label = "_"
        if current:
            axes.plot(x, now, color=SECOND, marker="D", markerfacecolor="none", linestyle="none", label=say("now"))
        series(axes, x, [row.std or 0.0 for row in rows], say("by the recipe"))
        whole_ticks(axes, len(rows))
        axes.set_xlabel(say("weight, by depth"))
        axes.xaxis.label.set_color(MUTED)
        legend(axes, 3)

    stds = [row.std for row in rows if row.std is not None]
    return [
        Panel(
            key="plan",
            title=say("Weights by depth"),
            about=say("Standard deviation that the recipe gives each weight, beside what keeps the signal's size."),
            alt=say(f"std of {len(rows)} weights, {span(stds)}"),
            head=("#", *map(say, ("name", "std", "now", "fan"))),
            rows=tuple(
                (str(at), row.name, number(row.std), number(current.get(row.name)), number(row.fan))
                for at, row in enumerate(rows, 1)
            ),
            draw=draw,
            height=260,
        )
    ]


@torch.no_grad()
def values_now(report: InitReport) -> dict[str, float]:
    """The standard deviations of the weights that the report's model has now; empty where it is not there."""
    from ..diagnosis.stats import measure

    tensors = report.parameters_now()
    found = {name: measure(tensor) for name, tensor in tensors.items() if tensor.dim() > 1}
    return {name: stats.std for name, stats in found.items() if stats is not None}
