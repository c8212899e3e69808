"""Comparing methods: what is planned, at which ratio, and what comes of it."""

import contextlib
import json
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from rich.console import Console

from train import check, compare, config, figures, loop, picture
from train.errors import UsageError
from train.labels import parse_labels
from train.studies import STUDIES, StudyName

FEW = {"model": "mlp", "steps": 20, "batch": 32, "eval_every": 10, "devices": 4, "phases": False}


def make(folder: Path, wanted: dict, **changes) -> compare.Comparison:
    made = config.make(workdir=folder, **({"name": "c"} | FEW | changes))
    parts = {group: getattr(made, group) for group in config.groups()}
    found = compare.Comparison(**parts, **wanted)
    check.check(found)
    return found


def test_a_budget_is_of_link_bits(tmp_path) -> None:
    asked = {"methods": "dense,partition,partition:exchange=all_gather", "budgets": "9,36", "seeds": 2}
    entries = compare.plan(make(tmp_path, asked, devices=8))
    assert [(e.label.text, e.budget, e.ratio) for e in entries[::2]] == [
        ("dense", None, 1.0),
        ("partition", 9.0, 8.0),
        ("partition", 36.0, 32.0),
        ("partition:exchange=all_gather", 9.0, 36.0),
        ("partition:exchange=all_gather", 36.0, 144.0),
    ]
    assert [e.seed for e in entries] == [0, 1] * 5
    assert entries[2].folder == "partition-9x-seed0"
    assert entries[0].folder == "dense-1x-seed0"
    near = [entries[2]._replace(budget=budget).folder for budget in (1234.567, 1234.571, 37.1, 100.0, 1e5)]
    assert near == [f"partition-{budget}x-seed0" for budget in ("1234.567", "1234.571", "37.1", "100", "100000")]


def test_a_label_with_a_size_of_its_own_runs_once_a_seed(tmp_path) -> None:
    asked = {"methods": "topk:density=0.01,powersgd:rank=2,signsgd,topk", "budgets": "30,100", "seeds": 1}
    entries = compare.plan(make(tmp_path, asked, local_steps=4))
    assert [(e.label.text, e.budget) for e in entries] == [
        ("topk:density=0.01", None),
        ("powersgd:rank=2", None),
        ("signsgd", None),
        ("topk", 30.0),
        ("topk", 100.0),
    ]


def test_a_training_that_diverges_is_one_more_result(tmp_path) -> None:
    wild = "dense:learning_rate=1e6"
    asked = {"methods": f"{wild},dense", "seeds": 1, "budgets": "50"}
    made = make(tmp_path, asked, name="a[b]c", clip=1e12, schedule="constant", rise=0.0, checkpoint_every=1)
    console = Console(width=80, record=True)
    with console.capture() as captured:
        rows = compare.run(made, console)
    said = captured.get()
    assert re.search(r"learning_rate=1e6-1x-seed0 diverged: the loss of step \d+ \(dense:learning_rate=1e6\) is", said)
    assert f"report: {made.folder}/report.html" in said  # its name as it is
    assert np.isnan(rows[0]["test_loss"]["mean"])
    assert np.isfinite(rows[1]["test_loss"]["mean"])
    folder = made.folder / "dense-learning_rate=1e6-1x-seed0"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["test_loss"]) == ("diverged", None)
    assert 0 < summary["steps"] < 20
    page = (made.folder / "report.html").read_text()
    assert f"no result: {folder.name} ({summary['steps']} of 20 steps)" in page
    assert "1 of 1 diverged" in page
    # Gone on with, it comes to the same end
    compare.run(config.change(made, resume=True), Console(quiet=True))
    again = json.loads((folder / "summary.json").read_text())
    assert again["why"] == summary["why"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--methods", "best"], "--methods best is unknown: choose among partition, dense"),
        (["--methods", "partition:rungs=9"], "--methods partition:rungs=9: rungs=9 is out of range"),
        (["--methods", "partition:rungs=abc"], "rungs='abc' is not an integer"),
        (["--methods", "dense,dense"], "names dense twice"),
        (["--methods", ""], "--methods is empty"),
        (["--budgets", "30,many"], "--budgets 'many' is no number"),
        (["--budgets", "0.1"], "--budgets 0.1 is out of range"),
        (
            ["--budgets", "90000", "--exchange", "all_gather"],
            "asks of partition a payload ratio of 180000 on 4 devices",
        ),
        (["--seeds", "0"], "--seeds 0 is out of range"),
        (["--devices", "1"], "--devices 1 has no link to compare on"),
        (["--ratio", "50"], "--ratio has no meaning in a comparison: give --budgets"),
    ],
)
def test_mistakes_are_one_line(given, words, tmp_path, capsys) -> None:
    assert compare.main([*given, "--workdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", STUDIES)
def test_studies_can_be_planned_and_overridden(name, tmp_path) -> None:
    found = compare.parse(["--study", name, "--steps", "17", "--workdir", str(tmp_path)])
    assert found.folder.name == f"compare-{name}"
    assert (found.training.steps, found.seeds) == (17, STUDIES[name].seeds)
    entries = compare.plan(config.settle(found))
    assert {entry.label.kind for entry in entries} >= {"dense", "partition"}
    assert compare.parse(["--study", name, "--data", "digits", "--budgets", "9"]).task.data == "digits"


def test_going_on_outlives_a_damaged_list_of_what_was_wanted(tmp_path) -> None:
    for name in ("config.json", compare.WANTED):
        (tmp_path / name).write_text("{}" if name == "config.json" else '{"methods": "de')
    given = ["--resume", "--workdir", str(tmp_path.parent), "--name", tmp_path.name]
    assert compare.parse([*given, "--study", "headline-resnet20"]).methods == STUDIES["headline-resnet20"].methods


def test_every_study_has_its_name_among_the_options() -> None:
    assert set(get_args(StudyName)) == set(STUDIES)


@pytest.fixture
def panels(monkeypatch) -> list:
    """The axes of the picture that was drawn last."""
    axes, canvas = [], figures.canvas

    @contextlib.contextmanager
    def seen(*given, **named):
        with canvas(*given, **named) as axes[:]:
            yield list(axes)

    monkeypatch.setattr(figures, "canvas", seen)
    return axes


def test_several_budgets_are_drawn_against_the_link_ratio(tmp_path, panels) -> None:
    way = {10: 2.0, 20: 1.5}
    drawn = [picture.Ended("dense:learning_rate=0.1", None, 1.0, [1.4, 1.5], [way, way])]
    for budget in (30, 100, 300):
        drawn.append(picture.Ended("topk", budget, 0.98 * budget, [1.5, float("nan")], [way, way]))
        picture.draw(drawn, "text", tmp_path / "p.png")
        ends, ways = panels
        names = [text.get_text() for text in ways.get_legend().get_texts()]
        assert names == ["dense", "topk"]
        assert len(ways.lines) == 2
        if len(drawn) == 2:
            assert [tick.get_text() for tick in ends.get_yticklabels()] == ["topk, 29.4 x", "dense, 1 x"]
    assert "at 100 x" in ways.get_title()
    assert ends.lines[1].get_xdata().tolist() == pytest.approx([29.4, 98, 294])
    assert ways.lines[0].get_marker() != ways.lines[1].get_marker() == ends.lines[1].get_marker()


def test_a_picture_shows_one_evaluation_and_goes_without_results(tmp_path, panels) -> None:
    picture.draw([picture.Ended("dense", None, 1.0, [float("nan")], [{}])], "image", tmp_path / "p.png")
    assert not panels[1].lines
    picture.draw([picture.Ended("topk", None, 30.0, [0.9], [{60: 0.9}])], "image", tmp_path / "p.png")
    (line,) = panels[1].lines
    assert line.get_marker() == "o"  # of a line through one point nothing is seen


def test_labels_are_parted_at_commas_that_part_them() -> None:
    found = parse_labels("dense,partition:rungs=2,family=gamma,partition")
    assert [label.text for label in found] == ["dense", "partition:rungs=2,family=gamma", "partition"]
    assert found[1].options == {"rungs": 2, "family": "gamma"}
    assert found[1].folder == "partition-rungs=2-family=gamma"
    with pytest.raises(UsageError, match="no option of partition"):
        parse_labels("partition:family")


def test_a_comparison_is_resumed_and_averaged(tmp_path, monkeypatch) -> None:
    wanted = {"methods": "dense,partition", "budgets": "50", "seeds": 2}
    trained = []
    train = loop.train

    def once(run, *rest, **options):
        trained.append(run.folder.name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(run, *rest, **options)

    monkeypatch.setattr(loop, "train", once)
    with pytest.raises(KeyboardInterrupt):
        compare.run(make(tmp_path, wanted), Console(quiet=True))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    assert len(before) == 2
    rows = compare.run(make(tmp_path, wanted, resume=True), Console(quiet=True))
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert trained[3:] == ["dense-1x-seed0", "dense-1x-seed1", "partition-50x-seed0", "partition-50x-seed1"]
    assert [(row["method"], row["budget"], row["seeds"]) for row in rows] == [
        ("dense", None, [0, 1]),
        ("partition", 50.0, [0, 1]),
    ]
    # At equal link bits means that the link ratio is the budget
    assert rows[1]["link_ratio"]["mean"] == pytest.approx(50, rel=0.1)
    header = json.loads((tmp_path / "c" / "partition-50x-seed1" / "run.json").read_text())
    assert (header["budget"], header["seed"]) == (50.0, 1)
    assert (tmp_path / "c" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "c" / "comparison.png").stat().st_size > 10_000
    console = Console(width=80, record=True)
    with console.capture() as captured:
        console.print(compare.table(rows, "image"))
    assert "partition" in captured.get()
    assert "diverged" not in captured.get()
    broken = [{**row, "test_loss": {"mean": float("nan"), "spread": float("nan")}} for row in rows]
    with console.capture() as captured:
        console.print(compare.table(broken, "image"))
    assert captured.get().count("diverged") == 2
    # What was asked for is known when it goes on
    found = compare.parse(["--resume", "--name", "c", "--workdir", str(tmp_path)])
    assert (found.methods, found.budgets, found.seeds, found.training.steps) == ("dense,partition", "50", 2, 20)
