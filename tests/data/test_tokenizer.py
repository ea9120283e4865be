"""Compare both kinds of tokenizer with their libraries; the SentencePiece model is a published one."""

import importlib.resources
import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest
import sentencepiece
import tokenizers

from rho1_jax.data import tokenizer as tokenizer_module
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.data.tokenizer_backends import special_mark
from rho1_jax.runtime.errors import UserError

TEXTS = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
    "  two spaces,\ttab\n\n\nand three line ends ",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f600 \u0416 e\u0301",
    "\\begin{equation} \\sum_{i=1}^n x_i^2 \\end{equation}",
    "def f(x):\n    return x ** 2  # </s> <s> [INST]",
]


@pytest.fixture(scope="module")
def mistral() -> pathlib.Path:
    """Mistral 7B's SentencePiece model, from its publisher's package."""
    return pathlib.Path(str(importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> pathlib.Path:
    """A folder with a byte-level tokenizer.json whose template adds BOS, as in Llama 3."""
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}})
    return folder


def write(path: pathlib.Path, value) -> None:
    path.write_text(json.dumps(value))


def test_sentencepiece_model_matches_the_library(mistral):
    expected = sentencepiece.SentencePieceProcessor(model_file=str(mistral))
    ours = Tokenizer(mistral)
    assert (ours.vocab_size, ours.eos_id, ours.bos_id) == (32_000, 2, None)
    for text in TEXTS:
        assert ours.encode(text) == expected.encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_json_model_matches_the_library(byte_level):
    expected = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    ours = Tokenizer(byte_level)
    assert ours.vocab_size == expected.get_vocab_size()
    assert (ours.bos_id, ours.eos_id) == (expected.token_to_id("<|begin|>"), expected.token_to_id("<|end|>"))
    for text in TEXTS:
        assert ours.encode(text) == expected.encode(text, add_special_tokens=False).ids
        assert ours.encode_prompt(text) == expected.encode(text).ids
        assert ours.decode(ours.encode_prompt(text)) == text
    assert ours.pieces(ours.encode(" two")) != [] and "".join(ours.pieces(ours.encode(" two"))) == " two"


def test_special_token_in_a_text_is_ordinary_text(byte_level, mistral):
    for path, special in ((byte_level, "<|end|>"), (mistral, "</s>")):
        tokenizer = Tokenizer(path)
        ids = tokenizer.encode(f"a{special}b")
        assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == f"a{special}b"


def test_a_mark_stands_for_its_token_in_a_vocabulary_with_gaps(tmp_path):
    token = tokenizers.AddedToken("<s>", special=True, normalized=False)
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "<s>": 40}, []))
    model.add_special_tokens([token])
    model.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", {"eos_token": "<s>"})
    ids, _ = Tokenizer(tmp_path).encode_spans(f"a{special_mark(40)}b", marked=True)
    assert ids == [0, 40, 1]


def test_spans_cover_the_characters_of_each_token(byte_level, mistral):
    for path in (byte_level, mistral):
        tokenizer = Tokenizer(path)
        for text in TEXTS:
            ids, spans = tokenizer.encode_spans(text)
            assert ids == tokenizer.encode(text)
            covered = sorted({i for start, end in spans for i in range(start, end)})
            assert covered == list(range(len(text)))
            assert all(a[0] <= b[0] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("size", [40, 200, 1000])
def test_a_long_text_is_tokenized_in_parts_to_the_same_ids(byte_level, mistral, tokenizer, monkeypatch, size):
    monkeypatch.setattr(tokenizer_module, "PART_CHARACTERS", size)
    text = "\n".join([*TEXTS, "", "  indented", *TEXTS, "\n\n"] * 4)
    for each in (tokenizer, Tokenizer(byte_level), Tokenizer(mistral)):
        ids, spans = each.encode_spans(text)
        parts = list(each.encode_parts(text))
        if size > 100:  # longer than every line
            assert len(parts) > 1 and [i for part, _ in parts for i in part] == ids
            assert [span for _, part in parts for span in part] == spans
            assert each.encode_document(text).tolist() == [*each.prefix(), *ids, each.eos_id]
        covered = sorted({i for _, part in parts for begin, end in part for i in range(begin, end)})
        assert covered == list(range(len(text)))
        assert each.encode_document(text).dtype == np.int32


@pytest.mark.parametrize(
    "settings, has_bos",
    [
        (None, False),
        ({"tokenizer_class": "LlamaTokenizer"}, False),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
        ({"add_bos_token": True}, True),
    ],
)
def test_bos_is_added_if_the_settings_say_so(mistral, tmp_path, settings, has_bos):
    shutil.copyfile(mistral, tmp_path / "tokenizer.model")
    if settings is not None:
        write(tmp_path / "tokenizer_config.json", settings)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.bos_id == (1 if has_bos else None)
    assert tokenizer.encode_prompt("x")[0] == (1 if has_bos else tokenizer.encode("x")[0])


def test_eos_from_the_model_config(byte_level, tmp_path):
    shutil.copyfile(byte_level / "tokenizer.json", tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Tokenizer(tmp_path)
    write(tmp_path / "config.json", {"eos_token_id": [7, 8]})
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_id == 7
    write(tmp_path / "tokenizer_config.json", {"eos_token_id": [], "eos_token": None})
    assert Tokenizer(tmp_path).eos_id == 7
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        (None, None, ()),
        (None, [7, 8], (7, 8)),
        (9, [7, 8], (9,)),
        ([9, 8, 9], 7, (9, 8)),
        ([], 7, (7,)),
        (None, 0, (0,)),
    ],
)
def test_every_eos_of_the_models_files_ends_a_generation(byte_level, mistral, tmp_path, generation, config, expected):
    for number, path in enumerate((byte_level / "tokenizer.json", mistral)):
        Tokenizer(path).save(tmp_path / str(number))
        write(tmp_path / str(number) / "generation_config.json", {"eos_token_id": generation})
        write(tmp_path / str(number) / "config.json", {"eos_token_id": config})
        tokenizer = Tokenizer(tmp_path / str(number))
        assert tokenizer.eos_id == Tokenizer(path).eos_id and tokenizer.eos_ids == (tokenizer.eos_id, *expected)
        tokenizer.save(tmp_path / "saved" / str(number))
        assert Tokenizer(tmp_path / "saved" / str(number)).eos_ids == tokenizer.eos_ids


@pytest.mark.parametrize("settings", [[], {"eos_token": 7}, {"eos_token": {"id": 7}}, {"eos_token_id": ["</s>"]}])
def test_settings_of_another_form_are_refused_by_file(byte_level, tmp_path, settings):
    shutil.copyfile(byte_level / "tokenizer.json", tmp_path / "tokenizer.json")
    write(tmp_path / "generation_config.json", settings)
    with pytest.raises(UserError, match="generation_config.json: "):
        Tokenizer(tmp_path)


def test_fingerprint_survives_saving_and_depends_on_eos(byte_level, mistral, tmp_path):
    for number, path in enumerate((byte_level, mistral)):
        Tokenizer(path).save(tmp_path / str(number))
        assert Tokenizer(tmp_path / str(number)).fingerprint == Tokenizer(path).fingerprint
    write(tmp_path / "0" / "tokenizer_config.json", {"eos_token": "<|begin|>", "add_bos_token": False})
    assert Tokenizer(tmp_path / "0").fingerprint != Tokenizer(byte_level).fingerprint


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", "{}", "not a tokenizer of the library"),
        ("tokenizer.model", "no model", "not a SentencePiece model"),
        ("other.txt", "", "holds neither tokenizer.json nor tokenizer.model"),
    ],
)
def test_invalid_tokenizer_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer(tmp_path)
