"""How is the bundled starter model made? Seeded pre-training on generated documents, one thread, no download.

    python benchmarks/starter/pretrain.py --seed 20 --tokens 9000000 --out edge_client/starter/model

The result depends on seed and tokens, not on wall time. Recipe: 32-token documents first, then 256-token documents
(the length of the anchor set) for the last 40 % of the tokens; about 1 k tokens a step; answer tokens weigh 5, prompt
tokens 1 (they must be learnt too, or nothing could be sampled from the model); AdamW, 100 steps of warm-up, constant to
30 %, then cosine to 2 %.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from fedblocks.edge_client.starter.exact import exact_by_skill
from fedblocks.edge_client.starter.skills import (
    BOS,
    EOS,
    PAD,
    SKILLS,
    UNK,
    VOCABULARY,
    Document,
    document,
    general_items,
    seeded,
)

IDS = {token: i for i, token in enumerate(VOCABULARY)}

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": IDS[BOS],
    "eos_token_id": IDS[EOS],
    "pad_token_id": IDS[PAD],
    "torch_dtype": "bfloat16",
}
"""config.json as written: the plain Llama fields that every transformers version reads."""

ANSWER_WEIGHT = 5.0
SHORT, LONG = (32, 32), (4, 256)
"""(documents a step, tokens a document): 1024 tokens a step in both phases."""
SHORT_SHARE = 0.6
PEAK_LR = 2e-3


def write_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Writes the word-level tokenizer and returns it as transformers loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel(vocab=IDS, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([UNK, BOS, EOS, PAD])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, IDS[BOS])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNK,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": CONFIG["max_position_embeddings"],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(folder)


def write_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes config.json, generation_config.json and bf16 weights; the tied head is not written twice."""
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600, which a wheel would keep
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    generation = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def batch(documents: list[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) and the weight of predicting each of them (B, T)."""
    ids = torch.tensor([[IDS[token] for token in doc.tokens] for doc in documents])
    weight = torch.tensor([[ANSWER_WEIGHT if answer else 1.0 for answer in doc.is_answer] for doc in documents])
    return ids, weight


def rate(done: float, step: int) -> float:
    """Learning rate after the share `done` of all tokens: warm-up, constant to 30 %, cosine to 2 %."""
    if done < 0.3:
        return PEAK_LR * min(1.0, (step + 1) / 100)
    return PEAK_LR * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - 0.3) / 0.7)))


def pretrain(seed: int, tokens: int, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Trains from scratch for `tokens` document tokens and prints the validation accuracy now and then."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"})).float()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    rng = seeded(seed, "documents")
    steps = tokens // (SHORT[0] * SHORT[1])
    began = time.perf_counter()
    for step in range(steps):
        done = step / steps
        count, length = SHORT if done < SHORT_SHARE else LONG
        ids, weight = batch([document(rng, length) for _ in range(count)])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # (B, T-1, V)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weight[:, 1:].flatten()
        loss = (loss * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(done, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            scores = exact_by_skill(
                lambda x: model(input_ids=x).logits, tokenizer, general_items(seed, 100, "validation")
            )
            line = " ".join(f"{name} {score:.2f}" for name, score in scores.items())
            seconds = time.perf_counter() - began
            print(f"step {step + 1}/{steps} loss {loss.item():.3f} {seconds:.0f} s  {line}", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=9_000_000, help="document tokens in all")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = write_tokenizer(args.out)
    began = time.perf_counter()
    model = pretrain(args.seed, args.tokens, tokenizer)
    seconds = time.perf_counter() - began
    write_model(model, args.out)
    record = {"seed": args.seed, "tokens": args.tokens, "seconds": round(seconds), "skills": list(SKILLS)}
    (args.out / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"wrote {args.out}: {parameters} parameters, {args.tokens} tokens, {seconds:.0f} s")


if __name__ == "__main__":
    main()
