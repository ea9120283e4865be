"""Pack documents into rows, and compare with a plain loop over the stream."""

import numpy as np
import pytest

from rho1_jax.data.packing import Documents, pack

EOS = 2


def documents(seed, count):
    rng = np.random.default_rng(seed)
    return [[*rng.integers(3, 50, rng.integers(0, 20)).tolist(), EOS] for _ in range(count)]


def as_batches(docs, sizes):
    start = 0
    for size in sizes:
        part = docs[start : start + size]
        start += size
        yield Documents(np.array([t for d in part for t in d], np.int32), np.array([len(d) for d in part], np.int64))


def rows_of(docs, sizes, seq_len):
    packed = list(pack(as_batches(docs, sizes), seq_len, EOS))
    return np.concatenate([b.tokens for b in packed]), np.concatenate([b.segment_ids for b in packed])


@pytest.mark.parametrize("seq_len", [1, 7, 16, 500])
def test_every_token_is_a_target_once_and_in_order(seq_len):
    docs = documents(0, 40)
    tokens, segment_ids = rows_of(docs, [40], seq_len)
    targets = tokens[:, 1:][segment_ids[:, 1:] != 0]
    np.testing.assert_array_equal(targets, [t for d in docs for t in d])
    # Rows overlap by one token: the last target is the next row's first input.
    np.testing.assert_array_equal(tokens[:-1, -1], tokens[1:, 0])
    assert tokens.shape == (-(-len(targets) // seq_len), seq_len + 1)


def test_segments_follow_documents_and_start_at_one():
    docs = [[5, 6, EOS], [7, EOS], [8, 9, 10, EOS]]
    tokens, segment_ids = rows_of(docs, [3], 4)
    np.testing.assert_array_equal(tokens, [[EOS, 5, 6, EOS, 7], [7, EOS, 8, 9, 10], [10, EOS, 0, 0, 0]])
    np.testing.assert_array_equal(segment_ids, [[1, 2, 2, 2, 3], [1, 1, 2, 2, 2], [1, 1, 0, 0, 0]])


def test_rows_do_not_depend_on_batches_of_documents():
    docs = documents(1, 30)
    whole = rows_of(docs, [30], 8)
    for sizes in ([1] * 30, [10, 0, 20], [29, 1]):
        for array, expected in zip(rows_of(docs, sizes, 8), whole):
            np.testing.assert_array_equal(array, expected)
