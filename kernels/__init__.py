"""Laws, keys and fills for plain tensors. Installed as `initlab.kernels`; knows no modules and no names."""

if __name__ == "kernels":
    # A checkout of initlab is on sys.path and somebody means Hugging Face's distribution of that name, as
    # transformers does at import. Where that one is installed, it takes this module's place: transformers reads
    # the version from its metadata and would then look for its names here. Where it is not, this looks like a
    # version too old to use, and empty: no second copy of our modules under another name.
    import os as _os
    import sys as _sys
    from importlib.machinery import PathFinder as _PathFinder
    from importlib.util import module_from_spec as _module_from_spec

    __version__ = "0.0.0"
    __path__ = []

    _elsewhere = _PathFinder.find_spec(
        "kernels", [entry for entry in _sys.path if not _os.path.isfile(_os.path.join(entry, "kernels", "stream.py"))]
    )
    if _elsewhere is not None and _elsewhere.origin is not None and _elsewhere.loader is not None:
        _sys.modules["kernels"] = _module = _module_from_spec(_elsewhere)
        _elsewhere.loader.exec_module(_module)
else:
    from .digest import content_sum
    from .engines import eagerly
    from .grad_norm import Gathered, Norm, clip_, clip_coefficient, grad_norm
    from .linear_relu import linear_relu
    from .nonfinite import (
        NAN,
        NEGATIVE_INF,
        POSITIVE_INF,
        FlagBuffer,
        add_flag_,
        describe,
        flag_of,
        looks_finite,
        quick_flag,
    )
    from .region import Region
    from .sampling import Constant, Draw, Law, Normal, TruncatedNormal, Uniform, engine_of, fill_
    from .stream import STREAM_VERSION, generator_key, named_key

    __all__ = [
        "NAN",
        "NEGATIVE_INF",
        "POSITIVE_INF",
        "STREAM_VERSION",
        "Constant",
        "Draw",
        "FlagBuffer",
        "Gathered",
        "Law",
        "Norm",
        "Normal",
        "Region",
        "TruncatedNormal",
        "Uniform",
        "add_flag_",
        "clip_",
        "clip_coefficient",
        "content_sum",
        "describe",
        "eagerly",
        "engine_of",
        "fill_",
        "flag_of",
        "generator_key",
        "grad_norm",
        "linear_relu",
        "looks_finite",
        "named_key",
        "quick_flag",
    ]
