"""Memory of states that were freed goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

KEPT = """
import sys
from fedblocks.aggregator.heap import give_back_large_blocks

def anonymous_bytes():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon:"))

if sys.argv[1] == "given back":
    give_back_large_blocks()
bytearray(b"x" * 30_000_000)  # freed at once: from here on glibc would take blocks of this size from its heap
before = anonymous_bytes()
between = []
for _ in range(4):
    state = bytearray(b"x" * 20_000_000)
    between.append([bytes(100_000) for _ in range(10)])  # what lives on behind it
    del state
print(anonymous_bytes() - before - sum(len(b) for some in between for b in some))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose heap this is about")
def test_states_that_were_freed_leave_nothing_behind() -> None:
    def left_bytes(how: str) -> int:
        ended = subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, text=True, check=True)
        return int(ended.stdout)

    assert left_bytes("given back") < 2_000_000
    assert left_bytes("as it comes") > 10_000_000


TRIMMED = """
from fedblocks.aggregator.heap import give_back_the_rest

def anonymous_bytes():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon:"))

chunks = [bytearray(b"x" * 100_000) for _ in range(400)]
kept = chunks[::50]
before = anonymous_bytes()
del chunks
held = anonymous_bytes()
give_back_the_rest()
print(before - held, before - anonymous_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose heap this is about")
def test_what_lies_free_between_small_blocks_is_given_back_on_demand() -> None:
    ended = subprocess.run([sys.executable, "-c", TRIMMED], capture_output=True, text=True, check=True)
    by_itself, on_demand = map(int, ended.stdout.split())
    assert by_itself < 20_000_000
    assert on_demand > 30_000_000
