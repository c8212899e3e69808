"""`python -m train.main`: parse, check, and train."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from train import options, pages
from train.config import VIRTUAL_DEVICES, Config, Settings, change, settle
from train.errors import UsageError, status_of
from train.interrupts import remembered

PROG = "train.main"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
      arguments: of the command line; None takes the process's own.

    Returns:
      The exit status: 0, 1 where training broke down, 2 for a mistake in the options, 3 where another process is
      lost, 130 for Ctrl-C, 141 where nobody reads on what is printed, 143 for an end that the system asked for.
    """

    def train(config: Config, command: str) -> None:
        from train import hosts, loop, screen

        loop.run(config, screen.paper(quiet=not hosts.leads()), command)

    return carry_out(PROG, arguments, parse, train)


def carry_out(
    prog: str,
    arguments: Sequence[str] | None,
    parse: Callable[[Sequence[str]], Settings],
    train: Callable[[Settings, str], object],
) -> int:
    """Carry a program out that trains: parse, meet other processes, check, train, and part from them.

    Args:
      prog: the program's name.
      arguments: of the command line; None takes the process's own.
      parse: makes a configuration of them, not settled.
      train: is given the settled and checked configuration, and the command line.

    Returns:
      The exit status.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)

    @remembered()
    def work() -> None:
        config = parse(given)
        # Imported here: reading the library must not slow --help down.
        from train import check, folders, hosts

        with hosts.company():
            config = begin(config)
            hosts.together(lambda: check.check(config), "the check of options")
            # Dependencies' warnings tell a user of this program nothing.
            warnings.simplefilter("ignore")
            train(config, folders.command(prog, given))

    status = status_of(work)
    if "train.hosts" not in sys.modules:  # ended before there were others
        return status
    from train import hosts

    return hosts.part(status)


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
    if config.start.resume and os.path.exists(kept):  # no error where a name is too long, which is said later
        base = change(base, **options.read(kept, "--resume"))
        config = options.parse(arguments, f"python -m {PROG}", Config, base)
    return config


def begin(config: Settings) -> Settings:
    """Meet the other processes, start JAX with the devices asked for, and settle the configuration.

    Args:
      config: as parsed.

    Returns:
      The settled configuration, the same on every process.

    Raises:
      UsageError: options do not go together, or hosts differ.
      HostError: other processes did not come in time.
    """
    pages.keep()
    import jax

    from train import agree, hosts, joining

    joining.join(config.hosts)
    wanted, processes = config.training.devices, hosts.count()
    if wanted is not None and wanted % processes:
        near = max(1, round(wanted / processes)) * processes
        raise UsageError(f"--devices {wanted} does not divide among {processes} processes: use --devices {near}")
    here = (wanted or max(VIRTUAL_DEVICES if processes == 1 else 0, processes)) // processes
    # Where JAX has started already, as in a notebook, it is too late: then there are as many as there are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(1, min(here, 1024)))
    config = settle(config, len(jax.devices()) if wanted is None else wanted)
    joining.check_met()
    if processes > 1:
        hosts.together(joining.check_name, "the check of names")
        agree.check(config)
    return config


if __name__ == "__main__":
    sys.exit(main())
