"""Studies: named sets of trainings, as data, that `python -m train.compare --study NAME` reproduces from nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

from train.registry import METHODS

StudyName: TypeAlias = Literal[
    "headline",
    "headline-muon",
    "headline-digits",
    "headline-resnet20",
    "rivals",
    "rivals-digits",
    "budgets",
    "ablation",
    "plane",
]


class Study(NamedTuple):
    """What a comparison is asked for; every option can be overridden on the command line."""

    settings: Mapping[str, Any]  # options of a training, over those of its preset
    methods: str
    budgets: str
    seeds: int


def named(names: Iterable[str], options: Mapping[str, str]) -> str:
    """Name methods, each with options where it needs one, or a rate of its own."""
    return ",".join(f"{name}:{options[name]}" if name in options else name for name in names)


# Each at the rate that is best for it. Rivals go without agreement, as they were published, and as each was tuned.
STDLIB = MappingProxyType(
    {"data": "stdlib", "optimizer": "adam", "steps": 2000, "learning_rate": 0.005, "schedule": "linear"}
)
SHORT = MappingProxyType({**STDLIB, "steps": 600, "schedule": "cosine"})
RESNET = MappingProxyType({"data": "digits", "model": "resnet20", "image_size": 32, "batch": 64, "steps": 900})
TELLING = MappingProxyType({**SHORT, "steps": 300, "learning_rate": 0.006, "agreement": 0.0})
TUNED = MappingProxyType(
    {
        "dense": "learning_rate=0.004",
        "threshold": "value=0.03,keep_own=0.3",
        "dgc": "momentum=none",
        "lgc": "train_steps=50",
        "demo": "recipe=before,learning_rate=0.002",
        "signsgd": "recipe=before,learning_rate=0.004",
    }
)
TUNED_DIGITS = MappingProxyType(
    {
        "randomk": "learning_rate=0.01",
        "threshold": "value=0.1",
        "oktopk": "learning_rate=0.05",
        "lgc": "train_steps=100",
        "demo": "recipe=before,learning_rate=0.0003",
        "signsgd": "recipe=before,learning_rate=0.0003",
    }
)
DENSE = f"dense:{TUNED['dense']},"
AGREEING = "partition:agreement=0.05,learning_rate=0.005,"
COMPARED = ("partition", "topk", "dgc", "sidco", "demo", "powersgd", "ef_signsgd")
ABLATED = (
    "partition",
    "partition:agreement=0,learning_rate=0.006",
    "partition:entropy_rule=entropy",
    "partition:entropy_rule=fixed",
    "partition:learn_every=0",  # the predictor as it was trained beforehand
    "partition:error_feedback=false",
    "topk:agreement=0,learning_rate=0.006",  # no partition: exact, one region, float32 values
    "sidco:agreement=0,learning_rate=0.006",  # a threshold by a closed-form fit
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
            "dense:learning_rate=0.006,partition,topk,dgc:momentum=none,"
            "powersgd:agreement=0,keep_own=0.3,learning_rate=0.006",
            "100",
            3,
        ),
        "headline-muon": Study(
            MappingProxyType({**STDLIB, "optimizer": "muon"}),
            "dense:learning_rate=0.01,partition:learning_rate=0.02",
            "100",
            3,
        ),
        "headline-digits": Study(
            MappingProxyType({"data": "digits"}), "dense,partition,topk,dgc,powersgd", "100,300", 3
        ),
        "headline-resnet20": Study(RESNET, "dense,partition", "100", 3),
        "rivals": Study(TELLING, named(METHODS, TUNED), "100", 3),
        "rivals-digits": Study(MappingProxyType({"data": "digits"}), named(METHODS, TUNED_DIGITS), "100", 3),
        "budgets": Study(TELLING, DENSE + AGREEING + named(COMPARED, TUNED), "30,100,300,1000", 3),
        "ablation": Study(SHORT, DENSE + ",".join(ABLATED), "100", 1),
        "plane": Study(
            SHORT,
            DENSE + ",".join(f"partition:local_steps={steps}" for steps in (1, 2, 4, 8, 16)),
            "30,100,300,1000",
            1,
        ),
    }
)
