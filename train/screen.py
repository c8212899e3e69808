"""What a run shows: its header, a live line with speed and time left, and tables of results."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from train.log import amount, nats

RECENT = 50  # steps that the speed shown is of
WIDTH = 100  # characters at least, where no terminal says how wide it is


class Paper(Console):
    """A console whose program decides what is done where nobody reads on; rich's own ends it there and then."""

    def on_broken_pipe(self) -> None:
        """Print nothing more.

        Raises:
          BrokenPipeError: always.
        """
        self.quiet = True
        raise BrokenPipeError


def paper(*, quiet: bool = False) -> Paper:
    """Make what a program prints on.

    Args:
      quiet: whether it shows nothing.

    Returns:
      The console.
    """
    made = Paper(quiet=quiet)
    if not made.is_terminal:
        made.width = max(made.width, WIDTH)
    return made


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: paths may hold what rich takes for markup, and are never broken.

    Args:
      console: to print on.
      text: of the line.
      style: of rich, for all of it.
    """
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class Screen:
    """A progress bar, for the length of a with-block; where there is no terminal, a line an evaluation.

    Args:
      console: to draw on.
      title: of the bar.
      start: steps already done.
      steps: in all.
      seconds: of training so far.
    """

    def __init__(self, console: Console, title: str, start: int, steps: int, seconds: float) -> None:
        self._console, self._title, self._steps = console, title, steps
        self.unread = False  # whether nobody reads what is shown
        # Of training alone: a clock on the wall would count the evaluation that a line is shown for
        self._seconds = deque([seconds], maxlen=RECENT + 1)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=12 if console.width < 110 else 32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[says]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            escape(title), total=steps, completed=start, says="compiling ...", speed=""
        )

    def __enter__(self) -> Screen:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        with self._outliving():
            self._progress.stop()

    def step(self, line: dict[str, Any]) -> None:
        """Move the bar.

        Args:
          line: of metrics.jsonl.
        """
        self._seconds.append(line["seconds"])
        says = f"loss {nats(line['loss'], 3)} acc {line['accuracy']:4.0%} {line['payload_ratio']:.0f}x"
        speed = f"{self._speed():.1f} steps/s"
        self._progress.update(self._task, completed=line["step"], says=says, speed=speed)
        if "test_loss" in line and not self._console.is_terminal:
            self.says(
                f"{self._title}: step {line['step']} of {self._steps}, {says}, "
                f"test loss {nats(line['test_loss'])}, test accuracy {line['test_accuracy']:.2%}, {speed}"
            )

    def says(self, text: str) -> None:
        """Say a line above the bar."""
        with self._outliving():
            say(self._console, text)

    @contextlib.contextmanager
    def _outliving(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self.unread = True

    def _speed(self) -> float:
        return (len(self._seconds) - 1) / max(self._seconds[-1] - self._seconds[0], 1e-9)


def header(console: Console, run: dict[str, Any], config: dict[str, Any]) -> None:
    """Say what is about to be trained.

    Args:
      console: to draw on.
      run: contents of run.json.
      config: contents of config.json.
    """
    rows = {
        "command": run["command"],
        "devices": f"{run['devices']} of {run['device_kind']}"
        + (f", {run['processes']} processes" if run["processes"] > 1 else ""),
        "task": f"{run['model']} of {run['parameters']:,} parameters in {len(run['sizes'])} leaves on {run['data']}",
        "steps": f"{config['steps']}, batch {config['batch']}"
        + (f" in {config['accumulate']} parts" if config["accumulate"] > 1 else "")
        + f", {config['optimizer']} at {config['learning_rate']:g}, {config['schedule']}",
        "exchange": _exchange(run),
    }
    say(console, run["method"], "bold")
    for name, value in rows.items():
        say(console, f"  {name:<9} {value}")


def summary_table(summaries: Sequence[dict[str, Any]]) -> Group:
    """Set the runs of one training side by side.

    Args:
      summaries: of `loop.train`.

    Returns:
      A table to print, and what its figures are.
    """
    rows: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        ("test accuracy", lambda s: number(s["test_accuracy"], "{:.2%}")),
        ("test loss", lambda s: "-" if s["test_loss"] is None else f"{nats(s['test_loss'])} nats"),
        ("payload a step", lambda s: amount(s["payload_bytes"] / s["steps"])),
        ("payload in all", lambda s: amount(s["payload_bytes"])),
        ("payload ratio", lambda s: f"{s['payload_ratio']:.1f} x"),
        ("  after warm-up", lambda s: f"{s['steady_payload_ratio']:.1f} x"),
        ("link a step", lambda s: amount(s["link_bytes"] / s["steps"])),
        ("link in all", lambda s: amount(s["link_bytes"])),
        ("link ratio", lambda s: f"{s['link_ratio']:.1f} x"),
        ("  after warm-up", lambda s: f"{s['steady_link_ratio']:.1f} x"),
        ("forecast error", lambda s: number(s["forecast_error"], "{:.1%}")),
        ("training time", lambda s: f"{s['seconds']:.1f} s"),
    )
    made = Table()
    made.add_column("", overflow="fold")
    for summary in summaries:
        made.add_column(escape(summary["method"]), justify="right", overflow="fold")
    for name, value in rows:
        made.add_row(name, *[value(s) for s in summaries])
    # Not its title, which would be as narrow as the table
    return Group(made, "bytes are one device's; forecast error is the median of |exact / forecast threshold - 1|")


def _exchange(run: dict[str, Any]) -> str:
    dense, expected = amount(run["dense_payload_bytes"]), run["expected_payload_bytes"]
    if run["kind"] == "dense":
        return f"uncompressed, {dense} a step and device"
    size = "of the method's own size" if expected is None else f"about {amount(expected)} a step and device"
    return f"{size}, uncompressed {dense}"


def number(value: float | None, form: str) -> str:
    """Write a number for people, or a dash where there is none.

    >>> number(0.5, "{:.0%}"), number(None, "{:.0%}")
    ('50%', '-')
    """
    return "-" if value is None else form.format(value)
