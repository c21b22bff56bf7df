import random
import torch
import torch.nn as nn
import torch.nn.functional as F

random.seed(0)
torch.manual_seed(0)

WORDS = {
    1: "awful broken refund terrible waste never worst".split(),
    2: "poor slow disappointing weak cheap noisy".split(),
    3: "okay average fine decent acceptable usual".split(),
    4: "good nice solid pleased handy reliable".split(),
    5: "excellent perfect love amazing best wonderful".split(),
}
FILLER = "the a it this product was is very and i bought for my".split()


def make_review():
    stars = random.choices([1, 2, 3, 4, 5], weights=[3, 3, 4, 5, 1])[0]
    toks = random.choices(WORDS[stars], k=3) + random.choices(FILLER, k=7)
    random.shuffle(toks)
    return " ".join(toks), stars


reviews = [make_review() for _ in range(1500)]
vocab = {w: i for i, w in enumerate(sorted({w for r, _ in reviews for w in r.split()}))}


def encode(batch):
    ids, offsets, labels = [], [], []
    for text, stars in batch:
        offsets.append(len(ids))
        ids.extend(vocab[w] for w in text.split())
        labels.append(stars)
    return torch.tensor(ids), torch.tensor(offsets), torch.tensor(labels)


class StarModel(nn.Module):
    def __init__(self, vocab_size, dim=32, num_classes=5):
        super().__init__()
        self.emb = nn.EmbeddingBag(vocab_size, dim, mode="mean")
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, ids, offsets):
        return self.fc(self.drop(self.emb(ids, offsets)))


model = StarModel(len(vocab))
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for epoch in range(5):
    random.shuffle(reviews)
    total = correct = 0
    for i in range(0, len(reviews), 16):
        ids, offsets, labels = encode(reviews[i:i + 16])
        logits = model(ids, offsets)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        correct += (logits.argmax(1) == labels).sum().item()
        total += len(labels)
    print(epoch, loss.item(), correct / total)
