"""A model's tokenizer, checked against the model's vocabulary."""

import pathlib

from rho1_jax.configs.default import ModelConfig
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.runtime.errors import UserError


def open_tokenizer(path: pathlib.Path, model: ModelConfig, fingerprint: str | None = None) -> Tokenizer:
    """Opens the tokenizer at `path` for a model.

    Args:
      path: its file or folder.
      model: the model.
      fingerprint: the fingerprint recorded for the tokenizer; None: any.

    Raises:
      UserError: there is no tokenizer, it was replaced, or it has token ids beyond the model's vocabulary.
    """
    tokenizer = Tokenizer(path, fingerprint)
    if model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} token ids, but the model's vocabulary has only "
            f"{model.vocab_size}; use the tokenizer that the model was trained with"
        )
    return tokenizer
