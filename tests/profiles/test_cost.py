"""The cost model against the tables of docs/runtime.md and docs/methods.md, and against the client's own code."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedblocks.profiles.catalog_files import QWEN2_5_0_5B, load
from fedblocks.profiles.cost import (
    ACTIVATION_COPIES,
    NF4_DECODE_BYTES_MOVED,
    SAME_TIME,
    TIME_TOLERANCE,
    WAVE_TOKENS,
    WEIGHT_COPIES,
    ExecutionMode,
    ModeChoice,
    ModeSearch,
    NoFit,
    SavedBytes,
    StackLayout,
    TimeFactors,
    Workload,
    attention_flops,
    choose_mode,
    download_bytes,
    fill_time,
    forward_block_flops,
    head_flops,
    measure_memory,
    peak_memory,
    prefix_flops,
    round_time,
    step_flops,
    step_parts,
    step_time,
    suffix_flops,
    upload_bytes,
    usual_mode,
)
from fedblocks.profiles.model_shape import WIDTHS, ModelShape

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
    ("shape", "expected"),
    [(TINYLLAMA, 0.22), (LLAMA_1B, 0.58), (LLAMA_3B, 0.90), (QWEN2_5_0_5B, 0.26), (QWEN_7B, 1.45)],
)
def test_computing_only_labelled_rows_of_the_topmost_block_costs_what_the_table_says(shape, expected):
    found = suffix_flops(shape, on_top(shape, 1), (0,), CONTEXT, 0.4) + head_flops(shape, 0.4)
    assert found / 1e9 == pytest.approx(expected, abs=0.011)


def test_rows_are_chosen_only_at_the_top_and_only_where_they_are_few():
    layout = after(STARTER, 2, 4)  # the topmost layer is the base's
    whole = suffix_flops(STARTER, layout, (0, 1), CONTEXT)
    assert suffix_flops(STARTER, layout, (0, 1), CONTEXT, 0.91) == whole
    saved = whole - suffix_flops(STARTER, layout, (0, 1), CONTEXT, 0.5)
    linear = STARTER.linear_parameters - 2 * STARTER.hidden_size * STARTER.kv_size
    assert saved == pytest.approx(4 * 0.5 * linear + 3.5 * 0.25 * 2 * CONTEXT * STARTER.q_size)


def test_recomputing_costs_one_forward_pass_of_every_block_with_a_gradient():
    layout = after(STARTER, 3, 5, 1)
    for trained in ((0, 1, 2), (1,), (0,)):
        low = min(layout.positions[b] for b in trained)
        plain, again = (suffix_flops(STARTER, layout, trained, CONTEXT, checkpoint=c) for c in (False, True))
        assert again - plain == pytest.approx((layout.num_entries - low) * forward_block_flops(STARTER, CONTEXT))


def test_with_a_cache_of_the_round_only_fresh_samples_run_through_the_frozen_part():
    layout = after(STARTER, 3, 5, 1)
    every, half = (suffix_flops(STARTER, layout, (1,), CONTEXT, fresh_share=share) for share in (1.0, 0.5))
    between = layout.positions[1] - layout.base_cut
    assert every - half == pytest.approx(0.5 * between * forward_block_flops(STARTER, CONTEXT))


SHAPES = [
    pytest.param({"num_kv_heads": 4}, id="every head its own keys"),
    pytest.param({"num_kv_heads": 2}, id="two heads share keys"),
    pytest.param({"num_kv_heads": 1}, id="all heads share keys"),
    pytest.param({"num_kv_heads": 2, "family": "qwen2", "qkv_bias": True}, id="biases"),
    pytest.param({"num_kv_heads": 2, "family": "qwen3", "qk_norm": True}, id="norms of q and k"),
    pytest.param({"num_kv_heads": 4, "family": "qwen3", "qk_norm": True}, id="norms, every head its own keys"),
]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("labelled", [None, 20])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", SHAPES)
def test_a_real_block_saves_the_predicted_bytes_to_the_byte(changes, dtype, trained, labelled, fused):
    import torch

    from fedblocks.edge_client.decoder_block import BlockSpec, BlockWeights, block_forward
    from fedblocks.edge_client.rotary import Rotary

    sequences, tokens, compute = 2, 64, getattr(torch, dtype)
    sizes = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
    usual = {"family": "llama", "num_layers": 1, "num_heads": 4, "vocab_size": 8, "tied_embeddings": True, **sizes}
    shape = ModelShape(**{**usual, **changes})
    rotary = Rotary({"model_type": shape.family}, shape.head_dim, compute)
    weights = BlockWeights.of(shape, {s.name: torch.ones(s.shape) for s in shape.block_tensors()}, compute)
    weights = weights.as_leaves() if trained else weights
    x = torch.randn(sequences, tokens, shape.hidden_size).to(compute).requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (*weights.tensors().values(), *rotary.tables(tokens))}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = None
    if labelled is not None:
        rows = torch.cat([torch.arange(tokens - labelled, tokens) + tokens * i for i in range(sequences)])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block_forward(x, weights, BlockSpec(shape=shape, eps=1e-5, fused=fused), rotary, rows)
    share = 1.0 if labelled is None else labelled / tokens
    predicted = SavedBytes.of(shape, compute.itemsize, trained=trained, fused=fused).total(sequences, tokens, share)
    assert sum(saved.values()) == predicted


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
    decoding = layout.base_cut * NF4_DECODE_BYTES_MOVED["cpu"] * STARTER.linear_parameters / device.memory_bytes_per_s
    assert filled == pytest.approx(1000 * prefix_flops(STARTER, layout, 512) / device.gemm_flops_per_s + decoding)


def test_a_wave_on_a_slow_disk_waits_for_its_layers_unless_they_are_in_memory():
    layout = after(STARTER, 3, 5, 1)
    device = dataclasses.replace(load("laptop-cpu"), disk_read_bytes_per_s=1e5)
    work_ = work(new_tokens=WAVE_TOKENS["cpu"] + 1)  # two waves
    suffix, resident = (
        round_time(
            device,
            STARTER,
            layout,
            (1,),
            work_,
            ExecutionMode(residency=residency),
            upload_num_bytes=0,
            download_num_bytes=0,
        ).fill_s
        for residency in ("suffix", "resident")
    )
    assert suffix == pytest.approx(2 * layout.base_cut * 0.51587 * STARTER.linear_parameters / 1e5, rel=1e-3)
    assert resident < suffix / 10


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
        step_time(
            device,
            STARTER,
            layout,
            (1,),
            work(anchor_batch_size=4, anchor_tokens=8),
            ExecutionMode(micro_batch_size=m),
        )
        for m in (4, 2)
    )
    assert halved - whole == pytest.approx(0.5)


def test_decoding_at_each_use_costs_a_pass_over_each_frozen_layer_and_another_one_going_back():
    device, layout = load("laptop-cpu"), after(STARTER, 3, 5, 1)  # cut 2, blocks at 2, 5 and 8
    layer_s = NF4_DECODE_BYTES_MOVED["cpu"] * STARTER.linear_parameters / device.memory_bytes_per_s

    def extra_layers(blocks, **mode):
        mode = {"micro_batch_size": 4, **mode}
        modes = (ExecutionMode(frozen=frozen, **mode) for frozen in ("decoded", "nf4"))
        decoded, nf4 = (step_time(device, STARTER, layout, blocks, work(), mode) for mode in modes)
        return (nf4 - decoded) / layer_s

    assert extra_layers((2,)) == pytest.approx(2 * 4)
    assert extra_layers((0,)) == pytest.approx(2 * 2 + 2)
    assert extra_layers((1,)) == pytest.approx(4)
    assert extra_layers((0,), checkpoint=True) == pytest.approx(3 * 2 + 2)
    assert extra_layers((1,), micro_batch_size=2) == pytest.approx(2 * 4)


@given(
    tokens=st.integers(1, 512),
    label_share=st.sampled_from([0.1, 0.5, 1.0]),
    checkpoint=st.booleans(),
    anchored=st.booleans(),
    width=st.sampled_from(WIDTHS),
)
def test_arithmetic_and_attention_are_all_flops_of_a_step(tokens, label_share, checkpoint, anchored, width):
    device, layout, blocks = load("jetson-orin-nano-8gb"), after(STARTER, 3, 5, 1), (0, 2)  # there both have one rate
    job = work(
        mean_tokens=tokens, max_tokens=512, label_share=label_share, anchor_batch_size=2 * anchored, anchor_tokens=64
    )
    mode = ExecutionMode(checkpoint=checkpoint, micro_batch_size=4)
    parts = step_parts(device, STARTER, layout, blocks, job, mode, width)
    if width == 1.0:
        flops = step_flops(STARTER, layout, blocks, job, checkpoint=checkpoint)
        assert parts.arithmetic_s + parts.attention_s == pytest.approx(flops / device.gemm_flops_per_s)
    assert sum(parts) == pytest.approx(step_time(device, STARTER, layout, blocks, job, mode, width))
    assert min(parts) > 0


PROBED = dataclasses.replace(load("laptop-cpu"), source="measured")


def test_a_probed_cpu_computes_attention_at_a_fifth_of_the_matrix_rate():
    layout = after(STARTER, 3, 5)  # block 1 is the topmost entry

    def attention_s(tokens, device=PROBED):
        job = work(batch_size=1, micro_batch_size=1, mean_tokens=tokens, max_tokens=tokens)
        return step_parts(device, STARTER, layout, (1,), job).attention_s

    below = layout.num_entries - 1 - layout.base_cut
    flops = 64 * (below + 3.5) * attention_flops(STARTER, 64)
    assert attention_s(64) == pytest.approx(flops / (0.2 * PROBED.gemm_flops_per_s))
    assert attention_s(128) == pytest.approx(4 * attention_s(64))
    assert attention_s(64, load("laptop-cpu")) == pytest.approx(0.2 * attention_s(64))


def test_on_a_probed_cpu_each_pass_reads_the_weights_and_each_token_leaves_activations():
    layout = after(STARTER, 3, 5)  # block 1 is the topmost entry

    def parts(micro=4, device=PROBED, **mode):
        return step_parts(device, STARTER, layout, (1,), work(), ExecutionMode(micro_batch_size=micro, **mode))

    below = layout.num_entries - 1 - layout.base_cut
    read = (below + 2 + 2) * STARTER.block_parameters + 2 * STARTER.vocab_size * STARTER.hidden_size
    more_s = parts(micro=2).weights_s - parts().weights_s
    assert more_s == pytest.approx(WEIGHT_COPIES * 4 * read / PROBED.memory_bytes_per_s)
    assert parts(micro=2).activations_s == parts().activations_s
    h, i, q, kv = STARTER.hidden_size, STARTER.intermediate_size, STARTER.q_size, STARTER.kv_size
    recomputed_s = parts(checkpoint=True).activations_s - parts().activations_s
    one_block_s = 4 * 512 * 4 * (4 * h + 3 * i + 3 * q + 3 * kv) / PROBED.memory_bytes_per_s
    assert recomputed_s == pytest.approx(ACTIVATION_COPIES * one_block_s)
    catalog = parts(micro=2, device=load("laptop-cpu"))
    assert catalog.weights_s == parts(device=load("laptop-cpu")).weights_s < parts().weights_s
    assert catalog.activations_s < parts().activations_s / 10


def test_each_factor_scales_its_part_of_the_time():
    device, layout, mode = PROBED, after(STARTER, 3, 5), ExecutionMode(micro_batch_size=4)
    job = work(new_tokens=1000)
    parts = step_parts(device, STARTER, layout, (1,), job, mode)
    plain = ModeSearch(device, STARTER, layout, job).cost((1,), mode)
    for name in ("arithmetic", "attention", "activations", "weights", "overhead"):
        factors = TimeFactors(**{name: 3.0})
        found = ModeSearch(device, STARTER, layout, job, factors=factors).cost((1,), mode)
        assert found.step_s == pytest.approx(plain.step_s + 2 * getattr(parts, f"{name}_s"))
    filled = ModeSearch(device, STARTER, layout, job, factors=TimeFactors(prefix=3.0)).cost((1,), mode)
    assert filled.step_s == plain.step_s
    assert filled.seconds - plain.seconds == pytest.approx(2 * fill_time(device, STARTER, layout, job))


def test_the_breakdown_adds_up_to_its_peak():
    found = peak_memory(
        STARTER, after(STARTER, 3, 5, 1), (0, 1), work(anchor_batch_size=4, anchor_tokens=64), runtime_bytes=7
    )
    terms = dataclasses.asdict(found)
    assert terms.pop("phase") == "training"
    assert terms["runtime"] == 7
    assert found.peak == sum(terms.values())
    assert terms[found.largest] == max(v for k, v in terms.items() if k != "runtime")


@pytest.mark.parametrize(
    ("dtype_bytes", "optimizer", "c"),
    [(4, "fp32", 16), (4, "split_8bit", 10.03125), (2, "split", 16), (2, "split_8bit", 10.03125), (2, "fp32", 16)],
)
def test_a_trained_parameter_costs_what_the_optimizer_mode_says(dtype_bytes, optimizer, c):
    # Few tokens, so that the worst moment is the optimizer's, when all gradients are there.
    job = work(dtype_bytes=dtype_bytes, mean_tokens=1, max_tokens=1, batch_size=2, micro_batch_size=2)
    found = peak_memory(TINYLLAMA, on_top(TINYLLAMA, 1), (0,), job, ExecutionMode(optimizer=optimizer))
    assert found.phase == "training"
    assert found.trained == math.ceil(c * TINYLLAMA.block_parameters)


def test_bf16_copies_of_fp32_weights_cost_two_bytes_more():
    job = work(dtype_bytes=2, mean_tokens=1, max_tokens=1)
    layout = on_top(LLAMA_1B, 2)
    copies, halves = (
        peak_memory(LLAMA_1B, layout, (0, 1), job, ExecutionMode(optimizer=optimizer)).activations
        for optimizer in ("fp32", "split")
    )
    assert copies - halves == 2 * 2 * LLAMA_1B.block_parameters


def test_what_lies_below_the_cut_is_not_held_unless_it_is_resident():
    layout = on_top(TINYLLAMA, 1)
    suffix, resident = (
        peak_memory(TINYLLAMA, layout, (0,), work(), ExecutionMode(residency=residency, micro_batch_size=4))
        for residency in ("suffix", "resident")
    )
    assert suffix.phase == resident.phase == "training"
    assert suffix.frozen == 0
    table = 4 * TINYLLAMA.vocab_size * TINYLLAMA.hidden_size
    assert (suffix.head, resident.head) == (table, 2 * table)
    assert resident.frozen == pytest.approx(22 * 0.51587 * TINYLLAMA.linear_parameters, rel=0.002)


def test_frozen_layers_above_the_cut_are_held_decoded_or_in_four_bits_and_others_blocks_decoded():
    layout = after(LLAMA_1B, 10, 15)  # five layers between the blocks
    decoded, nf4 = (
        peak_memory(LLAMA_1B, layout, (1,), work(dtype_bytes=2), ExecutionMode(optimizer="split", frozen=frozen))
        for frozen in ("decoded", "nf4")
    )
    assert decoded.frozen == 5 * 2 * LLAMA_1B.block_parameters
    assert nf4.frozen == pytest.approx(5 * 0.51587 * LLAMA_1B.linear_parameters, rel=0.002)
    assert decoded.blocks == nf4.blocks == 2 * LLAMA_1B.block_parameters


SETS = st.sets(st.integers(0, 2), min_size=1)
MODES = st.builds(
    ExecutionMode,
    optimizer=st.sampled_from(["fp32", "split_8bit"]),
    residency=st.sampled_from(["suffix", "resident"]),
    frozen=st.sampled_from(["decoded", "nf4"]),
    micro_batch_size=st.sampled_from([1, 2, 4]),
    checkpoint=st.booleans(),
)
JOBS = st.builds(
    work,
    mean_tokens=st.just(10),
    max_tokens=st.integers(10, 600),
    label_share=st.floats(0, 1),
    dtype_bytes=st.sampled_from([2, 4]),
    anchor_batch_size=st.integers(0, 4),
    anchor_tokens=st.integers(1, 300),
    new_tokens=st.floats(0, 1e5),
)


@given(blocks=SETS, extra=st.integers(0, 2), mode=MODES, job=JOBS)
def test_training_one_block_more_never_costs_less(blocks, extra, mode, job):
    layout, device = after(STARTER, 3, 5, 1), load("jetson-orin-nano-8gb")
    fewer, more = sorted(blocks), sorted({*blocks, extra})
    assert peak_memory(STARTER, layout, more, job, mode).peak >= peak_memory(STARTER, layout, fewer, job, mode).peak
    assert step_time(device, STARTER, layout, more, job, mode) >= step_time(device, STARTER, layout, fewer, job, mode)
    assert measure_memory(STARTER, layout, job).peak <= peak_memory(STARTER, layout, fewer, job).peak


@given(chosen=st.sets(st.integers(1, 3), min_size=1, max_size=3), mode=MODES, job=JOBS)
def test_for_a_given_lowest_block_only_the_number_of_blocks_and_the_topmost_count(chosen, mode, job):
    # The exactness of the allocation's enumeration rests on this.
    layout, device = StackLayout(num_entries=12, positions={0: 2, 1: 5, 2: 8, 3: 11}), load("jetson-orin-nano-8gb")
    same = {0, *({3} if 3 in chosen else set()), *range(1, 1 + len(chosen - {3}))}
    for of in (
        lambda b: peak_memory(STARTER, layout, b, job, mode).peak,
        lambda b: step_time(device, STARTER, layout, b, job, mode),
    ):
        assert of({0, *chosen}) == of(same)


@given(mode=MODES, job=JOBS)
def test_every_way_to_save_memory_saves_memory(mode, job):
    layout = after(LLAMA_1B, 10, 15)
    job = dataclasses.replace(job, max_tokens=max(64, job.max_tokens))

    def peak(**changes):
        return peak_memory(LLAMA_1B, layout, (0, 1), job, dataclasses.replace(mode, **changes)).peak

    assert peak(optimizer="split_8bit") <= peak(optimizer="split")
    assert peak(residency="suffix") <= peak(residency="resident")
    assert peak(micro_batch_size=1) <= peak(micro_batch_size=2)  # both add up gradients
    assert peak(checkpoint=True) <= peak(checkpoint=False)
    assert peak(frozen="nf4") <= peak(frozen="decoded")


def all_modes(job, layout):
    sizes = [size for size in (4, 2, 1) if size <= job.micro_batch_size]
    exact = "fp32" if job.dtype_bytes == 4 else "split"
    frozen = layout.num_entries - layout.base_cut > len(layout.positions)
    return [
        ExecutionMode(optimizer=optimizer, micro_batch_size=size, checkpoint=checkpoint, frozen=form, residency=where)
        for optimizer, size, checkpoint, form, where in itertools.product(
            (exact, "split_8bit"),
            sizes,
            (False, True),
            ("decoded", "nf4") if frozen else ("decoded",),
            ("suffix", "resident"),
        )
    ]


@given(blocks=SETS, job=JOBS, share=st.floats(0, 1.2), disk=st.sampled_from([1e5, 1e9]))
@settings(max_examples=60)
def test_the_chosen_mode_is_the_fastest_that_fits_and_exact_where_that_costs_little(blocks, job, share, disk):
    layout = after(STARTER, 3, 5, 1)
    device = dataclasses.replace(load("laptop-cpu"), disk_read_bytes_per_s=disk)
    modes = all_modes(job, layout)
    peaks = [peak_memory(STARTER, layout, blocks, job, mode).peak for mode in modes]
    budget = min(peaks) + share * (max(peaks) - min(peaks)) - (1 if share == 0 else 0)
    found = choose_mode(device, STARTER, layout, blocks, job, budget_bytes=budget)

    def seconds(mode):
        time = round_time(device, STARTER, layout, blocks, job, mode, upload_num_bytes=0, download_num_bytes=0)
        return time.fill_s + time.train_s

    fitting = {mode: seconds(mode) for mode, peak in zip(modes, peaks, strict=True) if peak <= budget}
    if not fitting:
        assert isinstance(found, NoFit)
        assert found.memory.peak == min(peaks)
        return
    assert isinstance(found, ModeChoice)
    assert found.memory == peak_memory(STARTER, layout, blocks, job, found.mode)
    assert found.seconds == pytest.approx(fitting[found.mode])
    fastest = min(fitting.values())
    exact = min((s for mode, s in fitting.items() if not mode.approximate), default=math.inf)
    if exact <= (1 + TIME_TOLERANCE) * fastest * (1 - 1e-9):
        assert not found.mode.approximate
        assert found.seconds <= (1 + SAME_TIME) * exact * (1 + 1e-9)
    elif exact > (1 + TIME_TOLERANCE) * fastest * (1 + 1e-9):
        assert found.mode.approximate
        assert found.seconds <= (1 + SAME_TIME) * fastest * (1 + 1e-9)


def test_a_budget_is_filled_to_the_last_byte_and_not_beyond():
    layout, device, job = after(STARTER, 3, 5, 1), load("laptop-cpu"), work()
    usual = peak_memory(STARTER, layout, (0, 1), job).peak
    chosen = [choose_mode(device, STARTER, layout, (0, 1), job, budget_bytes=usual + by).mode for by in (1, 0, -1)]
    assert chosen[:2] == [usual_mode(job)] * 2
    assert chosen[2] != usual_mode(job)
    least = ModeSearch(device, STARTER, layout, job).least_memory((0, 1))[1]
    found = [choose_mode(device, STARTER, layout, (0, 1), job, budget_bytes=least + by) for by in (1, 0, -1)]
    assert [type(f) for f in found] == [ModeChoice, ModeChoice, NoFit]


def test_rounded_moments_can_be_forbidden():
    layout, device, job = on_top(LLAMA_1B, 1), load("jetson-orin-nano-8gb"), work(dtype_bytes=2)
    exact = ("fp32", "split")
    least, rounded = (
        ModeSearch(device, LLAMA_1B, layout, job, optimizers).least_memory((0,))
        for optimizers in (exact, (*exact, "split_8bit"))
    )
    assert (least[0].optimizer, rounded[0].optimizer) == ("split", "split_8bit")
    found = choose_mode(device, LLAMA_1B, layout, (0,), job, budget_bytes=least[1] - 1, optimizers=exact)
    assert isinstance(found, NoFit)
    assert choose_mode(device, LLAMA_1B, layout, (0,), job, budget_bytes=least[1] - 1).mode.approximate


def test_what_does_not_fit_says_what_would():
    layout, device, job = on_top(LLAMA_1B, 2), load("jetson-orin-nano-8gb"), work(dtype_bytes=2, max_tokens=4096)
    search = ModeSearch(device, LLAMA_1B, layout, job)
    one, both = (search.least_memory(blocks)[1] for blocks in ((1,), (0, 1)))
    found = choose_mode(device, LLAMA_1B, layout, (0, 1), job, budget_bytes=one)
    assert (found.fitting_blocks, found.fitting_blocks_bytes) == ((1,), one)
    assert found.memory.peak == both
    assert found.text.startswith(f"it takes at least {both / 2**20:.1f} MiB (1 sequence at a time, with recomputed ")
    assert f"the budget is {one / 2**20:.1f} MiB; block 1 alone would fit with {one / 2**20:.1f} MiB" in found.text
    found = choose_mode(device, LLAMA_1B, layout, (0, 1), job, budget_bytes=both - 2**20)
    assert 0 < found.fitting_tokens < 4096
    assert f"or sequences of at most {found.fitting_tokens} tokens would fit" in found.text
    for tokens, fits in ((found.fitting_tokens, True), (found.fitting_tokens + 1, False)):
        shorter = dataclasses.replace(job, max_tokens=tokens, mean_tokens=min(tokens, 512))
        peak = peak_memory(LLAMA_1B, layout, (0, 1), shorter, found.mode, accelerator=device.accelerator).peak
        assert (peak <= both - 2**20) == fits
    nothing = choose_mode(device, LLAMA_1B, layout, (0, 1), job, budget_bytes=2**20)
    assert nothing.text.endswith("the budget is 1.0 MiB; no smaller part of it would fit")


def test_a_mode_is_told_in_words():
    assert ExecutionMode(micro_batch_size=8).text() == "8 sequences at a time"
    assert ExecutionMode(checkpoint=True).text() == "1 sequence at a time, with recomputed activations"
    everything = ExecutionMode(optimizer="split_8bit", frozen="nf4", checkpoint=True, micro_batch_size=2)
    assert everything.text() == (
        "2 sequences at a time, with recomputed activations, frozen layers decoded at each use and 8-bit moments"
    )
    with pytest.raises(ValueError, match="micro_batch_size is 0"):
        ExecutionMode(micro_batch_size=0)


@pytest.mark.parametrize("positions", [{}, {0: 9}, {0: -1}, {0: 3, 1: 3}])
def test_an_impossible_layout_is_refused(positions):
    with pytest.raises(ValueError, match="stack layout"):
        StackLayout(num_entries=9, positions=positions)


def test_an_unknown_block_is_named():
    with pytest.raises(ValueError, match=r"unknown: \[7\]"):
        suffix_flops(STARTER, after(STARTER, 3, 5), (0, 7), 16)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"mean_tokens": 600.0},
        {"mean_tokens": 0.0},
        {"label_share": 1.1},
        {"fresh_share": -0.1},
        {"cache_bytes": -1},
        {"dtype_bytes": 3},
    ],
)
def test_an_impossible_workload_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        work(**changes)
