"""The tokenizer: a SentencePiece model file."""

import hashlib
import pathlib
from collections.abc import Iterable, Sequence

import sentencepiece

from rho1_jax.errors import UserError

TOKENIZER_FILE = "tokenizer.model"  # its name in a run or a prepared data set


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      path: the model file.
      vocab_size: number of ids.
      eos_id: the id that ends a document.
      fingerprint: sha256 of the model file, in hex.
    """

    def __init__(self, path: str | pathlib.Path):
        """Raises UserError where the file is absent, no SentencePiece model, or has no end-of-sequence piece."""
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such tokenizer file (tools/train_tokenizer.py makes one)")
        model = self.path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model") from error
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{path}: the tokenizer has no end-of-sequence piece, which ends each document")
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any that mark its ends."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._processor.decode(list(ids))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each id's own text, for display."""
        return [self._processor.id_to_piece(int(i)).replace("\N{LOWER ONE EIGHTH BLOCK}", " ") for i in ids]
