"""No input file, template or manifest raises anything except UserError or BadRecord."""

import contextlib
import gzip
import io
import json
import os
import pathlib

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rho1_jax.data import preparation, records, transcripts
from rho1_jax.data.manifest import MANIFEST
from rho1_jax.data.preparation import Options
from rho1_jax.data.store import DataManifest, Store
from rho1_jax.data.stored_scores import ScoreManifest
from rho1_jax.data.transcripts import Transcripts
from rho1_jax.runtime import schema
from rho1_jax.runtime.errors import UserError

# The fixtures hold nothing that an example changes, except for the one file that each example writes.
fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
KEYS = ["text", "messages", "prompt", "response", "role", "content", "x"]
TEXT = st.text(st.characters(codec=None), max_size=20)  # with lone surrogates
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["user", "assistant", "tool"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | TEXT, inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": JSON, "content": JSON | TEXT}), max_size=4)
LINES = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    JSON.map(lambda value: json.dumps({"text": value}).encode()),
    MESSAGES.map(lambda messages: json.dumps({"messages": messages}).encode()),
)
PLAIN = Options(("{text}", "{x}"), None, 16, 0.5, 1.0)
CHAT = Options(("{text}",), Transcripts(), 16, 0.5, 1.0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.txt.gz", "a.parquet"])
@given(content=st.lists(LINES, max_size=4).map(b"\n".join), compressed=st.booleans(), chat=st.booleans())
@fuzz
def test_any_bytes_in_a_file(tokenizer, tmp_path, name, content, compressed, chat):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if compressed and path.suffix == ".gz" else content)
    try:
        chunks = list(preparation.raw_chunks([path]))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    for raw, _ in chunks:
        chunk = preparation.tokenize(raw, tokenizer, CHAT if chat else PLAIN)
        assert len(chunk.lengths) + len(chunk.bad) <= len(raw)
        assert all(reason.startswith(f"{path}:") and "\n" not in reason for reason in chunk.bad)
        assert chunk.lengths.sum() == len(chunk.tokens) and chunk.tokens.dtype == "int32"
        chunk.save(tmp_path / "chunk.npz")
        assert preparation.Chunk.load(tmp_path / "chunk.npz").bad == chunk.bad


def whole_file(name: str) -> bytes:
    """A valid file, in the format that its name says."""
    texts = [f"text {number}" for number in range(50)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if name.endswith(".parquet"):
        table = pyarrow.table({"text": texts, "list": [[text] for text in texts], "struct": [{"x": 1.5}] * 50})
        pyarrow.parquet.write_table(table, buffer := io.BytesIO())
        return buffer.getvalue()
    return gzip.compress(lines) if name.endswith(".gz") else pyarrow.compress(lines, codec="zstd", asbytes=True)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
@fuzz
def test_a_damaged_file(tokenizer, tmp_path, name, position, byte, cut):
    content = bytearray(whole_file(name))
    at = int(position * len(content))
    content[at] = byte
    (tmp_path / name).write_bytes(content[:at] if cut else content)
    try:
        chunks = [preparation.tokenize(raw, tokenizer, PLAIN) for raw, _ in preparation.raw_chunks([tmp_path / name])]
    except UserError as error:
        assert str(tmp_path / name) in str(error) and "\n" not in str(error)
        return
    assert all("\n" not in reason for chunk in chunks for reason in chunk.bad)


@given(
    record=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3)
    | MESSAGES.map(lambda messages: {"messages": messages})
)
@fuzz
def test_any_conversation(tokenizer, record):
    try:
        conversation = transcripts.exchanges(record, Transcripts())
    except records.BadRecord:
        return
    ids, in_response = transcripts.encode(conversation, tokenizer)
    assert len(ids) == len(in_response) and any(in_response)
    trained = "".join(exchange.text[start:stop] for exchange in conversation for start, stop in exchange.responses)
    assert all(message["content"] in trained or "```" in trained for message in record.get("messages", [])
               if message["role"] == "assistant")  # fmt: skip


@given(
    template=st.text(alphabet="{}!:.[]rtexcont \\", max_size=12) | TEXT, record=st.dictionaries(TEXT, JSON, max_size=3)
)
@fuzz
def test_any_template(template, record):
    with contextlib.suppress(UserError, records.BadRecord):
        templates = records.parse_templates("text", [template])
        records.document({"text": "a", "x": "b", **record}, templates)
    with contextlib.suppress(UserError):
        transcripts.parse_role_templates([f"user={template}"])


@pytest.mark.parametrize("kind", [DataManifest, ScoreManifest])
@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@fuzz
def test_any_manifest(tmp_path, kind, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError):
        Store(tmp_path)
    with pytest.raises(UserError):
        schema.parse_json(content, kind, "here")


@given(number=st.integers(0, 2**31), value=JSON)
@fuzz
def test_any_change_of_a_manifest_is_noticed(data, tmp_path, number, value):
    """One value anywhere in the manifest is replaced."""
    text = (data / MANIFEST).read_text()
    stored = json.loads(text)
    places = [(stored, key) for key in stored]
    for container, key in places:
        inner = container[key]
        keys = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        places += [(inner, key) for key in keys]
    container, key = places[number % len(places)]
    before, container[key] = container[key], value
    folder = tmp_path / "rows"
    folder.mkdir(exist_ok=True)
    for name in ("rows", "tokenizer"):
        if not (folder / name).exists():
            os.symlink(data / name, folder / name)
    (folder / MANIFEST).write_text(json.dumps(stored))
    if type(before) is type(value) and before == value:
        Store(folder)
    else:
        with pytest.raises(UserError) as caught:
            Store(folder)
        assert "\n" not in str(caught.value)


@given(pattern=st.text(alphabet="ab,[]*?\\:=/.", max_size=12))
@fuzz
def test_any_list_of_paths(tmp_path, pattern):
    (tmp_path / "a,b.txt").write_text("")
    try:
        files = records.expand([str(tmp_path / pattern.lstrip("/"))])
    except UserError:
        return
    assert all(isinstance(file, pathlib.Path) and file.is_file() for file in files)
