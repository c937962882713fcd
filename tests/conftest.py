"""What do all tests share? An offline, single-threaded environment and a factory of tiny random checkpoints.

Nothing heavy is imported here: the aggregator's tests run where torch is not installed.
"""

from __future__ import annotations

import itertools
import json
import os
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import settings

# Before anything imports torch or transformers: no download, and one thread, because the suite runs on two cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

# No deadline: a busy machine is not a failing test.
settings.register_profile("fedblocks", deadline=None)
settings.load_profile("fedblocks")

SPECIAL_TOKENS: Final = ("<unk>", "<s>", "</s>", "<pad>")

ARCHITECTURES: Final = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "bert": "BertModel",
}


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Callable[..., Path]:
    """The factory :func:`write_tiny_checkpoint`."""
    return write_tiny_checkpoint


def write_tiny_checkpoint(
    tmp_path: Path,
    family: str = "llama",
    layers: int = 4,
    hidden: int = 64,
    intermediate: int = 192,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 128,
    dtype: str = "float32",
    tied: bool = True,
    seed: int = 0,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> Path:
    """A new Hugging Face folder with random weights and a character tokenizer, made without transformers.

    Args:
        tmp_path: parent of the new folder.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        shards: number of safetensors files; more than one come with an index.
        config: fields of config.json to add or to overwrite (``None`` removes one).
        chat_template: Jinja text for tokenizer_config.json.
    """
    import torch
    from safetensors.torch import save_file

    from fedblocks.protocol.expansion import FAMILIES, shape_from_config

    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    if family == "mistral":
        fields["sliding_window"] = None
    if family == "qwen3":
        fields["head_dim"] = hidden // heads
    if family == "bert":
        fields |= {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "cls_token_id": 1}
        for key in ("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
            del fields[key]
    for key, value in (config or {}).items():
        if value is None and key not in ("sliding_window", "layer_types"):
            fields.pop(key, None)
        else:
            fields[key] = value

    generator = torch.Generator().manual_seed(seed)
    stored = getattr(torch, dtype)
    shape = shape_from_config(fields)

    def weight(name: str, size: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(size, generator=generator)
        if name.endswith(("norm.weight", "LayerNorm.weight")):
            return (1 + 0.1 * noise).to(stored)
        if len(size) == 1 or "embed" in name:
            return (0.3 * noise).to(stored)
        return (noise / size[1] ** 0.5).to(stored)

    record = FAMILIES[family]
    sizes: dict[str, tuple[int, ...]] = {record.embedding: (vocab, hidden)}
    for layer in range(layers):
        for spec in shape.block_tensors():
            sizes[f"{record.layer_prefix}.{layer}.{spec.name}"] = spec.shape
    if shape.encoder:
        sizes |= {
            "embeddings.position_embeddings.weight": (fields["max_position_embeddings"], hidden),
            "embeddings.token_type_embeddings.weight": (2, hidden),
            "embeddings.LayerNorm.weight": (hidden,),
            "embeddings.LayerNorm.bias": (hidden,),
            "pooler.dense.weight": (hidden, hidden),
            "pooler.dense.bias": (hidden,),
        }
    else:
        sizes["model.norm.weight"] = (hidden,)
    if not tied:
        sizes["lm_head.weight"] = (vocab, hidden)
    tensors = {name: weight(name, size) for name, size in sizes.items()}

    folder = next(path for i in itertools.count() if not (path := tmp_path / f"{family}-{dtype}-{i}").exists())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in list(tensors)[i::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    _write_character_tokenizer(folder, vocab, chat_template, framed=family == "bert")
    return folder


def _write_character_tokenizer(folder: Path, vocab: int, chat_template: str | None, *, framed: bool = False) -> None:
    """One token per printable ASCII character, as many as fit beside the four special tokens.

    Args:
        framed: put ``<s>`` and ``</s>`` around every text, as an encoder's tokenizer does.
    """
    from tokenizers import Tokenizer, decoders, models, processors

    characters = (string.ascii_lowercase + " " + string.digits + string.ascii_uppercase + string.punctuation + "\n")[
        : vocab - len(SPECIAL_TOKENS)
    ]
    ids = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *characters))}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    if framed:
        special = [(token, ids[token]) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": 512,
    }
    if chat_template is not None:
        fields["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2))
