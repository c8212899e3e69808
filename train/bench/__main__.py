"""`python -m train.bench`: choose a benchmark and run it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from train.bench import calibrate, compress, exchanges, forecast, inputs, network, rivals, wire
from train.errors import status_of

Choice = (
    Annotated[forecast.Args, tyro.conf.subcommand("forecast")]
    | Annotated[compress.Args, tyro.conf.subcommand("compress")]
    | Annotated[wire.Args, tyro.conf.subcommand("wire")]
    | Annotated[rivals.Args, tyro.conf.subcommand("rivals")]
    | Annotated[inputs.Args, tyro.conf.subcommand("inputs")]
    | Annotated[network.Args, tyro.conf.subcommand("network")]
    | Annotated[exchanges.Args, tyro.conf.subcommand("exchanges")]
    | Annotated[calibrate.Args, tyro.conf.subcommand("calibrate")]
)
BENCHMARKS = (forecast, compress, wire, rivals, inputs, network, exchanges, calibrate)
MAINS: dict[type, Callable[[Any], object]] = {benchmark.Args: benchmark.main for benchmark in BENCHMARKS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark.

    Args:
      arguments: of the command line; None takes the process's own.

    Returns:
      The exit status: 0, 2 for a mistake in the options, 130 for Ctrl-C.
    """

    def work() -> None:
        chosen = tyro.cli(Choice, args=arguments, prog="python -m train.bench", description=__doc__)
        warnings.simplefilter("ignore")
        MAINS[type(chosen)](chosen)

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
