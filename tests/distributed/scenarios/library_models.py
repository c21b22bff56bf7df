"""Models of transformers under FSDP2, from the meta device, computed starts included: the bits of one process."""

import warnings
from collections.abc import Callable

import torch
from ranks import on
from scenarios.filling import same
from torch import nn
from torch.distributed.fsdp import fully_shard

import initlab

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}
CONFIGS: dict[str, dict[str, object]] = {
    "mamba": SIZES | {"state_size": 8},
    "falcon_mamba": SIZES | {"state_size": 8},
    "whisper": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 1,
    },
    "qwen3_next": HEADS
    | {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "rwkv": SIZES | {"attention_hidden_size": 32},
    "llama": HEADS,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64},
    "vit": HEADS | {"image_size": 16, "patch_size": 8},
    "bert": HEADS | {"max_position_embeddings": 32},
    "wav2vec2": HEADS
    | {"conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_conv_pos_embeddings": 8}
    | {"num_conv_pos_embedding_groups": 4, "feat_extract_norm": "layer", "num_feat_extract_layers": 2},
}


def builder(kind: str) -> Callable[[], nn.Module]:
    from transformers import CONFIG_MAPPING, AutoModel, logging

    logging.set_verbosity_error()
    return lambda: AutoModel.from_config(CONFIG_MAPPING[kind](**CONFIGS[kind]))


def sharded(model: nn.Module) -> nn.Module:
    """Each block of the outermost lists of blocks, then the rest."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        for block in module if isinstance(module, nn.ModuleList) and module not in inside else ():
            inside.update(block.modules())
            if any(True for _ in block.parameters()):
                fully_shard(block)
    fully_shard(model)
    return model


def check(kind: str) -> None:
    build = builder(kind)
    warnings.simplefilter("ignore")
    with initlab.record_build() as recorded, torch.device("meta"):
        model = build()
    model = sharded(model)
    report = initlab.init_model_(model, 5, recorded, device="cpu")
    parameters = dict(model.named_parameters())
    computed = {row.name for row in report.rows if row.source == "computed" and row.name in parameters}
    assert bool(computed) == (kind in COMPUTED), computed
    with initlab.record_build() as alone:
        expected = build()
    initlab.init_model_(expected, 5, alone)
    same(model, expected)


COMPUTED = {"mamba", "falcon_mamba", "whisper", "qwen3_next", "rwkv", "wav2vec2"}


@on(2, 4)
def computed_starts() -> None:
    for kind in CONFIGS:
        if kind in COMPUTED:
            check(kind)


@on(2, 4)
def other_starts() -> None:
    for kind in CONFIGS:
        if kind not in COMPUTED:
            check(kind)
