"""The loss of the run as it is, beside that of the run with each remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..diagnosis.outcomes import in_words
from ..languages import Say
from .marks import edge, legend, plain_ticks
from .panel import Panel, number
from .style import FIRST, SECOND, THIRD

if TYPE_CHECKING:
    from ..diagnosis import Diagnosis

_WIDE = 30.0  # largest to smallest loss, from which on the scale is logarithmic
_LOOKS = ((FIRST, "o"), (THIRD, "^"))  # of runs with a remedy


class _Run(NamedTuple):
    label: str
    losses: tuple[float, ...]
    color: str
    marker: str


def loss_panel(diagnosis: Diagnosis, say: Say) -> Panel | None:
    """The losses; None where there is none to draw."""
    runs = _runs(diagnosis, say)
    if not any(math.isfinite(loss) for run in runs for loss in run.losses):
        return None
    longest = max(len(run.losses) for run in runs)
    rows = [
        (str(step), *(number(run.losses[step]) if step < len(run.losses) else "" for run in runs))
        for step in range(longest)
    ]
    return Panel(
        key="loss",
        title=say("Loss"),
        about=say(
            "The loss of the same batch, before the first step and after each. A cross is a loss that is not finite."
        ),
        alt=say("; ").join(f"{run.label}{say(': ')}{say(in_words(run.losses))}" for run in runs),
        head=(say("steps"), *(run.label for run in runs)),
        rows=tuple(rows),
        draw=lambda figure: _draw(figure, runs, say),
        height=240,
    )


def _runs(diagnosis: Diagnosis, say: Say) -> list[_Run]:
    """The run as it is, and those with a remedy."""
    own = tuple(math.nan if loss is None else loss for loss in diagnosis.losses)
    longer = [cause.untreated for cause in diagnosis.causes if _begins_alike(cause.untreated, own)]
    runs = [_Run(say("as it is"), max(longer, key=len) if longer and len(own) < 2 else own, SECOND, "s")]
    for place, cause in enumerate(diagnosis.causes, 1):
        losses = cause.trial or cause.emulated
        if not losses or len(runs) > len(_LOOKS) or any(losses == run.losses for run in runs):
            continue
        # What was found behind other remedies ran with them.
        alone = not cause.untreated or place == 1 or _begins_alike(cause.untreated, own)
        label = f"with remedy {place}" if alone else f"with remedies 1 to {place}"
        runs.append(_Run(say(label if cause.trial else f"remedy {place}, emulated"), losses, *_LOOKS[len(runs) - 1]))
    return [run for run in runs if run.losses]


def _begins_alike(losses: Sequence[float], others: Sequence[float]) -> bool:
    """Whether two runs are of one start: by their first loss."""
    if not losses or not others:
        return False
    first, other = losses[0], others[0]
    return math.isclose(first, other, rel_tol=1e-5) or not (math.isfinite(first) or math.isfinite(other))


def _draw(figure: Any, runs: Sequence[_Run], say: Say) -> None:
    axes = figure.add_subplot()
    axes.grid(axis="x", visible=False)
    known = [loss for run in runs for loss in run.losses if math.isfinite(loss)]
    longest = max(len(run.losses) for run in runs)
    for run in runs:
        steps = range(len(run.losses))
        finite = [loss if math.isfinite(loss) else math.nan for loss in run.losses]
        style = {"color": run.color, "marker": run.marker, "markersize": 4, "label": run.label}
        axes.plot(steps, finite, linestyle="--" if run.color == SECOND else "-", **style)
        edge(axes, [step for step in steps if not math.isfinite(run.losses[step])], 0.96, run.color, "X")
    if min(known) > 0 and max(known) > _WIDE * min(known):
        axes.set_yscale("log")
        plain_ticks(axes)
    elif max(known) - min(known) <= 1e-9 * abs(max(known)):  # level: nothing that rounding would blow up
        axes.set_ylim(min(known) - 0.5 * abs(min(known)) - 0.5, max(known) + 0.5 * abs(max(known)) + 0.5)
    axes.margins(y=0.12)
    axes.set_xlim(-0.03 * max(longest - 1, 1), 1.03 * max(longest - 1, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(say("steps"))
    legend(axes)
