"""The hand-over where a checkout of initlab is on sys.path and somebody imports `kernels`, Hugging Face's distribution.

transformers does so at import: it reads the version from the distribution's metadata, and then looks for its names in
whatever module it finds. Where that distribution is installed, it takes this folder's place. Where it is not, the
folder looks like an empty package whose version is too old to use: no second copy of our modules under another name.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec


def hand_over(ours: dict[str, object]) -> None:
    """Put Hugging Face's `kernels` in this folder's place, or leave an empty package.

    Args:
        ours: the globals of this folder's own `__init__`, imported as `kernels`.
    """
    ours.update(__version__="0.0.0", __path__=[])
    others = [entry for entry in sys.path if not os.path.isfile(os.path.join(entry, "kernels", "_hub_shim.py"))]
    spec = PathFinder.find_spec("kernels", others)
    if spec is not None and spec.origin is not None and spec.loader is not None:
        sys.modules["kernels"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
