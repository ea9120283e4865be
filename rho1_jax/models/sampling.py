"""The next token of each row: the likeliest one, or one drawn at a temperature from the nucleus of likely tokens.

Shapes: B rows, V vocabulary.
"""

import jax
import jax.numpy as jnp


def nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """The smallest set of likeliest tokens whose probabilities reach `top_p`, at least one in each row: bool [B, V].

    Of equally likely tokens, lower ids come first. Holtzman et al. 2019, arXiv 1904.09751, section 3.1.
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1))
    likelier_BV = jnp.cumsum(sorted_BV, axis=-1)[:, :-1]  # probability of all tokens before the second, the third, ...
    inside_BV = jnp.pad(likelier_BV < top_p, ((0, 0), (1, 0)), constant_values=True)
    return jnp.put_along_axis(jnp.zeros_like(inside_BV), order_BV, inside_BV, axis=-1, inplace=False)


def next_token(
    logits_BV: jax.Array, number_B: jax.Array, length_B: jax.Array, key: jax.Array, temperature: float, top_p: float
) -> tuple[jax.Array, jax.Array]:
    """Chooses the next token of each row.

    Args:
      logits_BV: float32 logits.
      number_B: number of each row's request. It seeds the draw with the length, whatever else is in the batch.
      length_B: number of tokens before the new one.
      key: random key for sampling.
      temperature: sampling temperature; 0 takes the likeliest token.
      top_p: sample from the `nucleus` at the temperature; 1: from all tokens.

    Returns:
      The tokens [B], and their log-probabilities [B] under the model. Temperature and nucleus do not change the latter.
    """

    def draw(number, length, logits_V):
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, number), length), logits_V)

    if temperature == 0:
        token_B = logits_BV.argmax(axis=-1)
    else:
        scaled_BV = logits_BV / temperature
        if top_p < 1:
            scaled_BV = jnp.where(nucleus(scaled_BV, top_p), scaled_BV, -jnp.inf)
        token_B = jax.vmap(draw)(number_B, length_B, scaled_BV)
    # A sum over the vocabulary keeps it sharded; indexing would gather the logits.
    is_token_BV = jnp.arange(logits_BV.shape[-1]) == token_B[:, None]
    return token_B, jnp.where(is_token_BV, logits_BV, 0).sum(axis=-1) - jax.nn.logsumexp(logits_BV, axis=-1)
