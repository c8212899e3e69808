"""`python -m train.plan`: what a step takes on given links, and how best to exchange; nothing is trained."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.table import Table

import gradpart_jax as gp
from gradpart_jax.costs import ROUNDS
from gradpart_jax.planner import DENSE, EXCHANGES, Estimate, duration
from train import figures
from train.calibration import calibration_of
from train.errors import UsageError, status_of
from train.limits import within
from train.log import amount, times, write_text
from train.screen import paper, say

DEVICES = (2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 1000, 2000, 4000, 10_000)
LINKS = (*(m * 10.0**e for e in range(6) for m in (1, 2, 4)), 400_000.0)  # Mbit/s
SHOWN = (1.0, 10.0, 100.0, 1000.0, 10_000.0, 100_000.0, 400_000.0)
COLOURS = {DENSE: "#9a9a9a", "all_gather": "#1f77b4", "reduce_scatter": "#2ca02c", "leader": "#ff7f0e"}


@dataclasses.dataclass(frozen=True)
class Args:
    """Foretell step times, and choose exchange and ratio."""

    elements: int = 25_000_000
    """Parameters of the model."""
    devices: int = 16
    """In all."""
    link_mbit: float = 100.0
    """What one device (one host, if it has several chips) can send, in Mbit/s."""
    latency_ms: float = 1.0
    """Of one message."""
    compute_s: float = 0.5
    """Seconds of one step's forward and backward pass."""
    ratio: float | None = None
    """Payload ratio; chosen if not given."""
    step_s: float | None = None
    """Step time wanted, in seconds: the mildest ratio that keeps to it."""
    chips: int = 1
    """Of a host, which average among themselves first."""
    inner_gbit: float | None = None
    """What one chip can send to another of its host, in Gbit/s."""
    rounds: str = "ring"
    """Of collectives: ring or tree."""
    calibration: Path | None = None
    """File of `python -m train.bench calibrate`."""
    json: Path | None = None
    """File to write the figures to."""
    figure: Path = Path("plan.png")
    """Picture to draw."""


def ask(args: Args, calibration: gp.Calibration, **changed: Any) -> gp.StepPlan:
    """Ask the library.

    Args:
      args: of the command line, which `check` found nothing wrong with.
      calibration: what coding takes.
      **changed: options that are others.

    Returns:
      StepPlan.
    """
    args = dataclasses.replace(args, **changed)
    return gp.plan(
        args.elements,
        args.devices,
        args.link_mbit,
        args.latency_ms,
        args.compute_s,
        ratio=args.ratio,
        step_s=args.step_s,
        chips=args.chips,
        inner_gbit=args.inner_gbit,
        rounds=args.rounds,
        calibration=calibration,
    )


def check(args: Args) -> None:
    """Refuse what cannot be planned, and files that cannot be written.

    Args:
      args: of the command line.

    Raises:
      UsageError: an option is out of range, or does not go with another one.
    """
    within(
        ("--elements", args.elements, 1, 10**13),
        ("--devices", args.devices, 1, 2**20),
        ("--link-mbit", args.link_mbit, 1e-3, 1e9),
        ("--latency-ms", args.latency_ms, 0, 1e6),
        ("--compute-s", args.compute_s, 0, 1e6),
        ("--ratio", args.ratio, 1, 1e5),
        ("--step-s", args.step_s, 1e-6, 1e6),
        ("--chips", args.chips, 1, args.devices),
        ("--inner-gbit", args.inner_gbit, 1e-6, 1e6),
    )
    if args.devices % args.chips:
        raise UsageError(f"--chips {args.chips} does not divide --devices {args.devices}: give the chips of one host")
    if (args.chips > 1) != (args.inner_gbit is not None):
        raise UsageError("--inner-gbit is the link between the --chips of a host: give both or neither")
    if args.rounds not in ROUNDS:
        raise UsageError(f"--rounds {args.rounds} is unknown: choose {' or '.join(ROUNDS)}")
    figures.check(args.figure, args.json)


def every(found: gp.StepPlan) -> dict[str, Estimate]:
    """Name all estimates of a plan by their exchange."""
    return {one.exchange: one for one in (*found.others, found.dense, found.best)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the advice and two tables, and draw the picture.

    Args:
      arguments: of the command line; None takes the process's own.

    Returns:
      The exit status: 0, 2 for a mistake in the options, 130 for Ctrl-C.
    """

    def work() -> None:
        args = tyro.cli(Args, args=arguments, prog="python -m train.plan", description=__doc__)
        check(args)
        asked = functools.partial(ask, args, calibration_of(args.calibration))
        console = paper()
        console.print(str(asked()), highlight=False, soft_wrap=True)
        whole = {hosts * args.chips for hosts in (2, 4, 8, 16)}  # however many chips a host has, there is a row to show
        counts = sorted({count for count in DEVICES if count % args.chips == 0} | whole)
        by_devices = {count: asked(devices=count) for count in counts}
        by_link = {link: asked(link_mbit=link) for link in LINKS}
        console.print(_table("devices", {f"{n:,}": found for n, found in by_devices.items()}, _title(args, link=True)))
        shown = {_rate(link): by_link[link] for link in SHOWN}
        console.print(_table("link", shown, _title(args, link=False)))
        if args.json:
            rows = [_row(found, args.link_mbit) for found in by_devices.values()]
            rows += [_row(found, link) for link, found in by_link.items()]
            write_text(json.dumps(rows, indent=1) + "\n", args.json)
        speedups = [[asked(devices=n, link_mbit=link).speedup for n in by_devices] for link in by_link]
        _draw(args, by_devices, by_link, speedups)
        say(console, f"picture: {args.figure}")

    return status_of(work)


def _row(found: gp.StepPlan, link_mbit: float) -> dict[str, Any]:
    estimates = {name: one._asdict() for name, one in every(found).items()}
    return {"devices": found.devices, "link_mbit": link_mbit, "best": found.best.exchange, "estimates": estimates}


def _title(args: Args, link: bool) -> str:
    other = f"{_rate(args.link_mbit)} links" if link else _devices(args)
    return f"{args.elements:,} elements, {duration(args.compute_s)} of computing, {other}, {args.latency_ms:g} ms"


def _devices(args: Args) -> str:
    return f"{args.devices:,} device{'s' * (args.devices > 1)}"


def _rate(mbit: float) -> str:
    return f"{mbit:g} Mbit/s" if mbit < 1000 else f"{mbit / 1000:g} Gbit/s"


def _table(first: str, rows: dict[str, gp.StepPlan], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in (first, "exchange", "ratio", "step", "dense", "speed-up", "sent"):
        table.add_column(column, justify="left" if column == "exchange" else "right", overflow="fold")
    for name, found in rows.items():
        best = found.best
        table.add_row(
            name,
            best.exchange if found.compress else "plain psum",
            f"{best.ratio:g}",
            duration(best.step_s),
            duration(found.dense.step_s),
            times(found.speedup),
            amount(best.link_bits / 8),
        )
    return table


def _draw(
    args: Args,
    by_devices: dict[int, gp.StepPlan],
    by_link: dict[float, gp.StepPlan],
    speedups: list[list[float]],
) -> None:
    import matplotlib as mpl
    import numpy as np

    with figures.canvas(3, args.figure) as axes:
        lines = ({float(n): found for n, found in by_devices.items()}, by_link)
        for axis, found in zip(axes, lines, strict=False):
            for name in (DENSE, *EXCHANGES):
                line = [(x, every(one)[name].step_s) for x, one in found.items() if name in every(one)]
                axis.plot(*zip(*line, strict=True), "-", color=COLOURS[name], lw=2, label=name.replace("_", " "))
            axis.set(xscale="log", yscale="log", ylabel="step, s")
            if args.compute_s:
                axis.axhline(args.compute_s, color="#444444", ls=":", lw=1)
                axis.text(min(found), args.compute_s * 0.95, "computing alone", va="top", fontsize=8, color="#444444")
                room = (args.compute_s / axis.get_ylim()[1]) ** 0.08
                axis.set_ylim(bottom=args.compute_s * min(0.7, room))
        axes[0].set(xlabel="devices", title=f"{_rate(args.link_mbit)} links")
        axes[1].set(xlabel="link, Mbit/s", title=_devices(args))
        axes[0].legend(frameon=False)
        axis = axes[2]
        levels = (1, 1.1, 2, 5, 10, 20, 50, 100, 200, 500)
        colours = ["#eeeeee", *mpl.colormaps["YlGn"](np.linspace(0.1, 1, len(levels) - 1))]
        shades = axis.contourf(list(by_devices), list(by_link), speedups, levels=levels, colors=colours, extend="max")
        axis.set(
            xscale="log", yscale="log", xlabel="devices", ylabel="link, Mbit/s", title="speed-up, grey: plain psum"
        )
        axis.figure.colorbar(shades, ax=axis, ticks=levels, format="%g")


if __name__ == "__main__":
    sys.exit(main())
