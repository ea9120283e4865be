"""Everything a run needs before its first step: config, data, model, optimizer, state, and the jitted step."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx
from jax.sharding import Mesh

from rho1_jax.configs.default import BackwardConfig, ModelConfig, OptimizerConfig
from rho1_jax.data.loader import open_mixture
from rho1_jax.data.packing import Batch
from rho1_jax.data.store import Store
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.method.objectives import OBJECTIVES
from rho1_jax.method.selection import Selection
from rho1_jax.models import decoder
from rho1_jax.models.decoder import Params
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.processes import say
from rho1_jax.training.checkpoint import Checkpoints, Meta
from rho1_jax.training.config import RUN_SETTINGS, as_saved, changes, check_values, model_config, selection_rule
from rho1_jax.training.optimizer import DECAYS, learning_rate_schedule, make_optimizer
from rho1_jax.training.pretrained import INIT, Pretrained, open_pretrained, recorded_model, take_model
from rho1_jax.training.reference import Reference
from rho1_jax.training.retention import check_retention
from rho1_jax.training.state import TrainState
from rho1_jax.training.train_step import TrainStep, make_train_step, needed_signals

# Resuming with another value of one of these would train on other batches, or train another model.
FIXED_ON_RESUME = (
    "config.model.",
    "config.seed",
    "config.batch_size",
    "config.objective",
    "config.data.document_mask",
    "config.selection.",
    "config.backward.",
    "config.reference.moves",
    "config.reference.decay",
    "config.reference.every",
)
# Except these, which may change with the machine, or do not change what is computed.
FREE_ON_RESUME = tuple(f"config.model.{name}" for name in (*RUN_SETTINGS, "context_length"))

# Fields of `Meta` that a resumed run takes from its checkpoint.
PROGRESS = ("step", "tokens_seen", "tokens_selected", "permuted_rows", "health", "pending")


class TrainingData(NamedTuple):
    """The prepared data sets of a mixture, and the tokenizer they share."""

    stores: list[Store]
    weights: list[float]
    tokenizer: Tokenizer

    @property
    def seq_len(self) -> int:
        """Targets per row."""
        return self.stores[0].seq_len


@dataclasses.dataclass(frozen=True)
class RunSetup:
    """A resolved config and what is built from it, once.

    Attributes:
      config: every key filled in.
      mesh: the devices.
      model: config of the policy.
      policy: structure of the policy.
      rule: selection rule.
      needs: signals that the rule and the objective are computed from.
      schedule: learning rate by step.
      optimizer: AdamW under that schedule.
      initial: the model the run starts from; None: new weights, or those of the run's newest checkpoint.
    """

    config: ml_collections.ConfigDict
    mesh: Mesh
    model: ModelConfig
    policy: nnx.GraphDef
    rule: Selection
    needs: set[str]
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    initial: Pretrained | None = None


def open_run(
    config: ml_collections.ConfigDict, given: Collection[str] = (), workdir: pathlib.Path | None = None
) -> tuple[RunSetup, TrainingData]:
    """Checks a config, opens its data and its first model, and builds what they decide. Nothing is written.

    A run that is resumed does not need the model of config.init.checkpoint any more.

    Args:
      config: the run's config.
      given: the keys that the command line sets, such as model.layers.
      workdir: the run's directory, if it may hold checkpoints to resume from.

    Raises:
      UserError: a value is not allowed, the devices do not fit, the data or the first model cannot be opened, or the
        config contradicts that model.
    """
    mesh, data = open_data(config)
    config, initial = config.copy_and_resolve_references(), None
    if config.init.checkpoint:
        model, named = recorded_model(workdir, config) if workdir else None, f"the run in {workdir}"
        if model is None:
            initial = open_pretrained(config.init.checkpoint, INIT, config, data.stores[0])
            model, named = initial.model, f"{INIT}={initial.path}"
        take_model(config, model, named, given, data.seq_len)
    return dataclasses.replace(build_setup(resolve(config, data), mesh), initial=initial), data


def open_data(config: ml_collections.ConfigDict) -> tuple[Mesh, TrainingData]:
    """Checks a config, makes its mesh, and opens its data.

    Raises:
      UserError: a value is not allowed, the devices do not fit, or the data cannot be opened.
    """
    check(config)
    try:
        mesh = sharding.make_mesh(**config.mesh)
    except UserError as error:
        raise UserError(f"config.{error}") from None
    check_batch_size(config, mesh)
    stores, weights = open_mixture(config.data.train)
    return mesh, TrainingData(stores, weights, stores[0].tokenizer())


def build_setup(config: ml_collections.ConfigDict, mesh: Mesh) -> RunSetup:
    """Builds what a resolved config decides. Raises UserError if the model's sizes do not fit together."""
    model, rule = model_config(config), selection_rule(config)
    settings = OptimizerConfig(**config.optimizer)
    schedule = learning_rate_schedule(settings, config.steps)
    return RunSetup(
        config,
        mesh,
        model,
        decoder.build(model),
        rule,
        needed_signals(rule, config.objective),
        schedule,
        make_optimizer(settings, schedule),
    )


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError, naming the key, if a value is not allowed."""
    check_values(config)
    selection_rule(config)
    for key, value, values in (
        ("objective", config.objective, OBJECTIVES),
        ("optimizer.decay", config.optimizer.decay, DECAYS),
    ):
        if value not in values:
            raise UserError(f"config.{key}={value!r} is not one of {', '.join(values)}")
    if not 0 <= config.trace.first <= config.trace.last:
        raise UserError(
            f"config.trace.last={config.trace.last} must not be below config.trace.first={config.trace.first} or 0"
        )
    check_retention(config)


def check_batch_size(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises UserError if the rows of a microbatch cannot be spread evenly over the devices."""
    parts = config.microbatches * math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    if config.batch_size % parts:
        raise UserError(
            f"config.batch_size={config.batch_size} must be a multiple of {parts}: "
            "config.microbatches times the devices that rows are spread over"
        )


def resolve(config: ml_collections.ConfigDict, data: TrainingData) -> ml_collections.ConfigDict:
    """A copy of the config with the keys that the data decide filled in. Raises UserError if the model is too small."""
    config = config.copy_and_resolve_references()
    if config.epochs:
        rows = sum(len(store.rows("train")) for store in data.stores)
        config.steps = math.ceil(config.epochs * rows / config.batch_size)
    config.model.context_length = config.model.context_length or data.seq_len
    if config.model.context_length < data.seq_len:
        raise UserError(
            f"config.model.context_length={config.model.context_length} is below the {data.seq_len} tokens of a row "
            f"of {data.stores[0].path}"
        )
    config.model.vocab_size = config.model.vocab_size or data.tokenizer.vocab_size
    if config.model.vocab_size < data.tokenizer.vocab_size:
        raise UserError(
            f"config.model.vocab_size={config.model.vocab_size} is below the tokenizer's {data.tokenizer.vocab_size}"
        )
    return config


def describe_run(setup: RunSetup, data: TrainingData, reference: Reference) -> Meta:
    """The description of a run that has not made a step."""
    return Meta(
        step=0,
        tokens_seen=0,
        tokens_selected=0,
        config=as_saved(setup.config),
        data=[{"fingerprint": s.fingerprint, "weight": w} for s, w in zip(data.stores, data.weights)],
        tokenizer=data.tokenizer.fingerprint,
        reference=reference.description,
        permuted_rows=True,
    )


def first_state(setup: RunSetup, checkpoints: Checkpoints, meta: Meta, reference: Reference) -> tuple[TrainState, Meta]:
    """The state to train from, on the mesh, and how far the run is: its newest checkpoint, or its first weights.

    Raises:
      UserError: the work directory holds a different run.
    """
    abstract = abstract_state(setup, moving=reference.moving is not None)
    newest = checkpoints.newest(abstract, lambda saved: check_resume(saved, meta))
    if newest is not None:
        state, saved = newest
        say(f"resumed from step {saved.step}")
        progress = {name: getattr(saved, name) for name in PROGRESS}
        return state, meta._replace(**progress)
    if setup.initial is not None:
        params = setup.initial.load(setup.mesh, "float32")
    else:
        init = functools.partial(decoder.init_params, setup.model, setup.config.seed)
        params = jax.jit(init, out_shardings=placement(abstract.params))()
    opt_state = jax.jit(setup.optimizer.init, out_shardings=placement(abstract.opt_state))(params)
    moving_params = None
    if reference.moving:
        start = reference.start
        moving_params = start.load(setup.mesh, "float32") if start else jax.tree.map(jnp.copy, params)
    step = jax.device_put(jnp.int32(0), sharding.replicated(setup.mesh))
    return TrainState(step, params, opt_state, moving_params), meta


def abstract_state(setup: RunSetup, moving: bool = False) -> TrainState:
    """Shapes, dtypes and shardings of the state. `moving` adds a reference that follows the policy."""
    mesh = setup.mesh
    params = decoder.abstract_params(setup.model)
    opt_state = jax.eval_shape(setup.optimizer.init, params)
    opt_shardings = sharding.param_shardings(opt_state, mesh)
    if setup.config.optimizer.host_offload:
        opt_shardings = sharding.on_host(opt_shardings)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    params = placed(params, sharding.param_shardings(params, mesh))
    return TrainState(step, params, placed(opt_state, opt_shardings), params if moving else None)


def placed(tree: Any, shardings: Any) -> Any:
    """Abstract arrays with shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def placement(tree: Any) -> Any:
    """The sharding of each array in a tree."""
    return jax.tree.map(lambda x: x.sharding, tree)


def check_resume(saved: Meta, meta: Meta) -> None:
    """Raises UserError if a checkpoint belongs to a different run than `meta` describes; says what else changed."""
    parts = {"data": "config.data.train", "tokenizer": "the tokenizer", "reference": "the reference model"}
    for part, name in parts.items():
        if getattr(saved, part) != getattr(meta, part):
            raise UserError(f"cannot resume this run: the content of {name} changed. Use a new --workdir")
    steps = meta.config["steps"]
    if steps < saved.step:
        raise UserError(
            f"config.steps={steps} is below the {saved.step} steps that this run has done; raise it, or use a new "
            "--workdir"
        )
    for change in changes(saved.config, meta.config):
        if change.key.startswith(FIXED_ON_RESUME) and change.key not in FREE_ON_RESUME:
            raise UserError(f"cannot resume this run: {change}. Use a new --workdir, or change it back")
        say(f"since the last start, {change}")
    if steps != saved.config["steps"]:
        say(_changed_schedules(saved, meta.config))


def _changed_schedules(saved: Meta, config: dict[str, Any]) -> str:
    """Describes how a changed number of steps changes the schedules of a run."""
    before, after = (
        float(learning_rate_schedule(OptimizerConfig(**c["optimizer"]), c["steps"])(saved.step))
        for c in (saved.config, config)
    )
    text = f"the learning rate of step {saved.step + 1} stays {after:.3g}"
    if before != after:
        text = (
            f"the learning rate schedule now spans {config['steps']} steps: at step {saved.step + 1} the rate changes "
            f"from {before:.3g} to {after:.3g}. To keep the old one, set "
            f"config.optimizer.schedule_steps={saved.config['optimizer']['schedule_steps'] or saved.config['steps']}"
        )
    if config["selection"]["schedule"] != "constant" or config["selection"]["dense_fraction"]:
        text += f"; the schedule of config.selection now spans {config['steps']} steps"
    return text


def train_step(setup: RunSetup, reference: Reference) -> TrainStep:
    """The run's train step, not yet jitted."""
    config = setup.config
    return make_train_step(
        setup.policy,
        decoder.build(reference.model) if reference.model else None,
        setup.optimizer,
        rule=setup.rule,
        objective=config.objective,
        steps=config.steps,
        microbatches=config.microbatches,
        document_mask=config.data.document_mask,
        seed=config.seed,
        moving=reference.moving,
        backward=BackwardConfig(**config.backward),
    )


def jitted_step(setup: RunSetup, reference: Reference, state: TrainState) -> jax.stages.Wrapped:
    """The train step, compiled for the mesh. It donates the state, and not a frozen reference."""
    step = train_step(setup, reference)
    rows, everywhere = sharding.batch_sharding(setup.mesh), sharding.replicated(setup.mesh)
    if setup.config.optimizer.host_offload:
        step = _from_host(step)
    return jax.jit(step, donate_argnames="state", out_shardings=(placement(state), everywhere, rows))


def _from_host(step: TrainStep) -> TrainStep:
    """The step, with the optimizer state moved to the devices first. `out_shardings` moves the new one back."""

    @functools.wraps(step)
    def moved(state: TrainState, reference_params: Params | None, batch: Batch):
        opt_state = jax.device_put(state.opt_state, jax.memory.Space.Device)
        return step(state._replace(opt_state=opt_state), reference_params, batch)

    return moved
