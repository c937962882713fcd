"""Is the greedy answer exactly right? Measured in one forward pass, terminator included.

Greedy decoding gives the reference answer if and only if every answer token is the argmax after the tokens before it,
so no generation loop is needed.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from fedblocks.edge_client.starter.skills import Example

Logits = Callable[[torch.Tensor], torch.Tensor]
"""ids (B, T) int64 -> logits (B, T, V)."""


def encode(tokenizer: PreTrainedTokenizerBase, item: Example) -> tuple[list[int], int]:
    """Ids of `<bos>` + prompt + completion, and how many of them at the end are the completion's."""
    prompt = tokenizer(item.prompt)["input_ids"]  # the tokenizer puts <bos> in front
    completion = tokenizer(item.completion, add_special_tokens=False)["input_ids"]
    return prompt + completion, len(completion)


@torch.no_grad()
def exact_answers(
    logits: Logits, tokenizer: PreTrainedTokenizerBase, items: Sequence[Example], batch_size: int = 256
) -> list[bool]:
    """One bool per item, in order: all answer tokens and the terminator are the argmax."""
    encoded = [encode(tokenizer, item) for item in items]
    order = sorted(range(len(items)), key=lambda i: len(encoded[i][0]))
    right = [False] * len(items)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(encoded[i][0]) for i in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)  # padded on the right: causal, so never looked at
        for row, i in enumerate(chosen):
            ids[row, : len(encoded[i][0])] = torch.tensor(encoded[i][0])
        guess = logits(ids).argmax(-1)  # (B, T)
        for row, i in enumerate(chosen):
            length, answer = len(encoded[i][0]), encoded[i][1]
            right[i] = torch.equal(guess[row, length - answer - 1 : length - 1], ids[row, length - answer : length])
    return right


def exact_by_skill(
    logits: Logits, tokenizer: PreTrainedTokenizerBase, items: Sequence[Example], batch_size: int = 256
) -> dict[str, float]:
    """Share of exactly right answers per skill (or task) name, in order of first appearance."""
    right = exact_answers(logits, tokenizer, items, batch_size)
    names = dict.fromkeys(item.skill for item in items)
    return {
        name: sum(ok for ok, item in zip(right, items, strict=True) if item.skill == name)
        / sum(item.skill == name for item in items)
        for name in names
    }
