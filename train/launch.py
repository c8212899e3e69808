"""`python -m train.launch --processes N -- OPTIONS`: several processes of train.main, kept going."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from train import main as program
from train import options
from train.errors import BROKEN, USAGE, UsageError, status_of
from train.interrupts import HANGUP, leave_terminal, wishes
from train.limits import MANY, within

PROG = "train.launch"
GRACE = 15.0  # seconds that processes have to end by themselves, once one has, or once two signals asked them to
PAUSE, LONGEST = 1.0, 30.0  # seconds before the first restart, doubled each time, and before any
NOISE = ("[Gloo] Rank ", "    @ ", "*** Check failure")  # what gloo says of every connection, and stacks of JAX's own


@dataclasses.dataclass(frozen=True)
class Launch:
    """Start processes of train.main, whose options follow after --, and see them through to the end.

    When one dies, all are ended, and started again from the newest checkpoint. Their lines are shown with their number
    before them. Ctrl-C, SIGTERM and SIGHUP reach all of them; a second Ctrl-C or SIGTERM ends them at once. Those that
    have not ended --timeout seconds after the first are killed. Where nobody reads on what is printed, all end as by
    SIGTERM.
    """

    processes: int = 2
    """Number of processes: on this machine, or, with --coordinator, on all hosts together."""
    coordinator: str | None = None
    """HOST:PORT of process 0, to start one process of several hosts; None starts all of them on this machine."""
    process: int | None = None
    """With --coordinator: number of the process to start here."""
    restarts: int = 3
    """How often to start again after a process was lost."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
      arguments: of the command line; None takes the process's own.

    Returns:
      The exit status: 0 where all ended well, else that of the process that failed first, 128 and its signal's number
      where it was killed; 141 where nobody reads on what is printed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    own, rest = given[:cut], given[cut + 1 :]
    result = [0]

    def work() -> None:
        _check_names(own)
        launch = options.parse(own, f"python -m {PROG}", Launch, Launch())
        _check(launch, rest)
        group = Group(launch, rest)
        result[0] = group.run()
        if group.unread:
            raise BrokenPipeError

    return status_of(work) or result[0]


class Group:
    """The processes that are to be seen through.

    Args:
      launch: of the command line.
      given: options of train.main.
    """

    def __init__(self, launch: Launch, given: Sequence[str]) -> None:
        self._launch, self._given = launch, list(given)
        self._running: dict[int, subprocess.Popen[str]] = {}
        config = program.parse(self._given)
        self._settings, self._patience = config.folder / "config.json", config.hosts.timeout
        self._before = _stamp(self._settings)
        self._signal = 0
        self._last = math.inf  # when those that were asked to end are killed
        self.unread = False  # whether nobody reads what is printed

    def run(self) -> int:
        """Start, watch, and start again, until all have ended well, or for good.

        Returns:
          The exit status.
        """
        before = {number: signal.signal(number, self._hear) for number in wishes()}
        try:
            for start in range(self._launch.restarts + 1):
                status = self._once()
                if status in (0, BROKEN, USAGE) or self._signal or start == self._launch.restarts:
                    return status
                _say(f"a process was lost (status {status}): restart {start + 1} of {self._launch.restarts}")
                self._sleep(min(LONGEST, PAUSE * 2.0 ** min(start, 10)))
                if self._signal or self.unread:
                    return status
                if _stamp(self._settings) not in (None, self._before):
                    self._given = _going_on(self._given)
            return status
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _once(self) -> int:
        launch = self._launch
        address = launch.coordinator or f"127.0.0.1:{_free_port()}"
        numbers = range(launch.processes) if launch.process is None else [launch.process]
        readers = []
        for number in numbers:
            named = ["--coordinator", address, "--processes", str(launch.processes), "--process", str(number)]
            child = subprocess.Popen(
                [sys.executable, "-u", "-m", program.PROG, *self._given, *named],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C in a terminal is to come by way of this program, and once
            )
            assert child.stdout is not None
            self._running[number] = child
            readers.append(threading.Thread(target=self._relay, args=(child.stdout, number), daemon=True))
            readers[-1].start()
        try:
            return self._watch()
        finally:
            for child in self._running.values():
                if child.poll() is None:
                    child.kill()
                child.wait()
            for reader in readers:
                reader.join(GRACE)
            self._running.clear()

    def _watch(self) -> int:
        """Wait for the end of all; once one has failed, the others have GRACE seconds to see it themselves."""
        first, last = 0, math.inf
        while True:
            ended = {number: child.poll() for number, child in self._running.items()}
            for number, status in ended.items():
                if status and not first:
                    first, last = (status if status > 0 else 128 - status), time.monotonic() + GRACE
                    _say(f"process {number} ended with status {first}")
            if all(status is not None for status in ended.values()) or time.monotonic() > last:
                return first
            if time.monotonic() > self._last:
                _say("processes that do not end are killed")
                return first or 128 + self._signal
            if self.unread and not self._signal:
                self._hear(signal.SIGTERM, None)
            time.sleep(0.05)

    def _sleep(self, seconds: float) -> None:
        last = time.monotonic() + seconds
        while time.monotonic() < last and not (self._signal or self.unread):
            time.sleep(0.05)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == HANGUP:
            leave_terminal()
            # Both the shell and the system may tell of it
            if self._signal:
                return
        # A step and its checkpoint take a while; who asks twice does not wait for them
        self._last = min(self._last, time.monotonic() + (GRACE if self._signal else self._patience))
        self._signal = number
        for child in self._running.values():
            if child.poll() is None:
                child.send_signal(number)

    def _relay(self, lines: IO[str], number: int) -> None:
        """Show a process's lines; where nobody reads them they are taken all the same, or it would wait for ever."""
        for line in lines:
            if not (line.startswith(NOISE) or self.unread):
                try:
                    sys.stdout.write(f"[{number}] {line}")
                    sys.stdout.flush()
                except OSError as error:  # or of a terminal that has gone, which is told by SIGHUP
                    self.unread = isinstance(error, BrokenPipeError)


def _check_names(own: Sequence[str]) -> None:
    known = [f"--{field.name}" for field in dataclasses.fields(Launch)]
    for argument in own:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in (*known, "--help"):
            raise UsageError(f"{name} is none of {', '.join(known)}: give options of {program.PROG} after --")


def _check(launch: Launch, given: Sequence[str]) -> None:
    within(("--processes", launch.processes, 1, 1024), ("--restarts", launch.restarts, 0, MANY))
    if (launch.coordinator is None) != (launch.process is None):
        raise UsageError("--coordinator and --process go together: give both, or neither to start all on this machine")
    for option in ("--coordinator", "--processes", "--process"):
        if any(argument.partition("=")[0] == option for argument in given):
            raise UsageError(f"{option} is given to the processes by this program: give it before --")
    # Mistakes, and --help, are better said once than by every process
    program.parse(given)


def _going_on(given: Sequence[str]) -> list[str]:
    """Turn the options of a start that has made its run folder into those that go on from the newest checkpoint."""
    return [*(argument for argument in given if argument not in ("--overwrite", "--resume")), "--resume"]


def _stamp(path: Path) -> tuple[int, int] | None:
    """Give what becomes another when a file is written anew; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
