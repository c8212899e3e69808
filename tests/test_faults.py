"""Faults, each with real processes: links that are cut, a host that stalls, gradients that are not finite, odd data."""

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.processes import arrays, await_lines, child, ended, finish, metrics, same_arrays, same_metrics, start
from train import check, config, launch, loop, parts
from train.bench import links
from train.log import read

LACKS = links.missing()
PROC = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are found by Linux's /proc")
SPACES = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))
STEPS = 60
OPTIONS = ["--model", "mlp", "--method", "topk", "--batch", "32", "--devices", "2"]
OPTIONS += ["--no-dense-reference", "--no-phases", "--name", "run"]
UNTIL = ["--steps", str(STEPS), "--eval-every", "30", "--checkpoint-every", "10"]

# On the second host the first training example has another label.
ODD_DATA = """
import sys
from train import data, hosts
from train.main import main
load = data.load
def changed(*given, **named):
    found = load(*given, **named)
    if not hosts.index():
        return found
    def read(numbers):
        batch = found.train.read(numbers)
        return batch | {"label": (batch["label"] + (numbers == 0)) % 10}
    return found._replace(train=found.train._replace(read=read))
data.load = changed
sys.exit(main(sys.argv[1:]))
"""
# At step 5 a pixel of the second host is what comes first on the command line. One above 1000 gives a loss that is
# finite and, as a root does at 0, a gradient that is not.
ODD_STEP = """
import sys
import jax, jax.numpy as jnp
from train import hosts, session, step
from train.main import main
pixel = float(sys.argv[1])
gradient_of, batches = step.gradient_of, session.batches
def steep(network, state, batch, key):
    gradient, *rest = gradient_of(network, state, batch, key)
    odd = jnp.any(batch["input"] > 1000)
    return jax.tree.map(lambda x: jnp.where(odd, jnp.inf, x), gradient), *rest
def odd_at_step_5(config, split, start):
    for number, batch in enumerate(batches(config, split, start), start + 1):
        batch = {key: x.copy() for key, x in batch.items()}
        if hosts.index() == 1 and number == 5:
            batch["input"].flat[0] = pixel
        yield batch
step.gradient_of, session.batches = steep, odd_at_step_5
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data_dir) -> Path:
    """One process's run folder."""
    settings = config.make(
        model="mlp", method="topk", batch=32, devices=2, steps=STEPS, eval_every=30, checkpoint_every=10,
        dense_reference=False, phases=False, workdir=tmp_path_factory.mktemp("runs"), data_dir=data_dir, name="run",
    )  # fmt: skip
    check.check(settings)
    loop.run(settings, Console(quiet=True))
    return settings.folder / "topk"


def pair(code: str, *given: str) -> list[subprocess.Popen]:
    """Start two processes of a program that is given as text."""
    coordinator = ["--processes", "2", "--coordinator", f"127.0.0.1:{launch._free_port()}"]
    return [start("-c", code, *given, *coordinator, "--process", str(number)) for number in range(2)]


@SPACES
def test_a_full_link_that_becomes_slower_goes_on() -> None:
    """What waits in a shaper may be longer than what a slower one ever lets through."""
    get = "import socket as s; c, _ = s.create_server(('', 7001)).accept()\nwhile c.recv(1 << 20): pass"
    put = "import socket as s; s.create_connection(('{}', 7001), 9).sendall(bytes(4_000_000))"
    with links.Links(2, "100mbit") as net:
        receiver = start("-c", get, before=net.command(0))
        while b":1B59" not in subprocess.check_output([*net.command(0), "cat", "/proc/net/tcp"]):
            time.sleep(0.05)
        sender = start("-c", put.format(net.address(0)), before=net.command(1))
        with links.ended([receiver, sender]):
            while net.sent()[1] < 1_000_000:
                time.sleep(0.01)
            net.shape("20mbit")
            assert not finish(sender, 30)
            assert not finish(receiver, 30)
            assert sender.returncode == receiver.returncode == 0


@pytest.mark.slow
@SPACES
def test_a_link_that_is_cut_ends_both_hosts_within_bounds_and_namespaces_are_taken_down(tmp_path, data_dir) -> None:
    given = [*OPTIONS, "--steps", "1000000", "--eval-every", "1000000", "--data-dir", str(data_dir)]
    given += ["--heartbeat", "6", "--timeout", "120", "--processes", "2"]
    with links.Links(2, "100mbit") as net:
        coordinator = ["--coordinator", f"{net.address(0)}:7000"]
        running = [
            start(
                "-m", "train.main", *given, *coordinator, "--process", str(host), "--workdir", str(tmp_path / str(host)),
                before=net.command(host),
            )
            for host in range(2)
        ]  # fmt: skip
        with ended(running):
            await_lines(tmp_path / "0" / "run" / "topk" / "metrics.jsonl", 5, running[0])
            sent = net.sent()
            assert all(x > 10_000 for x in sent)
            net.cut(1)
            said = [finish(process, 60) for process in running]
        assert all(process.returncode not in (0, None) for process in running)
        assert all("lost touch" in text or "JAX distributed service detected fatal errors" in text for text in said)
        tag = net.command(0)[3].removesuffix("n0")
    for kind in ("netns", "link"):
        assert tag not in subprocess.run(["ip", kind, "show"], capture_output=True, text=True, check=True).stdout
    assert links.clean() == 0


@pytest.mark.slow
@PROC
@SPACES
def test_a_link_that_is_cut_and_restored_leaves_what_an_undisturbed_run_leaves(tmp_path, data_dir, undisturbed) -> None:
    options = [*OPTIONS, *UNTIL, "--data-dir", str(data_dir), "--heartbeat", "6", "--timeout", "120"]
    with links.Links(2, "100mbit") as net:
        named = ["--coordinator", f"{net.address(0)}:7000", "--processes", "2", "--process"]
        # Each host has a disk of its own
        launched = [
            start(
                "-m", "train.launch", *named, str(host), "--", *options, "--workdir", str(tmp_path / str(host)),
                before=net.command(host),
            )
            for host in range(2)
        ]  # fmt: skip
        with ended(launched):
            await_lines(tmp_path / "0" / "run" / "topk" / "metrics.jsonl", 12, launched[0])
            first = [child(process.pid, host) for host, process in enumerate(launched)]
            net.cut(1)
            last = time.monotonic() + 90
            while any(Path(f"/proc/{pid}").exists() for pid in first):
                assert time.monotonic() < last, "no end after the link was cut"
                time.sleep(0.1)
            net.cut(1, restore=True)
            said = [finish(process) for process in launched]
    assert [process.returncode for process in launched] == [0, 0], said
    assert all("launch: a process was lost" in text for text in said), said
    assert "resumed at step" in said[0]
    folders = [tmp_path / str(host) / "run" / "topk" for host in range(2)]
    same_metrics(metrics(folders[0]), metrics(undisturbed))
    same_arrays(arrays(STEPS, *folders), arrays(STEPS, undisturbed))


@pytest.mark.slow
@PROC
def test_a_host_that_stalls_is_waited_for_and_changes_nothing(tmp_path, data_dir, undisturbed) -> None:
    options = [*OPTIONS, *UNTIL, "--data-dir", str(data_dir), "--workdir", str(tmp_path)]
    launched = start("-m", "train.launch", "--processes", "2", "--", *options)
    with ended([launched]):
        written = tmp_path / "run" / "topk" / "metrics.jsonl"
        await_lines(written, 12, launched)
        slow = child(launched.pid, 1)
        os.kill(slow, signal.SIGSTOP)
        time.sleep(1)
        done = written.read_bytes()
        time.sleep(3)
        assert written.read_bytes() == done
        assert done.count(b"\n") < STEPS
        os.kill(slow, signal.SIGCONT)
        said = finish(launched)
    assert launched.returncode == 0, said
    assert "a process was lost" not in said
    same_metrics(metrics(tmp_path / "run" / "topk"), metrics(undisturbed))
    same_arrays(arrays(STEPS, tmp_path / "run" / "topk"), arrays(STEPS, undisturbed))


def parameters(folder: Path, step: int) -> dict[str, np.ndarray]:
    part = parts.load(folder / "checkpoints" / str(step))
    return {name: part.arrays[str(i)] for i, name in enumerate(part.header["names"]) if name.startswith(".params")}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["before", pytest.param("local", marks=pytest.mark.deep)])
def test_a_gradient_that_is_not_finite_on_one_host_is_left_out_and_counted(recipe, tmp_path, data_dir) -> None:
    given = [*OPTIONS, "--checkpoint-every", "1", "--check-every", "1", "--momentum", "0", "--recipe", recipe]
    given += ["--data-dir", str(data_dir), "--workdir", str(tmp_path)]
    folder = tmp_path / "run" / "topk"
    for options in (["--steps", "5"], ["--steps", "7", "--resume"]):
        running = pair(ODD_STEP, "1e4", *given, *options)
        with ended(running):
            said = [finish(process) for process in running]
        # Replicas are compared after each step
        assert [process.returncode for process in running] == [0, 0], said
        if "--resume" not in options:
            before, at = parameters(folder, 4), parameters(folder, 5)
    # Process 0 writes these, whose own gradients are all sound
    assert [line["nonfinite"] for line in read(folder / "metrics.jsonl")] == [0, 0, 0, 0, 1, 1, 1]
    after = parameters(folder, 7)
    assert before
    for name, x in before.items() if recipe == "before" else ():
        # Where changes meet, and not gradients, the other host takes its step
        np.testing.assert_array_equal(at[name], x)
    assert any((after[name] != x).any() for name, x in at.items())


def test_a_loss_that_is_not_finite_on_one_host_ends_all_with_the_step_named(tmp_path, data_dir) -> None:
    given = [*OPTIONS, "--steps", "8", "--checkpoint-every", "0", "--data-dir", str(data_dir)]
    running = pair(ODD_STEP, "nan", *given, "--workdir", str(tmp_path))
    with ended(running):
        for process in running:
            said = finish(process)
            assert process.returncode == 1, said
            assert "error: the loss of step 5 (topk) is nan: lower --learning-rate or --clip, and start again" in said
            assert "checkpoints before it" not in said
    assert len(read(tmp_path / "run" / "topk" / "metrics.jsonl")) == 4


def test_data_that_differ_between_hosts_are_named_and_nobody_trains(tmp_path, data_dir) -> None:
    running = pair(ODD_DATA, *OPTIONS, *UNTIL, "--data-dir", str(data_dir), "--workdir", str(tmp_path))
    with ended(running):
        for process in running:
            said = finish(process)
            assert process.returncode == 2, said
            assert "the hosts differ, and none trains: training split of --data digits is 1497 examples, " in said
            assert "on process 1" in said
            assert "test split" not in said
    assert not list(tmp_path.rglob("metrics.jsonl"))
