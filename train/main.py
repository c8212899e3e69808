"""`python -m train.main`: parse, check, and train."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Sequence

from train import options
from train.config import VIRTUAL_DEVICES, Config, Settings, change, settle
from train.errors import status_of

PROG = "train.main"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
      arguments: of the command line; None takes the process's own.

    Returns:
      The exit status: 0, 1 where training broke down, 2 for a mistake in the options, 130 for Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)

    def work() -> None:
        config = parse(given)
        config = with_devices(config)
        # Imported here: reading the library must not slow --help down.
        from rich.console import Console

        from train import check, folders, loop

        check.check(config)
        # Dependencies' warnings tell a user of this program nothing.
        warnings.simplefilter("ignore")
        loop.run(config, Console(), folders.command(PROG, given))

    return status_of(work)


def parse(arguments: Sequence[str]) -> Config:
    """Parse a command line; a run that goes on keeps the settings it was started with.

    Args:
      arguments: of the command line.

    Returns:
      A configuration, not settled.

    Raises:
      UsageError: a configuration file is wrong.
    """
    base = options.defaults(arguments)
    config = options.parse(arguments, f"python -m {PROG}", Config, base)
    kept = config.folder / "config.json"
    if config.start.resume and kept.exists():
        base = change(base, **options.read(kept, "--resume"))
        config = options.parse(arguments, f"python -m {PROG}", Config, base)
    return config


def with_devices(config: Settings) -> Settings:
    """Start JAX with the devices asked for, and settle the configuration.

    Args:
      config: as parsed.

    Returns:
      The settled configuration.
    """
    import jax

    wanted = config.training.devices
    with_virtual = VIRTUAL_DEVICES if wanted is None else max(1, min(wanted, 1024))
    # Where JAX has started already, as in a notebook, it is too late: then there are as many as there are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", with_virtual)
    return settle(config, len(jax.devices()) if wanted is None else wanted)


if __name__ == "__main__":
    sys.exit(main())
