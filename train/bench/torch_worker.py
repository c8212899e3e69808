"""One host of a PyTorch training: DistributedDataParallel over gloo, with or without PyTorch's PowerSGD hook.

`network_torch` starts it on each host, with a folder, the host's number and its network interface. Nothing else imports
it, for it needs PyTorch.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

from train import pages

MOST_RANK = 256
LEAST_COMPRESSION = 2  # PyTorch's: a matrix must have more than this many times the elements of its factors
WARM, CALLS = 4, 20  # calls of a piece that are not timed, in the last of which the hook compresses; and that are


class Block(nn.Module):
    """A pre-normalised block: causal attention, and two dense layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.normal, self.normal_hidden = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Any) -> Any:
        """Map float[B, T, width] to the same."""
        normal = self.normal(x)
        query, key, value = (
            layer(normal).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(gelu(self.up(self.normal_hidden(x)), approximate="tanh"))


class Transformer(nn.Module):
    """`train.models.transformer` again, layer by layer, with as many parameters that start as widely spread."""

    def __init__(self, classes: int, width: int, layers: int, heads: int, window: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.positions = nn.Parameter(0.02 * torch.randn(window, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.normal, self.logits = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Any) -> Any:
        """Map int64[B, T] to logits float[B, T, classes]."""
        return self.logits(self.normal(self.blocks(self.embed(tokens) + self.positions)))


def rank_within(model: nn.Module, ratio: float) -> int:
    """Choose PowerSGD's rank.

    Args:
      model: to train.
      ratio: how many times fewer numbers to hand over than there are parameters.

    Returns:
      The highest rank within the ratio; 1 where none is.
    """
    sizes = [(p.shape[0], p.numel() // p.shape[0]) for p in model.parameters()]

    def cost(rank: int) -> int:
        thin = [(n * m, (n + m) * min(n, m, rank)) for n, m in sizes]
        return sum(low if low * LEAST_COMPRESSION < full else full for full, low in thin)

    elements = sum(n * m for n, m in sizes)
    return max((rank for rank in range(1, MOST_RANK + 1) if cost(rank) * ratio <= elements), default=1)


class Parallel:
    """A model whose backward pass exchanges its gradient.

    Args:
      model: the host's own.
      job: of the training.
      group: of processes; None for all.
    """

    def __init__(self, model: nn.Module, job: dict[str, Any], group: Any = None) -> None:
        self._elements, self._before, self._state = sum(p.numel() for p in model.parameters()), 0, None
        # The hook starts collectives from callbacks, which hosts may call in different orders where there are several
        # buckets; gloo then takes one's answer for another's, and ends
        whole = 4 * self._elements // 2**20 + 1 if job["compressed"] else None
        self.model = DistributedDataParallel(model, process_group=group, bucket_cap_mb=whole)
        if job["compressed"]:
            self._state = power.PowerSGDState(
                group, job["rank"], start_powerSGD_iter=job["start"], min_compression_rate=LEAST_COMPRESSION
            )
            self.model.register_comm_hook(self._state, power.powerSGD_hook)

    def words(self) -> int:
        """Say how many numbers the last step handed over, by the hook's own count of those it compressed."""
        if self._state is None:
            return self._elements
        counted = self._state.total_numel_after_compression
        new, self._before = counted - self._before, counted
        return new or self._elements


def backward(model: nn.Module, tokens: Any, labels: Any) -> float:
    """Compute the gradient, exchanged where the model does so; gives the loss."""
    model.zero_grad()
    loss = cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.item()


def apply(model: nn.Module, optimizer: Any, rate: float, clip: float) -> None:
    """Take the optimizer's step."""
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def adam(model: nn.Module, job: dict[str, Any]) -> Any:
    """Make the optimizer."""
    return torch.optim.Adam(model.parameters(), betas=(job["b1"], job["b2"]))


def measure(model: nn.Module, job: dict[str, Any], tokens: Any, labels: Any) -> dict[str, float]:
    """Time the pieces of a step, each on all hosts at once, on copies of the model.

    Args:
      model: to train; it stays as it is.
      job: of the training.
      tokens: of a step.
      labels: of a step.

    Returns:
      Medians in seconds. Encoding and decoding are one figure: what a step takes longer where the host is in a group
      by itself, and so has no wire. The wire is a bare all-reduce of as many numbers.
    """
    plain = copy.deepcopy(model)
    compute, optimizer = _median(lambda: backward(plain, tokens, labels)), adam(plain, job)
    step = _median(lambda: apply(plain, optimizer, job["rates"][-1], job["clip"]))
    alone = Parallel(copy.deepcopy(model), job, dist.new_subgroups(1)[0])
    counts: list[int] = []

    def encode() -> None:
        backward(alone.model, tokens, labels)
        counts.append(alone.words())

    coded = _median(encode)
    words = torch.zeros(counts[-1])
    wire = _median(lambda: dist.all_reduce(words))
    coded = max(0.0, coded - compute)
    return {"forward_backward": compute, "optimizer": step, "encode": coded, "wire": wire, "decode": 0.0}


def _median(call: Callable[[], object]) -> float:
    dist.barrier()
    times = []
    for _ in range(WARM + CALLS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times[WARM:]))


def train(model: nn.Module, job: dict[str, Any], tokens: Any, labels: Any, path: Path) -> None:
    """Train, and write a line for each step.

    Args:
      model: the host's own.
      job: of the training.
      tokens: int64[steps, 1, T].
      labels: of each token.
      path: of the lines.
    """
    parallel, optimizer = Parallel(model, job), adam(model, job)
    hosts, link, began = job["hosts"], 0.0, time.perf_counter()
    dist.barrier()
    with path.open("w", buffering=1) as file:
        for number, rate in enumerate(job["rates"]):
            loss = backward(parallel.model, tokens[number], labels[number])
            apply(parallel.model, optimizer, rate, job["clip"])
            link += 2 * (hosts - 1) / hosts * 4 * parallel.words()
            seconds = time.perf_counter() - began
            line = {"step": number + 1, "seconds": seconds, "link_bytes": link, "loss": loss}
            file.write(json.dumps(line) + "\n")


def main(folder: Path, host: int, interface: str) -> None:
    """Measure, and train.

    Args:
      folder: of job.json and batches.npz; metrics-HOST.jsonl and, by host 0, phases.json are written there.
      host: the number of this one.
      interface: of the network.
    """
    pages.keep()
    job = json.loads((folder / "job.json").read_text())
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    # As many as there are cores for each: where more threads spin than there are cores, all wait for each other
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // job["hosts"]))
    torch.manual_seed(job["seed"])
    waits = datetime.timedelta(seconds=job["timeout"])
    dist.init_process_group("gloo", f"tcp://{job['coordinator']}", waits, job["hosts"], host)
    model = Transformer(**job["model"])
    if job["compressed"] and job["rank"] is None:
        job["rank"] = rank_within(model, job["ratio"])
    batches = np.load(folder / "batches.npz")
    tokens, labels = (torch.from_numpy(batches[key][:, host : host + 1].astype(np.int64)) for key in ("input", "label"))
    phases = measure(model, job, tokens[0], labels[0])
    if host == 0:
        parameters = sum(p.numel() for p in model.parameters())
        (folder / "phases.json").write_text(json.dumps(phases | {"parameters": parameters, "rank": job["rank"]}))
    train(model, job, tokens, labels, folder / f"metrics-{host}.jsonl")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
