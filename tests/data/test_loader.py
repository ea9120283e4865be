"""Batches are a pure function of (seed, step) and do not depend on the number of hosts."""

import itertools
import shutil

import numpy as np
import pytest
from helpers import OPTIONS, random_batch, write_jsonl

from rho1_jax.data import loader
from rho1_jax.data.loader import batches, eval_batches, open_mixture, parse_mixture, to_devices
from rho1_jax.data.preparation import Options, prepare
from rho1_jax.data.store import Store
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.sharding import batch_sharding, local_rows, make_mesh


def take(stores, weights, count, *, first_step=0, rows=range(8), seed=0, batch_size=8, permute=True):
    stream = batches(
        stores,
        weights,
        batch_size=batch_size,
        seed=seed,
        first_step=first_step,
        rows=np.array(rows),
        prefetch=2,
        permute=permute,
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
    stream = np.concatenate(take(stores, weights, -(-2 * count // 8), permute=False))
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


@pytest.mark.parametrize("hosts", [[range(16)], [range(8), range(8, 16)], [[0, 1, 6, 7], [2, 3, 4, 5, *range(8, 16)]]])
def test_every_microbatch_of_a_mixture_sees_every_data_set(data, other_data, hosts):
    """At weights 3:1, every fourth row is from the second data set. Row r goes to microbatch r mod 4."""
    stores, weights = open_mixture(f"{data}:3,{other_data}:1")
    rows = stores[1].rows("train")
    other = {tuple(rows[i]["tokens"].tolist()) for i in range(len(rows))}

    def is_other(permute):
        """True for rows of the second data set, [steps, 16], and the rows themselves, joined from all hosts."""
        batches = np.empty((8, 16, 17), np.int32)
        for host in hosts:
            batches[:, list(host)] = take(stores, weights, 8, rows=host, batch_size=16, permute=permute)
        return np.array([[tuple(row.tolist()) in other for row in batch] for batch in batches]), batches

    fixed, in_order = is_other(permute=False)
    assert (fixed.sum(axis=0) > 0).reshape(4, 4).all(axis=0).sum() == 1  # only one microbatch sees the second data set
    permuted, batches = is_other(permute=True)
    counts = permuted.reshape(8, 4, 4).sum(axis=1)  # [steps, microbatches]
    assert (counts.sum(axis=0) > 0).all() and (counts.sum(axis=0) < 8 * 4).all()
    for before, after in zip(in_order, batches):
        assert sorted(before.tolist()) == sorted(after.tolist()) and (before != after).any()
    # The same on any number of hosts, and on every machine and version of NumPy.
    np.testing.assert_array_equal(batches, take(stores, weights, 8, rows=range(16), batch_size=16))


def test_the_permutation_of_a_step_is_fixed():
    """A run must resume in the order it began with, on any machine and with any version of NumPy."""
    assert loader._permutation(3, 5, 8).tolist() == [0, 6, 2, 1, 3, 4, 7, 5]
    assert loader._permutation(3, 6, 8).tolist() == [4, 3, 2, 6, 7, 1, 5, 0]


def test_a_damaged_row_ends_a_run_with_one_line(data, tmp_path):
    shutil.copytree(data, tmp_path / "rows")
    stores, weights = open_mixture(str(tmp_path / "rows"))
    (path,) = (tmp_path / "rows" / "rows" / "1.0.0").glob("rows-train*")
    path.write_bytes(path.read_bytes()[:3000] + bytes(5000) + path.read_bytes()[8000:])
    with pytest.raises(
        UserError, match=r"rows: row \d+ of the split 'train' cannot be read: .*; restore it, or remove"
    ):
        take(stores, weights, 100)


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
    for text in ("", "a:0", "a:x", "a:-1", "a:nan", "a:inf"):
        with pytest.raises(UserError, match="config.data.train"):
            parse_mixture(text)


def test_directories_with_commas_and_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_mixture(r"a\,b:3,c\:1:2,d\:5") == [("a,b", 3.0), ("c:1", 2.0), ("d:5", 1.0)]
    for name in ("a,b:2", "x:3", "y,z"):
        (tmp_path / name).mkdir()
    assert parse_mixture("a,b:2") == [("a,b:2", 1.0)]
    assert parse_mixture("x:3,n:2") == [("x:3", 1.0), ("n", 2.0)]
    assert parse_mixture(r"y\,z,x\:3:2") == [("y,z", 1.0), ("x:3", 2.0)]


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
