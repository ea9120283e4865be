"""One interface to both kinds of tokenizer file; `data.tokenizer` says what its methods mean."""

import functools
import json
import pathlib
import re
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from rho1_jax.runtime.errors import UserError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a space in a SentencePiece piece

# Settings that change how a SentencePiece model encodes or decodes.
NORMALIZER_SETTINGS = ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces")
TRAINER_SETTINGS = (
    "model_type",
    "treat_whitespace_as_suffix",
    "byte_fallback",
    "unk_surface",
    "unk_piece",
    "bos_piece",
    "eos_piece",
    "pad_piece",
)
JSON_WITHOUT_EFFECT = ("version", "truncation", "padding", "post_processor")  # in a tokenizer.json

MARK = re.compile("\ufdd2([0-9]+)\ufdd3")  # see `special_mark`; noncharacters of Unicode, which no text may hold

Span = tuple[int, int]  # the first character, and the one after the last


def special_mark(token_id: int) -> str:
    """The text that stands for a special token, in a text to encode with `marked`."""
    return f"\ufdd2{token_id}\ufdd3"


class SentencePieceBackend:
    """A SentencePiece model."""

    def __init__(self, path: pathlib.Path, settings: dict[str, Any]):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model") from error
        self.vocab_size = self._processor.vocab_size()
        # The model file does not say whether to add BOS.
        bos_id = self._processor.bos_id() if settings.get("add_bos_token", False) else -1
        self.bos_id = bos_id if bos_id >= 0 else None
        eos_id = self._processor.eos_id()
        self.eos_id = eos_id if eos_id >= 0 else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._processor.encode(text)

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids, and the span of characters that each covers."""
        encoding = self._processor.encode(text, return_type="offset_mapping")
        return encoding["ids"], encoding["offsets"]

    def encode_marked(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids and spans of a text in which a match of MARK stands for a special token."""
        ids: list[int] = []
        spans: list[Span] = []
        done = 0
        for mark in (*MARK.finditer(text), None):
            end = mark.start() if mark else len(text)
            part_ids, part_spans = self.encode_spans(text[done:end]) if end > done else ([], [])
            ids += part_ids
            spans += [(first + done, last + done) for first, last in part_spans]
            if mark:
                ids.append(int(mark[1]))
                spans.append(mark.span())
                done = mark.end()
        return ids, spans

    def behavior(self) -> Any:
        """The pieces, and the settings that change how text is encoded or decoded."""
        model = sentencepiece_model_pb2.ModelProto.FromString(self._processor.serialized_model_proto())  # type: ignore[attr-defined]
        pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
        normalizers = [
            (spec.precompiled_charsmap.hex(), *(getattr(spec, name) for name in NORMALIZER_SETTINGS))
            for spec in (model.normalizer_spec, model.denormalizer_spec)
        ]
        return [pieces, normalizers, [getattr(model.trainer_spec, name) for name in TRAINER_SETTINGS]]

    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens, by name."""
        ids = range(self.vocab_size)
        return {self.name(token_id): token_id for token_id in ids if self._processor.is_control(token_id)}

    def name(self, token_id: int) -> str:
        """The name of a token in the vocabulary."""
        return self._processor.id_to_piece(token_id)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._processor.decode(ids)

    def piece(self, token_id: int) -> str:
        """The text of a token on its own."""
        return self._processor.id_to_piece(token_id).replace(SPACE, " ")


class JsonBackend:
    """A tokenizer.json of the library `tokenizers`."""

    def __init__(self, path: pathlib.Path, settings: dict[str, Any]):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path}: not a tokenizer of the library `tokenizers`: {error}") from error
        self._path = path
        self._tokenizer.encode_special_tokens = True  # treats "</s>" in a document as text
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
        """Token ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids, and the span of characters that each covers."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @functools.cached_property
    def _marking(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A copy of the tokenizer in which marks stand for special tokens, and {id of a mark: id of its token}."""
        marking = tokenizers.Tokenizer.from_file(str(self._path))
        marking.encode_special_tokens = True
        marking.no_truncation()
        marking.no_padding()
        marks: dict[str, int] = {}
        for token_id, token in marking.get_added_tokens_decoder().items():
            if token.special:
                mark = special_mark(token_id)
                options = {key: getattr(token, key) for key in ("lstrip", "rstrip", "single_word", "normalized")}
                marking.add_tokens([tokenizers.AddedToken(mark, **options)])
                marks[mark] = token_id
        added = marking.get_added_tokens_decoder()
        return marking, {number: marks[token.content] for number, token in added.items() if token.content in marks}

    def encode_marked(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids and spans of a text in which a match of MARK stands for a special token."""
        tokenizer, ids = self._marking
        encoding = tokenizer.encode(text, add_special_tokens=False)
        spans = encoding.offsets
        for number, (token_id, (first, last)) in enumerate(zip(encoding.ids, spans)):
            if token_id in ids:  # some special tokens take the spaces around them
                mark = MARK.search(text, first, last)
                spans[number] = mark.span() if mark else (first, last)
        return [ids.get(token_id, token_id) for token_id in encoding.ids], spans

    def behavior(self) -> Any:
        """The tokenizer in the library's own form, without the settings that have no effect here."""
        content = json.loads(self._tokenizer.to_str())
        # BOS and EOS, which the post-processor adds, are part of every fingerprint.
        return {key: value for key, value in content.items() if key not in JSON_WITHOUT_EFFECT}

    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens, by name."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def name(self, token_id: int) -> str:
        """The name of a token in the vocabulary."""
        return self._tokenizer.id_to_token(token_id) or ""

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        """The text of a token on its own."""
        piece = self._tokenizer.id_to_token(token_id) or ""
        # Pieces of a byte-level vocabulary are readable only after decoding.
        return piece.replace(SPACE, " ") if SPACE in piece else self._tokenizer.decode([token_id])
