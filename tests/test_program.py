"""The training program, as its users meet it: options, errors, files, a run, and what it leaves."""

import contextlib
import errno
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds
from flax import serialization
from rich.console import Console

from train import check, config, data, folders, loop, main, methods, models, optimizer, options, screen, step, summary
from train.errors import NonFiniteError, UsageError
from train.interrupts import Interrupts, remembered
from train.labels import parse_label
from train.log import read

ROOT = Path(__file__).parents[1]
FEW = {
    "model": "mlp",
    "steps": 20,
    "batch": 32,
    "eval_every": 10,
    "checkpoint_every": 10,
    "dense_reference": False,
    "phases": False,
}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def done(tmp_path_factory, data_dir) -> config.Config:
    """A run of both methods with everything on, for several tests to look at."""
    settings = make(
        tmp_path_factory.mktemp("done"), data_dir,
        dense_reference=True, phases=True, tensorboard=True, profile=True, keep_own=0.25,
    )  # fmt: skip
    loop.run(settings, Console(quiet=True), "python -m train.main")
    return settings


def make(folder: Path, data_dir: Path, **changes) -> config.Config:
    made = config.make(workdir=folder, data_dir=data_dir, **(FEW | changes))
    check.check(made)
    return made


def test_help_explains_every_option_with_its_default(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in [*config.flat(config.Config()), "config", "resume", "overwrite"]:
        assert f"--{name.replace('_', '-')}" in text
    assert "100.0" in text


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE")
def test_help_may_be_read_in_part() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "train.main", "--help"]
    ended = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--model", "resnet"], "--model resnet is unknown: choose one of conv, mlp, lenet5"),
        (["--family", "cauchy"], "choose one of laplace"),
        (["--entropy-rule", "most"], "choose one of fixed, entropy, perplexity"),
        (["--batch", "30"], "does not divide among --devices 4: use --batch 32"),
        (["--accumulate", "3"], "does not divide among --devices 4 times --accumulate 3: use --batch 132"),
        (["--ratio", "0.5"], "--ratio 0.5 is out of range: give 1 to"),
        (["--steps", "0"], "--steps 0 is out of range"),
        (["--devices", "0"], "--devices 0 is out of range"),
        (["--devices", "16"], "--devices 16 is more than the 4 that JAX finds"),
        (["--data", "stdlib", "--model", "conv"], "does not suit --data stdlib: use transformer"),
        (["--resume", "--overwrite"], "contradict each other"),
        (["--resume", "--name", "never"], "there is no run folder"),
        (["--name", "n" * 300], "File name too long"),
        (["--workdir", "/dev/null/runs"], "cannot be written to: choose another folder"),
        (["--data", "no_such_data"], "is unknown to tfds: digits, stdlib are embedded"),
        (["--data", "mnist"], "not prepared as array_record: run"),
        (["--method", "best"], "--method best is unknown: choose among partition, dense"),
        (
            ["--method", "partition:rung=2"],
            "'rung=2' is no option of partition: it has entropy_rule=..., error_feedback=...",
        ),
        (["--method", "partition:rungs=99"], "--method partition:rungs=99: rungs=99 is out of range: give 1 to 8"),
        (
            ["--method", "dense:rungs=2"],
            "is no option of dense: it has agreement=..., keep_own=..., learning_rate=..., local_steps=..., nesterov=",
        ),
        (["--local-steps", "0"], "--local-steps 0 is out of range"),
        (["--local-steps", "64", "--steps", "20", "--data-dir", "{data}"], "would be exchanged: use at most 20"),
        (["--warmup-steps", "20", "--steps", "20", "--data-dir", "{data}"], "would be compressed: use at most 19"),
        (
            ["--warmup-steps", "17", "--steps", "20", "--local-steps", "4", "--data-dir", "{data}"],
            "would be compressed: use at most 16",
        ),
        (["--local-steps", "4", "--recipe", "after", "--data-dir", "{data}"], "--recipe after has none: use"),
        (["--data", "stdlib", "--augment", "flip-crop", "--data-dir", "{data}"], "--data stdlib is text: use none"),
        (["--batch", "2048", "--data-dir", "{data}"], "more than the 1497 training examples: use at most 1496"),
        (["--keep-own", "1.5"], "--keep-own 1.5 is out of range: give 0 to 1"),
        (["--method", "partition:keep_own=2"], "keep_own=2 is out of range: give 0 to 1"),
        (["--keep-own", "0.5", "--recipe", "before"], "serves optimizers on each device, and partition has"),
        (["--optimizer", "muon", "--agreement", "0.1"], "--agreement 0.1 serves adam and adamw on each device"),
        (["--optimizer", "lion", "--recipe", "after"], "--optimizer lion does more: use local or before"),
        (["--method", "qsgd:keep_own=0.5"], "qsgd:keep_own=0.5 remembers nothing: leave it out"),
        (["--method", "topk", "--warmup-steps", "5"], "--warmup-steps 5 is of no use to --method topk: leave it out"),
        (["--method", "partition:recipe=best"], "recipe=best is unknown: choose local, after or before"),
        (["--width", "64", "--data-dir", "{data}"], "--width 64 is no size of --model conv: leave it out"),
        (["--config", "/no/such"], "--config /no/such cannot be read"),
        (["--config", "x", "--preset", "mnist"], "--config and --preset both give every default"),
    ],
)
def test_mistakes_are_one_line_that_names_option_and_remedy(given, words, tmp_path, data_dir, capsys) -> None:
    given = [text.format(data=data_dir) for text in given]
    if "--workdir" not in given:
        given += ["--workdir", str(tmp_path / "runs")]
    if "--data-dir" not in given:
        given += ["--data-dir", str(data_dir if "16" in given else tmp_path / "none")]
    assert main.main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "runs").exists()  # a run folder would stand in the way of the next try


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"stepps": 3}', "there is no setting 'stepps': did you mean steps?"),
        ('{"steps": "three"}', 'steps is "three", which is not a whole number'),
        ('{"steps": true}', "steps is true, which is not a whole number"),
        ('{"optimizer": "lamb"}', 'optimizer is "lamb", which is not sgd, adam, adamw, lion, muon'),
        ('{"learning_rate": "fast"}', 'learning_rate is "fast", which is not a number or null'),
        ('{"steps": 3', "is not JSON"),
        ("[3]", "holds no JSON object"),
    ],
)
def test_a_wrong_configuration_file_is_named(text, words, tmp_path, capsys) -> None:
    (tmp_path / "c.json").write_text(text)
    assert main.main(["--config", str(tmp_path / "c.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_a_configuration_is_read_back_as_it_was_written_and_flags_override_it(tmp_path) -> None:
    made = config.make(data="stdlib", steps=7, workdir=tmp_path, tensorboard=True, clip=2.5)
    options.write(made, tmp_path / "c.json")
    assert config.settle(main.parse(["--config", str(tmp_path / "c.json")])) == config.change(
        made, config=tmp_path / "c.json"
    )
    other = main.parse(["--config", str(tmp_path / "c.json"), "--steps", "9", "--no-tensorboard"])
    assert (other.training.steps, other.output.tensorboard, other.task.model) == (9, False, "transformer")


@pytest.mark.parametrize("name", config.PRESETS)
def test_presets_give_defaults_that_can_be_overridden(name) -> None:
    made = main.parse(["--preset", name, "--seed", "5"])
    assert made.task.data == config.PRESETS[name]["data"]
    assert made.training.seed == 5
    assert main.parse([f"--preset={name}", "--steps", "3"]).training.steps == 3
    folders_free = config.change(config.settle(made), workdir=Path("/tmp/none-such"))
    check.check(folders_free)


def test_what_was_chosen_for_one_optimizer_or_run_does_not_stick_to_another(tmp_path) -> None:
    def of(*given: str) -> tuple:
        found = config.settle(main.parse(given)).training
        return found.learning_rate, found.momentum, found.weight_decay

    assert of("--preset", "mnist", "--optimizer", "adam") == (0.004, 0.9, 0)
    assert of("--preset", "mnist", "--optimizer", "adam", "--learning-rate", "0.3") == (0.3, 0.9, 0)
    assert of("--preset", "cifar10", "--optimizer", "sgd") == (0.1, 0.9, 1e-4)
    assert of("--data", "stdlib", "--optimizer", "muon") == (0.01, 0.9, 0)  # the preset's own momentum
    made = config.make(name="first", steps=7, learning_rate=0.3)
    assert made.training.b2 == 0.999
    options.write(made, tmp_path / "c.json")
    given = ["--config", str(tmp_path / "c.json")]
    assert of(*given) == (0.3, 0.9, 0)
    assert of(*given, "--optimizer", "muon") == (0.01, 0.95, 0)
    other = config.settle(main.parse([*given, "--optimizer", "lion", "--seed", "1"]))
    assert (other.training.b2, other.training.steps, other.folder.name) == (0.99, 7, "digits-100x-seed1")


def test_none_is_as_absent() -> None:
    assert main.parse(["--preset", "None", "--config", "None", "--data", "stdlib"]) == main.parse(["--data", "stdlib"])


def test_the_data_set_chooses_the_preset() -> None:
    assert main.parse(["--data", "stdlib"]).training.optimizer == "adam"
    assert main.parse(["--data=mnist"]).task.model == "lenet5"
    assert main.parse([]) == config.base({})


def test_a_folder_that_cannot_be_had_is_no_mistake_of_the_name(tmp_path, capsys) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert main.main(["--workdir", str(tmp_path / "loop" / "runs")]) == 2
    assert "loop/runs cannot be written to (Too many levels of symbolic links)" in capsys.readouterr().err


def test_images_that_a_model_would_make_nothing_of_are_refused() -> None:
    split = data.Split(200, lambda numbers: {})
    with pytest.raises(UsageError, match=r"--model conv halves .* have 3 x 8 pixels: give --image-size, of 4 or more"):
        check.check_data(config.make(), data.Dataset((3, 8, 1), 10, "image", split, split))


def test_fewer_examples_than_devices_are_refused_with_what_can_be_done() -> None:
    split = data.Split(3, lambda numbers: {})
    words = "--batch 128 is more than the 3 training examples: choose another --data, or fewer --devices than 4"
    with pytest.raises(UsageError, match=words):
        check.check_data(config.settle(config.make(), 4), data.Dataset((8, 8, 1), 10, "image", split, split))


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ("iterdir", r"run folder .*theirs cannot be read \(Permission denied\): choose another --name"),
        ("write_bytes", r"config.json could not be written \(Permission denied\): choose another folder"),
    ],
)
def test_another_users_folder_is_no_traceback(refused: str, words: str, tmp_path, monkeypatch) -> None:
    def refuse(*given):
        raise PermissionError(errno.EACCES, "Permission denied")

    theirs = config.make(workdir=tmp_path, name="theirs")
    theirs.folder.mkdir()
    monkeypatch.setattr(Path, refused, refuse)

    def begin() -> None:
        folders.check(theirs)
        folders.enter(theirs, theirs.folder / "partition", print)

    with pytest.raises(UsageError, match=words):
        begin()


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
    assert main.main(["--workdir", str(tmp_path), "--overwrite"]) == 2
    assert "is no run folder" in capsys.readouterr().err
    for other, words in (
        ("{}", "its config.json lacks "),
        ('{"steps": 7}', "its config.json lacks "),
        ('{"model_type": "x"}', "there is no setting 'model_type'"),
    ):
        (folder / "config.json").write_text(other)
        assert main.main(["--workdir", str(tmp_path), "--overwrite"]) == 2
        assert words in capsys.readouterr().err
    unseen = config.make(workdir=tmp_path, overwrite=True)  # as on a host that `check` has not looked at
    with pytest.raises(UsageError, match="there is no setting 'model_type'"), folders.made(unseen):
        pass
    assert (folder / "kept").exists()
    two = config.make(workdir=tmp_path, name="two")
    folders.check(two)  # and so does another start at the same moment
    with folders.made(two):
        for other in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UsageError, match="a training goes on in"), folders.made(config.change(two, **other)):
                pass
    late = config.change(two, learning_rate=0.3)
    with pytest.raises(UsageError, match=r"run folder .*two exists: go on with --resume"), folders.made(late):
        pass
    assert json.loads((two.folder / "config.json").read_text())["learning_rate"] == 0.1


@pytest.mark.xdist_group("done")
def test_a_run_leaves_its_files(done) -> None:
    for method in ("partition", "dense"):
        folder = done.folder / method
        header, summary, phases = (
            json.loads((folder / name).read_text()) for name in ("run.json", "summary.json", "phases.json")
        )
        lines = read(folder / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, 21))
        assert [line["step"] for line in lines if "test_loss" in line] == [10, 20]
        assert summary["status"] == "finished"
        assert summary["test_accuracy"] == lines[-1]["test_accuracy"]
        assert sum(header["sizes"]) == header["parameters"] == summary["parameters"]
        assert header["command"] == "python -m train.main"
        assert all(phases[key] >= 0 for key in ("forward_backward", "encode", "wire", "decode", "optimizer"))
        assert phases["forward_backward"] > 0
        assert list((folder / "tensorboard").glob("events*"))
        assert list((folder / "profile").rglob("*.xplane.pb"))
        assert options.read(folder / "config.json", "")["steps"] == 20
    partition, dense = (json.loads((done.folder / m / "summary.json").read_text()) for m in ("partition", "dense"))
    assert partition["payload_bytes"] * 90 < dense["payload_bytes"] == 4 * dense["parameters"] * 20
    assert dense["forecast_error"] is None
    assert (done.folder / "report.html").stat().st_size > 10_000


@pytest.mark.xdist_group("done")
def test_the_model_that_is_left_scores_as_the_run_says(done) -> None:
    settings = config.flat(done)
    dataset = data.load(settings["data"], settings["data_dir"])
    examples = dataset.test.read(np.arange(dataset.test.size))
    for method in ("partition", "dense"):
        folder = done.folder / method
        variables = serialization.msgpack_restore((folder / "model.msgpack").read_bytes())
        logits = models.build(settings["model"], dataset.classes).apply(variables, examples["input"])
        right = np.mean(np.argmax(logits, axis=1) == examples["label"])
        assert right == pytest.approx(json.loads((folder / "summary.json").read_text())["test_accuracy"])


@pytest.mark.xdist_group("done")
def test_layers_and_forecasts_are_kept_where_the_method_has_them(done) -> None:
    layers = read(done.folder / "partition" / "layers.jsonl")
    assert [line["step"] for line in layers] == [1, 2, 4, 8, 10, 16, 20]
    assert np.shape(layers[-1]["threshold"]) == (6, 2)
    forecasts = read(done.folder / "partition" / "forecast.jsonl")
    assert [line["step"] for line in forecasts] == [10, 20]
    bins = len(forecasts[0]["forecast"][0])
    assert np.shape(forecasts[0]["edges"]) == (6, bins + 1)
    assert np.shape(forecasts[0]["observed"]) == (len(forecasts[0]["segments"]), bins)
    assert read(done.folder / "dense" / "layers.jsonl") == []


@pytest.mark.xdist_group("done")
def test_a_finished_run_is_left_as_it_is(done) -> None:
    before = (done.folder / "dense" / "metrics.jsonl").stat().st_mtime_ns
    again = config.change(done, resume=True)
    check.check(again)
    assert loop.run(again, Console(quiet=True))[1]["steps"] == 20
    assert (done.folder / "dense" / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.xdist_group("done")
def test_going_on_with_other_settings_is_refused_by_name(done, capsys) -> None:
    with pytest.raises(UsageError, match=r"--clip 3.0 differs from 1.0, with which .* was started: leave --clip out"):
        loop.run(config.change(done, resume=True, clip=3.0), Console(quiet=True))


@pytest.mark.xdist_group("done")
def test_resume_takes_the_settings_of_the_run(done) -> None:
    given = ["--resume", "--workdir", str(done.output.workdir), "--steps", "30"]
    found = main.parse(given)
    assert config.settle(found) == config.change(done, resume=True, steps=30)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(tmp_path, data_dir) -> None:
    settings = make(tmp_path, data_dir, learning_rate=1e6, clip=1e12, method="dense", schedule="constant", rise=0.0)
    with pytest.raises(NonFiniteError, match=r"the loss of step \d+ \(dense\) is (nan|inf): lower --learning-rate"):
        loop.run(settings, Console(quiet=True))
    for line in read(settings.folder / "dense" / "metrics.jsonl"):
        assert np.isfinite(line["loss"])


def test_parts_of_a_batch_give_the_gradient_of_the_whole_and_one_trace(tmp_path, data_dir, monkeypatch) -> None:
    traces = []
    gradient_of = step.gradient_of
    monkeypatch.setattr(step, "gradient_of", lambda *a: traces.append(1) or gradient_of(*a))
    runs = [
        loop.run(make(tmp_path, data_dir, accumulate=k, method="dense", name=str(k)), Console(quiet=True))
        for k in (1, 4)
    ]
    assert len(traces) == 2
    assert runs[0][0]["test_loss"] == pytest.approx(runs[1][0]["test_loss"], rel=1e-4)


def test_one_device_alone_ends_in_a_table_and_a_report(tmp_path, data_dir, capsys) -> None:
    given = ["--devices", "1", "--model", "mlp", "--batch", "32", "--steps", "2", "--method", "topk", "--no-phases"]
    assert main.main([*given, "--workdir", str(tmp_path), "--data-dir", str(data_dir), "--name", "alone"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "link ratio" in line]
    assert re.findall(r"[0-9.]+ x", rows[0]) == ["1.0 x", "1.0 x"]
    assert (tmp_path / "alone" / "report.html").exists()


def test_warm_up_steps_are_steps_with_local_steps_too() -> None:
    own = config.make(local_steps=4, warmup_steps=6, method="partition").exchange
    assert methods.settings_of(parse_label("partition"), own)["warmup_steps"] == 2  # exchanges: after steps 4 and 8
    header = {"method": "", "data": "", "model": "", "seed": 0, "kind": "topk", "parameters": 25}
    header |= {"devices": 2, "dense_payload_bytes": 100.0, "dense_link_bytes": 100.0}
    spent = np.cumsum([400.0 if step in (4, 8) else 8.0 if step % 4 == 0 else 0.0 for step in range(1, 17)])
    line = {"forecast_error": None, "seconds": 0.0}
    lines = [line | {"step": i + 1, "payload_bytes": x, "link_bytes": x} for i, x in enumerate(spent)]
    found = summary.summarise(header, lines, None, 8)
    assert (found["steady_link_ratio"], found["link_ratio"]) == (800 / 16, 1600 / 816)


@pytest.mark.slow
@pytest.mark.deep
def test_the_cifar10_preset_trains_on_mock_data(tmp_path) -> None:
    """Batch normalisation, augmentation and weight decay, through the whole program; mock data for the download."""
    with tfds.testing.mock_data(num_examples=32):
        settings = config.change(
            config.make(preset="cifar10", workdir=tmp_path, data_dir=tmp_path, dtype="bfloat16"),
            steps=3, batch=8, devices=2, eval_every=3, dense_reference=False, phases=False,
        )  # fmt: skip
        check.check(settings)
        summary = loop.run(settings, Console(quiet=True))[0]
    header = json.loads((settings.folder / "partition" / "run.json").read_text())
    lines = read(settings.folder / "partition" / "metrics.jsonl")
    assert header["model"] == "resnet20"
    assert summary["test_loss"] is not None
    # Averaging batch statistics before the evaluation is counted, and so are histograms: a second one at once, because
    # behind scales that start at 0 gradients are zero in the first step.
    statistics, histogram = 4 * 2 * 688, 4 * 65 * len(header["segments"])
    first, second, third = (line["payload_bytes"] for line in lines)
    assert second - first == first
    assert third - second == first - histogram + statistics


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
def test_schedules_rise_and_fall(schedule) -> None:
    made = config.make(steps=100, schedule=schedule, learning_rate=1.0, rise=0.1)
    rates = np.asarray(jax.vmap(optimizer.schedule(made))(np.arange(100)))
    assert rates[0] == 0
    assert rates[10] == rates.max() == 1
    expected = {"constant": (1, 1), "linear": (0.56, 0.011), "cosine": (0.587, 0.0003), "step": (0.1, 0.01)}[schedule]
    np.testing.assert_allclose(rates[[50, 99]], expected, atol=0.01)


def test_weight_decay_spares_biases() -> None:
    params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    nothing = jax.tree.map(np.zeros_like, params)
    for name in config.OPTIMIZERS:
        made = config.make(optimizer=name, weight_decay=0.1, schedule="constant", rise=0.0)
        tx = optax.chain(*optimizer.parts(made, parse_label("dense")))
        updates, _ = tx.update(nothing, tx.init(params), params)
        assert np.all(np.asarray(updates["kernel"]) < 0), name
        assert not np.any(updates["bias"]), name


def test_momentum_correction_takes_momentum_from_sgd() -> None:
    made = config.make()
    for text, traced in (("partition", True), ("partition:momentum=0.9", False)):
        state = optimizer.parts(made, parse_label(text))[0].init({"x": np.zeros(2, np.float32)})
        found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, optax.TraceState))
        assert any(isinstance(node, optax.TraceState) for node in found) == traced


def test_labels_have_settings_of_their_own_and_dense_training_is_plain() -> None:
    made = config.make(optimizer="adam", local_steps=4)
    label = parse_label("partition:local_steps=2,learning_rate=0.5,rungs=2")
    assert methods.settings_of(label, made.exchange)["rungs"] == 2
    own = methods.tuned(made, label)
    assert (own.exchange.local_steps, own.training.learning_rate, own.exchange.recipe) == (2, 0.5, "local")
    assert own.exchange.entropy_rule == "energy"
    assert own.exchange.agreement == 0.05
    before = methods.tuned(made, parse_label("partition:recipe=before")).exchange
    assert (before.entropy_rule, before.agreement) == ("entropy", 0.0)
    with pytest.raises(UsageError, match="serves adam and adamw on each device"):
        methods.tuned(config.make(optimizer="sgd", agreement=0.1), label)
    # What a comparison keeps, those of its methods keep that remember
    kept = [methods.tuned(config.make(keep_own=0.5), parse_label(name)).exchange.keep_own for name in ("topk", "qsgd")]
    assert kept == [0.5, None]
    dense = methods.tuned(made, parse_label("dense"))
    assert (dense.exchange.local_steps, dense.exchange.recipe, dense.exchange.agreement) == (1, "before", 0.0)
    assert methods.tuned(made, parse_label("dense:local_steps=8")).exchange.local_steps == 8
    with pytest.raises(UsageError, match="--local-steps 2 saves more than the payload ratio"):
        methods.build(label, own.exchange, None, 1.5, 1)


def test_the_first_interrupt_is_a_wish_and_the_second_ends() -> None:
    heard: list[str] = []
    with Interrupts(heard.append) as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert heard == ["ending after the next step; once more ends at once"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="only Unix has terminals that hang up")
@pytest.mark.usefixtures("usual_signals")
def test_a_closed_terminal_is_a_wish_however_often_it_is_told_and_none_under_nohup() -> None:
    with Interrupts(lambda text: None) as interrupts:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert interrupts.number == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts(lambda text: None) as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert interrupts.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("usual_signals")
def test_ctrl_c_that_python_ignored_ends_before_a_run_folder_is_made(tmp_path, data_dir) -> None:
    with remembered():
        with contextlib.suppress(KeyboardInterrupt):  # as in a callback of the garbage collector
            signal.raise_signal(signal.SIGINT)
        settings = make(tmp_path, data_dir, name="missed")
        with pytest.raises(KeyboardInterrupt):
            loop.run(settings, Console(quiet=True))
        assert not settings.folder.exists()
        with pytest.raises(KeyboardInterrupt), Interrupts(print):
            pytest.fail("has begun")


@pytest.mark.usefixtures("usual_signals")
def test_ctrl_c_in_a_callback_of_the_garbage_collector_comes_again_without_a_traceback(capsys) -> None:
    def call(*given: Any) -> None:
        gc.callbacks.remove(call)
        signal.raise_signal(signal.SIGINT)

    @remembered()
    def work() -> None:
        gc.collect()
        assert call not in gc.callbacks
        for _ in range(1000):
            time.sleep(0.01)

    gc.callbacks.append(call)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("usual_signals")
def test_ctrl_c_of_which_a_module_makes_another_error_is_ctrl_c() -> None:
    @remembered()
    def work(number: int) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            if number:
                signal.raise_signal(number)
        raise ImportError("an extension could not be initialized")

    with pytest.raises(ImportError):
        work(0)
    with pytest.raises(KeyboardInterrupt):
        work(signal.SIGINT)


def test_numbers_for_people() -> None:
    assert screen.number(None, "{}") == "-"
    header = {
        "method": "topk", "kind": "topk", "command": "c", "devices": 4, "device_kind": "cpu", "processes": 1, "model": "mlp",
        "parameters": 1000, "sizes": [1000], "data": "digits", "expected_payload_bytes": 40.0, "dense_payload_bytes": 4000.0,
    }  # fmt: skip
    console = Console(width=100, record=True)
    for changes, said in (
        ({}, "about 40 B a step and device, uncompressed 4 kB"),
        ({"expected_payload_bytes": None}, "of the method's own size, uncompressed 4 kB"),
        ({"kind": "dense"}, "uncompressed, 4 kB a step and device"),
    ):
        with console.capture() as captured:
            screen.header(console, header | changes, config.flat(config.make()))
        assert said in captured.get()


def test_the_speed_shown_is_that_of_training_alone() -> None:
    console = Console(width=200, record=True)
    line = {
        "step": 11,
        "loss": 1.0,
        "accuracy": 0.5,
        "payload_ratio": 9.0,
        "seconds": 1.25,
        "test_loss": 1.0,
        "test_accuracy": 0.5,
    }
    with console.capture() as captured, screen.Screen(console, "topk", 10, 20, 1.0) as show:
        show.step(line)  # a start's first step has a speed, too
        show.step(line | {"step": 12, "seconds": 1.5})
    assert captured.get().count("4.0 steps/s") == 2


def test_the_program_runs_as_its_users_run_it(tmp_path, data_dir) -> None:
    given = ["--model", "mlp", "--steps", "20", "--batch", "32", "--eval-every", "10"]
    command = [sys.executable, "-m", "train.main", *given]
    paths = ["--workdir", str(tmp_path), "--data-dir", str(data_dir)]
    done = subprocess.run(
        [*command, "--no-phases", *paths], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "payload ratio" in done.stdout
    assert "mlp of 85,002 parameters" in done.stdout
    assert (tmp_path / "digits-100x-seed0" / "report.html").stat().st_size > 10_000
    assert not done.stderr
