"""The panels of a diagnosis, in the order in which they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..languages import Say
from .depth import gradient_panel, signal_panel, update_panel, weight_panel
from .distributions import activation_histograms, weight_histograms
from .losses import loss_panel
from .panel import Panel
from .scales import scale_panel

if TYPE_CHECKING:
    from ..diagnosis import Diagnosis

_ALL = (
    loss_panel,
    signal_panel,
    gradient_panel,
    scale_panel,
    activation_histograms,
    weight_panel,
    weight_histograms,
    update_panel,
)


def diagnosis_panels(diagnosis: Diagnosis, say: Say) -> list[Panel]:
    """What there is to plot of a diagnosis.

    Args:
        diagnosis: with measurements, or only the panels that need none.
        say: translates what is written.
    """
    return [panel for make in _ALL if (panel := make(diagnosis, say)) is not None]
