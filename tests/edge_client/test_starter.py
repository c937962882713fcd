"""The bundled starter model, its skills and its frozen tasks."""

import hashlib
import json
from collections import Counter

import pytest

from fedblocks.edge_client.starter import frozen_task_file, starter_folder
from fedblocks.edge_client.starter import skills as sk
from fedblocks.edge_client.starter import tasks as tk

FROZEN = json.loads(frozen_task_file().read_text())


def sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def lines(examples):
    return [item.prompt + item.completion for item in examples]


@pytest.fixture(scope="module")
def tokenizer():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(starter_folder())


def test_vocabulary_has_unique_tokens_and_a_length_that_is_a_multiple_of_64():
    assert len(set(sk.VOCABULARY)) == len(sk.VOCABULARY) == 256


def test_generated_items_are_pinned():
    items, doc = lines(sk.general_items(1, 50)), sk.document(sk.seeded(1), 256)
    assert sha256(items) == "ffd45e8f108cd90189d7d31f2ccd480af3470012542b804cf8dfdbf8f5a6ee9f"
    assert sha256(doc.tokens) == "d74ab47ed139216bfb12d1d87d96f68c3f0c886449f478856d21258f5f7dcd8a"


def test_every_generated_token_is_in_the_vocabulary():
    items = sk.general_items(2, 50) + [e for task in tk.TASKS for e in tk.task_examples(task, "train", 200, 2)]
    assert {token for line in lines(items) for token in line.split()} <= set(sk.VOCABULARY)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("count b , a b b c :", "2"),
        ("plus 2 8 , 7 5 :", "1 0 3"),
        ("mod 2 8 , 7 5 :", "3"),
        ("compare 2 8 , 7 5 :", "less"),
        ("agree run the cats near the dog :", "run"),
        ("agree run the cat near the dogs :", "runs"),
        ("kind cat hammer dog :", "animal"),
        ("odd cat hammer dog :", "hammer"),
    ],
)
def test_a_skill_is_the_function_that_its_name_says(question, answer):
    assert ORACLE[question.split()[0]](question.split()[1:-1]) == answer.split()


def _majority(words):
    return Counter(sk.KIND_OF[word] for word in words).most_common(1)[0][0]


def _number(digits):
    return int("".join(digits))


ORACLE = {
    "copy": lambda q: q,
    "first": lambda q: q[:1],
    "last": lambda q: q[-1:],
    "reverse": lambda q: q[::-1],
    "sort": sorted,
    "fact": lambda q: [sk.FACTS[q[0], q[1]]],
    "compare": lambda q: ["more" if _number(q[:2]) > _number(q[3:]) else "less"],
    "count": lambda q: [str(q[2:].count(q[0]))],
    "plus": lambda q: list(f"{_number(q[:2]) + _number(q[3:]):03d}"),
    "mod": lambda q: [str((int(q[1]) + int(q[4])) % 10)],
    "agree": lambda q: [sk.VERBS[q[0]] if q[2] in sk.WORDS else q[0]],
    "kind": lambda q: [_majority(q)],
    "odd": lambda q: [word for word in q if sk.KIND_OF[word] != _majority(q)],
}


def test_every_generated_answer_is_right():
    for item in sk.general_items(3, 100, "train"):
        assert item.completion.split()[:-1] == ORACLE[item.skill](item.prompt.split()[1:-1]), item


def test_general_splits_share_no_prompt_but_facts():
    prompts = {
        split: {item.prompt for item in sk.general_items(4, 300, split) if item.skill not in sk.NOT_HELD_OUT}
        for split in sk.SPLITS
    }
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    assert not prompts["validation"] & prompts["test"]


def test_documents_hold_training_prompts_only_and_one_bos():
    doc = sk.document(sk.seeded(5), 4000)
    assert len(doc.tokens) == len(doc.is_answer) == 4000
    assert doc.tokens[0] == sk.BOS
    assert not {sk.BOS, sk.EOS} & set(doc.tokens[1:])
    text = " ".join(doc.tokens[1:])
    for line in text.split(f" {sk.TERMINATOR} ")[:-1]:
        prompt = line.split(sk.ANSWER)[0] + sk.ANSWER
        assert prompt.startswith("fact") or sk.split_of(prompt) == "train"


@pytest.mark.parametrize(
    ("prompt", "completion"), [("copy a b", " a b ;"), ("copy a :", "a ;"), ("copy a :", " a"), ("copy a:", " a ;")]
)
def test_an_example_without_answer_sign_blank_or_terminator_is_refused(prompt, completion):
    with pytest.raises(ValueError, match="must"):
        sk.Example(skill="copy", prompt=prompt, completion=completion)


@pytest.mark.parametrize("task", tk.TASKS)
def test_task_splits_share_no_prompt_and_cover_all_labels(task):
    parts = {split: tk.task_examples(task, split, 400, 6) for split in sk.SPLITS}
    prompts = {split: {item.prompt for item in items} for split, items in parts.items()}
    assert all(len(found) == 400 for found in prompts.values())
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    assert not prompts["validation"] & prompts["test"]
    assert all({item.label for item in items} == set(tk.LABELS[task]) for items in parts.values())


def test_a_task_asked_for_more_prompts_than_exist_says_so():
    with pytest.raises(ValueError, match="ask for fewer"):
        tk.task_examples("association", "test", 2000, 6)


def test_the_new_classes_say_next_to_nothing_about_the_old_kinds():
    shared = Counter((sk.KIND_OF[word], tk.GROUP_OF[word]) for word in sk.WORDS)
    assert max(shared.values()) <= 2
    assert set(Counter(tk.GROUP_OF.values()).values()) == {8}


@pytest.mark.parametrize(("clients", "alpha"), [(4, 0.5), (8, 0.5), (8, 0.1), (8, 10.0), (1, 0.5)])
def test_dirichlet_split_uses_every_example_once_and_gives_each_client_the_minimum(clients, alpha):
    examples = tk.task_examples("rule", "train", 960, 7)
    parts = tk.dirichlet_split(examples, clients, alpha, 7)
    assert sorted(lines(e for part in parts for e in part)) == sorted(lines(examples))
    assert len(parts) == clients
    assert min(map(len, parts)) >= 8
    assert parts == tk.dirichlet_split(examples, clients, alpha, 7)


def test_dirichlet_split_is_more_skewed_at_a_smaller_alpha():
    examples = tk.task_examples("rule", "train", 960, 8)

    def largest_share(alpha):
        parts = tk.dirichlet_split(examples, 8, alpha, 8)
        return sum(max(Counter(e.label for e in part).values()) for part in parts) / len(examples)

    assert largest_share(0.1) > largest_share(10.0) + 0.1


@pytest.mark.parametrize(("examples", "fits"), [(31, False), (32, True), (33, True)])
def test_dirichlet_split_refuses_fewer_examples_than_the_minimum_needs(examples, fits):
    items = tk.task_examples("rule", "train", examples, 9)
    if fits:
        assert min(map(len, tk.dirichlet_split(items, 4, 1000.0, 9))) >= 8
    else:
        with pytest.raises(ValueError, match="cannot give 4 clients 8 each"):
            tk.dirichlet_split(items, 4, 1000.0, 9)


@pytest.mark.parametrize("task", tk.TASKS)
def test_frozen_maps_and_partitions_are_those_of_the_file(task):
    assert FROZEN["map_seed"] == tk.MAP_SEED
    assert tuple(FROZEN["tasks"]) == tk.TASKS
    assert tuple(FROZEN["skills"]) == sk.SKILLS
    assert FROZEN["tasks"][task]["map_sha256"] == sha256({"rule": tk.COLOUR_OF, "association": tk.GROUP_OF}[task])
    for setting, chosen in FROZEN["federation"]["settings"].items():
        parts = tk.frozen_federation(task, setting)
        assert len(parts) == chosen["clients"]
        assert chosen["partition_sha256"][task] == sha256([lines(part) for part in parts])


def test_written_lines_are_prompt_completion_label(tmp_path):
    examples = tk.task_examples("rule", "train", 20, 10)
    tk.write_jsonl(examples, tmp_path / "train.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": e.prompt, "completion": e.completion, "label": e.label} for e in examples]


def test_prompt_and_completion_tokens_concatenate_to_those_of_the_text(tokenizer):
    for item in sk.general_items(11, 20) + [e for task in tk.TASKS for e in tk.task_examples(task, "test", 50, 11)]:
        prompt, completion, text = (
            tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (item.prompt, item.completion, item.prompt + item.completion)
        )
        assert prompt + completion == text
        assert tokenizer.unk_token_id not in text
        assert tokenizer.decode(text) == item.prompt + item.completion


def test_tokenizer_puts_bos_in_front_once_and_knows_its_special_tokens(tokenizer):
    encoded = tokenizer("copy a :")
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1
    assert encoded["input_ids"][0] == tokenizer.bos_token_id
    assert [tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == [
        sk.UNK, sk.BOS, sk.EOS, sk.PAD,
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(list(range(256))) == list(sk.VOCABULARY)


def test_folder_holds_at_most_three_megabytes_and_one_and_a_half_million_bf16_parameters():
    folder = starter_folder()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3_000_000
    header = (folder / "model.safetensors").read_bytes()
    tensors = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    tensors.pop("__metadata__")
    assert {tensor["dtype"] for tensor in tensors.values()} == {"BF16"}
    assert "lm_head.weight" not in tensors
    assert sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors.values()) // 2 <= 1_500_000


def test_card_lists_every_skill_at_the_promised_accuracy_and_the_tasks_at_chance():
    card = json.loads((starter_folder() / "card.json").read_text())
    for kind, floor in (("fp32", 0.90), ("bf16", 0.88), ("nf4", 0.88)):
        assert set(card["accuracy"][kind]) == set(sk.SKILLS)
        assert min(card["accuracy"][kind].values()) >= floor
    for row in card["downstream_before"].values():
        three_errors = 3 * (row["chance"] * (1 - row["chance"]) / row["n"]) ** 0.5
        assert row["exact"] <= row["chance"] + three_errors
        assert row["among_labels"] <= row["chance"] + three_errors


def test_shipped_model_answers_held_out_items_of_every_skill(tokenizer):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from fedblocks.edge_client.starter.exact import exact_by_skill

    model = AutoModelForCausalLM.from_pretrained(starter_folder(), dtype=torch.float32)
    scores = exact_by_skill(lambda ids: model(input_ids=ids).logits, tokenizer, sk.general_items(12, 20))
    assert sum(scores.values()) / len(scores) >= 0.9, scores
    assert min(scores.values()) >= 0.7, scores


def test_exact_answer_equals_greedy_generation(tokenizer):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from fedblocks.edge_client.starter.exact import encode, exact_answers

    model = AutoModelForCausalLM.from_pretrained(starter_folder(), dtype=torch.float32)
    items = [sk.general_items(13, 1)[i] for i in (0, 3, 8)] + tk.task_examples("rule", "test", 2, 13)
    generated = []
    for item in items:
        ids, answer = encode(tokenizer, item)
        out = model.generate(torch.tensor([ids[:-answer]]), max_new_tokens=answer, do_sample=False)
        generated.append(out[0].tolist() == ids)
    assert exact_answers(lambda x: model(input_ids=x).logits, tokenizer, items) == generated
