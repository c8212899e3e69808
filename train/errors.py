"""Errors that a user can mend: shown in one line, never as a traceback."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable

SIGPIPE = 13  # on every system that has it; Python ignores it, and a write fails in its place
BROKEN, USAGE, LOST, UNREAD = 1, 2, 3, 128 + SIGPIPE  # exit statuses


class UsageError(Exception):
    """Something that the user asked for cannot be done; the message names the option and the remedy."""


class NonFiniteError(Exception):
    """The loss is not finite any more; the message names the step."""


class DivergedError(Exception):
    """Replicas that have to be equal are not; the message names the step and the devices."""


class HostError(Exception):
    """Another process did not come, does not answer, or is lost."""


class Interrupted(KeyboardInterrupt):
    """Somebody asked the program to end, by Ctrl-C or by a signal, and it has put its affairs in order.

    Args:
      number: of the signal.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number


def status_of(work: Callable[[], object]) -> int:
    """Do a program's work, and say its mistakes in one line.

    Args:
      work: the program.

    Returns:
      The exit status: 0, 1 where training broke down, 2 for a mistake in the options, 3 where another process is
      lost, 130 for Ctrl-C, 141 where nobody reads on what is printed, 143 for an end that the system asked for.
    """
    # What a terminal has no sign for must not end a training
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
    try:
        work()
    except (UsageError, NonFiniteError, DivergedError, HostError) as error:
        print(f"error: {error}", file=sys.stderr)
        return {UsageError: USAGE, HostError: LOST}.get(type(error), BROKEN)
    except BrokenPipeError:
        if not unread():
            raise
        return UNREAD
    except Interrupted as interrupt:
        if interrupt.number == SIGPIPE:
            unread()
        return 128 + interrupt.number
    except KeyboardInterrupt:
        return 130
    return 0


def unread() -> bool:
    """Say whether standard output is a pipe whose reader has gone, as `| head` does; if so, close it for good.

    Returns:
      Whether it is, and was not closed yet.
    """
    try:
        print(flush=True)
    except BrokenPipeError:
        # What is still in the buffer must go somewhere when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
