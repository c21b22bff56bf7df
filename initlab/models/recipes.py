"""Which distribution each parameter of a model gets: the recipes of init_model_.

A recipe is a name ("torch", "own", "he", "xavier", "lecun", "gpt2", "trunc_normal", "auto"), what a function of the
same name here returns for other settings, a function from TensorRef to distribution, or a mapping from name patterns to any of
these or to distributions.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.nn.init import calculate_gain

from initlab.kernels import Constant, Distribution, Normal, TruncatedNormal, Uniform

from ..nn import LinearReLU
from .layers import ONES, ZEROS, Fans, FillSpec, InitTrace, fans, is_embedding, padding, spec
from .naming import TensorRef, matches, walk
from .recording import read_init_weights, read_resets

DistributionName: TypeAlias = Literal["normal", "uniform", "truncated_normal"]
FanMode: TypeAlias = Literal["fan_in", "fan_out"]


class View:
    """A model, as a recipe sees it.

    Args:
        model: the model.
        refs: its parameters, also those that will not be filled.
        stage: whether the names are those of a larger model, of which this is a part.
    """

    def __init__(self, model: nn.Module, refs: Sequence[TensorRef], stage: bool) -> None:
        self.model = model
        self.refs = refs
        self.stage = stage

    @cached_property
    def resets(self) -> InitTrace:
        """What calling reset_parameters of every module, children first, would write."""
        trace = InitTrace()
        read_resets(self.model, trace)
        return trace

    @cached_property
    def init_weights(self) -> InitTrace:
        """What `_init_weights(module)`, where the model has one, would write."""
        trace = InitTrace()
        read_init_weights(self.model, trace)
        return trace

    def is_unreadable(self, ref: TensorRef) -> bool:
        """Whether the model's own code writes a parameter in a way that is no distribution."""
        return id(ref.tensor) in self.resets.unreadable or id(ref.tensor) in self.init_weights.unreadable

    def unreadable(self, ref: TensorRef) -> str:
        """Why the model's own code gives no distribution for a parameter."""
        reasons = [trace.unreadable.get(id(ref.tensor)) for trace in (self.resets, self.init_weights)]
        return next(filter(None, reasons), "no code of the model that initlab can read writes it")


Recipe: TypeAlias = Callable[[View], Callable[[TensorRef], FillSpec | None]]
DistributionOf: TypeAlias = Callable[[TensorRef], Distribution | None]
RecipeLike: TypeAlias = "str | NamedRecipe | Distribution | DistributionOf | Mapping[str, Any]"


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe with the name that reports give it; called with a View it gives the function from refs to specs."""

    name: str
    prepare: Recipe

    def __call__(self, view: View) -> Callable[[TensorRef], FillSpec | None]:
        """The function that gives each parameter of the view its spec."""
        return self.prepare(view)


# ---------------------------------------------------------------------------------------------------------------
# Recipes


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
    return NamedRecipe("torch", lambda view: lambda ref: _by_default(view, ref))


def own() -> NamedRecipe:
    """What the model's own code does: reset_parameters of every module, then `_init_weights` of the model.

    This is the order in which transformers and timm start a model. What a constructor itself draws cannot be read.

    Example:
        >>> import torch, initlab
        >>> class Model(torch.nn.Sequential):
        ...     def _init_weights(self, module):
        ...         if isinstance(module, torch.nn.Linear):
        ...             torch.nn.init.normal_(module.weight, std=0.02)
        >>> report = initlab.init_model_(Model(torch.nn.Linear(4, 2)), seed=0, recipe="own")
        >>> [row.distribution for row in report.rows]
        [Normal(mean=0.0, std=0.02), Uniform(low=-0.5, high=0.5)]
    """

    def prepare(view: View) -> Callable[[TensorRef], FillSpec | None]:
        trace = view.resets.copy()  # the view's own trace is asked for buffers, and must not be read twice
        read_init_weights(view.model, trace)
        return lambda ref: trace.complete(ref.tensor) or _guess(ref) if id(ref.tensor) not in trace.unreadable else None

    return NamedRecipe("own", prepare)


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
        K. He, X. Zhang, S. Ren and J. Sun, "Delving deep into rectifiers", 2015. Fans: initlab.layers.fans.

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
    _with_std(1.0, distribution)
    return _by_fan("he", lambda f: (getattr(f, mode), gain), distribution)


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
    if not 0.0 <= gain < math.inf:
        raise ValueError(f"gain is {gain}; it must be finite and not negative")
    _with_std(1.0, distribution)
    return _by_fan("xavier", lambda f: ((f.fan_in + f.fan_out) / 2, gain), distribution)


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
    _with_std(1.0, distribution)
    return _by_fan("lecun", lambda f: (f.fan_in, 1.0), distribution)


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
        residual: name patterns of those layers.

    Biases of weights are 0, all else as "torch".

    Raises:
        RuntimeError: if std is negative.
        ValueError: in use, if a stage (`names=`) leaves L to be counted: a part would count its own blocks only.

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
    plain = Normal(0.0, std)

    def prepare(view: View) -> Callable[[TensorRef], FillSpec | None]:
        blocks, source = layers, "given"
        if blocks is None:
            config = getattr(view.model, "config", None)
            known = (getattr(config, name, None) for name in ("num_hidden_layers", "n_layer"))
            blocks, source = next((n for n in known if isinstance(n, int)), None), "of model.config"
        if blocks is None:
            found = _blocks(view, [ref for ref in view.refs if _within(ref, residual)])
            if found and view.stage:
                raise ValueError(
                    f"recipe 'gpt2' scales residual layers by 1/sqrt(2 L), and a stage shows {found} blocks, not the "
                    "whole model's L; pass recipe=initlab.recipes.gpt2(layers=L)"
                )
            blocks, source = found, "counted"

        def distribution(ref: TensorRef) -> FillSpec:
            if blocks and _within(ref, residual):
                scaled = Normal(0.0, std / math.sqrt(2 * blocks))
                return spec(scaled, f"residual layer, 1/sqrt(2 * {blocks}), L {source}")
            return spec(plain, ref.owner)

        return _every_weight(view, distribution)

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
    distribution = TruncatedNormal(0.0, std, a, b)
    return NamedRecipe("trunc_normal", lambda view: _every_weight(view, lambda ref: spec(distribution, ref.owner)))


def auto() -> NamedRecipe:
    """Each weight by the activation that follows it: He before ReLU's family, Xavier before tanh and sigmoid, LeCun
    before SELU.

    What follows is read off the order of modules, skipping normalisation, dropout, pooling and reshaping. In an
    nn.Sequential that order is the order of use; anywhere else it is a guess, and the report marks it. Where no
    activation module is seen before the next weight, the weight keeps the distribution of "torch", and the report says so.
    Biases of the weights that do get a distribution by their activation are 0, all else is as "torch".

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
        following = _following(view.model)

        def choose(ref: TensorRef) -> FillSpec | None:
            activation, certain = following.get(id(ref.module), (None, True))
            counted = fans(ref.module, ref.leaf, ref.tensor, ref.path)
            if activation is not None and counted is not None:
                return replace(_distribution_before(activation, counted), guess=not certain)
            if activation is not None and (zeros := _bias_of_a_weight(ref)) is not None:
                return zeros
            default = _by_default(view, ref)
            if default is None or counted is None:
                return default
            return replace(default, why=f"no activation seen: {ref.owner}'s own distribution")

        return choose

    return NamedRecipe("auto", prepare)


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


def resolve(recipe: RecipeLike) -> NamedRecipe:
    """The recipe that a caller means.

    Args:
        recipe: a name; a recipe made by a function of this module; a distribution for every parameter; a function that is given
            a TensorRef and returns a distribution, or None where it has none; or a mapping from name patterns to any of these. Of
            the patterns that match one of a parameter's names the first that has a distribution for it counts, and then
            "torch".

    Raises:
        ValueError: for a name that is not known.
        TypeError: for anything else.

    Example:
        >>> from initlab import recipes
        >>> from initlab.kernels import Constant
        >>> recipes.resolve({"*.bias": Constant(0.1), "*": "he"}).name
        'he with rules for *.bias'
    """
    if isinstance(recipe, NamedRecipe):
        return recipe
    if isinstance(recipe, str):
        if recipe not in _RECIPES:
            raise ValueError(f"recipe is {recipe!r}; it must be one of {', '.join(_RECIPES)}, a function or a mapping")
        return _RECIPES[recipe]()
    if isinstance(recipe, Uniform | Normal | TruncatedNormal | Constant):
        return NamedRecipe(str(recipe), lambda view: lambda ref: spec(recipe, "given"))
    if isinstance(recipe, Mapping):
        return _by_pattern(recipe)
    if callable(recipe):
        return _by_function(recipe)
    raise TypeError(
        f"recipe is a {type(recipe).__name__}; it must be a name, a distribution, a function from a TensorRef to a distribution, or "
        "a mapping from name patterns to any of these"
    )


def _by_function(function: DistributionOf) -> NamedRecipe:
    name = getattr(function, "__name__", type(function).__name__)

    def distribution(ref: TensorRef) -> FillSpec | None:
        given = function(ref)
        if given is not None and not isinstance(given, Uniform | Normal | TruncatedNormal | Constant):
            raise TypeError(f"recipe {name} returned {given!r} for {ref.name}; it must return a distribution or None")
        return None if given is None else spec(given, name)

    return NamedRecipe(name, lambda view: distribution)


def _by_pattern(patterns: Mapping[str, Any]) -> NamedRecipe:
    chain = [(pattern, resolve(part)) for pattern, part in patterns.items()]
    base = next((part.name for pattern, part in chain if pattern == "*"), "torch")
    special = [pattern for pattern, _ in chain if pattern != "*"]

    def prepare(view: View) -> Callable[[TensorRef], FillSpec | None]:
        idle = [p for p, _ in chain if not any(_selects(p, ref) for ref in view.refs)]
        if idle:
            raise ValueError(f"recipe: no parameter is called {idle[0]!r}; patterns are globs or names of modules")
        prepared = [(pattern, part(view)) for pattern, part in chain] + [("*", torch()(view))]

        def distribution(ref: TensorRef) -> FillSpec | None:
            found = (part(ref) for pattern, part in prepared if _selects(pattern, ref))
            return next((r for r in found if r is not None), None)

        return distribution

    return NamedRecipe(f"{base} with rules for {', '.join(special)}" if special else base, prepare)


def _selects(pattern: str, ref: TensorRef) -> bool:
    return any(matches(name, pattern) for name in ref.names)


# ---------------------------------------------------------------------------------------------------------------
# What several recipes share


def keep_padding(ref: TensorRef, found: FillSpec) -> FillSpec:
    """A spec that leaves the padding row of an embedding zero, whatever the others get."""
    if is_embedding(ref.module) and ref.leaf == "weight" and ref.module.padding_idx is not None:
        row = (padding(ref.module), ZEROS)
        if row not in found.fills and ref.tensor.shape[0] > 0:
            return replace(found, fills=(*found.fills, row))
    return found


def _by_default(view: View, ref: TensorRef) -> FillSpec | None:
    """The distribution of "torch"."""
    for read in (lambda: view.resets, lambda: view.init_weights):
        if (found := read().complete(ref.tensor)) is not None:
            return found
    return None if view.is_unreadable(ref) else _guess(ref)


def _guess(ref: TensorRef) -> FillSpec | None:
    if ref.tensor.dim() == 1 and ref.leaf == "weight" and "norm" in ref.owner.lower():
        return spec(ONES, f"{ref.owner} is called a norm", guess=True)
    if ref.tensor.dim() == 1 and ref.leaf == "bias":
        return spec(ZEROS, "called a bias", guess=True)
    return None


def _by_fan(name: str, measure: Callable[[Fans], tuple[float, float]], distribution: DistributionName) -> NamedRecipe:
    def prepare(view: View) -> Callable[[TensorRef], FillSpec | None]:
        def choose(ref: TensorRef) -> FillSpec | None:
            counted = fans(ref.module, ref.leaf, ref.tensor, ref.path)
            if counted is not None:
                fan, gain = measure(counted)
                return _centred(distribution, gain, fan, ref.owner)
            return _bias_of_a_weight(ref) or _by_default(view, ref)

        return choose

    return NamedRecipe(name, prepare)


def _every_weight(view: View, distribution: Callable[[TensorRef], FillSpec]) -> Callable[[TensorRef], FillSpec | None]:
    """`distribution` for every weight and embedding, and, as a guess, for whatever else has two dimensions or more.

    No guess is made against the model's own code where that sets a parameter to a constant, or computes it.
    """

    def choose(ref: TensorRef) -> FillSpec | None:
        if ref.tensor.dim() < 2:
            return _bias_of_a_weight(ref) or _by_default(view, ref)
        if is_embedding(ref.module) or fans(ref.module, ref.leaf, ref.tensor) is not None:
            return distribution(ref)
        default = _by_default(view, ref)
        computed = default is None and view.is_unreadable(ref)
        return (
            default
            if computed or (default and isinstance(default.distribution, Constant))
            else replace(distribution(ref), guess=True)
        )

    return choose


def _bias_of_a_weight(ref: TensorRef) -> FillSpec | None:
    """Zero for the one-dimensional parameters of a module that has a weight matrix."""
    if ref.tensor.dim() != 1 or "bias" not in ref.leaf:
        return None
    own = ref.module._parameters.items()
    if any(t is not None and fans(ref.module, leaf, t) is not None for leaf, t in own):
        return spec(ZEROS, ref.owner)
    return None


# Standard deviation of a standard normal cut at 2 sigma: sqrt(1 - 4 pdf(2) / (2 cdf(2) - 1)).
_CUT = 2.0
_CUT_STD = 0.87962566103423978


def _with_std(std: float, distribution: str) -> Distribution:
    """The centred distribution of a kind that has this standard deviation."""
    if distribution == "normal":
        return Normal(0.0, std)
    if distribution == "uniform":
        return Uniform(-math.sqrt(3.0) * std, math.sqrt(3.0) * std) if std else ZEROS
    if distribution == "truncated_normal":
        parent = std / _CUT_STD
        return TruncatedNormal(0.0, parent, -_CUT * parent, _CUT * parent) if std else ZEROS
    raise ValueError(f"distribution is {distribution!r}; it must be 'normal', 'uniform' or 'truncated_normal'")


def _within(ref: TensorRef, patterns: Iterable[str]) -> bool:
    """Whether a pattern names the module of a parameter, or the parameter itself, as experts in one tensor have it."""
    return any(matches(f".{ref.path}.{ref.leaf}", pattern) for pattern in patterns)


def _blocks(view: View, residual: list[TensorRef]) -> int:
    """The blocks that residual layers lie in: members of the outermost nn.ModuleList above each, or else of whatever
    numbers its members last on the way to it."""
    lists = {path for path, module in walk(view.model) if isinstance(module, nn.ModuleList)}
    found = set()
    for ref in residual:
        parts = ref.path.split(".")
        numbered = [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]
        in_lists = [path for path in numbered if path.rpartition(".")[0] in lists]
        found |= set(in_lists[:1] or numbered[-1:])
    return len(found)


# ---------------------------------------------------------------------------------------------------------------
# auto: the activation after a weight

_RELU_FAMILY = (nn.ReLU, nn.ReLU6, nn.ELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus)
_TANH_FAMILY = (nn.Tanh, nn.Hardtanh, nn.Tanhshrink, nn.Softsign)
_SIGMOID_FAMILY = (nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Softmax, nn.LogSoftmax)
_LEAKY = (nn.LeakyReLU, nn.PReLU, nn.RReLU)
_ACTIVATIONS = (*_RELU_FAMILY, *_TANH_FAMILY, *_SIGMOID_FAMILY, *_LEAKY, nn.SELU)
# Files of torch.nn.modules whose layers scale, drop, pool or reshape, and leave the next activation the next.
_SKIPPED = (
    *("batchnorm", "channelshuffle", "dropout", "flatten", "fold", "instancenorm", "normalization", "padding"),
    *("pixelshuffle", "pooling", "upsampling"),
)


def _distribution_before(activation: nn.Module, counted: Fans) -> FillSpec:
    name, fan_in = type(activation).__name__, counted.fan_in
    if isinstance(activation, (*_RELU_FAMILY, *_LEAKY)):  # before tanh's family: to torch, ReLU6 is a Hardtanh
        return _centred("normal", calculate_gain("leaky_relu", _slope(activation)), fan_in, f"He, before {name}")
    if isinstance(activation, nn.SELU):
        return _centred("normal", 1.0, fan_in, f"LeCun, before {name}")
    gain = calculate_gain("tanh") if isinstance(activation, _TANH_FAMILY) else 1.0
    return _centred("uniform", gain, (fan_in + counted.fan_out) / 2, f"Xavier, before {name}")


def _slope(activation: nn.Module) -> float:
    """The slope on the negative side, where there is one."""
    if isinstance(activation, nn.LeakyReLU):
        return activation.negative_slope
    if isinstance(activation, nn.PReLU):
        return activation.init
    if isinstance(activation, nn.RReLU):
        return (activation.lower + activation.upper) / 2
    return 0.0


def _centred(distribution: DistributionName, gain: float, fan: float, why: str) -> FillSpec:
    return spec(_with_std(gain / math.sqrt(fan), distribution) if fan else ZEROS, why, fan)


def _following(model: nn.Module) -> dict[int, tuple[nn.Module | None, bool]]:
    """For each module with a weight matrix: the activation after it, if one comes before the next weight, and whether
    both lie in one nn.Sequential, next to each other but for what is skipped."""
    parents = {id(child): module for _, module in walk(model) for child in module.children()}
    found: dict[int, tuple[nn.Module | None, bool]] = {}
    waiting: tuple[nn.Module, nn.Module | None] | None = None
    certain = True
    for _, module in walk(model):
        parent = parents.get(id(module))
        if isinstance(module, _ACTIVATIONS):
            if waiting is not None:
                layer, home = waiting
                in_order = isinstance(home, nn.Sequential) and type(home).forward is nn.Sequential.forward
                found.setdefault(id(layer), (module, certain and in_order and home is parent))
                waiting = None
        elif isinstance(module, LinearReLU):
            found[id(module)], waiting = (nn.ReLU(), True), None
        elif _has_weight(module):
            waiting, certain = (module, parent), True
        else:
            certain &= (
                type(module).__module__.removeprefix("torch.nn.modules.") in _SKIPPED or type(module) is nn.Identity
            )
    return found


def _has_weight(module: nn.Module) -> bool:
    return any(t is not None and fans(module, leaf, t) is not None for leaf, t in module._parameters.items())
