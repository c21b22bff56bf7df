"""A page of what `make bench` measured: `python benchmarks/page.py RESULT.json PAGE.html`.

One HTML file that needs nothing else. A ratio is the peer's time over ours in the same round: its median, and the range
of its middle half. Plots need matplotlib; without it tables stand in their places.
"""

import argparse
import itertools
import json
import statistics
from html import escape
from pathlib import Path

from initlab._console import shortened
from initlab.languages import translator
from initlab.pages import layout, parts, write_page
from initlab.plots import Panel, ratios_panel
from initlab.plots.marks import legend, log_limits, series, subplot
from initlab.plots.panel import number
from initlab.plots.results import LOOKS
from initlab.plots.style import MUTED

SUITES = {  # title, and what the peer is
    "sampling": ("Filling tensors", "Peer: torch.nn.init, the same call."),
    "models": ("Whole models", "Peer: the library's own way, or torch.nn.init parameter by parameter."),
    "clip": ("Clipping gradients", "Peer: torch.nn.utils.clip_grad_norm_, alone or before the same optimizer's step."),
    "linear_relu": ("Linear and ReLU", "Peer: F.relu(F.linear), plain, or checked by isfinite().all()."),
    "scaling": ("Other peers", "Libraries' trunc_normal_, and what torch.compile makes of our formulas."),
    "guard": ("guard()", "Peer: the same training step, clipped by torch or not at all. 0.97 is an overhead of 3 %."),
    "watch": ("watch()", "Peer: the same training step, not watched. 0.9 is an overhead of 10 %."),
    "diagnose": ("diagnose()", "Peer: one forward and backward pass. 0.25 is four passes."),
}
LABEL = 34  # characters of a bar's name


def quartiles(values):
    """Median and the ends of the middle half."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def ratio(row, peer="peer"):
    """Of a peer's time over ours, round by round: median and quartiles."""
    theirs = row["peer"] if peer == "peer" else row["others"][peer]
    return quartiles([b / a for a, b in zip(row["ours"], theirs, strict=True)])


def suite_of(row):
    return row["case"].split("::")[0].split("bench_")[-1].removesuffix(".py")


def label_of(row):
    """A case in a few words: its test and parameters."""
    if row.get("sweep"):
        return row["sweep"][0]
    test = row["case"].split("::")[-1]
    name, _, parameters = test.removeprefix("test_").rstrip("]").partition("[")
    words = f"{name.replace('_', ' ')}, {parameters.replace('-', ', ')}" if parameters else name.replace("_", " ")
    return words.removeprefix("sampling, ").removeprefix("clip grad norm, ")


def bars(suite, rows):
    """A suite's ratios."""
    title, about = SUITES[suite]
    about = f"{about} Lines are the middle half of the rounds, {min(len(row['ours']) for row in rows)} at least."
    found = {shortened(label_of(row), LABEL): ratio(row) for row in rows}
    assert len(found) == len(rows), "two bars have one name"
    return ratios_panel(f"ratio-{suite}", title, about, "peer's time / ours", found)


def per_element(row, name):
    """Nanoseconds per element of a contestant: median and quartiles."""
    seconds = row[name] if name in ("ours", "peer", "floor") else row["others"][name]
    return tuple(value / row["elements"] * 1e9 for value in quartiles(seconds))


def scaling(name, along, rows):
    """Time per element along a sweep, of all contestants."""
    rows = sorted(rows, key=lambda row: row["sweep"][2])
    peer = "torch, foreach" if name == "clip_grad_norm_" else "torch"
    contestants = {"ours": "initlab", "peer": peer, **{other: other for other in rows[0]["others"]}}
    x = [row["sweep"][2] for row in rows]
    found = {label: [per_element(row, key) for row in rows] for key, label in contestants.items()}

    def draw(figure):
        axes = subplot(figure)
        log_limits(axes, [end for values in found.values() for value in values for end in value])
        for (label, values), (color, marker) in zip(found.items(), LOOKS, strict=False):
            series(axes, x, [middle for middle, _, _ in values], label, color=color, marker=marker)
            for at, (_, low, high) in zip(x, values, strict=True):
                axes.plot([at, at], [low, high], color=MUTED, linewidth=2.0, zorder=1.5)
        if x[-1] > 20 * x[0]:
            axes.set_xscale("log", base=2 if along == "elements" else 10)
            axes.set_xticks(x[:: max(1, len(x) // 5)], [_short(at) for at in x[:: max(1, len(x) // 5)]])
            axes.minorticks_off()
        else:
            axes.set_xticks(x)
        axes.set_xlabel(along)
        axes.set_ylabel("ns per element")
        legend(axes, len(found))

    head = (along, *itertools.chain.from_iterable((label, "lowest", "highest") for label in found))
    table = tuple(
        (f"{at:,}", *(number(value) for values in found.values() for value in values[place]))
        for place, at in enumerate(x)
    )
    about = f"Time per element by {along}, float32; medians, and the middle half of the rounds."
    said = "; ".join(f"{label}: {number(values[0][0])} to {number(values[-1][0])}" for label, values in found.items())
    return Panel(f"{name}-{along}", f"{name} by {along}", about, f"{about} {said}.", head, table, draw, 260)


def _short(value):
    """1,048,576 as 2^20; 1,000 as it is."""
    power = value.bit_length() - 1
    return f"2^{power}" if value == 1 << power and power > 3 else f"{value:,}"


def memory(rows, copy):
    """How near large cases come to a copy's bandwidth: bytes that a call has to move, over its time."""
    found = {}
    for row in rows:
        if suite_of(row) in ("sampling", "clip") and row["elements"] >= 1 << 24 and "step" not in row["case"]:
            size = row["elements"] * row["element_size"]
            found[shortened(label_of(row), LABEL)] = quartiles([size / s / copy for s in row["ours"]])
    if not found:
        return None
    about = (
        f"Bytes of the tensor over time, as a share of what a copy reads and writes here ({copy / 1e9:.1f} GB/s). "
        "Clipping reads twice and writes once where it clips."
    )
    return ratios_panel("memory", "Against the memory's ceiling", about, "share of a copy's bandwidth", found)


def page(result):
    """The page, as text."""
    made, rows = result["made"], result["rows"]
    copy = made["copy_bytes_per_second"]
    swept = [row for row in rows if row["sweep"] and row["sweep"][1]]
    by_suite = {suite: [row for row in rows if suite_of(row) == suite and row not in swept] for suite in SUITES}
    panels = [bars(suite, found) for suite, found in by_suite.items() if found]
    panels += filter(None, [memory(rows, copy)])
    for sweep in dict.fromkeys(tuple(row["sweep"][:2]) for row in swept):
        panels.append(scaling(*sweep, [row for row in swept if tuple(row["sweep"][:2]) == sweep]))

    cells = []
    for row in rows:
        for peer in ("peer", *row["others"]):
            middle, low, high = ratio(row, peer)
            at = f", {row['sweep'][2]:,} {row['sweep'][1]}" if row in swept else ""
            name = label_of(row) + at + ("" if peer == "peer" else f" ({peer})")
            speed = row["elements"] * row["element_size"] / statistics.median(row["ours"])
            spread = f"{middle:.3g} [{low:.3g}, {high:.3g}]"
            figures = number(per_element(row, "ours")[0]), f"{speed / 1e9:.3g}", f"{speed / copy:.2f}"
            cells.append((suite_of(row), name, spread, *figures, str(len(row["ours"]))))
    head = ("suite", "case", "ratio [middle half]", "ns per element", "GB/s", "of a copy", "rounds")
    facts = [
        ("machine", made["machine"]),
        ("date", made["date"]),
        ("command", made["command"]),
        ("commit", made["commit"] or "unknown"),
        ("versions", ", ".join(f"{name} {version}" for name, version in made["versions"].items())),
        ("a copy of memory", f"{copy / 1e9:.1f} GB/s"),
    ]
    gate = (
        "Kernels, clipping, layers and models gave the reference's results before they were timed, and a watched or "
        "guarded run its report after it. One that does not ends all, and leaves no page."
    )
    left = [f"{case.split('::')[-1]}: {why}" for case, why in result["left_out"].items()]
    out = f"<section><h2>Left out</h2>{parts.listing(left)}</section>" if left else ""
    body = (
        f'<header class="plan">{layout.MAKER}<h1>initlab against its peers</h1>{parts.paragraph(gate)}'
        f"{parts.facts(facts)}</header><main>{parts.panels(panels, translator('en'))}"
        f"<section><h2>{escape('Every case')}</h2>{parts.table(head, cells, 'Every case')}</section>{out}</main>"
    )
    return layout.html_page("initlab's benchmarks", body, "en")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("page", type=Path)
    given = parser.parse_args()
    result = json.loads(given.result.read_text(encoding="utf-8"))
    given.page.parent.mkdir(parents=True, exist_ok=True)
    write_page(given.page, lambda: page(result))
    print(f"{len(result['rows'])} cases: {given.page}")


if __name__ == "__main__":
    main()
