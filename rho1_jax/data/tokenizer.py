"""Tokenize text with a SentencePiece model, or with a tokenizer.json of the library `tokenizers`."""

import functools
import hashlib
import itertools
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NotRequired

import numpy as np
from typing_extensions import TypedDict

from rho1_jax.data.tokenizer_backends import JsonBackend, SentencePieceBackend, Span
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import json_sha256, local_path
from rho1_jax.runtime.schema import read_json

TOKENIZER_DIR = "tokenizer"  # folder of the tokenizer in a run or a prepared data set
SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
# Files beside a tokenizer that belong to it. This module only reads BOS and EOS from them; other programs read more.
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
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
PART_CHARACTERS = 1 << 19  # tokenized at once: SentencePiece needs up to 300 bytes of memory per character


class _Token(TypedDict):
    """A token with options, which do not matter here."""

    content: str


class _Settings(TypedDict):
    """What this module reads of a JSON file beside a tokenizer. null means that the file does not say."""

    bos_token: NotRequired[str | _Token | None]
    eos_token: NotRequired[str | _Token | None]
    unk_token: NotRequired[str | _Token | None]
    pad_token: NotRequired[str | _Token | None]
    eos_token_id: NotRequired[int | list[int] | None]  # of several, the first one ends documents
    add_bos_token: NotRequired[bool | None]


class Tokenizer:
    """Converts text to token ids and back.

    Attributes:
      path: the model file.
      vocab_size: the highest id plus one.
      bos_id: the id to add before each text, according to the model's files; None if they add none.
      eos_id: the id to add after each document.
      eos_ids: the ids that end a generation: `eos_id`, and those of generation_config.json or else config.json.
      fingerprint: sha256 of the model file and of the ids of BOS and EOS, in hex. This is what gets recorded; use
        `same_tokenizer` to compare, since a program may save a tokenizer in another form.
    """

    def __init__(self, path: str | pathlib.Path, expected: str | None = None):
        """Opens a model file. In a folder, tokenizer.json is preferred to tokenizer.model.

        Args:
          path: the file, or its folder.
          expected: the fingerprint recorded for it; None: any.

        Raises:
          UserError: the file does not exist, is not a tokenizer, has no end-of-sequence token, or is not the expected
            one.
        """
        self.path = local_path(path, "tokenizer")
        if self.path.is_dir():
            names = [name for name in (JSON_FILE, SENTENCEPIECE_FILE) if (self.path / name).is_file()]
            if not names:
                raise UserError(f"{path}: holds neither {JSON_FILE} nor {SENTENCEPIECE_FILE}")
            self.path /= names[0]
        if not self.path.is_file():
            raise UserError(f"{path}: no such tokenizer file; train one with `rho1 tokenizer`")
        self._settings = _settings(self.path.parent)
        backend = JsonBackend if self.path.suffix == ".json" else SentencePieceBackend
        self._model = backend(self.path, self._settings)
        self.vocab_size = self._model.vocab_size
        self.bos_id = self._model.bos_id
        if self._model.eos_id is None:
            raise UserError(
                f"{path}: the tokenizer has no end-of-sequence token, and documents need one; "
                "set eos_token in its tokenizer_config.json"
            )
        self.eos_id: int = self._model.eos_id
        self.eos_ids = tuple(dict.fromkeys([self.eos_id, *_generation_eos_ids(self.path.parent)]))
        identity = self.path.read_bytes() + f"{self.bos_id} {self.eos_id}".encode()
        self.fingerprint = hashlib.sha256(identity).hexdigest()
        if expected is not None and expected != self.fingerprint:
            raise UserError(
                f"{self.path} is not the tokenizer recorded here: its fingerprint is {self.fingerprint[:12]}, not "
                f"{expected[:12]}. The file was replaced, or a JSON file beside it changed BOS or EOS; restore them"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS. The name of a special token in it counts as ordinary text."""
        return self._model.encode(text)

    @functools.cached_property
    def behavior(self) -> str:
        """Sha256 of what the tokenizer does, in hex: two files of one tokenizer have the same.

        Comparable only within one version of the tokenizer libraries, so it is never recorded.
        """
        return json_sha256({"does": self._model.behavior(), "bos_id": self.bos_id, "eos_id": self.eos_id})

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens, by name."""
        return self._model.special_tokens()

    @functools.cached_property
    def named_tokens(self) -> dict[str, str]:
        """The names of bos_token, eos_token, unk_token and pad_token, of those that the tokenizer has."""
        named = {key: self._settings[key] for key in NAMED_TOKENS if key in self._settings}
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        return {key: self._model.name(token_id) for key, token_id in ids.items() if token_id is not None} | named

    def encode_spans(self, text: str, marked: bool = False) -> tuple[list[int], list[Span]]:
        """Token ids as from `encode`, with the span of characters that each token covers.

        Args:
          text: the text.
          marked: True if a match of MARK stands for a special token.
        """
        return self._model.encode_marked(text) if marked else self._model.encode_spans(text)

    def encode_parts(self, text: str, marked: bool = False) -> Iterator[tuple[list[int], list[Span]]]:
        """Token ids and spans as from `encode_spans`, at most PART_CHARACTERS at a time, to bound the memory.

        Parts end at line breaks, where tokenizers end tokens. The ids can differ from those of `encode` only if a text
        has no line break in PART_CHARACTERS.
        """
        start = 0
        while start < len(text):
            end = _part_end(text, start)
            # One more character at each end makes a part tokenize as it does within the text.
            first = start - int(start > 0 and text[start - 1] == "\n")
            last = end + int(end < len(text) and text[end - 1] == "\n")
            ids, spans = self.encode_spans(text[first:last], marked)
            tokens = [(i, (a + first, b + first)) for i, (a, b) in zip(ids, spans)]
            inside = [(i, span) for i, span in tokens if span[0] < end and (span[0] >= start or span[1] > start)]
            yield [i for i, _ in inside], [span for _, span in inside]
            start = end

    def encode_document(self, text: str) -> np.ndarray:
        """Token ids, int32, of a document to train on: BOS, if the tokenizer adds it, the text, and EOS."""
        parts = [self.encode(text)] if len(text) <= PART_CHARACTERS else (ids for ids, _ in self.encode_parts(text))
        everything = itertools.chain([self.prefix()], parts, [[self.eos_id]])
        return np.concatenate([np.array(ids, np.int32) for ids in everything])

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text to continue: BOS, if the tokenizer adds it, and then the text."""
        return [*self.prefix(), *self.encode(text)]

    def prefix(self) -> list[int]:
        """The ids before each text: [BOS], or [] if the tokenizer adds none."""
        return [] if self.bos_id is None else [self.bos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._model.decode(list(ids))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The text of each id on its own, for display."""
        return [self._model.piece(int(i)) for i in ids]

    def save(self, directory: pathlib.Path) -> None:
        """Copies the tokenizer and the settings files beside it into a directory."""
        directory.mkdir(parents=True, exist_ok=True)
        is_json = self.path.suffix == ".json"
        shutil.copyfile(self.path, directory / (JSON_FILE if is_json else SENTENCEPIECE_FILE))
        for name in (*SETTINGS_FILES, *([SENTENCEPIECE_FILE] if is_json else [])):
            if (self.path.parent / name).is_file():
                shutil.copyfile(self.path.parent / name, directory / name)


def same_tokenizer(path: pathlib.Path, fingerprint: str, other_path: pathlib.Path, other_fingerprint: str) -> bool:
    """True if two tokenizers give the same ids. All comparisons of tokenizers are made here.

    Those of different fingerprints are opened, and are the same if they do the same.

    Args:
      path: the first tokenizer's file or folder.
      fingerprint: the fingerprint recorded for it.
      other_path: the same of the second tokenizer.
      other_fingerprint: the same of the second tokenizer.

    Raises:
      UserError: they have different fingerprints, and one of them cannot be opened.
    """
    if fingerprint == other_fingerprint:
        return True
    first, second = Tokenizer(path), Tokenizer(other_path)
    recorded = (first.fingerprint, second.fingerprint) == (fingerprint, other_fingerprint)
    return recorded and first.behavior == second.behavior


def _part_end(text: str, start: int) -> int:
    """The end of the part of a text that begins at `start`: after its last line break that is followed by more text."""
    end = start + PART_CHARACTERS
    if end >= len(text):
        return len(text)
    line_break = end
    while (line_break := text.rfind("\n", start, line_break)) >= 0:
        if not text[line_break + 1].isspace():
            return line_break + 1
    space = text.rfind(" ", start + 1, end)
    return space if space > 0 else end


def _settings(directory: pathlib.Path) -> dict[str, Any]:
    """The BOS and EOS settings in the JSON files beside a tokenizer. The first file that has a key decides."""
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"):
        if not (directory / name).is_file():
            continue
        content: Mapping[str, Any] = read_json(directory / name, _Settings)
        for key, value in content.items():
            if isinstance(value, dict):
                value = value["content"]
            if isinstance(value, list):
                value = value[0] if value else None
            if value is not None:
                settings.setdefault(key, value)
    return settings


def _generation_eos_ids(directory: pathlib.Path) -> list[int]:
    """The ids that end a generation, according to the first of the model's files that names any."""
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            ids = read_json(directory / name, _Settings).get("eos_token_id")
            if isinstance(ids, int):
                return [ids]
            if ids:
                return ids
    return []
