"""Whole models: transformers' models under swap() and by init_model_, digests, and what a parameter costs the host.

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


LIBRARY = {
    "tiny Llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
        )
    ),
    "T5-small": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config()),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_swap(versus, name):
    """Building under swap(): 19 and 61 million parameters, in many tensors that are too small for two threads."""

    def ours():
        with initlab.swap():
            LIBRARY[name]()

    parameters = list(LIBRARY[name]().parameters())
    row = versus(
        ours=ours,
        peer=LIBRARY[name],
        floor=lambda: [p.data.fill_(1.0) for p in parameters],
        elements=sum(p.numel() for p in parameters),
        element_size=4,
    )
    row["case"] = f"{name} built under swap()"


def test_digest(versus, model):
    """The peer is torch.hash_tensor of each parameter, which does not tell the order of elements."""
    parameters = list(model.parameters())
    row = versus(
        ours=lambda: initlab.model_digest(model),
        peer=lambda: [torch.hash_tensor(p) for p in parameters],
        floor=lambda: [p.data.fill_(1.0) for p in parameters],
        elements=sum(p.numel() for p in parameters),
        element_size=4,
    )
    row["case"] = "model_digest of GPT-2"


@pytest.mark.parametrize("function", ["init_model_", "plan_model"])
@pytest.mark.parametrize("recipe", ["torch", "gpt2", "auto", "own"])
def test_host_cost_of_2000_parameters(versus, recipe, function):
    """1,000 linear layers of 4 x 4; ns per element are ns per parameter. The peer is reset_parameters of each."""
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(1000)))
    copies = [p.detach().clone() for p in layers.parameters()]  # "own" refuses values that the model's code cannot make
    row = versus(
        ours=lambda: getattr(initlab, function)(layers, 0, recipe),
        peer=lambda: [layer.reset_parameters() for layer in layers],
        floor=lambda: [p.fill_(1.0) for p in copies],
        elements=2000,
        element_size=40,
    )
    row["case"] = f"{function}, 2,000 tiny, {recipe}"
