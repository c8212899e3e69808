"""What the benchmark of rivals shows: its tables, and bytes and time of each method by number of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from train import figures

BUDGETS = ("payload", "link")


def tables(rows: list[dict[str, Any]], about: str, ratio: float, budget: float) -> tuple[Table, Table]:
    """Lay the figures out, a row for each method; what differs by number of devices stands side by side.

    Args:
      rows: of `rivals.rows_of`.
      about: the gradient and the numbers of devices.
      ratio: payload ratio asked for.
      budget: link ratio asked for.

    Returns:
      Tables to print: bytes, and time.
    """
    sent = _empty(f"bytes: {about}", "payload", f"link, payload {ratio:g}", f"payload, link {budget:g}")
    sent.caption = "how many times fewer than dense; * has a ratio of its own and cannot be asked for another"
    timed = _empty(f"time of one device's update: {about}", "times the floor", "times a dense mean")
    timed.caption = f"at a payload ratio of {ratio:g}; the floor reads gradient and memory once, and writes both"
    dense = {r["devices"]: r["seconds"] for r in rows if (r["method"], r["budget"]) == ("dense", "payload")}
    for method in _methods(rows):
        equal, link = (_chosen(rows, method, name) for name in BUDGETS)
        budgeted = equal[0]["budgeted"]
        name = _name(method) + ("" if budgeted else " *")
        sent.add_row(
            name,
            short(equal[0]["payload_ratio"]),
            "/".join(short(row["link_ratio"]) for row in equal),
            "/".join(short(row["payload_ratio"]) for row in link) if budgeted else "-",
        )
        timed.add_row(
            name,
            "/".join(short(row["seconds"] / row["floor_seconds"]) for row in equal),
            "/".join(short(row["seconds"] / dense[row["devices"]]) if dense else "-" for row in equal),
        )
    return sent, timed


def draw(rows: list[dict[str, Any]], counts: list[int], ratio: float, budget: float, path: Path) -> None:
    """Draw bytes at both budgets, and time.

    Args:
      rows: of `rivals.rows_of`.
      counts: of devices.
      ratio: payload ratio asked for.
      budget: link ratio asked for.
      path: of the picture.
    """
    import matplotlib as mpl

    order = _methods(rows)[::-1]
    colours = mpl.colormaps["viridis"](np.linspace(0.05, 0.85, len(counts)))
    dots = np.linspace(80, 14, len(counts))  # the fewer devices the larger, so that equal values show
    panels = [
        ("payload", "link_ratio", f"link ratio, at a payload ratio of {ratio:g}", ratio),
        ("link", "payload_ratio", f"payload ratio for a link ratio of {budget:g}", None),
        ("payload", "floors", f"time in floors, at a payload ratio of {ratio:g}", None),
    ]
    with figures.canvas(len(panels), path, height=1.2 + 0.27 * len(order)) as axes:
        for axis, (wanted, name, title, line) in zip(axes, panels, strict=True):
            for place, method in enumerate(order):
                chosen = _chosen(rows, method, wanted)
                values = [r["seconds"] / r["floor_seconds"] if name == "floors" else r[name] for r in chosen]
                if name == "payload_ratio" and not chosen[0]["budgeted"]:
                    continue
                axis.plot([min(values), max(values)], [place, place], color="#bbbbbb", lw=1.2, zorder=1)
                for value, colour, size in zip(values, colours, dots, strict=True):
                    axis.scatter(value, place, color=colour, s=size, zorder=2)
            if line:
                axis.axvline(line, color="#999999", lw=0.8, ls=":")
            axis.set(xscale="log", title=title, ylim=(-0.7, len(order) - 0.3), yticks=range(len(order)))
            axis.set_yticklabels([_name(method) for method in order] if axis is axes[0] else [])
        for count, colour, size in zip(counts, colours, dots, strict=True):
            axes[1].scatter([], [], color=colour, s=size, label=f"{count} devices")
        # Methods with a ratio of their own leave room in the middle.
        axes[1].legend(frameon=False, fontsize=8, loc="lower right")


def short(value: float) -> str:
    """Write a ratio in two places or more, and no exponent.

    >>> short(0.1242), short(3.125), short(24.04), short(958.8)
    ('0.12', '3.1', '24', '959')
    """
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"


def _empty(title: str, *columns: str) -> Table:
    made = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("method", *columns):
        made.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    return made


def _methods(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _chosen(rows: list[dict[str, Any]], method: str, budget: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["method"], row["budget"]) == (method, budget)]


def _name(method: str) -> str:
    return method.replace("exchange=", "")
