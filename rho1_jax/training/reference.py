"""How a run uses its reference: frozen in the step, moving with the policy, or scored beforehand."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import optax
from jax.sharding import Mesh

from rho1_jax.configs.default import ModelConfig
from rho1_jax.data.store import Store
from rho1_jax.data.stored_scores import KEY, ScoreStore, external_columns
from rho1_jax.method.signals import COMPUTED_SIGNALS, REFERENCE_SIGNALS
from rho1_jax.models.decoder import Params
from rho1_jax.runtime.errors import UserError
from rho1_jax.training.checksums import fingerprint
from rho1_jax.training.pretrained import Pretrained, open_pretrained, open_same_model

CHECKPOINT = "config.reference.checkpoint"
MOVES = ("average", "snapshot")

Columns = dict[str, Any]  # signal -> row number -> float32 [seq_len]


class MovingReference(NamedTuple):
    """A reference that follows the model in training, in float32 like the model.

    Attributes:
      kind: "average", of the parameters over time, or "snapshot", the parameters some steps ago.
      decay: of the average: the share of it that a step keeps.
      every: steps between two snapshots.
    """

    kind: str
    decay: float
    every: int

    def move(self, reference: Params, params: Params, step: jax.Array) -> Params:
        """The reference after `step` updates, the last of which gave `params`."""
        if self.kind == "average":
            return optax.incremental_update(params, reference, 1 - self.decay)
        return optax.periodic_update(params, reference, step, self.every)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Where a run gets the signals that its policy does not give.

    Attributes:
      model: config of the reference that runs in the step; None if there is none.
      params: of a frozen reference, in the compute dtype. Never donated, never saved.
      moving: how the reference follows the policy, if it does.
      start: the weights a moving reference starts from; None: the policy's first ones.
      description: path and fingerprint, for checkpoints.
      columns: for each data set, the signals that come with its batches.
      scoring_flops: what computing the stored losses cost.
    """

    model: ModelConfig | None = None
    params: Params | None = None
    moving: MovingReference | None = None
    start: Pretrained | None = None
    description: dict[str, str] | None = None
    columns: Sequence[Mapping[str, Any]] = ()
    scoring_flops: float = 0.0


def open_reference(
    config: ml_collections.ConfigDict, needs: set[str], policy_config: ModelConfig, stores: Sequence[Store], mesh: Mesh
) -> Reference:
    """Opens what the needed signals require beside the policy.

    Raises:
      UserError: something is missing, or does not fit the training data or the policy.
    """
    columns = external_columns(config.data.external, needs - set(COMPUTED_SIGNALS), stores)
    if not needs & set(REFERENCE_SIGNALS):
        return Reference(columns=columns)
    if config.reference.moves:
        return dataclasses.replace(_moving(config, policy_config, stores[0]), columns=columns)
    if config.reference.scores:
        return _stored(config, needs, stores, mesh, columns)
    model, params, description = load_frozen(config, stores[0], mesh)
    return Reference(model, params, description=description, columns=columns)


def load_frozen(
    config: ml_collections.ConfigDict, store: Store, mesh: Mesh
) -> tuple[ModelConfig, Params, dict[str, str]]:
    """Loads the model of `config.reference.checkpoint`: its config, its parameters, and its path and fingerprint.

    Raises:
      UserError: there is none, or it does not fit the data.
    """
    if not config.reference.checkpoint:
        raise UserError(
            f"{CHECKPOINT} is empty, but config.selection.score={config.selection.score!r} needs a reference"
        )
    pretrained = open_pretrained(config.reference.checkpoint, CHECKPOINT, config, store)
    params = pretrained.load(mesh, config.model.compute_dtype)
    description = {"path": str(pretrained.path), "fingerprint": fingerprint(params)}
    return pretrained.model, params, description


def _moving(config: ml_collections.ConfigDict, policy_config: ModelConfig, store: Store) -> Reference:
    settings = config.reference
    if settings.scores:
        raise UserError(f"{KEY}={settings.scores} needs a frozen reference: clear it, or config.reference.moves")
    if settings.moves not in MOVES:
        raise UserError(f"config.reference.moves={settings.moves!r} is not empty, nor one of {', '.join(MOVES)}")
    if not 0 <= settings.decay < 1:
        raise UserError(f"config.reference.decay={settings.decay} must be in [0, 1)")
    if settings.every < 1:
        raise UserError(f"config.reference.every={settings.every} must be at least 1")
    start = open_same_model(settings.checkpoint, CHECKPOINT, config, policy_config, store)
    moving = MovingReference(settings.moves, settings.decay, settings.every)
    return Reference(
        policy_config, moving=moving, start=start, description={"path": str(start.path)} if start else None
    )


def _stored(
    config: ml_collections.ConfigDict, needs: set[str], stores: Sequence[Store], mesh: Mesh, columns: Sequence[Columns]
) -> Reference:
    """Losses stored by `rho1 score`. If the config names a reference as well, they must be its losses."""
    expected = load_frozen(config, stores[0], mesh)[2] if config.reference.checkpoint else None
    description, flops = None, 0.0
    for store, column in zip(stores, columns):
        scores = ScoreStore(store, config.reference.scores, config.data.document_mask, expected)
        description = description or scores.manifest["reference"]
        expected = expected or description
        column["reference_loss_BL"] = scores.column("losses")
        if "reference_entropy_BL" in needs:
            column["reference_entropy_BL"] = scores.column("entropies")
        flops += scores.manifest["flops"]
    return Reference(description=description, columns=columns, scoring_flops=flops)
