"""Digits, an MLP that embeds pairs (contrastive loss), float32, Lightning."""
import logging

import lightning
import torch
from sklearn.datasets import load_digits

import common

NAME = "run05_mlp_lightning_pairs"
STEPS = 50
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Siamese(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))

    def training_step(self, batch, batch_idx):
        left, right, same = batch
        distance = ((self.encoder(left) - self.encoder(right)) ** 2).sum(1).sqrt()
        apart = torch.nn.functional.relu(2.0 - distance)
        loss = (same * distance**2 + (1 - same) * apart**2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


def data():
    digits = load_digits()
    x, y = torch.from_numpy(digits.data.astype("float32")) / 16, torch.from_numpy(digits.target)
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(STEPS):
        i = torch.randint(0, len(x), (32,), generator=generator)
        j = torch.randint(0, len(x), (32,), generator=generator)
        j = torch.where(i == j, (j + 1) % len(x), j)
        batches.append([x[i], x[j], (y[i] == y[j]).float()])
    for step, row in ((28, 7), (41, 19)):  # the sampler drew the same picture twice
        batches[step - 1][1][row] = batches[step - 1][0][row]
        batches[step - 1][2][row] = 1.0
    return batches


class Report(lightning.Callback):
    def __init__(self, model):
        self.probe, self.loss = common.Probe(model), 0.0

    def on_before_backward(self, trainer, module, loss):
        self.loss = loss.detach()

    def on_after_backward(self, *args):
        self.probe.see(self.loss)


class Count(lightning.Callback):
    batches = 0

    def on_train_batch_end(self, *args):
        self.batches += 1


def main():
    torch.manual_seed(0)
    model = Siamese()
    loader = torch.utils.data.DataLoader(data(), batch_size=None)
    settings = dict(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    if common.PLAIN:
        report = Report(model)
        lightning.Trainer(callbacks=[report], **settings).fit(model, loader)
        return report.probe.print(NAME)
    from initlab.integrations.lightning import TrainingGuardCallback

    where = common.folder(NAME)
    callback = TrainingGuardCallback(max_norm=1.0, folder=str(where))
    count = Count()
    trainer = lightning.Trainer(callbacks=[callback, count], **settings)
    trainer.fit(model, loader)
    common.emit(NAME, callback.report(), where, count.batches, STEPS, common.finite(model))


if __name__ == "__main__":
    main()
