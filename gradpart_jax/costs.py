"""Seconds: what collectives take on a link, and what encoding and decoding take on a machine.

A collective takes its rounds' latencies and its bits' time on the link (Hockney, "The communication challenge for MPP",
Parallel Computing 1994; Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH",
IJHPCA 2005). Encoding takes time for each element of the gradient, for each entry sent, and for each entry received.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

ROUNDS = ("ring", "tree")


class Link(NamedTuple):
    """A link, as one device sees it."""

    bits_per_s: float
    latency_s: float = 0.0
    rounds: str = "ring"  # "ring": as many rounds as devices; "tree": as many as their logarithm

    def reduce(self, bits: float, devices: int) -> float:
        """Time an all-reduce: 2 (W - 1) rounds of a ring, 2 (W - 1) / W of the operand's bits.

        Args:
          bits: of the operand.
          devices: W.

        Returns:
          Seconds.

        >>> Link(bits_per_s=100.0, latency_s=1.0).reduce(100.0, devices=2)
        3.0
        """
        return 2 * self._rounds(devices) * self.latency_s + 2 * bits * (devices - 1) / devices / self.bits_per_s

    def gather(self, bits: float, devices: int) -> float:
        """Time an all-gather: W - 1 rounds, (W - 1) times the operand's bits."""
        return self._rounds(devices) * self.latency_s + bits * (devices - 1) / self.bits_per_s

    def deal(self, bits: float, devices: int) -> float:
        """Time an all-to-all: W - 1 rounds, whatever the algorithm, (W - 1) / W of the operand's bits."""
        return (devices - 1) * self.latency_s + bits * (devices - 1) / devices / self.bits_per_s

    def _rounds(self, devices: int) -> int:
        return devices - 1 if self.rounds == "ring" else math.ceil(math.log2(devices))


class Calibration(NamedTuple):
    """What one update takes on a machine, measured by `python -m train.bench calibrate`; seconds."""

    machine: str
    fixed: float  # a step, whatever its size: the forecast, and some hundred small operations
    element: float  # an element: feedback, selection, result
    entry: float  # an entry sent: trimmed and coded
    decoded: float  # an entry received: decoded and added
    added: float = 0.0  # an element of a dense sum, made and written

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file that `python -m train.bench calibrate` wrote.

        Args:
          path: of the file.

        Returns:
          Calibration.

        Raises:
          ValueError: the file holds something else.
        """
        try:
            found = json.loads(Path(path).read_text())
            return cls(str(found["machine"]), *[float(found[name]) for name in cls._fields[1:]])
        except (ValueError, KeyError, TypeError) as error:
            lacks = f"lacks {error}" if isinstance(error, KeyError) else "holds something else"
            wanted = ", ".join(cls._fields)
            raise ValueError(
                f"calibration={str(path)!r} {lacks}: it must hold {wanted}; let train.bench calibrate write it"
            ) from error


# By `python -m train.bench compress`, 25 million elements, 1 % and 3 % sent
MEASURED = Calibration(
    machine="two cores of an AMD EPYC", fixed=9.7e-4, element=1.39e-9, entry=6.7e-8, decoded=2.1e-8, added=1.3e-9
)
