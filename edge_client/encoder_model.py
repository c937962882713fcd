"""How does an expanded encoder compute? A stack of post-norm blocks, and one embedding for each text.

Where blocks stand in the slot after a base layer, that layer emits its output without gamma and beta
(``affine_migration.py``): so does the hidden state "at the base cut". The base itself is computed with the layers' own
norms, its blocks skipped.

The embedding is that of sentence-transformers (Reimers and Gurevych, 1908.10084): the mean over the text's tokens,
divided by its length. A classification head reads it times the root of its size: coordinates of about 1, whatever the
model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fedblocks.edge_client.affine_migration import OUTPUT_NORM, normalised_layers, plain_norm
from fedblocks.edge_client.checkpoint import CheckpointError
from fedblocks.edge_client.decoder_block import BlockSpec, BlockWeights
from fedblocks.edge_client.encoder_block import LINEARS, encoder_forward
from fedblocks.edge_client.expanded_model import Chosen, ExpandedModel, ParamGroup, State
from fedblocks.edge_client.recompute import recomputed
from fedblocks.profiles.model_shape import TensorSpec
from fedblocks.profiles.units import EXTRA_UNIT, NamedTensors, block_units

if TYPE_CHECKING:
    from fedblocks.profiles.cost import OptimizerMode

WORDS: Final = "embeddings.word_embeddings.weight"
HEAD_WEIGHT: Final = "head.weight"
HEAD_BIAS: Final = "head.bias"
POOLING_FILE: Final = "1_Pooling/config.json"
"""Where sentence-transformers says how a text's vectors become one."""


def classification_head(hidden_size: int, num_labels: int) -> NamedTensors:
    """The extra tensor set of an encoder's run: zero at the start, so that all labels are alike."""
    return NamedTensors(
        name="classification head",
        tensors=(
            TensorSpec(name=HEAD_WEIGHT, shape=(num_labels, hidden_size)),
            TensorSpec(name=HEAD_BIAS, shape=(num_labels,)),
        ),
    )


class EncoderModel(ExpandedModel):
    """The base encoder with its expanded blocks, at some state and strength.

    The arguments are those of :class:`ExpandedModel`.

    Raises:
        CheckpointError: the base's folder wants another pooling than the mean.
    """

    embedding_name = WORDS
    linears = LINEARS

    def _set_up(self, config: Mapping[str, Any]) -> None:
        check_pooling(self.checkpoint.folder)
        self._eps = float(config.get("layer_norm_eps", 1e-12))
        self._specs = [BlockSpec(shape=self.shape, eps=self._eps)] * len(self.stack)
        self._normalised = normalised_layers(self.plan) if self.plan is not None else frozenset[int]()
        self._around: dict[str, Tensor] = {}  # tensors of the embedding, but for the words
        self._head: dict[str, Tensor] = {}  # the head as it is published, or the leaves that train

    def _below(self, name: str) -> Tensor:
        """A tensor of the embedding in the compute dtype."""
        if name not in self._around:
            self._around[name] = self.checkpoint.tensor(f"embeddings.{name}").to(self.device, self.dtype)
        return self._around[name]

    # The head

    def class_logits(self, embeddings: Tensor) -> Tensor:
        """Logits (B, classes) fp32 of normalised embeddings (B, H).

        Raises:
            ValueError: the plan has no head.
        """
        if not self._head:
            self._head = self._published_head()
        return functional.linear(
            embeddings.float() * self.shape.hidden_size**0.5, self._head[HEAD_WEIGHT], self._head[HEAD_BIAS]
        )

    def set_head(self, weight: Tensor, bias: Tensor) -> None:
        """Another head than the plan's, fp32: that of an export, which has no plan."""
        self._head = {HEAD_WEIGHT: weight.to(self.device), HEAD_BIAS: bias.to(self.device)}

    def _published_head(self) -> dict[str, Tensor]:
        if self.plan is None or self.plan.extra is None:
            raise ValueError("this plan has no classification head (extra tensors); make the run with fedblocks init")
        return {spec.name: self._start(EXTRA_UNIT, spec).to(self.device) for spec in self.plan.extra.tensors}

    def _start(self, block_id: int, spec: TensorSpec, state: State | None = None) -> Tensor:
        if block_id != EXTRA_UNIT:
            return super()._start(block_id, spec, state)
        delta = (self._state if state is None else state).get(EXTRA_UNIT, {}).get(spec.name)
        return torch.zeros(spec.shape) if delta is None else torch.from_numpy(np.array(delta, dtype=np.float32))

    def load_state(self, state: State, version: int = 0) -> None:
        """As the decoder's; the head too."""
        super().load_state(state, version)
        self._head.clear()

    def train_blocks(
        self, blocks: Sequence[int], optimizer: OptimizerMode = "fp32", width: float = 1.0
    ) -> list[ParamGroup]:
        """As the decoder's; :data:`EXTRA_UNIT` among the blocks is the head."""
        groups = super().train_blocks([block for block in blocks if block != EXTRA_UNIT], optimizer, width)
        self._head = {}
        return [*groups, self._train_head()] if EXTRA_UNIT in blocks else groups

    def _train_head(self) -> ParamGroup:
        """The head as leaves, fp32 whatever the optimizer."""
        self._head = {name: value.requires_grad_() for name, value in self._published_head().items()}
        return ParamGroup(name=f"block {EXTRA_UNIT}", tensors=tuple(self._head.values()), named=dict(self._head))

    def train_units(
        self,
        units: Sequence[int],
        optimizer: OptimizerMode = "fp32",
        width: float = 1.0,
        chosen: Chosen | None = None,
    ) -> list[ParamGroup]:
        """As the decoder's; :data:`EXTRA_UNIT` among the units is the head."""
        groups = super().train_units(block_units(units), optimizer, width, chosen)
        return [*groups, self._train_head()] if EXTRA_UNIT in units else groups

    # How it computes

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) int64, each row from its text's first token on -> (B, T, H)."""
        return self._embedded(ids, torch.arange(ids.shape[1], device=self.device))

    def embed_samples(self, samples: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        """As the decoder's; positions begin with each sample."""
        ids = torch.from_numpy(np.concatenate(samples).astype(np.int64))
        positions = np.concatenate([np.arange(len(sample)) for sample in samples])
        return self._embedded(ids, torch.from_numpy(positions).to(self.device))

    def _embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        places = self._below("position_embeddings.weight")
        if ids.shape[-1] and int(positions.max()) >= len(places):
            raise ValueError(
                f"a text of {int(positions.max()) + 1} tokens, this model has {len(places)} positions; lower "
                "data.max_tokens"
            )
        x = super().embed(ids) + self._below("token_type_embeddings.weight")[0] + places[positions]
        weight, bias = self._below("LayerNorm.weight"), self._below("LayerNorm.bias")
        return functional.layer_norm(x, (self.shape.hidden_size,), weight, bias, self._eps)

    def forward(  # type: ignore[override]
        self,
        inputs: Tensor,
        from_position: int = 0,
        to_position: int | None = None,
        rows: None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Runs the blocks ``from_position .. to_position - 1`` over padded rows.

        Args:
            inputs: hidden states (B, T, H) entering ``from_position``, or token ids (B, T) where that is 0.
            lengths: (B,) int64, real tokens of each row; None: all.

        Returns:
            (B, T, H); what stands at pads means nothing.
        """
        assert rows is None
        h = inputs if inputs.is_floating_point() else self.embed(inputs)
        for position in range(from_position, self.num_positions if to_position is None else to_position):
            h = self.run(h, position, lengths=lengths)
        return h

    def forward_base(self, inputs: Tensor, from_position: int = 0, lengths: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """As :meth:`forward` to the top, skipping every expanded block: the base itself (the teacher)."""
        h = inputs if inputs.is_floating_point() else self.embed(inputs)
        entry = self.stack[from_position] if from_position < self.num_positions else None
        below = self.stack[from_position - 1] if from_position else None
        if below is not None and below.kind == "base" and entry is not None and entry.kind == "block":
            name = self.checkpoint.layer_name(below.index, OUTPUT_NORM)
            gamma, beta = (self.checkpoint.tensor(f"{name}.{kind}").to(h) for kind in ("weight", "bias"))
            h = torch.addcmul(beta, h, gamma)
        with self.base_only():
            for position in range(from_position, self.num_positions):
                if self.stack[position].kind == "base":
                    h = encoder_forward(h, self.weights(position), self._specs[position], lengths)
        return h

    def run(
        self,
        h: Tensor,
        position: int,
        weights: BlockWeights | None = None,
        rows: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """One position of the stack: (B, T, H) -> (B, T, H)."""
        assert rows is None
        weights, spec = weights or self.weights(position), self._specs[position]
        entry = self.stack[position]
        if entry.kind == "base" and entry.index in self._normalised:
            weights = _emitting_normalised(weights)
        if self.recompute and torch.is_grad_enabled():
            return recomputed(lambda x: encoder_forward(x, weights, spec, lengths), h)
        return encoder_forward(h, weights, spec, lengths)


def _emitting_normalised(weights: BlockWeights) -> BlockWeights:
    """The layer without its last gamma and beta."""
    assert weights.output_norm is not None
    assert weights.output_norm_bias is not None
    return replace(
        weights,
        output_norm=plain_norm("weight", weights.output_norm),
        output_norm_bias=plain_norm("bias", weights.output_norm_bias),
    )


def pooled(h: Tensor, lengths: Tensor) -> Tensor:
    """The embeddings of texts, of length 1: (B, T, H) -> (B, H) fp32.

    Args:
        lengths: (B,) int64, real tokens of each.
    """
    real = (torch.arange(h.shape[1], device=h.device) < lengths.unsqueeze(1)).unsqueeze(2)
    mean = torch.where(real, h.float(), 0.0).sum(1) / lengths.unsqueeze(1)
    return functional.normalize(mean, dim=1)


def check_pooling(folder: Path) -> None:
    """Raises:
    CheckpointError: the folder says that its embedding is not the mean over the tokens.
    """
    path = folder / POOLING_FILE
    if not path.is_file():
        return
    try:
        settings = json.loads(path.read_bytes())
        modes = sorted(key for key, value in settings.items() if key.startswith("pooling_mode") and value is True)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: no JSON object: {error}; copy the checkpoint again") from error
    if modes != ["pooling_mode_mean_tokens"]:
        raise CheckpointError(
            f"{path}: pooling is {modes or 'not said'}, expected pooling_mode_mean_tokens alone: drift and head are "
            "about the mean over the tokens; what works: a base whose embedding is the mean"
        )
