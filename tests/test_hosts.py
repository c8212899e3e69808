"""Several processes: the same bits as one, and what becomes of kills, absence, and hosts that differ."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from tests.processes import arrays, await_lines, child, ended, finish, metrics, same_arrays, start
from train import agree, check, config, launch, loop, placing
from train.errors import DivergedError

FEW = ["--model", "mlp", "--batch", "32", "--no-dense-reference", "--no-phases", "--devices", "4"]
# The second process alone hears SIGTERM, after the last step.
LATE = """
import signal, sys
from train import hosts
from train.checkpoint import Checkpoints
from train.main import main
save = Checkpoints.save
def heard(self, step, *rest):
    save(self, step, *rest)
    if step == 3 and hosts.index() == 1:
        signal.raise_signal(signal.SIGTERM)
Checkpoints.save = heard
sys.exit(main(sys.argv[1:]))
"""
STEPS = ["--steps", "60", "--eval-every", "30", "--checkpoint-every", "10"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are found by Linux's /proc")
@pytest.mark.parametrize("method", ["topk", pytest.param("partition", marks=pytest.mark.deep)])
def test_two_processes_whose_worker_and_leader_are_killed_end_with_the_bits_of_one(method, tmp_path, data_dir) -> None:
    options = [*FEW, *STEPS, "--method", method, "--workdir", str(tmp_path), "--data-dir", str(data_dir)]
    launched = start("-m", "train.launch", "--processes", "2", "--", *options, "--name", "two")
    written = tmp_path / "two" / method / "metrics.jsonl"
    for victim, lines in ((1, 12), (0, 35)):
        await_lines(written, lines, launched)
        os.kill(child(launched.pid, victim), signal.SIGKILL)
    said = finish(launched)
    assert launched.returncode == 0, said
    assert said.count("launch: a process was lost") == 2, said
    assert "[0] resumed at step" in said
    settings = config.make(
        model="mlp", batch=32, steps=60, eval_every=30, checkpoint_every=10, dense_reference=False, phases=False,
        workdir=tmp_path, data_dir=data_dir, name="one", devices=4, method=method,
    )  # fmt: skip
    check.check(settings)
    loop.run(settings, Console(quiet=True))
    one, two = tmp_path / "one" / method, tmp_path / "two" / method
    assert metrics(two) == metrics(one)
    same_arrays(arrays(60, two), arrays(60, one))
    assert (tmp_path / "two" / "report.html").exists()


def test_absent_and_differing_processes_end_in_one_clear_line_each(tmp_path, data_dir) -> None:
    options = [*FEW, "--workdir", str(tmp_path), "--data-dir", str(data_dir), "--processes", "2"]
    port = launch._free_port()
    here, nowhere = f"127.0.0.1:{port}", f"127.0.0.1:{launch._free_port()}"
    clip = (
        start("-m", "train.main", *options, "--coordinator", here, "--process", "0", "--clip", "1"),
        start("-m", "train.main", *options, "--coordinator", here, "--process", "1", "--clip", "2"),
    )
    alone = start("-m", "train.main", *options, "--coordinator", nowhere, "--process", "1", "--timeout", "3")
    silent = f"127.0.0.1:{launch._free_port()}"
    waits = start("-m", "train.main", *options, "--coordinator", silent, "--process", "0", "--timeout", "3")
    for process in clip:
        said = finish(process)
        assert process.returncode == 2, said
        assert "the hosts differ, and none trains: --clip is 1.0 on process 0" in said
        assert "2.0 on process 1" in said
    said = finish(alone)
    assert alone.returncode == 3, said
    assert f"error: nobody answers at --coordinator {nowhere} after 3 s" in said
    said = finish(waits)
    assert waits.returncode == 3, said
    assert "error: not all of the 2 processes have come within 3 s" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--coordinator", "127.0.0.1:7000"], "--coordinator needs --processes beside it"),
        (["--coordinator", "here", "--processes", "2", "--process", "0"], "--coordinator here is no HOST:PORT"),
        (
            ["--coordinator", "a.invalid:7", "--processes", "2", "--process", "1", "--timeout", "1"],
            "no host has the name a.invalid after 1 s",
        ),
        (
            ["--coordinator", "1.1.1.1:7", "--processes", "2", "--process", "2"],
            "--process 2 is out of range: give 0 to 1",
        ),
        (["--coordinator", "192.0.2.1:7", "--processes", "2", "--process", "0"], "process 0 cannot listen there"),
        (["--timeout", "0"], "--timeout 0 is out of range"),
    ],
)
def test_mistakes_of_hosts_are_one_line(given, words, tmp_path, capsys) -> None:
    from train import main

    assert main.main([*given, "--workdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_a_pod_that_cannot_find_the_others_says_what_it_lacks(tmp_path, monkeypatch, capsys) -> None:
    from train import main

    if importlib.util.find_spec("kubernetes") is not None:
        pytest.skip("the package kubernetes is installed")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "192.0.2.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert main.main(["--workdir", str(tmp_path)]) == 2
    assert "install jax[k8s], or give --coordinator" in capsys.readouterr().err


def test_open_mpi_that_does_not_say_where_processes_meet_is_refused(tmp_path, monkeypatch, capsys) -> None:
    from train import joining, main

    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert main.main(["--workdir", str(tmp_path)]) == 2
    assert "--processes 4 and --process $OMPI_COMM_WORLD_RANK" in capsys.readouterr().err
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://192.0.2.1:34911")
    assert joining.cluster() == "Open MPI"


def test_processes_that_have_not_met_do_not_train_each_for_itself(tmp_path, monkeypatch, capsys) -> None:
    from train import main

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert main.main(["--workdir", str(tmp_path)]) == 2
    assert "JAX runs in 4 processes here, and 1 have met" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--processes", "0", "--"], "--processes 0 is out of range"),
        (["--processes", "2", "--steps", "3"], "--steps is none of --processes, "),
        (["--process", "1", "--"], "--coordinator and --process go together"),
        (["--", "--process", "1"], "give it before --"),
        (["--", "--config", "/no/such"], "--config /no/such cannot be read"),
    ],
)
def test_mistakes_of_a_launch_are_said_before_anything_starts(given, words, capsys) -> None:
    assert launch.main(given) == 2
    assert words in capsys.readouterr().err


def test_a_launch_that_is_lost_before_its_run_folder_is_made_keeps_its_options(tmp_path, monkeypatch) -> None:
    given, settings = ["--overwrite", "--workdir", str(tmp_path), "--name", "run"], tmp_path / "run" / "config.json"
    resumed = [*given[1:], "--resume"]
    settings.parent.mkdir()
    settings.write_text("{}")
    group, started, waited = launch.Group(launch.Launch(restarts=20), given), [], []

    def once() -> int:
        started.append(group._given)
        if len(started) == 3:
            settings.unlink()
            settings.write_text("{ }")
        return 139 if len(started) < 20 else 0

    monkeypatch.setattr(group, "_once", once)
    monkeypatch.setattr(group, "_sleep", waited.append)
    assert group.run() == 0
    assert started == [given] * 3 + [resumed] * 17
    assert waited == [1, 2, 4, 8, 16] + [30] * 14


def test_a_launch_that_nobody_reads_starts_nothing_again(tmp_path, monkeypatch) -> None:
    group, statuses = launch.Group(launch.Launch(), ["--workdir", str(tmp_path)]), iter([139])
    group.unread = True
    monkeypatch.setattr(group, "_once", lambda: next(statuses))
    assert group.run() == 139


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="only Unix has terminals that hang up")
@pytest.mark.usefixtures("usual_signals")
def test_a_launcher_whose_terminal_is_closed_tells_its_processes(tmp_path, monkeypatch) -> None:
    group, left = launch.Group(launch.Launch(), ["--workdir", str(tmp_path)]), []
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]

    def once() -> int:
        group._running[0] = subprocess.Popen(sleeps, text=True)
        for _ in range(2):  # by the shell and by the system: not a second wish, which would not wait for a checkpoint
            signal.raise_signal(signal.SIGHUP)
        left.append(group._last - time.monotonic())
        return group._watch()

    monkeypatch.setattr(group, "_once", once)
    assert group.run() == 128 + signal.SIGHUP
    assert left[0] > launch.GRACE


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE")
def test_a_launch_that_nobody_reads_ends_its_processes_those_that_will_not_end_too(tmp_path) -> None:
    deaf = tmp_path / "deaf"
    deaf.write_text("#!/bin/sh\ntrap '' TERM\nwhile :; do echo line; done\n")
    deaf.chmod(0o700)
    work = f"import sys; from train import launch; sys.executable = {str(deaf)!r}; sys.exit(launch.main())"
    reads, writes = os.pipe()
    os.close(reads)
    # One: a second might be told to end before it is deaf
    command = [sys.executable, "-c", work, "--processes", "1", "--", "--timeout", "1", "--workdir", str(tmp_path)]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "launch: processes that do not end are killed\n")


@pytest.mark.slow
def test_a_signal_that_one_process_hears_too_late_ends_all_before_the_next_training(tmp_path, data_dir) -> None:
    given = ["--model", "mlp", "--batch", "32", "--no-phases", "--devices", "2", "--method", "topk", "--steps", "3"]
    given += ["--workdir", str(tmp_path), "--data-dir", str(data_dir), "--name", "late", "--processes", "2"]
    given += ["--coordinator", f"127.0.0.1:{launch._free_port()}", "--process"]
    running = [start("-c", LATE, *given, str(number)) for number in range(2)]
    with ended(running):
        said = [finish(process) for process in running]
    assert [process.returncode for process in running] == [128 + signal.SIGTERM] * 2, said
    assert "topk has finished; what comes after it is left: go on with --resume" in said[0]
    assert (tmp_path / "late" / "topk" / "summary.json").exists()
    assert not (tmp_path / "late" / "dense").exists()


@pytest.mark.slow
def test_a_host_with_a_disk_of_its_own_keeps_the_settings_that_a_run_goes_on_with(tmp_path, data_dir) -> None:
    """What is left there from before would be taken for the options of the next --resume."""
    given = [*FEW, "--devices", "2", "--method", "topk", "--data-dir", str(data_dir), "--name", "run"]
    given += ["--processes", "2", "--coordinator", f"127.0.0.1:{launch._free_port()}"]
    for more in (["--steps", "2"], ["--resume", "--steps", "4"]):
        where = [["--process", str(host), "--workdir", str(tmp_path / str(host))] for host in range(2)]
        running = [start("-m", "train.main", *given, *more, *host) for host in where]
        with ended(running):
            said = [finish(process) for process in running]
        assert [process.returncode for process in running] == [0, 0], said
    folders = [tmp_path / str(host) / "run" for host in range(2)]
    assert [json.loads((folder / "config.json").read_text())["steps"] for folder in folders] == [4, 4]
    assert [path.name for folder in folders for path in folder.glob(".*")] == []


def test_a_replica_that_differs_is_named_with_its_step() -> None:
    mesh = placing.mesh_of(4)
    sharding = NamedSharding(mesh, PartitionSpec())
    values = [np.ones(3, np.float32) for _ in range(4)]

    def made() -> jax.Array:
        shards = [jax.device_put(x, d) for x, d in zip(values, mesh.devices.flat, strict=True)]
        return jax.make_array_from_single_device_arrays((3,), sharding, shards)

    agree.check_replicas(7, {"x": made()}, {"x": None})
    values[2] = np.float32([1, 1, np.nextafter(np.float32(1), np.float32(2))])
    with pytest.raises(DivergedError, match=re.escape("differ after step 7: device 2 of process 0")):
        agree.check_replicas(7, {"x": made()}, {"x": None})


def test_rows_of_devices_go_onto_the_mesh_and_come_back() -> None:
    mesh = placing.mesh_of(4)
    tree = {"mine": np.arange(8.0, dtype=np.float32).reshape(4, 2), "all": np.ones(3, np.float32)}
    axes = {"mine": 0, "all": None}
    placed = placing.place(placing.own(tree, axes, mesh), axes, mesh)
    back = placing.rows(placed)
    for key, x in tree.items():
        np.testing.assert_array_equal(back[key], x)
    np.testing.assert_array_equal(placing.one(placed)["mine"], tree["mine"][:1])
