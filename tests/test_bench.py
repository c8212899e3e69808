"""Benchmarks that stand beside the training program."""

import contextlib
import importlib.util
import json

import numpy as np
import pytest
from scipy import stats

from train import pretrain
from train.bench import __main__ as bench
from train.bench import forecast, links, network, network_picture, network_rows, rivals, thresholds, wire
from train.errors import HostError, UsageError


def test_benchmarks_refuse_what_cannot_work(tmp_path, capsys) -> None:
    assert bench.main(["wire", "--figure", str(tmp_path / "no" / "x.png")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert bench.main(["compress", "--elements", "5"]) == 2
    assert "--elements 5 is out of range" in capsys.readouterr().err
    for given, words in (
        (["wire", "--key-bits", "99"], "--key-bits 99 is out of range: give 2 to 8"),
        (["compress", "--repeats", "0"], "--repeats 0 is out of range: give 1 or more"),
        (["exchanges", "--calibration", str(tmp_path / "none")], "cannot be read"),
        (["forecast", "--model", "foo"], "--model foo is unknown: choose one of conv"),
        (["forecast", "--densities", "2"], "--densities 2 is out of range"),
        (["forecast", "--steps", "40"], "--steps 40 is out of range"),
    ):
        assert bench.main([*given, "--figure", str(tmp_path / "x.png")]) == 2
        assert words in capsys.readouterr().err


def test_training_the_predictor_refuses_what_cannot_work_and_overwrites_nothing(tmp_path) -> None:
    (tmp_path / "pareto.npz").write_bytes(b"")
    with pytest.raises(UsageError, match="holds files: replace them with --overwrite"):
        pretrain.main(pretrain.Args(out=tmp_path))
    with pytest.raises(UsageError, match="--batch 0 is out of range"):
        pretrain.main(pretrain.Args(batch=0))


def test_the_wire_benchmark_is_within_its_bounds(tmp_path) -> None:
    for density in (0.03, 0.001):
        row = wire.measure(1_000_000, density, 4)
        assert 1 <= row["index_ratio"] < 1.1
        assert 1 <= row["payload_ratio"] < 1.12


def test_rivals_are_measured_and_a_second_run_takes_what_is_known(tmp_path, monkeypatch, capsys) -> None:
    given = ["rivals", "--devices", "2,64", "--methods", "dense,randomk,signsgd", "--width", "32", "--repeats", "1"]
    given += ["--json", str(tmp_path / "r.json"), "--figure", str(tmp_path / "r.png")]
    assert bench.main(given) == 0
    rows = {(r["method"], r["budget"], r["devices"]): r for r in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert len(rows) == 12
    assert all(rows["dense", budget, 64]["link_ratio"] == 1 for budget in rivals.BUDGETS)
    # An all-reduce costs the same share of the link whatever the number of devices
    for budget, asked in (("payload", 100), ("link", 30)):
        for devices in (2, 64):
            assert rows["randomk", budget, devices]["link_ratio"] == pytest.approx(asked, rel=0.02)
    assert rows["signsgd", "payload", 2]["link_ratio"] == pytest.approx(32, rel=0.01)
    assert rows["signsgd", "payload", 64]["link_ratio"] > 24  # of seven words of a part, one is its header
    assert all(row["seconds"] > 0 for key, row in rows.items() if key[1] == "payload")
    assert (tmp_path / "r.png").stat().st_size > 10_000
    monkeypatch.setattr(rivals, "measure", None)
    assert bench.main(given) == 0
    assert "randomk" in capsys.readouterr().out
    for wrong, words in (("1", "--devices 1 is no list"), ("2,many", "--devices 2,many is no list")):
        assert bench.main(["rivals", "--devices", wrong]) == 2
        assert words in capsys.readouterr().err


def test_rivals_hit_the_count_on_what_they_were_made_for() -> None:
    x = np.random.default_rng(0).exponential(size=200_000)
    for name, (make, _) in thresholds.RIVALS.items():
        if name == "normal quantile":
            continue
        rival = make()
        for _ in range(12):
            ratio = np.mean(x > rival.threshold(x, 0.01)) / 0.01
            rival.realised(ratio)
        assert 0.8 < ratio < 1.25, name
    normal = np.random.default_rng(0).normal(size=200_000)
    assert np.mean(np.abs(normal) > thresholds.Normal().threshold(normal, 0.01)) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "fitted"),
    [
        ("exponential", lambda x: stats.expon(scale=x.mean())),
        ("normal", lambda x: stats.halfnorm(scale=np.sqrt((x**2).mean()))),
        ("gamma", lambda x: stats.gamma(0.5, scale=2.0)),
    ],
)
def test_a_fit_is_judged_as_scipy_judges_it(kind: str, fitted) -> None:
    x = np.random.default_rng(0).gamma(0.5, 2.0, size=50_000)
    edges = 2.0 ** np.arange(-12, 6)
    mass = np.histogram(x, np.append(0, edges[1:]))[0]
    above = fitted(x).sf(edges)
    above[0], above[-1] = 1.0, 0.0
    expected = -np.sum(mass / mass.sum() * np.log2(np.maximum(above[:-1] - above[1:], 1e-9)))
    # The order of the gamma distribution is estimated
    rel = 2e-3 if kind == "gamma" else 1e-5
    assert thresholds.cross_entropy(kind, x, mass, edges) == pytest.approx(expected, rel=rel)


def test_a_result_is_summed_up() -> None:
    result = forecast.Result("m", 0.01, [1.0] * 60 + [1.5] * 40, None).summary()
    assert result["median_error"] == 0
    assert result["worst_settled"] == 0.5
    assert result["share_far_off"] == 0.4


def test_a_training_whose_links_change_gives_a_row_for_each_rate(tmp_path) -> None:
    stretches = network_rows.plan(["20mbit", "none"], 3, 4)
    assert [tuple(stretch) for stretch in stretches] == [("none", 8, 16), ("20mbit", 20, 28)]
    # Of four steps the last meets: 1 s, and on the slow link 3 s, where others take 0.1 s; the first compiles
    each = [9.0 if i == 0 else 0.1 if i % 4 != 3 else 3.0 if i >= 16 else 1.0 for i in range(32)]
    lines = [
        {"seconds": s, "link_bytes": 1000.0 * ((i + 1) // 4), "loss": 3.0 - 0.1 * i}
        for i, s in enumerate(np.cumsum(each))
    ]
    # The kernel counts a tenth more, and the second reading comes a period late
    counted = [[(8, [2200, 2200]), (20, [5500, 5500])], [(20, [5500, 5500]), (28, [7700, 7700])]]
    phases = {"forward_backward": 0.05, "optimizer": 0.01, "encode": 0.1, "decode": 0.0, "wire": 0.02}
    rows = network_rows.rows_of(lines, phases, stretches, counted, 4)
    free, slow = rows
    assert free["step_time_s"] == pytest.approx(1.3 / 4)
    assert slow["step_time_s"] == pytest.approx(3.3 / 4)
    assert free["wire_s"] == pytest.approx(0.02)
    assert slow["wire_s"] == pytest.approx(0.02 + 2 / 4)
    assert (free["rate"], slow["rate"], slow["unshaped_s"]) == (None, 2e7, free["step_time_s"])
    for row in rows:
        assert row["link_bytes"] == pytest.approx(250)
        assert row["kernel_bytes"] == pytest.approx(275)
    assert network_rows.reached(lines, 1.5) == 26
    assert network_rows.reached(lines, -5.0) is None
    rows = [{"method": "dense", "parameters": 1000, "to_loss_s": None} | row for row in rows]
    dearer = [row | {"method": "half", "kernel_bytes": 137.5, "unshaped_s": 0.4, "to_loss_s": 9.0} for row in rows]
    assert network_picture.pays_below(dearer[0], rows[0]) == pytest.approx(8 * 137.5 / 0.075)
    assert network_picture.pays_below(rows[0] | {"unshaped_s": 9.0}, rows[0]) == 0
    assert [table.row_count for table in network_picture.tables(rows + dearer)] == [4 + 2] * 2
    network_picture.draw(rows + dearer, tmp_path / "n.png")
    assert (tmp_path / "n.png").stat().st_size > 10_000


def test_a_method_that_fails_leaves_the_figures_of_the_others(tmp_path, monkeypatch, capsys) -> None:
    log = tmp_path / "host.log"
    log.write_text("compiling\nerror: it broke\n\n*** Check failure stack trace: ***\n    @ 0x7f Flush()\n")
    assert network._ending(log) == "compiling\nerror: it broke"
    row = {
        "method": "dense", "rate": 2e7, "step_time_s": 9.0, "unshaped_s": 0.1, "compute_s": 0.05, "encode_s": 0.01,
        "wire_s": 8.9, "decode_s": 0.0, "link_bytes": 2e7, "kernel_bytes": 2.1e7, "overhead": 0.05, "steps": 3,
        "parameters": 1000, "steps_to_loss": None, "to_loss_s": None,
    }  # fmt: skip

    def train(args, net, label, folder, console):
        if label.text == "topk":
            raise HostError("topk did not train to its end")
        return [row | {"method": label.text}]

    monkeypatch.setattr(network, "train", train)
    monkeypatch.setattr(links, "missing", lambda: None)
    monkeypatch.setattr(links, "Links", contextlib.nullcontext)
    files = ["--json", str(tmp_path / "n.json"), "--figure", str(tmp_path / "n.png")]
    assert bench.main(["network", "--methods", "dense,topk,partition", *files]) == 3
    told = capsys.readouterr()
    assert told.err == "error: topk did not train to its end\n"
    assert "partition, 1,000 parameters" in told.out
    kept = json.loads((tmp_path / "n.json").read_text())["rows"]
    assert [each["method"] for each in kept] == ["dense", "partition"]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("torch:powersgd:rank=2", "needs PyTorch, which is not installed: pip install torch"),
        ("torch:topk", "is unknown: choose torch:dense or torch:powersgd"),
        ("torch:powersgd:rank=0", "'rank=0' is no option of torch:powersgd: it has rank=..."),
        ("torch:dense:rank=2", "'rank=2' is no option of torch:dense: it has none"),
    ],
)
def test_what_pytorch_cannot_train_is_refused_before_anything_starts(method, words, monkeypatch, capsys) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "torch" else find(name, *more))
    assert bench.main(["network", "--methods", f"dense,{method}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"error: --methods {method}" in error
    assert words in error


@pytest.mark.parametrize("given", ["20", "0mbit", "fast", ""])
def test_what_is_no_rate_is_refused(given) -> None:
    with pytest.raises(UsageError, match="is no rate: give one such as 20mbit"):
        links.bits(given)
