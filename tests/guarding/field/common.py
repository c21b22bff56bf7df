"""What the twelve runs share: data, a probe for --plain, and the JSON line at the end."""

import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import warnings

import numpy
import torch

torch.set_num_threads(1)
warnings.simplefilter("ignore")  # a guard warns of a bad step, and goes on
PLAIN = "--plain" in sys.argv  # a spawned process has the same arguments
ROOT = pathlib.Path(tempfile.gettempdir(), "guarded_runs")

TEXT = """
The harbour master kept three notebooks. In the first he wrote the hour at which each boat left, in the second the hour
at which it came home, and in the third, which nobody was allowed to open, the names of those that had not. The ink of
the third was blue. When the wind turned to the north the boys of the village sat on the wall and counted sails, and
whoever counted one too many had to carry the nets of the others up the hill. My grandmother counted well. She said that
a sail seen against the sun is always one more than there is, and a sail seen against the cliff always one fewer, and so
she looked only at the water between. In the winter of the long frost the harbour did not freeze, but the road to it did,
and for eleven days there was fish and no bread. On the twelfth a baker came down on skates, with a sack on each shoulder
and flour in his beard, and he was married before the thaw. The notebooks are in the museum now. The first two lie open
under glass; of the third one sees the cover. A card beside it says that it is empty, and that it was always empty, and
that the old man had bought the blue ink only to be on the safe side. Nobody in the village believes the card. The boys
still count the sails, though there are engines now, and the sails are for the tourists, and the nets are made of nylon
and carried by a truck. On summer evenings the water between the sun and the cliff is as it was: grey, then green, then
grey again, and if you look long enough you will see a boat that is neither coming nor going, and you will not count it.
""".strip().replace("\n", " ")
CHARS = sorted(set(TEXT))
VOCABULARY = len(CHARS)
CODES = torch.tensor([CHARS.index(c) for c in TEXT])


def encode(text):
    return torch.tensor([CHARS.index(c) for c in text if c in CHARS])


def windows(length, rows, generator):
    """Random pieces of the text: inputs and the characters that follow."""
    starts = torch.randint(0, len(CODES) - length - 1, (rows,), generator=generator)
    index = starts[:, None] + torch.arange(length)
    return CODES[index], CODES[index + 1]


def split(x, y, size, steps, seed=0):
    """`steps` batches of `size` rows, epoch after epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    while len(batches) < steps:
        order = torch.randperm(len(x), generator=generator)
        batches += [(x[o].clone(), y[o].clone()) for o in order.split(size) if len(o) == size]
    return batches[:steps]


def standardised(x):
    x = numpy.asarray(x, dtype=numpy.float32)
    return torch.from_numpy((x - x.mean(0)) / x.std(0))


def folder(name):
    path = ROOT / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def finite(model):
    return all(bool(torch.isfinite(local(p.detach())).all()) for p in model.parameters())


class Probe:
    """For --plain: the first step whose loss, and whose gradients, are not finite."""

    def __init__(self, model):
        self.model, self.steps, self.loss, self.gradient, self.count = model, 0, None, None, 0

    def see(self, loss, scaled=False):
        """After backward. `scaled`: gradients carry a GradScaler's scale, and are not looked at."""
        self.steps += 1
        loss_bad = not bool(torch.isfinite(torch.as_tensor(loss)).all())
        gradients = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
        gradient_bad = not scaled and any(not bool(torch.isfinite(g).all()) for g in gradients)
        if loss_bad and self.loss is None:
            self.loss = (self.steps, float(loss))
        if gradient_bad and self.gradient is None:
            self.gradient = self.steps
        self.count += loss_bad or gradient_bad

    def print(self, name):
        print(json.dumps({
            "name": name, "plain": True, "steps": self.steps, "first_nonfinite_loss": self.loss and list(map(str, self.loss)),
            "first_nonfinite_gradient": self.gradient, "nonfinite_steps": self.count, "weights_finite_at_end": finite(self.model),
        }))


def first_cause(text):
    """Kind, text (without the remedy) and remedy of the first cause: '1. input (broken): feature 1', and the lines below it."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        found = re.match(r"\s*1\.\s+([a-z][a-z ]*?)\s*(?:\(([a-z ]+)\))?:\s*(.*)", line, re.IGNORECASE)
        if found:
            block = [found[3]]
            for below in lines[number + 1:]:
                if not below.strip() or re.match(r"\s*\d+\.\s", below):
                    break
                block.append(below.strip())
            cut = next((i for i, b in enumerate(block) if i and b.startswith("remedy")), len(block))
            return found[1].strip().lower(), " ".join(block[:cut]), "\n".join(block[cut:])
    return None, None, ""


def emit(name, report, where, steps_done, steps, model_finite, **more):
    """The JSON line. The diagnosis is read from the saved text of the first examined step, else from the report."""
    where = pathlib.Path(where)
    saved = sorted(p.name for p in where.rglob("*") if p.is_file())
    texts = sorted((p for p in where.rglob("step-*.txt")), key=lambda p: int(re.search(r"step-(\d+)", p.name)[1]))
    kind = text = remedy = None
    sources = [p.read_text() for p in texts[:1]] + [str(report)]
    for source in sources:
        kind, text, remedy = first_cause(source)
        if kind:
            break
    if not kind:  # no list of causes: what the report says, as it is
        kind, text = "watch", " ".join(" ".join(sources[-1:]).split())[:2000]
    print(json.dumps({
        "name": name, "bad_steps": report.bad_steps, "saved": saved, "cause_kind": kind, "cause_text": text,
        "went_on": bool(steps_done == steps and model_finite), "remedy": remedy or "", **more,
    }))
