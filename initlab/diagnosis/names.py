"""What torch calls its operations, brought to one short name each."""

import functools
import re
from typing import Any

_SAME = {
    **dict.fromkeys(("truediv", "rtruediv", "true_divide", "divide", "rdiv", "idiv", "itruediv"), "div"),
    **dict.fromkeys(("rpow", "ipow", "float_power"), "pow"),
    **dict.fromkeys(("linalg_norm", "linalg_vector_norm", "vector_norm", "linalg_matrix_norm", "matrix_norm"), "norm"),
    **dict.fromkeys(("native_batch_norm", "native_batch_norm_legit", "cudnn_batch_norm"), "batch_norm"),
    **dict.fromkeys(("safe_softmax", "softmax_backward_data", "special_softmax"), "softmax"),
    **dict.fromkeys(("special_log_softmax", "log_softmax_backward_data"), "log_softmax"),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward", "nll_loss_nd", "nll_loss2d"), "nll_loss"),
    **dict.fromkeys(("var_mean",), "var"),
    **dict.fromkeys(("std_mean",), "std"),
    **dict.fromkeys(("euclidean_dist", "cdist_forward", "pairwise_distance"), "cdist"),
    **dict.fromkeys(("mul_", "rmul", "imul", "multiply"), "mul"),
    **dict.fromkeys(("addmm", "mm", "bmm", "rmatmul", "baddbmm"), "matmul"),
    **dict.fromkeys(("weight_norm_interface",), "weight_norm"),
    **dict.fromkeys(("native_layer_norm",), "layer_norm"),
    **dict.fromkeys(("native_group_norm",), "group_norm"),
    **dict.fromkeys(("arccos",), "acos"),
    **dict.fromkeys(("arcsin",), "asin"),
    **dict.fromkeys(("arctanh",), "atanh"),
    **dict.fromkeys(("subtract", "rsub", "isub"), "sub"),
    **dict.fromkeys(
        (
            *("scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_flash_attention"),
            *("scaled_dot_product_efficient_attention", "scaled_dot_product_cudnn_attention"),
        ),
        "attention",
    ),
    "special_logsumexp": "logsumexp",
    "special_logit": "logit",
    "getitem": "index",
    "setitem": "index_put",
}  # fmt: skip

# Operations that turn ordinary numbers into NaN or infinity, forward or backward. The others overflow only on numbers
# that are huge already, or pass on what they get.
UNSAFE = frozenset(
    (
        *("acos", "acosh", "arccos", "arccosh", "arcsin", "arctanh", "asin", "atan2", "atanh", "batch_norm", "cdist"),
        *("cholesky", "cosh", "cumprod", "digamma", "div", "exp", "exp2", "expm1", "instance_norm", "inverse"),
        *("kl_div", "lgamma", "linalg_cholesky", "linalg_det", "linalg_eigh", "linalg_inv", "linalg_solve"),
        *("linalg_svd", "log", "log10", "log1p", "log2", "log_softmax", "logdet", "logit", "logsumexp", "mean"),
        *("median", "norm", "pow", "prod", "reciprocal", "renorm", "rsqrt", "sinh", "softmax", "sqrt", "square"),
        *("std", "tan", "var", "where", "xlogy", "poisson_nll_loss", "gaussian_nll_loss", "binary_cross_entropy"),
        *("cross_entropy", "nll_loss", "cosine_similarity", "ctc_loss", "normalize", "weight_norm"),
    )
)

# Those of UNSAFE that overflow on numbers that are merely large: what made those is to blame.
POWERS = frozenset(("norm", "pow", "square", "std", "var", "mean", "cdist", "batch_norm", "instance_norm"))

# Those that write infinities on purpose: masks.
MASKING = frozenset(
    (
        *("fill", "full", "full_like", "index_fill", "index_put", "masked_fill", "masked_scatter", "new_full"),
        *("scalar_tensor", "scatter", "tensor", "where", "zeros", "lift_fresh", "copy", "clone", "to_copy", "detach"),
    )
)

# Those that hand on the numbers that they get, or what is 0 of them.
COPYING = frozenset(
    (
        *("abs", "alias", "clamp", "clamp_min", "clone", "detach", "div", "expand", "lift_fresh", "maximum", "mul"),
        *(
            "neg",
            "permute",
            "repeat",
            "reshape",
            "select",
            "slice",
            "squeeze",
            "t",
            "to_copy",
            "transpose",
            "unsqueeze",
        ),
        *("unsafe_view", "view", "index", "add"),
    )
)


@functools.lru_cache(maxsize=4096)
def plain(name: str) -> str:
    """The short name of an operation.

    Example:
        >>> from initlab.diagnosis.names import plain
        >>> plain("__rdiv__"), plain("_softmax"), plain("log_")
        ('div', 'softmax', 'log')
    """
    name = name.strip("_")
    return _SAME.get(name, name)


def of_function(function: Any) -> str:
    """The short name of a function that torch calls."""
    return plain(getattr(function, "__name__", None) or type(function).__name__)


@functools.lru_cache(maxsize=4096)
def of_node(name: str) -> str:
    """The short name of the operation whose gradient a node of the graph computes.

    Example:
        >>> from initlab.diagnosis.names import of_node
        >>> of_node("LinalgVectorNormBackward0"), of_node("SqrtBackward0")
        ('norm', 'sqrt')
    """
    name = re.sub(r"(Backward)?\d*$", "", name.rpartition("::")[2])
    return plain(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
