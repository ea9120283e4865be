"""Damaged, replaced and edited files of data sets and scores give one line each, on opening or from `rho1 verify`."""

import pathlib
import shutil
import tarfile

import numpy as np
import pytest
from helpers import OPTIONS, edit_manifest, root, run_command

from rho1_jax.data import stored_scores
from rho1_jax.data.manifest import END_BYTES, describe
from rho1_jax.data.preparation import prepare
from rho1_jax.data.store import Store
from rho1_jax.data.stored_scores import ScoreStore, ScoreWriter
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.runtime.errors import UserError
from rho1_jax.train_tokenizer import train_tokenizer
from rho1_jax.verify import verify

TRAIN = "rows/1.0.0/rows-train.array_record-00000-of-00001"
INFO = "rows/1.0.0/dataset_info.json"
REFERENCE = {"path": "runs/reference", "fingerprint": "1"}


@pytest.fixture
def rows(data, tmp_path) -> pathlib.Path:
    """A copy of the data set, to damage."""
    shutil.copytree(data, tmp_path / "rows")
    return tmp_path / "rows"


@pytest.fixture
def scores(rows) -> pathlib.Path:
    """Scores of that copy."""
    store = Store(rows)
    shape = (len(store.rows("train")), store.seq_len)
    writer = ScoreWriter(store, "s", stored_scores.describe(store, REFERENCE, True), "float32", entropies=False)
    writer.start()
    writer.write(0, {"losses": np.arange(np.prod(shape)).reshape(shape) / 7})
    writer.finish({"flops": 1.0})
    return rows / "scores" / "s"


@pytest.fixture
def old(tmp_path) -> pathlib.Path:
    """A data set and scores as 0.1.0 wrote them, without checksums of the data."""
    with tarfile.open(root() / "tests" / "fixtures" / "v0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "rows"


def flip(path: pathlib.Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def another_data_set(corpus, tokenizer, folder) -> pathlib.Path:
    """The documents in reverse order: another data set, with files of the same size."""
    reverse = folder / "reverse.jsonl"
    reverse.write_text("".join(reversed(corpus.read_text().splitlines(keepends=True))))
    prepare([reverse], tokenizer, folder / "other", OPTIONS, workers=1)
    return folder / "other"


def test_whole_data_and_scores_are_verified(scores, rows):
    assert verify(rows) == [
        f"{rows}: 5 files match their checksums",
        f"{scores}: 1 files match their checksums",
    ]
    assert verify(scores) == verify(rows)[1:]
    assert list(Store(rows).manifest["files"]) == [
        INFO, "rows/1.0.0/features.json", "rows/1.0.0/rows-eval.array_record-00000-of-00001", TRAIN,
        "tokenizer/tokenizer.model",
    ]  # fmt: skip


def test_a_shard_of_another_data_set_is_refused(rows, corpus, tokenizer, tmp_path):
    other = another_data_set(corpus, tokenizer, tmp_path)
    assert (other / TRAIN).stat().st_size == (rows / TRAIN).stat().st_size  # ArrayRecord pads its files
    shutil.copyfile(other / TRAIN, rows / TRAIN)
    with pytest.raises(UserError, match=f"{TRAIN} was changed since it was written; restore it, or remove .*rows and"):
        Store(rows)


def test_a_byte_in_the_middle_of_a_file_is_found_by_verify(rows):
    path = rows / "rows" / "big"
    whole = Store(rows).manifest["files"]
    path.write_bytes(bytes(3 * END_BYTES))

    edit_manifest(rows, files=whole | describe(rows, [path]))
    flip(path, END_BYTES + END_BYTES // 2)
    Store(rows)
    with pytest.raises(UserError, match="rows/big was changed since it was written"):
        verify(rows)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (TRAIN, lambda path: path.unlink(), "is missing; restore it, or remove .* and run `rho1 prepare` again"),
        (TRAIN, lambda path: path.write_bytes(b""), "has 0 bytes instead of"),
        (TRAIN, lambda path: path.write_bytes(path.read_bytes()[:70_000]), "has 70,000 bytes instead of"),
        (TRAIN, lambda path: flip(path, 100), "was changed"),
        (TRAIN, lambda path: shutil.copyfile(path, path.with_name("more")), "more is not listed in the manifest of"),
        (INFO, lambda path: path.unlink(), "dataset_info.json is missing"),
        (INFO, lambda path: flip(path, 30), "dataset_info.json was changed"),
        ("tokenizer/tokenizer.model", lambda path: flip(path, 3000), "tokenizer.model was changed"),
        ("tokenizer/tokenizer_config.json", lambda path: path.write_text("{}"), "is not listed in the manifest of"),
        ("manifest.json", lambda path: path.unlink(), "no prepared data set here; make one with `rho1 prepare`"),
        ("manifest.json", lambda path: path.write_text(path.read_text()[:300]), "manifest.json: not JSON: EOF"),
        ("manifest.json", lambda path: path.write_text("[]"), r"manifest.json: input should be an object, not \[\]"),
        ("manifest.json", lambda path: path.write_text("{}"), "manifest.json: fingerprint: field required"),
        ("manifest.json", lambda path: path.write_bytes(b"\xff"), "manifest.json: not JSON"),
        (
            "manifest.json",
            lambda path: path.write_text(path.read_text().replace('"seq_len": 16', '"seq_len": 8')),
            "manifest.json was edited: its checksum does not match",
        ),
        (
            "manifest.json",
            lambda path: path.write_text(path.read_text().replace('"checksum"', '"other"')),
            "manifest.json has no checksum",
        ),
        (
            "manifest.json",
            lambda path: edit_manifest(path.parent, options={"seq_len": "16", "transcripts": None}),
            "manifest.json: options.seq_len: input should be a valid integer, not '16'",
        ),
    ],
)  # fmt: skip
def test_damage_is_refused_on_opening(rows, name, damage, message):
    damage(rows / name)
    with pytest.raises(UserError, match=message) as caught:
        Store(rows)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_data_set(corpus):
    with pytest.raises(UserError, match="corpus.jsonl is a file, not a prepared data set; make one from it with"):
        Store(corpus)


def test_a_replaced_tokenizer_of_a_data_set_without_checksums_is_refused(old, corpus, tmp_path):
    train_tokenizer([corpus], tmp_path / "new.model", vocab_size=300, templates=["{text}"], max_sentences=100)
    shutil.copyfile(tmp_path / "new.model", old / "tokenizer" / "tokenizer.model")
    with pytest.raises(UserError, match="tokenizer.model is not the tokenizer recorded here: its fingerprint is"):
        Store(old).tokenizer()
    with pytest.raises(UserError, match="is not the tokenizer recorded here"):
        verify(old)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (TRAIN, lambda path: path.unlink(), "array_record-00000-of-00001 cannot be read"),
        (TRAIN, lambda path: path.write_bytes(b""), "cannot be read: ArrayRecord file should be at least 64KB big"),
        (
            TRAIN,
            lambda path: path.write_bytes(path.read_bytes()[:-100]),
            "cannot be read: Corrupted Riegeli/records file",
        ),
        (INFO, lambda path: path.write_text(path.read_text()[:50]), "rows/1.0.0: cannot open the rows: "),
        (INFO, lambda path: path.unlink(), "rows/1.0.0: cannot open the rows: "),
        (INFO, lambda path: path.write_text(path.read_text().replace('"184"', '"183"')), "disagree about the split"),
        ("rows/1.0.0/features.json", lambda path: path.unlink(), "rows/1.0.0: cannot open the rows: "),
    ],
)
def test_damage_without_checksums_gives_one_line(old, name, damage, message):
    damage(old / name)
    with pytest.raises(UserError, match=message) as caught:
        Store(old).rows("train")
    assert "\n" not in str(caught.value)


def test_verify_says_what_an_older_data_set_lacks(old):
    data, scores = verify(old)
    assert "an older version wrote it without checksums" in data and "prepare it again" in data
    assert scores.endswith("scores/stored: 2 files match their checksums")


def test_a_row_that_cannot_be_read_is_named(old):
    rows = Store(old).rows("train")
    flip(old / TRAIN, 4000)
    with pytest.raises(UserError, match=f"{old}: row 27 of the split 'train' cannot be read: .*; restore it, or"):
        list(rows)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "was changed since it was written; remove"),
        (lambda path: path.unlink(), "losses-00000.npy is missing"),
    ],
)
def test_a_damaged_score_file_is_refused(scores, rows, damage, message):
    damage(scores / "losses-00000.npy")
    for check in (lambda: verify(rows), lambda: ScoreStore(Store(rows), "s", True, None)):
        with pytest.raises(UserError, match=message):
            check()


def save(path: pathlib.Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def replaced(damage):
    """Replaces the scores, and gives the manifest the checksums of the new file."""

    def replace(scores):
        path = scores / "losses-00000.npy"
        array = np.load(path)
        damage(path, array)
        edit_manifest(scores, files=describe(scores, [path]))

    return replace


def with_nan(array: np.ndarray) -> np.ndarray:
    array[5, 3] = np.nan
    return array


@pytest.mark.parametrize(
    "damage, message",
    [
        (replaced(lambda path, array: path.write_bytes(path.read_bytes()[:-4])), "losses-00000.npy is damaged: "),
        (replaced(lambda path, array: path.write_bytes(b"")), "losses-00000.npy is damaged: "),
        (replaced(lambda path, array: save(path, array[1:])), r"is float32 \(\d+, 16\) instead of float32"),
        (replaced(lambda path, array: save(path, array.astype("f8"))), "is float64 .* instead of float32"),
        (replaced(lambda path, array: save(path, array.astype(object))), "is damaged: .*Python objects in dtype"),
        (replaced(lambda path, array: save(path, with_nan(array))), "the losses of row 5 are not finite; remove"),
        (lambda scores: (scores / "manifest.json").write_text("[]"), "manifest.json: input should be an object"),
        (lambda scores: (scores / "manifest.json").write_text('{"data": "x"}'), "manifest.json: tokenizer: field req"),
        (lambda scores: edit_manifest(scores, rows="3"), "manifest.json: rows: input should be a valid integer"),
        (lambda scores: edit_manifest(scores, reference={}), "manifest.json: reference: .*fingerprint is missing"),
        (
            lambda scores: (scores / "manifest.json").write_text(
                (scores / "manifest.json").read_text().replace("true", "false")
            ),
            "manifest.json was edited",
        ),
    ],
)
def test_damaged_scores_are_refused(scores, rows, damage, message):
    damage(scores)

    def read():
        column = ScoreStore(Store(rows), "s", True, None).column("losses")
        [column[row] for row in range(10)]

    for check in (lambda: verify(scores), read):
        with pytest.raises(UserError, match=message) as caught:
            check()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value, dtype", [(np.nan, "float32"), (np.inf, "float32"), (70_000.0, "float16")])
def test_scores_that_are_not_finite_are_not_written(rows, value, dtype):
    store = Store(rows)
    writer = ScoreWriter(store, "s", stored_scores.describe(store, REFERENCE, True), dtype, entropies=False)
    writer.start()
    losses = np.zeros((len(store.rows("train")), store.seq_len), np.float32)
    losses[7, 2] = value
    with pytest.raises(UserError, match=f"the reference's losses of row 7 are not finite in {dtype}"):
        writer.write(0, {"losses": losses})
    assert not writer.has(0)


def test_the_command(rows, tmp_path):
    done = run_command("rho1_jax.cli", "verify", str(rows))
    assert (done.returncode, done.stdout) == (0, f"{rows}: 5 files match their checksums\n"), done.stderr
    flip(rows / TRAIN, 100)
    done = run_command("rho1_jax.cli", "verify", str(rows))
    assert done.returncode == 2 and done.stderr.startswith(f"error: {rows / TRAIN} was changed")
    done = run_command("rho1_jax.cli", "verify", str(tmp_path))
    assert (
        done.returncode == 2
        and "is neither a prepared data set, nor a folder of stored scores, nor a run, nor a checkpoint" in done.stderr
    )


def test_a_tokenizer_that_is_not_the_recorded_one_is_refused(tokenizer):
    assert Tokenizer(tokenizer.path, tokenizer.fingerprint).fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match="is not the tokenizer recorded here"):
        Tokenizer(tokenizer.path, "0" * 64)
