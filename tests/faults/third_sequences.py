"""A third set of planted faults and healthy models, held out: language, sequences, RL, generative models, adapters."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from . import data
from .case import CROSS_ENTROPY, DIV, SOFTMAX, Fault, Healthy, healthy_keeper, planter, supervised, train

FAULTS: list[Fault] = []
HEALTHY: list[Healthy] = []

gpt = planter(FAULTS, "gpt")
text = planter(FAULTS, "text")
vit = planter(FAULTS, "vit")
seq2seq = planter(FAULTS, "seq2seq")
ctc = planter(FAULTS, "ctc")
rnn = planter(FAULTS, "rnn")
rl = planter(FAULTS, "rl")
gan = planter(FAULTS, "gan")
vae = planter(FAULTS, "vae")
flow = planter(FAULTS, "flow")
diffusion = planter(FAULTS, "diffusion")
metric = planter(FAULTS, "metric")
distill = planter(FAULTS, "distill")
lora = planter(FAULTS, "lora")
tune = planter(FAULTS, "tune")
healthy = healthy_keeper(HEALTHY)

# ---------------------------------------------------------------- language data

POEM = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance, or nature's changing course, untrimm'd;
But thy eternal summer shall not fade
Nor lose possession of that fair thou owest;
Nor shall Death brag thou wander'st in his shade,
When in eternal lines to time thou growest:
So long as men can breathe or eyes can see,
So long lives this, and this gives life to thee.
Let me not to the marriage of true minds
Admit impediments. Love is not love
Which alters when it alteration finds,
Or bends with the remover to remove:
O, no! it is an ever-fixed mark,
That looks on tempests, and is never shaken;
It is the star to every wandering bark,
Whose worth's unknown, although his height be taken.
Love's not Time's fool, though rosy lips and cheeks
Within his bending sickle's compass come;
Love alters not with his brief hours and weeks,
But bears it out even to the edge of doom.
If this be error, and upon me proved,
I never writ, nor no man ever loved.
"""
CHARS = sorted(set(POEM))
VOCAB = len(CHARS)
CODE = {c: i for i, c in enumerate(CHARS)}


def windows(batch: int = 16, block: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-character prediction."""
    ids = torch.tensor([CODE[c] for c in POEM])
    starts = torch.randint(len(ids) - block - 1, (batch,))
    x = torch.stack([ids[s : s + block] for s in starts])
    y = torch.stack([ids[s + 1 : s + block + 1] for s in starts])
    return x, y


def padded_lines(rows: int = 16, left: bool = False) -> dict[str, torch.Tensor]:
    """Lines of the poem as a tokenizer gives them: id 0 is the padding, labels are -100 there."""
    lines = [torch.tensor([CODE[c] + 1 for c in line]) for line in POEM.splitlines()[:rows]]
    longest = max(map(len, lines))
    ids = torch.zeros(rows, longest, dtype=torch.long)
    for i, line in enumerate(lines):
        if left:
            ids[i, longest - len(line) :] = line
        else:
            ids[i, : len(line)] = line
    mask = (ids != 0).long()
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = torch.where(mask[:, 1:] * mask[:, :-1] == 1, ids[:, 1:], -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


GOOD = """a warm and funny film with a great cast
the story is moving and the music is lovely
i loved every minute of this clever comedy
a great script and a great cast make a great film
funny and moving with a lovely ending
the best film of the year and a joy to watch
clever and warm and never dull
a lovely story told with real joy
the acting is superb and the ending is moving
i laughed and i cried and i loved it
superb music and a clever script
a joy from the first minute to the last
one of the best comedies i have seen
warm and clever with superb acting
a moving film with real heart
i would watch this lovely film again""".splitlines()
BAD = """a dull and empty film with a poor cast
the story is boring and the music is awful
i hated every minute of this stupid comedy
a poor script and a poor cast make a poor film
stupid and boring with an awful ending
the worst film of the year and a pain to watch
dull and cold and never funny
an awful story told with no heart
the acting is wooden and the ending is boring
i yawned and i slept and i hated it
awful music and a stupid script
a pain from the first minute to the last
one of the worst comedies i have seen
cold and dull with wooden acting
a boring film with no heart
i would not watch this awful film again""".splitlines()
WORDS = ["<pad>", *sorted({w for line in GOOD + BAD for w in line.split()})]
WORD = {w: i for i, w in enumerate(WORDS)}


def reviews() -> tuple[torch.Tensor, torch.Tensor]:
    """32 short reviews, padded with 0; 1 for the good ones."""
    lines = [torch.tensor([WORD[w] for w in line.split()]) for line in GOOD + BAD]
    x = nn.utils.rnn.pad_sequence(lines, batch_first=True)
    y = torch.tensor([1] * len(GOOD) + [0] * len(BAD))
    order = torch.randperm(len(y))
    return x[order], y[order]


# ---------------------------------------------------------------- a plain mini-GPT


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, fill: float = float("-inf")) -> None:
        super().__init__()
        self.heads = heads
        self.fill = fill
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, key_mask=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        att = q @ k.transpose(-2, -1) / math.sqrt(C // self.heads)
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        att = att.masked_fill(~causal, self.fill)
        if key_mask is not None:
            att = att.masked_fill(key_mask[:, None, None, :] == 0, self.fill)
        att = F.softmax(att, dim=-1)
        return self.proj((att @ v).transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, fill: float = float("-inf")) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads, fill)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, key_mask=None):
        x = x + self.attn(self.ln1(x), key_mask)
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, vocab=VOCAB, width=48, heads=4, layers=2, block=64, tied=False, fill=float("-inf")) -> None:
        super().__init__()
        self.tok = nn.Embedding(vocab, width)
        self.pos = nn.Embedding(block, width)
        self.blocks = nn.ModuleList([Block(width, heads, fill) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.apply(self._init)
        if tied:
            self.head.weight = self.tok.weight

    def _init(self, m):
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=0.02)
        if isinstance(m, nn.Linear) and m.bias is not None:
            nn.init.zeros_(m.bias)

    def forward(self, input_ids, attention_mask=None):
        T = input_ids.shape[1]
        x = self.tok(input_ids) + self.pos(torch.arange(T))
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.head(self.ln_f(x))


def lm_loss(model, batch):
    x, y = batch
    logits = model(x)
    return F.cross_entropy(logits.float().view(-1, logits.size(-1)), y.view(-1))


def hf_loss(model, batch):
    logits = model(batch["input_ids"], batch["attention_mask"])
    return F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


# ================================================================ faults: GPT


# I pad on the left, as one does for generation, and mask keys with -inf: the queries on the padding see no key at all.
@gpt("operation", place={"module": "blocks.0.attn", "op": SOFTMAX}, fixable=False)
def left_padding(planted: bool = True):
    model = GPT(VOCAB + 1, fill=float("-inf") if planted else torch.finfo(torch.float32).min)
    return model, padded_lines(left=True), hf_loss, torch.optim.AdamW(model.parameters(), lr=3e-3)


# I built the causal mask as "triu of ones, times -inf"; 0 * -inf is NaN below the diagonal.
@gpt("operation", place={"module": "", "op": ("mul", "multiply", "rmul")}, fixable=False)
def mask_times_inf(planted: bool = True):
    class CharLM(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(VOCAB, 32)
            self.pos = nn.Parameter(0.02 * torch.randn(32, 32))
            layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.fc = nn.Linear(32, VOCAB)

        def forward(self, x):
            T = x.size(1)
            if planted:
                mask = torch.triu(torch.ones(T, T), diagonal=1) * float("-inf")
            else:
                mask = torch.full((T, T), float("-inf")).triu(1)
            return self.fc(self.encoder(self.emb(x) + self.pos[:T], mask=mask))

    model = CharLM()
    return model, windows(), lm_loss, torch.optim.Adam(model.parameters(), lr=3e-3)


# I moved my GPT to half, with masked_fill(-1e9) from the old tutorial in it: -1e9 is no float16.
@gpt("precision", "operation", fixable=True)
def half_and_minus_1e9(planted: bool = True):
    model = GPT(fill=-1e9 if planted else -1e4, layers=1).half()
    return model, windows(), lm_loss, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


# The prompts fill max_length, the answers were cut off: every label is -100.
@gpt("target", "loss", "operation", fixable=False)
def truncated_answers(planted: bool = True):
    model = GPT(VOCAB + 1)
    batch = padded_lines()
    prompt = 20
    labels = batch["labels"].clone()
    labels[:, :prompt] = -100
    batch["labels"] = labels
    if planted:
        batch = {k: v[:, :prompt] for k, v in batch.items()}
    return model, batch, hf_loss, torch.optim.AdamW(model.parameters(), lr=3e-3)


# Weights tied, the embedding left as torch draws it, N(0, 1), and multiplied by sqrt(d) as in the paper.
@gpt("weights", place={"parameter": "tok.weight"}, steps=3)
def tied_default_embedding(planted: bool = True):
    class TiedGPT(nn.Module):
        def __init__(self, vocab=VOCAB, width=64):
            super().__init__()
            self.width = width
            self.tok = nn.Embedding(vocab, width)
            if not planted:
                nn.init.normal_(self.tok.weight, std=0.02)
            self.pos = nn.Parameter(torch.zeros(32, width))
            self.blocks = nn.ModuleList([Block(width, 4) for _ in range(2)])
            self.head = nn.Linear(width, vocab, bias=False)
            self.head.weight = self.tok.weight

        def forward(self, x):
            h = self.tok(x) * math.sqrt(self.width) + self.pos[: x.shape[1]]
            for block in self.blocks:
                h = block(h)
            return self.head(h)

    model = TiedGPT()
    return model, windows(), lm_loss, torch.optim.SGD(model.parameters(), lr=0.3)


# Pure half training "to save memory" with Adam's default eps=1e-8, which is 0 in float16.
@gpt("precision", "optimizer", steps=2)
def half_adam_eps(planted: bool = True):
    model = GPT(tied=True)
    if planted:
        model = model.half()
    return model, windows(), lm_loss, torch.optim.Adam(model.parameters(), lr=1e-3)


# My checkpoint saves every tensor as float16 to be small, Adam's second moments too: they came back as 0.
@gpt("optimizer", "precision", steps=3)
def resumed_in_half(planted: bool = True):
    def accumulated(model, batch):
        return lm_loss(model, batch) / 64  # of 64 micro-batches

    model = GPT(layers=1)
    batch = windows()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    train(model, batch, accumulated, optimizer, 25)
    for group in optimizer.param_groups:  # the schedule has come down
        group["lr"] = 2.5e-3
    saved = copy.deepcopy(optimizer.state_dict())
    if planted:
        for state in saved["state"].values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].half()
    optimizer.load_state_dict(saved)
    return model, batch, accumulated, optimizer


# ================================================================ faults: text


# My RMSNorm has no eps, and the padding's embedding is exactly 0 (padding_idx).
@text("operation", place={"module": "norm", "op": DIV}, fixable=False)
def rmsnorm_of_padding(planted: bool = True):
    class RMSNorm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(width))

        def forward(self, x):
            rms = x.pow(2).mean(-1, keepdim=True)
            rms = rms.sqrt() if planted else (rms + 1e-6).sqrt()
            return self.scale * (x / rms)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(len(WORDS), 32, padding_idx=0)
            self.norm = RMSNorm(32)
            self.up = nn.Linear(32, 64)
            self.out = nn.Linear(64, 2)

        def forward(self, ids):
            h = F.silu(self.up(self.norm(self.embed(ids))))
            keep = (ids != 0).unsqueeze(-1)
            return self.out((h * keep).sum(1) / keep.sum(1))

    model = Classifier()
    return model, reviews(), supervised(F.cross_entropy), torch.optim.Adam(model.parameters(), lr=1e-2)


# I normalise the word vectors to length 1; words that the file did not have are zeros, and 0 / 0 is NaN.
@text("weights", place={"parameter": "embed.weight"})
def oov_vectors(planted: bool = True):
    class BagOfVectors(nn.Module):
        def __init__(self, vectors):
            super().__init__()
            self.embed = nn.Embedding.from_pretrained(vectors, freeze=False, padding_idx=0)
            self.fc = nn.Sequential(nn.Linear(50, 32), nn.ReLU(), nn.Linear(32, 2))

        def forward(self, ids):
            keep = (ids != 0).unsqueeze(-1)
            h = self.embed(ids).masked_fill(~keep, 0.0)
            return self.fc(h.sum(1) / keep.sum(1))

    vectors = torch.randn(len(WORDS), 50)
    vectors[[WORD["superb"], WORD["wooden"]]] = 0.0
    length = vectors.norm(dim=1, keepdim=True)
    vectors = vectors / (length if planted else length.clamp_min(1e-6))
    model = BagOfVectors(vectors)
    return model, reviews(), supervised(F.cross_entropy), torch.optim.Adam(model.parameters(), lr=1e-2)


# The vectors' keys are upper case, my words are lower case: nothing matched, the matrix stayed 0, and it is frozen.
@text("weights", "input", steps=3)
def vectors_never_matched(planted: bool = True):
    class BiGRU(nn.Module):
        def __init__(self, matrix):
            super().__init__()
            self.embed = nn.Embedding.from_pretrained(matrix, freeze=True, padding_idx=0)
            self.gru = nn.GRU(32, 24, batch_first=True, bidirectional=True)
            self.fc = nn.Linear(48, 1)

        def forward(self, ids):
            h, _ = self.gru(self.embed(ids))
            return self.fc(h.max(1).values).squeeze(-1)

    pretrained = {w.upper() if planted else w: torch.randn(32) for w in WORDS[1:]}
    matrix = torch.zeros(len(WORDS), 32)
    for i, w in enumerate(WORDS):
        if w in pretrained:
            matrix[i] = pretrained[w]
    model = BiGRU(matrix)
    x, y = reviews()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    return model, (x, y.float()), supervised(F.binary_cross_entropy_with_logits), optimizer


# keep_prob=1.0, as in my old TensorFlow 1 code: nn.Dropout takes the probability to drop.
@text("gradient", "operation", place={"module": "dropout"}, steps=3)
def keep_probability(planted: bool = True):
    class EncoderClassifier(nn.Module):
        def __init__(self, keep_prob):
            super().__init__()
            self.embed = nn.Embedding(len(WORDS), 32, padding_idx=0)
            self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
            self.dropout = nn.Dropout(keep_prob)
            self.fc = nn.Linear(32, 2)

        def forward(self, ids):
            pad = ids == 0
            h = self.encoder(self.embed(ids), src_key_padding_mask=pad)
            h = h.masked_fill(pad.unsqueeze(-1), 0.0).sum(1) / (~pad).sum(1, keepdim=True)
            return self.fc(self.dropout(h))

    model = EncoderClassifier(1.0 if planted else 0.1)
    return model, reviews(), supervised(F.cross_entropy), torch.optim.Adam(model.parameters(), lr=3e-3)


# ================================================================ faults: ViT


# My layer norm takes E[x^2] - E[x]^2, and the positions are added as plain numbers: in bfloat16 it cancels below 0.
@vit("precision", "operation", place={"op": ("sqrt", "rsqrt")})
def bf16_variance(planted: bool = True):
    class MyLayerNorm(nn.Module):
        def __init__(self, width, eps=1e-5):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))
            self.bias = nn.Parameter(torch.zeros(width))
            self.eps = eps

        def forward(self, x):
            mean = x.mean(-1, keepdim=True)
            var = (x * x).mean(-1, keepdim=True) - mean * mean
            return self.weight * (x - mean) / torch.sqrt(var + self.eps) + self.bias

    class TinyViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Linear(4, 32)
            self.norm = MyLayerNorm(32)
            self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
            self.head = nn.Linear(16 * 32, 10)

        def forward(self, images):
            patches = images.unfold(2, 2, 2).unfold(3, 2, 2).reshape(len(images), 16, 4)
            x = self.patch(patches.to(self.patch.weight.dtype))
            x = x + torch.arange(16, dtype=x.dtype).view(1, 16, 1)
            h = self.norm(x)
            h = h + self.attn(h, h, h, need_weights=False)[0]
            return self.head(h.flatten(1))

    model = TinyViT()
    if planted:
        model = model.bfloat16()

    def loss_fn(model, batch):
        x, y = batch
        return F.cross_entropy(model(x).float(), y)

    return model, data.images(128), loss_fn, torch.optim.Adam(model.parameters(), lr=3e-3)


# The class token is torch.empty; I meant to initialise it and never did. (The bits I found there, made repeatable.)
@vit("uninitialised", "weights", place={"parameter": "cls_token"})
def class_token_empty(planted: bool = True):
    class ViT(nn.Module):
        def __init__(self, width=32):
            super().__init__()
            self.embed = nn.Conv2d(1, width, 2, 2)
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 17, width))
            layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
            self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(width, 10)

        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
            return self.head(self.blocks(x)[:, 0])

    model = ViT()
    with torch.no_grad():
        if planted:
            bits = torch.randint(-(2**31), 2**31 - 1, (1, 1, 32), dtype=torch.int32)
            bits[0, 0, ::5] = 0
            bits[0, 0, 7] = 2143289344 + 5  # what a freed buffer of NaNs leaves
            model.cls_token.copy_(bits.view(torch.float32))
        else:
            nn.init.trunc_normal_(model.cls_token, std=0.02)
    return model, data.images(96), supervised(F.cross_entropy), torch.optim.AdamW(model.parameters(), lr=3e-3)


# Quantisation-aware training with a bare torch.round: its derivative is 0, so no weight ever gets a gradient.
@vit("gradient", "operation", place={"op": "round"}, fixable=False, steps=3)
def rounded_weights(planted: bool = True):
    class QuantLinear(nn.Linear):
        def forward(self, x):
            scale = self.weight.detach().abs().max() / 7
            w = torch.round(self.weight / scale) * scale
            if not planted:
                w = self.weight + (w - self.weight).detach()
            return F.linear(x, w, self.bias)

    class Mixer(nn.Module):
        def __init__(self, width=32):
            super().__init__()
            self.embed = QuantLinear(4, width)
            self.tokens = nn.Sequential(QuantLinear(16, 32), nn.GELU(), QuantLinear(32, 16))
            self.channels = nn.Sequential(QuantLinear(width, 64), nn.GELU(), QuantLinear(64, width))
            self.head = QuantLinear(width, 10)

        def forward(self, images):
            x = images.unfold(2, 2, 2).unfold(3, 2, 2).reshape(len(images), 16, 4)
            x = self.embed(x)
            x = x + self.tokens(F.layer_norm(x, x.shape[-1:]).transpose(1, 2)).transpose(1, 2)
            x = x + self.channels(F.layer_norm(x, x.shape[-1:]))
            return self.head(F.layer_norm(x, x.shape[-1:]).mean(1))

    model = Mixer()
    return model, data.images(128), supervised(F.cross_entropy), torch.optim.Adam(model.parameters(), lr=1e-2)


# Noam's schedule with warmup_steps=1 while debugging: the rate is d_model ** -0.5 = 0.18 from the first step on.
@vit("learning rate", steps=3)
def noam_without_warmup(planted: bool = True):
    class RowTransformer(nn.Module):
        def __init__(self, width=32):
            super().__init__()
            self.inp = nn.Linear(8, width)
            self.pos = nn.Parameter(0.02 * torch.randn(8, width))
            layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
            self.enc = nn.TransformerEncoder(layer, 2)
            self.out = nn.Linear(width, 10)

        def forward(self, x):
            return self.out(self.enc(self.inp(x.view(-1, 8, 8)) + self.pos).mean(1))

    model = RowTransformer()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    warmup = 1 if planted else 4000
    noam = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 32**-0.5 * min((s + 1) ** -0.5, (s + 1) * warmup**-1.5)
    )
    for _ in range(1 if planted else 2500):
        optimizer.step()
        noam.step()
    return model, data.digits(128), supervised(F.cross_entropy), optimizer


# ================================================================ faults: seq2seq and CTC


class Seq2Seq(nn.Module):
    """Reads a line of characters and writes it again, in lower case and without vowels."""

    def __init__(self, vocab, width=48):
        super().__init__()
        self.src = nn.Embedding(vocab, width, padding_idx=0)
        self.tgt = nn.Embedding(vocab, width, padding_idx=0)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.query = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(2 * width, vocab)

    def forward(self, src, tgt):
        memory, h = self.encoder(self.src(src))
        states, _ = self.decoder(self.tgt(tgt), h)
        scores = self.query(states) @ memory.transpose(1, 2)
        scores = scores.masked_fill((src == 0).unsqueeze(1), float("-inf"))
        context = scores.softmax(-1) @ memory
        return self.out(torch.cat([states, context], -1))


BOS = VOCAB + 1


def rewriting() -> dict[str, torch.Tensor]:
    """Lines and what is left of them without vowels; 0 is padding, BOS starts the target."""
    src, tgt = [], []
    for line in POEM.splitlines()[:16]:
        src.append(torch.tensor([CODE[c] + 1 for c in line]))
        tgt.append(torch.tensor([CODE[c] + 1 for c in line if c not in "aeiou"]))
    src = nn.utils.rnn.pad_sequence(src, batch_first=True)
    tgt = nn.utils.rnn.pad_sequence(tgt, batch_first=True)
    start = torch.full((len(tgt), 1), BOS)
    return {"src": src, "tgt_in": torch.cat([start, tgt[:, :-1]], 1), "tgt_out": tgt}


# Tokens that the decoder may never write get the logit -inf, and then I switched label smoothing on.
@seq2seq("loss", "operation", place={"op": CROSS_ENTROPY}, fixable=False)
def smoothing_over_forbidden(planted: bool = True):
    model = Seq2Seq(VOCAB + 2)
    forbidden = torch.zeros(VOCAB + 2, dtype=torch.bool)
    forbidden[0] = forbidden[BOS] = True

    def loss_fn(model, batch):
        logits = model(batch["src"], batch["tgt_in"])
        logits = logits.masked_fill(forbidden, float("-inf"))
        smooth = 0.1 if planted else 0.0
        return F.cross_entropy(logits.transpose(1, 2), batch["tgt_out"], ignore_index=0, label_smoothing=smooth)

    return model, rewriting(), loss_fn, torch.optim.Adam(model.parameters(), lr=3e-3)


def translate_loss(model, batch):
    logits = model(batch["src"], batch["tgt_in"])
    return F.cross_entropy(logits.transpose(1, 2), batch["tgt_out"], ignore_index=0)


# Linear warm-up by LambdaLR, which sets the rate to 0 at once; I call scheduler.step() only once an epoch.
@seq2seq("learning rate", steps=3)
def warmup_from_zero(planted: bool = True):
    model = Seq2Seq(VOCAB + 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if planted:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 500))
    else:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 100) / 500))
    return model, rewriting(), translate_loss, optimizer


class Reader(nn.Module):
    """Reads a strip of digits column by column."""

    def __init__(self, stride, log=True):
        super().__init__()
        self.conv = nn.Conv1d(8, 48, 8, stride=stride)
        self.rnn = nn.LSTM(48, 48, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(96, 11)
        self.log = log

    def forward(self, strips):
        h = F.relu(self.conv(strips)).transpose(1, 2)
        h, _ = self.rnn(h)
        h = self.fc(h)
        h = h.log_softmax(-1) if self.log else h.softmax(-1)
        return h.transpose(0, 1)


def strips(rows: int = 24, digits: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Six digits side by side, 8 x 48, and what they say (1 to 10; 0 is the blank)."""
    x, y = data.images(rows * digits)
    x = x.view(rows, digits, 8, 8).permute(0, 2, 1, 3).reshape(rows, 8, digits * 8)
    return x, y.view(rows, digits) + 1


def ctc_loss(model, batch):
    x, y = batch
    log_probs = model(x)
    frames = torch.full((len(x),), log_probs.size(0), dtype=torch.long)
    lengths = torch.full((len(x),), y.size(1), dtype=torch.long)
    return F.ctc_loss(log_probs, y, frames, lengths, blank=0)


# A stride of 8 leaves 6 frames for 6 digits; where a digit repeats CTC needs a blank between, and has no frame for it.
@ctc("target", "loss", "operation", "input", fixable=False)
def too_few_frames(planted: bool = True):
    model = Reader(stride=8 if planted else 2)
    return model, strips(), ctc_loss, torch.optim.Adam(model.parameters(), lr=3e-3)


# ctc_loss gets softmax, not log_softmax.
@ctc("loss", fixable=False, steps=3)
def probabilities(planted: bool = True):
    model = Reader(stride=2, log=not planted)
    return model, strips(), ctc_loss, torch.optim.Adam(model.parameters(), lr=3e-3)


# ================================================================ faults: recurrent nets


# GPT's normal_(std=0.02) for my recurrent matrix too: nothing of the digit is left after the pause of 24 steps.
@rnn("weights", "gradient", steps=3)
def forgets_at_once(planted: bool = True):
    class Vanilla(nn.Module):
        def __init__(self, width=48):
            super().__init__()
            self.w_xh = nn.Linear(8, width)
            self.w_hh = nn.Parameter(torch.empty(width, width))
            self.fc = nn.Linear(width, 10)
            if planted:
                nn.init.normal_(self.w_hh, std=0.02)
            else:
                nn.init.orthogonal_(self.w_hh)

        def forward(self, x):
            h = x.new_zeros(len(x), self.w_hh.size(0))
            for t in range(x.size(1)):
                h = torch.tanh(self.w_xh(x[:, t]) + h @ self.w_hh)
            return self.fc(h)

    x, y = data.digits(128)
    x = torch.cat([x.view(-1, 8, 8), torch.zeros(128, 24, 8)], 1)
    model = Vanilla()
    return model, (x, y), supervised(F.cross_entropy), torch.optim.Adam(model.parameters(), lr=3e-3)


# The window still has its time stamp, in milliseconds since 1970, as the last column.
@rnn("input", place={"feature": [8]}, steps=3)
def time_stamp(planted: bool = True):
    class SensorGRU(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(9, 32, batch_first=True)
            self.fc = nn.Linear(32, 10)

        def forward(self, x):
            return self.fc(self.gru(x)[0][:, -1])

    x, y = data.digits(128)
    clock = 1.7e12 + 60_000.0 * torch.arange(128 * 8).view(128, 8, 1) if planted else torch.rand(128, 8, 1)
    x = torch.cat([x.view(128, 8, 8), clock], 2)
    model = SensorGRU()
    return model, (x, y), supervised(F.cross_entropy), torch.optim.Adam(model.parameters(), lr=5e-3)


# The LSTM ends in tanh, the progression of the disease is 25 to 346.
@rnn("target", "loss", steps=3)
def tanh_for_hundreds(planted: bool = True):
    class Forecast(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(1, 24, batch_first=True)
            self.out = nn.Linear(24, 1)

        def forward(self, x):
            h, _ = self.lstm(x.unsqueeze(-1))
            return torch.tanh(self.out(h[:, -1]))

    model = Forecast()
    batch = data.diabetes(128, raw_y=planted)
    return model, batch, supervised(F.mse_loss), torch.optim.Adam(model.parameters(), lr=1e-2)


# I took weight_decay for scikit-learn's C, "the inverse of the strength", and set 100.
@rnn("optimizer", steps=3)
def weight_decay_as_c(planted: bool = True):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(len(WORDS), 24, padding_idx=0)
            self.lstm = nn.LSTM(24, 24, batch_first=True, bidirectional=True)
            self.fc = nn.Linear(48, 2)

        def forward(self, ids):
            lengths = (ids != 0).sum(1)
            packed = nn.utils.rnn.pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
            _, (h, _) = self.lstm(packed)
            return self.fc(torch.cat([h[0], h[1]], -1))

    model = Tagger()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=100.0 if planted else 0.01)
    return model, reviews(), supervised(F.cross_entropy), optimizer


# A mixture density head with narrow first components: the densities underflow to 0, and I take their log.
@rnn("operation", "loss", place={"op": "log"}, fixable=False)
def mixture_density(planted: bool = True):
    class MDN(nn.Module):
        def __init__(self, k=5):
            super().__init__()
            self.rnn = nn.GRU(1, 24, batch_first=True)
            self.head = nn.Linear(24, 3 * k)

        def forward(self, x):
            h, _ = self.rnn(x.unsqueeze(-1))
            pi, mu, sigma = self.head(h[:, -1]).chunk(3, -1)
            return pi.softmax(-1), mu, F.softplus(sigma - 3.0)

    def loss_fn(model, batch):
        x, y = batch
        pi, mu, sigma = model(x)
        z = (y - mu) / sigma
        if planted:
            density = torch.exp(-0.5 * z**2) / (sigma * math.sqrt(2 * math.pi))
            return -torch.log((pi * density).sum(-1)).mean()
        log_density = -0.5 * z**2 - sigma.log() - 0.5 * math.log(2 * math.pi)
        return -torch.logsumexp(pi.log() + log_density, -1).mean()

    model = MDN()
    return model, data.diabetes(128), loss_fn, torch.optim.Adam(model.parameters(), lr=1e-2)


# ================================================================ faults: reinforcement learning


class QNet(nn.Module):
    def __init__(self, states=13, actions=3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(states, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, actions))

    def forward(self, s):
        return self.net(s)


class DQN(nn.Module):
    def __init__(self):
        super().__init__()
        self.online = QNet()
        self.target = copy.deepcopy(self.online)

    def forward(self, s):
        return self.online(s)


def replay(rows: int = 128) -> dict[str, torch.Tensor]:
    """Pours wine: reward 1 for the right cultivar, -1 for a wrong one; the next guest is the next row."""
    x, y = data.wine(rows)
    a = torch.randint(3, (rows,))
    return {
        "state": x,
        "action": a,
        "reward": torch.where(a == y, 1.0, -1.0),
        "next_state": x.roll(-1, 0),
        "done": (torch.rand(rows) < 0.5).float(),
    }


# gather keeps its dimension: q is (n, 1), the target (n,), and the mean squared error is over (n, n).
@rl("loss", fixable=False, steps=3)
def dqn_broadcasts(planted: bool = True):
    model = DQN()

    def loss_fn(model, b):
        q = model(b["state"]).gather(1, b["action"].unsqueeze(1))
        with torch.no_grad():
            best = model.target(b["next_state"]).max(1).values
            goal = b["reward"] + 0.9 * (1 - b["done"]) * best
        return F.mse_loss(q if planted else q.squeeze(1), goal)

    return model, replay(), loss_fn, torch.optim.Adam(model.online.parameters(), lr=3e-3)


# PPO on raw observations (I forgot VecNormalize): one of them goes to 1,680, and every tanh of the body is saturated.
@rl("input", place={"feature": 12}, steps=3)
def ppo_raw_observations(planted: bool = True):
    class ActorCritic(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(13, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
            self.pi = nn.Linear(64, 3)
            self.v = nn.Linear(64, 1)
            for layer in (self.body[0], self.body[2]):
                nn.init.orthogonal_(layer.weight, math.sqrt(2))
                nn.init.zeros_(layer.bias)
            nn.init.orthogonal_(self.pi.weight, 0.01)

        def forward(self, s):
            h = self.body(s)
            return torch.distributions.Categorical(logits=self.pi(h)), self.v(h).squeeze(-1)

    model = ActorCritic()
    rollout = replay()
    rollout["state"] = data.wine(128, raw=planted)[0]
    with torch.no_grad():
        dist, value = model(rollout["state"])
        rollout["old_log_prob"] = dist.log_prob(rollout["action"])
        rollout["advantage"] = rollout["reward"] - value

    def loss_fn(model, b):
        dist, value = model(b["state"])
        ratio = (dist.log_prob(b["action"]) - b["old_log_prob"]).exp()
        adv = (b["advantage"] - b["advantage"].mean()) / (b["advantage"].std() + 1e-8)
        policy = -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()
        return policy + 0.5 * F.mse_loss(value, b["reward"]) - 0.01 * dist.entropy().mean()

    return model, rollout, loss_fn, torch.optim.Adam(model.parameters(), lr=1e-3)


# The actor draws with sample(), which no gradient passes; it had to be rsample().
@rl("gradient", fixable=False, steps=3)
def sample_for_rsample(planted: bool = True):
    class ActorCritic(nn.Module):
        def __init__(self):
            super().__init__()
            self.actor = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 2))
            self.critic = nn.Sequential(nn.Linear(11, 32), nn.Tanh(), nn.Linear(32, 1))

        def forward(self, s):
            mu, log_std = self.actor(s).chunk(2, -1)
            dist = torch.distributions.Normal(mu, log_std.clamp(-4, 1).exp())
            a = dist.sample() if planted else dist.rsample()
            return self.critic(torch.cat([s, a], -1))

    model = ActorCritic()
    states, _ = data.diabetes(256)
    # the critic has already learned that actions near 1.5 are good
    fit = torch.optim.Adam(model.critic.parameters(), lr=1e-2)

    def critic_loss(m, s):
        a = 2 * torch.randn(len(s), 1)
        return F.mse_loss(m.critic(torch.cat([s, a], -1)), -((a - 1.5) ** 2))

    train(model, states, critic_loss, fit, 150)

    def actor_loss(model, s):
        return -model(s).mean()

    return model, states, actor_loss, torch.optim.Adam(model.actor.parameters(), lr=1e-2)


# "We maximise the return": maximize=True, and a minus in the loss as well.
@rl("optimizer", steps=3)
def maximised_twice(planted: bool = True):
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(13, 32), nn.Tanh())
            self.pi = nn.Linear(32, 3)

        def forward(self, s):
            return torch.distributions.Categorical(logits=self.pi(self.body(s)))

    def loss_fn(model, b):
        dist = model(b["state"])
        advantage = b["reward"] - b["reward"].mean()
        return -(dist.log_prob(b["action"]) * advantage).mean() - 0.01 * dist.entropy().mean()

    model = Policy()
    return model, replay(), loss_fn, torch.optim.Adam(model.parameters(), lr=3e-3, maximize=planted)


# SAC's correction log(1 - tanh(u)^2) without an eps, and wide first actions: tanh(u) is exactly 1.
@rl("operation", place={"module": "", "op": "log"}, fixable=False)
def squashed_log_prob(planted: bool = True):
    class SquashedGaussian(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
            self.mu = nn.Linear(64, 4)
            self.log_std = nn.Linear(64, 4)
            nn.init.constant_(self.log_std.bias, 1.7)

        def forward(self, s):
            h = self.body(s)
            dist = torch.distributions.Normal(self.mu(h), self.log_std(h).clamp(-5, 2).exp())
            u = dist.rsample()
            a = torch.tanh(u)
            squash = 1 - a.pow(2)
            if not planted:
                squash = squash + 1e-6
            log_prob = dist.log_prob(u) - torch.log(squash)
            return a, log_prob.sum(-1)

    def loss_fn(model, s):
        a, log_prob = model(s)
        q = -((a - 0.3) ** 2).sum(-1)  # a known reward in place of the critic
        return (0.2 * log_prob - q).mean()

    model = SquashedGaussian()
    return model, data.diabetes(128)[0], loss_fn, torch.optim.Adam(model.parameters(), lr=3e-3)


# ================================================================ faults: GANs


# WGAN-GP with sqrt(sum(g^2)), and a critic whose last layer starts at 0: sqrt has no gradient at 0.
@gan("operation", "gradient", place={"op": "sqrt"}, fixable=False)
def gradient_penalty(planted: bool = True):
    class WGAN(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))
            self.critic = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
            nn.init.zeros_(self.critic[2].weight)
            nn.init.zeros_(self.critic[2].bias)

    def critic_step(model, real):
        fake = model.generator(torch.randn(len(real), 8)).detach()
        mix = torch.rand(len(real), 1)
        between = (mix * real + (1 - mix) * fake).requires_grad_(True)
        (grad,) = torch.autograd.grad(model.critic(between).sum(), between, create_graph=True)
        norm = torch.sqrt((grad**2).sum(1) + (0.0 if planted else 1e-12))
        return model.critic(fake).mean() - model.critic(real).mean() + 10 * ((norm - 1) ** 2).mean()

    model = WGAN()
    return (
        model,
        data.digits(128)[0],
        critic_step,
        torch.optim.Adam(model.critic.parameters(), lr=1e-3, betas=(0.5, 0.9)),
    )


class SmallGAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.G = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64))
        self.D = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))


def discriminate(model, real):
    z = torch.randn(len(real), 16)
    on_real, on_fake = model.D(real), model.D(model.G(z).detach())
    return F.softplus(-on_real).mean() + F.softplus(on_fake).mean()


# The generator minimises log(1 - D(G(z))), as in the paper's first form, against a discriminator that is certain.
@gan("gradient", "loss", fixable=False, steps=3)
def saturating_generator(planted: bool = True):
    model = SmallGAN()
    real = data.digits(128)[0]
    train(model, real, discriminate, torch.optim.SGD(model.D.parameters(), lr=0.5), 150)
    with torch.no_grad():  # it had many more steps than the generator
        model.D[2].weight *= 3
        model.D[2].bias *= 3

    def generate(model, real):
        logit = model.D(model.G(torch.randn(len(real), 16)))
        if planted:
            return torch.log(1 - torch.sigmoid(logit)).mean()
        return -F.logsigmoid(logit).mean()

    return model, real, generate, torch.optim.SGD(model.G.parameters(), lr=0.005)


# A hand-written cross entropy in bfloat16: a score of 8 is a probability of 1, and (1 - y) * log(1 - p) is 0 * inf.
@gan("precision", "operation", "loss")
def bf16_probability_one(planted: bool = True):
    class GAN(nn.Module):
        def __init__(self):
            super().__init__()
            self.gen = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64))
            self.disc = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1), nn.Sigmoid())

    def bce(p, y):
        return -(y * torch.log(p) + (1 - y) * torch.log(1 - p)).mean()

    def disc_step(model, real):
        dtype = next(model.parameters()).dtype
        fake = model.gen(torch.randn(len(real), 16, dtype=dtype)).detach()
        p_real, p_fake = model.disc(real.to(dtype)), model.disc(fake)
        return bce(p_real, torch.ones_like(p_real)) + bce(p_fake, torch.zeros_like(p_fake))

    model = GAN()
    real = data.digits(128)[0]
    optimizer = torch.optim.Adam(model.disc.parameters(), lr=2e-3, betas=(0.5, 0.999))
    train(model, real, disc_step, optimizer, 120)
    with torch.no_grad():  # the generator has caught up a little since
        model.gen[2].bias.copy_(0.7 * real.mean(0) + 0.25 * real[3])
    if planted:
        model = model.bfloat16()
    return model, real, disc_step, torch.optim.Adam(model.disc.parameters(), lr=2e-3, betas=(0.5, 0.999))


# ================================================================ faults: VAEs and flows


# The encoder's second output is "the variance", straight from a linear layer: half of them are negative.
@vae("operation", place={"module": "", "op": ("sqrt", "log", "pow")}, fixable=False)
def negative_variance(planted: bool = True):
    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
            self.mu = nn.Linear(64, 8)
            self.var = nn.Linear(64, 8)
            self.dec = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

        def forward(self, x):
            h = self.enc(x)
            mu, var = self.mu(h), self.var(h)
            if not planted:
                var = F.softplus(var)
            z = mu + torch.sqrt(var) * torch.randn_like(mu)
            kl = 0.5 * (var + mu**2 - 1 - torch.log(var)).sum(1)
            return self.dec(z), kl

    def loss_fn(model, x):
        out, kl = model(x)
        return F.mse_loss(out, x, reduction="none").sum(1).mean() + kl.mean()

    model = VAE()
    return model, data.digits(128)[0], loss_fn, torch.optim.Adam(model.parameters(), lr=3e-3)


# An invertible linear layer with log(abs(det(W))): the determinant of a small 64 x 64 matrix underflows to 0.
@flow("operation", place={"op": ("log", "det")}, fixable=False)
def determinant_underflows(planted: bool = True):
    class InvertibleLinear(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.W = nn.Parameter(0.02 * torch.randn(n, n))
            self.b = nn.Parameter(torch.zeros(n))

        def forward(self, x):
            z = x @ self.W + self.b
            log_det = torch.log(torch.abs(torch.det(self.W))) if planted else torch.linalg.slogdet(self.W).logabsdet
            return z, log_det

    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = InvertibleLinear(64)

        def forward(self, x):
            z, log_det = self.layer(x)
            return 0.5 * (z**2).sum(1) + 32 * math.log(2 * math.pi) - log_det

    def nll(model, x):
        return model(x).mean()

    x = data.digits(128)[0]
    model = Flow()
    return model, x + 0.1 * torch.randn_like(x), nll, torch.optim.Adam(model.parameters(), lr=1e-3)


# ================================================================ faults: diffusion


class Denoiser(nn.Module):
    def __init__(self, steps=100, last_beta=0.2):
        super().__init__()
        betas = torch.linspace(1e-3, last_beta, steps)
        self.register_buffer("alpha_bar", torch.cumprod(1 - betas, 0))
        self.time = nn.Embedding(steps, 32)
        self.net = nn.Sequential(nn.Linear(64 + 32, 128), nn.SiLU(), nn.Linear(128, 64))

    def forward(self, x, t):
        return self.net(torch.cat([x, self.time(t)], 1))


def noise_loss(model, batch):
    """The simple loss of DDPM; batch holds the images, the times and the noise."""
    x0, t, noise = batch["x0"], batch["t"], batch["noise"]
    ab = model.alpha_bar[t].unsqueeze(1)
    xt = ab.sqrt() * x0 + (1 - ab).sqrt() * noise
    return F.mse_loss(model(xt, t), noise)


def noised(rows: int, top: float = 1.0, steps: int = 100) -> dict[str, torch.Tensor]:
    x = data.images(rows, top=top)[0].flatten(1)
    x = 2 * x - 1 if top == 1.0 else x
    return {"x0": x, "t": torch.arange(rows) % steps, "noise": torch.randn(rows, 64)}


# The schedule of betas ends at 1.0: no signal is left at the last time, and I divide by it to get the image back.
@diffusion("operation", place={"op": DIV}, fixable=False)
def last_beta_is_one(planted: bool = True):
    model = Denoiser(last_beta=1.0 if planted else 0.02)

    def x0_loss(model, batch):
        x0, t, noise = batch["x0"], batch["t"], batch["noise"]
        ab = model.alpha_bar[t].unsqueeze(1)
        xt = ab.sqrt() * x0 + (1 - ab).sqrt() * noise
        x0_hat = (xt - (1 - ab).sqrt() * model(xt, t)) / ab.sqrt()
        return F.mse_loss(x0_hat, x0)

    return model, noised(200), x0_loss, torch.optim.Adam(model.parameters(), lr=2e-3)


# Everything in half, and the squared errors of the whole batch are added up before I divide: the sum is beyond 65504.
@diffusion("precision", "loss", "operation", place={"op": "sum"})
def half_sum(planted: bool = True):
    model = Denoiser()
    if planted:
        model = model.half()

    def loss_fn(model, batch):
        dtype = model.alpha_bar.dtype
        x0, t, noise = batch["x0"].to(dtype), batch["t"], batch["noise"].to(dtype)
        ab = model.alpha_bar[t].unsqueeze(1)
        xt = ab.sqrt() * x0 + (1 - ab).sqrt() * noise
        return ((model(xt, t) - noise) ** 2).sum() / len(x0)

    return model, noised(1400), loss_fn, torch.optim.SGD(model.parameters(), lr=2e-3, momentum=0.9)


# Two mistakes: the pixels are 0 to 255, and the optimizer has the moving-average copy's weights.
@diffusion("input", "optimizer", several=True, steps=3)
def pixels_and_average(planted: bool = True):
    model = Denoiser()
    ema = copy.deepcopy(model)
    batch = noised(200, top=255.0 if planted else 1.0)
    return model, batch, noise_loss, torch.optim.Adam((ema if planted else model).parameters(), lr=2e-3)


# ================================================================ faults: metric learning


# The matrix of distances by sqrt of the squared ones; its diagonal is 0, and so the gradient is NaN.
@metric("operation", "gradient", place={"op": "sqrt"}, fixable=False)
def batch_hard_triplets(planted: bool = True):
    def loss_fn(model, batch):
        x, y = batch
        e = model(x)
        squared = ((e[:, None] - e[None]) ** 2).sum(-1)
        dist = torch.sqrt(squared) if planted else torch.sqrt(squared + 1e-8)
        same = y[:, None] == y[None]
        hardest_positive = (dist * same).max(1).values
        hardest_negative = (dist + 1e3 * same).min(1).values
        return F.relu(hardest_positive - hardest_negative + 0.5).mean()

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    return model, data.digits(96), loss_fn, torch.optim.Adam(model.parameters(), lr=3e-3)


# CLIP's logit_scale is stored as 100 and not as log(100), and then I take exp of it.
@metric("weights", "operation")
def clip_scale(planted: bool = True):
    class CLIP(nn.Module):
        def __init__(self):
            super().__init__()
            self.top = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 24))
            self.bottom = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 24))
            self.logit_scale = nn.Parameter(torch.tensor(100.0 if planted else math.log(1 / 0.07)))

        def forward(self, a, b):
            a = F.normalize(self.top(a), dim=-1)
            b = F.normalize(self.bottom(b), dim=-1)
            return self.logit_scale.exp() * a @ b.t()

    def loss_fn(model, x):
        logits = model(x[:, :32], x[:, 32:])
        labels = torch.arange(len(x))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2

    model = CLIP()
    return model, data.digits(64)[0], loss_fn, torch.optim.Adam(model.parameters(), lr=3e-3)


# ================================================================ faults: distillation


class Teacher(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x):
        return self.net(x)


class Pair(nn.Module):
    """A trained teacher, frozen, and its student."""

    def __init__(self, x, y):
        super().__init__()
        self.teacher = Teacher(128)
        train(self.teacher, (x, y), supervised(F.cross_entropy), torch.optim.Adam(self.teacher.parameters(), 1e-2), 30)
        self.teacher.requires_grad_(False)
        self.student = Teacher(32)


# The teacher ran in float16 and its logits are cached on disk: in some rows they overflowed, and softmax(inf) is NaN.
@distill("target", "input")
def cached_logits_inf(planted: bool = True):
    x, y = data.digits(128)
    pair = Pair(x, y)
    with torch.no_grad():
        logits = 4000.0 * pair.teacher(x)  # this teacher never divided by its 1 / sqrt(d)
        cached = (logits.half().float() if planted else logits) / 4000.0

    def loss_fn(model, batch, T=2.0):
        soft = F.softmax(batch["teacher_logits"] / T, dim=-1)
        logits = model(batch["pixels"])
        kd = F.kl_div(F.log_softmax(logits / T, dim=-1), soft, reduction="batchmean") * T * T
        return 0.7 * kd + 0.3 * F.cross_entropy(logits, batch["label"])

    student = pair.student
    batch = {"pixels": x, "label": y, "teacher_logits": cached}
    return student, batch, loss_fn, torch.optim.Adam(student.parameters(), lr=5e-3)


# kl_div's default mean is over every token and every word, times alpha: in float16 each gradient is below 6e-8, so 0.
@distill("precision", "gradient", steps=3)
def half_gradients_underflow(planted: bool = True):
    class LMPair(nn.Module):
        def __init__(self, batch):
            super().__init__()
            self.teacher = GPT(layers=2)
            train(self.teacher, batch, lm_loss, torch.optim.Adam(self.teacher.parameters(), lr=3e-3), 20)
            self.teacher.requires_grad_(False)
            self.student = GPT(layers=1, width=32)

    batch = windows(32, 32)
    model = LMPair(batch)

    def loss_fn(model, batch, alpha=0.003):
        x, _ = batch
        with torch.autocast("cpu", dtype=torch.float16, enabled=planted):
            with torch.no_grad():
                soft = model.teacher(x).float().softmax(-1)
            logits = model.student(x)
        return alpha * F.kl_div(logits.float().log_softmax(-1), soft)

    return model, batch, loss_fn, torch.optim.Adam(model.student.parameters(), lr=3e-3)


# ================================================================ faults: LoRA and adapters


class LoRALinear(nn.Module):
    def __init__(self, base, rank=4, alpha=8.0, zero_a=False):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = alpha / rank
        if not zero_a:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.lora_A.t() @ self.lora_B.t())


def pretrained_gpt(steps=25):
    """A GPT that knows the first lines, and a batch of the last ones."""
    model = GPT(layers=2)
    batch = windows(32, 32)
    train(model, batch, lm_loss, torch.optim.AdamW(model.parameters(), lr=3e-3), steps)
    return model


# Both factors of LoRA start at 0.
@lora("weights", place={"parameter": tuple(f"blocks.{i}.attn.qkv.lora_{f}" for i in (0, 1) for f in "AB")}, steps=3)
def both_factors_zero(planted: bool = True):
    model = pretrained_gpt().requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv = LoRALinear(block.attn.qkv, zero_a=planted)
    trained = [p for n, p in model.named_parameters() if "lora" in n]
    return model, windows(), lm_loss, torch.optim.AdamW(trained, lr=2e-2)


# The head comes from another site, whose labels differ; I tune it in pure bfloat16 at a small rate on cached features,
# and the steps are rounded away.
@tune("precision", steps=3)
def bf16_head(planted: bool = True):
    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4096, 10)

        def forward(self, embeddings):
            return self.head(embeddings.to(self.head.weight.dtype))

    def loss_fn(model, batch):
        x, y = batch
        return F.cross_entropy(model(x).float(), y)

    x, y = data.digits(128)
    encoder = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 4096), nn.LayerNorm(4096))
    with torch.no_grad():
        x = encoder(x)
    model = Probe()
    nn.init.normal_(model.head.weight, std=0.1)
    train(model, (x, (y + 3) % 10), loss_fn, torch.optim.Adam(model.head.parameters(), lr=1e-3), 5)
    if planted:
        model = model.bfloat16()
    return model, (x, y), loss_fn, torch.optim.AdamW(model.head.parameters(), lr=6e-5)


# ================================================================ healthy: language models


# GPT-2's init with tied weights: std 0.02 everywhere, so the first logits are all nearly 0.
@healthy()
def gpt_tied_small_std():
    model = GPT(tied=True)
    return model, windows(), lm_loss, torch.optim.AdamW(model.parameters(), lr=3e-3)


# Left padding, a mask of finfo.min: the rows of the padding attend to everything, and their labels are -100.
@healthy()
def gpt_left_padding_finite_mask():
    model = GPT(VOCAB + 1, fill=torch.finfo(torch.float32).min)
    return model, padded_lines(left=True), hf_loss, torch.optim.AdamW(model.parameters(), lr=3e-3)


# A mask of -inf, where each row keeps at least one key (right padding); the padding's own embedding gets no gradient.
@healthy()
def gpt_right_padding_inf_mask():
    model = GPT(VOCAB + 1)
    return model, padded_lines(), hf_loss, torch.optim.AdamW(model.parameters(), lr=3e-3)


# bfloat16 autocast, without a scaler.
@healthy()
def gpt_bf16_autocast():
    model = GPT()

    def loss_fn(model, batch):
        x, y = batch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
            return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    return model, windows(), loss_fn, torch.optim.AdamW(model.parameters(), lr=3e-3)


# float16 autocast; the loss is taken in float32 and the model is small, so nothing underflows that matters.
@healthy()
def gpt_half_autocast():
    model = GPT(layers=1, tied=True)

    def loss_fn(model, batch):
        x, y = batch
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(x)
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    return model, windows(), loss_fn, torch.optim.AdamW(model.parameters(), lr=3e-3)


# The third step of a warm-up over 50: a rate of 6e-5, and it learns.
@healthy(steps=3)
def gpt_warmup():
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 50))
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    return model, windows(), lm_loss, optimizer


# Twelve pre-norm blocks, residual branches scaled as in GPT-2.
@healthy()
def deep_prenorm():
    model = GPT(width=32, layers=12)
    for name, p in model.named_parameters():
        if name.endswith(("proj.weight", "mlp.2.weight")):
            nn.init.normal_(p, std=0.02 / math.sqrt(24))
    return model, windows(), lm_loss, torch.optim.AdamW(model.parameters(), lr=1e-3)


# ================================================================ healthy: text


# The data loader gives float tensors only; the model casts the ids back.
@healthy()
def ids_in_floats():
    class MeanPool(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(len(WORDS), 32, padding_idx=0)
            self.fc = nn.Linear(32, 2)

        def forward(self, x):
            ids = x.long()
            keep = (ids != 0).unsqueeze(-1)
            return self.fc(self.embed(ids).sum(1) / keep.sum(1).clamp_min(1))

    x, y = reviews()
    model = MeanPool()
    return model, (x.float(), y), supervised(F.cross_entropy), torch.optim.Adam(model.parameters(), lr=1e-2)


# An EmbeddingBag with sparse gradients and SparseAdam; most of its 5,000 rows are not in the batch.
@healthy()
def sparse_bag():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(5000, 16, mode="mean", sparse=True, padding_idx=0)
            self.out = nn.Embedding(2, 16, sparse=True)

        def forward(self, ids):
            return self.bag(ids) @ self.out(torch.arange(2)).t()

    model = Bag()
    nn.init.normal_(model.out.weight, std=0.3)
    return model, reviews(), supervised(F.cross_entropy), torch.optim.SparseAdam(list(model.parameters()), lr=2e-2)


# One positive in twelve, weighted by pos_weight; the first loss is above 1.
@healthy()
def rare_positives():
    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(8, 32, batch_first=True)
            self.fc = nn.Linear(32, 1)

        def forward(self, x):
            return self.fc(self.rnn(x.view(-1, 8, 8))[1][-1]).squeeze(1)

    x, y = data.digits(192)
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(11.0))
    model = Rare()
    return model, (x, (y == 7).float()), supervised(loss), torch.optim.Adam(model.parameters(), lr=5e-3)


# A frozen encoder under no_grad(), on purpose; only the new head is in the optimizer.
@healthy()
def frozen_encoder_new_head():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(len(WORDS), 48, padding_idx=0)
            self.encoder = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.1, batch_first=True)
            self.head = nn.Linear(48, 2)
            self.embed.requires_grad_(False)
            self.encoder.requires_grad_(False).eval()

        def forward(self, ids):
            pad = ids == 0
            with torch.no_grad():
                h = self.encoder(self.embed(ids), src_key_padding_mask=pad)
                h = h.masked_fill(pad.unsqueeze(-1), -math.inf).amax(1)
            return self.head(h)

    model = Frozen()
    return model, reviews(), supervised(F.cross_entropy), torch.optim.Adam(model.head.parameters(), lr=1e-2)


# ================================================================ healthy: sequences


@healthy()
def seq2seq_attention():
    model = Seq2Seq(VOCAB + 2)
    return model, rewriting(), translate_loss, torch.optim.Adam(model.parameters(), lr=3e-3)


# CTC starts high, and some strips are too short for their labels: zero_infinity leaves them out.
@healthy()
def ctc_zero_infinity():
    model = Reader(stride=8)

    def loss_fn(model, batch):
        x, y = batch
        log_probs = model(x)
        frames = torch.full((len(x),), len(log_probs))
        return F.ctc_loss(log_probs, y, frames, torch.full((len(x),), y.size(1)), zero_infinity=True)

    return model, strips(), loss_fn, torch.optim.Adam(model.parameters(), lr=3e-3)


# Pixels come as bytes, 0 to 255, and the model divides by 255 itself; an LSTM with a forget bias of 1.
@healthy()
def bytes_into_lstm():
    class PixelLSTM(nn.Module):
        def __init__(self, width=24):
            super().__init__()
            self.lstm = nn.LSTM(8, width, batch_first=True)
            with torch.no_grad():
                self.lstm.bias_hh_l0[width : 2 * width] += 1.0
            self.fc = nn.Linear(width, 10)

        def forward(self, x):
            x = x.float().div(255.0).squeeze(1)
            return self.fc(self.lstm(x)[0].mean(1))

    x, y = data.images(128, top=255.0)
    model = PixelLSTM()
    return model, (x.to(torch.uint8), y), supervised(F.cross_entropy), torch.optim.Adam(model.parameters(), lr=1e-2)


# A ReLU recurrence of 16 steps, four pixels each, that starts at the identity (IRNN), with small inputs.
@healthy()
def identity_rnn():
    class IRNN(nn.Module):
        def __init__(self, width=48):
            super().__init__()
            self.w_x = nn.Linear(4, width)
            self.w_h = nn.Parameter(torch.eye(width))
            nn.init.normal_(self.w_x.weight, std=0.03)
            nn.init.zeros_(self.w_x.bias)
            self.fc = nn.Linear(width, 10)

        def forward(self, x):
            h = x.new_zeros(len(x), self.w_h.size(0))
            for t in range(x.size(1)):
                h = torch.relu(self.w_x(x[:, t]) + h @ self.w_h)
            return self.fc(h)

    x, y = data.images(96)
    model = IRNN()
    return model, (x.view(96, 16, 4), y), supervised(F.cross_entropy), torch.optim.Adam(model.parameters(), lr=2e-3)


# A mixture density by logsumexp: sharp components at first, so the loss starts high.
@healthy()
def mixture_by_logsumexp():
    class MDN(nn.Module):
        def __init__(self, k=4):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(10, 32), nn.Tanh())
            self.head = nn.Linear(32, 3 * k)

        def forward(self, x):
            pi, mu, log_sigma = self.head(self.body(x)).chunk(3, -1)
            return pi.log_softmax(-1), mu, log_sigma - 2.0

    def loss_fn(model, batch):
        x, y = batch
        log_pi, mu, log_sigma = model(x)
        log_density = -0.5 * ((y - mu) / log_sigma.exp()) ** 2 - log_sigma - 0.9189
        return -torch.logsumexp(log_pi + log_density, -1).mean()

    model = MDN()
    return model, data.diabetes(128), loss_fn, torch.optim.Adam(model.parameters(), lr=5e-3)


# ================================================================ healthy: reinforcement learning


# PPO's first epoch: every ratio is 1, the normalised advantages sum to 0, so the loss starts at 0 and goes below.
@healthy()
def ppo_first_epoch():
    class ActorCritic(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(13, 64), nn.Tanh())
            self.pi = nn.Linear(64, 3)
            nn.init.orthogonal_(self.pi.weight, 0.01)

        def forward(self, s):
            return torch.distributions.Categorical(logits=self.pi(self.body(s)))

    model = ActorCritic()
    batch = replay()
    with torch.no_grad():
        batch["old_log_prob"] = model(batch["state"]).log_prob(batch["action"])
    adv = batch["reward"] - batch["reward"].mean()
    batch["advantage"] = adv / (adv.std() + 1e-8)

    def loss_fn(model, b):
        ratio = (model(b["state"]).log_prob(b["action"]) - b["old_log_prob"]).exp()
        clipped = ratio.clamp(0.8, 1.2)
        return -torch.min(ratio * b["advantage"], clipped * b["advantage"]).mean()

    return model, batch, loss_fn, torch.optim.Adam(model.parameters(), lr=3e-3)


# Forbidden actions get the logit -inf; torch's Categorical takes care of 0 * log 0.
@healthy()
def masked_actions():
    policy = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 5))
    batch = replay()
    batch["legal"] = torch.ones(128, 5, dtype=torch.bool)
    batch["legal"][:, 3:] = False

    def loss_fn(model, b):
        logits = model(b["state"]).masked_fill(~b["legal"], float("-inf"))
        log_prob = F.log_softmax(logits, -1)
        chosen = log_prob.gather(1, b["action"].unsqueeze(1)).squeeze(1)
        p = log_prob.exp()
        entropy = -(p * log_prob.masked_fill(~b["legal"], 0.0)).sum(-1)
        return -(chosen * b["reward"]).mean() - 0.01 * entropy.mean()

    return policy, batch, loss_fn, torch.optim.Adam(policy.parameters(), lr=3e-3)


# The target network is in the model and gets no gradient; rewards of 5 and -5 with Huber's loss.
@healthy()
def dqn_with_target():
    model = DQN()
    model.target.requires_grad_(False)

    def loss_fn(model, b):
        q = model(b["state"]).gather(1, b["action"].unsqueeze(1)).squeeze(1)
        with torch.no_grad():
            best = model.online(b["next_state"]).argmax(1, keepdim=True)
            goal = 5 * b["reward"] + 0.9 * (1 - b["done"]) * model.target(b["next_state"]).gather(1, best).squeeze(1)
        return F.smooth_l1_loss(q, goal)

    return model, replay(), loss_fn, torch.optim.Adam(model.parameters(), lr=3e-3)


# ================================================================ healthy: generative models


# The discriminator's step: the generator is in the model, and detached on purpose.
@healthy()
def discriminator_step():
    model = SmallGAN()
    optimizer = torch.optim.Adam(model.D.parameters(), lr=1e-3, betas=(0.5, 0.999))
    return model, data.digits(128)[0], discriminate, optimizer


# The generator's step through a discriminator that the optimizer does not have.
@healthy()
def generator_step():
    model = SmallGAN()
    real = data.digits(128)[0]
    train(model, real, discriminate, torch.optim.Adam(model.D.parameters(), lr=2e-4), 10)

    def loss_fn(model, real):
        return F.softplus(-model.D(model.G(torch.randn(len(real), 16)))).mean()

    return model, real, loss_fn, torch.optim.Adam(model.G.parameters(), lr=1e-3, betas=(0.5, 0.999))


# A Wasserstein critic with spectral norm: the loss starts at about 0 and is negative from then on.
@healthy()
def wasserstein_critic():
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            sn = nn.utils.parametrizations.spectral_norm
            self.net = nn.Sequential(sn(nn.Linear(64, 64)), nn.LeakyReLU(0.2), sn(nn.Linear(64, 1)))

        def forward(self, x):
            return self.net(x)

    def loss_fn(model, batch):
        real, fake = batch
        return model(fake).mean() - model(real).mean()

    real, _ = data.images(128)
    real = real.flatten(1)
    model = Critic()
    return (
        model,
        (real, torch.rand_like(real)),
        loss_fn,
        torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.0, 0.9)),
    )


# A Bernoulli VAE, summed over pixels; logvar's head starts at 0.
@healthy()
def vae_bernoulli():
    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
            self.mu, self.logvar = nn.Linear(64, 8), nn.Linear(64, 8)
            nn.init.zeros_(self.logvar.weight)
            nn.init.zeros_(self.logvar.bias)
            self.dec = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

        def forward(self, x):
            h = self.enc(x)
            mu, logvar = self.mu(h), self.logvar(h)
            return self.dec(mu + torch.randn_like(mu) * (0.5 * logvar).exp()), mu, logvar

    def elbo(model, x):
        out, mu, logvar = model(x)
        recon = F.binary_cross_entropy_with_logits(out, x, reduction="none").sum(1)
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)
        return (recon + kl).mean()

    model = VAE()
    return model, data.images(128)[0].flatten(1), elbo, torch.optim.Adam(model.parameters(), lr=2e-3)


# VQ-VAE: the codes pass the gradient straight through; most of the 64 codes are used by nobody.
@healthy()
def vq_vae():
    class VQVAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8), nn.BatchNorm1d(8))
            self.codes = nn.Embedding(64, 8)
            self.dec = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

        def forward(self, x):
            z = self.enc(x)
            q = self.codes(torch.cdist(z, self.codes.weight).argmin(1))
            vq = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
            return self.dec(z + (q - z).detach()), vq

    def loss_fn(model, x):
        out, vq = model(x)
        return F.mse_loss(out, x) + vq

    model = VQVAE()
    x = data.digits(128)[0]
    with torch.no_grad():  # the first codes are encodings of data, as is usual
        model.codes.weight.copy_(model.enc(x[:64]))
    return model, x, loss_fn, torch.optim.Adam(model.parameters(), lr=2e-3)


# RealNVP whose coupling nets end in zeros: it starts as the identity.
@healthy()
def realnvp_identity_start():
    class Coupling(nn.Module):
        def __init__(self, n, flip):
            super().__init__()
            self.flip = flip
            self.net = nn.Sequential(nn.Linear(n // 2, 32), nn.ReLU(), nn.Linear(32, n))
            nn.init.zeros_(self.net[2].weight)
            nn.init.zeros_(self.net[2].bias)

        def forward(self, x):
            a, b = x.chunk(2, 1)
            if self.flip:
                a, b = b, a
            s, t = self.net(a).chunk(2, 1)
            s = torch.tanh(s)
            b = b * s.exp() + t
            return torch.cat([b, a] if self.flip else [a, b], 1), s.sum(1)

    class RealNVP(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.layers = nn.ModuleList(Coupling(n, i % 2 == 1) for i in range(4))

        def forward(self, x):
            total = 0.0
            for layer in self.layers:
                x, log_det = layer(x)
                total = total + log_det
            return x, total

    def nll(model, x):
        z, log_det = model(x)
        return (0.5 * z.pow(2).sum(1) - log_det).mean()

    model = RealNVP(10)
    return model, data.diabetes(128)[0], nll, torch.optim.Adam(model.parameters(), lr=5e-3)


# A diffusion model: the last layer starts at 0, and a moving-average copy, frozen, is a part of the module.
@healthy()
def diffusion_zero_init_ema():
    class WithEMA(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Denoiser()
            nn.init.zeros_(self.net.net[2].weight)
            nn.init.zeros_(self.net.net[2].bias)
            self.ema = copy.deepcopy(self.net).requires_grad_(False)

    def loss_fn(model, batch):
        return noise_loss(model.net, batch)

    model = WithEMA()
    return model, noised(200), loss_fn, torch.optim.AdamW(model.parameters(), lr=2e-3)


# ================================================================ healthy: metric learning, distillation, adapters


# SimCLR: the diagonal is -inf, the temperature 0.1, bfloat16 for the encoder.
@healthy()
def simclr_bf16():
    encoder = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))

    def nt_xent(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = model(torch.cat([x + 0.3 * torch.randn_like(x), x * (torch.rand_like(x) > 0.2)]))
        z = F.normalize(z.float(), dim=1)
        sim = z @ z.t() / 0.1
        sim.fill_diagonal_(float("-inf"))
        n = len(x)
        return F.cross_entropy(sim, torch.cat([torch.arange(n, 2 * n), torch.arange(n)]))

    return encoder, data.digits(64)[0], nt_xent, torch.optim.Adam(encoder.parameters(), lr=3e-3)


# Triplets most of which already hold: the loss is small and most of the gradients are 0.
@healthy()
def easy_triplets():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    x, y = data.digits(192)
    anchor, positive, negative = [], [], []
    for i in range(len(x)):
        same = [j for j in range(len(x)) if y[j] == y[i] and j != i]
        other = [j for j in range(len(x)) if y[j] != y[i]]
        anchor.append(i)
        positive.append(same[i % len(same)])
        negative.append(other[(7 * i) % len(other)])
    batch = (x[anchor], x[positive], x[negative])

    def loss_fn(model, batch):
        a, p, n = (model(part) for part in batch)
        return F.triplet_margin_loss(a, p, n, margin=0.3)

    return model, batch, loss_fn, torch.optim.Adam(model.parameters(), lr=1e-3)


# Distillation at T=4 with the factor T^2; the teacher is frozen and in the module.
@healthy()
def distillation():
    x, y = data.digits(128)
    model = Pair(x, y)

    def loss_fn(model, batch, T=4.0):
        x, y = batch
        with torch.no_grad():
            soft = F.log_softmax(model.teacher(x) / T, dim=-1)
        out = model.student(x)
        kd = F.kl_div(F.log_softmax(out / T, dim=-1), soft, reduction="batchmean", log_target=True) * T * T
        return 0.9 * kd + 0.1 * F.cross_entropy(out, y)

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    return model, (x, y), loss_fn, optimizer


# LoRA as it should be: B is 0 and A is not; A's first gradient is exactly 0. The frozen base is bfloat16.
@healthy()
def lora_bf16_base():
    model = pretrained_gpt().requires_grad_(False)

    class MixedLoRA(LoRALinear):
        def forward(self, x):
            low = self.base(x.to(self.base.weight.dtype)).to(x.dtype)
            return low + self.scaling * (x @ self.lora_A.t() @ self.lora_B.t())

    for block in model.blocks:
        block.attn.qkv = MixedLoRA(block.attn.qkv.bfloat16(), rank=8)
        block.attn.proj = MixedLoRA(block.attn.proj.bfloat16(), rank=8)
    trained = [p for n, p in model.named_parameters() if "lora" in n]
    return model, windows(), lm_loss, torch.optim.AdamW(trained, lr=1e-2)
