"""Computed FLOPs against XLA's count, and the ledger of a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import config_of, random_batch, tiny

from rho1_jax.models import decoder
from rho1_jax.models.families import FAMILIES
from rho1_jax.models.forward import make_token_losses
from rho1_jax.models.structure import Structure
from rho1_jax.runtime.metrics import read_metrics
from rho1_jax.train import train_model
from rho1_jax.training import accounting
from rho1_jax.training.accounting import ForwardFlops, training_flops


@pytest.mark.parametrize(
    "changes",
    [
        {"tied_embeddings": True},
        {"tied_embeddings": False},
        {"family": "gpt_neox", "kv_heads": 4, "width": 512},  # wider, because XLA counts 70 FLOPs per exact GELU
        {"family": "granite"},
    ],
    ids=str,
)
def test_forward_flops_match_the_compiled_program(changes):
    # One layer, because XLA counts the body of a scan once. The width makes norms and softmax negligible.
    length = 128
    sizes = {"width": 256, "layers": 1, "heads": 4, "head_width": 64, "ff_width": 1024, "vocab_size": 512}
    config = tiny(**sizes | changes, loss_chunk=128)
    params = decoder.init_params(config, 0)
    losses = make_token_losses(decoder.build(config), document_mask=True)
    compiled = jax.jit(losses).lower(params, jax.tree.map(jnp.asarray, random_batch(1, length))).compile()
    forward = ForwardFlops.of(config, length)
    # With two blocks of 64 queries, XLA computes all keys for the second block and half of them for the first.
    extra = 4 * config.heads * config.head_width * (0.75 * length - accounting.seen_keys(length, None))
    assert forward.total + extra == pytest.approx(compiled.cost_analysis()["flops"] / length, rel=0.03)
    assert forward.head == 2 * 512 * config.width


def test_seen_keys_match_a_count():
    for length, window in ((7, None), (7, 3), (4, 9)):
        counted = [min(query + 1, window or length) for query in range(length)]
        assert accounting.seen_keys(length, window) == pytest.approx(np.mean(counted))


def test_only_selected_tokens_go_through_the_heads_backward_pass():
    policy, reference = ForwardFlops(layers=10.0, head=4.0), ForwardFlops(layers=3.0, head=1.0)
    expected = {"policy_forward": 1400.0, "policy_backward": 2480.0, "reference_forward": 400.0}
    assert training_flops(policy, reference, 100, 60) == expected
    assert training_flops(policy, None, 100, 100)["reference_forward"] == 0


def test_the_backward_pass_counts_few_tokens():
    """Norms, keys, values and attention itself go through all tokens."""
    forward = ForwardFlops.of(tiny(layers=3), 16)
    weights = 2 * 32 * 4 * 8 + 3 * 32 * 48  # queries and attention output; gate, up and down
    assert forward.few == 2 * 3 * weights
    few, full = (training_flops(forward, forward, 100, 60, tokens) for tokens in (0.3, 1.0))
    assert full["policy_backward"] - few["policy_backward"] == pytest.approx(2 * 100 * 0.7 * forward.few)
    assert few["policy_forward"] == full["policy_forward"]


def test_ledger_and_trace_of_a_run(data, reference, tmp_path, monkeypatch):
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(accounting.CHIPS, kind, accounting.Chip(1e12, 1e9, 1e9, 1e9))
    config = config_of("slm", data, reference)
    config.trace.update(first=3, last=4)
    train_model(config, tmp_path / "run")
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    last = read_metrics(tmp_path / "run")[-1]
    assert ledger["chips"] == 8 and ledger["chip"] == kind
    forward = ForwardFlops.of(tiny(vocab_size=300), 16)
    assert ledger["flops"] == training_flops(forward, forward, last["tokens_seen"], last["tokens_selected"]) | {
        "scoring": 0.0
    }
    assert 0 < ledger["goodput"] < 1 and ledger["step_seconds"] < ledger["seconds"]
    flops_a_token = sum(ledger["flops"].values()) / last["tokens_seen"]
    assert ledger["mfu"] == pytest.approx(ledger["tokens_per_second_per_chip"] * flops_a_token / 1e12)
    assert last["mfu"] == pytest.approx(last["tokens_per_second"] / 8 * flops_a_token / 1e12, rel=0.02)
    assert list((tmp_path / "run" / "trace").rglob("*.xplane.pb"))


def test_windows_count_layer_by_layer(monkeypatch):
    """Two layers of three have a window of 4; the third sees whole rows."""
    alternating = dataclasses.replace(
        FAMILIES["llama"], name="alternating", structure=lambda model: Structure(windows=(4, 4, None))
    )
    monkeypatch.setitem(FAMILIES, "alternating", alternating)
    layers = {
        name: ForwardFlops.of(tiny(layers=3, **changes), 16).layers
        for name, changes in (
            ("alternating", {"family": "alternating"}),
            ("window", {"family": "mistral", "sliding_window": 4}),
            ("full", {}),
        )
    }
    assert layers["window"] < layers["alternating"] < layers["full"]
    assert layers["alternating"] == pytest.approx((2 * layers["window"] + layers["full"]) / 3)
