"""--config: options of a command in a YAML file."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from smi_fast.cli.arguments import Parser
from smi_fast.data.files import first_line

NOT_IN_A_FILE = ("--config", "--resume", "--help")
NOTHING = "tag:yaml.org,2002:null"


def add_config(group: argparse._ActionsContainer) -> None:
    """Add --config."""
    what = (
        "read options from a YAML file, which maps their long names to values, such as iterations: 600; options on the "
        "command line win over it"
    )
    group.add_argument("--config", type=Path, metavar="FILE", help=what)


def with_config(arguments: Sequence[str], commands: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """Return the arguments of a command, with the options in the file that --config names in place of it, in front of
    the others. `commands` maps the names of the commands to their parsers.

    Raises:
        ValueError: the file cannot be read, is no YAML file of options, or names an option that the command does not
            have. The message names it.
    """
    parser = Parser(add_help=False)
    parser.add_argument("--config", type=Path)
    try:
        given, others = parser.parse_known_args(arguments)
    except ValueError:  # --config without a file, which the command's own parser refuses
        return list(arguments)
    command = commands.get(others[0]) if others else None
    if given.config is None or command is None or "--config" not in command._option_string_actions:
        return list(arguments)
    return [others[0], *_options(given.config, command._option_string_actions), *others[1:]]


def _options(file: Path, known: Mapping[str, argparse.Action]) -> list[str]:
    """Read a file of options, and return them as words of a command line."""
    try:
        content = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ValueError(f"--config: {file} cannot be read: {reason or first_line(error)}") from error
    if content is None:  # an empty file
        return []
    if not isinstance(content, yaml.MappingNode):
        raise ValueError(f"--config: {file} does not map names of options to values")
    words, seen = [], set()
    for key, value in content.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"--config: {file} has a list or a map in place of the name of an option")
        name = key.value.replace("_", "-")
        if f"--{name}" not in known or f"--{name}" in NOT_IN_A_FILE:
            raise ValueError(f"--config: {file} names {name!r}, which is no option for a file{_hint(name, known)}")
        if name in seen:
            raise ValueError(f"--config: {file} names {name} twice")
        seen.add(name)
        words += _words(file, name, value, is_flag=known[f"--{name}"].nargs == 0)
    return words


def _words(file: Path, name: str, value: yaml.Node, is_flag: bool) -> Iterator[str]:
    parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
    if not all(isinstance(part, yaml.ScalarNode) and part.tag != NOTHING for part in parts):
        raise ValueError(f"--config: {file} gives {name} no value or list of values")
    text = ",".join(part.value for part in parts)
    if not is_flag:
        yield from [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    elif text.lower() not in ("true", "false"):
        raise ValueError(f"--config: {name} is true or false, {file} gives it {text!r}")
    elif text.lower() == "true":
        yield f"--{name}"


def _hint(name: str, known: Mapping[str, argparse.Action]) -> str:
    names = [option.removeprefix("--") for option in known if option.startswith("--") and option not in NOT_IN_A_FILE]
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""
