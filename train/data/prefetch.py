"""Reading ahead in a background thread."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Generator, Iterator
from typing import NamedTuple, TypeVar

T = TypeVar("T")
PATIENCE = 5.0  # seconds that closing waits for a read that is under way


class _End(NamedTuple):
    error: BaseException | None


def prefetched(source: Iterator[T], ahead: int) -> Generator[T, None, None]:
    """Go through an iterator, reading ahead.

    Args:
      source: of items; from the first item on, only the background thread uses it.
      ahead: items to hold ready; 0 reads in the caller's thread.

    Yields:
      The source's items, in its order.

    Raises:
      BaseException: whatever the source raises, in its place among the items.
    """
    if not ahead:
        yield from source
        return
    ready: queue.Queue[T | _End] = queue.Queue(ahead)
    ended = threading.Event()

    def read() -> None:
        error: BaseException | None = None
        try:
            for item in source:
                ready.put(item)
                if ended.is_set():
                    return
        except BaseException as caught:
            error = caught
        ready.put(_End(error))

    # A daemon, so that a read which hangs does not keep the program from ending.
    thread = threading.Thread(target=read, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        ended.set()
        _drain(ready, thread)


def _drain(ready: queue.Queue[T | _End], thread: threading.Thread) -> None:
    # The thread may be waiting for room: with some, it sees that all is over, and ends.
    last = time.monotonic() + PATIENCE
    while thread.is_alive() and time.monotonic() < last:
        with contextlib.suppress(queue.Empty):
            ready.get_nowait()
        thread.join(0.005)
