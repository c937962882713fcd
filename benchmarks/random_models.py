"""What do the benchmarks of speed and memory run on? Checkpoints of known shapes with random weights.

Speed and memory depend on sizes, not on values, so nothing is downloaded. A folder is an ordinary Hugging Face
checkpoint (bf16 safetensors, one shard per layer, config.json), without a tokenizer: the benchmarks speak token ids.
It is written shard by shard, so that at most one is in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedblocks.profiles.model_shape import ModelShape
from fedblocks.protocol.expansion import shape_from_config

ARCHITECTURES: Final = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
DEVIATION: Final = 0.02
"""Standard deviation of an embedding entry; a matrix has 1/√in, which keeps the residual stream finite at any depth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModel:
    """The sizes of one random checkpoint."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = True

    def config(self) -> dict[str, Any]:
        """The fields of config.json."""
        return {
            "architectures": [ARCHITECTURES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    @property
    def shape(self) -> ModelShape:
        """The same as the client reads it from config.json."""
        return shape_from_config(self.config())

    @property
    def num_bytes(self) -> int:
        """Size of the weights on disk."""
        return 2 * self.shape.total_parameters


MODELS: Final = {
    "m15": RandomModel(
        family="llama", layers=6, hidden=256, intermediate=1024, heads=4, kv_heads=4, head_dim=64, vocab=32000
    ),
    "m135": RandomModel(
        family="llama", layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152
    ),
    "qwen05": RandomModel(
        family="qwen2", layers=24, hidden=896, intermediate=4864, heads=14, kv_heads=2, head_dim=64, vocab=151936
    ),
    "llama1b": RandomModel(
        family="llama", layers=16, hidden=2048, intermediate=8192, heads=32, kv_heads=8, head_dim=64, vocab=128256
    ),
    "qwen7b": RandomModel(
        family="qwen2",
        layers=28,
        hidden=3584,
        intermediate=18944,
        heads=28,
        kv_heads=4,
        head_dim=128,
        vocab=152064,
        tied=False,
    ),
}
"""By the name that the benchmarks give them. Widths are multiples of 64: at others bitsandbytes' CPU decoder is wrong
(runtime.md 5.1). From ``m135`` on the sizes are those of published models."""


def write_random_model(folder: Path, model: RandomModel, *, seed: int = 0) -> Path:
    """Writes the checkpoint, or finds it whole in ``folder`` from before; ``folder`` itself.

    config.json is written last, so that a folder without it is one whose writing was broken off.
    """
    config = json.dumps(model.config(), indent=1)
    done = folder / "config.json"
    if done.is_file() and done.read_text(encoding="utf-8") == config:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    count = model.layers + 1
    for i, sizes in enumerate(_shards(model), start=1):
        file = f"model-{i:05d}-of-{count:05d}.safetensors"
        tensors = {name: random_tensor(name, size, generator) for name, size in sizes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": model.num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    done.write_text(config, encoding="utf-8")
    return folder


def _shards(model: RandomModel) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and sizes of the tensors of each file: the ends of the model, then its layers."""
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (model.vocab, model.hidden),
        "model.norm.weight": (model.hidden,),
    }
    if not model.tied:
        ends["lm_head.weight"] = (model.vocab, model.hidden)
    yield ends
    for layer in range(model.layers):
        yield {f"model.layers.{layer}.{spec.name}": spec.shape for spec in model.shape.block_tensors()}


def random_tensor(name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A tensor of a checkpoint in bf16, on the generator's device."""
    if name.endswith("norm.weight"):
        return torch.ones(size, dtype=torch.bfloat16, device=generator.device)
    wide = name in ("model.embed_tokens.weight", "lm_head.weight")
    deviation = DEVIATION if wide or len(size) == 1 else size[1] ** -0.5
    return torch.empty(size, dtype=torch.bfloat16, device=generator.device).normal_(0, deviation, generator=generator)
