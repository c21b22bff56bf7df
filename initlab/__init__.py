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

from . import init  # noqa: E402
from .checkpoints import CheckpointReport, TensorRow, scan_checkpoint  # noqa: E402
from .clipping import (  # noqa: E402
    ClipReport,
    ClipStats,
    GradClipper,
    MedianSpikes,
    PartialNorm,
    QuantileSpikes,
    ZScoreSpikes,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from .data import ColumnRow, DataFault, DataReport, scan_data  # noqa: E402
from .diagnosis import Cause, Diagnosis, LayerRow, Place, diagnose, supervised  # noqa: E402
from .fitting import Advice, InputAdvice, LayerAdvice, advise  # noqa: E402
from .fusing import FuseReport, fuse_linear_relu, unfuse  # noqa: E402
from .guarding import BadStep, GuardReport, TrainingGuard, guard  # noqa: E402
from .models import (  # noqa: E402
    BuildRecord,
    InitReport,
    ModelDigest,
    Row,
    init_model_,
    model_digest,
    not_loaded,
    plan_model,
    recipes,
    record_build,
    swap,
)
from .nn import LinearReLU, all_reduce_flags_, linear_relu  # noqa: E402
from .watching import Fault, Watch, WatchReport, watch  # noqa: E402

__all__ = [
    "Advice",
    "BadStep",
    "BuildRecord",
    "Cause",
    "CheckpointReport",
    "ClipReport",
    "ClipStats",
    "ColumnRow",
    "DataFault",
    "DataReport",
    "Diagnosis",
    "Fault",
    "FuseReport",
    "GradClipper",
    "GuardReport",
    "InitReport",
    "InputAdvice",
    "LayerAdvice",
    "LayerRow",
    "LinearReLU",
    "MedianSpikes",
    "ModelDigest",
    "PartialNorm",
    "Place",
    "QuantileSpikes",
    "Row",
    "TensorRow",
    "TrainingGuard",
    "Watch",
    "WatchReport",
    "ZScoreSpikes",
    "advise",
    "all_reduce_flags_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "diagnose",
    "fuse_linear_relu",
    "get_total_norm",
    "guard",
    "init",
    "init_model_",
    "linear_relu",
    "model_digest",
    "not_loaded",
    "plan_model",
    "recipes",
    "record_build",
    "scan_checkpoint",
    "scan_data",
    "supervised",
    "swap",
    "unfuse",
    "watch",
]
__version__ = "0.2.0"
