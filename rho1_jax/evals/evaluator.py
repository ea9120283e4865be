"""Measure a model's held-out loss and answer accuracy, during training or afterwards."""

import contextlib
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from rho1_jax.configs.default import EvalConfig
from rho1_jax.data.loader import eval_batches, to_devices
from rho1_jax.data.packing import Batch
from rho1_jax.data.store import Store
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.evals.answers import (
    GradedItem,
    Questions,
    accuracy,
    answer_all,
    read_answered,
    read_questions,
    task_questions,
)
from rho1_jax.evals.grading import Grader
from rho1_jax.evals.tasks import TASKS
from rho1_jax.models.decoder import Params
from rho1_jax.models.forward import make_token_losses
from rho1_jax.models.generation import Generator
from rho1_jax.runtime import stopping
from rho1_jax.runtime.command_line import parse_named
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import json_lines, write_text
from rho1_jax.runtime.processes import is_first
from rho1_jax.runtime.progress import Progress
from rho1_jax.runtime.sharding import even_rows, local_rows, replicated


class Evaluator:
    """All evaluations that a config names. Their inputs are opened and checked once."""

    def __init__(self, config: ml_collections.ConfigDict, graphdef: nnx.GraphDef, tokenizer: Tokenizer, mesh: Mesh):
        """Raises UserError if a data set or question file is missing, bad or empty, or made with another tokenizer."""
        self._graphdef, self._tokenizer, self._mesh = graphdef, tokenizer, mesh
        self._batch_size = even_rows(config.batch_size // config.microbatches)
        self._settings = settings = EvalConfig(**config.eval.to_dict() | {"stops": tuple(config.eval.stops)})
        if "" in settings.stops:
            raise UserError("config.eval.stops: an empty string would end every generation at once; remove it")
        if settings.tool_use and jax.process_count() > 1:
            raise UserError(
                "config.eval.tool_use runs programs on one host only: evaluate there, without --distributed"
            )
        self._rows = {}
        for name, path in parse_named(settings.data, "config.eval.data").items():
            store = Store(path)
            if not store.has_tokenizer(tokenizer.path, tokenizer.fingerprint):
                raise UserError(
                    f"config.eval.data: {path} was prepared with a different tokenizer than the training data; "
                    "prepare it with the same one"
                )
            self._rows[name] = store.rows("eval")
        self.questions = {
            name: read_questions(path, settings)
            for name, path in parse_named(settings.questions, "config.eval.questions").items()
        }
        exemplars, grader = parse_named(settings.exemplars, "config.eval.exemplars"), Grader()
        self.tasks = [name for name in settings.tasks.split(",") if name]
        unknown = exemplars.keys() - TASKS.keys()
        if unknown:
            raise UserError(f"config.eval.exemplars: {min(unknown)!r} is not a task; use {', '.join(TASKS)}")
        for name in self.tasks:
            if name in self.questions:
                raise UserError(f"config.eval.tasks: two sets of questions are named {name!r}; rename or remove one")
            self.questions[name] = task_questions(
                name,
                settings.data_dir,
                settings.task_items,
                exemplars.get(name),
                settings.tool_use,
                grader,
            )
        self._sums = _make_loss_sums(graphdef, config.data.document_mask, mesh)

    def __call__(
        self, params: Params, temperature: float = 0.0, seed: int = 0, output: pathlib.Path | None = None
    ) -> dict[str, float]:
        """Runs every evaluation.

        Args:
          params: the model's parameters.
          temperature: sampling temperature of the answers; 0: greedy decoding.
          seed: seed for sampling.
          output: folder for the graded items, one file NAME.jsonl for each set of questions. Each item is written as
            soon as it is graded, and items that are already in the file are not answered again.

        Returns:
          {"eval/NAME/loss": nats per token, "eval/NAME/accuracy": fraction of right answers}.

        Raises:
          Stopped: the process was asked to stop.
        """
        metrics = {f"eval/{name}/loss": self._loss(params, name) for name in self._rows}
        if self.questions:
            generator = Generator(self._graphdef, params, self._tokenizer, self._settings.generate_batch)
            for name, questions in self.questions.items():
                file = output / f"{name}.jsonl" if output else None
                items = self._answer(generator, name, questions, temperature, seed, file)
                metrics[f"eval/{name}/accuracy"] = accuracy(items)
        return metrics

    def _answer(
        self,
        generator: Generator,
        name: str,
        questions: Questions,
        temperature: float,
        seed: int,
        file: pathlib.Path | None,
    ) -> list[GradedItem]:
        """The graded items that `answer_all` yields, sorted by question."""
        items = read_answered(file, questions) if file else []
        answered = {item.index for item in items}
        with contextlib.ExitStack() as stack:
            total = len(questions.items)
            progress = stack.enter_context(Progress(name, total, "questions", initial=len(items), leave=False))
            lines = None
            if file is not None and is_first():
                write_text(file, _lines(items))
                lines = stack.enter_context(file.open("a", encoding="utf-8"))
            new_tokens = 0
            kept = f"{file} keeps the items answered so far" if file else "without --output, no items are kept"

            def show_tokens(count: int) -> None:
                nonlocal new_tokens
                stopping.check(f"stopped in {name}; {kept}")
                new_tokens += count
                progress.advance(0, f"{new_tokens:,} tokens")

            options = {"temperature": temperature, "seed": seed, "on_tokens": show_tokens}
            answers = answer_all(generator, questions, self._settings, answered=answered, **options)
            for item in stack.enter_context(contextlib.closing(answers)):
                items.append(item)
                if lines:
                    lines.write(_lines([item]))
                    lines.flush()
                progress.advance(1, f"{new_tokens:,} tokens")
        items.sort(key=lambda item: item.index)
        if file is not None and is_first():
            write_text(file, _lines(items))
        return items

    def _loss(self, params: Params, name: str) -> float:
        """The mean loss over eligible targets, in nats per token."""
        rows = self._rows[name]
        steps = math.ceil(min(self._settings.rows, len(rows)) / self._batch_size)
        batches = itertools.islice(
            eval_batches(rows, self._batch_size, local_rows(self._mesh, self._batch_size)), steps
        )
        total = count = 0.0
        with Progress(name, steps, unit="batches", leave=False) as progress:
            for batch in batches:
                stopping.check(f"stopped in {name}; its loss is not known yet")
                loss_sum, eligible = self._sums(params, to_devices(batch, self._mesh, self._batch_size))
                total, count = total + float(loss_sum), count + float(eligible)
                progress.advance(1)
        return total / count


def _lines(items: list[GradedItem]) -> str:
    return json_lines(map(dataclasses.asdict, items))


def _make_loss_sums(graphdef: nnx.GraphDef, document_mask: bool, mesh: Mesh) -> Callable:
    token_losses = make_token_losses(graphdef, document_mask)

    def loss_sums(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        loss_BL, eligible_BL = token_losses(params, batch)
        return jnp.where(eligible_BL, loss_BL, 0).sum(), eligible_BL.sum()

    return jax.jit(loss_sums, out_shardings=replicated(mesh))
