import os
import tempfile

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

SEQ_LEN = 16
N_LABELS = 4


class SyntheticReviews(Dataset):
    """Token ids 10..89; every label has its own range of 10 'topic' tokens that fills half of the text."""

    def __init__(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, N_LABELS, (n,), generator=g)
        ids = torch.randint(50, 90, (n, SEQ_LEN), generator=g)
        topic = 10 + self.labels[:, None] * 10 + torch.randint(0, 10, (n, SEQ_LEN), generator=g)
        use = torch.rand(n, SEQ_LEN, generator=g) < 0.5
        self.ids = torch.where(use, topic, ids)
        self.ids[:, 0] = 2

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {
            "input_ids": self.ids[i],
            "attention_mask": torch.ones(SEQ_LEN, dtype=torch.long),
            "labels": self.labels[i],
        }


def accuracy(eval_pred):
    logits, labels = eval_pred
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


def main():
    set_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=N_LABELS,
    )
    model = BertForSequenceClassification(config)
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            output_dir=out,
            max_steps=120,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=128,
            learning_rate=1e-1,
            weight_decay=0.01,
            lr_scheduler_type="constant",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=SyntheticReviews(2000, 1),
            eval_dataset=SyntheticReviews(256, 2),
            compute_metrics=accuracy,
        )
        trainer.train()
        print(trainer.evaluate())


if __name__ == "__main__":
    main()
