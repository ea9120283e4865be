"""Compares generation with teacher forcing."""

import contextlib
import json
from collections import deque
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import continuations, tiny

from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.models import decoder, generation
from rho1_jax.models.generation import Generator, bucket
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError
from tools import hlo_cost

LONGEST = 160  # tokens of a prompt and its continuation
PROMPTS = ["Document 1: 3+4=", "D", "Document 12: 20+22=42.\nand so on, and so"]
MANY = [*PROMPTS, "x", "and so on, " * 9, "Document 7", "1+1=2", "so on, and", "Document 123: 45+4=" * 3]


def model_of(tokenizer, **changes):
    config = tiny(vocab_size=tokenizer.vocab_size, width=48, **changes)
    # Larger parameters than at the start of training, so that the next token has a clear winner.
    params = jax.tree.map(lambda x: 3 * x, decoder.init_params(config, 3))
    return decoder.build(config), params


@pytest.fixture(scope="module")
def setup(tokenizer):
    return model_of(tokenizer)


def continue_(setup, tokenizer, prompts, **options):
    return continuations(*setup, tokenizer, prompts, **{"max_new_tokens": 20, "stops": (), **options})


@partial(jax.jit, static_argnums=0)
def all_logits(graphdef, params, tokens, segment_ids):
    decoder = nnx.merge(graphdef, params)
    return decoder(tokens, segment_ids) @ decoder.output_VD().T


def teacher_forced_ids(setup, tokenizer, prompt, count):
    """New tokens, each from one forward pass over the whole text, without a cache."""
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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 5},
        {"sliding_window": 40},
        {"tied_embeddings": False, "kv_heads": 1},
        {"family": "qwen2", "kv_heads": 4},
        {"family": "qwen3", "rope_factor": 4.0, "rope_original_length": 32},
    ],
    ids=str,
)
def test_free_rows_take_the_next_prompts(tokenizer, changes):
    """Nine prompts in two rows, long enough for the ring to wrap around several times."""
    setup = model_of(tokenizer, **changes)
    expected = [teacher_forced(setup, tokenizer, prompt, 50) for prompt in MANY]
    assert continue_(setup, tokenizer, MANY, rows=2, max_new_tokens=50) == expected


def test_no_row_waits_for_the_longest(setup, tokenizer, monkeypatch):
    """Three short continuations, one after the other, take no longer than a long one beside them."""
    short, long = (teacher_forced(setup, tokenizer, prompt, 50) for prompt in PROMPTS[:2])
    stretches, decode = [], generation.decode
    monkeypatch.setattr(generation, "decode", lambda *a, **o: stretches.append(1) or decode(*a, **o))
    prompts = [PROMPTS[1], *PROMPTS[:1] * 3]
    texts = continue_(setup, tokenizer, prompts, rows=2, max_new_tokens=50, stops=[short[3:6]])
    assert texts == [long, *[short[: short.index(short[3:6])]] * 3]
    assert len(stretches) == -(-50 // generation.STRETCH)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_a_mesh_changes_nothing(setup, tokenizer, sizes):
    expected = [teacher_forced(setup, tokenizer, prompt, 20) for prompt in MANY]
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        params = jax.device_put(setup[1], sharding.param_shardings(setup[1], mesh))
        assert continue_((setup[0], params), tokenizer, MANY, rows=3) == expected


def test_decoding_gathers_no_weights(setup, tokenizer):
    mesh = sharding.make_mesh(1, 4, 2)
    with jax.set_mesh(mesh):
        params = jax.device_put(setup[1], sharding.param_shardings(setup[1], mesh))
        generator = Generator(setup[0], params, tokenizer, 8)
        state = generation.empty_state(generator._config, 8, 64)
        arguments = setup[0], generator._params, state, jax.random.key(0)
        compiled = generation.decode.lower(*arguments, temperature=0.0).compile()
    cost = hlo_cost.Program(compiled.as_text(), lambda _: 1, [None]).cost()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert 0 < cost.collective_bytes / generation.STRETCH < weights / 4
    keys = generation.decode(*arguments, temperature=0.0)[0].caches[0][0]
    assert {shard.data.nbytes for shard in keys.addressable_shards} == {keys.nbytes // 8}


def test_decoding_computes_in_the_compute_dtype(tokenizer):
    """Rounding decides between two tokens of nearly equal probability, so not all tokens need to be equal."""
    setup = model_of(tokenizer, compute_dtype="bfloat16")
    pairs = zip(continue_(setup, tokenizer, MANY, rows=2), (teacher_forced(setup, tokenizer, p, 20) for p in MANY))
    assert sum(ours[:4] == theirs[:4] for ours, theirs in pairs) > 5
    outer, layers = generation.decoding_params(*setup)
    assert outer["embedding"].dtype == layers[1]["attention"]["q"].dtype == jnp.bfloat16
    assert outer["norm"]["scale"].dtype == layers[1]["attention_norm"]["scale"].dtype == jnp.float32


def test_neighbours_in_the_batch_do_not_matter(setup, tokenizer):
    together = continue_(setup, tokenizer, PROMPTS)
    assert [continue_(setup, tokenizer, [prompt])[0] for prompt in PROMPTS] == together


def test_requests_may_be_added_while_others_run(setup, tokenizer):
    """One of them is longer than the cache was made for."""
    requests, texts = deque(enumerate(PROMPTS)), {}
    for number, text, *_ in Generator(*setup, tokenizer, 2).run(requests, max_new_tokens=20, stops=()):
        texts[number] = text
        if number < 3:
            requests.append((number + 10, PROMPTS[number] * 3))
    expected = {number: prompt for number, prompt in enumerate(PROMPTS)}
    expected |= {number + 10: prompt * 3 for number, prompt in enumerate(PROMPTS)}
    assert texts == {number: teacher_forced(setup, tokenizer, prompt, 20) for number, prompt in expected.items()}


def test_the_cache_grows_while_others_decode(setup, tokenizer):
    first, second = (teacher_forced(setup, tokenizer, prompt, 50) for prompt in PROMPTS[:2])
    stop = first[3:6]
    assert stop not in second
    requests, texts = deque(enumerate(PROMPTS[:2])), {}
    for number, text, *_ in Generator(*setup, tokenizer, 2).run(requests, max_new_tokens=50, stops=[stop]):
        if not texts:
            requests.append((2, MANY[4] * 2))
        texts[number] = text
    assert list(texts) == [0, 1, 2] and texts[0] == first[: first.index(stop)] and texts[1] == second


def test_lengths_are_rounded_up_a_little_and_to_few_values():
    lengths = np.arange(1, 4097)
    rounded = np.array([bucket(int(length)) for length in lengths])
    assert (rounded >= lengths).all() and (rounded % 32 == 0).all() and (np.diff(rounded) >= 0).all()
    assert (rounded < lengths + np.maximum(32, lengths / 4)).all() and len(set(rounded)) < 40
    assert bucket(1) == 32 and bucket(512) == 512 and bucket(513) == 640 and bucket(1000) == 1024


def test_nothing_is_compiled_twice_for_one_bucket(setup, tokenizer):
    generator = Generator(*setup, tokenizer, 2)

    def compiled():
        return [function._cache_size() for function in (generation._prefill, generation.decode, generation.empty_state)]

    def run(prompts):
        return list(generator.run(deque(enumerate(prompts)), max_new_tokens=20, stops=()))

    run(PROMPTS)
    before = compiled()
    run(["another", *MANY[3:4], *PROMPTS])
    assert compiled() == before
    run(["and so on, " * 60])
    assert compiled() == [size + 1 for size in before]


def test_stop_strings_and_length_end_a_continuation(setup, tokenizer):
    whole = continue_(setup, tokenizer, PROMPTS[:1])[0]
    stop = whole[5:8]
    assert continue_(setup, tokenizer, PROMPTS[:1], stops=("never", stop))[0] == whole[: whole.index(stop)]
    short = continue_(setup, tokenizer, PROMPTS[:1], max_new_tokens=3)[0]
    assert short == teacher_forced(setup, tokenizer, PROMPTS[0], 3) and len(short) < len(whole)


def test_end_of_sequence_ends_a_continuation(setup, tokenizer):
    graphdef, params = setup
    # Swapping two rows of the embedding turns the model's third token into the end-of-sequence token.
    prompt = PROMPTS[0]
    third = teacher_forced_ids(setup, tokenizer, prompt, 3)[2]
    embedding = params["embedding"]
    swapped = embedding.at[jnp.array([third, tokenizer.eos_id])].set(embedding[jnp.array([tokenizer.eos_id, third])])
    setup = graphdef, params | {"embedding": swapped}
    assert len(teacher_forced_ids(setup, tokenizer, prompt, 20)) < 20
    expected = teacher_forced(setup, tokenizer, prompt, 20)
    assert continue_(setup, tokenizer, [prompt])[0] == expected


def test_only_the_end_of_a_long_prompt_is_used(setup, tokenizer):
    ids = tokenizer.encode_prompt(MANY[4])
    expected = teacher_forced(setup, tokenizer, tokenizer.decode(ids[-7:]), 20)
    assert tokenizer.encode(tokenizer.decode(ids[-7:])) == ids[-7:]
    assert continue_(setup, tokenizer, [MANY[4]], max_prompt_tokens=7) == [expected]


def teacher_forced_logprobs(setup, tokenizer, prompt, token_ids):
    """Log-probabilities of tokens after a prompt, from one forward pass over the whole text."""
    ids = tokenizer.encode_prompt(prompt)
    padded = np.zeros((2, 1, LONGEST), np.int32)
    padded[0, 0, : len(ids) + len(token_ids)], padded[1, 0, : len(ids) + len(token_ids)] = [*ids, *token_ids], 1
    logprobs = jax.nn.log_softmax(all_logits(*setup, *padded)[0])
    return np.array(logprobs)[len(ids) - 1 + np.arange(len(token_ids)), token_ids]


def run_all(setup, tokenizer, prompts, rows=2, **options):
    """The continuations, ordered by number."""
    options = {"max_new_tokens": 20, "stops": (), **options}
    return sorted(Generator(*setup, tokenizer, rows).run(deque(enumerate(prompts)), **options))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=str)
def test_log_probabilities_equal_teacher_forcing(setup, tokenizer, sizes, temperature):
    """Those of the model, not of the distribution at the temperature."""
    with contextlib.ExitStack() as stack:
        placed = setup
        if sizes is not None:
            mesh = sharding.make_mesh(*sizes)
            stack.enter_context(jax.set_mesh(mesh))
            placed = setup[0], jax.device_put(setup[1], sharding.param_shardings(setup[1], mesh))
        continuations = run_all(placed, tokenizer, MANY, temperature=temperature)
    for (number, text, token_ids, logprobs), prompt in zip(continuations, MANY):
        expected = teacher_forced_logprobs(setup, tokenizer, prompt, token_ids)
        assert number == MANY.index(prompt) and len(token_ids) == len(logprobs) > 0
        assert tokenizer.decode(tokenizer.encode(prompt) + token_ids)[len(prompt) :] == text
        np.testing.assert_allclose(logprobs, expected, rtol=1e-4, atol=1e-4)


def test_tokens_end_before_the_end_of_sequence_and_with_the_stop_string(setup, tokenizer):
    prompt = PROMPTS[0]
    ids = teacher_forced_ids(setup, tokenizer, prompt, 20)
    ended = ids[: ids.index(ids[2])]
    embedding, swapped = setup[1]["embedding"], jnp.array([ids[2], tokenizer.eos_id])
    params = setup[1] | {"embedding": embedding.at[swapped].set(embedding[swapped[::-1]])}
    (continuation,) = run_all((setup[0], params), tokenizer, [prompt])
    assert continuation.token_ids == teacher_forced_ids((setup[0], params), tokenizer, prompt, 20)
    assert tokenizer.eos_id not in continuation.token_ids and len(continuation.logprobs) == len(ended) <= 2

    whole = tokenizer.decode(tokenizer.encode(prompt) + ids)[len(prompt) :]
    for stop in (whole[0], whole[5:8], whole[-1:]):
        (continuation,) = run_all(setup, tokenizer, [prompt], stops=("never", stop))
        length = len(continuation.token_ids)
        assert continuation.text == whole[: whole.index(stop)] and continuation.token_ids == ids[:length]
        texts = [tokenizer.decode(tokenizer.encode(prompt) + ids[:n])[len(prompt) :] for n in (length - 1, length)]
        assert stop not in texts[0] and stop in texts[1] and len(continuation.logprobs) == length


def test_the_first_of_several_end_of_sequence_tokens_ends_a_continuation(setup, tokenizer, tmp_path):
    ids = teacher_forced_ids(setup, tokenizer, PROMPTS[0], 20)
    (late,) = [token for token in ids[-1:] if ids.index(token) > ids.index(ids[2])]
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, late, ids[2]]}))
    (continuation,) = run_all(setup, Tokenizer(tmp_path), PROMPTS[:1])
    assert continuation.token_ids == ids[: ids.index(ids[2])]


def test_temperature_draws_by_seed(setup, tokenizer):
    drawn = [continue_(setup, tokenizer, PROMPTS, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != continue_(setup, tokenizer, PROMPTS)


def test_each_token_is_drawn_independently(setup, tokenizer):
    assert len(set(continue_(setup, tokenizer, PROMPTS[:1], temperature=1e6)[0])) > 9  # more letters than any piece has


def test_draws_do_not_depend_on_the_batch(setup, tokenizer):
    drawn = continue_(setup, tokenizer, PROMPTS, temperature=2.0)
    assert continue_(setup, tokenizer, PROMPTS, rows=1, temperature=2.0) == drawn
    assert len(set(continue_(setup, tokenizer, PROMPTS[:1] * 4, temperature=2.0))) == 4


def test_temperature_follows_the_models_probabilities(setup, tokenizer):
    """Compares the first tokens of many draws with the softmax of the logits."""
    graphdef, params = setup
    decoder, ids = nnx.merge(graphdef, params), tokenizer.encode(PROMPTS[0])
    hidden = decoder(jnp.array([ids]), jnp.ones((1, len(ids)), int))
    probabilities = jax.nn.softmax(hidden[0, -1] @ decoder.output_VD().T / 1.5)
    best = int(probabilities.argmax())
    drawn = continue_(setup, tokenizer, PROMPTS[:1] * 400, temperature=1.5, max_new_tokens=1)
    share = np.mean([text == tokenizer.decode([*ids, best])[len(PROMPTS[0]) :] for text in drawn])
    assert abs(share - float(probabilities[best])) < 0.08


def test_the_nucleus_reaches_prefill_and_decode(setup, tokenizer):
    """A nucleus of one token is greedy at any temperature, and nothing else is drawn from it."""
    greedy = continue_(setup, tokenizer, PROMPTS)
    assert continue_(setup, tokenizer, PROMPTS, temperature=2.0, top_p=1e-6) == greedy
    assert continue_(setup, tokenizer, PROMPTS, temperature=2.0) != greedy


def test_prompts_may_be_token_ids(setup, tokenizer):
    ids = [tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    expected = continue_(setup, tokenizer, PROMPTS)
    assert continue_(setup, tokenizer, ids) == continue_(setup, tokenizer, [PROMPTS[0], *ids[1:]]) == expected
    (cut,) = continue_(setup, tokenizer, ids[2:], max_prompt_tokens=7)
    assert [cut] == continue_(setup, tokenizer, PROMPTS[2:], max_prompt_tokens=7) != expected[2:]
    with pytest.raises(UserError, match="prompt 0 is empty"):
        continue_(setup, tokenizer, [[]])


def streamed(setup, tokenizer, prompts, stretch, rows=2, **options):
    """The pieces of each text in the order in which they came, and the texts."""
    pieces = [[] for _ in prompts]
    generator = Generator(*setup, tokenizer, rows, stretch=stretch, shortest=64)
    options = {
        "max_new_tokens": 20,
        "stops": (),
        "on_text": lambda number, text: pieces[number].append(text),
        **options,
    }
    texts = dict(answer[:2] for answer in generator.run(deque(enumerate(prompts)), **options))
    return pieces, [texts[number] for number in range(len(prompts))]


@pytest.mark.parametrize("stretch", [1, 3, 16])
def test_pieces_join_to_the_text_whatever_the_stretch(setup, tokenizer, stretch):
    pieces, texts = streamed(setup, tokenizer, MANY, stretch)
    assert texts == continue_(setup, tokenizer, MANY) == ["".join(parts) for parts in pieces]
    assert all(all(parts) for parts in pieces) and (stretch > 9 or max(map(len, pieces)) > 5)


def test_no_piece_shows_any_part_of_a_stop_string(setup, tokenizer):
    """Every piece is a beginning of the text before the stop string, also where the string begins and does not end."""
    whole = continue_(setup, tokenizer, PROMPTS[:1])[0]
    for start in range(1, len(whole) - 4):
        stops = [whole[start : start + 4], whole[0] + "never"]
        pieces, (text,) = streamed(setup, tokenizer, PROMPTS[:1], 1, rows=1, stops=stops)
        assert "".join(pieces[0]) == text == whole[: whole.index(stops[0])]


def replay(monkeypatch, ids):
    """Makes decoding give these token ids, whatever the model says."""
    decode, left = generation.decode, deque(ids)

    def replayed(*arguments, **options):
        state, tokens_BT, logprobs_BT = decode(*arguments, **options)
        return state, np.full_like(tokens_BT, left.popleft() if left else 0), logprobs_BT

    monkeypatch.setattr(generation, "decode", replayed)


def test_pieces_end_with_whole_characters(setup, tokenizer, monkeypatch):
    text = " so \u65e5\U0001f600 and"
    ids = tokenizer.encode(text)
    assert len(ids) == 3 + 7  # three pieces, and each byte of the two characters in the middle
    replay(monkeypatch, ids)
    pieces, (continued,) = streamed(setup, tokenizer, ["a"], 1, rows=1, max_new_tokens=len(ids))
    assert "".join(pieces[0]) == continued and continued.strip() == text.strip()
    assert "\u65e5" in pieces[0] and "\U0001f600" in pieces[0]


def test_half_a_character_at_the_end_is_shown_at_last(setup, tokenizer, monkeypatch):
    ids = tokenizer.encode("so \u65e5")[:-1]
    replay(monkeypatch, ids)
    pieces, (continued,) = streamed(setup, tokenizer, ["a"], 1, rows=1, max_new_tokens=len(ids))
    assert "".join(pieces[0]) == continued and continued.endswith("\ufffd") and "\ufffd" in pieces[0][-1]


def test_no_prompts_give_no_continuations(setup, tokenizer):
    assert list(Generator(*setup, tokenizer, 4).run(deque(), max_new_tokens=4, stops=())) == []


def test_an_empty_prompt_is_refused(setup, tokenizer):
    with pytest.raises(UserError, match="prompt 1 is empty"):
        continue_(setup, tokenizer, ["a", ""])
