"""Decoding with a key/value cache: a batch of rows, each of which takes the next prompt when its own has ended.

Prompts are padded on the left to one of a few lengths, and their keys and values are computed for a few rows at a time
(prefill). Then all rows decode together, STRETCH tokens on the device; between two stretches the host looks for ends
and fills the free rows. The cache is a ring: all rows write the same position, wherever each of them began.

Shapes: B rows, P rows that are filled together, L padded prompt length, S positions of the cache, D model width,
H query heads, K key/value heads, C head width, V vocabulary, T tokens of one stretch.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rho1_jax.configs.default import ModelConfig
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.models.attention import cached_attention
from rho1_jax.models.decoder import Decoder, Params, segment_positions
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.sharding import even_rows, replicate, shard_cache

STRETCH = 16
SHORTEST = 32  # lengths are multiples of it
PREFILL_TOKENS = 2048  # of prompts that are filled together, about
TAIL = 8  # tokens of a prompt that the text of its continuation is decoded with

Request = tuple[int, str]  # a number that the caller knows it by, and the prompt


class State(NamedTuple):
    """What decoding carries from token to token."""

    caches: list[tuple[jax.Array, jax.Array]]  # of each layer: keys [B, K, C, S], values [B, K, S, C]
    token_B: jax.Array  # the newest, which is not in the cache yet
    length_B: jax.Array  # tokens that are
    number_B: jax.Array  # of the request, for draws that do not depend on what else is in the batch
    next: jax.Array  # position of the ring that all rows write next

    @property
    def positions(self) -> int:
        """S, the length of the ring."""
        return self.caches[0][1].shape[2]


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def bucket(length: int) -> int:
    """A length rounded up, so that few shapes are compiled: by a quarter at most, and to a multiple of SHORTEST."""
    step = max(SHORTEST, 1 << max(0, (length - 1).bit_length() - 3))
    return _up(length, step)


@partial(jax.jit, static_argnames="graphdef")
def decoding_params(graphdef: nnx.GraphDef, params: Params) -> tuple[Params, list[Params]]:
    """The parameters as decoding reads them: matrices in the compute dtype, and a list of each layer by itself.

    In the first of the two, layer 0 stands in the place of all.
    """
    config = nnx.merge(graphdef, params).config

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(config.compute_dtype) if x.ndim > 1 else x

    layers = [jax.tree.map(lambda x, n=n: cast(x[n]), params["layers"]) for n in range(config.layers)]
    return jax.tree.map(cast, params | {"layers": layers[0]}), layers


@partial(jax.jit, static_argnames=("config", "rows", "positions"))
def empty_state(config: ModelConfig, rows: int, positions: int) -> State:
    """A state of so many rows, none of which has a request, and so many positions of the cache."""
    shape = rows, config.kv_heads, config.head_width, positions
    keys = [shard_cache(jnp.zeros(shape, config.compute_dtype)) for _ in range(config.layers)]
    none_B = jnp.zeros(rows, jnp.int32)
    return State([(k, k.swapaxes(2, 3)) for k in keys], none_B, none_B, none_B, jnp.int32(0))


def _next_token(model: Decoder, hidden_BD, number_B, length_B, key, temperature: float) -> jax.Array:
    """The likeliest token, or one drawn with a key of its own for each request and length."""
    logits_BV = model.logits(hidden_BD)
    if temperature == 0:
        return logits_BV.argmax(axis=-1)

    def draw(number, length, logits_V):
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, number), length), logits_V)

    return jax.vmap(draw)(number_B, length_B, logits_BV / temperature)


@partial(jax.jit, static_argnames=("graphdef", "temperature"), donate_argnames="state")
def _prefill(graphdef, params, state, tokens_PL, segment_ids_PL, slot_P, number_P, key, *, temperature):
    """Reads prompts into the rows `slot_P` of the cache; those of a row that does not exist are dropped."""
    outer, layers = params
    model, caches = nnx.merge(graphdef, outer), []
    attend, before = model.mix_within(segment_ids_PL), iter(state.caches)
    L, S = tokens_PL.shape[1], state.positions

    def written(cache, new_PLKC, axes):
        # The last token of each prompt goes before the position that is written next.
        ring = jnp.roll(jnp.pad(new_PLKC, ((0, 0), (0, S - L), (0, 0), (0, 0))), state.next - L, axis=1)
        return shard_cache(cache.at[slot_P].set(ring.transpose(axes), mode="drop"))

    def mix(q_PLHC, k_PLKC, v_PLKC):
        k_BKCS, v_BKSC = next(before)
        caches.append((written(k_BKCS, k_PLKC, (0, 2, 3, 1)), written(v_BKSC, v_PLKC, (0, 2, 1, 3))))
        return attend(q_PLHC, k_PLKC, v_PLKC)

    hidden_PLD = model.layer_by_layer(layers, tokens_PL, segment_positions(segment_ids_PL), mix)
    length_P = segment_ids_PL.sum(axis=1)
    token_P = _next_token(model, hidden_PLD[:, -1], number_P, length_P, key, temperature)

    def filled(old_B, new_P):
        return old_B.at[slot_P].set(new_P, mode="drop")

    return State(
        caches,
        filled(state.token_B, token_P),
        filled(state.length_B, length_P),
        filled(state.number_B, number_P),
        state.next,
    )


@partial(jax.jit, static_argnames=("graphdef", "temperature"), donate_argnames="state")
def decode(
    graphdef: nnx.GraphDef, params: tuple[Params, list[Params]], state: State, key: jax.Array, *, temperature: float
) -> tuple[State, jax.Array]:
    """The state after STRETCH more tokens of each row, and these tokens, [B, T], beginning with the newest it had.

    Args:
      graphdef: structure of the model.
      params: of `decoding_params`.
      state: given away.
      key: of the draws.
      temperature: 0: no draws.
    """
    outer, layers = params
    model, S = nnx.merge(graphdef, outer), state.positions
    reach = min(S, model.config.sliding_window or S)

    def one(state, _):
        caches, before = [], iter(state.caches)
        age_S = (state.next - jnp.arange(S)) % S  # tokens ago
        visible_BS = (age_S <= state.length_B[:, None]) & (age_S < reach)

        def mix(q_B1HC, k_B1KC, v_B1KC):
            k_BKCS, v_BKSC = next(before)
            k_BKCS = jax.lax.dynamic_update_slice_in_dim(k_BKCS, k_B1KC.transpose(0, 2, 3, 1), state.next, axis=3)
            v_BKSC = jax.lax.dynamic_update_slice_in_dim(v_BKSC, v_B1KC.swapaxes(1, 2), state.next, axis=2)
            caches.append((shard_cache(k_BKCS), shard_cache(v_BKSC)))
            return cached_attention(q_B1HC[:, 0], k_BKCS, v_BKSC, visible_BS)[:, None]

        hidden_B1D = model.layer_by_layer(layers, state.token_B[:, None], state.length_B[:, None], mix)
        length_B = state.length_B + 1
        token_B = _next_token(model, hidden_B1D[:, 0], state.number_B, length_B, key, temperature)
        return State(caches, token_B, length_B, state.number_B, (state.next + 1) % S), state.token_B

    state, tokens_TB = jax.lax.scan(one, state, length=STRETCH)
    return state, replicate(tokens_TB.T)


@partial(jax.jit, static_argnames="positions")
def _grow(state: State, *, positions: int) -> State:
    """The state with a longer ring: what it holds stands at its beginning, in the order of writing."""

    def grown(cache, axis):
        padding = [(0, positions - state.positions if number == axis else 0) for number in range(4)]
        return shard_cache(jnp.pad(jnp.roll(cache, -state.next, axis), padding))

    caches = [(grown(k_BKCS, 3), grown(v_BKSC, 2)) for k_BKCS, v_BKSC in state.caches]
    return state._replace(caches=caches, next=jnp.int32(state.positions))


@dataclasses.dataclass
class _Row:
    """A request in the batch."""

    number: int
    ids: list[int]  # of the prompt
    new_ids: list[int] = dataclasses.field(default_factory=list)


class Generator:
    """Continues prompts with one model, so many at a time."""

    def __init__(self, graphdef: nnx.GraphDef, params: Params, tokenizer: Tokenizer, rows: int):
        """Takes a copy of the parameters, as decoding reads them.

        Args:
          graphdef: structure of the model.
          params: its parameters.
          tokenizer: of the model.
          rows: of the batch; rounded up to what the mesh can spread.
        """
        self._graphdef, self._tokenizer = graphdef, tokenizer
        self._config = nnx.merge(graphdef, params).config
        self._params = decoding_params(graphdef, params)
        self._rows = even_rows(rows)

    def run(
        self,
        requests: deque[Request],
        *,
        max_new_tokens: int,
        stops: Sequence[str],
        temperature: float = 0.0,
        seed: int = 0,
        max_prompt_tokens: int | None = None,
    ) -> Iterator[Request]:
        """Continues each prompt until the end-of-sequence token, a stop string, or `max_new_tokens`.

        Args:
          requests: what to continue, taken from the left. The caller may add to it between two continuations.
          max_new_tokens: most tokens to add.
          stops: strings that end a continuation; they are not part of it.
          temperature: 0 takes the likeliest token; otherwise tokens are drawn at this temperature.
          seed: of the draws, which are the same whatever else is in the batch.
          max_prompt_tokens: of longer prompts, only so many tokens at their end are used.

        Yields:
          Number and continuation, without its prompt, as each ends.

        Raises:
          UserError: a prompt is empty.
        """
        key, room = jax.random.key(seed), _up(max_new_tokens, STRETCH)
        longest = max((prompt for _, prompt in requests), key=len, default="")
        length = bucket(len(self._tokenizer.encode_prompt(longest)[-(max_prompt_tokens or 0) :]))
        together = max(1, min(PREFILL_TOKENS // length, self._rows // 8))
        width = even_rows(together)
        state = empty_state(self._config, self._rows, bucket(length + room))
        rows: list[_Row | None] = [None] * self._rows
        while requests or any(rows):
            free = [slot for slot, row in enumerate(rows) if row is None]
            while requests and len(free) >= min(together, len(requests)):
                new = []
                for _ in range(min(width, len(free), len(requests))):
                    number, prompt = requests.popleft()
                    ids = self._tokenizer.encode_prompt(prompt)[-(max_prompt_tokens or 0) :]
                    if not ids:
                        raise UserError(f"prompt {number} is empty: there is nothing to continue")
                    new.append(_Row(number, ids))
                slots, free = free[: len(new)], free[len(new) :]
                state = self._read(state, new, slots, width, room, key, temperature)
                for slot, added in zip(slots, new):
                    rows[slot] = added
            state, tokens_BT = decode(self._graphdef, self._params, state, key, temperature=temperature)
            for slot, (row, stretch) in enumerate(zip(rows, np.asarray(tokens_BT).tolist())):
                if row is not None:
                    text, ended = self._extend(row, stretch, max_new_tokens, stops)
                    if ended:
                        rows[slot] = None
                        yield row.number, text

    def _read(self, state, new, slots, width, room, key, temperature) -> State:
        """The state with new requests in free slots."""
        L = bucket(max(len(row.ids) for row in new))
        if bucket(L + room) > state.positions:
            state = _grow(state, positions=bucket(L + room))
        tokens_PL, segment_ids_PL = np.zeros((2, width, L), np.int32)
        slot_P, number_P = np.full(width, self._rows, np.int32), np.zeros(width, np.int32)
        for index, (row, slot) in enumerate(zip(new, slots)):
            tokens_PL[index, L - len(row.ids) :] = row.ids
            segment_ids_PL[index, L - len(row.ids) :] = 1
            slot_P[index], number_P[index] = slot, row.number
        arrays = tokens_PL, segment_ids_PL, slot_P, number_P
        return _prefill(self._graphdef, self._params, state, *arrays, key, temperature=temperature)

    def _extend(self, row, stretch, max_new_tokens, stops) -> tuple[str, bool]:
        """The text of a row with some more tokens, and whether it has ended."""
        row.new_ids = (row.new_ids + stretch)[:max_new_tokens]
        ended = self._tokenizer.eos_id in row.new_ids
        if ended:
            row.new_ids = row.new_ids[: row.new_ids.index(self._tokenizer.eos_id)]
        tail = row.ids[-TAIL:]
        text = self._tokenizer.decode(tail + row.new_ids)[len(self._tokenizer.decode(tail)) :]
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        return (text[: min(found)], True) if found else (text, ended or len(row.new_ids) == max_new_tokens)
