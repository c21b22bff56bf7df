"""Faults in transformers: rows of digits as tokens, or grey values as a small language."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import data
from .case import CROSS_ENTROPY, DIV, MATMUL, POW, SOFTMAX, STD, Built, Fault, planter, supervised

FAULTS: list[Fault] = []
fault = planter(FAULTS, "transformer")


class Attention(nn.Module):
    """Attention written out; `stable` subtracts the maximum before exp."""

    def __init__(self, width: int, heads: int, *, scaled: bool = True, own_softmax: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.scale = math.sqrt(width // heads) if scaled else 1.0
        self.own_softmax = own_softmax

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / self.scale
        if mask is not None:
            scores = scores + mask
        if self.own_softmax:
            weights = torch.exp(scores)
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            weights = torch.softmax(scores, -1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, width: int, heads: int, **attention: bool) -> None:
        super().__init__()
        self.norm1: nn.Module = nn.LayerNorm(width)
        self.attn = Attention(width, heads, **attention)
        self.norm2: nn.Module = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Rows of an image as tokens; `embed`, `pos`, `blocks`, `norm`, `head`."""

    def __init__(self, depth: int = 2, width: int = 32, **attention: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.pos = nn.Parameter(0.02 * torch.randn(1, 8, width))
        self.blocks = nn.ModuleList(Block(width, 4, **attention) for _ in range(depth))
        self.norm: nn.Module = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(x) + self.pos
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x).mean(1))


class Language(nn.Module):
    """A causal language model over 17 grey values; token 0 may be padding."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 32, padding_idx=padding)
        self.blocks = nn.ModuleList(Block(32, 4) for _ in range(2))
        self.norm: nn.Module = nn.LayerNorm(32)
        self.head = nn.Linear(32, 17)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        time = tokens.shape[1]
        mask = torch.full((time, time), -torch.inf).triu(1)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def rows(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = data.images(count)
    return x[:, 0], y


def text(count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of grey values as 16 tokens, and the next tokens."""
    x, _ = data.digits(count, raw=True)
    tokens = x[:, 16:33].long()
    return tokens[:, :-1].clone(), tokens[:, 1:].clone()


cross_entropy = supervised(nn.CrossEntropyLoss())


def next_token(model: Any, batch: Any) -> torch.Tensor:
    tokens, target = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), target.flatten())


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


def anywhere(depth: int) -> tuple[str, ...]:
    """Paths of the modules of a `Vit`: the fault sits in the whole network."""
    parts = ("", ".norm1", ".attn", ".attn.qkv", ".attn.out", ".norm2", ".mlp", ".mlp.0", ".mlp.1", ".mlp.2")
    return ("", "embed", "blocks", "norm", "head", *(f"blocks.{i}{part}" for i in range(depth) for part in parts))


# Input and target.


@fault("input", place={"feature": 4})
def nan_in_one_column(planted: bool = True) -> Built:
    # One sensor line of the scanner gives NaN in a few images.
    x, y = rows()
    if planted:
        x[[1, 8], 2, 4] = torch.nan
    model = Vit()
    return model, (x, y), cross_entropy, adam(model)


@fault("target", fixable=False)
def target_past_the_vocabulary(planted: bool = True) -> Built:
    # The tokenizer got new special tokens, the head was not resized.
    tokens, target = text()
    if planted:
        target[3, 5] = 17
    model = Language()
    return model, (tokens, target), next_token, adam(model)


# Starting weights.


@fault("weights", place={"module": anywhere(8)})
def residual_without_norm(planted: bool = True) -> Built:
    # N(0, 1) for every matrix and the norms taken out "for speed": each of 8 blocks multiplies the stream.
    x, y = rows(32)
    model = Vit(depth=8)
    if planted:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight)
            if isinstance(module, nn.LayerNorm):
                path, _, last = name.rpartition(".")
                setattr(model.get_submodule(path), last, nn.Identity())
    return model, (x, y), cross_entropy, sgd(model, 0.01)


@fault("weights", place={"module": anywhere(2)})
def all_zero(planted: bool = True) -> Built:
    # Zeros for every matrix, "as the paper does it" (it does so for the last one of each block).
    x, y = rows()
    model = Vit()
    if planted:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
    return model, (x, y), cross_entropy, sgd(model, 0.1)


# Operations.


class Masked(Vit):
    """Rows that are all padding are masked."""

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        mask = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)[:, None, None, :]
        return super().forward(x, mask)


@fault("operation", place={"module": "blocks.0.attn", "op": SOFTMAX}, fixable=False)
def row_of_padding_only(planted: bool = True) -> Built:
    # A sample with no token left after the masking: softmax over nothing but -inf.
    x, y = rows()
    keep = x.sum(-1) > 0
    keep[:, 0] = True
    if planted:
        keep[22] = False
    model = Masked()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch["rows"], batch["keep"]), batch["label"])

    return model, {"rows": x, "keep": keep, "label": y}, loss_fn, adam(model)


class TorchAttention(nn.Module):
    """torch's own attention over rows, with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return self.head((x + self.attn(x, x, x, key_padding_mask=padding)[0]).mean(1))


@fault("operation", place={"module": "attn", "op": (*SOFTMAX, "baddbmm", "bmm")}, fixable=False)
def key_padding_mask_of_ones(planted: bool = True) -> Built:
    # key_padding_mask with True for the tokens to keep (it wants True for padding): full rows are all masked.
    x, y = rows()
    padding = x.sum(-1) == 0
    padding[:, 7] = True
    model = TorchAttention()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, mask, target = batch
        return F.cross_entropy(model(inputs, mask), target)

    if planted:
        padding = ~padding
        padding[6] = True
    return model, (x, padding, y), loss_fn, adam(model)


@fault("operation", place={"module": "blocks.0.attn", "op": "exp"}, fixable=False)
def softmax_by_hand(planted: bool = True) -> Built:
    # exp(scores) without the maximum, and without 1 / sqrt(d): sharp heads of a checkpoint overflow.
    x, y = rows()
    model = Vit(scaled=False, own_softmax=planted)
    with torch.no_grad():
        model.blocks[0].norm1.weight.fill_(12.0)
    return model, (x, y), cross_entropy, adam(model, 1e-4)


class HandNorm(nn.Module):
    """Layer norm by hand."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps)


@fault("operation", place={"module": "blocks.0.norm1", "op": (*DIV, *STD)}, fixable=False)
def layer_norm_without_eps(planted: bool = True) -> Built:
    # The embedding of padding is all zeros, so its std is 0.
    tokens, target = text()
    model = Language(padding=0)
    model.blocks[0].norm1 = HandNorm(0.0 if planted else 1e-5)
    return model, (tokens, target), next_token, adam(model)


class RmsNorm(nn.Module):
    """RMS norm by hand."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


@fault("operation", place={"module": "blocks.0.norm1", "op": ("rsqrt", *POW)}, fixable=False)
def rms_norm_without_eps(planted: bool = True) -> Built:
    # rsqrt(0) is inf, and 0 * inf is NaN, for each padding token.
    tokens, target = text()
    model = Language(padding=0)
    model.blocks[0].norm1 = RmsNorm(0.0 if planted else 1e-6)
    return model, (tokens, target), next_token, adam(model)


# Precision.


@fault("precision", place={"module": "blocks.1.attn", "op": MATMUL}, fixable=False)
def autocast_scores(planted: bool = True) -> Built:
    # A checkpoint trained in bfloat16 has sharp heads: their scores pass 65504 under float16 autocast, then inf - inf.
    x, y = rows()
    model = Vit(scaled=True)
    with torch.no_grad():
        model.blocks[1].norm1.weight.fill_(300.0)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        with torch.autocast("cpu", dtype=torch.float16 if planted else torch.bfloat16):
            return F.cross_entropy(model(inputs).float(), target)

    return model, (x, y), loss_fn, adam(model, 1e-4)


class FillMask(nn.Module):
    """Masks scores of tokens without ink."""

    def forward(self, scores: torch.Tensor, ink: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(~ink, -1e9)


class Pool(nn.Module):
    """Attention pooling over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.score = nn.Linear(32, 1)
        self.mask = FillMask()
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.embed(x))
        weights = torch.softmax(self.mask(self.score(h).squeeze(-1), x.sum(-1) > 0), -1)
        return self.head((weights[..., None] * h).sum(1))


@fault("precision", place={"module": "mask"})
def half_mask_value(planted: bool = True) -> Built:
    # -1e9 as the value for masked scores does not exist in float16; torch raises.
    x, y = rows()
    model = Pool()
    if planted:
        model.half()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        return F.cross_entropy(model(inputs.to(next(model.parameters()).dtype)).float(), target)

    return model, (x, y), loss_fn, sgd(model, 0.1)


# Learning rate.


@fault("learning rate", steps=5)
def adam_lr_1(planted: bool = True) -> Built:
    # lr=1.0 with Adam and no warm-up; the schedule of the paper was a factor, not a rate.
    x, y = rows()
    model = Vit()
    return model, (x, y), cross_entropy, adam(model, 1.0 if planted else 1e-3)


# Loss.


@fault("loss", "target", place={"op": CROSS_ENTROPY}, fixable=False)
def every_token_ignored(planted: bool = True) -> Built:
    # Prompts longer than the context: all labels are -100, and the mean over no token is NaN.
    tokens, target = text()
    if planted:
        target = torch.full_like(target, -100)
    model = Language()
    return model, (tokens, target), next_token, adam(model)


@fault("loss", place={"op": "log"})
def log_of_predicted_probabilities(planted: bool = True) -> Built:
    # torch.log(softmax) as the loss of a sharpened (temperature 0.001) student.
    x, y = rows()
    model = Vit()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        logits = model(inputs) / 1e-3
        return F.nll_loss(torch.log(logits.softmax(-1)) if planted else logits.log_softmax(-1), target)

    return model, (x, y), loss_fn, adam(model, 1e-5)


# Uninitialised.


@fault("uninitialised", place={"parameter": "pos"})
def empty_positions(planted: bool = True) -> Built:
    # Position embeddings from torch.empty; the call to reset_parameters went missing in a refactoring.
    x, y = rows()
    model = Vit()
    if planted:
        with torch.no_grad():
            model.pos.zero_()
            model.pos.view(-1)[::9] = -8.4e37
            model.pos.view(-1)[4::31] = torch.nan
    return model, (x, y), cross_entropy, adam(model)


@fault("uninitialised", place={"parameter": "blocks.1.mlp.2.bias"})
def inf_bias(planted: bool = True) -> Built:
    # A float16 checkpoint whose last bias had overflowed, loaded into float32.
    x, y = rows()
    model = Vit()
    if planted:
        with torch.no_grad():
            model.blocks[1].mlp[2].bias[7] = torch.inf
    return model, (x, y), cross_entropy, adam(model)


@fault("uninitialised", place={"parameter": "head.weight"})
def nan_in_momentum(planted: bool = True) -> Built:
    # The momentum buffer of SGD was resumed from a step that had gone NaN.
    x, y = rows()
    model = Vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    cross_entropy(model, (x, y)).backward()
    optimizer.step()
    optimizer.zero_grad()
    if planted:
        optimizer.state[model.head.weight]["momentum_buffer"].fill_(torch.nan)
    return model, (x, y), cross_entropy, optimizer


# Several at once.


@fault("operation", place={"module": "blocks.0.attn", "op": SOFTMAX}, several=True, fixable=False, steps=2)
def row_of_padding_only_and_lr_1(planted: bool = True) -> Built:
    # A fully masked sample makes NaN whatever the step; lr=1.0 is the next problem.
    x, y = rows()
    keep = x.sum(-1) > 0
    keep[:, 0] = True
    if planted:
        keep[[3, 30]] = False
    model = Masked()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, mask, target = batch
        return F.cross_entropy(model(inputs, mask), target)

    return model, (x, keep, y), loss_fn, adam(model, 1.0 if planted else 1e-3)
