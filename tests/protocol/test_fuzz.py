"""F3 of field.md for every decoder: whatever the bytes are, only the documented error comes out, quickly and in little
memory. ``make fuzz`` tries a million and more."""

from __future__ import annotations

import importlib.util
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

FUZZ = Path(__file__).parents[1] / "fuzz" / "decoders.py"


def fuzz_module() -> Any:
    spec = importlib.util.spec_from_file_location("fedblocks_fuzz_decoders", FUZZ)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


decoders = fuzz_module()
#: 30,000 inputs for all together, beside the hundred thousand damaged messages of test_codec.py.
CASES = {"frames": 5000, "body": 5000, "announcement": 4000, "connection": 4000, "tensor": 5000, "state_update": 3000}


@pytest.mark.parametrize("target", decoders.TARGETS)
def test_mutated_inputs_raise_the_documented_error_and_no_other(target):
    figures = decoders.run(target, CASES.get(target, 4000))

    assert figures["slowest_ms"] < 50
    assert figures["rss_growth_bytes"] < 8e6


def test_another_error_of_a_decoder_would_be_found_and_written_down(monkeypatch, tmp_path):
    def fails_on_a_long_frame(data: bytes) -> None:
        raise IndexError if len(data) > 20 else decoders.errors.RemoteProtocolError("no message")

    monkeypatch.setitem(decoders.TARGETS, "frames", fails_on_a_long_frame)
    monkeypatch.setattr(decoders, "seeds", lambda target: [b"short"])
    monkeypatch.setattr(decoders, "FOUND", tmp_path)

    with pytest.raises(IndexError):
        decoders.run("frames", 10_000)
    (path,) = tmp_path.glob("frames-*.bin")
    assert len(path.read_bytes()) > 20


def oversized_claims() -> dict[str, tuple[str, bytes]]:
    """Inputs that announce far more than they hold."""
    tensor = decoders.seeds("tensor")[1]
    update = next(data for data in decoders.seeds("state_update") if data[0] == 2)
    return {
        "2^32 - 1 items in a body": ("body", b"\x02\xdd\xff\xff\xff\xff"),
        "2^32 - 1 bytes in a header": ("frames", b"\x05\xc6\xff\xff\xff\xff\x80"),
        "255 rows of a tensor": ("tensor", tensor[:3] + b"\xff" + tensor[4:]),
        "255 steps of a replay": ("state_update", b"\x01\x00\xff" + update[3:]),
        "a difference with ones in every length": ("state_update", update[:3] + b"\xff" * 64 + update[67:]),
        "a plan of endless lists": ("plan", b"[" * 100_000),
        "a plan of a huge number": ("plan", b'{"base_hash": ' + b"9" * 5000 + b"}"),
    }


@pytest.mark.parametrize(
    "claim", oversized_claims().values(), ids=[name.replace(" ", "-") for name in oversized_claims()]
)
def test_an_oversized_claim_is_refused_in_less_than_a_megabyte(claim):
    target, data = claim
    decoders.attempt(target, data)  # what is imported or cached on the first call is not the claim's
    tracemalloc.start()
    try:
        with pytest.raises(decoders.allowed(target)):
            decoders.TARGETS[target](data)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak_bytes < 1e6
