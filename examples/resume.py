"""Interrupted and resumed, to the same bits; and a look into the checkpoint: python examples/resume.py

The clipper belongs into a checkpoint as the optimizer does: its limit for spikes follows the norms of the steps before.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import initlab

loss_fn = nn.MSELoss()


class Run:
    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
        initlab.init_model_(self.model, seed=0, recipe="auto")
        self.optimizer = torch.optim.AdamW(self.model.named_parameters(), lr=1e-2)  # names: for the scan's report
        self.clipper = initlab.GradClipper(self.optimizer, max_norm=4.0, spikes=initlab.ZScoreSpikes())

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
            if step % 25 == 24:
                x = x * 30  # a batch of outliers: its gradient is a spike
            self.optimizer.zero_grad()
            loss_fn(self.model(x), x.sum(1, keepdim=True).sin()).backward()
            self.optimizer.step()  # clips

    def state(self) -> dict:
        parts = {"model": self.model, "optimizer": self.optimizer, "clipper": self.clipper}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, path: Path) -> None:
        for name, state in torch.load(path, weights_only=True).items():  # the clipper's state is plain numbers
            getattr(self, name).load_state_dict(state)


def main() -> None:
    whole = Run()
    whole.train(0, 100)
    print("without a break ", initlab.model_digest(whole.model), whole.clipper.stats())

    with tempfile.TemporaryDirectory() as folder:
        older, newer = Path(folder) / "step-50.pt", Path(folder) / "step-100.pt"
        first = Run()
        first.train(0, 50)
        torch.save(first.state(), older)

        second = Run()
        second.load(older)
        second.train(50, 100)
        torch.save(second.state(), newer)
        print("with a break    ", initlab.model_digest(second.model), second.clipper.stats())

        # Builds no model and runs no code of the file. In a shell: initlab scan step-100.pt --since step-50.pt
        print(initlab.scan_checkpoint(newer, since=older))


if __name__ == "__main__":
    main()
