"""Prepare a data set: read text files, tokenize them in several processes, pack the tokens and write the rows.

Tokens are first written to numbered chunk files in OUTPUT.partial. Each file is complete or absent, so an interrupted
run can resume with the chunks it has finished. The finished data set is renamed to OUTPUT.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import pathlib
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from rho1_jax.data import manifest, records, store, transcripts
from rho1_jax.data.manifest import MANIFEST
from rho1_jax.data.packing import Batch, Documents, pack, pack_whole
from rho1_jax.data.tokenizer import TOKENIZER_DIR, Tokenizer
from rho1_jax.data.transcripts import Transcripts
from rho1_jax.runtime import formats, stopping
from rho1_jax.runtime.children import end_with_parent
from rho1_jax.runtime.errors import UserError, printable
from rho1_jax.runtime.files import json_sha256, replacing, sha256, write_text
from rho1_jax.runtime.lock import locked
from rho1_jax.runtime.progress import Progress
from rho1_jax.runtime.stopping import Stopped

CHUNK_BYTES = 4 << 20
BAD_RECORDS_SHOWN = 20
REASON_CHARACTERS = 300  # kept of the reason why a record is bad


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that determine the rows, together with the tokenizer and the inputs.

    Attributes:
      templates: format strings over a record's keys. The first one whose keys the record has gives its text.
      transcripts: the keys of conversations, of which only the responses are trained on; None: records hold plain text.
      seq_len: targets in a row.
      eval_fraction: fraction of documents in the split "eval". A hash of its text decides for each document.
      max_bad_fraction: largest fraction of bad records to accept.
    """

    templates: tuple[str, ...]
    transcripts: Transcripts | None
    seq_len: int
    eval_fraction: float
    max_bad_fraction: float


@dataclasses.dataclass
class Chunk:
    """Consecutive documents of the corpus, tokenized."""

    tokens: np.ndarray  # int32, the documents one after another, each with EOS at its end
    lengths: np.ndarray  # number of tokens in each document, including EOS
    responses: np.ndarray  # bool, one per token: True inside a response; empty for plain text
    held_out: np.ndarray  # bool, one per document: True if it belongs to the split "eval"
    truncated: int  # number of conversations that were longer than a row
    bad: list[str]  # "file:line: reason" for each bad record

    def save(self, path: pathlib.Path) -> None:
        """Writes the chunk to a file, completely or not at all."""
        fields = vars(self) | {"bad": np.array(self.bad, dtype=np.str_)}
        with replacing(path) as beside, beside.open("wb") as file:
            np.savez(file, **fields)

    @classmethod
    def load(cls, path: pathlib.Path) -> "Chunk":
        """Reads a chunk that `save` wrote. Raises UserError if it was damaged since."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                fields = dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged: {error}; remove {path.parent} and run `rho1 prepare` again") from error
        return cls(**fields | {"bad": fields["bad"].tolist(), "truncated": int(fields["truncated"])})

    def split(self, held_out: bool) -> Documents:
        """The documents of one split."""
        in_split = self.held_out == held_out
        token_in_split = np.repeat(in_split, self.lengths)
        responses = self.responses[token_in_split] if len(self.responses) else None
        return Documents(self.tokens[token_in_split], self.lengths[in_split], responses)


RawChunk = list[tuple[pathlib.Path, int, Any]]  # file, line, raw record


def raw_chunks(files: list[pathlib.Path]) -> Iterator[tuple[RawChunk, int]]:
    """Reads the raw records of all files, about CHUNK_BYTES at a time. The chunks depend only on the inputs.

    Yields:
      A chunk, and the number of input bytes read up to its end.
    """
    chunk: RawChunk = []
    size = done = 0
    for path in files:
        for line, record, position in records.read(path):
            chunk.append((path, line, record))
            size += records.size(record)
            if size >= CHUNK_BYTES:
                yield chunk, done + position
                chunk, size = [], 0
        done += path.stat().st_size
    if chunk:
        yield chunk, done


def tokenize(chunk: RawChunk, tokenizer: Tokenizer, options: Options) -> Chunk:
    """Tokenizes a chunk. Bad records are listed with the reason, and empty texts are dropped."""
    documents: list[np.ndarray] = []
    responses: list[list[bool]] = []
    held_out, bad, truncated = [], [], 0
    for path, line, record in chunk:
        try:
            parsed = records.parse(path, record)
            if options.transcripts is None:
                text = records.document(parsed, options.templates)
                ids = tokenizer.encode_document(text)
            else:
                row_length = options.seq_len + 1
                text, tokens, in_response = transcripts.tokenize(parsed, options.transcripts, tokenizer, row_length)
                if not any(in_response[:row_length]):
                    raise records.BadRecord(f"no response within the {row_length} tokens of a row")
                truncated += len(tokens) > row_length
                ids = np.array(tokens[:row_length], np.int32)
                responses.append(in_response[:row_length])
        except records.BadRecord as error:
            bad.append(f"{path}:{line}: {str(error)[:REASON_CHARACTERS]}")
            continue
        if text:
            documents.append(ids)
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            held_out.append(int.from_bytes(digest, "big") < options.eval_fraction * 2**64)
    return Chunk(
        tokens=np.concatenate([np.empty(0, np.int32), *documents]),
        lengths=np.array(list(map(len, documents)), np.int64),
        responses=np.fromiter(itertools.chain.from_iterable(responses), bool),
        held_out=np.array(held_out, bool),
        truncated=truncated,
        bad=bad,
    )


# The tokenizer and the options of a worker process.
_worker: dict[str, Any] = {}


def _start_worker(tokenizer_path: pathlib.Path, options: Options) -> None:
    end_with_parent()
    _worker.update(tokenizer=Tokenizer(tokenizer_path), options=options)


def _work(chunk: RawChunk, path: pathlib.Path) -> Chunk:
    tokenized = tokenize(chunk, **_worker)
    tokenized.save(path)
    return tokenized


def describe(files: list[pathlib.Path], tokenizer: Tokenizer, options: Options) -> dict[str, Any]:
    """The part of the manifest that is known before tokenizing: the fingerprint, and everything it covers."""
    inputs = []
    with Progress("fingerprint", sum(path.stat().st_size for path in files), unit="B") as progress:
        for path in files:
            size = path.stat().st_size
            inputs.append({"file": str(path), "bytes": size, "sha256": sha256(path)})
            progress.advance(size)
    description: dict[str, Any] = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "options": _as_json(options),
        "inputs": inputs,
    }
    return {"fingerprint": _fingerprint(description), **description}


def _as_json(options: Options) -> dict[str, Any]:
    """The options for the manifest. What older versions did not have is left out unless it is set."""
    described = json.loads(json.dumps(dataclasses.asdict(options)))
    if described["transcripts"] and described["transcripts"]["chat_template"] is None:
        del described["transcripts"]["chat_template"]
    return described


def _fingerprint(description: Mapping[str, Any]) -> str:
    """Hash of the tokenizer, the options and the content of the inputs."""
    parts = {key: description[key] for key in ("tokenizer_fingerprint", "options")}
    return json_sha256(parts | {"inputs": [entry["sha256"] for entry in description["inputs"]]})


def prepare(
    files: list[pathlib.Path], tokenizer: Tokenizer, output: pathlib.Path, options: Options, workers: int
) -> dict[str, Any]:
    """Makes the data set `output`, or resumes an interrupted run. An existing data set is left as it is.

    Returns:
      The manifest.

    Raises:
      UserError: an option or input is invalid, too many records are bad, `output` exists and holds something else, or
        another process is making it.
      Stopped: the process was asked to stop.
    """
    _check(options)
    description = describe(files, tokenizer, options)
    if output.exists():
        return _existing(output, description, tokenizer)
    partial = output.with_name(output.name + ".partial")
    with locked(partial.with_name(partial.name + ".lock"), f"--output={output}"):
        stopping.save_on_stop()
        _start_or_resume(partial, description)
        try:
            chunks = _tokenize_all(files, tokenizer, partial, options, workers)
            counts = _write(chunks, tokenizer, partial, options)
        except UserError:
            shutil.rmtree(partial)
            raise
        tokenizer.save(partial / TOKENIZER_DIR)
        if options.transcripts and options.transcripts.chat_template:
            options.transcripts.chat_template.save(partial / TOKENIZER_DIR)
        paths = [path for folder in store.FOLDERS for path in (partial / folder).rglob("*") if path.is_file()]
        sealed = manifest.write(partial, description | counts | {"files": manifest.describe(partial, paths)})
        store.Store(partial).verify()
        for chunk in chunks:
            chunk.unlink()
        (partial / "description.json").unlink()
        partial.rename(output)
    return sealed


def _check(options: Options) -> None:
    if options.seq_len < 1:
        raise UserError(f"--seq_len={options.seq_len} must be at least 1")
    for name in ("eval_fraction", "max_bad_fraction"):
        if not 0 <= getattr(options, name) <= 1:
            raise UserError(f"--{name}={getattr(options, name)} must be between 0 and 1")


def _existing(output: pathlib.Path, description: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    if not (output / MANIFEST).is_file():
        raise UserError(f"{output} exists but is not a prepared data set; choose another --output")
    existing = store.Store(output)
    stored: Mapping[str, Any] = existing.manifest
    if not existing.has_tokenizer(tokenizer.path, tokenizer.fingerprint):
        difference = "another tokenizer"
    elif stored["options"] != description["options"]:
        difference = "other options"
    elif stored["fingerprint"] != _fingerprint(
        description | {"tokenizer_fingerprint": existing.tokenizer_fingerprint}  # may be another file of the same one
    ):
        difference = "other inputs"
    else:
        return dict(stored)
    raise UserError(f"{output} exists and was made with {difference}; remove it or choose another --output")


def _start_or_resume(partial: pathlib.Path, description: dict[str, Any]) -> None:
    """Keeps the chunks of an interrupted run if its inputs and options were the same; deletes them otherwise."""
    marker = partial / "description.json"
    # Another version may read records or cut chunks differently.
    text = json.dumps({formats.KEY: formats.FORMAT_VERSION} | description)
    if not (marker.is_file() and marker.read_bytes() == text.encode()):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_text(marker, text)


def _tokenize_all(
    files: list[pathlib.Path], tokenizer: Tokenizer, partial: pathlib.Path, options: Options, workers: int
) -> list[pathlib.Path]:
    """Tokenizes the chunks that do not exist yet. Returns the paths of all chunks, in order."""
    chunk_paths: list[pathlib.Path] = []
    bad_count = document_count = 0
    progress = Progress("tokenize", sum(path.stat().st_size for path in files), unit="B")
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path, options))
    pending: collections.deque[tuple[Callable[[], Chunk], int]] = collections.deque()

    def finish_next() -> None:
        nonlocal bad_count, document_count
        result, position = pending.popleft()
        chunk = result()
        for reason in chunk.bad[: max(0, BAD_RECORDS_SHOWN - bad_count)]:
            print(f"bad record: {printable(reason)}", file=sys.stderr)
        bad_count += len(chunk.bad)
        document_count += len(chunk.lengths)
        progress.advance_to(position)
        if not options.max_bad_fraction:
            _check_bad(bad_count, document_count, options)

    with progress, pool:
        try:
            for number, (raw, position) in enumerate(raw_chunks(files)):
                _check_stop(partial)
                path = partial / f"chunk-{number:06d}.npz"
                chunk_paths.append(path)
                done = functools.partial(Chunk.load, path) if path.exists() else pool.submit(_work, raw, path).result
                pending.append((done, position))
                while len(pending) > 2 * workers:
                    finish_next()
            while pending:
                finish_next()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    _check_bad(bad_count, document_count, options)
    if not document_count:
        raise UserError(f"{', '.join(map(str, files))}: no documents")
    return chunk_paths


def _check_stop(partial: pathlib.Path) -> None:
    if stopping.requested():
        raise Stopped(f"stopped; {partial} keeps the finished chunks, and the same command resumes")


def _check_bad(bad: int, documents: int, options: Options) -> None:
    if bad > options.max_bad_fraction * (bad + documents):
        raise UserError(
            f"{bad} of {bad + documents} records are bad, more than --max_bad_fraction={options.max_bad_fraction} "
            "allows, so no data set was written; fix them (the first are listed above) or raise the limit"
        )


def _write(chunks: list[pathlib.Path], tokenizer: Tokenizer, partial: pathlib.Path, options: Options) -> dict[str, Any]:
    """Packs the documents of all chunks and writes the rows. Returns the counts for the manifest."""
    splits: dict[str, dict[str, int]] = {}
    bad = truncated = 0
    for path in chunks:
        chunk = Chunk.load(path)
        bad += len(chunk.bad)
        truncated += chunk.truncated
        for name, held_out in (("train", False), ("eval", True)):
            documents = chunk.split(held_out)
            if len(documents.lengths):
                counts = splits.setdefault(name, {"documents": 0, "tokens": 0, "rows": 0})
                counts["documents"] += len(documents.lengths)
                counts["tokens"] += len(documents.tokens)
    progress = Progress("pack", sum(counts["tokens"] for counts in splits.values()), unit="tokens")

    def rows(name: str) -> Iterator[Batch]:
        documents = (Chunk.load(path).split(name == "eval") for path in chunks)
        whole = options.transcripts is not None
        packing = (
            pack_whole(documents, options.seq_len) if whole else pack(documents, options.seq_len, tokenizer.eos_id)
        )
        for batch in packing:
            _check_stop(partial)
            yield batch
            splits[name]["rows"] += len(batch.tokens)
            # In rows cut from a stream, the first token repeats the last one of the previous row.
            progress.advance(int((batch.segment_ids[:, 0 if whole else 1 :] > 0).sum()))

    with progress:
        shutil.rmtree(partial / "rows", ignore_errors=True)
        generators = {name: rows(name) for name in splits}
        store.write_rows(partial, generators, options.seq_len, options.transcripts is not None)
    shutil.rmtree(partial / "downloads", ignore_errors=True)
    totals = {name: sum(counts[name] for counts in splits.values()) for name in ("documents", "tokens", "rows")}
    return {"splits": splits, **totals, "bad_records": bad, "truncated": truncated}
