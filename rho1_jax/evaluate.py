"""Held-out losses and answer accuracies of a checkpoint.

python -m rho1_jax.evaluate --checkpoint=DIR [--tasks=gsm8k,math_oai,... --data_dir=DIR] [--questions=NAME=FILE,...]
    [--data=NAME=DIR,...] [--lm_eval=TASK,...] [--output=DIR]

Everything else is as in the run that wrote the checkpoint, unless a flag says otherwise. Interrupted and started again
with the same --output, it goes on.
"""

import importlib
import json
import pathlib
from typing import NamedTuple

import jax
import ml_collections
from absl import flags
from flax import nnx
from jax.sharding import Mesh

from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.evals.evaluator import Evaluator
from rho1_jax.models import decoder
from rho1_jax.models.decoder import Params
from rho1_jax.runtime import sharding
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import read_json, write_text
from rho1_jax.runtime.processes import define_distributed_flag, is_first, say, start
from rho1_jax.training import checkpoint
from rho1_jax.training.config import differences, model_config


class LmEval(NamedTuple):
    """What lm-eval is asked to do: names of its tasks, a folder with further ones, and items of each (0: all)."""

    tasks: list[str]
    include_path: str
    limit: int


def evaluate(
    checkpoint_path: str,
    overrides: dict,
    output: pathlib.Path | None,
    temperature: float,
    seed: int,
    lm_eval: LmEval | None = None,
) -> dict[str, float]:
    """Evaluates a checkpoint on what its config names, with the `eval` keys of `overrides` in their place.

    Returns:
      {"eval/NAME/loss": nats a token, "eval/NAME/accuracy": share of right answers}. With `output`, they are written
      to results.json there, and the items to NAME.jsonl.

    Raises:
      UserError: there is no checkpoint, nothing to evaluate, or an input is bad.
    """
    directory = checkpoint.find(checkpoint_path, "--checkpoint")
    config = ml_collections.ConfigDict(checkpoint.load_meta(directory).config)
    config.eval.update({key: value for key, value in overrides.items() if value is not None})
    if not (config.eval.data or config.eval.questions or config.eval.tasks or lm_eval):
        raise UserError("nothing to evaluate: give --tasks=NAME,NAME, --questions=NAME=FILE or --data=NAME=DIR")
    settings = {"checkpoint": str(directory), "eval": config.eval.to_dict(), "temperature": temperature, "seed": seed}
    settings["lm_eval"] = lm_eval._asdict() if lm_eval else None
    tokenizer = Tokenizer(checkpoint.tokenizer_path(directory))
    mesh = sharding.mesh_of_run(**config.mesh)
    policy_config = model_config(config)
    graphdef = decoder.build(policy_config)
    with jax.set_mesh(mesh):
        evaluator = Evaluator(config, graphdef, tokenizer, mesh)
        params = checkpoint.load_params(directory, policy_config, mesh, "float32")
        if output is not None:
            check_settings(output, settings)
        metrics = evaluator(params, temperature, seed, output)
        if lm_eval:
            metrics |= run_lm_eval(lm_eval, graphdef, params, tokenizer, mesh, config.eval.generate_batch)
    tasks = [metrics[f"eval/{name}/accuracy"] for name in evaluator.tasks]
    if len(tasks) > 1:
        metrics["eval/average/accuracy"] = sum(tasks) / len(tasks)
    if output is not None and is_first():
        write_text(output / "results.json", json.dumps({"checkpoint": str(directory), **metrics}, indent=2) + "\n")
    return metrics


def run_lm_eval(
    wanted: LmEval, graphdef: nnx.GraphDef, params: Params, tokenizer: Tokenizer, mesh: Mesh, batch_size: int
) -> dict[str, float]:
    """lm-eval's tasks on the model: {"lm_eval/TASK/METRIC": value}. Raises UserError where it is not installed."""
    try:
        adapter = importlib.import_module("rho1_jax.evals.lm_eval_adapter")
        evaluator, tasks = importlib.import_module("lm_eval.evaluator"), importlib.import_module("lm_eval.tasks")
    except ModuleNotFoundError as error:
        raise UserError(f"--lm_eval: {error}; install the extra `eval`: pip install -e '.[eval]'") from None
    manager = tasks.TaskManager(include_path=wanted.include_path or None)
    unknown = [name for name in wanted.tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"--lm_eval: lm-eval knows no task {', '.join(unknown)}; --lm_eval_path=DIR adds those of a folder"
        )
    model = adapter.LanguageModel(graphdef, params, tokenizer, mesh, batch_size)
    found = evaluator.simple_evaluate(
        model, tasks=wanted.tasks, task_manager=manager, limit=wanted.limit or None, bootstrap_iters=0
    )
    return {
        f"lm_eval/{task}/{metric.split(',')[0]}": float(value)
        for task, values in found["results"].items()
        for metric, value in values.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def check_settings(output: pathlib.Path, settings: dict) -> None:
    """Keeps the settings of an evaluation beside its results. Raises UserError where those there are of others."""
    path, settings = output / "settings.json", json.loads(json.dumps(settings))
    if path.exists():
        changed = differences(read_json(path), settings, "settings")
        if changed:
            raise UserError(f"--output={output} holds another evaluation ({'; '.join(changed)}); choose another")
    elif is_first():
        output.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """The command: its flags, then `evaluate`."""
    checkpoint_flag = flags.DEFINE_string("checkpoint", None, "A run's directory or one checkpoint.", required=True)
    overrides = {
        "tasks": flags.DEFINE_string("tasks", None, "Math tasks, with commas."),
        "data_dir": flags.DEFINE_string("data_dir", None, "Where the tasks' files lie."),
        "task_items": flags.DEFINE_integer("task_items", None, "Items of each task, the first ones."),
        "exemplars": flags.DEFINE_string("exemplars", None, "NAME=FILE,... in place of a task's own."),
        "tool_use": flags.DEFINE_bool("tool_use", None, "Run the programs that the model writes."),
        "generate_batch": flags.DEFINE_integer("generate_batch", None, "Prompts decoded together."),
        "questions": flags.DEFINE_string("questions", None, "NAME=FILE,... of questions and answers."),
        "data": flags.DEFINE_string("data", None, "NAME=DIR,... of prepared data with a split 'eval'."),
        "rows": flags.DEFINE_integer("rows", None, "Rows of each data set, at most."),
        "prompt_template": flags.DEFINE_string("prompt_template", None, "A question's record as a prompt."),
        "answer_pattern": flags.DEFINE_string("answer_pattern", None, "Regular expression with one group."),
        "max_new_tokens": flags.DEFINE_integer("max_new_tokens", None, "Longest generation."),
    }
    temperature = flags.DEFINE_float("temperature", 0.0, "0: greedy.", lower_bound=0.0)
    seed = flags.DEFINE_integer("seed", 0, "Of the draws at a temperature.")
    lm_eval = flags.DEFINE_list(
        "lm_eval", [], "lm-eval's tasks, with commas (extra `eval`). It may download data sets."
    )
    lm_eval_path = flags.DEFINE_string("lm_eval_path", "", "A folder with task files of your own for lm-eval.")
    distributed_flag = define_distributed_flag()
    output = flags.DEFINE_string("output", None, "Directory for results.json and the items.")

    def command() -> None:
        start(distributed_flag.value)
        values = {name: flag.value for name, flag in overrides.items()}
        directory = pathlib.Path(output.value) if output.value else None
        wanted = LmEval(lm_eval.value, lm_eval_path.value, int(values["task_items"] or 0)) if lm_eval.value else None
        metrics = evaluate(checkpoint_flag.value, values, directory, temperature.value, seed.value, wanted)
        width = max(map(len, metrics)) + 2
        for name, value in metrics.items():
            say(f"{name:<{width}}" + (f"{value:.1%}" if name.endswith("accuracy") else f"{value:.4f}"))

    run(command)


if __name__ == "__main__":
    main()
