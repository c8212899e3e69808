"""`python -m train.main`: parse, check, and train."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import tyro

from train.config import Config, check, fill
from train.errors import status_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
      arguments: of the command line; None takes the process's own.

    Returns:
      The exit status: 0, 1 where training broke down, 2 for a mistake in the options, 130 for Ctrl-C.
    """
    config = fill(tyro.cli(Config, args=arguments, prog="python -m train.main", description=Config.__doc__))

    def work() -> None:
        check(config)
        # Dependencies' warnings tell a user of this program nothing.
        warnings.simplefilter("ignore")
        import jax

        jax.config.update("jax_num_cpu_devices", config.devices)
        from rich.console import Console

        from train import loop

        loop.run(config, Console())

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
