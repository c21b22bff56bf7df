"""The recipe that a caller means: a name, a distribution, a function, a mapping of patterns, a recorded build."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from initlab.kernels import Constant, Distribution, Normal, TruncatedNormal, Uniform

from .builds import BuildRecord
from .naming import TensorRef
from .patterns import compile_pattern
from .recipe_parts import Chooser, DistributionOf, NamedRecipe, RecipeLike, View, short_repr
from .report import InitReport
from .specs import FillSpec, Refused, whole_fill

DEFAULT = "own"
"""The name of the recipe of whoever names none."""

NAMED: dict[str, Callable[[], NamedRecipe]] = {}
"""Recipes by name; recipes.py enters them."""


def based_on(name: str, rest: NamedRecipe) -> str:
    """The name of a recipe that leaves the rest to another one."""
    return name if rest.name == DEFAULT else f"{name}, {rest.name}"


def resolve(recipe: RecipeLike) -> NamedRecipe:
    """The recipe that a caller means.

    Args:
        recipe: a name; a recipe made by a function of this module; a distribution for every parameter; a function that
            takes a TensorRef and returns a distribution, or None where it has none; the report of another call, whose
            distributions are given again; or a mapping from name patterns to any of these. Of the patterns that match
            one of a parameter's names the first that has a distribution for it counts, and then "own".

    Raises:
        ValueError: for a name that is not known.
        TypeError: for anything else. Of a function that fills tensors, such as those of torch.nn.init, the error says
            which recipe does the same.

    Example:
        >>> from initlab import recipes
        >>> from initlab.kernels import Constant
        >>> recipes.resolve({"*.bias": Constant(0.1), "*": "he"}).name
        'he with rules for *.bias'
    """
    return _resolve(recipe, "recipe")


def _resolve(recipe: Any, where: str) -> NamedRecipe:
    """`where` is how errors call it: an entry of a mapping by its pattern."""
    if isinstance(recipe, NamedRecipe):
        return recipe
    if isinstance(recipe, BuildRecord):
        return recipe.recipe()
    if isinstance(recipe, InitReport):
        return _by_report(recipe)
    if isinstance(recipe, str):
        if recipe in NAMED:
            return NAMED[recipe]()
        instead = _TORCH_INIT.get(recipe, "")
        raise ValueError(
            f"{where} is {recipe!r}; it must be one of {', '.join(NAMED)}, a function or a mapping"
            + (f". {instead}" if instead else "")
        )
    if isinstance(recipe, _DISTRIBUTIONS):
        return NamedRecipe(str(recipe), lambda view: lambda ref: whole_fill(recipe, "given"))
    if isinstance(recipe, Mapping):
        return _by_pattern(recipe, where)
    if callable(recipe) and not isinstance(recipe, nn.Module):
        return _by_function(recipe, where)
    raise TypeError(f"{where} is {short_repr(recipe)}; {_MUST_BE}")


def _by_report(report: InitReport) -> NamedRecipe:
    """What a report says, by name; whoever has no distribution there is refused."""
    rows = {row.name: row for row in report.rows}
    if any(row.unfitted for row in report.rows):
        raise ValueError(
            f"recipe is plan_model's report of recipe {report.recipe!r}, whose weights are not scaled to a batch yet; "
            "pass the report that init_model_ returns with batch="
        )

    def choose(ref: TensorRef) -> FillSpec | Refused | None:
        row = rows.get(ref.name)
        if row is None:
            return Refused("the report says nothing of it")
        orthogonal = row.source == "orthogonal"
        whole = Normal(0.0, row.std) if orthogonal and row.std is not None else row.distribution
        if row.source == "kept":
            return Refused("its values were kept, and the report does not hold them: pass them with values=")
        if whole is None:
            return Refused("the report has no distribution for it")
        return FillSpec(((None, whole), *row.slices), row.fan, row.why, row.guess, exact=True, orthogonal=orthogonal)

    return NamedRecipe(f"report of {report.recipe}", lambda view: choose, asks_parts=True)


_DISTRIBUTIONS = (Uniform, Normal, TruncatedNormal, Constant)
_MUST_BE = (
    'it must be a name such as "torch" or "he", a distribution such as Normal(0.0, 0.02), a function from a TensorRef '
    "to a distribution, a mapping from name patterns to any of these, or the report of another call"
)
_NO_DISTRIBUTION = "No distribution does the same: leave these parameters out with only=, and call it on them yourself"
_TORCH_INIT = {
    "uniform_": "The distribution Uniform(low, high) does the same",
    "normal_": "The distribution Normal(mean, std) does the same",
    "trunc_normal_": 'recipe="trunc_normal" does the same for weights, TruncatedNormal(mean, std, low, high) for all',
    "constant_": "The distribution Constant(value) does the same",
    "ones_": "The distribution Constant(1.0) does the same",
    "zeros_": "The distribution Constant(0.0) does the same",
    "xavier_uniform_": 'recipe="xavier" does the same for weights',
    "xavier_normal_": 'recipe=initlab.recipes.xavier(distribution="normal") does the same for weights',
    "kaiming_uniform_": 'recipe=initlab.recipes.he(distribution="uniform") does the same for weights',
    "kaiming_normal_": 'recipe="he" does the same for weights',
    "mup": "muP compares with a narrower model: recipe=initlab.recipes.mup(base)",
    **dict.fromkeys(("orthogonal_", "sparse_", "eye_", "dirac_"), _NO_DISTRIBUTION),
}


def _refuse_function(function: Any, where: str) -> None:
    """Raise for functions that are no recipes, and are often taken for one."""
    called = function.func if isinstance(function, functools.partial) else function
    home, name = getattr(called, "__module__", None), getattr(called, "__name__", "")
    if home in ("torch.nn.init", "initlab.init"):
        raise TypeError(
            f"{where} is {home}.{name}, which fills a tensor; a recipe says which distribution a parameter gets. "
            f"{_TORCH_INIT.get(name, _NO_DISTRIBUTION)}. Any rule of your own is a function from a TensorRef to a "
            'distribution: recipe={"*": lambda ref: Normal(0.0, 0.02) if ref.tensor.dim() > 1 else None}'
        )
    if NAMED.get(name) is called:
        raise TypeError(f"{where} is the function recipes.{name}; call it, recipe=initlab.recipes.{name}()")
    if called in _DISTRIBUTIONS:
        raise TypeError(f"{where} is the class {name}; it must be one distribution, {name}() with its parameters")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin that shows none
        return
    try:
        signature.bind(None)
    except TypeError:
        raise TypeError(
            f"{where} is the function {name or type(function).__name__}{signature}; it must take one argument, a "
            "TensorRef, and return a distribution or None: lambda ref: Normal(0.0, 0.02)"
        ) from None


def _by_function(function: DistributionOf, where: str) -> NamedRecipe:
    _refuse_function(function, where)
    name = getattr(function, "__name__", type(function).__name__)

    def choose(ref: TensorRef) -> FillSpec | None:
        found: Distribution | None = function(ref)
        if found is not None and not isinstance(found, _DISTRIBUTIONS):
            raise TypeError(
                f"recipe {name} returned {short_repr(found)} for {ref.name}; it must return a distribution, such as "
                "Normal(0.0, 0.02), or None"
            )
        return None if found is None else whole_fill(found, name)

    return NamedRecipe(name, lambda view: choose)


def _by_pattern(patterns: Mapping[str, Any], where: str) -> NamedRecipe:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{where} has the key {short_repr(pattern)}; keys are name patterns: globs or names of modules"
            )
    chain = [(pattern, _resolve(part, f"{where}[{pattern!r}]")) for pattern, part in patterns.items()]
    rest = next((part for pattern, part in chain if pattern == "*"), None)
    base = DEFAULT if rest is None else rest.name
    special = [pattern for pattern, _ in chain if pattern != "*"]

    def prepare(view: View) -> Chooser:
        names = [name for ref in view.refs for name in ref.names]
        fits = {pattern: compile_pattern(pattern, names) for pattern, _ in chain}
        for pattern, fit in fits.items():
            if not any(map(fit, names)):
                raise ValueError(f"{where}: no parameter is called {pattern!r}; patterns are globs or names of modules")
        prepared = [(fits[pattern], part(view), part.asks_parts) for pattern, part in chain]
        default = functools.cache(lambda: NAMED[DEFAULT]()(view))  # reads the model's code: only where it is asked

        def choose(ref: TensorRef) -> FillSpec | Refused | None:
            whole = view.wholes.get(id(ref.tensor))
            left = False  # by a rule that matches, and has nothing for it
            for fit, part, asks_parts in prepared:
                if whole is not None and not asks_parts and any(map(fit, whole.names)):
                    continue  # the rule is for the weight that this is a part of
                if not any(map(fit, ref.names)):
                    continue
                if (found := part(ref)) is not None:
                    if left and isinstance(found, FillSpec) and found.fitted:
                        return replace(found, fitted="never")
                    return found
                left = True
            return default()(ref)

        return choose

    advice = next((part.advice for _, part in chain if part.advice), NAMED[DEFAULT]().advice)
    of_buffers = None if rest is None else rest.prepare_buffers
    return NamedRecipe(
        f"{base} with rules for {', '.join(special)}" if special else base, prepare, of_buffers, advice, True
    )
