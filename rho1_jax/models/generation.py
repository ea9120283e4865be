"""Decoding with a key/value cache: a batch of rows, each of which takes the next prompt when its own has ended.

Prompts are padded on the left to one of a few lengths, and their keys and values are computed for a few rows at a time
(prefill). Then all rows decode a stretch of tokens together on the device. Between two stretches, the host looks for
continuations that have ended and fills their rows. The cache is a ring: all rows write the same position, no matter
where each of them began.

Shapes: B rows, P rows that are filled together, L padded prompt length, S positions of the cache, D model width,
H query heads, K key/value heads, C head width, V vocabulary, T tokens of one stretch.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rho1_jax.configs.default import ModelConfig
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.models.attention import cached_attention
from rho1_jax.models.decoder import Params, segment_positions
from rho1_jax.models.sampling import next_token
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.sharding import even_rows, replicate, shard_cache

STRETCH = 16  # tokens decoded between two looks at them
SHORTEST = 32  # lengths are multiples of this
PREFILL_TOKENS = 2048  # approximate number of tokens in the prompts that are filled together
TAIL = 8  # tokens at the end of a prompt that are detokenized together with its continuation

Prompt = str | list[int]  # a text, or its token ids, with BOS if the model needs it
Request = tuple[int, str]  # the caller's number for it, and the prompt


class Continuation(NamedTuple):
    """What a model generated after a prompt.

    Attributes:
      number: the request's.
      text: the continuation without its prompt and without the stop string.
      token_ids: the generated tokens, without the end-of-sequence token. If a stop string ended the continuation, they
        include it: the last token is the one that completed it.
      logprobs: log-probability of each of these tokens under the model, in nats, from float32 logits. The temperature
        does not change them.
    """

    number: int
    text: str
    token_ids: list[int]
    logprobs: list[float]


class State(NamedTuple):
    """The state of decoding between two tokens."""

    caches: list[tuple[jax.Array, jax.Array]]  # of each layer: keys [B, K, C, S], values [B, K, S, C]
    token_B: jax.Array  # newest token, which is not in the cache yet
    logprob_B: jax.Array  # its log-probability
    length_B: jax.Array  # number of tokens in the cache
    limit_B: jax.Array  # number of tokens that prompt and continuation may have together
    number_B: jax.Array  # number of the request; seeds draws that do not depend on the rest of the batch
    next: jax.Array  # position of the ring that all rows write next

    @property
    def positions(self) -> int:
        """The length S of the ring."""
        return self.caches[0][1].shape[2]


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def bucket(length: int, shortest: int = SHORTEST) -> int:
    """Rounds a length up to a multiple of `shortest` and by at most a quarter, so that few shapes are compiled."""
    step = max(shortest, 1 << max(0, (length - 1).bit_length() - 3))
    return _up(length, step)


@partial(jax.jit, static_argnames="graphdef")
def decoding_params(graphdef: nnx.GraphDef, params: Params) -> tuple[Params, list[Params]]:
    """The parameters for decoding: matrices in the compute dtype, and a list with each layer's parameters.

    In the first of the two trees, layer 0 replaces the stacked layers.
    """
    config = nnx.merge(graphdef, params).config

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(config.compute_dtype) if x.ndim > 1 else x

    layers = [jax.tree.map(lambda x, n=n: cast(x[n]), params["layers"]) for n in range(config.layers)]
    return jax.tree.map(cast, params | {"layers": layers[0]}), layers


@partial(jax.jit, static_argnames=("config", "rows", "positions"))
def empty_state(config: ModelConfig, rows: int, positions: int) -> State:
    """A state with `rows` rows without a request, and a cache of `positions` positions."""
    shape = rows, config.kv_heads, config.head_width, positions
    keys = [shard_cache(jnp.zeros(shape, config.compute_dtype)) for _ in range(config.layers)]
    none_B = jnp.zeros(rows, jnp.int32)
    caches = [(k, k.swapaxes(2, 3)) for k in keys]
    return State(caches, none_B, jnp.zeros(rows, jnp.float32), none_B, none_B, none_B, jnp.int32(0))


@partial(jax.jit, static_argnames=("graphdef", "temperature", "top_p"), donate_argnames="state")
def _prefill(graphdef, params, state, tokens_PL, segment_ids_PL, slot_P, number_P, limit_P, key, *, temperature, top_p):
    """Writes prompts into the rows `slot_P` of the cache. A prompt whose row does not exist is dropped."""
    outer, layers = params
    model, caches = nnx.merge(graphdef, outer), list(state.caches)
    L, S = tokens_PL.shape[1], state.positions

    def written(cache, new_PLKC, axes):
        # The last token of each prompt goes just before the position that is written next.
        ring = jnp.roll(jnp.pad(new_PLKC, ((0, 0), (0, S - L), (0, 0), (0, 0))), state.next - L, axis=1)
        return shard_cache(cache.at[slot_P].set(ring.transpose(axes), mode="drop"))

    def mix(n, q_PLHC, k_PLKC, v_PLKC):
        k_BKCS, v_BKSC = caches[n]
        caches[n] = written(k_BKCS, k_PLKC, (0, 2, 3, 1)), written(v_BKSC, v_PLKC, (0, 2, 1, 3))
        return model.mix_within(segment_ids_PL, model.structure.kind(model.config, n).window)(q_PLHC, k_PLKC, v_PLKC)

    positions_PL = segment_positions(segment_ids_PL)
    hidden_PLD = model.layer_by_layer(layers, tokens_PL, positions_PL, limit_P, mix, decoding=False)
    length_P = segment_ids_PL.sum(axis=1)
    logits_PV = model.logits(hidden_PLD[:, -1])
    token_P, logprob_P = next_token(logits_PV, number_P, length_P, key, temperature, top_p)

    def filled(old_B, new_P):
        return old_B.at[slot_P].set(new_P, mode="drop")

    return State(
        caches,
        filled(state.token_B, token_P),
        filled(state.logprob_B, logprob_P),
        filled(state.length_B, length_P),
        filled(state.limit_B, limit_P),
        filled(state.number_B, number_P),
        state.next,
    )


@partial(jax.jit, static_argnames=("graphdef", "temperature", "top_p", "stretch"), donate_argnames="state")
def decode(
    graphdef: nnx.GraphDef,
    params: tuple[Params, list[Params]],
    state: State,
    key: jax.Array,
    *,
    temperature: float,
    top_p: float = 1.0,
    stretch: int = STRETCH,
) -> tuple[State, jax.Array, jax.Array]:
    """Decodes more tokens of each row.

    Args:
      graphdef: structure of the model.
      params: from `decoding_params`.
      state: donated.
      key: random key for sampling.
      temperature: sampling temperature; 0 takes the likeliest token.
      top_p: probability of the tokens to sample from, see `sampling.nucleus`.
      stretch: number T of tokens.

    Returns:
      The state afterwards, the tokens [B, T] and their log-probabilities [B, T] in nats. They begin with the newest
      token of the state before, and the newest token of the state afterwards is not among them.
    """
    outer, layers = params
    model, S = nnx.merge(graphdef, outer), state.positions
    structure = model.structure

    def decode_token(state, _):
        caches = list(state.caches)
        age_S = (state.next - jnp.arange(S)) % S  # tokens ago
        visible_by_window = {
            window: (age_S <= state.length_B[:, None]) & (age_S < min(S, window or S)) for window in structure.windows
        }

        def mix(n, q_B1HC, k_B1KC, v_B1KC):
            k_BKCS, v_BKSC = caches[n]
            k_BKCS = jax.lax.dynamic_update_slice_in_dim(k_BKCS, k_B1KC.transpose(0, 2, 3, 1), state.next, axis=3)
            v_BKSC = jax.lax.dynamic_update_slice_in_dim(v_BKSC, v_B1KC.swapaxes(1, 2), state.next, axis=2)
            caches[n] = shard_cache(k_BKCS), shard_cache(v_BKSC)
            visible_BS = visible_by_window[structure.kind(model.config, n).window]
            scale, soft_cap = structure.query_scale, structure.attention_soft_cap
            return cached_attention(q_B1HC[:, 0], k_BKCS, v_BKSC, visible_BS, scale, soft_cap)[:, None]

        token_B1, length_B1 = state.token_B[:, None], state.length_B[:, None]
        hidden_B1D = model.layer_by_layer(layers, token_B1, length_B1, state.limit_B, mix, decoding=True)
        length_B, number_B, last = state.length_B + 1, state.number_B, (state.token_B, state.logprob_B)
        logits_BV = model.logits(hidden_B1D[:, 0])
        token_B, logprob_B = next_token(logits_BV, number_B, length_B, key, temperature, top_p)
        return State(caches, token_B, logprob_B, length_B, state.limit_B, number_B, (state.next + 1) % S), last

    state, (tokens_TB, logprobs_TB) = jax.lax.scan(decode_token, state, length=stretch)
    return state, replicate(tokens_TB.T), replicate(logprobs_TB.T)


@partial(jax.jit, static_argnames="positions")
def _grow(state: State, *, positions: int) -> State:
    """The state with a longer ring. Its old content moves to the beginning, in the order of writing."""

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
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reported: int = 0  # characters given to `on_text`


def _final(text: str, stops: Sequence[str]) -> int:
    """The number of characters that no later token changes: those before half a character, or half a stop string."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    parts = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return len(text) - max(parts, default=0)


class Generator:
    """Continues prompts with one model, `rows` of them at a time."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Params,
        tokenizer: Tokenizer,
        rows: int,
        stretch: int = STRETCH,
        shortest: int = SHORTEST,
    ):
        """Copies the parameters into the form that decoding needs.

        Args:
          graphdef: structure of the model.
          params: its parameters.
          tokenizer: of the model.
          rows: number of rows in the batch, rounded up to a multiple of the mesh's data-parallel size.
          stretch: number of tokens decoded between two looks at them. With fewer, text arrives more often.
          shortest: lengths are rounded up to multiples of this. With a larger number, fewer shapes are compiled.
        """
        self._graphdef, self._tokenizer = graphdef, tokenizer
        self._config = nnx.merge(graphdef, params).config
        self._params = decoding_params(graphdef, params)
        self._rows, self._stretch, self._shortest = even_rows(rows), stretch, shortest

    def run(
        self,
        requests: deque[Request] | deque[tuple[int, Prompt]],
        *,
        max_new_tokens: int,
        stops: Sequence[str],
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        max_prompt_tokens: int | None = None,
        on_tokens: Callable[[int], None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[Continuation]:
        """Continues each prompt until an end-of-sequence token, a stop string, or `max_new_tokens`.

        Args:
          requests: the prompts, taken from the left. The caller may add more between two continuations.
          max_new_tokens: maximum number of tokens to generate for each prompt.
          stops: strings that end a continuation and are not part of its text.
          temperature: sampling temperature; 0 takes the likeliest token.
          top_p: sample from the fewest tokens whose probabilities reach this; 1 samples from all.
          seed: seed for sampling. A continuation does not depend on the rest of the batch.
          max_prompt_tokens: a longer prompt keeps only this many tokens at its end.
          on_tokens: called after each stretch with the number of tokens decoded.
          on_text: called after each stretch with the number of a request and its new text, if there is any. The pieces
            join to the text of its continuation. Each ends with a whole character, and none holds a stop string or a
            part of one.

        Yields:
          The continuations, in the order in which they end.

        Raises:
          UserError: a prompt is empty.
        """
        if not requests:
            return
        key, room = jax.random.key(seed), _up(max_new_tokens, self._stretch)
        sampling = {"temperature": temperature, "top_p": top_p}
        longest = max((prompt for _, prompt in requests), key=len)
        length = self._bucket(max(1, len(self._ids(longest, max_prompt_tokens))))
        together = max(1, min(PREFILL_TOKENS // length, self._rows // 8))
        width = even_rows(together)
        state = empty_state(self._config, self._rows, self._bucket(length + room))
        rows: list[_Row | None] = [None] * self._rows
        while requests or any(rows):
            free = [slot for slot, row in enumerate(rows) if row is None]
            while requests and len(free) >= min(together, len(requests)):
                new = []
                for _ in range(min(width, len(free), len(requests))):
                    number, prompt = requests.popleft()
                    ids = self._ids(prompt, max_prompt_tokens)
                    if not ids:
                        raise UserError(f"prompt {number} is empty: there is nothing to continue")
                    new.append(_Row(number, ids))
                slots, free = free[: len(new)], free[len(new) :]
                state = self._read(state, new, slots, width, max_new_tokens, key, sampling)
                for slot, added in zip(slots, new):
                    rows[slot] = added
            state, *stretch = decode(self._graphdef, self._params, state, key, **sampling, stretch=self._stretch)
            tokens_BT, logprobs_BT = (np.asarray(x_BT).tolist() for x_BT in stretch)
            if on_tokens:
                on_tokens(self._stretch * sum(row is not None for row in rows))
            for slot, row in enumerate(rows):
                if row is not None:
                    text, ended = self._extend(row, tokens_BT[slot], logprobs_BT[slot], max_new_tokens, stops)
                    final = len(text) if ended or not on_text else _final(text, stops)
                    if on_text and final > row.reported:
                        on_text(row.number, text[row.reported : final])
                        row.reported = final
                    if ended:
                        rows[slot] = None
                        yield Continuation(row.number, text, row.new_ids, row.logprobs[: len(row.new_ids)])

    def _bucket(self, length: int) -> int:
        return bucket(length, self._shortest)

    def _ids(self, prompt: Prompt, limit: int | None) -> list[int]:
        """The token ids of a prompt, or the last `limit` of them."""
        ids = self._tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        return ids[-(limit or 0) :]

    def _read(self, state, new, slots, width, max_new_tokens, key, sampling) -> State:
        """The state with new requests in free slots."""
        L, room = self._bucket(max(len(row.ids) for row in new)), _up(max_new_tokens, self._stretch)
        if self._bucket(L + room) > state.positions:
            state = _grow(state, positions=self._bucket(L + room))
        tokens_PL, segment_ids_PL = np.zeros((2, width, L), np.int32)
        slot_P = np.full(width, self._rows, np.int32)
        number_P, limit_P = np.zeros((2, width), np.int32)
        for index, (row, slot) in enumerate(zip(new, slots)):
            tokens_PL[index, L - len(row.ids) :] = row.ids
            segment_ids_PL[index, L - len(row.ids) :] = 1
            slot_P[index], number_P[index], limit_P[index] = slot, row.number, len(row.ids) + max_new_tokens
        arrays = tokens_PL, segment_ids_PL, slot_P, number_P, limit_P
        return _prefill(self._graphdef, self._params, state, *arrays, key, **sampling)

    def _extend(self, row, tokens, logprobs, max_new_tokens, stops) -> tuple[str, bool]:
        """Adds a stretch to a row. Returns the row's text, and True if it has ended."""
        before = len(row.new_ids)
        row.new_ids, row.logprobs = (row.new_ids + tokens)[:max_new_tokens], row.logprobs + logprobs
        ends = [row.new_ids.index(eos_id) for eos_id in self._tokenizer.eos_ids if eos_id in row.new_ids]
        ended = bool(ends)
        if ended:
            row.new_ids = row.new_ids[: min(ends)]
        text = self._text(row, len(row.new_ids))
        if not any(stop in text for stop in stops):
            return text, ended or len(row.new_ids) == max_new_tokens
        # Cut the tokens after the one that completed the stop string.
        lengths = range(before + 1, len(row.new_ids))
        stopped = (n for n in lengths if any(stop in self._text(row, n) for stop in stops))
        row.new_ids = row.new_ids[: next(stopped, len(row.new_ids))]
        return text[: min(text.find(stop) for stop in stops if stop in text)], True

    def _text(self, row, length: int) -> str:
        """The text of the first `length` tokens generated for a row."""
        tail = row.ids[-TAIL:]
        return self._tokenizer.decode(tail + row.new_ids[:length])[len(self._tokenizer.decode(tail)) :]
