"""Tests of edge_client/memory.py."""

import time

import pytest

from fedblocks.edge_client.memory import PeakMemory, anonymous_bytes, give_back_freed_memory

MIB = 1 << 20


def test_the_peak_counts_memory_that_was_taken_and_given_back_while_measuring():
    with PeakMemory() as memory:
        taken = bytearray(b"x") * (64 * MIB)
        time.sleep(0.1)
        del taken
    assert 60 * MIB < memory.peak_bytes < 90 * MIB
    after = memory.peak_bytes
    later = bytearray(b"x") * (64 * MIB)
    assert memory.peak_bytes == after
    del later


def test_a_given_start_counts_as_zero():
    held = bytearray(b"x") * (32 * MIB)
    give_back_freed_memory()  # what other tests have freed must not go between the two readings
    with PeakMemory(anonymous_bytes() - 32 * MIB) as memory:
        pass
    assert memory.peak_bytes > 24 * MIB
    with PeakMemory(1 << 50) as memory:
        pass
    assert memory.peak_bytes == 0
    del held


def test_mapped_files_do_not_count(tmp_path):
    import mmap

    file = tmp_path / "big"
    file.write_bytes(b"x" * (48 * MIB))
    with file.open("rb") as f, PeakMemory() as memory:
        mapped = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
        assert sum(mapped[i] for i in range(0, len(mapped), 4096)) > 0
        time.sleep(0.05)
        mapped.close()
    assert memory.peak_bytes < 16 * MIB


@pytest.mark.parametrize("times", [1, 2])
def test_it_can_be_started_again(times):
    memory = PeakMemory()
    for _ in range(times):
        memory.start()
        assert memory.stop() < 64 * MIB
