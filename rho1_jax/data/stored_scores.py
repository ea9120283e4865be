"""What a reference makes of a data set's training rows, stored beside them, row by row in the same order.

DATA/scores/NAME/manifest.json  losses-00000.npy  [entropies-00000.npy]  ...

Each .npy file is an array [rows of the shard, seq_len] in nats, which numpy reads by itself.
"""

import json
import math
import pathlib
import shutil
from typing import Any

import numpy as np

from rho1_jax.data.store import MANIFEST, Store
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, read_json, replacing, sha256, write_text
from rho1_jax.runtime.progress import Progress

KEY = "config.reference.scores"
SPLIT = "train"
SHARD_TOKENS = 2**22
DTYPES = ("float16", "float32")
# What a description has to agree in, and how an error calls it.
PARTS = {
    "data": "other rows",
    "tokenizer": "another tokenizer",
    "reference": "another reference",
    "document_mask": "another config.data.document_mask",
}


def scores_path(store: Store, name: str) -> pathlib.Path:
    """Where the scores of a name lie. Raises UserError where the name cannot be a directory's."""
    if not name or name != pathlib.PurePath(name).name:
        raise UserError(f"{KEY}={name!r} must be the name of a directory, without a path")
    return store.path / "scores" / name


def describe(store: Store, reference: dict[str, str], document_mask: bool) -> dict[str, Any]:
    """What scores depend on. `reference` has the path and the fingerprint of the model."""
    return {
        "data": store.fingerprint,
        "tokenizer": store.tokenizer_fingerprint,
        "reference": reference,
        "document_mask": document_mask,
    }


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first part in which two descriptions differ. A reference is told by its fingerprint, wherever it lies."""
    found, wanted = ({**x, "reference": x["reference"]["fingerprint"]} for x in (found, wanted))
    return next((name for part, name in PARTS.items() if found[part] != wanted[part]), None)


class ScoreWriter:
    """Writes scores shard by shard into NAME.partial, which becomes NAME when all are there."""

    def __init__(self, store: Store, name: str, description: dict[str, Any], dtype: str, entropies: bool):
        """Goes on with what an interrupted run over the same data and reference left.

        Raises:
          UserError: there are scores of that name, made from something else.
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
            found = read_json(self._final / MANIFEST)
            different = _difference(found, description)
            if different is None and any(found[key] != self._description[key] for key in ("dtype", "signals")):
                different = f"dtype {found['dtype']} and signals {', '.join(found['signals'])}"
            if different:
                raise UserError(f"{self._final} was made with {different}; remove it or choose another {KEY}")

    def start(self) -> None:
        """Makes the directory; drops what another data set or reference left there. One process does it."""
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
        """Whether the shard is on the disk, whole."""
        return all((self._partial / _file(name, shard)).exists() for name in self.names)

    def write(self, shard: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes a shard: [rows, seq_len] for each signal."""
        for name in self.names:
            with replacing(self._partial / _file(name, shard)) as beside, beside.open("wb") as file:
                np.save(file, arrays[name].astype(self._dtype), allow_pickle=False)

    def finish(self, totals: dict[str, Any]) -> None:
        """Writes the manifest, with the checksum of each file and the totals, and gives the directory its name."""
        files = [_file(name, shard) for name in self.names for shard in range(len(self.shards()))]
        checksums = {file: sha256(self._partial / file) for file in files}
        write_text(
            self._partial / MANIFEST,
            json.dumps(self._description | totals | {"files": checksums}, indent=2) + "\n",
        )
        (self._partial / "description.json").unlink()
        self._partial.rename(self._final)

    @property
    def bytes_per_token(self) -> int:
        """What is stored of each target."""
        return np.dtype(self._dtype).itemsize * len(self.names)


def _file(name: str, shard: int) -> str:
    return f"{name}-{shard:05d}.npy"


class ScoreStore:
    """Scores, opened for reading.

    Attributes:
      path: their directory.
      manifest: what they depend on, and what making them took.
    """

    def __init__(self, store: Store, name: str, document_mask: bool, reference: dict[str, str] | None):
        """Opens and verifies every file.

        Args:
          store: the data set.
          name: of the scores.
          document_mask: of the run that reads them.
          reference: path and fingerprint of the model they must be from; None: whichever it was.

        Raises:
          UserError: there are none, they are not complete, a file was changed, or they were made from something else.
        """
        self.path = scores_path(store, name)
        if not (self.path / MANIFEST).exists():
            raise UserError(f"{KEY}={name}: no scores in {self.path}; `python -m rho1_jax.score` makes them")
        self.manifest: dict[str, Any] = read_json(self.path / MANIFEST)
        wanted = describe(store, reference or self.manifest["reference"], document_mask)
        different = _difference(self.manifest, wanted)
        if different:
            raise UserError(f"{self.path} was made with {different}, and does not fit this run")
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
        """The losses or entropies. Raises UserError where they were not stored."""
        if name not in self.manifest["signals"]:
            raise UserError(f"{self.path} has no {name}; score again with --{name} under another {KEY}")
        shards = math.ceil(self.manifest["rows"] / self.manifest["rows_per_shard"])
        arrays = [np.load(self.path / _file(name, shard), mmap_mode="r", allow_pickle=False) for shard in range(shards)]
        return ScoreColumn(arrays, self.manifest["rows_per_shard"])


class ScoreColumn:
    """One number for each target of each row, read from the disk when asked for."""

    def __init__(self, shards: list[np.ndarray], rows_per_shard: int):
        self._shards, self._rows_per_shard = shards, rows_per_shard

    def __getitem__(self, row: int) -> np.ndarray:
        shard, position = divmod(row, self._rows_per_shard)
        return self._shards[shard][position].astype(np.float32)


class ExternalColumn:
    """Numbers that the user brings: a .npy file of [rows, seq_len], of bools, integers or floats."""

    def __init__(self, path: str, store: Store):
        """Raises UserError where the file is no such array."""
        try:
            self._array = np.load(local_path(path, "config.data.external"), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"config.data.external: {path}: {error}") from None
        wanted = (len(store.rows(SPLIT)), store.seq_len)
        if (
            not isinstance(self._array, np.ndarray)
            or self._array.shape != wanted
            or self._array.dtype.kind not in "biuf"
        ):
            found = f"{self._array.dtype} {self._array.shape}" if isinstance(self._array, np.ndarray) else "no array"
            raise UserError(f"config.data.external: {path} is {found}; {store.path} needs numbers {wanted}")
        self._path = path

    def __getitem__(self, row: int) -> np.ndarray:
        values = self._array[row].astype(np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"config.data.external: {self._path}: row {row} has a number that is not finite")
        return values
