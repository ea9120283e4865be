"""Keep packed rows on disk: a TFDS data set of ArrayRecord files, its manifest and its tokenizer, in one directory.

DIR/manifest.json  DIR/tokenizer.model  DIR/rows/1.0.0/*.array_record*
"""

import contextlib
import io
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rho1_jax.data.packing import Batch
from rho1_jax.data.tokenizer import TOKENIZER_DIR, Tokenizer
from rho1_jax.runtime import formats
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path

MANIFEST = "manifest.json"
_ROWS = "rows"
_VERSION = "1.0.0"


class _RowsBuilder(tfds.core.GeneratorBasedBuilder):
    """Writes rows in the given order. TFDS writes to a temporary directory and renames it at the end."""

    name = _ROWS
    VERSION = tfds.core.Version(_VERSION)
    pkg_dir_path = None  # keeps TFDS from looking for checksums and metadata next to this module
    code_path = None

    def __init__(self, splits: dict[str, Iterator[Batch]], seq_len: int, responses: bool, data_dir: pathlib.Path):
        self._rows = splits
        self._row_length = seq_len + 1
        self._responses = responses
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        row = tfds.features.Tensor(shape=(self._row_length,), dtype=np.int32)
        features = {"tokens": row, "segment_ids": row}
        if self._responses:
            features["responses"] = tfds.features.Tensor(shape=(self._row_length,), dtype=np.bool_)
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(rows) for name, rows in self._rows.items()}

    def _generate_examples(self, rows):
        key = 0
        for batch in rows:
            named = {name: rows for name, rows in batch._asdict().items() if name in self.info.features}
            for row in zip(*named.values()):
                yield key, dict(zip(named, row))
                key += 1


def write_rows(directory: pathlib.Path, splits: dict[str, Iterator[Batch]], seq_len: int, responses: bool) -> None:
    """Writes the rows of each split, in order, under `directory`.

    Args:
      directory: the data set's directory.
      splits: name -> packed rows. Every split must have at least one row.
      seq_len: targets in a row.
      responses: True if the rows mark the tokens of responses.
    """
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints that it downloads
        _RowsBuilder(splits, seq_len, responses, directory).download_and_prepare()


class Store:
    """A prepared data set, opened for reading.

    Attributes:
      path: its directory.
      manifest: how it was made. Its `fingerprint` covers tokenizer, options and inputs.
    """

    def __init__(self, path: str | pathlib.Path):
        """Opens the data set. Raises UserError if `path` does not hold one."""
        self.path = local_path(path, "data set")
        try:
            self.manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text())
        except FileNotFoundError:
            raise UserError(f"{path}: no prepared data set here; make one with `rho1 prepare`") from None
        formats.check_format(self.manifest, self.path)
        self._builder = tfds.builder_from_directory(self.path / _ROWS / _VERSION)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer, the options and the inputs."""
        return self.manifest["fingerprint"]

    @property
    def seq_len(self) -> int:
        """Targets in a row."""
        return self.manifest["options"]["seq_len"]

    @property
    def has_responses(self) -> bool:
        """True if the rows hold conversations, of which only the responses are trained on."""
        return self.manifest["options"]["transcripts"] is not None

    @property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer's file and special ids."""
        return self.manifest["tokenizer_fingerprint"]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the rows were made with."""
        return Tokenizer(self.path / TOKENIZER_DIR)

    def rows(self, split: str) -> Sequence[dict[str, np.ndarray]]:
        """Random access to the rows of a split.

        Each row is a dict of arrays [M]: "tokens", "segment_ids" and, in conversations, "responses".

        Raises:
          UserError: the data set has no such split.
        """
        if split not in self._builder.info.splits:
            option = "--eval_fraction above 0" if split == "eval" else "--eval_fraction below 1"
            raise UserError(f"{self.path} has no {split!r} split; prepare it with {option}")
        return self._builder.as_data_source(split)
