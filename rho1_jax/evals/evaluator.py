"""Held-out loss and answer accuracy of a model, during training and after it."""

import contextlib
import itertools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from rho1_jax.config import parse_named
from rho1_jax.data.loader import eval_batches, to_devices
from rho1_jax.data.packing import Batch
from rho1_jax.data.store import Store
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.distributed import is_first
from rho1_jax.errors import UserError
from rho1_jax.evals.answers import (
    AnswerConfig,
    accuracy,
    answer_all,
    read_items_done,
    read_questions,
    task_questions,
)
from rho1_jax.evals.grading import Grader
from rho1_jax.files import write_text
from rho1_jax.metrics import Progress
from rho1_jax.model import Params
from rho1_jax.sharding import local_rows, replicated
from rho1_jax.train_step import make_token_losses


class Evaluator:
    """All evaluations that a config names, opened and checked once."""

    def __init__(self, config: ml_collections.ConfigDict, graphdef: nnx.GraphDef, tokenizer: Tokenizer, mesh: Mesh):
        """Raises UserError where a data set or question file is missing, bad, or of another tokenizer."""
        self._graphdef, self._tokenizer, self._mesh = graphdef, tokenizer, mesh
        self._batch_size, self._max_rows = config.batch_size // config.microbatches, config.eval.rows
        settings = {name: config.eval[name] for name in AnswerConfig.__dataclass_fields__}
        self._answers = AnswerConfig(**settings | {"stops": tuple(config.eval.stops)})
        self._rows = {}
        for name, path in parse_named(config.eval.data, "config.eval.data").items():
            store = Store(path)
            if store.tokenizer_fingerprint != tokenizer.fingerprint:
                raise UserError(f"config.eval.data: {path} was prepared with another tokenizer than the training data")
            self._rows[name] = store.rows("eval")
        self.questions = {
            name: read_questions(path, self._answers)
            for name, path in parse_named(config.eval.questions, "config.eval.questions").items()
        }
        exemplars, grader = parse_named(config.eval.exemplars, "config.eval.exemplars"), Grader()
        self.tasks = [name for name in config.eval.tasks.split(",") if name]
        for name in self.tasks:
            self.questions[name] = task_questions(
                name,
                config.eval.data_dir,
                config.eval.task_items,
                exemplars.get(name),
                self._answers.tool_use,
                grader,
            )
        self._sums = _make_loss_sums(graphdef, config.data.document_mask, mesh)

    def __call__(self, params: Params) -> dict[str, float]:
        """{"eval/NAME/loss": nats a token, "eval/NAME/accuracy": share of right answers}."""
        accuracies = {f"eval/{name}/accuracy": accuracy(self.answers(params, name)) for name in self.questions}
        return self.losses(params) | accuracies

    def losses(self, params: Params) -> dict[str, float]:
        """{"eval/NAME/loss": mean over the eligible tokens of the split "eval", in nats}."""
        return {f"eval/{name}/loss": self._loss(params, name) for name in self._rows}

    def answers(
        self,
        params: Params,
        name: str,
        temperature: float = 0.0,
        seed: int = 0,
        file: pathlib.Path | None = None,
    ) -> list[dict[str, Any]]:
        """The graded items of a question file or task, as `answer_all` yields them.

        With a file, they are written there as they come, and those that it holds are not answered again.
        """
        questions = self.questions[name]
        items = read_items_done(file, questions, self._answers.generate_batch) if file else []
        total = len(questions.items)
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(Progress(name, total, "questions", initial=len(items), leave=False))
            lines = None
            if file is not None and is_first():
                write_text(file, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
                lines = stack.enter_context(file.open("a", encoding="utf-8"))
            for item in answer_all(
                self._graphdef,
                params,
                self._tokenizer,
                questions,
                self._answers,
                first=len(items),
                temperature=temperature,
                seed=seed,
            ):
                items.append(item)
                if lines:
                    lines.write(json.dumps(item, ensure_ascii=False) + "\n")
                    lines.flush()
                progress.advance(1)
        return items

    def _loss(self, params: Params, name: str) -> float:
        rows = self._rows[name]
        steps = math.ceil(min(self._max_rows, len(rows)) / self._batch_size)
        batches = itertools.islice(
            eval_batches(rows, self._batch_size, local_rows(self._mesh, self._batch_size)), steps
        )
        total = count = 0.0
        with Progress(name, steps, unit="batches", leave=False) as progress:
            for batch in batches:
                loss_sum, eligible = self._sums(params, to_devices(batch, self._mesh, self._batch_size))
                total, count = total + float(loss_sum), count + float(eligible)
                progress.advance(1)
        return total / count


def _make_loss_sums(graphdef: nnx.GraphDef, document_mask: bool, mesh: Mesh) -> Callable:
    token_losses = make_token_losses(graphdef, document_mask)

    def loss_sums(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        loss_BL, eligible_BL = token_losses(params, batch)
        return jnp.where(eligible_BL, loss_BL, 0).sum(), eligible_BL.sum()

    return jax.jit(loss_sums, out_shardings=replicated(mesh))
