"""Compile a run's train step with the real TPU compiler, without a TPU. Shows whether it fits and what it costs.

python -m tools.compile_tpu --config=FILE:stage --topology=v5e:8x8 [--seq_len=2048] [--config.key=value]

Needs the extra `tpu`. Prints one line each for CLM, SLM with the reference in the step (online), and SLM with stored
reference losses (cached). The exit status is nonzero if one does not fit a chip's memory. --decode_rows compiles
decoding instead of the train step.
"""

import os

os.environ.update(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-16",
    TPU_WORKER_HOSTNAMES="localhost",
)

import contextlib
import json
import math
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh

from rho1_jax.configs.default import ModelConfig
from rho1_jax.data.packing import Batch
from rho1_jax.models import decoder, generation
from rho1_jax.models.attention import KERNELS
from rho1_jax.models.families import family_of
from rho1_jax.runtime import sharding
from rho1_jax.runtime.command_line import define_config_flag, overridden_keys, run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import write_text
from rho1_jax.training import accounting
from rho1_jax.training.config import model_config
from rho1_jax.training.pretrained import with_first_model
from rho1_jax.training.reference import Reference
from rho1_jax.training.setup import abstract_state, build_setup, check, check_batch_size, jitted_step, placed, placement
from tools import hlo_cost

GIB = 2**30
ARMS = ("clm", "online", "cached")


def topology_mesh(name: str, slices: int, mesh: ml_collections.ConfigDict) -> Mesh:
    """The mesh over the chips of a topology such as "v5e:8x8".

    Raises:
      UserError: the compiler does not know the topology.
    """
    try:
        options = {"num_slices": slices} if slices > 1 else {}
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:
        raise UserError(f"--topology={name}: {str(error).splitlines()[0]}") from None
    return sharding.make_mesh(**mesh, devices=devices)


def for_tpu(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy of the config with "auto" replaced by the attention kernel it selects on TPU."""
    config = config.copy_and_resolve_references()
    if config.model.attention == "auto":
        config.model.attention = KERNELS["tpu"][0]
    return config


def windows_of(model: ModelConfig) -> list[int | None]:
    """The sliding window of each layer."""
    structure = family_of(model).structure(model)
    return [structure.kind(model, layer).window for layer in range(model.layers)]


def lowered_step(config: ml_collections.ConfigDict, arm: str, seq_len: int, mesh: Mesh) -> jax.stages.Lowered:
    """Lower the train step of an arm for abstract arrays on the mesh."""
    setup = build_setup(config, mesh)
    state = abstract_state(setup)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, setup.model.compute_dtype), state.params)
    frozen = placed(frozen, placement(state.params))
    reference = Reference(setup.model, frozen) if arm == "online" else Reference()
    row = jax.ShapeDtypeStruct((config.batch_size, seq_len + 1), jnp.int32)
    losses = jax.ShapeDtypeStruct((config.batch_size, seq_len), jnp.float32)
    batch = Batch(row, row, columns={"reference_loss_BL": losses} if arm == "cached" else {})
    batch = jax.tree.map(lambda x: x.update(sharding=sharding.batch_sharding(mesh)), batch)
    step = jitted_step(setup, reference, state)
    return step.lower(state, reference_params=frozen if arm == "online" else None, batch=batch)


def memory_gib(compiled: jax.stages.Compiled, chip: accounting.Chip) -> dict[str, float]:
    """GiB of memory used on each chip and on its host, and the chip's total."""
    memory: Any = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    others = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes
    return {
        "arguments": arguments / GIB,
        "temporaries": temporaries / GIB,
        "total": (arguments + temporaries + others) / GIB,
        "chip": chip.memory / GIB,
        "host": memory.host_argument_size_in_bytes / GIB,
    }


@contextlib.contextmanager
def must_fit(what: str) -> Iterator[None]:
    """Turn the compiler's out-of-memory error into a UserError that names `what`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = re.search(r"(Ran out of memory[^\n]*)", str(error))
        if reason is None:
            raise
        raise UserError(f"{what} does not fit: {reason[1]}") from None


def roofline_seconds(cost: hlo_cost.Cost, chip: accounting.Chip) -> dict[str, float]:
    """Seconds that compute, memory and links each need at their peak rate."""
    return {
        "compute": cost.flops / chip.flops,
        "memory": cost.memory_bytes / chip.memory_bandwidth,
        "links": cost.collective_bytes / chip.link_bandwidth,
    }


def arm_figures(config: ml_collections.ConfigDict, arm: str, seq_len: int, mesh: Mesh) -> dict[str, Any]:
    """Compile an arm's train step.

    Returns:
      Figures per chip: memory, FLOPs, collectives, and the roofline's seconds per step. For the whole run: MFU and
      chip-hours at the roofline.
    """
    chip = accounting.CHIPS[mesh.devices.flat[0].device_kind]
    policy_config = model_config(config)
    start = time.monotonic()
    with jax.set_mesh(mesh):
        compiled = lowered_step(config, arm, seq_len, mesh).compile()
    seconds = time.monotonic() - start
    tokens = config.batch_size * seq_len
    ratio = 1.0 if arm == "clm" else config.selection.ratio
    chips_of_rows = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    head_rounds = math.ceil(ratio * tokens / config.microbatches / chips_of_rows / config.model.loss_chunk)
    program = hlo_cost.Program(compiled.as_text() or "", lambda _: head_rounds, windows_of(policy_config))
    cost = program.cost()
    times = roofline_seconds(cost, chip)
    forward = accounting.ForwardFlops.of(policy_config, seq_len)
    reference = forward if arm == "online" else None
    needed = accounting.training_flops(forward, reference, tokens, ratio * tokens, config.backward.tokens)
    step_seconds = max(times.values())
    memory = memory_gib(compiled, chip)
    return {
        "arm": arm,
        "memory_gib": memory,
        "fits": memory["total"] <= memory["chip"],
        "compile_seconds": seconds,
        "flops": cost.flops,
        "collectives": {kind: {"count": count, "bytes": size} for kind, (count, size) in cost.collectives.items()},
        "selection_share": {
            "flops": cost.selection_flops / cost.flops,
            "collective_bytes": cost.selection_bytes / max(cost.collective_bytes, 1),
        },
        "roofline_seconds": {**times, "step": step_seconds},
        "mfu": sum(needed.values()) / (step_seconds * chip.flops * mesh.size),
        "chip_hours": config.steps * step_seconds * mesh.size / 3600,
    }


def table_row(arm: dict[str, Any]) -> str:
    """An arm's figures as a row of a Markdown table."""
    memory, times, share = arm["memory_gib"], arm["roofline_seconds"], arm["selection_share"]
    bound = max(("compute", "memory", "links"), key=lambda part: times[part])
    received = sum(kind["bytes"] for kind in arm["collectives"].values())
    return (
        f"| {arm['arm']} | {memory['arguments']:.2f} | {memory['temporaries']:.2f} | {memory['total']:.2f} of "
        f"{memory['chip']:.0f} | {arm['compile_seconds']:.0f} | {arm['flops'] / 1e12:.1f} | {received / 1e9:.1f} | "
        f"{share['flops']:.1e}, {share['collective_bytes']:.1e} | {times['step']:.2f} ({bound}) | {arm['mfu']:.0%} | "
        f"{arm['chip_hours']:,.0f} |"
    )


HEADER = (
    "| arm | arguments GiB | temporaries GiB | total GiB per chip | compile s | TFLOP per chip | GB received | "
    "selection's share of FLOPs, bytes | roofline s per step | MFU | chip-hours |\n|" + " --- |" * 11
)


def compile_decoding(
    config: ml_collections.ConfigDict, topology: str, slices: int, rows: int, positions: int
) -> dict[str, Any]:
    """Compile greedy decoding, print its cost per chip for one token in each row, and return the figures."""
    mesh = topology_mesh(topology, slices, config.mesh)
    chip = accounting.CHIPS[mesh.devices.flat[0].device_kind]
    policy_config = model_config(config)
    graphdef, params = decoder.build(policy_config), decoder.abstract_params(policy_config)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def outputs(lowered: jax.stages.Lowered) -> Any:
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            lowered.out_info,
            lowered.compile().output_shardings,
        )

    with jax.set_mesh(mesh), must_fit(f"decoding on {topology}"):
        params = outputs(
            generation.decoding_params.lower(graphdef, placed(params, sharding.param_shardings(params, mesh)))
        )
        state = outputs(generation.empty_state.lower(policy_config, rows, positions))
        start = time.monotonic()
        compiled = generation.decode.lower(graphdef, params, state, key, temperature=0.0).compile()
    cost = hlo_cost.Program(compiled.as_text() or "", lambda _: 1, windows_of(policy_config)).cost()
    memory, compile_seconds = memory_gib(compiled, chip), time.monotonic() - start
    times = {part: seconds / generation.STRETCH for part, seconds in roofline_seconds(cost, chip).items()}
    received, bound = cost.collective_bytes / generation.STRETCH, max(times, key=lambda part: times[part])
    print(
        f"{topology}, {rows} rows of {positions} positions: {memory['total']:.2f} of {memory['chip']:.0f} GiB per "
        f"chip, compiled in {compile_seconds:.0f} s; per token in each row: {received / 1e6:.0f} MB received, "
        f"roofline {1000 * times[bound]:.2f} ms ({bound})"
    )
    return {
        "topology": topology,
        "mesh": dict(mesh.shape),
        "memory_gib": memory,
        "compile_seconds": compile_seconds,
        "bytes_received": received,
        "roofline_seconds": times,
    }


def compile_arms(
    config: ml_collections.ConfigDict, arms: list[str], topology: str, slices: int, seq_len: int
) -> dict[str, Any]:
    """Compile each arm, print its row, and return all figures.

    Raises:
      UserError: an arm does not fit a chip's memory.
    """
    config = for_tpu(config)
    mesh = topology_mesh(topology, slices, config.mesh)
    check(config)
    check_batch_size(config, mesh)
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    tokens = config.batch_size * seq_len
    print(f"{topology}: {mesh.size} chips ({shape}); {tokens:,} tokens per step in {config.microbatches} microbatches")
    print(HEADER, flush=True)
    rows = []
    for arm in arms:
        config.selection.score = "none" if arm == "clm" else "excess"
        with must_fit(f"{arm} on {topology}"):
            rows.append(arm_figures(config, arm, seq_len, mesh))
        print(table_row(rows[-1]), flush=True)
    if not all(row["fits"] for row in rows):
        raise UserError(f"{topology}: out of chip memory; use more microbatches, remat or more chips")
    return {"topology": topology, "slices": slices, "mesh": dict(mesh.shape), "seq_len": seq_len, "arms": rows}


def main() -> None:
    """Define the flags, then run `compile_arms` or `compile_decoding`."""
    config = define_config_flag()
    topology = flags.DEFINE_string(
        "topology", None, "TPU topology, such as v5e:8x8, v5p:4x4x4 or v6e:16x16.", required=True
    )
    slices = flags.DEFINE_integer(
        "slices", 1, "Number of slices of this topology, connected by the data-center network."
    )
    seq_len = flags.DEFINE_integer("seq_len", 2048, "Targets per row.", lower_bound=1)
    arms = flags.DEFINE_multi_enum("arm", list(ARMS), list(ARMS), "Arm to compile. Repeatable; all by default.")
    decode_rows = flags.DEFINE_integer(
        "decode_rows", 0, "If above 0, compile decoding of this many rows instead of the train step."
    )
    output = flags.DEFINE_string("output", None, "JSON file to write the figures to.")

    def command() -> None:
        resolved = with_first_model(config.value, overridden_keys(), seq_len.value)
        if decode_rows.value:
            figures = compile_decoding(resolved, topology.value, slices.value, decode_rows.value, seq_len.value)
        else:
            figures = compile_arms(resolved, arms.value, topology.value, slices.value, seq_len.value)
        if output.value:
            write_text(pathlib.Path(output.value), json.dumps(figures, indent=2) + "\n")

    run(command)


if __name__ == "__main__":
    main()
