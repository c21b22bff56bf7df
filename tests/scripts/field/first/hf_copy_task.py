import tempfile

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

set_seed(42)


class CountingDataset(Dataset):
    """Sequences that count up modulo the vocabulary with a per-sequence stride."""

    def __init__(self, n=512, length=24, vocab=32):
        g = torch.Generator().manual_seed(0)
        start = torch.randint(0, vocab, (n, 1), generator=g)
        stride = torch.randint(1, 4, (n, 1), generator=g)
        self.ids = (start + stride * torch.arange(length)) % vocab
        self.lengths = torch.randint(length // 2, length + 1, (n,), generator=g)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        ids = self.ids[i].clone()
        mask = (torch.arange(len(ids)) < self.lengths[i]).long()
        labels = ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


config = GPT2Config(vocab_size=32, n_positions=32, n_embd=48, n_layer=2, n_head=4,
                    bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)

with tempfile.TemporaryDirectory() as out:
    args = TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=16,
        max_steps=60,
        learning_rate=2e-3,
        warmup_steps=10,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=42,
    )
    trainer = Trainer(model=model, args=args, train_dataset=CountingDataset())
    trainer.train()

last = [h["loss"] for h in trainer.state.log_history if "loss" in h][-1]
total = sum(p.detach().double().sum().item() for p in model.parameters())
print("RESULT", repr(total), last)
