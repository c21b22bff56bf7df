"""What `initlab demo` shows: starts that fail, one that trains, and equal bits, with the evidence for each claim.

Parts 1 and 2 start and train a deep network on scikit-learn's digits; part 3 fills the parameters of GPT-2, part 4
builds GPT-2 with transformers. Nothing is downloaded.

This is one file, of over 500 lines, because it is one story: its parts stand in the order in which they are printed.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from initlab.kernels import (
    STREAM_VERSION,
    Distribution,
    Draw,
    Normal,
    Region,
    TruncatedNormal,
    Uniform,
    fill_,
    named_key,
)

from . import init
from ._console import say
from .models.digest import ModelDigest, model_digest
from .models.initialization import init_model_
from .models.swapping import swap
from .pages import demo_page, write_page
from .plots import Panel, curves_panel, ratios_panel


class DataMissingError(RuntimeError):
    """scikit-learn, whose digits the demo trains on, is not installed."""


@dataclass(frozen=True)
class Settings:
    """The size of the demo; the defaults are what `initlab demo` runs.

    Args:
        seed: of the weights, the batches and the keys of part 3.
        depth: hidden layers. 36 layers of 256 units carry N(0, 1) weights past float32's largest number; 40 leave
            no doubt.
        width: units of a hidden layer.
        epochs: of the good start.
        bad_epochs: of the bad starts, which have nothing to show for more.
        rounds: how often parts 3 and 4 repeat each timing.
    """

    seed: int = 0
    depth: int = 40
    width: int = 256
    epochs: int = 40
    bad_epochs: int = 3
    rounds: int = 5


@dataclass
class Evidence:
    """The claims made so far, whether each of them held, and what there is to see of them."""

    claims: list[tuple[str, bool]] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)

    def claim(self, text: str, holds: bool) -> None:
        """Print a claim and whether it holds."""
        self.claims.append((text, bool(holds)))
        say(f"  {'[ok]' if holds else '[FAILED]'} {text}", "green" if holds else "bold red")

    @property
    def holds(self) -> bool:
        """Whether everything held, of at least one claim."""
        return bool(self.claims) and all(held for _, held in self.claims)

    @property
    def verdict(self) -> str:
        """The last line."""
        failed, total = sum(not held for _, held in self.claims), len(self.claims)
        return f"Verdict: {failed} of {total} claims FAILED." if failed else f"Verdict: all {total} claims hold."


def run(settings: Settings, backend: str, page: Path | None = None) -> bool:
    """Print the whole demo.

    Args:
        settings: its size and seed.
        backend: the backend that serves CPU tensors; only numba's is claimed to beat torch.nn.init.
        page: where to put its pictures and claims as well, as an HTML file.

    Returns:
        Whether every claim that it makes holds.

    Raises:
        DataMissingError: if scikit-learn is not installed.
        OSError: if the page cannot be written.
    """
    data = load_digits()
    evidence = Evidence()
    threads = torch.get_num_threads()
    made = f"initlab's stream {STREAM_VERSION}, {backend} backend; torch {torch.__version__}, {threads} threads"
    print(made)
    with _threads(1):  # a second thread gains little here, and on a busy machine costs tenfold
        show_starts(data, settings, evidence)
        show_training(data, settings, evidence)
    show_gpt2(gpt2_shapes(), settings, backend, evidence)
    show_models(gpt2_model, settings, backend, evidence)
    print()
    say(evidence.verdict, "bold green" if evidence.holds else "bold red")
    if page is not None:
        write_page(page, lambda: demo_page(evidence.verdict, made, evidence.claims, evidence.panels))
        print(f"Its pictures are in {page}")
    return evidence.holds


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------
# The data and the model


class Digits(NamedTuple):
    """1797 images of 8 x 8 pixels, shifted and scaled to mean 0 and variance 1 over the training images."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """scikit-learn's digits, every fifth of them kept for the test.

    Returns:
        Images as float32 rows of 64, labels as int64.

    Raises:
        DataMissingError: if scikit-learn is not installed.

    Source:
        E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise DataMissingError(
            "the demo trains on scikit-learn's digits, and scikit-learn is not installed; pip install 'initlab[demo]'"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train, test = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    train_labels, test_labels = (torch.tensor(part, dtype=torch.int64) for part in split[2:])
    mean, std = train.mean(), train.std()
    return Digits((train - mean) / std, train_labels, (test - mean) / std, test_labels)


STARTS: dict[str, Callable[[Tensor, torch.Generator], object]] = {
    "std 1": lambda weight, generator: init.normal_(weight, generator=generator),
    "std 0.02": lambda weight, generator: init.normal_(weight, std=0.02, generator=generator),
    "He": lambda weight, generator: init.kaiming_normal_(weight, nonlinearity="relu", generator=generator),
}


def build(start: str, settings: Settings) -> nn.Sequential:
    """The network, 64 -> width -> ... -> width -> 10, with ReLU between, started in one of the ways of STARTS."""
    sizes = [64, *[settings.width] * settings.depth]
    layers: list[nn.Module] = []
    with torch.device("meta"):  # so that nn.Linear does not draw weights of its own
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        layers.append(nn.Linear(settings.width, 10))
    model = nn.Sequential(*layers).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(settings.seed)
    for layer in linears(model):
        STARTS[start](layer.weight, generator)
        init.zeros_(layer.bias)
    return model


def linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers, in order."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


# ---------------------------------------------------------------------------------------------------------------
# Part 1: three starts


class Signal(NamedTuple):
    """What becomes of the images on their way through an untrained network."""

    stds: list[float]  # of each hidden layer's activations
    overflow: int | None  # the first hidden layer, counted from 1, with an activation that is not finite
    loss: float


@torch.no_grad()
def signal(model: nn.Sequential, images: Tensor, labels: Tensor) -> Signal:
    """Send images through a network and watch its activations."""
    stds: list[float] = []
    overflow = None
    x = images
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            stds.append(x.double().std().item())  # in float32 the squares would overflow long before x does
            if overflow is None and not x.isfinite().all():
                overflow = len(stds)
    return Signal(stds, overflow, F.cross_entropy(x, labels).item())


def show_starts(data: Digits, settings: Settings, evidence: Evidence) -> None:
    """Part 1: print how far the signal of each start gets."""
    models = {start: build(start, settings) for start in STARTS}
    signals = {start: signal(model, data.train, data.train_labels) for start, model in models.items()}
    weights = sum(layer.weight.numel() for layer in linears(models["He"]))
    print(f"""
1. Three starts of one network
  {settings.depth} hidden layers of {settings.width} ReLU units, {weights / 1e6:.1f} million weights, for
  scikit-learn's digits: {len(data.train)} images to train on, {len(data.test)} to test on.

    std 1      normal_(w)              std forgotten: 1 is the default
    std 0.02   normal_(w, std=0.02)    GPT-2's number, in another model
    He         kaiming_normal_(w, nonlinearity="relu"): sqrt(2 / fan_in)

  Standard deviation of the activations before the first step:

    layer{"".join(f"{start:>12}" for start in STARTS)}""")
    depths = [1, *range(settings.depth // 4, settings.depth, settings.depth // 4)]
    overflow = signals["std 1"].overflow
    around = {overflow - 1, overflow} - {0} if overflow else set()
    for depth in sorted({*depths, *around, settings.depth}):
        print(f"    {depth:5}" + "".join(f"{signals[start].stds[depth - 1]:12.1e}" for start in STARTS))
    print("    loss " + "".join(f"{signals[start].loss:12.4g}" for start in STARTS) + "\n")

    evidence.panels.append(
        curves_panel(
            "signal",
            "Signal by depth, three starts",
            "Standard deviation of each hidden layer's activations before the first step. A cross is inf.",
            "hidden layer",
            "std of activations",
            {start: signals[start].stds for start in STARTS},
        )
    )
    evidence.claim(
        "one stream: He's weights are those of std 1 times sqrt(2 / fan_in), bit for bit",
        all(
            torch.equal(good.weight, bad.weight * math.sqrt(2.0 / good.in_features))
            for good, bad in zip(linears(models["He"]), linears(models["std 1"]), strict=True)
        ),
    )
    evidence.claim(
        f"std 1: float32 overflows in layer {overflow}, the loss is {signals['std 1'].loss}",
        overflow is not None and not math.isfinite(signals["std 1"].loss),
    )
    last = signals["std 0.02"].stds[-1]
    evidence.claim(f"std 0.02: the signal fades, to {last:.0e} in the last layer", last < 1e-6)
    stds = signals["He"].stds
    evidence.claim(
        f"He: the signal lasts, between {min(stds):.2f} and {max(stds):.2f} in every layer",
        all(0.1 < std < 10 for std in stds),
    )


# ---------------------------------------------------------------------------------------------------------------
# Part 2: training


class Epoch(NamedTuple):
    """Where training stands after an epoch."""

    number: int
    loss: float  # mean over the epoch's batches
    accuracy: float  # share of the test images that the network gets right


def train(model: nn.Sequential, data: Digits, settings: Settings, epochs: int) -> Iterator[Epoch]:
    """Train a network, epoch by epoch: Adam, gradients clipped to norm 1, some noise on the images.

    Every start gets the same batches, noise and learning rates; `settings.epochs` sets the schedule, also where
    `epochs` ends it early.
    """
    batch = 64
    generator = torch.Generator().manual_seed(settings.seed ^ 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=7e-4, fused=True)
    steps = settings.epochs * math.ceil(len(data.train) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # up for a tenth of the steps, then down to 0
        optimizer, lambda step: min((step + 1) / (0.1 * steps), 1.0 - step / steps)
    )
    for number in range(1, epochs + 1):
        total = 0.0
        for index in torch.randperm(len(data.train), generator=generator).split(batch):
            images = data.train[index]
            images = images + 0.3 * torch.randn(images.shape, generator=generator)
            loss = F.cross_entropy(model(images), data.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        with torch.no_grad():
            right = model(data.test).argmax(dim=1) == data.test_labels
        yield Epoch(number, total / len(data.train), right.double().mean().item())


def show_training(data: Digits, settings: Settings, evidence: Evidence) -> None:
    """Part 2: print what training makes of each start."""
    print("""
2. Training
  The same images, batches and optimizer for each start. Guessing gives a loss
  of ln 10 = 2.303 and gets 10 % of the test images right.
""")
    print("    start       epoch        loss   test right")
    last: dict[str, Epoch] = {}
    losses: dict[str, list[float]] = {start: [] for start in STARTS}
    finite: dict[str, int] = {}
    began = time.perf_counter()
    for start in STARTS:
        epochs = settings.epochs if start == "He" else settings.bad_epochs
        model = build(start, settings)
        for epoch in train(model, data, settings, epochs):
            if epoch.number in (1, epochs) or epoch.number % max(1, epochs // 8) == 0:
                print(f"    {start:<12}{epoch.number:5}{epoch.loss:12.4f}{epoch.accuracy:11.1%}", flush=True)
            last[start] = epoch
            losses[start].append(epoch.loss)
        finite[start] = sum(int(layer.weight.isfinite().sum()) for layer in linears(model))
    print(f"\n  {time.perf_counter() - began:.0f} s in all, on one thread.")
    evidence.panels.append(
        curves_panel(
            "training",
            "Loss by epoch, three starts",
            "Mean cross entropy of each epoch on digits; ln 10 = 2.3 is guessing. A cross is NaN or inf.",
            "epoch",
            "loss",
            losses,
        )
    )
    evidence.claim(
        f"std 1: the loss stays {last['std 1'].loss}, {finite['std 1']} weights are still numbers",
        not math.isfinite(last["std 1"].loss) and finite["std 1"] == 0,
    )
    faded = last["std 0.02"]
    evidence.claim(
        f"std 0.02: it learns nothing, the loss stays at {faded.loss:.3f}",
        abs(faded.loss - math.log(10)) < 0.02 and faded.accuracy < 0.2,
    )
    evidence.claim(
        f"He: {last['He'].accuracy:.1%} of the test images right, more than 95 %",
        last["He"].accuracy > 0.95,
    )


# ---------------------------------------------------------------------------------------------------------------
# Part 3: GPT-2

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def gpt2_shapes(
    layers: int = 12, width: int = 768, vocabulary: int = 50257, positions: int = 1024
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of GPT-2, as transformers names them; the defaults are the 124M model's.

    Source:
        A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, and its published weights.
        The output head is the token embedding, so it is not listed twice.

    Example:
        >>> import math
        >>> from initlab.demo import gpt2_shapes
        >>> sum(math.prod(shape) for shape in gpt2_shapes().values())
        124439808
    """
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocabulary, width),
        "transformer.wpe.weight": (positions, width),
    }
    matrices = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    for layer in range(layers):
        block = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        for name, shape in matrices.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[1:]}
    return shapes | {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}


Fill: TypeAlias = Callable[[ModuleType, Tensor], object]  # by the module's own function of one name


def race(fill: Fill, tensors: Sequence[Tensor], rounds: int) -> tuple[float, float]:
    """Seconds to fill all tensors with torch.nn.init and with initlab.init: medians, the two taking turns."""
    modules: tuple[ModuleType, ModuleType] = (nn.init, init)
    for module in modules:
        for tensor in tensors:  # untimed: the first use compiles, and gets the memory
            fill(module, tensor)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for module, taken in zip(modules, seconds, strict=True):
            began = time.perf_counter()
            for tensor in tensors:
                fill(module, tensor)
            taken.append(time.perf_counter() - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


CONTROL = "other seed differs"  # so that an equality of nothing with nothing would show


def same_bits(shapes: Shapes, distribution: Distribution, seed: int) -> dict[str, bool]:
    """Fill named matrices in several ways and compare the results, bit for bit.

    Args:
        shapes: of the matrices; each is keyed by its name.
        distribution: what to fill them with.
        seed: of the keys.

    Returns:
        For each way, whether it gave what filling whole float32 tensors in one call and on all threads gives; and
        under CONTROL, whether another seed gives other values in every matrix.
    """
    threads = max(2, torch.get_num_threads())
    one_thread, reverse, rows, columns, rounded = (
        f"1 thread = {threads} threads",
        "in reverse order",
        "8 shards of rows",
        "5 shards of columns",
        "bfloat16 = rounded *",
    )
    same = dict.fromkeys((one_thread, reverse, rows, columns, rounded, CONTROL), True)
    # What a fill leaves out must not pass for equal: it is NaN here and an infinity there.
    whole = {name: torch.full(shape, math.nan) for name, shape in shapes.items()}
    room = torch.empty(max(tensor.numel() for tensor in whole.values()))  # one for all: new memory is slow to get

    def filled(
        name: str,
        region: Region | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = seed,
    ) -> Tensor:
        shape = region.sizes if region else shapes[name]
        tensor = room.view(dtype)[: math.prod(shape)].view(shape).fill_(math.inf)
        fill_([Draw(tensor, distribution, named_key(seed, name), region)])
        return tensor

    with _threads(threads):
        fill_([Draw(tensor, distribution, named_key(seed, name)) for name, tensor in whole.items()])
        for name, shape in reversed(list(shapes.items())):
            same[reverse] &= _equal_bits(filled(name), whole[name])
            same[rounded] &= _equal_bits(filled(name, dtype=torch.bfloat16), _as_bfloat16(whole[name], distribution))
            same[CONTROL] &= not _equal_bits(filled(name, seed=seed ^ 1), whole[name])
            for way, dim, count in ((rows, 0, 8), (columns, 1, 5)):
                step = -(-shape[dim] // count)  # the last shard is smaller where it does not come out even
                for at in range(0, shape[dim], step):
                    size = min(step, shape[dim] - at)
                    region = Region.whole(shape).narrow(dim, at, size)
                    same[way] &= _equal_bits(filled(name, region), whole[name].narrow(dim, at, size))
    with _threads(1):
        for name in shapes:
            same[one_thread] &= _equal_bits(filled(name), whole[name])
    return same


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    integers = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    return torch.equal(a.view(integers), b.view(integers))  # as numbers, 0.0 and -0.0 would be equal


def _as_bfloat16(tensor: Tensor, distribution: Distribution) -> Tensor:
    """What a bfloat16 tensor should hold: the rounded values; a uniform's upper bound stays outside."""
    rounded = tensor.bfloat16()
    if not isinstance(distribution, Uniform):
        return rounded
    high = torch.tensor(distribution.high, dtype=torch.bfloat16)
    return rounded.clamp(max=torch.nextafter(high, torch.tensor(-math.inf, dtype=torch.bfloat16)))


def show_gpt2(shapes: Shapes, settings: Settings, backend: str, evidence: Evidence) -> None:
    """Part 3: print the speed of both modules on GPT-2's parameters, and compare bits."""
    total = sum(math.prod(shape) for shape in shapes.values())
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}  # the rest starts at 0 or 1
    drawn = sum(math.prod(shape) for shape in matrices.values())
    print(f"""
3. The parameters of GPT-2
  {len(shapes)} tensors, {total:,} parameters; {drawn:,} of them, in {len(matrices)} matrices,
  start at random. Filled in float32 by torch.nn.init and initlab.init in turns,
  median of {settings.rounds}, nanoseconds per element:

    function         torch   initlab   ratio""")
    # torch's trunc_normal_ is so slow that one block of the twelve has to do.
    block = [name for name in matrices if ".h.0." in name]
    races: dict[str, tuple[Fill, Sequence[str]]] = {
        "normal_": (lambda module, tensor: module.normal_(tensor, std=0.02), list(matrices)),
        "uniform_": (lambda module, tensor: module.uniform_(tensor, -0.02, 0.02), list(matrices)),
        "trunc_normal_*": (
            lambda module, tensor: module.trunc_normal_(tensor, std=0.02, a=-0.04, b=0.04),
            block,
        ),
    }
    tensors = {name: torch.zeros(shape) for name, shape in matrices.items()}
    ratios: dict[str, float] = {}
    for function, (fill, names) in races.items():
        elements = sum(tensors[name].numel() for name in names)
        medians = race(fill, [tensors[name] for name in names], settings.rounds)
        theirs, ours = (seconds / elements * 1e9 for seconds in medians)
        ratios[function] = theirs / ours
        print(f"    {function:<15}{theirs:7.2f}{ours:10.2f}{ratios[function]:7.1f}x", flush=True)
    del tensors
    evidence.panels.append(
        ratios_panel(
            "speed",
            "torch.nn.init's time over initlab.init's",
            f"The matrices of GPT-2 in float32, in turns, medians of {settings.rounds}; {backend} backend.",
            "times as fast",
            {function: [ratio] for function, ratio in ratios.items()},
        )
    )
    print(f"    * at 2 sigma, block 0 only: {sum(math.prod(shapes[name]) for name in block):,} parameters")
    if backend == "numba":  # the torch backend is a reference, and slow
        print()
        evidence.claim("initlab.init is faster, with the same call", min(ratios.values()) > 1)

    distributions: dict[str, Distribution] = {
        "normal": Normal(0.0, 0.02),
        "uniform": Uniform(-0.02, 0.02),
        "truncated": TruncatedNormal(0.0, 0.02, -0.04, 0.04),
    }
    print(f"""
  The same matrices, keyed by their names, filled in other ways. Equal bits?

    {"":<24}{"".join(f"{name:>11}" for name in distributions)}""")
    same = {name: same_bits(matrices, distribution, settings.seed) for name, distribution in distributions.items()}
    for way in same["normal"]:
        print(f"    {way:<24}" + "".join(f"{'yes' if same[name][way] else 'NO':>11}" for name in distributions))
    print("    * and a uniform stays below its upper bound, which rounding could reach\n")
    controls = [ways.pop(CONTROL) for ways in same.values()]
    equal = [held for ways in same.values() for held in ways.values()]
    evidence.claim(f"equal bits in {sum(equal)} of {len(equal)} comparisons", all(equal))
    evidence.claim("another seed gives other values", all(controls))


# ---------------------------------------------------------------------------------------------------------------
# Part 4: whole models


def gpt2_model(**sizes: int) -> nn.Module:
    """transformers' GPT-2 with a language modelling head; without sizes the 124M model. Weights at random.

    Args:
        sizes: of transformers.GPT2Config: n_layer, n_embd, n_head, vocab_size, ...

    Raises:
        DataMissingError: if transformers is not installed.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ModuleNotFoundError as error:
        raise DataMissingError("transformers is not installed; pip install 'initlab[demo]'") from error
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**sizes))
    return model


def register_backwards(model: nn.Module) -> nn.Module:
    """The same model, as if its modules and parameters had been made in the opposite order."""
    for module in model.modules():
        for registered in (vars(module)["_modules"], vars(module)["_parameters"]):
            for name in list(reversed(registered)):
                registered[name] = registered.pop(name)
    return model


def largest_deviation(model: nn.Module, reference: nn.Module) -> float:
    """The largest difference between two models' standard deviations, parameter by parameter, in standard errors."""
    worst = 0.0
    others = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        ours, theirs = (p.detach().double().std(correction=0).item() for p in (parameter, others[name]))
        if max(ours, theirs) > 0:
            # of the difference of two sample deviations of n normal numbers each: sigma / sqrt(n)
            worst = max(worst, abs(ours - theirs) * math.sqrt(parameter.numel()) / max(ours, theirs))
    return worst


def show_models(build: Callable[[], nn.Module], settings: Settings, backend: str, evidence: Evidence) -> None:
    """Part 4: print what swap() and init_model_ make of a model that another library builds."""
    print("""
4. Whole models
  transformers' GPT-2, built plainly and under swap(), in turns, and filled by name with
  init_model_ from the meta device.
""")
    try:
        reference = build()
    except DataMissingError as error:
        print(f"  Left out: {error}")
        return

    def swapped() -> nn.Module:
        with swap():
            return build()

    def named() -> nn.Module:
        with torch.device("meta"):
            model = build()
        init_model_(model, settings.seed, "own", device="cpu")
        return model

    seconds: dict[str, list[float]] = {"plainly": [], "under swap()": [], "init_model_": []}
    model = swapped()  # untimed: the first use compiles
    for _ in range(settings.rounds):
        for way, make in zip(seconds, (build, swapped, named), strict=True):
            began = time.perf_counter()
            make()
            seconds[way].append(time.perf_counter() - began)
    plain, *ours = (statistics.median(taken) for taken in seconds.values())
    print(f"    {'plainly':<14}{plain:7.2f} s")
    for way, taken in zip(list(seconds)[1:], ours, strict=True):
        print(f"    {way:<14}{taken:7.2f} s{plain / taken:7.1f}x")
    print()
    if backend == "numba":
        evidence.claim("under swap() the same code builds its model faster", ours[0] < plain)
    deviation = largest_deviation(model, reference)
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    evidence.claim(
        f"the same distributions: standard deviations differ by {deviation:.1f} standard errors at most, less than 5",
        finite and deviation < 5,
    )
    torch.manual_seed(settings.seed)
    del model, reference
    there, back = named(), register_backwards(build())
    init_model_(back, settings.seed, "own")
    digests: tuple[ModelDigest, ModelDigest] = (model_digest(there), model_digest(back))
    evidence.claim(
        f"by name, made on meta or made backwards: digests {digests[0]} and {digests[1]}", digests[0] == digests[1]
    )
    init_model_(back, settings.seed ^ 1, "own")
    evidence.claim("another seed gives another digest", model_digest(back).total != digests[0].total)
