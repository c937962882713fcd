"""Rows in, samples out; and what a site is told about its file."""

from __future__ import annotations

import json

import pytest

from fedblocks.edge_client.data import DataError, TextEncoder, load_site_data, read_rows, tokenise_file, topic_bin
from fedblocks.protocol.messages import DataFormat

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def encoder(tiny_checkpoint, tmp_path):
    def make(max_tokens=64, append_eos=True, **checkpoint):
        folder = tiny_checkpoint(tmp_path, **checkpoint)
        return TextEncoder(folder, DataFormat(max_tokens=max_tokens, append_eos=append_eos, join=" "))

    return make


@pytest.fixture
def write(tmp_path):
    def make(*rows):
        path = tmp_path / "data.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return path

    return make


def targets(encoder, sample) -> str:
    return encoder.tokenizer.decode([int(t) for t in sample.ids[sample.label_mask]], skip_special_tokens=False)


def test_only_the_completion_and_the_end_of_sequence_are_targets(encoder, write):
    enc = encoder()

    (sample,) = tokenise_file(write({"prompt": "ab", "completion": "cd"}), enc)

    assert enc.tokenizer.decode(sample.ids.tolist(), skip_special_tokens=False) == "<s>ab cd</s>"
    assert targets(enc, sample) == "cd</s>"


def test_prompt_and_completion_are_joined_only_where_neither_brings_white_space(encoder, write):
    enc = encoder(append_eos=False)

    a, b, c = tokenise_file(
        write(
            {"prompt": "ab", "completion": "cd"},
            {"prompt": "ab ", "completion": "cd"},
            {"prompt": "ab", "completion": " cd"},
        ),
        enc,
    )

    assert a.ids.tolist() == b.ids.tolist() == c.ids.tolist()
    assert targets(enc, c) == " cd"


def test_of_a_text_every_token_but_the_first_is_a_target(encoder, write):
    enc = encoder(append_eos=False)

    (sample,) = tokenise_file(write({"text": "abc"}), enc)

    assert targets(enc, sample) == "abc"
    assert not sample.label_mask[0]


def test_of_a_chat_the_last_answer_is_the_target(encoder, write):
    enc = encoder(append_eos=False, chat_template=CHAT)
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}

    (sample,) = tokenise_file(write(row), enc)

    assert targets(enc, sample) == "yes"


def test_a_chat_without_a_template_is_an_error_that_says_what_works(encoder, write):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}

    with pytest.raises(DataError, match=r"line 1.*prompt and completion"):
        tokenise_file(write(row), encoder())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a"', "no valid JSON"),
        ("[1]", "expected an object"),
        ('{"prompt": "a"}', "completion"),
        ('{"prompt": 1, "completion": "b"}', "'prompt' is '1'"),
        ('{"text": "  "}', "not empty"),
        ('{"messages": []}', "no list of messages"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "assistant"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
    ],
)
def test_a_row_that_cannot_be_read_names_file_and_line(write, line, says):
    path = write({"text": "good"}, line)

    with pytest.raises(DataError, match=rf"data\.jsonl, line 2: .*{says}"):
        read_rows(path)


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\u2028b\u0085c"}\r\n{"text": "d"}\n', encoding="utf-8", newline="")

    assert [(r.line, r.text) for r in read_rows(path)] == [(1, "a\u2028b\x85c"), (2, "d")]


def test_a_missing_or_empty_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no rows"):
        read_rows(tmp_path / "empty.jsonl")


def test_the_summary_counts_truncated_cut_and_duplicate_rows(encoder, write):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(30)]
    path = write(*rows, rows[0], {"prompt": "p", "completion": "c" * 40}, {"prompt": "p" * 40, "completion": "c"})

    data = load_site_data(path, encoder(max_tokens=16))

    s = data.summary
    assert (s.num_rows, s.num_truncated, s.num_labels_cut, s.num_duplicates) == (33, 2, 1, 1)
    assert s.num_train + s.num_validation == 32
    assert "2 cut at the context length" in s.line()
    assert "1 duplicates" in s.line()
    assert "no chat template" in s.line()


def test_the_split_depends_on_content_only_so_appended_rows_move_nothing(encoder, write):
    enc = encoder()
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(100)]
    before = load_site_data(write(*rows), enc)
    after = load_site_data(write(*rows, *({"prompt": f"q{i}", "completion": "c"} for i in range(20))), enc)

    def keys(samples):
        return {s.ids.tobytes() for s in samples}

    assert keys(before.validation) <= keys(after.validation)
    assert keys(before.train) <= keys(after.train)
    assert 3 <= len(before.validation) <= 25


def test_rows_that_also_stand_in_the_evaluation_file_are_counted(encoder, write, tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(12)]
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text(json.dumps(rows[3]) + "\n")

    assert load_site_data(write(*rows), encoder(), evaluation=evaluation).summary.num_evaluation_overlap == 1


def test_a_file_whose_targets_all_lie_behind_the_context_is_refused_with_the_key_to_raise(encoder, write):
    path = write({"prompt": "p" * 40, "completion": "c"})

    with pytest.raises(DataError, match=r"data\.max_tokens"):
        load_site_data(path, encoder(max_tokens=16))


def test_the_statistics_hold_numbers_only(encoder, write):
    path = write(*({"prompt": f"p{i}", "completion": "cd"} for i in range(20)))

    statistics = load_site_data(path, encoder()).statistics()

    assert statistics.num_examples + len(load_site_data(path, encoder()).validation) == 20
    assert statistics.num_target_tokens == 3 * statistics.num_examples


def test_topics_are_counted_in_bins_that_are_the_same_at_every_site_and_leave_only_where_it_is_allowed(encoder, write):
    rows = [{"prompt": f"item {i} ", "completion": "red" if i % 2 else "blue"} for i in range(30)]
    rows += [{"text": f"about the sea, part {i}", "topic": "sea"} for i in range(10)]
    rows += [{"text": f"about nothing, part {i}"} for i in range(5)]
    data = load_site_data(write(*rows), encoder())
    assert data.statistics().topics == ()
    shared = data.statistics(share_topics=True).topics
    bins = {topic: topic_bin(topic) for topic in ("red", "blue", "sea")}
    assert len(set(bins.values())) == 3
    assert {i for i, count in enumerate(shared) if count} == set(bins.values())
    assert 0 < len(data.train) - sum(shared) <= 5  # the rows about nothing
    assert sum(shared) >= 30


def test_a_topic_that_is_no_word_is_an_error_with_its_line(encoder, write):
    path = write({"text": "a b"}, {"text": "c d", "topic": ["x"]})
    with pytest.raises(DataError, match=r"line 2: 'topic' is \"\['x'\]\", expected a text or a number"):
        load_site_data(path, encoder())
