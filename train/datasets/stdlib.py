"""The Python standard library's own source, as bytes: about ten megabytes of text that every machine has."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

TEST_EVERY = 20
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def files() -> list[Path]:
    """List the source files, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts))


class GradpartStdlib(tfds.core.GeneratorBasedBuilder):
    """Python source, one example a file; every twentieth file is for testing."""

    # Another Python has another library, and a copy of its own
    VERSION = tfds.core.Version(".".join(map(str, sys.version_info[:3])))
    RELEASE_NOTES = {str(VERSION): "Every twentieth file is a test file."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The source of the running Python's standard library.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Tensor(shape=(None,), dtype=np.uint8)}),
            metadata=tfds.core.MetadataDict(classes=256),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, path in enumerate(files()):
            content = np.frombuffer(path.read_bytes(), np.uint8)
            if (i % TEST_EVERY == 0) == test and content.size:
                yield i, {"text": content}
