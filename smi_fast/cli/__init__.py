"""The command line, one file a command."""

from smi_fast.cli.invert import main

__all__ = ["main"]
