"""Reports, from run folders made here by the run folder's own rules, down to what a browser makes of the page."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from train.errors import UsageError
from train.report import groups, runs, write
from train.report.curves import compression, tables
from train.report.layers import layers

LAYERS = ("Conv_0/kernel", "Conv_0/bias", "Dense_0/kernel", "Dense_0/bias")
SIZES = (288, 32, 59_000, 10)
BINS = 64


def make_run(
    folder: Path,
    method: str = "partition",
    *,
    steps: int = 40,
    every: int = 10,
    planned: int | None = None,
    seed: int = 0,
    ratio: float = 50.0,
    budget: float | None = None,
    layers: tuple[str, ...] = LAYERS,
    data: str = "digits",
    model: str = "conv",
    devices: int = 4,
    quality: float = 0.99,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write a run folder: smooth curves with noise, whole where as many steps were done as planned."""
    draw = np.random.default_rng(seed + 17 * len(method))
    dense, foretells = method == "dense", method.startswith("partition")
    ratio = 1.0 if dense else ratio
    sizes = (SIZES * (len(layers) // len(SIZES) + 1))[: len(layers)]
    parameters = sum(sizes)
    planned = planned or steps
    payload, link = 4.0 * parameters, 4.0 * parameters * 2 * (devices - 1) / devices
    folder.mkdir(parents=True)
    config = {"data": data, "model": model, "steps": planned, "batch": 128, "ratio": ratio, "seed": seed, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    header = {
        "method": method,
        "kind": method.split(":")[0],
        "command": f"python -m train.main --data {data} --seed {seed}",
        "started": "2026-01-02T03:04:05",
        "versions": {"gradpart_jax": "0.1.0", "jax": "0.10.2"},
        "device_kind": "cpu",
        "devices": devices,
        "processes": 1,
        "data": data,
        "model": model,
        "parameters": parameters,
        "segments": list(layers),
        "sizes": list(sizes),
        "seed": seed,
        "budget": budget,
        "dense_payload_bytes": payload,
        "dense_link_bytes": link,
        "expected_payload_bytes": payload / ratio,
    }
    (folder / "run.json").write_text(json.dumps(header))
    metrics, maps, forecasts = [], [], []
    for step in range(1, steps + 1):
        gone = step / planned
        loss = 2.3 * math.exp(-5 * gone) + 0.03 + 0.02 * abs(draw.normal())
        evaluated = step % every == 0 or step == planned
        line = {
            "step": step,
            "loss": loss,
            "accuracy": min(quality * (1 - math.exp(-6 * gone)) + 0.02 * draw.normal(), 1.0),
            "learning_rate": 0.1 * (1 - gone),
            "payload_bytes": step * payload / ratio,
            "link_bytes": step * link / ratio,
            "payload_ratio": 2 * ratio if not dense else 1.0,
            "link_ratio": ratio,
            "sent": parameters / ratio,
            "capacity": parameters // 50,
            "overflow": 0.0 if dense else float(max(0, draw.normal(0, 20))),
            "nonfinite": 0,
            "entropy": 5 - 2 * gone if foretells else 0.0,
            "forecast_error": float(draw.normal(0, 0.05)) if foretells else 0.0,
            "memory_norm": 0.0 if dense else 3 * (1 - math.exp(-9 * gone)),
            "seconds": 0.05 * step,
        }
        if evaluated:
            line |= {"test_loss": loss + 0.02, "test_accuracy": quality * (1 - math.exp(-6 * gone))}
        metrics.append(line)
        if dense or not (evaluated or math.log2(step).is_integer()):
            continue
        low = np.asarray([2.0 ** -(5 + at % 7) for at in range(len(layers))]) * math.exp(-gone)
        threshold = np.stack([low, 4 * low], axis=1)
        asked = np.asarray(sizes) / ratio
        maps.append(
            {
                "step": step,
                "threshold": threshold.tolist(),
                "asked": asked.tolist(),
                "realised": (asked * np.exp(draw.normal(0, 0.1, len(layers)))).tolist(),
                "entropy": (5 - 2 * gone + 0.1 * np.arange(len(layers)) % 1.5).tolist(),
            }
        )
        if evaluated and foretells:
            shown = list(np.argsort(sizes)[::-1][:6])
            edges = np.stack([low[at] * 2.0 ** (np.arange(BINS + 1) / 4 - 12) for at in shown])
            middle = np.arange(BINS)
            bell = np.exp(-0.5 * ((middle - 32) / np.where(middle < 32, 12, 6)) ** 2)
            observed = bell * np.exp(draw.normal(0, 0.1, (len(shown), BINS)))
            forecasts.append(
                {
                    "step": step,
                    "segments": [layers[at] for at in shown],
                    "edges": edges.tolist(),
                    "forecast": np.tile(bell / bell.sum(), (len(shown), 1)).tolist(),
                    "observed": (observed / observed.sum(1, keepdims=True)).tolist(),
                    "threshold": threshold[shown].tolist(),
                }
            )
    for name, lines in (("metrics", metrics), ("layers", maps), ("forecast", forecasts)):
        if lines:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    times = {"forward_backward": 0.04, "encode": 0.004, "wire": 0.002, "decode": 0.003, "optimizer": 0.001}
    if dense:
        times |= {"encode": 0.0, "wire": 0.02, "decode": 0.0}
    (folder / "phases.json").write_text(json.dumps(times | {"note": "Medians of 20 steps, each phase compiled alone."}))
    if steps == planned:
        summary: dict[str, Any] = {
            **{key: header[key] for key in ("method", "data", "model", "seed", "parameters")},
            **{
                key: metrics[-1][key]
                for key in ("test_loss", "test_accuracy", "payload_bytes", "link_bytes", "seconds")
            },
            "steps": steps,
            "payload_ratio": ratio if dense else 2 * ratio,
            "link_ratio": ratio,
            "status": "finished",
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def text_of(page: Path) -> str:
    """What one reads of a page: its tags taken away, and its scripts."""
    body = re.sub(r"(?s)<(script|style)>.*?</\\1>", "", page.read_text())
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_a_run_and_its_reference_make_a_page_that_loads_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "digits/partition", ratio=50.7)
    make_run(tmp_path / "digits/dense", "dense")
    page = write([tmp_path], tmp_path / "made/report.html")
    raw, text = page.read_text(), text_of(page)
    assert "With partition it reached 98.8 % test accuracy with 50.7 times fewer bytes on the link" in text
    assert "uncompressed training (98.8 %)" in text
    assert not re.search(r"<(script|link|img|iframe)[^>]* (src|href)=", raw)
    assert "default-src 'none'" in raw
    assert page.stat().st_size < 2_500_000
    for word in ("Loss", "Accuracy", "Overflow", "Forecast and regions", "Density", "Where the time of a step goes"):
        assert word in text
    for name, _ in re.findall(r'id="(t0-[a-z]+)" (data-section)', raw):
        assert f'id="{name}"' in raw


def test_seeds_are_taken_together_and_a_run_that_goes_on_is_left_out(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path / f"p{seed}", seed=seed, budget=50.0, quality=0.9 + 0.02 * seed)
        make_run(tmp_path / f"topk{seed}", "topk", seed=seed, budget=50.0)
        make_run(tmp_path / f"d{seed}", "dense", seed=seed, budget=50.0)
    make_run(tmp_path / "p3", steps=5, planned=40, seed=3, budget=50.0)
    found = groups.gather(runs.find([tmp_path]), "t")
    assert [group.label for group in found] == ["partition 50\u00d7", "topk 50\u00d7", "dense"]
    mean, spread = found[0].spread("test_accuracy")
    assert mean == pytest.approx(0.92 * (1 - math.exp(-6)))
    assert spread == pytest.approx(0.02 * (1 - math.exp(-6)))
    text = text_of(write([tmp_path], tmp_path / "report.html"))
    assert "10 trainings: 3 methods, 1 budget, 4 seeds" in text
    assert "p3 (5 of 40 steps)" in text
    assert "91.77 % \u00b1 2.00 %" in text
    assert "Quality against bytes" in text


def labels_of(folder: Path) -> dict[str, int]:
    """How many runs each group of a folder has, by its label."""
    return {group.label: len(group.runs) for group in groups.gather(runs.find([folder]), "t")}


def test_trainings_with_other_settings_are_no_seeds_of_one_another(tmp_path: Path) -> None:
    """A mean over ratios or learning rates means nothing."""
    for ratio in (300.0, 20.0):
        for seed in range(2):
            own = {
                "learning_rate": 0.1,
                "name": f"{ratio}-{seed}",
                "eval_every": 10 + seed,
                "dense_reference": not seed,
            }
            make_run(tmp_path / f"{ratio}-{seed}/p", seed=seed, ratio=ratio, settings=own)
            make_run(
                tmp_path / f"{ratio}-{seed}/d", "dense", seed=seed, settings=own | {"ratio": ratio, "recipe": "after"}
            )
    assert labels_of(tmp_path) == {"partition, ratio 20": 2, "partition, ratio 300": 2, "dense": 2}
    make_run(tmp_path / "slow/p", ratio=20.0, quality=0.5, settings={"learning_rate": 0.001})
    make_run(tmp_path / "slow/d", "dense", quality=0.4, settings={"learning_rate": 0.001})
    assert labels_of(tmp_path) == {
        "partition, ratio 20, learning rate 0.1": 2,
        "partition, ratio 300, learning rate 0.1": 2,
        "partition, ratio 20, learning rate 0.001": 1,
        "dense, learning rate 0.1": 2,
        "dense, learning rate 0.001": 1,
    }
    found = groups.gather(runs.find([tmp_path]), "t")
    looks = {(group.colour, group.dash) for group in found}
    assert len(looks) == len(found)
    _, choices = layers(found)
    assert "partition, ratio 20, learning rate 0.001, seed 0" in choices.values()
    assert len(set(choices.values())) == len(choices)
    text = text_of(write([tmp_path], tmp_path / "report.html"))
    assert "partition, ratio 300, learning rate 0.1" in text
    slow = text_of(write([tmp_path / "slow"], tmp_path / "slow.html"))
    assert "With partition it reached" in slow


def test_regions_and_entropies_are_drawn_of_methods_that_have_them(tmp_path: Path) -> None:
    make_run(tmp_path / "t", "topk")
    alone, _ = layers(groups.gather(runs.find([tmp_path]), "t"))
    assert [panel.title for panel in alone] == ["Threshold", "Density", "Sent against asked for"]
    make_run(tmp_path / "p")
    both, choices = layers(groups.gather(runs.find([tmp_path]), "t"))
    key = next(panel for panel in both if panel.title == "Threshold of the key region")
    assert [choices[at] for at in key.views[""].tags[0]] == ["partition, seed 0"]


def test_names_leave_out_what_most_trainings_have_where_many_settings_differ(tmp_path: Path) -> None:
    usual = {"clip": 1.0, "rise": 0.05, "devices": 4, "momentum": 0.9}
    for key in usual:
        make_run(tmp_path / key, settings=usual | {key: 2})
    assert set(labels_of(tmp_path)) == {f"partition, {key} 2" for key in usual}
    make_run(tmp_path / "usual", settings=usual)
    assert set(labels_of(tmp_path)) == {"partition", *(f"partition, {key} 2" for key in usual)}


def test_a_training_is_held_against_uncompressed_training_with_its_settings(tmp_path: Path) -> None:
    for rate, quality in ((0.001, 0.5), (0.1, 0.9)):
        make_run(tmp_path / f"{rate}/p", quality=quality, settings={"learning_rate": rate})
        make_run(tmp_path / f"{rate}/d", "dense", quality=quality + 0.05, settings={"learning_rate": rate})
    text = text_of(write([tmp_path], tmp_path / "report.html"))
    assert "The best compressed training, partition, learning rate 0.1, reached 89.8 % test accuracy" in text
    assert "than uncompressed training (94.8 %)" in text


def test_ratios_that_meet_one_budget_make_no_other_training(tmp_path: Path) -> None:
    for seed in range(2):
        for budget in (30.0, 100.0):
            make_run(tmp_path / f"p{budget}{seed}", seed=seed, budget=budget, ratio=2 * budget + seed)
        make_run(tmp_path / f"d{seed}", "dense", seed=seed)
    assert labels_of(tmp_path) == {"partition 30\u00d7": 2, "partition 100\u00d7": 2, "dense": 2}


def test_a_seed_that_was_run_twice_counts_once(tmp_path: Path) -> None:
    for name, day, quality in (("b", 1, 0.5), ("a", 2, 0.9), ("c", 1, 0.4)):
        run = make_run(tmp_path / name, quality=quality)
        header = json.loads((run / "run.json").read_text()) | {"started": f"2026-01-0{day}T00:00:00"}
        (run / "run.json").write_text(json.dumps(header))
    (group,) = groups.gather(runs.find([tmp_path]), "t")
    assert [run.folder.name for run in group.runs] == ["a"]
    said = text_of(write([tmp_path], tmp_path / "report.html"))
    assert "Of runs with the same settings and seed the one begun last counts" in said
    assert "standard deviation" not in said.split("Learning")[0]


def test_runs_that_differ_are_not_said_to_be_alike(tmp_path: Path) -> None:
    make_run(tmp_path / "a", steps=20, devices=2)
    make_run(tmp_path / "b", steps=2000, every=500, devices=8, settings={"batch": 64})
    said = text_of(write([tmp_path], tmp_path / "report.html"))
    assert "for 20 to 2,000 steps of 64 to 128 examples on 2 to 8 devices." in said


def test_where_all_compressed_training_diverged_uncompressed_training_is_told(tmp_path: Path) -> None:
    make_run(tmp_path / "d", "dense")
    run = make_run(tmp_path / "p")
    summary = json.loads((run / "summary.json").read_text()) | {"test_loss": None, "test_accuracy": None}
    (run / "summary.json").write_text(json.dumps(summary | {"status": "diverged"}))
    said = text_of(write([tmp_path], tmp_path / "report.html"))
    assert "No compressed training came to a result; uncompressed, it reached" in said
    assert "No evaluation" not in said
    assert "diverged, 40 of 40 steps" in said


def test_settings_that_are_not_known_are_not_taken_for_those_of_others(tmp_path: Path) -> None:
    make_run(tmp_path / "known")
    (make_run(tmp_path / "lost", ratio=20.0) / "config.json").unlink()
    assert labels_of(tmp_path) == {"partition": 1, "partition, settings unknown": 1}
    make_run(tmp_path / "more", settings={"clip": 2.0})
    assert set(labels_of(tmp_path)) == {"partition, clip unknown", "partition, clip 2", "partition, settings unknown"}
    assert "partition, clip 2" in text_of(write([tmp_path], tmp_path / "report.html"))


def test_methods_that_forecast_nothing_have_no_forecast_error_or_entropy(tmp_path: Path) -> None:
    """They write 0, which would pass for a perfect forecast."""
    make_run(tmp_path / "rival", "topk")
    rival = tables(groups.gather(runs.find([tmp_path]), "t"))
    shown = [panel.title for panel in compression(rival)]
    assert "Overflow" in shown
    assert not {"Forecast error", "Entropy of the forecast"} & set(shown)
    make_run(tmp_path / "partition")
    both = tables(groups.gather(runs.find([tmp_path]), "t"))
    assert {"Forecast error", "Entropy of the forecast"} <= {panel.title for panel in compression(both)}
    for group, source in both.steps:
        for key in ("forecast_error", "entropy"):
            assert np.isfinite(source.data[key]).all() == (group.method == "partition")
            assert np.isfinite(source.data[key]).any() == (group.method == "partition")


def test_steps_before_the_first_exchange_are_not_drawn_as_uncompressed(tmp_path: Path) -> None:
    path = make_run(tmp_path / "local", steps=8) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[:3]:
        line |= {"payload_bytes": 0.0, "link_bytes": 0.0, "payload_ratio": 1.0, "link_ratio": 1.0}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ((_, source),) = tables(groups.gather(runs.find([tmp_path]), "t")).steps
    for key in ("link_ratio", "entropy", "memory_norm"):
        assert np.isfinite(source.data[key]).tolist() == [False] * 3 + [True] * 5
    assert np.isfinite(source.data["loss"]).all()


def test_a_seed_that_diverged_is_not_left_out_of_the_mean(tmp_path: Path) -> None:
    """A mean over those that went well would praise a method that breaks down."""
    for seed in range(3):
        run = make_run(tmp_path / f"p{seed}", seed=seed, budget=50.0)
        make_run(tmp_path / f"d{seed}", "dense", seed=seed, budget=50.0)
    summary = json.loads((run / "summary.json").read_text()) | {"test_loss": None, "test_accuracy": None}
    (run / "summary.json").write_text(json.dumps(summary))
    found = groups.gather(runs.find([tmp_path]), "t")
    assert np.isnan(found[0].spread("test_loss")).all()
    assert np.isfinite(found[0].spread("link_bytes")).all()
    assert np.isfinite(found[1].spread("test_loss")).all()
    assert "1 of 3 diverged" in text_of(write([tmp_path], tmp_path / "report.html"))


def test_long_runs_are_thinned_out_and_the_page_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "long", steps=4100, every=500)
    held = tables(groups.gather(runs.find([tmp_path]), "t"))
    assert held.bucket == 3
    drawn = held.steps[0][1].data
    assert len(drawn["loss"]) == 1367
    assert drawn["step"][-1] == 4100
    assert len(held.evaluations[0][1].data["step"]) == 9
    assert "a point of a line stands for up to 3 steps" in text_of(write([tmp_path], tmp_path / "report.html"))


FILES = ("run.json", "config.json", "summary.json", "metrics.jsonl", "layers.jsonl", "forecast.jsonl", "phases.json")


@pytest.mark.parametrize("missing", FILES)
@pytest.mark.parametrize("how", ["gone", "cut", "nulls"])
def test_files_may_be_missing_cut_short_or_full_of_nulls(tmp_path: Path, missing: str, how: str) -> None:
    folder = make_run(tmp_path / "run", steps=8, every=4)
    path = folder / missing
    text = path.read_text()
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_text(text[: -len(text) // 3])
    else:
        path.write_text(re.sub(r"(: |\[|, )-?[0-9.]+(e-?[0-9]+)?(?=[,}\]])", r"\1null", text))
    assert "Results" in text_of(write([tmp_path], tmp_path / "report.html"))


def test_a_run_without_a_step_or_devices_to_talk_to_has_a_page(tmp_path: Path) -> None:
    empty = tmp_path / "just-begun"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps({"data": {"name": "digits"}, "model": {"name": "conv"}}))
    assert "No evaluation" in text_of(write([empty], tmp_path / "empty.html"))
    with contextlib.chdir(empty):
        assert "just-begun (0 steps)" in text_of(write([Path()], tmp_path / "empty.html"))
    alone = make_run(tmp_path / "alone", devices=1, steps=1, every=1)
    assert "on one device" in text_of(write([alone], tmp_path / "alone.html"))


def test_a_folder_that_only_holds_runs_is_none_and_each_run_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "outer/name/partition", steps=2)
    (tmp_path / "outer/name/config.json").write_text("{}")
    assert [found.folder for found in runs.find([tmp_path, run, tmp_path / "outer"])] == [run]


def test_bad_paths_are_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nothing").mkdir()
    for path, says in (("absent", "does not exist"), ("file", "not a folder"), ("nothing", "holds no run")):
        with pytest.raises(UsageError, match=says):
            write([tmp_path / path], tmp_path / "report.html")
    run = make_run(tmp_path / "run", steps=2)
    with pytest.raises(UsageError, match="--out"):
        write([run], tmp_path / "file/report.html")


def test_the_command_line_needs_no_jax(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    code = (
        "import sys; from train.report.__main__ import main; status = main()\n"
        "assert not {'jax', 'train.loop', 'gradpart_jax'} & set(sys.modules)\n"
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", code, str(run), "--out", str(tmp_path / "made.html")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "made.html").exists()
    odd = shutil.copytree(run, tmp_path / "gr\u00f6\udcff")  # neither the page nor an ASCII terminal can hold it
    bare = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command[:3], str(odd), "--out", str(tmp_path / "\u00f6.html")], capture_output=True, env=bare
    )
    assert (done.returncode, done.stderr) == (0, b"")
    done = subprocess.run([*command[:3], str(tmp_path / "absent")], capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == f"error: {tmp_path / 'absent'} does not exist: give a run folder, or a folder that holds some"
    )


BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
# Hears every complaint, works every control, then writes what it found where the dump of the page shows it
EARS = """<script>
window.complaints = [];
for (const kind of ["error", "warn"]) console[kind] = (...words) => complaints.push(words.join(" "));
addEventListener("error", (event) => complaints.push(event.message));
addEventListener("unhandledrejection", (event) => complaints.push(`${event.reason}`));
addEventListener("securitypolicyviolation", (event) => complaints.push(event.violatedDirective));
</script>"""
# A window cannot be as narrow as a phone, a frame can
FRAME = """<!DOCTYPE html><title></title><iframe src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>addEventListener("message", (event) => {{ document.title = event.data; }});</script>"""
HANDS = """<script>
(async () => {
  const pause = (time) => new Promise((done) => setTimeout(done, time));
  while (!document.documentElement.dataset.ready) await pause(50);
  const all = (where) => [...document.querySelectorAll(where)];
  const canvases = (node) => [...(node.shadowRoot ?? node).querySelectorAll("*")].flatMap((one) =>
    one.tagName === "CANVAS" ? [one] : one.shadowRoot ? canvases(one) : []);
  const drawn = (chart) => canvases(chart).some((one) => one.width && one.height &&
    new Uint32Array(one.getContext("2d").getImageData(0, 0, one.width, one.height).data.buffer).some((dot) => dot));
  const blank = () => all(".chart").filter((chart) => !chart.closest("[hidden]") && !drawn(chart)).length;
  const found = { charts: all(".chart").length, blank: [], wide: 0 };
  const look = async () => {
    // A chart that was hidden is laid out anew before it is drawn
    for (let wait = 0; wait < 20 && (wait < 3 || blank()); wait++) await pause(100);
    found.blank.push(blank());
    found.wide = Math.max(found.wide, document.documentElement.scrollWidth - innerWidth);
  };
  await look();
  for (const button of all("[data-toggle]")) { button.click(); }
  await look();
  for (const button of all("[data-toggle]")) { button.click(); }
  for (const radio of all("[data-radios] input")) { radio.click(); await look(); }
  for (const field of all("select, [type=range]")) {
    field.value = field.max ?? field.options[field.options.length - 1].value;
    for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind));
    await look();
  }
  found.maps = all('[data-kind="map"]:not([hidden]) h3').map((one) => one.textContent);
  found.said = all("[data-said]").map((one) => one.textContent).join();
  found.width = innerWidth;
  found.complaints = complaints;
  parent.postMessage(JSON.stringify(found), "*");
})();
</script>"""


def browse(page: Path, width: int, profile: Path) -> dict[str, Any]:
    """Open a page in a browser that sees no network, and say what it found."""
    probed = profile / "probed.html"
    profile.mkdir()
    (profile / "frame.html").write_text(FRAME.format(page=probed.as_uri(), width=width))
    probed.write_text(page.read_text().replace("</title>", f"</title>{EARS}", 1) + HANDS)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    options += [f"--user-data-dir={profile / 'profile'}", "--window-size=1500,1000"]
    command = [BROWSER, *options, "--virtual-time-budget=60000", "--dump-dom", (profile / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stderr[-2000:]
    return json.loads(title[1])


@pytest.mark.skipif(not BROWSER, reason="no Chromium is installed: the page's look cannot be checked")
@pytest.mark.parametrize("width", [1400, 390])
def test_a_browser_draws_every_chart_without_complaint(tmp_path: Path, width: int) -> None:
    many = tuple(f"Transformer_0/Block_{at}/MultiHeadAttention_0/query/kernel" for at in range(161))
    for seed in range(2):
        make_run(tmp_path / f"runs/p{seed}", seed=seed, budget=50.0, layers=many)
        rival = "topk:" + ",".join(f"option_{at}=value" for at in range(20))
        make_run(
            tmp_path / f"runs/q{seed}", rival, steps=20 + 20 * seed, planned=40, seed=seed, budget=100.0, layers=many
        )
    make_run(tmp_path / "runs/dense", "dense", layers=many)
    found = browse(write([tmp_path / "runs"], tmp_path / "report.html"), width, tmp_path / "browser")
    assert found["complaints"] == []
    assert found["width"] == width
    assert found["wide"] <= 0
    assert found["charts"] == 25
    assert found["maps"] == ["Threshold", "Density", "Sent against asked for"]  # of top-k, which was chosen last
    assert found["blank"] == [0] * len(found["blank"])
    assert re.fullmatch(r"At step 40 \S+ sent 2\.\d\d % of its entries, and remembered 97\.\d %\.", found["said"])
