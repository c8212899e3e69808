"""The command line and configuration files: both give a Config, and name what is wrong with them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import tyro

from train.config import CHOSEN, NOT_KEPT, Config, base, change, flat, groups
from train.errors import UsageError
from train.log import write_whole

Parsed = TypeVar("Parsed")


def parse(arguments: Sequence[str], prog: str, kind: type[Parsed], default: Parsed) -> Parsed:
    """Parse a command line, in which options have flat names whatever group they stand in.

    Args:
      arguments: without the program's name.
      prog: the program's name.
      kind: a dataclass.
      default: gives every default.

    Returns:
      One of kind.
    """
    return tyro.cli(
        kind,
        args=arguments,
        prog=prog,
        default=default,
        description=inspect.cleandoc(kind.__doc__ or ""),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def early(arguments: Sequence[str], *names: str) -> dict[str, str]:
    """Read a few options before all others, those that choose the others' defaults.

    Args:
      arguments: of the command line.
      *names: of the options.

    Returns:
      The values of those that are given, and not as None.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        parser.add_argument(f"--{name}", nargs="?")
    found = vars(parser.parse_known_args(arguments)[0])
    return {key: value for key, value in found.items() if value not in (None, "None")}


def defaults(arguments: Sequence[str], changed: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """Find the defaults of a command line: of its --config, its --preset, or its --data.

    What was chosen for one optimizer is none of another's, and left to `settle` where --optimizer is another.

    Args:
      arguments: of the command line.
      changed: values that take their place, by option.

    Returns:
      A configuration, for `parse`.

    Raises:
      UsageError: the file cannot be read, or its contents are wrong.
    """
    given = early(arguments, "preset", "data", "config")
    path = given.pop("config", None)
    values = {key: value for key, value in changed.items() if key not in given}
    if path is not None:
        if "preset" in given:
            raise UsageError("--config and --preset both give every default: give one of them")
        values = read(Path(path), "--config")
        values.pop("name", None)  # is that run's
    made = change(base(values | given), **values)
    optimizer = early(arguments, "optimizer").get("optimizer", made.training.optimizer)
    if optimizer == made.training.optimizer:
        return made
    values = {key: value for key, value in values.items() if key not in CHOSEN}
    return change(base(values | given | {"optimizer": optimizer}), **values)


def write(config: Config, path: Path) -> None:
    """Write a whole configuration as JSON, at once or not at all.

    Args:
      config: settled.
      path: of the file.
    """
    values = {key: str(value) if isinstance(value, Path) else value for key, value in flat(config).items()}
    write_json(values, path)


def write_json(value: Any, path: Path) -> None:
    """Write JSON so that a kill leaves the old file or the new one.

    Args:
      value: of plain types.
      path: of the file.
    """
    write_whole((json.dumps(value, indent=2) + "\n").encode(), path)


def read(path: Path, option: str) -> dict[str, Any]:
    """Read a configuration file, checking every key and type.

    Args:
      path: of the file.
      option: that named it, for errors.

    Returns:
      Values by option; those not in the file are missing.

    Raises:
      UsageError: the file cannot be read, a key is unknown, or a value has the wrong type.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read ({error.strerror}): give a config.json") from error
    except ValueError as error:
        raise UsageError(f"{option} {path} is not JSON ({error}): give a config.json") from error
    if not isinstance(found, dict):
        raise UsageError(f"{option} {path} holds no JSON object: give a config.json")
    hints = _hints()
    for key in found:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            advice = f"did you mean {near[0]}?" if near else f"it may hold {', '.join(hints)}"
            raise UsageError(f"{option} {path}: there is no setting {key!r}: {advice}")
    return {key: _convert(value, hints[key], f"{option} {path}: {key}") for key, value in found.items()}


def differences(a: Config, b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare a configuration with values read from a file.

    Args:
      a: settled.
      b: from `read`.

    Returns:
      Both values of each option that differs.
    """
    own = flat(a)
    return {key: (own[key], value) for key, value in b.items() if own[key] != value}


def _hints() -> dict[str, Any]:
    return {
        field.name: hints[field.name]
        for kind in groups().values()
        if kind not in NOT_KEPT
        for hints in [typing.get_type_hints(kind)]
        for field in dataclasses.fields(kind)
    }


def _convert(value: Any, hint: Any, where: str) -> Any:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return value
        elif kind is type(None):
            if value is None:
                return None
        elif kind is Path and isinstance(value, str):
            return Path(value)
        elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif type(value) is kind:
            return value
    raise UsageError(f"{where} is {json.dumps(value)}, which is not {_name(kinds)}")


def _name(kinds: Sequence[Any]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", Path: "a path"}
    parts = [
        ", ".join(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else names.get(kind, "null")
        for kind in kinds
    ]
    return " or ".join(parts)
