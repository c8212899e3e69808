"""Real processes of the training program, and what they leave: for the tests of several hosts."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from train import checkpoint, parts
from train.log import read

ROOT = Path(__file__).parents[1]


def start(*given: str, before: Sequence[str] = ()) -> subprocess.Popen:
    """Start Python with arguments, behind a command that leads onto a host where there is one."""
    return subprocess.Popen(
        [*before, sys.executable, "-u", *given],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def finish(process: subprocess.Popen, seconds: float = 240.0) -> str:
    """Wait for the end of a process, and give what it said."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"no end within {seconds} s:\n{process.communicate()[0]}")


def await_lines(path: Path, lines: int, process: subprocess.Popen) -> None:
    """Wait until a process has written so many lines."""
    last = time.monotonic() + 200.0
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        if process.poll() is not None or time.monotonic() > last:
            pytest.fail(finish(process, 1))
        time.sleep(0.002)


def children(parent: int) -> dict[int, list[str]]:
    """List the processes that one has started, with their command lines."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                words = (path / "cmdline").read_text().split("\0")
                above = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            if above == parent:
                found[int(path.name)] = words
    return found


def child(parent: int, number: int) -> int:
    """Find the process id of one of the launcher's processes."""
    for pid, words in children(parent).items():
        if "--process" in words and words[words.index("--process") + 1] == str(number):
            return pid
    pytest.fail(f"process {number} does not run")


def metrics(folder: Path) -> list[dict]:
    """Read a run's metrics without its times."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read(folder / "metrics.jsonl")]


def same_metrics(found: list[dict], expected: list[dict]) -> None:
    """See that metrics are equal; a process with one device may sum the memory's norm in another order."""
    loose = [line | {"memory_norm": pytest.approx(line["memory_norm"], rel=1e-6)} for line in expected]
    assert found == loose


def arrays(step: int, *folders: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a checkpoint, its parts put together, which may lie in the run folders of several hosts."""
    found = [
        parts.PartHandler().restore(path / str(step) / parts.ITEM)
        for folder in folders
        for path in sorted(folder.glob(f"{checkpoint.FOLDER}*"))
    ]
    for one in found:
        del one[parts.FACTS]
    whole = {}
    for key, x in found[0].items():
        own = [one[key] for one in found]
        same = all(np.array_equal(x, y, equal_nan=True) for y in own)
        whole[key] = x if same or x.ndim < 2 else np.concatenate(own)
    return whole


def same_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """See that two checkpoints hold the same bits."""
    assert expected.keys() == found.keys()
    for key, x in expected.items():
        own = found[key]
        if x.ndim == own.ndim == 1:
            # A counter of each device, of which every host wrote the same for its own
            own = np.tile(own, x.size // own.size)
        np.testing.assert_array_equal(own, x)
        assert own.shape == x.shape


@contextlib.contextmanager
def ended(processes: Sequence[subprocess.Popen]) -> Iterator[None]:
    """See to it that processes, and those that they have started, are gone after a with-block."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                for pid in [*children(process.pid), process.pid]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.wait()
