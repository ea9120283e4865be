"""A damaged checkpoint is never used: it is named, and the one before it is restored."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rho1_jax.configs import default
from rho1_jax.configs.default import OptimizerConfig
from rho1_jax.runtime.errors import UserError
from rho1_jax.training import checkpoint
from rho1_jax.training.checkpoint import Checkpoints, DamagedCheckpoint, Meta
from rho1_jax.training.checksums import named_leaves
from rho1_jax.training.config import as_saved
from rho1_jax.training.description import META_FILE, read_description
from rho1_jax.training.optimizer import make_optimizer
from rho1_jax.training.state import TrainState
from rho1_jax.verify import verify

ADAMW = make_optimizer(OptimizerConfig(), 1e-2)
BEFORE, NEWEST = 3, 4


def any_run(meta):
    """The check of a run that resumes from any checkpoint it finds."""


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def state_of(step):
    rng = np.random.default_rng(step)
    weights = [jnp.asarray(rng.standard_normal(shape), "float32") for shape in ((64, 32), (2, 32, 32), (8,))]
    params = dict(zip(("embedding", "head", "norm"), weights)) | {"layers": {"up": weights[1] + 1}}
    opt_state = jax.tree.map(lambda x: x + rng.standard_normal(x.shape).astype(x.dtype), ADAMW.init(params))
    return TrainState(jnp.int32(step), params, opt_state, jax.tree.map(jnp.negative, params))


def meta_of(step):
    return Meta(step, 100 * step, 60 * step, as_saved(default.get_config()), [], "t", None)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run with two checkpoints, and the state in each."""
    workdir, states = tmp_path_factory.mktemp("runs") / "run", {step: state_of(step) for step in (BEFORE, NEWEST)}
    checkpoints = Checkpoints(workdir, keep=2)
    for step, state in states.items():
        checkpoints.save(state, meta_of(step), {})
    checkpoints.close()
    return workdir, states


@pytest.fixture
def run(original, tmp_path):
    """A copy of the run to damage."""
    shutil.copytree(original[0], tmp_path / "run")
    return tmp_path / "run"


def assert_equal(state, expected):
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def newest(workdir, states, check=any_run):
    return Checkpoints(workdir, keep=2).newest(abstract(states[NEWEST]), check)


def flip_a_bit(content, rng):
    position, bit = rng.integers(len(content)), rng.integers(8)
    return content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :]


def cut(content, rng):
    return content[: rng.integers(1, len(content))]


def half_written(content, rng):
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def zeros_inside(content, rng):
    start = rng.integers(len(content) - 1)
    return content[:start] + bytes(min(64, len(content) - start)) + content[start + 64 :]


def empty(content, rng):
    return b""


def remove(content, rng):
    return None


DAMAGES = (flip_a_bit, flip_a_bit, cut, half_written, zeros_inside, empty, remove)
# A pattern, whose largest matching file is damaged, and True if any damage to it must be noticed. Some bytes of the
# others are never read: data files also hold nodes that were replaced while the checkpoint was written.
FILES = {
    "meta/metadata": True,
    "params/d/*": True,
    "params/ocdbt.process_0/d/*": False,
    "params/manifest.ocdbt": True,
    "params/_METADATA": False,
    "params/_sharding": False,
    "params/array_metadatas/*": False,
    "params/ocdbt.process_0/manifest.ocdbt": False,
    "opt_state/d/*": True,
    "opt_state/ocdbt.process_0/d/*": False,
    "opt_state/_METADATA": False,
    "opt_state/array_metadatas/*": False,
    "reference/ocdbt.process_0/d/*": False,
    "_CHECKPOINT_METADATA": False,
    "commit_success.txt": False,
}


@pytest.mark.parametrize("damage_number", range(len(DAMAGES)), ids=lambda n: f"{DAMAGES[n].__name__}{n}")
@pytest.mark.parametrize("pattern", FILES)
def test_a_damaged_checkpoint_is_not_used(run, original, capfd, pattern, damage_number):
    damaged, (_, states) = checkpoint.at(run, NEWEST), original
    path = max(damaged.glob(pattern), key=lambda file: (file.stat().st_size, file))
    rng = np.random.default_rng([damage_number, *pattern.encode()])
    before = path.read_bytes()
    after = DAMAGES[damage_number](before, rng)
    must_be_noticed = FILES[pattern] or ("0/d" in pattern and DAMAGES[damage_number] in (half_written, empty, remove))
    assert after != before
    path.unlink()
    if after is not None:
        path.write_bytes(after)

    # Everything except `train` refuses it, or reads what was written.
    try:
        arrays = dict(checkpoint.iterate_params(damaged))
    except UserError as error:
        assert f"{damaged} is damaged: " in str(error) and "\n" not in str(error)
    else:
        assert not (must_be_noticed and pattern.startswith(("meta", "params")))
        assert_equal(arrays, named_leaves(states[NEWEST].params))

    # `train` restores the one before.
    state, meta = newest(run, states)
    printed, errors = capfd.readouterr()
    assert_equal(state, states[meta.step])
    assert meta == meta_of(meta.step) and errors == ""
    if meta.step == NEWEST:
        assert not must_be_noticed and printed == ""
    else:
        assert printed.startswith(f"{damaged} is damaged: ") and printed.endswith("; renamed it to 4.damaged\n")
        assert printed.count("\n") == 1
        assert sorted(child.name for child in damaged.parent.iterdir()) == ["3", "4.damaged"]


@pytest.mark.parametrize("failures, step", [(1, NEWEST), (2, BEFORE)])
def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_not_damaged(original, run, monkeypatch, failures, step):
    read, errors = ocp.StandardCheckpointHandler.restore, iter(range(failures))

    def fail_at_first(self, directory, *arguments, **options):
        if next(errors, None) is not None:
            raise OSError(errno.EIO, "Input/output error")
        return read(self, directory, *arguments, **options)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail_at_first)
    state, meta = newest(run, original[1])
    assert meta.step == step and checkpoint.steps(run) == [BEFORE, NEWEST][: 3 - failures]
    assert_equal(state, original[1][step])


def replace_params(workdir):
    """Puts the parameters of one checkpoint into another. Orbax reads them without complaint."""
    shutil.rmtree(checkpoint.at(workdir, NEWEST) / "params")
    shutil.copytree(checkpoint.at(workdir, BEFORE) / "params", checkpoint.at(workdir, NEWEST) / "params")


def test_an_array_with_other_numbers_is_named(run, original):
    replace_params(run)
    with pytest.raises(DamagedCheckpoint, match="4 is damaged: params/embedding does not match its checksum; use anot"):
        list(checkpoint.iterate_params(checkpoint.at(run, NEWEST)))
    assert newest(run, original[1])[1].step == BEFORE


@pytest.mark.parametrize("key", ["step", "tokens_seen", "tokens_selected", "format_version"])
def test_a_changed_number_in_the_description_is_noticed(run, original, key):
    path = checkpoint.at(run, NEWEST) / "meta" / "metadata"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {key: stored[key] + 1}))
    with pytest.raises(DamagedCheckpoint, match="4 is damaged: meta/metadata does not match its checksum"):
        checkpoint.load_meta(checkpoint.at(run, NEWEST))
    assert newest(run, original[1])[1].step == BEFORE


def test_a_description_without_its_checksum_is_noticed(run, original):
    path = checkpoint.at(run, NEWEST) / "meta" / "metadata"
    stored = json.loads(path.read_text())
    del stored["sha256"]
    path.write_text(json.dumps(stored))
    with pytest.raises(DamagedCheckpoint, match="meta/metadata has no checksum"):
        checkpoint.load_meta(checkpoint.at(run, NEWEST))


def test_a_checkpoint_under_another_step_is_noticed(run, original):
    checkpoint.at(run, NEWEST).rename(checkpoint.at(run, 7))
    with pytest.raises(DamagedCheckpoint, match="7 is damaged: meta/metadata belongs to step 4"):
        checkpoint.load_meta(checkpoint.at(run, 7))
    assert newest(run, original[1])[1].step == BEFORE


def test_an_empty_folder_is_set_aside_and_the_step_can_be_saved_again(run, original, capsys):
    for name in ("5", "6", "5.damaged"):
        (run / "checkpoints" / name).mkdir()
    states = original[1]
    checkpoints = Checkpoints(run, keep=2)
    state, meta = checkpoints.newest(abstract(states[NEWEST]), any_run)
    assert meta.step == NEWEST and "6 is damaged: meta/metadata: no such file; renamed" in capsys.readouterr().out
    for step in (5, 6):
        checkpoints.save(state, meta_of(step), {})
    checkpoints.close()
    names = {child.name for child in (run / "checkpoints").iterdir()}
    assert names == {"5", "6", "5.damaged", "5.damaged.1", "6.damaged"}
    assert newest(run, states)[1].step == 6


def test_if_every_checkpoint_is_damaged_the_run_is_refused_and_nothing_is_renamed(run, original):
    for step in (BEFORE, NEWEST):
        (checkpoint.at(run, step) / "meta" / "metadata").write_text("{")
    message = (
        r"cannot resume: every checkpoint in .*run/checkpoints is damaged, the newest one \(4\) because meta/metad"
    )
    with pytest.raises(UserError, match=message):
        newest(run, original[1])
    assert checkpoint.steps(run) == [BEFORE, NEWEST]


def test_a_run_without_checkpoints_starts_from_scratch(original, tmp_path):
    assert newest(tmp_path, original[1]) is None


def test_a_checkpoint_of_another_run_is_refused_and_not_taken_for_damaged(run, original):
    def check(meta):
        raise UserError("cannot resume this run: config.seed changed")

    with pytest.raises(UserError, match=r"config\.seed changed"):
        newest(run, original[1], check)
    larger = original[1][NEWEST]._replace(reference=None)
    larger.params["norm"] = jnp.zeros(9)
    with pytest.raises(UserError, match=r"4 does not fit the model: params/norm is \(8,\) in the file, but \(9,\) in"):
        Checkpoints(run, keep=2).newest(abstract(larger), any_run)
    assert checkpoint.steps(run) == [BEFORE, NEWEST]


def test_verify_reads_every_array_of_every_checkpoint(run):
    count = len(read_description(checkpoint.at(run, NEWEST)).arrays)
    expected = [f"{checkpoint.at(run, step)}: {count} arrays match their checksums" for step in (BEFORE, NEWEST)]
    assert verify(run) == expected and verify(checkpoint.at(run, NEWEST)) == expected[1:]
    newest = checkpoint.at(run, NEWEST)
    for item in ("params", "opt_state", "reference"):
        description = read_description(newest)
        name = next(name for name in description.arrays if name.startswith(item))
        changed = description.arrays[name]._replace(checksum=description.arrays[name].checksum ^ 1)
        edited = description._replace(arrays=description.arrays | {name: changed})
        (newest / META_FILE).write_text(json.dumps(edited.as_json()))
        with pytest.raises(UserError, match=f"{newest} is damaged: {name} does not match its checksum"):
            verify(run)
        (newest / META_FILE).write_text(json.dumps(description.as_json()))
