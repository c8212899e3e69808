"""Slow links on one machine: network namespaces on a bridge, each behind a token-bucket filter. Linux, root, iproute2.

Every name begins with PREFIX and the number of the process that made it, so that nothing else is ever touched.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from train.errors import UsageError

UNSHAPED = "none"
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
BURST = 0.004  # seconds of a full link that a shaper lets pass at once, after a pause
PREFIX = "gpn"
ETC = Path("/etc/netns")  # what stands here under a namespace's name is that namespace's /etc


def missing() -> str | None:
    """Say what this machine lacks for namespaces.

    Returns:
      What, with the remedy; None where they can be made.
    """
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's: run it there"
    if os.geteuid() != 0:
        return "network namespaces need root: run it with sudo"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "network namespaces need ip and tc: install iproute2"
    tried = f"{PREFIX}{os.getpid()}t"
    done = subprocess.run(["ip", "netns", "add", tried], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"network namespaces cannot be made here ({done.stderr.strip()}): run it outside the container"
    subprocess.run(["ip", "netns", "del", tried], check=False)
    return None


def bits(rate: str) -> float | None:
    """Read a rate as tc writes it.

    >>> bits("20mbit")
    20000000.0
    """
    if rate.strip() == UNSHAPED:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate.strip())
    if not found or not float(found[1]):
        raise UsageError(f"--rate {rate} is no rate: give one such as 20mbit (kbit, mbit or gbit), or none")
    return float(found[1]) * UNITS[found[2]]


class Links:
    """Hosts on a bridge, for the length of a with-block; taken down whatever happens.

    Args:
      hosts: their number, up to 100.
      rate: of each host's link, both ways, as tc writes it, or UNSHAPED.
    """

    def __init__(self, hosts: int, rate: str = UNSHAPED) -> None:
        self.hosts, self._tag = hosts, f"{PREFIX}{os.getpid()}"
        self._subnet = f"10.{77 + os.getpid() % 100}.{os.getpid() // 100 % 200}"
        self._rate = rate

    def __enter__(self) -> Links:
        """Build."""
        atexit.register(self._down)
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take down."""
        self._down()
        atexit.unregister(self._down)

    def address(self, host: int) -> str:
        """Give a host's address."""
        return f"{self._subnet}.{host + 1}"

    def interface(self, host: int) -> str:
        """Name a host's network interface."""
        return f"{self._tag}w{host}"

    def command(self, host: int) -> list[str]:
        """Give what runs the command after it on a host."""
        return ["ip", "netns", "exec", f"{self._tag}n{host}"]

    def sent(self) -> list[int]:
        """Read how many bytes have left each host, as the kernel counts them at the other end of its cable."""
        counter = "/sys/class/net/{}v{}/statistics/rx_bytes"
        return [int(Path(counter.format(self._tag, host)).read_text()) for host in range(self.hosts)]

    def shape(self, rate: str) -> None:
        """Give every link another rate, both ways; UNSHAPED takes the shapers away."""
        if rate == self._rate:
            return
        for host in range(self.hosts):
            # A shaper that is changed keeps what waits in it, and a packet longer than its new burst would wait forever
            if self._rate != UNSHAPED:
                self._control(host, "del")
            self._shape(host, rate)
        self._rate = rate

    def cut(self, host: int, *, restore: bool = False) -> None:
        """Pull a host's cable, or plug it in again."""
        _run("ip", "link", "set", f"{self._tag}v{host}", "up" if restore else "down")

    def _up(self) -> None:
        bridge = f"{self._tag}b"
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for host in range(self.hosts):
            space, outer, inner = f"{self._tag}n{host}", f"{self._tag}v{host}", self.interface(host)
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "address", _ethernet(host))
            _run("ip", "link", "set", inner, "netns", space)
            _run("ip", "link", "set", outer, "master", bridge, "up")
            within = self.command(host)
            _run(*within, "ip", "addr", "add", f"{self.address(host)}/24", "dev", inner)
            _run(*within, "ip", "link", "set", inner, "up")
            _run(*within, "ip", "link", "set", "lo", "up")
            # Nobody asks where an address lives: on a full link the answer may come too late, and a connection breaks
            known = "neigh add {} lladdr {} dev {} nud permanent\n"
            others = (n for n in range(self.hosts) if n != host)
            given = "".join(known.format(self.address(n), _ethernet(n), inner) for n in others)
            _run(*within, "ip", "-batch", "-", given=given)
            self._shape(host, self._rate)
            # gloo listens where the host's name leads, and all namespaces share that name
            etc = ETC / space
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{self.address(host)} {socket.gethostname()}\n")

    def _shape(self, host: int, rate: str) -> None:
        speed = bits(rate)
        if speed is not None:
            burst = max(6000, round(BURST * speed / 8))  # a few packets at least
            self._control(host, "add", "tbf", "rate", rate, "burst", str(burst), "latency", "400ms")

    def _control(self, host: int, action: str, *shaper: str) -> None:
        """Add or delete a shaper at both ends of a host's cable."""
        for within, device in ((self.command(host), self.interface(host)), ([], f"{self._tag}v{host}")):
            _run(*within, "tc", "qdisc", action, "dev", device, "root", *shaper)

    def _down(self) -> None:
        _remove(self._tag)


def clean() -> int:
    """Remove what a killed benchmark left behind.

    Returns:
      How many namespaces there were.
    """
    return sum(_remove(tag) for tag in _tags())


def _tags() -> set[str]:
    names = _names("netns") + _names("link")
    tags = {found[0] for name in names if (found := re.match(rf"{PREFIX}\d+(?=[nvwb])", name))}
    return {tag for tag in tags if not _alive(int(tag.removeprefix(PREFIX)))}


def _alive(process: int) -> bool:
    return process != os.getpid() and Path(f"/proc/{process}").exists()


def _remove(tag: str) -> int:
    spaces = [name for name in _names("netns") if re.fullmatch(rf"{tag}n\d+", name)]
    for name in [name for name in _names("link") if re.fullmatch(rf"{tag}(v\d+|b)", name)]:
        subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)
    for name in spaces:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    for path in ETC.glob(f"{tag}n*") if ETC.exists() else ():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        ETC.rmdir()  # only where it is empty
    return len(spaces)


def _names(kind: str) -> list[str]:
    done = subprocess.run(["ip", "-o", kind, "show"], capture_output=True, text=True, check=False)
    if kind == "netns":
        return [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    return [line.split(": ")[1].split("@")[0] for line in done.stdout.splitlines() if ": " in line]


def _ethernet(host: int) -> str:
    return f"02:00:00:00:00:{host + 1:02x}"


def _run(*command: str, given: str | None = None) -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    """See to it that processes are gone after a with-block."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
