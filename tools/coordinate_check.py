"""The coordinate check of muP: does the size of activations depend on the width, in the first steps of training?

`python tools/coordinate_check.py docs/mup.svg` trains a small transformer at widths 128 to 2,048, ten steps each, once
with torch's start and one learning rate, and once with `initlab.recipes.mup`, prints the largest ratio between widths,
and draws the figure of docs/models.md.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from initlab.kernels import Constant
from torch import Tensor, nn

import initlab

WIDTHS = (128, 256, 512, 1024, 2048)
STEPS = 10
HEAD = 32  # width of an attention head: it stays, and their number grows
CLASSES = 64


class Transformer(nn.Module):
    """Two pre-norm blocks between an embedding and a head, all of them torch's layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // HEAD, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES, bias=False)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """What each part puts out, by name."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embedding(tokens)
        found = {"embedding": x}
        for index, block in enumerate(self.blocks):
            x = block(x, src_mask=mask, is_causal=True)
            found[f"block {index}"] = x
        return {**found, "logits": self.head(self.norm(x))}


def sizes(
    width: int, base: int | None, steps: int = STEPS, lr: float = 0.004, seeds: int = 1
) -> dict[str, list[float]]:
    """The mean size of each part's output after 1, 2, ... steps of Adam.

    Args:
        width: of the model.
        base: width of the base model of muP; None for torch's own start, and one learning rate.
        steps: of training, on one batch of random tokens.
        lr: the learning rate, of the base model where there is one.
        seeds: over so many it is averaged.
    """
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        model = Transformer(width)
        if base is None:
            initlab.init_model_(model, seed, {"head": Constant(0.0), "*": "torch"})
            optimizer = torch.optim.Adam(model.parameters(), lr)
        else:
            with torch.device("meta"):
                recipe = initlab.recipes.mup(Transformer(base), "torch")
            # Outputs from zero, as the paper advises: their size at the start says nothing then.
            initlab.init_model_(model, seed, {"head": Constant(0.0), "*": recipe})
            optimizer = torch.optim.Adam(recipe.param_groups(model, lr))
        tokens = torch.randint(0, CLASSES, (2, 33), generator=torch.Generator().manual_seed(seed))
        for step in range(steps + 1):
            outputs = model(tokens[:, :-1])
            for name, output in outputs.items() if step else ():
                sums = found.setdefault(name, [0.0] * steps)
                sums[step - 1] += float(output.detach().abs().mean()) / seeds
            optimizer.zero_grad()
            nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
    return found


def spread(by_width: Sequence[dict[str, list[float]]]) -> dict[str, float]:
    """Of each part, the largest ratio between two widths, after any step."""
    return {
        name: max(
            max(found[name][step] for found in by_width) / min(found[name][step] for found in by_width)
            for step in range(len(by_width[0][name]))
        )
        for name in by_width[0]
    }


def main(path: str) -> None:
    torch.set_num_threads(2)
    panels = {}
    for title, base in (("torch's start, one learning rate", None), ("muP, base width 128", WIDTHS[0])):
        by_width = [sizes(width, base) for width in WIDTHS]
        panels[title] = by_width
        print(title, {name: round(ratio, 2) for name, ratio in spread(by_width).items()})
    Path(path).write_text(drawn(panels))


COLOURS = {"embedding": "#777777", "block 0": "#1f77b4", "block 1": "#2ca02c", "logits": "#d62728"}


def drawn(panels: dict[str, list[dict[str, list[float]]]]) -> str:
    """The figure, as SVG: sizes over widths, both logarithmic, a line for each part and step, later ones darker."""
    every = [x for by_width in panels.values() for found in by_width for line in found.values() for x in line]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    width, height, left, top = 300, 260, 50, 40

    def place(panel: int, index: int, value: float) -> str:
        x = left + panel * (width + 40) + index * width / (len(WIDTHS) - 1)
        return f"{x:.1f},{top + height * (high - math.log10(value)) / (high - low):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width + 110}" height="{height + 110}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for panel, (title, by_width) in enumerate(panels.items()):
        x = left + panel * (width + 40)
        parts.append(f'<text x="{x}" y="{top - 12}" font-size="13">{title}</text>')
        for power in range(low, high + 1):
            y = top + height * (high - power) / (high - low)
            parts.append(f'<path d="M{x},{y:.1f}h{width}" stroke="#dddddd"/>')
            if not panel:
                parts.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
        for index, of_width in enumerate(WIDTHS):
            at = x + index * width / (len(WIDTHS) - 1)
            parts.append(f'<text x="{at:.1f}" y="{top + height + 16}" text-anchor="middle">{of_width}</text>')
        for name, colour in COLOURS.items():
            steps = len(by_width[0][name])
            for step in range(steps):
                points = " ".join(place(panel, i, found[name][step]) for i, found in enumerate(by_width))
                shade = 0.15 + 0.85 * step / steps
                parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" opacity="{shade:.2f}"/>')
    for index, (name, colour) in enumerate(COLOURS.items()):
        at, y = left + index * 110, top + height + 46
        parts.append(f'<path d="M{at},{y - 4}h18" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{at + 24}" y="{y}">{name}</text>')
    caption = "mean size of outputs over the width, after 1 (light) to 10 (dark) steps of Adam"
    parts.append(f'<text x="{left}" y="{top + height + 64}">{caption}</text></svg>')
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main(sys.argv[1])
