"""Compares the model, its gradients and the method with Transformers' Llama in float64 (extra `peers`)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from helpers import random_batch, selection_of, tensors, tiny

from rho1_jax.data.packing import Batch
from rho1_jax.models import decoder
from rho1_jax.models.forward import make_token_losses
from rho1_jax.training.state import TrainState
from rho1_jax.training.train_step import make_train_step

pytestmark = pytest.mark.peers

CONFIGS = {
    "grouped, tied": tiny(),
    "one key head, untied": tiny(kv_heads=1, tied_embeddings=False),
    "no grouping, wide heads": tiny(kv_heads=4, head_width=16, rope_theta=500_000.0, norm_eps=1e-6),
}
RELATIVE = 1e-5


def torch_llama(config, params):
    """Transformers' Llama in float64, with our weights."""
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            intermediate_size=config.ff_width,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied_embeddings,
            attn_implementation="eager",
        )
    ).double()
    state = {name: torch.from_numpy(array) for name, array in tensors(double(params)).items()}
    if config.tied_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    llama.load_state_dict(state)
    return llama


def double(tree):
    """The arrays in float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def torch_losses(llama, tokens):
    logits = llama(torch.from_numpy(tokens[:, :-1]).long()).logits
    targets = torch.from_numpy(tokens[:, 1:]).long()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def assert_gradients_close(ours, llama):
    theirs = dict(llama.named_parameters())
    for name, gradient in tensors(double(ours)).items():
        expected = theirs[name].grad.numpy()
        error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
        assert error < RELATIVE, f"{name}: {error:.2e}"


def whole_rows(seed):
    """Rows with one document each, which Transformers can compute."""
    tokens = random_batch(4, 24, seed).tokens
    return Batch(np.where(tokens == 0, 1, tokens), np.ones_like(tokens))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_losses_and_gradients_of_the_whole_model(config):
    params, rows = decoder.init_params(config, 0), whole_rows(0)
    losses = make_token_losses(decoder.build(config), document_mask=True)
    mean, gradient = jax.value_and_grad(lambda p: losses(p, rows)[0].mean())(params)
    llama = torch_llama(config, params)
    expected = torch_losses(llama, rows.tokens)
    expected.mean().backward()
    np.testing.assert_allclose(losses(params, rows)[0], expected.detach().numpy(), rtol=RELATIVE)
    np.testing.assert_allclose(float(mean), float(expected.detach().mean()), rtol=RELATIVE)
    assert_gradients_close(gradient, llama)


def test_packed_documents_have_the_losses_of_documents_alone():
    config = CONFIGS["grouped, tied"]
    params = decoder.init_params(config, 0)
    tokens = whole_rows(1).tokens[:1]
    packed = Batch(tokens, np.array([[1] * 9 + [2] * 16]))
    loss, eligible = make_token_losses(decoder.build(config), document_mask=True)(params, packed)
    llama = torch_llama(config, params)
    alone = [torch_losses(llama, tokens[:, :9]), torch_losses(llama, tokens[:, 9:])]
    np.testing.assert_allclose(loss[eligible], torch.cat(alone, dim=1)[0].detach().numpy(), rtol=RELATIVE)


def test_slm_loss_and_gradient_equal_ten_lines_of_torch():
    config = CONFIGS["grouped, tied"]
    policy, reference, rows = decoder.init_params(config, 0), decoder.init_params(config, 1), whole_rows(2)
    graphdef = decoder.build(config)
    step = make_train_step(
        graphdef,
        graphdef,
        optax.sgd(1.0),
        rule=selection_of(ratio=0.6),
        steps=1,
        microbatches=1,
        document_mask=True,
        seed=0,
    )
    state = TrainState(jnp.int32(0), policy, optax.sgd(1.0).init(policy))
    after, metrics, selected = jax.jit(step)(state, reference, rows)

    llama = torch_llama(config, policy)
    policy_loss = torch_losses(llama, rows.tokens)
    with torch.no_grad():
        excess = policy_loss - torch_losses(torch_llama(config, reference), rows.tokens)
    kept = torch.zeros_like(excess, dtype=torch.bool).view(-1)
    kept[excess.view(-1).topk(-(-excess.numel() * 6 // 10)).indices] = True
    loss = policy_loss.view(-1)[kept].mean()
    loss.backward()

    np.testing.assert_array_equal(selected, kept.view(excess.shape).numpy())
    np.testing.assert_allclose(float(metrics["selected_loss"]), float(loss.detach()), rtol=RELATIVE)
    update = jax.tree.map(lambda b, a: np.asarray(b, np.float64) - np.asarray(a, np.float64), policy, after.params)
    theirs = dict(llama.named_parameters())
    for name, gradient in tensors(update).items():
        # The difference of two float32 parameters has their rounding error, so the bound is absolute.
        error = np.abs(gradient - theirs[name].grad.numpy()).max()
        assert error < 1e-6, f"{name}: {error:.2e}"
