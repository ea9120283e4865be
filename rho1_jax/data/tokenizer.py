"""Tokenizers: a SentencePiece model, or a tokenizer.json of the library `tokenizers`, as models come with."""

import hashlib
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece
import tokenizers

from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, read_json

TOKENIZER_DIR = "tokenizer"  # its name in a run or a prepared data set
SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
# What lies beside either and belongs to it. Others may read all of it; here it tells BOS and EOS.
SETTINGS_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a space in a SentencePiece piece

Span = tuple[int, int]  # first character and the one behind the last


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      path: the model file.
      vocab_size: one above the highest id.
      bos_id: the id that the model's files put in front of each text; None where they put none.
      eos_id: the id that ends a document.
      fingerprint: sha256 of the model file and these ids, in hex.
    """

    def __init__(self, path: str | pathlib.Path):
        """Opens a model file, or the one in a folder: its tokenizer.json before its tokenizer.model.

        Raises:
          UserError: it is absent, no tokenizer, or names no end-of-sequence token.
        """
        self.path = local_path(path, "tokenizer")
        if self.path.is_dir():
            names = [name for name in (JSON_FILE, SENTENCEPIECE_FILE) if (self.path / name).is_file()]
            if not names:
                raise UserError(f"{path}: holds neither {JSON_FILE} nor {SENTENCEPIECE_FILE}")
            self.path /= names[0]
        if not self.path.is_file():
            raise UserError(f"{path}: no such tokenizer file (tools/train_tokenizer.py makes one)")
        settings = _settings(self.path.parent)
        backend = _Json if self.path.suffix == ".json" else _SentencePiece
        self._model = backend(self.path, settings)
        self.vocab_size = self._model.vocab_size
        self.bos_id = self._model.bos_id
        if self._model.eos_id is None:
            raise UserError(f"{path}: the tokenizer has no end-of-sequence token, which ends each document")
        self.eos_id: int = self._model.eos_id
        identity = self.path.read_bytes() + f"{self.bos_id} {self.eos_id}".encode()
        self.fingerprint = hashlib.sha256(identity).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any that mark its ends. What looks like a special token is text too."""
        return self._model.encode(text)

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids as `encode` gives them, and the characters that each stands for."""
        return self._model.encode_spans(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text to be continued: BOS, where the model's files put one, and the text."""
        return [*self.prefix(), *self.encode(text)]

    def prefix(self) -> list[int]:
        """What each text begins with: BOS or nothing."""
        return [] if self.bos_id is None else [self.bos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special ones left out."""
        return self._model.decode(list(ids))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each id's own text, for display."""
        return [self._model.piece(int(i)) for i in ids]

    def save(self, directory: pathlib.Path) -> None:
        """Copies the tokenizer, and what lies beside it and belongs to it, into a directory."""
        directory.mkdir(parents=True, exist_ok=True)
        is_json = self.path.suffix == ".json"
        shutil.copyfile(self.path, directory / (JSON_FILE if is_json else SENTENCEPIECE_FILE))
        for name in (*SETTINGS_FILES, *([SENTENCEPIECE_FILE] if is_json else [])):
            if (self.path.parent / name).is_file():
                shutil.copyfile(self.path.parent / name, directory / name)


def _settings(directory: pathlib.Path) -> dict[str, Any]:
    """What the JSON files beside a tokenizer say of BOS and EOS: the first that says something counts."""
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"):
        if not (directory / name).is_file():
            continue
        said = read_json(directory / name)
        for key in ("bos_token", "eos_token", "eos_token_id", "add_bos_token"):
            value = said.get(key)
            if isinstance(value, dict):  # a token with its options
                value = value.get("content")
            if isinstance(value, list):  # of several end tokens the first ends a document
                value = value[0]
            if value is not None:
                settings.setdefault(key, value)
    return settings


class _SentencePiece:
    def __init__(self, path: pathlib.Path, settings: dict[str, Any]):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model") from error
        self.vocab_size = self._processor.vocab_size()
        # The model itself does not say whether BOS is put in front.
        bos_id = self._processor.bos_id() if settings.get("add_bos_token", False) else -1
        self.bos_id = bos_id if bos_id >= 0 else None
        eos_id = self._processor.eos_id()
        self.eos_id = eos_id if eos_id >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self._processor.encode(text, return_type="offset_mapping")
        return encoding["ids"], encoding["offsets"]

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def piece(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id).replace(SPACE, " ")


class _Json:
    def __init__(self, path: pathlib.Path, settings: dict[str, Any]):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path}: not a tokenizer of the library `tokenizers`: {error}") from error
        self._tokenizer.encode_special_tokens = True  # "</s>" in a document is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        added = self._tokenizer.encode("", add_special_tokens=True).ids
        self.eos_id = self._id(settings.get("eos_token"), settings.get("eos_token_id"))
        bos_id = self._id(settings.get("bos_token"), added[0] if added and added[0] != self.eos_id else None)
        self.bos_id = bos_id if settings.get("add_bos_token", bos_id in added) else None

    def _id(self, token: str | None, default: int | None) -> int | None:
        return default if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        piece = self._tokenizer.id_to_token(token_id) or ""
        # Pieces of byte-level vocabularies have to be decoded to be read.
        return piece.replace(SPACE, " ") if SPACE in piece else self._tokenizer.decode([token_id])
