"""Compare the answers to lm-eval's requests with losses computed directly."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import continuations, tiny

from rho1_jax.data.packing import Batch
from rho1_jax.evals.lm_eval_adapter import LanguageModel
from rho1_jax.models import decoder
from rho1_jax.models.forward import make_token_losses
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError

pytestmark = pytest.mark.slow

CONFIG = tiny(vocab_size=300, context_length=48)


@pytest.fixture(scope="module")
def weights():
    # Larger weights than at initialization, so that the generated text depends on the prompt.
    return decoder.build(CONFIG), jax.tree.map(lambda x: 3 * x, decoder.init_params(CONFIG, 0))


@pytest.fixture(scope="module", params=[(8, 1, 1), (2, 2, 2)], ids=str)
def language_model(weights, tokenizer, request):
    mesh = sharding.make_mesh(*request.param)
    with jax.set_mesh(mesh):
        params = jax.device_put(weights[1], sharding.param_shardings(weights[1], mesh))
        yield LanguageModel(weights[0], params, tokenizer, mesh, batch_size=8)


def request(*arguments):
    return types.SimpleNamespace(args=arguments)


def alone():
    """A mesh of one device, to compute expected values on."""
    return jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))


def log_probabilities(weights, ids):
    """The log-probability of each token after the first, for one text."""
    row = np.array([ids], np.int32)
    with alone():
        losses, _ = make_token_losses(weights[0], True)(weights[1], Batch(jnp.asarray(row), jnp.ones_like(row)))
    return -np.asarray(losses)[0]


def generated(weights, tokenizer, prompt, **options):
    with alone():
        return continuations(*weights, tokenizer, [prompt], **options)[0]


PAIRS = [
    ("Document 3: 4+5=", "9."),
    ("and so", " on, and so on"),
    ("", "Document"),
    ("1", "2"),
    ("x " * 60 + "x", " end"),
]


def test_loglikelihood_is_the_sum_of_token_losses(language_model, weights, tokenizer):
    results = language_model.loglikelihood([request(*pair) for pair in PAIRS * 3], disable_tqdm=True)
    assert results[: len(PAIRS)] == results[len(PAIRS) : 2 * len(PAIRS)]
    for (context, continuation), (score, _) in zip(PAIRS, results):
        before = tokenizer.encode_prompt(context) if context else [language_model.prefix_token_id]
        whole = (
            before + tokenizer.encode(continuation) if not context else tokenizer.encode_prompt(context + continuation)
        )
        kept = whole[-CONFIG.context_length - 1 :]
        expected = log_probabilities(weights, kept)[-(len(whole) - len(before)) :].sum()
        assert score == pytest.approx(expected, rel=1e-4)


def test_continuations_without_a_token_of_their_own_are_refused(language_model, tokenizer):
    assert tokenizer.bos_id is None
    # "ocument" is one token, so "Document" has no more tokens than "Doc".
    context, continuation = "Doc", "ument"
    assert len(tokenizer.encode(context + continuation)) <= len(tokenizer.encode(context))
    for pair in ((context, continuation), ("Document", ""), ("", "")):
        with pytest.raises(UserError, match="has no token of its own"):
            language_model.loglikelihood([request("1", "2"), request(*pair)], disable_tqdm=True)


def test_context_of_spaces_counts_as_empty(language_model):
    spaces, empty = language_model.loglikelihood([request("  ", "Document"), request("", "  Document")])
    assert spaces == empty and spaces[0] < 0


def test_too_long_requests_are_named(language_model, capsys):
    language_model.loglikelihood([request(*pair) for pair in PAIRS], disable_tqdm=True)
    assert "1 of 5 requests exceed the model's context_length 48" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"the score of \d+ tokens; the model's context_length is 48"):
        language_model.loglikelihood([request("x", " 1" * 60)], disable_tqdm=True)


def test_greedy_flag_marks_only_the_likeliest_tokens(language_model, weights, tokenizer):
    context = tokenizer.encode_prompt("Document 7: 1+2=")
    rows = np.array([[*context, token] for token in range(CONFIG.vocab_size)], np.int32)
    with alone():
        losses, _ = jax.jit(make_token_losses(weights[0], True))(weights[1], Batch(rows, np.ones_like(rows)))
    likeliest = int(np.asarray(losses)[:, -1].argmin())
    requests = [(None, context, [token]) for token in range(CONFIG.vocab_size)]
    results = language_model._loglikelihood_tokens(requests)
    assert [token for token, (_, greedy) in enumerate(results) if greedy] == [likeliest]
    for first, times in ((likeliest, 1), (likeliest - 1, 0)):  # both tokens of a pair must be the likeliest
        requests = [(None, context, [first, token]) for token in range(CONFIG.vocab_size)]
        assert sum(greedy for _, greedy in language_model._loglikelihood_tokens(requests)) == times


def test_rolling_windows_count_each_token_once(language_model, weights, tokenizer):
    texts = ["Document 1: 2+3=5.", "and so on, " * 40]
    totals = language_model.loglikelihood_rolling([request(text) for text in texts])
    short = [language_model.prefix_token_id, *tokenizer.encode_prompt(texts[0])]
    assert totals[0] == pytest.approx(log_probabilities(weights, short).sum(), rel=1e-4)
    ids = tokenizer.encode_prompt(texts[1])
    length, total = CONFIG.context_length, 0.0
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        # The last window is as long as the others, so its first targets have more context.
        row = [language_model.prefix_token_id, *ids[:end]] if start == 0 else ids[end - length - 1 : end]
        total += log_probabilities(weights, row)[start - end :].sum()
    assert len(ids) > 2 * length and totals[1] == pytest.approx(total, rel=1e-4)


def test_generate_until_follows_the_options(language_model, weights, tokenizer):
    requests = [
        request("Document 1:", {"until": ["\n"], "max_gen_toks": 8}),
        request("Document 22: 1+1", {"until": "zz", "max_gen_toks": 4, "do_sample": False, "temperature": 1.0}),
        request("and so on, " * 30, {"until": [], "max_gen_toks": 8}),
        request("Document 1:", {"max_new_tokens": 6}),
        request("x", {"max_gen_toks": 8, "do_sample": True, "temperature": 4.0}),
        request("x", {"max_gen_toks": 8, "temperature": 4.0}),
        request("x", {"max_gen_toks": 8}),
    ]
    texts = language_model.generate_until(requests)
    first = generated(weights, tokenizer, "Document 1:", max_new_tokens=8, stops=["\n"])
    second = generated(weights, tokenizer, "Document 22: 1+1", max_new_tokens=4, stops=[])
    options = {"max_new_tokens": 8, "stops": [], "max_prompt_tokens": CONFIG.context_length - 8}
    third = generated(weights, tokenizer, "and so on, " * 30, **options)
    fourth = generated(weights, tokenizer, "Document 1:", max_new_tokens=6, stops=[])
    assert texts[:4] == [first, second, third, fourth]
    assert len({*texts[4:]}) == 3  # two samples and the greedy text
    with pytest.raises(UserError, match="48 new tokens; the model's context_length is 48"):
        language_model.generate_until([request("x", {"until": [], "max_gen_toks": CONFIG.context_length})])
