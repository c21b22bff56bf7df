"""muP: a start and learning rates that keep their meaning as a model grows wider, read off a narrower one.

Nothing is added to the model, so this is muP in the form without multipliers (table 3 of the paper): the outputs' small
scale lies in their start and their learning rate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import nn

from initlab.kernels import Constant

from .._console import listing, warn
from .arithmetic import affine
from .fans import Fans, compute_fans, is_embedding
from .naming import Names, TensorRef, tensor_refs
from .recipe_parts import (
    Chooser,
    NamedRecipe,
    RecipeLike,
    View,
    as_number,
    is_head,
    keep_padding,
    short_repr,
    with_small_heads,
)
from .resolving import DEFAULT, based_on, resolve
from .specs import DimSlice, FillSpec, Refused

Family: TypeAlias = Literal["adam", "sgd"]


class Growth(NamedTuple):
    """How much wider a layer is than in the base model.

    Args:
        role: "hidden", "input", "output", "vector" or "fixed", by which of a weight's sides grow.
        fan_in: factor on the connections that meet in an output.
        fan_out: factor on those that an input reaches.
    """

    role: str
    fan_in: float = 1.0
    fan_out: float = 1.0

    @property
    def std(self) -> float:
        """Factor on the standard deviation of the start."""
        return 1 / self.fan_in if self.role == "output" else 1 / math.sqrt(self.fan_in)

    def learning_rate(self, optimizer: Family) -> float:
        """Factor on the learning rate."""
        return 1 / self.fan_in if optimizer == "adam" else self.fan_out / self.fan_in


class _Base(NamedTuple):
    """What is known of a parameter of the base model."""

    shape: tuple[int, ...]
    fans: Fans | None
    spec: FillSpec | Refused | None


@dataclass(frozen=True)
class MupRecipe(NamedRecipe):
    """What `mup` returns: a recipe, and the learning rates that belong to it.

    Args:
        base: by name, the parameters of the base model: shapes, fans and distributions. The model itself is not kept.
    """

    base: Mapping[str, _Base] = field(default_factory=dict, repr=False)

    def param_groups(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float | None = None,
        optimizer: Family = "adam",
        names: Names | None = None,
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, each with its learning rate.

        Args:
            model: the one to train; each of its parameters that requires grad is in one group.
            lr: the learning rate of the base model.
            weight_decay: that of the base model. Each group's is divided by its factor on the learning rate, so that
                a step shrinks all weights alike: torch's AdamW multiplies the two. None leaves it to the optimizer.
            optimizer: "adam" for what divides gradients by their size (Adam, AdamW, Lion, Adafactor), "sgd" for SGD.
            names: as for init_model_.

        Raises:
            ValueError: for another optimizer, or listing parameters that cannot be compared with the base model.

        Example:
            >>> import torch, initlab
            >>> def build(width):
            ...     return torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
            >>> groups = initlab.recipes.mup(build(16)).param_groups(build(64), lr=0.1, weight_decay=0.01)
            >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
            [(3, 0.1, 0.01), (1, 0.025, 0.04)]
        """
        if optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer is {short_repr(optimizer)}; it must be 'adam', AdamW's too, or 'sgd'")
        lr = as_number(lr, "lr")
        by_factor: dict[float, list[Any]] = {}
        refused = []
        for ref in tensor_refs(model, names)[0]:
            growth = self.growth(ref)
            if isinstance(growth, Refused):
                refused.append(f"{ref.name} (in {ref.owner}): {growth.why}")
            elif ref.tensor.requires_grad:
                by_factor.setdefault(growth.learning_rate(optimizer), []).append(ref.tensor)
        if refused:
            raise ValueError(f"{len(refused)} parameters have no learning rate under muP:{listing(refused)}")
        groups = [{"params": tensors, "lr": lr * factor} for factor, tensors in by_factor.items()]
        if weight_decay is not None:
            decay = as_number(weight_decay, "weight_decay")
            for group, factor in zip(groups, by_factor, strict=True):
                group["weight_decay"] = decay / factor
        return groups

    def growth(self, ref: TensorRef) -> Growth | Refused:
        """How much wider a parameter is than in the base model."""
        base, shape = self.base.get(ref.name), tuple(ref.tensor.shape)
        if base is None:
            return Refused("the base model has no parameter of this name; it must differ in widths only")
        if len(base.shape) != len(shape):
            return Refused(f"it has {len(shape)} dimensions, and {len(base.shape)} in the base model")
        ratios = [new / old if old else 1.0 for new, old in zip(shape, base.shape, strict=True)]
        if is_head(ref):
            return Growth("output" if ratios[-1] != 1 else "fixed", ratios[-1])
        if any(is_embedding(module) for module, _ in ref.places):
            return Growth("input" if ratios[-1] != 1 else "fixed", 1.0, ratios[-1])
        changed = [ratio for ratio in ratios if ratio != 1]
        if not changed:
            return Growth("fixed")
        if len(shape) == 1:
            return Growth("vector", 1.0, ratios[0])
        fans = compute_fans(ref.module, ref.attribute, ref.tensor, ref.module_name)
        if fans is not None and base.fans is not None:
            fan_in, fan_out = fans.fan_in / base.fans.fan_in, fans.fan_out / base.fans.fan_out
            role = "input" if fan_in == 1 else "output" if fan_out == 1 else "hidden"
            return Growth(role, fan_in, fan_out)
        if len(changed) == 1:  # positions, class tokens, scales of heads
            return Growth("vector", 1.0, changed[0])
        return Refused("two of its dimensions grow, and which of them is its input is not known")


def mup(base: nn.Module, recipe: RecipeLike = DEFAULT) -> MupRecipe:
    """muP: the start of a narrower model, carried over to a wider one, with the learning rates that belong to it.

    Widths are read by comparing shapes with the base model, parameter by parameter, by name. With m the factor by which
    a fan_in has grown, the std of hidden weights is divided by sqrt(m), that of outputs by m; inputs, embeddings,
    biases and norms keep the base model's distribution. `param_groups` gives the learning rates: under Adam divided by
    m for hidden weights and outputs. A model as wide as the base starts by `recipe`, unchanged.

    What muP asks of the model itself cannot be done from here: attention must divide by the width of a head, not its
    root, where that width grows; with more heads of one width nothing is needed. A head tied to its embedding has two
    roles at once. It is started and trained as an output, with a warning: for muP in full, untie it.

    Args:
        base: the same model, narrower; of equal depth, and so of equal names. It may lie on the meta device.
        recipe: of the base model.

    Returns:
        A recipe, with a method `param_groups(model, lr)`. It holds no model.

    Raises:
        TypeError: if base is no module.

    Source:
        G. Yang et al., "Tensor programs V: Tuning large neural networks via zero-shot hyperparameter transfer", 2022,
        arXiv 2203.03466, table 3.

    Example:
        >>> import torch, initlab
        >>> def build(width):
        ...     return torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
        >>> with torch.device("meta"):
        ...     base = build(16)
        >>> recipe, model = initlab.recipes.mup(base, "he"), build(64)
        >>> for row in initlab.init_model_(model, seed=0, recipe=recipe).rows[::2]:
        ...     print(f"{row.name}: {row.std:.4g}, {row.why}")
        0.weight: 0.5, muP input, 4 times the base: Linear
        2.weight: 0.08839, muP output, 4 times the base: Linear
        >>> optimizer = torch.optim.AdamW(recipe.param_groups(model, lr=0.1))
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.1, 0.025]
    """
    if not isinstance(base, nn.Module):
        raise TypeError(
            f"base is {short_repr(base)}; it must be the same model, narrower: recipes.mup(build(width=128))"
        )
    refs, of_base = tensor_refs(base)[0], resolve(recipe)
    choose = of_base(View(base, refs, stage=False))
    known: dict[str, _Base] = {}
    for ref in refs:
        fans = compute_fans(ref.module, ref.attribute, ref.tensor, ref.module_name)
        found = choose(ref)
        known[ref.name] = _Base(
            tuple(ref.tensor.shape), fans, keep_padding(ref, found) if isinstance(found, FillSpec) else found
        )
    return MupRecipe(based_on("mup", of_base), _Prepare(known), of_base.prepare_buffers, of_base.advice, base=known)


@dataclass(frozen=True)
class _Prepare:
    """Gives, for a model, the function that chooses the spec of each parameter. A class, so that it can be pickled."""

    base: Mapping[str, _Base]

    def __call__(self, view: View) -> Chooser:
        recipe = MupRecipe("mup", self, base=self.base)

        def choose(ref: TensorRef) -> FillSpec | Refused | None:
            growth = recipe.growth(ref)
            if isinstance(growth, Refused):
                return growth
            before = self.base[ref.name]
            if not isinstance(before.spec, FillSpec):
                return before.spec or Refused("nothing is known of it in the base model")
            fills = []
            for part, distribution in before.spec.fills:
                if growth.std != 1 and not isinstance(distribution, Constant):
                    distribution = affine(distribution, growth.std, 0.0)
                fills.append((None if part is None else _grown(part, before.shape, ref.tensor.shape), distribution))
            if is_head(ref):
                warn(
                    f"recipe 'mup': {ref.name} is the head as well as the embedding, and muP scales the two "
                    "differently; it starts and trains as a head. Untie them for muP in full"
                )
            fan = compute_fans(ref.module, ref.attribute, ref.tensor, ref.module_name)
            factor = growth.fan_in if growth.fan_in != 1 else growth.fan_out
            wider = f"muP {growth.role}, {factor:g} times the base: " if factor != 1 else ""
            return replace(
                before.spec, fills=tuple(fills), fan=fan and fan.fan_in, why=wider + before.spec.why, copy_of=""
            )

        return with_small_heads(choose)


def _grown(part: DimSlice, before: tuple[int, ...], after: Any) -> DimSlice:
    """A slice of the base model's parameter, as it lies in a wider one."""
    old, new = before[part.dim], after[part.dim]
    return DimSlice(part.dim, part.start * new // old, part.length * new // old)
