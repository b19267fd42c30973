"""The command line. Each command has a file of its own; `main` runs one and turns its errors into exit codes."""

from __future__ import annotations

import argparse
import sys
import warnings

import smi_fast
from smi_fast.cli import distill, evaluate, info, invert, quantize, reproduce
from smi_fast.cli.arguments import Parser
from smi_fast.cli.output import INTERRUPTED
from smi_fast.inversion.inverter import NonFiniteError

COMMANDS = (info, invert, quantize, distill, reproduce, evaluate)
OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory")  # what torch's RuntimeErrors say


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 2 after an error that the user can act on, or 130 after Ctrl-C. Each error or warning is one
        line on the standard error stream.
    """
    args = argparse.Namespace(written=[])  # a command adds the names of the files that it has written completely
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            _parser().parse_args(arguments, args)
            return args.run(args)
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        expected = isinstance(error, NonFiniteError) or any(text in str(error) for text in OUT_OF_MEMORY)
        if isinstance(error, RuntimeError) and not expected:
            raise
        print(f"smi-fast: error: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        what = f"after it wrote {', '.join(args.written)} to {args.out}" if args.written else "before it wrote anything"
        print(f"smi-fast: interrupted {what}", file=sys.stderr)
        return INTERRUPTED


def _parser() -> Parser:
    parser = Parser(prog="smi-fast", description="Fast sparse model inversion of Vision Transformers.")
    parser.add_argument("--version", action="version", version=f"smi-fast {smi_fast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def _sentence(error: Exception) -> str:
    """Return an error's message in one line. A DataLoader's worker sends a traceback that ends with the message."""
    text = str(error).strip() or "out of memory"  # a MemoryError has no message
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def _show_warning(message: Warning, *where: object) -> None:
    print(f"smi-fast: warning: {message}", file=sys.stderr)
