"""What is run, and how large. Imported first: a dry run asks for Triton's interpreter before triton is imported."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["INITLAB_BACKEND"] = "triton"

import torch  # noqa: E402

DEVICE = torch.device("cpu" if DRY else "cuda")
ELEMENTS = 1 << (12 if DRY else 28)
ROUNDS = 2 if DRY else 15
