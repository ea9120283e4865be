"""Compares our decoder with Transformers on the same folder and text."""

import importlib
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rho1_jax.configs.default import ModelConfig
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.models import decoder
from rho1_jax.models.hf_folder import HuggingFaceFolder
from rho1_jax.models.structure import soft_cap
from rho1_jax.models.vocabulary import open_tokenizer
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError

MAX_TOKENS = 2048
TEXTS = (  # texts that tokenizers often split differently
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 1234567890",
    "  two spaces,\ttab\n\n\nand three line ends ",
    "def f(x):\n    return x  # a comment\n",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f600 \u0416 e\u0301",
    "\\begin{equation} \\sum_{i=1}^n x_i^2 \\end{equation}",
    "",
    " a  b   c",
)


class Difference(NamedTuple):
    """The largest difference between two arrays: its size, its index, and the two values there."""

    size: float
    where: tuple[int, ...]
    ours: float
    theirs: float


def largest_difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Finds the largest absolute difference. NaN in only one of the arrays counts as infinite."""
    apart = np.abs(ours - theirs)
    apart = np.where(np.isnan(apart), np.where(np.isnan(ours) & np.isnan(theirs), 0, np.inf), apart)
    where = tuple(int(i) for i in np.unravel_index(apart.argmax(), apart.shape))
    return Difference(float(apart[where]), where, float(ours[where]), float(theirs[where]))


def our_logits(folder: HuggingFaceFolder, config: ModelConfig, ids: list[int]) -> np.ndarray:
    """Logits [L, V] of our decoder, in float32."""
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
    graphdef = decoder.build(config)

    @jax.jit
    def logits(params, ids_1L):
        decoder = nnx.merge(graphdef, params)
        hidden_1LD = decoder(ids_1L, jnp.ones_like(ids_1L))
        logits_LV = jnp.einsum("LD,VD->LV", hidden_1LD[0], decoder.output_VD(), preferred_element_type=jnp.float32)
        return soft_cap(logits_LV, decoder.structure.logit_soft_cap)

    with jax.set_mesh(mesh):
        return np.asarray(logits(folder.load(config, mesh, "float32"), jnp.array([ids])))


def token_losses(logits_LV: np.ndarray, ids: list[int]) -> np.ndarray:
    """Losses [L - 1] of each next token, in nats."""
    loss_L = -jax.nn.log_softmax(logits_LV[:-1].astype(np.float64), axis=-1)
    return np.asarray(loss_L)[np.arange(len(ids) - 1), ids[1:]]


def verify_tokens(folder: pathlib.Path) -> None:
    """Compares token ids with those of Transformers on TEXTS.

    Raises:
      UserError: ids differ (the message names the text), or transformers is not installed.
    """
    transformers = _peer("transformers")
    tokenizer = Tokenizer(folder)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in TEXTS:
        ids, hf_ids = tokenizer.encode_prompt(text), hf_tokenizer(text)["input_ids"]
        if ids != hf_ids:
            raise UserError(
                f"--verify: {folder}: {len(ids)} tokens here, {len(hf_ids)} in Transformers "
                f"({type(hf_tokenizer).__name__}) for {text!r}"
            )


def _peer(name: str) -> Any:
    """A library that only --verify needs. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--verify needs {name} ({error}): install the extra `peers`") from None


def verify(folder: HuggingFaceFolder, config: ModelConfig, text_file: pathlib.Path) -> Iterator[str]:
    """Compares token ids, logits and token losses on the first tokens of a text, in float32.

    Yields:
      Lines for the terminal: the largest differences, and where they are.

    Raises:
      UserError: torch or transformers is not installed, or the text cannot be read.
    """
    torch, transformers = _peer("torch"), _peer("transformers")
    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--verify={text_file}: {error}") from None
    tokenizer = open_tokenizer(folder.path, config)
    ids = tokenizer.encode_prompt(text)
    their_ids = transformers.AutoTokenizer.from_pretrained(folder.path, local_files_only=True)(text)["input_ids"]
    first = next((n for n, (a, b) in enumerate(zip(ids, their_ids)) if a != b), None)
    if ids == their_ids:
        yield f"tokens: all {len(ids):,} equal"
    else:
        yield f"tokens: {len(ids):,} here, {len(their_ids):,} in Transformers; they first differ at position {first}"
    ids = ids[: min(MAX_TOKENS, config.context_length)]
    ours_LV = our_logits(folder, config, ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder.path, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )
    with torch.no_grad():
        theirs_LV = theirs(torch.tensor([ids])).logits[0].numpy()
    difference = largest_difference(ours_LV, theirs_LV)
    position, token = difference.where
    where = f"position {position}, vocabulary {token} ({tokenizer.pieces([token])[0]!r})"
    yield _line("logits", difference, where)
    difference = largest_difference(token_losses(ours_LV, ids), token_losses(theirs_LV, ids))
    (position,) = difference.where
    yield _line("losses", difference, f"position {position} ({tokenizer.pieces([ids[position + 1]])[0]!r})")


def _line(what: str, difference: Difference, where: str) -> str:
    values = f"{difference.ours:.6f} here, {difference.theirs:.6f} in Transformers"
    return f"{what}: largest difference {difference.size:.2e} at {where}: {values}"
