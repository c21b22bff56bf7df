"""scikit-learn's small data sets as tensors: fresh copies, the rows in a fixed random order."""

import functools

import torch


@functools.cache
def _load(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn import datasets

    options = {"scaled": False} if name == "diabetes" else {}
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True, **options)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(x).float()[order], torch.from_numpy(y)[order]


def standardised(x: torch.Tensor) -> torch.Tensor:
    """As StandardScaler does it: a constant column becomes zero."""
    std = x.std(0, correction=0)
    return (x - x.mean(0)) / torch.where(std > 0, std, 1.0)


def _part(name: str, rows: int, raw: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = _load(name)
    x = x if raw else standardised(x)
    return x[:rows].clone(), y[:rows].clone()


def digits(rows: int = 128, *, raw: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """64 pixels in 0..16 (raw) or standardised; 10 classes."""
    return _part("digits", rows, raw)


def images(rows: int = 128, *, top: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits as images of one channel, 8x8, in 0..top; 10 classes."""
    x, y = _part("digits", rows, raw=True)
    return x.reshape(-1, 1, 8, 8) * (top / 16), y


def wine(rows: int = 128, *, raw: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """13 features, raw from 0.1 to 1700; 3 classes."""
    return _part("wine", rows, raw)


def cancer(rows: int = 128, *, raw: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """30 features, raw from 0 to 4000; 2 classes."""
    return _part("breast_cancer", rows, raw)


def diabetes(rows: int = 128, *, raw: bool = False, raw_y: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """10 features, raw from 1 to 300; one target of shape (rows, 1), raw from 25 to 346."""
    x, y = _load("diabetes")
    y = y.float().reshape(-1, 1)
    x, y = x if raw else standardised(x), y if raw_y else standardised(y)
    return x[:rows].clone(), y[:rows].clone()
