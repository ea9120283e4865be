"""Prepare data sets from text files: formats, bad records, interrupted runs."""

import gzip
import json
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import OPTIONS, environment, options, write_jsonl

from rho1_jax.data import preparation, records
from rho1_jax.data.preparation import prepare
from rho1_jax.data.store import Store
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import split_list

TEXTS = ["one plus one", "zwei und zwei – vier", "a line\nand another"]


def texts_of(store, tokenizer, split="train"):
    """The documents of a split, read back from its rows."""
    rows = store.rows(split)
    tokens = [t for i in range(len(rows)) for t in rows[i]["tokens"][1:][rows[i]["segment_ids"][1:] != 0].tolist()]
    ends = [at for at, token in enumerate(tokens) if token == tokenizer.eos_id]
    return [tokenizer.decode(tokens[start:end]) for start, end in zip([0, *(e + 1 for e in ends)], ends)]


def write_plain(path):
    return write_jsonl(path.with_suffix(".jsonl"), TEXTS)


def write_gzip(path):
    out = path.with_suffix(".jsonl.gz")
    out.write_bytes(gzip.compress(write_plain(path).read_bytes()))
    return out


def write_zstd(path):
    out = path.with_suffix(".jsonl.zst")
    out.write_bytes(pyarrow.compress(write_plain(path).read_bytes(), codec="zstd", asbytes=True))
    return out


def write_parquet(path):
    out = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "other": [1, 2, 3]}), out)
    return out


@pytest.mark.parametrize("write", [write_plain, write_gzip, write_zstd, write_parquet])
def test_all_formats_give_the_same_documents(write, tokenizer, tmp_path):
    prepare([write(tmp_path / "corpus")], tokenizer, tmp_path / "out", options(), workers=1)
    assert texts_of(Store(tmp_path / "out"), tokenizer) == TEXTS


def test_plain_text_file_is_one_document(tokenizer, tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    files = records.expand([str(tmp_path / "*.txt")])
    prepare(files, tokenizer, tmp_path / "out", options(), workers=1)
    assert texts_of(Store(tmp_path / "out"), tokenizer) == TEXTS


def test_first_template_whose_keys_exist_is_used(tokenizer, tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"question": "2+2?", "answer": "4", "text": "x"}\n{"text": "y"}\n')
    templates = records.parse_templates("unused", [r"{question}\n{answer}", "{text}"])
    prepare([path], tokenizer, tmp_path / "out", options(templates=templates), workers=1)
    assert texts_of(Store(tmp_path / "out"), tokenizer) == ["2+2?\n4", "y"]
    assert records.parse_templates("body", []) == ("{body}",)
    with pytest.raises(records.BadRecord, match="missing keys: needs 'question' and 'answer', or 'text'; has 'body'"):
        records.document({"body": "z"}, templates)


def test_manifest_counts_and_splits_are_disjoint(data, tokenizer, corpus):
    store = Store(data)
    manifest, texts = store.manifest, [json.loads(line)["text"] for line in corpus.open()]
    train, held_out = texts_of(store, tokenizer), texts_of(store, tokenizer, "eval")
    assert sorted(train + held_out) == sorted(texts) and not set(train) & set(held_out)
    assert 10 < len(held_out) < 60
    assert manifest["documents"] == 300 and manifest["bad_records"] == 0
    assert manifest["tokens"] == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert manifest["rows"] == len(store.rows("train")) + len(store.rows("eval"))
    assert manifest["tokenizer_fingerprint"] == tokenizer.fingerprint == store.tokenizer().fingerprint


def test_fingerprint_covers_options_and_inputs(tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = preparation.describe([file], tokenizer, options())["fingerprint"]
    assert first == preparation.describe([file], tokenizer, options())["fingerprint"]
    assert first != preparation.describe([file], tokenizer, options(seq_len=17))["fingerprint"]
    write_jsonl(file, TEXTS[:2])
    assert first != preparation.describe([file], tokenizer, options())["fingerprint"]


BAD_LINES = {
    b'{"text": "cut': "not JSON",
    b'{"other": "x"}': "missing keys: needs 'text'; has 'other'",
    b'{"text": 7}': "holds int, not text",
    b'{"text": "\xff"}': "not UTF-8",
    b'["text"]': "a JSON list, not an object",
    b'{"text": "\\ud800"}': "lone surrogate",
    b'{"text": "a", "n": '
    + b"9" * 5000
    + b"}": "not JSON: Exceeds the limit (4300 digits) for integer string conversion",
    b'{"text": ' + b"[" * 100_000: "not JSON: nested too deeply",
    b'{"text": NaN}': "holds float, not text",
    b'{"text": null}': "holds NoneType, not text",
    b'{"text": "a", "text": "b"}': "the key 'text' appears twice",
    b'{"text": "a", "x": {"y": 1, "z": 1, "y": 2}}': "the key 'y' appears twice",
    b'{"text": "a"}\x00': "not JSON: Extra data",
    b'{"' + b"k" * 10_000 + b'": 1}': "missing keys: needs 'text'; has 'kkkk",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_record_is_reported_and_nothing_is_written(line, tokenizer, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good too"}\n')
    with pytest.raises(UserError, match="1 of 3 records are bad"):
        prepare([path], tokenizer, tmp_path / "out", options(), workers=1)
    assert f"{path}:3: " in (reported := capsys.readouterr().err) and BAD_LINES[line] in reported
    assert [child.name for child in tmp_path.iterdir()] == ["bad.jsonl"]
    # Bad records within the limit are left out and counted.
    manifest = prepare([path], tokenizer, tmp_path / "out", options(max_bad_fraction=0.34), workers=1)
    assert (manifest["documents"], manifest["bad_records"]) == (2, 1)


def write_in(path: pathlib.Path, content: bytes) -> pathlib.Path:
    """Writes a JSON lines file, compressed as its name says."""
    compress = {".gz": gzip.compress, ".zst": lambda b: pyarrow.compress(b, codec="zstd", asbytes=True)}
    path.write_bytes(compress.get(path.suffix, bytes)(content))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_that_is_too_long_is_a_bad_record(name, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(records.MAX_BYTES, "json", 1 << 20)
    longest = b'{"text": "' + b"y" * ((1 << 20) - 12) + b'"}'
    assert len(longest) == 1 << 20
    lines = [b'{"text": "good"}', b'{"text": "' + b"x" * 5_000_000 + b'"}', longest, longest + b" ", b'{"text": "end"}']
    path = write_in(tmp_path / name, b"\n".join(lines))
    read = list(records.read(path))
    assert [number for number, *_ in read] == [1, 2, 3, 4, 5]
    assert [isinstance(record, records.BadRecord) for _, record, _ in read] == [False, True, False, True, False]
    with pytest.raises(UserError, match="2 of 5 records are bad"):
        prepare([path], tokenizer, tmp_path / "out", options(), workers=1)
    assert f"bad record: {path}:2: longer than 1 MiB; split it into several records" in capsys.readouterr().err


def test_a_decompression_bomb_needs_little_memory(tmp_path):
    """One line of 512 MiB in 20 kB. Without a bound, it takes 1 GiB."""
    path = write_in(tmp_path / "bomb.jsonl.zst", bytes(1 << 29))
    code = f"""
import pathlib, resource
from rho1_jax.data import records
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
((line, record, _),) = records.read(pathlib.Path({str(path)!r}))
print(line, record, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    *text, mebibytes = done.stdout.split()
    assert text == "1 longer than 16 MiB; split it into several records".split() and int(mebibytes) < 150, done.stderr


def test_a_text_file_that_is_too_long_is_a_bad_record(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(records.MAX_BYTES, "text", 1 << 20)
    path = tmp_path / "long.txt"
    path.write_text("x" * (1 << 20))
    assert len(next(records.read(path))[1]) == 1 << 20
    path.write_text("x" * ((1 << 20) + 1))
    with pytest.raises(UserError, match="1 of 1 records are bad"):
        prepare([path], tokenizer, tmp_path / "out", options(), workers=1)


def test_parquet_rows_that_cannot_be_read_are_bad_records(tokenizer, tmp_path, capsys):
    path = tmp_path / "bad.parquet"
    texts = pyarrow.array([b"good", b"\xff\xfe", b"good too"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    with pytest.raises(UserError, match="1 of 3 records are bad"):
        prepare([path], tokenizer, tmp_path / "out", options(), workers=1)
    assert f"{path}:2: not UTF-8 at byte 0" in capsys.readouterr().err
    manifest = prepare([path], tokenizer, tmp_path / "out", options(max_bad_fraction=0.5), workers=1)
    assert (manifest["documents"], manifest["bad_records"]) == (2, 1)


@pytest.mark.parametrize(
    "column, reason",
    [
        (pyarrow.array([1, 2]), "holds int, not text"),
        (pyarrow.array([b"a", b"b"]), "holds bytes, not text"),
        (pyarrow.array([["a"], None]), "holds list, not text"),
        (pyarrow.array([2**62, 1], pyarrow.timestamp("us")), "cannot be read: "),
    ],
)
def test_parquet_columns_of_another_type_are_bad_records(column, reason, tokenizer, tmp_path, capsys):
    path = tmp_path / "bad.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(UserError, match="[12] of [12] records are bad"):
        prepare([path], tokenizer, tmp_path / "out", options(), workers=1)
    assert f"{path}:1: " in (reported := capsys.readouterr().err) and reason in reported


@pytest.mark.parametrize("keep", [0, 3, 100, -20])
def test_a_cut_parquet_file_is_refused(keep, tmp_path):
    path = write_parquet(tmp_path / "cut")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{path}: cannot be read: "):
        list(records.read(path))


def test_a_damaged_chunk_of_an_interrupted_run_is_refused(corpus, tokenizer, tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr(preparation, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], tokenizer, tmp_path / "out", OPTIONS, workers=1)
    chunk = tmp_path / "out.partial" / "chunk-000001.npz"
    chunk.write_bytes(chunk.read_bytes()[:-10])
    with pytest.raises(UserError, match="chunk-000001.npz is damaged: .*; remove .*out.partial and run `rho1 prepare`"):
        preparation.Chunk.load(chunk)


def test_files_with_commas_and_brackets_in_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "[1].jsonl", "1.jsonl"):
        (tmp_path / name).write_text("{}")
    assert split_list("a,b.jsonl") == ["a,b.jsonl"]
    assert split_list(r"a\,b.jsonl,[1].jsonl") == ["a,b.jsonl", "[1].jsonl"]
    assert records.expand(["[1].jsonl"]) == [pathlib.Path("[1].jsonl")]
    assert records.expand(["[12].jsonl"]) == [pathlib.Path("1.jsonl")]


def test_too_many_bad_records_are_an_error(tokenizer, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{}\n{}\n')
    with pytest.raises(UserError, match="2 of 3 records are bad, more than --max_bad_fraction=0.5 allows"):
        prepare([path], tokenizer, tmp_path / "out", options(max_bad_fraction=0.5), workers=1)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK_BYTES", 1000)


def rows_bytes(store):
    return [
        np.stack([store.rows("train")[i][name] for i in range(len(store.rows("train")))]).tobytes()
        for name in ("tokens", "segment_ids")
    ]


def test_interrupted_run_resumes(corpus, tokenizer, data, tmp_path, small_chunks, monkeypatch):
    """The second run tokenizes only the missing chunk, and its rows equal those of an uninterrupted run."""
    output, loaded = tmp_path / "out", []
    real = preparation.Chunk.load
    monkeypatch.setattr(preparation, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], tokenizer, output, OPTIONS, workers=1)
    monkeypatch.undo()
    monkeypatch.setattr(preparation, "CHUNK_BYTES", 1000)
    chunks = sorted((tmp_path / "out.partial").glob("chunk-*.npz"))
    assert len(chunks) > 5 and not output.exists()
    chunks[2].unlink()
    kept = {path: path.stat().st_mtime_ns for path in chunks if path.exists()}

    def load(path):
        loaded.append((path, path.stat().st_mtime_ns))
        return real(path)

    monkeypatch.setattr(preparation.Chunk, "load", load)
    prepare([corpus], tokenizer, output, OPTIONS, workers=1)
    assert kept.items() <= set(loaded)
    assert rows_bytes(Store(output)) == rows_bytes(Store(data))
    assert Store(output).fingerprint == Store(data).fingerprint


def workers_of(pid: int | None = None) -> set[int]:
    """Worker processes of `multiprocessing`, of one parent or all of them."""
    lines = subprocess.run(["ps", "-axwwo", "pid=,ppid=,command="], capture_output=True, text=True).stdout.splitlines()
    processes = [line.split(maxsplit=2) for line in lines if "multiprocessing.spawn" in line]
    return {int(child) for child, parent, _ in processes if pid in (None, int(parent))}


def test_a_killed_run_leaves_no_worker_and_resumes(corpus, tokenizer, tmp_path, monkeypatch):
    big, output = tmp_path / "big.jsonl", tmp_path / "out"
    big.write_bytes(corpus.read_bytes() * 50)
    flags = [f"--input={big}", f"--tokenizer={tokenizer.path}", f"--output={output}", "--seq_len=16", "--workers=2"]
    code = "from rho1_jax.data import preparation; preparation.CHUNK_BYTES = 20_000; from rho1_jax import prepare; "
    command = [sys.executable, "-c", code + "prepare.main()", *flags]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as parent:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("out.partial/chunk-*.npz"))) < 2:
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        workers = workers_of(parent.pid)
        parent.kill()
    assert len(workers) == 2 and not output.exists()
    deadline = time.monotonic() + 5
    while alive := workers & workers_of():
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.1)
    kept = len(list(tmp_path.glob("out.partial/chunk-*.npz")))
    monkeypatch.setattr(preparation, "CHUNK_BYTES", 20_000)
    prepare([big], tokenizer, output, options(), workers=1)
    monkeypatch.undo()
    prepare([big], tokenizer, tmp_path / "whole", options(), workers=1)  # without interruption, and in other chunks
    assert kept >= 2
    for path in Store(output).manifest["files"]:
        assert (output / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), path


def test_changed_inputs_do_not_resume_from_old_chunks(tokenizer, tmp_path, monkeypatch):
    file, output = write_jsonl(tmp_path / "a.jsonl", ["old text"]), tmp_path / "out"
    monkeypatch.setattr(preparation, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare([file], tokenizer, output, options(), workers=1)
    monkeypatch.undo()
    write_jsonl(file, TEXTS)
    prepare([file], tokenizer, output, options(), workers=1)
    assert texts_of(Store(output), tokenizer) == TEXTS


def test_number_of_workers_does_not_change_the_rows(corpus, tokenizer, data, tmp_path, small_chunks):
    prepare([corpus], tokenizer, tmp_path / "out", OPTIONS, workers=3)
    assert rows_bytes(Store(tmp_path / "out")) == rows_bytes(Store(data))


def test_existing_data_set_is_kept(corpus, tokenizer, data):
    before = (data / "manifest.json").stat().st_mtime_ns
    assert prepare([corpus], tokenizer, data, OPTIONS, workers=1) == Store(data).manifest
    with pytest.raises(UserError, match="made with other options"):
        prepare([corpus], tokenizer, data, options(), workers=1)
    assert (data / "manifest.json").stat().st_mtime_ns == before


def test_missing_file_and_unknown_file_type(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl: no such file"):
        records.expand([str(tmp_path / "nowhere.jsonl")])
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(UserError, match="a.doc: unknown file type"):
        records.expand([str(tmp_path / "*")])


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_truncated_file_is_reported(suffix, tokenizer, tmp_path):
    path = tmp_path / f"a{suffix}"
    whole = {".jsonl.gz": write_gzip, ".jsonl.zst": write_zstd, ".parquet": write_parquet}[suffix](tmp_path / "b")
    path.write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"a{suffix}: cannot be read"):
        prepare([path], tokenizer, tmp_path / "out", options(), workers=1)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("text_template", ["no keys", "{0}", "{a.b}", "{open"])
def test_template_without_plain_keys_is_refused(text_template):
    with pytest.raises(UserError, match=f"text template {re.escape(repr(text_template))}: "):
        records.parse_templates("text", [text_template])


def test_tokenizer_is_lossless_and_splits_digits_and_lines(tokenizer):
    text = " Two  spaces,\ta tab, 1234 and\n\nünïcode 🙂 "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert {"1", "2", "3", "4", "\n"} <= set(tokenizer.pieces(tokenizer.encode(text)))
    assert tokenizer.encode("a\nb") == [*tokenizer.encode("a\n"), *tokenizer.encode("b")]


def test_file_that_is_not_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_text("not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(pathlib.Path(tmp_path / "bad.model"))


def test_documents_begin_with_bos_if_the_tokenizer_adds_it(corpus, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "bos")
    (tmp_path / "bos" / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    path = write_jsonl(tmp_path / "some.jsonl", TEXTS)
    with_bos = Tokenizer(tmp_path / "bos")
    prepare([path], with_bos, tmp_path / "rows", options(seq_len=400), workers=1)
    row = Store(tmp_path / "rows").rows("train")[0]
    expected = [[1, *tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]
    assert row["tokens"][1:][row["segment_ids"][1:] != 0].tolist() == [token for ids in expected for token in ids]
    # The first word of each document is a target: its input is the BOS of the same document.
    assert [row["segment_ids"][1:].tolist().count(number) for number in (2, 3, 4)] == [len(ids) for ids in expected]
