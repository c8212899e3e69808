"""Several processes that train together: how they speak to one another, and part.

Gradients go by JAX's own collectives. What stands here goes through the key-value store of JAX's coordinator, and is
small: settings to compare, decisions of process 0, errors that everyone is to hear of.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

# JAX has no public name for the client of its coordinator
from jax._src import distributed

from train.config import Hosts
from train.errors import BROKEN, UNREAD, DivergedError, HostError, NonFiniteError, UsageError, unread

T = TypeVar("T")
GRACE = 3.0  # seconds that processes which end in an error wait for the others to say theirs
LINGER = 1.0  # seconds that process 0 then stays: JAX aborts whoever sees the store close before it has left itself

_rounds = itertools.count()
patience = Hosts.timeout  # seconds; set by `joining.join`


def index() -> int:
    """Say which process this is; 0 where there is one alone."""
    return int(distributed.global_state.process_id or 0)


def count() -> int:
    """Count the processes."""
    return int(distributed.global_state.num_processes or 1)


def leads() -> bool:
    """Say whether this is the process that writes and draws."""
    return index() == 0


def gather(value: Any, what: str) -> list[Any]:
    """Give every process every process's value.

    Args:
      value: of JSON's types.
      what: this meeting is about, for errors.

    Returns:
      The values, in the processes' order.

    Raises:
      HostError: a process does not answer in time.
    """
    if count() == 1:
        return [value]
    number, client = next(_rounds), _store()
    client.key_value_set(f"gradpart/{number}/{index()}", json.dumps(value))
    values, last = [], time.monotonic() + patience
    for process in range(count()):
        left = max(1, round(1000 * (last - time.monotonic())))
        try:
            values.append(json.loads(client.blocking_key_value_get(f"gradpart/{number}/{process}", left)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise HostError(
                f"process {process} did not come to {what} within {patience:g} s: see what it says, "
                "or give it longer with --timeout"
            ) from error
    # Whoever has set this round's value has read all of the last one's
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_delete(f"gradpart/{number - 1}/{index()}")
    return values


def together(work: Callable[[], T], what: str) -> list[T]:
    """Let every process do something; where one cannot, all stop.

    Args:
      work: to do; what it returns is of JSON's types.
      what: it is, for errors.

    Returns:
      What each returned.

    Raises:
      UsageError: of this process, or else of the first that had one.
      HostError: a process does not answer in time.
    """
    if count() == 1:
        return [work()]
    own: UsageError | None = None
    answer: dict[str, Any] = {}
    try:
        answer = {"value": work()}
    except UsageError as error:
        own, answer = error, {"error": str(error), "host": socket.gethostname()}
    answers = gather(answer, what)
    if own is not None:
        raise own
    for process, one in enumerate(answers):
        if "error" in one:
            raise UsageError(f"process {process} ({one['host']}): {one['error']}")
    return [one["value"] for one in answers]


def lead(work: Callable[[], T], what: str) -> T:
    """Let process 0 do something, and the others know what came of it.

    Args:
      work: for process 0 to do; what it returns is of JSON's types.
      what: it is, for errors.

    Returns:
      What it returned.

    Raises:
      UsageError: it could not be done.
      HostError: a process does not answer in time.
    """
    return together(lambda: work() if leads() else None, what)[0]  # type: ignore[return-value]


@contextlib.contextmanager
def company() -> Iterator[None]:
    """Say in one line that another process is lost, where that is what a collective's failure means."""
    try:
        yield
    except (UsageError, NonFiniteError, DivergedError, HostError):
        raise
    except Exception as error:
        if count() == 1:
            raise
        words = str(error)
        lost = any(sign in words for sign in ("Gloo", "NCCL", "coordination", "heartbeat", "UNAVAIL"))
        if isinstance(error, jax.errors.JaxRuntimeError) and lost:
            raise HostError(
                f"process {index()} lost touch with another one: start all again with --resume "
                f"({words.splitlines()[0]})"
            ) from error
        if isinstance(error, BrokenPipeError) and unread():
            part(UNREAD)
        # The others wait in a collective for this one: they are to see it go
        traceback.print_exc()
        part(BROKEN)


def part(status: int) -> int:
    """Leave the others, before the program ends.

    Args:
      status: of the program. Where it is not 0, the process ends here: the orderly parting would wait for those that
        are lost, and then abort.

    Returns:
      The status.
    """
    if count() == 1 or status == 0:
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    # Process 0 holds the store: whoever still reads another's error in it is to get it
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _store().wait_at_barrier("gradpart/part", round(1000 * GRACE))
    if leads():
        time.sleep(LINGER)
    os._exit(status)


def _store() -> Any:
    return distributed.global_state.client
