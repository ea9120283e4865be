"""Trains a model: reference, CLM, random or SLM, as the stage of the config says.

rho1 train --config=CONFIG[:stage] --workdir=DIR [--config.key=value]

The same command again resumes from the newest checkpoint, as if the run had never stopped.
"""

import contextlib
import functools
import pathlib
import time
from collections.abc import Collection

import jax
import ml_collections
from absl import flags

from rho1_jax.data.loader import batches, to_devices
from rho1_jax.data.tokenizer import TOKENIZER_DIR
from rho1_jax.evals.evaluator import Evaluator
from rho1_jax.models.decoder import Params
from rho1_jax.runtime import sharding, stopping
from rho1_jax.runtime.command_line import define_config_flag, overridden_keys, run
from rho1_jax.runtime.files import local_path
from rho1_jax.runtime.lock import LOCK_FILE, locked
from rho1_jax.runtime.processes import define_distributed_flag, is_first, say, start
from rho1_jax.training.accounting import ForwardFlops, Ledger
from rho1_jax.training.agreement import check_same_everywhere
from rho1_jax.training.checkpoint import Checkpoints
from rho1_jax.training.config import write_config
from rho1_jax.training.loop import Loop
from rho1_jax.training.reference import open_reference
from rho1_jax.training.setup import describe_run, first_state, jitted_step, open_run


def train_model(config: ml_collections.ConfigDict, workdir: str | pathlib.Path, given: Collection[str] = ()) -> Params:
    """Trains one stage to its end, or resumes it.

    Args:
      config: every key of the run, as `rho1_jax.configs.default.get_config` gives them. If config.init.checkpoint names
        a model, the `model` section comes from there, or from the run itself if it is resumed.
      workdir: directory of the run: metrics, checkpoints, config, tokenizer.
      given: the keys that were set on purpose, such as model.layers, beside those that differ from their default. They
        must not contradict the model of config.init.checkpoint.

    Returns:
      The final parameters, float32.

    Raises:
      UserError: the config, the data, the reference or an earlier run in `workdir` do not fit.
    """
    start_time, workdir = time.monotonic(), local_path(workdir, "--workdir")
    # 1. Check everything that can be refused, before anything is written.
    setup, data = open_run(config, given, workdir)
    config, mesh = setup.config, setup.mesh
    check_same_everywhere(setup, data)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        reference = open_reference(config, setup.needs, setup.model, data.stores, mesh)
        evaluator = Evaluator(config, setup.policy, data.tokenizer, mesh)

        # 2. The state: from the newest checkpoint, from another run, or new.
        if is_first():
            stack.enter_context(locked(workdir / LOCK_FILE, f"--workdir={workdir}"))
        checkpoints = Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.keep_every, config.checkpoint.best)
        state, meta = first_state(setup, checkpoints, describe_run(setup, data, reference), reference)
        if is_first():
            write_config(config, workdir)
            data.tokenizer.save(workdir / TOKENIZER_DIR)

        # 3. The step.
        step = functools.partial(jitted_step(setup, reference, state), reference_params=reference.params)

        # 4. The loop.
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        say(f"{count:,} parameters on {mesh.size} devices ({shape}); compiling the first step")
        batch_stream = batches(
            data.stores,
            data.weights,
            batch_size=config.batch_size,
            seed=config.seed,
            first_step=meta.step,
            rows=sharding.local_rows(mesh, config.batch_size),
            prefetch=config.data.prefetch,
            permute=meta.permuted_rows,
            columns=reference.columns,
        )
        forward = ForwardFlops.of(setup.model, data.seq_len)
        reference_forward = ForwardFlops.of(reference.model, data.seq_len) if reference.model else None
        devices = mesh.devices.ravel().tolist()
        ledger = Ledger(
            start_time, forward, reference_forward, reference.scoring_flops, devices, config.backward.tokens
        )
        loop = Loop(setup, workdir, meta, data.seq_len, evaluator, checkpoints, ledger)
        return loop.run(state, step, (to_devices(batch, mesh, config.batch_size) for batch in batch_stream))


def main() -> None:
    """The command `rho1 train`."""
    config = define_config_flag()
    workdir = flags.DEFINE_string("workdir", None, "Directory of the run: metrics, checkpoints, config.", required=True)
    distributed_flag = define_distributed_flag()

    def command() -> None:
        stopping.listen()
        start(distributed_flag.value)
        train_model(config.value, workdir.value, overridden_keys())

    run(command)


if __name__ == "__main__":
    main()
