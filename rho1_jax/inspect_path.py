"""Shows what a path holds: a run, a checkpoint, a Hugging Face folder, a prepared data set or stored scores.

rho1 inspect PATH [--rows=2] [--split=train] [--json]

Reads only descriptions and a few rows, so it is quick at any size. It does not check checksums; `rho1 verify` does. In
the sample rows of a data set, tokens in [brackets] are not eligible: nothing is trained on them. A terminal dims them
instead.
"""

import dataclasses
import json
import math
import pathlib
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from rho1_jax.configs import default
from rho1_jax.configs.default import ModelConfig
from rho1_jax.data import stored_scores
from rho1_jax.data.chat_template import ChatTemplate
from rho1_jax.data.store import Store
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.method.selection import eligible_targets
from rho1_jax.models import hf_config
from rho1_jax.models.hf_folder import HuggingFaceFolder
from rho1_jax.models.vocabulary import open_tokenizer
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError, printable
from rho1_jax.runtime.files import local_path
from rho1_jax.training import checkpoint
from rho1_jax.training.config import RUN_SETTINGS, as_saved, changes
from rho1_jax.training.description import Description, Meta, StoredArray, read_description
from rho1_jax.training.health import Health
from rho1_jax.training.path_kind import Kind, kind_of
from rho1_jax.training.pretrained import Pretrained

# Sizes that are always shown. Other fields of a model are shown if they differ from their defaults.
SIZES = (
    *("family", "layers", "width", "heads", "kv_heads", "head_width", "ff_width"),
    *("vocab_size", "context_length", "tied_embeddings"),
)
FINGERPRINT = 12  # characters of a fingerprint that are shown
SCORE_ROWS = 16  # rows whose losses are read
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SAMPLE, TABLE_GAP = "sample", "  "

Report = dict[str, Any]  # what is shown: numbers, texts, lists of them, and tables as lists of dicts


def inspect_path(path: str | pathlib.Path, rows: int = 2, split: str | None = None) -> Report:
    """Describes what a path holds.

    Args:
      path: a run directory, RUN/best, a checkpoint, a Hugging Face folder, a data set or a folder of scores.
      rows: rows of a data set to show.
      split: their split; None: the first one.

    Returns:
      The description, in values that JSON can hold. Sizes are in bytes, losses in nats.

    Raises:
      UserError: the path holds none of these, or what it holds is damaged.
    """
    folder = local_path(path, "PATH")
    if folder.name == checkpoint.BEST and checkpoint.steps(folder.parent):
        folder = checkpoint.find(folder, "PATH")
    kind = kind_of(folder)
    if kind is None:
        problem = "not a folder that rho1 knows" if folder.exists() else "no such folder"
        *kinds, last = (each.value for each in Kind if each != Kind.PARTIAL_SCORES)
        raise UserError(f"{path}: {problem}; give {', '.join(kinds)} or {last}")
    report: Report = {"path": str(folder), "kind": kind.value.partition(" ")[2]}
    match kind:
        case Kind.RUN:
            return report | _run(folder)
        case Kind.CHECKPOINT:
            return report | _run(checkpoint.tokenizer_path(folder.absolute()).parent, folder)
        case Kind.HUGGING_FACE:
            return report | _hugging_face_folder(HuggingFaceFolder(folder))
        case Kind.DATA:
            return report | _data_set(Store(folder), rows, split)
        case Kind.SCORES | Kind.PARTIAL_SCORES:
            return report | _scores(folder)


def _run(workdir: pathlib.Path, folder: pathlib.Path | None = None) -> Report:
    """A run with its newest checkpoint, or with the checkpoint `folder`."""
    saved_steps = checkpoint.steps(workdir)
    folder = folder or checkpoint.at(workdir, saved_steps[-1])
    description = read_description(folder)
    meta = description.meta
    model = ModelConfig(**meta.config["model"])
    params = checkpoint.stored_arrays(folder, description.arrays, "params")
    return {
        "checkpoint": str(folder),
        "step": meta.step,
        "steps_of_run": meta.config["steps"],
        "finished": _is_finished(meta),
        "tokens_seen": meta.tokens_seen,
        "tokens_selected": meta.tokens_selected,
        "checkpoints": saved_steps,
        "damaged": sorted(path.name for path in (workdir / checkpoint.CHECKPOINTS).glob("*.damaged*")),
        **_model(model),
        "parameters": sum(math.prod(array.shape) for array in params.values()),
        "parameter_bytes": _bytes(params),
        "dtypes": sorted({array.dtype for array in params.values()}),
        "optimizer_bytes": _bytes(checkpoint.stored_arrays(folder, description.arrays, "opt_state")),
        **_tokenizer(lambda: open_tokenizer(checkpoint.tokenizer_path(folder), model, meta.tokenizer)),
        "reference": meta.reference and f"{meta.reference['path']} ({meta.reference['fingerprint'][:FINGERPRINT]})",
        "data": [{**each, "fingerprint": each["fingerprint"][:FINGERPRINT]} for each in meta.data],
        "evaluations": [{"metric": name, "value": value} for name, value in sorted(description.metrics.items())],
        "config": _config(description),
        "tensors": [
            {
                "name": name,
                "shape": list(array.shape),
                "dtype": array.dtype,
                "parameters": math.prod(array.shape),
                "bytes": _bytes({name: array}),
            }
            for name, array in sorted(params.items())
        ],
    }


def _is_finished(meta: Meta) -> bool:
    """True if no step is left, or if config.checkpoint.patience ended the run."""
    settings, health = meta.config["checkpoint"], Health(**meta.health or {})
    spent = health.metric == settings["best"] and 0 < settings["patience"] <= health.evaluations_since_best
    return meta.pending is None and (spent or meta.step >= meta.config["steps"])


def _config(description: Description) -> list[Report]:
    """The keys of a run's config that differ from their defaults."""
    changed = changes(as_saved(default.get_config()), description.meta.config)
    return [{"key": change.key, "value": change.new, "default": change.old} for change in changed]


def _bytes(arrays: dict[str, StoredArray]) -> int:
    return sum(math.prod(array.shape) * jnp.dtype(array.dtype).itemsize for array in arrays.values())


def _model(model: ModelConfig) -> Report:
    defaults = ModelConfig()
    others = [field.name for field in dataclasses.fields(model) if field.name not in (*SIZES, *RUN_SETTINGS)]
    changed = [name for name in others if getattr(model, name) != getattr(defaults, name)]
    return {name: getattr(model, name) for name in (*SIZES, *changed)}


def _tokenizer(open_it: Callable[[], Tokenizer]) -> Report:
    try:
        tokenizer = open_it()
    except UserError as error:
        return {"tokenizer": f"refused: {error}"}
    return {
        "tokenizer": tokenizer.path.name,
        "tokenizer_vocabulary": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_ids": list(tokenizer.eos_ids),
        "tokenizer_fingerprint": tokenizer.fingerprint[:FINGERPRINT],
    }


def _hugging_face_folder(folder: HuggingFaceFolder) -> Report:
    """A Hugging Face folder. If it cannot be imported, the report gives the reason."""
    try:
        model = Pretrained.of_folder(folder).model
        sizes = _model(model)
        folder.check(model)
        refused = None
    except UserError as error:
        refused = str(error)
        sizes = {key: folder.config[key] for key in hf_config.FIELDS if key in folder.config}  # type: ignore[literal-required]
    try:
        template = "yes" if ChatTemplate.open(folder.path) else "no"
    except UserError as error:
        template = f"refused: {error}"
    return {
        "architecture": next(iter(folder.config.get("architectures") or []), None),
        "refused": refused,
        **sizes,
        "parameters": sum(math.prod(tensor.shape) for tensor in folder.stored),
        "file_bytes": sum(file.stat().st_size for file in {tensor.file for tensor in folder.stored}),
        "dtypes": [f"{dtype} ({count})" for dtype, count in Counter(each.dtype for each in folder.stored).items()],
        **_tokenizer(lambda: Tokenizer(folder.path)),
        "chat_template": template,
    }


def _data_set(store: Store, rows: int, split: str | None) -> Report:
    manifest: Any = store.manifest
    scores = sorted((store.path / stored_scores.FOLDER).glob("*"))
    split = split or next(iter(manifest["splits"]))
    source = store.rows(split)
    samples = [
        {"split": split, "row": number, **_sample(source[number], store)} for number in range(min(rows, len(source)))
    ]
    return {
        "seq_len": store.seq_len,
        "conversations": store.has_responses,
        "fingerprint": store.fingerprint[:FINGERPRINT],
        **_tokenizer(store.tokenizer),
        "file_bytes": sum(file["bytes"] for file in manifest.get("files", {}).values()) or None,
        "splits": [{"split": name, **counts} for name, counts in manifest["splits"].items()],
        "inputs": [{"file": each["file"], "bytes": each["bytes"]} for each in manifest.get("inputs", [])],
        "scores": [_stored_scores(path) for path in scores if kind_of(path)],
        SAMPLE: samples,
    }


def _sample(row: dict[str, np.ndarray], store: Store) -> Report:
    """The pieces of a row, the number of each token's document (0: padding), and True for each eligible token."""
    return {
        "pieces": [
            piece or f"<{token}>"
            for token, piece in zip(row["tokens"].tolist(), store.tokenizer().pieces(row["tokens"]))
        ],
        "documents": row["segment_ids"].tolist(),
        "eligible": [False, *_eligible(row)],  # the first token is an input only
    }


def _eligible(row: dict[str, np.ndarray]) -> list[bool]:
    batch = {name: jnp.asarray(values)[None] for name, values in row.items()}
    return eligible_targets(batch["segment_ids"], batch.get("responses"))[0].tolist()


def _stored_scores(path: pathlib.Path) -> Report:
    stored, done = stored_scores.read_scores(path)
    return {
        "name": path.name,
        "signals": list(stored["signals"]),
        "dtype": stored["dtype"],
        "rows": stored["rows"],
        "rows_done": done,
    }


def _scores(path: pathlib.Path) -> Report:
    stored, done = stored_scores.read_scores(path)
    data = path.absolute().parent.parent
    try:
        store = Store(data)
        belongs = "" if store.fingerprint == stored["data"] else ", which has changed since"
        rows = store.rows(stored_scores.SPLIT)
    except UserError as error:
        rows, belongs = None, f", which cannot be opened: {error}"
    losses = _losses(path, stored, rows) if done == stored["rows"] and not belongs else None
    return {
        **_stored_scores(path),
        "seq_len": stored["seq_len"],
        "document_mask": stored["document_mask"],
        "stored_bytes": done * stored["seq_len"] * np.dtype(stored["dtype"]).itemsize * len(stored["signals"]),
        "data": f"{data} ({stored['data'][:FINGERPRINT]}){belongs}",
        "reference": f"{stored['reference'].get('path')} ({stored['reference']['fingerprint'][:FINGERPRINT]})",
        "tokenizer_fingerprint": stored["tokenizer"][:FINGERPRINT],
        **(losses or {}),
    }


def _losses(path: pathlib.Path, stored: stored_scores.ScoreDescription, rows: Any) -> Report:
    """Statistics of the losses of the eligible targets in a few rows, spread over the data set."""
    column = stored_scores.open_column(path, stored, "losses")
    numbers = np.unique(np.linspace(0, stored["rows"] - 1, SCORE_ROWS).astype(int)).tolist()
    losses = np.concatenate([column[number][np.array(_eligible(rows[number]))] for number in numbers])
    if not losses.size:
        return {"rows_read": len(numbers)}
    quantiles = {f"loss_{100 * q:g}%": float(value) for q, value in zip(QUANTILES, np.quantile(losses, QUANTILES))}
    return {"rows_read": len(numbers), "mean_loss": float(losses.mean()), **quantiles}


def text_of(report: Report, dim: bool) -> str:
    """A report as aligned text. Tokens that are not eligible are dimmed, for a terminal, or else in brackets."""
    tables = {name: value for name, value in report.items() if value and _is_table(value)}
    fields = {_label(name): _shown(name, value) for name, value in report.items() if not _is_table(value)}
    width = max(map(len, fields))
    lines = [f"{label:<{width}}  {text}" for label, text in fields.items() if text]
    for name, rows in tables.items():
        if name == SAMPLE:
            lines += [line for row in rows for line in ("", *_sample_lines(row, dim))]
        else:
            lines += ["", f"{_label(name)}:", *_table_lines(rows)]
    return "\n".join(lines)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _label(name: str) -> str:
    return name.replace("_", " ")


def _shown(name: str, value: Any) -> str:
    match value:
        case None | [] | "":
            return ""
        case bool():
            return "yes" if value else "no"
        case int() if name.endswith("bytes"):
            return _size(value)
        case int() if not name.endswith(("_id", "_ids")):
            return f"{value:,}"
        case float():
            return f"{value:,.6g}"
        case list():
            return ", ".join(_shown(name, each) for each in value)
    return printable(str(value))


def _size(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}" if unit != "bytes" else f"{number} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


def _table_lines(rows: list[Report]) -> list[str]:
    names = list(rows[0])
    cells = [[_label(name) for name in names], *([_shown(name, row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    right = [all(isinstance(row[name], int | float) for row in rows) for name in names]
    return [
        TABLE_GAP
        + TABLE_GAP.join(
            f"{cell:>{width}}" if is_right else f"{cell:<{width}}" for cell, width, is_right in zip(line, widths, right)
        ).rstrip()
        for line in cells
    ]


def _sample_lines(row: Report, dim: bool) -> list[str]:
    """A row: one line for each document in it, with its pieces separated by a bar."""
    before, after = ("\033[2m", "\033[22m") if dim else ("[", "]")
    tokens = list(zip(row["pieces"], row["documents"], row["eligible"]))
    counts = f"{sum(row['eligible']):,} of {len(tokens) - 1:,} targets are eligible"
    lines = [f"{row['split']} row {row['row']}: {counts}"]
    for document in dict.fromkeys(row["documents"]):
        pieces = [(printable(piece), eligible) for piece, number, eligible in tokens if number == document]
        text = "|".join(piece if eligible else f"{before}{piece}{after}" for piece, eligible in pieces)
        lines.append(f"  document {document}: {text}" if document else f"  padding: {len(pieces):,} tokens")
    return lines


def main() -> None:
    """The command: parses the flags and prints what `inspect_path` returns."""
    path = flags.DEFINE_string("path", None, "The path to inspect. `rho1 inspect PATH` sets it too.")
    rows = flags.DEFINE_integer("rows", 2, "Rows of a data set to show; 0: none.", lower_bound=0)
    split = flags.DEFINE_string("split", None, "Split of these rows. By default, the first one.")
    as_json = flags.DEFINE_boolean("json", False, "Print JSON, with sizes in bytes.")

    def command() -> None:
        if path.value is None:
            raise UserError("name the path to inspect: rho1 inspect PATH")
        report = inspect_path(path.value, rows.value, split.value)
        print(json.dumps(report, indent=2) if as_json.value else text_of(report, dim=sys.stdout.isatty()))

    run(command, argument=path)


if __name__ == "__main__":
    main()
