"""Manifests: what a data set or a folder of scores holds, with a checksum for each file and for the manifest itself.

Opening a folder checks the manifest, the sizes of its files and their ends. `verify` reads every byte.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NotRequired, TypeVar

import pydantic
from typing_extensions import TypedDict

from rho1_jax.runtime import formats
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import json_sha256, sha256, write_text
from rho1_jax.runtime.progress import Progress
from rho1_jax.runtime.schema import read_json

MANIFEST = "manifest.json"
CHECKSUM = "checksum"  # key of the manifest's own checksum
FIRST_FORMAT = 3  # the first format with checksums of the files
END_BYTES = 1 << 16

T = TypeVar("T")


class File(TypedDict):
    """A file as it was written."""

    bytes: int
    sha256: str
    ends: str  # SHA-256 of the first and the last END_BYTES, which opening checks


Files = Mapping[str, File]  # by path in the folder


class _Versioned(TypedDict):
    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]
    format_version: NotRequired[int]
    checksum: NotRequired[str]


def describe(folder: pathlib.Path, paths: Iterable[pathlib.Path]) -> dict[str, File]:
    """Reads files in `folder` and returns their entries for a manifest."""
    paths = sorted(paths)
    files: dict[str, File] = {}
    with Progress("checksum", sum(path.stat().st_size for path in paths), unit="B") as progress:
        for path in paths:
            size = path.stat().st_size
            files[path.relative_to(folder).as_posix()] = {"bytes": size, "sha256": sha256(path), "ends": _ends(path)}
            progress.advance(size)
    return files


def write(folder: pathlib.Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the manifest of a folder, with the format version and a checksum. Returns it."""
    sealed = {formats.KEY: formats.FORMAT_VERSION, **content}
    sealed[CHECKSUM] = _checksum(sealed)
    write_text(folder / MANIFEST, json.dumps(sealed, indent=2) + "\n")
    return sealed


def read(folder: pathlib.Path, kind: type[T], remedy: str) -> T:
    """Reads the manifest of a folder.

    Args:
      folder: the data set, or the folder of scores.
      kind: type of the manifest.
      remedy: what to do about a damaged folder, for the error.

    Raises:
      UserError: the manifest is missing, damaged or edited, or a newer version wrote it.
    """
    path = folder / MANIFEST
    with _advising(remedy):
        stored = read_json(path, _Versioned)
    formats.check_format(stored, folder)  # the remedy for a newer version is another one
    with _advising(remedy):
        if stored.get("format_version", 1) >= FIRST_FORMAT or CHECKSUM in stored:
            recorded = stored.get(CHECKSUM)
            if recorded != _checksum(stored):
                problem = "has no checksum" if recorded is None else "was edited: its checksum does not match"
                raise UserError(f"{path} {problem}")
        return read_json(path, kind)


@contextlib.contextmanager
def _advising(remedy: str) -> Iterator[None]:
    """Adds what to do to a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None


def check(folder: pathlib.Path, files: Files, folders: Iterable[str], remedy: str) -> None:
    """Checks names, sizes and ends of a folder's files, without reading all of them.

    Args:
      folder: the folder that the manifest describes.
      files: the manifest's entries.
      folders: subfolders, which must hold no other file.
      remedy: what to do about a damaged folder, for the error.

    Raises:
      UserError: a file is missing, changed, or does not belong there.
    """
    for name, file in files.items():
        path = _existing(folder, name, remedy)
        size = path.stat().st_size
        if size != file["bytes"]:
            raise UserError(f"{path} has {size:,} bytes instead of {file['bytes']:,}; {remedy}")
        if _ends(path) != file["ends"]:
            raise _changed(path, remedy)
    for subfolder in folders:
        for path in sorted((folder / subfolder).rglob("[!.]*")):
            if path.is_file() and path.relative_to(folder).as_posix() not in files:
                raise UserError(f"{path} is not listed in the manifest of {folder}; move it elsewhere")


def verify(folder: pathlib.Path, checksums: Mapping[str, str], remedy: str) -> None:
    """Compares every byte of a folder's files with their SHA-256. Raises UserError if one is missing or was changed."""
    paths = {_existing(folder, name, remedy): checksum for name, checksum in checksums.items()}
    with Progress(f"verify {folder.name}", sum(path.stat().st_size for path in paths), unit="B") as progress:
        for path, checksum in paths.items():
            if sha256(path) != checksum:
                raise _changed(path, remedy)
            progress.advance(path.stat().st_size)


def _existing(folder: pathlib.Path, name: str, remedy: str) -> pathlib.Path:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    return path


def _changed(path: pathlib.Path, remedy: str) -> UserError:
    return UserError(f"{path} was changed since it was written; {remedy}")


def _checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its checksum."""
    return json_sha256({key: value for key, value in manifest.items() if key != CHECKSUM})


def _ends(path: pathlib.Path) -> str:
    """SHA-256 of the first and the last END_BYTES of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(END_BYTES))
        file.seek(max(0, os.fstat(file.fileno()).st_size - END_BYTES))
        digest.update(file.read())
    return digest.hexdigest()
