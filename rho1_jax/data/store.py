"""Keep packed rows on disk: a TFDS data set of ArrayRecord files, its manifest and its tokenizer, in one directory.

DIR/manifest.json  DIR/tokenizer.model  DIR/rows/1.0.0/*.array_record*
"""

import contextlib
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NotRequired

import numpy as np
import pydantic
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from typing_extensions import TypedDict

from rho1_jax.data import manifest
from rho1_jax.data.manifest import MANIFEST
from rho1_jax.data.packing import Batch
from rho1_jax.data.tokenizer import TOKENIZER_DIR, Tokenizer, same_tokenizer
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path

_ROWS = "rows"
_VERSION = "1.0.0"
FOLDERS = (_ROWS, TOKENIZER_DIR)  # everything in them is listed in the manifest

_Count = Annotated[int, pydantic.Field(ge=0)]
_Positive = Annotated[int, pydantic.Field(ge=1)]


class _Options(TypedDict):
    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]
    seq_len: _Positive
    transcripts: dict[str, Any] | None


class _Split(TypedDict):
    documents: _Count
    tokens: _Count
    rows: _Positive


class DataManifest(TypedDict):
    """How a data set was made, and its files. Formats before 3 list no files."""

    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]
    format_version: NotRequired[int]
    fingerprint: str
    tokenizer_fingerprint: str
    options: _Options
    splits: dict[str, _Split]
    files: NotRequired[dict[str, manifest.File]]


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
        """Opens the data set, and checks its manifest and the sizes and ends of its files.

        Raises:
          UserError: `path` holds no data set, or a damaged one.
        """
        self.path = local_path(path, "data set")
        if self.path.is_file():
            raise UserError(f"{path} is a file, not a prepared data set; make one from it with `rho1 prepare`")
        if not (self.path / MANIFEST).exists():
            raise UserError(f"{path}: no prepared data set here; make one with `rho1 prepare`")
        self._remedy = f"restore it, or remove {path} and run `rho1 prepare` again"
        self.manifest: DataManifest = manifest.read(self.path, DataManifest, self._remedy)
        if "files" in self.manifest:
            manifest.check(self.path, self.manifest["files"], FOLDERS, self._remedy)
        rows = self.path / _ROWS / _VERSION
        try:
            self._builder = tfds.builder_from_directory(rows)
            for name, split in self.manifest["splits"].items():
                if self._builder.info.splits[name].num_examples != split["rows"]:
                    raise ValueError(f"dataset_info.json and {MANIFEST} disagree about the split {name!r}")
        except Exception as error:  # TFDS raises errors of many kinds
            raise UserError(f"{rows}: cannot open the rows: {_one_line(error)}; {self._remedy}") from error

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

    def has_tokenizer(self, path: pathlib.Path, fingerprint: str) -> bool:
        """True if the rows were made with this tokenizer.

        Args:
          path: the tokenizer's file or folder.
          fingerprint: the fingerprint recorded for it.
        """
        return same_tokenizer(self.path / TOKENIZER_DIR, self.tokenizer_fingerprint, path, fingerprint)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the rows were made with. Raises UserError if it was replaced."""
        return Tokenizer(self.path / TOKENIZER_DIR, self.tokenizer_fingerprint)

    def rows(self, split: str) -> Sequence[dict[str, np.ndarray]]:
        """Random access to the rows of a split.

        Each row is a dict of arrays [M]: "tokens", "segment_ids" and, in conversations, "responses". Reading one raises
        UserError if it is damaged.

        Raises:
          UserError: the data set has no such split, or one of its files has the wrong number of rows.
        """
        if split not in self.manifest["splits"]:
            option = "--eval_fraction above 0" if split == "eval" else "--eval_fraction below 1"
            raise UserError(f"{self.path} has no {split!r} split; prepare it with {option}")
        info = self._builder.info.splits[split]
        for path, expected in zip(info.filepaths, info.shard_lengths):
            try:
                reader = ArrayRecordReader(str(path))
                count = reader.num_records()
                reader.close()
            except RuntimeError as error:
                raise UserError(f"{path} cannot be read: {_one_line(error)}; {self._remedy}") from None
            if count != expected:
                raise UserError(f"{path} holds {count:,} rows instead of {expected:,}; {self._remedy}")
        return _Rows(self._builder.as_data_source(split), f"{self.path}: row", f"of the split {split!r}", self._remedy)

    def verify(self) -> None:
        """Compares every file with its checksum, and opens tokenizer and rows. Raises UserError on any damage."""
        checksums = {name: file["sha256"] for name, file in self.manifest.get("files", {}).items()}
        manifest.verify(self.path, checksums, self._remedy)
        self.tokenizer()
        for split in self.manifest["splits"]:
            self.rows(split)


class _Rows(Sequence[dict[str, np.ndarray]]):
    """The rows of a split. Errors name the row."""

    def __init__(self, source: Sequence[Mapping[str, np.ndarray]], before: str, after: str, remedy: str):
        self._source, self._before, self._after, self._remedy = source, before, after, remedy

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: Any) -> Any:
        try:
            return self._source[row]
        except Exception as error:  # the libraries raise RuntimeError, ValueError, IndexError and more
            where = f"{self._before} {row} {self._after}"
            raise UserError(f"{where} cannot be read: {_one_line(error)}; {self._remedy}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
