"""Scoring once: what is stored, training from it like from a reference in the step, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import OPTIONS, config_of, edit_manifest, run_command

from rho1_jax import score
from rho1_jax.configs.default import ModelConfig
from rho1_jax.data import stored_scores
from rho1_jax.data.loader import eval_batches
from rho1_jax.data.preparation import prepare
from rho1_jax.data.store import Store
from rho1_jax.data.stored_scores import ScoreStore
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.method import selection
from rho1_jax.method.token_scores import SCORES
from rho1_jax.models import decoder
from rho1_jax.models.forward import make_reference_signals, make_token_losses
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.metrics import read_metrics
from rho1_jax.train import train_model
from rho1_jax.train_tokenizer import train_tokenizer
from rho1_jax.training import checkpoint

SEQ_LEN = OPTIONS.seq_len


def scoring_config(data, reference, name="scores", /, **changes):
    config = config_of("slm", data, reference)
    config.reference.scores = name
    config.update(changes)
    return config


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """Several shards of 16 rows, as in a large data set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_scores, "SHARD_TOKENS", 16 * SEQ_LEN)
        yield


@pytest.fixture(scope="module")
def scored(data, reference, tmp_path_factory):
    """The data set with scores in float16, and in float32 with entropies."""
    path = tmp_path_factory.mktemp("scored") / "rows"
    shutil.copytree(data, path)
    score.score_data(scoring_config(path, reference, "half"), "float16", entropies=False)
    score.score_data(scoring_config(path, reference, "single"), "float32", entropies=True)
    return path


def reference_signals(reference, rows):
    """Losses and entropies of the reference, for all rows at once on one device."""
    directory = checkpoint.find(reference, "reference")
    config = ModelConfig(**checkpoint.load_meta(directory).config["model"])
    params = checkpoint.load_params(directory, config, sharding.make_mesh(8, 1, 1), "float32")
    batch = next(eval_batches(rows, len(rows), np.arange(len(rows))))
    signals = jax.jit(make_reference_signals(decoder.build(config), True, True))
    return jax.device_get(signals(jax.device_get(params), batch))


def stored(path, name):
    arrays = [np.load(file) for file in sorted((path / "scores").glob(name))]
    return np.concatenate(arrays)


def test_the_stored_numbers_are_those_of_the_reference(scored, reference):
    rows = Store(scored).rows("train")
    losses, entropies = reference_signals(reference, rows)
    assert len(list((scored / "scores" / "half").glob("losses-*.npy"))) == -(-len(rows) // 16) > 2
    np.testing.assert_allclose(stored(scored, "single/losses-*.npy"), losses, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stored(scored, "single/entropies-*.npy"), entropies, rtol=1e-4, atol=1e-5)
    half = stored(scored, "half/losses-*.npy")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, stored(scored, "single/losses-*.npy").astype(np.float16))


@pytest.fixture(scope="module")
def online(data, reference, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "online"
    return workdir, jax.device_get(train_model(config_of("slm", data, reference), workdir))


def test_training_from_stored_losses_equals_training_with_the_reference(scored, reference, online, tmp_path):
    config = scoring_config(scored, "", "single")
    params = jax.device_get(train_model(config, tmp_path / "cached"))
    ours, theirs = read_metrics(tmp_path / "cached"), read_metrics(online[0])
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["tokens_selected"] == other["tokens_selected"]
        for name in ("loss", "selected_loss", "reference_loss", "gradient_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), params, online[1])
    meta = checkpoint.load_meta(checkpoint.find(tmp_path / "cached", "workdir"))
    assert meta.reference == checkpoint.load_meta(checkpoint.find(online[0], "workdir")).reference
    ledger = json.loads((tmp_path / "cached" / "ledger.json").read_text())
    manifest = json.loads((scored / "scores" / "single" / "manifest.json").read_text())
    assert ledger["flops"]["scoring"] == manifest["flops"] > 0 and ledger["flops"]["reference_forward"] == 0


def test_stored_losses_select_the_same_tokens_as_the_reference(scored, reference, online):
    """Over all tokens at once: exactly the same from float32, almost the same from float16."""
    rows = Store(scored).rows("train")
    batch = next(eval_batches(rows, len(rows), np.arange(len(rows))))
    config = ModelConfig(**checkpoint.load_meta(checkpoint.find(online[0], "workdir")).config["model"])
    policy_loss, eligible = make_token_losses(decoder.build(config), True)(online[1], batch)
    exact, _ = reference_signals(reference, rows)

    def chosen(reference_loss):
        return np.asarray(selection.select(policy_loss - jnp.asarray(reference_loss), eligible, 6000, "global"))

    expected = chosen(exact)
    for name, most in (("single", 0.0), ("half", 0.01)):
        selected = chosen(stored(scored, f"{name}/losses-*.npy").astype(np.float32))
        share = float((selected & ~expected).sum() / expected.sum())
        print(f"{name}: {share:.3%} of the selected tokens are others")
        assert share <= most


def test_the_program_contains_no_reference(scored, reference, tmp_path, monkeypatch):
    """Not even the reference's checkpoint is needed."""
    monkeypatch.setattr("rho1_jax.training.reference.open_pretrained", None)
    config = scoring_config(scored, "", "half")
    config.steps = 2
    train_model(config, tmp_path / "run")


@pytest.mark.parametrize(
    "score_name", ["reference_loss", "reference_entropy", "reference_loss:0.7 & reference_entropy"]
)
def test_rules_that_need_no_policy_train_from_stored_scores(scored, score_name, tmp_path):
    config = scoring_config(scored, "", "single")
    config.selection.score = score_name
    config.steps = 2
    train_model(config, tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-1]["selected_fraction"] <= 0.61


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 1, "fsdp": 4, "tensor": 2}])
def test_interrupted_scoring_resumes_to_the_same_scores_on_any_mesh(scored, reference, mesh, monkeypatch):
    # A shard is two batches, or two thirds of one.
    config = scoring_config(scored, reference, f"again{mesh['data']}", mesh=mesh)
    config.batch_size = 8 if mesh["data"] == 8 else 24
    write, written = stored_scores.ScoreWriter.write, []

    def failing(self, shard, arrays):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, arrays)

    monkeypatch.setattr(stored_scores.ScoreWriter, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        score.score_data(config, "float16", entropies=False)
    directory = scored / "scores" / f"again{mesh['data']}"
    assert not directory.exists()
    rest = []
    monkeypatch.setattr(
        stored_scores.ScoreWriter, "write", lambda self, shard, arrays: (rest.append(shard), write(self, shard, arrays))
    )
    score.score_data(config, "float16", entropies=False)
    assert written == [0, 1] and rest[0] == 2
    ours, theirs = (
        json.loads((path / "manifest.json").read_text()) for path in (directory, scored / "scores" / "half")
    )
    np.testing.assert_allclose(
        stored(scored, f"{directory.name}/losses-*.npy").astype(np.float32),
        stored(scored, "half/losses-*.npy").astype(np.float32),
        rtol=2e-3,
    )
    if mesh["data"] == 8:
        assert ours["files"] == theirs["files"]


def test_scoring_twice_does_nothing(scored, reference, capsys):
    score.score_data(scoring_config(scored, reference, "half"), "float16", entropies=False)
    assert "already scored" in capsys.readouterr().out
    with pytest.raises(UserError, match="made with dtype float16 and signals losses"):
        score.score_data(scoring_config(scored, reference, "half"), "float32", entropies=False)


def test_bad_settings_are_refused_as_in_training(scored, reference):
    with pytest.raises(UserError, match="config.microbatches=0: input should be greater than or equal to 1"):
        score.score_data(scoring_config(scored, reference, "new", microbatches=0), "float16", entropies=False)
    assert not (scored / "scores" / "new.partial").exists()


@pytest.fixture
def copy(scored, tmp_path):
    shutil.copytree(scored, tmp_path / "rows")
    return tmp_path / "rows"


def refused(rows, name, checkpoint_path, message, /, **changes):
    with pytest.raises(UserError, match=message):
        train_model(scoring_config(rows, checkpoint_path, name, **changes), rows.parent / "run")
    assert not (rows.parent / "run").exists()


def test_one_changed_byte_is_refused(copy):
    path = copy / "scores" / "half" / "losses-00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(copy, "half", "", "losses-00001.npy was changed")


def test_a_missing_shard_is_refused(copy):
    (copy / "scores" / "half" / "losses-00002.npy").unlink()
    refused(copy, "half", "", "losses-00002.npy is missing")


def test_missing_scores_are_refused(copy):
    refused(copy, "nothing", "", "config.reference.scores=nothing: no scores in .*; make them with `rho1 score`")
    refused(copy, "../half", "", "must be the name of a directory")


def test_entropies_that_were_not_stored_are_refused(copy):
    refused(copy, "half", "", "has no entropies", selection={"score": "reference_entropy"})


def test_another_document_mask_is_refused(copy):
    refused(copy, "half", "", "another config.data.document_mask", data={"document_mask": False})


def test_the_wrong_reference_is_refused(copy, data, tmp_path):
    other = config_of("reference", data)
    other.seed, other.steps = 1, 1
    train_model(other, tmp_path / "other")
    refused(copy, "half", tmp_path / "other", "was made with another reference")


def test_other_rows_and_another_tokenizer_are_refused(copy, corpus, tokenizer, tmp_path):
    other = type(OPTIONS)(**OPTIONS.__dict__ | {"eval_fraction": 0.2})
    path = tmp_path / "other.model"
    train_tokenizer([corpus], path, vocab_size=290, templates=["{text}"], max_sentences=1000)
    for number, (options, made_by, message) in enumerate(
        [(other, tokenizer, "other rows"), (OPTIONS, Tokenizer(path), "other rows")]
    ):
        prepare([corpus], made_by, tmp_path / str(number), options, workers=1)
        shutil.copytree(copy / "scores", tmp_path / str(number) / "scores")
        refused(tmp_path / str(number), "half", "", message)
    edit_manifest(tmp_path / "1" / "scores" / "half", data=Store(tmp_path / "1").fingerprint)
    refused(tmp_path / "1", "half", "", "another tokenizer")


def test_a_moving_reference_has_no_scores(copy, reference):
    refused(copy, "half", "", "needs a frozen reference", reference={"moves": "average"})


@pytest.mark.parametrize("rule, dtype", [("threshold", bool), ("weight", np.float32), ("ratio", np.int32)])
def test_a_column_of_your_own(data, tmp_path, rule, dtype):
    rows = len(Store(data).rows("train"))
    values = np.random.default_rng(0).integers(0, 2, (rows, SEQ_LEN)).astype(dtype)
    np.save(tmp_path / "mask.npy", values)
    config = config_of("slm", data)
    config.steps, config.log_every = 2, 1
    config.selection.update(score="external", rule=rule, threshold=0.5)
    config.data.external = str(tmp_path / "mask.npy")
    train_model(config, tmp_path / "run")
    fraction = read_metrics(tmp_path / "run")[-1]["selected_fraction"]
    assert fraction == pytest.approx(0.6 if rule == "ratio" else 0.5, abs=0.12)


def test_rows_and_their_columns_stay_together(data):
    """Uses the row number as the column: it must follow its row through shuffling and mixing."""
    from rho1_jax.data.loader import batches

    store = Store(data)
    rows = store.rows("train")

    class Numbers:
        def __getitem__(self, row):
            return np.full(SEQ_LEN, row, np.float32)

    settings = dict(batch_size=8, seed=3, first_step=1, rows=np.array([1, 4, 6]), prefetch=1, permute=True)
    stream = batches([store, store], [3, 1], **settings, columns=[{"external_BL": Numbers()}] * 2)
    for _ in range(4):
        batch = next(stream)
        for tokens, number in zip(batch.tokens, batch.columns["external_BL"][:, 0]):
            np.testing.assert_array_equal(tokens, rows[int(number)]["tokens"])


def test_a_named_column_of_your_own(data, tmp_path, monkeypatch):
    """A score over the column "quality" of a mixture; a file that is missing for one data set."""

    def finest(quality_BL):
        return quality_BL

    monkeypatch.setitem(SCORES, "finest", finest)
    rows = len(Store(data).rows("train"))
    values = np.random.default_rng(0).integers(0, 2, (rows, SEQ_LEN)).astype(bool)
    np.save(tmp_path / "quality.npy", values)
    config = config_of("slm", data)
    config.steps, config.log_every = 2, 1
    config.data.train = f"{data}:1,{data}:1"
    config.selection.update(score="finest", rule="threshold", threshold=0.5)
    config.data.external = f"quality={tmp_path}/quality.npy"
    with pytest.raises(UserError, match="names 1 files for the column 'quality' of 2 data sets; give quality=FILE.npy"):
        train_model(config, tmp_path / "run")
    config.data.external += f",quality={tmp_path}/quality.npy"
    train_model(config, tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-1]["selected_fraction"] == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((3, SEQ_LEN)), r"is float64 \(3, 16\); .* needs numbers"),
        (np.array(["a"]), "needs numbers"),
        (None, "no-such.npy"),
    ],
)
def test_columns_that_do_not_fit_are_refused(data, tmp_path, array, message):
    path = tmp_path / "no-such.npy"
    if array is not None:
        path = tmp_path / "bad.npy"
        np.save(path, array)
    config = config_of("slm", data)
    config.selection.score, config.data.external = "external", str(path)
    with pytest.raises(UserError, match=f"config.data.external: .*{message}"):
        train_model(config, tmp_path / "run")


def test_the_command_reports_rate_and_size(data, reference, tmp_path):
    shutil.copytree(data, tmp_path / "rows")
    arguments = ["--config=configs/default.py:slm", f"--config.data.train={tmp_path / 'rows'}"]
    arguments += [f"--config.reference.checkpoint={reference}", "--config.reference.scores=r", "--config.batch_size=8"]
    done = run_command("rho1_jax.score", *arguments)
    assert done.returncode == 0, done.stderr
    assert "tokens scored" in done.stdout and "2 bytes per token" in done.stdout
    ScoreStore(Store(tmp_path / "rows"), "r", True, None)
    nameless = run_command("rho1_jax.score", *arguments, "--config.reference.scores=")
    assert nameless.returncode == 2 and "config.reference.scores=''" in nameless.stderr
