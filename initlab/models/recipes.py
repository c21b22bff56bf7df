"""Which distribution each parameter of a model gets: the recipes of init_model_.

A recipe is a name, what a function of the same name here returns for other settings, a function from TensorRef to
distribution, or a mapping from name patterns to any of these or to distributions. Here are those that go by the layer
itself; those for residual branches are in transformer_recipes.py, muP in maximal_update.py, what is fitted to data in
fitted_recipes.py.
"""

import math
from dataclasses import replace
from typing import Literal, TypeAlias

from torch.nn.init import calculate_gain

from initlab.kernels import TruncatedNormal

from .activations import Activation, activations_after
from .checking import MetaWrites
from .fans import Fans, compute_fans
from .fitted_recipes import lsuv
from .maximal_update import mup
from .naming import TensorRef
from .recipe_parts import (
    RECORD_IT,
    Chooser,
    DistributionName,
    NamedRecipe,
    View,
    as_number,
    by_default,
    by_fan,
    centred,
    every_weight,
    guess_by_name,
    refuse_unknown_experts,
    with_small_heads,
    with_std,
    zero_bias,
)
from .recording import read_init_weights, read_public_starts
from .rerunning import Stage, start_mismatch
from .resolving import NAMED, resolve
from .specs import FillSpec, Refused, whole_fill
from .transformer_recipes import deepnorm, depth_scaled, gpt2, mitchell, small_embedding, zero_residual

__all__ = [
    "auto",
    "deepnorm",
    "depth_scaled",
    "gpt2",
    "he",
    "lecun",
    "lsuv",
    "mitchell",
    "mup",
    "own",
    "resolve",
    "small_embedding",
    "torch",
    "trunc_normal",
    "xavier",
    "zero_residual",
]

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
    return NamedRecipe("torch", lambda view: lambda ref: by_default(view, ref), advice=RECORD_IT)


_UNCHECKED = (
    "\nIf the model has been trained, loaded, filled or given new memory (to_empty) since it was built, its values say "
    "nothing of its start: "
    "recipe=initlab.recipes.own(check=False)"
)


def own(check: bool = True) -> NamedRecipe:
    """What the model's own code does: reset_parameters of every module, then `_init_weights`, then `init_weights()`.

    This is the order in which transformers and timm start a model. What a constructor itself draws cannot be read, so
    the values that are there are compared with what was read: constants by value, random numbers by exact tests of
    their scale and shape. What cannot be from that distribution is refused, at a level at which one untouched model in
    10,000 would be. On the meta device, where there are no values, the writes in place are counted instead, and more
    than the code that was read explains are refused. `initlab.record_build()` needs neither reading nor guessing.

    Args:
        check: False leaves the comparison out: for a model that has been trained, loaded, filled otherwise or given new
            memory (to_empty) since it was built, whose values say nothing of its start.

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

    return NamedRecipe("own", prepare, advice=RECORD_IT + (_UNCHECKED if check else ""))


_STAGES: tuple[tuple[Stage, ...], ...] = (("resets", "init_weights", "public"), ("resets", "init_weights"))


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
    gain = as_number(gain, "gain")
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
    distribution = TruncatedNormal(0.0, as_number(std, "std"), as_number(a, "a"), as_number(b, "b"))
    return NamedRecipe("trunc_normal", lambda view: every_weight(view, lambda ref: whole_fill(distribution, ref.owner)))


def auto() -> NamedRecipe:
    """Each weight by the activation that follows it: He before ReLU's family, Xavier before tanh and sigmoid, LeCun
    before SELU.

    In an nn.Sequential what follows is read off the order of modules, skipping normalisation, dropout, pooling and
    reshaping. Anywhere else it is read off the source of forward functions, where modules and functions count alike
    (transformers' `act_fn`, `F.relu`), or else guessed from the order of modules; the report marks both. Where no
    activation is seen before the next weight, the weight keeps the distribution of "torch", and the report says so.
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

    def prepare(view: View) -> Chooser:
        after = activations_after(view.model)
        before_one = {module for module, _ in after}

        def choose(ref: TensorRef) -> FillSpec | Refused | None:
            counted = compute_fans(ref.module, ref.attribute, ref.tensor, ref.module_name)
            if counted is None:
                experts = refuse_unknown_experts(ref)
                return experts or (zero_bias(ref) if id(ref.module) in before_one else None) or by_default(view, ref)
            activation = after.get((id(ref.module), ref.attribute))
            if activation is not None:
                return replace(_start(activation, counted), guess=not activation.certain)
            default = by_default(view, ref)
            return default and replace(default, why=f"no activation seen: {ref.owner}'s own distribution")

        return with_small_heads(choose)

    return NamedRecipe("auto", prepare)


def _start(activation: Activation, counted: Fans) -> FillSpec:
    start, name = activation.start, activation.name
    if start.recipe == "xavier":
        return centred("uniform", start.gain, (counted.fan_in + counted.fan_out) / 2, f"Xavier, before {name}")
    by = "He" if start.recipe == "he" else "LeCun"
    return centred("normal", start.gain, counted.fan_in, f"{by}, before {name}")


NAMED.update(
    {
        "torch": torch,
        "own": own,
        "he": he,
        "xavier": xavier,
        "lecun": lecun,
        "gpt2": gpt2,
        "trunc_normal": trunc_normal,
        "auto": auto,
        "depth_scaled": depth_scaled,
        "mitchell": mitchell,
        "deepnorm": deepnorm,
        "small_embedding": small_embedding,
        "zero_residual": zero_residual,
        "lsuv": lsuv,
    }
)
