"""Models of timm, torchvision, transformers, diffusers, peft and torchtitan, small enough to be built five times.

Each is a function without arguments. A package that is not installed has no models here.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import nn

Build = Callable[[], nn.Module]

TIMM = """
    resnet18 resnet50 resnetv2_50 resnet26d resnext50_32x4d seresnet50 skresnet18 res2net50_26w_4s regnety_002
    regnetx_002 efficientnet_b0 efficientnetv2_rw_t mobilenetv2_050 mobilenetv3_small_050 mnasnet_small
    ghostnet_050 densenet121 dla34 dpn68 vgg11 vgg11_bn inception_v3 inception_v4 xception41 nasnetalarge
    hrnet_w18_small selecsls42 tresnet_m nfnet_l0 dm_nfnet_f0 convnext_atto convnextv2_atto convmixer_768_32
    poolformer_s12 vit_tiny_patch16_224 vit_relpos_small_patch16_224 deit_tiny_patch16_224
    deit_tiny_distilled_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 beitv2_base_patch16_224
    eva02_tiny_patch14_224 cait_xxs24_224 xcit_nano_12_p16_224 crossvit_tiny_240 coat_tiny coatnet_nano_rw_224
    maxvit_pico_rw_256 levit_128s swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swin_s3_tiny_224
    twins_svt_small pvt_v2_b0 pit_ti_224 tnt_s_patch16_224 visformer_tiny mixer_s32_224 gmixer_12_224
    resmlp_12_224 gmlp_ti16_224 edgenext_xx_small mobilevit_xxs mobilevitv2_050 efficientformer_l1
    efficientformerv2_s0 fastvit_t8 repvit_m0_9 tiny_vit_5m_224 volo_d1_224 sequencer2d_s focalnet_tiny_srf
    davit_tiny gcvit_xxtiny inception_next_tiny mambaout_femto hiera_tiny_224 hgnet_tiny rdnet_tiny
    repghostnet_050 cspresnet50 darknet53 eca_nfnet_l0 gernet_s repvgg_a0 starnet_s1 shvit_s1
    mobilenetv4_conv_small test_vit test_resnet test_convnext test_byobnet naflexvit_base_patch16_gap
"""

TORCHVISION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t
    mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf resnet18 resnet50 shufflenet_v2_x0_5 squeezenet1_0
    swin_t swin_v2_t vgg11 vgg11_bn vit_b_32
"""


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def timm_models() -> dict[str, Build]:
    """timm's by name; images and depths are the library's own."""
    import timm

    known = set(timm.list_models())
    return {f"timm {n}": lambda n=n: timm.create_model(n) for n in TIMM.split() if n in known}


def torchvision_models() -> dict[str, Build]:
    """torchvision's classifiers, without weights."""
    from torchvision import models

    extra = {"inception_v3": {"init_weights": True}, "googlenet": {"init_weights": True}}
    return {
        f"torchvision {n}": lambda n=n: getattr(models, n)(weights=None, **extra.get(n, {}))
        for n in TORCHVISION.split()
    }


def _torchvision() -> None:
    """Lets torchvision be imported where its compiled operators do not fit this torch: no model here uses them."""
    try:
        import torchvision
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
        import torchvision  # noqa: F401


SMALL: dict[str, Any] = dict.fromkeys(
    (
        "num_hidden_layers",
        "encoder_layers",
        "decoder_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "num_decoder_layers",
    ),
    2,
) | {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "word_embed_proj_dim", "embedding_size"), 64
    ),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "ffn_dim"), 128),
    **dict.fromkeys(
        ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "n_head", "n_heads", "num_heads"),
        4,
    ),
    **dict.fromkeys(("vocab_size", "text_vocab_size"), 128),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), 0),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "eos_token_id": 1,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "moe_intermediate_size": 32,
}

TRANSFORMERS = """
    albert audio_spectrogram_transformer bart beit bert bert-generation big_bird bigbird_pegasus blenderbot bloom
    camembert canine codegen cohere convbert convnext convnextv2 ctrl data2vec-text data2vec-vision deberta
    deberta-v2 deit dinov2 distilbert dpr electra ernie esm falcon fnet focalnet gemma gemma2 glm gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj granite hiera hubert ibert imagegpt jetmoe led levit lilt
    llama longformer luke m2m_100 mamba mamba2 marian markuplm mbart megatron-bert mistral mixtral mobilebert
    mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 modernbert mpnet mpt mra mt5 mvp nemotron nystromformer olmo
    olmo2 opt pegasus phi phi3 plbart poolformer prophetnet pvt pvt_v2 qwen2 qwen2_moe qwen3 recurrent_gemma
    regnet rembert resnet roberta roberta-prelayernorm roc_bert roformer rwkv segformer speech_to_text splinter
    squeezebert stablelm starcoder2 swin swin2sr swinv2 switch_transformers t5 timesformer umt5 unispeech vit
    vit_mae vit_msn vivit wav2vec2 wavlm whisper xglm xlm xlm-roberta xlnet xmod yolos yoso
"""


def transformers_models() -> dict[str, Build]:
    """One base model for each type of configuration, its sizes cut by name."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoModel

    transformers.logging.set_verbosity_error()

    def build(kind: str) -> nn.Module:
        config = CONFIG_MAPPING[kind]()
        for name, size in SMALL.items():
            if isinstance(getattr(config, name, None), int):
                try:
                    setattr(config, name, size)
                except (AttributeError, NotImplementedError):  # worked out from others
                    continue
        if isinstance(vars(config).get("layer_types"), list):
            config.layer_types = config.layer_types[:2]
        model: nn.Module = AutoModel.from_config(config)
        return model

    return {f"transformers {kind}": lambda kind=kind: build(kind) for kind in TRANSFORMERS.split()}


def diffusers_models() -> dict[str, Build]:
    """diffusers' small UNets, VAEs, transformers and a ControlNet."""
    import diffusers as d

    unet = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "attention_head_dim": 8,
    }
    up = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    control = {k: v for k, v in unet.items() if k != "sample_size"}
    control["conditioning_embedding_out_channels"] = (16, 32)
    small = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    return {
        "diffusers UNet2D": lambda: d.UNet2DModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        "diffusers UNet2DCondition": lambda: d.UNet2DConditionModel(**unet, **up),
        "diffusers ControlNet": lambda: d.ControlNetModel(**control),
        "diffusers AutoencoderKL": lambda: d.AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        "diffusers VQModel": lambda: d.VQModel(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        "diffusers DiT": lambda: d.DiTTransformer2DModel(**small, in_channels=4, sample_size=8),
        "diffusers PixArt": lambda: d.PixArtTransformer2DModel(
            **small, sample_size=8, cross_attention_dim=16, caption_channels=16
        ),
        "diffusers SD3": lambda: d.SD3Transformer2DModel(
            **small,
            sample_size=8,
            in_channels=4,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=16,
        ),
        "diffusers Flux": lambda: d.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
        "diffusers Prior": lambda: d.PriorTransformer(**small, embedding_dim=16, num_embeddings=7),
        "diffusers T5Film": lambda: d.UNet1DModel(
            block_out_channels=(8, 16),
            extra_in_channels=8,
            layers_per_block=1,
            sample_size=64,
            down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
            up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
        ),
    }


def peft_models() -> dict[str, Build]:
    """Adapters on a tiny Llama or BERT, each built together with its body."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    def body() -> nn.Module:
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=128,
                max_position_embeddings=64,
            )
        )

    targets = {"target_modules": ["q_proj", "v_proj"]}
    causal = {"task_type": "CAUSAL_LM"}
    configs: dict[str, Callable[[], Any]] = {
        "LoRA": lambda: peft.LoraConfig(r=4, **targets),
        "LoRA gaussian": lambda: peft.LoraConfig(r=4, init_lora_weights="gaussian", **targets),
        "LoRA random B": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **targets),
        "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **targets),
        "LoHa": lambda: peft.LoHaConfig(r=4, **targets),
        "LoKr": lambda: peft.LoKrConfig(r=4, **targets),
        "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **targets),
        "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "VeRA": lambda: peft.VeraConfig(r=4, **targets),
        "OFT": lambda: peft.OFTConfig(oft_block_size=8, **targets),
        "Prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **causal),
        "Prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **causal),
        "P-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=32, **causal),
    }
    return {f"peft {n}": lambda c=c: peft.get_peft_model(body(), c()) for n, c in configs.items()}


def torchtitan_models() -> dict[str, Build]:
    """torchtitan's debug models, started by its own init_states."""

    def build(name: str) -> nn.Module:
        family = importlib.import_module(f"torchtitan.models.{name}")
        model: Any = family.model_registry("debugmodel").model.build()
        model.init_states()
        built: nn.Module = model
        return built

    return {f"torchtitan {name}": lambda name=name: build(name) for name in ("llama3", "qwen3", "deepseek_v3")}


GROUPS: dict[str, Callable[[], dict[str, Build]]] = {
    "transformers": transformers_models,
    "timm": timm_models,
    "torchvision": torchvision_models,
    "diffusers": diffusers_models,
    "peft": peft_models,
    "torchtitan": torchtitan_models,
}


def models(groups: list[str]) -> dict[str, Build]:
    """The models of these packages, as far as they are installed."""
    found: dict[str, Build] = {}
    if _installed("torchvision"):
        _torchvision()
    for group in groups:
        if _installed(group):
            found |= GROUPS[group]()
    return found
