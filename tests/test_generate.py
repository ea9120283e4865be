"""Generation against teacher forcing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny
from flax import nnx

from rho1_jax import model
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.generate import generate

LONGEST = 96  # tokens of a prompt and its continuation
PROMPTS = ["Document 1: 3+4=", "D", "Document 12: 20+22=42.\nand so on, and so"]


@pytest.fixture(scope="module")
def setup(tokenizer):
    config = tiny(vocab_size=tokenizer.vocab_size, width=48)
    # Sharper than at the start of training, so that the next token has a clear winner.
    params = jax.tree.map(lambda x: 3 * x, model.init_params(config, 3))
    return model.build(config), params


def continue_(setup, tokenizer, prompts, **options):
    return generate(*setup, tokenizer, prompts, **{"max_new_tokens": 20, "stops": (), **options})


@partial(jax.jit, static_argnums=0)
def all_logits(graphdef, params, tokens, segment_ids):
    decoder = nnx.merge(graphdef, params)
    return decoder(tokens, segment_ids)[0] @ decoder.output_VD().T


def teacher_forced_ids(setup, tokenizer, prompt, count):
    """New tokens, by one forward pass without a cache over the whole text for each."""
    ids = tokenizer.encode_prompt(prompt)
    start = len(ids)
    while len(ids) < start + count:
        padded = np.zeros((2, 1, LONGEST), np.int32)
        padded[0, 0, : len(ids)], padded[1, 0, : len(ids)] = ids, 1
        ids.append(int(all_logits(*setup, *padded)[0, len(ids) - 1].argmax()))
        if ids[-1] == tokenizer.eos_id:
            return ids[start:-1]
    return ids[start:]


def teacher_forced(setup, tokenizer, prompt, count):
    new_ids = teacher_forced_ids(setup, tokenizer, prompt, count)
    return tokenizer.decode(tokenizer.encode(prompt) + new_ids)[len(prompt) :]


@pytest.mark.parametrize("bos", [False, True])
def test_greedy_equals_teacher_forced_argmax(setup, tokenizer, bos, tmp_path):
    if bos:
        tokenizer.save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
        without, tokenizer = tokenizer, Tokenizer(tmp_path)
        expected = [teacher_forced(setup, without, prompt, 20) for prompt in PROMPTS]
        assert expected != [teacher_forced(setup, tokenizer, prompt, 20) for prompt in PROMPTS]
    expected = [teacher_forced(setup, tokenizer, prompt, 20) for prompt in PROMPTS]
    assert any(expected) and len(set(expected)) == 3
    assert continue_(setup, tokenizer, PROMPTS) == expected


def test_neighbours_in_the_batch_do_not_matter(setup, tokenizer):
    together = continue_(setup, tokenizer, PROMPTS)
    assert [continue_(setup, tokenizer, [prompt])[0] for prompt in PROMPTS] == together


def test_stop_strings_and_length_end_a_continuation(setup, tokenizer):
    whole = continue_(setup, tokenizer, PROMPTS[:1])[0]
    stop = whole[5:8]
    assert continue_(setup, tokenizer, PROMPTS[:1], stops=("never", stop))[0] == whole[: whole.index(stop)]
    short = continue_(setup, tokenizer, PROMPTS[:1], max_new_tokens=3)[0]
    assert short == teacher_forced(setup, tokenizer, PROMPTS[0], 3) and len(short) < len(whole)


def test_end_of_sequence_ends_a_continuation(setup, tokenizer):
    graphdef, params = setup
    # The model's third token becomes the end-of-sequence token, by exchanging two rows of the embedding.
    prompt = PROMPTS[0]
    third = teacher_forced_ids(setup, tokenizer, prompt, 3)[2]
    embedding = params["embedding"]
    swapped = embedding.at[jnp.array([third, tokenizer.eos_id])].set(embedding[jnp.array([tokenizer.eos_id, third])])
    setup = graphdef, params | {"embedding": swapped}
    assert len(teacher_forced_ids(setup, tokenizer, prompt, 20)) < 20
    expected = teacher_forced(setup, tokenizer, prompt, 20)
    assert continue_(setup, tokenizer, [prompt])[0] == expected


def test_temperature_draws_by_seed(setup, tokenizer):
    drawn = [continue_(setup, tokenizer, PROMPTS, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != continue_(setup, tokenizer, PROMPTS)


def test_temperature_follows_the_models_probabilities(setup, tokenizer):
    """First tokens of many draws against the softmax of the logits."""
    graphdef, params = setup
    decoder, ids = nnx.merge(graphdef, params), tokenizer.encode(PROMPTS[0])
    hidden, _ = decoder(jnp.array([ids]), jnp.ones((1, len(ids)), int))
    probabilities = jax.nn.softmax(hidden[0, -1] @ decoder.output_VD().T / 1.5)
    best = int(probabilities.argmax())
    drawn = continue_(setup, tokenizer, PROMPTS[:1] * 400, temperature=1.5, max_new_tokens=1)
    share = np.mean([text == tokenizer.decode([*ids, best])[len(PROMPTS[0]) :] for text in drawn])
    assert abs(share - float(probabilities[best])) < 0.08


def test_an_empty_prompt_is_refused(setup, tokenizer):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        continue_(setup, tokenizer, ["a", ""])
