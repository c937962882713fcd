"""Tests of edge_client/expanded_model.py and edge_client/decoder_block.py against transformers' own classes."""

import copy

import numpy as np
import pytest
import torch

from fedblocks.edge_client.checkpoint import initial_block
from fedblocks.protocol.expansion import expand_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
VARIANTS = [
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama with all biases"),
    pytest.param(
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        id="llama with scaled rope",
    ),
    pytest.param("mistral", {"sliding_window": 5}, id="mistral with a window"),
    pytest.param("qwen2", {}, id="qwen2"),
    pytest.param(
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, id="qwen2 with windows"
    ),
    pytest.param("qwen3", {"attention_bias": True, "head_dim": 32}, id="qwen3 with wide heads and biases"),
]


def token_ids(rows=3, length=17, vocab=128, seed=0):
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, ids, base_only=False):
    h = model.forward_base(ids) if base_only else model.forward(ids)
    return model.rows_logits(h.flatten(0, 1)).view(*ids.shape, -1)


def hf_base(model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model.checkpoint.folder, dtype=torch.float32).eval()


def hf_expanded(model, state):
    """transformers' class built for the grown depth, with our values: a second way to the same function."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = expand_config(model.checkpoint.config, model.plan)
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    hf = AutoModelForCausalLM.from_config(config).float().eval()
    values = {name: model.checkpoint.tensor(name) for name in ("model.embed_tokens.weight", "model.norm.weight")}
    values["lm_head.weight"] = values["model.embed_tokens.weight"]
    if not model.shape.tied_embeddings:
        values["lm_head.weight"] = model.checkpoint.tensor("lm_head.weight")
    for position, entry in enumerate(model.stack):
        if entry.kind == "base":
            tensors = dict(model.backbone.block(entry.index, torch.float32).named(model.shape))
        else:
            tensors = initial_block(model.checkpoint, model.plan, entry.index)
            for name, delta in state.get(entry.index, {}).items():
                tensors[name] = tensors[name] + torch.from_numpy(delta)
        values |= {f"model.layers.{position}.{name}": tensor for name, tensor in tensors.items()}
    hf.load_state_dict(values)
    return hf


@pytest.mark.parametrize(("family", "config"), VARIANTS)
def test_the_plain_base_gives_the_logits_of_transformers(make_model, family, config):
    model = make_model(blocks=0, nf4=False, family=family, config=config)
    ids = token_ids()
    with torch.no_grad():
        assert (logits_of(model, ids) - hf_base(model)(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(("family", "config"), VARIANTS)
def test_expanded_logits_and_every_block_gradient_equal_transformers(make_model, random_state, family, config):
    model = make_model(blocks=2, nf4=False, family=family, config=config)
    state = random_state(model)
    model.load_state(state)
    ids = token_ids()
    upstream = torch.randn(*ids.shape, 128, generator=torch.Generator().manual_seed(1))
    groups = model.train_blocks(model.plan.block_ids)
    logits = logits_of(model, ids)
    (logits * upstream).mean().backward()
    hf = hf_expanded(model, state)
    expected = hf(ids).logits
    (expected * upstream).mean().backward()
    assert (logits - expected).abs().max() <= 1e-5
    theirs = dict(hf.named_parameters())
    for block, group in zip(model.plan.block_ids, groups, strict=True):
        weights = model.weights(model.plan.position(block))
        for name, gradient in weights.gradients(model.shape).items():
            reference = theirs[f"model.layers.{model.plan.position(block)}.{name}"].grad
            assert (gradient - reference).abs().max() <= 1e-5 * (1 + reference.abs().max()), (block, name)
        assert set(group.named) == {spec.name for spec in model.shape.block_tensors()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", ["thirds", "top", "interleaved"])
def test_at_the_start_the_expanded_model_is_the_base_bit_for_bit(make_model, family, placement):
    model = make_model(blocks=2, placement=placement, family=family)
    ids = token_ids()
    assert torch.equal(logits_of(model, ids), logits_of(model, ids, base_only=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_training_strength_zero_is_the_base_bit_for_bit_and_strength_one_is_not(make_model, random_state, dtype):
    model = make_model(dtype=dtype)
    model.load_state(random_state(model))
    ids = token_ids()
    assert not torch.equal(logits_of(model, ids), logits_of(model, ids, base_only=True))
    model.set_strength(0.0)
    assert torch.equal(logits_of(model, ids), logits_of(model, ids, base_only=True))
    model.set_strength(1.0)
    assert not torch.equal(logits_of(model, ids), logits_of(model, ids, base_only=True))


def test_half_strength_is_the_block_with_half_its_out_projections(make_model, random_state):
    model = make_model(blocks=1, nf4=False)
    state = random_state(model)
    model.load_state(state)
    model.set_strength(0.5)
    halved = copy.deepcopy(state)
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):  # their initial value is zero
        halved[0][name] *= 0.5
    half = make_model(blocks=1, nf4=False, state=halved)
    assert torch.equal(logits_of(model, token_ids()), logits_of(half, token_ids()))


def test_right_padding_changes_no_real_row(make_model, random_state):
    model = make_model()
    model.load_state(random_state(model))
    ids = token_ids(rows=2, length=12)
    padded = torch.cat((ids, torch.full((2, 7), 3)), dim=1)
    alone, with_pads = logits_of(model, ids), logits_of(model, padded)[:, :12]
    assert torch.isfinite(with_pads).all()
    assert (alone - with_pads).abs().max() <= 1e-5


@pytest.mark.parametrize("config", [{}, {"sliding_window": 4}])
def test_decoding_token_by_token_gives_the_logits_of_the_whole_sequence(make_model, random_state, config):
    model = make_model(family="mistral", config=config)
    model.load_state(random_state(model))
    ids = token_ids(rows=2, length=11)
    past = model.empty_past(2, 11)
    steps = [model.decode_step(ids[:, t], past, t) for t in range(11)]
    assert (torch.stack(steps, dim=1) - logits_of(model, ids)).abs().max() <= 2e-5


def test_nothing_below_the_lowest_trained_block_is_on_the_tape(make_model):
    model = make_model(blocks=3, layers=6)
    ids = token_ids()
    model.train_blocks((1,))  # the topmost of the three
    hidden = model.forward(ids, 0, model.plan.position(1))
    assert not hidden.requires_grad
    assert model.forward(hidden, model.plan.position(1)).requires_grad


def test_at_the_first_step_only_the_out_tensors_have_a_gradient_and_after_two_steps_all_have_moved(make_model):
    model = make_model(blocks=2, family="qwen2")
    groups = model.train_blocks((0, 1))
    start = [group.values() for group in groups]
    outs = {spec.name for spec in model.shape.block_tensors() if spec.is_out}
    optimizer = torch.optim.SGD([t for group in groups for t in group.tensors], lr=0.1)
    for step in range(2):
        logits_of(model, token_ids())[..., 7].mean().backward()
        for block in (0, 1):
            for name, gradient in model.weights(model.plan.position(block)).gradients(model.shape).items():
                if step == 0:
                    assert bool(gradient.any()) == (name in outs), name
        optimizer.step()
        optimizer.zero_grad()
    for group, before in zip(groups, start, strict=True):
        # A key bias shifts every score of a row by the same number, which softmax ignores: its gradient is rounding.
        moved = {name for name, value in group.values().items() if not np.array_equal(value, before[name])}
        assert moved >= {name for name in before if name != "self_attn.k_proj.bias"}


def test_a_state_is_added_to_the_initial_values_and_deltas_are_measured_from_there(make_model, random_state):
    model = make_model()
    state = random_state(model)
    model.load_state(state)
    groups = model.train_blocks((1,))
    assert all(not d.any() for d in model.deltas(groups)[1].values())
    initial = initial_block(model.checkpoint, model.plan, 1)
    for name, value in groups[0].values().items():
        assert np.array_equal(value, initial[name].numpy() + state[1][name])
    with torch.no_grad():
        for tensor in groups[0].tensors:
            tensor += 1
    assert all(np.allclose(d, 1, atol=1e-5) for d in model.deltas(groups)[1].values())
    model.load_state(state)
    assert all(not d.any() for d in model.deltas(model.train_blocks((1,)))[1].values())


def test_recomputing_activations_changes_no_gradient(make_model, random_state):
    gradients = []
    for recompute in (False, True):
        model = make_model()
        model.load_state(random_state(model))
        model.recompute = recompute
        groups = model.train_blocks((0, 1))
        logits_of(model, token_ids()).square().mean().backward()
        gradients.append([t.grad for group in groups for t in group.tensors])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bf16_compute_stays_near_fp32_with_fp32_trained_tensors(make_model, random_state):
    ids = token_ids()
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(dtype=dtype)
        model.load_state(random_state(model))
        groups = model.train_blocks((0, 1))
        assert {t.dtype for group in groups for t in group.tensors} == {torch.float32}
        out = logits_of(model, ids).float()
        out.mean().backward()
        assert all(torch.isfinite(t.grad).all() for group in groups for t in group.tensors)
        logits.append(out.detach())
    assert (logits[0] - logits[1]).norm() / logits[0].norm() < 0.05


@pytest.mark.parametrize("tied", [True, False])
def test_full_fine_tuning_has_the_gradients_of_transformers_for_every_tensor(make_model, tied):
    model = make_model(blocks=0, nf4=False, family="qwen3", tied=tied)
    groups = model.train_base()
    ids = token_ids()
    torch.log_softmax(logits_of(model, ids), -1)[..., 5].mean().backward()
    hf = hf_base(model)
    torch.log_softmax(hf(ids).logits, -1)[..., 5].mean().backward()
    theirs = {name: p.grad for name, p in hf.named_parameters()}
    ours: dict[str, torch.Tensor] = {}
    for group in groups:
        if group.name == "embeddings":
            ours |= {name: tensor.grad for name, tensor in group.named.items()}
    for layer in range(4):
        ours |= {f"model.layers.{layer}.{n}": g for n, g in model.weights(layer).gradients(model.shape).items()}
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).abs().max() <= 1e-6 + 1e-4 * theirs[name].abs().max(), name


def test_lora_starts_as_the_base_and_equals_its_merged_weights(make_model):
    base = make_model(blocks=0, nf4=False)
    model = make_model(blocks=0, nf4=False)
    (group,) = model.train_lora(rank=4, alpha=8.0, seed=1)
    ids = token_ids()
    assert torch.equal(logits_of(model, ids), logits_of(base, ids))
    with torch.no_grad():
        for name, tensor in group.named.items():
            if name.endswith("lora_B"):
                tensor.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
    merged = make_model(blocks=0, nf4=False)
    leaves = {name: t for g in merged.train_base(embeddings=False) for name, t in g.named.items()}
    with torch.no_grad():
        for name, weight in leaves.items():
            pair = name.removesuffix(".weight")
            if f"{pair}.lora_A" in group.named:
                weight += 2.0 * group.named[f"{pair}.lora_B"] @ group.named[f"{pair}.lora_A"]
    difference = (logits_of(model, ids) - logits_of(merged, ids)).abs().max()
    assert 0 < difference <= 1e-4
    logits_of(model, ids).square().mean().backward()
    assert all(t.grad is not None and t.grad.any() for t in group.tensors)
    assert len(group.named) == 2 * 7 * 4


def test_training_at_another_strength_than_one_is_refused(make_model):
    model = make_model()
    model.set_strength(0.5)
    with pytest.raises(ValueError, match=r"strength 0\.5"):
        model.train_blocks((0,))
