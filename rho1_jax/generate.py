"""Batched greedy and temperature decoding with a key/value cache.

Prompts are padded on the left, so that every row writes the same cache position. Decoding runs in stretches of
`STRETCH` tokens on the device; between two of them the host looks for stop strings.

Shapes: B prompts, L padded prompt length, S cache positions, V vocabulary, T tokens of one stretch.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.model import Cache, ModelConfig, Params
from rho1_jax.sharding import replicate

STRETCH = 16
PROMPT_MULTIPLE = 32  # prompt lengths are rounded up to this, so that few shapes are compiled


def empty_cache(config: ModelConfig, rows: int, positions: int) -> Cache:
    """A cache for `rows` sequences of at most `positions` tokens."""
    shape = (config.layers, rows, positions, config.kv_heads, config.head_width)
    zeros = jnp.zeros(shape, config.compute_dtype)
    return Cache(zeros, zeros, jnp.zeros((rows, positions), jnp.int32), jnp.zeros((), jnp.int32))


def _next_token(model, hidden_BD: jax.Array, temperature: float, key: jax.Array) -> jax.Array:
    output_VD = model.output_VD().astype(hidden_BD.dtype)
    logits_BV = jnp.einsum("BD,VD->BV", hidden_BD, output_VD, preferred_element_type=jnp.float32)
    if temperature == 0:
        return logits_BV.argmax(axis=-1)
    return jax.random.categorical(key, logits_BV / temperature)


@partial(jax.jit, static_argnames=("graphdef", "positions", "temperature"))
def _prefill(graphdef, params, tokens_BL, segment_ids_BL, key, *, positions, temperature):
    model = nnx.merge(graphdef, params)
    cache = empty_cache(model.config, tokens_BL.shape[0], positions)
    hidden_BLD, cache = model(tokens_BL, segment_ids_BL, cache)
    return replicate(_next_token(model, hidden_BLD[:, -1], temperature, key)), cache


@partial(jax.jit, static_argnames=("graphdef", "temperature"), donate_argnames="cache")
def _decode(graphdef, params, token_B, cache, key, *, temperature):
    model = nnx.merge(graphdef, params)
    ones_B1 = jnp.ones((token_B.shape[0], 1), jnp.int32)

    def one(carry, key):
        token_B, cache = carry
        hidden_B1D, cache = model(token_B[:, None], ones_B1, cache)
        return (_next_token(model, hidden_B1D[:, -1], temperature, key), cache), token_B

    (token_B, cache), tokens_TB = jax.lax.scan(one, (token_B, cache), jax.random.split(key, STRETCH))
    return token_B, cache, replicate(tokens_TB.T)


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before its first stop string, and whether there was one."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def generate(
    graphdef: nnx.GraphDef,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stops: Sequence[str],
    temperature: float = 0.0,
    seed: int = 0,
    max_prompt_tokens: int | None = None,
) -> list[str]:
    """Continues each prompt until the end-of-sequence token, a stop string, or `max_new_tokens`.

    Args:
      graphdef: structure of the model.
      params: its parameters.
      tokenizer: of the model.
      prompts: texts to continue, all in one batch.
      max_new_tokens: most tokens to add.
      stops: strings that end a continuation; they are not part of it.
      temperature: 0 takes the likeliest token; otherwise tokens are drawn at this temperature.
      seed: of the draws.
      max_prompt_tokens: of longer prompts, only so many tokens at their end are used.

    Returns:
      The continuations, without their prompts.
    """
    ids = [tokenizer.encode_prompt(prompt)[-(max_prompt_tokens or 0) :] for prompt in prompts]
    if not all(ids):
        raise ValueError(f"prompt {ids.index([])} is empty: there is nothing to continue")
    length = -(-max(map(len, ids)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens_BL = np.zeros((len(ids), length), np.int32)
    segment_ids_BL = np.zeros_like(tokens_BL)
    for row, prompt_ids in enumerate(ids):
        tokens_BL[row, length - len(prompt_ids) :] = prompt_ids
        segment_ids_BL[row, length - len(prompt_ids) :] = 1
    stretches = -(-max_new_tokens // STRETCH)
    positions = length + stretches * STRETCH
    keys = jax.random.split(jax.random.key(seed), stretches + 1)
    token_B, cache = _prefill(
        graphdef, params, tokens_BL, segment_ids_BL, keys[0], positions=positions, temperature=temperature
    )
    new_ids: list[list[int]] = [[] for _ in ids]
    texts, done = [""] * len(ids), [False] * len(ids)
    for key in keys[1:]:
        token_B, cache, new_BT = _decode(graphdef, params, token_B, cache, key, temperature=temperature)
        for row, stretch in enumerate(np.asarray(new_BT).tolist()):
            if done[row]:
                continue
            new_ids[row] = (new_ids[row] + stretch)[:max_new_tokens]
            ended = tokenizer.eos_id in new_ids[row]
            if ended:
                new_ids[row] = new_ids[row][: new_ids[row].index(tokenizer.eos_id)]
            before = tokenizer.decode(ids[row])
            texts[row], stopped = _cut(tokenizer.decode(ids[row] + new_ids[row])[len(before) :], stops)
            done[row] = ended or stopped
        if all(done):
            break
    return texts
