"""The reference's part in a run: a frozen model in the step, one that follows the policy, or losses stored before."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from jax.sharding import Mesh

from rho1_jax.configs.default import ModelConfig
from rho1_jax.data.store import Store
from rho1_jax.data.stored_scores import KEY, ExternalColumn, ScoreStore
from rho1_jax.method.selection import Selection
from rho1_jax.method.token_scores import REFERENCE_SIGNALS
from rho1_jax.models.decoder import Params
from rho1_jax.runtime.errors import UserError
from rho1_jax.training import checkpoint
from rho1_jax.training.optimizer import MOVES, MovingReference
from rho1_jax.training.pretrained import Pretrained, open_pretrained, open_same_model

CHECKPOINT = "config.reference.checkpoint"


class Reference(NamedTuple):
    """Where the signals come from that the policy does not give.

    Attributes:
      model: of a reference that runs in the step; None where there is none.
      params: of a frozen one, in the compute dtype. Never donated, never saved.
      moving: how it follows the policy, where it does.
      start: the weights a moving one begins with; None: the policy's first ones.
      description: path and fingerprint, for what is saved of the run.
      columns: for each data set, further fields of its batches.
      scoring_flops: that those took which were made from a reference.
    """

    model: ModelConfig | None = None
    params: Params | None = None
    moving: MovingReference | None = None
    start: Pretrained | None = None
    description: dict[str, str] | None = None
    columns: Sequence[Mapping[str, Any]] = ()
    scoring_flops: float = 0.0


def open_reference(
    config: ml_collections.ConfigDict,
    rule: Selection,
    policy_config: ModelConfig,
    stores: Sequence[Store],
    mesh: Mesh,
) -> Reference:
    """What the rule needs beside the policy.

    Raises:
      UserError: it is not there, or does not fit the training data or the policy.
    """
    columns: list[dict[str, Any]] = [{} for _ in stores]
    if "external_BL" in rule.needs:
        paths = [path for path in config.data.external.split(",") if path]
        if len(paths) != len(stores):
            raise UserError(f"config.data.external names {len(paths)} files for {len(stores)} data sets")
        for column, path, store in zip(columns, paths, stores):
            column["external"] = ExternalColumn(path, store)
    if not rule.needs & REFERENCE_SIGNALS:
        return Reference(columns=columns)
    if config.reference.moves:
        return _moving(config, policy_config, stores[0])._replace(columns=columns)
    if config.reference.scores:
        return _stored(config, rule, stores, mesh, columns)
    model, params, description = load_frozen(config, stores[0], mesh)
    return Reference(model, params, description=description, columns=columns)


def load_frozen(
    config: ml_collections.ConfigDict, store: Store, mesh: Mesh
) -> tuple[ModelConfig, Params, dict[str, str]]:
    """The model that `config.reference.checkpoint` names: its config, parameters, and path and fingerprint.

    Raises:
      UserError: there is none, or it does not fit the data.
    """
    if not config.reference.checkpoint:
        raise UserError(
            f"{CHECKPOINT} is empty, and config.selection.score={config.selection.score!r} needs a reference"
        )
    found = open_pretrained(config.reference.checkpoint, CHECKPOINT, config, store)
    params = found.load(mesh, config.model.compute_dtype)
    description = {"path": str(found.path), "fingerprint": checkpoint.fingerprint(params)}
    return found.model, params, description


def _moving(config: ml_collections.ConfigDict, policy_config: ModelConfig, store: Store) -> Reference:
    settings = config.reference
    if settings.scores:
        raise UserError(
            f"{KEY}={settings.scores} are of a frozen reference: they cannot go with config.reference.moves"
        )
    if settings.moves not in MOVES:
        raise UserError(f"config.reference.moves={settings.moves!r} is none of {', '.join(MOVES)}, and not empty")
    if not 0 <= settings.decay < 1 or settings.every < 1:
        raise UserError(f"config.reference.decay={settings.decay} must lie in [0, 1), every={settings.every} above 0")
    start = open_same_model(settings.checkpoint, CHECKPOINT, config, policy_config, store)
    moving = MovingReference(settings.moves, settings.decay, settings.every)
    return Reference(
        policy_config, moving=moving, start=start, description={"path": str(start.path)} if start else None
    )


def _stored(
    config: ml_collections.ConfigDict,
    rule: Selection,
    stores: Sequence[Store],
    mesh: Mesh,
    columns: list[dict[str, Any]],
) -> Reference:
    """Losses stored by `rho1_jax.score`. Where the config names a reference as well, they must be from it."""
    named = load_frozen(config, stores[0], mesh)[2] if config.reference.checkpoint else None
    opened = []
    for store, column in zip(stores, columns):
        scores = ScoreStore(store, config.reference.scores, config.data.document_mask, named)
        named = named or scores.manifest["reference"]
        column["reference_losses"] = scores.column("losses")
        if "reference_entropy_BL" in rule.needs:
            column["reference_entropies"] = scores.column("entropies")
        opened.append(scores)
    flops = sum(scores.manifest["flops"] for scores in opened)
    return Reference(description=opened[0].manifest["reference"], columns=columns, scoring_flops=flops)
