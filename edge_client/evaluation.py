"""What was learnt, what was kept, and how far is the model from the base? ``fedblocks evaluate`` and the demo's proof.

Three models can be measured: the base, a plain checkpoint (an export), and a run's published state on the clients' own
4-bit stack.
Retention is the general score over the base's own, both on the same stack; KL is over the full vocabulary, on text that
the base has written, nats per token.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedblocks.edge_client.anchor import sample_anchor
from fedblocks.edge_client.backbone import Backbone, DenseBackbone
from fedblocks.edge_client.checkpoint import Checkpoint, base_hash
from fedblocks.edge_client.data import TextEncoder, tokenise_file
from fedblocks.edge_client.encoder_evaluation import describe_encoder, evaluate_encoder
from fedblocks.edge_client.evaluate import ExampleSums, evaluate_examples, kl_full
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.export import export_hf, load_final, strength_of
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.protocol import run_config
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.messages import BUDGET_ERRORS, STRENGTHS, DataFormat

#: Texts that the base writes for the final KL: another seed than any anchor set, so no client ever trained on them.
KL_SEED = 90_001
KL_SEQUENCES = 64
KL_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One model's figures; None where the file to measure with was not given."""

    downstream_accuracy: float | None
    downstream_nll: float | None
    """nats per target token."""
    general_accuracy: float | None
    general_nll: float | None
    retention: float | None
    """General accuracy over the base's; for plain texts, where accuracy says little, base perplexity over ours."""
    kl_nats_per_token: float
    kl_standard_error: float
    agreement: float
    """Share of positions at which both models put the same token first."""


class Judge:
    """The files and the base that models are measured with.

    Args:
        base: the base checkpoint.
        encoder: its tokenizer and the data format.
        downstream: the task that was learnt.
        general: general ability.
    """

    def __init__(
        self, *, base: Checkpoint, encoder: TextEncoder, downstream: Path | None, general: Path | None
    ) -> None:
        self.base = base
        self.downstream = tokenise_file(downstream, encoder) if downstream else []
        self.general = tokenise_file(general, encoder) if general else []
        self.texts = sample_anchor(base, num_sequences=KL_SEQUENCES, num_tokens=KL_TOKENS, seed=KL_SEED).sequences
        self.dense_base = ExpandedModel(backbone=DenseBackbone(base), checkpoint=base)

    def base_figures(self) -> Figures:
        """The base's own figures: KL 0 and retention 1 by definition."""
        downstream, general = _scores(self.dense_base, self.downstream), _scores(self.dense_base, self.general)
        return Figures(
            downstream_accuracy=_accuracy(downstream),
            downstream_nll=_nll(downstream),
            general_accuracy=_accuracy(general),
            general_nll=_nll(general),
            retention=_retention(general, general),
            kl_nats_per_token=0.0,
            kl_standard_error=0.0,
            agreement=1.0,
        )

    def figures(
        self,
        model: ExpandedModel,
        *,
        reference: ExpandedModel,
        reference_is_base_of_model: bool,
        kl: tuple[float, float, float] | None = None,
    ) -> Figures:
        """Measure ``model``; ``reference`` is the base on the same stack.

        Args:
            reference_is_base_of_model: the reference is ``model`` itself with its expanded blocks skipped.
            kl: what :meth:`kl` gave for this model at this strength, if it is known.
        """
        mean_kl, kl_se, agreement = kl or self.kl(model, reference, base_of_model=reference_is_base_of_model)
        downstream, general = _scores(model, self.downstream), _scores(model, self.general)
        before = _scores(reference, self.general) if not reference_is_base_of_model else self._base_general(model)
        return Figures(
            downstream_accuracy=_accuracy(downstream),
            downstream_nll=_nll(downstream),
            general_accuracy=_accuracy(general),
            general_nll=_nll(general),
            retention=_retention(general, before),
            kl_nats_per_token=mean_kl,
            kl_standard_error=kl_se,
            agreement=agreement,
        )

    def _base_general(self, model: ExpandedModel) -> ExampleSums | None:
        """The base's own score on the model's stack: the same model at strength 0 is the base, bit for bit."""
        strength = model.strength
        model.set_strength(0.0)
        try:
            return _scores(model, self.general)
        finally:
            model.set_strength(strength)

    def kl(self, model: ExpandedModel, reference: ExpandedModel, *, base_of_model: bool) -> tuple[float, float, float]:
        """Mean KL to the reference in nats per token, its standard error over texts, and the agreement."""
        means: list[float] = []
        weights: list[int] = []
        agree = 0
        for text in self.texts:
            sums = kl_full(reference, model, [text], p_is_base=base_of_model)
            means.append(sums.kl_sum / sums.num_tokens)
            weights.append(sums.num_tokens)
            agree += sums.num_agree
        total = sum(weights)
        mean = sum(m * w for m, w in zip(means, weights, strict=True)) / total
        variance = sum((w * (m - mean)) ** 2 for m, w in zip(means, weights, strict=True)) / total**2
        return mean, math.sqrt(variance), agree / total


def evaluate_target(
    target: Path,
    *,
    base: Path,
    downstream: Path | None,
    general: Path | None,
    strength: float | None = None,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Measure a model folder, or a run folder's published state on the 4-bit stack, beside the base.

    Args:
        strength: of a run's blocks; default: the one that the run chose within its forgetting budget.
        overrides: ``data.key=value``: how rows become tokens, where it is not that of the run folder or the default.

    Raises:
        CheckpointError: a folder holds no model.
        DataError: a file cannot be used.
    """
    checkpoint = Checkpoint.open(base)
    is_run = (target / "run.json").is_file()
    data = data_format(target if is_run else None, overrides)
    if checkpoint.shape.encoder:
        return evaluate_encoder(
            target, checkpoint, data=data, downstream=downstream, general=general, strength=strength
        )
    encoder = TextEncoder(checkpoint.folder, data)
    judge = Judge(base=checkpoint, encoder=encoder, downstream=downstream, general=general)
    base_figures = judge.base_figures()
    wanted: float | None = None
    if is_run:
        plan, state = load_final(target)
        wanted = strength_of(target, strength)
        with tempfile.TemporaryDirectory(prefix="fedblocks-") as folder:
            model = four_bit_model(checkpoint, plan, state, Path(folder))
            model.set_strength(wanted)
            figures = judge.figures(model, reference=model, reference_is_base_of_model=True)
    else:
        grown = Checkpoint.open(target)
        model = ExpandedModel(backbone=DenseBackbone(grown), checkpoint=grown)
        figures = judge.figures(model, reference=judge.dense_base, reference_is_base_of_model=False)
    return {
        "target": str(target),
        "stack": "4-bit" if is_run else "as stored",
        "strength": wanted,
        "base": asdict(base_figures),
        "model": asdict(figures),
    }


def describe(result: Mapping[str, Any]) -> str:
    """The result of :func:`evaluate_target` as a few lines."""
    if "spearman" in result["model"]:
        return describe_encoder(result)
    lines = [f"{result['target']} ({result['stack']}), beside the base:"]
    for key, label in (
        ("downstream_accuracy", "downstream accuracy"),
        ("downstream_nll", "downstream nll, nats per token"),
        ("general_accuracy", "general accuracy"),
        ("general_nll", "general nll, nats per token"),
        ("retention", "retention"),
        ("kl_nats_per_token", "KL to the base, nats per token"),
        ("agreement", "same first choice as the base"),
    ):
        before, after = result["base"][key], result["model"][key]
        if after is not None:
            lines.append(f"  {label:32} {before:8.4f} -> {after:8.4f}")
    return "\n".join(lines)


def prove_run(run: Path, *, model: Path, out: Path, downstream: Path, general: Path | None) -> dict[str, Any]:
    """Export a finished run within its forgetting budget and measure the export and the clients' 4-bit stack.

    The strength is the one that the run chose, or the highest below it whose KL as measured here, with a one-sided 95 %
    margin, is within the budget on both stacks.
    """
    checkpoint = Checkpoint.open(model)
    config = run_config.load(run / "run.toml")
    judge = Judge(
        base=checkpoint,
        encoder=TextEncoder(checkpoint.folder, data_format(run)),
        downstream=downstream,
        general=general,
    )
    plan, state = load_final(run)
    dense = ExpandedModel(backbone=DenseBackbone(checkpoint), checkpoint=checkpoint, plan=plan, state=state)
    with tempfile.TemporaryDirectory(prefix="fedblocks-") as folder:
        four_bit = four_bit_model(checkpoint, plan, state, Path(folder))
        highest = strength_of(run)
        strength, four_bit_kl = _strength_within_budget(judge, dense, four_bit, config.forgetting.max_kl, highest)
        four_bit.set_strength(strength)
        four_bit_figures = judge.figures(four_bit, reference=four_bit, reference_is_base_of_model=True, kl=four_bit_kl)
        four_bit_logits = _first_logits(four_bit, judge.texts)
        four_bit.set_strength(0.0)
        four_bit_base_kl = judge.kl(four_bit, judge.dense_base, base_of_model=False)[0]
    base_figures = judge.base_figures()
    summary = export_hf(
        checkpoint=checkpoint,
        plan=plan,
        state=state,
        strength=strength,
        out=out,
        measured={"KL to the base, nats per token (4-bit stack)": four_bit_figures.kl_nats_per_token},
    )
    grown = Checkpoint.open(out)
    exported = ExpandedModel(backbone=DenseBackbone(grown), checkpoint=grown)
    exported_figures = judge.figures(exported, reference=judge.dense_base, reference_is_base_of_model=False)
    dense.set_strength(strength)
    difference = (_first_logits(exported, judge.texts) - _first_logits(dense, judge.texts)).abs().max().item()
    return {
        "strength": strength,
        "max_kl": config.forgetting.max_kl,
        "base": asdict(base_figures),
        "exported": asdict(exported_figures),
        "four_bit": asdict(four_bit_figures),
        "four_bit_base_kl_to_fp32_base": four_bit_base_kl,
        "export_vs_client_model_max_abs_logit_difference": difference,
        "export_logit_scale": float(four_bit_logits.abs().max()),
        "max_abs_logit_difference_at_strength_0": summary.max_abs_logit_difference_at_zero,
        "base_parameters": plan.shape.total_parameters,
        "expanded_parameters": len(plan.blocks) * plan.shape.block_parameters,
    }


def _strength_within_budget(
    judge: Judge, dense: ExpandedModel, four_bit: ExpandedModel, max_kl: float, highest: float
) -> tuple[float, tuple[float, float, float]]:
    """The highest strength, up to ``highest``, at which both stacks hold the budget, and the KL of the 4-bit one."""
    for strength in (highest, *(s for s in reversed(STRENGTHS) if s < highest)):
        four_bit.set_strength(strength)
        on_four_bit = judge.kl(four_bit, four_bit, base_of_model=True)
        if on_four_bit[0] + BUDGET_ERRORS * on_four_bit[1] > max_kl:
            continue
        dense.set_strength(strength)
        kl, se, _ = judge.kl(dense, dense, base_of_model=True)
        if kl + BUDGET_ERRORS * se <= max_kl:
            return strength, on_four_bit
    raise AssertionError("strength 0 is the base: its KL is 0")


@torch.no_grad()
def _first_logits(model: ExpandedModel, texts: Sequence[npt.NDArray[np.int32]]) -> torch.Tensor:
    """Logits (T, V) of the first text."""
    ids = torch.from_numpy(texts[0].astype(np.int64)).unsqueeze(0)
    return model.rows_logits(model.forward(ids)[0]).float()


def four_bit_model(
    checkpoint: Checkpoint,
    plan: ExpansionPlan,
    state: Mapping[int, Mapping[str, npt.NDArray[np.float32]]],
    folder: Path,
) -> ExpandedModel:
    """The clients' own stack: NF4 base layers, expanded blocks in fp32."""
    backbone = Backbone.open(checkpoint, folder, base_hash=base_hash(checkpoint.folder))
    backbone.hold(decoded=range(checkpoint.shape.num_layers), dtype=torch.float32)
    return ExpandedModel(backbone=backbone, checkpoint=checkpoint, plan=plan, state=state)


def data_format(run: Path | None, overrides: tuple[str, ...] = ()) -> DataFormat:
    """How rows become tokens: as the run folder says, else by default."""
    config = run_config.load(run / "run.toml", overrides) if run else run_config.from_mapping({}, overrides)
    section = config.data
    return DataFormat(max_tokens=section.max_tokens, append_eos=section.append_eos, join=section.join)


def _scores(model: ExpandedModel, samples: Sequence[TokenisedSample]) -> ExampleSums | None:
    return evaluate_examples(model, samples) if samples else None


def _accuracy(sums: ExampleSums | None) -> float | None:
    return sums.num_correct / sums.num_items if sums else None


def _nll(sums: ExampleSums | None) -> float | None:
    return sums.nll_sum / sums.num_tokens if sums else None


def _retention(after: ExampleSums | None, before: ExampleSums | None) -> float | None:
    """Accuracy ratio; where the base answers nothing right (plain texts), the perplexity ratio base / ours."""
    if after is None or before is None:
        return None
    if before.num_correct:
        return after.num_correct / before.num_correct
    return math.exp(before.nll_sum / before.num_tokens - after.nll_sum / after.num_tokens)
