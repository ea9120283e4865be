"""A tokenizer is the same if it does the same, in whatever form its file was saved."""

import json
import pathlib
import shutil

import pytest
import tokenizers
from chat_forms import make_tokenizer
from helpers import options
from sentencepiece import sentencepiece_model_pb2

from rho1_jax.data.loader import open_mixture
from rho1_jax.data.preparation import prepare
from rho1_jax.data.store import Store
from rho1_jax.data.tokenizer import Tokenizer, same_tokenizer
from rho1_jax.runtime.errors import UserError


def same(path: pathlib.Path, other: pathlib.Path) -> bool:
    return same_tokenizer(path, Tokenizer(path).fingerprint, other, Tokenizer(other).fingerprint)


def edited(folder: pathlib.Path, output: pathlib.Path, change) -> pathlib.Path:
    """A copy of a folder whose tokenizer.json was changed."""
    shutil.copytree(folder, output)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (output / "tokenizer.json").write_text(json.dumps(content))
    return output


def merges_as_text(content):
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def swap_pieces(content):
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


@pytest.fixture(scope="module", params=["byte level", "prepend"])
def folder(request, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def saved_again(folder, tmp_path_factory) -> pathlib.Path:
    """The same tokenizer, loaded and saved again with other settings that change no ids."""
    output = tmp_path_factory.mktemp("again") / "tokenizer"
    edited(folder, output, merges_as_text)
    tokenizer = tokenizers.Tokenizer.from_file(str(output / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding()
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    return output


def test_a_tokenizer_that_was_saved_again_is_the_same(folder, saved_again, tmp_path):
    assert Tokenizer(folder).fingerprint != Tokenizer(saved_again).fingerprint
    assert same(folder, saved_again) and same(saved_again, folder)
    assert same(folder, edited(folder, tmp_path / "merges", merges_as_text))


@pytest.mark.parametrize(
    "change",
    [
        swap_pieces,
        lambda content: content["model"]["merges"].pop(),
        lambda content: content["model"]["merges"].insert(0, content["model"]["merges"].pop()),
        lambda content: content.update(normalizer={"type": "Lowercase"}),
        lambda content: content.update(pre_tokenizer={"type": "Whitespace"}),
        lambda content: content.update(decoder={"type": "Fuse"}),
        lambda content: content["added_tokens"][3].update(special=False),
        lambda content: content["added_tokens"][3].update(rstrip=True),
        lambda content: content["added_tokens"].pop(),
    ],
)
def test_a_tokenizer_that_does_something_else_is_another(folder, tmp_path, change):
    assert not same(folder, edited(folder, tmp_path / "other", change))


@pytest.mark.parametrize("settings", [{"eos_token": "<|im_end|>"}, {"eos_token": "</s>", "add_bos_token": True}])
def test_another_eos_or_bos_makes_another_tokenizer(folder, tmp_path, settings):
    other = edited(folder, tmp_path / "other", merges_as_text)
    (other / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", **settings}))
    assert not same(folder, other)


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda model: setattr(model.trainer_spec, "input_sentence_size", 7), True),
        (lambda model: model.trainer_spec.input.append("elsewhere.txt"), True),
        (lambda model: setattr(model.pieces[-1], "score", -1e9), False),
        (lambda model: setattr(model.pieces[-1], "piece", "xyzzy"), False),
        (lambda model: setattr(model.pieces[-1], "type", 4), False),
        (
            lambda model: setattr(
                model.normalizer_spec, "add_dummy_prefix", not model.normalizer_spec.add_dummy_prefix
            ),
            False,
        ),
        (lambda model: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True), False),
    ],
)
def test_what_a_sentencepiece_model_was_trained_on_does_not_matter(tokenizer, tmp_path, change, expected):
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    change(model)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    assert Tokenizer(tmp_path).fingerprint != tokenizer.fingerprint
    assert same(tokenizer.path, tmp_path) == expected


def test_fingerprints_are_those_that_older_versions_recorded(tmp_path):
    """Data sets and checkpoints hold them."""
    (tmp_path / "tokenizer.json").write_text(
        '{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}'
    )
    (tmp_path / "config.json").write_text('{"eos_token_id": [1, 0]}')
    assert Tokenizer(tmp_path).fingerprint == "8b7b8672069c15591f302d22ef7018e1c00abec3c8575fdb9fb19441d179cae4"


@pytest.fixture
def corpus_file(tmp_path) -> pathlib.Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"What is {n} times 7? It is {7 * n}."}) + "\n" for n in range(40)))
    return path


def test_data_prepared_with_either_form_mixes_and_is_not_prepared_twice(folder, saved_again, corpus_file, tmp_path):
    stores = []
    for name, path in (("first", folder), ("second", saved_again)):
        manifest = prepare([corpus_file], Tokenizer(path), tmp_path / name, options(), workers=1)
        stores.append(Store(tmp_path / name))
        for tokenizer in (Tokenizer(folder), Tokenizer(saved_again)):
            assert prepare([corpus_file], tokenizer, tmp_path / name, options(), workers=1) == manifest
            assert stores[-1].has_tokenizer(tokenizer.path, tokenizer.fingerprint)
        with pytest.raises(UserError, match="was made with other options"):
            prepare([corpus_file], tokenizer, tmp_path / name, options(seq_len=17), workers=1)
    open_mixture(f"{tmp_path / 'first'},{tmp_path / 'second'}")
    corpus_file.write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match="was made with other inputs"):
        prepare([corpus_file], Tokenizer(saved_again), tmp_path / "first", options(), workers=1)
    other = edited(folder, tmp_path / "other", swap_pieces)
    with pytest.raises(UserError, match="was made with another tokenizer"):
        prepare([corpus_file], Tokenizer(other), tmp_path / "first", options(), workers=1)
    prepare([corpus_file], Tokenizer(other), tmp_path / "third", options(), workers=1)
    with pytest.raises(UserError, match="third was prepared with a different tokenizer"):
        open_mixture(f"{tmp_path / 'first'},{tmp_path / 'third'}")


def test_a_tokenizer_that_was_replaced_is_not_the_recorded_one(folder, saved_again):
    assert not same_tokenizer(folder, "0" * 64, saved_again, Tokenizer(saved_again).fingerprint)
