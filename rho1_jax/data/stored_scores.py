"""Store a reference model's losses on a data set's training rows, and optionally its entropies, beside the data set.

DATA/scores/NAME/manifest.json  losses-00000.npy  [entropies-00000.npy]  ...

Each .npy file is a plain numpy array [rows in the shard, seq_len], in nats. Rows are in the order of the data set.
"""

import json
import math
import pathlib
import shutil
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from rho1_jax.data.store import MANIFEST, Store
from rho1_jax.method.signals import SUFFIX
from rho1_jax.runtime import formats
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, read_json, replacing, sha256, write_text
from rho1_jax.runtime.progress import Progress

KEY = "config.reference.scores"
EXTERNAL_KEY = "config.data.external"
SPLIT = "train"
SHARD_TOKENS = 2**22
DTYPES = ("float16", "float32")
# The parts of a description that must match, and what to call a mismatch in an error.
PARTS = {
    "data": "other rows",
    "tokenizer": "another tokenizer",
    "reference": "another reference",
    "document_mask": "another config.data.document_mask",
}


def scores_path(store: Store, name: str) -> pathlib.Path:
    """The directory of the scores called `name`. Raises UserError if the name is not a plain directory name."""
    if not name or name != pathlib.PurePath(name).name:
        raise UserError(f"{KEY}={name!r} must be the name of a directory, without a path")
    return store.path / "scores" / name


def describe(store: Store, reference: dict[str, str], document_mask: bool) -> dict[str, Any]:
    """The inputs that scores depend on. `reference` holds the path and the fingerprint of the model."""
    return {
        "data": store.fingerprint,
        "tokenizer": store.tokenizer_fingerprint,
        "reference": reference,
        "document_mask": document_mask,
    }


def _difference(stored: dict[str, Any], expected: dict[str, Any]) -> str | None:
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
            manifest = read_json(self._final / MANIFEST)
            formats.check_format(manifest, self._final)
            difference = _difference(manifest, description)
            if difference is None and any(manifest[key] != self._description[key] for key in ("dtype", "signals")):
                difference = f"dtype {manifest['dtype']} and signals {', '.join(manifest['signals'])}"
            if difference:
                raise UserError(f"{self._final} was made with {difference}; remove it or choose another {KEY}")

    def start(self) -> None:
        """Creates NAME.partial, or resumes one with the same description. Call it in one process only."""
        marker = self._partial / "description.json"
        if not (marker.exists() and read_json(marker) == json.loads(json.dumps(self._description))):
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
        """Writes a shard. `arrays` maps each of `names` to an array [rows in the shard, seq_len], in nats."""
        for name in self.names:
            with replacing(self._partial / _file(name, shard)) as beside, beside.open("wb") as file:
                np.save(file, arrays[name].astype(self._dtype), allow_pickle=False)

    def finish(self, totals: dict[str, Any]) -> None:
        """Writes the manifest, with `totals` and the checksum of each file, and renames NAME.partial to NAME."""
        files = [_file(name, shard) for name in self.names for shard in range(len(self.shards()))]
        checksums = {file: sha256(self._partial / file) for file in files}
        write_text(
            self._partial / MANIFEST,
            json.dumps(
                {formats.KEY: formats.FORMAT_VERSION} | self._description | totals | {"files": checksums}, indent=2
            )
            + "\n",
        )
        (self._partial / "description.json").unlink()
        self._partial.rename(self._final)

    @property
    def bytes_per_token(self) -> int:
        """Bytes stored for each target."""
        return np.dtype(self._dtype).itemsize * len(self.names)


def _file(name: str, shard: int) -> str:
    return f"{name}-{shard:05d}.npy"


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
        self.manifest: dict[str, Any] = read_json(self.path / MANIFEST)
        formats.check_format(self.manifest, self.path)
        expected = describe(store, reference or self.manifest["reference"], document_mask)
        difference = _difference(self.manifest, expected)
        if difference:
            raise UserError(
                f"{self.path} was made with {difference} than this run uses; score again under another {KEY}"
            )
        self._verify()

    def _verify(self) -> None:
        files = [(self.path / file, checksum) for file, checksum in self.manifest["files"].items()]
        for path, _ in files:
            if not path.exists():
                raise UserError(f"{path} is missing; remove {self.path} and score again")
        with Progress(f"verify {self.path.name}", sum(path.stat().st_size for path, _ in files), unit="B") as progress:
            for path, checksum in files:
                if sha256(path) != checksum:
                    raise UserError(f"{path} was changed since it was written; remove {self.path} and score again")
                progress.advance(path.stat().st_size)

    def column(self, name: str) -> "ScoreColumn":
        """The column "losses" or "entropies". Raises UserError if it was not stored."""
        if name not in self.manifest["signals"]:
            raise UserError(f"{self.path} has no {name}; score again with --{name} under another {KEY}")
        shards = math.ceil(self.manifest["rows"] / self.manifest["rows_per_shard"])
        arrays = [np.load(self.path / _file(name, shard), mmap_mode="r", allow_pickle=False) for shard in range(shards)]
        return ScoreColumn(arrays, self.manifest["rows_per_shard"])


class ScoreColumn:
    """One number for each target of each row, in nats. Rows are read from disk on demand."""

    def __init__(self, shards: list[np.ndarray], rows_per_shard: int):
        self._shards, self._rows_per_shard = shards, rows_per_shard

    def __getitem__(self, row: int) -> np.ndarray:
        shard, position = divmod(row, self._rows_per_shard)
        return self._shards[shard][position].astype(np.float32)


class ExternalColumn:
    """A user's own column: a .npy file of [rows, seq_len] bools, integers or floats."""

    def __init__(self, path: str, store: Store):
        """Raises UserError if the file holds no such array."""
        try:
            self._array = np.load(local_path(path, "config.data.external"), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{EXTERNAL_KEY}: {path}: {error}") from None
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
    for part in filter(None, text.split(",")):
        name, _, path = part.rpartition("=")
        files.setdefault((name or "external") + SUFFIX, []).append(path)
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
