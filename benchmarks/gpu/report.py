"""What a run finds, the machine it ran on, and the files and the page that tell of it."""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from initlab.kernels import backend_of

from .config import DEVICE, DRY, ROOT


@dataclass
class Findings:
    """What a run found."""

    environment: dict[str, str] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    timings: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)  # what the docs claim, and whether it holds
    notes: list[str] = field(default_factory=list)

    def check(self, name: str, holds: bool) -> None:
        """Record a check and print it."""
        self.checks[name] = bool(holds)
        print(f"[{'ok' if holds else 'FAILED'}] {name}", flush=True)


def environment() -> dict[str, str]:
    """What the figures depend on."""

    def git(*arguments: str) -> str:
        try:
            command = ["git", "-C", str(ROOT), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    facts = {
        "date": date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD") + ("" if not git("status", "--porcelain") else " and changes"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "numba": version_of("numba"),
    }
    if DRY:
        return facts | {"device": "none: a dry run in Triton's interpreter; its figures mean nothing"}
    properties = torch.cuda.get_device_properties(DEVICE)
    major, minor = torch.cuda.get_device_capability(DEVICE)
    return facts | {
        "device": torch.cuda.get_device_name(DEVICE),
        "capability": f"{major}.{minor}, {properties.multi_processor_count} processors",
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "cuda": str(torch.version.cuda or torch.version.hip),
        "backend": backend_of(DEVICE),
    }


def version_of(package: str) -> str:
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError:
        return "not installed"


def save(findings: Findings, folder: Path, name: str = "gpu") -> None:
    """Write NAME.json and NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(asdict(findings), indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(findings))


def markdown(findings: Findings) -> str:
    """The run as a page."""
    lines = ["# GPU run", ""]
    if DRY:
        lines += ["**A dry run: no GPU, Triton's interpreter, tiny sizes. The figures mean nothing.**", ""]
    lines += [*(f"- {name}: {value}" for name, value in findings.environment.items()), "", "## Checks", ""]
    lines += [f"- {'ok' if holds else '**FAILED**'}: {name}" for name, holds in findings.checks.items()]
    lines += [f"- note: {note}" for note in findings.notes]
    if findings.verdicts:
        lines += ["", "## What the docs claim, for an H100", "", *(f"- {verdict}" for verdict in findings.verdicts)]
    if findings.timings:
        ceilings = {row["what"].split(", ")[1]: row["GB/s"] for row in findings.timings if row["contestant"] == "fill_"}
        lines += ["", "## Timings", "", "Medians; ratio to the first of each group; % of the bandwidth of `fill_`.", ""]
        lines += [
            "| what | contestant | ms | p10 | p90 | GB/s | % of fill_ | ratio |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in findings.timings:
            ceiling = ceilings.get(row["what"].split(", ")[-1])
            share = f"{100 * row['GB/s'] / ceiling:.0f}" if ceiling else ""
            lines.append(
                f"| {row['what']} | {row['contestant']} | {row['ms']:.3f} | {row['p10_ms']:.3f} | {row['p90_ms']:.3f} "
                f"| {row['GB/s']:.0f} | {share} | {row['ratio']:.2f} |"
            )
    return "\n".join(lines) + "\n"
