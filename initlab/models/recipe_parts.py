"""What recipes are made of: a model as a recipe sees it, and the rules that several recipes share."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

from torch import nn

from initlab.kernels import Constant, Distribution, Normal, TruncatedNormal, Uniform

from .fans import Fans, compute_fans, has_weight_matrix, holds_experts, is_embedding
from .layers import padding_row
from .naming import TensorRef
from .recording import read_init_weights, read_resets
from .rerunning import Stage, computed_starts
from .specs import ONES, ZEROS, FillSpec, InitTrace, Refused, whole_fill

DistributionName: TypeAlias = Literal["normal", "uniform", "truncated_normal"]


RECORD_IT = (
    ", or record the build, which sees what no code that can be read tells:\n"
    "    with initlab.record_build() as build:\n"
    "        model = ...  # as it was built\n"
    "    initlab.init_model_(model, seed, recipe=build)"
)
"""What helps where no code that can be read tells."""


class View:
    """A model, as a recipe sees it.

    Args:
        model: the model.
        refs: its parameters, also those that will not be filled.
        stage: whether the names are those of a larger model, of which this is a part.
        wholes: by the id of a parameter that makes up another weight, as in weight_norm, that weight.
    """

    def __init__(
        self, model: nn.Module, refs: Sequence[TensorRef], stage: bool, wholes: Mapping[int, TensorRef] | None = None
    ) -> None:
        self.model = model
        self.refs = refs
        self.stage = stage
        self.wholes = wholes or {}
        self._computed: dict[tuple[Stage, ...], dict[int, FillSpec | str]] = {}

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

    def computed(self, ref: TensorRef, trace: InitTrace, *stages: Stage) -> FillSpec | Refused | None:
        """What the model's own code, of which a trace was read, computes for a parameter."""
        if stages not in self._computed:
            self._computed[stages] = computed_starts(self.model, self.refs, stages, trace.failed)
        found = self._computed[stages].get(id(ref.tensor))
        return Refused(found) if isinstance(found, str) else found

    def is_unreadable(self, ref: TensorRef) -> bool:
        """Whether the model's own code writes a parameter in a way that is no distribution."""
        return id(ref.tensor) in self.resets.unreadable or id(ref.tensor) in self.init_weights.unreadable

    def unreadable(self, ref: TensorRef) -> str:
        """Why the model's own code gives no distribution for a parameter."""
        reasons = [trace.unreadable.get(id(ref.tensor)) for trace in (self.resets, self.init_weights)]
        return next(filter(None, reasons), "no code of the model that initlab can read writes it")


Chooser: TypeAlias = Callable[[TensorRef], FillSpec | Refused | None]
Recipe: TypeAlias = Callable[[View], Chooser]
DistributionOf: TypeAlias = Callable[[TensorRef], Distribution | None]
RecipeLike: TypeAlias = "str | NamedRecipe | Distribution | DistributionOf | Mapping[str, Any]"


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe with the name that reports give it; called with a View it gives the function from refs to specs.

    Args:
        name: its name.
        prepare: gives, for a model, the function that chooses the spec of each parameter.
        prepare_buffers: the same for buffers; None leaves them to reset_parameters.
        advice: what else can be done where it refuses, for the message.
        asks_parts: whether it has specs for the parameters that make up a weight, such as a weight_norm's v and g. All
            others are asked for the weight instead.
    """

    name: str
    prepare: Recipe
    prepare_buffers: Callable[[View], Callable[[TensorRef], FillSpec | None]] | None = None
    advice: str = ""
    asks_parts: bool = False

    def __call__(self, view: View) -> Chooser:
        """The function that gives each parameter of the view its spec."""
        return self.prepare(view)

    def for_buffers(self, view: View) -> Callable[[TensorRef], FillSpec | None]:
        """The function that gives each buffer its spec."""
        if self.prepare_buffers is None:
            return lambda ref: view.resets.complete(ref.tensor)
        return self.prepare_buffers(view)


def keep_padding(ref: TensorRef, found: FillSpec) -> FillSpec:
    """The spec with zeros in the padding row, where the parameter is the weight of an embedding that has one."""
    if found.exact:
        return found
    if is_embedding(ref.module) and ref.attribute == "weight" and ref.module.padding_idx is not None:
        row = (padding_row(ref.module), ZEROS)
        if row not in found.fills and ref.tensor.shape[0] > 0:
            return replace(found, fills=(*found.fills, row))
    return found


def by_default(view: View, ref: TensorRef) -> FillSpec | None:
    """What the recipe "torch" gives a parameter; None where it has nothing."""
    found = view.resets.complete(ref.tensor) or view.init_weights.complete(ref.tensor)
    if found is not None:
        return found
    if not view.is_unreadable(ref):
        return guess_by_name(ref)
    if id(ref.tensor) in view.resets.unreadable:
        computed = view.computed(ref, view.resets, "resets")
    else:
        computed = view.computed(ref, view.init_weights, "init_weights")
    return computed if isinstance(computed, FillSpec) else None


def guess_by_name(ref: TensorRef) -> FillSpec | None:
    """1 for the weight of what is called a norm, 0 for what is called a bias; None for anything else."""
    if ref.tensor.dim() == 1 and ref.attribute == "weight" and "norm" in ref.owner.lower():
        return whole_fill(ONES, f"{ref.owner} is called a norm", guess=True)
    if ref.tensor.dim() == 1 and ref.attribute == "bias":
        return whole_fill(ZEROS, "called a bias", guess=True)
    return None


def is_head(ref: TensorRef) -> bool:
    """Whether a parameter is both the weight of an embedding and that of a linear layer: a head tied to it."""
    if len(ref.places) < 2:
        return False
    owners = [module for module, attribute in ref.places if attribute == "weight"]
    return any(map(is_embedding, owners)) and any(
        compute_fans(module, "weight", ref.tensor) is not None for module in owners
    )


def head_std(ref: TensorRef) -> float:
    """The largest std of an embedding that is a head too, with which a first loss is near ln(classes).

    What reaches the head has been normalised, to a length of sqrt(width), and may still point where the embedding of
    its own token does. Then that token's logit is width * std, whatever the token to be predicted is: std 0.02 makes
    it 15 at a width of 768, where ln(1,000) is 6.9. std = 4 / width makes it 4 at most, and the std of the others
    4 / sqrt(width).
    """
    return 4.0 / max(1, ref.tensor.shape[-1])


def with_small_heads(choose: Chooser) -> Chooser:
    """As `choose`, with a std of at most `head_std` for embeddings that are heads too."""

    def chosen(ref: TensorRef) -> FillSpec | Refused | None:
        found = choose(ref)
        if found is None or isinstance(found, Refused) or found.program is not None or not is_head(ref):
            return found
        part, old = found.fills[0]
        std = head_std(ref)
        if part is not None or old.stddev <= std:
            return found
        new = replace(old, std=std) if isinstance(old, TruncatedNormal) else Normal(0.0, std)
        return replace(found, fills=((None, new), *found.fills[1:]), fan=None, why="embedding and head, 4 / width")

    return chosen


def by_fan(name: str, measure: Callable[[Fans], tuple[float, float]], distribution: DistributionName) -> NamedRecipe:
    """Weights with std = gain / sqrt(fan), where `measure` gives (fan, gain); their biases 0, all else as "torch"."""

    def prepare(view: View) -> Chooser:
        def choose(ref: TensorRef) -> FillSpec | Refused | None:
            counted = compute_fans(ref.module, ref.attribute, ref.tensor, ref.module_name)
            if counted is not None:
                fan, gain = measure(counted)
                return centred(distribution, gain, fan, ref.owner)
            return refuse_unknown_experts(ref) or zero_bias(ref) or by_default(view, ref)

        return with_small_heads(choose)

    return NamedRecipe(name, prepare)


def refuse_unknown_experts(ref: TensorRef) -> Refused | None:
    """For experts in one parameter that says nowhere which of its dimensions are inputs; None for anything else."""
    if not holds_experts(ref.module, ref.attribute, ref.tensor):
        return None
    return Refused(
        f"the weights of experts in one parameter of shape {' x '.join(map(str, ref.tensor.shape))}, and nothing says "
        "which dimension is their input"
    )


def every_weight(view: View, distribution: Callable[[TensorRef], FillSpec]) -> Chooser:
    """`distribution` for every weight and embedding, and, as a guess, for whatever else has two dimensions or more.

    No guess is made against the model's own code where that sets a parameter to a constant, or computes it.
    """

    def choose(ref: TensorRef) -> FillSpec | None:
        if ref.tensor.dim() < 2:
            return zero_bias(ref) or by_default(view, ref)
        if is_embedding(ref.module) or compute_fans(ref.module, ref.attribute, ref.tensor) is not None:
            return distribution(ref)
        default = by_default(view, ref)
        if default is None and view.is_unreadable(ref):
            return None
        if default is not None and isinstance(default.distribution, Constant | None):
            return default
        return replace(distribution(ref), guess=True)

    return with_small_heads(choose)


def zero_bias(ref: TensorRef) -> FillSpec | None:
    """Zero for the one-dimensional parameters of a module that has a weight matrix."""
    if ref.tensor.dim() != 1 or "bias" not in ref.attribute:
        return None
    return whole_fill(ZEROS, ref.owner) if has_weight_matrix(ref.module) else None


# Standard deviation of a standard normal cut at 2 sigma: sqrt(1 - 4 pdf(2) / (2 cdf(2) - 1)).
_CUT = 2.0
_CUT_STD = 0.87962566103423978


def with_std(std: float, distribution: str) -> Distribution:
    """The distribution of that kind with mean 0 and this standard deviation."""
    if distribution == "normal":
        return Normal(0.0, std)
    if distribution == "uniform":
        return Uniform(-math.sqrt(3.0) * std, math.sqrt(3.0) * std) if std else ZEROS
    if distribution == "truncated_normal":
        before = std / _CUT_STD  # of the normal that is cut
        return TruncatedNormal(0.0, before, -_CUT * before, _CUT * before) if std else ZEROS
    raise ValueError(f"distribution is {distribution!r}; it must be 'normal', 'uniform' or 'truncated_normal'")


def centred(distribution: DistributionName, gain: float, fan: float, why: str) -> FillSpec:
    """The spec with mean 0 and std = gain / sqrt(fan); zeros where the fan is 0."""
    return whole_fill(with_std(gain / math.sqrt(fan), distribution) if fan else ZEROS, why, fan)


def short_repr(value: object) -> str:
    """A value and its type for a message; of long values the type only."""
    text = repr(value)
    return f"{text} ({type(value).__name__})" if len(text) <= 40 and "\n" not in text else f"a {type(value).__name__}"


def as_number(value: Any, name: str) -> float:
    """A setting as a float, or an error that names it."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a number")
