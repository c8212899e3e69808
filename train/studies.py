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


STDLIB = MappingProxyType({"data": "stdlib", "optimizer": "adam", "steps": 2000})
ABLATED = (
    "partition:local_steps=4",  # the default of a transformer
    "partition:local_steps=4,entropy_rule=entropy",
    "partition:local_steps=4,entropy_rule=perplexity",
    "partition:local_steps=4,learn_every=0",  # the predictor as it was trained beforehand
    "partition:local_steps=4,error_feedback=false",
    "topk:local_steps=4",  # no partition: exact, one region, float32 values
    "sidco:local_steps=4",  # a threshold by a closed-form fit
    "partition:local_steps=1",
    "partition:recipe=after",
    "partition:recipe=before",
    "partition:recipe=before,momentum=0.9",
)

STUDIES: Mapping[str, Study] = MappingProxyType(
    {
        "headline": Study(
            STDLIB,
            "dense,partition:local_steps=1,partition:local_steps=4,topk:local_steps=4,"
            "dgc:local_steps=4,momentum=none,powersgd:local_steps=4",
            "100",
            3,
        ),
        "headline-digits": Study(
            MappingProxyType({"data": "digits"}), "dense,partition,topk,dgc,powersgd", "100,300", 3
        ),
        "ablation": Study(MappingProxyType({**STDLIB, "steps": 1000}), "dense," + ",".join(ABLATED), "100", 1),
        "plane": Study(
            MappingProxyType({**STDLIB, "steps": 1000}),
            "dense," + ",".join(f"partition:local_steps={steps}" for steps in (1, 2, 4, 8, 16)),
            "30,100,300,1000",
            1,
        ),
    }
)
