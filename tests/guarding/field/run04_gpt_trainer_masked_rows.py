"""Text by characters, GPT with a padding mask, bfloat16, Hugging Face's Trainer."""
import torch
import transformers

import common

NAME = "run04_gpt_trainer_masked_rows"
STEPS, ROWS, LENGTH = 40, 8, 32


class Attention(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)

    def forward(self, x, allowed):
        b, t, c = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / (c // self.heads) ** 0.5
        scores = scores.masked_fill(~allowed, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))


class Block(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = torch.nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = torch.nn.LayerNorm(width)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width))

    def forward(self, x, allowed):
        x = x + self.attention(self.norm1(x), allowed)
        return x + self.mlp(self.norm2(x))


class GPT(torch.nn.Module):
    def __init__(self, width=48, heads=4, layers=2):
        super().__init__()
        self.token = torch.nn.Embedding(common.VOCABULARY, width)
        self.place = torch.nn.Embedding(LENGTH, width)
        self.blocks = torch.nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm, self.head = torch.nn.LayerNorm(width), torch.nn.Linear(width, common.VOCABULARY)

    def forward(self, input_ids, attention_mask, labels):
        t = input_ids.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        allowed = causal & attention_mask[:, None, None, :].bool()
        x = self.token(input_ids) + self.place(torch.arange(t))
        for block in self.blocks:
            x = block(x, allowed)
        logits = self.head(self.norm(x))
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        return {"loss": loss, "logits": logits}


def data():
    generator = torch.Generator().manual_seed(2)
    x, y = common.windows(LENGTH, STEPS * ROWS, generator)
    mask = torch.ones_like(x)
    for row in range(len(x)):  # padded on the right, as a tokenizer does
        keep = int(torch.randint(12, LENGTH + 1, (1,), generator=generator))
        mask[row, keep:] = 0
    short = 24 * ROWS + 5  # this one was padded on the left, by another script
    mask[short] = 1
    mask[short, :20] = 0
    y[mask == 0] = -100
    x[mask == 0] = 0
    return [{"input_ids": a, "attention_mask": m, "labels": b} for a, m, b in zip(x, mask, y)]


def arguments(where):
    return transformers.TrainingArguments(
        output_dir=str(where), max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=1e-3, bf16=True, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        dataloader_num_workers=0, seed=0,
    )


class InOrder:
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main():
    torch.manual_seed(0)
    model = GPT()
    where = common.folder(NAME)
    if common.PLAIN:
        probe = common.Probe(model)

        class Plain(InOrder, transformers.Trainer):
            def training_step(self, *args, **kwargs):
                loss = super().training_step(*args, **kwargs)
                probe.see(loss)
                return loss

        Plain(model, arguments(where), train_dataset=data()).train()
        return probe.print(NAME)
    from initlab.integrations.transformers import TrainingGuardMixin

    class Trainer(TrainingGuardMixin, InOrder, transformers.Trainer):
        pass

    trainer = Trainer(model, arguments(where), train_dataset=data(), guard_options={"folder": str(where)})
    trainer.train()
    common.emit(NAME, trainer.guard.report(), where, trainer.state.global_step, STEPS, common.finite(model))


if __name__ == "__main__":
    main()
