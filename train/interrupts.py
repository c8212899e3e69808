"""Ctrl-C and SIGTERM as a wish to end after the next step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


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
        """Begin; in a thread other than the main one nothing can be held back."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        self._says("ending after the next step; once more ends at once")
