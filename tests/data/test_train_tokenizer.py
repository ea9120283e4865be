"""The same text gives the same tokenizer in every process."""

import random

import numpy as np
import pytest
from helpers import run_command, write_jsonl

from rho1_jax.runtime.errors import UserError
from rho1_jax.train_tokenizer import sample, train_tokenizer


@pytest.fixture(scope="module")
def many_lines(tmp_path_factory):
    """More lines than the sample, each of its own words."""
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefghijklm", k=generator.randint(2, 9))) for _ in range(500)]
    texts = [" ".join(generator.choices(words, k=12)) for _ in range(2000)]
    return write_jsonl(tmp_path_factory.mktemp("lines") / "lines.jsonl", texts)


def test_two_processes_train_the_same_model(many_lines, tmp_path):
    models = []
    for number in range(2):
        path = tmp_path / f"{number}.model"
        flags = [f"--input={many_lines}", f"--output={path}", "--vocab_size=400", "--max_sentences=200"]
        done = run_command("rho1_jax.train_tokenizer", *flags)
        assert done.returncode == 0, done.stderr
        models.append(path.read_bytes())
    assert models[0] == models[1]


def test_a_sample_is_uniform_and_always_the_same():
    assert sample(map(str, range(10)), 20) == [str(i) for i in range(10)]
    assert sample(map(str, range(50)), 5) == sample(map(str, range(50)), 5)
    drawn = np.array(sample(map(str, range(100_000)), 10_000)).astype(int)
    assert len(set(drawn)) == 10_000
    np.testing.assert_allclose(np.histogram(drawn, 10, (0, 100_000))[0], 1000, atol=100)


def test_text_too_short_for_the_vocabulary_is_refused(many_lines, tmp_path):
    with pytest.raises(UserError, match="--vocab_size=90000 does not fit this text: "):
        train_tokenizer([many_lines], tmp_path / "x.model", 90_000, ["{text}"], 10)
    assert not list(tmp_path.iterdir())
