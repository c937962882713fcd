"""The cost model against the tables of docs/runtime.md and docs/methods.md."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedblocks.profiles.catalog_files import QWEN2_5_0_5B, load
from fedblocks.profiles.cost import (
    StackLayout,
    Workload,
    download_bytes,
    head_flops,
    measure_memory,
    peak_memory,
    prefix_flops,
    round_time,
    saved_bytes_frozen,
    saved_bytes_trained,
    step_flops,
    step_time,
    suffix_flops,
    upload_bytes,
)
from fedblocks.profiles.model_shape import ModelShape

CONTEXT = 512


def llama(layers, hidden, mlp, heads, kv_heads, vocabulary, *, head_dim=64, tied=True):
    return ModelShape(
        family="llama",
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        tied_embeddings=tied,
    )


LLAMA_1B = llama(16, 2048, 8192, 32, 8, 128256)
LLAMA_3B = llama(28, 3072, 8192, 24, 8, 128256, head_dim=128)
TINYLLAMA = llama(22, 2048, 5632, 32, 4, 32000, tied=False)
QWEN_7B = ModelShape(
    family="qwen2",
    num_layers=28,
    hidden_size=3584,
    intermediate_size=18944,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=152064,
    tied_embeddings=False,
    qkv_bias=True,
)
STARTER = llama(6, 64, 192, 4, 4, 320, head_dim=16)


def on_top(shape, count):
    return StackLayout(num_entries=shape.num_layers + count, positions={i: shape.num_layers + i for i in range(count)})


def after(shape, *layers):
    """Layout of one block after each of these layers, ids in the given order."""
    low_first = sorted(layers)
    return StackLayout(
        num_entries=shape.num_layers + len(layers),
        positions={i: layer + 1 + low_first.index(layer) for i, layer in enumerate(layers)},
    )


def work(**changes):
    usual = {
        "batch_size": 4,
        "micro_batch_size": 4,
        "mean_tokens": 512,
        "max_tokens": 512,
        "label_share": 1.0,
        "steps": 16,
        "dtype_bytes": 4,
    }
    return Workload(**{**usual, **changes})


@pytest.mark.parametrize(
    ("shape", "count", "no_cache", "cached", "cached_40"),
    [
        (TINYLLAMA, 1, 2.52, 0.53, 0.38),
        (TINYLLAMA, 4, 3.33, 1.35, 1.19),
        (LLAMA_1B, 1, 3.40, 1.42, 0.79),
        (LLAMA_1B, 2, 3.77, 1.80, 1.16),
        (LLAMA_1B, 4, 4.52, 2.54, 1.91),
        (LLAMA_3B, 2, 8.53, 2.81, 1.86),
        (QWEN2_5_0_5B, 1, 1.37, 0.64, 0.31),
        (QWEN2_5_0_5B, 4, 1.65, 0.92, 0.59),
        (QWEN_7B, 1, 16.74, 3.59, 2.28),
        (QWEN_7B, 4, 20.98, 7.82, 6.52),
    ],
)
def test_blocks_on_top_cost_what_the_table_says(shape, count, no_cache, cached, cached_40):
    layout = on_top(shape, count)
    suffix = suffix_flops(shape, layout, range(count), CONTEXT)
    prefix = prefix_flops(shape, layout, CONTEXT)
    found = [
        prefix + suffix + head_flops(shape, 1.0),
        suffix + head_flops(shape, 1.0),
        suffix + head_flops(shape, 0.4),
    ]
    assert [x / 1e9 for x in found] == pytest.approx([no_cache, cached, cached_40], abs=0.011)


@pytest.mark.parametrize(
    ("shape", "trained", "expected"),
    [
        (LLAMA_1B, (1,), (3.65, 2.91, 2.28)),
        (LLAMA_1B, (0, 1), (4.53, 3.79, 3.16)),
        (LLAMA_1B, (0, 1, 2), (5.42, 4.67, 4.04)),
        (QWEN2_5_0_5B, (1,), (1.44, 1.19, 0.86)),
        (QWEN2_5_0_5B, (0, 1, 2), (2.07, 1.83, 1.50)),
        (QWEN_7B, (0, 1), (22.90, 18.21, 16.90)),
    ],
)
def test_three_blocks_at_the_thirds_cost_what_the_table_says(shape, trained, expected):
    layers = shape.num_layers
    layout = after(shape, -(-2 * layers // 3) - 1, layers - 1, -(-layers // 3) - 1)
    suffix = suffix_flops(shape, layout, trained, CONTEXT)
    prefix = prefix_flops(shape, layout, CONTEXT)
    found = [
        prefix + suffix + head_flops(shape, 1.0),
        suffix + head_flops(shape, 1.0),
        suffix + head_flops(shape, 0.4),
    ]
    assert [x / 1e9 for x in found] == pytest.approx(expected, abs=0.011)


@pytest.mark.parametrize(
    ("shape", "trained", "frozen"),
    [
        (LLAMA_1B, 108936, 76168),
        (QWEN2_5_0_5B, 57664, 40768),
        (TINYLLAMA, 87432, 59784),
        (LLAMA_3B, 131688, 90728),
        (QWEN_7B, 225912, 159352),
    ],
)
def test_saved_bytes_per_token_are_those_measured_with_hooks(shape, trained, frozen):
    assert (saved_bytes_trained(shape), saved_bytes_frozen(shape)) == (trained, frozen)


def test_an_upload_of_one_qwen_block_has_the_bytes_of_the_formula():
    assert upload_bytes(QWEN2_5_0_5B, 1, "int8", 1.0) == 14_963_092
    assert upload_bytes(QWEN2_5_0_5B, 1, "int8", 0.25) == 3_744_580
    assert upload_bytes(QWEN2_5_0_5B, 1, "fp32") == 4 * QWEN2_5_0_5B.block_parameters
    assert upload_bytes(QWEN2_5_0_5B, 1, "bf16") == 2 * QWEN2_5_0_5B.block_parameters


def test_an_upload_counts_rows_bitmap_scales_and_vectors():
    # One row of two kept in q (4 values + scale, bitmap of one byte), and so on for each matrix; two vectors of 2.
    tiny = llama(1, 2, 2, 1, 1, 8, head_dim=2)
    matrices = 7 * (1 * (2 + 4) + 1)
    assert upload_bytes(tiny, 1, "int8", 0.5) == matrices + 2 * (2 + 4)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01])
def test_an_upload_with_an_impossible_density_is_refused(density):
    with pytest.raises(ValueError, match="density"):
        upload_bytes(STARTER, 1, "int8", density)


def test_catching_up_many_versions_never_costs_more_than_a_snapshot():
    assert download_bytes(STARTER, 3, "int8", 0.25, versions_behind=0) == 0
    assert download_bytes(STARTER, 3, "int8", 0.25, versions_behind=2) == 2 * upload_bytes(STARTER, 3, "int8", 0.25)
    assert download_bytes(STARTER, 3, "int8", 0.25, versions_behind=1000) == upload_bytes(STARTER, 3, "fp32")


def test_steps_cost_tokens_of_task_and_anchor():
    layout = after(STARTER, 3, 5, 1)
    plain = step_flops(STARTER, layout, (1,), work(label_share=0.5))
    anchored = step_flops(STARTER, layout, (1,), work(label_share=0.5, anchor_batch_size=2, anchor_tokens=512))
    per_token = suffix_flops(STARTER, layout, (1,), 512) + head_flops(STARTER, 1.0)
    assert anchored - plain == pytest.approx(2 * 512 * per_token)
    every_other = step_flops(
        STARTER, layout, (1,), work(label_share=0.5, anchor_batch_size=2, anchor_tokens=512, anchor_every=2)
    )
    assert every_other - plain == pytest.approx(512 * per_token)


def test_samples_cost_their_prefix_only_the_first_time():
    layout, device = after(STARTER, 3, 5, 1), load("laptop-cpu")

    def seconds(**changes):
        return round_time(device, STARTER, layout, (1,), work(**changes), upload_num_bytes=0, download_num_bytes=0)

    assert seconds().fill_s == 0
    filled = seconds(new_tokens=1000).fill_s
    assert filled == pytest.approx(1000 * prefix_flops(STARTER, layout, 512) / device.gemm_flops_per_s)


def test_transfers_cost_bytes_over_bandwidth_and_are_not_rescaled():
    device = load("jetson-orin-nano-8gb")
    time = round_time(
        device,
        STARTER,
        after(STARTER, 3, 5),
        (1,),
        work(),
        upload_num_bytes=625_000,
        download_num_bytes=5_000_000,
        scale=3.0,
    )
    assert (time.upload_s, time.download_s) == (1.0, 2.0)
    assert time.total_s == pytest.approx(3.0 + time.train_s)


def test_smaller_forward_passes_repeat_the_fixed_overhead():
    device = dataclasses.replace(load("jetson-orin-nano-8gb"), step_overhead_s=0.5)
    layout = after(STARTER, 3, 5)
    whole, halved = (
        step_time(device, STARTER, layout, (1,), work(micro_batch_size=m, anchor_batch_size=4, anchor_tokens=8))
        for m in (4, 2)
    )
    assert halved - whole == pytest.approx(0.5)


def test_the_breakdown_adds_up_to_its_peak():
    found = peak_memory(STARTER, after(STARTER, 3, 5, 1), (0, 1), work(anchor_batch_size=4, anchor_tokens=64))
    terms = dataclasses.asdict(found)
    assert found.peak == sum(terms.values()) - min(found.work, found.logits)


def test_a_trained_parameter_costs_sixteen_bytes_in_fp32_and_eighteen_with_a_copy():
    layout = after(STARTER, 3, 5)
    for dtype_bytes, c in ((4, 16), (2, 18)):
        found = peak_memory(STARTER, layout, (0,), work(dtype_bytes=dtype_bytes))
        weight = 4 * STARTER.block_parameters
        assert found.trained + weight == c * STARTER.block_parameters


#: Blocks, sequences per pass, anchor tokens, measured peak in MiB: the client's own training loop on the starter model
#: (width 64, six layers; batch 8 of 10 tokens, anchor batch 4, 16 steps), anonymous memory above the imports.
MEASURED_PEAKS = [
    ((1,), 8, 96, 11.2),
    ((0, 1), 8, 96, 18.4),
    ((0, 1, 2), 8, 96, 25.3),
    ((1,), 2, 96, 8.7),
    ((0,), 2, 96, 11.7),
    ((0, 1, 2), 2, 96, 16.6),
    ((0, 1, 2), 1, 96, 12.1),
    ((1,), 2, 256, 13.9),
    ((1,), 8, 256, 19.9),
    ((0, 1), 8, 256, 37.9),
    ((0, 1, 2), 8, 256, 55.8),
    ((0, 1, 2), 2, 256, 33.4),
    ((0, 1, 2), 1, 256, 20.3),
]


@pytest.mark.parametrize(("blocks", "micro_batch_size", "anchor_tokens", "measured_mib"), MEASURED_PEAKS)
def test_predicted_peaks_are_within_a_tenth_or_two_mebibytes_of_the_measured_ones(
    blocks, micro_batch_size, anchor_tokens, measured_mib
):
    found = peak_memory(
        dataclasses.replace(STARTER, vocab_size=256),
        after(STARTER, 3, 5, 1),
        blocks,
        work(
            batch_size=8,
            micro_batch_size=micro_batch_size,
            mean_tokens=10,
            max_tokens=10,
            anchor_batch_size=4,
            anchor_tokens=anchor_tokens,
        ),
    )
    assert found.peak / 2**20 == pytest.approx(measured_mib, rel=0.1, abs=2.0)


SETS = st.sets(st.integers(0, 2), min_size=1)


@given(blocks=SETS, extra=st.integers(0, 2), micro=st.sampled_from([1, 2, 4]))
def test_training_one_block_more_never_costs_less(blocks, extra, micro):
    layout, device = after(STARTER, 3, 5, 1), load("jetson-orin-nano-8gb")
    job = work(micro_batch_size=micro)
    fewer, more = sorted(blocks), sorted({*blocks, extra})
    assert peak_memory(STARTER, layout, more, job).peak >= peak_memory(STARTER, layout, fewer, job).peak
    assert step_time(device, STARTER, layout, more, job) >= step_time(device, STARTER, layout, fewer, job)
    assert measure_memory(STARTER, layout, job).peak <= peak_memory(STARTER, layout, fewer, job).peak


@given(chosen=st.sets(st.integers(1, 2), min_size=1, max_size=2))
def test_for_a_given_lowest_block_only_the_number_of_blocks_counts(chosen):
    # The exactness of the allocation's enumeration rests on this.
    layout, device = StackLayout(num_entries=9, positions={0: 2, 1: 5, 2: 8}), load("jetson-orin-nano-8gb")
    blocks = {0, *chosen}
    canonical = tuple(range(len(blocks)))
    assert peak_memory(STARTER, layout, blocks, work()).peak == peak_memory(STARTER, layout, canonical, work()).peak
    assert step_time(device, STARTER, layout, blocks, work()) == step_time(device, STARTER, layout, canonical, work())


@pytest.mark.parametrize("positions", [{}, {0: 9}, {0: -1}, {0: 3, 1: 3}])
def test_an_impossible_layout_is_refused(positions):
    with pytest.raises(ValueError, match="stack layout"):
        StackLayout(num_entries=9, positions=positions)


def test_an_unknown_block_is_named():
    with pytest.raises(ValueError, match=r"unknown: \[7\]"):
        suffix_flops(STARTER, after(STARTER, 3, 5), (0, 7), 16)


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 0}, {"mean_tokens": 600.0}, {"mean_tokens": 0.0}, {"label_share": 1.1}, {"dtype_bytes": 3}],
)
def test_an_impossible_workload_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        work(**changes)
