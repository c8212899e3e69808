"""Freed memory that stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

from train.pages import OWN

PROGRAM = """
import resource, sys
from train import pages

told = sys.argv[1] == "keep" and pages.keep()

size = 20_000_000  # of which no constant is made beforehand

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first, second = faults(), faults()
print(told, first, second)
"""


def faults(how: str, **more: str) -> tuple[bool, int, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env=environment | more, capture_output=True, text=True, check=True
    )
    told, first, second = done.stdout.split()
    return told == "True", int(first), int(second)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_an_array_of_the_same_size_finds_its_pages_again() -> None:
    told, _, again = faults("leave")
    assert (told, again > 1000) == (False, True)
    told, first, again = faults("keep")
    assert (told, first > 1000, again < 100) == (True, True, True)


def test_the_environment_stands() -> None:
    assert not faults("keep", MALLOC_ARENA_MAX="8")[0]
