"""PowerSGD beside PyTorch's own communication hook: the same matrices on two processes, and a benchmark of both."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradpart_jax as gp
from train.bench import links, network

LACKS = links.missing()
TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed: pip install torch"
)
RANK, START, STEPS, W = 2, 2, 7, 2
SHAPES = {"bias": (7,), "kernel": (40, 50), "other": (24, 30)}
# One of two processes: DDP over gloo, with gradients that are given, and the hook's first Q replaced by ours
PROCESS = """
import sys
import numpy as np, torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
given = np.load(f"{folder}/given.npz")
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
names = ("bias", "kernel", "other")

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in names:
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(given[name].shape[2:])))

    def forward(self, step):
        return sum((getattr(self, name) * torch.from_numpy(given[name][step, rank])).sum() for name in names)

model = Model()
parallel = torch.nn.parallel.DistributedDataParallel(model)
state = power.PowerSGDState(
    None, matrix_approximation_rank=int(given["rank"]), start_powerSGD_iter=int(given["start"]), min_compression_rate=2
)
shapes = {model.get_parameter(name).shape: name for name in names}

def hook(state, bucket):
    if state.iter == state.start_powerSGD_iter and bucket.index() not in state.q_memory_dict:
        thin = [p for p in bucket.gradients() if p.ndim > 1]
        right = [torch.from_numpy(given["right_" + shapes[p.shape]]) for p in thin]
        state.q_memory_dict[bucket.index()] = torch.cat([q.flatten() for q in right])
        state.p_memory_dict[bucket.index()] = torch.zeros(sum(p.shape[0] * int(given["rank"]) for p in thin))
    return power.powerSGD_hook(state, bucket)

parallel.register_comm_hook(state, hook)
found = {name: [] for name in names}
for step in range(len(given["bias"])):
    model.zero_grad()
    parallel(step).backward()
    for name in names:
        found[name].append(model.get_parameter(name).grad.numpy().copy())
if rank == 0:
    np.savez(f"{folder}/found.npz", **{name: np.stack(all) for name, all in found.items()})
dist.destroy_process_group()
"""


@TORCH
def test_powersgd_averages_what_pytorchs_hook_averages(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    given = {n: rng.laplace(size=(STEPS, W, *s)) ** 3 + rng.normal(size=(STEPS, 1, *s)) for n, s in SHAPES.items()}
    given = {name: g.astype(np.float32) for name, g in given.items()}
    tx = gp.compress(gp.baselines.powersgd(RANK, start_step=START), "w")
    state = tx.init({name: jnp.zeros(shape) for name, shape in SHAPES.items()})
    right = {
        f"right_{n}": np.asarray(q[0]) for n, q in zip(("kernel", "other"), state.scheme.shared.right, strict=True)
    }
    np.savez(tmp_path / "given.npz", rank=RANK, start=START, **given, **right)
    command, environment = [sys.executable, "-c", PROCESS], os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(W)
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    found = np.load(tmp_path / "found.npz")
    update = jax.jit(jax.vmap(tx.update, axis_name="w"))
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (W, *x.shape)), state)
    for step in range(STEPS):
        out, state = update({name: jnp.asarray(g[step]) for name, g in given.items()}, state)
        for name in SHAPES:
            theirs = found[name][step]
            np.testing.assert_allclose(
                out[name][0], theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max(), err_msg=f"step {step}, {name}"
            )
    assert np.asarray(state.memory.residual).any()


@pytest.mark.slow
@TORCH
@pytest.mark.skipif(LACKS is not None, reason=str(LACKS))
def test_the_network_benchmark_trains_pytorchs_powersgd_over_links(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(network, "MODEL", [*network.MODEL, "--data-dir", str(tmp_path)])
    args = network.Args(
        hosts=2, rate="none,100mbit", methods="torch:powersgd:rank=1", steps=3, loss=5.0, loss_steps=60, timeout=150,
        json=tmp_path / "n.json", figure=tmp_path / "n.png",
    )  # fmt: skip
    network.main(args)
    found = json.loads((tmp_path / "n.json").read_text())["rows"]
    width, window, classes = 512, 16, 256
    matrices = [(classes, width), (window, width), *[(width, width)] * 4, (width, 4 * width), (4 * width, width)]
    matrices += [(width, classes)]
    others = 3 * 2 * width + 4 * width + 4 * width + width + classes  # three norms, and what is added after a matrix
    assert [row["rate"] for row in found] == [None, 1e8]
    for row in found:
        assert row["parameters"] == sum(n * m for n, m in matrices) + others
        assert row["link_bytes"] == 4 * (sum(n + m for n, m in matrices) + others)
        assert 0 < row["overhead"] < 0.3
        assert row["steps_to_loss"] is not None
        pieces = sum(row[key] for key in ("compute_s", "encode_s", "wire_s", "decode_s"))
        assert 0 < row["step_time_s"] < 10 * pieces < 60
    for kind in ("netns", "link"):
        said = subprocess.run(["ip", kind, "show"], capture_output=True, text=True, check=True).stdout
        assert f"{links.PREFIX}{os.getpid()}" not in said
