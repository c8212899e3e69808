"""Following the network benchmark's trainings: their links change, and the kernel's counters are read, as they go."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from train.bench.links import Links
from train.bench.network_rows import Stretch

GRACE = 15.0  # seconds that processes have to end by themselves, once one has failed


class Training(NamedTuple):
    """How to start one, and what it leaves."""

    commands: list[list[str]]  # of each host
    metrics: Path  # gets a line each step
    stretches: list[Stretch]
    period: int  # steps to an exchange
    results: Callable[[], tuple[list[dict[str, Any]], dict[str, Any]]]  # its lines; its phases and parameters


class Follower:
    """Follows a training by its metrics, and sets its links.

    Args:
      path: of the metrics.
      net: the hosts.
      running: their processes.
      last: when to give up, by the monotonic clock.
    """

    def __init__(self, path: Path, net: Links, running: list[subprocess.Popen[str]], last: float) -> None:
        self._path, self._net, self._running, self._last = path, net, running, last

    def count(self, stretch: Stretch, console: Console) -> list[tuple[int, list[int]]]:
        """Read the kernel's counters at both ends of a stretch; gives them with the steps done by then."""
        self._net.shape(stretch.rate)
        found = [self._wait(stretch.start), self._wait(stretch.stop)]
        if found[1][0] >= stretch.stop:
            console.print(f"  {stretch.rate}: step {found[1][0]}")
        return found

    def finish(self) -> bool:
        """Wait for the end, where a process has failed for GRACE seconds, and say whether all have ended well."""
        while any(one.poll() is None for one in self._running) and time.monotonic() < self._last:
            if any(one.returncode for one in self._running):
                self._last = min(self._last, time.monotonic() + GRACE)
            time.sleep(0.05)
        return all(one.returncode == 0 for one in self._running)

    def _wait(self, steps: int) -> tuple[int, list[int]]:
        done = 0
        while done < steps and time.monotonic() < self._last and all(one.poll() is None for one in self._running):
            time.sleep(0.003)
            done = self._path.read_bytes().count(b"\n") if self._path.exists() else 0
        return done, self._net.sent()
