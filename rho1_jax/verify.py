"""Checks that nothing on disk was damaged, replaced or edited: compares every byte with the checksums in the manifest.

rho1 verify DIR

DIR is a prepared data set, with the scores stored beside it, one folder of stored scores, a run's work directory, or
one of its checkpoints.
"""

import pathlib

from absl import flags

from rho1_jax.data import stored_scores
from rho1_jax.data.manifest import MANIFEST
from rho1_jax.data.store import Store
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path
from rho1_jax.training import checkpoint
from rho1_jax.training.path_kind import Kind, kind_of

WITHOUT_CHECKSUMS = "an older version wrote it without checksums; the next checkpoint of the run will have them"


def verify(path: str | pathlib.Path) -> list[str]:
    """Verifies everything in a folder.

    Returns:
      One line for each thing in it: what was verified, and what could not be.

    Raises:
      UserError: something is damaged, or the folder holds nothing that can be verified.
    """
    folder = local_path(path, "DIR")
    match kind_of(folder):
        case Kind.SCORES:
            return [_verify_scores(folder)]
        case Kind.DATA:
            scores = sorted(manifest.parent for manifest in folder.glob(f"{stored_scores.FOLDER}/*/{MANIFEST}"))
            return [_verify_data(folder), *map(_verify_scores, scores)]
        case Kind.RUN:
            return [_verify_checkpoint(checkpoint.at(folder, step)) for step in checkpoint.steps(folder)]
        case Kind.CHECKPOINT:
            return [_verify_checkpoint(folder)]
    raise UserError(
        f"{path} is neither a prepared data set, nor a folder of stored scores, nor a run, nor a checkpoint"
    )


def _verify_checkpoint(folder: pathlib.Path) -> str:
    count = checkpoint.verify(folder)
    return f"{folder}: {count} arrays match their checksums" if count else f"{folder}: {WITHOUT_CHECKSUMS}"


def _verify_data(folder: pathlib.Path) -> str:
    store = Store(folder)
    store.verify()
    files = store.manifest.get("files")
    if files is None:
        return (
            f"{folder}: opens, but an older version wrote it without checksums, so changes to its rows cannot be "
            "detected; prepare it again to add checksums"
        )
    return f"{folder}: {len(files)} files match their checksums"


def _verify_scores(folder: pathlib.Path) -> str:
    files = stored_scores.verify(folder)["files"]
    return f"{folder}: {len(files)} files match their checksums"


def main() -> None:
    """The command: verifies the folder it is given."""
    path = flags.DEFINE_string("path", None, "The folder to verify. `rho1 verify DIR` sets it too.")

    def command() -> None:
        if path.value is None:
            raise UserError("name the folder to verify: rho1 verify DIR")
        for line in verify(path.value):
            print(line)

    run(command, argument=path)


if __name__ == "__main__":
    main()
