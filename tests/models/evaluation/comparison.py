"""Compares starts of a model with the library's own builds of it: constants, distributions, copies.

It knows nothing of what initlab read or recorded: two-sample tests on the values alone.
"""

import math
from collections.abc import Callable, Sequence

import torch
from scipy.stats import ks_2samp
from torch import Tensor, nn

LEVEL = 1e-8  # of one test; a model has up to 3 a tensor
SAMPLE = 20_000  # elements of a tensor, of all seeds together


def start(build: Callable[[], nn.Module], seed: int) -> dict[str, Tensor]:
    """The values that the library's own build has under a seed of torch."""
    torch.manual_seed(seed)
    return values(build())


def values(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def differences(theirs: Sequence[dict[str, Tensor]], ours: Sequence[dict[str, Tensor]]) -> list[str]:
    """What differs between the starts of a library and ours, one line a tensor; empty if nothing does."""
    found = []
    if theirs[0].keys() != ours[0].keys():
        found.append(f"other names: {sorted(theirs[0].keys() ^ ours[0].keys())[:4]}")
    for name in theirs[0].keys() & ours[0].keys():
        a, b = [t[name] for t in theirs], [t[name] for t in ours]
        if (why := _difference(a, b)) is not None:
            found.append(f"{name}: {why}")
    if (mine := _equal_names(ours[0])) != (wanted := _equal_names(theirs[0])):
        found.append(f"other copies: {sorted(map(sorted, mine ^ wanted))[:2]}")
    return sorted(found)


def _difference(theirs: list[Tensor], ours: list[Tensor]) -> str | None:
    if theirs[0].shape != ours[0].shape or theirs[0].dtype != ours[0].dtype:
        return f"{tuple(ours[0].shape)} {ours[0].dtype} for {tuple(theirs[0].shape)} {theirs[0].dtype}"
    if any(t.is_meta for t in ours):
        return "on meta"
    if theirs[0].numel() == 0:
        return None
    if all(_same(t, theirs[0]) for t in theirs):
        return (
            None if all(_same(t, theirs[0]) for t in ours) else f"{_shown(ours[0])} for the fixed {_shown(theirs[0])}"
        )
    if not theirs[0].is_floating_point():
        return None  # random integers: buffers of the library, which nobody fills
    tests: dict[str, Callable[[Tensor], Tensor]] = {"values": lambda t: t.flatten()}
    if theirs[0].dim() > 1:
        tests["norms of rows"] = lambda t: t.flatten(1).norm(dim=1)
        tests["norms of columns"] = lambda t: t.flatten(1).norm(dim=0)
    for what, of in tests.items():
        a, b = (_sample([of(t.double()) for t in side]) for side in (theirs, ours))
        size = len(a) * len(b) / (len(a) + len(b))
        # Massart's bound: scipy's p-value of a few numbers that are apart is 0.
        if 2 * math.exp(-2 * size * ks_2samp(a, b, method="asymp").statistic ** 2) < LEVEL:
            return f"{what} have mean {b.mean():.4g}, std {b.std():.4g}; the library's {a.mean():.4g}, {a.std():.4g}"
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point() or a.is_complex():
        return torch.allclose(a, b, rtol=1e-5, atol=1e-8, equal_nan=True)
    return torch.equal(a, b)


def _sample(parts: list[Tensor]) -> "Tensor":
    each = math.ceil(SAMPLE / len(parts))
    return torch.cat([p[:: max(1, p.numel() // each)] for p in parts]).numpy()  # type: ignore[return-value]


def _shown(t: Tensor) -> str:
    t = t.double() if not t.is_complex() else t.abs().double()
    return f"{t.min():.4g} to {t.max():.4g}"


def _equal_names(tensors: dict[str, Tensor]) -> set[frozenset[str]]:
    """Groups of names of tensors that hold equal values, constants left out."""
    groups: dict[bytes, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() > 1 and not bool((tensor == tensor.flatten()[0]).all()):
            key = f"{tuple(tensor.shape)}".encode() + tensor.float().contiguous().numpy().tobytes()
            groups.setdefault(key, []).append(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}
