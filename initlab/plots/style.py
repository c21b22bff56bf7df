"""How plots look: sizes, and colours that people with any colour vision can tell apart.

Colours are Okabe and Ito's (jfly.uni-koeln.de/color). A page replaces each by a CSS variable of its role, which has
another value in the dark. No two series differ by colour alone: marks and lines differ too.
"""

from __future__ import annotations

from typing import Any

WIDTH = 360  # pixels of a figure
DPI = 72  # of SVG's units: a point is a pixel

INK = "#1f2329"
MUTED = "#59626d"
GRID = "#dde2e8"
FIRST = "#0072b2"  # blue
SECOND = "#d55e00"  # vermilion
THIRD = "#aa4499"  # purple
HEALTHY = "#009e73"  # green
ROLES = {INK: "ink", MUTED: "muted", GRID: "grid", FIRST: "first", SECOND: "second", THIRD: "third", HEALTHY: "healthy"}

CHINESE = ("Noto Sans CJK SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei", "SimHei", "WenQuanYi Micro Hei")
RC: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.unicode_minus": False,
    "figure.dpi": DPI,
    "figure.edgecolor": "none",
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],  # matplotlib brings it, so plots are the same everywhere
    "font.size": 11,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "hatch.color": MUTED,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "mathtext.default": "regular",
    "svg.fonttype": "none",
    "svg.hashsalt": "initlab",
    "text.color": INK,
    "text.parse_math": False,  # a name may have dollars
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 10,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 10,
}
