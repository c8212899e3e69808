"""The training program, as its users meet it: options, errors, data, a run, its files, and going on with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from rich.console import Console

from train import config, data, loop, main, report
from train.bench import __main__ as bench
from train.bench import forecast, rivals, wire
from train.errors import UsageError
from train.log import read

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def settings(folder: Path, data_dir: Path, **changes) -> config.Config:
    few = {"model": "mlp", "steps": 20, "batch": 32, "eval_every": 10, "checkpoint_every": 10, "dense_reference": False}
    return config.fill(config.Config(workdir=folder, data_dir=data_dir, **(few | changes)))


def test_help_explains_every_option_with_its_default(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in [
        "data",
        "model",
        "devices",
        "ratio",
        "steps",
        "seed",
        "workdir",
        "resume",
        "checkpoint-every",
        "no-dense-reference",
    ]:
        assert f"--{option}" in text
    assert "100.0" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "resnet"], "--model resnet is unknown: choose one of conv, mlp, transformer"),
        (["--family", "cauchy"], "choose one of laplace"),
        (["--entropy-rule", "most"], "choose one of fixed, entropy, perplexity"),
        (["--batch", "30"], "does not divide among --devices 4: use --batch 32"),
        (["--ratio", "0.5"], "--ratio 0.5 is out of range: give 1 to"),
        (["--steps", "0"], "--steps 0 is out of range"),
        (["--devices", "0"], "--devices 0 is out of range"),
        (["--data", "stdlib", "--model", "conv"], "does not suit --data stdlib: use transformer"),
        (["--resume", "--overwrite"], "contradict each other"),
        (["--resume", "--name", "never"], "there is no run folder"),
        (["--workdir", "/dev/null/runs"], "cannot be written to: choose another folder"),
        (["--data", "no_such_data"], "is unknown to tfds: digits, stdlib are embedded"),
        (["--data", "mnist"], "not prepared as array_record: run"),
    ],
)
def test_mistakes_are_one_line_that_names_option_and_remedy(options, words, tmp_path, capsys) -> None:
    given = options if "--workdir" in options else [*options, "--workdir", str(tmp_path)]
    assert main.main([*given, "--data-dir", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_an_unwritable_folder_is_refused(tmp_path, capsys) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    assert main.main(["--workdir", str(tmp_path / "runs")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_a_run_folder_is_never_overwritten_silently(tmp_path, capsys) -> None:
    folder = tmp_path / "digits-100x-seed0"
    folder.mkdir()
    (folder / "kept").write_text("")
    assert main.main(["--workdir", str(tmp_path)]) == 2
    assert "exists: go on with --resume, replace it with --overwrite" in capsys.readouterr().err
    assert (folder / "kept").exists()


def test_a_run_resumes_to_the_same_bits_and_leaves_its_files(tmp_path, data_dir) -> None:
    console = Console(quiet=True)
    whole = loop.run(settings(tmp_path, data_dir, name="whole"), console)
    part = settings(tmp_path, data_dir, name="part")
    loop.run(config.dataclasses.replace(part, steps=20, schedule="cosine"), console)
    # As if it had been killed after its checkpoint at step 10
    import shutil

    for saved in (tmp_path / "part" / "checkpoints" / "partition").iterdir():
        if saved.name != "10":
            shutil.rmtree(saved)
    again = loop.run(config.dataclasses.replace(part, resume=True), console)
    assert again[0]["test_loss"] == whole[0]["test_loss"]
    lines, other = (read(tmp_path / name / "metrics.jsonl") for name in ("part", "whole"))
    assert [line["step"] for line in lines] == list(range(1, 21))
    for a, b in zip(lines, other, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model"] == "mlp"
    assert lines[-1]["payload_bytes"] * 90 < 4 * whole[0]["parameters"] * 20
    before = (tmp_path / "part" / "report.png").stat().st_size
    assert report.draw(tmp_path / "part").stat().st_size == before > 10_000


def test_any_tfds_name_is_accepted(tmp_path) -> None:
    """A prepared set of tfds goes through the program; mock_data stands for the download."""
    with tfds.testing.mock_data(num_examples=64):
        found = data.load("mnist", tmp_path)
        assert found.inputs == (28, 28, 1)
        assert found.classes == 10
        summary = loop.run(
            settings(tmp_path, tmp_path, data="mnist", steps=2, eval_every=2, devices=2), Console(quiet=True)
        )
    assert summary[0]["steps"] == 2


def test_more_devices_than_there_are(tmp_path, data_dir) -> None:
    with pytest.raises(UsageError, match="--devices 16 is more than the 4 that JAX finds"):
        loop.run(settings(tmp_path, data_dir, devices=16), Console(quiet=True))


def test_the_program_runs_as_its_users_run_it(tmp_path, data_dir) -> None:
    command = [
        sys.executable,
        "-m",
        "train.main",
        "--steps",
        "3",
        "--model",
        "mlp",
        "--devices",
        "2",
        "--eval-every",
        "3",
    ]
    paths = ["--workdir", str(tmp_path), "--data-dir", str(data_dir)]
    done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "payload ratio" in done.stdout
    assert (tmp_path / "digits-100x-seed0" / "report.png").stat().st_size > 10_000


def test_benchmarks_refuse_what_cannot_work(tmp_path, capsys) -> None:
    assert bench.main(["wire", "--figure", str(tmp_path / "no" / "x.png")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert bench.main(["compress", "--elements", "5"]) == 2
    assert "--elements 5 is out of range" in capsys.readouterr().err


def test_the_wire_benchmark_is_within_its_bounds(tmp_path) -> None:
    for density in (0.03, 0.001):
        row = wire.measure(1_000_000, density, 4)
        assert 1 <= row["index_ratio"] < 1.1
        assert 1 <= row["payload_ratio"] < 1.12


def test_rivals_hit_the_count_on_what_they_were_made_for() -> None:
    x = np.random.default_rng(0).exponential(size=200_000)
    for name, (make, _) in rivals.RIVALS.items():
        if name == "normal quantile":
            continue
        rival = make()
        for _ in range(12):
            ratio = np.mean(x > rival.threshold(x, 0.01)) / 0.01
            rival.realised(ratio)
        assert 0.8 < ratio < 1.25, name
    normal = np.random.default_rng(0).normal(size=200_000)
    assert np.mean(np.abs(normal) > rivals.Normal().threshold(np.abs(normal), 0.01)) == pytest.approx(0.01, rel=0.1)


def test_a_result_is_summed_up() -> None:
    result = forecast.Result("m", 0.01, [1.0] * 60 + [1.5] * 40, None).summary()
    assert result["median_error"] == 0
    assert result["worst_settled"] == 0.5
    assert result["share_far_off"] == 0.4
