"""In Hugging Face's Trainer: a small Llama from its config, clipped and guarded. python examples/in_trainer.py

It learns to spell from the help texts that Python ships. Nothing is downloaded.
"""

import tempfile
from pydoc_data.topics import topics

import torch
import transformers

import initlab
from initlab.integrations.transformers import TrainingGuardMixin


class Trainer(TrainingGuardMixin, transformers.Trainer):  # the mixin first; it goes before trl's trainers too
    pass


def main() -> None:
    transformers.logging.set_verbosity_error()
    text = "\n".join(topics.values()).encode("ascii", "replace")
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[: 64 * 800].view(-1, 64)
    data = [{"input_ids": row, "labels": row} for row in rows]

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    # "own" gives each weight what the model's own _init_weights gives it, but by name: equal on every machine.
    initlab.init_model_(model, seed=0, recipe="own", device="cpu")
    print("digest", initlab.model_digest(model))

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_grad_norm=1.0,  # it stays the place for this; the norm in the log is the clipper's
            learning_rate=5e-3,
            per_device_train_batch_size=16,
            num_train_epochs=1,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data, guard_options={"folder": f"{folder}/guard"})
        trainer.train()  # prints loss and grad_norm
    print(trainer.guard.report())
    print(trainer.clipper.stats())


if __name__ == "__main__":
    main()
