"""Does what a client frees go back to the system? In a process of its own, with and without the client's setting."""

import subprocess
import sys

import pytest

CHILD = """
import sys
import torch
from fedblocks.edge_client.memory import anonymous_bytes, return_large_blocks
if sys.argv[1] == "set":
    return_large_blocks()
held = []
for size in (8, 12, 6, 10, 7):  # a large block is freed: glibc's default then keeps all that follow in its heap
    torch.ones(size << 18)
for i in range(40):
    held.append((torch.ones((1 << 18) + 1000 * i), torch.ones(16)))  # 1 MiB each, something small after it
start = anonymous_bytes()
held = [small for _, small in held]
print((start - anonymous_bytes()) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_tensors_go_back_to_the_system():
    given_back = {
        setting: int(
            subprocess.run([sys.executable, "-c", CHILD, setting], check=True, capture_output=True, text=True).stdout
        )
        for setting in ("set", "default")
    }
    assert given_back["set"] >= 38
    assert given_back["set"] > given_back["default"]
