"""The step: what it selects, what contributes to the gradient, and that splitting the work changes neither."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, random_batch, selection_of, tiny

from rho1_jax.data.packing import Batch
from rho1_jax.method import selection
from rho1_jax.method.objectives import OBJECTIVES, register_objective
from rho1_jax.models import decoder
from rho1_jax.models.forward import make_reference_signals, make_token_losses
from rho1_jax.runtime import sharding
from rho1_jax.training.reference import MovingReference
from rho1_jax.training.state import TrainState
from rho1_jax.training.train_step import make_train_step

GRAPHDEF = decoder.build(TINY)
# Under plain gradient descent, the change of a parameter is its gradient.
SGD = optax.sgd(1.0)
DEFAULTS = {"rule": selection_of(), "steps": 10, "microbatches": 1, "document_mask": True, "seed": 0}


def make_step(
    optimizer=SGD, microbatches=1, document_mask=True, seed=0, moving=None, objective="cross_entropy", **changes
):
    settings = {"microbatches": microbatches, "document_mask": document_mask, "seed": seed, "moving": moving}
    settings["objective"] = objective
    return jax.jit(make_train_step(GRAPHDEF, GRAPHDEF, optimizer, rule=selection_of(**changes), steps=10, **settings))


def start(params, optimizer=SGD):
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def gradient(before, after):
    return jax.tree.map(lambda b, a: np.asarray(b - a), before, after.params)


@jax.jit
@jax.value_and_grad
def weighted_loss(params, batch, weight_BL):
    """The weighted mean of the token losses, and its gradient."""
    return (weight_BL * make_token_losses(GRAPHDEF, True)(params, batch)[0]).sum() / weight_BL.sum()


def assert_trees_close(ours, theirs, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), ours, theirs)


def assert_trees_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture(scope="module")
def batch():
    return random_batch(8, 16)


@pytest.fixture(scope="module")
def slm(params, batch):
    """State, metrics and selection after one step of SLM."""
    return make_step()(start(params[0]), params[1], batch)


def test_trains_on_the_mean_loss_of_the_tokens_with_the_highest_excess(params, batch, slm):
    policy, reference = params
    losses = make_token_losses(GRAPHDEF, True)
    policy_loss, eligible = losses(policy, batch)
    reference_loss, _ = losses(reference, batch)
    selected = selection.select(policy_loss - reference_loss, eligible, 6000, "global")
    np.testing.assert_array_equal(slm[2], selected)

    loss, expected = weighted_loss(policy, batch, selected.astype(jnp.float32))
    assert_trees_close(gradient(policy, slm[0]), expected)
    metrics = slm[1]
    np.testing.assert_allclose(metrics["selected_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], policy_loss[eligible].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["reference_loss"], reference_loss[eligible].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mean_excess"], (policy_loss - reference_loss)[eligible].mean(), rtol=1e-3)
    assert int(metrics["selected_count"]) == -(-6 * int(eligible.sum()) // 10)


def test_ratio_one_is_clm_to_the_bit(params, batch):
    optimizer = optax.adamw(1e-2)
    states = []
    for changes in ({"ratio": 1.0}, {"score": "none"}):
        step, state = make_step(optimizer, **changes), start(params[0], optimizer)
        for _ in range(3):
            state, _, _ = step(state, params[1], batch)
        states.append(state)
    assert_trees_equal(states[0].params, states[1].params)


def test_padding_and_first_tokens_of_documents_are_never_selected(params, batch, slm):
    # Not even when the ratio cannot be reached without them.
    _, _, everything = make_step(ratio=1.0)(start(params[0]), params[1], batch)
    segment_ids = batch.segment_ids
    barred = (segment_ids[:, 1:] == 0) | (segment_ids[:, 1:] != segment_ids[:, :-1])
    assert barred.any() and not np.asarray(everything)[barred].any() and np.asarray(everything)[~barred].all()
    assert not np.asarray(slm[2])[barred].any()


def test_the_target_of_an_unselected_token_does_not_move_the_gradient(params):
    """The last target of a row is no input, so only its loss could have an effect."""
    rows = Batch(random_batch(8, 16, seed=3).tokens, np.ones((8, 17), np.int32))
    step = make_step(score="random", ratio=0.5)
    state, _, selected = step(start(params[0]), params[1], rows)
    moved = {}
    for chosen in (False, True):
        row = int(np.flatnonzero(np.asarray(selected)[:, -1] == chosen)[0])
        tokens = rows.tokens.copy()
        tokens[row, -1] = (tokens[row, -1] + 9) % 64
        changed, _, _ = step(start(params[0]), params[1], Batch(tokens, rows.segment_ids))
        moved[chosen] = max(
            float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(changed.params))
        )
    assert moved[False] == 0 and moved[True] > 1e-4


@pytest.mark.parametrize("score", ["none", "excess"])
def test_prompt_and_tool_output_tokens_give_no_gradient(params, score):
    """In fine-tuning, the last target of a row contributes to the gradient only if it is part of a response."""
    rows = Batch(random_batch(8, 16, seed=3).tokens, np.ones((8, 17), np.int32), np.zeros((8, 17), bool))
    rows.responses[:, 5:9] = True
    rows.responses[0, -1] = True
    step = make_step(score=score, ratio=1.0)
    state, metrics, selected = step(start(params[0]), params[1], rows)
    np.testing.assert_array_equal(selected, rows.responses[:, 1:])
    assert int(metrics["selected_count"]) == 8 * 4 + 1
    for row in (0, 1):
        tokens = rows.tokens.copy()
        tokens[row, -1] = (tokens[row, -1] + 9) % 64
        changed, _, _ = step(start(params[0]), params[1], rows._replace(tokens=tokens))
        apart = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(changed.params))]
        assert max(apart) > 1e-4 if row == 0 else max(apart) == 0


def test_among_response_tokens_the_highest_excess_is_selected(params):
    rows = Batch(random_batch(8, 16, seed=3).tokens, np.ones((8, 17), np.int32), np.zeros((8, 17), bool))
    rows.responses[:, 4:12] = True
    losses = make_token_losses(GRAPHDEF, True)
    excess = np.asarray(losses(params[0], rows)[0] - losses(params[1], rows)[0])
    _, _, selected = make_step(ratio=0.25)(start(params[0]), params[1], rows)
    among = np.where(rows.responses[:, 1:], excess, -np.inf)
    assert selected.sum() == 16 and excess[np.asarray(selected) > 0].min() > np.sort(among.ravel())[-17]


def test_no_gradient_through_scores_or_reference(params, batch, slm):
    """The reference affects the update only through the choice of tokens."""
    selected = np.asarray(slm[2])
    shifted = jax.tree.map(lambda x: x + 1e-7, params[1])
    state, _, again = make_step()(start(params[0]), shifted, batch)
    np.testing.assert_array_equal(again, selected)
    assert_trees_equal(state.params, slm[0].params)


def test_the_reference_may_have_another_size_and_a_lower_precision(params, batch):
    config = tiny(layers=1, width=16, compute_dtype="bfloat16")
    reference = jax.tree.map(lambda x: x.astype(jnp.bfloat16), decoder.init_params(config, 1))
    step = jax.jit(make_train_step(GRAPHDEF, decoder.build(config), SGD, **DEFAULTS))
    _, metrics, selected = step(start(params[0]), reference, batch)
    policy_loss, eligible = make_token_losses(GRAPHDEF, True)(params[0], batch)
    reference_loss, _ = jax.jit(make_token_losses(decoder.build(config), True))(reference, batch)
    expected = selection.select(policy_loss - reference_loss, eligible, 6000, "global")
    assert np.mean(np.asarray(selected) != expected) < 0.02
    np.testing.assert_allclose(metrics["reference_loss"], reference_loss[eligible].mean(), rtol=1e-3)


@pytest.mark.parametrize("scope", ["global", "sequence"])
@pytest.mark.parametrize("microbatches", [2, 4])
def test_accumulation_gives_the_same_update(params, batch, scope, microbatches):
    whole, whole_metrics, whole_selected = make_step(scope=scope)(start(params[0]), params[1], batch)
    parts, metrics, selected = make_step(scope=scope, microbatches=microbatches)(start(params[0]), params[1], batch)
    np.testing.assert_array_equal(selected, whole_selected)
    assert_trees_close(parts.params, whole.params)
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("score", ["none", "random"])
def test_accumulation_gives_the_same_update_for_the_other_arms(params, batch, score):
    whole, _, whole_selected = make_step(score=score)(start(params[0]), None, batch)
    parts, _, selected = make_step(score=score, microbatches=4)(start(params[0]), None, batch)
    np.testing.assert_array_equal(selected, whole_selected)
    assert_trees_close(parts.params, whole.params)


def test_scope_microbatch_ranks_each_microbatch_by_itself(params, batch):
    _, _, selected = make_step(scope="microbatch", microbatches=4)(start(params[0]), params[1], batch)
    eligible = np.asarray(selection.eligible_targets(batch.segment_ids))
    for part in range(4):
        assert selected[part::4].sum() == -(-6 * int(eligible[part::4].sum()) // 10)


def test_random_selection_differs_by_step_and_seed(params, batch):
    step, other_seed = make_step(score="random", ratio=0.3), make_step(score="random", ratio=0.3, seed=1)
    state, metrics, first = step(start(params[0]), None, batch)
    _, _, second = step(state, None, batch)
    _, _, again = step(start(params[0]), None, batch)
    _, _, other = other_seed(start(params[0]), None, batch)
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != second).any() and (np.asarray(first) != other).any()
    assert "reference_loss" not in metrics


def test_document_mask_off_lets_attention_cross_documents(params, batch):
    seen, _, _ = make_step(score="none", document_mask=False)(start(params[0]), None, batch)
    masked, _, _ = make_step(score="none")(start(params[0]), None, batch)
    assert not np.allclose(seen.params["embedding"], masked.params["embedding"])


COMPOSED = "excess:0.8 & policy_entropy:0.7"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"score": COMPOSED},
        {"score": "reference_loss:0.5 | reference_entropy:0.3"},
        {"rule": "threshold", "threshold": 0.1},
        {"rule": "soft", "threshold": 0.1, "temperature": 0.3},
        {"score": "policy_loss", "schedule": "linear", "first_ratio": 0.3},
        {"score": "external", "rule": "weight"},
    ],
    ids=str,
)
def test_accumulation_and_meshes_give_the_same_update_for_every_rule(params, batch, changes):
    """On one device, in four microbatches and on eight devices; the update is that of the weighted mean loss."""
    noise = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    batch = batch._replace(columns={"external_BL": noise})
    whole, metrics, weight = make_step(**changes)(start(params[0]), params[1], batch)
    parts, _, weight_parts = make_step(**changes, microbatches=4)(start(params[0]), params[1], batch)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        rows = jax.device_put(batch, sharding.batch_sharding(mesh))
        split, _, weight_split = make_step(**changes)(start(params[0]), params[1], rows)
    for other, other_weight in ((parts, weight_parts), (split, weight_split)):
        np.testing.assert_allclose(other_weight, weight, rtol=1e-4, atol=1e-6)
        assert_trees_close(jax.device_get(other.params), jax.device_get(whole.params))

    loss, expected = weighted_loss(params[0], batch, weight)
    assert_trees_close(gradient(params[0], whole), expected, atol=1e-5)
    eligible = np.asarray(selection.eligible_targets(batch.segment_ids))
    np.testing.assert_allclose(metrics["selected_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["selected_fraction"], weight.sum() / eligible.sum(), rtol=1e-5)
    assert int(metrics["selected_count"]) == int((np.asarray(weight) > 0).sum())


@pytest.fixture
def advantage_objective():
    """A made-up objective over a column of the data, as a user registers it."""

    @register_objective
    def advantage_weighted(policy_loss_BL, reference_loss_BL, advantage_BL, weight_BL):
        return weight_BL * (advantage_BL * policy_loss_BL + 0.1 * (policy_loss_BL - reference_loss_BL) ** 2)

    yield "advantage_weighted"
    del OBJECTIVES["advantage_weighted"]


@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_objective_of_your_own_over_a_column_of_the_data(params, batch, advantage_objective, microbatches):
    """Compared with the gradient of its formula, and on eight devices."""
    advantage = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)
    batch = batch._replace(columns={"advantage_BL": advantage})
    # Only the objective needs the reference.
    step = make_step(objective=advantage_objective, microbatches=microbatches, score="random", ratio=0.5)
    state, metrics, weight = step(start(params[0]), params[1], batch)
    reference_loss = make_token_losses(GRAPHDEF, True)(params[1], batch)[0]

    @jax.value_and_grad
    def formula(policy):
        loss = make_token_losses(GRAPHDEF, True)(policy, batch)[0]
        return (weight * (advantage * loss + 0.1 * (loss - reference_loss) ** 2)).sum() / weight.sum()

    value, expected = formula(params[0])
    np.testing.assert_allclose(metrics["objective"], value, rtol=1e-5)
    assert_trees_close(gradient(params[0], state), expected, atol=1e-5)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        rows = jax.device_put(batch, sharding.batch_sharding(mesh))
        split, _, _ = step(start(params[0]), params[1], rows)
    assert_trees_close(jax.device_get(split.params), jax.device_get(state.params))


def test_entropies_are_those_of_the_two_models(params, batch):
    signals = jax.jit(make_reference_signals(GRAPHDEF, True, True))
    eligible = selection.eligible_targets(batch.segment_ids)
    for name, entropy in (
        ("policy_entropy", signals(params[0], batch)[1]),
        ("reference_entropy", -signals(params[1], batch)[1]),
    ):
        _, _, weight = make_step(score=name, ratio=0.3)(start(params[0]), params[1], batch)
        np.testing.assert_array_equal(weight, selection.select(entropy, eligible, 3000, "global"))


@pytest.mark.parametrize("kind", ["average", "snapshot"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_moving_reference(params, batch, kind, microbatches):
    """Compared with the same steps when the reference is moved by hand between them."""
    moving = MovingReference(kind, decay=0.9, every=2)
    step = make_step(moving=moving, microbatches=microbatches)
    by_hand = make_step(microbatches=microbatches)
    state, other, reference = start(params[0])._replace(reference=params[1]), start(params[0]), params[1]
    for number in range(1, 5):
        state, _, weight = step(state, None, batch)
        other, _, expected = by_hand(other, reference, batch)
        np.testing.assert_array_equal(weight, expected)
        if kind == "average":
            reference = jax.tree.map(lambda r, p: 0.9 * r + 0.1 * p, reference, other.params)
        elif number % 2 == 0:
            reference = other.params
        assert_trees_close(state.reference, reference, rtol=1e-5, atol=1e-7)
        assert_trees_close(state.params, other.params)


def test_an_empty_batch_changes_nothing(params):
    blank = Batch(np.zeros((8, 17), np.int32), np.zeros((8, 17), np.int32))
    state, metrics, selected = make_step()(start(params[0]), params[1], blank)
    assert_trees_equal(state.params, params[0])
    assert not np.asarray(selected).any() and float(metrics["loss"]) == 0


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 2}], ids=str)
def test_remat_and_unrolled_layers_give_the_same_update(params, batch, slm, changes):
    graphdef = decoder.build(tiny(**changes))
    state, _, selected = jax.jit(make_train_step(graphdef, graphdef, SGD, **DEFAULTS))(
        start(params[0]), params[1], batch
    )
    np.testing.assert_array_equal(selected, slm[2])
    assert_trees_close(state.params, slm[0].params)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_no_buffer_of_the_step_holds_the_logits_of_all_tokens(microbatches):
    config = tiny(vocab_size=509, loss_chunk=16)
    graphdef, shape = decoder.build(config), decoder.abstract_params(config)
    step = make_train_step(graphdef, graphdef, SGD, **DEFAULTS | {"microbatches": microbatches})
    state = TrainState(jnp.int32(0), shape, jax.eval_shape(SGD.init, shape))
    rows = jax.ShapeDtypeStruct((8, 17), jnp.int32)
    hlo = jax.jit(step).lower(state, shape, Batch(rows, rows)).compile().as_text()
    with_vocabulary = {dims for dims in re.findall(r"\[([\d,]+)\]", hlo) if "509" in dims.split(",")}
    assert max(np.prod([int(d) for d in dims.split(",")]) for dims in with_vocabulary) < 8 * 16 * 509 / 2


def test_losses_in_the_batch_replace_the_reference(params, batch, slm):
    reference_losses, _ = jax.jit(make_token_losses(GRAPHDEF, True))(params[1], batch)
    step = jax.jit(make_train_step(GRAPHDEF, None, SGD, **DEFAULTS))
    state, metrics, selected = step(
        start(params[0]), None, batch._replace(columns={"reference_loss_BL": reference_losses})
    )
    np.testing.assert_array_equal(selected, slm[2])
    assert_trees_close(state.params, slm[0].params)
    np.testing.assert_allclose(metrics["reference_loss"], slm[1]["reference_loss"], rtol=1e-5)


MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2), (4, 1, 2), (2, 4, 1), (4, 2, 1)]


@pytest.fixture(scope="module")
def runs(params, batch):
    """Three AdamW steps of SLM on each mesh: the parameters and the selection of each step."""
    optimizer = optax.adamw(1e-2)
    results = {}
    for sizes in MESHES:
        mesh = jax.make_mesh(
            sizes, sharding.AXES, (jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[: np.prod(sizes)]
        )
        with jax.set_mesh(mesh):
            placed = [jax.device_put(p, sharding.param_shardings(p, mesh)) for p in params]
            rows = jax.device_put(batch, sharding.batch_sharding(mesh))
            step, state, selections = make_step(optimizer), start(placed[0], optimizer), []
            for _ in range(3):
                state, _, selected = step(state, placed[1], rows)
                selections.append(np.asarray(selected))
            results[sizes] = jax.device_get(state.params), selections
    return results


@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_any_mesh_selects_the_same_tokens_and_reaches_the_same_parameters(runs, sizes):
    (params_one, selected_one), (params_many, selected_many) = runs[1, 1, 1], runs[sizes]
    np.testing.assert_array_equal(selected_many, selected_one)
    assert_trees_close(params_many, params_one, rtol=1e-3, atol=1e-4)
