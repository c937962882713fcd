"""What preflight says of a device that holds a part of a block only."""

from __future__ import annotations

from types import SimpleNamespace

from fedblocks.edge_client.preflight import _fits
from fedblocks.profiles.device import DeviceProfile
from fedblocks.protocol.expansion import shape_from_config
from fedblocks.protocol.messages import DataStatistics

MIB = 1 << 20
CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def answers(memory_mib: float) -> list[tuple[str, str, str]]:
    profile = DeviceProfile(
        device="test",
        source="measured",
        accelerator="cpu",
        compute_dtype="float32",
        cpu_cores=1,
        memory_usable_bytes=int(memory_mib * MIB),
        runtime_memory_bytes=0,
        gemm_flops_per_s=1e11,
        memory_bytes_per_s=1e10,
        step_overhead_s=0.001,
        uplink_bytes_per_s=1e7,
        downlink_bytes_per_s=1e7,
        disk_read_bytes_per_s=1e9,
        disk_free_bytes=1 << 40,
        four_bit="ok",
    )
    statistics = DataStatistics(num_examples=10, num_target_tokens=40, mean_tokens=8.0, max_tokens=16)
    options = SimpleNamespace(site=SimpleNamespace(base_hash="ab" * 32), runtime=SimpleNamespace(memory_bytes=0))
    checkpoint = SimpleNamespace(config=CONFIG, shape=shape_from_config(CONFIG))
    data = SimpleNamespace(train=(1,), statistics=lambda: statistics)
    return [(check.name, check.answer, check.text) for check in _fits(options, profile, checkpoint, data)]


def test_a_device_with_room_for_a_slice_only_can_join_a_run_with_slim_blocks() -> None:
    found = {size: answers(size) for size in range(100, 1500, 25)}
    kinds = [rows[0][1] for rows in found.values()]
    assert kinds == sorted(kinds, key=["no", "unknown", "yes"].index)
    assert {"no", "unknown", "yes"} == set(kinds)
    [(name, _, text)] = next(rows for rows in found.values() if rows[0][1] == "unknown")
    assert name == "fit 1 block"
    assert "1/8 of it takes" in text
    assert "allocation.slim" in text
