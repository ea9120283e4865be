"""Batches are a pure function of (seed, step) and do not depend on the number of hosts."""

import itertools

import numpy as np
import pytest
from helpers import OPTIONS, random_batch, write_jsonl

from rho1_jax.data.loader import batches, eval_batches, open_mixture, parse_mixture, to_devices
from rho1_jax.data.preparation import Options, prepare
from rho1_jax.data.store import Store
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.sharding import batch_sharding, local_rows, make_mesh


def take(stores, weights, count, *, first_step=0, rows=range(8), seed=0, batch_size=8):
    stream = batches(
        stores,
        weights,
        batch_size=batch_size,
        seed=seed,
        first_step=first_step,
        rows=np.array(rows),
        prefetch=2,
    )
    return [batch.tokens for batch in itertools.islice(stream, count)]


@pytest.fixture(scope="module")
def other_data(tokenizer, tmp_path_factory):
    """A second data set. All its documents begin with "Other"."""
    directory = tmp_path_factory.mktemp("other")
    corpus = write_jsonl(directory / "other.jsonl", [f"Other text number {n}, quite another" for n in range(60)])
    prepare([corpus], tokenizer, directory / "rows", OPTIONS, workers=1)
    return directory / "rows"


@pytest.mark.parametrize("rows", [range(4), range(4, 8), [0, 1, 6, 7], [5]])
def test_host_reads_its_rows_of_each_batch(data, other_data, rows):
    stores, weights = open_mixture(f"{data}:3,{other_data}:1")
    whole = take(stores, weights, 5, first_step=2)
    for local, batch in zip(take(stores, weights, 5, first_step=2, rows=rows), whole):
        np.testing.assert_array_equal(local, batch[list(rows)])


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_to_devices_shards_a_batch_by_row(sizes):
    mesh = make_mesh(*sizes)
    np.testing.assert_array_equal(local_rows(mesh, 16), np.arange(16))  # a single process holds all rows
    batch = random_batch(16, 5)
    placed = to_devices(batch, mesh, 16)
    np.testing.assert_array_equal(placed.tokens, batch.tokens)
    assert placed.segment_ids.sharding == batch_sharding(mesh)


def test_batches_can_start_at_any_step(data):
    stores, weights = open_mixture(str(data))
    whole = take(stores, weights, 12)
    np.testing.assert_array_equal(take(stores, weights, 3, first_step=9), whole[9:])
    assert (take(stores, weights, 1, seed=1)[0] != whole[0]).any()


def test_each_epoch_has_every_row_once_in_a_new_order(data):
    stores, weights = open_mixture(str(data))
    rows = Store(data).rows("train")
    count = len(rows)
    stream = np.concatenate(take(stores, weights, -(-2 * count // 8)))
    expected = sorted(row["tokens"].tolist() for row in (rows[i] for i in range(count)))
    epochs = [stream[:count].tolist(), stream[count : 2 * count].tolist()]
    assert sorted(epochs[0]) == expected and sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1]


def test_mixture_follows_its_weights(data, other_data):
    stores, weights = open_mixture(f"{data}:3,{other_data}:1")
    other = {
        tuple(row["tokens"].tolist())
        for row in (stores[1].rows("train")[i] for i in range(len(stores[1].rows("train"))))
    }
    drawn = np.concatenate(take(stores, weights, 50))
    share = np.mean([tuple(row.tolist()) in other for row in drawn])
    assert abs(share - 0.25) < 0.02


def test_eval_batches_hold_every_row_once_for_any_hosts(data):
    rows = Store(data).rows("eval")
    for parts in ([range(8)], [[0, 1, 6, 7], [2, 3, 4, 5]]):
        read = []
        for part in parts:
            for batch in eval_batches(rows, 8, np.array(part)):
                assert batch.tokens.shape == (len(part), 17)
                read += batch.tokens[batch.segment_ids.any(axis=1)].tolist()
        assert sorted(read) == sorted(rows[i]["tokens"].tolist() for i in range(len(rows)))


def test_parse_mixture():
    assert parse_mixture("a:3,b:0.5") == [("a", 3.0), ("b", 0.5)]
    assert parse_mixture("some/dir") == [("some/dir", 1.0)]
    for text in ("", "a:0", "a:x", "a:-1", "a:nan"):
        with pytest.raises(UserError, match="config.data.train"):
            parse_mixture(text)


def test_incompatible_data_sets_are_refused(data, tokenizer, corpus, tmp_path):
    prepare([corpus], tokenizer, tmp_path / "longer", Options(**OPTIONS.__dict__ | {"seq_len": 32}), workers=1)
    with pytest.raises(UserError, match="rows of 32 tokens, .* of 16"):
        open_mixture(f"{data},{tmp_path / 'longer'}")
    with pytest.raises(UserError, match="nothing: no prepared data set"):
        open_mixture(f"{data},{tmp_path / 'nothing'}")


def test_missing_split_is_reported(tokenizer, corpus, tmp_path):
    prepare([corpus], tokenizer, tmp_path / "all", Options(**OPTIONS.__dict__ | {"eval_fraction": 0.0}), workers=1)
    with pytest.raises(UserError, match="all has no 'eval' split"):
        Store(tmp_path / "all").rows("eval")
