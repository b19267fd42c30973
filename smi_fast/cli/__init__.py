"""The command line. Each command has a file of its own; `main` runs one and turns its errors into exit codes."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import smi_fast
from smi_fast.cli import distill, evaluate, info, invert, quantize, report, reproduce
from smi_fast.cli.arguments import Parser, prepare_data
from smi_fast.cli.config import with_config
from smi_fast.cli.output import resumed, say
from smi_fast.data.manifest import MANIFEST
from smi_fast.inversion.inverter import NonFiniteError
from smi_fast.runs.processes import device_of_process
from smi_fast.runs.signals import SIGNALS, Stopped

COMMANDS = (info, invert, report, quantize, distill, reproduce, evaluate)
# What torch's RuntimeErrors say of memory: its allocators, C++ and NVIDIA's libraries.
OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 2 after an error that the user can act on, 130 after Ctrl-C, or 143 after SIGTERM. Each error
        or warning is one line on the standard error stream.
    """
    args = argparse.Namespace()
    with warnings.catch_warnings(), _stoppable():
        warnings.showwarning = _show_warning
        try:
            parser = _parser()
            given = resumed(with_config(sys.argv[1:] if arguments is None else arguments, parser.commands))
            args.command = [argument for argument in given if argument != "--overwrite"]
            parser.parse_args(given, args)
            if hasattr(args, "device"):
                args.device = device_of_process(args.device)
            prepare_data(args)
            return args.run(args)
        except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
            spent = any(text in str(error) for text in OUT_OF_MEMORY) or isinstance(error, MemoryError)
            if isinstance(error, RuntimeError) and not (spent or isinstance(error, NonFiniteError)):
                raise
            sentence = _sentence(error)
            if spent and "memory" not in sentence:
                sentence = f"out of memory ({sentence})"
            advice = "; a smaller --batch-size needs less" if spent and hasattr(args, "batch_size") else ""
            print(f"smi-fast: error: {sentence}{advice}", file=sys.stderr)
            return 2
        except (KeyboardInterrupt, Stopped) as error:
            _ignore_signals()
            say(f"smi-fast: interrupted; {_going_on(args)}", sys.stderr)
            return error.exit_code if isinstance(error, Stopped) else 128 + signal.SIGINT


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM raise `Stopped`, as Ctrl-C raises KeyboardInterrupt. Afterwards signals do what they did before."""

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    """Let no further signal disturb the last words of a command."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _going_on(args: argparse.Namespace) -> str:
    """Return how to go on after an interruption."""
    out = getattr(args, "out", None)
    if out is None or not (out / MANIFEST).exists():
        return "nothing was written"
    if "RANK" in os.environ:
        return "to go on, start the processes again as before"
    return f"to go on: smi-fast {args.command[0]} --resume {shlex.quote(str(out))}"


def _parser() -> Parser:
    what = (
        "Sparse model inversion, fast: images out of a trained classifier alone, and what they are for, which is to "
        "quantise a model or to teach a student without its training data. To begin with: smi-fast invert"
    )
    parser = Parser(prog="smi-fast", description=what)
    parser.add_argument("--version", action="version", version=f"smi-fast {smi_fast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    parser.commands = commands.choices
    return parser


def _sentence(error: Exception) -> str:
    """Return an error's message in one line. A DataLoader's worker sends a traceback that ends with the message."""
    text = str(error).strip() or "out of memory"  # a MemoryError has no message
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def _show_warning(message: Warning, *where: object) -> None:
    print(f"smi-fast: warning: {message}", file=sys.stderr)
