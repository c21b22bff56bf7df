"""The recipe that init_model_ fits to a batch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from initlab.kernels import Normal

from .fans import compute_fans, holds_experts, is_embedding
from .naming import TensorRef
from .parametrized import norm_of_weight
from .recipe_parts import Chooser, NamedRecipe, RecipeLike, View, by_default, zero_bias
from .refusals import only_value
from .resolving import based_on, resolve
from .specs import FillSpec, Refused, constant_fill, whole_fill


def lsuv(base: RecipeLike = "orthogonal") -> NamedRecipe:
    """Layer-sequential unit variance: each weight scaled so that its layer's output has variance 1 on your own batch.

    `init_model_(model, seed, recipe="lsuv", batch=batch)` draws all parameters, runs the model on the batch, and scales
    one weight after the other in the order in which they are used. Factors are powers of 2^(1/32), and are folded into
    the distributions: the report, given as a recipe, fills any copy of the model with the same values.

    Layers are the products that a pass calls, wherever their weights are kept: Linear, convolutions, transposed ones,
    Bilinear, nn.MultiheadAttention's projections one by one, parameters in F.linear, matmul and einsum, and embeddings.
    A weight that is used several times is scaled for all uses together, and one that is an embedding too as a head. Of
    weight_norm the norms g are scaled, which start as one number. The layers that end L residual branches of one stream
    get a variance of 1/L each, so that the stream grows by 1 in all.

    The model runs in the mode that it is in, without dropout and without gradients; batch norms normalise by the batch
    where they train. What the passes change is put back.

    Args:
        base: what is scaled: "orthogonal", matrices that normal draws make, with biases 0, a parameter that no code
            explains as the one value that it has, and all else as "torch"; or a recipe. "lecun" has normal weights,
            whose bits do not depend on a library's factorisation, and which a sharded model can be filled with.

    Source:
        D. Mishkin and J. Matas, "All you need is a good init", 2015. Residual branches: B. Hanin and D. Rolnick, "How
        to Start Training", 2018; S. De and S. L. Smith, "Batch Normalization Biases Residual Blocks", 2020.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> data = 100 * torch.rand(256, 64)
        >>> report = initlab.init_model_(model, seed=0, recipe="lsuv", batch=data)
        >>> 0.9 < model(data).var().item() < 1.1
        True
    """
    rest = None if base == "orthogonal" else resolve(base)

    def prepare(view: View) -> Chooser:
        made = {id(whole) for whole in view.wholes.values()}
        chosen = (lambda ref: None) if rest is None else rest(view)

        def choose(ref: TensorRef) -> FillSpec | Refused | None:
            whole = view.wholes.get(id(ref.tensor))
            if whole is not None:
                is_norm = norm_of_weight(ref)
                if is_norm:
                    return replace(constant_fill(1.0, f"{whole.owner}, norms of weight_norm"), fitted="always")
                return None if is_norm is None else chosen(whole) or _start(view, whole, rest is None)
            spec = chosen(ref) or _start(view, ref, rest is None)
            fitted = _fitted(ref, spec)
            if not isinstance(spec, FillSpec) or not fitted:
                return spec
            if id(ref) in made:
                return Refused("parameters make this weight up, and a factor on them need not be one on the weight")
            if spec.program is not None:
                return spec if fitted == "if a weight" else Refused("its values are computed, and have no scale to fit")
            return replace(spec, fitted=fitted)

        return choose

    name = "lsuv" if rest is None else based_on("lsuv", rest)
    of_buffers, advice = (None, "") if rest is None else (rest.prepare_buffers, rest.advice)
    return NamedRecipe(name, prepare, of_buffers, advice, asks_parts=True)


def _fitted(ref: TensorRef, spec: FillSpec | Refused | None) -> Literal["", "if a weight", "always"]:
    if compute_fans(ref.module, ref.attribute, ref.tensor, ref.module_name) is not None or is_embedding(ref.module):
        return "always"
    if isinstance(spec, FillSpec) and spec.why == _UNKNOWN:
        return "always"
    return "if a weight" if ref.tensor.dim() > 1 else ""


_UNKNOWN = "used as a weight"


def _start(view: View, ref: TensorRef, orthogonal: bool) -> FillSpec | Refused | None:
    """The distribution of a parameter before it is scaled."""
    counted = compute_fans(ref.module, ref.attribute, ref.tensor, ref.module_name)
    if counted is not None:
        return _normal(ref, counted.fan_in, ref.owner, orthogonal)
    found = zero_bias(ref)
    if found is None and not holds_experts(ref.module, ref.attribute, ref.tensor):
        found = by_default(view, ref)
        if found is None and view.is_unreadable(ref):
            return None
    if found is None and (value := only_value(ref.tensor)) is not None:
        found = constant_fill(float(value), "the value that all of it has")
    if found is not None:
        return found
    if ref.tensor.dim() == 0 or ref.tensor.numel() == 0:
        return None
    fan = ref.tensor.numel() / ref.tensor.shape[0]
    return replace(_normal(ref, fan, _UNKNOWN, orthogonal), fan=None, guess=True)


def _normal(ref: TensorRef, fan: float, why: str, orthogonal: bool) -> FillSpec:
    spec = whole_fill(Normal(0.0, 1.0 / math.sqrt(max(1.0, fan))), why, fan)
    return replace(spec, orthogonal=orthogonal and ref.tensor.dim() > 1 and ref.tensor.numel() > 0)
