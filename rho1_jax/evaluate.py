"""Held-out losses and answer accuracies of a checkpoint.

python -m rho1_jax.evaluate --checkpoint=DIR [--tasks=gsm8k,math_oai,... --data_dir=DIR] [--questions=NAME=FILE,...]
    [--data=NAME=DIR,...] [--output=DIR]

Everything else is as in the run that wrote the checkpoint, unless a flag says otherwise. Interrupted and started again
with the same --output, it goes on.
"""

import json
import pathlib

import jax
import ml_collections
from absl import flags

from rho1_jax import checkpoint, model, sharding
from rho1_jax.config import differences, model_config, run
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.distributed import define_distributed_flag, is_first, say, start
from rho1_jax.errors import UserError
from rho1_jax.evals.answers import accuracy
from rho1_jax.evals.evaluator import Evaluator
from rho1_jax.files import read_json, write_text


def evaluate(
    checkpoint_path: str,
    overrides: dict,
    output: pathlib.Path | None,
    temperature: float,
    seed: int,
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
    if not (config.eval.data or config.eval.questions or config.eval.tasks):
        raise UserError("nothing to evaluate: give --tasks=NAME,NAME, --questions=NAME=FILE or --data=NAME=DIR")
    settings = {"checkpoint": str(directory), "eval": config.eval.to_dict(), "temperature": temperature, "seed": seed}
    tokenizer = Tokenizer(checkpoint.tokenizer_path(directory))
    mesh = sharding.make_mesh(**config.mesh)
    policy_config = model_config(config)
    graphdef = model.build(policy_config)
    with jax.set_mesh(mesh):
        evaluator = Evaluator(config, graphdef, tokenizer, mesh)
        params = checkpoint.load_params(directory, policy_config, mesh, "float32")
        if output is not None:
            check_settings(output, settings)
        metrics = evaluator.losses(params)
        for name in evaluator.questions:
            file = output / f"{name}.jsonl" if output else None
            items = evaluator.answers(params, name, temperature, seed, file)
            metrics[f"eval/{name}/accuracy"] = accuracy(items)
    tasks = [metrics[f"eval/{name}/accuracy"] for name in config.eval.tasks.split(",") if name]
    if len(tasks) > 1:
        metrics["eval/average/accuracy"] = sum(tasks) / len(tasks)
    if output is not None and is_first():
        write_text(output / "results.json", json.dumps({"checkpoint": str(directory), **metrics}, indent=2) + "\n")
    return metrics


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
    distributed_flag = define_distributed_flag()
    output = flags.DEFINE_string("output", None, "Directory for results.json and the items.")

    def command() -> None:
        start(distributed_flag.value)
        values = {name: flag.value for name, flag in overrides.items()}
        directory = pathlib.Path(output.value) if output.value else None
        metrics = evaluate(checkpoint_flag.value, values, directory, temperature.value, seed.value)
        width = max(map(len, metrics)) + 2
        for name, value in metrics.items():
            say(f"{name:<{width}}" + (f"{value:.1%}" if name.endswith("accuracy") else f"{value:.4f}"))

    run(command)


if __name__ == "__main__":
    main()
