"""What fuse_linear_relu did to a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FuseReport:
    """What fuse_linear_relu did to a model: every Linear layer is in one of the two tables.

    Attributes:
        fused: names of the Linear layers that are LinearReLU layers now.
        skipped: by the name of every other one, why it was left alone.
        notes: by the name of a fused layer, what there is to know.
        share: the part of the model's matrix products that is flagged now, from 0 to 1. With an example it is of all
            floating-point operations that torch.utils.flop_counter counts in its run, without one of the
            multiplications that its Linear layers make for a row.
    """

    fused: tuple[str, ...]
    skipped: dict[str, str]
    notes: dict[str, str]
    share: float

    def __str__(self) -> str:
        counts = f"{len(self.fused)} fused, {len(self.skipped)} left alone"
        lines = [f"{counts}; {self.share:.0%} of the matrix products are flagged"]
        for name in self.fused:
            note = self.notes.get(name)
            lines.append(f"  {name}: LinearReLU" + (f"; {note}" if note else ""))
        lines += [f"  {name}: left alone, {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)
