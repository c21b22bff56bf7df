"""Each block of docs/stack.md runs alone, against the real package, and does to the run what the page says.

timm and torchtitan are no part of CI. The package index has torchvision, which timm needs, for CUDA's torch only:
beside a torch for the CPU it breaks the import of lightning and transformers. Where they are installed their blocks
run here.
"""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs/stack.md"
BLOCKS = dict(re.findall(r"\n## ([^\n]+)\n.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
STEPS = {"Plain loop": 4, "Lightning": 4, "Hugging Face's Trainer": 4, "accelerate": 2}
NOT_IN_CI = {"timm", "torchtitan"}
# torchvision's own registrations ask for operators that only its build for the same torch has; nobody here uses them.
LET_TORCHVISION_IN = 'import sys, types; sys.modules["torchvision._meta_registrations"] = types.ModuleType("m")\n'


def test_every_stack_is_there():
    assert set(BLOCKS) == {*STEPS, *NOT_IN_CI, "torch.compile", "DDP", "FSDP2"}
    for name, code in BLOCKS.items():
        ours = code.split("\nimport initlab\n")[1]
        for call in ("init_model_" if name != "torchtitan" else "swap", "Clipper", "watch"):
            assert call in ours, f"{name}: no {call}"


@pytest.mark.long
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs_alone(name, tmp_path):
    if name in NOT_IN_CI and find_spec(name) is None:
        pytest.skip(f"{name} is run by hand")
    code = (LET_TORCHVISION_IN if name in NOT_IN_CI else "") + BLOCKS[name]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    steps = STEPS.get(name, 1)
    assert f"ClipStats(steps={steps}, " in done.stdout
    assert "nonfinite=0, " in done.stdout
    if "watching" in BLOCKS[name]:
        assert f"nothing non-finite in {steps} steps, " in done.stdout
