"""Spike policies against plain Python: floats, math and sorted, one IEEE operation at a time. So bits are compared."""

import importlib
import math
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import initlab
from initlab.clipping import MedianSpikes, QuantileSpikes, SpikePolicy, ZScoreSpikes, spike_differences


class Reference:
    """One policy as a program without tensors."""

    def __init__(self, policy):
        self.policy, self.count, self.norms = policy, 0, []
        self.mean = self.variance = 0.0

    def step(self, norm):
        """Limit and spike, as `SpikePolicy.step`."""
        if not math.isfinite(norm):
            return math.inf, False
        warm = self.count < self.policy.warmup
        limit = {"quantile": self.quantile, "median": self.median, "zscore": self.zscore}[self.policy.kind](norm, warm)
        if warm or not limit > 0.0:
            limit = math.inf
        return limit, norm > limit

    def push(self, norm):
        self.count += 1
        self.norms.append(norm)

    def window(self):
        return sorted(self.norms[-self.policy.window :])

    def quantile(self, norm, warm):
        self.push(norm)
        return interpolated(self.window(), self.policy.q)

    def median(self, norm, warm):
        limit = interpolated(self.window(), 0.5) * self.policy.factor if self.norms else math.nan
        self.push(norm)
        return limit

    def zscore(self, norm, warm):
        threshold, decay = self.policy.threshold, self.policy.decay
        limit = math.inf
        if self.variance > 0.0 and norm > self.mean:
            limit = self.mean + self.variance * threshold * threshold / (norm - self.mean)
            limit = limit if norm > limit else math.inf
        x = norm if warm else min(norm, limit)
        weight = 1.0 / (self.count + 1.0) if warm else 1.0 - decay
        deviation = x - self.mean
        mean = self.mean + weight * deviation
        square = (deviation if warm else x - mean) * (x - mean)
        variance = self.variance + weight * (square - self.variance)
        if math.isfinite(variance):
            self.count, self.mean, self.variance = self.count + 1, mean, variance
        return limit

    def state(self):
        if self.policy.kind == "zscore":
            return [float(self.count), self.mean, self.variance]
        ring = [math.inf] * self.policy.window
        for i, norm in enumerate(self.norms):
            ring[i % self.policy.window] = norm
        return [float(self.count), *ring]


def interpolated(ordered, q):
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    part = place - below
    return high - (high - low) * (1.0 - part) if part >= 0.5 else low + (high - low) * part


def norm_series(seed, n=1000):
    """A decline with noise; then spikes, NaN and inf, stretches of equal norms and of zeros, and a rise for good."""
    rng = random.Random(seed)
    norms = [(1.0 + 9.0 * math.exp(-i / 200)) * rng.lognormvariate(0.0, 0.2) for i in range(n)]
    for i in range(n):
        if rng.random() < 0.03:
            norms[i] *= rng.choice([4.0, 30.0, 1e6])
        elif rng.random() < 0.03:
            norms[i] = rng.choice([math.nan, math.inf, 0.0, norms[i - 1]])
        elif i > 0.8 * n:
            norms[i] *= 5.0
    start = rng.randrange(n // 2)
    norms[start : start + 60] = [norms[start]] * 60
    return norms


SERIES = {
    "mixed": norm_series(0),
    "equal": [0.1] * 1000,
    "equal, then a spike": [0.1] * 600 + [0.3] + [0.1] * 399,
    "zeros first": [0.0] * 40 + norm_series(1, 960),
    "huge": [x * 1e153 for x in norm_series(2)],
    "bad first": [math.nan, math.inf] * 20 + norm_series(3, 960),
}
POLICIES = [
    QuantileSpikes(0.1),
    QuantileSpikes(0.9, window=64, warmup=10),
    QuantileSpikes(1.0, window=1),
    QuantileSpikes(0.0, window=3, action="skip"),
    ZScoreSpikes(),
    ZScoreSpikes(1.0, decay=0.5, warmup=2, action="skip"),
    MedianSpikes(),
    MedianSpikes(1.5, window=1, warmup=1, action="skip"),
    MedianSpikes(4.0, window=7, warmup=3),
]


def check(policy, norms):
    """Every limit, spike and state is the reference's. Returns how many spikes there were."""
    reference, state, spikes = Reference(policy), policy.new_state("cpu"), 0
    for i, norm in enumerate(norms):
        before = state.clone()
        limit, spike, new = policy.step(state, torch.tensor(norm, dtype=torch.float64))
        assert torch.equal(state, before)  # it is not changed in place
        assert (limit.shape, spike.shape, new.shape) == ((), (), state.shape)
        assert (limit.dtype, spike.dtype, new.dtype) == (torch.float64, torch.bool, torch.float64)
        assert (float(limit), bool(spike)) == reference.step(norm), (i, norm)
        assert new.tolist() == reference.state(), (i, norm)
        state, spikes = new, spikes + bool(spike)
    return spikes


@pytest.mark.parametrize("series", SERIES)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_bit_is_that_of_plain_python(policy, series):
    check(policy, SERIES[series])


NORMS = st.lists(st.floats(0.0, allow_infinity=True) | st.just(math.nan) | st.sampled_from([0.0, 1.0]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    policy=st.one_of(
        st.builds(QuantileSpikes, st.floats(0.0, 1.0), window=st.integers(1, 9), warmup=st.integers(0, 12)),
        st.builds(
            ZScoreSpikes,
            st.floats(0.0, 1e6, exclude_min=True),
            decay=st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
            warmup=st.integers(2, 12),
        ),
        st.builds(
            MedianSpikes,
            st.floats(0.0, 1e6, exclude_min=True),
            window=st.integers(1, 9),
            warmup=st.integers(1, 12),
        ),
    ),
    norms=NORMS,
)
def test_any_parameters_and_norms(policy, norms):
    check(policy, norms)


def test_spikes_are_found_and_others_are_not():
    rng = random.Random(5)
    norms = [rng.lognormvariate(0.0, 0.2) for _ in range(400)]
    places = {100, 101, 250, 399}
    for i in places:
        norms[i] = 50.0
    for policy in (QuantileSpikes(0.98, warmup=50), ZScoreSpikes(4.0), MedianSpikes()):
        state, found = policy.new_state("cpu"), set()
        for i, norm in enumerate(norms):
            limit, spike, state = policy.step(state, torch.tensor(norm))
            if spike:
                found.add(i)
                assert float(limit) < norm
        assert places <= found, policy
        assert len(found) <= 12, policy


@pytest.mark.parametrize("q", [0.0, 0.1, 0.37, 0.5, 0.999, 1.0])
def test_a_quantile_is_that_of_numpy(q):
    norms = [x for x in SERIES["mixed"] if math.isfinite(x)]
    policy = QuantileSpikes(q, window=100)
    state = policy.new_state("cpu")
    for i, norm in enumerate(norms):
        limit, _, state = policy.step(state, torch.tensor(norm, dtype=torch.float64))
        expected = float(np.quantile(norms[max(0, i - 99) : i + 1], q))
        assert float(limit) == (expected if expected > 0.0 else math.inf)


def test_a_median_is_that_of_numpy_without_the_current_norm():
    norms = [x for x in SERIES["mixed"] if math.isfinite(x)]
    policy = MedianSpikes(3.0, window=20, warmup=5)
    state = policy.new_state("cpu")
    for i, norm in enumerate(norms):
        limit, _, state = policy.step(state, torch.tensor(norm, dtype=torch.float64))
        if i >= 5:
            assert float(limit) == pytest.approx(3.0 * np.median(norms[max(0, i - 20) : i]), rel=1e-15)


def test_zscore_follows_the_papers_formulas():
    """As ZClip writes them: population variance of the warm-up, threshold over z / threshold, two moving averages."""
    rng = random.Random(7)
    norms = [rng.lognormvariate(0.0, 0.3) * (20.0 if rng.random() < 0.03 else 1.0) for _ in range(1000)]
    threshold, decay, warmup = 2.5, 0.97, 25
    mean, std = float(np.mean(norms[:warmup])), float(np.std(norms[:warmup]))
    policy = ZScoreSpikes(threshold, decay, warmup)
    state, spikes = policy.new_state("cpu"), 0
    for i, norm in enumerate(norms):
        limit, spike, state = policy.step(state, torch.tensor(norm, dtype=torch.float64))
        if i < warmup:
            assert (float(limit), bool(spike)) == (math.inf, False)
            continue
        z = (norm - mean) / std
        assert bool(spike) == (z > threshold)
        if z > threshold:
            norm = mean + threshold**2 / z * std
            spikes += 1
            assert float(limit) == pytest.approx(norm, rel=1e-9)
        mean = decay * mean + (1 - decay) * norm
        std = math.sqrt(decay * std**2 + (1 - decay) * (norm - mean) ** 2)
        assert state.tolist() == pytest.approx([i + 1, mean, std**2], rel=1e-9)
    assert spikes > 20


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_norm_that_is_no_number_changes_nothing(policy):
    state = policy.new_state("cpu")
    for norm in norm_series(4, 60):
        state = policy.step(state, torch.tensor(norm)).state
    for bad in (math.nan, math.inf):
        limit, spike, new = policy.step(state, torch.tensor(bad))
        assert (float(limit), bool(spike)) == (math.inf, False)
        assert torch.equal(new, state)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_nothing_waits_for_a_device(policy, monkeypatch):
    def looked(*args):
        raise AssertionError("looked at a value")

    norms = [torch.tensor(x) for x in (1.0, 2.0, 90.0, math.nan)]
    state = policy.new_state("cpu")
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, looked)
        for norm in norms:
            state = policy.step(state, norm).state
    assert float(state[0]) == 3.0
    meta = policy.step(policy.new_state("meta"), torch.empty((), device="meta"))  # has no values to look at
    assert meta.limit.device.type == meta.spike.device.type == meta.state.device.type == "meta"


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_saved_state_goes_on_with_the_same_bits(policy):
    norms = [torch.tensor(x) for x in norm_series(8, 200)]
    state = policy.new_state("cpu")
    for norm in norms[:100]:
        state = policy.step(state, norm).state
    restored = policy.restored_state(state.tolist(), "cpu")
    for norm in norms[100:]:
        expected, got = policy.step(state, norm), policy.step(restored, norm)
        assert [x.tolist() for x in got] == [x.tolist() for x in expected]
        state, restored = expected.state, got.state
    with pytest.raises(ValueError, match="has shape"):
        policy.restored_state(state.tolist()[:-1], "cpu")
    with pytest.raises(ValueError, match="has shape"):
        policy.step(state[:-1], norms[0])


def test_float32_state_and_gradients_of_the_norm():
    """As on mps, which has no float64; and a norm that autograd knows."""
    for policy in POLICIES:
        norm = torch.tensor(2.0, requires_grad=True)
        result = policy.step(policy.new_state("cpu").float(), norm)
        assert result.state.dtype == result.limit.dtype == torch.float32
        assert not result.state.requires_grad
        assert not result.limit.requires_grad


def test_compiled_without_a_graph_break():
    policy = ZScoreSpikes(warmup=2)
    step = torch.compile(policy.step, backend="eager", fullgraph=True)
    state = policy.new_state("cpu")
    for x in (1.0, 2.0, 70.0):
        expected = policy.step(state, torch.tensor(x))
        assert [t.tolist() for t in step(state, torch.tensor(x))] == [t.tolist() for t in expected]
        state = expected.state


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_values_are_compared_copied_and_frozen(policy):
    assert isinstance(policy, SpikePolicy)
    twin = pickle.loads(pickle.dumps(policy))
    assert twin == policy
    assert hash(twin) == hash(policy)
    assert policy not in [other for other in POLICIES if other is not policy]
    with pytest.raises(AttributeError):
        policy.warmup = 3
    kind, *fields = policy.config().items()
    assert kind == ("kind", policy.kind)
    assert type(policy)(**dict(fields)) == policy
    assert {type(value) for _, value in fields} <= {int, float, str}


def test_differences():
    policy = QuantileSpikes(0.25, window=7)
    assert spike_differences(policy, policy.config()) == []
    assert spike_differences(None, None) == []
    assert spike_differences(policy, QuantileSpikes(0.5, action="skip").config()) == [
        "q is 0.25, and was 0.5",
        "window is 7, and was 1000",
        "action is 'clip', and was 'skip'",
    ]
    assert spike_differences(policy, None) == ["kind is 'quantile', and was None"]
    assert spike_differences(None, policy.config()) == ["kind is None, and was 'quantile'"]
    assert spike_differences(MedianSpikes(), policy.config()) == ["kind is 'median', and was 'quantile'"]
    assert spike_differences(policy, {**policy.config(), "later": 1}) == ["later is None, and was 1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantileSpikes(10), r"q is 10\.0; it must be from 0 to 1"),
        (lambda: QuantileSpikes(-0.1), "q is -0.1"),
        (lambda: QuantileSpikes(math.nan), "q is nan"),
        (lambda: QuantileSpikes(None), "q is None; it must be a number"),
        (lambda: QuantileSpikes(0.5, window=0), "window is 0; it must be 1 or more"),
        (lambda: QuantileSpikes(0.5, window=2.5), "window is 2.5; it must be a whole number"),
        (lambda: QuantileSpikes(0.5, warmup=-1), "warmup is -1; it must be 0 or more"),
        (lambda: QuantileSpikes(0.5, action="drop"), "action is 'drop'; it must be one of clip, skip"),
        (lambda: MedianSpikes(0.0), "factor is 0.0; it must be a finite number above 0"),
        (lambda: MedianSpikes(math.inf), "factor is inf"),
        (lambda: MedianSpikes(window=0), "window is 0"),
        (lambda: MedianSpikes(warmup=0), "warmup is 0"),
        (lambda: MedianSpikes(action=None), "action is None"),
        (lambda: ZScoreSpikes(-1.0), "threshold is -1.0"),
        (lambda: ZScoreSpikes(decay=1.0), "decay is 1.0; it must be more than 0 and less than 1"),
        (lambda: ZScoreSpikes(warmup=1), "warmup is 1; it must be 2 or more"),
        (lambda: ZScoreSpikes(action="warn"), "action is 'warn'"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_exported():
    for name in ("MedianSpikes", "QuantileSpikes", "ZScoreSpikes"):
        assert getattr(initlab, name) is getattr(importlib.import_module("initlab.clipping.spikes"), name)
