"""Distributions, keys and fills for plain tensors. Installed as `initlab.kernels`; knows no modules and no names."""

if __name__ == "kernels":  # a checkout on sys.path, and somebody means Hugging Face's distribution of that name
    from ._hub_shim import hand_over as _hand_over

    _hand_over(globals())
else:
    from .backends import eagerly
    from .checksum import content_sum
    from .linear import linear_relu
    from .nonfinite import (
        NAN,
        NEGATIVE_INF,
        POSITIVE_INF,
        FlagBuffer,
        add_flag_,
        all_finite_fast,
        describe,
        nonfinite_flag,
        nonfinite_flag_fast,
    )
    from .norms import EPSILON, Norm, TensorGroups, clip_, clip_coefficient, combine_norms, grad_norm
    from .region import Region
    from .sampling import (
        STREAM_VERSION,
        Constant,
        Distribution,
        Draw,
        Normal,
        TruncatedNormal,
        Uniform,
        backend_of,
        fill_,
        generator_key,
        named_key,
    )
    from .tensors import PLAIN, all_plain, register_wrapper

    __all__ = [
        "EPSILON",
        "NAN",
        "NEGATIVE_INF",
        "PLAIN",
        "POSITIVE_INF",
        "STREAM_VERSION",
        "Constant",
        "Distribution",
        "Draw",
        "FlagBuffer",
        "Norm",
        "Normal",
        "Region",
        "TensorGroups",
        "TruncatedNormal",
        "Uniform",
        "add_flag_",
        "all_finite_fast",
        "all_plain",
        "backend_of",
        "clip_",
        "clip_coefficient",
        "combine_norms",
        "content_sum",
        "describe",
        "eagerly",
        "fill_",
        "generator_key",
        "grad_norm",
        "linear_relu",
        "named_key",
        "nonfinite_flag",
        "nonfinite_flag_fast",
        "register_wrapper",
    ]
