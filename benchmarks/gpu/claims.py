"""What the docs say of speed on a GPU, each figure beside what was measured here.

The figures are for an H100: counts of instructions and bytes, not measurements. A GPU with more bandwidth may exceed
them.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import DRY
from .report import Findings

_UNCLIPPED = "clip_grad_norm_, 16 tensors, unclipped"
ENOUGH = 0.9  # of a claimed figure: what a model leaves out, and noise


@dataclass(frozen=True)
class Claim:
    """A row of a table in the docs, and the timing that it is about."""

    page: str
    row: str  # the table's row, as it begins
    figure: str  # in 1e9 elements a second, as it stands in that row
    timing: str
    contestant: str
    bytes_per_element: int  # that the timing counts

    @property
    def claimed(self) -> float:
        """1e9 elements a second."""
        return float(self.figure.replace(",", ""))


def _sampling(row: str, timing: str, float32: str, bfloat16: str) -> tuple[Claim, ...]:
    return tuple(
        Claim("docs/design.md", f"| {row} |", figure, f"{timing}, {dtype}", "initlab", size)
        for dtype, figure, size in (("float32", float32, 4), ("bfloat16", bfloat16, 2))
    )


CLAIMS = (
    *_sampling("uniform", "uniform_", "754", "1,508"),
    *_sampling("normal", "normal_", "754", "771"),
    *_sampling("centre", "trunc_normal_ at 2 sigma", "533", "530"),
    *_sampling("tail", "trunc_normal_ at 100 sigma", "338", "354"),
    Claim("docs/clip.md", "| norm, bfloat16 |", "1,508", f"{_UNCLIPPED}, bfloat16", "initlab", 2),
    Claim("docs/clip.md", "| norm, float32 |", "754", f"{_UNCLIPPED}, float32", "initlab", 4),
)


def check_claims(findings: Findings) -> None:
    """A verdict for each claim; in a dry run the figures mean nothing, and only that each has a timing is seen."""
    timings = {(row["what"], row["contestant"]): row for row in findings.timings}
    for claim in CLAIMS:
        row = timings[claim.timing, claim.contestant]
        measured = row["GB/s"] / claim.bytes_per_element
        holds = measured >= ENOUGH * claim.claimed
        verdict = "a dry run" if DRY else "holds" if holds else "DOES NOT HOLD"
        findings.verdicts.append(
            f"{claim.timing}: {claim.page} says {claim.figure} G elements/s: "
            f"measured {measured:,.0f}, {100 * measured / claim.claimed:.0f} %: {verdict}"
        )
        print(findings.verdicts[-1], flush=True)
