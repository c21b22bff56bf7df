"""Which layers add to the residual stream, in which block, and how many blocks a model has."""

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .._console import warn
from .fans import compute_fans
from .naming import TensorRef, walk
from .patterns import compile_pattern
from .recipe_parts import View

# By name alone: nothing else is called so.
_NAMED = (
    *("*.c_proj", "*.out_proj", "*.o_proj", "*.down_proj", "*.wo", "*.w2", "*.fc2", "*.linear2", "*.dense_4h_to_h"),
    *("*.attn.proj", "*.to_out", "*.output.dense"),
)
# In numbered blocks, where they are no wider than what they read: BERT's intermediate.dense is called dense too.
_IN_BLOCKS = ("*.down", "*.out", "*.proj", "*.dense", "*.attn_out", "*.ff_out")

RESIDUAL: tuple[str, ...] = (*_NAMED, *_IN_BLOCKS)
"""Name patterns of the layers at the end of a residual branch."""


def residual_layers(view: View, patterns: Sequence[str]) -> dict[int, TensorRef]:
    """By id: the parameters whose module, or which themselves (experts in one tensor), a pattern selects."""
    names = [f"{ref.module_name}.{ref.attribute}" for ref in view.refs]
    dotted = [f".{name}" for name in names]  # "*.c_proj" is to fit a layer of the model itself too
    inside: dict[int, TensorRef] = {}
    for pattern in patterns:
        tried = dotted if pattern.startswith("*") else names
        fits = compile_pattern(pattern, tried)
        found = [ref for ref, name in zip(view.refs, tried, strict=True) if fits(name)]
        if patterns is RESIDUAL and pattern in _IN_BLOCKS:
            found = [ref for ref in found if _is_numbered(ref.module_name) and _narrows(ref)]
        inside.update((id(ref), ref) for ref in found)
    return inside


def _is_numbered(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _narrows(ref: TensorRef) -> bool:
    """Whether the weight beside a parameter leads to no more units than it comes from."""
    own = ref.module._parameters.items()
    every = [compute_fans(ref.module, name, tensor) for name, tensor in own if tensor is not None]
    return all(fans is None or fans.fan_out <= fans.fan_in for fans in every)


def last_norms(model: nn.Module) -> list[nn.Module]:
    """The last batch norm of every block that has several, bn1, bn2, ...: torchvision's and timm's ResNets."""
    found = []
    for _, module in walk(model):
        numbered = [int(name[2:]) for name in module._modules if name[:2] == "bn" and name[2:].isdigit()]
        if len(numbered) > 1 and (last := module._modules[f"bn{max(numbered)}"]) is not None:
            found.append(last)
    return found


def warn_without_residual(view: View, recipe: str, patterns: Sequence[str]) -> None:
    """Say that a model has blocks, and no layer in them that a pattern selects."""
    blocks_of = next((name for name, module in walk(view.model) if _holds_blocks(module)), None)
    if blocks_of is not None:
        known_names = ", ".join(pattern.removeprefix("*.") for pattern in patterns)
        warn(
            f"recipe {recipe!r} found no layer that adds to the residual stream in {blocks_of or 'the model'}: none of "
            f"its blocks' layers is called {known_names}. None is made smaller. Name those layers, "
            f"recipe=initlab.recipes.{recipe}(residual='*.down'), or say that there are none, residual=()"
        )


def _holds_blocks(module: nn.Module) -> bool:
    """Whether it is a list of modules of one class, not Sequential, that have modules of their own."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2 or len(set(map(type, module))) > 1:
        return False
    return not isinstance(module[0], nn.Sequential) and next(module[0].children(), None) is not None


def as_patterns(residual: str | Sequence[str]) -> tuple[str, ...]:
    """One pattern or several; the default stays itself."""
    return RESIDUAL if residual is RESIDUAL else (residual,) if isinstance(residual, str) else tuple(residual)


def layer_count(layers: Any) -> int:
    """A number of blocks, or an error that says what it must be."""
    try:
        count = operator.index(layers)
    except TypeError:
        count = -1
    if count < 0:
        raise ValueError(f"layers is {layers!r}; it must be the number of blocks of the whole model, or None")
    return count


def count_blocks(view: View, recipe: str, blocks: Collection[str]) -> tuple[int, str]:
    """L, the number of blocks of the whole model, and where it was found."""
    config = getattr(view.model, "config", None)
    for name in ("num_hidden_layers", "n_layer"):
        if isinstance(count := getattr(config, name, None), int):
            return count, "of model.config"
    found = len(blocks)
    if found and view.stage:
        raise ValueError(
            f"recipe {recipe!r} scales residual layers by the number L of blocks, and a stage shows {found} blocks, "
            f"not the whole model's L; pass recipe=initlab.recipes.{recipe}(layers=L)"
        )
    return found, "counted"


def blocks_around(model: nn.Module, refs: Iterable[TensorRef]) -> set[str]:
    """The blocks that layers lie in: members of the outermost nn.ModuleList above each, or else of whatever numbers
    its members last on the way to it."""
    lists = _lists(model)
    return {block for ref in refs if (block := _block_of(ref.module_name, lists))}


def _lists(model: nn.Module) -> set[str]:
    return {name for name, module in walk(model) if isinstance(module, nn.ModuleList)}


def _block_of(module_name: str, lists: set[str]) -> str:
    parts = module_name.split(".")
    numbered = [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]
    in_lists = [name for name in numbered if name.rpartition(".")[0] in lists]
    return (in_lists[:1] or numbered[-1:] or [""])[0]


def block_indices(view: View, residual: Mapping[int, TensorRef]) -> dict[int, int]:
    """By the id of a residual layer's TensorRef: how many blocks of its stack come before its own.

    Of a stage (`names=`) it is the first number in the mapped name.
    """
    lists = _lists(view.model)
    found: dict[int, int] = {}
    for key, ref in residual.items():
        if view.stage:
            numbers = [part for part in ref.name.split(".")[:-1] if part.isdigit()]
            block = numbers[0] if numbers else ""
        else:
            block = _block_of(ref.module_name, lists)
        if block:
            found[key] = int(block.rpartition(".")[2])
    return found
