"""Slim blocks on the client: the slice trains, the block computes as a whole (methods.md 3; S1, S2, S4)."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from fedblocks.edge_client.decoder_block import BlockWeights, SlimMatrix, slim_shape
from fedblocks.edge_client.optimizer import AdamW
from fedblocks.edge_client.prefix_cache import PrefixStates
from fedblocks.edge_client.train import Hyper, data_order, run_steps, stack_losses, task_batch
from fedblocks.kernels.ops import slim_linear
from fedblocks.profiles.model_shape import WIDTHS
from fedblocks.protocol.tensors import cut

FAMILIES = {
    "llama": {},
    "llama with all biases": {"config": {"attention_bias": True, "mlp_bias": True}},
    "mistral": {"family": "mistral", "config": {"sliding_window": 4}},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "one key/value head": {"kv_heads": 1},
    "no groups": {"kv_heads": 4},
}
SLIM = [width for width in WIDTHS if width < 1]


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def box(spec):
    return tuple(slice(size) for size in spec.shape)


def outside(values, spec):
    """What of a whole tensor the slice leaves out, flat."""
    mask = torch.ones(values.shape, dtype=torch.bool)
    mask[box(spec)] = False
    return values[mask]


def whole_values(weights, shape):
    """Name -> value of the whole tensor that the arithmetic reads, of a slim block."""
    held = BlockWeights(
        **{
            name: tensor.whole if isinstance(tensor, SlimMatrix) else tensor.detach()
            for name, tensor in weights.tensors().items()
        },
        **{
            f"{name}_bias": getattr(weights, name).bias
            for name in ("qkv", "gate_up")
            if getattr(weights, name).bias is not None
        },
    )
    return held.named(shape)


def steps(model, groups, samples, *, steps=3, placement_cut=None, decay=0.0, optimizer="fp32", after=None):
    prefix = PrefixStates(model, None)
    order = data_order(len(samples), 4, seed=5)
    windows = [next(order) for _ in range(steps)]
    return run_steps(
        groups=groups,
        losses=stack_losses(model, model.base_cut if placement_cut is None else placement_cut),
        task=(
            [task_batch([samples[i] for i in part], prefix.padded([samples[i].ids for i in part]))] for part in windows
        ),
        anchor=(),
        hyper=Hyper(steps=steps, learning_rate=3e-3, warmup_steps=2, weight_decay=decay),
        optimizer_mode=optimizer,
        now=lambda: 0.0,
        status=after or (lambda _phase, _steps: None),
    )


def mask_gradients(model, width):
    """Blocks that train whole get no gradient outside the slice; returns what to call when done."""
    handles = []
    specs = model.shape.block_tensors(width)
    for block in model.plan.block_ids:
        weights = model.weights(model.plan.position(block))
        masks = BlockWeights.empty(model.shape, torch.float32)
        for name, place in masks.named(model.shape).items():
            place.zero_()
            place[box(next(s for s in specs if s.name == name))] = 1
        for name, leaf in weights.tensors().items():
            handles.append(leaf.register_hook(partial(torch.mul, getattr(masks, name))))
    return lambda: [handle.remove() for handle in handles]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_slim_block_is_the_identity_at_the_start(make_model, family, width):
    model = make_model(blocks=2, nf4=False, **family)
    ids = torch.arange(24).view(2, 12) + 4
    base = model.forward_base(ids)
    model.train_blocks(model.plan.block_ids, width=width)

    assert torch.equal(model.forward(ids), base)


@pytest.mark.parametrize("width", SLIM)
def test_a_slim_block_computes_as_the_whole_one_at_any_state(make_model, random_state, family, width):
    model = make_model(blocks=2, nf4=False, **family)
    model.load_state(random_state(model))
    ids = torch.arange(24).view(2, 12) + 4
    whole = model.forward(ids).detach()
    groups = model.train_blocks(model.plan.block_ids, width=width)

    assert torch.equal(model.forward(ids), whole)
    for group in groups:
        assert {n: t.shape for n, t in group.named.items()} == {
            s.name: s.shape for s in model.shape.block_tensors(width)
        }


def test_the_slices_are_nested_and_the_whole_width_is_the_whole_block(make_model, random_state, family):
    model = make_model(blocks=1, nf4=False, **family)
    model.load_state(random_state(model))
    values = {w: model.train_blocks((0,), width=w)[0].values() for w in WIDTHS}

    assert {n: v.shape for n, v in values[1.0].items()} == {s.name: s.shape for s in model.shape.block_tensors()}
    for width in SLIM:
        for name, value in values[width].items():
            np.testing.assert_array_equal(value, cut(values[1.0][name], value.shape))
        assert slim_shape(model.shape, width).block_tensors() == model.shape.block_tensors(width)


@pytest.mark.parametrize("width", SLIM)
@pytest.mark.parametrize(("placement", "recompute"), [("thirds", False), ("top", True)])
def test_slim_steps_are_whole_steps_with_the_gradient_outside_masked(
    make_model, make_samples, random_state, family, width, placement, recompute
):
    """The topmost block computes label rows alone; the state makes every gradient differ from 0 in the first step."""
    samples = make_samples(count=10)
    found = {}
    for kind in ("whole", "slim"):
        model = make_model(blocks=2, placement=placement, nf4=False, **family)
        model.load_state(random_state(model))
        model.recompute = recompute
        groups = model.train_blocks((0, 1), width=1.0 if kind == "whole" else width)
        done = mask_gradients(model, width) if kind == "whole" else lambda: None
        result = steps(model, groups, samples)
        done()
        deltas = model.deltas(groups)
        sizes = [sum(t.numel() for t in g.decayed) for g in groups]
        energy = [e * size for e, size in zip(result.gradient_energy, sizes, strict=True)]
        found[kind] = result.task_loss, deltas, energy
    np.testing.assert_allclose(found["slim"][0], found["whole"][0], rtol=1e-6)
    np.testing.assert_allclose(found["slim"][2], found["whole"][2], rtol=1e-5)
    for block in (0, 1):
        for spec in model.shape.block_tensors(width):
            whole = torch.from_numpy(found["whole"][1][block][spec.name])
            assert not outside(whole, spec).any()
            # Keys all but cancel their bias's gradient; what is left is rounding, and Adam divides by its size.
            atol = 5e-5 if spec.name == "self_attn.k_proj.bias" else 1e-6
            slim = found["slim"][1][block][spec.name]
            np.testing.assert_allclose(slim, whole[box(spec)], rtol=1e-6, atol=atol, err_msg=spec.name)
            assert whole.any()


@pytest.mark.parametrize("family_name", ["qwen2", "llama with all biases"])
def test_weight_decay_pulls_the_slice_of_the_zero_set_alone(make_model, make_samples, random_state, family_name):
    model = make_model(blocks=1, nf4=False, **FAMILIES[family_name])
    model.load_state(random_state(model))
    (group,) = model.train_blocks((0,), width=0.25)
    expected = {s.name for s in model.shape.block_tensors() if s.is_out}
    start = group.values()
    assert sum(t.numel() for t in group.decayed) == sum(group.named[n].numel() for n in expected)
    before = {n: v.clone() for n, v in whole_values(model.weights(model.plan.position(0)), model.shape).items()}
    results = {}
    for decay in (0.0, 0.5):
        model.load_state(random_state(model))
        (group,) = model.train_blocks((0,), width=0.25)
        steps(model, [group], make_samples(count=6), steps=1, decay=decay)
        results[decay] = group.values()
        after = whole_values(model.weights(model.plan.position(0)), model.shape)
        for spec in model.shape.block_tensors(0.25):
            assert torch.equal(outside(after[spec.name], spec), outside(before[spec.name], spec))
    for name, value in results[0.5].items():
        pulled = 1.5e-3 * 0.5 * start[name] if name in expected else 0.0
        np.testing.assert_allclose(results[0.0][name] - value, pulled, atol=1e-7)


MODES = [(torch.float32, "fp32"), (torch.float32, "split_8bit")] + [
    (torch.bfloat16, mode) for mode in ("fp32", "split", "split_8bit")
]


@pytest.mark.parametrize(("dtype", "optimizer"), MODES, ids=lambda v: str(v).removeprefix("torch."))
def test_after_every_step_the_arithmetic_reads_the_new_slice_and_the_old_rest(
    make_model, make_samples, random_state, dtype, optimizer
):
    model = make_model(blocks=2, dtype=dtype, family="qwen2")
    model.load_state(random_state(model, scale=0.02))
    groups = model.train_blocks((0, 1), optimizer, 0.25)
    positions = [model.plan.position(b) for b in (0, 1)]
    start = [{n: v.clone() for n, v in whole_values(model.weights(p), model.shape).items()} for p in positions]
    seen = []

    def compare(_phase, _step):
        for group, position, before in zip(groups, positions, start, strict=True):
            after = whole_values(model.weights(position), model.shape)
            for spec in model.shape.block_tensors(0.25):
                if len(spec.shape) == 1 and not spec.name.endswith("bias"):
                    continue  # norms are leaves themselves
                read = group.named[spec.name].detach().to(dtype)
                assert torch.equal(after[spec.name][box(spec)], read)
                assert torch.equal(outside(after[spec.name], spec), outside(before[spec.name], spec))
                seen.append(not torch.equal(read, before[spec.name][box(spec)]))

    losses = steps(model, groups, make_samples(count=10), steps=12, optimizer=optimizer, after=compare).task_loss
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert np.mean(seen) > 0.9
    for group in groups:
        assert all(t.dtype == (torch.float32 if group.lows == () else torch.bfloat16) for t in group.tensors)


def test_the_delta_of_a_slim_block_is_its_exact_change_in_every_mode(make_model, random_state):
    for dtype, optimizer in MODES:
        model = make_model(blocks=2, dtype=dtype)
        model.load_state(random_state(model))
        (group,) = model.train_blocks((1,), optimizer, 0.5)
        deltas = model.deltas([group])[1]
        assert {n: v.shape for n, v in deltas.items()} == {s.name: s.shape for s in model.shape.block_tensors(0.5)}
        assert not any(v.any() for v in deltas.values())


class _Made(TorchDispatchMode):
    """The shapes of all memory that operations make, views left out."""

    def __init__(self):
        super().__init__()
        self.shapes = set()
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for given in (*args, *(kwargs or {}).values()):
            for tensor in given if isinstance(given, list | tuple) else (given,):
                if isinstance(tensor, torch.Tensor):
                    self._known.add(tensor.untyped_storage().data_ptr())
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.shapes.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("family_name", ["qwen2", "qwen3", "llama with all biases"])
@pytest.mark.parametrize("apart", [False, True], ids=["all rows", "label rows"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_backward_pass_makes_no_gradient_outside_the_slice(make_model, family_name, apart, recompute):
    """S4: not even for a moment, and in no layout; the whole block's pass shows that the test would see it."""
    found = {}
    for width in (1.0, 0.25):
        model = make_model(blocks=1, placement="top", nf4=False, **FAMILIES[family_name])
        model.recompute = recompute
        position = model.plan.position(0)
        (group,) = model.train_blocks((0,), width=width)
        h = torch.randn(3, 7, model.shape.hidden_size, requires_grad=True)
        y = model.run(h, position, rows=torch.tensor([2, 5, 6, 13, 20]) if apart else None)
        with _Made() as made:
            y.square().sum().backward()
        found[width] = made.shapes
        assert all(t.grad.shape == t.shape for t in group.tensors)
        assert h.grad is not None
    shape = model.shape
    sizes = [(shape.q_size + 2 * shape.kv_size, 64), (64, shape.q_size), (2 * shape.intermediate_size, 64)]
    sizes += [(64, shape.intermediate_size), (shape.q_size, 64), (2 * shape.kv_size, 64)]
    forbidden = {*sizes, *(size[::-1] for size in sizes)}
    if shape.qkv_bias:
        forbidden.add((shape.q_size + 2 * shape.kv_size,))
    if shape.mlp_bias:
        forbidden.add((2 * shape.intermediate_size,))

    assert found[1.0] & forbidden
    assert not found[0.25] & forbidden


def test_of_the_input_of_an_out_projection_only_the_columns_of_the_slice_are_kept(make_model):
    model = make_model(blocks=1, placement="top", nf4=False)
    position, kept = model.plan.position(0), []
    model.train_blocks((0,), width=0.25)
    with saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model.run(torch.randn(3, 7, 64), position)
    neurons = model.shape.slice_sizes(0.25)[2]

    assert (3, 7, neurons) in kept
    assert (3, 7, model.shape.intermediate_size) not in kept


@pytest.mark.parametrize("rows", [((0, 3), (5, 6), (8, 10)), ((0, 12),), None])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_linear_layer_of_a_slice_has_the_gradients_of_the_formula(rows, with_bias):
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    whole, x, bias = random(12, 5), random(2, 3, 5).requires_grad_(), random(12) if with_bias else None
    index = torch.arange(12) if rows is None else torch.cat([torch.arange(a, b) for a, b in rows])
    leaf = (whole[:, :2] if rows is None else whole[index]).clone().requires_grad_()
    bias_leaf = bias[index].clone().requires_grad_() if with_bias else None

    def plain(x, leaf, bias_leaf=None):
        w = torch.cat([leaf, whole[:, 2:]], 1) if rows is None else whole.index_copy(0, index, leaf)
        b = None if bias is None else bias.index_copy(0, index, bias_leaf)
        return torch.nn.functional.linear(x, w, b)

    inputs = (x, leaf) + ((bias_leaf,) if with_bias else ())
    y = slim_linear(x, whole, leaf, rows, bias, bias_leaf)
    upstream = random(*y.shape)
    assert torch.equal(y, torch.nn.functional.linear(x, whole, bias))
    for mine, theirs in zip(
        torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(plain(*inputs), inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_slice_that_is_frozen_costs_no_product(monkeypatch):
    whole = torch.randn(6, 4)
    x = torch.randn(3, 4, requires_grad=True)
    monkeypatch.setattr(torch, "mm", lambda *_args, **_kwargs: pytest.fail("a product for a gradient nobody wants"))
    slim_linear(x, whole, whole[:2].clone(), ((0, 2),)).sum().backward()

    assert x.grad is not None


def test_a_width_that_does_not_exist_is_named(make_model):
    with pytest.raises(ValueError, match=r"block width is 0.3, expected one of 0.125, 0.25, 0.5, 1.0"):
        make_model(nf4=False).train_blocks((0,), width=0.3)


@pytest.mark.parametrize(("dtype", "optimizer"), MODES, ids=lambda v: str(v).removeprefix("torch."))
def test_leaf_gradient_and_moments_are_as_large_as_the_slice(make_model, make_samples, dtype, optimizer):
    model = make_model(blocks=2, dtype=dtype)
    (group,) = model.train_blocks((1,), optimizer, 0.125)
    size = model.shape.slice_parameters(0.125)
    sizes = []
    made = AdamW([group], mode=optimizer)
    made.begin()
    prefix, samples = PrefixStates(model, None), make_samples(count=4)
    batch = task_batch(samples, prefix.padded([s.ids for s in samples]))
    stack_losses(model, model.base_cut).task(batch, 1.0).backward()
    sizes += [sum(slot.gradient.numel() for slot in made._slots)]
    sizes += [sum(t.numel() for t in group.tensors), sum(slot._moments.m.numel() for slot in made._slots)]
    made.close()

    assert sizes == [size] * 3
    assert group.lows == () or sum(t.numel() for t in group.lows) == size
