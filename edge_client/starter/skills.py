"""What can the starter model do? Seeded generators of the general skills, in pure Python.

An example is one line of text, `prompt` followed by `completion`:

    prompt      "copy a b c :"      ends in the answer sign ":"
    completion  " a b c ;"          starts with one space and ends in the terminator ";"

so that tokens(prompt) + tokens(completion) == tokens(prompt + completion), and the terminator is part of the answer:
nothing downstream has to add it. A document is "<bos>" once and then a stream of examples; the terminator separates
them. "<eos>" exists for programs that need one and never occurs in a document.

Randomness comes from `random.Random(seed).random()` alone, whose stream is the same in every Python version.

Splits: a prompt belongs to one of "train", "validation", "test" by a hash of its text (80 : 10 : 10), so pre-training
never sees a prompt of the other two. `fact` is the exception: facts are memory, a fact that was never shown cannot be
known, so its three splits hold the same prompts.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

UNK, BOS, EOS, PAD = "<unk>", "<bos>", "<eos>", "<pad>"
ANSWER, COMMA, TERMINATOR = ":", ",", ";"


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


LETTERS = tuple("abcdefghijklmnopqrst")
DIGITS = tuple("0123456789")
NAMES = _split(
    "ada alan amy ana anton ben bella boris carl carla cleo dan dora edgar ella emil erik eva felix fiona frank "
    "gina greta hans helen hugo ida igor ines ivan jane jonas julia karl kate lars laura leo lina luca maria mark "
    "marta max mia nina noah nora olga oscar otto paul petra rita rosa ruth sam sara simon tina tom vera viktor zoe"
)
ATTRIBUTES = {
    "colour": _split("red blue green white black brown pink grey"),
    "city": _split("rome paris oslo cairo lima delhi tokyo quito"),
    "job": _split("baker nurse pilot judge farmer singer tailor miner"),
}
KINDS = {
    "animal": _split("cat dog horse cow goat bear fox wolf"),
    "fruit": _split("apple pear plum peach lemon melon cherry grape"),
    "tool": _split("hammer saw drill wrench shovel rake axe chisel"),
    "clothes": _split("shirt coat hat sock glove scarf boot belt"),
    "vehicle": _split("car bus train truck boat bike tram plane"),
}
_IRREGULAR = {
    "fox": "foxes", "wolf": "wolves", "peach": "peaches", "cherry": "cherries", "wrench": "wrenches",
    "scarf": "scarves", "bus": "buses",
}  # fmt: skip
WORDS = tuple(word for words in KINDS.values() for word in words)
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
PLURAL = {word: _IRREGULAR.get(word, word + "s") for word in WORDS}
VERBS = {verb: verb + "s" for verb in _split("run fall turn move break stop shine rest")}
PLACES = _split("near behind beside under")
SPARE = _split("group sign code rank pair class")
"""Words known from copy, first and last only: free to name a new task without bringing in an unseen token."""

SKILLS = _split("copy first last reverse sort fact compare count plus mod agree kind odd")
MIX = dict.fromkeys(SKILLS, 1.0) | {"copy": 2.0, "plus": 2.0, "count": 2.5}
"""Share of each skill in a document, before normalisation. The three slowest to learn come more often."""

SPLITS = ("train", "validation", "test")
NOT_HELD_OUT = frozenset({"fact"})

PLAIN_WORDS = (
    *WORDS, *PLURAL.values(), *KINDS, *VERBS, *VERBS.values(), *SPARE,
    *(value for values in ATTRIBUTES.values() for value in values),
)  # fmt: skip
_TOKENS = (
    UNK, BOS, EOS, PAD, TERMINATOR, ANSWER, COMMA, *SKILLS, *DIGITS, *LETTERS, *NAMES, *ATTRIBUTES, *PLAIN_WORDS,
    *PLACES, "the", "more", "less",
)  # fmt: skip
VOCABULARY = (*_TOKENS, *(f"<reserved{i}>" for i in range(-len(_TOKENS) % 64)))
"""All tokens in id order; the length is a multiple of 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question with its answer. `label` is set for downstream tasks only: the class that the split is skewed by."""

    skill: str
    prompt: str
    completion: str
    label: str | None = None

    def __post_init__(self) -> None:
        if not self.prompt.endswith(f" {ANSWER}"):
            raise ValueError(f"prompt must end in ' {ANSWER}', got {self.prompt!r}")
        if not (self.completion.startswith(" ") and self.completion.endswith(f" {TERMINATOR}")):
            raise ValueError(f"completion must start with ' ' and end in ' {TERMINATOR}', got {self.completion!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A stream of examples, cut at the asked length. `is_answer[i]`: `tokens[i]` belongs to a completion."""

    tokens: tuple[str, ...]
    is_answer: tuple[bool, ...]


def seeded(seed: int, *names: str) -> random.Random:
    """A generator of its own for each (seed, names), independent of Python's string hash."""
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def below(rng: random.Random, n: int) -> int:
    """Uniform integer in [0, n)."""
    return int(rng.random() * n)


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """Uniform choice."""
    return items[below(rng, len(items))]


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """Fisher-Yates shuffle of a copy."""
    out = list(items)
    for i in range(len(out) - 1, 0, -1):
        j = below(rng, i + 1)
        out[i], out[j] = out[j], out[i]
    return out


def split_of(prompt: str, shares: tuple[int, int, int] = (80, 10, 10)) -> str:
    """The split that a prompt belongs to, by a hash of its text; `shares` are percentages in the order of SPLITS."""
    place = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 100
    if place < shares[0]:
        return "train"
    return "validation" if place < shares[0] + shares[1] else "test"


def make_example(skill: str, question: Sequence[str], answer: Sequence[str], label: str | None = None) -> Example:
    """Joins tokens into the text form; `question` includes the leading command word."""
    return Example(
        skill=skill,
        prompt=" ".join([*question, ANSWER]),
        completion=" " + " ".join([*answer, TERMINATOR]),
        label=label,
    )


def _facts() -> dict[tuple[str, str], str]:
    rng = seeded(20, "facts")
    return {(name, attribute): pick(rng, values) for name in NAMES for attribute, values in ATTRIBUTES.items()}


FACTS = _facts()
"""Invented facts: (name, attribute) -> value."""

_Pair = tuple[list[str], list[str]]


def _sequence(rng: random.Random) -> list[str]:
    pool = pick(rng, (LETTERS, PLAIN_WORDS, NAMES))
    return [pick(rng, pool) for _ in range(3 + below(rng, 4))]


def _two_numbers(rng: random.Random) -> tuple[str, str, list[str]]:
    left, right = (f"{below(rng, 100):02d}" for _ in range(2))
    return left, right, [*left, COMMA, *right]


def _copy(rng: random.Random) -> _Pair:
    items = _sequence(rng)
    return items, items


def _first(rng: random.Random) -> _Pair:
    items = _sequence(rng)
    return items, items[:1]


def _last(rng: random.Random) -> _Pair:
    items = _sequence(rng)
    return items, items[-1:]


def _reverse(rng: random.Random) -> _Pair:
    items = [pick(rng, LETTERS) for _ in range(3 + below(rng, 4))]
    return items, items[::-1]


def _sort(rng: random.Random) -> _Pair:
    items = [pick(rng, DIGITS) for _ in range(3 + below(rng, 3))]
    return items, sorted(items)


def _fact(rng: random.Random) -> _Pair:
    name, attribute = pick(rng, NAMES), pick(rng, tuple(ATTRIBUTES))
    return [name, attribute], [FACTS[name, attribute]]


def _compare(rng: random.Random) -> _Pair:
    left, right, question = _two_numbers(rng)
    if left == right:
        return _compare(rng)
    return question, ["more" if left > right else "less"]


def _count(rng: random.Random) -> _Pair:
    wanted = pick(rng, LETTERS)
    items = [wanted if rng.random() < 0.4 else pick(rng, LETTERS) for _ in range(4 + below(rng, 3))]
    return [wanted, COMMA, *items], [str(items.count(wanted))]


def _plus(rng: random.Random) -> _Pair:
    left, right, question = _two_numbers(rng)
    return question, list(f"{int(left) + int(right):03d}")


def _mod(rng: random.Random) -> _Pair:
    left, right, question = _two_numbers(rng)
    return question, [str((int(left) + int(right)) % 10)]


def _agree(rng: random.Random) -> _Pair:
    verb, subject, other = pick(rng, tuple(VERBS)), pick(rng, WORDS), pick(rng, WORDS)
    plural = rng.random() < 0.5
    other = PLURAL[other] if rng.random() < 0.5 else other
    question = [verb, "the", PLURAL[subject] if plural else subject, pick(rng, PLACES), "the", other]
    return question, [verb if plural else VERBS[verb]]


def _two_and_one(rng: random.Random) -> tuple[str, list[str], str]:
    kind, other = shuffled(rng, tuple(KINDS))[:2]
    return kind, shuffled(rng, KINDS[kind])[:2], pick(rng, KINDS[other])


def _kind(rng: random.Random) -> _Pair:
    kind, pair, stranger = _two_and_one(rng)
    if rng.random() < 0.5:
        return shuffled(rng, KINDS[kind])[:3], [kind]
    return shuffled(rng, [*pair, stranger]), [kind]


def _odd(rng: random.Random) -> _Pair:
    _, pair, stranger = _two_and_one(rng)
    return shuffled(rng, [*pair, stranger]), [stranger]


_MAKERS: dict[str, Callable[[random.Random], _Pair]] = {
    "copy": _copy, "first": _first, "last": _last, "reverse": _reverse, "sort": _sort, "fact": _fact,
    "compare": _compare, "count": _count, "plus": _plus, "mod": _mod, "agree": _agree, "kind": _kind, "odd": _odd,
}  # fmt: skip


def example(skill: str, rng: random.Random, split: str = "train") -> Example:
    """One example of `skill` from `split`, redrawn until its prompt belongs there."""
    while True:
        question, answer = _MAKERS[skill](rng)
        drawn = make_example(skill, [skill, *question], answer)
        if skill in NOT_HELD_OUT or split_of(drawn.prompt) == split:
            return drawn


def general_items(seed: int, per_skill: int, split: str = "test") -> list[Example]:
    """`per_skill` examples of each skill, in the order of SKILLS. Splits are disjoint but for `fact`."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    items: list[Example] = []
    for skill in SKILLS:
        rng = seeded(seed, "general", split, skill)
        items += [example(skill, rng, split) for _ in range(per_skill)]
    return items


def document(rng: random.Random, tokens: int) -> Document:
    """`<bos>` and a stream of training examples, exactly `tokens` tokens; the last example may be cut."""
    text, is_answer = [BOS], [False]
    bounds = [sum(MIX[s] for s in SKILLS[: i + 1]) for i in range(len(SKILLS))]
    while len(text) < tokens:
        place = rng.random() * bounds[-1]
        skill = next(s for s, bound in zip(SKILLS, bounds, strict=True) if place < bound)
        drawn = example(skill, rng)
        question, answer = drawn.prompt.split(), drawn.completion.split()
        text += question + answer
        is_answer += [False] * len(question) + [True] * len(answer)
    return Document(tokens=tuple(text[:tokens]), is_answer=tuple(is_answer[:tokens]))
