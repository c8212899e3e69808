"""The cost model: sizes from the library itself, times by hand, advice that is right at the extremes."""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradpart_jax as gp
from gradpart_jax.costs import MEASURED, Link
from gradpart_jax.planner import EXCHANGES, RATIOS, estimate
from gradpart_jax.segments import layout_of
from gradpart_jax.sizes import plan_of
from train import plan as program
from train.bench import __main__ as bench
from train.bench import exchanges

N = 1_000_000
FREE = gp.Calibration("no machine", 0.0, 0.0, 0.0, 0.0)


def test_collectives_take_their_rounds_and_their_bits() -> None:
    link = Link(bits_per_s=1e6, latency_s=0.5)
    assert link.reduce(8e6, 4) == 6 * 0.5 + 1.5 * 8
    assert link.gather(8e6, 4) == 3 * 0.5 + 3 * 8
    assert link.deal(8e6, 4) == 3 * 0.5 + 0.75 * 8
    tree = link._replace(rounds="tree")
    assert tree.reduce(8e6, 4) == 4 * 0.5 + 1.5 * 8
    assert tree.gather(0.0, 1000) == 10 * 0.5
    assert link.reduce(8e6, 1) == 0


@pytest.mark.parametrize("devices", [2, 16, 1000])
def test_link_bits_are_the_library_s_own(devices: int) -> None:
    layout = layout_of(jax.ShapeDtypeStruct((N,), jnp.float32))
    for exchange in EXCHANGES:
        found = estimate(layout, exchange, 100.0, devices, Link(1e6), FREE)
        sizes = plan_of(layout, 0.32, exchange=exchange, devices=devices)
        shape, entries = sizes.ladder[-1], sizes.entries
        assert found.payload_bits == pytest.approx(0.32 * N, rel=0.03 if devices < 1000 else 0.3)
        expected = {
            "all_gather": (devices - 1) * shape.bits,
            "reduce_scatter": 2 * (devices - 1) * shape.bits,
            "leader": 2 * (devices - 1) / devices * found.payload_bits,
        }[exchange]
        assert found.link_bits == pytest.approx(expected, rel=0.03)
        assert found.link_s == pytest.approx(found.link_bits / 1e6)
        assert found.step_s == found.link_s
        slow = gp.Calibration("by hand", fixed=N, element=2.0, entry=30.0, decoded=400.0)
        coding = {
            "all_gather": 3 * N + (30 + devices * 400) * entries,
            "reduce_scatter": N + (2 * N + 30 * entries) * (1 + 1 / devices) + 2 * 400 * entries,
            "leader": 3 * N + (30 + 400) * entries,
        }[exchange]
        assert estimate(layout, exchange, 100.0, devices, Link(1e6), slow).code_s == pytest.approx(coding)


def test_only_reduce_scatter_and_leader_stay_flat() -> None:
    layout = layout_of(jax.ShapeDtypeStruct((25 * N,), jnp.float32))
    bits = {w: [estimate(layout, w, 100.0, n, Link(1e6), FREE).link_bits for n in (4, 256)] for w in EXCHANGES}
    assert bits["all_gather"][1] == pytest.approx(85 * bits["all_gather"][0], rel=0.01)
    for way in ("reduce_scatter", "leader"):
        assert bits[way][1] < 1.7 * bits[way][0]


def test_the_advice_follows_the_link() -> None:
    speedups = [gp.plan(25 * N, 8, mbit, compute_s=0.5).speedup for mbit in (1, 10, 100, 1000, 1e4, 1e5)]
    assert speedups == sorted(speedups, reverse=True)
    assert speedups[0] > 100
    fast = gp.plan(25 * N, 8, 400_000, compute_s=0.5)
    assert not fast.compress
    assert fast.speedup == 1
    assert "leave gradients uncompressed" in str(fast)
    slow = gp.plan(25 * N, 64, 10, compute_s=0.5)
    assert slow.best.exchange == "reduce_scatter"
    assert f"exchange='reduce_scatter', ratio={slow.best.ratio:g}, devices=64" in str(slow)


def test_the_mildest_ratio_that_keeps_to_the_wanted_step_is_chosen() -> None:
    found = gp.plan(25 * N, 8, 100, compute_s=0.5, step_s=1.0)
    assert found.wanted
    assert found.best.step_s <= 1.0
    milder = RATIOS[RATIOS.index(found.best.ratio) - 1]
    assert gp.plan(25 * N, 8, 100, compute_s=0.5, ratio=milder).best.step_s > 1.0
    hopeless = gp.plan(25 * N, 8, 1, compute_s=0.5, step_s=0.4)
    assert not hopeless.wanted
    assert "no exchange makes the step as short" in str(hopeless)


def test_chips_of_a_host_share_its_link() -> None:
    flat, deep = (gp.plan(25 * N, 64, 100, compute_s=0.5, chips=c, inner_gbit=400) for c in (1, 8))
    assert deep.devices == 8
    assert deep.best.link_s < flat.best.link_s
    assert deep.best.inner_s == pytest.approx(2 * 7 / 8 * 32 * 25 * N / 400e9)


def test_trees_numbers_and_one_device() -> None:
    tree = {"a": jax.ShapeDtypeStruct((1000, 1000), jnp.float32), "b": np.zeros(24)}
    assert gp.plan(tree, 8, 100).elements == 1_000_024
    huge = gp.plan(7_000_000_000, 8, 1000)
    assert huge.elements == pytest.approx(7e9, rel=1e-6)
    assert huge.best.payload_bits * huge.best.ratio == pytest.approx(32 * 7e9, rel=0.05)
    assert gp.plan(np.int64(25_000_000), 4, 100) == gp.plan(25_000_000, 4, 100)
    alone = gp.plan(N, 1, 100, compute_s=1.0)
    assert not alone.compress
    assert alone.best.link_bits == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"devices": 0}, "devices=0"),
        ({"link_mbit": 0.0}, "link_mbit=0.0"),
        ({"link_mbit": math.inf}, "link_mbit=inf"),
        ({"latency_ms": -1}, "latency_ms=-1"),
        ({"ratio": 0.5}, "ratio=0.5"),
        ({"chips": 3}, "chips=3 does not divide devices=8"),
        ({"chips": 4}, "give its inner_gbit"),
        ({"rounds": "star"}, "rounds='star'"),
        ({"params": {}}, "params has no elements"),
        ({"params": 0}, "params=0"),
    ],
)
def test_bad_arguments_are_named(arguments, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        gp.plan(**{"params": N, "devices": 8, "link_mbit": 100.0} | arguments)


def test_a_number_of_elements_is_whole() -> None:
    for number in (25e6, np.float32(25e6), True):
        with pytest.raises(TypeError, match=re.escape(f"params={number!r} is not an integer")):
            gp.plan(number, 4, 100)
    for tree, words in (("x", "leaf '', which is 'x'"), ({"a": [None, "b"]}, "leaf 'a/1', which is 'b'")):
        with pytest.raises(TypeError, match=words):
            gp.plan(tree, 4, 100)
    with pytest.raises(TypeError, match="calibration=3 is no Calibration"):
        gp.plan(N, 4, 100, calibration=3)
    assert gp.plan(np.int64(N), 4, 100) == gp.plan(N, 4, 100)


def test_measured_rows_outlive_a_run_of_other_settings_and_an_interruption(tmp_path, monkeypatch, capsys) -> None:
    rows, measured = tmp_path / "e.json", []
    jax.devices()  # so that there are as many for other tests as they need

    def measure(way, devices, elements, ratio, repeats):
        measured.append((way, devices, elements))
        if len(measured) == 6:
            raise KeyboardInterrupt
        numbers = {"seconds": 0.1, "link_bits": 8e3, "inner_bits": 0.0, "entries": 10.0, "messages": 1, "kind": "dense"}
        return {"way": way, "devices": devices, "elements": elements, "ratio": ratio, **numbers}

    monkeypatch.setattr(exchanges, "measure", measure)
    monkeypatch.setattr(exchanges, "foretold", lambda *_: 0.1)
    files = ["--json", str(rows), "--figure", str(tmp_path / "e.png")]
    first = ["exchanges", "--devices", "2", "--ways", "dense", "leader", "--elements"]
    assert bench.main([*first, "20000", *files]) == 0
    assert bench.main([*first, "10000", *files]) == 0
    assert [row["elements"] for row in json.loads(rows.read_text())["measured"]] == [10_000] * 2 + [20_000] * 2
    more = ["exchanges", "--devices", "2", "--ways", "dense", "all_gather", "reduce_scatter", "--elements", "10000"]
    assert bench.main([*more, *files]) == 130
    assert [row["way"] for row in json.loads(rows.read_text())["measured"]][:3] == ["dense", "leader", "all_gather"]
    capsys.readouterr()
    for text in ("x", "[]", '{"a": 1}', '{"measured": [{"way": "dense"}]}'):
        rows.write_text(text)
        assert bench.main(["exchanges", *files]) == 2
        assert bench.main(["rivals", *files]) == 2
        assert capsys.readouterr().err.count("holds something else: name another file") == 2
        assert rows.read_text() == text
    for option in ("--ways", "--devices"):
        assert bench.main(["exchanges", option, "--figure", str(tmp_path / "e.png")]) == 2
        assert f"{option} is empty" in capsys.readouterr().err


def test_a_calibration_is_read_and_reckoned_with(tmp_path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(FREE._replace(machine="mine", fixed=3.0)._asdict()))
    found = gp.plan(N, 8, 100, ratio=100, calibration=path)
    assert found.machine == "mine"
    assert next(one for one in found.others if one.exchange == "leader").code_s == 3.0
    worded = json.dumps(FREE._asdict() | {"entry": "slow"}).encode()
    for content, words in (
        (b"{}", "lacks 'machine'"),
        (b"[]", "holds something else"),
        (b"x", "holds something else"),
        (b"\xff", "holds something else"),
        (worded, "holds something else"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            gp.plan(N, 8, 100, calibration=path)
    assert all(value > 0 for value in MEASURED[1:])


def test_the_program_prints_draws_and_refuses(tmp_path, capsys) -> None:
    figure, rows = tmp_path / "p.png", tmp_path / "p.json"
    assert program.main(["--elements", "1000000", "--figure", str(figure), "--json", str(rows)]) == 0
    printed = capsys.readouterr().out
    assert "gp.partition_compress(axis_name" in printed
    assert "10,000" in printed
    assert figure.stat().st_size > 10_000
    assert {row["devices"] for row in json.loads(rows.read_text())} >= {2, 10_000}
    assert "…" not in printed
    assert program.main(["--devices", "14", "--chips", "7", "--inner-gbit", "100", "--figure", str(figure)]) == 0
    assert "112 " in capsys.readouterr().out
    for given, words in (
        (["--chips", "3", "--figure", str(figure)], "does not divide"),
        (["--figure", str(tmp_path / "plan.xyz")], "is no picture's name"),
        (["--figure", str(figure), "--json", str(tmp_path)], "it is a folder"),
        (["--figure", str(figure), "--elements", "0"], "--elements 0 is out of range"),
        (["--figure", str(figure), "--link-mbit", "0"], "--link-mbit 0 is out of range"),
        (["--figure", str(figure), "--inner-gbit", "10"], "--inner-gbit is the link between the --chips of a host"),
        (["--figure", str(figure), "--rounds", "star"], "--rounds star is unknown: choose ring or tree"),
        (["--figure", str(figure), "--calibration", "no"], "--calibration no cannot be read (No such file"),
        (["--figure", str(figure), "--calibration", str(rows)], "cannot be read (it holds something else)"),
        (["--figure", str(figure), "--calibration", str(figure)], "cannot be read (it holds something else)"),
    ):
        assert program.main(given) == 2
        assert words in capsys.readouterr().err


def test_what_compiled_programs_carry_is_read_from_their_text() -> None:
    text = """
      x = (f32[10]{0}, s32[]) all-reduce(a, b), replica_groups={{0,1},{2,3}}, to_apply=add
      y = (u32[1,5]{1,0}, u32[1,5]{1,0}) all-to-all(c, d), replica_groups={{0,1}}
      z = u32[2,2,3]{2,1,0} all-gather(e), replica_groups=[2,2]<=[4], dimensions={0}
    """
    assert exchanges.carried(text) == 11 * 32 + 10 * 32 / 2 + 12 * 32 / 2
    with pytest.raises(ValueError, match="collective-permute"):
        exchanges.carried("v = f32[3]{0} collective-permute(w)")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize("option", ["figure", "json"])
def test_a_full_disk_is_said_in_one_line(tmp_path, capsys, option: str) -> None:
    (tmp_path / "full.png").symlink_to("/dev/full")
    given = {"figure": tmp_path / "plan.png", option: tmp_path / "full.png"}
    assert program.main([part for key, path in given.items() for part in (f"--{key}", str(path))]) == 2
    assert "full.png could not be written (No space left on device): free some space" in capsys.readouterr().err
