"""The tensors in nested containers, and their paths."""

import collections
import dataclasses
from collections import UserDict, deque, namedtuple

import pytest
import torch
from torch.utils._pytree import keystr

from initlab._tree import tensors_in, tensors_with_paths

X, Y = torch.ones(1), torch.zeros(2)


class Odd(list):
    """A subclass, which pytree takes for a leaf."""


@dataclasses.dataclass
class Out:
    logits: torch.Tensor
    extra: object = None


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        (X, [""]),
        (None, []),
        ("text", []),
        ([X, 3, (Y,)], ["[0]", "[2][0]"]),
        (Pair(None, X), ["[1]"]),
        (Odd([X]), ["[0]"]),
        ({"a": X, 3: [Y]}, ["['a']", "[3][0]"]),
        (UserDict(a=X), ["['a']"]),
        (collections.OrderedDict(b=X, a=Y), ["['b']", "['a']"]),
        (Out(X, {"deep": Y}), [".logits", ".extra['deep']"]),
        (deque([X, Y]), ["[0]", "[1]"]),
        (torch.ones(2, 2).max(0), ["[0]", "[1]"]),
    ],
)
def test_paths(value, paths):
    found = list(tensors_with_paths(value))
    assert [keystr(path) for path, _ in found] == paths
    assert all(a is b for a, (_, b) in zip(tensors_in(value), found, strict=True))


@pytest.mark.long
def test_what_transformers_puts_out():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.BaseModelOutput(last_hidden_state=X, hidden_states=(X, Y))
    paths = [keystr(path) for path, _ in tensors_with_paths(value)]
    assert paths == ["['last_hidden_state']", "['hidden_states'][0]", "['hidden_states'][1]"]


def test_depth():
    loop = [X]
    loop.append(loop)
    assert len(list(tensors_in(loop, depth=3))) == 3
    assert list(tensors_in([[X]], depth=1)) == []
    assert list(tensors_in(X, depth=0)) == [X]
