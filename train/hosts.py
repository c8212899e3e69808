"""Several processes that train together: how they meet, speak to one another, and part.

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
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

# JAX has no public name for the client of its coordinator
from jax._src import distributed

from train.config import Hosts
from train.errors import BROKEN, LOST, DivergedError, HostError, NonFiniteError, UsageError

T = TypeVar("T")
GRACE = 3.0  # seconds that processes which end in an error wait for the others to say theirs

_rounds = itertools.count()
_patience = Hosts.timeout


def index() -> int:
    """Say which process this is; 0 where there is one alone."""
    return int(distributed.global_state.process_id or 0)


def count() -> int:
    """Count the processes."""
    return int(distributed.global_state.num_processes or 1)


def leads() -> bool:
    """Say whether this is the process that writes and draws."""
    return index() == 0


def join(options: Hosts) -> None:
    """Meet the other processes, where there are any: those named by the options, or those that a cluster started.

    Args:
      options: of the command line.

    Raises:
      UsageError: the options do not fit together, or the address cannot be had.
      HostError: the others did not come in time.
    """
    global _patience
    _patience = options.timeout
    for option, seconds in (("--timeout", options.timeout), ("--heartbeat", options.heartbeat)):
        if not 1 <= seconds <= 1e6:
            raise UsageError(f"{option} {seconds:g} is out of range: give 1 to 1e+06 seconds")
    if options.check_every < 0:
        raise UsageError(f"--check-every {options.check_every} is out of range: give 0 or more")
    if jax.distributed.is_initialized():
        return
    given = {"--coordinator": options.coordinator, "--processes": options.processes, "--process": options.process}
    if all(value is None for value in given.values()):
        if cluster() is not None:
            _meet("the processes of this cluster's job", options)
        return
    for option, value in given.items():
        if value is None:
            present = next(name for name, one in given.items() if one is not None)
            raise UsageError(f"{present} needs {option} beside it: give --coordinator, --processes and --process")
    address, processes, process = options.coordinator, options.processes, options.process
    assert address is not None
    assert processes is not None
    assert process is not None
    if not 1 <= processes <= 2**15:
        raise UsageError(f"--processes {processes} is out of range: give 1 to {2**15}")
    if not 0 <= process < processes:
        raise UsageError(f"--process {process} is out of range: give 0 to {processes - 1} for --processes {processes}")
    host, port = _split(address)
    if process == 0:
        _may_listen(host, port)
    _meet(f"the other {processes - 1} processes", options, address, processes, process)


def cluster() -> str | None:
    """Name the cluster manager that started several processes like this one, of those that JAX knows.

    Returns:
      Its name; None where there is none, or where it started this process alone.
    """
    found = os.environ
    if int(found.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "SLURM"
    if "OMPI_MCA_orte_hnp_uri" in found and int(found.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in found and "JOB_COMPLETION_INDEX" in found:
        return "Kubernetes"
    if "," in found.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in found:
        return "Cloud TPU"
    return None


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
    values, last = [], time.monotonic() + _patience
    for process in range(count()):
        left = max(1, round(1000 * (last - time.monotonic())))
        try:
            values.append(json.loads(client.blocking_key_value_get(f"gradpart/{number}/{process}", left)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise HostError(
                f"process {process} did not come to {what} within {_patience:g} s: see what it says, "
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


def check_name() -> None:
    """Refuse a host whose own name leads nowhere, for gloo, between CPUs, listens where that name leads.

    Raises:
      UsageError: names the line that /etc/hosts lacks.
    """
    if count() == 1 or jax.default_backend() != "cpu":
        return
    name, address = socket.gethostname(), ""
    coordinator = str(distributed.global_state.coordinator_address).rpartition(":")[0].strip("[]")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((coordinator, 9))  # sends nothing; it chooses the interface
        address = probe.getsockname()[0]
    try:
        own = socket.gethostbyname(name)
    except OSError:
        own = "nothing"
    if address and (own == "nothing" or (own.startswith("127.") and not address.startswith("127."))):
        raise UsageError(
            f"the name of this host, {name}, leads to {own}, where other hosts cannot reach it: "
            f"put the line `{address} {name}` into /etc/hosts, above any other line with that name"
        )


@contextlib.contextmanager
def company() -> Iterator[None]:
    """Say in one line that another process is lost, where that is what a collective's failure means."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        words = str(error)
        if count() == 1 or not any(sign in words for sign in ("Gloo", "NCCL", "coordination", "heartbeat", "UNAVAIL")):
            raise
        raise HostError(
            f"process {index()} lost touch with another one: start all again with --resume ({words.splitlines()[0]})"
        ) from error
    except (UsageError, NonFiniteError, DivergedError, HostError):
        raise
    except Exception:
        if count() == 1:
            raise
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
    os._exit(status)


def _store() -> Any:
    return distributed.global_state.client


def _meet(others: str, options: Hosts, *where: Any) -> None:
    def give_up() -> None:
        # JAX would abort with a stack trace
        print(f"error: {_absent(others, options)}", file=sys.stderr, flush=True)
        os._exit(LOST)

    timer = threading.Timer(options.timeout, give_up)
    timer.daemon = True
    timer.start()
    names = ("coordinator_address", "num_processes", "process_id")
    named = dict(zip(names, where, strict=True)) if where else {}
    if where:
        named["cluster_detection_method"] = "deactivate"
        if where[-1] == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
            # JAX's own choice is every interface, and nothing in it asks who connects
            named["coordinator_bind_address"] = where[0]
    try:
        jax.distributed.initialize(
            **named,
            initialization_timeout=round(options.timeout) + 60,
            heartbeat_timeout_seconds=round(options.heartbeat),
            shutdown_timeout_seconds=round(options.timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise HostError(f"cannot join {others}: {str(error).splitlines()[0]}") from error
    finally:
        timer.cancel()


def _absent(others: str, options: Hosts) -> str:
    if options.coordinator is not None and options.process:
        try:
            socket.create_connection(_split(options.coordinator), timeout=2.0).close()
        except OSError as error:
            return (
                f"nobody answers at --coordinator {options.coordinator} after {options.timeout:g} s "
                f"({error.strerror or error}): start process 0 there, and see that no firewall is between"
            )
    return (
        f"{others} have not all come within {options.timeout:g} s: start each with the same --coordinator and "
        "--processes and a --process of its own, or give them longer with --timeout"
    )


def _split(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UsageError(f"--coordinator {address} is no HOST:PORT: give one such as 10.0.0.1:7000")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise UsageError(f"--coordinator {address}: no host has the name {host} ({error}): give its address") from error
    return host.strip("[]"), int(port)


def _may_listen(host: str, port: int) -> None:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as test:
            test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            test.bind(address)
    except OSError as error:
        raise UsageError(
            f"--coordinator {host}:{port}: process 0 cannot listen there ({error.strerror}): give an address of the "
            "host of process 0, and a port that is free"
        ) from error
