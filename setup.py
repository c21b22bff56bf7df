"""Which folder becomes which package; everything else about the build is in pyproject.toml."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# Hugging Face's `kernels`, where it is installed, registers a setuptools hook that imports `kernels.locking`.
# With the project root on sys.path that would resolve to our own kernels/ and stop the build.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

from setuptools import find_packages, setup  # noqa: E402

setup(
    packages=[
        *find_packages(str(ROOT), include=["initlab", "initlab.*"]),
        "initlab.kernels",
        *(f"initlab.kernels.{name}" for name in find_packages(str(ROOT / "kernels"))),
    ],
    package_dir={"initlab": "initlab", "initlab.kernels": "kernels"},
)
