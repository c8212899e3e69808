"""Ctrl-C, SIGTERM and SIGHUP as a wish to end after the next step."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

HANGUP: int | None = getattr(signal, "SIGHUP", None)  # which Windows has not
SOON = 0.05  # seconds after which Ctrl-C comes again, when what ignored it is over
_missed: list[int] = []  # signals; an Event's lock would be taken twice where they come one upon another


def wishes() -> list[int]:
    """List the signals that ask for an end; not that of a closed terminal where it is ignored, as under nohup."""
    hangup = [] if HANGUP is None or signal.getsignal(HANGUP) is signal.SIG_IGN else [HANGUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def leave_terminal() -> None:
    """Write into nothing from now on, where the terminal has gone: what is said to it would raise."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, number)
                os.close(nothing)


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Remember Ctrl-C, for the length of a with-block: where it was ignored it comes again, or `check_missed` ends.

    Python ignores a KeyboardInterrupt in a callback, such as JAX's of the garbage collector, and a start has many. A
    module that is being read may make an ImportError of it.

    Raises:
      KeyboardInterrupt: Ctrl-C came.
    """

    def hear(number: int, frame: FrameType | None) -> None:
        _missed.append(number)
        raise KeyboardInterrupt

    def again(ignored: sys.UnraisableHookArgs) -> None:
        if not isinstance(ignored.exc_value, KeyboardInterrupt):
            usual(ignored)
            return
        later = threading.Timer(SOON, signal.raise_signal, [signal.SIGINT])
        timers.append(later)
        later.start()

    timers: list[threading.Timer] = []
    usual = sys.unraisablehook
    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, hear)
    sys.unraisablehook = again
    try:
        yield
    except Exception as error:
        check_missed(error)
        raise
    finally:
        for timer in timers:
            timer.cancel()
        sys.unraisablehook = usual
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _missed.clear()


def check_missed(cause: Exception | None = None) -> None:
    """End where Ctrl-C came and was ignored.

    Args:
      cause: what was made of it.

    Raises:
      KeyboardInterrupt: it was.
    """
    if _missed:
        raise KeyboardInterrupt from cause


class Interrupts:
    """Hold interrupts back, for the length of a with-block; a second one ends at once.

    Args:
      says: is told of the first.
    """

    def __init__(self, says: Callable[[str], None]) -> None:
        self._says = says
        self._before: dict[int, Any] = {}
        self.number: int | None = None

    def __enter__(self) -> Interrupts:
        """Begin; in a thread other than the main one nothing can be held back.

        Raises:
          KeyboardInterrupt: Ctrl-C came before, and was ignored.
        """
        check_missed()
        if threading.current_thread() is threading.main_thread():
            for number in wishes():
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == HANGUP:
            leave_terminal()
            # Both the shell and the system may tell of it
            if self.number is not None:
                return
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        self._says("ending after the next step; once more ends at once")
