"""What the network benchmark shows: its tables, and step time against link rate, measured and by a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from train import figures
from train.bench.network_torch import PREFIX
from train.log import amount

UNITS = ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s"))


def tables(rows: list[dict[str, Any]]) -> tuple[Table, Table]:
    """Draw the rows.

    Args:
      rows: of `network.train`.

    Returns:
      Tables to print: how long a step takes, and where its time and its bytes go.
    """
    timed = any(row["to_loss_s"] is not None for row in rows)
    steps = _empty("seconds a step, medians", "step, s", "faster", "to unshaped", *(("to loss, s",) if timed else ()))
    pieces = _empty(
        "pieces in seconds, timed apart on links without a shaper, all hosts at once on this machine's cores; wire "
        "adds what a step takes longer on the shaped link; over is what the kernel counts above link_bits: headers and "
        "acknowledgements",
        "compute", "encode", "wire", "decode", "link", "over",
    )  # fmt: skip
    dense = {(row["method"], row["rate"]): row["step_time_s"] for row in rows}
    last = None
    for row in rows:
        step, name = row["step_time_s"], f"  {words(row['rate'])}"
        if row["method"] != last:
            for made, more in ((steps, f", {row['parameters']:,} parameters"), (pieces, "")):
                made.add_section()
                made.add_row(row["method"] + more)
            last = row["method"]
        same = (uncompressed(row["method"]), row["rate"])
        faster = f"{dense[same] / step:.1f} x" if same in dense else "-"
        reached = ["never" if row["to_loss_s"] is None else f"{row['to_loss_s']:.0f}"] if timed else []
        steps.add_row(name, f"{step:.3f}", faster, f"{step / row['unshaped_s']:.2f} x", *reached)
        times = [f"{row[key]:.3f}" for key in ("compute_s", "encode_s", "wire_s", "decode_s")]
        pieces.add_row(name, *times, amount(row["link_bytes"]), f"{row['overhead']:.1%}")
    return steps, pieces


def _empty(title: str, *columns: str) -> Table:
    made = Table(title=title)
    made.add_column("method and link", overflow="fold")
    for name in columns:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def uncompressed(method: str) -> str:
    """Name the training that a method is compared with.

    >>> uncompressed("powersgd"), uncompressed("torch:powersgd")
    ('dense', 'torch:dense')
    """
    return f"{PREFIX}dense" if method.startswith(PREFIX) else "dense"


def words(rate: float | None) -> str:
    """Write a rate for people.

    >>> words(2e7), words(None)
    ('20 Mbit/s', 'unshaped')
    """
    if rate is None:
        return "unshaped"
    size, unit = next((pair for pair in UNITS if rate >= pair[0]), UNITS[-1])
    return f"{rate / size:g} {unit}"


def model(row: dict[str, Any], rate: np.ndarray | float) -> Any:
    """Predict a step's time on another link: what it takes on one without a shaper, and what the link carries.

    Args:
      row: of `network.train`.
      rate: bits a second.

    Returns:
      Seconds.
    """
    return row["unshaped_s"] + 8 * row["kernel_bytes"] / rate


def pays_below(row: dict[str, Any], dense: dict[str, Any]) -> float:
    """Find the rate below which a method's step is shorter than the dense one, by the model.

    Args:
      row: of the method.
      dense: of the uncompressed training.

    Returns:
      Bits a second; infinite where it is always shorter, 0 where it never is.

    >>> dense = {"unshaped_s": 1.0, "kernel_bytes": 1.1e7}
    >>> pays_below({"unshaped_s": 1.5, "kernel_bytes": 1e6}, dense)
    160000000.0
    """
    saved, extra = dense["kernel_bytes"] - row["kernel_bytes"], row["unshaped_s"] - dense["unshaped_s"]
    if saved <= 0:
        return 0.0 if extra >= 0 else float("inf")
    return 8 * saved / extra if extra > 0 else float("inf")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw step time against link rate: points as measured, lines by the model.

    Args:
      rows: of `network.train`.
      path: of the picture.
    """
    grid = np.logspace(6, 9, 100)
    names = list(dict.fromkeys(row["method"] for row in rows))
    with figures.canvas(1, path) as axes:
        for number, name in enumerate(names):
            own = [row for row in rows if row["method"] == name and row["rate"] is not None]
            first, colour = next(row for row in rows if row["method"] == name), f"C{number}"
            label = name
            dense = next((row for row in rows if row["method"] == uncompressed(name)), None)
            if dense is not None and name != dense["method"] and 0 < (below := pays_below(first, dense)) < float("inf"):
                label = f"{name}, pays below {words(float(f'{below:.2g}'))}"
                if grid[0] < below < grid[-1]:
                    axes[0].axvline(below / 1e6, color=colour, lw=0.8, ls=":")
            axes[0].plot(
                [row["rate"] / 1e6 for row in own], [row["step_time_s"] for row in own], "o", color=colour, label=label
            )
            axes[0].plot(grid / 1e6, model(first, grid), "-", color=colour, lw=1, alpha=0.7)
        axes[0].set(
            xscale="log", yscale="log", xlabel="link rate, Mbit/s", ylabel="seconds a step",
            title="A step on slow links; lines: model",
        )  # fmt: skip
        axes[0].set_ylim(top=20 * axes[0].get_ylim()[1])  # room for the legend
        axes[0].legend(frameon=False, fontsize=7, loc="upper right")
