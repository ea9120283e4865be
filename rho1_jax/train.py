"""Trains a model: reference, CLM, random or SLM, as the config's stage says.

python -m rho1_jax.train --config=FILE[:stage] --workdir=DIR [--config.key=value]

Started again with the same command, it goes on from its newest checkpoint as if it had never stopped.
"""

import functools
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags
from flax import nnx
from jax.sharding import Mesh

from rho1_jax.configs.default import ModelConfig, OptimizerConfig
from rho1_jax.data.loader import batches, open_mixture, to_devices
from rho1_jax.data.store import Store
from rho1_jax.data.tokenizer import TOKENIZER_DIR, Tokenizer
from rho1_jax.evals.evaluator import Evaluator
from rho1_jax.models import decoder
from rho1_jax.models.decoder import Params
from rho1_jax.runtime import sharding
from rho1_jax.runtime.command_line import define_config_flag, run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.processes import define_distributed_flag, is_first, say, start
from rho1_jax.training import accounting, optimizer
from rho1_jax.training.checkpoint import Checkpoints, Meta
from rho1_jax.training.config import RUN_SETTINGS, as_saved, differences, model_config, selection_rule, write_config
from rho1_jax.training.loop import Loop
from rho1_jax.training.pretrained import Pretrained, open_same_model
from rho1_jax.training.reference import Reference, open_reference
from rho1_jax.training.state import TrainState
from rho1_jax.training.train_step import make_train_step

# A resumed run that changed one of these would train on other batches, or not be the same model.
FIXED_ON_RESUME = (
    "config.model.",
    "config.seed",
    "config.batch_size",
    "config.data.document_mask",
    "config.selection.",
    "config.reference.moves",
    "config.reference.decay",
    "config.reference.every",
)
# Of these, what may change with the machine.
FREE_ON_RESUME = tuple(f"config.model.{name}:" for name in RUN_SETTINGS)


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Params:
    """Runs one stage to its end and returns the final parameters.

    Raises:
      UserError: the config, the data, the reference or an earlier run in `workdir` do not fit.
    """
    start_time = time.monotonic()
    # 1. Everything that can be refused is checked before anything is written.
    check(config)
    mesh = sharding.make_mesh(**config.mesh)
    check_batch_size(config, mesh)
    stores, weights = open_mixture(config.data.train)
    tokenizer = stores[0].tokenizer()
    config = resolve(config, stores, tokenizer)
    policy_config = model_config(config)
    policy = decoder.build(policy_config)
    with jax.set_mesh(mesh):
        initial = open_same_model(config.init.checkpoint, "config.init.checkpoint", config, policy_config, stores[0])
        reference = open_reference(config, selection_rule(config), policy_config, stores, mesh)
        evaluator = Evaluator(config, policy, tokenizer, mesh)
        meta = Meta(
            step=0,
            tokens_seen=0,
            tokens_selected=0,
            config=as_saved(config),
            data=[{"fingerprint": s.fingerprint, "weight": w} for s, w in zip(stores, weights)],
            tokenizer=tokenizer.fingerprint,
            reference=reference.description,
        )

        # 2. The state: of the newest checkpoint, of another run, or new.
        workdir.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(workdir, config.checkpoint.keep)
        tx = optimizer.make_optimizer(OptimizerConfig(**config.optimizer), config.steps)
        state, meta = initial_state(config, policy_config, tx, checkpoints, meta, initial, reference, mesh)
        if is_first():
            write_config(config, workdir)
            tokenizer.save(workdir / TOKENIZER_DIR)

        # 3. The step.
        step = jitted_step(config, policy, reference, tx, state, mesh)
        step = functools.partial(step, reference_params=reference.params)

        # 4. The loop.
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        say(f"{count:,} parameters on {mesh.size} devices ({shape}); the first step compiles")
        batch_stream = batches(
            stores,
            weights,
            batch_size=config.batch_size,
            seed=config.seed,
            first_step=meta.step,
            rows=sharding.local_rows(mesh, config.batch_size),
            prefetch=config.data.prefetch,
            columns=reference.columns,
        )
        next_batch = lambda: to_devices(next(batch_stream), mesh, config.batch_size)  # noqa: E731
        forward = accounting.ForwardFlops.of(policy_config, stores[0].seq_len)
        reference_forward = accounting.ForwardFlops.of(reference.model, stores[0].seq_len) if reference.model else None
        ledger = accounting.Ledger(
            start_time, forward, reference_forward, reference.scoring_flops, mesh.devices.ravel().tolist()
        )
        loop = Loop(config, workdir, meta, stores[0].seq_len, evaluator, checkpoints, ledger)
        return loop.run(state, step, next_batch)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError, naming the key, where a value cannot be."""
    selection_rule(config)
    if config.optimizer.decay not in optimizer.DECAYS:
        raise UserError(f"config.optimizer.decay={config.optimizer.decay!r} is none of {', '.join(optimizer.DECAYS)}")
    if not 0 <= config.optimizer.warmup_fraction < 1:
        raise UserError(f"config.optimizer.warmup_fraction={config.optimizer.warmup_fraction} must lie in [0, 1)")
    if config.epochs < 0:
        raise UserError(f"config.epochs={config.epochs} must not be negative")
    for key in ("steps", "batch_size", "microbatches", "log_every"):
        if config[key] < 1:
            raise UserError(f"config.{key}={config[key]} must be at least 1")
    if not 0 <= config.trace.first <= config.trace.last:
        raise UserError(
            f"config.trace.last={config.trace.last} must not be below config.trace.first={config.trace.first} or 0"
        )
    for section in ("eval", "checkpoint"):
        if config[section].every < 1:
            raise UserError(f"config.{section}.every={config[section].every} must be at least 1")


def check_batch_size(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises UserError where the rows of a microbatch cannot be spread evenly."""
    parts = config.microbatches * math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    if config.batch_size % parts:
        raise UserError(
            f"config.batch_size={config.batch_size} must be a multiple of {parts}: "
            "config.microbatches times the devices that rows are spread over"
        )


def resolve(
    config: ml_collections.ConfigDict, stores: Sequence[Store], tokenizer: Tokenizer
) -> ml_collections.ConfigDict:
    """A copy of the config with what the data decide filled in. Raises UserError where the model is too small."""
    config = config.copy_and_resolve_references()
    if config.epochs:
        rows = sum(len(store.rows("train")) for store in stores)
        config.steps = math.ceil(config.epochs * rows / config.batch_size)
    seq_len = stores[0].seq_len
    config.model.context_length = config.model.context_length or seq_len
    if config.model.context_length < seq_len:
        length = config.model.context_length
        raise UserError(
            f"config.model.context_length={length} is below the {seq_len} tokens of a row of {stores[0].path}"
        )
    if not config.model.vocab_size:
        config.model.vocab_size = tokenizer.vocab_size
    if config.model.vocab_size < tokenizer.vocab_size:
        size = config.model.vocab_size
        raise UserError(f"config.model.vocab_size={size} is below the tokenizer's {tokenizer.vocab_size}")
    return config


def initial_state(
    config: ml_collections.ConfigDict,
    policy_config: ModelConfig,
    tx,
    checkpoints: Checkpoints,
    meta: Meta,
    initial: Pretrained | None,
    reference: Reference,
    mesh: Mesh,
) -> tuple[TrainState, Meta]:
    """The state to go on from, already on the mesh, and where the run stands. A new run starts from `initial`, if any.

    Raises:
      UserError: the run in the work directory is another one.
    """
    moves = reference.moving is not None
    abstract = abstract_state(policy_config, tx, mesh, config.optimizer.host_offload, moves)
    saved = checkpoints.latest_meta()
    if saved is not None:
        check_resume(saved, meta)
        state = checkpoints.restore(saved.step, abstract)
        say(f"resumed from step {saved.step}")
        meta = meta._replace(step=saved.step, tokens_seen=saved.tokens_seen, tokens_selected=saved.tokens_selected)
        return state, meta
    if initial is not None:
        params = initial.load(mesh, "float32")
    else:
        init = functools.partial(decoder.init_params, policy_config, config.seed)
        params = jax.jit(init, out_shardings=placement(abstract.params))()
    opt_state = jax.jit(tx.init, out_shardings=placement(abstract.opt_state))(params)
    moving_params = None
    if moves:
        moving_params = reference.start.load(mesh, "float32") if reference.start else jax.tree.map(jnp.copy, params)
    step = jax.device_put(jnp.int32(0), sharding.replicated(mesh))
    return TrainState(step, params, opt_state, moving_params), meta


def abstract_state(policy_config: ModelConfig, tx, mesh: Mesh, host_offload: bool, moves: bool = False) -> TrainState:
    """Shapes, dtypes and shardings of the state; `moves` says whether it has a reference."""
    params = decoder.abstract_params(policy_config)
    opt_state = jax.eval_shape(tx.init, params)
    opt_shardings = sharding.param_shardings(opt_state, mesh)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    params = placed(params, sharding.param_shardings(params, mesh))
    opt_state = placed(opt_state, sharding.on_host(opt_shardings) if host_offload else opt_shardings)
    return TrainState(step, params, opt_state, params if moves else None)


def placed(tree: Any, shardings: Any) -> Any:
    """Abstract arrays with the shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def placement(tree: Any) -> Any:
    """The sharding of each array of a tree."""
    return jax.tree.map(lambda x: x.sharding, tree)


def check_resume(saved: Meta, meta: Meta) -> None:
    """Raises UserError where the run in the work directory cannot be gone on with; says what changed otherwise."""
    parts = {"data": "config.data.train", "tokenizer": "the tokenizer", "reference": "the reference model"}
    for part, name in parts.items():
        if getattr(saved, part) != getattr(meta, part):
            raise UserError(f"the run in this workdir began with other content of {name}; use a new --workdir")
    for difference in differences(saved.config, meta.config):
        fixed = difference.startswith(FIXED_ON_RESUME) and not difference.startswith(FREE_ON_RESUME)
        if fixed:
            raise UserError(f"the run in this workdir cannot go on with {difference}; use a new --workdir")
        say(f"changed since the last start: {difference}")


def jitted_step(
    config: ml_collections.ConfigDict,
    policy: nnx.GraphDef,
    reference: Reference,
    tx,
    state: TrainState,
    mesh: Mesh,
) -> Any:
    """The train step, compiled for the mesh; the state is donated, a frozen reference is not."""
    step = make_train_step(
        policy,
        decoder.build(reference.model) if reference.model else None,
        tx,
        rule=selection_rule(config),
        steps=config.steps,
        microbatches=config.microbatches,
        document_mask=config.data.document_mask,
        seed=config.seed,
        moving=reference.moving,
    )
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return jax.jit(step, donate_argnames="state", out_shardings=(placement(state), everywhere, rows))


def main() -> None:
    """The command: its flags, then `train`."""
    config = define_config_flag()
    workdir = flags.DEFINE_string("workdir", None, "Directory of the run: metrics, checkpoints, config.", required=True)

    distributed_flag = define_distributed_flag()

    def command() -> None:
        start(distributed_flag.value)
        train(config.value, pathlib.Path(workdir.value))

    run(command)


if __name__ == "__main__":
    main()
