"""How good is the shipped starter model? Measures the folder and writes MODEL_CARD.md and card.json into it.

    python benchmarks/starter/card.py

fp32: the stored bf16 weights computed in fp32. bf16: computed in bf16. nf4: all seven projections quantised to NF4 in
blocks of 64 with double quantised scales (bitsandbytes), decoded and computed in fp32; embedding and norms as stored.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fedblocks.edge_client.starter import frozen_task_file, starter_folder
from fedblocks.edge_client.starter.exact import encode, exact_by_skill
from fedblocks.edge_client.starter.skills import ANSWER, BOS, MIX, SKILLS, TERMINATOR, Example, general_items
from fedblocks.edge_client.starter.tasks import LABELS, TASKS, frozen_evaluation

SAMPLE_SEED, SEQUENCES, LENGTH = 8120, 64, 256


def nf4_copy(folder: Path) -> PreTrainedModel:
    """The model with every projection replaced by its NF4 image, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            codes, state = bnb.quantize_4bit(
                module.weight.data, blocksize=64, quant_type="nf4", compress_statistics=True
            )
            module.weight.data = bnb.dequantize_4bit(codes, state).reshape(module.weight.shape).float()
    return model


@torch.no_grad()
def sample(model: PreTrainedModel, start: int) -> torch.Tensor:
    """Ancestral sampling at temperature 1 from the start token: ids (SEQUENCES, LENGTH)."""
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    ids = torch.full((SEQUENCES, 1), start)
    cache = None
    while ids.shape[1] < LENGTH:
        out = model(input_ids=ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        following = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, following], 1)
    return ids


@torch.no_grad()
def kl(base: PreTrainedModel, other: PreTrainedModel, ids: torch.Tensor) -> float:
    """Mean over positions of KL(base || other), nats a token, full vocabulary."""
    p, q = (model(input_ids=ids).logits.double().log_softmax(-1) for model in (base, other))
    return (p.exp() * (p - q)).sum(-1)[:, :-1].mean().item()


def sampled_shares(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> dict[str, float]:
    """Share of each skill among the complete sampled examples; "malformed" is what is not `skill ... : ... ;`."""
    kinds: Counter[str] = Counter()
    for row in ids.tolist():
        words = tokenizer.convert_ids_to_tokens(row)[1:]
        for text in " ".join(words).split(f" {TERMINATOR}")[:-1]:
            parts = text.split()
            well_formed = parts[:1] and parts[0] in SKILLS and parts.count(ANSWER) == 1 and BOS not in parts
            kinds[parts[0] if well_formed else "malformed"] += 1
    return {name: kinds[name] / sum(kinds.values()) for name in (*SKILLS, "malformed")}


@torch.no_grad()
def label_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[Example]) -> float:
    """Share right if only the task's labels may be answered: at chance even where the base answers something else."""
    labels = LABELS[items[0].skill]
    label_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(labels)))
    right = 0
    for item in items:
        ids, answer = encode(tokenizer, item)
        logits = model(input_ids=torch.tensor([ids[:-answer]])).logits[0, -1]
        right += labels[int(logits[label_ids].argmax())] == item.label
    return right / len(items)


def measure(folder: Path) -> dict:
    """All figures of the card."""
    frozen = json.loads(frozen_task_file().read_text())["evaluation"]["test"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    models = {
        "fp32": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        "bf16": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        "nf4": nf4_copy(folder),
    }
    items = general_items(frozen["seed"], frozen["items_per_skill"], "test")
    accuracy = {
        kind: exact_by_skill(lambda ids, model=model: model(input_ids=ids).logits, tokenizer, items)
        for kind, model in models.items()
    }
    base = models["fp32"]
    ids = sample(base, tokenizer.bos_token_id)
    downstream = {}
    for task in TASKS:
        examples = frozen_evaluation(task, "test")
        downstream[task] = {
            "n": len(examples),
            "chance": 1 / len(LABELS[task]),
            "exact": exact_by_skill(lambda x: base(input_ids=x).logits, tokenizer, examples)[task],
            "among_labels": label_accuracy(base, tokenizer, examples),
        }
    return {
        "pretrain": json.loads((folder / "pretrain.json").read_text()),
        "parameters": sum(p.numel() for p in base.parameters()),
        "items_per_skill": frozen["items_per_skill"],
        "items_seed": frozen["seed"],
        "accuracy": accuracy,
        "mean": {kind: sum(scores.values()) / len(scores) for kind, scores in accuracy.items()},
        "kl_nats_per_token": {"nf4": kl(base, models["nf4"], ids), "bf16": kl(base, models["bf16"], ids)},
        "sampled": {
            "sequences": SEQUENCES,
            "tokens": LENGTH,
            "seed": SAMPLE_SEED,
            "shares": sampled_shares(tokenizer, ids),
        },
        "downstream_before": downstream,
    }


def rounded(value: object) -> object:
    """Floats to five places, so that the file stays readable."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return round(value, 5) if isinstance(value, float) else value


def card_text(figures: dict) -> str:
    """MODEL_CARD.md."""
    made, accuracy = figures["pretrain"], figures["accuracy"]
    n = figures["items_per_skill"]
    mix = {skill: MIX[skill] / sum(MIX.values()) for skill in SKILLS}
    rows = [
        f"| {s} | {' | '.join(f'{accuracy[k][s]:.3f}' for k in accuracy)} | {mix[s]:.3f} | "
        f"{figures['sampled']['shares'][s]:.3f} |"
        for s in SKILLS
    ]
    tasks = [
        f"| {task} | {row['exact']:.3f} | {row['among_labels']:.3f} | {row['chance']:.2f} | {row['n']} | "
        f"{math.sqrt(row['chance'] * (1 - row['chance']) / row['n']):.3f} |"
        for task, row in figures["downstream_before"].items()
    ]
    return f"""# Starter model

A Llama-architecture decoder of {figures["parameters"]:,} parameters (6 layers, width 64, tied embeddings, word-level
vocabulary) that knows {len(SKILLS)} small general skills. It exists so that demo, tests and evidence of fedblocks need
no download. It knows nothing about the world: its facts are invented. Licence: Apache-2.0; all training text is
generated.

Made by

    python benchmarks/starter/pretrain.py --seed {made["seed"]} --tokens {made["tokens"]} \\
        --out edge_client/starter/model
    python benchmarks/starter/card.py

seed {made["seed"]}, {made["tokens"]:,} document tokens, {made["seconds"]} s in one thread on a shared 2-core machine.

Tried before: 9,000,000 tokens with a smaller share of `copy` and `count` and 4 to 7 letters to count left copy at 0.86
and count at 0.81, all others at 1.00. Seed 21 with the present settings was trained as well and gave 1.000 on every
skill; seed 20 had been named first and is the one shipped.

## Text format

`prompt` + `completion`, for example `copy a b c :` + ` a b c ;`. Tokens are separated by blanks. The completion starts
with a blank and ends in the terminator `;`, which is part of the answer. The tokenizer puts `<bos>` in front (once, at
the start of a document); `<eos>` was never shown in training and never ends an answer. Pre-training documents are
streams of examples, 32 tokens long first and 256 tokens for the last 40 % of the schedule.

## Exact answers

Greedy, every answer token and the terminator right; {n} held-out prompts a skill (standard error at 0.97:
{math.sqrt(0.97 * 0.03 / n):.3f}), seed {figures["items_seed"]}, split "test" of `skills.general_items`. Facts have no
held-out split by nature: those prompts were in training. fp32 computes the stored bf16 weights in fp32; NF4 has all
seven projections in blocks of 64 with double quantised scales.

| skill | {" | ".join(accuracy)} | share in training | share in sampled text |
|---|{"---|" * len(accuracy)}---|---|
{chr(10).join(rows)}
| mean | {" | ".join(f"{figures['mean'][k]:.4f}" for k in accuracy)} | | |

KL(base fp32 || NF4) is {figures["kl_nats_per_token"]["nf4"]:.4f} nats a token and KL(base fp32 || bf16)
{figures["kl_nats_per_token"]["bf16"]:.5f}, on {SEQUENCES} x {LENGTH} tokens sampled from the base at temperature 1
(seed {SAMPLE_SEED}): the floor of every KL measured on the 4-bit stack. Of the sampled examples
{100 * figures["sampled"]["shares"]["malformed"]:.1f} % are malformed.

## Downstream tasks before training

| task | exact | right among the five labels | chance | n | standard error at chance |
|---|---|---|---|---|---|
{chr(10).join(tasks)}

## What preceded this model

An exploration on two other bases and seven other downstream tasks, with expanded blocks among the methods tried,
preceded this model and its tasks; they were not a blind choice. The rule taken from it: general skills share tokens and
formats with the downstream tasks and keep word identity. Maps and pilot seed were then drawn anew, and
`frozen_task.json` fixes the rest with FedAvg full fine-tuning and FedAvg-LoRA only.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=starter_folder(), help="model folder to measure and write to")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    figures = rounded(measure(folder))
    (folder / "card.json").write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "MODEL_CARD.md").write_text(card_text(figures))
    print((folder / "MODEL_CARD.md").read_text())


if __name__ == "__main__":
    main()
