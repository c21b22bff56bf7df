"""What can be done, and pasted, where a recipe has no distribution for a parameter."""

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed.dtensors import local
from .naming import TensorRef
from .patterns import compile_pattern
from .recipe_parts import NamedRecipe
from .resolving import NAMED

_LINES = 12


def ways_out(refused: Sequence[TensorRef], every: Sequence[TensorRef], recipe: NamedRecipe) -> str:
    """The end of a refusal: rules for what is refused, as code.

    A parameter that holds one value gets it as its rule. No other number is made up: where the values differ, and on
    the meta device, `...` stands for what is missing, and is refused itself when it is pasted as it is.

    Args:
        refused: parameters without a distribution.
        every: all parameters of the model.
        recipe: what refuses.

    Example:
        >>> import torch
        >>> from initlab.models.naming import tensor_refs
        >>> from initlab.models.refusals import ways_out
        >>> from initlab.models.resolving import resolve
        >>> model = torch.nn.ParameterDict({"scale": torch.full((), 2.5), "tokens": torch.randn(3, 4)})
        >>> refs, _ = tensor_refs(model)
        >>> print(ways_out(refs, refs, resolve("torch")).splitlines()[1])
            recipe={"scale": Constant(2.5), "tokens": ..., "*": "torch"}
    """
    by_rule = with_globs({ref.name: _rule(ref) for ref in refused}, [ref.name for ref in every])
    shown = list(by_rule.items())[:_LINES]
    rules = ", ".join(f'"{name}": {rule}' for name, rule in shown)
    rest = f'"{recipe.name}"' if recipe.name in NAMED else "recipe"
    lines = [f'Give them a distribution by name:\n    recipe={{{rules}, "*": {rest}}}']
    if rest == "recipe":
        lines.append("where recipe is the one that was passed.")
    if any(rule.startswith("Constant") for _, rule in shown):
        lines.append("Each Constant is the value that all of the parameter has now.")
    if any(rule == "..." for _, rule in shown):
        lines.append("Write the distribution that it is to have in the place of ..., such as Normal(mean, std).")
    if len(by_rule) > len(shown):
        lines.append(f"{len(by_rule) - len(shown)} more need a rule.")
    return "\n".join(lines) + f"\nOr leave them out with only={recipe.advice or '.'}"


def _rule(ref: TensorRef) -> str:
    value = only_value(ref.tensor)
    return "..." if value is None else f"Constant({value})"


def only_value(tensor: Tensor) -> str | None:
    """The value that all of a tensor has, as few digits as give it back; None where there is none, or no values."""
    values = local(tensor).detach()
    if values.is_meta or values.layout != torch.strided or values.numel() == 0 or values.dtype.is_complex:
        return None
    first = values.flatten()[:1]
    if local(tensor) is not tensor or not bool(torch.isfinite(first)) or not bool((values == first).all()):
        return None
    if not values.dtype.is_floating_point:
        return str(first.item())
    digits = (f"{first.item():.{count}g}" for count in range(1, 18))
    shortest = next(text for text in digits if torch.tensor(float(text), dtype=values.dtype) == first.cpu())
    return repr(float(shortest))


def with_globs(rules: dict[str, str], every: Sequence[str]) -> dict[str, str]:
    """The same rules, with one glob for names that differ in numbers only, after those of them that have another rule.

    A glob selects nothing else: where it would, each name keeps a rule of its own.
    """
    groups: dict[str, list[str]] = {}
    for name in rules:
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    found: dict[str, str] = {}
    for pattern, names in groups.items():
        common = Counter(rules[name] for name in names).most_common(1)[0][0]
        alone = len(names) == 1 or set(filter(compile_pattern(pattern, every), every)) != set(names)
        found.update((name, rules[name]) for name in names if alone or rules[name] != common)
        if not alone:
            found[pattern] = common
    return found
