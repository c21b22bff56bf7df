"""Numeric kernels for the fragile moments of a training run; one random stream on every device.

Example:
    >>> import torch, initlab
    >>> seed = torch.manual_seed(0)
    >>> whole = initlab.init.normal_(torch.empty(3, 5))
    >>> seed = torch.manual_seed(0)
    >>> half = initlab.init.normal_(torch.empty(3, 5, dtype=torch.bfloat16))
    >>> torch.equal(half, whole.bfloat16())  # every dtype holds the rounding of the same draw
    True
"""

from . import _checkout

_checkout.link_kernels()  # before anything imports initlab.kernels

from . import init, recipes  # noqa: E402
from .clip import (  # noqa: E402
    ClipReport,
    GradClipper,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from .diagnose import Cause, Diagnosis, Place, diagnose, supervised  # noqa: E402
from .model import init_model_, not_loaded, plan_model  # noqa: E402
from .nn import LinearReLU, fuse_linear_relu, linear_relu  # noqa: E402
from .report import InitReport, model_digest  # noqa: E402
from .swap import swap  # noqa: E402
from .watch import watch  # noqa: E402

__all__ = [
    "Cause",
    "ClipReport",
    "Diagnosis",
    "GradClipper",
    "InitReport",
    "LinearReLU",
    "Place",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "diagnose",
    "fuse_linear_relu",
    "get_total_norm",
    "init",
    "init_model_",
    "linear_relu",
    "model_digest",
    "not_loaded",
    "plan_model",
    "recipes",
    "supervised",
    "swap",
    "watch",
]
__version__ = "0.1.0"
