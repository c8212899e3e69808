"""What the benchmark of exchanges shows: its tables, and bits and time of each way by number of devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from gradpart_jax.planner import duration
from train import figures

WAYS = ("dense", "all_gather", "reduce_scatter", "leader", "hierarchical")
MODELLED = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 4000, 10_000)
COLOURS = dict(zip(WAYS, ("#9a9a9a", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd"), strict=True))


def tables(rows: list[dict[str, Any]], future: list[dict[str, Any]], about: str, links: str) -> tuple[Table, ...]:
    """Lay the figures out.

    Args:
      rows: measured.
      future: foretold.
      about: the gradient.
      links: for which times are foretold.

    Returns:
      Tables to print: what was measured; foretold, what leaves a device, and how long an exchange takes.
    """
    return (
        _measured(rows, about),
        _foretold(future, "foretold: MB that leave a device", lambda row: f"{row['link_bits'] / 8e6:.3g}"),
        _foretold(future, f"foretold: exchange on {links}", lambda row: duration(row["seconds"])),
    )


def draw(
    rows: list[dict[str, Any]], future: list[dict[str, Any]], devices: Sequence[int], links: str, figure: Path
) -> None:
    """Draw what leaves a device, and how long an exchange takes, by number of devices.

    Args:
      rows: measured.
      future: foretold.
      devices: numbers asked for.
      links: for which times are foretold.
      figure: picture to draw.
    """

    def line(found: list[dict[str, Any]], way: str, value: Callable[[dict[str, Any]], float]) -> tuple[list, list]:
        chosen = [row for row in found if row["way"] == way]
        return [row["devices"] for row in chosen], [value(row) for row in chosen]

    with figures.canvas(3, figure) as axes:
        for way in WAYS:
            colour, name = COLOURS[way], way.replace("_", " ")
            axes[0].plot(*line(future, way, lambda row: row["link_bits"] / 8e6), "-", color=colour, label=name)
            axes[0].plot(*line(rows, way, lambda row: row["link_bits"] / 8e6), "o", color=colour, ms=5)
            axes[1].plot(*line(future, way, lambda row: row["seconds"]), "-", color=colour)
            axes[2].plot(*line(rows, way, lambda row: 1e3 * row["seconds"]), "o", color=colour, ms=5)
            axes[2].plot(*line(rows, way, lambda row: 1e3 * row.get("foretold", math.nan)), "-", color=colour, lw=1)
        axes[0].set(xlabel="devices", ylabel="MB that leave a device", title="on the link: dots counted")
        axes[1].set(xlabel="devices", ylabel="exchange, s", title=f"{links}: foretold")
        axes[2].set(xlabel="virtual devices", ylabel="exchange, ms", title="one machine: dots measured")
        for axis in axes:
            axis.set(xscale="log", yscale="log")
        axes[2].set_xticks(devices, [str(n) for n in devices])
        axes[2].minorticks_off()
        axes[0].legend(frameon=False)


def _measured(rows: list[dict[str, Any]], about: str) -> Table:
    table = Table(title=f"{about}, virtual devices of one machine")
    for column in ("devices", "exchange", "kB sent", "inside", "step", "foretold", "off"):
        table.add_column(column, justify="left" if column == "exchange" else "right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if before and before["devices"] != row["devices"]:
            table.add_section()
        error = row["foretold"] / row["seconds"] - 1 if "foretold" in row else None
        table.add_row(
            str(row["devices"]),
            row["way"],
            f"{row['link_bits'] / 8e3:.1f}",
            f"{row['inner_bits'] / 8e3:.0f}" if row["inner_bits"] else "",
            duration(row["seconds"]),
            duration(row["foretold"]) if "foretold" in row else "",
            "" if error is None else f"{error:+.0%}",
        )
    return table


def _foretold(future: list[dict[str, Any]], title: str, cell: Callable[[dict[str, Any]], str]) -> Table:
    table = Table(title=title)
    table.add_column("devices", justify="right")
    for way in WAYS:
        table.add_column(way, justify="right", no_wrap=True)
    for n in MODELLED:
        cells = {row["way"]: cell(row) for row in future if row["devices"] == n}
        table.add_row(f"{n:,}", *(cells.get(way, "") for way in WAYS))
    return table
