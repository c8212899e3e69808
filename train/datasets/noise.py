"""Random pictures of CIFAR's shape, compressed as CIFAR is in tfds: what the input is timed with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

SHAPE = (32, 32, 3)
EXAMPLES = {"train": 10_000, "test": 100}


class GradpartNoise(tfds.core.GeneratorBasedBuilder):
    """Smooth random pictures with random labels."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Ten thousand pictures."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Random pictures to time a training program's input with.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=SHAPE, encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split, count) for split, count in EXAMPLES.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        from PIL import Image

        random = np.random.default_rng(len(split))
        for number in range(count):
            # A few colours, smoothly joined, and some grain: about as many bytes as a photograph
            coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize(SHAPE[:2])
            grain = random.integers(-4, 5, SHAPE)
            picture = np.clip(np.asarray(coarse).astype(np.int64) + grain, 0, 255).astype(np.uint8)
            yield number, {"image": Image.fromarray(picture), "label": int(random.integers(10))}
