"""Studies: named sets of trainings, as data, that `python -m train.compare --study NAME` reproduces from nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Study(NamedTuple):
    """What a comparison is asked for; every option can be overridden on the command line."""

    settings: Mapping[str, Any]  # options of a training, over those of its preset
    methods: str
    budgets: str
    seeds: int


# Each at the rate that is best for it: uncompressed Adam at 0.004; Adam on each device, compressed, at 0.01, and in a
# short training at 0.006
STDLIB = MappingProxyType({"data": "stdlib", "optimizer": "adam", "steps": 2000, "learning_rate": 0.01})
SHORT = MappingProxyType({**STDLIB, "steps": 600, "learning_rate": 0.006})
DENSE = "dense:learning_rate=0.004,"
# Every method that `train.methods` knows; options where a method needs one, or a rate of its own
RIVALS = (
    "partition,topk,{randomk},{threshold},{dgc},gaussiank,redsync,sidco,scalecom,egc,{oktopk},{lgc},powersgd,{demo},qsgd,"
    "terngrad,{signsgd},ef_signsgd,onebit_sgd,natural,int8,bfloat16"
)
ABLATED = (
    "partition",
    "partition:entropy_rule=entropy",
    "partition:entropy_rule=fixed",
    "partition:learn_every=0",  # the predictor as it was trained beforehand
    "partition:error_feedback=false",
    "topk",  # no partition: exact, one region, float32 values
    "sidco",  # a threshold by a closed-form fit
    "partition:nesterov=false",
    "partition:local_steps=2",
    "partition:local_steps=4",
    "partition:recipe=after",
    "partition:recipe=before",
    "partition:recipe=before,momentum=0.9",
)

STUDIES: Mapping[str, Study] = MappingProxyType(
    {
        "headline": Study(
            STDLIB,
            DENSE + "partition,partition:local_steps=2,topk,dgc:momentum=none,powersgd",
            "100",
            3,
        ),
        "headline-digits": Study(
            MappingProxyType({"data": "digits"}), "dense,partition,topk,dgc,powersgd", "100,300", 3
        ),
        "rivals": Study(
            MappingProxyType({**SHORT, "steps": 300}),
            DENSE
            + RIVALS.format(
                randomk="randomk",
                threshold="threshold:value=0.03",
                dgc="dgc:momentum=none",
                oktopk="oktopk",
                lgc="lgc:train_steps=50",
                demo="demo:recipe=before,learning_rate=0.002",
                signsgd="signsgd:recipe=before,learning_rate=0.004",
            ),
            "100",
            3,
        ),
        "rivals-digits": Study(
            MappingProxyType({"data": "digits"}),
            "dense,"
            + RIVALS.format(
                randomk="randomk:learning_rate=0.01",
                threshold="threshold:value=0.1",
                dgc="dgc",
                oktopk="oktopk:learning_rate=0.05",
                lgc="lgc:train_steps=100",
                demo="demo:recipe=before,learning_rate=0.0003",
                signsgd="signsgd:recipe=before,learning_rate=0.0003",
            ),
            "100",
            3,
        ),
        "ablation": Study(SHORT, DENSE + ",".join(ABLATED), "100", 1),
        "plane": Study(
            SHORT,
            DENSE + ",".join(f"partition:local_steps={steps}" for steps in (1, 2, 4, 8, 16)),
            "30,100,300,1000",
            1,
        ),
    }
)
