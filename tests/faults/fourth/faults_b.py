"""Faults in sequence models, attention, CTC, VAEs, GANs, diffusion."""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_wine


def _t(x):
    return torch.tensor(np.asarray(x), dtype=torch.float32)


def _digits(n=128):
    d = load_digits()
    return _t(d.data[:n]), torch.tensor(d.target[:n])


def _patterns(n, length, vocab, seed):
    """Periodic sequences: a next token can be learnt."""
    rng = np.random.default_rng(seed)
    start, step = rng.integers(0, vocab, (n, 1)), rng.integers(1, 4, (n, 1))
    return torch.tensor((start + step * np.arange(length)) % vocab)


# 17 ---- tril where True means "may not look"
class SelfAttention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x, mask):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        att = (q @ k.transpose(-2, -1)) / math.sqrt(d // self.heads)
        att = F.softmax(att.masked_fill(mask, float("-inf")), dim=-1)
        return self.proj((att @ v).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = SelfAttention(d, heads)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x, mask):
        x = x + self.attn(self.ln1(x), mask)
        return x + self.mlp(self.ln2(x))


class MiniGPT(nn.Module):
    def __init__(self, vocab=24, d=32, length=16):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, d), nn.Embedding(length, d)
        self.blocks = nn.ModuleList([Block(d, 4) for _ in range(2)])
        self.ln_f = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)
        for e in (self.tok, self.pos):
            nn.init.normal_(e.weight, std=0.1)

    def mask(self, t):
        return torch.ones(t, t, dtype=torch.bool).tril()

    def forward(self, idx):
        t = idx.shape[1]
        x = self.tok(idx) + self.pos(torch.arange(t))
        mask = self.mask(t)
        for b in self.blocks:
            x = b(x, mask)
        return self.head(self.ln_f(x))


class MiniGPTCausal(MiniGPT):
    def mask(self, t):
        return torch.ones(t, t, dtype=torch.bool).triu(1)


def _lm(model, batch):
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def fault_causal():
    torch.manual_seed(17)
    model = MiniGPT()
    return dict(model=model, batch=_patterns(16, 17, 24, 17), loss_fn=_lm, optimizer=torch.optim.AdamW(model.parameters(), 3e-3),
                kind=("operation",), place=("attn", "attention", "softmax", "masked_fill", "blocks.0"), curable=False, cure=None,
                wrong="masked_fill hides where the mask is True: with tril() the last row has nothing left to look at")


def twin_causal():
    torch.manual_seed(17)
    model = MiniGPTCausal()
    return dict(model=model, batch=_patterns(16, 17, 24, 17), loss_fn=_lm, optimizer=torch.optim.AdamW(model.parameters(), 3e-3))


# 18 ---- transformers, every label is -100
def _ignored(fixed):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(18)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
                                       resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    ids = _patterns(8, 12, 40, 18)
    labels = ids.clone()
    prompt = torch.tensor([4, 5, 3, 6, 4, 4, 5, 3] if fixed else [16] * 8)  # the truncation left only the prompt
    labels[torch.arange(12)[None] < prompt[:, None]] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return dict(model=model, batch=batch, loss_fn=lambda model, b: model(**b).loss, optimizer=torch.optim.AdamW(model.parameters(), 5e-3),
                kind=("target", "loss"), place=("batch['labels']", "labels"), curable=False, cure=None,
                wrong="all labels are -100, so that cross entropy is the mean of nothing")


def fault_ignored():
    return _ignored(False)


def twin_ignored():
    return _ignored(True)


# 19 ---- float16 attention, a mask of -1e9, padding on the left
class HalfEncoder(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.emb = nn.Embedding(30, d, padding_idx=0)
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.out = nn.Linear(d, 30)

    def bias(self, idx, dtype):
        t = idx.shape[1]
        allowed = torch.ones(t, t).tril() * (idx != 0)[:, None, :]
        return (1.0 - allowed.to(dtype)) * -1e9

    def forward(self, idx):
        x = self.emb(idx)
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + self.bias(idx, q.dtype)
        x = x + self.proj(scores.softmax(-1) @ v)
        return self.out(x)


class HalfEncoderMin(HalfEncoder):
    def bias(self, idx, dtype):
        return super().bias(idx, dtype).clamp_min(-1e4)


def _leftpad(cls):
    torch.manual_seed(19)
    model = cls().half()
    seq = _patterns(16, 10, 29, 19) + 1
    for i, n in enumerate([0, 3, 1, 5, 2, 0, 4, 6] * 2):
        seq[i, :n] = 0

    def loss_fn(model, batch):
        logits = model(batch[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0)
    return dict(model=model, batch=seq, loss_fn=loss_fn, optimizer=torch.optim.SGD(model.parameters(), 0.3),
                kind=("precision", "operation"), place=("softmax", "mul", "bias"), curable=True,
                cure="model = model.float(); optimizer = torch.optim.SGD(model.parameters(), 0.3)",
                wrong="-1e9 is -inf in float16: the first rows of a sequence padded on the left have nothing to look at")


def fault_leftpad():
    return _leftpad(HalfEncoder)


def twin_leftpad():
    return _leftpad(HalfEncoderMin)


# 20 ---- float16 RMSNorm
class RMSNorm(nn.Module):
    def __init__(self, d, upcast):
        super().__init__()
        self.g, self.upcast = nn.Parameter(torch.ones(d)), upcast

    def forward(self, x):
        h = x.float() if self.upcast else x
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return h.to(x.dtype) * self.g


def _rms(upcast):
    torch.manual_seed(20)
    d = load_wine()
    spread = np.where(d.data.std(0) > 0, d.data.std(0), 1)
    model = nn.Sequential(nn.Linear(13, 32), RMSNorm(32, upcast), nn.SiLU(), nn.Linear(32, 3)).half()
    with torch.no_grad():
        model[0].weight.mul_(600)  # an outlier dimension, as large checkpoints have them
    return dict(model=model, batch=(_t((d.data - d.data.mean(0)) / spread).half(), torch.tensor(d.target)),
                loss_fn=lambda model, b: F.cross_entropy(model(b[0]).float(), b[1]), optimizer=torch.optim.SGD(model.parameters(), 0.2),
                kind=("precision", "operation", "weights"), place=("pow", "1", "rsqrt", "mul", "0.weight"), curable=True,
                cure="model = model.float(); batch = (batch[0].float(), batch[1]); optimizer = torch.optim.SGD(model.parameters(), 0.2)",
                wrong="x ** 2 is beyond 65,504 in a float16 RMSNorm: its output is 0")


def fault_rms():
    return _rms(False)


def twin_rms():
    return _rms(True)


# 21 ---- nll_loss on logits
class CharGRU(nn.Module):
    def __init__(self, vocab=20, d=32):
        super().__init__()
        self.emb = nn.Embedding(vocab, 16)
        self.gru = nn.GRU(16, d, batch_first=True)
        self.fc = nn.Linear(d, vocab)

    def forward(self, x):
        return self.fc(self.gru(self.emb(x))[0])


def _nll(lossf):
    torch.manual_seed(21)
    model = CharGRU()

    def loss_fn(model, batch):
        logits = model(batch[:, :-1])
        return lossf(logits.reshape(-1, 20), batch[:, 1:].reshape(-1))
    return dict(model=model, batch=_patterns(16, 13, 20, 21), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 1e-2),
                wrong_end=True,  # falls without bound
                kind=("loss",), place=("loss", "nll_loss"), curable=True,
                cure="def loss_fn(model, batch):\n    return F.cross_entropy(model(batch[:, :-1]).reshape(-1, 20), batch[:, 1:].reshape(-1))",
                wrong="nll_loss takes log probabilities and gets logits")


def fault_nll():
    return _nll(F.nll_loss)


def twin_nll():
    return _nll(F.cross_entropy)


# 23 ---- linear state space layer with a random matrix
class StateSpace(nn.Module):
    def __init__(self, d_in, n, d_out, scale):
        super().__init__()
        self.A_mat = nn.Parameter(torch.randn(n, n) * scale)
        self.B = nn.Parameter(torch.randn(d_in, n) * 0.3)
        self.C = nn.Linear(n, d_out)

    def forward(self, u):
        h = torch.zeros(u.shape[0], self.A_mat.shape[0])
        for t in range(u.shape[1]):
            h = h @ self.A_mat + u[:, t] @ self.B
        return self.C(h)


def _ssm(scale):
    torch.manual_seed(23)
    x, y = _digits(100)
    model = StateSpace(1, 24, 10, scale)
    return dict(model=model, batch=(x.view(-1, 64, 1) / 8 - 1, y), loss_fn=lambda model, b: F.cross_entropy(model(b[0]), b[1]),
                optimizer=torch.optim.Adam(model.parameters(), 3e-3),
                kind=("weights",), place=("A_mat",), curable=True, cure="nn.init.orthogonal_(model.A_mat)",
                wrong="A from N(0, 1) has eigenvalues near 5, to the power of 64 steps")


def fault_ssm():
    return _ssm(1.0)


def twin_ssm():
    return _ssm(0.9 / math.sqrt(24))


# 24 ---- CTC
class Reader(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.conv = nn.Conv1d(8, 32, 3, stride=stride, padding=1)
        self.rnn = nn.GRU(32, 24, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(48, 6)

    def forward(self, x):
        h = F.relu(self.conv(x)).transpose(1, 2)
        return self.fc(self.rnn(h)[0])


def _lines(repeats):
    rng = np.random.default_rng(24)
    y = rng.integers(1, 6, (12, 4))
    for i in range(12):
        for j in range(1, 4):
            if y[i, j] == y[i, j - 1]:
                y[i, j] = y[i, j] % 5 + 1
    if repeats:
        y[5] = 3
    x = np.repeat(np.eye(8)[y], 4, axis=1) + 0.1 * rng.normal(size=(12, 16, 8))
    return _t(x).transpose(1, 2).contiguous(), torch.tensor(y)


def _ctc(model, batch):
    x, y = batch
    logp = model(x).log_softmax(-1).transpose(0, 1)
    frames = torch.full((len(x),), logp.shape[0])
    return F.ctc_loss(logp, y, frames, torch.full((len(y),), y.shape[1]))


def _repeat(stride):
    torch.manual_seed(24)
    model = Reader(stride)
    return dict(model=model, batch=_lines(True), loss_fn=_ctc, optimizer=torch.optim.Adam(model.parameters(), 5e-3),
                kind=("operation", "target", "loss"), place=("ctc_loss", "batch[1]", "loss"), curable=True,
                cure="def loss_fn(model, batch):\n    x, y = batch\n    logp = model(x).log_softmax(-1).transpose(0, 1)\n"
                     "    return F.ctc_loss(logp, y, torch.full((len(x),), logp.shape[0]), torch.full((len(y),), y.shape[1]), zero_infinity=True)",
                wrong="one row has 4 equal labels, which take 7 frames, and the convolution leaves 4")


def fault_repeat():
    return _repeat(4)


def twin_repeat():
    return _repeat(2)


# 26, 27 ---- VAEs
class VAE(nn.Module):
    def __init__(self, n, h=32, z=4):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(n, h), nn.ReLU())
        self.mu, self.logvar = nn.Linear(h, z), nn.Linear(h, z)
        self.dec = nn.Sequential(nn.Linear(z, h), nn.ReLU(), nn.Linear(h, n))

    def forward(self, x):
        h = self.enc(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.dec(z), mu, logvar


def _vaebce(scale):
    torch.manual_seed(26)
    x, _ = _digits(200)
    model = VAE(64)

    def loss_fn(model, batch):
        x = batch["pixels"]
        logits, mu, logvar = model(x)
        rec = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1).mean()
        return rec + kl
    return dict(model=model, batch={"pixels": x / scale}, loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 3e-3),
                wrong_end=True,  # falls without bound: a target of 16 is no probability
                kind=("target", "input", "loss"), place=("batch['pixels']", "pixels", "binary_cross_entropy", "loss"), curable=True,
                cure="batch = {'pixels': batch['pixels'] / 16}", wrong="pixels of 0 to 16 as targets of a binary cross entropy")


def fault_vaebce():
    return _vaebce(1)


def twin_vaebce():
    return _vaebce(16)


def _vaewine(fixed):
    torch.manual_seed(27)
    x = load_wine().data
    if fixed:
        x = (x - x.mean(0)) / x.std(0)
    model = VAE(13)

    def loss_fn(model, batch):
        rec, mu, logvar = model(batch)
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1).mean()
        return F.mse_loss(rec, batch, reduction="sum") / len(batch) + kl
    return dict(model=model, batch=_t(x), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 3e-3),
                kind=("input", "operation"), place=("batch", "exp", "feature 12"), curable=True,
                cure="batch = (batch - batch.mean(0)) / batch.std(0)",
                wrong="unscaled wine: log variances of hundreds, of which exp is inf")


def fault_vaewine():
    return _vaewine(False)


def twin_vaewine():
    return _vaewine(True)


# 28, 29, 30 ---- GANs
class Pair(nn.Module):
    def __init__(self, out=None):
        super().__init__()
        self.G = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        layers = [nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1)]
        self.D = nn.Sequential(*layers, *([out] if out else []))


def _moons():
    from sklearn.datasets import make_moons
    return _t(make_moons(128, noise=0.05, random_state=0)[0])


def _generator(fixed):
    torch.manual_seed(28)
    model = Pair()

    def loss_fn(model, real):
        fake = model.G(torch.randn(len(real), 8))
        score = model.D(fake if fixed else fake.detach())
        return F.binary_cross_entropy_with_logits(score, torch.ones_like(score))
    return dict(model=model, batch=_moons(), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.G.parameters(), 1e-2),
                kind=("gradient",), place=("detach", "G.0", "G.2"), curable=False, cure=None,
                wrong="the generator's step was copied from the discriminator's, with fake.detach()")


def fault_generator():
    return _generator(False)


def twin_generator():
    return _generator(True)


def _doublesigmoid(fixed):
    torch.manual_seed(29)
    model = Pair(None if fixed else nn.Sigmoid())

    def loss_fn(model, real):
        fake = model.G(torch.randn(len(real), 8)).detach()
        real_score, fake_score = model.D(real), model.D(fake - 3)
        return (F.binary_cross_entropy_with_logits(real_score, torch.ones_like(real_score))
                + F.binary_cross_entropy_with_logits(fake_score, torch.zeros_like(fake_score)))
    return dict(model=model, batch=_moons(), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.D.parameters(), 2e-2),
                wrong_end=True,  # cannot fall below 1.006, and stays there
                kind=("loss",), place=("D.3", "sigmoid", "loss"), curable=True, cure="model.D[3] = nn.Identity()",
                wrong="a sigmoid at the end of the discriminator, and one in BCEWithLogits")


def fault_doublesigmoid():
    return _doublesigmoid(False)


def twin_doublesigmoid():
    return _doublesigmoid(True)


def _penalty(eps):
    torch.manual_seed(30)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def loss_fn(critic, batch):
        real, fake = batch
        mix = torch.rand(len(real), 1)
        x = (mix * real + (1 - mix) * fake).requires_grad_()
        g, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        norm = torch.sqrt((g ** 2).sum(1) + eps)
        return critic(fake).mean() - critic(real).mean() + 10 * ((norm - 1) ** 2).mean()
    with torch.no_grad():
        for i in (0, 2):
            model[i].bias.sub_(0.3)  # some points reach no unit, as after an hour of training
    real = _moons()
    return dict(model=model, batch=(real, torch.randn(len(real), 2) * 0.7), loss_fn=loss_fn,
                optimizer=torch.optim.Adam(model.parameters(), 2e-3, betas=(0.0, 0.9)),
                kind=("operation", "gradient"), place=("sqrt",), curable=False, cure=None,
                wrong="the gradient penalty takes sqrt(sum(g ** 2)) where g is 0: its derivative is inf")


def fault_penalty():
    return _penalty(0.0)


def twin_penalty():
    return _penalty(1e-12)


# 31, 32 ---- diffusion
class Denoiser(nn.Module):
    def __init__(self, n=64, steps=50):
        super().__init__()
        self.time = nn.Embedding(steps, 64)
        self.net = nn.Sequential(nn.Linear(n + 64, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, n))
        beta = torch.linspace(1e-4, 0.2, steps)
        self.register_buffer("abar", torch.cumprod(1 - beta, 0))

    def forward(self, x, t):
        return self.net(torch.cat([x, self.time(t)], -1))


def _noise(fixed):
    torch.manual_seed(31)
    x, _ = _digits(512)
    model = Denoiser()

    def q_sample(x0, t, noise=None):
        noise = torch.randn_like(x0) if noise is None else noise
        a = model.abar[t][:, None]
        return a.sqrt() * x0 + (1 - a).sqrt() * noise

    def loss_fn(model, x0):
        t = torch.randint(0, 50, (len(x0),))
        noise = torch.randn_like(x0)
        xt = q_sample(x0, t, noise) if fixed else q_sample(x0, t)
        return F.mse_loss(model(xt, t), noise)
    return dict(model=model, batch=x / 8 - 1, loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 3e-3),
                kind=("target", "loss"), place=("loss", "randn", "target"), curable=False, cure=None,
                wrong="q_sample draws noise of its own, and the target is another: the loss stays at 1, its variance")


def fault_noise():
    return _noise(False)


def twin_noise():
    return _noise(True)


def _snr(fixed):
    torch.manual_seed(32)
    x, _ = _digits(256)
    model = Denoiser()
    s = torch.arange(50) / 50
    f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
    model.abar.copy_(f / f[0])  # the cosine schedule begins at exactly 1

    def loss_fn(model, x0):
        t = torch.arange(len(x0)) % 50
        a = model.abar[t][:, None]
        noise = torch.randn_like(x0)
        pred = model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t)
        snr = a / (1 - a).clamp_min(1e-3) if fixed else a / (1 - a)
        weight = snr.sqrt() if not fixed else snr.clamp(max=5.0).sqrt()
        return (weight * (pred - noise) ** 2).mean()
    return dict(model=model, batch=x / 8 - 1, loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 3e-3),
                kind=("operation",), place=("div", "loss"), curable=False, cure=None,
                wrong="the signal-to-noise ratio a / (1 - a) at a step where a is exactly 1")


def fault_snr():
    return _snr(False)


def twin_snr():
    return _snr(True)


# 51 ---- log spectrogram of a recording with silence
class Listener(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(33)
        self.conv = nn.Conv1d(33, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, spec):
        h = self.norm(spec.transpose(1, 2)).transpose(1, 2)
        return self.fc(F.relu(self.conv(h)).amax(2))


def _speech(floor):
    torch.manual_seed(51)
    y = torch.arange(24) % 4
    t = torch.arange(1024) / 1024
    wave = torch.sin(2 * math.pi * (40 + 60 * y[:, None]) * t) * (0.5 + torch.rand(24, 1)) + 0.05 * torch.randn(24, 1024)
    wave[7, 700:] = 0  # the recording ends, the rest is padding
    model = Listener()

    def loss_fn(model, batch):
        wave, y = batch
        spec = torch.stft(wave, 64, hop_length=32, window=torch.hann_window(64), return_complex=True).abs() + floor
        return F.cross_entropy(model(torch.log(spec)), y)
    return dict(model=model, batch=(wave, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 5e-3),
                kind=("operation", "input"), place=("log", "batch[0]"), curable=False, cure=None,
                wrong="the logarithm of a spectrogram whose frames of padding are exactly 0")


def fault_speech():
    return _speech(0.0)


def twin_speech():
    return _speech(1e-5)


# 52 ---- kl_div with a target in logarithms
class Net8(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten())
        self.fc = nn.Linear(width * 36, 10)

    def forward(self, x):
        return self.fc(self.body(x))


def _kllog(log_target):
    torch.manual_seed(52)
    x, _ = _digits(64)
    big, model = Net8(16).requires_grad_(False), Net8(4)
    big.fc.weight.mul_(10)

    def loss_fn(model, x):
        with torch.no_grad():
            goal = F.log_softmax(big(x), -1)
        return F.kl_div(F.log_softmax(model(x), -1), goal, reduction="batchmean", log_target=log_target)
    return dict(model=model, batch=(x / 8 - 1).view(-1, 1, 8, 8), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 5e-3),
                kind=("loss", "operation", "target"), place=("kl_div", "xlogy", "log", "loss"), curable=False, cure=None,
                wrong="kl_div takes the target as probabilities, and gets their logarithms without log_target=True")


def fault_kllog():
    return _kllog(False)


def twin_kllog():
    return _kllog(True)


# 53 ---- output tied to an embedding from N(0, 1)
class TiedLM(nn.Module):
    def __init__(self, std, vocab=64, d=128):
        super().__init__()
        self.tok = nn.Embedding(vocab, d)
        nn.init.normal_(self.tok.weight, std=std)
        self.mix = nn.GRU(d, d, batch_first=True)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, idx):
        e = self.tok(idx)
        return self.head(self.norm(e + self.mix(e)[0]))


def _tied(std):
    torch.manual_seed(53)
    model = TiedLM(std)
    return dict(model=model, batch=_patterns(16, 13, 64, 53), loss_fn=_lm, optimizer=torch.optim.AdamW(model.parameters(), 1e-3),
                wrong_end=True,  # begins near 100 and is far above ln(64) = 4.2, what guessing costs, after 25 steps
                kind=("weights",), place=("tok", "head"), curable=True, cure="nn.init.normal_(model.tok.weight, std=0.02)",
                wrong="the head is the embedding, and that is drawn from N(0, 1): logits of 100")


def fault_tied():
    return _tied(1.0)


def twin_tied():
    return _tied(0.02)
