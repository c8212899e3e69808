"""A link that is cut: real processes in network namespaces, where root and iproute2 are to be had."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.bench import links

ROOT = Path(__file__).parents[1]
LACKS = links.missing()


@pytest.mark.slow
@pytest.mark.skipif(LACKS is not None, reason=str(LACKS))
def test_a_link_that_is_cut_ends_both_hosts_within_bounds_and_namespaces_are_taken_down(tmp_path) -> None:
    given = [
        "--model", "mlp", "--batch", "32", "--steps", "1000000", "--eval-every", "1000000", "--no-dense-reference",
        "--no-phases", "--data-dir", str(tmp_path / "data"), "--heartbeat", "6", "--timeout", "120",
        "--processes", "2",
    ]  # fmt: skip
    with links.Links(2, "100mbit") as net:
        coordinator = ["--coordinator", f"{net.address(0)}:7000"]
        running = [
            subprocess.Popen(
                [*net.command(host), sys.executable, "-m", "train.main", *given, *coordinator, "--process", str(host),
                 "--workdir", str(tmp_path / str(host))],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
            for host in range(2)
        ]  # fmt: skip
        with links.ended(running):
            written = tmp_path / "0" / "digits-100x-seed0" / "partition" / "metrics.jsonl"
            last = time.monotonic() + 200
            while not written.exists() or written.read_text().count("\n") < 5:
                assert time.monotonic() < last
                assert not any(process.poll() for process in running), [p.communicate()[0] for p in running]
                time.sleep(0.05)
            sent = net.sent()
            assert all(x > 10_000 for x in sent)
            net.cut(1)
            said = [process.communicate(timeout=60)[0] for process in running]
        assert all(process.returncode not in (0, None) for process in running)
        assert all("lost touch" in text or "JAX distributed service detected fatal errors" in text for text in said)
        tag = net.command(0)[3].removesuffix("n0")
    for kind in ("netns", "link"):
        assert tag not in subprocess.run(["ip", kind, "show"], capture_output=True, text=True, check=True).stdout
    assert links.clean() == 0
