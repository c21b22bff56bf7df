"""Recipes for deep models with residual branches: GPT-2's, and what larger models have used since.

Each says by its own rule how small a branch starts, so that a sum over many of them keeps its size.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from initlab.kernels import Normal, TruncatedNormal, Uniform

from .fans import Fans, compute_fans, is_conv1d, is_embedding, is_fused_qkv
from .naming import TensorRef
from .recipe_parts import (
    Chooser,
    NamedRecipe,
    RecipeLike,
    View,
    as_number,
    by_default,
    every_weight,
    refuse_unknown_experts,
    with_small_heads,
    zero_bias,
)
from .residual import (
    RESIDUAL,
    as_patterns,
    block_indices,
    blocks_around,
    count_blocks,
    last_norms,
    layer_count,
    residual_layers,
    warn_without_residual,
)
from .resolving import DEFAULT, based_on, resolve
from .specs import ZEROS, DimSlice, FillSpec, Refused, whole_fill


def gpt2(std: float = 0.02, layers: int | None = None, residual: str | Sequence[str] = RESIDUAL) -> NamedRecipe:
    """GPT-2's: weights and embeddings normal with one std, smaller where a layer adds to the residual stream.

    Args:
        std: of every weight of two dimensions or more.
        layers: L, the blocks of the whole model; weights in residual layers have std / sqrt(2 L). None takes it from
            `model.config` (num_hidden_layers or n_layer) or else counts the numbered blocks that hold such layers.
        residual: name patterns of those layers, one or several; () for none. The names that are known are in
            docs/models.md. A UserWarning tells where blocks were found and no such layer.

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
    plain = Normal(0.0, as_number(std, "std"))
    known = None if layers is None else layer_count(layers)
    patterns = as_patterns(residual)

    def prepare(view: View) -> Chooser:
        inside = residual_layers(view, patterns)
        if not inside and patterns:
            warn_without_residual(view, "gpt2", patterns)
        blocks, source = (
            (known, "given")
            if known is not None
            else count_blocks(view, "gpt2", blocks_around(view.model, inside.values()))
        )
        scaled = Normal(0.0, plain.std / math.sqrt(2 * blocks)) if blocks else plain

        def distribution(ref: TensorRef) -> FillSpec:
            if blocks and id(ref) in inside:
                return whole_fill(scaled, f"residual layer, 1/sqrt(2 * {blocks}), L {source}")
            return whole_fill(plain, ref.owner)

        return every_weight(view, distribution)

    return NamedRecipe("gpt2", prepare)


def depth_scaled(std: float = 0.02, residual: str | Sequence[str] = RESIDUAL) -> NamedRecipe:
    """Weights and embeddings truncated normal, smaller the deeper a residual layer lies: std / sqrt(2 (l + 1)).

    l is the number of blocks before a layer's own, so that each branch adds as much to the stream as those before it
    leave room for. torchtitan's Llama 3 starts so; it scales its `w3` too, residual=(*patterns, "*.w3"), and gives
    embeddings std 1 and the head 1 / sqrt(width).

    Args:
        std: of the normal distribution before it is cut, on [-2, 2], of every weight of two dimensions or more.
        residual: as for `gpt2`.

    Biases of weights are 0, all else as "torch".

    Raises:
        ValueError: if std is not positive.

    Source:
        B. Zhang, I. Titov and R. Sennrich, "Improving deep transformer with depth-scaled initialization and merged
        attention", 2019; torchtitan, `depth_scaled_std`.

    Example:
        >>> import torch, initlab
        >>> block = torch.nn.TransformerEncoderLayer(8, 2, 32)
        >>> model = torch.nn.TransformerEncoder(block, num_layers=2, enable_nested_tensor=False)
        >>> report = initlab.init_model_(model, seed=0, recipe="depth_scaled")
        >>> [round(row.std, 4) for row in report.rows if row.name.endswith("linear2.weight")]
        [0.0141, 0.01]
    """
    plain = TruncatedNormal(0.0, as_number(std, "std"), -2.0, 2.0)
    return _scaled_by_depth(
        "depth_scaled", lambda ref, fans: (plain.std, ref.owner), lambda std: replace(plain, std=std), residual
    )


def mitchell(residual: str | Sequence[str] = RESIDUAL) -> NamedRecipe:
    """OLMo's: weights truncated normal at 3 sigma, 1 / sqrt(fan_in), residual layers / sqrt(2 (l + 1)) on top.

    Embeddings have 1 / sqrt(width).

    Args:
        residual: as for `gpt2`.

    Biases of weights are 0, all else as "torch".

    Source:
        D. Groeneveld et al., "OLMo: Accelerating the science of language models", 2024, and its published code,
        `InitFnType.mitchell`, suggested by M. Wortsman.

    Example:
        >>> import torch, initlab
        >>> block = torch.nn.TransformerEncoderLayer(8, 2, 32)
        >>> model = torch.nn.TransformerEncoder(block, num_layers=2, enable_nested_tensor=False)
        >>> rows = initlab.init_model_(model, seed=0, recipe="mitchell").rows
        >>> [round(row.distribution.std, 4) for row in rows if row.name.endswith("linear2.weight")]
        [0.125, 0.0884]
    """

    def std(ref: TensorRef, fans: Fans | None) -> tuple[float, str]:
        width = ref.tensor.shape[-1] if fans is None else fans.fan_in
        return 1 / math.sqrt(max(1, width)), f"{ref.owner}, 1/sqrt({width:g})"

    return _scaled_by_depth("mitchell", std, lambda std: TruncatedNormal(0.0, std, -3 * std, 3 * std), residual)


def _scaled_by_depth(
    name: str,
    std_of: Callable[[TensorRef, Fans | None], tuple[float, str]],
    cut: Callable[[float], TruncatedNormal],
    residual: str | Sequence[str],
) -> NamedRecipe:
    patterns = as_patterns(residual)

    def prepare(view: View) -> Chooser:
        inside = residual_layers(view, patterns)
        if not inside and patterns:
            warn_without_residual(view, name, patterns)
        indices = block_indices(view, inside)

        def distribution(ref: TensorRef) -> FillSpec:
            fans = compute_fans(ref.module, ref.attribute, ref.tensor, ref.module_name)
            std, why = std_of(ref, fans)
            if id(ref) in indices:
                depth = indices[id(ref)] + 1
                std, why = std / math.sqrt(2 * depth), f"{why}, residual layer, 1/sqrt(2 * {depth})"
            fan = fans.fan_in if fans is not None and name == "mitchell" else None
            return whole_fill(cut(std), why, fan)

        choose = every_weight(view, distribution)
        if name != "mitchell":
            return choose

        def with_known_fans(ref: TensorRef) -> FillSpec | Refused | None:
            known = compute_fans(ref.module, ref.attribute, ref.tensor, ref.module_name) is not None
            return (None if known else refuse_unknown_experts(ref)) or choose(ref)

        return with_known_fans

    return NamedRecipe(name, prepare)


def deepnorm(
    layers: int | None = None, encoder_layers: int | None = None, residual: str | Sequence[str] = RESIDUAL
) -> NamedRecipe:
    """DeepNorm's, for post-norm models of up to 1,000 layers: Xavier normal, in blocks with gain beta but for q and k.

    It is half of a scheme: the model itself must compute `norm(alpha * x + branch(x))`. The report gives alpha and beta
    with each weight of a block. For one stack of L blocks alpha = (2 L)^(1/4), beta = (8 L)^(-1/4). For an encoder of N
    and a decoder of M: 0.81 (N^4 M)^(1/16) and 0.87 (N^4 M)^(-1/16), and (3 M)^(1/4) and (12 M)^(-1/4).

    Args:
        layers: L or M, the blocks of the whole model, or of its decoder; None counts them.
        encoder_layers: N, where there are an encoder and a decoder; None counts them where both names occur.
        residual: as for `gpt2`; blocks are what numbers the modules around these layers.

    Biases of weights are 0, all else as "torch". Of a fused projection the rows of v have gain beta; where heads are
    interleaved in it (`query_key_value`), or its parts are not equal, it is refused.

    Raises:
        ValueError: if a number of layers is none; in use, if there are no blocks, or a stage leaves them to be counted.

    Source:
        H. Wang et al., "DeepNet: Scaling transformers to 1,000 layers", 2022, figure 2.

    Example:
        >>> import torch, initlab
        >>> block = torch.nn.TransformerEncoderLayer(8, 2, 32)
        >>> model = torch.nn.TransformerEncoder(block, num_layers=2, enable_nested_tensor=False)
        >>> row = initlab.init_model_(model, seed=0, recipe="deepnorm").rows[4]
        >>> print(row.name, row.why)
        layers.0.linear1.weight Linear, beta 0.5 for a model with norm(1.414 * x + branch(x))
    """
    given = None if layers is None else layer_count(layers)
    given_encoder = None if encoder_layers is None else layer_count(encoder_layers)
    patterns = as_patterns(residual)

    def prepare(view: View) -> Chooser:
        blocks = blocks_around(view.model, residual_layers(view, patterns).values())
        counted = None if given is not None or not blocks else count_blocks(view, "deepnorm", blocks)[0]
        if not blocks:
            raise ValueError(
                "recipe 'deepnorm' found no blocks: none of the model's layers is called "
                f"{', '.join(pattern.removeprefix('*.') for pattern in patterns)}; name those at the end of a residual "
                "branch, recipe=initlab.recipes.deepnorm(residual='*.down')"
            )
        encoder = {block for block in blocks if "encoder" in block} if any("decoder" in b for b in blocks) else set()
        n = given_encoder if given_encoder is not None else len(encoder)
        m = given if given is not None else len(blocks - encoder) if encoder else counted
        assert m is not None

        def constants(block: str) -> tuple[float, float]:
            if not n:
                return (2 * m) ** 0.25, (8 * m) ** -0.25
            if "encoder" in block and "decoder" not in block:
                return 0.81 * (n**4 * m) ** (1 / 16), 0.87 * (n**4 * m) ** (-1 / 16)
            return (3 * m) ** 0.25, (12 * m) ** -0.25

        def choose(ref: TensorRef) -> FillSpec | Refused | None:
            fans = compute_fans(ref.module, ref.attribute, ref.tensor, ref.module_name)
            if fans is None:
                return refuse_unknown_experts(ref) or zero_bias(ref) or by_default(view, ref)
            std, fan = math.sqrt(2 / max(1, fans.fan_in + fans.fan_out)), (fans.fan_in + fans.fan_out) / 2
            block = next((name for name in blocks if f"{ref.module_name}.".startswith(f"{name}.")), None)
            name = f"{ref.module_name}.{ref.attribute}"
            if block is None or _QUERY_OR_KEY(name):
                return whole_fill(Normal(0.0, std), ref.owner, fan)
            alpha, beta = constants(block)
            why = f"{ref.owner}, beta {beta:.4g} for a model with norm({alpha:.4g} * x + branch(x))"
            spec = whole_fill(Normal(0.0, beta * std), why, fan)
            if not is_fused_qkv(ref.module, ref.attribute, ref.module_name):
                return spec
            dim = 1 if is_conv1d(ref.module) else 0
            if "query_key_value" in name or ref.tensor.shape[dim] != 3 * ref.tensor.shape[1 - dim]:
                return Refused(
                    "DeepNorm starts query and key otherwise than value, and the parts of this fused projection are "
                    "interleaved or not equal"
                )
            size = ref.tensor.shape[dim] // 3
            return replace(spec, fills=(*spec.fills, (DimSlice(dim, 0, 2 * size), Normal(0.0, std))))

        return with_small_heads(choose)

    return NamedRecipe("deepnorm", prepare)


_QUERY_OR_KEY = re.compile(
    r"(^|\.)(q|k|query|key|wq|wk|to_q|to_k|q_lin|k_lin|q_proj|k_proj|q_proj_weight|k_proj_weight)(\.weight)?$"
).search


def small_embedding(scale: float = 1e-4, recipe: RecipeLike = DEFAULT) -> NamedRecipe:
    """Embeddings uniform on [-scale, scale], for a model that normalises right after them; all else by another recipe.

    A small embedding turns at the first steps, where one of std 1 is moved by a learning rate's worth.

    Args:
        scale: the largest value.
        recipe: of everything else.

    Raises:
        ValueError: if scale is not positive; in use, if there is no embedding.

    Source:
        B. Peng, "SmallInitEmb", 2022, used by RWKV: B. Peng et al., "RWKV: Reinventing RNNs for the transformer era",
        2023, 3.4.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
        >>> report = initlab.init_model_(model, seed=0, recipe="small_embedding")
        >>> [str(row.distribution) for row in report.rows]
        ['uniform[-0.0001, 0.0001)', '1', '0', 'uniform[-0.5, 0.5)', 'uniform[-0.5, 0.5)']
    """
    scale = as_number(scale, "scale")
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be positive and finite")
    rest = resolve(recipe)

    def prepare(view: View) -> Chooser:
        if not any(is_embedding(module) for ref in view.refs for module, _ in ref.places):
            raise ValueError("recipe 'small_embedding' found no torch.nn.Embedding in the model")
        others = rest(view)

        def choose(ref: TensorRef) -> FillSpec | Refused | None:
            if any(is_embedding(module) for module, _ in ref.places):
                return whole_fill(Uniform(-scale, scale), f"{ref.owner}, small")
            return others(ref)

        return choose

    return NamedRecipe(based_on("small_embedding", rest), prepare, rest.prepare_buffers, rest.advice)


def zero_residual(residual: str | Sequence[str] = RESIDUAL, recipe: RecipeLike = DEFAULT) -> NamedRecipe:
    """Every residual branch starts at zero, by its last layer or last norm; all else by another recipe.

    So a block is the identity at first, however many there are. Zero are the layers at the end of branches, known by
    name, and in ResNets the last batch norm of a block, bn2 or bn3. Where a norm comes after such a layer and before
    the sum (Gemma 2, OLMo 2), name that norm: behind a layer of zeros it would divide by nearly nothing.

    Args:
        residual: name patterns of those layers or norms, one or several.
        recipe: of everything else.

    Raises:
        ValueError: in use, if the model has no such layer.

    Source:
        P. Goyal et al., "Accurate, large minibatch SGD", 2017, 5.1; H. Zhang, Y. Dauphin and T. Ma, "Fixup
        initialization", 2019.

    Example:
        >>> import torch, initlab
        >>> block = torch.nn.TransformerEncoderLayer(8, 2, 32)
        >>> model = torch.nn.TransformerEncoder(block, num_layers=2, enable_nested_tensor=False)
        >>> report = initlab.init_model_(model, seed=0, recipe=initlab.recipes.zero_residual(recipe="xavier"))
        >>> [row.name for row in report.rows if row.why == "end of a residual branch" and "layers.1" in row.name][::2]
        ['layers.1.self_attn.out_proj.weight', 'layers.1.linear2.weight']
    """
    rest, patterns = resolve(recipe), as_patterns(residual)

    def prepare(view: View) -> Chooser:
        inside = {id(ref.tensor) for ref in residual_layers(view, patterns).values()}
        norms = last_norms(view.model) if patterns is RESIDUAL else []
        inside |= {id(tensor) for norm in norms for tensor in norm._parameters.values() if tensor is not None}
        if not inside:
            raise ValueError(
                "recipe 'zero_residual' found nothing to set to zero: no layer of the model is called "
                f"{', '.join(pattern.removeprefix('*.') for pattern in patterns)}; name those at the end of a residual "
                "branch, recipe=initlab.recipes.zero_residual(residual='*.down')"
            )
        others = rest(view)

        def choose(ref: TensorRef) -> FillSpec | Refused | None:
            return whole_fill(ZEROS, "end of a residual branch") if id(ref.tensor) in inside else others(ref)

        return with_small_heads(choose)

    return NamedRecipe(based_on("zero_residual", rest), prepare, rest.prepare_buffers, rest.advice)
