"""Compile with the real TPU compiler, without a TPU."""

import dataclasses
import json
import re

import pytest
from helpers import run_command, tiny, write_hf_folder

from rho1_jax.configs.mistral_7b_math import get_config
from rho1_jax.models.decoder import init_params, param_count
from rho1_jax.training.config import model_config

pytestmark = pytest.mark.slow

SMALL = {"layers": 2, "width": 256, "heads": 4, "kv_heads": 2, "head_width": 128, "ff_width": 512, "vocab_size": 1024}


def compile_small(topology, tmp_path, *flags):
    changes = [f"--config.model.{key}={value}" for key, value in SMALL.items()]
    output = tmp_path / "figures.json"
    done = run_command(
        "tools.compile_tpu",
        "--config=configs/mistral_7b_math.py:slm",
        *(f"--topology={topology}", "--seq_len=256", f"--output={output}", "--config.batch_size=16", *changes, *flags),
    )
    return done, json.loads(output.read_text()) if output.exists() else None


@pytest.mark.parametrize(
    "topology, flags",
    [
        ("v5e:2x2", ["--config.microbatches=2"]),
        ("v5p:2x2x1", ["--config.mesh.tensor=2", "--config.optimizer.host_offload=True"]),
        ("v6e:2x2", ["--slices=2", "--config.mesh.data=2", "--config.optimizer.first_moment_dtype=bfloat16"]),
    ],
)
def test_the_step_compiles_with_splash_and_both_models(topology, flags, tmp_path):
    done, figures = compile_small(topology, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    clm, online, cached = figures["arms"]
    assert [len(re.findall(rf"^\| {arm} \|", done.stdout, re.M)) for arm in ("clm", "online", "cached")] == [1, 1, 1]
    # The reference in the step costs memory and FLOPs; its stored losses do not.
    assert online["memory_gib"]["arguments"] > cached["memory_gib"]["arguments"]
    assert online["flops"] > cached["flops"]
    for arm in (online, cached):
        assert arm["fits"] and 0 < arm["mfu"] < 1
        assert arm["selection_share"]["flops"] < 0.01 and arm["selection_share"]["collective_bytes"] < 0.01
    if "host_offload" in str(flags):
        assert cached["memory_gib"]["host"] > cached["memory_gib"]["arguments"]
    if "bfloat16" in str(flags):
        sizes = [
            arm["memory_gib"]["arguments"] for arm in (clm, compile_small(topology, tmp_path, *flags[:2])[1]["arms"][0])
        ]
        assert sizes[0] < sizes[1]


def test_a_step_that_does_not_fit_is_an_error(tmp_path):
    done, figures = compile_small(
        "v5e:2x2", tmp_path, "--config.model.ff_width=262144", "--config.model.layers=32", "--arm=clm"
    )
    assert done.returncode != 0 and figures is None
    assert "clm on v5e:2x2 does not fit" in done.stderr and "available HBM" in done.stderr


def test_the_model_is_that_of_the_first_checkpoint(tokenizer, tmp_path):
    model = tiny(vocab_size=304)
    folder = write_hf_folder(tmp_path / "model", model, init_params(model, 0), tokenizer)
    done, _ = compile_small("v5e:2x2", tmp_path, f"--config.init.checkpoint={folder}")
    assert done.returncode == 2 and f"contradict config.init.checkpoint={folder}" in done.stderr


def test_an_unknown_topology_is_refused(tmp_path):
    done, _ = compile_small("v5e:3x5x7", tmp_path)
    assert done.returncode == 2 and "--topology=v5e:3x5x7" in done.stderr


def test_decoding_compiles_without_gathering_the_weights(tmp_path):
    done, figures = compile_small("v5e:2x2", tmp_path, "--decode_rows=8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("v5e:2x2, 8 rows of 256 positions: ")
    config = dataclasses.replace(model_config(get_config("slm")), **SMALL)
    assert 0 < figures["bytes_received"] < param_count(config)  # half the bytes of the bfloat16 weights
    assert 0 < figures["memory_gib"]["total"] < 0.1 and figures["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    done, _ = compile_small("v5e:2x2", tmp_path, f"--decode_rows={1 << 22}")
    assert done.returncode == 2 and done.stderr.startswith("error: decoding on v5e:2x2 does not fit: Ran out of memory")
