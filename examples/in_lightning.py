"""In Lightning: the start, clipping and the guard in a real Trainer. python examples/in_lightning.py

One batch of the digits holds a NaN. The guard leaves that step out, says why, and keeps the batch.
The training goes on.
"""

import tempfile
import warnings

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import initlab
from initlab.integrations.lightning import TrainingGuardCallback


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    warnings.simplefilter("ignore")  # Lightning's about small machines, and the guard's about the bad step
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16 - 0.3, torch.tensor(digits.target)
    x[700, 20] = float("nan")

    model = Digits()
    initlab.init_model_(model, seed=0, recipe="he")  # the same on every rank, whatever trainer and strategy
    print("digest", initlab.model_digest(model))
    with tempfile.TemporaryDirectory() as folder:
        # It clips too: leave gradient_clip_val out of the Trainer. Clipping alone is GradClipperCallback.
        guard = TrainingGuardCallback(max_norm=1.0, folder=folder, budget=5.0)  # seconds for a diagnosis
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(accelerator="cpu", max_epochs=3, callbacks=[guard], **quiet)
        trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=64))
        print(guard.report())

    good = x.isfinite().all(1)
    right = (model.net(x[good]).argmax(1) == y[good]).float().mean()
    print(f"{right:.1%} of the training set is right")


if __name__ == "__main__":
    main()
