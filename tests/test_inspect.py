"""The command `rho1 inspect`: what it shows of each kind of path, and in which form."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from forks import run_all
from helpers import OPTIONS, STEPS, TINY, edit_manifest, tiny, write_hf_folder

from rho1_jax import inspect_path as module
from rho1_jax.data import stored_scores
from rho1_jax.data.preparation import prepare
from rho1_jax.data.store import Store
from rho1_jax.data.stored_scores import ScoreWriter
from rho1_jax.data.transcripts import Transcripts
from rho1_jax.inspect_path import inspect_path, text_of
from rho1_jax.models import decoder
from rho1_jax.runtime.errors import UserError
from rho1_jax.training import checkpoint
from rho1_jax.training.description import META_FILE, read_description

REFERENCE = {"path": "runs/reference", "fingerprint": "0123456789abcdef"}


def fields(text):
    """The lines "label  value" of a text."""
    return dict(line.split("  ", 1) for line in text.splitlines() if "  " in line.strip() and not line.startswith(" "))


def test_a_run_shows_its_newest_checkpoint(reference, tokenizer):
    report = inspect_path(reference)
    assert (report["kind"], report["step"], report["steps_of_run"], report["finished"]) == ("run", STEPS, STEPS, True)
    assert report["checkpoints"] == checkpoint.steps(reference) == [8, 12] and report["damaged"] == []
    assert report["tokens_seen"] == STEPS * 8 * OPTIONS.seq_len >= report["tokens_selected"] > 0
    params = decoder.param_count(tiny(vocab_size=tokenizer.vocab_size))
    assert report["parameters"] == params == sum(row["parameters"] for row in report["tensors"])
    assert report["parameter_bytes"] == 4 * params and report["dtypes"] == ["float32"]
    assert report["optimizer_bytes"] > 8 * params  # two moments
    assert report["tokenizer_fingerprint"] == tokenizer.fingerprint[:12] and report["width"] == TINY.width
    changed = {row["key"]: (row["value"], row["default"]) for row in report["config"]}
    assert changed["config.steps"] == (STEPS, 1000) and "config.seed" not in changed
    assert [row["metric"] for row in report["evaluations"]] == ["eval/held_out/loss"]
    embedding = next(row for row in report["tensors"] if row["name"] == "embedding")
    assert embedding["shape"] == [tokenizer.vocab_size, TINY.width] and embedding["dtype"] == "float32"
    text = text_of(report, dim=False)
    assert f"\nparameters             {params:,}\n" in text and "finished               yes" in text
    assert "\n  config.steps " in text and "reference" not in fields(text)


def test_one_checkpoint_of_a_run_that_has_not_finished(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    older = checkpoint.at(tmp_path / "run", 8)
    checkpoint.at(tmp_path / "run", 12).rename(older.parent / "12.damaged")
    report = inspect_path(older)
    assert (report["kind"], report["step"], report["finished"]) == ("checkpoint", 8, False)
    assert report["checkpoints"] == [8] and report["damaged"] == ["12.damaged"]
    with pytest.raises(UserError, match="trained without config.checkpoint.best"):
        inspect_path(tmp_path / "run" / "best")
    (tmp_path / "run" / "tokenizer" / "tokenizer.model").unlink()
    assert inspect_path(older)["tokenizer"].startswith("refused: ")
    (older / META_FILE).write_text("{")
    with pytest.raises(UserError, match="8 is damaged"):
        inspect_path(older)


def test_the_best_checkpoint_and_a_run_out_of_patience(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    metric = "eval/held_out/loss"
    for step, loss, since in ((8, 1.0, 0), (12, 2.0, 2)):
        folder = checkpoint.at(tmp_path / "run", step)
        described = read_description(folder)
        config = described.meta.config | {"steps": 100}
        config["checkpoint"] = config["checkpoint"] | {"best": metric, "patience": 2}
        health = described.meta.health | {"metric": metric, "evaluations_since_best": since}
        edited = described._replace(meta=described.meta._replace(config=config, health=health), metrics={metric: loss})
        (folder / META_FILE).write_text(json.dumps(edited.as_json()))
    assert inspect_path(tmp_path / "run")["finished"]
    best = inspect_path(tmp_path / "run" / "best")
    assert (best["kind"], best["step"], best["finished"]) == ("checkpoint", 8, False)


def test_weights_are_not_read(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    for item in ("params", "opt_state"):
        shutil.rmtree(checkpoint.at(tmp_path / "run", 12) / item)
    expected, report = inspect_path(reference), inspect_path(tmp_path / "run")
    assert report["tensors"] == expected["tensors"] and report["optimizer_bytes"] == expected["optimizer_bytes"]


def test_a_hugging_face_folder_and_why_another_is_refused(tokenizer, tmp_path):
    config = tiny(vocab_size=tokenizer.vocab_size, family="qwen2", kv_heads=4)
    folder = write_hf_folder(tmp_path / "model", config, decoder.init_params(config, 0), tokenizer)
    report = inspect_path(folder)
    assert (report["architecture"], report["family"], report["refused"]) == ("Qwen2ForCausalLM", "qwen2", None)
    assert report["parameters"] == decoder.param_count(config) and report["dtypes"][0].startswith("F32 (")
    assert report["file_bytes"] == (folder / "model.safetensors").stat().st_size
    assert (report["tokenizer"], report["chat_template"]) == ("tokenizer.model", "no")
    assert report["eos_ids"] == [tokenizer.eos_id]
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert inspect_path(folder)["chat_template"] == "yes"

    hf_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf_config | {"architectures": ["OddForCausalLM"]}))
    report = inspect_path(folder)
    assert "unknown architecture OddForCausalLM" in report["refused"] and report["architecture"] == "OddForCausalLM"
    assert report["num_hidden_layers"] == config.layers and report["parameters"] == decoder.param_count(config)
    (folder / "config.json").write_text(json.dumps(hf_config | {"hidden_size": 48}))
    (folder / "tokenizer.model").unlink()
    report = inspect_path(folder)
    assert "do not match config.json" in report["refused"] and report["tokenizer"].startswith("refused: ")


def test_a_data_set_and_its_rows(data, tokenizer):
    report, store = inspect_path(data, rows=3), Store(data)
    manifest = store.manifest
    assert report["seq_len"] == 16 and not report["conversations"] and report["fingerprint"] == store.fingerprint[:12]
    assert report["splits"] == [{"split": name, **counts} for name, counts in manifest["splits"].items()]
    assert [(row["split"], row["row"]) for row in report["sample"]] == [("train", n) for n in range(3)]
    for number, row in enumerate(report["sample"]):
        segment_ids = store.rows("train")[number]["segment_ids"]
        assert row["pieces"] == tokenizer.pieces(store.rows("train")[number]["tokens"])
        assert row["documents"] == segment_ids.tolist() and not row["eligible"][0]
        assert row["eligible"][1:] == ((segment_ids[1:] == segment_ids[:-1]) & (segment_ids[1:] > 0)).tolist()
    (row,) = inspect_path(data, rows=1, split="eval")["sample"]
    assert row["split"] == "eval" and inspect_path(data, rows=0)["sample"] == []
    with pytest.raises(UserError, match="has no 'test' split"):
        inspect_path(data, split="test")


def test_no_more_rows_are_read_than_shown(data, monkeypatch):
    read, rows = [], Store.rows
    counting = type("Rows", (), {"__len__": lambda self: 10**9, "__getitem__": lambda self, n: read.append(n) or ROW})
    monkeypatch.setattr(Store, "rows", lambda self, split: rows(self, split) and counting())
    assert len(inspect_path(data, rows=2)["sample"]) == 2 and read == [0, 1]


ROW = {"tokens": np.arange(3, 8), "segment_ids": np.array([1, 1, 2, 2, 0])}


def test_a_row_as_text_marks_documents_and_what_is_not_eligible():
    row = {"split": "train", "row": 5, "pieces": ["</s>", " a", "b\n", "c\x1b", "<unk>", "<unk>"]}
    row |= {"documents": [1, 1, 2, 2, 0, 0], "eligible": [False, True, False, True, False, False]}
    expected = ["train row 5: 2 of 5 targets are eligible", "  document 1: [</s>]| a", "  document 2: [b\\n]|c\\x1b"]
    assert module._sample_lines(row, dim=False) == [*expected, "  padding: 2 tokens"]
    assert module._sample_lines(row, dim=True)[1] == "  document 1: \033[2m</s>\033[22m| a"


def test_only_responses_of_conversations_are_eligible(tokenizer, tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"prompt": "so", "response": "and"}\n' * 4)
    options = dataclasses.replace(OPTIONS, transcripts=Transcripts(), seq_len=64, eval_fraction=0.0)
    prepare([tmp_path / "chats.jsonl"], tokenizer, tmp_path / "rows", options, workers=1)
    report = inspect_path(tmp_path / "rows", rows=1)
    (row,) = report["sample"]
    trained = [piece for piece, eligible in zip(row["pieces"], row["eligible"]) if eligible]
    assert report["conversations"] and 0 < "".join(trained).count("and") <= 4 and "so" not in "".join(trained)


@pytest.fixture
def rows(data, tmp_path):
    shutil.copytree(data, tmp_path / "rows")
    return tmp_path / "rows"


def write_scores(rows, losses, monkeypatch, shards=None):
    """Stores scores of a data set in shards of 16 rows. With `shards`, stops after that many, unfinished."""
    store = Store(rows)
    monkeypatch.setattr(stored_scores, "SHARD_TOKENS", 16 * store.seq_len)
    writer = ScoreWriter(store, "s", stored_scores.describe(store, REFERENCE, True), "float16", entropies=True)
    writer.start()
    for number, shard in list(enumerate(writer.shards()))[:shards]:
        writer.write(number, {"losses": losses[shard], "entropies": losses[shard]})
    if shards is None:
        writer.finish({"flops": 1.0})


def test_scores_of_a_data_set(rows, monkeypatch):
    source = Store(rows).rows("train")
    losses = np.random.default_rng(0).gamma(2.0, 1.0, (len(source), 16))
    segment_ids = np.stack([source[number]["segment_ids"] for number in range(len(source))])
    eligible = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    losses[~eligible] = 1000.0  # would show if it counted
    write_scores(rows, losses, monkeypatch)
    report = inspect_path(rows / "scores" / "s")
    assert (report["kind"], report["name"], report["dtype"]) == ("folder of stored scores", "s", "float16")
    assert report["signals"] == ["losses", "entropies"] and report["rows"] == report["rows_done"] == len(source)
    assert report["data"] == f"{rows} ({Store(rows).fingerprint[:12]})"
    assert report["reference"] == "runs/reference (0123456789ab)"
    assert report["stored_bytes"] == 2 * 2 * losses.size and report["rows_read"] == 16
    read = np.unique(np.linspace(0, len(source) - 1, 16).astype(int))
    expected = losses[read][eligible[read]]
    assert report["mean_loss"] == pytest.approx(expected.mean(), rel=1e-3)
    for percent in (5, 25, 50, 75, 95):
        assert report[f"loss_{percent}%"] == pytest.approx(np.quantile(expected, percent / 100), rel=5e-3)
    (listed,) = inspect_path(rows)["scores"]
    assert listed == {name: report[name] for name in ("name", "signals", "dtype", "rows", "rows_done")}

    edit_manifest(rows, fingerprint="f" * 64)
    report = inspect_path(rows / "scores" / "s")
    assert report["data"].endswith("), which has changed since") and "mean_loss" not in report


def test_scores_that_are_not_complete(rows, monkeypatch):
    count = len(Store(rows).rows("train"))
    write_scores(rows, np.ones((count, 16)), monkeypatch, shards=2)
    report = inspect_path(rows / "scores" / "s.partial")
    assert (report["rows"], report["rows_done"]) == (count, 32) and "mean_loss" not in report
    assert report["kind"] == "folder of scores that are not complete yet"
    assert [row["rows_done"] for row in inspect_path(rows)["scores"]] == [32]


def test_the_command_prints_text_or_json(data, reference, tmp_path):
    (tmp_path / "file").write_text("")
    commands = {
        "text": ["inspect", str(data), "--rows=1"],
        "json": ["inspect", str(reference), "--json"],
        "empty": ["inspect", str(tmp_path)],
        "file": ["inspect", f"{tmp_path}/file"],
        "missing": ["inspect", f"{tmp_path}/nowhere"],
        "remote": ["inspect", "gs://bucket/run"],
        "none": ["inspect"],
    }
    done = run_all(commands, tmp_path / "done", make=True)
    shown = done["text"].stdout
    assert fields(shown)["kind"].strip() == "prepared data set" and "[</s>]" in shown and "\033" not in shown
    assert json.loads(done["json"].stdout) == inspect_path(reference)
    accepted = "give a prepared data set, a folder of stored scores, a run, a checkpoint or a Hugging Face folder"
    for name, message in (
        ("empty", f"{tmp_path}: not a folder that rho1 knows; {accepted}"),
        ("file", f"{tmp_path}/file: not a folder that rho1 knows; {accepted}"),
        ("missing", f"{tmp_path}/nowhere: no such folder; {accepted}"),
        ("remote", "PATH=gs://bucket/run: rho1 reads and writes local files only"),
        ("none", "name the path to inspect: rho1 inspect PATH"),
    ):
        (line,) = done[name].stderr.splitlines()
        assert done[name].status == 2 and line.startswith(f"error: {message}") and not done[name].stdout, line
    assert read_description(checkpoint.at(reference, 12)).meta.step == 12  # nothing was changed
