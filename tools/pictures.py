"""The pictures of README and docs: `python tools/pictures.py` draws docs/pictures/ from docs/pictures/data/.

``python tools/pictures.py measure`` runs what they show and writes docs/pictures/data/*.json, each with the machine,
the date, the command and the versions; ``python tools/pictures.py bench benchmarks/results/bench.json`` takes over what
`make bench` measured. Drawing again gives the same bytes under the same matplotlib.
"""

import datetime
import json
import os
import platform
import re
import sys
from html import escape
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import initlab
from initlab import demo
from initlab.pages import layout
from initlab.plots import curves_panel, panel_svg, ratios_panel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import page as bench_page

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
DATA = PICTURES / "data"

# ---------------------------------------------------------------------------------------------------------------
# What is measured


def signal_by_depth():
    """The std of each layer's activations of the demo's network, at its start."""
    data, settings = demo.load_digits(), demo.Settings()
    return {
        start: demo.signal(demo.build(start, settings), data.train, data.train_labels).stds for start in demo.STARTS
    }


def gradient_norm(steps=200, max_norm=1.0):
    """The gradient's norm before and after clipping, where five batches of a run hold inputs 30 times too large."""
    data = demo.load_digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    initlab.init_model_(model, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, after = [], []
    for step in range(steps):
        index = torch.randint(len(data.train), (64,))
        scale = 30.0 if step % 40 == 25 else 1.0
        optimizer.zero_grad()
        F.cross_entropy(model(scale * data.train[index]), data.train_labels[index]).backward()
        before.append(float(initlab.clip_grad_norm_(model.parameters(), max_norm)))
        after.append(float(initlab.get_total_norm(p.grad for p in model.parameters())))
        optimizer.step()
    return {"before clipping": before, "after clipping": after}


def gpt_start(depth=24, width=256):
    """The std of the residual stream after each block of a GPT-2 without training, under four of initlab's recipes."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_layer=depth, n_embd=width, n_head=4, vocab_size=1000, n_positions=64)
    tokens = torch.randint(1000, (4, 64), generator=torch.Generator().manual_seed(0))
    model = GPT2Model(config).eval()
    found = {}
    for recipe in ("he", "xavier", "trunc_normal", "gpt2"):
        initlab.init_model_(model, 0, recipe)
        stds = []
        hooks = [
            block.register_forward_hook(
                lambda module, args, out, stds=stds: stds.append(
                    (out[0] if isinstance(out, tuple) else out).std().item()
                )
            )
            for block in model.h
        ]
        with torch.no_grad():
            model(tokens)
        for hook in hooks:
            hook.remove()
        found[recipe] = stds
    return found


# ---------------------------------------------------------------------------------------------------------------
# What is drawn


PANELS = {
    "signal-by-depth": lambda found: curves_panel(
        "signal-by-depth",
        "Signal by depth, three starts",
        "Standard deviation of each hidden layer's activations before the first step, 40 layers of 256 ReLU units.",
        "hidden layer",
        "std of activations",
        found,
    ),
    "gradient-norm": lambda found: curves_panel(
        "gradient-norm",
        "Gradient norm, spikes clipped",
        "Norm of all gradients by step, before and after clipping to 1; five batches have inputs 30 times too large.",
        "step",
        "gradient norm",
        found,
    ),
    "gpt-start": lambda found: curves_panel(
        "gpt-start",
        "Signal by depth of a GPT, four schemes",
        "Standard deviation of the residual stream after each of 24 blocks of an untrained GPT-2, 256 wide.",
        "block",
        "std of residual stream",
        found,
    ),
}


def init_ratios(rows):
    """Filling one tensor: torch's time over ours."""
    about = (
        "torch.nn.init's time over initlab.init's for 2^26 float32 elements on two cores, in turns in one run. Bars "
        "are medians, lines the middle half of the rounds."
    )
    return ratios_panel(
        "init-ratios",
        "Filling a tensor, against torch",
        about,
        "times as fast as torch",
        {bench_page.label_of(row).removesuffix(", float32"): bench_page.ratio(row) for row in rows},
    )


FROM_BENCH = {  # the panels, and which cases of `make bench` they show
    "init-ratios": (init_ratios, lambda case: "::test_sampling[" in case and "float32" in case),
    "scaling-elements": (
        lambda rows: bench_page.scaling("normal_", "elements", rows),
        lambda case: "::test_elements[normal_" in case,
    ),
    "scaling-tensors": (
        lambda rows: bench_page.scaling("clip_grad_norm_", "tensors", rows),
        lambda case: "::test_gradients[" in case,
    ),
}


def take_over(path):
    """Keep of a result of `make bench` what is drawn."""
    result = json.loads(path.read_text(encoding="utf-8"))
    for name, (_, shows) in FROM_BENCH.items():
        rows = [row for row in result["rows"] if shows(row["case"])]
        found = [{**row, "case": row["case"].split("bench_")[-1]} for row in rows]
        text = json.dumps({"made": result["made"], "found": found})
        (DATA / f"{name}.json").write_text(text + "\n", encoding="utf-8")


MEASURED = {"signal-by-depth": signal_by_depth, "gradient-norm": gradient_norm, "gpt-start": gpt_start}


def palettes():
    """The colours of the light and the dark page, by their names."""
    css = Path(layout.__file__).with_name("page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    return [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in blocks]


def picture(panel, colours):
    """A panel as an SVG file of its own, with a title and a description."""
    text = panel_svg(panel).replace("var(--font)", "system-ui, sans-serif")
    text = re.sub(r"var\(--([\w-]+)\)", lambda found: colours[found[1]], text)
    root, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', root)[0]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" {box}>\n'
        f"<title>{escape(panel.title)}</title>\n<desc>{escape(panel.alt)}</desc>\n"
        f'<rect width="100%" height="100%" fill="{colours["page"]}"/>\n{body}\n'
    )


def pictures():
    """All pictures, as pairs of a file's name and its text."""
    for name, panel in (PANELS | {name: panel for name, (panel, _) in FROM_BENCH.items()}).items():
        found = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))["found"]
        for kind, colours in zip(("light", "dark"), palettes(), strict=True):
            yield f"{name}-{kind}.svg", picture(panel(found), colours)


def made():
    """Where and how a result was measured."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": "python tools/pictures.py measure",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "initlab": initlab.__version__},
    }


def main(arguments):
    if arguments == ["measure"]:
        DATA.mkdir(parents=True, exist_ok=True)
        for name, measure in MEASURED.items():
            text = json.dumps({"made": made(), "found": measure()}, indent=1)
            (DATA / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    elif arguments[:1] == ["bench"]:
        take_over(Path(arguments[1]))
    for name, text in pictures():
        (PICTURES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
