"""The JSON that describes a checkpoint: its run, its arrays, and the checksums of both."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rho1_jax.runtime import formats
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import json_sha256
from rho1_jax.runtime.schema import parse_json, read_json
from rho1_jax.training.config import complete

META_FILE = pathlib.Path("meta", "metadata")
SHA256 = "sha256"
FIRST_WITH_CHECKSUMS = 3  # format version


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete or that changed since it was written."""

    def __init__(self, checkpoint: pathlib.Path, problem: str):
        super().__init__(f"{checkpoint} is damaged: {problem}; use another checkpoint of the run")
        self.problem = problem


class Meta(NamedTuple):
    """A checkpoint's description of its run.

    Attributes:
      step: updates done.
      tokens_seen: target positions that went through the policy, padding included.
      tokens_selected: target positions that were trained on.
      config: the resolved config.
      data: fingerprint and weight of each data set of the mixture.
      tokenizer: fingerprint of the tokenizer.
      reference: path and fingerprint of the reference model; None if the run has none.
      format_version: version of the format on disk, see `runtime.formats`.
      permuted_rows: True if the rows of a step are permuted; older runs keep their order.
      health: the fields of `training.health.Health` after this step; None before the first step.
      pending: the metrics of the last step if its evaluation is still to be done; otherwise None.
    """

    step: int
    tokens_seen: int
    tokens_selected: int
    config: dict[str, Any]
    data: list[dict[str, Any]]
    tokenizer: str
    reference: dict[str, str] | None
    format_version: int = formats.FORMAT_VERSION
    permuted_rows: bool = False
    health: dict[str, Any] | None = None
    pending: dict[str, int | float] | None = None


class StoredArray(NamedTuple):
    """An array as it was written. Before format 3, the checksum is missing."""

    dtype: str
    shape: tuple[int, ...]
    checksum: int | None


class Description(NamedTuple):
    """The content of a checkpoint's JSON.

    Attributes:
      meta: the run.
      arrays: every array by item and path, such as params/embedding; None before format 3.
      metrics: the evaluations at this step.
    """

    meta: Meta
    arrays: dict[str, StoredArray] | None
    metrics: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """The fields of `meta`, the arrays and the metrics, with a checksum of them all."""
        stored = self.meta._asdict() | {"arrays": self.arrays, "metrics": dict(self.metrics)}
        return stored | {SHA256: json_sha256(stored)}


def read_description(checkpoint: pathlib.Path) -> Description:
    """Reads and verifies a checkpoint's JSON.

    Raises:
      DamagedCheckpoint: it is missing, is not JSON, does not match its checksum, or belongs to another step.
      UserError: a newer version wrote it, or its config has a key that this version does not know.
    """
    path = checkpoint.absolute() / META_FILE
    with _as_damage(checkpoint):
        stored = read_json(path, dict[str, Any])
    sha256 = stored.pop(SHA256, None)
    if sha256 is not None and sha256 != json_sha256(stored):
        raise DamagedCheckpoint(checkpoint, f"{META_FILE} does not match its checksum")
    formats.check_format(stored, checkpoint)
    if sha256 is None and stored.get(formats.KEY, 1) >= FIRST_WITH_CHECKSUMS:
        raise DamagedCheckpoint(checkpoint, f"{META_FILE} has no checksum")
    arrays, metrics = stored.pop("arrays", None), stored.pop("metrics", {})
    with _as_damage(checkpoint):
        meta = parse_json(json.dumps(stored), Meta, META_FILE)
        if arrays is not None:
            arrays = parse_json(json.dumps(arrays), dict[str, StoredArray], META_FILE)
    if checkpoint.name.isdecimal() and int(checkpoint.name) != meta.step:
        raise DamagedCheckpoint(checkpoint, f"{META_FILE} belongs to step {meta.step}")
    config = complete(meta.config, str(checkpoint))
    return Description(meta._replace(config=config, format_version=formats.FORMAT_VERSION), arrays, metrics)


@contextlib.contextmanager
def _as_damage(checkpoint: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise DamagedCheckpoint(checkpoint, str(error).removeprefix(f"{checkpoint.absolute()}/")) from None
