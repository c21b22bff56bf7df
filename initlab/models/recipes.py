"""Which distribution each parameter of a model gets: the recipes of init_model_.

A recipe is a name ("torch", "own", "he", "xavier", "lecun", "gpt2", "trunc_normal", "auto"), what a function of the
same name here returns for other settings, a function from TensorRef to distribution, or a mapping from name patterns
to any of these or to distributions.

This is one file, of a little over 500 lines, because a new scheme is written by looking at the others.
"""

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.nn.init import calculate_gain

from initlab.kernels import Constant, Distribution, Normal, TruncatedNormal, Uniform

from .._console import warn
from .activations import activations_after, start_before
from .builds import BuildRecord
from .checking import MetaWrites
from .fans import Fans, compute_fans
from .naming import TensorRef, walk
from .patterns import compile_pattern
from .recipe_parts import (
    Chooser,
    DistributionName,
    DistributionOf,
    NamedRecipe,
    RecipeLike,
    View,
    by_default,
    by_fan,
    centred,
    every_weight,
    guess_by_name,
    short_repr,
    with_small_heads,
    with_std,
    zero_bias,
)
from .recording import read_init_weights, read_public_starts
from .rerunning import Stage, start_mismatch
from .specs import FillSpec, Refused, whole_fill

FanMode: TypeAlias = Literal["fan_in", "fan_out"]


def torch() -> NamedRecipe:
    """What torch gives its layers: the distribution of every module's reset_parameters, children first.

    Modules that are not torch's are read from their own reset_parameters or, where that says nothing, from the model's
    `_init_weights`. Without either, a one-dimensional `weight` of a module whose class is called a norm is 1 and a
    one-dimensional `bias` 0; the report marks these as guesses.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Linear(4, 2)
        >>> row = initlab.init_model_(model, seed=0, recipe=initlab.recipes.torch()).rows[0]
        >>> print(row.name, row.fan, round(row.distribution.high, 6))
        weight 4 0.5
    """
    return NamedRecipe("torch", lambda view: lambda ref: by_default(view, ref))


def own(check: bool = True) -> NamedRecipe:
    """What the model's own code does: reset_parameters of every module, then `_init_weights`, then `init_weights()`.

    This is the order in which transformers and timm start a model. What a constructor itself draws cannot be read, so
    the values that are there are compared with what was read: constants by value, random numbers by exact tests of
    their scale and shape. What cannot be from that distribution is refused, at a level at which one untouched model in
    10,000 would be. On the meta device, where there are no values, the writes in place are counted instead, and more
    than the code that was read explains are refused. `initlab.record_build()` needs neither reading nor guessing.

    Args:
        check: False leaves the comparison out: for a model that has been trained, loaded or filled otherwise since it
            was built, whose values say nothing of its start.

    Example:
        >>> import torch, initlab
        >>> class Model(torch.nn.Sequential):
        ...     def _init_weights(self, module):
        ...         if isinstance(module, torch.nn.Linear):
        ...             torch.nn.init.normal_(module.weight, std=0.02)
        >>> model = Model(torch.nn.Linear(4, 2))
        >>> report = initlab.init_model_(model.apply(model._init_weights), seed=0, recipe="own")
        >>> [row.distribution for row in report.rows]
        [Normal(mean=0.0, std=0.02), Uniform(low=-0.5, high=0.5)]
    """

    def prepare(view: View) -> Chooser:
        trace = view.resets.copy()  # the view's own trace is asked for buffers, and must not be read twice
        read_init_weights(view.model, trace)
        public = trace.copy()
        # Whether the constructor called the public functions is not known: the values tell.
        traces = [public, trace] if read_public_starts(view.model, public) else [trace]

        made = {id(whole.tensor) for whole in view.wholes.values()}
        held = [ref for ref in view.refs if id(ref.tensor) not in made]
        meta = [MetaWrites(view.model, held, view.resets.writes, found.writes) for found in traces]

        def differs(ref: TensorRef, spec: FillSpec, writes: MetaWrites) -> str | None:
            if not check:
                return None
            if ref.tensor.is_meta:
                return None if id(ref.tensor) in made else writes.mismatch(ref, spec)
            return start_mismatch(ref, spec, view.refs)

        def choose(ref: TensorRef) -> FillSpec | Refused | None:
            reason = ""
            for found, writes, stages in zip(traces, meta, _STAGES[-len(traces) :], strict=True):
                spec: FillSpec | None
                if id(ref.tensor) in found.unreadable:
                    computed = view.computed(ref, found, *stages)
                    if not isinstance(computed, FillSpec):
                        return Refused(found.unreadable[id(ref.tensor)])
                    spec = computed
                else:
                    spec = found.complete(ref.tensor) or guess_by_name(ref)
                if spec is None:
                    continue
                spec = replace(spec, exact=True, check=check)
                why = differs(ref, spec, writes)
                if why is None:
                    return spec
                reason = reason or why
            return Refused(reason) if reason else None

        return choose

    return NamedRecipe("own", prepare, advice=_RECORD + (_UNCHECKED if check else ""))


_STAGES: tuple[tuple[Stage, ...], ...] = (("resets", "init_weights", "public"), ("resets", "init_weights"))
_RECORD = (
    ", or record the build, which sees what no code that can be read tells:\n"
    "    with initlab.record_build() as build:\n"
    "        model = ...  # as it was built\n"
    "    initlab.init_model_(model, seed, recipe=build)"
)
_UNCHECKED = (
    "\nIf the model has been trained, loaded or filled since it was built, its values say nothing of its start: "
    "recipe=initlab.recipes.own(check=False)"
)


def he(
    mode: FanMode = "fan_in", nonlinearity: str = "relu", a: float = 0.0, distribution: DistributionName = "normal"
) -> NamedRecipe:
    """Weights by He's distribution, std = gain / sqrt(fan); their biases 0, all else as "torch".

    Args:
        mode: "fan_in" keeps the variance of activations, "fan_out" that of gradients.
        nonlinearity: what follows the layers; sets the gain, see torch.nn.init.calculate_gain.
        a: negative slope, for "leaky_relu".
        distribution: "normal", "uniform", or "truncated_normal" at 2 sigma, each with that std.

    Raises:
        ValueError: if mode, nonlinearity or distribution is not known.

    Source:
        K. He, X. Zhang, S. Ren and J. Sun, "Delving deep into rectifiers", 2015. Fans: docs/models.md.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Conv2d(8, 8, 3, groups=8)
        >>> report = initlab.init_model_(model, seed=0, recipe=initlab.recipes.he("fan_out"))
        >>> round(report.rows[0].std, 4)  # sqrt(2 / 9)
        0.4714
    """
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode is {mode!r}; it must be 'fan_in' or 'fan_out'")
    gain = calculate_gain(nonlinearity, a)  # type: ignore[arg-type]
    with_std(1.0, distribution)
    return by_fan("he", lambda f: (getattr(f, mode), gain), distribution)


def xavier(gain: float = 1.0, distribution: DistributionName = "uniform") -> NamedRecipe:
    """Weights by Glorot's distribution, std = gain * sqrt(2 / (fan_in + fan_out)); their biases 0, all else as "torch".

    Args:
        gain: factor on the standard deviation, >= 0.
        distribution: "uniform", "normal", or "truncated_normal" at 2 sigma, each with that std.

    Raises:
        ValueError: if gain is negative or not finite, or distribution is not known.

    Source:
        X. Glorot and Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010.

    Example:
        >>> import torch, initlab
        >>> report = initlab.init_model_(torch.nn.Linear(4, 2), seed=0, recipe="xavier")
        >>> report.rows[0].distribution  # sqrt(6 / (4 + 2))
        Uniform(low=-1.0, high=1.0)
    """
    gain = _number(gain, "gain")
    if not 0.0 <= gain < math.inf:
        raise ValueError(f"gain is {gain}; it must be finite and not negative")
    with_std(1.0, distribution)
    return by_fan("xavier", lambda f: ((f.fan_in + f.fan_out) / 2, gain), distribution)


def lecun(distribution: DistributionName = "normal") -> NamedRecipe:
    """Weights by LeCun's distribution, std = 1 / sqrt(fan_in); their biases 0, all else as "torch".

    Args:
        distribution: "normal", "uniform", or "truncated_normal" at 2 sigma, each with that std.

    Raises:
        ValueError: if distribution is not known.

    Source:
        Y. LeCun, L. Bottou, G. Orr and K.-R. Mueller, "Efficient BackProp", 1998; G. Klambauer et al.,
        "Self-normalizing neural networks", 2017, for SELU.

    Example:
        >>> import torch, initlab
        >>> initlab.init_model_(torch.nn.Linear(4, 2), seed=0, recipe="lecun").rows[0].distribution
        Normal(mean=0.0, std=0.5)
    """
    with_std(1.0, distribution)
    return by_fan("lecun", lambda f: (f.fan_in, 1.0), distribution)


_RESIDUAL = (
    "*.c_proj",
    "*.out_proj",
    "*.o_proj",
    "*.down_proj",
    "*.wo",
    "*.w2",
    "*.fc2",
    "*.linear2",
    "*.dense_4h_to_h",
    "*.attn.proj",
)


def gpt2(std: float = 0.02, layers: int | None = None, residual: Sequence[str] = _RESIDUAL) -> NamedRecipe:
    """GPT-2's: weights and embeddings normal with one std, smaller where a layer adds to the residual stream.

    Args:
        std: of every weight of two dimensions or more.
        layers: L, the blocks of the whole model; weights in residual layers have std / sqrt(2 L). None takes it from
            `model.config` (num_hidden_layers or n_layer) or else counts the numbered blocks that hold such layers.
        residual: name patterns of those layers, one or several; () for none. A UserWarning tells where blocks were
            found and no such layer.

    Biases of weights are 0, all else as "torch".

    Raises:
        RuntimeError: if std is negative.
        ValueError: if layers is no number of blocks; in use, if a stage (`names=`) leaves L to be counted: a part would
            count its own blocks only.

    Source:
        A. Radford et al., "Language models are unsupervised multitask learners", 2019, 2.3, and its published code.

    Example:
        >>> import torch, initlab
        >>> block = torch.nn.TransformerEncoderLayer(8, 2, 32)
        >>> model = torch.nn.TransformerEncoder(block, num_layers=2, enable_nested_tensor=False)
        >>> report = initlab.init_model_(model, seed=0, recipe="gpt2")
        >>> sorted({row.std for row in report.rows if row.name.endswith(("linear1.weight", "linear2.weight"))})
        [0.01, 0.02]
    """
    plain = Normal(0.0, _number(std, "std"))
    known = None if layers is None else _layer_count(layers)
    patterns = (residual,) if isinstance(residual, str) else tuple(residual)

    def prepare(view: View) -> Callable[[TensorRef], FillSpec | None]:
        inside = _residual_layers(view, patterns)
        blocks_of = next((name for name, module in walk(view.model) if _holds_blocks(module)), None)
        if not inside and patterns and blocks_of is not None:
            known_names = ", ".join(pattern.removeprefix("*.") for pattern in patterns)
            warn(
                f"recipe 'gpt2' found no layer that adds to the residual stream in {blocks_of or 'the model'}: none of "
                f"its blocks' layers is called {known_names}. All weights get std {plain.std:.3g}. Name those layers, "
                "recipe=initlab.recipes.gpt2(residual='*.down'), or say that there are none, residual=()"
            )
        blocks, source = (known, "given") if known is not None else _count_blocks(view, inside)
        scaled = Normal(0.0, plain.std / math.sqrt(2 * blocks)) if blocks else plain

        def distribution(ref: TensorRef) -> FillSpec:
            if blocks and id(ref) in inside:
                return whole_fill(scaled, f"residual layer, 1/sqrt(2 * {blocks}), L {source}")
            return whole_fill(plain, ref.owner)

        return every_weight(view, distribution)

    return NamedRecipe("gpt2", prepare)


def trunc_normal(std: float = 0.02, a: float = -2.0, b: float = 2.0) -> NamedRecipe:
    """Weights and embeddings truncated normal, as `trunc_normal_(w, std=std, a=a, b=b)`; biases 0, all else as "torch".

    Args:
        std: of the normal distribution before it is cut.
        a: smallest value, absolute as in torch.nn.init; the default, like timm's, cuts at 100 sigma.
        b: largest value.

    Raises:
        ValueError: if std is not positive, or the bounds lie beyond 12 std.
        RuntimeError: if a > b.

    Source:
        A. Dosovitskiy et al., "An image is worth 16x16 words", 2021, as implemented in timm.

    Example:
        >>> import torch, initlab
        >>> recipe = initlab.recipes.trunc_normal(std=0.02, a=-0.04, b=0.04)
        >>> model = torch.nn.Linear(64, 64)
        >>> report = initlab.init_model_(model, seed=0, recipe=recipe)
        >>> model.weight.abs().max().item() <= 0.04
        True
    """
    distribution = TruncatedNormal(0.0, _number(std, "std"), _number(a, "a"), _number(b, "b"))
    return NamedRecipe("trunc_normal", lambda view: every_weight(view, lambda ref: whole_fill(distribution, ref.owner)))


def auto() -> NamedRecipe:
    """Each weight by the activation that follows it: He before ReLU's family, Xavier before tanh and sigmoid, LeCun
    before SELU.

    What follows is read off the order of modules, skipping normalisation, dropout, pooling and reshaping. In an
    nn.Sequential that order is the order of use; anywhere else it is a guess, and the report marks it. Where no
    activation module is seen before the next weight, the weight keeps the distribution of "torch", and the report says
    so. Biases of the weights that do get a distribution by their activation are 0, all else is as "torch".

    Example:
        >>> import torch, initlab
        >>> from torch.nn import BatchNorm1d, Linear, ReLU, Sequential, Tanh
        >>> model = Sequential(Linear(8, 8), BatchNorm1d(8), ReLU(), Linear(8, 8), Tanh(), Linear(8, 2))
        >>> report = initlab.init_model_(model, seed=0, recipe="auto")
        >>> for row in report.rows:
        ...     if row.name.endswith("weight") and len(row.shape) == 2:
        ...         print(row.name, row.why)
        0.weight He, before ReLU
        3.weight Xavier, before Tanh
        5.weight no activation seen: Linear's own distribution
    """

    def prepare(view: View) -> Callable[[TensorRef], FillSpec | None]:
        after = activations_after(view.model)

        def choose(ref: TensorRef) -> FillSpec | None:
            activation, certain = after.get(id(ref.module), (None, True))
            counted = compute_fans(ref.module, ref.attribute, ref.tensor, ref.module_name)
            if activation is None:
                default = by_default(view, ref)
                if default is None or counted is None:
                    return default
                return replace(default, why=f"no activation seen: {ref.owner}'s own distribution")
            if counted is not None:
                return replace(_start(activation, counted), guess=not certain)
            return zero_bias(ref) or by_default(view, ref)

        return with_small_heads(choose)

    return NamedRecipe("auto", prepare)


def _start(activation: nn.Module, counted: Fans) -> FillSpec:
    start, name = start_before(activation), type(activation).__name__
    assert start is not None
    if start.recipe == "xavier":
        return centred("uniform", start.gain, (counted.fan_in + counted.fan_out) / 2, f"Xavier, before {name}")
    by = "He" if start.recipe == "he" else "LeCun"
    return centred("normal", start.gain, counted.fan_in, f"{by}, before {name}")


_RECIPES: dict[str, Callable[[], NamedRecipe]] = {
    "torch": torch,
    "own": own,
    "he": he,
    "xavier": xavier,
    "lecun": lecun,
    "gpt2": gpt2,
    "trunc_normal": trunc_normal,
    "auto": auto,
}


def _layer_count(layers: Any) -> int:
    try:
        count = operator.index(layers)
    except TypeError:
        count = -1
    if count < 0:
        raise ValueError(f"layers is {layers!r}; it must be the number of blocks of the whole model, or None")
    return count


def _holds_blocks(module: nn.Module) -> bool:
    """Whether it is a list of modules of one class, not Sequential, that have modules of their own."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2 or len(set(map(type, module))) > 1:
        return False
    return not isinstance(module[0], nn.Sequential) and next(module[0].children(), None) is not None


def _residual_layers(view: View, patterns: Sequence[str]) -> dict[int, TensorRef]:
    """By id: the parameters whose module, or which themselves (experts in one tensor), a pattern selects."""
    names = [f"{ref.module_name}.{ref.attribute}" for ref in view.refs]
    dotted = [f".{name}" for name in names]  # "*.c_proj" is to fit a layer of the model itself too
    inside: dict[int, TensorRef] = {}
    for pattern in patterns:
        tried = dotted if pattern.startswith("*") else names
        fits = compile_pattern(pattern, tried)
        inside.update((id(ref), ref) for ref, name in zip(view.refs, tried, strict=True) if fits(name))
    return inside


def _count_blocks(view: View, residual: Mapping[int, TensorRef]) -> tuple[int, str]:
    """L, the number of blocks of the whole model, and where it was found."""
    config = getattr(view.model, "config", None)
    for name in ("num_hidden_layers", "n_layer"):
        if isinstance(count := getattr(config, name, None), int):
            return count, "of model.config"
    found = len(_blocks_around(view.model, residual.values()))
    if found and view.stage:
        raise ValueError(
            f"recipe 'gpt2' scales residual layers by 1/sqrt(2 L), and a stage shows {found} blocks, not the "
            "whole model's L; pass recipe=initlab.recipes.gpt2(layers=L)"
        )
    return found, "counted"


def _blocks_around(model: nn.Module, refs: Iterable[TensorRef]) -> set[str]:
    """The blocks that layers lie in: members of the outermost nn.ModuleList above each, or else of whatever numbers
    its members last on the way to it."""
    lists = {name for name, module in walk(model) if isinstance(module, nn.ModuleList)}
    found = set()
    for ref in refs:
        parts = ref.module_name.split(".")
        numbered = [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]
        in_lists = [name for name in numbered if name.rpartition(".")[0] in lists]
        found |= set(in_lists[:1] or numbered[-1:])
    return found


def _number(value: Any, name: str) -> float:
    """A setting as a float, or an error that names it."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a number")


def resolve(recipe: RecipeLike) -> NamedRecipe:
    """The recipe that a caller means.

    Args:
        recipe: a name; a recipe made by a function of this module; a distribution for every parameter; a function that
            takes a TensorRef and returns a distribution, or None where it has none; or a mapping from name patterns to
            any of these. Of the patterns that match one of a parameter's names the first that has a distribution for
            it counts, and then "torch".

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
    if isinstance(recipe, str):
        if recipe in _RECIPES:
            return _RECIPES[recipe]()
        instead = _TORCH_INIT.get(recipe, "")
        raise ValueError(
            f"{where} is {recipe!r}; it must be one of {', '.join(_RECIPES)}, a function or a mapping"
            + (f". {instead}" if instead else "")
        )
    if isinstance(recipe, _DISTRIBUTIONS):
        return NamedRecipe(str(recipe), lambda view: lambda ref: whole_fill(recipe, "given"))
    if isinstance(recipe, Mapping):
        return _by_pattern(recipe, where)
    if callable(recipe) and not isinstance(recipe, nn.Module):
        return _by_function(recipe, where)
    raise TypeError(f"{where} is {short_repr(recipe)}; {_MUST_BE}")


_DISTRIBUTIONS = (Uniform, Normal, TruncatedNormal, Constant)
_MUST_BE = (
    'it must be a name such as "torch" or "he", a distribution such as Normal(0.0, 0.02), a function from a TensorRef '
    "to a distribution, or a mapping from name patterns to any of these"
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
            "distribution: recipe=lambda ref: Normal(0.0, 0.02) if ref.tensor.dim() > 1 else None"
        )
    if _RECIPES.get(name) is called:
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
    base = next((part.name for pattern, part in chain if pattern == "*"), "torch")
    special = [pattern for pattern, _ in chain if pattern != "*"]

    def prepare(view: View) -> Chooser:
        names = [name for ref in view.refs for name in ref.names]
        fits = {pattern: compile_pattern(pattern, names) for pattern, _ in chain}
        for pattern, fit in fits.items():
            if not any(map(fit, names)):
                raise ValueError(f"{where}: no parameter is called {pattern!r}; patterns are globs or names of modules")
        prepared = [(fits[pattern], part(view), part.asks_parts) for pattern, part in chain]
        default = torch()(view)

        def choose(ref: TensorRef) -> FillSpec | Refused | None:
            whole = view.wholes.get(id(ref.tensor))
            for fit, part, asks_parts in prepared:
                if whole is not None and not asks_parts and any(map(fit, whole.names)):
                    continue  # the rule is for the weight that this is a part of
                if any(map(fit, ref.names)) and (found := part(ref)) is not None:
                    return found
            return default(ref)

        return choose

    advice = next((part.advice for _, part in chain if part.advice), "")
    of_buffers = next((part.prepare_buffers for pattern, part in chain if pattern == "*"), None)
    return NamedRecipe(
        f"{base} with rules for {', '.join(special)}" if special else base, prepare, of_buffers, advice, True
    )
