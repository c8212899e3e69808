"""What came out of the runs, in plain sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from train.log import amount, nats, times
from train.report.groups import Group
from train.report.runs import Run, number
from train.report.style import duration

GLOSSARY = (
    ("Payload", "what one device encodes in a step: indices, values, counts and padding, everything counted."),
    (
        "Link bytes",
        "what leaves one device on the wire as the payloads are exchanged among all devices. The network feels these; "
        "they grow with the number of devices where each device gets every payload.",
    ),
    (
        "Ratio",
        "how many times fewer bytes than uncompressed training, which exchanges each gradient as 32-bit numbers.",
    ),
    ("Budget", "the ratio that a training was asked to keep."),
    (
        "Memory",
        "what a device did not send. It is added to the next gradient, so that nothing is lost, only delayed "
        "(error feedback).",
    ),
    (
        "Forecast",
        "what a small neural network expects the magnitudes of gradient and memory to look like, from earlier steps "
        "alone. The thresholds follow from it, so that the gradient is read once only.",
    ),
    ("Key region", "the largest magnitudes; they are sent with a precise value."),
    ("Sparse region", "magnitudes between the two thresholds; they are sent coarsely, as a sign and a common size."),
    (
        "Entropy",
        "how spread out a forecast is, in bits. A layer with a higher entropy has more to say and gets more of the "
        "budget.",
    ),
    ("Overflow", "entries above the thresholds that found no room in their step's payload, and wait in the memory."),
    ("Loss, in nats", "minus the logarithm of the probability that the model gave to the right answer, on average."),
    ("Seed", "the number that fixes the first parameters and the data's order; several seeds show what is chance."),
)  # fmt: skip


NOTHING = "No evaluation on test data is on record yet."


@dataclasses.dataclass(frozen=True)
class Tile:
    """A figure that one should see first."""

    value: str
    says: str


def lead(task: tuple[str, str], runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    """Say what was trained and what came out.

    Args:
      task: data set and model.
      runs: of it, at least one.
      groups: of them.

    Returns:
      Paragraphs.
    """
    parameters, devices, batch = (
        _span(run.about(key, None) for run in runs) for key in ("parameters", "devices", "batch")
    )
    model = f"The model {task[1]}" + (f", with {parameters} parameters," if parameters else "")
    over = "" if not devices else " on one device" if devices == "1" else f" on {devices} devices"
    steps = _span(run.planned or run.step for run in runs) or "0"
    each = f" of {batch} examples" if batch else ""
    what = f"{model} was trained on {task[0]} for {steps} step{'s' * (steps != '1')}{each}{over}."
    if len(runs) > 2:
        seeds = len({str(run.seed) for run in runs})
        methods = len({group.method for group in groups})
        what += f" {_count(len(runs), 'training')}: {_count(methods, 'method')}"
        budgets = {group.budget for group in groups} - {None}
        what += (f", {_count(len(budgets), 'budget')}" if budgets else "") + f", {_count(seeds, 'seed')}."
    return [what, *_outcome(groups, task), *_diverged(runs), *_unfinished(runs)]


def tiles(groups: Sequence[Group], task: tuple[str, str]) -> tuple[str, list[Tile]]:
    """Choose the figures to see first.

    Args:
      groups: of one task.
      task: data set and model.

    Returns:
      Whose figures they are, and the figures.
    """
    best = _best(groups, task)
    if best is None:
        return "", []
    key, _ = _quality(task)
    dense = _reference(groups, best, key)
    made = []
    if np.isfinite(best.spread(key)[0]):
        against = f", uncompressed {_write(key, dense)}" if dense and dense is not best else ""
        made.append(Tile(_write(key, best), f"{key.replace('_', ' ')}{', nats' if 'loss' in key else ''}{against}"))
    if not best.dense:
        for kind, says in (("link", "fewer bytes on the link"), ("payload", "smaller payload")):
            if np.isfinite(best.spread(f"{kind}_ratio")[0]):
                made.append(Tile(f"{times(best.spread(f'{kind}_ratio')[0])}\u00d7", says))
    link = best.spread("link_bytes")[0]
    if link > 0:
        made.append(Tile(amount(link), "sent by each device in all"))
    seconds = best.spread("seconds")[0]
    if np.isfinite(seconds):
        made.append(Tile(duration(seconds), "of training"))
    return best.label, made


def _outcome(groups: Sequence[Group], task: tuple[str, str]) -> list[str]:
    best = _best(groups, task)
    key, name = _quality(task)
    if best is None or not np.isfinite(best.spread(key)[0]):
        plain = next((group for group in groups if group.dense and np.isfinite(group.spread(key)[0])), None)
        if plain:
            return [f"No compressed training came to a result; uncompressed, it reached {_write(key, plain)} {name}."]
        return [] if any(run.diverged for group in groups for run in group.runs) else [NOTHING]
    dense = _reference(groups, best, key)
    if best.dense:
        return [f"Uncompressed, it reached {_write(key, best)} {name}."]
    ratio, payload = best.spread("link_ratio")[0], best.spread("payload_ratio")[0]
    compressed = [group for group in groups if not group.dense]
    which = f"The best compressed training, {best.label}," if len(compressed) > 1 else f"With {best.label} it"
    said = f"{which} reached {_write(key, best)} {name}"
    if np.isfinite(ratio):
        said += f" with {times(ratio)} times fewer bytes on the link than uncompressed training"
    said += f" ({_write(key, dense)})." if dense else "."
    if np.isfinite(payload) and len(compressed) == 1:
        said += f" What one device encodes is {times(payload)} times smaller."
    if dense and len(compressed) > 1:
        fewest = max(compressed, key=lambda group: np.nan_to_num(group.spread("link_ratio")[0]))
        if fewest is not best and np.isfinite(fewest.spread(key)[0]):
            said += (
                f" The one that sent least, {fewest.label}, reached {_write(key, fewest)} with "
                f"{times(fewest.spread('link_ratio')[0])} times fewer bytes."
            )
    return [said]


def _diverged(runs: Sequence[Run]) -> list[str]:
    left = [run for run in runs if run.diverged]
    return [f"Diverged, so that there is no result: {_where(left)}."] if left else []


def _unfinished(runs: Sequence[Run]) -> list[str]:
    left = [run for run in runs if not run.finished]
    if not left:
        return []
    return [
        "Not finished yet, and left out of the results where other seeds have finished, or else judged by the last "
        f"step on record: {_where(left)}."
        if len(runs) > len(left)
        else f"Not finished yet, and judged by the last step on record: {_where(left)}."
    ]


def _where(runs: Sequence[Run]) -> str:
    """Name runs, and how far they came."""
    named = ", ".join(
        f"{run.name} ({run.step:,}{f' of {run.planned:,}' if run.planned else ''} steps)" for run in runs[:4]
    )
    return named + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")


def _best(groups: Sequence[Group], task: tuple[str, str]) -> Group | None:
    key, _ = _quality(task)
    sign = 1 if key == "test_accuracy" else -1
    able = [group for group in groups if not group.dense] or list(groups)
    return max(able, key=lambda g: np.nan_to_num(sign * g.spread(key)[0], nan=-np.inf), default=None)


def _reference(groups: Sequence[Group], best: Group, key: str) -> Group | None:
    """Find uncompressed training with the settings of the best group, or else with other ones."""
    dense = [group for group in groups if group.dense and np.isfinite(group.spread(key)[0])]
    return next((group for group in dense if group.way.training == best.way.training), dense[0] if dense else None)


def _quality(task: tuple[str, str]) -> tuple[str, str]:
    # A language model is judged by its loss
    return ("test_loss", "nats of test loss") if "transformer" in task[1] else ("test_accuracy", "test accuracy")


def _write(key: str, group: Group) -> str:
    mean = group.spread(key)[0]
    return nats(mean, 3) if key == "test_loss" else f"{100 * mean:.1f} %"


def _span(values: Iterable[Any]) -> str:
    """Write a number that runs have in common, or the least and the greatest."""
    known = [value for value in map(number, values) if value is not None]
    if not known:
        return ""
    least, most = min(known), max(known)
    return f"{most:,.0f}" if least == most else f"{least:,.0f} to {most:,.0f}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
