"""In accelerate: accumulation, bfloat16, a schedule and a checkpoint. python examples/in_accelerate.py

The second part loads the checkpoint into a run of its own: the clipper's counts go on where they were.
"""

import tempfile

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import initlab

loss_fn = nn.CrossEntropyLoss()


def prepare(accelerator: Accelerator):
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16 - 0.3, torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    initlab.init_model_(model, seed=0, recipe="he")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=45)
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    # Around the prepared optimizer, so that it clips where accumulation is complete. Call no clip_grad_norm_ beside it.
    clipper = initlab.GradClipper(optimizer, max_norm=1.0, scaler=accelerator.scaler)
    accelerator.register_for_checkpointing(clipper)
    return model, optimizer, loader, schedule, clipper


def train(accelerator: Accelerator, model, optimizer, loader, schedule, clipper, epochs: int) -> None:
    for epoch in range(epochs):
        total = 0.0
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = loss_fn(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            total += loss.item()
        norm = clipper.report.norm.item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.3f}, last gradient norm {norm:.2f}")
    print(clipper.stats())


def main() -> None:
    options = {"gradient_accumulation_steps": 2, "mixed_precision": "bf16", "cpu": True}
    with tempfile.TemporaryDirectory() as folder:
        accelerator = Accelerator(**options)
        run = prepare(accelerator)
        with initlab.watch(run[0]) as watching:  # names the module that makes the first NaN or inf
            train(accelerator, *run, epochs=3)
        print(watching.report())
        accelerator.save_state(folder)
        accelerator.free_memory()

        accelerator = Accelerator(**options)
        run = prepare(accelerator)
        accelerator.load_state(folder)
        print("loaded:", run[-1].stats())
        train(accelerator, *run, epochs=1)


if __name__ == "__main__":
    main()
