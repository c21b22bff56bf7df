"""run_script() on scripts as people write them: what stops them, what is said, and that a healthy one is left alone."""

import io
import json
import os
import runpy
import subprocess
import sys
import textwrap

import pytest
import torch

from initlab import cli
from initlab.scripts import run_script

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn
torch.manual_seed(0)
x = torch.randn(256, 8)
y = x[:, :1].tanh()
labels = (x[:, 0] > 0).long()
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, {out}))
"""


def script(tmp_path, body, out=1, name="train.py"):
    path = tmp_path / name
    path.write_text(HEAD.format(out=out) + textwrap.dedent(body))
    return str(path)


def line_of(path, text):
    with open(path) as file:
        return next(number for number, line in enumerate(file, 1) if text in line)


@pytest.fixture(autouse=True)
def as_it_was(one_thread, unhurried):
    """The scripts run in this process, and seed torch."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def test_a_loss_that_is_not_finite(tmp_path):
    path = script(
        tmp_path,
        """
        x[40, 3] = float("nan")
        opt = torch.optim.Adam(model.parameters())
        for i in range(0, 256, 32):
            xb, yb = x[i:i + 32], y[i:i + 32]
            loss = F.mse_loss(model(xb), yb)
            opt.zero_grad()
            loss.backward()
            opt.step()
        """,
    )
    report = run_script(path)
    assert (report.stopped, report.steps) == ("the loss is nan", 2)
    assert report.place == (path, line_of(path, "loss.backward()"))
    cause = report.diagnosis.causes[0]
    assert (cause.kind, cause.place.feature, cause.severity) == ("input", 3, "broken")
    assert report.preamble == "optimizer = opt; batch = {'xb': xb, 'yb': yb}"


def test_a_rate_that_ruins_the_weights_is_seen_from_the_start(tmp_path):
    path = script(
        tmp_path,
        """
        optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
        def main():
            for step in range(100):
                optimizer.zero_grad()
                loss = ((model(x) - y) ** 2).mean()
                loss.backward()
                optimizer.step()
        if __name__ == "__main__":
            main()
        """,
    )
    report = run_script(path)
    assert report.verdict == "broken"
    assert report.steps > 1
    assert report.diagnosis.causes[0].kind == "learning rate"
    assert report.notes[0].startswith("examined from the weights and the batch of step 1")


def test_an_error_in_the_loss(tmp_path):
    path = script(
        tmp_path,
        """
        labels[100] = 3
        optimizer = torch.optim.Adam(model.parameters())
        criterion = nn.CrossEntropyLoss()
        for i in range(0, 256, 32):
            loss = criterion(model(x[i:i + 32]), labels[i:i + 32])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        """,
        out=3,
    )
    report = run_script(path)
    assert report.stopped.startswith("IndexError: Target 3 is out of bounds")
    assert report.place == (path, line_of(path, "criterion(model"))
    assert report.diagnosis.causes[0].kind == "target"


@pytest.mark.parametrize("patience", [30, 60])
def test_a_loss_that_stands_still(tmp_path, patience):
    path = script(
        tmp_path,
        """
        old = nn.Linear(8, 1)
        optimizer = torch.optim.Adam(old.parameters(), 1e-3)
        for step in range(200):
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        """,
    )
    report = run_script(path, patience=patience)
    assert report.steps == patience
    assert report.stopped.startswith(f"the loss has not fallen in {patience} steps")
    assert report.diagnosis.causes[0].kind == "optimizer"


def test_a_gradient_that_is_not_finite(tmp_path):
    path = script(
        tmp_path,
        """
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            out = model(x)
            loss = (out - out.detach()).abs().sqrt().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        """,
    )
    report = run_script(path)
    assert (report.stopped, report.steps) == ("a gradient is not finite", 1)
    assert (report.diagnosis.causes[0].kind, report.diagnosis.causes[0].place.op) in [
        ("operation", "sqrt"),
        ("loss", "sqrt"),
    ]


def test_the_line_of_an_operation_is_the_scripts(tmp_path):
    path = script(tmp_path, "loss = model(x).log().mean()\nloss.backward()\n")
    cause = run_script(path).diagnosis.causes[0]
    assert (cause.kind, cause.place.op) == ("operation", "log")
    assert cause.evidence["line"] == f"train.py:{line_of(path, 'log()')}: loss = model(x).log().mean()"


HEALTHY = {
    "plain": (
        """
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32, shuffle=True)
        for epoch in range(6):
            for xb, yb in data:
                loss = F.mse_loss(F.dropout(model(xb), 0.1), yb)
                optimizer.zero_grad(); loss.backward(); optimizer.step()
        result = list(model.parameters())
        """,
        1,
    ),
    "gan": (
        """
        G = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        og, od = torch.optim.Adam(G.parameters(), 1e-3), torch.optim.Adam(model.parameters(), 1e-3)
        bce = nn.BCEWithLogitsLoss()
        for step in range(40):
            fake = G(torch.randn(64, 4))
            ld = bce(model(x[:64]), torch.ones(64, 1)) + bce(model(fake.detach()), torch.zeros(64, 1))
            od.zero_grad(); ld.backward(); od.step()
            lg = bce(model(fake), torch.ones(64, 1))
            og.zero_grad(); lg.backward(); og.step()
        result = [*G.parameters(), *model.parameters()]
        """,
        1,
    ),
    "accumulation under a scaler": (
        """
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)
        for step in range(12):
            for part in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(model(x[part::2]), labels[part::2]) / 2
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        result = list(model.parameters())
        """,
        2,
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_script_ends_as_it_would(tmp_path, name):
    body, out = HEALTHY[name]
    save = "\ntorch.save([torch.get_rng_state(), *[p.detach() for p in result]], 'result{}.pt')\n"
    body = textwrap.dedent(body)
    plain = script(tmp_path, f"import os; os.chdir({str(tmp_path)!r})\n" + body + save.format(1), out, "plain.py")
    ours = script(tmp_path, f"import os; os.chdir({str(tmp_path)!r})\n" + body + save.format(2), out, "ours.py")
    here = os.getcwd()
    try:
        runpy.run_path(plain, run_name="__main__")
        report = run_script(ours, patience=25)
    finally:
        os.chdir(here)
    assert report.verdict == "healthy", str(report)
    assert report.error is None
    one, two = (torch.load(tmp_path / f"result{i}.pt") for i in (1, 2))
    assert len(one) == len(two)
    assert all(map(torch.equal, one, two))
    assert "nothing to report" in str(report)


def test_a_healthy_script_waits_for_no_package_that_it_does_not_use(tmp_path):
    """numba takes longer to load than many a script to run."""
    body = """
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(30):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    import sys
    print("loaded:", sorted({"numba", "scipy", "matplotlib", "sklearn", "transformers"} & {*sys.modules}))
    """
    path = script(tmp_path, textwrap.dedent(body), 1)
    done = subprocess.run(
        [sys.executable, "-m", "initlab", "doctor", path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "loaded: []" in done.stdout + done.stderr) == (0, True), done.stdout + done.stderr


def test_nothing_is_left_behind(tmp_path):
    backward, call, argv, path = torch.autograd.backward, torch.nn.Module.__call__, sys.argv[:], sys.path[:]
    report = run_script(script(tmp_path, "import sys; assert sys.argv[1:] == ['--lr', '3']; 1 / 0"), ["--lr", "3"])
    assert isinstance(report.error, ZeroDivisionError)
    assert not report.stopped
    assert (torch.autograd.backward, torch.nn.Module.__call__) == (backward, call)
    assert (sys.argv, sys.path) == (argv, path)
    assert not torch._C._len_torch_function_stack()


# The command

BROKEN = """
        print("the script's own")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = (model(x) * float("inf")).mean()
        loss.backward()
        """


def test_the_command(tmp_path, capsys):
    path = script(tmp_path, BROKEN)
    assert cli.main(["doctor", "--json", path]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["verdict"], found["file"], found["line"]) == ("broken", path, line_of(path, "loss.backward"))
    assert "the script's own" in err
    assert cli.main(["doctor", path]) == 2
    assert "train.py: stopped in step 1: the loss is" in capsys.readouterr().out
    assert cli.main(["doctor", script(tmp_path, "x = 1", name="nothing.py")]) == 0
    assert "no backward pass was seen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "arguments", "said"),
    [
        ("1 / 0", [], "ZeroDivisionError"),
        ("raise SystemExit(3)", [], "SystemExit(3)"),
        ("def setup(a):\n    pass", ["setup"], "takes a; the command calls it without arguments"),
        ("def setup():\n    raise KeyError('no')", ["setup"], "raised KeyError: 'no'"),
        ("import nowhere", ["setup"], "raised ModuleNotFoundError: No module named 'nowhere'"),
        ("def setup(:", ["setup"], "SyntaxError"),
    ],
)
def test_the_users_own_errors_are_64(tmp_path, capsys, body, arguments, said):
    path = script(tmp_path, body)
    assert cli.main(["doctor", ":".join([path, *arguments])]) == 64
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


def test_our_own_errors_are_70(monkeypatch, capsys):
    def fails(arguments, parser):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(cli, "_run", fails)
    assert cli.main(["env"]) == 70
    assert "fault of initlab" in capsys.readouterr().err


def test_version_and_env(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert (exit.value.code, capsys.readouterr().out.split()[0]) == (0, "initlab")
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(capsys, shell):
    assert cli.main(["completion", shell]) == 0
    assert "doctor" in capsys.readouterr().out


def test_a_pipe_that_is_closed_early(monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert cli.main(["env"]) == 141
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.long
def test_a_real_pipe(tmp_path):
    command = f"{sys.executable} -m initlab env | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141)
    assert done.stderr == ""
