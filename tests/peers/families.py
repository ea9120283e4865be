"""Tiny random models of every family, made by Transformers, and how much our decoder differs from them.

`python tests/peers/families.py [WORD ...]` prints the table of differences, or its rows with one of the words.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections import deque
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
import transformers
from flax import nnx
from helpers import tensors
from safetensors import safe_open

from rho1_jax.data.packing import Batch
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.export_hf import export_hf
from rho1_jax.import_hf import import_hf
from rho1_jax.models import decoder, hf_config
from rho1_jax.models.forward import make_token_losses
from rho1_jax.models.generation import Generator
from rho1_jax.models.hf_folder import HuggingFaceFolder
from rho1_jax.models.structure import soft_cap
from rho1_jax.runtime import sharding
from rho1_jax.train_tokenizer import train_tokenizer

RUN_SETTINGS = {"compute_dtype": "float32", "attention": "auto", "remat": "none", "unroll": 1, "loss_chunk": 16}
LENGTH = 48
VOCAB = 320


@dataclasses.dataclass(frozen=True)
class Case:
    """One model: Transformers' config class, and the values that are not its defaults."""

    config: type
    changes: dict[str, Any]
    norm_mean: float = 1.0  # of the random norm scales


def _rope(theta, **scaling):
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **scaling}}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # puts a frequency between the two factors
}
FACTORS = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 2.0, 5.0, 30.0]}
CASES = {
    "Llama 2, K = H": Case(transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "Llama 2 (TinyLlama), K < H": Case(transformers.LlamaConfig, {}),
    "Llama 2, K = 1, head_dim not D / H": Case(transformers.LlamaConfig, {"num_key_value_heads": 1, "head_dim": 12}),
    "Llama 3.1, rope scaling": Case(transformers.LlamaConfig, _rope(500_000.0, **LLAMA3)),
    "Llama 3.2, rope scaling, tied": Case(
        transformers.LlamaConfig, {"tie_word_embeddings": True, **_rope(500_000.0, **LLAMA3 | {"factor": 32.0})}
    ),
    "Llama 2, linear rope scaling": Case(transformers.LlamaConfig, _rope(10_000.0, rope_type="linear", factor=4.0)),
    "Mistral 0.1, sliding window": Case(transformers.MistralConfig, {"sliding_window": 7}),
    "Mistral 0.3, explicit head_dim": Case(
        transformers.MistralConfig, {"sliding_window": None, "head_dim": 16, **_rope(1_000_000.0)}
    ),
    "Qwen2.5, biases": Case(transformers.Qwen2Config, {"rms_norm_eps": 1e-6, **_rope(1_000_000.0)}),
    "Qwen2.5, tied, K = 1": Case(
        transformers.Qwen2Config, {"tie_word_embeddings": True, "num_key_value_heads": 1, **_rope(1_000_000.0)}
    ),
    "Qwen2, sliding window": Case(
        transformers.Qwen2Config, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}
    ),
    "Qwen3, q/k norm": Case(transformers.Qwen3Config, {"head_dim": 16, **_rope(1_000_000.0)}),
    "Qwen3, tied": Case(transformers.Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}),
    "Pythia, parallel residual": Case(
        transformers.GPTNeoXConfig, {"num_key_value_heads": 4, **_rope(10_000.0, partial_rotary_factor=0.5)}
    ),
    "GPT-NeoX, sequential, tied": Case(
        transformers.GPTNeoXConfig,
        {"num_key_value_heads": 4, "use_parallel_residual": False, "tie_word_embeddings": True},
    ),
    "Granite 3, tied": Case(
        transformers.GraniteConfig,
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.22,
            "logits_scaling": 7.0,
            "tie_word_embeddings": True,
        },
    ),
    "Granite 3, rope scaling": Case(transformers.GraniteConfig, {"logits_scaling": 2.0, **_rope(500_000.0, **LLAMA3)}),
    "Phi-3, sliding window": Case(transformers.Phi3Config, {"sliding_window": 7}),
    # A context of 128 tokens: the attention factor follows from the original length.
    "Phi-3, short factors": Case(
        transformers.Phi3Config, {"original_max_position_embeddings": 64, **_rope(10_000.0, **FACTORS)}
    ),
    # Shorter than every prompt, so that Transformers uses the long factors from the start.
    "Phi-3, long factors": Case(
        transformers.Phi3Config,
        {"original_max_position_embeddings": 2, **_rope(10_000.0, **FACTORS, attention_factor=1.2)},
    ),
    "Phi-4-mini, partial rotary, long factors, tied": Case(
        transformers.Phi3Config,
        {
            "hidden_size": 64,
            "original_max_position_embeddings": 2,
            "tie_word_embeddings": True,
            **_rope(
                10_000.0,
                rope_type="longrope",
                partial_rotary_factor=0.75,
                short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                long_factor=[1.0, 1.5, 2.0, 4.0, 8.0, 16.0],
                attention_factor=1.3,
            ),
        },
    ),
    "Gemma 2": Case(
        transformers.Gemma2Config,
        {"head_dim": 12, "query_pre_attn_scalar": 8, "sliding_window": 7},
        norm_mean=0.0,  # stored without the offset of 1
    ),
    "Gemma 2, no soft caps": Case(
        transformers.Gemma2Config,
        {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 7},
        norm_mean=0.0,
    ),
    "Gemma 3": Case(
        transformers.Gemma3TextConfig,
        {"head_dim": 12, "query_pre_attn_scalar": 8, "sliding_window": 7, "num_hidden_layers": 7},
        norm_mean=0.0,
    ),
    "Gemma 3, rope scaling, soft cap": Case(
        transformers.Gemma3TextConfig,
        {
            "head_dim": 8,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
            },
        },
        norm_mean=0.0,
    ),
    "OLMo 2, K = H": Case(transformers.Olmo2Config, {"num_key_value_heads": 4, **_rope(500_000.0)}),
    "OLMo 2, K < H": Case(transformers.Olmo2Config, {"rms_norm_eps": 1e-6}),
    "SmolLM3": Case(transformers.SmolLM3Config, {"num_hidden_layers": 5, **_rope(5_000_000.0)}),
    "SmolLM3, untied": Case(transformers.SmolLM3Config, {"no_rope_layer_interval": 2, "tie_word_embeddings": False}),
}


def byte_level(case: Case) -> bool:
    """True if Transformers reads a folder of this model with a byte-level tokenizer, regardless of its files."""
    return case.config is transformers.Qwen2Config


def build(case: Case, seed: int = 0) -> transformers.PreTrainedModel:
    """The model with random weights, including norms and biases, which Transformers sets to ones and zeros."""
    config = case.config(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
            "attn_implementation": "eager",
            **case.changes,
        }
    )
    torch.manual_seed(seed)
    peer = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            torch.nn.init.normal_(parameter, mean=case.norm_mean if "norm" in name else 0.0, std=0.2)
    return peer.eval()


def save(peer: transformers.PreTrainedModel, tokenizer: Tokenizer, directory: pathlib.Path, **options) -> None:
    """Writes the model with save_pretrained, and a tokenizer."""
    peer.save_pretrained(directory, **options)
    tokenizer.save(directory)


def load(directory: pathlib.Path, dtype: str | None = "float32", mesh: jax.sharding.Mesh | None = None):
    """Reads the folder as our model: structure and parameters, on one device if no mesh is given."""
    folder = HuggingFaceFolder(directory)
    config = hf_config.from_hf(folder.config, str(directory), RUN_SETTINGS)
    mesh = mesh or sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return decoder.build(config), folder.load(config, mesh, dtype)


def eight_devices(peer: transformers.PreTrainedModel) -> jax.sharding.Mesh:
    """A mesh that uses all three axes, or only two if the model has a single key/value head."""
    return sharding.make_mesh(2, 2, 2) if peer.config.num_key_value_heads % 2 == 0 else sharding.make_mesh(2, 4, 1)


@jax.jit(static_argnums=0)
def our_logits(graphdef, params, ids_BL):
    decoder = nnx.merge(graphdef, params)
    hidden_BLD = decoder(ids_BL, jnp.ones_like(ids_BL))
    return soft_cap(jnp.einsum("BLD,VD->BLV", hidden_BLD, decoder.output_VD()), decoder.structure.logit_soft_cap)


def random_ids(rows: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, LENGTH + 1)).astype(np.int32)


def logits_difference(graphdef, params, peer) -> float:
    """Largest absolute difference between logits, in float32."""
    ids = random_ids()
    with torch.no_grad():
        theirs = peer(torch.from_numpy(ids).long()).logits.numpy()
    return float(np.abs(np.asarray(our_logits(graphdef, params, ids)) - theirs).max())


def gradient_difference(graphdef, params, peer) -> float:
    """Largest relative difference, in norm, between gradients of the mean loss with respect to a parameter."""
    ids = random_ids(seed=1)
    losses = make_token_losses(graphdef, document_mask=True)
    gradient = jax.jit(jax.grad(lambda p: losses(p, Batch(ids, np.ones_like(ids)))[0].mean()))(params)
    ours = tensors(gradient, nnx.merge(graphdef, params).config.family)
    peer.zero_grad()
    logits = peer(torch.from_numpy(ids[:, :-1]).long()).logits
    torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.from_numpy(ids[:, 1:]).long()).backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in peer.named_parameters()}
    if "gpt_neox.embed_in.weight" in theirs:
        # Transformers renames the head of GPT-NeoX when it reads and writes files.
        theirs = {name.replace("lm_head", "embed_out"): gradient for name, gradient in theirs.items()}
    assert ours.keys() == theirs.keys()
    return max(
        float(np.linalg.norm(ours[name] - gradient) / np.linalg.norm(gradient)) for name, gradient in theirs.items()
    )


def generations(
    graphdef, params, peer, tokenizer: Tokenizer, new_tokens: int = 24
) -> tuple[list[str], list[str], float]:
    """Greedy continuations of the same prompts by us and by Transformers.

    The number is the largest difference between log-probabilities of the generated tokens, in nats.
    """
    prompts = ["Document 3: 4+", "and so on", "x = y"]
    requests = deque(enumerate(prompts))
    generator = Generator(graphdef, params, tokenizer, len(prompts))
    ours = sorted(generator.run(requests, max_new_tokens=new_tokens, stops=()))
    theirs, differences = [], []
    for prompt, continuation in zip(prompts, ours):
        ids = torch.tensor([tokenizer.encode_prompt(prompt)])
        options = {"max_new_tokens": new_tokens, "output_scores": True, "return_dict_in_generate": True}
        with torch.no_grad():
            out = peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **options)
        new = out.sequences[0].tolist()
        new = new[: len(new) - (new[-1] == tokenizer.eos_id)]
        theirs.append(tokenizer.decode(new)[len(tokenizer.decode(ids[0].tolist())) :])
        logprobs = torch.log_softmax(torch.cat(out.scores), dim=-1).max(dim=-1).values.numpy()
        differences.append(np.abs(logprobs[: len(continuation.logprobs)] - continuation.logprobs).max())
    return [continuation.text for continuation in ours], theirs, float(max(differences))


def stored(folder: pathlib.Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor in a folder."""
    contents = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                contents[name] = (opened.get_slice(name).get_dtype(), opened.get_tensor(name).tobytes())
    return contents


def export_again(directory: pathlib.Path) -> pathlib.Path:
    """Imports a folder and exports it again, beside it."""
    imported, exported = directory.with_name("imported"), directory.with_name("exported")
    import_hf(directory, imported, dtype=None)
    export_hf(str(imported), exported, dtype=None)
    return exported


def make_tokenizer(directory: pathlib.Path) -> Tokenizer:
    """Trains a small SentencePiece model with VOCAB pieces."""
    text = directory / "corpus.jsonl"
    lines = [f"Document {n}: {n}+{n % 7}={n + n % 7}. and so on, and so forth {n * n}" for n in range(300)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    train_tokenizer([text], directory / "tokenizer.model", VOCAB, ["{text}"], max_sentences=1000)
    return Tokenizer(directory / "tokenizer.model")


def make_byte_level_tokenizer(directory: pathlib.Path) -> Tokenizer:
    """Trains a tokenizer.json of the kind that Transformers expects beside a Qwen model, without BOS."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = transformers.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    lines = [f"Document {n}: {n}+{n % 7}={n + n % 7}. and so on, and so forth {n * n}" for n in range(300)]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    return Tokenizer(directory)


def main() -> None:
    """Prints a Markdown table of the largest differences, on one device / on eight."""
    print("| family | logits, absolute | gradients, relative | greedy generation | out and back |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = make_tokenizer(pathlib.Path(scratch))
        for number, (name, case) in enumerate(CASES.items()):
            if not any(word in name for word in sys.argv[1:] or [""]):
                continue
            peer, directory = build(case), pathlib.Path(scratch) / str(number) / "hf"
            save(peer, make_byte_level_tokenizer(pathlib.Path(scratch)) if byte_level(case) else tokenizer, directory)
            cells: list[list[str]] = [[], [], []]
            for mesh in (sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]), eight_devices(peer)):
                with jax.set_mesh(mesh):
                    graphdef, params = load(directory, mesh=mesh)
                    ours, theirs, _ = generations(graphdef, params, peer, tokenizer)
                    cells[0].append(f"{logits_difference(graphdef, params, peer):.1e}")
                    cells[1].append(f"{gradient_difference(graphdef, params, peer):.1e}")
                    cells[2].append("equal" if ours == theirs else "DIFFERS")
            same = "equal" if stored(export_again(directory)) == stored(directory) else "DIFFERS"
            print(f"| {name} | {' | '.join(map(' / '.join, cells))} | {same} |", flush=True)


if __name__ == "__main__":
    main()
