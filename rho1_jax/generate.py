"""Continues prompts with a checkpoint.

rho1 generate --checkpoint=DIR --prompt='2+2=' [--prompt=...] [--max_new_tokens=256] [--temperature=0.7 --seed=1]
rho1 generate --checkpoint=DIR --prompts=FILE.jsonl --output=FILE.jsonl [--stop='\\n\\n']
"""

import pathlib
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from rho1_jax.data import records
from rho1_jax.models import decoder
from rho1_jax.models.generation import Continuation, Generator
from rho1_jax.runtime import sharding
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import json_lines, local_path, write_text
from rho1_jax.training.pretrained import Pretrained


def generate_text(
    checkpoint: str | pathlib.Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    stops: Sequence[str] = (),
) -> list[Continuation]:
    """Continues each prompt until the end-of-sequence token, a stop string, or `max_new_tokens`.

    Args:
      checkpoint: a run directory (its newest checkpoint) or one of its checkpoints.
      prompts: the texts to continue.
      max_new_tokens: longest continuation.
      temperature: 0 takes the likeliest token; above 0, tokens are sampled.
      seed: seed of the samples.
      stops: strings that end a continuation, and are not part of it.

    Returns:
      For each prompt its continuation: text, token ids and log-probabilities, without the prompt.

    Raises:
      UserError: there is no checkpoint, or a prompt is empty.
    """
    trained = Pretrained.open(checkpoint, "--checkpoint")
    config, tokenizer = trained.config, trained.tokenizer()
    mesh = sharding.mesh_of_run(**config.mesh)
    with jax.set_mesh(mesh):
        rows = max(1, min(len(prompts), config.eval.generate_batch))
        params = trained.load(mesh, "float32")
        generator = Generator(decoder.build(trained.model), params, tokenizer, rows)
        continuations = generator.run(
            deque(enumerate(prompts)), max_new_tokens=max_new_tokens, stops=stops, temperature=temperature, seed=seed
        )
        return sorted(continuations, key=lambda continuation: continuation.number)


def read_prompts(path: pathlib.Path) -> list[str]:
    """The prompts of a file: each line of a text file, or the key "prompt" of each record of a JSON lines file.

    Raises:
      UserError: the file is missing or holds no prompt, or a record is bad (with file and line).
    """
    prompts: list[str] = []
    for file in records.expand([str(path)]):
        for line, raw, _ in records.read(file):
            try:
                text = records.document(records.parse(file, raw), ["{prompt}"])
            except records.BadRecord as error:
                raise UserError(f"{file}:{line}: {error}") from None
            prompts += [text] if records.file_format(file) != "text" else filter(None, text.split("\n"))
    if not prompts:
        raise UserError(f"{path}: no prompts")
    return prompts


def main() -> None:
    """The command: parses the flags and calls `generate_text`."""
    path = flags.DEFINE_string("checkpoint", None, "A run directory or one of its checkpoints.", required=True)
    prompt = flags.DEFINE_multi_string("prompt", [], "Text to continue. May be given several times.")
    file = flags.DEFINE_string("prompts", None, 'JSON lines with the key "prompt", or text with one prompt a line.')
    output = flags.DEFINE_string("output", None, "JSON lines file to write. By default, texts are printed.")
    max_new_tokens = flags.DEFINE_integer("max_new_tokens", 256, "Longest continuation.", lower_bound=1)
    temperature = flags.DEFINE_float("temperature", 0.0, "0: the likeliest token; above 0: sample.", lower_bound=0.0)
    seed = flags.DEFINE_integer("seed", 0, "Seed of the samples.")
    stop = flags.DEFINE_multi_string("stop", [], r"String that ends a continuation; '\n' is a line break. Repeatable.")

    def command() -> None:
        output_path = local_path(output.value, "--output") if output.value else None
        prompts = prompt.value + (read_prompts(local_path(file.value, "--prompts")) if file.value else [])
        if not prompts:
            raise UserError("nothing to continue: give --prompt=TEXT or --prompts=FILE")
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens.value,
            "temperature": temperature.value,
            "seed": seed.value,
        }
        stops = [text.replace("\\n", "\n") for text in stop.value]
        continuations = generate_text(path.value, prompts, **options, stops=stops)
        if output_path:
            items = [
                {"prompt": prompt, "continuation": text, "token_ids": list(token_ids), "logprobs": list(logprobs)}
                for prompt, (_, text, token_ids, logprobs) in zip(prompts, continuations)
            ]
            write_text(output_path, json_lines(items))
        else:
            print("\n\n".join(prompt + text for prompt, (_, text, *_) in zip(prompts, continuations)))

    run(command)


if __name__ == "__main__":
    main()
