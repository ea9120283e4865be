"""A real language model, SmolLM2-135M-Instruct, from its folder to an exported fine-tuned copy, beside Transformers."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from helpers import options

from rho1_jax.configs import default
from rho1_jax.data.chat_template import ChatTemplate
from rho1_jax.data.preparation import prepare
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.export_hf import export_hf
from rho1_jax.generate import generate_text
from rho1_jax.models import decoder
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.metrics import read_metrics
from rho1_jax.train import train_model
from rho1_jax.training.pretrained import Pretrained
from tools.real_model import make_folder

pytestmark = pytest.mark.peers

PROMPTS = [
    "What is the capital of France?",
    "Name three primary colors.",
    "Write one sentence about the sea.",
    "How many days are there in a leap year?",
    "Translate 'good morning' into Spanish.",
    "What is 12 plus 30?",
    "Who wrote Romeo and Juliet?",
    "Give me a synonym for 'happy'.",
    "What do bees make?",
    "List the first five prime numbers.",
    "Explain photosynthesis to a child.",
    "What is the boiling point of water in Celsius?",
    "Write a Python function that adds two numbers.",
    "Which planet is closest to the Sun?",
    "Is a tomato a fruit or a vegetable?",
    "Tom has 3 apples and buys 4 more. How many apples has he?",
    "Finish the proverb: a stitch in time",
    "What is the opposite of 'cold'?",
    "Name a famous painting by Leonardo da Vinci.",
    "Why is the sky blue?",
]
NEW_TOKENS = 12
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "smollm2"
    try:
        make_folder(path)
    except UserError as error:
        pytest.skip(f"there is no real model to compare with: {error}")
    return path


@pytest.fixture(scope="module")
def peer(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def peer_tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompt_ids(folder):
    """The prompts in the model's chat template, as token ids."""
    tokenizer = Tokenizer(folder)
    template = ChatTemplate.open(folder)
    return [template.prompt_ids([SYSTEM, {"role": "user", "content": text}], tokenizer) for text in PROMPTS]


def test_chat_prompts_have_the_token_ids_of_transformers(prompt_ids, peer_tokenizer):
    for text, ids in zip(PROMPTS, prompt_ids):
        messages = [SYSTEM, {"role": "user", "content": text}]
        expected = peer_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == expected


def test_a_conversation_has_the_token_ids_of_transformers_and_its_answers_are_trained_on(folder, peer_tokenizer):
    messages = [SYSTEM, {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}]
    ids, is_trained = ChatTemplate.open(folder).encode(messages, [False, False, True], None, Tokenizer(folder))
    assert ids == peer_tokenizer.apply_chat_template(messages, return_dict=False)
    assert peer_tokenizer.decode([i for i, trained in zip(ids, is_trained) if trained]) == "It is 2.<|im_end|>"


def test_logits_are_those_of_transformers(folder, prompt_ids, peer):
    model = Pretrained.open(folder, "--checkpoint")
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        params = model.load(mesh, "float32")
        ids = np.array([prompt_ids[0]], np.int32)
        policy = decoder.nnx.merge(decoder.build(model.model), params)
        hidden = policy(ids, np.ones_like(ids))
        ours = np.asarray(hidden @ policy.output_VD().T)
    with torch.no_grad():
        theirs = peer(torch.tensor(ids)).logits.numpy()
    assert np.abs(ours - theirs).max() < 2e-3  # of logits up to 30, through 30 layers in float32


def test_greedy_answers_are_those_of_transformers(folder, prompt_ids, peer, peer_tokenizer):
    ours = generate_text(folder, prompt_ids, max_new_tokens=NEW_TOKENS)
    for continuation, ids in zip(ours, prompt_ids):
        with torch.no_grad():
            row = peer.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        assert continuation.text == peer_tokenizer.decode(row[len(ids) :], skip_special_tokens=True)


def test_five_steps_of_slm_and_the_exported_model(folder, tmp_path, prompt_ids):
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text * 5}) + "\n" for text in PROMPTS))
    prepare([source], Tokenizer(folder), tmp_path / "data", options(seq_len=64), 1)
    config = default.get_config("slm")
    config.update(steps=5, batch_size=2, log_every=1)
    config.init.checkpoint = config.reference.checkpoint = str(folder)
    config.data.train = str(tmp_path / "data")
    config.optimizer.learning_rate = 1e-4
    config.mesh.update(data=1, fsdp=-1)
    config.batch_size = 8
    train_model(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert abs(rows[0]["mean_excess"]) < 1e-5  # both models start from the same weights
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (tmp_path / "run" / "config.json").read_text().count('"layers": 30')

    export_hf(str(tmp_path / "run"), tmp_path / "exported", None)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    (ours,) = generate_text(tmp_path / "run", prompt_ids[:1], max_new_tokens=8)
    with torch.no_grad():
        row = exported.generate(torch.tensor(prompt_ids[:1]), max_new_tokens=8, do_sample=False)[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert ours.text == tokenizer.decode(row[len(prompt_ids[0]) :], skip_special_tokens=True)
