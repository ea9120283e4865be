"""Store a reference model's losses on a data set's training rows, and optionally its entropies, beside the data set.

DATA/scores/NAME/manifest.json  losses-00000.npy  [entropies-00000.npy]  ...

Each .npy file is a plain numpy array [rows in the shard, seq_len], in nats. Rows are in the order of the data set.
"""

import json
import math
import pathlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import pydantic
from typing_extensions import TypedDict

from rho1_jax.data import manifest
from rho1_jax.data.manifest import MANIFEST, File
from rho1_jax.data.store import Store
from rho1_jax.method.signals import SUFFIX
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, replacing, split_list, write_text
from rho1_jax.runtime.schema import read_json

KEY = "config.reference.scores"
EXTERNAL_KEY = "config.data.external"
SPLIT = "train"
FOLDER = "scores"  # folder in a data set that holds its scores
DESCRIPTION = "description.json"  # in a folder of scores that are not complete yet
SHARD_TOKENS = 2**22
DTYPES = ("float16", "float32")
# The parts of a description that must match, and what to call a mismatch in an error.
PARTS = {
    "data": "other rows",
    "tokenizer": "another tokenizer",
    "reference": "another reference",
    "document_mask": "another config.data.document_mask",
}

_Positive = Annotated[int, pydantic.Field(ge=1)]


def _has_fingerprint(reference: dict[str, str]) -> dict[str, str]:
    if "fingerprint" not in reference:
        raise ValueError("the fingerprint is missing")
    return reference


class ScoreDescription(TypedDict):
    """What scores are made from, and their shape."""

    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]
    data: str
    tokenizer: str
    reference: Annotated[dict[str, str], pydantic.AfterValidator(_has_fingerprint)]
    document_mask: bool
    rows: _Positive
    seq_len: _Positive
    rows_per_shard: _Positive
    dtype: Literal["float16", "float32"]
    signals: list[Literal["losses", "entropies"]]


class ScoreManifest(ScoreDescription):
    """The description of complete scores, and their files. Formats before 3 store only the SHA-256 of each file."""

    format_version: NotRequired[int]
    flops: pydantic.FiniteFloat
    files: dict[str, str | File]


def scores_path(store: Store, name: str) -> pathlib.Path:
    """The directory of the scores called `name`. Raises UserError if the name is not a plain directory name."""
    if not name or name != pathlib.PurePath(name).name:
        raise UserError(f"{KEY}={name!r} must be the name of a directory, without a path")
    return store.path / FOLDER / name


def is_scores(path: pathlib.Path) -> bool:
    """True if a folder holds scores."""
    return path.absolute().parent.name == FOLDER and (path / MANIFEST).exists()


def is_partial_scores(path: pathlib.Path) -> bool:
    """True if a folder holds scores that are not complete yet."""
    return path.absolute().parent.name == FOLDER and (path / DESCRIPTION).exists()


def read_scores(path: pathlib.Path) -> tuple[ScoreDescription, int]:
    """The description of a folder of scores, and the number of rows stored in it. Verifies no file.

    Raises:
      UserError: the manifest, or the description of scores that are not complete, is damaged.
    """
    if not is_partial_scores(path):
        stored = manifest.read(path, ScoreManifest, _remedy(path))
        return stored, stored["rows"]
    partial = read_json(path / DESCRIPTION, ScoreDescription)
    rows, size = partial["rows"], partial["rows_per_shard"]
    complete = [
        min(size, rows - shard * size)
        for shard in range(math.ceil(rows / size))
        if all((path / _file(name, shard)).exists() for name in partial["signals"])
    ]
    return partial, sum(complete)


def describe(store: Store, reference: dict[str, str], document_mask: bool) -> dict[str, Any]:
    """The inputs that scores depend on. `reference` holds the path and the fingerprint of the model."""
    return {
        "data": store.fingerprint,
        "tokenizer": store.tokenizer_fingerprint,
        "reference": reference,
        "document_mask": document_mask,
    }


def _difference(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first mismatch between two descriptions, or None. References are compared by fingerprint, not by path."""
    stored, expected = ({**x, "reference": x["reference"]["fingerprint"]} for x in (stored, expected))
    return next((mismatch for part, mismatch in PARTS.items() if stored[part] != expected[part]), None)


class ScoreWriter:
    """Writes scores shard by shard into NAME.partial, and renames it to NAME when it is complete.

    Attributes:
      names: what is stored for each target: "losses", and perhaps "entropies".
      rows_per_shard: rows in every shard but the last.
      finished: True if complete scores already exist.
    """

    def __init__(self, store: Store, name: str, description: dict[str, Any], dtype: str, entropies: bool):
        """Looks up existing scores, and writes nothing.

        Raises:
          UserError: scores of that name exist, but were made from other inputs or store other signals.
        """
        self._final = scores_path(store, name)
        self._partial = self._final.with_name(self._final.name + ".partial")
        self._rows, self._seq_len, self._dtype = len(store.rows(SPLIT)), store.seq_len, dtype
        self.names = ("losses", "entropies") if entropies else ("losses",)
        self.rows_per_shard = max(1, SHARD_TOKENS // store.seq_len)
        shape = {"split": SPLIT, "rows": self._rows, "seq_len": self._seq_len, "rows_per_shard": self.rows_per_shard}
        self._description = description | shape | {"dtype": dtype, "signals": list(self.names)}
        self.finished = self._final.exists()
        if self.finished:
            stored = manifest.read(self._final, ScoreManifest, _remedy(self._final))
            difference = _difference(stored, description)
            if difference is None and (stored["dtype"] != dtype or stored["signals"] != list(self.names)):
                difference = f"dtype {stored['dtype']} and signals {', '.join(stored['signals'])}"
            if difference:
                raise UserError(f"{self._final} was made with {difference}; remove it or choose another {KEY}")

    def start(self) -> None:
        """Creates NAME.partial, or resumes one with the same description. Call it in one process only."""
        marker = self._partial / DESCRIPTION
        if not (marker.exists() and read_json(marker, dict[str, Any]) == json.loads(json.dumps(self._description))):
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            write_text(marker, json.dumps(self._description))

    def shards(self) -> list[range]:
        """The rows of each shard."""
        starts = range(0, self._rows, self.rows_per_shard)
        return [range(start, min(start + self.rows_per_shard, self._rows)) for start in starts]

    def has(self, shard: int) -> bool:
        """True if the shard is complete on disk."""
        return all((self._partial / _file(name, shard)).exists() for name in self.names)

    def write(self, shard: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes a shard. `arrays` maps each of `names` to an array [rows in the shard, seq_len], in nats.

        Raises:
          UserError: a number is not finite in the stored dtype.
        """
        for name in self.names:
            with np.errstate(over="ignore"):  # reported below
                values = arrays[name].astype(self._dtype)
            wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(wrong):
                row = shard * self.rows_per_shard + int(wrong[0])
                raise UserError(
                    f"the reference's {name} of row {row} are not finite in {self._dtype}, so they were not stored; "
                    "check the reference and the row, or use --dtype=float32 if the numbers are only too large"
                )
            with replacing(self._partial / _file(name, shard)) as beside, beside.open("wb") as file:
                np.save(file, values, allow_pickle=False)

    def finish(self, totals: dict[str, Any]) -> None:
        """Writes the manifest, with `totals` and the checksums of the files, and renames NAME.partial to NAME."""
        paths = [self._partial / _file(name, shard) for name in self.names for shard in range(len(self.shards()))]
        files = manifest.describe(self._partial, paths)
        manifest.write(self._partial, self._description | totals | {"files": files})
        verify(self._partial)
        (self._partial / DESCRIPTION).unlink()
        self._partial.rename(self._final)

    @property
    def lock_path(self) -> pathlib.Path:
        """The file to lock while NAME.partial is written."""
        return self._partial.with_name(self._partial.name + ".lock")

    @property
    def bytes_per_token(self) -> int:
        """Bytes stored for each target."""
        return np.dtype(self._dtype).itemsize * len(self.names)


def _file(name: str, shard: int) -> str:
    return f"{name}-{shard:05d}.npy"


def _remedy(path: pathlib.Path) -> str:
    return f"remove {path} and score again"


def _open_shards(path: pathlib.Path, stored: ScoreDescription, name: str) -> list[np.ndarray]:
    """The shards of a signal, mapped from disk. Raises UserError if one does not match the manifest."""
    shards = []
    for shard in range(math.ceil(stored["rows"] / stored["rows_per_shard"])):
        file = path / _file(name, shard)
        rows = min(stored["rows_per_shard"], stored["rows"] - shard * stored["rows_per_shard"])
        shards.append(_load(file, (rows, stored["seq_len"]), stored["dtype"], _remedy(path)))
    return shards


def _load(file: pathlib.Path, shape: tuple[int, int], dtype: str, remedy: str) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {remedy}") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} is damaged: {' '.join(str(error).split())}; {remedy}") from None
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
        content = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "not an array"
        raise UserError(f"{file} is {content} instead of {dtype} {shape}; {remedy}")
    return array


def verify(path: pathlib.Path) -> ScoreManifest:
    """Compares every file of a folder of scores with its checksum, and reads every number.

    Returns:
      The manifest.

    Raises:
      UserError: a file is missing, damaged or changed, or holds a number that is not finite.
    """
    stored = manifest.read(path, ScoreManifest, _remedy(path))
    _verify_files(path, stored)
    for name in stored["signals"]:
        for number, shard in enumerate(_open_shards(path, stored, name)):
            for row, values in enumerate(shard, start=number * stored["rows_per_shard"]):
                _finite(values, path, name, row)
    return stored


def _verify_files(path: pathlib.Path, stored: ScoreManifest) -> None:
    checksums = {name: file if isinstance(file, str) else file["sha256"] for name, file in stored["files"].items()}
    manifest.verify(path, checksums, _remedy(path))


def _finite(values: np.ndarray, path: pathlib.Path, name: str, row: int) -> np.ndarray:
    if not np.isfinite(values).all():
        raise UserError(f"{path}: the {name} of row {row} are not finite; {_remedy(path)}")
    return values


class ScoreStore:
    """Stored scores, opened for reading.

    Attributes:
      path: their directory.
      manifest: their inputs, shapes and checksums, and the totals given to `ScoreWriter.finish`.
    """

    def __init__(self, store: Store, name: str, document_mask: bool, reference: dict[str, str] | None):
        """Opens the scores and verifies the checksum of every file.

        Args:
          store: the data set.
          name: name of the scores.
          document_mask: config.data.document_mask of the run that reads them.
          reference: path and fingerprint of the model that they must come from; None: any model.

        Raises:
          UserError: the scores do not exist, a file is missing or was changed, or they were made from other inputs.
        """
        self.path = scores_path(store, name)
        if not (self.path / MANIFEST).exists():
            raise UserError(f"{KEY}={name}: no scores in {self.path}; make them with `rho1 score`")
        self.manifest = manifest.read(self.path, ScoreManifest, _remedy(self.path))
        expected = describe(store, reference or self.manifest["reference"], document_mask)
        difference = _difference(self.manifest, expected)
        shape = (len(store.rows(SPLIT)), store.seq_len)
        if difference is None and shape != (self.manifest["rows"], self.manifest["seq_len"]):
            difference = f"rows [{self.manifest['rows']}, {self.manifest['seq_len']}] instead of {list(shape)}"
        if difference:
            raise UserError(
                f"{self.path} was made with {difference} than this run uses; score again under another {KEY}"
            )
        _verify_files(self.path, self.manifest)

    def column(self, name: str) -> "ScoreColumn":
        """The column "losses" or "entropies". Raises UserError if it was not stored, or is damaged."""
        if name not in self.manifest["signals"]:
            raise UserError(f"{self.path} has no {name}; score again with --{name} under another {KEY}")
        return open_column(self.path, self.manifest, name)


class ScoreColumn:
    """One number for each target of each row, in nats. Rows are read from disk on demand."""

    def __init__(self, shards: list[np.ndarray], rows_per_shard: int, path: pathlib.Path, name: str):
        self._shards, self._rows_per_shard, self._path, self._name = shards, rows_per_shard, path, name

    def __getitem__(self, row: int) -> np.ndarray:
        """Float32 [seq_len]. Raises UserError if a number is not finite."""
        shard, position = divmod(row, self._rows_per_shard)
        return _finite(self._shards[shard][position].astype(np.float32), self._path, self._name, row)


def open_column(path: pathlib.Path, stored: ScoreDescription, name: str) -> ScoreColumn:
    """A column of a folder of complete scores. Verifies shapes, but no checksum. Raises UserError if one is wrong."""
    return ScoreColumn(_open_shards(path, stored, name), stored["rows_per_shard"], path, name)


class ExternalColumn:
    """A user's own column: a .npy file of [rows, seq_len] bools, integers or floats."""

    def __init__(self, path: str, store: Store):
        """Raises UserError if the file holds no such array."""
        try:
            self._array = np.load(local_path(path, "config.data.external"), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{EXTERNAL_KEY}: {path}: {' '.join(str(error).split())}") from None
        expected = (len(store.rows(SPLIT)), store.seq_len)
        is_array = isinstance(self._array, np.ndarray)
        if not is_array or self._array.shape != expected or self._array.dtype.kind not in "biuf":
            content = f"{self._array.dtype} {self._array.shape}" if is_array else "not an array"
            raise UserError(f"{EXTERNAL_KEY}: {path} is {content}; {store.path} needs numbers {expected}")
        self._path = path

    def __getitem__(self, row: int) -> np.ndarray:
        values = self._array[row].astype(np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"{EXTERNAL_KEY}: {self._path}: row {row} has a number that is not finite")
        return values


def external_columns(text: str, needed: Collection[str], stores: Sequence[Store]) -> list[dict[str, Any]]:
    """Opens the user's columns that a run needs.

    Args:
      text: config.data.external, "FILE.npy,..." or "NAME=FILE.npy,...": for each column, one file per data set.
      needed: signals, "NAME_BL" for each column; a file without a name is "external_BL".
      stores: the data sets.

    Returns:
      For each data set, signal -> row number -> float32 [seq_len].

    Raises:
      UserError: a needed column has no file for each data set, or a file does not fit.
    """
    files: dict[str, list[str]] = {}
    for part in filter(None, split_list(text)):
        name, *path = split_list(part, "=")
        files.setdefault((name if path else "external") + SUFFIX, []).append("=".join(path) if path else name)
    for signal in sorted(needed):
        name, count = signal.removesuffix(SUFFIX), len(files.get(signal, ()))
        if count != len(stores):
            raise UserError(
                f"{EXTERNAL_KEY} names {count} files for the column {name!r} of {len(stores)} data sets; "
                f"give {name}=FILE.npy for each"
            )
    return [
        {signal: ExternalColumn(files[signal][number], store) for signal in sorted(needed)}
        for number, store in enumerate(stores)
    ]
