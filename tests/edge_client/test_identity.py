"""Is a grown model the base, bit for bit, until its blocks are trained, and whenever their strength is 0?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedblocks.edge_client import export
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.export import block_values, build_base_hf, build_expanded_hf, verify_identity
from fedblocks.protocol.expansion import ExpansionError, ExpansionPlan, grow, plan_expansion

Factory = Callable[..., Path]

#: Every wave-1 family, and each in its less usual forms.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with a head size of its own": ("llama", {"head_dim": 32}),
    "llama with scaled rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("mistral", {}),
    "mistral with a window": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows above": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen3": ("qwen3", {}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "qwen3 with listed windows": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
}


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=list(VARIANTS))
def checkpoint(request: pytest.FixtureRequest, dtype: str, tmp_path: Path, tiny_checkpoint: Factory) -> Checkpoint:
    family, config = VARIANTS[request.param]
    return Checkpoint.open(tiny_checkpoint(tmp_path, family, dtype=dtype, config=config))


@pytest.fixture(params=["llama", "mistral", "qwen2", "qwen3"])
def plain_checkpoint(
    request: pytest.FixtureRequest, dtype: str, tmp_path: Path, tiny_checkpoint: Factory
) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path, request.param, dtype=dtype))


def make_plan(checkpoint: Checkpoint, placement: Any = "thirds", num_blocks: int = 3) -> ExpansionPlan:
    return plan_expansion(base_hash="0" * 64, config=checkpoint.config, placement=placement, num_blocks=num_blocks)


def random_state(plan: ExpansionPlan, scale: float = 0.1) -> dict[int, dict[str, np.ndarray]]:
    rng = np.random.default_rng(7)
    return {
        block_id: {
            spec.name: rng.normal(scale=scale, size=spec.shape).astype(np.float32)
            for spec in plan.shape.block_tensors()
        }
        for block_id in plan.block_ids
    }


def batches() -> dict[str, dict[str, torch.Tensor]]:
    tokens = torch.randint(4, 128, (3, 17), generator=torch.Generator().manual_seed(3))
    left, right = torch.ones_like(tokens), torch.ones_like(tokens)
    left[1, :5] = left[2, :11] = 0
    right[1, -5:] = right[2, -11:] = 0
    return {
        "plain": {"input_ids": tokens},
        "left padded": {"input_ids": tokens.where(left.bool(), 3), "attention_mask": left},
        "right padded": {"input_ids": tokens.where(right.bool(), 3), "attention_mask": right},
    }


def logits(model: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: model(**batch).logits for name, batch in batches().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> dict[str, bool]:
    return {name: torch.equal(one[name], two[name]) for name in one}


def generated(model: Any) -> torch.Tensor:
    batch = batches()["left padded"]
    return model.generate(**batch, do_sample=False, use_cache=True, max_new_tokens=8, min_new_tokens=8, pad_token_id=3)


def test_an_untrained_grown_model_is_the_base(checkpoint: Checkpoint) -> None:
    base = build_base_hf(checkpoint, checkpoint.dtype)
    expected = logits(base)
    assert expected["plain"].isfinite().all()
    grown = build_expanded_hf(checkpoint, make_plan(checkpoint), {}, 1.0, checkpoint.dtype)
    assert all(same(expected, logits(grown)).values())
    assert torch.equal(generated(base), generated(grown))


@pytest.mark.parametrize(("placement", "num_blocks"), [("top", 3), ("interleaved", 4), ("thirds", 1)])
def test_it_is_the_base_in_every_placement(plain_checkpoint: Checkpoint, placement: str, num_blocks: int) -> None:
    verify_identity(plain_checkpoint, make_plan(plain_checkpoint, placement, num_blocks))


def test_trained_blocks_at_strength_0_are_the_base_and_at_strength_1_are_not(checkpoint: Checkpoint) -> None:
    plan = make_plan(checkpoint)
    state = random_state(plan)
    base = build_base_hf(checkpoint, checkpoint.dtype)
    off = build_expanded_hf(checkpoint, plan, state, 0.0, checkpoint.dtype)
    on = build_expanded_hf(checkpoint, plan, state, 1.0, checkpoint.dtype)
    assert all(same(logits(base), logits(off)).values())
    assert torch.equal(generated(base), generated(off))
    assert not any(same(logits(base), logits(on)).values())
    assert logits(on)["plain"].isfinite().all()


def test_the_grown_model_is_built_with_the_right_index_and_type_in_every_layer(checkpoint: Checkpoint) -> None:
    plan = make_plan(checkpoint)
    base = build_base_hf(checkpoint, checkpoint.dtype)
    grown = build_expanded_hf(checkpoint, plan, {}, 1.0, checkpoint.dtype)
    assert grown.config.num_hidden_layers == len(grown.model.layers) == 7
    assert [layer.self_attn.layer_idx for layer in grown.model.layers] == list(range(7))
    for layer, source in zip(grown.model.layers, plan.sources(), strict=True):
        of_base = base.model.layers[source]
        for name in ("sliding_window", "layer_type"):
            assert getattr(layer.self_attn, name, None) == getattr(of_base.self_attn, name, None)
    for name, value in grown.config.to_dict().items():
        if name in ("layer_types", "no_rope_layers", "mlp_layer_types") and value is not None:
            assert value == [base.config.to_dict()[name][source] for source in plan.sources()]


def test_growing_leaves_the_logits_of_a_trained_model_bit_equal(plain_checkpoint: Checkpoint) -> None:
    checkpoint = plain_checkpoint
    before = make_plan(checkpoint, "thirds", 2)
    after = grow(before)
    state = random_state(before)
    one = build_expanded_hf(checkpoint, before, state, 1.0, checkpoint.dtype)
    two = build_expanded_hf(checkpoint, after, state, 1.0, checkpoint.dtype)
    assert all(same(logits(one), logits(two)).values())


def test_the_last_guard_refuses_a_model_that_is_not_the_base(
    tmp_path: Path, tiny_checkpoint: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path))

    def not_zeroed(checkpoint: Checkpoint, plan: ExpansionPlan, block_id: int) -> dict[str, torch.Tensor]:
        return checkpoint.layer_tensors(plan.block(block_id).source_layer)

    monkeypatch.setattr(export, "initial_block", not_zeroed)
    with pytest.raises(ExpansionError, match="does not give the base's output: it differs by up to") as e:
        verify_identity(checkpoint, make_plan(checkpoint))
    assert e.value.code == "E_IDENTITY"


def test_only_the_zero_set_has_a_gradient_at_step_1_and_everything_moves_by_step_2(
    plain_checkpoint: Checkpoint,
) -> None:
    checkpoint = plain_checkpoint
    plan = make_plan(checkpoint)
    model = build_expanded_hf(checkpoint, plan, {}, 1.0, torch.float32)
    model.requires_grad_(False)
    trained = {}
    for block_id in plan.block_ids:
        layer = model.model.layers[plan.position(block_id)].requires_grad_(True)
        trained |= {(block_id, name): parameter for name, parameter in layer.named_parameters()}
    start = {key: parameter.detach().clone() for key, parameter in trained.items()}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    out = {spec.name for spec in plan.shape.block_tensors() if spec.is_out}
    assert {name for _, name in trained} == {spec.name for spec in plan.shape.block_tensors()}

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    tokens = batches()["plain"]["input_ids"]
    for step in (1, 2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        if step == 1:
            assert {key: bool(p.grad.any()) for key, p in trained.items()} == {key: key[1] in out for key in trained}
        optimizer.step()
    assert all((parameter != start[key]).any() for key, parameter in trained.items())
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in frozen.items())


def test_strength_scales_the_out_tensors_only(tmp_path: Path, tiny_checkpoint: Factory) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, config={"attention_bias": True, "mlp_bias": True}))
    plan = make_plan(checkpoint)
    state = random_state(plan)
    full, half = (block_values(checkpoint, plan, state, 1, strength) for strength in (1.0, 0.5))
    for spec in plan.shape.block_tensors():
        assert torch.equal(half[spec.name], full[spec.name] * (0.5 if spec.is_out else 1.0))
        source = checkpoint.tensor(checkpoint.layer_name(3, spec.name))
        start = torch.zeros(spec.shape) if spec.is_out else source
        assert torch.equal(full[spec.name], start + torch.from_numpy(state[1][spec.name]))


def test_blocks_and_tensors_that_the_state_lacks_are_untrained(tmp_path: Path, tiny_checkpoint: Factory) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path))
    plan = make_plan(checkpoint)
    untrained = block_values(checkpoint, plan, {}, 0, 1.0)
    partly = block_values(checkpoint, plan, {0: {}, 1: random_state(plan)[1]}, 0, 1.0)
    assert all(torch.equal(untrained[name], partly[name]) for name in untrained)


@pytest.mark.parametrize(
    ("state", "strength", "text"),
    [
        ({}, 1.5, "strength is 1.5, expected a number from 0"),
        ({}, float("nan"), "strength is nan"),
        ({9: {}}, 1.0, r"has blocks \[9\]"),
        ({0: {"mlp.gate": np.zeros(3, np.float32)}}, 1.0, r"has tensors \['mlp.gate'\]"),
        ({0: {"input_layernorm.weight": np.zeros(63, np.float32)}}, 1.0, r"float32 \[63\], expected float32 \[64\]"),
        ({0: {"input_layernorm.weight": np.zeros(64)}}, 1.0, r"float64 \[64\], expected float32"),
        ({0: {"input_layernorm.weight": np.full(64, np.inf, np.float32)}}, 1.0, "not finite"),
    ],
)
def test_a_state_that_is_not_of_this_plan_is_refused(
    tmp_path: Path, tiny_checkpoint: Factory, state: Any, strength: float, text: str
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path))
    with pytest.raises(ValueError, match=text):
        block_values(checkpoint, make_plan(checkpoint), state, 0, strength)
