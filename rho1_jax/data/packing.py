"""Pack documents into rows.

The corpus is one stream of tokens: EOS, then each document with EOS at its end. Rows of `seq_len + 1` tokens are cut
from the stream with stride `seq_len`, so every corpus token is a target exactly once.

Shapes: R rows, M = seq_len + 1.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

PAD_ID = 0


class Documents(NamedTuple):
    """Tokenized documents, concatenated."""

    tokens: np.ndarray  # int32
    lengths: np.ndarray  # number of tokens in each document
    responses: np.ndarray | None = None  # bool, one per token: True inside a response


class Batch(NamedTuple):
    """Packed rows: numpy arrays on the host, JAX arrays on devices.

    Attributes:
      tokens: int32 [R, M] token ids.
      segment_ids: int32 [R, M] document numbers within each row, from 1; 0 is padding.
      responses: in fine-tuning, bool [R, M]: the token is part of a response.
      columns: signals that come with the data, by name: float32 [R, M - 1], one number per target. For example the
        losses of a reference that ran beforehand ("reference_loss_BL"), or the user's own numbers.
    """

    tokens: Any
    segment_ids: Any
    responses: Any = None
    columns: Mapping[str, Any] = {}


def pack(documents: Iterable[Documents], seq_len: int, eos_id: int) -> Iterator[Batch]:
    """Cuts a stream of documents into rows.

    Args:
      documents: plain documents, each ended by EOS.
      seq_len: targets in a row.
      eos_id: the token that the stream starts with.

    Yields:
      Packed rows, as soon as the documents read so far fill them. The last row is padded.
    """
    tokens = np.array([eos_id], np.int32)
    numbers = np.zeros(1, np.int64)  # the number of each token's document
    documents_seen = 0
    for new_tokens, lengths, _ in documents:
        new_numbers = documents_seen + 1 + np.repeat(np.arange(len(lengths)), lengths)
        documents_seen += len(lengths)
        tokens, numbers = np.concatenate([tokens, new_tokens]), np.concatenate([numbers, new_numbers])
        rows = (len(tokens) - 1) // seq_len
        if rows:
            yield _cut(tokens, numbers, rows, seq_len)
            tokens, numbers = tokens[rows * seq_len :], numbers[rows * seq_len :]
    rest = len(tokens) - 1
    if rest:
        padding = (0, seq_len - rest)
        last = _cut(np.pad(tokens, padding, constant_values=PAD_ID), np.pad(numbers, padding), 1, seq_len)
        last.segment_ids[:, rest + 1 :] = 0
        yield last


def _cut(tokens: np.ndarray, numbers: np.ndarray, rows: int, seq_len: int) -> Batch:
    index_RM = np.arange(rows)[:, None] * seq_len + np.arange(seq_len + 1)
    numbers_RM = numbers[index_RM]
    segment_ids_RM = (numbers_RM - numbers_RM[:, :1] + 1).astype(np.int32)
    return Batch(tokens[index_RM].astype(np.int32), segment_ids_RM)


def pack_whole(documents: Iterable[Documents], seq_len: int) -> Iterator[Batch]:
    """Packs conversations into rows without splitting them. A row is closed when the next conversation does not fit.

    Args:
      documents: conversations of at most seq_len + 1 tokens each, with their responses.
      seq_len: targets in a row.

    Yields:
      One padded row at a time.
    """
    row: list[tuple[np.ndarray, np.ndarray]] = []
    for tokens, lengths, responses in documents:
        assert responses is not None
        ends = np.cumsum(lengths)
        for start, end in zip(ends - lengths, ends):
            if sum(len(part) for part, _ in row) + end - start > seq_len + 1:
                yield _whole_row(row, seq_len)
                row = []
            row.append((tokens[start:end], responses[start:end]))
    if row:
        yield _whole_row(row, seq_len)


def _whole_row(parts: list[tuple[np.ndarray, np.ndarray]], seq_len: int) -> Batch:
    tokens, responses = (np.concatenate(arrays) for arrays in zip(*parts))
    numbers = np.repeat(1 + np.arange(len(parts)), [len(part) for part, _ in parts])
    padding = (0, seq_len + 1 - len(tokens))
    return Batch(
        np.pad(tokens, padding, constant_values=PAD_ID)[None].astype(np.int32),
        np.pad(numbers, padding)[None].astype(np.int32),
        np.pad(responses, padding)[None],
    )
