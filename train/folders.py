"""Run folders: never overwritten silently, and gone on with only under the settings they were started with."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import shlex
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import optax

import gradpart_jax as gp
from train import hosts, options
from train.config import Config, flat
from train.errors import UsageError
from train.held import held
from train.labels import Label
from train.log import read_object
from train.summary import FINISHED

# What may differ when a run goes on; all else makes it another training.
MAY_CHANGE = {
    "preset",
    "data_dir",
    "devices",
    "steps",
    "eval_every",
    "checkpoint_every",
    "tensorboard",
    "profile",
    "phases",
    "dense_reference",
    "workdir",
    "name",
}


def check(config: Config) -> None:
    """Refuse a folder that exists where nobody said what to do with it, or that cannot be written to.

    Args:
      config: settled.

    Raises:
      UsageError: names the option and the remedy.
    """
    folder, start = config.folder, config.start
    for path in (folder, Path(folder.name)):  # where --workdir is missing, a name's length is not looked at
        try:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.stat()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise UsageError(f"--name: {folder.name} cannot be had ({error.strerror}): choose another") from error
            if path is folder:
                raise UsageError(
                    f"--workdir {config.output.workdir} cannot be written to ({error.strerror}): choose another folder"
                ) from error
    if start.resume and start.overwrite:
        raise UsageError("--resume and --overwrite contradict each other: give one of them")
    if start.resume and not folder.exists():
        raise UsageError(f"--resume: there is no run folder {folder}: leave --resume out to start one")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--name: {folder} is a file: choose another --name")
    try:
        used = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise UsageError(f"run folder {folder} cannot be read ({error.strerror}): choose another --name") from error
    if used and not (start.overwrite or start.resume):
        raise _taken(folder)
    _check_replaced(config)
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"--workdir {config.output.workdir} cannot be written to: choose another folder")


def _taken(folder: Path) -> UsageError:
    return UsageError(
        f"run folder {folder} exists: go on with --resume, replace it with --overwrite, or choose another --name"
    )


def _check_replaced(config: Config) -> None:
    """Refuse to remove what is no run folder, on this host's disk."""
    folder, kept = config.folder, config.folder / "config.json"
    if not (config.start.overwrite and folder.exists()):
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not kept.exists()):
        raise UsageError(f"--overwrite: {folder} holds no config.json, so it is no run folder: choose another --name")
    if kept.exists():
        # Which refuses another program's; one that a user wrote to give some settings by --config lacks others
        lacking = flat(config).keys() - options.read(kept, "--overwrite").keys()
        if lacking:
            raise UsageError(
                f"--overwrite: {folder} is no run folder of this version, for its config.json lacks {min(lacking)!r}: "
                "choose another --name, or remove it yourself"
            )


@contextlib.contextmanager
def made(config: Config) -> Iterator[None]:
    """Make the program's folder, after `check`, on every host, and keep other programs out of it meanwhile.

    Args:
      config: settled.

    Raises:
      UsageError: it cannot be made, another program is in it, or what is in it was started with other settings.
    """
    path = config.folder / "config.json"

    def prepare(*, first: bool) -> None:
        try:
            if config.start.overwrite and config.folder.exists():
                shutil.rmtree(config.folder)
            config.folder.mkdir(parents=True, exist_ok=True)
            if first and not config.start.resume:
                path.open("x").close()
            options.write(config, path)
        except FileExistsError as error:
            # Since `check` looked, another start has made it, which would go on into the same files
            raise _taken(config.folder) from error
        except OSError as error:
            raise UsageError(
                f"--workdir {config.output.workdir} cannot be written to ({error}): choose another"
            ) from error

    def begin() -> str:
        with held(config.folder) if config.folder.exists() else contextlib.nullcontext():
            if config.start.resume and path.exists():
                _agree(config, config.folder)
            prepare(first=True)
        alone.enter_context(held(config.folder))
        mark = config.folder / f".{uuid.uuid4().hex}"
        mark.touch()
        return mark.name

    with contextlib.ExitStack() as alone:
        # `check` has looked at process 0's folder alone
        hosts.together(lambda: _check_replaced(config), "the look at run folders")
        mark = config.folder / hosts.lead(begin, "the making of the run folder")
        # A host with a disk of its own needs the settings too, to go on with them; of its processes one writes them
        places = hosts.gather(f"{socket.gethostname()}:{config.folder.resolve()}", "the making of run folders")
        apart = places.index(places[hosts.index()]) == hosts.index() and not os.path.exists(mark)
        hosts.together(lambda: prepare(first=False) if apart else None, "the making of run folders")
        hosts.lead(lambda: mark.unlink(missing_ok=True), "the making of run folders")
        yield


def enter(config: Config, folder: Path, notice: Callable[[str], None]) -> dict[str, Any] | None:
    """Make one run's folder, or check that the run in it is this one.

    Args:
      config: settled.
      folder: of the run.
      notice: is told what settings changed.

    Returns:
      The summary where the run has finished all its steps, else None.

    Raises:
      UsageError: the run was started with other settings.
    """
    path = folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        differ = _agree(config, folder)
        told = [f"{key} {old} became {new}" for key, (new, old) in differ.items() if key in ("devices", "steps")]
        if told:
            notice(f"going on with other settings: {', '.join(told)}")
    summary = finished(folder)
    if summary is not None and summary["steps"] >= config.training.steps:
        return summary
    options.write(config, path)
    (folder / "summary.json").unlink(missing_ok=True)
    return None


def _agree(config: Config, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Compare with the settings that a folder was started with; refuse those that make it another training."""
    differ = options.differences(config, options.read(folder / "config.json", "--resume"))
    for key, (new, old) in differ.items():
        if key not in MAY_CHANGE:
            option = "--" + key.replace("_", "-")
            raise UsageError(
                f"--resume: {option} {new} differs from {old}, with which {folder} was started: "
                f"leave {option} out, or choose another --name"
            )
    return differ


def finished(folder: Path) -> dict[str, Any] | None:
    """Read a run's summary.

    Args:
      folder: of the run.

    Returns:
      The summary; None where the run has not finished.
    """
    found = read_object(folder / "summary.json")
    return found if found.get("status") == FINISHED else None


def describe(
    config: Config, label: Label, ratio: float, budget: float | None, params: Any, command: str
) -> dict[str, Any]:
    """Put together a run's header, as in run.json.

    Args:
      config: settled.
      label: of the method.
      ratio: payload ratio asked of it.
      budget: link ratio asked for, or None.
      params: of the model.
      command: that started it.

    Returns:
      The header.
    """
    sizes = [int(x.size) for x in jax.tree.leaves(params)]
    devices, dense = config.devices, 4.0 * sum(sizes)
    return {
        "method": label.text,
        "kind": label.kind,
        "command": command,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "gradpart_jax": gp.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
        },
        "device_kind": jax.devices()[0].device_kind,
        "devices": devices,
        "processes": jax.process_count(),
        "data": config.task.data,
        "model": config.task.model,
        "parameters": sum(sizes),
        "segments": list(gp.segment_names(params)),
        "sizes": sizes,
        "seed": config.training.seed,
        "budget": budget,
        "dense_payload_bytes": dense,
        "dense_link_bytes": dense * 2 * (devices - 1) / devices,
        "expected_payload_bytes": dense / ratio if label.budgeted else None,
    }


def keep_header(header: dict[str, Any], folder: Path, done: int) -> dict[str, Any]:
    """Write run.json; a run that goes on keeps when and how it was started, and notes each start after.

    Args:
      header: of `describe`.
      folder: of the run.
      done: steps already done.

    Returns:
      The header as it is kept.
    """
    path = folder / "run.json"
    first = read_object(path)
    if done and first:
        again = {"step": done, **{key: header[key] for key in ("command", "started", "devices")}}
        header = header | {
            "command": first["command"],
            "started": first["started"],
            "began_with": first.get("began_with", first["devices"]),
            "resumed": [*first.get("resumed", []), again],
        }
    options.write_json(header, path)
    return header


def command(module: str, arguments: Sequence[str]) -> str:
    """Write the command line that started this.

    Args:
      module: run by python -m.
      arguments: given to it.

    Returns:
      The command.
    """
    return shlex.join(["python", "-m", module, *arguments])
