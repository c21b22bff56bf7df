"""Toy speech recogniser: every symbol is a short burst in one of 10 bands, model is conv + GRU + CTC."""
import torch
import torch.nn as nn
import torch.nn.functional as F

N_SYM = 10
FRAMES = 64
BANDS = 12


def make_utterance(gen):
    length = int(torch.randint(4, 14, (1,), generator=gen))
    labels = torch.randint(1, N_SYM + 1, (length,), generator=gen)
    spec = 0.1 * torch.randn(BANDS, FRAMES, generator=gen)
    width = FRAMES // length
    for i, s in enumerate(labels.tolist()):
        spec[s, i * width:(i + 1) * width - 1] += 1.0
    return spec, labels


def collate(items):
    specs = torch.stack([s for s, _ in items])
    labels = torch.cat([l for _, l in items])
    lengths = torch.tensor([len(l) for _, l in items])
    return specs, labels, lengths


class Recogniser(nn.Module):
    def __init__(self, hidden=48):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv1d(BANDS, hidden, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv1d(hidden, hidden, 5, stride=4, padding=2),
            nn.ReLU(),
        )
        self.rnn = nn.GRU(hidden, hidden, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * hidden, N_SYM + 1)

    def forward(self, spec):
        h = self.conv(spec).transpose(1, 2)
        h, _ = self.rnn(h)
        return F.log_softmax(self.out(h), dim=-1).transpose(0, 1)


def main():
    torch.manual_seed(7)
    gen = torch.Generator().manual_seed(7)
    model = Recogniser()
    ctc = nn.CTCLoss(blank=0)
    opt = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(120):
        specs, labels, tgt_len = collate([make_utterance(gen) for _ in range(16)])
        logp = model(specs)
        in_len = torch.full((specs.size(0),), logp.size(0), dtype=torch.long)
        loss = ctc(logp, labels, in_len, tgt_len)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        opt.step()
        if step % 20 == 0 or step == 119:
            print(f"step {step}: ctc {loss.item():.3f}")


main()
