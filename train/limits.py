"""Numbers that options may have."""

from __future__ import annotations

from train.errors import UsageError

MANY = 2**31 - 1


def within(*limits: tuple[str, float | None, float, float]) -> None:
    """Refuse numbers that are out of range.

    Args:
      limits: of options: name, value (None passes), least and greatest that is allowed.

    Raises:
      UsageError: names the first of them that is out of range, its value and its limits.

    >>> within(("--repeats", 7, 1, MANY), ("--ratio", None, 1, 10_000))
    """
    for option, value, least, most in limits:
        if value is not None and not least <= value <= most:
            top = f"to {most:.15g}" if most < MANY else "or more"
            raise UsageError(f"{option} {value:.15g} is out of range: give {least:.15g} {top}")
