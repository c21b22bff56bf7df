"""What a report shows as plots: panels of plain data, and matplotlib figures of them.

panel.py says what a panel is; losses.py, depth.py, distributions.py and scales.py make those of a diagnosis, plans.py
those of an InitReport, results.py those of what was measured; marks.py and style.py are what they draw with; figures.py
makes matplotlib's figures, svg.py the pictures of pages. matplotlib is imported by what draws, when it draws.
"""

from .diagnoses import diagnosis_panels
from .figures import draw_panels, why_not
from .panel import Panel
from .plans import plan_panels
from .results import curves_panel, ratios_panel
from .svg import panel_svg

__all__ = [
    "Panel",
    "curves_panel",
    "diagnosis_panels",
    "draw_panels",
    "panel_svg",
    "plan_panels",
    "ratios_panel",
    "why_not",
]
