"""Compares our model in lm-eval with lm-eval's own Transformers backend, on the same tiny weights."""

import types

import families
import jax
import numpy as np
import pytest
from families import CASES, build, load, save
from lm_eval.models.huggingface import HFLM

from rho1_jax.evals.lm_eval_adapter import LanguageModel
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError

pytestmark = pytest.mark.peers

MAX_LENGTH = 96
TEXTS = ["The sum of two and three is", " five", "", "and so on " * 30, "x", " = 12.", "Question: what?\nAnswer:"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our model and theirs: a Llama with grouped heads."""
    tokenizer = families.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    folder = tmp_path_factory.mktemp("hf")
    peer = build(CASES["Llama 2 (TinyLlama), K < H"])
    peer.config.max_position_embeddings = MAX_LENGTH
    save(peer, tokenizer, folder)
    graphdef, params = load(folder)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(params, mesh))
        ours = LanguageModel(graphdef, placed, tokenizer, mesh, batch_size=4)
        options = {"device": "cpu", "dtype": "float32", "batch_size": 4, "max_length": MAX_LENGTH}
        # Like training, ours starts a text without context with EOS if the tokenizer has no BOS.
        theirs = HFLM(pretrained=str(folder), prefix_token_id=ours.prefix_token_id, **options)
        assert ours._max_length == MAX_LENGTH
        yield ours, theirs


def requests(*arguments):
    return [types.SimpleNamespace(args=argument) for argument in arguments]


def test_loglikelihoods(both):
    pairs = [(context, continuation) for context in TEXTS for continuation in TEXTS if continuation.strip()]
    ours, theirs = (model.loglikelihood(requests(*pairs), disable_tqdm=True) for model in both)
    np.testing.assert_allclose([score for score, _ in ours], [score for score, _ in theirs], rtol=1e-4, atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_pairs_that_lm_eval_cannot_score_are_refused(both):
    tokenizer = both[0]._tokenizer
    context, continuation = "Doc", "ument"
    assert tokenizer.bos_id is None and len(tokenizer.encode(context + continuation)) <= len(tokenizer.encode(context))
    for pair in ((context, continuation), ("x", ""), ("x", " = 12" * MAX_LENGTH)):
        with pytest.raises(UserError, match="has no token of its own|the model's context_length is"):
            both[0].loglikelihood(requests(pair), disable_tqdm=True)
        with pytest.raises(AssertionError):
            both[1].loglikelihood(requests(pair), disable_tqdm=True)


def test_rolling_loglikelihoods(both):
    texts = [(text,) for text in TEXTS if text]
    ours, theirs = (model.loglikelihood_rolling(requests(*texts), disable_tqdm=True) for model in both)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_generations(both, monkeypatch):
    # A random model generates invalid UTF-8, which the two detokenize differently, so both use theirs.
    monkeypatch.setattr(both[0]._tokenizer, "decode", lambda ids: both[1].tok_decode(ids, skip_special_tokens=True))
    options = [{"until": ["zz"], "max_gen_toks": 12, "do_sample": False}, {"until": [" "], "max_gen_toks": 5}]
    asked = [(text, option) for text in TEXTS if text for option in options]
    ours, theirs = (model.generate_until(requests(*asked), disable_tqdm=True) for model in both)
    assert ours == theirs and any(ours)
