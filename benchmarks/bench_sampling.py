"""initlab.init against torch.nn.init on one large CPU tensor: 2^26 elements, 4 bytes or 2 written for each.

``pytest benchmarks --benchmark-only``; INITLAB_BENCH_ELEMENTS sets another size. Nothing is timed before the bits
of the backend that serves it equal the reference's.
"""

import os

import pytest
import torch
from initlab.kernels import Draw, Normal, TruncatedNormal, Uniform, fill_
from initlab.kernels.sampling import stream
from initlab.kernels.sampling._maps import map_of

from initlab import init

ELEMENTS = int(os.environ.get("INITLAB_BENCH_ELEMENTS", 1 << 26))

CASES = {
    "uniform_": (Uniform(0.0, 1.0), lambda m, x: m.uniform_(x)),
    "normal_": (Normal(0.0, 1.0), lambda m, x: m.normal_(x)),
    "trunc_normal_ at 2 sigma": (TruncatedNormal(), lambda m, x: m.trunc_normal_(x)),
    "trunc_normal_ at 100 sigma": (TruncatedNormal(0.0, 0.02), lambda m, x: m.trunc_normal_(x, 0.0, 0.02)),
    "kaiming_uniform_": (None, lambda m, x: m.kaiming_uniform_(x.view(1024, -1))),
}


def gate(distribution, dtype):
    """The backend in use gives the reference's bits, first and last elements of a tensor included."""
    if distribution is None:
        return
    x = torch.full((10_007,), float("nan"), dtype=dtype)
    fill_([Draw(x, distribution, 42)])
    reference = stream.block_values(map_of(distribution, dtype), 42, torch.arange(10_008 // 4), dtype).view(-1)
    assert torch.equal(x, reference[: len(x)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_sampling(versus, case, dtype):
    distribution, call = CASES[case]
    gate(distribution, dtype)
    x = torch.empty(ELEMENTS, dtype=dtype)
    versus(
        ours=lambda: call(init, x),
        peer=lambda: call(torch.nn.init, x),
        floor=lambda: x.fill_(1.0),
        elements=x.numel(),
        element_size=x.element_size(),
        rounds=7,
    )


@pytest.mark.parametrize("elements", [16, 4096])
@pytest.mark.parametrize("name", ["uniform_", "normal_"])
def test_one_call(versus, name, elements):
    """What a call costs: ns per element are ns per call, of 1,000."""
    x = torch.empty(elements)

    def calls(function):
        for _ in range(1000):
            function(x)

    row = versus(
        ours=lambda: calls(getattr(init, name)),
        peer=lambda: calls(getattr(torch.nn.init, name)),
        floor=lambda: calls(lambda x: x.fill_(1.0)),
        elements=1000,
        element_size=x.numel() * x.element_size(),
    )
    row["case"] = f"{name} on {elements} elements, per call"


def test_many_small_tensors(versus):
    """One fill_ of 2,000 tensors of 4 x 4; ns per element are ns per tensor."""
    tensors = [torch.empty(4, 4) for _ in range(2000)]
    draws = [Draw(x, Normal(), key) for key, x in enumerate(tensors)]

    def peer():
        for x in tensors:
            torch.nn.init.normal_(x)

    row = versus(
        ours=lambda: fill_(draws),
        peer=peer,
        floor=lambda: [x.fill_(1.0) for x in tensors],
        elements=len(tensors),
        element_size=64,
    )
    row["case"] = "fill_ of 2,000 x 4 x 4, per tensor"
