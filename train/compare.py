"""`python -m train.compare`: the same training by several methods, budgets and seeds, at equal link bits."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from train import methods, options, picture, report
from train.config import Config, change, groups
from train.errors import UsageError
from train.interrupts import check_missed
from train.labels import parse_labels
from train.limits import within
from train.log import plain, read_object
from train.main import carry_out
from train.results import Entry, endings, table, tabulate
from train.screen import paper, say
from train.studies import STUDIES, StudyName
from train.summary import DIVERGED

PROG = "train.compare"
FILE, PICTURE = "comparison.json", "comparison.png"
WANTED = "wanted.json"
INSTEAD = {
    "--ratio": "--budgets",
    "--method": "--methods",
    "--dense-reference": "--methods",
    "--no-dense-reference": "--methods",
}


@dataclasses.dataclass(frozen=True)
class Comparison(Config):
    """Train by several methods at equal link bits, several seeds each, and set the results side by side.

    A budget is a link ratio: how many times fewer bits leave a device than in uncompressed training. Every training is
    a run folder of its own; with --resume, finished ones are left as they are and the interrupted one goes on, and
    more methods, budgets and seeds may be named than before.
    """

    methods: str = "dense,partition"
    """Methods, separated by commas, with options where wanted: dense,partition:rungs=2,family=gamma."""
    budgets: str = "30,100"
    """Link ratios, separated by commas; dense and methods of a size of their own have none and run once a seed."""
    study: StudyName | None = None
    """A named set of methods, budgets, seeds and settings, whose table is reproduced; other options override it."""
    seeds: int = 3
    """Trainings of each method and budget, with seeds from --seed on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
      arguments: of the command line; None takes the process's own.

    Returns:
      The exit status: 0, 1 where training broke down, 2 for a mistake in the options, 3 where another process is
      lost, 130 for Ctrl-C, 141 where nobody reads on what is printed, 143 for an end that the system asked for.
    """

    def train(comparison: Comparison, command: str) -> None:
        from train import hosts

        run(comparison, paper(quiet=not hosts.leads()), command)

    return carry_out(PROG, arguments, parse, train)


def parse(arguments: Sequence[str]) -> Comparison:
    """Parse a command line; a comparison that goes on keeps the settings it was started with.

    Args:
      arguments: of the command line.

    Returns:
      A Comparison, not settled.

    Raises:
      UsageError: a configuration file is wrong, or an option has no meaning here.
    """
    for option, instead in INSTEAD.items():
        if any(argument.partition("=")[0] == option for argument in arguments):
            raise UsageError(f"{option} has no meaning in a comparison: give {instead}")

    def of(config: Config, **kept: Any) -> Comparison:
        parts = {group: getattr(config, group) for group in groups()}
        found = options.parse(arguments, f"python -m {PROG}", Comparison, Comparison(**parts, **kept))
        what = found.study or found.task.data.replace("/", "-")
        return change(found, name=found.output.name or f"compare-{what}")

    # A study that is unknown is refused with all other options
    study = STUDIES.get(options.early(arguments, "study").get("study", ""))
    base = options.defaults(arguments, study.settings if study else {})
    sets = {} if study is None else {"methods": study.methods, "budgets": study.budgets, "seeds": study.seeds}
    found = of(base, **sets)
    kept = found.folder / "config.json"
    if found.start.resume and os.path.exists(kept):
        base = change(base, **options.read(kept, "--resume"))
        wanted = read_object(found.folder / WANTED) or sets
        found = of(base, **{key: wanted[key] for key in ("methods", "budgets", "seeds") if key in wanted})
    return found


def plan(comparison: Comparison) -> list[Entry]:
    """List all trainings.

    Args:
      comparison: settled.

    Returns:
      Entries; those that differ in the seed alone follow one another.

    Raises:
      UsageError: a method, a budget or the number of seeds is wrong.
    """
    if comparison.devices < 2:
        raise UsageError("--devices 1 has no link to compare on: use 2 or more")
    within(("--seeds", comparison.seeds, 1, 1000))
    budgets = list(_budgets(comparison.budgets))
    entries = []
    for label in parse_labels(comparison.methods):
        for budget in budgets if label.budgeted else [None]:
            ratio = methods.payload_ratio(label, comparison.exchange, budget, comparison.devices)
            if not 1 <= ratio <= 1e5:
                raise UsageError(
                    f"--budgets {budget:g} asks of {label.text} a payload ratio of {ratio:g} on {comparison.devices} "
                    "devices, and 1 to 100000 is possible: choose another budget"
                )
            # Refused here what a method will not do, and not after hours
            own = methods.tuned(comparison, label).exchange
            methods.build(label, own, "devices", ratio, comparison.devices)
            seeds = range(comparison.training.seed, comparison.training.seed + comparison.seeds)
            entries += [Entry(label, budget, ratio, seed) for seed in seeds]
    return entries


def run(comparison: Comparison, console: Console, command: str = "compare.run") -> list[dict[str, Any]]:
    """Train what has not been trained yet, and write the table and the report.

    A training that diverges is one more result: it is said, and the others go on.

    Args:
      comparison: settled and checked.
      console: to draw on.
      command: that started this.

    Returns:
      Rows of the table, as in comparison.json.

    Raises:
      UsageError: something asked for cannot be done.
      KeyboardInterrupt: somebody asked for the end.
    """
    from train import check, folders, hosts, loop
    from train.program import Program, prepare

    entries = plan(comparison)
    dataset = loop.load(comparison)
    check.check_data(comparison, dataset)
    kept = [comparison.folder / entry.folder for entry in entries]
    hosts.lead(lambda: loop.check_resumable(comparison, *kept), "the look for checkpoints")
    check_missed()
    with folders.made(comparison):
        wanted = {"methods": comparison.methods, "budgets": comparison.budgets, "seeds": comparison.seeds}
        if hosts.leads():
            options.write_json(wanted, comparison.folder / WANTED)
        say(console, f"{len(entries)} training{'s' * (len(entries) > 1)} in {comparison.folder}")
        summaries: list[dict[str, Any]] = []
        program: Program | None = None
        last: Entry | None = None
        for number, entry in enumerate(entries, 1):
            console.rule(f"{number} of {len(entries)}: {escape(entry.folder)}")
            fresh = program is None or last is None or entry._replace(seed=last.seed) != last
            if program is None or fresh:
                program, last = prepare(comparison, dataset, entry.label, entry.ratio), entry
            settings = change(comparison, seed=entry.seed, ratio=entry.ratio, method=entry.label.text)
            one = loop.Run(settings, comparison.folder / entry.folder, command, entry.budget)
            summaries.append(loop.train(one, program, dataset, console, header=fresh))
            if summaries[-1]["status"] == DIVERGED:
                say(console, f"{entry.folder} diverged: {summaries[-1]['why']}", "yellow")
        rows = tabulate(entries, summaries)
        console.print(table(rows, dataset.kind))
        if not hosts.leads():
            return rows
        options.write_json(plain(rows), comparison.folder / FILE)
        shown = list(endings(comparison.folder, rows, entries, summaries, dataset.kind))
        picture.draw(shown, dataset.kind, comparison.folder / PICTURE)
        say(console, f"picture: {comparison.folder / PICTURE}")
        page = report.write(kept, comparison.folder / "report.html")
        say(console, f"report: {page}")
        return rows


def _budgets(text: str) -> Iterator[float]:
    seen: set[float] = set()
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        try:
            budget = float(piece)
        except ValueError:
            raise UsageError(f"--budgets {piece!r} is no number: give link ratios such as 30,100") from None
        if not 1 <= budget <= 1e5:
            raise UsageError(f"--budgets {piece} is out of range: give link ratios of 1 to 100000")
        if budget not in seen:
            seen.add(budget)
            yield budget
    if not seen:
        raise UsageError("--budgets is empty: give link ratios such as 30,100")


if __name__ == "__main__":
    sys.exit(main())
