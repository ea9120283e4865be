"""Held-out losses and answer accuracies of a model: a run, one of its checkpoints, or a Hugging Face folder.

rho1 evaluate --checkpoint=DIR [--tasks=gsm8k,math_oai,... --data_dir=DIR] [--questions=NAME=FILE,...]
    [--data=NAME=DIR,...] [--lm_eval=TASK,...] [--output=DIR]

Each key of config.eval except `every` is a flag: --rows, --exemplars, --tool_use, --max_new_tokens, --stops and so on.

All other settings come from the run that wrote the checkpoint. For a Hugging Face folder, they are the defaults. To
resume after an interruption, run the same command again with the same --output.
"""

import contextlib
import dataclasses
import importlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, get_type_hints

import jax
import pydantic
from absl import flags
from flax import nnx
from jax.sharding import Mesh

from rho1_jax.configs.default import EvalConfig
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.evals.evaluator import Evaluator
from rho1_jax.models import decoder
from rho1_jax.models.decoder import Params
from rho1_jax.runtime import sharding, stopping
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, write_text
from rho1_jax.runtime.lock import LOCK_FILE, locked
from rho1_jax.runtime.processes import define_distributed_flag, is_first, say, start
from rho1_jax.runtime.schema import read_json
from rho1_jax.training.config import changes, check_values, complete
from rho1_jax.training.pretrained import Pretrained

# The keys of config.eval that a flag may replace.
EVAL_FIELDS = [field for field in dataclasses.fields(EvalConfig) if field.name != "every"]
MORE_HELP = {
    "stops": r" A string that ends a generation for --questions; '\n' is a line break. --stops= alone "
    "removes all. Tasks have their own stops."
}
FIELD_TYPES = get_type_hints(EvalConfig)  # without their ranges


class LmEval(NamedTuple):
    """What to run with lm-eval: its task names, a folder with further tasks, and items of each (0: all)."""

    tasks: list[str]
    include_path: str
    limit: int


def evaluate_model(
    checkpoint: str | pathlib.Path,
    overrides: Mapping[str, Any],
    output: pathlib.Path | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    lm_eval: LmEval | None = None,
) -> dict[str, float]:
    """Evaluates a model on what its config and `overrides` name.

    Args:
      checkpoint: a run directory, one of its checkpoints, or a Hugging Face folder.
      overrides: keys of the config's `eval` section to change; None leaves a key as it is.
      output: folder for results.json and, per question set, the items in NAME.jsonl.
      temperature: sampling temperature; 0 takes the likeliest token.
      seed: seed for sampling.
      lm_eval: tasks to run with lm-eval.

    Returns:
      {"eval/NAME/loss": nats per token, "eval/NAME/accuracy": share of right answers}.

    Raises:
      UserError: there is no model, nothing to evaluate, or an input is bad.
    """
    trained = Pretrained.open(checkpoint, "--checkpoint")
    config = trained.config
    config.eval.update({key: value for key, value in overrides.items() if value is not None})
    check_values(config)
    if not (config.eval.data or config.eval.questions or config.eval.tasks or lm_eval):
        raise UserError("nothing to evaluate: give --tasks=NAME,NAME, --questions=NAME=FILE or --data=NAME=DIR")
    if overrides.get("stops") is not None and not config.eval.questions:
        raise UserError("--stops applies only to --questions, since tasks have their own stops; remove --stops")
    path = str(trained.path.absolute())
    lm_eval_settings = lm_eval._asdict() if lm_eval else None
    settings = Settings(path, config.eval.to_dict(), temperature, seed, lm_eval_settings)
    tokenizer, mesh, graphdef = trained.tokenizer(), sharding.mesh_of_run(**config.mesh), decoder.build(trained.model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        evaluator = Evaluator(config, graphdef, tokenizer, mesh)
        params = trained.load(mesh, "float32")
        if output is not None:
            if is_first():
                stack.enter_context(locked(output / LOCK_FILE, f"--output={output}"))
            check_settings(output, settings)
        stopping.save_on_stop()
        metrics = evaluator(params, temperature, seed, output)
        if lm_eval:
            metrics |= run_lm_eval(lm_eval, graphdef, params, tokenizer, mesh, config.eval.generate_batch)
    accuracies = [metrics[f"eval/{name}/accuracy"] for name in evaluator.tasks]
    if len(accuracies) > 1:
        metrics["eval/average/accuracy"] = sum(accuracies) / len(accuracies)
    if output is not None and is_first():
        write_text(output / "results.json", json.dumps({"checkpoint": path, **metrics}, indent=2) + "\n")
    return metrics


def run_lm_eval(
    requested: LmEval, graphdef: nnx.GraphDef, params: Params, tokenizer: Tokenizer, mesh: Mesh, batch_size: int
) -> dict[str, float]:
    """Runs lm-eval's tasks: {"lm_eval/TASK/METRIC": value}. Raises UserError if lm-eval is not installed."""
    try:
        adapter = importlib.import_module("rho1_jax.evals.lm_eval_adapter")
        evaluator, tasks = importlib.import_module("lm_eval.evaluator"), importlib.import_module("lm_eval.tasks")
    except ModuleNotFoundError as error:
        raise UserError(f"--lm_eval: {error}; install the extra `eval`: pip install 'rho1_jax[eval]'") from None
    manager = tasks.TaskManager(include_path=requested.include_path or None)
    unknown = [name for name in requested.tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"--lm_eval: lm-eval knows no task {', '.join(unknown)}; --lm_eval_path=DIR adds the tasks of a folder"
        )
    model = adapter.LanguageModel(graphdef, params, tokenizer, mesh, batch_size)
    results = evaluator.simple_evaluate(
        model, tasks=requested.tasks, task_manager=manager, limit=requested.limit or None, bootstrap_iters=0
    )["results"]
    return {
        f"lm_eval/{task}/{metric.split(',')[0]}": float(value)
        for task, values in results.items()
        for metric, value in values.items()
        if isinstance(value, float) and "stderr" not in metric
    }


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an evaluation depends on, stored as settings.json in its output folder.

    Attributes:
      checkpoint: the evaluated checkpoint or folder.
      eval: the `eval` section of the config.
      temperature: sampling temperature.
      seed: seed for sampling.
      lm_eval: the fields of `LmEval`; None without lm-eval.
    """

    checkpoint: str
    eval: dict[str, Any]
    temperature: pydantic.FiniteFloat
    seed: int
    lm_eval: dict[str, Any] | None = None


def check_settings(output: pathlib.Path, settings: Settings) -> None:
    """Stores the settings of an evaluation beside its results.

    Raises:
      UserError: `output` holds an evaluation with other settings, or its settings.json is bad.
    """
    path, text = output / "settings.json", json.dumps(dataclasses.asdict(settings), indent=2) + "\n"
    if path.exists():
        stored = dataclasses.asdict(read_json(path, Settings))
        stored["eval"] = complete({"eval": stored["eval"]}, str(path))["eval"]
        changed = changes(stored, json.loads(text), "settings")
        if changed:
            raise UserError(
                f"--output={output} holds another evaluation ({'; '.join(map(str, changed))}); choose another --output"
            )
    elif is_first():
        write_text(path, text)


def main() -> None:
    """The command `rho1 evaluate`."""
    checkpoint = flags.DEFINE_string(
        "checkpoint", None, "A run, one of its checkpoints, or a Hugging Face folder.", required=True
    )
    define: dict[Any, Any] = {str: flags.DEFINE_string, int: flags.DEFINE_integer, bool: flags.DEFINE_bool}
    overrides = {
        field.name: define.get(FIELD_TYPES[field.name], flags.DEFINE_multi_string)(
            field.name, None, f"Replaces config.eval.{field.name}.{MORE_HELP.get(field.name, '')}"
        )
        for field in EVAL_FIELDS
    }
    temperature = flags.DEFINE_float("temperature", 0.0, "0: greedy.", lower_bound=0.0)
    seed = flags.DEFINE_integer("seed", 0, "Seed for sampling.")
    lm_eval = flags.DEFINE_list(
        "lm_eval", [], "lm-eval tasks, comma-separated (extra `eval`). lm-eval may download data sets."
    )
    lm_eval_path = flags.DEFINE_string("lm_eval_path", "", "A folder with lm-eval task files of your own.")
    distributed_flag = define_distributed_flag()
    output = flags.DEFINE_string("output", None, "Directory for results.json and the items.")

    def command() -> None:
        stopping.listen()
        start(distributed_flag.value)
        values = {name: flag.value for name, flag in overrides.items()}
        if values["stops"] is not None:
            values["stops"] = [stop.replace("\\n", "\n") for stop in values["stops"] if stop]
        directory = local_path(output.value, "--output") if output.value else None
        if lm_eval_path.value:
            local_path(lm_eval_path.value, "--lm_eval_path")
        requested = LmEval(lm_eval.value, lm_eval_path.value, int(values["task_items"] or 0)) if lm_eval.value else None
        metrics = evaluate_model(checkpoint.value, values, directory, temperature.value, seed.value, requested)
        width = max(map(len, metrics)) + 2
        for name, value in metrics.items():
            say(f"{name:<{width}}" + (f"{value:.1%}" if name.endswith("accuracy") else f"{value:.4f}"))

    run(command)


if __name__ == "__main__":
    main()
