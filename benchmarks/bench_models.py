"""Whole models: transformers' GPT-2 124M under swap() and by init_model_, and what 2,000 tiny parameters cost the host.

``pytest benchmarks --benchmark-only``. Nothing is timed before two ways of filling the model agree bit for bit.
"""

import pytest
import torch
from torch import nn

import initlab

transformers = pytest.importorskip("transformers")


def build():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


def under_swap():
    with initlab.swap():
        return build()


def on_meta():
    with torch.device("meta"):
        return build()


def by_name():
    model = on_meta()
    initlab.init_model_(model, 0, "own", device="cpu")
    return model


@pytest.fixture(scope="module")
def model():
    """A GPT-2 filled by name, equal to one that was built off the meta device and filled then."""
    named, built = by_name(), build()
    initlab.init_model_(built, 0, "own")
    assert initlab.model_digest(named) == initlab.model_digest(built)
    return named


@pytest.mark.parametrize(
    "ours", [under_swap, by_name], ids=["GPT-2 built under swap()", "GPT-2 by init_model_, from meta"]
)
def test_gpt2(versus, model, ours):
    """Building the model: the peer is the library's own way, the floor one fill_ of each parameter in place."""
    versus(
        ours=ours,
        peer=build,
        floor=lambda: [p.data.fill_(1.0) for p in model.parameters()],
        elements=sum(p.numel() for p in model.parameters()),
        element_size=4,
    )


def test_gpt2_in_place(versus, model):
    """Filling a model that exists: the peer draws its matrices with torch.nn.init.normal_."""
    parameters = list(model.parameters())

    def peer():
        for p in parameters:
            nn.init.normal_(p, std=0.02) if p.dim() > 1 else nn.init.zeros_(p)

    versus(
        ours=lambda: initlab.init_model_(model, 0, "gpt2"),
        peer=peer,
        floor=lambda: [p.data.fill_(1.0) for p in parameters],
        elements=sum(p.numel() for p in parameters),
        element_size=4,
    )


@pytest.mark.parametrize("recipe", ["torch", "gpt2", "auto"], ids=lambda recipe: f"2000 tiny parameters, {recipe}")
def test_host_cost_of_2000_parameters(versus, recipe):
    """1,000 linear layers of 4 x 4; ns per element are ns per parameter. The peer is reset_parameters of each."""
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(1000)))
    versus(
        ours=lambda: initlab.init_model_(layers, 0, recipe),
        peer=lambda: [layer.reset_parameters() for layer in layers],
        floor=lambda: [p.data.fill_(1.0) for p in layers.parameters()],
        elements=2000,
        element_size=40,
    )
