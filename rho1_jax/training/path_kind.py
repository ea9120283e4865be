"""Tells what is stored at a path: a data set, scores, a run, a checkpoint or a Hugging Face folder."""

import enum
import pathlib

from rho1_jax.data import stored_scores
from rho1_jax.data.manifest import MANIFEST
from rho1_jax.models.hf_folder import is_hugging_face_folder
from rho1_jax.training import checkpoint
from rho1_jax.training.description import META_FILE


class Kind(enum.Enum):
    """What a folder holds. The value is its name in messages."""

    DATA = "a prepared data set"
    SCORES = "a folder of stored scores"
    PARTIAL_SCORES = "a folder of scores that are not complete yet"
    RUN = "a run"
    CHECKPOINT = "a checkpoint"
    HUGGING_FACE = "a Hugging Face folder"


def kind_of(folder: pathlib.Path) -> Kind | None:
    """The kind of a folder, from the files in it; None if it is none of these."""
    if stored_scores.is_scores(folder):
        return Kind.SCORES
    if stored_scores.is_partial_scores(folder):
        return Kind.PARTIAL_SCORES
    if (folder / MANIFEST).exists():
        return Kind.DATA
    if checkpoint.steps(folder):
        return Kind.RUN
    if (folder / META_FILE).exists():
        return Kind.CHECKPOINT
    return Kind.HUGGING_FACE if is_hugging_face_folder(folder) else None
