"""fuse_linear_relu on models of other people: every ReLU that follows a Linear alone, and what watch then sees.

Each case names the layers to be fused: what a reader of the library's code finds, written before ours ran.
"""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import initlab

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]

IDS = torch.arange(10).view(2, 5)
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # a GEMM's own: the values are of one size


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
    )
    return OPTForCausalLM(config), {"input_ids": IDS}, r"model\.decoder\.layers\.\d\.fc1"


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), {"input_ids": IDS, "labels": IDS}, r".*\.DenseReluDense\.wi"


def detr():
    from transformers.models.detr.modeling_detr import DetrMLPPredictionHead

    return DetrMLPPredictionHead(16, 32, 4, 3), torch.randn(2, 16), r"layers\.[01]"


def sam():
    from transformers.models.sam.modeling_sam import SamFeedForward

    return SamFeedForward(16, 32, 4, 4), torch.randn(2, 16), r"proj_in|layers\.\d"


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 16), r"layers\.\d\.linear1"


def dlrm():
    """Dense and sparse features, their products, and an MLP on top; as in Naumov et al., 2019."""

    class DLRM(nn.Module):
        def __init__(self):
            super().__init__()
            self.bottom = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU())
            self.tables = nn.ModuleList(nn.EmbeddingBag(20, 8, mode="sum") for _ in range(3))
            self.top = nn.Sequential(nn.Linear(8 + 6, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid())

        def forward(self, dense, sparse):
            x = self.bottom(dense)
            parts = torch.stack([x, *(table(sparse[:, i : i + 1]) for i, table in enumerate(self.tables))], 1)
            products = torch.bmm(parts, parts.mT)
            i, j = torch.tril_indices(4, 4, -1)
            return self.top(torch.cat([x, products[:, i, j]], 1))

    return DLRM(), (torch.randn(3, 13), torch.randint(20, (3, 3))), r"bottom\.[02]|top\.0"


def vision_mlp():
    """torchvision.ops.MLP's shape: an nn.Sequential with norms and dropouts."""

    class MLP(nn.Sequential):
        def __init__(self):
            super().__init__(
                *(nn.Linear(12, 16), nn.LayerNorm(16), nn.ReLU(inplace=True), nn.Dropout(0.1)),
                *(nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(16, 4), nn.Dropout(0.1)),
            )

    return MLP(), torch.randn(3, 12), "4"


def nanochat():
    """A GPT's block with squared ReLU."""

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_fc, self.c_proj = nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False)

        def forward(self, x):
            x = self.c_fc(x)
            x = F.relu(x).square()
            return self.c_proj(x)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out, self.mlp = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False), MLP()

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(F.rms_norm(x, (16,))).chunk(3, -1))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            return x + self.mlp(F.rms_norm(x, (16,)))

    return nn.Sequential(Block(), Block()), torch.randn(2, 5, 16), r"\d\.mlp\.c_fc"


CASES = (opt, t5, detr, sam, encoder, dlrm, vision_mlp, nanochat)


def call(model, batch):
    torch.manual_seed(1)  # of the dropouts
    y = model(**batch) if isinstance(batch, dict) else model(*(batch if isinstance(batch, tuple) else (batch,)))
    return y if isinstance(y, torch.Tensor) else y.logits


def cast(batch, dtype):
    if isinstance(batch, torch.Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    return type(batch)(cast(x, dtype) for x in batch) if isinstance(batch, tuple) else batch


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_forward_and_gradients(case, dtype, training, with_example):
    torch.manual_seed(0)
    model, batch, names = case()
    model, batch = model.to(dtype).train(training), cast(batch, dtype)
    before = copy.deepcopy(model)
    report = initlab.fuse_linear_relu(model, batch if with_example else None)
    linears = [name for name, module in before.named_modules() if isinstance(module, nn.Linear)]
    assert set(report.fused) == {name for name in linears if re.fullmatch(names, name)}
    assert {*report.fused, *report.skipped} == set(linears)
    assert bool(report.notes) == (case in (detr, nanochat))  # where code calls F.relu
    results = []
    for m in (model, before):
        y = call(m, batch)
        y.square().mean().backward()
        results.append([y, *(p.grad for p in m.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for ours, theirs in zip(*results, strict=True):
        size = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=RTOL[dtype], atol=RTOL[dtype] * size)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_is_planted_before_a_relu_is_flagged_and_named(case, bad):
    torch.manual_seed(0)
    model, batch, _ = case()
    model.eval()
    report = initlab.fuse_linear_relu(model)
    for name in report.fused:
        layer = model.get_submodule(name)
        layer.flags = torch.zeros(1, dtype=torch.int32)
        place = layer.weight if layer.bias is None else layer.bias
        kept = place.detach().clone()
        with torch.no_grad():
            place.view(-1)[0] = bad
        with initlab.watch(model) as watching:
            call(model, batch)
        fault = watching.report().fault
        assert (fault.module, fault.cause) == (name, "parameter")
        assert int(layer.flags) != 0
        with torch.no_grad():
            place.copy_(kept)
        layer.flags = None
    with initlab.watch(model) as watching:
        call(model, batch)
    assert watching.report().fault is None
