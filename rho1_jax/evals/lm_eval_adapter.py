"""Run a model under lm-eval, for the paper's general benchmarks (needs the extra `eval`, but no PyTorch).

Shapes: B requests, L tokens, M = L + 1, n chunks, c positions in a chunk, D model width, V vocabulary.
"""

import sys
from collections import defaultdict, deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.models.decoder import Params
from rho1_jax.models.generation import Generator
from rho1_jax.models.structure import soft_cap
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.progress import Progress
from rho1_jax.runtime.sharding import batch_sharding, even_rows, replicate

LENGTH_MULTIPLE = 64  # lengths are rounded up to a multiple of this, so that few shapes are compiled
CHUNK = 64  # positions whose logits are computed at a time
MAX_NEW_TOKENS = 256  # default for tasks that set no limit


class LanguageModel(TemplateLM):
    """The model interface of lm-eval, on a mesh. Requests of similar length are batched together."""

    def __init__(self, graphdef: nnx.GraphDef, params: Params, tokenizer: Tokenizer, mesh: Mesh, batch_size: int):
        super().__init__()
        self._graphdef, self._params, self._tokenizer, self._mesh = graphdef, params, tokenizer, mesh
        self._batch_size = even_rows(batch_size)
        self._max_length = nnx.merge(graphdef, params).config.context_length
        self._score = jax.jit(_make_score(graphdef))

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: BOS, or EOS if the tokenizer adds no BOS."""
        return (self._tokenizer.prefix() or [self._tokenizer.eos_id])[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, after the tokenizer's BOS unless `add_special_tokens` is False."""
        if add_special_tokens is False:
            return self._tokenizer.encode(string)
        return self._tokenizer.encode_prompt(string)

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, in nats, and whether greedy decoding would produce it.

        Raises:
          UserError: a continuation has no token of its own, or more than the model's context_length.
        """
        for context, continuation in (request.args for request in requests):
            if not context and not self.tok_encode(continuation, add_special_tokens=False):
                raise _nothing_to_score(context, continuation)  # before lm-eval looks at its first token
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = []
        for texts, context, continuation in requests:
            if not continuation:
                raise _nothing_to_score(*texts)
            if len(continuation) > self._max_length:
                raise UserError(
                    f"an lm-eval task asks for the score of {len(continuation)} tokens; the model's context_length is "
                    f"{self._max_length}: leave out the task, or use a model with a longer context"
                )
            rows.append([*(context or [self.prefix_token_id]), *continuation])  # a context of spaces has no token
        cut = sum(len(row) > self._max_length + 1 for row in rows)
        if cut:
            limit = f"the model's context_length {self._max_length}"
            print(f"{cut} of {len(rows)} requests exceed {limit}; their contexts are cut at the start", file=sys.stderr)
        rows = [row[-self._max_length - 1 :] for row in rows]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        with Progress("loglikelihood", len(rows), unit="requests", leave=False) as progress:
            for start in range(0, len(order), self._batch_size):
                indices = order[start : start + self._batch_size]
                scores, greedy = self._scores([rows[index] for index in indices])
                for row, index in enumerate(indices):
                    # A row of n tokens has n - 1 scores. Those of the continuation come last.
                    end = len(rows[index]) - 1
                    part = slice(end - len(requests[index][2]), end)
                    results[index] = (float(scores[row, part].sum()), bool(greedy[row, part].all()))
                progress.advance(len(indices))
        return results

    def _scores(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The log-probability of each token after the first, and whether it is the likeliest: [B, L] each."""
        length = -(-(max(map(len, rows)) - 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE or LENGTH_MULTIPLE
        tokens_BM = np.zeros((self._batch_size, length + 1), np.int32)
        segment_ids_BM = np.zeros_like(tokens_BM)
        for number, row in enumerate(rows):
            tokens_BM[number, : len(row)], segment_ids_BM[number, : len(row)] = row, 1
        everywhere = batch_sharding(self._mesh)
        placed = [jax.make_array_from_callback(x.shape, everywhere, x.__getitem__) for x in (tokens_BM, segment_ids_BM)]
        return jax.device_get(self._score(self._params, *placed))

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in nats. Long texts are cut into windows, and each token counts once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self._max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Continues each prompt up to one of its stop strings; greedy unless the request's options ask for sampling.

        Raises:
          UserError: a request asks for as many new tokens as the model's context holds, or more.
        """
        groups = defaultdict(list)  # requests that can be decoded together
        for number, request in enumerate(requests):
            options: dict[str, Any] = {**normalize_gen_kwargs(request.args[1], MAX_NEW_TOKENS)}
            stops = tuple(stop for stop in options["until"] if stop)
            temperature = float(options.get("temperature", 1.0)) if options["do_sample"] else 0.0
            limit = options["max_gen_toks"]
            if limit >= self._max_length:
                raise UserError(
                    f"an lm-eval task asks for {limit} new tokens; the model's context_length is {self._max_length}: "
                    "lower the task's max_gen_toks"
                )
            groups[stops, limit, temperature].append(number)
        texts = [""] * len(requests)
        generator = Generator(self._graphdef, self._params, self._tokenizer, self._batch_size)
        with Progress("generate", len(requests), unit="requests", leave=False) as progress:
            for (stops, limit, temperature), numbers in groups.items():
                numbers.sort(key=lambda number: -len(requests[number].args[0]))
                for number, text, *_ in generator.run(
                    deque((number, requests[number].args[0]) for number in numbers),
                    max_new_tokens=limit,
                    stops=stops,
                    temperature=temperature,
                    max_prompt_tokens=self._max_length - limit,
                ):
                    texts[number] = text
                    progress.advance(1)
        return texts


def _nothing_to_score(context: str, continuation: str) -> UserError:
    return UserError(
        f"cannot score {continuation!r} after {context[-80:]!r}: it has no token of its own, since it is empty or "
        "merges with the end of the context; change the lm-eval task so that the context ends where a token ends"
    )


def _make_score(graphdef: nnx.GraphDef):
    def score(params: Params, tokens_BM: jax.Array, segment_ids_BM: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        hidden_BLD = model(tokens_BM[:, :-1], segment_ids_BM[:, :-1])
        output_VD = model.output_VD().astype(hidden_BLD.dtype)
        B, L, D = hidden_BLD.shape
        hidden_nBcD = hidden_BLD.reshape(B, L // CHUNK, CHUNK, D).swapaxes(0, 1)
        targets_nBc = tokens_BM[:, 1:].reshape(B, L // CHUNK, CHUNK).swapaxes(0, 1)

        def score_chunk(chunk):
            hidden_BcD, targets_Bc = chunk
            logits_BcV = jnp.einsum("BcD,VD->BcV", hidden_BcD, output_VD, preferred_element_type=jnp.float32)
            logits_BcV = soft_cap(logits_BcV, model.structure.logit_soft_cap)
            target_Bc = jnp.take_along_axis(logits_BcV, targets_Bc[..., None], axis=-1)[..., 0]
            return target_Bc - jax.nn.logsumexp(logits_BcV, axis=-1), logits_BcV.argmax(axis=-1) == targets_Bc

        scores_and_greedy = jax.lax.map(score_chunk, (hidden_nBcD, targets_nBc))
        return jax.tree.map(lambda x_nBc: replicate(x_nBc.swapaxes(0, 1).reshape(B, L)), scores_and_greedy)

    return score
