"""Only the responses of a conversation are trained on, without tool output."""

import json
import time

import numpy as np
import pytest
from helpers import options

from rho1_jax.data import transcripts
from rho1_jax.data.loader import open_mixture
from rho1_jax.data.packing import Documents, pack_whole
from rho1_jax.data.preparation import prepare
from rho1_jax.data.records import BadRecord
from rho1_jax.data.store import Store
from rho1_jax.data.transcripts import Transcripts, exchanges, parse_role_templates
from rho1_jax.runtime.errors import UserError

CODE = "Let us compute.\n```python\nprint(6*7)\n```\n"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "6 times 7?"},
    {"role": "assistant", "content": CODE[:-1]},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Bye."},
]


def trained_text(record, **changes):
    return [
        [exchange.text[start:stop] for start, stop in exchange.responses]
        for exchange in exchanges(record, Transcripts(**changes))
    ]


def test_only_the_assistants_text_is_trained_on():
    first, second = exchanges({"messages": MESSAGES}, Transcripts())
    assert first.text == (f"Be brief.\n\n<|user|>\n6 times 7?\n<|assistant|>\n{CODE}```output\n42\n```\nIt is 42.\n")
    assert second.text == "<|user|>\nThanks.\n<|assistant|>\nBye.\n"
    # The model opens the output block. The output and the end of the block come from the tool.
    assert trained_text({"messages": MESSAGES}) == [[CODE, "```output\n", "It is 42.\n"], ["Bye.\n"]]


def test_tool_output_within_a_response_is_not_trained_on():
    response = f"{CODE}```output\n42\n```\nSo:\n```python\n1/0\n```\n```output\nZeroDivisionError\n```\nHm."
    assert trained_text({"prompt": "?", "response": response}) == [
        [f"{CODE}```output\n", "So:\n```python\n1/0\n```\n```output\n", "Hm.\n"]
    ]


def test_prompt_and_response_with_other_keys_and_templates():
    templates = parse_role_templates([r"user=Q: {content}\nA:", "assistant= {content}"])
    (exchange,) = exchanges(
        {"question": "1+1", "answer": "2"}, Transcripts(templates, prompt_key="question", response_key="answer")
    )
    assert exchange.text == "Q: 1+1\nA: 2" and exchange.responses == [(len("Q: 1+1\nA: "), len(exchange.text))]


@pytest.mark.parametrize(
    "record, message",
    [
        ("plain", "plain text, not a conversation"),
        ({"prompt": "x"}, "missing keys: needs 'messages', or 'prompt' and 'response', or .*; has 'prompt'"),
        ({"messages": "x"}, "'messages' must hold a list of objects"),
        ({"messages": [{"role": "user"}]}, "'messages' must hold a list of objects"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "unknown role 'bot'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "the role of a message is list, not text"),
        ({"messages": [{"role": "assistant", "content": None}]}, "the assistant's content is NoneType, not text"),
        ({"messages": None}, "'messages' must hold a list of objects"),
        ({"messages": []}, "no message from the assistant"),
        ({"messages": [{"role": "user", "content": 3}]}, "the user's content is int, not text"),
        ({"messages": MESSAGES[:2]}, "no message from the assistant"),
        ({"prompt": "x", "response": "\ud800"}, "not text: a lone surrogate"),
    ],
)
def test_record_without_a_conversation_is_bad(record, message):
    with pytest.raises(BadRecord, match=message):
        exchanges(record, Transcripts())


@pytest.mark.parametrize("text", ["bot={content}", "user=no content", "user={content}{content}", "{content}"])
def test_invalid_role_template_is_refused(text):
    with pytest.raises(UserError, match="is not ROLE=TEMPLATE"):
        parse_role_templates([text])


def test_tokens_that_end_in_a_response_and_eos_are_trained_on(tokenizer):
    ids, trained = transcripts.encode(exchanges({"messages": MESSAGES}, Transcripts()), tokenizer)
    assert [token for token in ids if token == tokenizer.eos_id] == [tokenizer.eos_id] * 2
    assert [flag for token, flag in zip(ids, trained) if token == tokenizer.eos_id] == [True] * 2
    masked = tokenizer.decode([token for token, flag in zip(ids, trained) if not flag])
    kept = tokenizer.decode([token for token, flag in zip(ids, trained) if flag])
    for prompt in ("Be", "times", "Thanks", "42\n```\n"):
        assert prompt in masked
    assert "It is" in kept and "Bye." in kept and "user" not in kept and "print" in kept


def test_many_messages_take_linear_time(tokenizer):
    """Quadratic time would be minutes."""
    record = {"messages": [{"role": "user", "content": "a"}] + [{"role": "assistant", "content": "b"}] * 50_000}
    start = time.monotonic()
    ids, trained = transcripts.encode(exchanges(record, Transcripts()), tokenizer)
    assert time.monotonic() - start < 20 and len(ids) == len(trained) > 100_000
    ids, _ = transcripts.encode(exchanges(record, Transcripts()), tokenizer, 10)
    assert len(ids) > 10


def random_documents(seed, count, longest):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    tokens = rng.integers(3, 50, lengths.sum()).astype(np.int32)
    return Documents(tokens, lengths, rng.random(lengths.sum()) < 0.5)


def test_rows_hold_whole_conversations_in_order():
    documents = random_documents(0, 200, 17)
    rows = list(pack_whole([documents], 16))
    tokens, segment_ids, responses = (np.concatenate(parts) for parts in zip(*(row[:3] for row in rows)))
    assert tokens.shape[1] == 17
    np.testing.assert_array_equal(tokens[segment_ids > 0], documents.tokens)
    np.testing.assert_array_equal(responses[segment_ids > 0], documents.responses)
    assert not responses[segment_ids == 0].any()
    lengths = [np.sum(row == number) for row in segment_ids for number in range(1, row.max() + 1)]
    np.testing.assert_array_equal(lengths, documents.lengths)
    # A row is closed only if the next conversation does not fit.
    first_of_next = [np.sum(row == 1) for row in segment_ids[1:]]
    assert all(np.sum(row > 0) + follower > 17 for row, follower in zip(segment_ids, first_of_next))


def test_prepared_conversations(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    records = [{"messages": MESSAGES}, {"prompt": "x", "response": "word " * 200}] * 3
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    manifest = prepare([path], tokenizer, tmp_path / "rows", options(transcripts=Transcripts(), seq_len=150), workers=1)
    assert (manifest["documents"], manifest["truncated"], manifest["rows"]) == (6, 3, 6)
    store = Store(tmp_path / "rows")
    rows = store.rows("train")
    assert store.has_responses and len(rows) == 6
    ids, trained = transcripts.encode(exchanges(records[0], Transcripts()), tokenizer)
    assert rows[0]["tokens"][: len(ids)].tolist() == ids
    assert rows[0]["responses"].dtype == bool and rows[0]["responses"][: len(ids)].tolist() == trained
    assert rows[1]["segment_ids"].min() == 1  # the long conversation fills its row


def test_record_whose_prompt_fills_the_row_is_bad(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": "word " * 100, "response": "x"}) + "\n")
    with pytest.raises(UserError, match="1 of 1 records are bad"):
        prepare([path], tokenizer, tmp_path / "rows", options(transcripts=Transcripts(), seq_len=32), workers=1)
    assert not (tmp_path / "rows").exists() and not (tmp_path / "rows.partial").exists()


def test_conversations_and_plain_text_cannot_be_mixed(data, tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": "x", "response": "y"}) + "\n")
    short = Transcripts(parse_role_templates(["user={content}"]))
    prepare([path], tokenizer, tmp_path / "rows", options(transcripts=short, seq_len=16), workers=1)
    with pytest.raises(UserError, match="holds conversations, the other plain text"):
        open_mixture(f"{data},{tmp_path / 'rows'}")
