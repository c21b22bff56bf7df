"""What a report shows as plots: panels of plain data, and matplotlib figures of them.

panel.py says what a panel is; losses.py, depth.py, distributions.py and scales.py make those of a diagnosis, plans.py
those of an InitReport; marks.py and style.py are what they draw with; figures.py makes matplotlib's figures, svg.py the
pictures of pages. matplotlib is imported by what draws, when it draws.
"""

from .diagnoses import diagnosis_panels
from .figures import draw_panels, why_not
from .panel import Panel
from .plans import plan_panels
from .svg import panel_svg

__all__ = ["Panel", "diagnosis_panels", "draw_panels", "panel_svg", "plan_panels", "why_not"]
