"""Families: those of the package, that of docs/guides/add_family.md, followed literally, and the registry."""

import dataclasses
import importlib
import json
import re
import sys
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import MODELS, RUN_SETTINGS, TINY, random_batch, root, selection_of, tensors, tiny
from safetensors.numpy import load_file, save_file

from rho1_jax.data.packing import Batch
from rho1_jax.evals.lm_eval_adapter import LanguageModel
from rho1_jax.export_hf import export_hf
from rho1_jax.import_hf import import_hf
from rho1_jax.models import decoder, hf_config
from rho1_jax.models.families import FAMILIES, family_of, register_family
from rho1_jax.models.forward import make_token_losses
from rho1_jax.models.generation import Generator
from rho1_jax.models.layer import Layer, RMSNorm
from rho1_jax.models.rope import Rope
from rho1_jax.models.structure import Structure, soft_cap
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError
from rho1_jax.training.config import model_config
from rho1_jax.training.state import TrainState
from rho1_jax.training.train_step import make_train_step

PAGE = root() / "docs" / "guides" / "add_family.md"
SMALL = {name: getattr(TINY, name) for name in ("width", "heads", "kv_heads", "head_width", "ff_width", "loss_chunk")}


@pytest.fixture(scope="module")
def zigzag(tmp_path_factory):
    """The page's model at test size. Its two files are saved in a folder, which is on Python's path."""
    folder = tmp_path_factory.mktemp("page")
    files = dict(re.findall(r'```python title="(\w+)\.py"\n(.*?)```', PAGE.read_text(), re.DOTALL))
    assert list(files) == ["zigzag", "zigzag_config"]
    for name, code in files.items():
        (folder / f"{name}.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        config = importlib.import_module("zigzag_config").get_config("slm")
        assert (config.model.family, config.model.layers) == ("zigzag", 5)
        config.model.update(SMALL, vocab_size=64, sliding_window=3, context_length=64)
        yield model_config(config)
    for name in files:
        del sys.modules[name]
    del FAMILIES["zigzag"]


@pytest.fixture(params=["zigzag", *MODELS])
def model(request):
    return MODELS.get(request.param) or request.getfixturevalue("zigzag")


def sharp(config, seed=3):
    """Structure and parameters; larger ones than at the start of training, so that the next token is clear."""
    return decoder.build(config), jax.tree.map(lambda x: 3 * x, decoder.init_params(config, seed))


@pytest.mark.slow
def test_a_family_trains_on_a_mesh_as_on_one_device(model):
    graphdef, optimizer, batches = decoder.build(model), optax.sgd(1.0), [random_batch(8, 16, n) for n in range(2)]
    params, reference = decoder.init_params(model, 0), decoder.init_params(model, 1)
    settings = {"rule": selection_of(), "steps": 2, "microbatches": 1, "document_mask": True, "seed": 0}
    results = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
        with jax.set_mesh(mesh):
            placed = [jax.device_put(p, sharding.param_shardings(p, mesh)) for p in (params, reference)]
            step = jax.jit(make_train_step(graphdef, graphdef, optimizer, **settings))
            state, selections = TrainState(jnp.int32(0), placed[0], optimizer.init(placed[0])), []
            for batch in batches:
                state, _, selected = step(state, placed[1], jax.device_put(batch, sharding.batch_sharding(mesh)))
                selections.append(np.asarray(selected))
            results.append((jax.device_get(state.params), selections))
    (alone, selected), (spread, selected_spread) = results
    np.testing.assert_array_equal(selected_spread, selected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), spread, alone)
    assert tensors(spread, model.family).keys() == tensors(alone, model.family).keys()  # what export writes
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), alone, params)
    assert min(jax.tree.leaves(moved)) > 1e-5


@pytest.mark.slow
def test_a_family_decodes_as_one_pass_over_the_whole_text(model, tokenizer):
    config = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    graphdef, params = sharp(config)
    prompts = ["Document 1: 3+4=", "D", "and so on, and so"]
    generator = Generator(graphdef, params, tokenizer, 2)
    requests = deque(enumerate(prompts))
    whole_rows = nnx.merge(graphdef, params)
    for continuation in generator.run(requests, max_new_tokens=40, stops=()):
        ids = tokenizer.encode_prompt(prompts[continuation.number])
        whole = jnp.array([ids + continuation.token_ids])
        hidden = whole_rows(whole, jnp.ones_like(whole))[0, len(ids) - 1 : -1]
        logits = soft_cap(hidden @ whole_rows.output_VD().T, whole_rows.structure.logit_soft_cap)
        logprobs = jax.nn.log_softmax(logits)
        assert len(continuation.token_ids) > 6  # more than two windows
        np.testing.assert_array_equal(logprobs.argmax(axis=-1), continuation.token_ids)
        np.testing.assert_allclose(continuation.logprobs, logprobs.max(axis=-1), rtol=1e-4, atol=1e-4)


def test_a_family_goes_out_to_hugging_face_and_back_bit_for_bit(model, tokenizer, tmp_path):
    config = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    (tmp_path / "hf").mkdir()
    params = jax.tree.map(lambda x: x + 0.01 * jnp.arange(x.size).reshape(x.shape), decoder.init_params(config, 1))
    save_file(tensors(params, model.family), tmp_path / "hf" / "model.safetensors")
    described = hf_config.to_hf(config, "float32", tokenizer.bos_id, tokenizer.eos_id)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(described))
    tokenizer.save(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "imported", dtype=None)
    export_hf(str(tmp_path / "imported"), tmp_path / "exported", dtype=None)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "exported"))
    assert before.keys() == after.keys() and any(f"layers.{model.layers - 1}.post_attention" in name for name in after)
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert json.loads((tmp_path / "exported" / "config.json").read_text()) == described


def test_the_page_refuses_by_name_what_the_family_does_not_compute(zigzag):
    described = hf_config.to_hf(zigzag, "float32", None, 2)
    assert hf_config.from_hf(described, "here", RUN_SETTINGS) == zigzag
    with pytest.raises(UserError, match="here: hidden_activation='silu' is not supported, only 'gelu_pytorch_tanh'"):
        hf_config.from_hf(described | {"hidden_activation": "silu"}, "here", RUN_SETTINGS)
    with pytest.raises(UserError, match="here: lacks sliding_window"):
        hf_config.from_hf(described | {"sliding_window": None}, "here", RUN_SETTINGS)


def test_a_family_is_registered_once():
    llama = FAMILIES["llama"]
    for other in (llama, dataclasses.replace(llama, name="other"), dataclasses.replace(llama, architecture="Other")):
        with pytest.raises(ValueError, match="llama is registered already"):
            register_family(other)
    assert FAMILIES["llama"] is llama and "other" not in FAMILIES


def test_an_unknown_family_is_refused_with_a_hint():
    with pytest.raises(UserError, match="family='gpt' is not one of llama, .*load your own with --plugin=FILE.py"):
        family_of(tiny(family="gpt"))


@pytest.fixture
def family_with(monkeypatch):
    """Makes a config of the small model, in a family with the given switches."""

    def make(vocab_size=64, **switches):
        family = dataclasses.replace(FAMILIES["llama"], structure=lambda model: Structure(**switches))
        monkeypatch.setitem(FAMILIES, "test", family)
        return tiny(family="test", layers=5, vocab_size=vocab_size, loss_chunk=16)

    return make


SWITCHES = [
    {"norm_placement": "post"},
    {"norm_placement": "both"},
    {"norm_offset": 1.0},
    {"norm": "layer"},
    {"parallel_residual": True},
    {"gated": False},
    {"activation": "gelu"},
    {"activation": "gelu_tanh"},
    {"output_bias": True},
    {"feed_forward_bias": True},
    {"residual_scale": 0.5},
    {"logit_divisor": 2.0},
    {"qkv_bias": True},
    {"qk_norm": True},
    {"qk_norm": True, "qk_norm_over": "projection"},
    {"ropes": (None,)},
    {"ropes": (None, Rope(10_000.0))},
    {"ropes": (Rope(10_000.0, "linear", 8.0),)},
    {"windows": (3,)},
    {"windows": (None, 3)},
    {"embedding_scale": 3.0},
    {"query_scale": 1.0},
    {"attention_soft_cap": 1.0},
    {"logit_soft_cap": 1.0},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch_changes_the_losses(family_with, switches):
    batch = random_batch(2, 24)

    def losses(**switches):
        config = family_with(**switches)
        params = jax.tree.map(lambda x: 3 * x + 0.1, decoder.init_params(config, 0))
        return make_token_losses(decoder.build(config), True)(params, batch)[0]

    assert np.abs(losses(**switches) - losses()).max() > 1e-4


@pytest.mark.parametrize("placement", ["pre", "post", "both"])
def test_norms_are_where_the_structure_says(family_with, placement):
    """One layer by hand, with a feed-forward and an attention that only scale."""
    config = family_with(norm_placement=placement, norm_offset=1.0)
    layer = Layer(config, family_of(config).structure(config), nnx.Rngs(0))
    names = {"attention_norm", "feed_forward_norm"} if placement != "post" else set()
    names |= {"attention_post_norm", "feed_forward_post_norm"} if placement != "pre" else set()
    assert {name for name, part in vars(layer).items() if isinstance(part, RMSNorm)} == names
    for number, name in enumerate(sorted(names)):
        norm = getattr(layer, name)
        np.testing.assert_array_equal(norm.scale[...], 0)  # stored without the offset
        norm.scale[...] = norm.scale[...] + number
    x = jnp.array(np.random.default_rng(0).normal(size=(1, 3, 32)), jnp.float32)
    positions, mix = jnp.arange(3)[None], decoder.Decoder(config, nnx.Rngs(0)).mix_within(jnp.ones((1, 3), int), None)

    def normed(x, name):
        if name not in names:
            return x
        scale = 1 + sorted(names).index(name)
        return scale * x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps)

    rotation = Rope.of(config).rotation(config.head_width, 3)
    attended = layer.attention(normed(x, "attention_norm"), positions, rotation, mix, decoding=False)
    middle = x + normed(attended, "attention_post_norm")
    fed = layer.feed_forward(normed(middle, "feed_forward_norm"), decoding=False)
    expected = middle + normed(fed, "feed_forward_post_norm")
    np.testing.assert_allclose(layer(x, positions, rotation, mix, decoding=False), expected, rtol=1e-4, atol=1e-5)


ROPES = (Rope(10_000.0), None)


@pytest.mark.parametrize(
    "windows, ropes, changes",
    [
        ((3, None), None, {}),
        ((3, None), ROPES, {"remat": "dots", "unroll": 4}),
        ((None, 2, 4), (Rope(9.0),), {"remat": "full"}),
        ((2, 3, None, 4, 5, None), None, {}),
        ((3,), ROPES, {}),
        ((None, 2, 4), ROPES, {}),
    ],
    ids=str,
)
def test_a_pattern_of_layers_equals_each_layer_in_turn(family_with, windows, ropes, changes):
    """Five layers: two groups and one left over, one group and two left over, and fewer layers than the pattern."""
    config = dataclasses.replace(family_with(windows=windows, ropes=ropes), **changes)
    graphdef, params = decoder.build(config), decoder.init_params(config, 0)
    batch = random_batch(2, 24)
    tokens, segments = jnp.array(batch.tokens), jnp.array(batch.segment_ids)

    def in_turn(params):
        model = nnx.merge(graphdef, params)
        layers = [jax.tree.map(lambda x, n=n: x[n], params["layers"]) for n in range(5)]

        def mix(n, q, k, v):
            return model.mix_within(segments, windows[n % len(windows)])(q, k, v)

        positions, lengths = decoder.segment_positions(segments), jnp.full(2, 24)
        return model.layer_by_layer(layers, tokens, positions, lengths, mix, decoding=False)

    def scanned(params):
        return nnx.merge(graphdef, params)(tokens, segments)

    def weighted(params, run):
        hidden = run(params)
        return (hidden * jnp.sin(jnp.arange(hidden.size).reshape(hidden.shape))).sum(), hidden

    both = jax.jit(jax.value_and_grad(weighted, has_aux=True), static_argnums=1)
    ((_, ours), gradient), ((_, theirs), expected) = both(params, scanned), both(params, in_turn)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), gradient, expected)


@pytest.mark.slow
def test_scoring_and_decoding_cap_the_logits(family_with, tokenizer):
    """lm-eval's scores and the generator's log-probabilities against the losses, with both soft caps."""
    config = family_with(tokenizer.vocab_size, attention_soft_cap=2.0, logit_soft_cap=2.0, query_scale=1.0)
    graphdef, params = sharp(config)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(params, mesh))
        model = LanguageModel(graphdef, placed, tokenizer, mesh, batch_size=4)
        context = tokenizer.encode_prompt("Document 1: 3+4=")
        (continuation,) = Generator(graphdef, placed, tokenizer, 4).run(
            deque([(0, "Document 1: 3+4=")]), max_new_tokens=20, stops=()
        )
        ids = continuation.token_ids
        ((score, greedy),) = model._loglikelihood_tokens([(None, context, ids)])
    whole = jnp.array([context + ids])
    losses = make_token_losses(graphdef, True)(params, Batch(whole, jnp.ones_like(whole)))[0][0, -len(ids) :]
    assert greedy and score == pytest.approx(-float(losses.sum()), rel=1e-4)
    np.testing.assert_allclose(continuation.logprobs, -losses, rtol=1e-4, atol=1e-4)


def test_a_norm_over_the_projection_takes_all_heads_together(family_with):
    config = family_with(qk_norm=True, qk_norm_over="projection")
    layer = Layer(config, family_of(config).structure(config), nnx.Rngs(0))
    x = jnp.array(np.random.default_rng(0).normal(size=(1, 3, 32)), jnp.float32)
    scales = jnp.arange(1.0, 33.0), jnp.arange(2.0, 18.0)
    layer.attention.q_norm.scale[...], layer.attention.k_norm.scale[...] = scales
    mixed = []

    def mix(q, k, v):
        mixed.extend([q, k])
        return q

    layer.attention(x, jnp.arange(3)[None], None, mix, decoding=False)
    for vectors, kernel, scale in zip(mixed, (layer.attention.q, layer.attention.k), scales):
        flat = x[0] @ kernel[...].reshape(32, -1)
        expected = scale * flat / jnp.sqrt((flat**2).mean(axis=-1, keepdims=True) + config.norm_eps)
        np.testing.assert_allclose(vectors[0].reshape(3, -1), expected, rtol=1e-4, atol=1e-5)


def test_linear_scaling_stretches_all_waves_alike():
    plain = Rope(100.0).frequencies(8)
    np.testing.assert_allclose(plain, 100.0 ** -np.array([0, 0.25, 0.5, 0.75]))
    np.testing.assert_array_equal(Rope(100.0, "linear", 4.0).frequencies(8), plain / 4)
    scaled = Rope(100.0, "llama3", 4.0, original_length=16).frequencies(8)
    np.testing.assert_allclose(scaled[-1], plain[-1] / 4)
    assert scaled[0] > plain[0] / 4


def test_soft_cap():
    logits = jnp.array([-100.0, -1.0, 0.0, 0.01, 1e6])
    assert soft_cap(logits, None) is logits
    np.testing.assert_allclose(soft_cap(logits, 5.0), [-5.0, -5 * np.tanh(0.2), 0.0, 0.01, 5.0], rtol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"norm": "batch"}, {"activation": "relu"}, {"norm_placement": "none"}, {"qk_norm_over": "x"}], ids=str
)
def test_a_structure_with_an_unknown_switch_is_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name}=.* is not one of"):
        Structure(**changes)
