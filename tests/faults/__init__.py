"""Planted faults and healthy models: what diagnose() is judged by. Importing loads no data."""

from . import cnn, gan, mlp, physics, rnn, transformer
from .case import FAMILIES, KINDS, Fault, Healthy
from .healthy import HEALTHY

FAULTS: list[Fault] = [
    *mlp.FAULTS,
    *cnn.FAULTS,
    *rnn.FAULTS,
    *transformer.FAULTS,
    *gan.FAULTS,
    *physics.FAULTS,
]

__all__ = ["FAMILIES", "FAULTS", "HEALTHY", "KINDS", "Fault", "Healthy"]
