"""What a guard writes beside the run: the batch, as torch.load(weights_only=True) reads it, and the diagnosis."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._tree import items_in
from ..distributed.dtensors import local
from .passes import ForwardPass
from .report import BadStep


def plain(value: Any) -> Any:
    """A batch as tensors on the CPU, numbers, strings, lists, tuples and dicts.

    Mappings and dataclasses become dicts, arrays tensors, of a DTensor it is this rank's part. Of what is none of these
    it is the repr.

    Example:
        >>> import torch
        >>> from initlab.guarding.saving import plain
        >>> plain({"x": [torch.ones(1), None], "meta": ("id", 3)})
        {'x': [tensor([1.]), None], 'meta': ('id', 3)}
    """
    if isinstance(value, Tensor):
        kept = local(value).detach()
        return torch.empty_like(kept, device="cpu").copy_(kept) if kept.layout == torch.strided else kept.cpu()
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return torch.tensor(value) if value.dtype.kind in "biufc" else repr(value)
    if isinstance(value, bool | int | float | complex | str | bytes | type(None)):
        return value if type(value).__module__ == "builtins" else repr(value)
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key if isinstance(key, str | int) else repr(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name, None)) for field in dataclasses.fields(value)}
    inside = [plain(item) for _, item in items_in(value)]
    return inside or repr(value)


def save(
    folder: Path,
    found: BadStep,
    ran: ForwardPass,
    models: Mapping[str, nn.Module],
    rank: int | None,
    first: bool,
    lang: str = "en",
) -> tuple[Path, ...]:
    """Write what is known of a bad step.

    Args:
        folder: is made where there is none.
        found: the step.
        ran: its pass.
        models: by a prefix for the names of their buffers.
        rank: of several; None of one.
        first: whether this rank writes what is the same on all of them.
        lang: of the text and the page.

    Returns:
        The files: `step-12-batch.pt`, of several ranks `step-12-rank-0-batch.pt`, and the diagnosis as .txt, .json and
        .html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{found.step}"
    batch = folder / f"{name}{'' if rank is None else f'-rank-{rank}'}-batch.pt"
    names = {id(module): f"{prefix}{n}" for prefix, model in models.items() for n, module in model.named_modules()}
    buffers = {
        f"{names[id(module)]}.{leaf}".lstrip("."): plain(copy)
        for module, leaf, copy in ran.state.buffers()
        if id(module) in names
    }
    contents = {
        "batch": plain(ran.batch),
        "step": found.step,
        "reason": found.reason,
        "buffers": buffers,
        "rng": {"cpu": ran.state.random.cpu, "cuda": ran.state.random.cuda, "python": ran.state.random.python},
    }
    torch.save(contents, batch)
    saved = [batch]
    if first:
        text = folder / f"{name}.txt"
        text.write_text(f"{found.text(lang)}\n", encoding="utf-8")
        saved.append(text)
        if found.diagnosis is not None:
            data, page = folder / f"{name}.json", folder / f"{name}.html"
            data.write_text(found.diagnosis.to_json(), encoding="utf-8")
            found.diagnosis.save(page, lang=lang)
            saved += [data, page]
    return tuple(saved)
