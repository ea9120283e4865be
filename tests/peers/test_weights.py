"""Compares import and export of every family with Transformers (extra `peers`)."""

import dataclasses
import importlib.resources
import json
import pathlib
import re
import shutil

import families
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from families import CASES, build, generations, gradient_difference, load, logits_difference, our_logits, save, stored
from helpers import config_of, selection_of, tensors

from rho1_jax.data import transcripts
from rho1_jax.data.packing import Batch, Documents, pack_whole
from rho1_jax.data.preparation import Options, prepare
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.data.transcripts import Transcripts, exchanges
from rho1_jax.export_hf import complete_tokenizer_settings, export_hf, sentencepiece_settings
from rho1_jax.import_hf import import_hf
from rho1_jax.models.hf_folder import HuggingFaceFolder
from rho1_jax.models.verify_hf import verify
from rho1_jax.runtime.errors import UserError
from rho1_jax.train import train_model
from rho1_jax.training.pretrained import Pretrained
from rho1_jax.training.state import TrainState
from rho1_jax.training.train_step import make_train_step

pytestmark = pytest.mark.peers

LARGEST = 1e-4


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory):
    return families.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def byte_level_tokenizer(tmp_path_factory):
    return families.make_byte_level_tokenizer(tmp_path_factory.mktemp("byte_level"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits_gradients_and_generations(case, small_tokenizer, tmp_path):
    peer = build(case)
    save(peer, small_tokenizer, tmp_path)
    graphdef, params = load(tmp_path)
    assert logits_difference(graphdef, params, peer) < LARGEST
    assert gradient_difference(graphdef, params, peer) < LARGEST
    ours, theirs, logprob_difference = generations(graphdef, params, peer, small_tokenizer)
    assert ours == theirs and all(ours)
    assert logprob_difference < LARGEST


ON_EIGHT = ["Gemma 2", "Gemma 3, rope scaling, soft cap", "OLMo 2, K < H", "SmolLM3"]


@pytest.mark.parametrize("name", ON_EIGHT)
def test_logits_and_gradients_on_eight_devices(name, small_tokenizer, tmp_path):
    peer = build(CASES[name])
    save(peer, small_tokenizer, tmp_path)
    mesh = families.eight_devices(peer)
    with jax.set_mesh(mesh):
        graphdef, params = load(tmp_path, mesh=mesh)
        assert logits_difference(graphdef, params, peer) < LARGEST
        assert gradient_difference(graphdef, params, peer) < LARGEST


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_round_trip_is_bit_identical(case, dtype, small_tokenizer, byte_level_tokenizer, tmp_path):
    peer = build(case).to(getattr(torch, dtype))
    tokenizer = byte_level_tokenizer if families.byte_level(case) else small_tokenizer
    save(peer, tokenizer, tmp_path / "hf", max_shard_size="40KB")
    families.export_again(tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    before, after = stored(tmp_path / "hf"), stored(tmp_path / "exported")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
    first, again = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager")
        for name in ("hf", "exported")
    )
    assert type(again) is type(peer) and again.dtype == peer.dtype
    ids = torch.from_numpy(families.random_ids()).long()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, first(ids).logits, rtol=0, atol=0)


NAMES = ["Llama 2 (TinyLlama), K < H", "Mistral 0.1, sliding window", "Qwen2.5, biases", "Qwen3, tied"]
NAMES += ["Gemma 2", "Gemma 3", "OLMo 2, K < H", "SmolLM3"]
NAMES += ["Pythia, parallel residual", "Granite 3, tied", "Phi-3, sliding window"]


@pytest.mark.parametrize("kind", ["small", "published", "byte level"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_tokenizes_an_exported_folder_as_we_do(
    name, kind, small_tokenizer, byte_level_tokenizer, tmp_path
):
    published = pathlib.Path(str(importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"))
    tokenizer = {"small": small_tokenizer, "byte level": byte_level_tokenizer}.get(kind) or Tokenizer(published)
    case = dataclasses.replace(CASES[name], changes=CASES[name].changes | {"vocab_size": tokenizer.vocab_size})
    save(build(case), tokenizer, tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "imported", dtype=None)
    if families.byte_level(case) and kind != "byte level":
        with pytest.raises(UserError, match="cannot export tokenizer.model with a qwen2 model"):
            export_hf(str(tmp_path / "imported"), tmp_path / "exported", dtype=None, verify=True)
        assert not (tmp_path / "exported").exists() and not (tmp_path / "exported.partial").exists()
        return
    export_hf(str(tmp_path / "imported"), tmp_path / "exported", dtype=None, verify=True)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    for text in [*texts(), "x = 1\n    y = 2  # 1234567890", "  ", "</s"]:
        assert tokenizer.encode(text) == hf_tokenizer(text)["input_ids"], text


def test_verified_export_refuses_a_folder_that_transformers_reads_differently(small_tokenizer, tmp_path):
    save(build(CASES["Qwen3, tied"]), small_tokenizer, tmp_path / "hf")
    settings = sentencepiece_settings(small_tokenizer) | {"tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    import_hf(tmp_path / "hf", tmp_path / "imported", dtype=None)
    with pytest.raises(UserError, match=r"--verify: .*: \d+ tokens here, \d+ in Transformers"):
        export_hf(str(tmp_path / "imported"), tmp_path / "exported", dtype=None, verify=True)
    assert not (tmp_path / "exported").exists()


def test_export_keeps_the_special_tokens(small_tokenizer, tmp_path):
    peer = build(CASES["Qwen3, tied"])
    peer.config.pad_token_id, peer.config.eos_token_id = 3, [2, 5]
    peer.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=[2, 5], pad_token_id=3)
    save(peer, small_tokenizer, tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "imported", dtype=None)
    export_hf(str(tmp_path / "imported"), tmp_path / "exported", dtype=None)
    for kind in (transformers.AutoConfig, transformers.GenerationConfig):
        again = kind.from_pretrained(tmp_path / "exported")
        assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (1, [2, 5], 3)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert (hf_tokenizer.bos_token, hf_tokenizer.eos_token, hf_tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_an_exported_model_after_twenty_steps_of_slm_equals_the_trained_one(corpus, small_tokenizer, tmp_path):
    save(build(CASES["Llama 3.1, rope scaling"]), small_tokenizer, tmp_path / "hf")
    save(build(CASES["Llama 3.1, rope scaling"], seed=1), small_tokenizer, tmp_path / "reference")
    options = Options(("{text}",), None, seq_len=32, eval_fraction=0.1, max_bad_fraction=0.0)
    prepare([corpus], Tokenizer(tmp_path / "hf"), tmp_path / "data", options, workers=1)
    import_hf(tmp_path / "hf", tmp_path / "imported", dtype=None)
    # The reference is a Hugging Face folder; the policy starts from a checkpoint.
    config = config_of("slm", tmp_path / "data", tmp_path / "reference")
    config.init.checkpoint = str(tmp_path / "imported")
    config.model.update(
        layers=3,
        vocab_size=families.VOCAB,
        tied_embeddings=False,
        rope_theta=500_000.0,
        rope_factor=8.0,
        rope_original_length=16,
        norm_eps=1e-6,
        context_length=128,
    )
    config.steps = 20
    params = jax.device_get(train_model(config, tmp_path / "run"))
    export_hf(str(tmp_path / "run"), tmp_path / "exported", dtype=None)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager")
    graphdef, exported = load(tmp_path / "exported")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(exported), params)
    assert logits_difference(graphdef, params, peer) < LARGEST
    untrained = load(tmp_path / "hf")[1]
    ids = families.random_ids()
    moved = np.abs(our_logits(graphdef, params, ids) - our_logits(graphdef, untrained, ids)).max()
    assert moved > 100 * LARGEST
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    text = "Document 3: 4+5=9. and so on\n\nand so  forth \u65e5"
    assert tokenizer(text)["input_ids"] == small_tokenizer.encode(text)


@pytest.mark.parametrize("name", ["Llama 3.1, rope scaling", "Gemma 2"])
def test_verify_reports_a_difference_only_if_there_is_one(name, small_tokenizer, tmp_path):
    peer = build(CASES[name])
    save(peer, small_tokenizer, tmp_path / "hf")
    export_tokenizer_settings(tmp_path / "hf")
    text = tmp_path / "text.txt"
    text.write_text("Document 3: 4+5=9. and so on, and so forth. " * 10)
    folder = HuggingFaceFolder(tmp_path / "hf")
    config = Pretrained.of_folder(folder).model
    tokens, logits, losses = verify(folder, config, text)
    assert "all" in tokens and difference(logits) < LARGEST and difference(losses) < LARGEST
    # The same weights with another base of the rotary frequencies.
    wrong = dataclasses.replace(config, rope_theta=1000.0)
    _, logits, losses = verify(folder, wrong, text)
    assert difference(logits) > 100 * LARGEST and "at position" in losses


def test_the_text_model_of_a_model_of_text_and_images(small_tokenizer, tmp_path):
    """A folder like that of google/gemma-3-4b-it. Its text model is read, and exported on its own."""
    case = CASES["Gemma 3, rope scaling, soft cap"]
    text = build(case).config.to_dict() | {"final_logit_softcapping": None}  # which this class ignores
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    config.text_config._attn_implementation = "eager"
    peer = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    save(peer, small_tokenizer, tmp_path / "hf", max_shard_size="40KB")
    assert {"language_model", "vision_tower"} <= {name.split(".")[0] for name in stored(tmp_path / "hf")}
    graphdef, params = load(tmp_path / "hf")
    assert logits_difference(graphdef, params, peer) < LARGEST
    exported = families.export_again(tmp_path / "hf")
    before = {name.removeprefix("language_model."): value for name, value in stored(tmp_path / "hf").items()}
    after = stored(exported)
    assert after.keys() == {name for name in before if name.startswith("model.")}
    assert all(before[name] == value for name, value in after.items())
    again = transformers.AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager")
    assert type(again) is transformers.Gemma3ForCausalLM
    assert logits_difference(graphdef, params, again) < LARGEST


def difference(line: str) -> float:
    return float(re.search(r"difference (\S+) at position", line)[1])


def export_tokenizer_settings(folder: pathlib.Path) -> None:
    """Writes what Transformers needs to read a bare SentencePiece model."""
    (folder / "tokenizer_config.json").write_text(json.dumps(sentencepiece_settings(Tokenizer(folder))))


def test_fine_tuning_against_torch_with_ignored_labels(small_tokenizer, tmp_path):
    """Compares the gradient of one step over packed conversations with each conversation alone in torch."""
    peer = build(CASES["Llama 2 (TinyLlama), K < H"])
    save(peer, small_tokenizer, tmp_path)
    graphdef, params = load(tmp_path)
    records = [
        {"prompt": f"{n}+{n}=?", "response": f"so {2 * n}\n```output\n{2 * n}\n```\nDocument {n}"} for n in range(5)
    ]
    encoded = [transcripts.encode(exchanges(record, Transcripts()), small_tokenizer) for record in records]
    documents = Documents(
        np.concatenate([np.array(ids, np.int32) for ids, _ in encoded]),
        np.array([len(ids) for ids, _ in encoded]),
        np.concatenate([np.array(trained) for _, trained in encoded]),
    )
    packed = list(pack_whole([documents], 127))
    rows = Batch(*(np.concatenate(parts) for parts in zip(*(row[:3] for row in packed))))
    assert len(rows.tokens) < len(records)
    sgd = optax.sgd(1.0)
    step = make_train_step(
        graphdef,
        None,
        sgd,
        rule=selection_of(score="none"),
        steps=1,
        microbatches=1,
        document_mask=True,
        seed=0,
    )
    state = TrainState(jnp.int32(0), params, sgd.init(params))
    after, metrics, _ = jax.jit(step)(state, None, rows)

    total, count = 0.0, 0
    for ids, trained in encoded:
        labels = torch.tensor([token if flag else -100 for token, flag in zip(ids, trained)])[1:]
        logits = peer(torch.tensor([ids[:-1]])).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    assert int(metrics["selected_count"]) == count
    np.testing.assert_allclose(float(metrics["selected_loss"]), float(total.detach()) / count, rtol=1e-5)
    updates = tensors(jax.tree.map(lambda b, a: np.asarray(b, np.float64) - np.asarray(a), params, after.params))
    for name, parameter in peer.named_parameters():
        gradient = parameter.grad.numpy()
        assert np.linalg.norm(updates[name] - gradient) < LARGEST * np.linalg.norm(gradient), name


def test_a_tokenizer_that_transformers_made_of_a_published_model(tmp_path):
    """Mistral's SentencePiece model, saved by Transformers as tokenizer.json, gives the ids that Transformers gives.

    For several spaces in a row they differ from SentencePiece's own ids, because the conversion is not exact.
    """
    published = pathlib.Path(str(importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"))
    shutil.copyfile(published, tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    converted = Tokenizer(tmp_path / "saved")
    assert converted.path.name == "tokenizer.json"
    assert (converted.bos_id, converted.eos_id, converted.vocab_size) == (1, 2, 32_000)
    for text in texts():
        assert converted.encode_prompt(text) == theirs(text)["input_ids"]
        assert converted.decode(converted.encode_prompt(text)) == theirs.decode(theirs(text)["input_ids"][1:])


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "gpt_neox", "llama", "qwen3"])
def test_transformers_reads_a_tokenizer_json_whose_settings_name_no_class(model_type, tmp_path):
    """Otherwise it rebuilds the tokenizer from the vocabulary, with the rules of the model type."""
    published = Tokenizer(
        pathlib.Path(str(importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"))
    )
    settings = sentencepiece_settings(published)
    published.save(tmp_path / "source")
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    transformers.AutoTokenizer.from_pretrained(tmp_path / "source").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "add_bos_token": False}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = Tokenizer(tmp_path)
    complete_tokenizer_settings(tmp_path, tokenizer)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert hf_tokenizer.eos_token == "</s>"
    for text in texts():
        assert tokenizer.encode(text) == hf_tokenizer(text, add_special_tokens=False)["input_ids"], text


def texts() -> list[str]:
    """Texts that tokenizers get wrong."""
    return [
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
        "  two spaces,\ttab\n\n\nand three line ends ",
        "na\u00efve \u65e5\u672c\u8a9e \U0001f600 \u0416 e\u0301",
        "\\begin{equation} \\sum_{i=1}^n x_i^2 \\end{equation}",
    ]
