"""Going on after kills, damage, a full disk, and on another number of devices."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import gradpart_jax as gp
from gradpart_jax.segments import layout_of
from gradpart_jax.shares import share_of
from train import check, config, loop, parts, screen
from train.checkpoint import Checkpoints
from train.errors import Interrupted, UsageError
from train.log import Journal, read, write_whole
from train.owners import release
from train.redistribute import share

ROOT = Path(__file__).parents[1]
# As in the tests of the program, whose compiled step serves here too
OPTIONS = {
    "model": "mlp",
    "steps": 20,
    "batch": 32,
    "eval_every": 5,
    "checkpoint_every": 2,
    "dense_reference": False,
    "phases": False,
}
# A program that kills itself in the middle of writing the checkpoint of step 6, before it is renamed into place.
KILLED_IN_A_SAVE = """
import os, signal, sys
from pathlib import Path
rename = os.rename
def renamed(a, b, *rest, **options):
    if str(b).endswith("checkpoints/6"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(a, b, *rest, **options)
os.rename = os.replace = renamed
from train.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir) -> config.Config:
    settings = make(tmp_path_factory.mktemp("runs"), data_dir, name="whole")
    loop.run(settings, Console(quiet=True))
    return settings


def make(folder: Path, data_dir: Path, **changes) -> config.Config:
    made = config.make(workdir=folder, data_dir=data_dir, **(OPTIONS | changes))
    check.check(made)
    return made


def arrays(folder: Path) -> dict[str, bytes]:
    newest = max((path for path in (folder / "checkpoints").iterdir()), key=lambda path: int(path.name))
    found = parts.PartHandler().restore(newest / parts.ITEM)
    header = json.loads(found.pop(parts.FACTS).tobytes())
    header["facts"].pop("seconds")
    return {key: x.tobytes() for key, x in found.items()} | {"header": json.dumps(header).encode()}


def metrics(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read(folder / "metrics.jsonl")]


def again(whole: config.Config, name: str, last: int | None = None) -> config.Config:
    """A copy of the whole run, as if it had been killed some steps before its end."""
    settings = config.change(whole, name=name, resume=True)
    shutil.copytree(whole.folder, settings.folder)
    (settings.folder / "partition" / "summary.json").unlink()
    for path in (settings.folder / "partition" / "checkpoints").iterdir():
        if last is not None and path.name.isdecimal() and int(path.name) > last:
            shutil.rmtree(path)
    return settings


def owed(opt_state, layout) -> np.ndarray:
    """The sum of memories, and of all devices times the debts of owners, entry by entry."""
    (state,) = (node for node in jax.tree.leaves(opt_state, is_leaf=is_exchange) if is_exchange(node))
    debts = state.scheme.local
    total = state.memory.residual.sum(axis=0, dtype=np.float64)
    for owner, debt in enumerate(debts):
        places = np.asarray(share_of(layout, len(debts), jnp.int32(owner)).restore(jnp.arange(debt.size)))
        real = places < layout.total
        total[places[real]] += len(debts) * debt[real]
    return total


def is_exchange(node) -> bool:
    return isinstance(node, gp.CompressState)


@pytest.mark.xdist_group("whole")
@pytest.mark.slow
def test_a_run_killed_at_any_step_and_in_a_save_resumes_to_the_same_bits(whole) -> None:
    folder = whole.output.workdir / "killed" / "partition"
    given = [
        "--model", "mlp", "--steps", "20", "--batch", "32", "--eval-every", "5", "--checkpoint-every", "2",
        "--no-dense-reference", "--no-phases", "--name", "killed", "--workdir", str(whole.output.workdir),
        "--data-dir", str(whole.task.data_dir),
    ]  # fmt: skip

    def start(*more: str, code: str | None = None) -> subprocess.Popen:
        program = ["-m", "train.main"] if code is None else ["-c", code]
        return subprocess.Popen(
            [sys.executable, *program, *given, *more],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill_after(process: subprocess.Popen, lines: int) -> None:
        path = folder / "metrics.jsonl"
        last = time.monotonic() + 120
        while not path.exists() or path.read_text().count("\n") < lines:
            assert time.monotonic() < last
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        process.kill()
        process.communicate()

    kill_after(start(), 3)
    saving = start("--resume", code=KILLED_IN_A_SAVE)
    saving.communicate(timeout=120)
    assert saving.returncode == -signal.SIGKILL
    assert [path.name for path in (folder / "checkpoints").glob("6.*tmp*")]
    kill_after(start("--resume"), 9)
    last = start("--resume")
    out, error = last.communicate(timeout=120)
    assert last.returncode == 0, error
    assert "resumed at step" in out
    assert arrays(folder) == arrays(whole.folder / "partition")
    assert metrics(folder) == metrics(whole.folder / "partition")
    assert not list((folder / "checkpoints").glob("*tmp*"))
    assert len(json.loads((folder / "run.json").read_text())["resumed"]) >= 2


@pytest.mark.xdist_group("whole")
def test_a_damaged_checkpoint_is_named_and_passed_over(whole) -> None:
    settings = again(whole, "damaged")
    newest = settings.folder / "partition" / "checkpoints" / "20"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    largest.write_bytes(content)
    # As a power cut may leave others
    (settings.folder / "partition" / "run.json").write_text("")
    with (settings.folder / "partition" / "layers.jsonl").open("ab") as file:
        file.write(b"\xff\n")
    console = Console(record=True, width=200, file=io.StringIO())
    loop.run(settings, console)
    text = console.export_text()
    assert "the checkpoint of step 20 is damaged and passed over" in text
    assert "resumed at step 18" in text
    assert arrays(settings.folder / "partition") == arrays(whole.folder / "partition")
    assert metrics(settings.folder / "partition") == metrics(whole.folder / "partition")


@pytest.mark.xdist_group("whole")
def test_where_every_checkpoint_is_damaged_the_run_does_not_start_over_silently(whole) -> None:
    settings = again(whole, "ruined")
    for path in (settings.folder / "partition" / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"no checkpoint in .* can be read .*: start again with --overwrite"):
        loop.run(settings, Console(quiet=True))


@pytest.mark.xdist_group("whole")
def test_another_number_of_devices_owes_the_same(whole, monkeypatch) -> None:
    settings = config.change(again(whole, "on-2", last=18), devices=2)
    check.check(settings)
    release, redistribute = loop.release, loop.redistribute
    sums, layouts = [], []

    def released(opt_state, like, layout, *rest):
        sums.append(owed(opt_state, layout))
        layouts.append(layout)
        return release(opt_state, like, layout, *rest)

    def redistributed(state, *rest):
        made = redistribute(state, *rest)
        sums.append(owed(made[0].opt_state, layouts[0]))
        return made

    monkeypatch.setattr(loop, "release", released)
    monkeypatch.setattr(loop, "redistribute", redistributed)
    console = Console(record=True, width=200, file=io.StringIO())
    found = loop.run(settings, console)[0]
    assert found["steps"] == 20
    lines = read(settings.folder / "partition" / "metrics.jsonl")
    spent = np.diff([0.0, *[line["link_bytes"] for line in lines]])
    dense = spent @ [line["link_ratio"] for line in lines]
    assert found["link_ratio"] == pytest.approx(dense / found["link_bytes"], rel=1e-5)
    text = console.export_text()
    assert "going on with other settings: devices 4 became 2" in text
    assert "4 devices became 2: each takes over the memories of up to 2; the sum of memories is the same" in text
    before, after = sums
    assert np.abs(before).max() > 0
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6 * np.abs(before).max())


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_memories_are_dealt_out_with_the_same_sum(before: int, after: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = (random.normal(size=(before, 50)) * 10.0 ** random.integers(-6, 3, (before, 50))).astype(np.float32)
    dealt = share(x, after)
    assert dealt.shape == (after, 50)
    assert dealt.dtype == np.float32
    wanted, found = x.sum(axis=0, dtype=np.float64), dealt.sum(axis=0, dtype=np.float64)
    if after >= before:
        np.testing.assert_array_equal(found, wanted)
    # What is lost is at most the rounding of one device's entry
    assert np.all(np.abs(found - wanted) <= np.spacing(np.abs(dealt[-1])))


@pytest.mark.deep
@pytest.mark.xdist_group("whole")
def test_more_steps_go_on_from_the_end(whole) -> None:
    settings = config.change(whole, name="longer", resume=True, steps=22)
    shutil.copytree(whole.folder, settings.folder)
    assert loop.run(settings, Console(quiet=True))[0]["steps"] == 22
    assert [line["step"] for line in read(settings.folder / "partition" / "metrics.jsonl")] == list(range(1, 23))


def test_local_steps_resume_between_two_exchanges_to_the_same_bits_and_on_other_devices(tmp_path, data_dir) -> None:
    changes = {"method": "topk:local_steps=3", "optimizer": "adam", "name": "local", "phases": True, "steps": 12}
    settings = make(tmp_path, data_dir, **changes)
    summary = loop.run(settings, Console(quiet=True))[0]
    folder = settings.folder / "topk-local_steps=3"
    lines = metrics(folder)
    spent = np.diff([0.0] + [line["payload_bytes"] for line in lines])
    # Between exchanges devices tell one another how much they agree
    assert (np.flatnonzero(spent > spent.max() / 2) + 1).tolist() == [3, 6, 9, 12]
    told = np.delete(spent, [2, 5, 8, 11])
    assert len(set(told[told > 0])) == 1
    assert summary["payload_ratio"] == pytest.approx(100, rel=0.05)
    assert json.loads((folder / "phases.json").read_text())["optimizer"] > 0
    for name, devices in (("again", 4), ("fewer", 2)):
        other = config.change(settings, name=name, resume=True, devices=devices)
        shutil.copytree(settings.folder, other.folder)
        copied = other.folder / folder.name
        (copied / "summary.json").unlink()
        shutil.rmtree(copied / "checkpoints" / "12")
        loop.run(other, Console(quiet=True))
        if devices == 4:
            assert arrays(copied) == arrays(folder)
            assert metrics(copied) == lines
        assert read(copied / "metrics.jsonl")[-1]["step"] == 12


def test_other_parameters_are_refused_by_name(tmp_path) -> None:
    saved = Checkpoints(tmp_path)
    saved.save(1, {"a": jnp.ones(3)}, {})
    axes = {"a": None}
    with pytest.raises(UsageError, match=r"\['a'\] is float32\[3\] there, float32\[4\] here"):
        saved.restore({"a": np.ones(4, np.float32)}, axes, print)
    with pytest.raises(UsageError, match=r"\['b'\] is in one of the two states only"):
        saved.restore({"a": np.ones(3, np.float32), "b": np.ones(1)}, {"a": None, "b": None}, print)
    saved.close()


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small disk can be mounted by root only")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no small disk can be mounted here: {made.stderr.decode()}")
    try:
        saved = Checkpoints(tmp_path)
        state = {"a": jnp.asarray(np.random.default_rng(0).normal(size=300_000), jnp.float32)}
        saved.save(1, state, {"n": 1})
        with pytest.raises(
            UsageError, match=r"step 2 could not be written .* that of step 1 is intact: free some space"
        ):
            saved.save(2, state, {"n": 2})
        found = saved.restore(state, {"a": None}, print)
        assert found is not None
        assert (found.step, found.facts) == (1, {"n": 1})
        np.testing.assert_array_equal(found.state["a"], state["a"])
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
        saved.close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_storage_that_fails_is_said(tmp_path, monkeypatch) -> None:
    saved = Checkpoints(tmp_path)
    saved.save(1, {"a": jnp.ones(3)}, {})

    def fail(*args, **options):
        (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
        raise ValueError("RESOURCE_EXHAUSTED: quota\nand more")

    monkeypatch.setattr(saved._manager, "save", fail)
    with pytest.raises(UsageError, match=r"that of step 1 is intact.*\(RESOURCE_EXHAUSTED: quota\)"):
        saved.save(2, {"a": jnp.ones(3)}, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    saved.close()


def test_a_journal_has_each_step_once(tmp_path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    with Journal(path, 2) as journal:
        journal.write({"step": 3, "loss": float("nan")})
    assert read(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_files_that_a_full_disk_does_not_take_are_named_and_old_ones_stay(tmp_path) -> None:
    path = tmp_path / "m.jsonl"
    said = rf"{path} could not be written \(No space left on device\): free some space and start again, a training with"
    with Journal(path, 0) as journal:
        journal.write({"step": 1})
    journal._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(UsageError, match=said):
        journal.write({"step": 2})
    with pytest.raises(UsageError, match=said):
        journal.__exit__(None, None, None)
    (tmp_path / "m.jsonl.part").symlink_to("/dev/full")
    with pytest.raises(UsageError, match=said):
        write_whole(b"other", path)
    assert read(path) == [{"step": 1}]
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_saves_and_ends_with_130(tmp_path, data_dir) -> None:
    given = [
        "--model", "mlp", "--steps", "100000", "--batch", "32", "--checkpoint-every", "50000", "--method", "dense",
        "--workdir", str(tmp_path), "--data-dir", str(data_dir), "--name", "c",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "train.main", *given],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    path = tmp_path / "c" / "dense" / "metrics.jsonl"
    last = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < 3:
        assert time.monotonic() < last
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert not error
    assert "a checkpoint was written: go on with --resume" in out
    steps = len(read(path))
    assert (tmp_path / "c" / "dense" / "checkpoints" / str(steps)).is_dir()


def test_a_finished_run_without_checkpoints_is_not_begun_anew_by_resume(tmp_path, data_dir) -> None:
    settings = make(tmp_path, data_dir, checkpoint_every=0, name="ck", steps=2, method="dense")
    loop.run(settings, Console(quiet=True))
    before = {path: path.read_bytes() for path in settings.folder.rglob("*") if path.is_file()}
    longer = config.change(settings, resume=True, steps=3)
    with pytest.raises(
        UsageError, match=r"dense has 2 steps on record and no checkpoint: start again with --overwrite"
    ):
        loop.run(longer, Console(quiet=True))
    assert {path: path.read_bytes() for path in settings.folder.rglob("*") if path.is_file()} == before
    with pytest.raises(UsageError, match=r"--resume --steps 1: .*dense has made 2 steps: give that many"):
        loop.run(config.change(longer, steps=1), Console(quiet=True))
    assert json.loads((settings.folder / "config.json").read_text())["steps"] == 2
    # As it is, it has finished, and goes on to its report; killed before its end, it has nothing to lose
    assert loop.run(config.change(settings, resume=True), Console(quiet=True))[0]["steps"] == 2
    (settings.folder / "dense" / "summary.json").unlink()
    console = Console(record=True, width=200, file=io.StringIO())
    assert loop.run(longer, console)[0]["steps"] == 3
    assert "dense has no checkpoint yet: begun anew" in console.export_text()
    assert [line["step"] for line in read(settings.folder / "dense" / "metrics.jsonl")] == [1, 2, 3]


def test_a_signal_in_the_last_step_finishes_this_training_and_begins_no_other(tmp_path, data_dir, monkeypatch) -> None:
    save = Checkpoints.save

    def heard(self, step, *rest):
        save(self, step, *rest)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", heard)
    settings = make(tmp_path, data_dir, name="late", steps=2, method="topk", dense_reference=True)
    with pytest.raises(Interrupted) as caught:
        loop.run(settings, Console(quiet=True))
    assert caught.value.number == signal.SIGTERM
    summary = json.loads((settings.folder / "topk" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 2)
    assert (settings.folder / "topk" / "checkpoints" / "2").is_dir()
    assert not (settings.folder / "dense").exists()
    monkeypatch.setattr(Checkpoints, "save", save)
    # Killed before it was summed up, it is scored anew, to the same bits
    (settings.folder / "topk" / "summary.json").unlink()
    model = settings.folder / "topk" / "model.msgpack"
    kept = model.read_bytes()
    model.unlink()
    found = loop.run(config.change(settings, resume=True), Console(quiet=True))
    assert [one["method"] for one in found] == ["topk", "dense"]
    assert found[0] == summary
    assert model.read_bytes() == kept


@pytest.mark.usefixtures("usual_signals")
def test_ctrl_c_while_phases_are_measured_leaves_them_out_and_nothing_else(tmp_path, data_dir, monkeypatch) -> None:
    monkeypatch.setattr(loop.phases, "measure", lambda *given: signal.raise_signal(signal.SIGINT))
    settings = make(tmp_path, data_dir, name="timed", steps=2, method="dense", phases=True)
    with pytest.raises(KeyboardInterrupt):
        loop.run(settings, Console(quiet=True))
    kept = {path.name for path in (settings.folder / "dense").iterdir()}
    assert kept >= {"summary.json", "model.msgpack"}
    assert loop.run(config.change(settings, resume=True), Console(quiet=True))[0]["steps"] == 2


class Cut(io.StringIO):
    """A pipe whose reader goes after the first evaluation."""

    def write(self, text: str) -> int:
        if "step 2 of 9" in text:
            raise BrokenPipeError
        return super().write(text)


def test_a_training_whose_output_nobody_reads_on_ends_with_a_checkpoint(tmp_path, data_dir) -> None:
    settings = make(tmp_path, data_dir, name="cut", steps=9, eval_every=2, method="dense")
    with pytest.raises(Interrupted) as caught:
        loop.run(settings, screen.Paper(file=Cut(), width=100))
    assert 128 + caught.value.number == 141
    assert (settings.folder / "dense" / "checkpoints" / "3").is_dir()


@pytest.mark.xdist_group("whole")
def test_the_state_that_is_kept_holds_all_that_a_step_changes(whole) -> None:
    header = json.loads(arrays(whole.folder / "partition")["header"])
    names = " ".join(header["names"])
    for part in (".params", ".memory.residual", ".weights", ".summary", ".key", ".trace"):
        assert part in names, part
    assert jax.tree.leaves(header["facts"])


def test_what_owners_owe_becomes_memory_where_shares_change() -> None:
    """The sum of memories, and of all devices times the debts, is the same, entry by entry."""
    tree = {"a": np.zeros((30, 7), np.float32), "b": np.zeros(5, np.float32)}
    random = np.random.default_rng(0)

    def state(devices: int):
        fresh = gp.partition_compress("w", ratio=4, exchange="reduce_scatter", devices=devices).init(tree)
        axes = gp.state_axes(fresh)
        rows = lambda x, axis: random.normal(size=(devices, *x.shape)).astype(np.float32) if axis == 0 else x  # noqa: E731
        return jax.tree.map(rows, fresh, axes)

    layout = layout_of(tree)
    saved, like = state(3), state(4)
    released = release((saved,), (like,), layout, 0, 3)[0]
    assert released.scheme.local.shape == (3, *like.scheme.local.shape[1:])
    assert not released.scheme.local.any()
    np.testing.assert_allclose(owed(released, layout), owed(saved, layout), rtol=1e-5, atol=1e-6)
    same = release((saved,), (state(3),), layout, 0, 3)[0]
    np.testing.assert_array_equal(same.scheme.local, saved.scheme.local)
