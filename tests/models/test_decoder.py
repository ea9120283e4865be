"""The decoder: which tokens see which, and positions."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import TINY, random_batch, tiny

from rho1_jax.models import decoder


def run(config, params, tokens, segment_ids):
    return nnx.merge(decoder.build(config), params)(jnp.asarray(tokens), jnp.asarray(segment_ids))


def test_a_document_does_not_change_the_states_of_another(params):
    tokens, segment_ids = np.arange(1, 25)[None] % 64, np.array([[1] * 9 + [2] * 15])
    hidden = run(TINY, params[0], tokens, segment_ids)
    changed = run(TINY, params[0], np.where(segment_ids == 1, tokens + 7, tokens), segment_ids)
    np.testing.assert_array_equal(hidden[segment_ids == 2], changed[segment_ids == 2])
    assert not np.allclose(hidden[segment_ids == 1], changed[segment_ids == 1])


def test_a_later_token_does_not_change_an_earlier_state(params):
    tokens, segment_ids = np.arange(1, 17)[None], np.ones((1, 16), int)
    changed = tokens.copy()
    changed[0, 10] = 50
    before, after = run(TINY, params[0], tokens, segment_ids), run(TINY, params[0], changed, segment_ids)
    np.testing.assert_array_equal(before[:, :10], after[:, :10])
    assert not np.allclose(before[:, 10:], after[:, 10:])


def test_a_document_has_the_same_states_anywhere_in_a_row(params):
    """Positions restart at each document."""
    document, other = np.arange(20, 28), np.arange(40, 45)
    alone = run(TINY, params[0], document[None], np.ones((1, 8), int))
    packed = run(TINY, params[0], np.concatenate([other, document])[None], np.array([[1] * 5 + [2] * 8]))
    np.testing.assert_allclose(alone[0], packed[0, 5:], rtol=1e-4, atol=1e-5)


def test_segment_positions():
    segments = jnp.array([[3, 3, 4, 4, 4, 0], [1, 1, 1, 1, 2, 3]])
    np.testing.assert_array_equal(decoder.segment_positions(segments), [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 0]])


def test_sliding_window_hides_older_tokens(params):
    config = tiny(sliding_window=3, layers=1)
    one_layer = decoder.init_params(config, 0)
    tokens = np.arange(1, 13)[None]
    changed = np.where(np.arange(12) == 4, 60, tokens)
    moved = np.abs(
        run(config, one_layer, tokens, np.ones((1, 12), int)) - run(config, one_layer, changed, np.ones((1, 12), int))
    )
    assert np.flatnonzero(moved.max(axis=-1)[0] > 1e-6).tolist() == [4, 5, 6]


def test_remat_and_unrolling_change_nothing_and_tying_drops_the_head():
    batch = random_batch(2, 12)
    params = decoder.init_params(TINY, 0)
    plain = run(TINY, params, batch.tokens, batch.segment_ids)
    for changes in ({"remat": "full"}, {"remat": "dots"}, {"unroll": 2}):
        same = run(tiny(**changes), params, batch.tokens, batch.segment_ids)
        np.testing.assert_allclose(plain, same, rtol=1e-5, atol=1e-6)
    assert "head" not in params
    assert decoder.abstract_params(tiny(tied_embeddings=False))["head"].shape == (64, 32)


def test_master_weights_are_float32_in_any_compute_dtype():
    config = tiny(compute_dtype="bfloat16")
    params = decoder.init_params(config, 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert run(config, params, np.ones((1, 4), int), np.ones((1, 4), int)).dtype == jnp.bfloat16
