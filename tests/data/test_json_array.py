"""Files that hold one JSON array are read item by item."""

import gzip
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rho1_jax.data import json_array, records
from rho1_jax.runtime.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('"\\[]{},: x\u00e9'),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text('"\\[]{},', max_size=3), children, max_size=3)
    ),
    max_leaves=8,
)


def split(text, limit=1 << 20, chunk=7):
    before, json_array.CHUNK_BYTES = json_array.CHUNK_BYTES, chunk
    try:
        return list(json_array.split(io.BytesIO(text), limit))
    finally:
        json_array.CHUNK_BYTES = before


@settings(max_examples=200, deadline=None)
@given(st.lists(JSON, max_size=5), st.integers(1, 40), st.sampled_from([None, 2]), st.booleans())
def test_items_are_those_of_the_array(items, chunk, indent, escape):
    text = f" \n{json.dumps(items, indent=indent, ensure_ascii=escape)}\n ".encode()
    assert [json.loads(item) for item in split(text, chunk=chunk)] == items


@pytest.mark.parametrize(
    "text, message",
    [
        (b"[1, 2", "the file ends in item 2, at byte 5"),
        (b'[{"a": "]', "the file ends in item 1, at byte 9"),
        (b"[1, , 2]", "item 2 is empty, at byte 4"),
        (b"[1, 2, ]", "item 3 is empty, at byte 7"),
        (b"[, 1]", "item 1 is empty, at byte 1"),
        (b"[1}, 2]", "item 1 has a closing bracket too many, at byte 2"),
        (b"[1]\n[2]", "more text follows it, at byte 4"),
        (b"[1] 2, 3, 4, 5", "more text follows it, at byte 4"),
        (b" [1]       \n\n 5", "more text follows it, at byte 14"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_what_is_no_array_is_refused_with_the_position(text, message, chunk):
    with pytest.raises(ValueError, match=f"not a JSON array: {message}"):
        split(text, chunk=chunk)


def test_a_long_item_is_left_out():
    text = json.dumps(["a", "b" * 500, "c", ["d"] * 100, "e"]).encode()
    for chunk in (1, 64, 10_000):
        assert split(text, limit=100, chunk=chunk) == [b'"a"', None, b' "c"', None, b' "e"']


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_records_of_an_array(tmp_path, monkeypatch, name):
    monkeypatch.setitem(records.MAX_BYTES, "json", 1000)
    items = [{"text": "one"}, {"text": "two\n[3]"}, {"text": "long" * 1000}, [], {"text": "end", "x": [{}]}]
    text = json.dumps(items, indent=1).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    parsed = []
    for number, record, position in records.read(tmp_path / name):
        assert 0 < position <= (tmp_path / name).stat().st_size
        try:
            parsed.append((number, records.parse(tmp_path / name, record)))
        except records.BadRecord as error:
            parsed.append((number, str(error)))
    bad = {2: "longer than 0 MiB; split it into several records", 3: "a JSON list, not an object with keys"}
    assert parsed == [(number + 1, bad.get(number, item)) for number, item in enumerate(items)]


def test_an_array_that_ends_early_is_refused_by_file(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": ')
    with pytest.raises(
        UserError, match="a.json: cannot be read: not a JSON array: the file ends in item 2, at byte 27"
    ):
        list(records.read(tmp_path / "a.json"))


def test_lines_stay_lines(tmp_path):
    (tmp_path / "a.json").write_text('\n{"text": "[1]"}\n["text"]\n')
    (tmp_path / "a.jsonl").write_text('["text"]\n{"text": "x"}\n')
    for name, expected in (("a.json", [2, 3]), ("a.jsonl", [1, 2])):
        assert [number for number, _, _ in records.read(tmp_path / name)] == expected
