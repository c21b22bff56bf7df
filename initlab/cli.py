"""The `initlab` command: demo | plan | doctor | scan | env | completion.

Exit status: 0; 1 if the demo's evidence does not hold or a model cannot be planned; 64 if the command was used wrongly
or the user's own code fails; 70 if ours does (EX_USAGE and EX_SOFTWARE of sysexits.h).
Of doctor and scan: 0 healthy, 1 warning, 2 broken. What the user's code prints goes to
stderr: stdout has the report and nothing else.
"""

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import platform
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from ._console import line_width, say
from .languages import LANGUAGES, translator

EX_FAILED, EX_BROKEN, EX_USAGE, EX_SOFTWARE = 1, 2, 64, 70
EX_PIPE = 141  # 128 + SIGPIPE, as of a command that the signal ends


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse's own status is 2
        self.print_usage(sys.stderr)
        self.exit(EX_USAGE, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the command's name; None takes them from sys.argv.

    Returns:
        The exit status: 0, 1 if the demo could not run or its evidence does not hold, or if no plan could be made,
        64 if INITLAB_BACKEND asks for what the demo cannot have, there is no such function to plan or to examine, the
        user's code raises an error, or the model to examine cannot run without other ranks; 70 for an error of ours.
        Of doctor and scan 0, 1 or 2: healthy, warning, broken.

    Raises:
        SystemExit: with 64 for arguments that make no sense, with 0 after --help.

    Example:
        >>> from initlab.cli import main
        >>> main(["env"])
        initlab          ..., stream 1
        ...
        0
    """
    parser = _Parser(prog="initlab", description="Numeric kernels for the fragile moments of a training run.")
    shared = _Parser(add_help=False)  # what every report takes
    shared.add_argument("--json", action="store_true", help="print JSON instead of text")
    shared.add_argument("--lang", choices=LANGUAGES, default="en", help="of the text: en (the default) or zh, Chinese")
    paged = _Parser(add_help=False)  # what can be a page as well
    paged.add_argument("--html", type=_page, metavar="FILE", help="also write the report as a page, FILE.html")
    parser.add_argument("--version", action="version", version=f"initlab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser("demo", parents=[paged], help="bad starts, a good one and equal bits, on real data")
    demo.add_argument("--seed", type=_seed, default=0, help="of every draw in the demo (default: 0)")
    plan = commands.add_parser(
        "plan", parents=[shared, paged], help="which distribution each parameter of a model gets, without touching it"
    )
    plan.add_argument(
        "function",
        metavar="PATH:FUNCTION",
        help="a file or module, and its function that returns the model, alone or first in a tuple",
    )
    plan.add_argument(
        "--recipe",
        default="own",
        help="own (the default), torch, he, xavier, lecun, gpt2, trunc_normal, auto, depth_scaled, mitchell, deepnorm, "
        "small_embedding, zero_residual, lsuv",
    )
    plan.add_argument("--seed", type=_seed, default=0, help="of the keys (default: 0)")
    plan.add_argument("--only", action="append", metavar="PATTERN", help="name pattern; may be given several times")
    plan.add_argument(
        "--batch",
        action="store_true",
        help="the function returns (model, batch) or (model, batch, loss_fn), as for doctor: run the model on the "
        "batch, and say which start each layer asks for and what it does to the first loss",
    )
    plan.add_argument("--meta", action="store_true", help="build the model on the meta device: no memory, no time")
    doctor = commands.add_parser(
        "doctor", parents=[shared, paged], help="why is the loss inf or NaN: run a script or a step, and say"
    )
    doctor.add_argument("--steps", type=_positive, help="of training to take and undo (default: 25, or what fits)")
    doctor.add_argument("--budget", type=_seconds, default=15.0, help="seconds for all runs together (default: 15)")
    doctor.add_argument("--patience", type=_positive, help="steps of a script in which its loss should have fallen")
    doctor.add_argument(
        "function",
        metavar="SCRIPT or PATH:FUNCTION",
        help="a training script, which is run as it is; or a file or module, and its function that returns (model, "
        "batch, loss_fn) or (model, batch, loss_fn, optimizer); loss_fn(model, batch) returns the loss",
    )
    doctor.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")
    scan = commands.add_parser(
        "scan", parents=[shared], help="which tensors of a checkpoint are NaN, inf, huge, zero or untouched"
    )
    scan.add_argument(
        "path", metavar="FILE_OR_FOLDER", help="of safetensors, torch.save or torch.distributed.checkpoint"
    )
    scan.add_argument("--since", metavar="OLDER", help="an older checkpoint of the same run, to compare with")
    commands.add_parser("env", parents=[shared], help="versions, devices and backends, for a bug report")
    completion = commands.add_parser("completion", help="print a shell's completion script (needs the package shtab)")
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    arguments = parser.parse_args(argv)
    if arguments.command == "doctor" and not arguments.function.endswith(".py") and arguments.arguments:
        # What follows a script is the script's own; what follows a function can only be ours.
        rest, arguments.arguments = arguments.arguments, []
        arguments = doctor.parse_args([*rest, arguments.function], arguments)
    try:
        status = _run(arguments, parser)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has read enough. Python would complain when it flushes stdout at exit
        with contextlib.suppress(OSError, ValueError):  # no file, as where stdout is captured
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EX_PIPE
    except _UsersError as error:
        return _failed(arguments.command, error, EX_USAGE)
    except Exception as error:
        traceback.print_exc()
        about = f"{type(error).__name__}: {error}\nThis is a fault of initlab. Please report it with `initlab env`."
        return _failed(arguments.command, about, EX_SOFTWARE)


class _UsersError(Exception):
    """The user's own code has failed: what it raised, and where."""


@contextlib.contextmanager
def _users_code(what: str) -> Iterator[None]:
    """Runs the user's own code: what it prints goes to stderr, what it raises is its own."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except BrokenPipeError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(__file__).parent not in Path(frame.filename).parents]
        where = f", {own[-1].filename}:{own[-1].lineno}" if own else ""
        raise _UsersError(f"{what} raised {type(error).__name__}: {error}{where}") from error


def _run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if arguments.command == "completion":
        return _completion(arguments.shell, parser)
    if arguments.command == "env":
        return _env(arguments)
    if arguments.command == "plan":
        return _plan(arguments)
    if arguments.command == "doctor":
        return _doctor(arguments)
    if arguments.command == "scan":
        return _scan(arguments)
    return _demo(arguments.seed, arguments.html)


def _completion(shell: str, parser: argparse.ArgumentParser) -> int:
    try:
        shtab = importlib.import_module("shtab")
    except ModuleNotFoundError:
        return _failed("completion", "it is made by the package shtab: pip install shtab", EX_USAGE)
    print(shtab.complete(parser, shell))
    return 0


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if not -(2**63) <= seed < 2**64:
        raise argparse.ArgumentTypeError(f"{seed} does not fit into 64 bits")
    return seed


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _page(text: str) -> Path:
    from .pages import checked_path

    try:
        return checked_path(text)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _demo(seed: int, page: Path | None) -> int:
    import torch

    from initlab.kernels import backend_of

    from . import demo

    try:
        backend = backend_of(torch.device("cpu"))
    except (RuntimeError, ValueError) as error:
        return _failed("demo", error, EX_USAGE)
    try:
        return 0 if demo.run(demo.Settings(seed=seed), backend, page) else EX_FAILED
    except demo.DataMissingError as error:
        return _failed("demo", error, EX_FAILED)


def _plan(arguments: argparse.Namespace) -> int:
    import torch

    from .models.initialization import plan_model
    from .models.recipes import resolve

    if arguments.batch and (arguments.meta or arguments.only or arguments.recipe != "own"):
        return _failed(
            "plan", "--batch runs the model, and finds the recipe: leave --meta, --only, --recipe out", EX_USAGE
        )
    try:
        build = _function(arguments.function)
        recipe = resolve(arguments.recipe)
    except (LookupError, ValueError) as error:
        return _failed("plan", error.args[0], EX_USAGE)
    with torch.device("meta") if arguments.meta else contextlib.nullcontext(), _users_code(arguments.function):
        returned = build()
    if arguments.batch:
        return _advise(arguments, returned)
    model = returned[0] if isinstance(returned, tuple) and returned else returned
    try:
        report = plan_model(model, arguments.seed, recipe, only=arguments.only)
    except (NotImplementedError, TypeError, ValueError) as error:
        return _failed("plan", error, EX_FAILED)
    _save(report, arguments)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report.text(arguments.lang, line_width()))
    return 0


def _advise(arguments: argparse.Namespace, returned: Any) -> int:
    from .fitting import advise

    if not isinstance(returned, tuple) or len(returned) not in (2, 3, 4):
        what = f"{len(returned)} values" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
        return _failed(
            "plan", f"{arguments.function} returned {what}; --batch asks for (model, batch[, loss_fn])", EX_USAGE
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):
            advice = advise(*returned[:3], seed=arguments.seed)
    except (NotImplementedError, TypeError, ValueError) as error:
        return _failed("plan", error, EX_FAILED)
    print(advice.to_json() if arguments.json else advice.text(arguments.lang, line_width()))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .diagnosis import CommunicatesError, UsageError, diagnose_alone

    translate = translator(arguments.lang)

    def on_stage(stage: str) -> None:
        say(f"initlab doctor: {translate(stage)}", "dim", stderr=True)

    if arguments.function.endswith(".py"):
        return _doctor_script(arguments, on_stage)
    if arguments.arguments or arguments.patience:
        return _failed("doctor", "--patience and further arguments are for scripts: doctor train.py ...", EX_USAGE)
    try:
        build = _function(arguments.function)
    except LookupError as error:
        return _failed("doctor", error.args[0], EX_USAGE)
    with _users_code(arguments.function):
        returned = build()
    try:
        if not isinstance(returned, tuple) or len(returned) not in (3, 4):
            what = f"{len(returned)} values" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
            raise UsageError(
                f"{arguments.function} returned {what}; it must return (model, batch, loss_fn[, optimizer])"
            )
        with contextlib.redirect_stdout(sys.stderr):
            diagnosis = diagnose_alone(*returned, steps=arguments.steps, budget=arguments.budget, on_stage=on_stage)
    except (CommunicatesError, UsageError) as error:
        return _failed("doctor", error, EX_USAGE)
    return _judged(diagnosis, arguments)


def _doctor_script(arguments: argparse.Namespace, on_stage: Callable[[str], None]) -> int:
    from .scripts import PATIENCE, run_script

    try:
        with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
            report = run_script(
                arguments.function,
                arguments.arguments,
                patience=arguments.patience or PATIENCE,
                on_stage=on_stage,
            )
    except FileNotFoundError as error:
        return _failed("doctor", error, EX_USAGE)
    if report.error is not None and not report.stopped:
        if not isinstance(report.error, SystemExit):
            traceback.print_exception(report.error)
        return _failed("doctor", f"{arguments.function} ended with {report.error!r}", EX_USAGE)
    return _judged(report, arguments)


def _scan(arguments: argparse.Namespace) -> int:
    from .checkpoints import scan_checkpoint
    from .checkpoints.formats import CheckpointError

    try:
        report = scan_checkpoint(arguments.path, arguments.since)
    except (CheckpointError, OSError) as error:
        return _failed("scan", error, EX_USAGE)
    return _judged(report, arguments)


def _judged(report: Any, arguments: argparse.Namespace) -> int:
    """Print a report that has a verdict; its exit status."""
    status, style = {"healthy": (0, "green"), "warning": (EX_FAILED, "yellow"), "broken": (EX_BROKEN, "bold red")}[
        report.verdict
    ]
    _save(report, arguments)
    if arguments.json:
        print(report.to_json())
    else:
        headline, _, rest = report.text(arguments.lang, line_width()).partition("\n")
        say(headline, style)
        if rest:
            print(rest)
    return status


def _save(report: Any, arguments: argparse.Namespace) -> None:
    """Write the page that --html asks for."""
    path = getattr(arguments, "html", None)  # scan has none
    if path is not None:
        try:
            report.save(path, lang=arguments.lang)
        except OSError as error:  # what is printed is not lost with it
            _failed(arguments.command, error, EX_USAGE)
        else:
            say(f"initlab {arguments.command}: wrote {path}", "dim", stderr=True)


def _failed(command: str, error: object, status: int) -> int:
    say(f"initlab {command}: error: {error}", "red", stderr=True)
    return status


def _function(place: str) -> Callable[[], Any]:
    """What PATH:FUNCTION names; a LookupError says why if it names nothing."""
    path, _, name = place.rpartition(":")
    if not path or not name.isidentifier():
        raise LookupError(f"{place!r} is not of the form PATH:FUNCTION, as model.py:build or package.module:build")
    if path.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        if not Path(path).is_file() or spec is None or spec.loader is None:
            raise LookupError(f"there is no file {path}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # as an import would: dataclasses and pickle look their module up
        sys.path.insert(0, str(Path(path).resolve().parent))  # its neighbours can be imported, as by `python model.py`
        with _users_code(path):
            spec.loader.exec_module(module)
        found = getattr(module, name, None)
    else:
        sys.path.insert(0, os.getcwd())
        try:
            with contextlib.redirect_stdout(sys.stderr):
                found = pkgutil.resolve_name(f"{path}:{name}")
        except ModuleNotFoundError as error:
            if error.name is None or not (path == error.name or path.startswith(f"{error.name}.")):
                raise _UsersError(f"{path} raised ModuleNotFoundError: {error}") from error  # what it imports itself
            raise LookupError(f"there is no module {path}; a file's name ends in .py") from None
        except AttributeError:
            found = None
        except Exception as error:
            raise _UsersError(f"{path} raised {type(error).__name__}: {error}") from error
    if not callable(found):
        raise LookupError(f"{path} has no function {name}")
    with contextlib.suppress(TypeError, ValueError):  # a builtin may have no signature
        needed = [p.name for p in inspect.signature(found).parameters.values() if p.default is p.empty and p.kind < 2]
        if needed:
            raise LookupError(f"{place} takes {', '.join(needed)}; the command calls it without arguments")
    build: Callable[[], Any] = found
    return build


def _env(arguments: argparse.Namespace) -> int:
    import torch

    from initlab.kernels import STREAM_VERSION, backend_of

    def backend(device: torch.device) -> str:
        try:
            return backend_of(device)
        except (RuntimeError, ValueError) as error:
            return f"none: {error}"  # what a fill would raise

    facts = [("initlab", f"{__version__}, stream {STREAM_VERSION}"), ("python", platform.python_version())]
    facts += [("torch", torch.__version__)]
    facts += [(package, _version(package)) for package in ("numba", "triton", "numpy")]
    facts += [("INITLAB_BACKEND", os.environ.get("INITLAB_BACKEND", "not set"))]
    facts += [
        ("cpu", f"{_cpu_model()}, {torch.get_num_threads()} threads"),
        ("cpu backend", backend(torch.device("cpu"))),
    ]
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not gpus:
        facts += [("cuda", "no device")]
    for gpu in gpus:
        facts += [(str(gpu), torch.cuda.get_device_name(gpu)), (f"{gpu} backend", backend(gpu))]
    if arguments.json:
        print(json.dumps(dict(facts), indent=2))
        return 0
    translate, room = translator(arguments.lang), max(20, line_width() - 17)
    for name, fact in facts:
        lines = textwrap.wrap(translate(fact), room, break_long_words=False, break_on_hyphens=False)
        print("\n".join(f"{name if not number else '':<17}{line}" for number, line in enumerate(lines)))
    return 0


def _version(package: str) -> str:
    # Read from its metadata: importing numba takes a third of a second.
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
