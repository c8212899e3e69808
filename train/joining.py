"""How processes meet: by options or by what a cluster says, in a bounded time, and in one line where they do not."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import sys
import threading
import time
from typing import Any

import jax

# JAX has no public name for the client of its coordinator
from jax._src import distributed

from train import hosts
from train.config import Hosts
from train.errors import LOST, HostError, UsageError
from train.limits import MANY, within


def join(options: Hosts) -> None:
    """Meet the other processes, where there are any: those named by the options, or those that a cluster started.

    Args:
      options: of the command line.

    Raises:
      UsageError: the options do not fit together, or the address cannot be had.
      HostError: the others did not come in time.
    """
    hosts.patience = options.timeout
    within(
        ("--timeout", options.timeout, 1, 1e6),
        ("--heartbeat", options.heartbeat, 1, 1e6),
        ("--check-every", options.check_every, 0, MANY),
    )
    if jax.distributed.is_initialized():
        return
    given = {"--coordinator": options.coordinator, "--processes": options.processes, "--process": options.process}
    if all(value is None for value in given.values()):
        found = cluster()
        if found == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
            raise UsageError(
                "pods of an indexed job find one another by a package that is not there: install jax[k8s], or give "
                "--coordinator, --processes and --process"
            )
        if found is not None:
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
    within(("--processes", processes, 1, 2**15))
    if not 0 <= process < processes:
        raise UsageError(f"--process {process} is out of range: give 0 to {processes - 1} for --processes {processes}")
    host, port = _split(address)
    _wait_for_name(host, options.timeout)
    if process == 0:
        _may_listen(host, port)
    _meet(f"the {processes} processes", options, (address, processes, process))


def cluster() -> str | None:
    """Name the cluster manager that started several processes like this one, of those that JAX knows.

    Returns:
      Its name; None where there is none, or where it started this process alone.

    Raises:
      UsageError: several were started, and JAX cannot find the others.
    """
    found = os.environ
    if int(found.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "SLURM"
    together = int(found.get("OMPI_COMM_WORLD_SIZE", "1"))
    if together > 1 and "OMPI_MCA_orte_hnp_uri" in found:
        return "Open MPI"
    if together > 1:
        # Each would train by itself, into the same run folder
        raise UsageError(
            f"Open MPI started {together} processes and, as from its version 5 on, does not say where they meet: give "
            f"--coordinator HOST:PORT, --processes {together} and --process $OMPI_COMM_WORLD_RANK (by sh -c, on each)"
        )
    if "KUBERNETES_SERVICE_HOST" in found and "JOB_COMPLETION_INDEX" in found:
        return "Kubernetes"
    if "," in found.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in found:
        return "Cloud TPU"
    return None


def check_met() -> None:
    """Refuse to train as one where JAX runs in several processes, as on a TPU pod that was not recognised.

    Raises:
      UsageError: this process has not met the others.
    """
    if jax.process_count() != hosts.count():
        raise UsageError(
            f"JAX runs in {jax.process_count()} processes here, and {hosts.count()} have met: give --coordinator, "
            "--processes and --process on each"
        )


def check_name() -> None:
    """Refuse a host whose own name leads nowhere, for gloo, between CPUs, listens where that name leads.

    Raises:
      UsageError: names the line that /etc/hosts lacks.
    """
    if hosts.count() == 1 or jax.default_backend() != "cpu":
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


def _meet(others: str, options: Hosts, where: tuple[str, int, int] | None = None) -> None:
    """Join; where is the address of process 0, the number of processes, and this one's; None: as the cluster says."""

    def give_up() -> None:
        # JAX would abort with a stack trace
        print(f"error: {_absent(others, options)}", file=sys.stderr, flush=True)
        os._exit(LOST)

    timer = threading.Timer(options.timeout, give_up)
    timer.daemon = True
    timer.start()
    named: dict[str, Any] = {}
    if where is not None:
        address, processes, process = where
        named = {"coordinator_address": address, "num_processes": processes, "process_id": process}
        named["cluster_detection_method"] = "deactivate"
        if process == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
            # JAX's own choice is every interface, and nothing in it asks who connects
            named["coordinator_bind_address"] = address
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
        f"not all of {others} have come within {options.timeout:g} s: start each with the same --coordinator and "
        "--processes and a --process of its own, or give them longer with --timeout"
    )


def _split(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UsageError(f"--coordinator {address} is no HOST:PORT: give one such as 10.0.0.1:7000")
    return host.strip("[]"), int(port)


def _wait_for_name(host: str, patience: float) -> None:
    """Wait until a name leads somewhere: a cluster gives names to its hosts as they start."""
    last = time.monotonic() + patience
    while True:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            if time.monotonic() > last:
                raise UsageError(
                    f"--coordinator: no host has the name {host} after {patience:g} s ({error.strerror}): "
                    "give its address"
                ) from error
            time.sleep(0.5)
        else:
            return


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
