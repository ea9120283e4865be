"""Load batches with Grain, as a pure function of (seed, step).

Each data set is repeated forever and reshuffled every epoch; several data sets are mixed by weight. Step n takes rows
n * B to (n + 1) * B of the resulting sequence, so there is no iterator state to save.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from rho1_jax.data.packing import Batch
from rho1_jax.data.store import Store
from rho1_jax.data.tokenizer import TOKENIZER_DIR
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, split_list
from rho1_jax.runtime.sharding import batch_sharding, local_rows


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """Parses "DIR1:3,DIR2:1" into [("DIR1", 3.0), ("DIR2", 1.0)]. The default weight is 1.

    See `split_list` for directories with a comma or a colon in their names.

    Raises:
      UserError: no directory is named, or a weight is not a positive number.
    """
    mixture = []
    for part in filter(None, split_list(text)):
        local_path(part, "config.data.train")
        *names, last = split_list(part, ":")
        directory, weight = (":".join(names), last) if names else (last, "1")
        try:
            mixture.append((directory, float(weight)))
            if not 0 < mixture[-1][1] < math.inf:
                raise ValueError
        except ValueError:
            raise UserError(f"config.data.train: {part!r} is not DIR or DIR:WEIGHT with a positive weight") from None
    if not mixture:
        raise UserError(
            "config.data.train is empty; set it to a prepared data set, DIR, or to a mixture, DIR1:3,DIR2:1"
        )
    return mixture


def open_mixture(text: str) -> tuple[list[Store], list[float]]:
    """Opens the stores of a mixture and returns them with their weights.

    Raises:
      UserError: a data set cannot be opened, or differs from the first in tokenizer, in row length, or in whether it
        holds conversations.
    """
    directories, weights = zip(*parse_mixture(text))
    stores = [Store(directory) for directory in directories]
    for store in stores[1:]:
        check_same_tokenizer(store, stores[0])
        if store.seq_len != stores[0].seq_len:
            raise UserError(
                f"{store.path} has rows of {store.seq_len} tokens, {stores[0].path} of {stores[0].seq_len}: "
                "prepare them with the same --seq_len"
            )
        if store.has_responses != stores[0].has_responses:
            raise UserError(
                f"cannot mix {store.path} and {stores[0].path}: one holds conversations, the other plain text"
            )
    return stores, list(weights)


def check_same_tokenizer(store: Store, other: Store) -> None:
    """Raises UserError if two data sets were prepared with different tokenizers."""
    if not store.has_tokenizer(other.path / TOKENIZER_DIR, other.tokenizer_fingerprint):
        raise UserError(
            f"{store.path} was prepared with a different tokenizer ({store.tokenizer_fingerprint[:12]}) than "
            f"{other.path} ({other.tokenizer_fingerprint[:12]}): prepare both with the same one"
        )


def batches(
    stores: Sequence[Store],
    weights: Sequence[float],
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    rows: np.ndarray,
    prefetch: int,
    permute: bool,
    columns: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[Batch]:
    """Loads the given rows of every training batch, from `first_step` on and without end. No other row is read.

    Args:
      stores: prepared data sets; the split "train" of each is read.
      weights: how often to draw from each data set, relative to the others.
      batch_size: rows B of the global batch.
      seed: seed of the shuffles.
      first_step: the step of the first batch.
      rows: [R] the rows to load of each global batch, from 0 to B - 1 (see `sharding.local_rows`).
      prefetch: batches to read ahead.
      permute: shuffle the rows within each batch. Otherwise the data sets of a mixture follow each other in a fixed
        pattern, which can put all rows of one of them into the same microbatch. Runs that an older version
        began are not permuted.
      columns: for each data set, the signals that `Batch.columns` gets: row number -> float32 [seq_len].

    Yields:
      numpy arrays [R, seq_len + 1].
    """
    tables = [_Table(store.rows("train"), more) for store, more in zip(stores, columns or [{}] * len(stores))]
    sources = [
        grain.MapDataset.source(table).seed(seed + number).shuffle().repeat() for number, table in enumerate(tables)
    ]
    mixed = grain.MapDataset.mix(sources, weights)
    mine = grain.MapDataset.source(_LocalRows(mixed, batch_size, rows, seed if permute else None)).batch(len(rows))[
        first_step:
    ]
    for read in mine.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=prefetch)):
        yield Batch(**read)


class _Table:
    """Rows with further columns."""

    def __init__(self, rows: Sequence[dict[str, np.ndarray]], columns: Mapping[str, Any]):
        self._rows, self._columns = rows, columns

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        columns = {name: column[row] for name, column in self._columns.items()}
        return self._rows[row] | ({"columns": columns} if columns else {})


class _LocalRows:
    """The same rows of each batch, for a sequence of rows that is cut into batches of `batch_size`.

    With a seed, the rows of each batch are permuted first.
    """

    def __init__(self, sequence: Sequence[dict[str, np.ndarray]], batch_size: int, rows: np.ndarray, seed: int | None):
        self._sequence, self._batch_size, self._rows, self._seed = sequence, batch_size, rows, seed

    def __len__(self) -> int:
        return len(self._sequence) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, position = divmod(index, len(self._rows))
        row = int(self._rows[position])
        if self._seed is not None:
            row = int(_permutation(self._seed, step, self._batch_size)[row])
        return self._sequence[step * self._batch_size + row]


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, step: int, count: int) -> np.ndarray:
    """A permutation of `count` numbers that depends on the seed and the step alone.

    It sorts the raw output of a bit generator, which NumPy keeps the same from version to version. The methods of
    `np.random.Generator` may change.
    """
    return np.argsort(np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(count), kind="stable")


def eval_batches(
    rows: Sequence[dict[str, np.ndarray]], batch_size: int, local: np.ndarray, which: range | None = None
) -> Iterator[Batch]:
    """Batches of a split's rows, in order. The last batch is padded.

    Args:
      rows: all rows of the split.
      batch_size: rows B of the global batch.
      local: [R] the rows to load of each global batch, from 0 to B - 1.
      which: the rows of the split to take; None: all.

    Yields:
      numpy arrays [R, seq_len + 1].
    """
    which = range(len(rows)) if which is None else which
    blank = {name: np.zeros_like(values) for name, values in rows[0].items()}
    for start in range(0, len(which), batch_size):
        numbers = which[start : start + batch_size]
        taken = [rows[numbers[i]] if i < len(numbers) else blank for i in local.tolist()]
        arrays: dict[str, Any] = {name: np.stack([row[name] for row in taken]) for name in blank}
        yield Batch(**arrays)


def to_devices(batch: Batch, mesh: Mesh, batch_size: int) -> Batch:
    """Makes one global batch of `batch_size` rows, sharded over the mesh, from each process's `sharding.local_rows`."""
    rows, everywhere = local_rows(mesh, batch_size), batch_sharding(mesh)

    def place(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return x[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), everywhere, part)

    return jax.tree.map(place, batch)
