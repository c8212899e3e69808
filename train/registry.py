"""The methods of exchange that the training program knows by name.

A new method is one line in METHODS: its constructor takes the axis name first, and options by keyword. Those that it
has are the options that users may give; a `ratio` among them is the payload ratio asked for.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

import optax

import gradpart_jax as gp
from gradpart_jax import baselines
from train.rivals import density, kept, random_density, rank, rival, width


class Method(NamedTuple):
    """How a method is made, and how its payloads travel."""

    make: Callable[..., optax.GradientTransformation]
    gathers: bool = True  # payloads, which all devices get from all; otherwise it all-reduces
    budgeted: bool = True  # whether it can be asked for a ratio


METHODS: dict[str, Method] = {
    "partition": Method(gp.partition_compress),
    "dense": Method(gp.dense_mean, gathers=False, budgeted=False),
    "bfloat16": Method(rival(functools.partial(baselines.dense, "bfloat16")), gathers=False, budgeted=False),
    "topk": Method(rival(baselines.topk, "ratio", density())),
    "randomk": Method(rival(baselines.randomk, "ratio", random_density), gathers=False),
    "threshold": Method(rival(baselines.threshold, "ratio", density())),
    "dgc": Method(rival(baselines.dgc, "ratio", density(), momentum=0.9)),
    "gaussiank": Method(rival(baselines.gaussiank, "ratio", density(slack=1.25))),
    "redsync": Method(rival(baselines.redsync, "ratio", density(slack=2.0))),
    "sidco": Method(rival(baselines.sidco, "ratio", density(slack=1.25))),
    "scalecom": Method(rival(baselines.scalecom, "ratio", density()), gathers=False),
    "egc": Method(rival(baselines.egc, "ratio", density())),
    "oktopk": Method(rival(baselines.oktopk, "ratio", density(slack=2.5)), gathers=False),
    "lgc": Method(rival(baselines.lgc, "ratio", density(value_bits="code"))),
    "powersgd": Method(rival(baselines.powersgd, "rank", rank), gathers=False),
    "demo": Method(rival(baselines.demo, "keep", kept, memory_decay=0.999)),
    "qsgd": Method(rival(baselines.qsgd, "bits", width, error_feedback=False)),
    "terngrad": Method(rival(baselines.terngrad, error_feedback=False), budgeted=False),
    "signsgd": Method(rival(baselines.signsgd, error_feedback=False), gathers=False, budgeted=False),
    "ef_signsgd": Method(rival(baselines.ef_signsgd), budgeted=False),
    "onebit_sgd": Method(rival(baselines.onebit_sgd), budgeted=False),
    "natural": Method(rival(baselines.natural, error_feedback=False), budgeted=False),
    "int8": Method(rival(baselines.int8), budgeted=False),
}
PLAIN = ("dense", "bfloat16")  # uncompressed training, which nothing need be done for


def parameters(kind: str) -> Mapping[str, inspect.Parameter]:
    """List what a method's constructor takes.

    Args:
      kind: a name of METHODS.

    Returns:
      Its parameters by name.
    """
    return inspect.signature(METHODS[kind].make).parameters
