"""Data: what sets are accepted and how, the order, each process's share, augmentation, reading ahead."""

import io
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

from train import data
from train.bench import __main__ as bench
from train.data import images, texts
from train.data.augment import flip_crop
from train.data.load import Source
from train.data.prefetch import prefetched
from train.datasets import noise
from train.errors import UsageError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def split_of(size: int, shape: tuple[int, ...] = (4, 4, 1)) -> data.Split:
    inputs = np.arange(size * np.prod(shape), dtype=np.float32).reshape(size, *shape)
    return data.Split(size, lambda numbers: {"input": inputs[numbers], "label": numbers.astype(np.int32)})


def take(count: int, *arguments: Any, **options: Any) -> list[data.Batch]:
    """So many batches; the background thread ends with the test."""
    source = data.batches(*arguments, **options)
    found = [next(source) for _ in range(count)]
    source.close()
    return found


@given(st.integers(1, 40), st.integers(0, 100), st.integers(0, 30))
def test_order_is_a_function_of_seed_and_step(size: int, seed: int, start: int) -> None:
    split = data.Split(40, lambda numbers: {"n": numbers})
    rounds = 40 // size
    whole = [b["n"] for b in take(start + rounds, split, size, seed, 0, prefetch=0)]
    later = [b["n"] for b in take(rounds, split, size, seed, start, prefetch=0)]
    np.testing.assert_array_equal(whole[start:], later)
    epoch = np.concatenate(whole[:rounds])
    assert len(set(epoch.tolist())) == epoch.size


@given(
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 5),
    st.integers(0, 20),
    st.sampled_from([None, "flip-crop"]),
    st.integers(0, 3),
)
def test_shares_of_all_processes_make_the_global_batch(
    processes: int, share: int, start: int, augment: str | None, prefetch: int
) -> None:
    split, size = split_of(24), processes * share
    whole = take(3, split, size, 5, start, augment=augment, prefetch=0)
    parts = [
        take(3, split, size, 5, start, process=p, processes=processes, augment=augment, prefetch=prefetch)
        for p in range(processes)
    ]
    for at, batch in enumerate(whole):
        for key, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[at][key] for part in parts]), value)


@given(st.integers(0, 5), st.integers(0, 100), st.integers(5, 20), st.integers(5, 20), st.integers(1, 3))
def test_augmentation_equals_one_image_at_a_time(seed: int, step: int, height: int, width: int, channels: int) -> None:
    found = np.random.default_rng(0).normal(size=(6, height, width, channels)).astype(np.float32)
    pad = max(1, min(height, width) // 8)
    result = flip_crop(found, seed, step, 0, 6)
    # Each result is one of the windows of the padded image or its mirror image.
    for image, made in zip(found, result, strict=True):
        choices = []
        for face in (image, image[:, ::-1]):
            padded = np.pad(face, ((pad, pad), (pad, pad), (0, 0)))
            choices += [
                padded[top : top + height, left : left + width]
                for top in range(2 * pad + 1)
                for left in range(2 * pad + 1)
            ]
        assert any(np.array_equal(made, choice) for choice in choices)


def test_augmentation_differs_by_step_and_seed_and_leaves_its_input_alone() -> None:
    found = np.random.default_rng(0).normal(size=(64, 16, 16, 3)).astype(np.float32)
    kept = found.copy()
    a, again, b, c = (flip_crop(found, *key, 0, 64) for key in ((0, 1), (0, 1), (0, 2), (1, 1)))
    np.testing.assert_array_equal(a, again)
    assert not np.array_equal(a, b)
    assert not np.array_equal(a, c)
    np.testing.assert_array_equal(found, kept)
    # An image comes back as it was in one of 5 x 5 places and one of 2 faces.
    same = [
        np.array_equal(made, image)
        for step in range(20)
        for made, image in zip(flip_crop(found, 0, step, 0, 64), found, strict=True)
    ]
    assert 0.5 / 50 < np.mean(same) < 2 / 50


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 41}, "--batch 41 is more than the 40 training examples: use a smaller one"),
        ({"processes": 3}, "--batch 32 does not divide among 3 processes: use --batch 33"),
        ({"augment": "blur"}, "--augment blur is unknown: choose one of flip-crop"),
    ],
)
def test_mistakes_are_said_before_the_first_batch(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        data.batches(split_of(40), **({"size": 32, "seed": 0, "start": 0} | options))


def waiting() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "prefetch"}


def test_errors_of_the_thread_come_in_their_place() -> None:
    def source():
        yield 1
        yield 2
        raise OSError("the disk is gone")

    found = prefetched(source(), 4)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)
    with pytest.raises(StopIteration):
        next(found)
    assert list(prefetched(iter(range(5)), 2)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("taken", [1, 3])
def test_the_thread_ends_with_its_consumer(taken: int) -> None:
    before = waiting()
    source = data.batches(split_of(8), 2, 0, 0)
    for _ in range(taken):
        next(source)
    assert waiting() - before
    time.sleep(0.02)  # the thread waits for room
    source.close()
    assert not waiting() - before
    # And with one that is only forgotten
    source = data.batches(split_of(8), 2, 0, 0)
    next(source)
    del source
    assert not waiting() - before


def test_reading_goes_on_while_the_consumer_works() -> None:
    started = threading.Event()

    def source():
        yield 0
        yield 1
        started.set()
        yield 2

    found = prefetched(source(), 2)
    next(found)
    assert started.wait(5)
    found.close()


def test_a_read_that_hangs_does_not_keep_the_program_from_ending() -> None:
    code = (
        "import threading, numpy as np\n"
        "from train import data\n"
        "def read(numbers):\n"
        "    if hung.is_set(): threading.Event().wait()\n"
        "    hung.set()\n"
        "    return {'input': numbers, 'label': numbers}\n"
        "hung = threading.Event()\n"
        "source = data.batches(data.Split(8, read), 2, 0, 0)\n"
        "next(source)\n"
        "raise SystemExit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (3, b"")


def test_digits_are_scikit_learns(data_dir: Path) -> None:
    from sklearn.datasets import load_digits

    found, source = data.load("digits", data_dir), load_digits()
    assert (found.inputs, found.classes, found.kind) == ((8, 8, 1), 10, "image")
    assert found.train.size + found.test.size == len(source.target)
    inputs = np.concatenate([split.read(np.arange(split.size))["input"] for split in (found.train, found.test)])
    ours, theirs = (np.sort(x.reshape(len(x), -1).sum(1)) for x in ((inputs + 0.5) * 16, source.images))
    np.testing.assert_allclose(ours, theirs, atol=1e-2)


def test_text_is_cut_into_windows_that_predict_the_next_byte(data_dir: Path) -> None:
    found = data.load("stdlib", data_dir, window=32)
    # Of this Python, and of no other one
    assert (data_dir / "gradpart_stdlib" / ".".join(map(str, sys.version_info[:3]))).is_dir()
    assert (found.inputs, found.classes, found.kind) == ((32,), 256, "text")
    batch = found.train.read(np.array([0, 1, 7]))
    np.testing.assert_array_equal(batch["input"][:, 1:], batch["label"][:, :-1])
    assert batch["label"][0, -1] == batch["input"][1, 0]
    assert found.test.size <= texts.EVALUATED
    with pytest.raises(UsageError, match="--window 0 is out of range for --data stdlib, which has a split of"):
        data.load("stdlib", data_dir, window=0)


@pytest.mark.parametrize(
    ("name", "options", "inputs", "classes"),
    [
        ("cifar10", {}, (32, 32, 3), 10),
        ("mnist", {}, (28, 28, 1), 10),
        ("imagenette/160px-v2", {}, (128, 128, 3), 10),
        ("tf_flowers", {}, (64, 64, 3), 5),
        ("cifar100", {"image_size": 16}, (16, 16, 3), 100),
    ],
)
def test_image_sets_of_tfds(
    name: str, options: dict[str, int], inputs: tuple[int, ...], classes: int, tmp_path
) -> None:
    with tfds.testing.mock_data(num_examples=40):
        found = data.load(name, tmp_path, **options)
        assert (found.inputs, found.classes, found.kind) == (inputs, classes, "image")
        assert found.train.size == found.test.size == 40
        batch = take(2, found.train, 20, 0, 0, augment="flip-crop")[1]
        whole = found.train.read(np.arange(40))
        again = found.train.read(np.array([7, 3, 7]))
    assert batch["input"].shape == (20, *inputs)
    assert batch["label"].dtype == np.int32
    assert whole["input"].dtype == np.float32
    np.testing.assert_array_equal(whole["input"][[7, 3, 7]], again["input"])
    np.testing.assert_allclose(whole["input"].mean(axis=(0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(whole["input"].std(axis=(0, 1, 2)), 1, atol=1e-3)


@pytest.mark.parametrize("name", ["lm1b", "imdb_reviews", "tiny_shakespeare"])
def test_text_sets_of_tfds(name: str, tmp_path) -> None:
    with tfds.testing.mock_data(num_examples=40):
        found = data.load(name, tmp_path, window=16)
        batch = take(1, found.train, 8, 0, 0)[0]
    assert (found.inputs, found.classes, found.kind) == ((16,), 256, "text")
    assert set(np.unique(batch["input"])) <= set(b" abcdefghij\n")


def test_a_split_too_short_for_a_window_is_named() -> None:
    long, short, empty = ([{"text": text}] for text in (b"word " * 100, b"word", b""))
    assert texts.dataset("mine", "text", long, short, 4).test.size == 1
    with pytest.raises(
        UsageError, match="--window 64 is out of range for --data mine, which has a split of 5 bytes: give"
    ):
        texts.dataset("mine", "text", long, short, 64)
    with pytest.raises(UsageError, match="--data mine has too little text to learn from or to test on: choose another"):
        texts.dataset("mine", "text", long, empty, 64)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_data", "--data no_such_data is unknown to tfds: digits, stdlib are embedded"),
        ("cifar10/no_such_config", "--data cifar10/no_such_config is unknown to tfds"),
        ("mnist", "--data mnist is not prepared as array_record: run `pip install -e '.[tfds]' && tfds build mnist"),
        ("kitti", "--data kitti has neither text nor images (height, width, channels) with a ClassLabel each"),
        ("kitti", "but image (Image of None x None x 3), image/file_name (Text), objects (Sequence)"),
    ],
)
def test_sets_that_cannot_be_used(name: str, words: str, tmp_path) -> None:
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        data.load(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_image_size_is_checked(tmp_path) -> None:
    with tfds.testing.mock_data(num_examples=4), pytest.raises(UsageError, match="--image-size 2 is out of range"):
        data.load("cifar10", tmp_path, image_size=2)


def test_an_unwritable_data_folder_is_said_in_one_line(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--data digits cannot be written to .*: choose another --data-dir"):
        data.load("digits", tmp_path / "file")


class GradpartPictures(tfds.core.GeneratorBasedBuilder):
    """Compressed pictures of many sizes, prepared for real; their test split has no labels."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS, COUNT = ("train", "test"), 40

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=4),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures of one colour, which tells their label.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split == "test") for split in self.SPLITS}

    def _generate_examples(self, test: bool):
        from PIL import Image

        for n in range(self.COUNT):
            image = np.full((10 + n, 50 - n, 3), 60 * (n % 4), np.uint8)
            file = io.BytesIO()
            Image.fromarray(image[..., 0] if n == 5 else image).save(file, format="png")
            yield n, {"image": file.getvalue(), "label": -1 if test else n % 4}


def test_a_prepared_set_of_compressed_pictures(tmp_path) -> None:
    GradpartPictures(data_dir=str(tmp_path), file_format="array_record").download_and_prepare(
        file_format="array_record"
    )
    found = data.load("gradpart_pictures", tmp_path, image_size=16)
    # The test labels are not there: the last tenth of the training examples stands in.
    assert (found.train.size, found.test.size) == (36, 4)
    whole = found.train.read(np.arange(36))
    assert whole["input"].shape == (36, 16, 16, 3)
    assert set(whole["label"].tolist()) == {0, 1, 2, 3}
    colours = np.array([whole["input"][whole["label"] == label].mean() for label in range(4)])
    np.testing.assert_allclose(np.diff(colours), np.diff(colours)[0], rtol=1e-3)
    for label in range(4):
        assert np.ptp(whole["input"][whole["label"] == label]) < 1e-4


def test_labels_that_are_no_class_and_a_class_alone_are_refused(monkeypatch, tmp_path) -> None:
    GradpartPictures(data_dir=str(tmp_path), file_format="array_record").download_and_prepare(
        file_format="array_record"
    )
    monkeypatch.setattr(images, "_classes", lambda info, label: 3)
    found = data.load("gradpart_pictures", tmp_path, image_size=8)
    with pytest.raises(UsageError, match=r"its example \d+ has the label 3, which is none of its 3 classes: choose"):
        found.train.read(np.arange(36))
    monkeypatch.setattr(images, "_classes", lambda info, label: 1)
    with pytest.raises(UsageError, match="--data gradpart_pictures has one class alone"):
        data.load("gradpart_pictures", tmp_path)


def test_damage_to_a_prepared_set_is_said_in_one_line(tmp_path) -> None:
    made = GradpartPictures(data_dir=str(tmp_path), file_format="array_record")
    made.download_and_prepare(file_format="array_record")
    folder = Path(made.data_dir)
    shard = next(folder.glob("*train.array_record*"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(
        UsageError, match=r"--data gradpart_pictures is damaged \(.*\): remove the folder of its version, and"
    ):
        data.load("gradpart_pictures", tmp_path)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UsageError, match="--data gradpart_pictures is damaged"):
        data.load("gradpart_pictures", tmp_path)


def test_an_example_that_cannot_be_decoded_is_said_in_one_line() -> None:
    class Deep:
        def __getitem__(self, number: int) -> dict[str, Any]:
            raise ValueError("PIL does not handle uint16 images. Please, install OpenCV instead.")

    words = "--data mine: its example 3 cannot be decoded (PIL does not handle uint16 images. Please, install OpenCV"
    with pytest.raises(UsageError, match=re.escape(words)):
        Source(Deep(), "mine")[3]


def test_a_set_of_three_examples_has_none_to_test_on(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(GradpartPictures, "SPLITS", ("train",))
    monkeypatch.setattr(GradpartPictures, "COUNT", 3)
    GradpartPictures(data_dir=str(tmp_path), file_format="array_record").download_and_prepare(
        file_format="array_record"
    )
    with pytest.raises(UsageError, match="--data gradpart_pictures has too few examples"):
        data.load("gradpart_pictures", tmp_path)


def test_a_set_too_large_to_keep_is_read_again_each_time(monkeypatch, tmp_path) -> None:
    with tfds.testing.mock_data(num_examples=40):
        kept = data.load("cifar10", tmp_path).train.read(np.arange(40))
        monkeypatch.setattr(images, "KEPT", 0)
        again = data.load("cifar10", tmp_path).train.read(np.arange(40))
    for key, value in kept.items():
        np.testing.assert_array_equal(again[key], value)


def test_the_central_part_is_kept() -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = (10, 20, 30)
    np.testing.assert_array_equal(images.fit(image, (20, 20, 3)), image[:, 10:30])
    smaller = images.fit(image, (5, 5, 3))
    assert smaller.shape == (5, 5, 3)
    np.testing.assert_array_equal(smaller[2, 2], (10, 20, 30))


def test_the_input_is_timed(monkeypatch, capsys) -> None:
    monkeypatch.setitem(noise.EXAMPLES, "train", 64)
    assert bench.main(["inputs", "--batch", "16", "--seconds", "0.01"]) == 0
    assert capsys.readouterr().out.count("flip-crop") == 3
    assert bench.main(["inputs", "--batch", "65"]) == 2
    assert "--batch 65 is out of range: give 1 to 64" in capsys.readouterr().err
