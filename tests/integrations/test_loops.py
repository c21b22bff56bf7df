"""GradClipper in the training loops that people have: the weights of clip_grad_norm_ before each step, in each of them.

Every loop runs twice over the same batches: once as its users write it with torch's clipping, once with a GradClipper.
Some batches hold a NaN. The loop with torch's clipping never sees the steps that they are in, so equal weights, moments
and counters at the end mean that those steps changed nothing.
"""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import utils

import initlab

# Lightning, accelerate and transformers warn of small machines, short epochs and each other.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

MAX_NORM = 0.1
STEPS = 200
BAD = (0, 7, 8, 120, 199)  # the first step too, in which optimizers make their state
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def net(dtype):
    torch.manual_seed(0)
    layers = nn.Linear(6, 16, bias=False), nn.Tanh(), nn.Linear(16, 3, bias=False)  # Muon takes matrices only
    return nn.Sequential(*layers).to(dtype)


def loss(model, x, y):
    return nn.functional.mse_loss(model(x), y)


def batches(dtype, clean, per_step=1):
    """The batches of all steps, `per_step` for each; without those of bad steps if clean."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(STEPS):
        of_step = []
        for _ in range(per_step):
            x = torch.randn(8, 6, generator=generator, dtype=torch.float64).to(dtype)
            of_step.append((x, (x[:, :3] * 4).sin() * (1 + step % 5)))
        if step in BAD:
            of_step[-1][0][3, 2] = torch.nan
        if not (clean and step in BAD):
            found += of_step
    return found


# Optimizers. Muon rounds to bfloat16 on its way, where the last bit of a float32 norm may turn a rounding: in float64
# the two norms agree to 1e-15, and it does not.


def schedule_free(parameters):
    import schedulefree

    optimizer = schedulefree.AdamWScheduleFree(parameters, lr=0.01, warmup_steps=20)
    optimizer.train()
    return optimizer


OPTIMIZERS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, 0.01),
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, 0.01, fused=True),
    "SGD momentum": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9),
    "SGD momentum fused": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, fused=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, 0.05),
    "Muon": lambda ps: torch.optim.Muon(ps, 0.01),
    "schedulefree": schedule_free,
}
DTYPES = {"Muon": torch.float64}


# Loops. Each trains the model, clips by itself (ours=False) or by a GradClipper, and returns that.


def plain(model, optimizer, ours, step=None):
    clipper = initlab.GradClipper(optimizer, MAX_NORM) if ours else None
    step = optimizer.step if step is None else step
    for x, y in batches(model[0].weight.dtype, clean=not ours):
        loss(model, x, y).backward()
        if not ours:
            utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        step()
        optimizer.zero_grad()
    return clipper


def compiled_step(backend):
    def loop(model, optimizer, ours):
        with compiling():
            return plain(model, optimizer, ours, step=torch.compile(optimizer.step, backend=backend))

    return loop


def compiled_whole_step(model, optimizer, ours):
    clipper = initlab.GradClipper(optimizer, MAX_NORM) if ours else None

    def train_step(x, y):
        loss(model, x, y).backward()
        if not ours:
            utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    with compiling():
        train_step = torch.compile(train_step, backend="eager")
        for x, y in batches(model[0].weight.dtype, clean=not ours):
            train_step(x, y)
    return clipper


@contextlib.contextmanager
def compiling():
    """Afresh, and not for long: counters that are Python numbers, as schedulefree's, are compiled anew at each step.

    Past its limit torch runs the step as it is, which is tested with that.
    """
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        yield
    torch._dynamo.reset()


def scaled(model, optimizer, ours):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=50)
    clipper = initlab.GradClipper(optimizer, MAX_NORM, scaler=scaler) if ours else None
    for x, y in batches(model[0].weight.dtype, clean=not ours):
        scaler.scale(loss(model, x, y)).backward()
        if not ours:
            scaler.unscale_(optimizer)
            utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return clipper


def accelerate_accumulating(model, optimizer, ours):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    dtype = model[0].weight.dtype
    model, optimizer = accelerator.prepare(model, optimizer)
    clipper = initlab.GradClipper(optimizer, MAX_NORM) if ours else None
    for x, y in batches(dtype, clean=not ours, per_step=2):
        with accelerator.accumulate(model):
            accelerator.backward(loss(model, x, y))
            if not ours and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
    return clipper


LIGHTNING = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
LIGHTNING |= {"enable_progress_bar": False, "enable_model_summary": False}
HUGGING_FACE = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
HUGGING_FACE |= {"num_train_epochs": 1, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}


def lightning_loop(manual):
    def loop(model, optimizer, ours):
        import lightning

        from initlab.integrations.lightning import GradClipperCallback

        class Module(lightning.LightningModule):
            automatic_optimization = not manual

            def __init__(self):
                super().__init__()
                self.net = model

            def configure_optimizers(self):
                return optimizer

            def training_step(self, batch):
                if not manual:
                    return loss(self.net, *batch)
                self.manual_backward(loss(self.net, *batch))
                if not ours:
                    utils.clip_grad_norm_(self.parameters(), MAX_NORM)
                self.optimizers().step()
                self.optimizers().zero_grad()
                return None

        callbacks = [GradClipperCallback(MAX_NORM)] if ours else []
        trainer = lightning.Trainer(
            **LIGHTNING, callbacks=callbacks, gradient_clip_val=None if ours or manual else MAX_NORM
        )
        data = batches(model[0].weight.dtype, clean=not ours)
        trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=None))
        return callbacks[0].clippers[0] if ours else None

    return loop


class WithLoss(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, labels):
        return {"loss": loss(self.net, x, labels)}


def hugging_face(model, optimizer, ours):
    import transformers

    from initlab.integrations.transformers import GradClipperMixin

    class ClippingTrainer(GradClipperMixin, transformers.Trainer):
        pass

    arguments = transformers.TrainingArguments(**HUGGING_FACE, max_grad_norm=MAX_NORM)
    trainer = (ClippingTrainer if ours else transformers.Trainer)(
        WithLoss(model),
        arguments,
        data_collator=lambda items: {"x": items[0][0], "labels": items[0][1]},
        train_dataset=batches(model[0].weight.dtype, clean=not ours),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    )
    trainer.train()
    return trainer.clipper if ours else None


LOOPS = {
    "plain": plain,
    "compiled step, eager": compiled_step("eager"),
    "compiled step, aot_eager": compiled_step("aot_eager"),
    "compiled whole step": compiled_whole_step,
    "GradScaler": scaled,
    "accelerate, accumulating": accelerate_accumulating,
    "Lightning, automatic": lightning_loop(manual=False),
    "Lightning, manual": lightning_loop(manual=True),
    "Hugging Face": hugging_face,
}


# Each of these packages takes seconds to import: one worker for all of its tests.
GROUPS = {"Lightning": "lightning", "Hugging Face": "transformers", "accelerate": "transformers"}


def in_its_group(loop):
    group = GROUPS.get(loop.split(",")[0])
    return pytest.param(loop, marks=[] if group is None else pytest.mark.xdist_group(group))


def contents(optimizer):
    """Everything that an optimizer holds: state, groups and attributes, as tensors by name."""
    found = {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        found |= {f"state of {i}, {key}": value for key, value in optimizer.state.get(p, {}).items()}
    for i, group in enumerate(optimizer.param_groups):
        # torch.compile adds "capturable" to groups that have none, where it compiles the first step.
        found |= {f"group {i}, {key}": value for key, value in group.items() if key != "capturable"}
    found |= vars(optimizer)
    numbers = torch.Tensor, int, float
    return {name: torch.as_tensor(value) for name, value in found.items() if isinstance(value, numbers)}


def check(loop, make, dtype=torch.float32):
    ours, theirs = net(dtype), net(dtype)
    mine, other = make(ours.parameters()), make(theirs.parameters())
    clipper = loop(ours, mine, True)
    loop(theirs, other, False)
    torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), **TOLERANCE)
    left, right = contents(mine), contents(other)
    torch.testing.assert_close(left, right, **TOLERANCE)
    stats = clipper.stats()
    assert (stats.steps, stats.nonfinite, stats.first_bad_step) == (STEPS, len(BAD), 1)
    assert 20 < stats.clipped <= STEPS - len(BAD)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loop", [in_its_group(loop) for loop in LOOPS])
def test_a_loop_trains_as_with_clipping_before_each_step(loop, optimizer):
    check(LOOPS[loop], OPTIMIZERS[optimizer], DTYPES.get(optimizer, torch.float32))


def test_a_step_that_inductor_compiled():
    check(compiled_step("inductor"), OPTIMIZERS["AdamW fused"])
