"""Weights in and out against Transformers: every family, both directions (extra `peers`)."""

import pathlib

import families
import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import config_of
from families import CASES, build, generations, gradient_difference, load, logits_difference, our_logits, save
from safetensors import safe_open

from rho1_jax.data.prepare import Options, prepare
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.train import train
from tools.export_hf import export_hf
from tools.import_hf import import_hf

LARGEST = 1e-4


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory):
    return families.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits_gradients_and_generations(case, small_tokenizer, tmp_path):
    peer = build(case)
    save(peer, small_tokenizer, tmp_path)
    graphdef, params = load(tmp_path)
    assert logits_difference(graphdef, params, peer) < LARGEST
    assert gradient_difference(graphdef, params, peer) < LARGEST
    ours, theirs = generations(graphdef, params, peer, small_tokenizer)
    assert ours == theirs and all(ours)


def stored(folder: pathlib.Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor of a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                found[name] = (opened.get_slice(name).get_dtype(), opened.get_tensor(name).tobytes())
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_round_trip_is_bit_identical(case, dtype, small_tokenizer, tmp_path):
    peer = build(case).to(getattr(torch, dtype))
    save(peer, small_tokenizer, tmp_path / "hf", max_shard_size="40KB")
    import_hf(tmp_path / "hf", tmp_path / "imported", dtype=None)
    export_hf(str(tmp_path / "imported"), tmp_path / "exported", dtype=None)
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    before, after = stored(tmp_path / "hf"), stored(tmp_path / "exported")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
    first, again = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager")
        for name in ("hf", "exported")
    )
    assert type(again) is type(peer) and again.dtype == peer.dtype
    ids = torch.from_numpy(families.random_ids()).long()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, first(ids).logits, rtol=0, atol=0)


def test_an_exported_model_after_twenty_steps_of_slm_is_the_one_that_was_trained(corpus, small_tokenizer, tmp_path):
    save(build(CASES["Llama 3.1, rope scaling"]), small_tokenizer, tmp_path / "hf")
    save(build(CASES["Llama 3.1, rope scaling"], seed=1), small_tokenizer, tmp_path / "reference")
    options = Options(("{text}",), None, seq_len=32, eval_fraction=0.1, max_bad_fraction=0.0)
    prepare([corpus], Tokenizer(tmp_path / "hf"), tmp_path / "data", options, workers=1)
    import_hf(tmp_path / "hf", tmp_path / "imported", dtype=None)
    # The reference is a Hugging Face folder, the policy's first weights a checkpoint.
    config = config_of("slm", tmp_path / "data", tmp_path / "reference")
    config.init.checkpoint = str(tmp_path / "imported")
    config.model.update(
        layers=3,
        vocab_size=families.VOCAB,
        tied_embeddings=False,
        rope_theta=500_000.0,
        rope_factor=8.0,
        rope_original_length=32,
        norm_eps=1e-6,
        context_length=128,
    )
    config.steps = 20
    params = jax.device_get(train(config, tmp_path / "run"))
    export_hf(str(tmp_path / "run"), tmp_path / "exported", dtype=None)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager")
    graphdef, exported = load(tmp_path / "exported")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(exported), params)
    assert logits_difference(graphdef, params, peer) < LARGEST
    untrained = load(tmp_path / "hf")[1]
    ids = families.random_ids()
    moved = np.abs(our_logits(graphdef, params, ids) - our_logits(graphdef, untrained, ids)).max()
    assert moved > 100 * LARGEST
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    text = "Document 3: 4+5=9. and so on\n\nand so  forth \u65e5"
    assert tokenizer(text)["input_ids"] == small_tokenizer.encode(text)
